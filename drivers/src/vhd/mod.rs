//! VHD images: fixed, dynamic and differencing.
//!
//! Source of the format: Microsoft, "Virtual Hard Disk Image Format Specification", October 11, 2006; what Xen's toolstacks
//! add is said where it is. All numbers are big-endian. A fixed image is the disk's bytes and a footer; the others are:
//!
//! ```text
//! 0     copy of the footer                       512 bytes
//! 512   header                                  1024 bytes     where the footer says
//!       block allocation table (BAT)            4 bytes for each block, in whole sectors; where the header says
//!       batmap, blktap's: which blocks are full  header of 512 bytes and a bit for each block; after the table
//!       names of the parent                      where the header's locators say
//!       blocks, in any order, each:
//!         bitmap                                 a bit for each sector of the block, in whole sectors
//!         data                                   2 MiB
//! end   footer                                   512 bytes
//! ```
//!
//! A table entry is the number of the file's sector that the block's bitmap begins with.

pub mod bitmap;
mod check;
mod disk;
mod fixed;
mod footer;
mod header;
mod image;
pub mod layout;
mod relink;
mod repair;
mod table;

pub use disk::{Disk, Settings};
pub use fixed::Fixed;
pub use footer::{FOOTER_SIZE, Footer, Geometry, IN_USE, Kind, OLD_FOOTER_SIZE, timestamp, unix_seconds};
pub use header::{BLOCK_SIZE, HEADER_SIZE, Header, Locator, Platform, decode_path, encode_path};
pub use image::{Image, NAME_MAX, Parts, Problem, ReadError, Source};
pub use relink::relink;
pub use repair::Repair;
pub use table::{Batmap, KeyHash, SECTORS_MAX, Table};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What an image is known by.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(transparent)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// Nobody's.
    pub const NIL: Uuid = Uuid([0; 16]);
}

