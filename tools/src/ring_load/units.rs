//! Sizes and times as people write them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Bytes, from `4096`, `4k`, `4K`, `4KiB`, `1M`, `2G` or `1T`.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| format!("'{text}' is no size: 512, 4k, 1M, 2G"))?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(format!("'{unit}' is no unit: k, M, G, T")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is too large"))
}

/// A time, from `10s`, `10`, `500ms`, `2m` or `1h`.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| format!("'{text}' is no time: 10s, 500ms, 2m, 1h"))?;
    let seconds = match unit {
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("'{unit}' is no unit of time: ms, s, m, h")),
    };
    Duration::try_from_secs_f64(number * seconds).map_err(|_| format!("'{text}' is too long"))
}

/// The sizes that requests may have, in bytes, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SizeRange {
    /// The smallest.
    pub min: u32,
    /// The largest.
    pub max: u32,
}

impl FromStr for SizeRange {
    type Err = String;

    fn from_str(text: &str) -> Result<SizeRange, String> {
        let (min, max) = text.split_once('-').unwrap_or((text, text));
        let size = |text| u32::try_from(parse_size(text)?).map_err(|_| format!("'{text}' is too large"));
        let range = SizeRange { min: size(min)?, max: size(max)? };
        match range {
            SizeRange { min: 0, .. } => Err("a request can't be empty".into()),
            SizeRange { min, max } if min > max => Err(format!("'{text}' has its larger end first")),
            _ => Ok(range),
        }
    }
}

impl fmt::Display for SizeRange {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        if self.min == self.max { write!(to, "{}", self.min) } else { write!(to, "{}-{}", self.min, self.max) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("512", 512), ("0", 0), ("4k", 4096), ("4K", 4096), ("1M", 1 << 20), ("3GiB", 3 << 30), ("2T", 2 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "k", "4x", "-1", "1.5k", "4 k", "99999999999T", "4kk"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times() {
        for (text, millis) in [("10s", 10_000), ("2", 2000), ("500ms", 500), ("1.5m", 90_000), ("1h", 3_600_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "s", "10x", "-1s", "1..2s"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ranges() {
        assert_eq!("4k".parse(), Ok(SizeRange { min: 4096, max: 4096 }));
        assert_eq!("512-64k".parse(), Ok(SizeRange { min: 512, max: 65536 }));
        for text in ["0", "0-4k", "8k-4k", "4k-", "-4k", "8G"] {
            assert!(text.parse::<SizeRange>().is_err(), "{text}");
        }
    }
}
