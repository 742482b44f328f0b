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

use std::ops::{Range, RangeInclusive};

use zerocopy::little_endian::{I32, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::vhd::Uuid;
use crate::{Ask, Extent, Fail, Layer, LayerFile, Meta, MetaId, MetaOp, OpenError, Plan};

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
    /// The map, all of which is in memory, is far larger than that of the disk.
    #[error(
        "the disk has {disk} bytes, and this log is for {size}, which is more than any disk's of its like: cbt-util create makes one for it"
    )]
    FarLarger {
        /// Bytes of the disk.
        disk: u64,
        /// Bytes of the disk, as the header says.
        size: u64,
    },
}

/// A log may be for a disk of so many bytes, however small the one is that has it: 32 MiB of map.
const SIZE_MAX: u64 = 16 << 40;

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
        if blocks(disk) > blocks(size) {
            return Err(Unfit::DiskLarger { disk, size });
        }
        if size > disk.max(SIZE_MAX) { Err(Unfit::FarLarger { disk, size }) } else { Ok(()) }
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

/// Bytes of the map that are written at a time, at most.
const PAGE: usize = 512;

/// Bytes of the disk that a page of the map is for.
const PAGE_BYTES: u64 = PAGE as u64 * 8 * BLOCK_SIZE;

/// Pages that are written at a time, at most.
const PAGES_MAX: usize = 16;

/// The layer's file: the log.
const LOG: LayerFile = LayerFile(0);

/// Bits of a page on their way to the file.
#[derive(Debug)]
struct Page {
    /// Which, counted from the map's first; none: it is free for another.
    number: Option<usize>,
    /// Those that are being written.
    now: [u8; PAGE],
    /// Those that come next.
    next: [u8; PAGE],
    writing: bool,
    /// They could not be written, and nobody has been told.
    failed: bool,
}

impl Page {
    fn free() -> Page {
        Page { number: None, now: [0; PAGE], next: [0; PAGE], writing: false, failed: false }
    }

    /// The bytes of the page that are being written: from the first with a bit to the last.
    fn range(&self) -> RangeInclusive<usize> {
        let set = |byte: &u8| *byte != 0;
        let ends = self.now.iter().position(set).zip(self.now.iter().rposition(set));
        ends.map_or(0..=0, |(first, last)| first..=last)
    }
}

/// The filter: a write, discard or zeroing goes on below when the bits of its blocks are in the file. A bit is written through the page cache, so
/// it outlives the process and not the host; that the storage manager knows ([`Header::consistent`]).
///
/// blktap maps the file instead. But a page that is written first waits for the file system, which may be frozen or out of room, and who maps
/// a file that gets shorter dies by SIGBUS. The write of a log is an I/O like all others: it can hang, fail, and is seen.
#[derive(Debug)]
pub struct ChangedBlocks {
    header: Header,
    /// Bytes of the file.
    len: u64,
    /// What the file has.
    map: Vec<u8>,
    /// Blocks that were found to have their bits: what is asked in parts is looked at once.
    known: Range<u64>,
    pages: Vec<Page>,
    /// Blocks that have their bits.
    changed: u64,
    writes: u64,
    failures: u64,
}

impl ChangedBlocks {
    /// For a log in a file of `len` bytes, with that header and map, of a disk of `disk` bytes.
    pub fn new(header: Header, map: Vec<u8>, len: u64, disk: u64) -> Result<ChangedBlocks, Unfit> {
        header.check(len, disk)?;
        let pages = (0..PAGES_MAX).map(|_| Page::free()).collect();
        let changed = set(&map);
        Ok(ChangedBlocks { header, len, map, known: 0..0, pages, changed, writes: 0, failures: 0 })
    }

    /// Has the bits of blocks written that the file has not. None: it has all of them.
    fn mark(&mut self, blocks: Range<u64>) -> Option<Plan> {
        let known = &self.known;
        if known.start <= blocks.start && blocks.end <= known.end {
            return None;
        }
        let mut missing = None;
        for (byte, mask) in bits(blocks.clone()) {
            let byte = usize::try_from(byte).unwrap_or(usize::MAX);
            let plan = match self.map.get(byte).map(|there| mask & !there) {
                Some(0) => continue,
                Some(mask) => self.want(byte, mask),
                // The disk has grown beyond its log, which `check_size` does not let it.
                None => Plan::Fail(Fail::Io),
            };
            missing = Some(plan);
            if matches!(plan, Plan::Fail(_)) {
                break;
            }
        }
        if missing.is_none() {
            self.known = blocks;
        }
        missing
    }

