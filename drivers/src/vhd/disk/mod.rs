//! A dynamic or differencing image in use.
//!
//! What a write takes, beyond its data, depends on where it goes:
//!
//! - Sectors that the image has: nothing.
//! - A block that it has, sectors that it has not: when the data is down, the [bitmap](bitmaps).
//! - A [block](blocks) that it has not: data and bitmap go to the end of the file, where nothing points to; when both are down,
//!   the sector of the table that has the block's entry.
//!
//! Whatever points to something is written when that is down, with `Durability::Flush` after a flush, so that after a crash
//! an extent has what was there before or what was written, and never what is another's. One write takes along all that
//! has come together for a bitmap, a sector of the table, or a flush, while the one before it was under way.
//!
//! Where the end of the file reads as zeros, a new block of an image without a parent has a bitmap of ones at once: what nobody
//! has written reads as zeros from the block, too, and writing to it takes nothing more.

mod bitmaps;
mod blocks;
mod pages;
mod space;
mod tickets;

use std::collections::VecDeque;

use self::bitmaps::{Bitmaps, Found, State};
use self::blocks::Blocks;
use self::pages::Pages;
use self::space::Space;
use self::tickets::{List, Needs, Tickets};
use super::layout::{Piece, batmap_pieces};
use super::{Batmap, FOOTER_SIZE, Footer, Image, Kind, Table, bitmap};
use crate::{
    Ask, Durability, Fail, LastStep, Layer, LayerFile, Meta, MetaId, MetaOp, Op, Plan, SECTOR_SIZE, Settled, Ticket,
};

/// The one file of an image.
const FILE: LayerFile = LayerFile(0);

/// Until some metadata is there, or settled.
const WAIT: Plan = Plan::Wait { until: None };

/// How an image is used.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// What is between data and metadata.
    pub durability: Durability,
    /// What is written beyond the end of the file leaves zeros before it: it is a regular file, and nothing is behind the image.
    pub zeros: bool,
    /// Bytes of the file, or those of the device that blocks can have. A file's last sector is none's, and zeros.
    pub usable: u64,
    /// Bytes that it can have.
    pub limit: u64,
    /// Bytes that it grows by.
    pub step: u64,
    /// The file system is to set those apart at once.
    pub preallocate: bool,
    /// Bytes of memory for bitmaps, about.
    pub bitmap_cache: usize,
    /// Writes under way at a time that take metadata. 0: the image is only read.
    pub tickets: usize,
    /// Where the last footer goes on a device, bytes. On a file it follows the last block.
    pub footer_at: Option<u64>,
}

/// Who waits for a flush.
#[derive(Debug, Default)]
struct Flush {
    /// Writes whose data is to be durable before their bits are written: for the next flush.
    next: List,
    /// For the one that is under way.
    now: List,
    under_way: bool,
}

/// Counters.
#[derive(Debug, Default)]
struct Counters {
    bitmap_hits: u64,
    bitmap_reads: u64,
    bitmap_writes: u64,
    table_writes: u64,
    flushes: u64,
    blocks_added: u64,
}

/// A dynamic or differencing image in use.
#[derive(Debug)]
pub struct Disk {
    size: u64,
    block_size: u64,
    bitmap_len: u64,
    /// Sectors that are not here are the parent's.
    differencing: bool,
    table: Table,
    table_at: u64,
    full: Batmap,
    bitmaps: Bitmaps,
    pages: Pages,
    tickets: Tickets,
    blocks: Blocks,
    space: Space,
    flush: Flush,
    durability: Durability,
    footer: Footer,
    footer_at: Option<u64>,
    /// Something was written.
    written: bool,
    /// New blocks have a bitmap of ones at once.
    ones: bool,
    /// Slots whose bitmap is to be read.
    loads: VecDeque<u32>,
    /// Slots whose bitmap is to be written.
    writes: VecDeque<u32>,
    counters: Counters,
}

