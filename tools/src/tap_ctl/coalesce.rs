//! `coalesce`: starts, shows, waits for and ends the merge of an image into its parent.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use tapdisk::control::client::{self, refused};
use tapdisk::control::proto::coalesce::{CANCEL, START};
use tapdisk::disk::{CoalesceReport, Stage};
use tapdisk::text::one_line;

use super::show::parse;
use super::{Coalesce, Disk};

/// How often it is asked how far it is.
const EACH: Duration = Duration::from_millis(100);

/// Does what the options say, and prints how far it is.
pub(super) fn coalesce(
    out: &mut impl Write,
    directory: &Path,
    disk: Disk,
    args: &Coalesce,
    json: bool,
) -> io::Result<()> {
    let flags = match args {
        Coalesce { cancel: true, .. } => CANCEL,
        Coalesce { show: true, .. } => 0,
        _ => START,
    };
    // The tapdisk may be in another folder.
    let image = args.image.as_ref().map(|image| image.canonicalize().unwrap_or_else(|_| image.clone()));
    let image = image.map(|image| image.to_string_lossy().into_owned()).unwrap_or_default();
    let rate = args.rate.map_or(0, |rate| rate.0);
    let ask = |flags| client::coalesce(directory, disk.pid, disk.minor, flags, rate, &image);
    let mut text = ask(flags)?;
    let mut report: CoalesceReport = parse(&text)?;
    if args.wait {
        let bar = io::stderr().is_terminal();
        while matches!(report.stage, Stage::Merging | Stage::Relinking) {
            if bar {
                eprint!("\r{:3} %", report.percent);
            }
            std::thread::sleep(EACH);
            text = ask(0)?;
            report = parse(&text)?;
        }
        if bar {
            eprintln!("\r{:3} %", report.percent);
        }
    }
    let failed = args.wait && report.stage == Stage::Failed;
    if !json {
        show(out, &report)?;
    } else if !failed {
        // Otherwise the error is the one value.
        writeln!(out, "{text}")?;
    }
    if failed {
        return Err(refused(Errno::EIO, report.error.unwrap_or_else(|| "it failed".into())));
    }
    Ok(())
}

/// A line about it.
pub(super) fn show(out: &mut impl Write, report: &CoalesceReport) -> io::Result<()> {
    let CoalesceReport { stage, image, parent, percent, bytes, error } = report;
    let stage = format!("{stage:?}").to_lowercase();
    if image.is_empty() {
        return writeln!(out, "{stage}");
    }
    let error = error.as_ref().map_or(String::new(), |error| format!(" ({error})"));
    let what = format!("{image} into {parent}{error}");
    writeln!(out, "{stage} {percent} % {bytes} bytes: {}", one_line(&what))
}