impl std::fmt::Display for Uuid {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            let dash = if matches!(i, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl std::str::FromStr for Uuid {
    type Err = NoUuid;

    /// As it is printed, with digits of either case.
    fn from_str(text: &str) -> Result<Uuid, NoUuid> {
        let is_dash = |place: usize| matches!(place, 8 | 13 | 18 | 23);
        let fits = text.len() == 36 && text.bytes().enumerate().all(|(i, byte)| is_dash(i) == (byte == b'-'));
        let mut digits = text.chars().filter(|digit| *digit != '-').map(|digit| digit.to_digit(16));
        let mut uuid = Uuid::NIL;
        for byte in &mut uuid.0 {
            let (Some(Some(high)), Some(Some(low)), true) = (digits.next(), digits.next(), fits) else {
                return Err(NoUuid);
            };
            *byte = (high << 4 | low) as u8;
        }
        Ok(uuid)
    }
}

/// A text that is no UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is no UUID, such as 0f0e0d0c-0b0a-0908-0706-050403020100")]
pub struct NoUuid;

/// One's complement of the sum of the bytes, of which those of the checksum itself are zero.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(0, |sum: u32, byte| sum.wrapping_add((*byte).into()))
}

/// For the first of so many blocks.
fn and_others(blocks: u32) -> String {
    if blocks > 1 { format!(", and so of {} more", blocks - 1) } else { String::new() }
}

/// What is wrong with an image. Nothing of it was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Corrupt {
    /// The file ends in it.
    #[error("its {what} has only {len} bytes")]
    Short {
        /// Which part.
        what: &'static str,
        /// Bytes that there are.
        len: u64,
    },
    /// It is something else, or was overwritten.
    #[error("its {what} does not begin as one does")]
    Cookie {
        /// Which part.
        what: &'static str,
    },
    /// blktap's mark.
    #[error(
        "it is disabled (v_poison): a resize of it was cut short; vhd-util revert -n IMAGE -j JOURNAL, with the journal of that resize, \
         makes it what it was"
    )]
    Disabled,
    /// Bytes have changed, or were never written.
    #[error("the checksum of its {what} is {found:#010x}, and should be {computed:#010x}")]
    Checksum {
        /// Which part.
        what: &'static str,
        /// As it is.
        found: u32,
        /// As it should be.
        computed: u32,
    },
    /// Made by a later program.
    #[error("its {what} has version {version:#010x}, which is not known here")]
    Version {
        /// Which part.
        what: &'static str,
        /// As it is: major in the upper half, minor in the lower.
        version: u32,
    },
    /// Neither fixed nor dynamic nor differencing.
    #[error("it is an image of type {number}; known are 2 (fixed), 3 (dynamic) and 4 (differencing)")]
    Kind {
        /// As it is.
        number: u32,
    },
    /// The disk's size can't be.
    #[error("its size, {size} bytes, {why}")]
    Size {
        /// As its footer says.
        size: u64,
        /// What is wrong with that.
        why: &'static str,
    },
    /// The footer of an image with blocks says that there is no header.
    #[error("its footer does not say where its header is")]
    NoHeader,
    /// The footer at the beginning is no good.
    #[error("at its beginning: {0}")]
    Copy(Box<Corrupt>),
    /// The footers say different things; that at the end counts.
    #[error("its footer and the copy at the beginning differ")]
    CopyDiffers,
    /// The footers are of two images, and one of them is not this one's.
    #[error(
        "it has the footers of two images: at its beginning, beside the header, of {copy} with {copy_size} bytes, and at its end of {last} \
         with {last_size} bytes; the last may be left from what was there before: vhd-util modify -n IMAGE -s BYTES, BYTES being its \
         size, writes the first there"
    )]
    TwoImages {
        /// The UUID in the copy.
        copy: Uuid,
        /// Bytes of its disk.
        copy_size: u64,
        /// The UUID in the footer at the end.
        last: Uuid,
        /// Bytes of its disk.
        last_size: u64,
    },
    /// The name of the parent is no text.
    #[error("the parent's name at byte {at} is no text")]
    Name {
        /// Where it is.
        at: u64,
    },
    /// A block can't have that size.
    #[error("its blocks have {size} bytes, which is no power of two from 4 KiB to 256 MiB")]
    BlockSize {
        /// As its header says.
        size: u32,
    },
    /// The table is larger than what is held in memory.
    #[error("its table has {entries} entries; at most {most} are possible")]
    Entries {
        /// As its header says.
        entries: u64,
        /// The most.
        most: u64,
    },
    /// A part is where it can't be.
    #[error("its {what} is at byte {at}, with {len} bytes, where it cannot be: the file has {file}")]
    Place {
        /// Which part.
        what: &'static str,
        /// Where it is.
        at: u64,
        /// Its bytes.
        len: u64,
        /// Bytes of the file.
        file: u64,
    },
    /// A block is among the metadata, or beyond the end.
    #[error(
        "block {block} has {len} bytes at byte {at}, which are not its own: among the metadata, or beyond byte {end}"
    )]
    BlockPlace {
        /// Which.
        block: u32,
        /// Where its bitmap begins.
        at: u64,
        /// Its bytes, with the bitmap.
        len: u64,
        /// Where blocks must end.
        end: u64,
    },
    /// Two blocks share bytes.
    #[error("blocks {one} and {other} overlap at byte {at}")]
    BlocksOverlap {
        /// Which begins first.
        one: u32,
        /// The other.
        other: u32,
        /// Where that begins.
        at: u64,
    },
    /// A rule of the format, or of blktap, that it does not keep to.
    #[error("its {what} {why}")]
    Odd {
        /// Which part.
        what: &'static str,
        /// What is wrong.
        why: &'static str,
    },
    /// A time that is yet to come.
    #[error("its {what} says that it was made in the future, {seconds} seconds from now")]
    Future {
        /// Which part.
        what: &'static str,
        /// How far.
        seconds: u64,
    },
    /// The locators and the header do not agree.
    #[error("one of its locators names the parent {found:?}, and its header names it {expected:?}")]
    LocatorName {
        /// The file's name that the locator has.
        found: String,
        /// As the header says.
        expected: String,
    },
    /// The disk has no such block.
    #[error("its table has a place, byte {at}, for block {block}, which is beyond the disk's end")]
    BlockBeyond {
        /// Which.
        block: u32,
        /// Where it is said to be.
        at: u64,
    },
    /// What the batmap says of a block is wrong.
    #[error("its batmap says that block {block} is full, which its bitmap denies")]
    NotFull {
        /// Which.
        block: u32,
    },
    /// The batmap says something of blocks that the table does not have. It is not believed.
    #[error("its batmap says that block {block} is full, which is not there{}", and_others(*blocks))]
    AbsentFull {
        /// The first of them.
        block: u32,
        /// How many.
        blocks: u32,
    },
    /// A bitmap has more bits than its block has sectors.
    #[error("the bitmap of block {block} has bits for sectors that are not there")]
    BitmapBeyond {
        /// Which.
        block: u32,
    },
    /// Data where there should be none.
    #[error("sector {sector} of block {block} has data, and the block's bitmap says that it has none")]
    HiddenData {
        /// Which.
        block: u32,
        /// The first that is so, counted from the block's first.
        sector: u32,
    },
    /// Not all of it is told.
    #[error("there is more to say of its {what}")]
    More {
        /// Of what.
        what: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_as_it_is_printed() {
        let uuid = Uuid(std::array::from_fn(|i| 0xf0 - 7 * i as u8));
        assert_eq!(uuid.to_string().parse(), Ok(uuid));
        assert_eq!(uuid.to_string().to_uppercase().parse(), Ok(uuid));
        assert_eq!("00000000-0000-0000-0000-000000000000".parse(), Ok(Uuid::NIL));
        let good = uuid.to_string();
        let wrong = [good[1..].to_owned(), format!("{good}0"), good.replace('-', "0"), good.replacen("f0", "g0", 1)];
        let others = ["", "-", "\u{e9}0000000-0000-0000-0000-000000000000", "0000000-00000-0000-0000-0000000000000"];
        for text in wrong.iter().map(String::as_str).chain(others) {
            assert_eq!(text.parse::<Uuid>(), Err(NoUuid), "{text}");
        }
    }
}
