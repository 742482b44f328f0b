//! Blocks that the table does not point to yet.

use super::tickets::{List, Needs};
use super::{Disk, Found, State, WAIT, bytes, mark};
use crate::vhd::Table;
use crate::{Durability, Fail, LayerFile, Plan, SECTOR_SIZE, Ticket};

use super::space::Room;

/// Entries of the table in a sector.
pub(super) const ENTRIES: u32 = 128;

const NONE: u32 = u32::MAX;
const NOWHERE: u64 = u64::MAX;

/// New blocks at a time, at most. They are looked through one by one.
const MOST: usize = 64;

/// How far a new block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Free for another.
    Free,
    /// No data is down; a bitmap of ones is.
    Data,
    /// Its bitmap is to be written.
    Bitmap,
    /// That is being done.
    BitmapNow,
    /// What it consists of is to be made durable.
    Flush,
    /// That is being done.
    FlushNow,
    /// Its entry is to be written.
    Table,
    /// That is being done.
    TableNow,
    /// It is there. Writes that were planned before may be under way.
    Mapped,
    /// It could not be made. Writes may be under way.
    Failed,
}

/// A block that the table does not point to yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct New {
    pub(super) block: u32,
    /// Where its bitmap begins in the file, bytes.
    pub(super) at: u64,
    /// Where its bitmap will be; none if that is all ones.
    pub(super) slot: Option<u32>,
    phase: Phase,
    /// Writes whose data is not down.
    writing: u32,
    /// Writes whose data is down and that go with the block.
    pub(super) ready: List,
    /// Writes whose data was down too late for that.
    later: List,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Blocks {
    news: Vec<New>,
    /// How many are in each phase that somebody asks for: bitmap, flush, table.
    waiting: [u32; 3],
    used: usize,
    /// Sectors of the table that are being written.
    busy: Vec<u32>,
    /// Room that was taken for a block that came to nothing.
    spare: Vec<(u32, u64)>,
}

impl Phase {
    /// Index into `Blocks::waiting`.
    fn counter(self) -> Option<usize> {
        match self {
            Phase::Bitmap => Some(0),
            Phase::Flush => Some(1),
            Phase::Table => Some(2),
            _ => None,
        }
    }
}

impl Blocks {
    /// For at most `tickets` writes under way.
    pub(super) fn new(tickets: usize) -> Blocks {
        let count = tickets.min(MOST);
        let list = List::default();
        let (block, phase) = (NONE, Phase::Free);
        let new = New { block, at: 0, slot: None, phase, writing: 0, ready: list, later: list };
        Blocks {
            news: vec![new; count],
            waiting: [0; 3],
            used: 0,
            busy: Vec::with_capacity(count),
            spare: Vec::with_capacity(count),
        }
    }

    pub(super) fn get(&self, new: u32) -> &New {
        &self.news[new as usize]
    }

    pub(super) fn used(&self) -> usize {
        self.used
    }

    fn get_mut(&mut self, new: u32) -> &mut New {
        &mut self.news[new as usize]
    }

    fn go(&mut self, new: u32, phase: Phase) {
        let before = std::mem::replace(&mut self.news[new as usize].phase, phase);
        for (counter, step) in [(before.counter(), u32::MAX), (phase.counter(), 1)] {
            if let Some(counter) = counter {
                self.waiting[counter] = self.waiting[counter].wrapping_add(step);
            }
        }
    }

    fn all(&self) -> std::ops::Range<u32> {
        0..self.news.len() as u32
    }

    fn in_phase(&self, phase: Phase) -> impl Iterator<Item = u32> {
        self.all().filter(move |new| self.get(*new).phase == phase)
    }

    /// The new block of that number.
    fn find(&self, block: u32) -> Option<u32> {
        if self.used == 0 {
            return None;
        }
        self.all().find(|new| self.get(*new).block == block)
    }

    /// One whose bitmap is to be written, and is being written from now on.
    pub(super) fn next_bitmap(&mut self) -> Option<u32> {
        if self.waiting[0] == 0 {
            return None;
        }
        let new = self.in_phase(Phase::Bitmap).next()?;
        self.go(new, Phase::BitmapNow);
        Some(new)
    }