/// What an I/O of ours is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Own {
    /// The bitmap of a slot is read.
    Load(u32),
    /// It is written.
    Bits(u32),
    /// The bitmap of a new block is written.
    NewBits(u32),
    /// A sector of the table is.
    Table(u32),
    Flush,
    Extend,
}

impl From<Own> for MetaId {
    fn from(own: Own) -> MetaId {
        let (kind, index) = match own {
            Own::Load(index) => (0, index),
            Own::Bits(index) => (1, index),
            Own::NewBits(index) => (2, index),
            Own::Table(index) => (3, index),
            Own::Flush => (4, 0),
            Own::Extend => (5, 0),
        };
        MetaId(kind << 32 | u64::from(index))
    }
}

impl From<MetaId> for Own {
    fn from(id: MetaId) -> Own {
        let index = id.0 as u32;
        match id.0 >> 32 {
            0 => Own::Load(index),
            1 => Own::Bits(index),
            2 => Own::NewBits(index),
            3 => Own::Table(index),
            4 => Own::Flush,
            _ => Own::Extend,
        }
    }
}

impl Disk {
    /// An image that is not fixed, as it was read; `image` is none of a fixed one's.
    pub fn new(image: &Image, settings: &Settings) -> Option<Disk> {
        let header = image.header.as_ref()?;
        let bitmap_len = header.bitmap_size();
        let full = image.batmap.clone().unwrap_or_else(|| Batmap::empty(0, image.table.blocks()));
        let Settings { limit, step, preallocate, durability, bitmap_cache, .. } = *settings;
        // Most blocks are known by a small copy of their bitmap. The whole one is for those that are written, or odd.
        let (blocks, len) = (image.table.blocks() as usize, bitmap_len as usize);
        let bitmaps = Bitmaps::new((bitmap_cache / 3 / len).min(blocks), len);
        let pages = Pages::new((bitmap_cache / 3 * 2 / Pages::cost(len)).min(blocks), len);
        let differencing = image.kind == Kind::Differencing;
        let tail = if settings.zeros { SECTOR_SIZE } else { 0 };
        let mut disk = Disk {
            size: image.size,
            block_size: header.block_size().into(),
            bitmap_len,
            differencing,
            table: image.table.clone(),
            table_at: header.table_at(),
            full,
            bitmaps,
            pages,
            tickets: Tickets::new(settings.tickets),
            blocks: Blocks::new(settings.tickets),
            space: Space::new(image.end(), settings.usable, tail, limit, step, preallocate),
            flush: Flush::default(),
            durability,
            footer: image.footer,
            footer_at: settings.footer_at,
            written: false,
            ones: settings.zeros && !differencing,
            loads: VecDeque::new(),
            writes: VecDeque::new(),
            counters: Counters::default(),
        };
        disk.loads.reserve_exact(disk.bitmaps.count());
        disk.writes.reserve_exact(disk.bitmaps.count());
        Some(disk)
    }

    /// It was not closed when it was used last, and may have been written then: closing it says so to its children.
    pub fn was_in_use(&mut self) {
        self.written = true;
    }

    fn read(&mut self, block: u32, first: u32, count: u32) -> Plan {
        let Some(at) = self.table.get(block) else { return Plan::Below { count: bytes(count) } };
        let at = at + self.bitmap_len + bytes(first);
        if self.full.is_full(block) {
            return Plan::Data { file: FILE, at, count: bytes(count), ticket: None };
        }
        let known = self.pages.run(block, first, count).map(Ok);
        let run = known.unwrap_or_else(|| self.bitmap(block).map(|slot| self.run(slot, first, count)));
        let (there, run) = match run {
            Ok(run) => run,
            Err(plan) => return plan,
        };
        match there {
            true => Plan::Data { file: FILE, at, count: bytes(run), ticket: None },
            false => Plan::Below { count: bytes(run) },
        }
    }

    /// Sectors from `first` on, at most `count`, that are all here, or all not; and which.
    fn run(&self, slot: u32, first: u32, count: u32) -> (bool, u32) {
        let run = bitmap::runs(self.bitmaps.bits(slot), first..first + count).next();
        run.map_or((false, count), |(there, run)| (there, run.end - run.start))
    }

