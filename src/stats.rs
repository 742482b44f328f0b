//! What is counted: requests, sectors, errors and latencies by operation.

use std::sync::OnceLock;
use std::time::Instant;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::request::Op;

/// Nanoseconds since the process began to count.
pub fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// Latencies that are told apart, in µs: one minute, beyond which all count as that.
const LATENCY_US_MAX: u64 = 60_000_000;

/// Counters of one kind of operation.
#[derive(Debug)]
struct Kind {
    completed: u64,
    sectors: u64,
    errors: u64,
    latency_us: Histogram<u64>,
}

/// Counters of a disk.
#[derive(Debug)]
pub struct Stats {
    kinds: Vec<Kind>,
}

/// Counters of one operation, as they are shown.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct OpReport {
    /// The operation's name.
    pub op: String,
    /// Requests that were answered, with or without error.
    pub completed: u64,
    /// 512-byte sectors of those without error.
    pub sectors: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Mean latency, µs.
    pub mean_us: u64,
    /// Median latency, µs, to two digits.
    pub p50_us: u64,
    /// 99th percentile, µs.
    pub p99_us: u64,
    /// 99.9th percentile, µs.
    pub p999_us: u64,
    /// Slowest, µs.
    pub max_us: u64,
}

impl Default for Stats {
    fn default() -> Stats {
        let kind = || Kind {
            completed: 0,
            sectors: 0,
            errors: 0,
            latency_us: Histogram::new_with_bounds(1, LATENCY_US_MAX, 2).expect("the bounds are valid"),
        };
        Stats { kinds: std::iter::repeat_with(kind).take(Op::KINDS.len()).collect() }
    }
}

impl Stats {
    /// Counts a request that is answered, `latency` in ns.
    pub fn record(&mut self, op: Op, bytes: u64, ok: bool, latency: u64) {
        let kind = &mut self.kinds[op.kind()];
        kind.completed += 1;
        kind.latency_us.saturating_record(latency / 1000);
        if ok {
            kind.sectors += bytes / drivers::SECTOR_SIZE;
        } else {
            kind.errors += 1;
        }
    }

    /// Memory of the counters, bytes.
    pub fn bytes(&self) -> usize {
        self.kinds.iter().map(|kind| size_of::<Kind>() + kind.latency_us.distinct_values() * size_of::<u64>()).sum()
    }

    /// Of all operations that occurred.
    pub fn report(&self) -> Vec<OpReport> {
        let shown = Op::KINDS.iter().zip(&self.kinds).filter(|(_, kind)| kind.completed > 0);
        shown
            .map(|(op, kind)| OpReport {
                op: (*op).to_owned(),
                completed: kind.completed,
                sectors: kind.sectors,
                errors: kind.errors,
                mean_us: kind.latency_us.mean() as u64,
                p50_us: kind.latency_us.value_at_quantile(0.5),
                p99_us: kind.latency_us.value_at_quantile(0.99),
                p999_us: kind.latency_us.value_at_quantile(0.999),
                max_us: kind.latency_us.max(),
            })
            .collect()
    }

    /// 512-byte sectors read and written.
    pub fn sectors(&self) -> [u64; 2] {
        let of = |op: Op| self.kinds[op.kind()].sectors;
        [of(Op::Read), of(Op::Write { fua: false }) + of(Op::Barrier)]
    }

    /// Requests that changed or read the image and failed: reads, and everything else.
    pub fn failed(&self) -> [u64; 2] {
        let all: u64 = self.kinds.iter().map(|kind| kind.errors).sum();
        let reads = self.kinds[Op::Read.kind()].errors;
        [reads, all - reads]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_succeeded_counts_as_sectors() {
        let mut stats = Stats::default();
        stats.record(Op::Read, 4096, true, 50_000);
        stats.record(Op::Read, 4096, false, 150_000_000_000);
        stats.record(Op::Barrier, 512, true, 0);
        assert_eq!((stats.sectors(), stats.failed()), ([8, 1], [1, 0]));
        let report = &stats.report()[0];
        assert_eq!((report.op.as_str(), report.completed, report.errors, report.p50_us), ("read", 2, 1, 50));
        assert!(report.max_us >= LATENCY_US_MAX);
    }
}
