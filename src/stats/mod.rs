//! What is counted: requests, bytes, errors and latencies by operation.

pub mod latency;
pub mod shm;

use std::sync::OnceLock;
use std::time::Instant;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use self::latency::Latency;
use crate::request::Op;

/// Nanoseconds since the process began to count.
pub fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// Latencies that are told apart, in µs: one minute, beyond which all count as that.
const LATENCY_US_MAX: u64 = 60_000_000;

/// What one kind of operation has moved, and how long it took.
#[derive(Clone, Debug, Default)]
struct Counts {
    /// Of those without error.
    bytes: u64,
    errors: u64,
    latency: Latency,
}

/// The same of each kind of operation, of a disk's requests or of a file's transfers.
#[derive(Clone, Debug, Default)]
pub struct Traffic([Counts; Op::KINDS.len()]);

/// Counters of one kind of operation, as metrics show them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpTraffic {
    /// One of [`Op::KINDS`].
    pub op: String,
    /// Bytes of those without error.
    pub bytes: u64,
    /// Those with an error.
    pub errors: u64,
    /// How long all of them took; their number is in it.
    pub latency: Latency,
}

impl Traffic {
    /// Counts one of `kind`, an index of [`Op::KINDS`], that took `ns`.
    pub fn record(&mut self, kind: usize, bytes: u64, ok: bool, ns: u64) {
        let counts = &mut self.0[kind];
        counts.latency.record(ns);
        if ok {
            counts.bytes += bytes;
        } else {
            counts.errors += 1;
        }
    }

    /// Of all kinds, in the order of [`Op::KINDS`].
    pub fn report(&self) -> impl Iterator<Item = OpTraffic> {
        Op::KINDS.iter().zip(&self.0).map(|(op, counts)| OpTraffic {
            op: (*op).to_owned(),
            bytes: counts.bytes,
            errors: counts.errors,
            latency: counts.latency.clone(),
        })
    }
}

/// Counters of a disk's requests.
#[derive(Debug)]
pub struct Stats {
    traffic: Traffic,
    /// For percentiles, of each kind of operation.
    latency_us: Vec<Histogram<u64>>,
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
        let histogram = || Histogram::new_with_bounds(1, LATENCY_US_MAX, 2).expect("the bounds are valid");
        let latency_us = std::iter::repeat_with(histogram).take(Op::KINDS.len()).collect();
        Stats { traffic: Traffic::default(), latency_us }
    }
}

impl Stats {
    /// Counts a request that is answered, `latency` in ns.
    pub fn record(&mut self, op: Op, bytes: u64, ok: bool, latency: u64) {
        self.traffic.record(op.kind(), bytes, ok, latency);
        self.latency_us[op.kind()].saturating_record(latency / 1000);
    }

    /// Memory of the counters, bytes.
    pub fn bytes(&self) -> usize {
        let counters: usize =
            self.latency_us.iter().map(|latency| latency.distinct_values() * size_of::<u64>()).sum();
        size_of::<Stats>() + self.latency_us.len() * size_of::<Histogram<u64>>() + counters
    }

    /// What was counted, for metrics.
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Of all operations that occurred.
    pub fn report(&self) -> Vec<OpReport> {
        let shown = self.traffic.report().zip(&self.latency_us).filter(|(_, latency_us)| !latency_us.is_empty());
        shown
            .map(|(of_op, latency_us)| OpReport {
                op: of_op.op,
                completed: latency_us.len(),
                sectors: of_op.bytes / drivers::SECTOR_SIZE,
                errors: of_op.errors,
                mean_us: latency_us.mean() as u64,
                p50_us: latency_us.value_at_quantile(0.5),
                p99_us: latency_us.value_at_quantile(0.99),
                p999_us: latency_us.value_at_quantile(0.999),
                max_us: latency_us.max(),
            })
            .collect()
    }

    /// 512-byte sectors read and written.
    pub fn sectors(&self) -> [u64; 2] {
        let of = |op: Op| self.traffic.0[op.kind()].bytes / drivers::SECTOR_SIZE;
        [of(Op::Read), of(Op::Write { fua: false }) + of(Op::Barrier)]
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
        assert_eq!(stats.sectors(), [8, 1]);
        let report = &stats.report()[0];
        assert_eq!((report.op.as_str(), report.completed, report.errors, report.p50_us), ("read", 2, 1, 50));
        assert!(report.max_us >= LATENCY_US_MAX);
    }
}
