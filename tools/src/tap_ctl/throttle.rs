//! `throttle`.

use std::io::{self, Write};

use clap::Args;
use tapdisk::config::Size;
use tapdisk::control::proto::{ThrottleChange, throttle};
use tapdisk::disk::{LimitReport, ThrottleReport};

use super::Which;
use super::show::{parse, verbatim};

/// What `throttle` sets.
#[derive(Debug, Args)]
pub struct Throttle {
    /// Which disk
    #[command(flatten)]
    pub disk: Which,
    /// Bytes of reads a second, such as "100 MiB"
    #[arg(long, value_name = "SIZE")]
    pub read_bytes: Option<Size>,
    /// Bytes of reads that pass at once after a pause
    #[arg(long, value_name = "SIZE")]
    pub read_bytes_burst: Option<Size>,
    /// Reads a second
    #[arg(long, value_name = "COUNT")]
    pub read_requests: Option<u64>,
    /// Reads that pass at once after a pause
    #[arg(long, value_name = "COUNT")]
    pub read_requests_burst: Option<u64>,
    /// Bytes of writes a second; those of write-zeroes too
    #[arg(long, value_name = "SIZE")]
    pub write_bytes: Option<Size>,
    /// Bytes of writes that pass at once after a pause
    #[arg(long, value_name = "SIZE")]
    pub write_bytes_burst: Option<Size>,
    /// Writes a second; write-zeroes and discards too
    #[arg(long, value_name = "COUNT")]
    pub write_requests: Option<u64>,
    /// Writes that pass at once after a pause
    #[arg(long, value_name = "COUNT")]
    pub write_requests_burst: Option<u64>,
    /// Bytes of reads and writes together a second
    #[arg(long, value_name = "SIZE")]
    pub bytes: Option<Size>,
    /// Bytes of both that pass at once after a pause
    #[arg(long, value_name = "SIZE")]
    pub bytes_burst: Option<Size>,
    /// Reads and writes together a second
    #[arg(long, value_name = "COUNT")]
    pub requests: Option<u64>,
    /// Requests of both that pass at once after a pause
    #[arg(long, value_name = "COUNT")]
    pub requests_burst: Option<u64>,
    /// Takes all limits off, but for those that are given
    #[arg(long)]
    pub off: bool,
}

impl Throttle {
    /// What is given is to be changed.
    pub(super) fn change(&self) -> ThrottleChange {
        let size = |size: Option<Size>| size.map(|size| size.0);
        let given = [
            size(self.read_bytes),
            size(self.read_bytes_burst),
            self.read_requests,
            self.read_requests_burst,
            size(self.write_bytes),
            size(self.write_bytes_burst),
            self.write_requests,
            self.write_requests_burst,
            size(self.bytes),
            size(self.bytes_burst),
            self.requests,
            self.requests_burst,
        ];
        let flags = (0..).zip(given).filter(|(_, value)| value.is_some()).map(|(index, _): (u32, _)| 1 << index);
        let off = if self.off { throttle::OFF } else { 0 };
        ThrottleChange::new(flags.fold(off, std::ops::BitOr::bitor), given.map(Option::unwrap_or_default))
    }
}

/// The limits in force.
pub(super) fn show(out: &mut impl Write, text: &str, json: bool) -> io::Result<()> {
    if json {
        return verbatim(out, text, json);
    }
    let report: ThrottleReport = parse(text)?;
    for (of, limit) in [("read", report.read), ("write", report.write), ("all", report.all)] {
        let LimitReport { bytes_per_s, bytes_burst, requests_per_s, requests_burst } = limit;
        let limits = [(bytes_per_s, bytes_burst, "bytes"), (requests_per_s, requests_burst, "requests")];
        let limits = limits.into_iter().filter_map(|(rate, burst, unit)| {
            let (rate, burst) = (rate?, burst?);
            Some(format!("{rate} {unit}/s (burst {burst})"))
        });
        let limits = limits.collect::<Vec<_>>().join(", ");
        writeln!(out, "{of}: {}", if limits.is_empty() { "no limit" } else { &limits })?;
    }
    let (seconds, ms) = (report.held_us / 1_000_000, report.held_us / 1000 % 1000);
    writeln!(out, "held: {} now, {} before, for {seconds}.{ms:03} s", report.held, report.held_before)
}
