//! A block's bitmap: a bit for each sector of its data, the most significant of a byte first (specification, "Data Blocks").

use std::ops::Range;

use crate::SECTOR_SIZE;

/// Sectors of a block that a disk of `size` bytes has: all of the block's `block_size` bytes, but for the last block.
pub fn own_sectors(size: u64, block_size: u64, block: u32) -> u32 {
    let left = size.saturating_sub(u64::from(block) * block_size);
    (left.min(block_size) / SECTOR_SIZE) as u32
}

/// Whether a sector's bit is set. One that is beyond the bitmap's end is not.
pub fn is_set(bitmap: &[u8], sector: u32) -> bool {
    bitmap.get(sector as usize / 8).is_some_and(|byte| byte & (0x80 >> (sector % 8)) != 0)
}

/// Sets the bits of sectors, and says whether one of them was not set.
pub fn set(bitmap: &mut [u8], sectors: Range<u32>) -> bool {
    let mut changed = false;
    for sector in sectors {
        changed |= !is_set(bitmap, sector);
        bitmap[sector as usize / 8] |= 0x80 >> (sector % 8);
    }
    changed
}

/// The sectors in runs of those that are set and those that are not.
pub fn runs(bitmap: &[u8], sectors: Range<u32>) -> impl Iterator<Item = (bool, Range<u32>)> + '_ {
    let mut at = sectors.start;
    std::iter::from_fn(move || {
        if at >= sectors.end {
            return None;
        }
        let (begin, state) = (at, is_set(bitmap, at));
        let whole = if state { 0xff } else { 0 };
        while at < sectors.end {
            // A byte at a time where it can be.
            if at.is_multiple_of(8) && sectors.end - at >= 8 && bitmap.get(at as usize / 8) == Some(&whole) {
                at += 8;
            } else if is_set(bitmap, at) == state {
                at += 1;
            } else {
                break;
            }
        }
        Some((state, begin..at))
    })
}

/// Whether the first `sectors` bits are all set.
pub fn is_full(bitmap: &[u8], sectors: u32) -> bool {
    runs(bitmap, 0..sectors).next() == Some((true, 0..sectors))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_those_of_the_bits() {
        let mut bitmap = [0; 8];
        assert!(set(&mut bitmap, 3..29) && set(&mut bitmap, 28..30) && !set(&mut bitmap, 5..30));
        set(&mut bitmap, 63..64);
        let found: Vec<_> = runs(&bitmap, 0..64).collect();
        assert_eq!(found, [(false, 0..3), (true, 3..30), (false, 30..63), (true, 63..64)]);
        assert_eq!(runs(&bitmap, 10..12).collect::<Vec<_>>(), [(true, 10..12)]);
        assert_eq!(runs(&bitmap, 5..5).count(), 0);
        assert_eq!(bitmap[..4], [0b0001_1111, 0xff, 0xff, 0b1111_1100]);
    }

    #[test]
    fn full_is_all_of_those_that_count() {
        let mut bitmap = [0; 2];
        set(&mut bitmap, 0..12);
        assert!(is_full(&bitmap, 12) && !is_full(&bitmap, 13) && is_full(&bitmap, 1));
    }
}