    /// The slot with a block's bitmap, or what is to be said as long as it is not there.
    fn bitmap(&mut self, block: u32) -> Result<u32, Plan> {
        match self.bitmaps.find(block) {
            Found::Loaded(slot) => {
                self.counters.bitmap_hits += 1;
                Ok(slot)
            }
            Found::Load(slot) => {
                if self.pages.expand(block, self.bitmaps.bits_mut(slot)) {
                    self.bitmaps.slot(slot).state = State::Loaded;
                    return Ok(slot);
                }
                self.loads.push_back(slot);
                Err(WAIT)
            }
            Found::Loading | Found::NoRoom => Err(WAIT),
            Found::Failed => Err(Plan::Fail(Fail::Io)),
        }
    }

    fn write(&mut self, block: u32, first: u32, count: u32) -> Plan {
        let Some(at) = self.table.get(block) else { return self.write_new(block, first, count) };
        let at = at + self.bitmap_len + bytes(first);
        let data = |ticket| Plan::Data { file: FILE, at, count: bytes(count), ticket };
        if self.full.is_full(block) {
            return data(None);
        }
        let slot = match self.bitmap(block) {
            Ok(slot) => slot,
            Err(plan) => return plan,
        };
        if self.run(slot, first, count) == (true, count) {
            return data(None);
        }
        if !self.tickets.room() {
            return WAIT;
        }
        self.bitmaps.slot(slot).pins += 1;
        data(Some(self.tickets.take(Needs::Bits { slot }, first, count)))
    }

    /// The data of a write is down; its sectors have to be marked in the bitmap of a slot.
    fn mark(&mut self, slot: u32, ticket: Ticket) {
        match self.durability {
            Durability::Flush => self.tickets.push(&mut self.flush.next, ticket),
            Durability::Order => self.mark_now(slot, ticket),
        }
    }

    fn mark_now(&mut self, slot: u32, ticket: Ticket) {
        let place = self.bitmaps.slot(slot);
        self.tickets.push(&mut place.next, ticket);
        if !std::mem::replace(&mut place.writing, true) {
            self.writes.push_back(slot);
        }
    }

    /// A write is done, or has failed. It holds on to its bitmap no longer.
    fn settle(&mut self, ticket: Ticket, done: bool) {
        let slot = match self.tickets.get(ticket).needs {
            Needs::Bits { slot } => Some(slot),
            Needs::Block { new } => self.blocks.get(new).slot,
        };
        if let Some(slot) = slot {
            self.bitmaps.slot(slot).pins -= 1;
        }
        self.tickets.settle(ticket, done);
    }

    fn bitmap_read(&mut self, slot: u32, bytes: Option<&[u8]>) {
        self.bitmaps.slot(slot).state = if bytes.is_some() { State::Loaded } else { State::Failed };
        if let Some(bytes) = bytes {
            self.bitmaps.bits_mut(slot).copy_from_slice(bytes);
            self.note(slot);
        }
    }

    fn bitmap_written(&mut self, slot: u32, done: bool) {
        let mut now = std::mem::take(&mut self.bitmaps.slot(slot).now);
        while let Some(ticket) = self.tickets.pop(&mut now) {
            if done {
                mark(self.bitmaps.bits_mut(slot), self.tickets.get(ticket));
            }
            self.settle(ticket, done);
        }
        let place = self.bitmaps.slot(slot);
        place.writing = !place.next.is_empty();
        if place.writing {
            self.writes.push_back(slot);
        }
        self.note(slot);
    }

    /// The bitmap in a slot is what the file has: it may be full, or have a small copy.
    fn note(&mut self, slot: u32) {
        let block = self.bitmaps.slot(slot).block;
        let bits = self.bitmaps.bits(slot);
        if bitmap::is_full(bits, (self.block_size / SECTOR_SIZE) as u32) {
            self.full.set(block, true);
        }
        self.pages.keep(block, bits);
    }