    /// A sector of the table that is to be written, and is being written from now on.
    pub(super) fn next_table(&mut self) -> Option<u32> {
        if self.waiting[2] == 0 {
            return None;
        }
        let sector_of = |blocks: &Blocks, new| blocks.get(new).block / ENTRIES;
        let free = |new: &u32| !self.busy.contains(&sector_of(self, *new));
        let sector = sector_of(self, self.in_phase(Phase::Table).find(free)?);
        self.busy.push(sector);
        for new in self.all() {
            if self.get(new).phase == Phase::Table && sector_of(self, new) == sector {
                self.go(new, Phase::TableNow);
            }
        }
        Some(sector)
    }

    /// Puts the entries that are being written into the bytes of a sector of the table.
    pub(super) fn write(&self, sector: u32, to: &mut [u8]) {
        for new in self.in_phase(Phase::TableNow).map(|new| self.get(new)) {
            if new.block / ENTRIES == sector {
                let place = 4 * (new.block % ENTRIES) as usize;
                to[place..place + 4].copy_from_slice(&Table::entry(new.at));
            }
        }
    }

    /// Whether some want a flush, which begins now.
    pub(super) fn flush(&mut self) -> bool {
        let any = self.waiting[1] > 0;
        for new in if any { self.all() } else { 0..0 } {
            if self.get(new).phase == Phase::Flush {
                self.go(new, Phase::FlushNow);
            }
        }
        any
    }
}

impl Disk {
    /// A write to a block that the table does not point to.
    pub(super) fn write_new(&mut self, block: u32, first: u32, count: u32) -> Plan {
        if !self.tickets.room() {
            return WAIT;
        }
        let new = match self.blocks.find(block) {
            Some(new) if self.blocks.get(new).phase == Phase::Failed => return WAIT,
            Some(new) => new,
            None => match self.new_block(block) {
                Ok(new) => new,
                Err(plan) => return plan,
            },
        };
        let ticket = self.tickets.take(Needs::Block { new }, first, count);
        let place = self.blocks.get_mut(new);
        place.writing += 1;
        let (at, slot) = (place.at + self.bitmap_len + bytes(first), place.slot);
        if let Some(slot) = slot {
            self.bitmaps.slot(slot).pins += 1;
        }
        Plan::Data { file: LayerFile(0), at, count: bytes(count), ticket: Some(ticket) }
    }

    /// Finds room for a block.
    fn new_block(&mut self, block: u32) -> Result<u32, Plan> {
        let Some(new) = self.blocks.in_phase(Phase::Free).next() else { return Err(WAIT) };
        let slot = match self.ones {
            true => None,
            false => match self.bitmaps.find(block) {
                Found::Load(slot) => Some(slot),
                _ => return Err(WAIT),
            },
        };
        let room = match self.blocks.spare.iter().position(|(spare, _)| *spare == block) {
            Some(index) => Room::At(self.blocks.spare.swap_remove(index).1),
            None => self.space.take(self.bitmap_len, self.bitmap_len + self.block_size),
        };
        let at = match room {
            Room::At(at) => at,
            Room::Soon | Room::None | Room::Failed => {
                if let Some(slot) = slot {
                    self.bitmaps.forget(slot);
                }
                return Err(match room {
                    Room::Soon => WAIT,
                    Room::Failed => Plan::Fail(Fail::Io),
                    _ => Plan::Fail(Fail::NoSpace),
                });
            }
        };
        if let Some(slot) = slot {
            self.bitmaps.bits_mut(slot).fill(0);
            // The block's own, until it is there.
            self.bitmaps.slot(slot).pins += 1;
            self.bitmaps.slot(slot).state = State::Loaded;
        }
        let list = List::default();
        let phase = Phase::Data;
        *self.blocks.get_mut(new) = New { block, at, slot, phase, writing: 0, ready: list, later: list };
        self.blocks.used += 1;
        if self.ones {
            // It does not depend on what is written.
            self.blocks.go(new, Phase::Bitmap);
        }
        Ok(new)
    }

    /// The data of a write to a new block is down, or could not be written.
    pub(super) fn block_written(&mut self, new: u32, ticket: Ticket, done: bool) {
        let place = self.blocks.get_mut(new);
        place.writing -= 1;
        let phase = place.phase;
        match phase {
            _ if !done || phase == Phase::Failed => self.settle(ticket, false),
            Phase::Mapped => self.join(new, ticket),
            Phase::Data => {
                self.tickets.push(&mut place.ready, ticket);
                // A bitmap of ones is down already.
                self.blocks.go(new, if self.ones { Phase::Table } else { Phase::Bitmap });
            }
            Phase::Bitmap => self.tickets.push(&mut place.ready, ticket),
            Phase::BitmapNow if self.ones => self.tickets.push(&mut place.ready, ticket),
            _ => self.tickets.push(&mut place.later, ticket),
        }
        self.tidy(new);
    }

