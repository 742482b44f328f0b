//! How long things took, in a few fixed counters: a histogram whose bounds are powers of two.

use serde::{Deserialize, Serialize};

/// Buckets: up to 1 µs, up to 2 µs, and so on to 2^26 µs, which is 67 s; the last is for what took longer.
pub const BUCKETS: usize = 28;

/// A histogram of latencies. It takes 232 bytes, whatever it counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    buckets: [u64; BUCKETS],
    sum_ns: u64,
}

impl Latency {
    /// Counts one that took `ns`.
    pub fn record(&mut self, ns: u64) {
        // Bounds belong to the bucket below them.
        let us = ns.div_ceil(1000);
        let bucket = if us <= 1 { 0 } else { 64 - (us - 1).leading_zeros() as usize };
        self.buckets[bucket.min(BUCKETS - 1)] += 1;
        self.sum_ns = self.sum_ns.saturating_add(ns);
    }

    /// The longest that `bucket` counts, µs; none for the last.
    pub fn bound_us(bucket: usize) -> Option<u64> {
        (bucket < BUCKETS - 1).then(|| 1 << bucket)
    }

    /// How many there are in each bucket.
    pub fn buckets(&self) -> &[u64; BUCKETS] {
        &self.buckets
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        // What another process says may be anything.
        self.buckets.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// How long all of them took, ns.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// How many came after `earlier` was what this is now, and how long they took on average, µs; none if none came, or if
    /// counting began anew.
    pub fn since(&self, earlier: &Latency) -> Option<(u64, f64)> {
        let count = self.count().checked_sub(earlier.count()).filter(|count| *count > 0)?;
        let ns = self.sum_ns.checked_sub(earlier.sum_ns)?;
        Some((count, ns as f64 / count as f64 / 1000.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_is_in_the_bucket_whose_bound_it_does_not_exceed() {
        for (ns, bucket) in [
            (0, 0),
            (1000, 0),
            (1001, 1),
            (2000, 1),
            (2001, 2),
            (4000, 2),
            (1 << 20, 11),
            ((1 << 26) * 1000, 26),
            ((1 << 26) * 1000 + 1, 27),
            (u64::MAX, 27),
        ] {
            let mut latency = Latency::default();
            latency.record(ns);
            assert_eq!(latency.buckets().iter().position(|count| *count == 1), Some(bucket), "{ns} ns");
            assert_eq!((latency.count(), latency.sum_ns()), (1, ns));
            assert!(Latency::bound_us(bucket).is_none_or(|bound| ns <= bound * 1000), "{ns} ns");
        }
        assert_eq!((Latency::bound_us(26), Latency::bound_us(27)), (Some(67_108_864), None));
    }

    #[test]
    fn an_interval_is_what_came_between() {
        let mut latency = Latency::default();
        latency.record(7);
        let earlier = latency.clone();
        assert_eq!(latency.since(&earlier), None);
        latency.record(1000);
        latency.record(4000);
        assert_eq!(latency.since(&earlier), Some((2, 2.5)));
        assert_eq!(earlier.since(&latency), None, "counting began anew");
    }

    #[test]
    fn it_takes_what_it_says() {
        assert_eq!(size_of::<Latency>(), 232);
    }
}
