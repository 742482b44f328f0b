//! The log of changed blocks: which blocks of a disk were written since some moment, as backup programs ask it. It is blktap's format
//! (`include/cbt-util.h`), and what storage managers read and write by `cbt-util`:
//!
//! ```text
//! 0     UUID of the older log, the parent     16 bytes, zeros: none
//! 16    UUID of the newer one, the child      16 bytes
//! 32    consistent                             4 bytes, the storage manager's; then 4 of no use
//! 40    the disk, bytes                        8 bytes
//! 48    map                                    a bit for each block of 64 KiB, the least significant first
//! ```
//!
//! Numbers are little-endian. A file may have more than its map; a volume always has.
#![warn(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use std::ops::Range;

use zerocopy::little_endian::{I32, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::Extent;
use crate::vhd::Uuid;

/// Bytes of the header, where the map begins.
pub const HEADER_SIZE: usize = 48;
/// Bytes of the disk that a bit is for.
pub const BLOCK_SIZE: u64 = 64 << 10;

/// What a log begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// The older log: what was written before this one begins.
    pub parent: Uuid,
    /// The newer log.
    pub child: Uuid,
    consistent: I32,
    unused: U32,
    size: U64,
}

const _: () = assert!(size_of::<Header>() == HEADER_SIZE && std::mem::offset_of!(Header, size) == 40);

/// Why a log is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// There is not even a header.
    #[error("it has {len} bytes, and a log of changed blocks has {HEADER_SIZE} and a map: cbt-util create makes one")]
    NoHeader {
        /// Bytes of the file.
        len: u64,
    },
    /// The map is cut off.
    #[error(
        "it has {len} bytes, and the log of a disk of {size} bytes has {needed}: some of what was written is not known; cbt-util create makes \
         a new one, before which a backup has to be a whole one"
    )]
    Short {
        /// Bytes of the file.
        len: u64,
        /// Bytes of the disk, as the header says.
        size: u64,
        /// Bytes that the file has to have.
        needed: u64,
    },
    /// Blocks of the disk have no bit.
    #[error(
        "the disk has {disk} bytes, and this log is for {size}: cbt-util set -s {disk}, while nobody uses the disk, makes room for the others"
    )]
    DiskLarger {
        /// Bytes of the disk.
        disk: u64,
        /// Bytes of the disk, as the header says.
        size: u64,
    },
}

impl Header {
    /// That of a new log, of a disk with so many bytes: no block was written, and nobody has said that it is consistent.
    pub fn new(size: u64) -> Header {
        let (parent, child) = (Uuid::NIL, Uuid::NIL);
        Header { parent, child, consistent: I32::ZERO, unused: U32::ZERO, size: size.into() }
    }

    /// Of a file's first bytes, which has `len`.
    pub fn parse(bytes: &[u8], len: u64) -> Result<Header, Unfit> {
        match Header::read_from_prefix(bytes) {
            Ok((header, _)) => Ok(header),
            Err(_) => Err(Unfit::NoHeader { len }),
        }
    }

    /// Whether the map tells of all that was written, as the storage manager has it: 1 or 0.
    pub fn consistent(&self) -> i32 {
        self.consistent.get()
    }

    /// Sets that.
    pub fn set_consistent(&mut self, consistent: i32) {
        self.consistent = consistent.into();
    }

    /// The disk's size, bytes.
    pub fn size(&self) -> u64 {
        self.size.get()
    }

    /// Sets that. The map has to have room for it: [`file_len`](Self::file_len).
    pub fn set_size(&mut self, size: u64) {
        self.size = size.into();
    }

    /// Bytes that the file has to have: header and map.
    pub fn file_len(&self) -> u64 {
        map_len(self.size()).saturating_add(HEADER_SIZE as u64)
    }

    /// Whether a file of `len` bytes has the whole map.
    pub fn check_len(&self, len: u64) -> Result<(), Unfit> {
        let (size, needed) = (self.size(), self.file_len());
        if len < needed { Err(Unfit::Short { len, size, needed }) } else { Ok(()) }
    }

    /// Whether a disk of `disk` bytes can use a log that is in a file of `len` bytes.
    pub fn check(&self, len: u64, disk: u64) -> Result<(), Unfit> {
        self.check_len(len)?;
        let size = self.size();
        // A last block that the log has in part has a bit all the same.
        if blocks(disk) > blocks(size) { Err(Unfit::DiskLarger { disk, size }) } else { Ok(()) }
    }
}

/// Blocks of a disk of `size` bytes, the last of which may be in part.
pub fn blocks(size: u64) -> u64 {
    size.div_ceil(BLOCK_SIZE)
}

/// Bytes of the map of a disk of `size` bytes.
pub fn map_len(size: u64) -> u64 {
    blocks(size).div_ceil(8)
}

/// The blocks that an extent is in.
pub fn blocks_of(extent: Extent) -> Range<u64> {
    extent.offset / BLOCK_SIZE..blocks(extent.offset.saturating_add(extent.len))
}

