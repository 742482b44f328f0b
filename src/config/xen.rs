//! `[frontend.xen]`
#![warn(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::units::in_range;
use super::{Size, defaults};

/// What is to be done when the guest's device is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnClose {
    /// Flush, and end the process.
    #[default]
    Exit,
    /// Wait until the toolstack makes it again.
    Wait,
}

/// `[frontend.xen]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Xen {
    /// The guest's domain id.
    #[serde(deserialize_with = "in_range::<0, 32751, _, _>")]
    pub domain: u32,
    /// The device in the guest: "xvda", or its number.
    pub device: Device,
    /// The backend's kind: a directory in XenStore.
    #[serde(default = "defaults::backend", deserialize_with = "kind")]
    pub backend: String,
    /// XenStore's socket or device; not set: where it usually is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<PathBuf>,
    /// When the device is gone.
    #[serde(default)]
    pub on_close: OnClose,
    /// Offer nothing before `hotplug-status` is "connected".
    #[serde(default)]
    pub wait_for_hotplug: bool,
    /// log2 of the pages of a ring.
    #[serde(default = "defaults::ring_page_order", deserialize_with = "in_range::<0, 4, _, _>")]
    pub max_ring_page_order: u32,
    /// Rings.
    #[serde(default = "defaults::queues", deserialize_with = "in_range::<1, 16, _, _>")]
    pub max_queues: u32,
    /// Segments of an indirect request.
    #[serde(default = "defaults::indirect_segments", deserialize_with = "in_range::<1, 256, _, _>")]
    pub max_indirect_segments: u32,
    /// With many requests in flight, the longest that some wait for others to be taken or answered together; µs.
    #[serde(default = "defaults::gather_us", deserialize_with = "in_range::<0, 10000, _, _>")]
    pub gather_us: u32,
    /// Memory for data on its way between guest and image.
    #[serde(default = "defaults::buffers")]
    pub buffers: Size,
}

impl Xen {
    /// The default of `max_indirect_segments`.
    pub const INDIRECT_SEGMENTS: u32 = 256;
    /// The default of `gather_us`.
    pub const GATHER_US: u32 = 1000;
}

/// A block device of a guest: its number, as in XenStore (Xen's documentation, xen-vbd-interface(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Device(pub u32);

impl FromStr for Device {
    type Err = String;

    #[expect(clippy::arithmetic_side_effects, reason = "a name has one to three letters")]
    fn from_str(text: &str) -> Result<Device, String> {
        let wrong = || {
            format!("\"{text}\" is no device; expected such as \"xvda\", \"xvdb1\", \"hda\", \"sda\", or a number")
        };
        if let Ok(number) = text.parse() {
            return Ok(Device(number));
        }
        let (prefix, rest) = text.split_at_checked(if text.starts_with("xvd") { 3 } else { 2 }).ok_or_else(wrong)?;
        let letters = rest.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(rest.len());
        let (name, partition) = rest.split_at(letters);
        let partition: u32 = if partition.is_empty() { 0 } else { partition.parse().map_err(|_| wrong())? };
        if name.is_empty() || name.len() > 3 {
            return Err(wrong());
        }
        // a to z, then aa and so on, as disks are named everywhere.
        let disk = name.bytes().fold(0, |number, letter| number * 26 + u32::from(letter - b'a') + 1) - 1;
        let number = match (prefix, disk, partition) {
            ("xvd", 0..16, 0..16) => 202 << 8 | disk << 4 | partition,
            ("xvd", 0..1_048_576, 0..256) => 1 << 28 | disk << 8 | partition,
            ("sd", 0..16, 0..16) => 8 << 8 | disk << 4 | partition,
            ("hd", 0..2, 0..64) => 3 << 8 | disk << 6 | partition,
            ("hd", 2..4, 0..64) => 22 << 8 | (disk - 2) << 6 | partition,
            _ => return Err(wrong()),
        };
        Ok(Device(number))
    }
}

impl<'de> Deserialize<'de> for Device {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Device, D::Error> {
        struct NameOrNumber;
        impl Visitor<'_> for NameOrNumber {
            type Value = Device;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a device such as \"xvda\", or its number")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Device, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_i64<E: Error>(self, number: i64) -> Result<Device, E> {
                u32::try_from(number).map(Device).map_err(|_| E::invalid_value(Unexpected::Signed(number), &self))
            }
        }
        deserializer.deserialize_any(NameOrNumber)
    }
}

/// A directory's name in XenStore.
fn kind<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    let valid = !text.is_empty()
        && text.len() <= 64
        && text.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_');
    if valid {
        Ok(text)
    } else {
        Err(D::Error::custom("expected a directory's name in XenStore, such as \"vbd3\" or \"vbd\""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_the_numbers_of_the_interface() {
        let number = |name: &str| name.parse::<Device>().map(|device| device.0).ok();
        assert_eq!((number("xvda"), number("xvdb1"), number("xvdp15")), (Some(51712), Some(51729), Some(51967)));
        assert_eq!((number("xvdq"), number("xvdaa3")), (Some(1 << 28 | 16 << 8), Some(1 << 28 | 26 << 8 | 3)));
        assert_eq!((number("hda"), number("hdc1"), number("sdb")), (Some(768), Some(5633), Some(2064)));
        assert_eq!(number("51712"), Some(51712));
        for wrong in ["", "x", "xvd", "xvd1", "xvdA", "xvda256", "hde", "sdq", "vda", "xvdaaaa", "xvd\u{e9}"] {
            assert_eq!(number(wrong), None, "{wrong}");
        }
    }
}
