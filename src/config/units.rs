//! Values with a range or a unit.
#![warn(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use std::fmt;
use std::str::FromStr;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes, written as an integer or as "512", "64 KiB", "1.5 GiB"; K, M, G and T are binary too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

const UNITS: [(&str, u32); 4] = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let wrong = || format!("\"{text}\" is no size; expected bytes, or such as \"64 KiB\", \"1.5 GiB\"");
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = (text[..end].trim(), text[end..].trim());
        let letter = unit.strip_suffix("iB").or(unit.strip_suffix('B')).unwrap_or(unit).to_ascii_uppercase();
        let shift = match letter.as_str() {
            "" if unit.is_empty() || unit == "B" => 0,
            letter => UNITS.iter().find(|(name, _)| *name == letter).ok_or_else(wrong)?.1,
        };
        #[expect(clippy::cast_possible_truncation, reason = "it is less than 2^53")]
        let bytes = match number.parse::<u64>() {
            Ok(whole) => whole.checked_mul(1 << shift),
            Err(_) => {
                let bytes = number.parse::<f64>().map_err(|_| wrong())? * (1u64 << shift) as f64;
                (bytes.fract() == 0.0 && bytes < (1u64 << 53) as f64).then_some(bytes as u64)
            }
        };
        bytes.map(Size).ok_or_else(wrong)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match UNITS.iter().find(|(_, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift)) {
            Some((unit, shift)) => write!(f, "{} {unit}iB", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a number of bytes, or a size such as \"64 KiB\"")
            }
            fn visit_i64<E: Error>(self, value: i64) -> Result<Size, E> {
                u64::try_from(value).map(Size).map_err(|_| E::invalid_value(Unexpected::Signed(value), &self))
            }
            fn visit_str<E: Error>(self, value: &str) -> Result<Size, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Bytes)
    }
}

/// An integer from `MIN` to `MAX`.
pub(super) fn in_range<'de, const MIN: i64, const MAX: i64, T: TryFrom<i64>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    struct Range<const MIN: i64, const MAX: i64>;
    impl<const MIN: i64, const MAX: i64> Visitor<'_> for Range<MIN, MAX> {
        type Value = i64;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            write!(f, "an integer from {MIN} to {MAX}")
        }
        fn visit_i64<E: Error>(self, value: i64) -> Result<i64, E> {
            if (MIN..=MAX).contains(&value) {
                Ok(value)
            } else {
                Err(E::invalid_value(Unexpected::Signed(value), &self))
            }
        }
    }
    let value = deserializer.deserialize_i64(Range::<MIN, MAX>)?;
    T::try_from(value).map_err(|_| D::Error::custom("out of range"))
}

/// 512 or 4096.
pub(super) fn sector_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    match u32::deserialize(deserializer)? {
        size @ (512 | 4096) => Ok(Some(size)),
        other => Err(D::Error::invalid_value(Unexpected::Unsigned(other.into()), &"512 or 4096")),
    }
}

/// A disk's number.
pub(super) fn minor<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    in_range::<0, 16383, _, _>(deserializer).map(Some)
}

/// One of slog's levels, by name.
pub(super) fn log_level<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    match slog::Level::from_str(&name) {
        Ok(_) => Ok(name),
        Err(()) => Err(D::Error::invalid_value(
            Unexpected::Str(&name),
            &"\"critical\", \"error\", \"warning\", \"info\", \"debug\" or \"trace\"",
        )),
    }
}