    /// Has bits of a byte of the map written.
    fn want(&mut self, byte: usize, mask: u8) -> Plan {
        let number = byte.checked_div(PAGE);
        let wait = Plan::Wait { until: None };
        let find = |which: &dyn Fn(&Page) -> bool| self.pages.iter().position(which);
        let known = find(&|page| page.number == number);
        // Where nobody has come back to be told that a page failed, it is free, too. Where all are being written, it is asked again when one is.
        let Some(index) = known.or_else(|| find(&|page| page.number.is_none())).or_else(|| find(&|page| page.failed))
        else {
            return wait;
        };
        let page = &mut self.pages[index];
        if page.failed {
            let told = page.number == number;
            *page = Page::free();
            if told {
                return Plan::Fail(Fail::Io);
            }
        }
        page.number = number;
        let within = byte.checked_rem(PAGE).unwrap_or(0);
        page.next[within] |= mask & !page.now[within];
        wait
    }

    /// The part of the map that a page has, without what is before and behind its bits that are being written.
    fn part<'map>(map: &'map mut [u8], page: &Page) -> Option<(&'map mut [u8], [u8; PAGE])> {
        let range = page.range();
        let mut bits = [0; PAGE];
        let now = page.now.get(range.clone())?;
        bits.get_mut(..now.len())?.copy_from_slice(now);
        Some((map.chunks_mut(PAGE).nth(page.number?)?.get_mut(range)?, bits))
    }
}

impl Layer for ChangedBlocks {
    fn name(&self) -> &'static str {
        "changed-blocks"
    }

    fn size(&self) -> Option<u64> {
        None
    }

    fn plan(&mut self, ask: &Ask) -> Plan {
        if !ask.op.writes() {
            return Plan::Below { count: ask.extent.len };
        }
        // No more than a page of the map at a time: a discard can be of the whole disk.
        let count = ask.extent.len.min(PAGE_BYTES.saturating_sub(ask.extent.offset & PAGE_BYTES.saturating_sub(1)));
        let blocks = blocks_of(Extent { len: count, ..ask.extent });
        self.mark(blocks).unwrap_or(Plan::Below { count })
    }

    fn check_size(&self, size: u64) -> Result<(), OpenError> {
        Ok(self.header.check(self.len, size)?)
    }

    fn next_meta(&mut self) -> Option<Meta> {
        let due = |page: &Page| !page.writing && !page.failed && page.next != [0; PAGE];
        let (index, page) = (0..).zip(&mut self.pages).find(|(_, page)| due(page))?;
        page.now = std::mem::replace(&mut page.next, [0; PAGE]);
        page.writing = true;
        let range = page.range();
        let at = page.number?.saturating_mul(PAGE).saturating_add(*range.start()).saturating_add(HEADER_SIZE) as u64;
        self.writes = self.writes.wrapping_add(1);
        Some(Meta { id: MetaId(index), op: MetaOp::Write, file: LOG, at, len: range.count() as u64 })
    }

    fn meta_bytes(&mut self, MetaId(index): MetaId, to: &mut [u8]) {
        let page = usize::try_from(index).ok().and_then(|index| self.pages.get(index));
        if let Some((part, now)) = page.and_then(|page| ChangedBlocks::part(&mut self.map, page)) {
            to.copy_from_slice(part);
            add(to, &now);
        }
    }

    fn meta_done(&mut self, id: MetaId, result: Option<&[u8]>) {
        if result.is_none() {
            self.failures = self.failures.wrapping_add(1);
        }
        let Some(page) = usize::try_from(id.0).ok().and_then(|index| self.pages.get_mut(index)) else { return };
        (page.writing, page.failed) = (false, result.is_none());
        if page.failed {
            return;
        }
        if let Some((part, now)) = ChangedBlocks::part(&mut self.map, page) {
            self.changed = self.changed.saturating_sub(set(part));
            add(part, &now);
            self.changed = self.changed.saturating_add(set(part));
        }
        page.now = [0; PAGE];
        if page.next == [0; PAGE] {
            *page = Page::free();
        }
    }

    fn meta_len(&self) -> usize {
        PAGE
    }

    /// A crash of the host loses what was not durable, and the storage manager does not trust the log then.
    fn flushes_metadata(&self) -> bool {
        false
    }

    fn inspect(&self, show: &mut dyn FnMut(&'static str, u64)) {
        show("blocks", blocks(self.header.size()));
        show("blocks_changed", self.changed);
        show("map_writes", self.writes);
        show("map_writes_failed", self.failures);
    }

    fn bytes(&self) -> usize {
        self.map.len().saturating_add(size_of_val(&self.pages[..]))
    }
}

