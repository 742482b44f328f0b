//! Small copies of bitmaps: a bit for each page of eight sectors, where all eight are there or none, as most guests write them.

use super::bitmaps::{NONE, WAYS, places_of};
use crate::vhd::bitmap;

/// Sectors of a page: those of a byte of a bitmap.
const SECTORS: u32 = 8;

/// A cache in which a block has its place among a few (set-associative). What is in it is as in the file.
#[derive(Debug)]
pub(super) struct Pages {
    blocks: Vec<u32>,
    /// Used since somebody last looked for room.
    recent: Vec<bool>,
    maps: Vec<u8>,
    /// Bytes of a copy.
    len: usize,
}

impl Pages {
    /// Bytes of memory that the copy of a bitmap of `bitmap_len` bytes takes.
    pub(super) fn cost(bitmap_len: usize) -> usize {
        bitmap_len / 8 + size_of::<u32>() + size_of::<bool>()
    }

    /// Room for about `count` copies of bitmaps of `bitmap_len` bytes.
    pub(super) fn new(count: usize, bitmap_len: usize) -> Pages {
        let (count, len) = (count.next_multiple_of(WAYS).max(WAYS), bitmap_len / 8);
        Pages { blocks: vec![NONE; count], recent: vec![false; count], maps: vec![0; count * len], len }
    }

    /// Bytes of memory.
    pub(super) fn bytes(&self) -> usize {
        self.maps.len() + self.blocks.len() * (size_of::<u32>() + size_of::<bool>())
    }

    fn find(&self, block: u32) -> Option<usize> {
        places_of(block, self.blocks.len()).find(|index| self.blocks[*index] == block)
    }

    fn map(&self, index: usize) -> &[u8] {
        &self.maps[index * self.len..][..self.len]
    }

    /// Sectors from `first` on, at most `count`, that are all there, or all not; and which. None: that is not known here.
    pub(super) fn run(&mut self, block: u32, first: u32, count: u32) -> Option<(bool, u32)> {
        let index = self.find(block)?;
        self.recent[index] = true;
        let end = first + count;
        let pages = first / SECTORS..end.div_ceil(SECTORS);
        let (there, run) = bitmap::runs(self.map(index), pages).next()?;
        Some((there, end.min(run.end * SECTORS) - first))
    }

    /// Writes the bitmap of a block to `bits`, if it is known here.
    pub(super) fn expand(&self, block: u32, bits: &mut [u8]) -> bool {
        let Some(index) = self.find(block) else { return false };
        for (page, byte) in (0..).zip(bits) {
            *byte = if bitmap::is_set(self.map(index), page) { 0xff } else { 0 };
        }
        true
    }

    /// Keeps the bitmap of a block, as it is now in the file, if it can be kept.
    pub(super) fn keep(&mut self, block: u32, bits: &[u8]) {
        let known = self.find(block);
        if bits.iter().any(|byte| !matches!(byte, 0 | 0xff)) {
            if let Some(index) = known {
                self.blocks[index] = NONE;
            }
            return;
        }
        let index = known.unwrap_or_else(|| self.room(block));
        self.blocks[index] = block;
        self.recent[index] = true;
        let map = &mut self.maps[index * self.len..][..self.len];
        for (eight, byte) in bits.chunks_exact(8).zip(map) {
            *byte = eight.iter().fold(0, |byte, page| byte << 1 | u8::from(*page == 0xff));
        }
    }

    /// A place that is free, or was not used lately.
    fn room(&mut self, block: u32) -> usize {
        let set = places_of(block, self.blocks.len());
        if let Some(free) = set.clone().find(|index| self.blocks[*index] == NONE) {
            return free;
        }
        let first = set.start;
        for index in set {
            if !std::mem::take(&mut self.recent[index]) {
                return index;
            }
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_of_whole_pages_is_kept_and_another_is_not() {
        let mut pages = Pages::new(64, 512);
        let mut bits = [0; 512];
        bitmap::set(&mut bits, 8..32);
        bitmap::set(&mut bits, 4088..4096);
        pages.keep(7, &bits);
        assert_eq!(pages.run(7, 0, 4096), Some((false, 8)));
        assert_eq!(pages.run(7, 11, 4000), Some((true, 21)));
        assert_eq!(pages.run(7, 11, 4), Some((true, 4)));
        assert_eq!(pages.run(7, 4090, 6), Some((true, 6)));
        assert_eq!(pages.run(8, 0, 1), None);
        let mut expanded = [0x55; 512];
        assert!(pages.expand(7, &mut expanded) && expanded == bits && !pages.expand(8, &mut expanded));
        bitmap::set(&mut bits, 100..101);
        pages.keep(7, &bits);
        assert_eq!(pages.run(7, 0, 1), None, "what it was must not be shown any more");
    }

    #[test]
    fn those_that_are_used_stay() {
        let mut pages = Pages::new(8, 512);
        (0..8).for_each(|block| pages.keep(block, &[0; 512]));
        // One round takes the marks away.
        pages.keep(8, &[0; 512]);
        let kept: Vec<_> = (0..8).filter(|block| pages.find(*block).is_some()).collect();
        assert_eq!(kept.len(), 7);
        assert!(kept[..6].iter().all(|block| pages.run(*block, 0, 1).is_some()));
        pages.keep(9, &[0; 512]);
        assert!(kept[..6].iter().all(|block| pages.find(*block).is_some()));
    }
}