    fn flushed(&mut self, done: bool) {
        self.flush.under_way = false;
        self.space.flushed(done);
        let mut now = std::mem::take(&mut self.flush.now);
        while let Some(ticket) = self.tickets.pop(&mut now) {
            match self.tickets.get(ticket).needs {
                Needs::Bits { slot } if done => self.mark_now(slot, ticket),
                _ => self.settle(ticket, false),
            }
        }
        self.blocks_flushed(done);
    }

    /// Begins a flush for all who wait for one.
    fn next_flush(&mut self) -> bool {
        if self.flush.under_way {
            return false;
        }
        let blocks = self.blocks.flush();
        let space = self.space.flush();
        let bits = !self.flush.next.is_empty();
        self.flush.under_way = blocks || space || bits;
        self.flush.now = std::mem::take(&mut self.flush.next);
        self.flush.under_way
    }

    fn meta(&mut self, own: Own) -> Meta {
        let sector = SECTOR_SIZE;
        let block_at = |table: &Table, block| table.get(block).expect("only blocks that are there have bitmaps");
        let counters = &mut self.counters;
        let (op, at, len) = match own {
            Own::Load(slot) => {
                counters.bitmap_reads += 1;
                (MetaOp::Read, block_at(&self.table, self.bitmaps.slot(slot).block), self.bitmap_len)
            }
            Own::Bits(slot) => {
                counters.bitmap_writes += 1;
                (MetaOp::Write, block_at(&self.table, self.bitmaps.slot(slot).block), self.bitmap_len)
            }
            Own::NewBits(new) => {
                counters.bitmap_writes += 1;
                (MetaOp::Write, self.blocks.get(new).at, self.bitmap_len)
            }
            Own::Table(number) => {
                counters.table_writes += 1;
                (MetaOp::Write, self.table_at + u64::from(number) * sector, sector)
            }
            Own::Flush => {
                counters.flushes += 1;
                (MetaOp::Flush, 0, 0)
            }
            Own::Extend => unreachable!("it has its range from elsewhere"),
        };
        Meta { id: own.into(), op, file: FILE, at, len }
    }
}

/// Marks the sectors of a write in a bitmap.
fn mark(bits: &mut [u8], write: &tickets::State) {
    bitmap::set(bits, write.first..write.first + write.count);
}

fn bytes(sectors: u32) -> u64 {
    u64::from(sectors) * SECTOR_SIZE
}