/// Bits that are set.
fn set(map: &[u8]) -> u64 {
    map.iter().map(|byte| u64::from(byte.count_ones())).sum()
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)] // a test panics then
mod tests {
    use super::*;
    use crate::Op;

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
        let far = Unfit::FarLarger { disk: 1, size: 1 << 48 };
        assert_eq!(Header::new(1 << 48).check(1 << 40, 1), Err(far), "a hostile log takes no memory");
        assert_eq!(Header::new(1 << 48).check(1 << 40, 1 << 48), Ok(()));
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

    /// What the layer asks for, done at once, in a log of 64 KiB of map.
    struct File {
        layer: ChangedBlocks,
        bytes: Vec<u8>,
    }

    const DISK: u64 = (64 << 10) * 8 * BLOCK_SIZE;

    impl File {
        fn new() -> File {
            let mut bytes = Header::new(DISK).as_bytes().to_vec();
            bytes.resize(HEADER_SIZE + (64 << 10), 0);
            let layer = ChangedBlocks::new(Header::new(DISK), vec![0; 64 << 10], bytes.len() as u64, DISK).unwrap();
            File { layer, bytes }
        }

        /// Begins what it wants.
        fn begin(&mut self) -> Vec<(Meta, Vec<u8>)> {
            std::iter::from_fn(|| {
                let meta = self.layer.next_meta()?;
                assert!(meta.op == MetaOp::Write && meta.len as usize <= self.layer.meta_len());
                let mut bytes = vec![0; meta.len as usize];
                self.layer.meta_bytes(meta.id, &mut bytes);
                Some((meta, bytes))
            })
            .collect()
        }

        fn end(&mut self, (meta, bytes): &(Meta, Vec<u8>), done: bool) {
            if done {
                self.bytes[meta.at as usize..][..bytes.len()].copy_from_slice(bytes);
            }
            self.layer.meta_done(meta.id, done.then_some(&[]));
        }

        fn has(&self, block: u64) -> bool {
            self.bytes[HEADER_SIZE + (block / 8) as usize] & 1 << (block % 8) != 0
        }
    }

    const WAIT: Plan = Plan::Wait { until: None };

    #[test]
    fn a_write_goes_on_when_its_bits_are_in_the_file() {
        let mut file = File::new();
        for op in [Op::Read, Op::Locate, Op::Flush] {
            assert_eq!(file.layer.plan(&Ask::of(op, 0, 512)), Plan::Below { count: 512 });
        }
        assert!(file.begin().is_empty());
        for (n, op) in (0..).zip([Op::Write, Op::Discard, Op::WriteZeroes]) {
            let ask = Ask::of(op, (10 + 3 * n) * BLOCK_SIZE - 512, 1024);
            assert_eq!(file.layer.plan(&ask), WAIT);
            let begun = file.begin();
            assert_eq!((begun.len(), file.layer.plan(&ask)), (1, WAIT), "until it is there");
            assert!(file.begin().is_empty(), "and nothing is written twice");
            file.end(&begun[0], true);
            assert_eq!(file.layer.plan(&ask), Plan::Below { count: 1024 });
            assert_eq!((8..18).map(|block| file.has(block)).filter(|set| *set).count() as u64, 2 * (n + 1));
        }
        assert!(file.has(9) && file.has(10) && !file.has(8) && !file.has(11));
        assert!(file.begin().is_empty());
    }

    #[test]
    fn what_comes_together_is_written_together_and_what_comes_late_next() {
        let mut file = File::new();
        let ask = |block: u64| Ask::of(Op::Write, block * BLOCK_SIZE, 512);
        (0..100).for_each(|block| assert_eq!(file.layer.plan(&ask(block)), WAIT));
        let first = file.begin();
        assert_eq!(first.len(), 1);
        assert_eq!(file.layer.plan(&ask(200)), WAIT);
        assert!(file.begin().is_empty(), "one write of a page at a time");
        file.end(&first[0], true);
        assert_eq!(file.layer.plan(&ask(99)), Plan::Below { count: 512 });
        assert_eq!(file.layer.plan(&ask(200)), WAIT);
        let second = file.begin();
        file.end(&second[0], true);
        assert_eq!(file.layer.plan(&ask(200)), Plan::Below { count: 512 });
        assert!((0..300).all(|block| file.has(block) == (block < 100 || block == 200)));
    }

