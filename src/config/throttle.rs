//! `[throttle]`.
#![warn(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use std::num::NonZeroU64;

use drivers::throttle::{Limit, Limits, Traffic as Passes};
use serde::{Deserialize, Deserializer, Serialize};

use super::Size;
use super::units::in_range;

/// The least and the most of rates and bursts, bytes.
const BYTES: (u64, u64) = (512, 1 << 40);
/// The least and the most of rates and bursts, requests.
const REQUESTS: (u64, u64) = (1, 1_000_000_000);
/// A burst is what the rate gives in a second divided by this, at least: a tapdisk that wakes up late would not reach the rate with less.
const BURST_DIVISOR: u64 = 50;

/// `[throttle]`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Throttle {
    /// Of reads.
    #[serde(skip_serializing_if = "Traffic::is_none")]
    pub read: Traffic,
    /// Of writes and all that changes the disk.
    #[serde(skip_serializing_if = "Traffic::is_none")]
    pub write: Traffic,
    /// Of both together.
    #[serde(skip_serializing_if = "Traffic::is_none")]
    pub all: Traffic,
}

/// `[throttle.read]`, `[throttle.write]`, `[throttle.all]`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Traffic {
    /// Bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<Size>,
    /// Bytes that pass at once after a time without requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_burst: Option<Size>,
    /// Requests a second.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "count")]
    pub requests_per_s: Option<u64>,
    /// Requests that pass at once after a time without any.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "count")]
    pub requests_burst: Option<u64>,
}

fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    in_range::<0, { i64::MAX }, _, _>(deserializer).map(Some)
}

impl From<Passes> for Traffic {
    fn from(passes: Passes) -> Traffic {
        let rate = |limit: Option<Limit>| limit.map(|limit| limit.rate.get());
        let burst = |limit: Option<Limit>| limit.and_then(|limit| limit.burst).map(NonZeroU64::get);
        Traffic {
            bytes_per_s: rate(passes.bytes).map(Size),
            bytes_burst: burst(passes.bytes).map(Size),
            requests_per_s: rate(passes.requests),
            requests_burst: burst(passes.requests),
        }
    }
}

impl From<Limits> for Throttle {
    fn from(limits: Limits) -> Throttle {
        Throttle { read: limits.read.into(), write: limits.write.into(), all: limits.all.into() }
    }
}

impl Traffic {
    fn is_none(&self) -> bool {
        *self == Traffic::default()
    }

    fn passes(self) -> Passes {
        Passes {
            bytes: limit(self.bytes_per_s.map(|size| size.0), self.bytes_burst.map(|size| size.0)),
            requests: limit(self.requests_per_s, self.requests_burst),
        }
    }
}

fn limit(rate: Option<u64>, burst: Option<u64>) -> Option<Limit> {
    Some(Limit { rate: NonZeroU64::new(rate?)?, burst: burst.and_then(NonZeroU64::new) })
}

impl Throttle {
    /// The keys, in the order of [`values`](Self::values).
    pub const KEYS: [&str; 12] = [
        "throttle.read.bytes_per_s",
        "throttle.read.bytes_burst",
        "throttle.read.requests_per_s",
        "throttle.read.requests_burst",
        "throttle.write.bytes_per_s",
        "throttle.write.bytes_burst",
        "throttle.write.requests_per_s",
        "throttle.write.requests_burst",
        "throttle.all.bytes_per_s",
        "throttle.all.bytes_burst",
        "throttle.all.requests_per_s",
        "throttle.all.requests_burst",
    ];

    /// The value of each key.
    pub fn values(&self) -> [Option<u64>; Throttle::KEYS.len()] {
        let Throttle { read, write, all } = self;
        let bytes = |size: Option<Size>| size.map(|size| size.0);
        let of = |t: &Traffic| [bytes(t.bytes_per_s), bytes(t.bytes_burst), t.requests_per_s, t.requests_burst];
        let ([a, b, c, d], [e, f, g, h], [i, j, k, l]) = (of(read), of(write), of(all));
        [a, b, c, d, e, f, g, h, i, j, k, l]
    }

    /// Sets a key. None: as if it were left out.
    pub fn set(&mut self, key: usize, value: Option<u64>) {
        let traffic = [&mut self.read, &mut self.write, &mut self.all].into_iter().nth(key / 4);
        let Some(traffic) = traffic else { return };
        match key % 4 {
            0 => traffic.bytes_per_s = value.map(Size),
            1 => traffic.bytes_burst = value.map(Size),
            2 => traffic.requests_per_s = value,
            _ => traffic.requests_burst = value,
        }
    }

    /// Whether there is no limit.
    pub fn is_none(&self) -> bool {
        *self == Throttle::default()
    }

    /// Gives the first key that makes no sense, and what is wrong.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let values = self.values();
        let (values, _) = values.as_chunks::<2>();
        let (keys, _) = Throttle::KEYS.as_chunks::<2>();
        for ((index, [rate, burst]), [rate_key, burst_key]) in values.iter().enumerate().zip(keys) {
            let of_bytes = index.is_multiple_of(2);
            let (least, most) = if of_bytes { BYTES } else { REQUESTS };
            let shown = |value: u64| if of_bytes { format!("\"{}\"", Size(value)) } else { value.to_string() };
            let Some(rate) = *rate else {
                if burst.is_some() {
                    return Err((burst_key, format!("a burst needs a rate: set {rate_key} too, or leave both out")));
                }
                continue;
            };
            if !(least..=most).contains(&rate) {
                let (least, most) = (shown(least), shown(most));
                return Err((rate_key, format!("expected from {least} to {most} a second; no limit: leave it out")));
            }
            let least = least.max(rate.div_ceil(BURST_DIVISOR));
            if burst.is_some_and(|burst| !(least..=most).contains(&burst)) {
                let (least, most) = (shown(least), shown(most));
                return Err((
                    burst_key,
                    format!(
                        "expected from {least}, a fiftieth of a second's, without which the rate is not reached, to {most}; a tenth of a \
                         second's: leave it out"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// As the filter takes them.
    pub fn limits(&self) -> Limits {
        Limits { read: self.read.passes(), write: self.write.passes(), all: self.all.passes() }
    }
}