impl Layer for Disk {
    fn name(&self) -> &'static str {
        "vhd"
    }

    fn size(&self) -> Option<u64> {
        Some(self.size)
    }

    fn plan(&mut self, ask: &Ask) -> Plan {
        if ask.op == Op::Flush {
            return Plan::Data { file: FILE, at: 0, count: 0, ticket: None };
        }
        let extent = ask.extent;
        let block = (extent.offset / self.block_size) as u32;
        let within = extent.offset % self.block_size;
        let count = extent.len.min(self.block_size - within) / SECTOR_SIZE;
        let (first, count) = ((within / SECTOR_SIZE) as u32, count as u32);
        self.written |= ask.op.writes();
        let plan = match ask.op {
            Op::Write => return self.write(block, first, count),
            Op::WriteZeroes if self.differencing => return self.write(block, first, count),
            _ => self.read(block, first, count),
        };
        match plan {
            // What is not here has nothing to be given back, and reads as zeros where there is no parent.
            Plan::Below { count } if !self.differencing || ask.op.writes() => Plan::Zeros { count, ticket: None },
            plan => plan,
        }
    }

    fn tickets(&self) -> usize {
        self.tickets.count()
    }

    fn ended(&mut self, ticket: Ticket, done: bool) {
        match self.tickets.get(ticket).needs {
            Needs::Block { new } => self.block_written(new, ticket, done),
            Needs::Bits { slot } if done => self.mark(slot, ticket),
            Needs::Bits { .. } => self.settle(ticket, false),
        }
    }

    fn settled(&mut self) -> Option<Settled> {
        self.tickets.next_settled()
    }

    fn next_meta(&mut self) -> Option<Meta> {
        if let Some((at, len)) = self.space.extend() {
            return Some(Meta { id: Own::Extend.into(), op: MetaOp::Extend, file: FILE, at, len });
        }
        let own = if let Some(slot) = self.loads.pop_front() {
            Own::Load(slot)
        } else if let Some(slot) = self.writes.pop_front() {
            let place = self.bitmaps.slot(slot);
            place.now = std::mem::take(&mut place.next);
            Own::Bits(slot)
        } else if let Some(new) = self.blocks.next_bitmap() {
            Own::NewBits(new)
        } else if let Some(sector) = self.blocks.next_table() {
            Own::Table(sector)
        } else if self.next_flush() {
            Own::Flush
        } else {
            return None;
        };
        Some(self.meta(own))
    }

    fn meta_bytes(&mut self, id: MetaId, to: &mut [u8]) {
        match id.into() {
            Own::Bits(slot) => {
                to.copy_from_slice(self.bitmaps.bits(slot));
                let now = self.bitmaps.slot(slot).now;
                self.tickets.iter(now).for_each(|ticket| mark(to, ticket));
            }
            Own::NewBits(new) => {
                to.fill(0);
                if self.ones {
                    let own = bitmap::own_sectors(self.size, self.block_size, self.blocks.get(new).block);
                    bitmap::set(to, 0..own);
                }
                let ready = self.blocks.get(new).ready;
                self.tickets.iter(ready).for_each(|ticket| mark(to, ticket));
            }
            Own::Table(sector) => {
                let from = sector * blocks::ENTRIES;
                self.table.write(from, to);
                self.blocks.write(sector, to);
            }
            Own::Load(_) | Own::Flush | Own::Extend => {}
        }
    }

    fn meta_done(&mut self, id: MetaId, result: Option<&[u8]>) {
        let done = result.is_some();
        match id.into() {
            Own::Load(slot) => self.bitmap_read(slot, result),
            Own::Bits(slot) => self.bitmap_written(slot, done),
            Own::NewBits(new) => self.block_bitmap_written(new, done),
            Own::Table(sector) => self.table_written(sector, done),
            Own::Flush => self.flushed(done),
            Own::Extend => self.space.extended(done),
        }
    }

    fn close(&mut self, unix_seconds: u64, step: &mut dyn FnMut(LastStep)) {
        if self.full.at != 0 {
            let last = |Piece { at, bytes }| LastStep::Write { file: FILE, at, bytes, keep: None };
            batmap_pieces(&self.full).into_iter().for_each(|piece| step(last(piece)));
        }
        if self.written {
            self.footer.set_time(unix_seconds);
            self.footer.seal();
        }
        // The copy first: until it is there, a file without a last footer has none that says the same.
        step(self.footer.last_write(0, 0));
        let at = self.footer_at.unwrap_or(self.space.end.next_multiple_of(SECTOR_SIZE));
        step(self.footer.last_write(at, 0));
        if self.footer_at.is_none() {
            step(LastStep::Resize { file: FILE, size: at + FOOTER_SIZE as u64 });
        }
    }

    fn meta_len(&self) -> usize {
        self.bitmap_len.max(SECTOR_SIZE) as usize
    }

    fn inspect(&self, show: &mut dyn FnMut(&'static str, u64)) {
        let Counters { bitmap_hits, bitmap_reads, bitmap_writes, table_writes, flushes, blocks_added } =
            self.counters;
        show("blocks", self.table.blocks().into());
        show("blocks_added", blocks_added);
        show("bitmap_slots", self.bitmaps.count() as u64);
        show("bitmap_hits", bitmap_hits);
        show("bitmap_reads", bitmap_reads);
        show("bitmap_writes", bitmap_writes);
        show("table_writes", table_writes);
        show("flushes", flushes);
        show("writes_unsettled", self.tickets.used() as u64);
        show("blocks_unsettled", self.blocks.used() as u64);
    }

    fn bytes(&self) -> usize {
        4 * self.table.blocks() as usize + self.full.bits().len() + self.bitmaps.bytes() + self.pages.bytes()
    }
}