    /// Goes on with a write to a block that was new when it was planned, and is there now.
    fn join(&mut self, new: u32, ticket: Ticket) {
        match self.blocks.get(new).slot {
            None => self.settle(ticket, true),
            Some(slot) => {
                self.tickets.get(ticket).needs = Needs::Bits { slot };
                self.mark(slot, ticket);
            }
        }
    }

    /// The bitmap of a new block is down, or could not be written.
    pub(super) fn block_bitmap_written(&mut self, new: u32, done: bool) {
        let place = self.blocks.get(new);
        let next = match self.durability {
            _ if !done => return self.fail(new),
            // Of a bitmap of ones the rest of the block is zeros in any case, as is what is not there.
            _ if self.ones && place.ready.is_empty() => Phase::Data,
            _ if self.ones => Phase::Table,
            Durability::Flush => Phase::Flush,
            Durability::Order => Phase::Table,
        };
        self.blocks.go(new, next);
        self.tidy(new);
    }

    /// What was written of new blocks is durable, or could not be made so.
    pub(super) fn blocks_flushed(&mut self, done: bool) {
        for new in self.blocks.all() {
            match self.blocks.get(new).phase {
                Phase::FlushNow if done => self.blocks.go(new, Phase::Table),
                Phase::FlushNow => self.fail(new),
                _ => {}
            }
        }
    }

    /// A sector of the table is down, or could not be written.
    pub(super) fn table_written(&mut self, sector: u32, done: bool) {
        self.blocks.busy.retain(|busy| *busy != sector);
        for new in self.blocks.all() {
            let place = *self.blocks.get(new);
            if place.phase != Phase::TableNow || place.block / ENTRIES != sector {
                continue;
            }
            if done { self.mapped(new, place) } else { self.fail(new) }
        }
    }

    fn mapped(&mut self, new: u32, New { block, at, slot, mut ready, mut later, .. }: New) {
        self.table.set(block, at);
        self.counters.blocks_added += 1;
        self.blocks.go(new, Phase::Mapped);
        if slot.is_none() {
            self.full.set(block, true);
        }
        while let Some(ticket) = self.tickets.pop(&mut ready) {
            if let Some(slot) = slot {
                mark(self.bitmaps.bits_mut(slot), self.tickets.get(ticket));
            }
            self.settle(ticket, true);
        }
        while let Some(ticket) = self.tickets.pop(&mut later) {
            self.join(new, ticket);
        }
        if let Some(slot) = slot {
            self.bitmaps.slot(slot).pins -= 1;
            self.note(slot);
        }
        self.tidy(new);
    }

    /// A new block can't be made.
    fn fail(&mut self, new: u32) {
        let place = self.blocks.get_mut(new);
        if place.phase == Phase::TableNow {
            // The table may point there all the same, after a crash.
            place.at = NOWHERE;
        }
        self.blocks.go(new, Phase::Failed);
        let place = self.blocks.get_mut(new);
        let (mut ready, mut later) = (std::mem::take(&mut place.ready), std::mem::take(&mut place.later));
        while let Some(ticket) = self.tickets.pop(&mut ready).or_else(|| self.tickets.pop(&mut later)) {
            self.settle(ticket, false);
        }
        self.tidy(new);
    }

    /// Forgets a new block that nobody writes any more, if it is there, or came to nothing.
    fn tidy(&mut self, new: u32) {
        let place = *self.blocks.get(new);
        let nothing = place.phase == Phase::Data && place.ready.is_empty();
        let over = nothing || matches!(place.phase, Phase::Mapped | Phase::Failed);
        if place.writing > 0 || !over {
            return;
        }
        if place.phase != Phase::Mapped {
            // What is there may be this block's, and so it is no other's.
            if place.at != NOWHERE && self.blocks.spare.len() < self.blocks.spare.capacity() {
                self.blocks.spare.push((place.block, place.at));
            }
            if let Some(slot) = place.slot {
                self.bitmaps.slot(slot).pins -= 1;
                self.bitmaps.forget(slot);
            }
        }
        self.blocks.go(new, Phase::Free);
        self.blocks.get_mut(new).block = NONE;
        self.blocks.used -= 1;
    }
}

const _: () = assert!(ENTRIES as u64 * 4 == SECTOR_SIZE);