    #[test]
    fn an_error_fails_the_write_that_waits_and_the_next_one_tries_again() {
        let mut file = File::new();
        let page = PAGE as u64 * 8 * BLOCK_SIZE;
        for n in 0..PAGES_MAX as u64 {
            assert_eq!(file.layer.plan(&Ask::of(Op::Write, n * page, 512)), WAIT);
        }
        let more = Ask::of(Op::Write, 100 * page, 512);
        assert_eq!(file.layer.plan(&more), WAIT);
        let begun = file.begin();
        assert_eq!(begun.len(), PAGES_MAX);
        begun.iter().for_each(|meta| file.end(meta, false));
        let first = Ask::of(Op::Write, 0, 512);
        assert_eq!(file.layer.plan(&first), Plan::Fail(Fail::Io));
        assert!(!file.has(0));
        // Nobody asks for the others, whose requests were called off.
        for n in 100..120 {
            let ask = Ask::of(Op::Write, n * page, 512);
            while file.layer.plan(&ask) == WAIT {
                let begun = file.begin();
                assert!(!begun.is_empty(), "page {n} waits for ever");
                begun.iter().for_each(|meta| file.end(meta, true));
            }
        }
        assert_eq!(file.layer.plan(&first), WAIT);
        let begun = file.begin();
        begun.iter().for_each(|meta| file.end(meta, true));
        assert_eq!(file.layer.plan(&first), Plan::Below { count: 512 });
    }

    #[test]
    fn at_any_moment_the_file_has_the_bits_of_all_that_went_on() {
        for seed in 0..20 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut file = File::new();
            let (mut waiting, mut gone, mut begun) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..2000 {
                if rng.u32(..3) == 0 && waiting.len() < 64 {
                    let len = rng.u64(1..3 * BLOCK_SIZE / 512) * 512;
                    // Here and there, and much in a few places.
                    let near = if rng.bool() { DISK - len } else { 64 * BLOCK_SIZE };
                    waiting.push(Ask::of(Op::Write, rng.u64(..near) / 512 * 512, len));
                }
                waiting.retain_mut(|ask: &mut Ask| match file.layer.plan(ask) {
                    Plan::Below { count } => {
                        let part = Extent { len: count, ..ask.extent };
                        assert!(blocks_of(part).all(|block| file.has(block)), "{ask:?}");
                        gone.extend(blocks_of(part));
                        ask.extent = Extent { offset: part.offset + count, len: ask.extent.len - count };
                        ask.extent.len > 0
                    }
                    Plan::Fail(_) => false,
                    plan => {
                        assert_eq!(plan, WAIT);
                        true
                    }
                });
                begun.extend(file.begin());
                if !begun.is_empty() && rng.bool() {
                    let meta = begun.swap_remove(rng.usize(..begun.len()));
                    file.end(&meta, rng.u32(..10) != 0);
                }
            }
            assert!(gone.len() > 50);
            assert_eq!(
                file.bytes[..HEADER_SIZE],
                *Header::new(DISK).as_bytes(),
                "the header is the storage manager's"
            );
        }
    }

    #[test]
    fn a_discard_of_a_whole_disk_looks_at_each_part_of_the_map_once() {
        let mut file = File::new();
        // As an image below cuts it: a block at a time.
        let (mut offset, mut plans, mut writes) = (0, 0, 0);
        while offset < DISK {
            plans += 1;
            let ask = Ask::of(Op::Discard, offset, DISK - offset);
            match file.layer.plan(&ask) {
                Plan::Below { count } => {
                    assert!(count <= PAGE_BYTES, "one plan looks at a page at most");
                    offset += count.min(2 << 20);
                }
                plan => {
                    assert_eq!(plan, WAIT);
                    let begun = file.begin();
                    writes += begun.len();
                    begun.iter().for_each(|meta| file.end(meta, true));
                }
            }
            // What was found to be there is not looked for again.
            let blocks = blocks_of(Extent { offset, len: 1 });
            assert!(offset >= DISK || offset % PAGE_BYTES == 0 || file.layer.known.contains(&blocks.start));
        }
        assert_eq!((plans, writes), ((DISK / (2 << 20) + DISK / PAGE_BYTES) as usize, (DISK / PAGE_BYTES) as usize));
        let mut counters = std::collections::BTreeMap::new();
        file.layer.inspect(&mut |name, value| {
            counters.insert(name, value);
        });
        assert_eq!((counters["blocks"], counters["blocks_changed"]), (blocks(DISK), blocks(DISK)));
    }

    #[test]
    fn a_disk_does_not_grow_beyond_its_log() {
        let file = File::new();
        assert_eq!(file.layer.check_size(DISK), Ok(()));
        let refused = OpenError::ChangedBlocks(Unfit::DiskLarger { disk: DISK + 512, size: DISK });
        assert_eq!(file.layer.check_size(DISK + 512), Err(refused));
    }
}