/// The bits of blocks: for each byte of the map, counted from the map's first, those that are theirs.
pub fn bits(blocks: Range<u64>) -> impl Iterator<Item = (u64, u8)> {
    let (first, end) = (blocks.start, blocks.end);
    let bytes = if first < end { first / 8..end.div_ceil(8) } else { 0..0 };
    bytes.map(move |byte| {
        // Of those before the byte all are left out, of those behind it none is reached.
        let begin = first.saturating_sub(byte.saturating_mul(8)).min(7);
        let count = end.saturating_sub(byte.saturating_mul(8)).min(8);
        let below = |count: u64| (1_u16 << count).wrapping_sub(1);
        (byte, (below(count) & !below(begin)).to_le_bytes()[0])
    })
}

/// Adds what another map, or the same part of one, has. Done again, it changes nothing. Says whether there was something to add.
pub fn add(map: &mut [u8], other: &[u8]) -> bool {
    let mut more = false;
    for (to, from) in map.iter_mut().zip(other) {
        more |= *from & !*to != 0;
        *to |= from;
    }
    more
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_blktap_has_them() {
        let mut header = Header::new(0x0102_0304_0506);
        (header.parent, header.child) = (Uuid([1; 16]), Uuid([2; 16]));
        header.set_consistent(1);
        let bytes = [[1; 16].as_slice(), &[2; 16], &[1, 0, 0, 0, 0, 0, 0, 0], &[6, 5, 4, 3, 2, 1, 0, 0]].concat();
        assert_eq!(header.as_bytes(), bytes);
        assert_eq!(Header::parse(&[&bytes[..], &[9]].concat(), 49), Ok(header));
        assert_eq!(Header::parse(&bytes[..47], 47), Err(Unfit::NoHeader { len: 47 }));
        header.set_consistent(-1);
        assert_eq!((header.consistent(), header.as_bytes()[32..36].to_vec()), (-1, vec![0xff; 4]));
    }

    #[test]
    fn a_map_has_a_bit_for_each_block_and_one_for_the_last_part() {
        for (size, len) in [
            (0, 0),
            (1, 1),
            (BLOCK_SIZE, 1),
            (8 * BLOCK_SIZE, 1),
            (8 * BLOCK_SIZE + 1, 2),
            (2 << 40, 4 << 20),
            (u64::MAX, 1 << 45),
        ] {
            assert_eq!((map_len(size), Header::new(size).file_len()), (len, len + 48), "{size}");
        }
    }

    #[test]
    fn a_log_fits_a_disk_whose_blocks_all_have_a_bit() {
        let header = Header::new(16 * BLOCK_SIZE);
        assert_eq!(header.check(50, 16 * BLOCK_SIZE), Ok(()));
        assert_eq!(header.check(4 << 20, 1), Ok(()), "a volume, and a disk that is smaller");
        let short = Unfit::Short { len: 49, size: 16 * BLOCK_SIZE, needed: 50 };
        assert_eq!(header.check(49, 1), Err(short));
        let disk = 16 * BLOCK_SIZE + 512;
        let larger = header.check(50, disk).unwrap_err();
        assert_eq!(larger, Unfit::DiskLarger { disk, size: 16 * BLOCK_SIZE });
        let text = larger.to_string();
        assert!(["1049088 bytes", "for 1048576", "cbt-util set -s 1049088"].iter().all(|part| text.contains(part)));
        assert_eq!(Header::new(disk).check(51, 17 * BLOCK_SIZE), Ok(()), "within the last block");
        assert!(matches!(Header::new(u64::MAX).check(1 << 40, 1), Err(Unfit::Short { .. })));
    }

    #[test]
    fn an_extent_marks_the_blocks_that_it_touches_and_no_others() {
        let extent = |offset, len| blocks_of(Extent { offset, len });
        assert_eq!(extent(0, 512), 0..1);
        assert_eq!(extent(BLOCK_SIZE - 512, 512), 0..1);
        assert_eq!(extent(BLOCK_SIZE - 512, 1024), 0..2);
        assert_eq!(extent(BLOCK_SIZE, BLOCK_SIZE), 1..2);
        assert_eq!(extent(u64::MAX, u64::MAX), (1 << 48) - 1..1 << 48, "it does not overflow");
        assert_eq!(bits(3..3).count(), 0);
        assert_eq!(bits(0..8).collect::<Vec<_>>(), [(0, 0xff)]);
        assert_eq!(bits(7..17).collect::<Vec<_>>(), [(0, 0x80), (1, 0xff), (2, 1)]);
        // Against a bit at a time.
        for first in 0..20_usize {
            for end in first..40 {
                let (mut map, mut one_by_one) = ([0_u8; 5], [0_u8; 5]);
                let range = first as u64..end as u64;
                bits(range.clone()).for_each(|(byte, mask)| map[usize::try_from(byte).unwrap()] |= mask);
                (first..end).for_each(|block| one_by_one[block / 8] |= 1 << (block % 8));
                assert_eq!(map, one_by_one, "{first} to {end}");
                assert!(bits(range).all(|(_, mask)| mask != 0));
            }
        }
    }

    #[test]
    fn adding_twice_is_adding_once() {
        let mut map = [0b0101, 0, 0xff];
        assert!(add(&mut map, &[0b0011, 0]));
        assert_eq!(map, [0b0111, 0, 0xff]);
        assert!(!add(&mut map, &[0b0011, 0]));
    }
}
