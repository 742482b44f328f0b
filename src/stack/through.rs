//! Copies through memory of the stack's: what a plan calls [`Through`].
//!
//! A copy has a place in the memory for a block. It reads what it needs by requests of the stack's own, which begin at its layer, or below; then
//! its layer may transform the block; then it writes it, or gives the guest its part. Reads of its own may be copies again (a part of a cluster that
//! is packed): of the places some are kept for those, so that no copy waits for itself.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use drivers::{Origin, Through};
use nix::errno::Errno;

use super::pieces::Over;
use super::{ALIGN, Stack, Started, own_tag};
use crate::queue::{Queue, Transfer};
use crate::request::{Op, PieceId, RequestId, Slots};
use crate::sys::io::IoOp;
use crate::sys::memory::Memory;

/// Copies at a time, at most.
pub(super) const COPIES_MAX: usize = 8;

/// Requests of its own that a copy has at a time, at most: what is before the guest's part of a block, and what is behind it.
pub(super) const READS_MAX: usize = 2;

/// Copies within copies: a copy whose reads are copies, and those of these.
const DEPTH_MAX: u8 = 2;

/// Memory for the places, about; there are at least as many as copies can be nested.
const MEMORY: usize = 2 << 20;

/// Marks the tag of a request of a copy's; the rest is its index.
const MARK: u64 = 1 << 63;

/// How far a copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// What the block takes from the chain is being read.
    Gathers,
    /// What is stored is being read or written.
    Moves,
}

#[derive(Clone, Copy, Debug)]
struct Copy {
    owner: RequestId,
    /// First byte of the owner's payload.
    at: u64,
    /// First byte of the disk.
    offset: u64,
    op: IoOp,
    layer: usize,
    through: Through,
    piece: Option<PieceId>,
    depth: u8,
    step: Step,
    /// Requests of its own that are not done.
    parts: u8,
    errno: Option<Errno>,
}

impl Copy {
    /// Whether it ends with a write to the file.
    fn stores(&self) -> bool {
        self.op != IoOp::Read || self.through.fill
    }
}

/// All copies, and their memory.
pub(super) struct Copies {
    memory: Arc<Memory>,
    /// Bytes of each place.
    place: usize,
    copies: Vec<Option<Copy>>,
    free: Vec<u32>,
    /// Requests of copies that are not wholly planned.
    to_start: VecDeque<RequestId>,
    /// Copies of which all that was under way is done.
    ready: VecDeque<u32>,
    stored: Vec<u8>,
    content: Vec<u8>,
}

impl Copies {
    /// For blocks of up to `longest` bytes.
    pub(super) fn new(longest: usize) -> io::Result<Copies> {
        let place = longest.next_multiple_of(ALIGN);
        let count = (MEMORY / place).clamp(usize::from(DEPTH_MAX) + 1, COPIES_MAX);
        Ok(Copies {
            memory: Arc::new(Memory::anonymous(count * place)?),
            place,
            copies: vec![None; count],
            free: (0..count as u32).rev().collect(),
            to_start: VecDeque::with_capacity(count * READS_MAX),
            ready: VecDeque::with_capacity(count),
            stored: vec![0; longest],
            content: vec![0; longest],
        })
    }

    pub(super) fn bytes(&self) -> usize {
        self.memory.len() + self.stored.len() + self.content.len()
    }

    fn of(&mut self, index: u32) -> &mut Copy {
        self.copies[index as usize].as_mut().expect("it is under way")
    }

    /// Which copy a request of the stack's is for; none: it is metadata.
    fn index(tag: u64) -> Option<u32> {
        (tag & MARK != 0).then_some((tag & !MARK) as u32)
    }

    /// The depth of a copy that a request with that tag would begin.
    fn depth(&self, own: Option<u64>) -> u8 {
        let copy = own.and_then(Copies::index).and_then(|index| self.copies[index as usize]);
        copy.map_or(0, |copy| copy.depth + 1)
    }
}

/// What a copy is to do, and for which part of which request.
pub(super) struct Wanted {
    pub(super) owner: RequestId,
    pub(super) at: u64,
    pub(super) offset: u64,
    pub(super) op: IoOp,
    pub(super) layer: usize,
    pub(super) through: Through,
    pub(super) piece: Option<PieceId>,
}

impl Stack {
    /// Whether a request, of the stack's own if it has such a tag, may begin a copy now.
    pub(super) fn may_copy(&self, own: Option<u64>) -> bool {
        let kept = |copies: &Copies| usize::from(DEPTH_MAX.saturating_sub(copies.depth(own)));
        self.copies.as_ref().is_none_or(|copies| copies.free.len() > kept(copies))
    }

    /// The layer where the reads of a copy begin: its own, whose data is part of the block; or the one below, to fill.
    pub(super) fn begins_at(&self, tag: u64) -> Option<usize> {
        let index = Copies::index(tag)?;
        let copy = self.copies.as_ref()?.copies[index as usize]?;
        Some(copy.layer + usize::from(copy.through.fill))
    }

    /// Begins a copy. There is a place for it.
    pub(super) fn copy(&mut self, wanted: Wanted, slots: &mut Slots) {
        let Wanted { owner, at, offset, op, layer, through, piece } = wanted;
        let request = slots.get_mut(owner);
        request.pieces += 1;
        let own = own_tag(request);
        let copies = self.copies.as_mut().expect("a layer with blocks has memory for them");
        let depth = copies.depth(own);
        let index = copies.free.pop().expect("somebody has looked");
        let (step, errno) = (Step::Gathers, None);
        copies.copies[index as usize] =
            Some(Copy { owner, at, offset, op, layer, through, piece, depth, step, parts: 0, errno });
        let block = through.block;
        let end = block.offset + block.len;
        match op {
            IoOp::Read if through.fill => self.read(index, block.offset, end, slots),
            IoOp::Read => {}
            _ => {
                self.read(index, block.offset, offset, slots);
                self.read(index, offset + through.count, end, slots);
            }
        }
        if self.copies().of(index).parts == 0 {
            self.ready(index);
        }
    }

    fn ready(&mut self, index: u32) {
        self.copies().ready.push_back(index);
        self.meta_due = true;
    }

    /// The copies and their memory. There is a copy.
    fn copies(&mut self) -> &mut Copies {
        self.copies.as_mut().expect("there is a copy")
    }

    /// Has a part of the block read, as the chain has it. What is beyond the disk's end is zeros.
    fn read(&mut self, index: u32, from: u64, to: u64, slots: &mut Slots) {
        let copies = self.copies.as_mut().expect("there is a copy");
        let (block, layer) = (copies.of(index).through.block, copies.of(index).layer);
        let size = self.layers[layer..].iter().find_map(|layer| layer.layer.size()).unwrap_or(u64::MAX);
        let place = index as usize * copies.place;
        let there = to.min(size).max(from);
        copies.memory.zero(place + (there - block.offset) as usize, (to - there) as usize);
        if from < there {
            copies.of(index).parts += 1;
            let id = own(copies, index, Op::Read, (from, there - from), (from - block.offset) as usize, slots);
            slots.get_mut(id).planning = true;
            copies.to_start.push_back(id);
        }
    }

    /// A request of a copy's is done.
    pub(super) fn copied(&mut self, id: RequestId, slots: &mut Slots) {
        let request = slots.get(id);
        let index = Copies::index(request.tag).expect("metadata has its own end");
        let error = request.error;
        slots.release(id);
        let copy = self.copies().of(index);
        copy.parts -= 1;
        copy.errno = copy.errno.or(error);
        if copy.parts == 0 {
            self.ready(index);
        }
    }

    /// Goes on with copies, as far as there is room. True: there was something to do.
    pub(super) fn move_copies(&mut self, slots: &mut Slots, queue: &mut Queue) -> bool {
        let mut moved = false;
        let waiting = self.copies.as_ref().map_or(0, |copies| copies.to_start.len());
        for _ in 0..waiting {
            let Some(id) = self.copies.as_mut().and_then(|copies| copies.to_start.pop_front()) else { break };
            match self.start_own(id, slots, queue) {
                Started::Planned => {}
                // What it waits for may be behind it.
                Started::Waits => {
                    self.copies().to_start.push_back(id);
                    continue;
                }
                Started::NoRoom => {
                    self.copies().to_start.push_front(id);
                    break;
                }
            }
            moved = true;
            let request = slots.get_mut(id);
            request.planning = false;
            if request.pieces == 0 {
                self.all_done(id, slots);
            }
        }
        while queue.has_room()
            && let Some(index) = self.copies.as_mut().and_then(|copies| copies.ready.pop_front())
        {
            self.go_on(index, slots, queue);
            moved = true;
        }
        moved
    }

    #[inline(never)] // one copy of it is enough where it is rare
    fn start_own(&mut self, id: RequestId, slots: &mut Slots, queue: &mut Queue) -> Started {
        self.start(id, slots, queue)
    }

    /// What a copy has begun is done: it takes its next step.
    fn go_on(&mut self, index: u32, slots: &mut Slots, queue: &mut Queue) {
        let copy = *self.copies().of(index);
        if copy.errno.is_some() || copy.step == Step::Moves {
            return self.end(index, slots);
        }
        self.copies().of(index).step = Step::Moves;
        if copy.stores() && !self.transform(drivers::Op::Write, index, slots) {
            self.copies().of(index).errno = Some(Errno::EIO);
            return self.end(index, slots);
        }
        let (op, io) = match copy.op {
            _ if !copy.stores() => (Op::Read, IoOp::Read),
            IoOp::Write { fua } => (Op::Write { fua }, IoOp::Write { fua }),
            _ => (Op::Write { fua: false }, IoOp::Write { fua: false }),
        };
        let Through { at: offset, stored: len, .. } = copy.through;
        let file = self.layers[copy.layer].file(copy.through.file);
        let copies = self.copies();
        let id = own(copies, index, op, (offset, len), 0, slots);
        copies.of(index).parts += 1;
        slots.get_mut(id).pieces = 1;
        let pushed = queue.push(Transfer { op: io, file, offset, len, owner: id, at: 0, piece: None });
        debug_assert!(pushed);
    }

    /// Has the layer change a block between what is stored and what is seen, with the guest's part put into it, or given out of it. As `op` has it:
    /// a read makes of what was read what is seen, a write makes of what is seen what is stored. False: it makes no sense.
    fn transform(&mut self, op: drivers::Op, index: u32, slots: &Slots) -> bool {
        let copies = self.copies.as_mut().expect("there is a copy");
        let copy = *copies.of(index);
        let Copies { memory, stored, content, place, .. } = copies;
        let (place, through) = (index as usize * *place, &copy.through);
        let stored = &mut stored[..through.stored as usize];
        let content = &mut content[..through.block.len as usize];
        let first = (copy.offset - through.block.offset) as usize;
        let part = first..first + through.count as usize;
        let (payload, layer) = (&slots.get(copy.owner).payload, &mut self.layers[copy.layer].layer);
        if op == drivers::Op::Read {
            memory.read(place, stored);
            let done = layer.transform(op, through, stored, content);
            if done {
                payload.put(copy.at, &content[part]);
            }
            return done;
        }
        memory.read(place, content);
        match copy.op {
            IoOp::Read => payload.put(copy.at, &content[part]),
            IoOp::Write { .. } => payload.get(copy.at, &mut content[part]),
            _ => content[part].fill(0),
        }
        let done = layer.transform(op, through, stored, content);
        memory.write(place, stored);
        done
    }

    /// A copy is over, with or without error.
    fn end(&mut self, index: u32, slots: &mut Slots) {
        let mut copy = *self.copies().of(index);
        if copy.errno.is_none() && !copy.stores() && !self.transform(drivers::Op::Read, index, slots) {
            copy.errno = Some(Errno::EIO);
        }
        let copies = self.copies();
        copies.copies[index as usize] = None;
        copies.free.push(index);
        self.hits[copy.layer].count(copy.op, copy.through.count, copy.errno.is_none());
        // What could not be read the guest does not have, whatever the layer says.
        if copy.op == IoOp::Read && (copy.step == Step::Gathers || !copy.through.fill) {
            slots.get_mut(copy.owner).error = slots.get(copy.owner).error.or(copy.errno);
        }
        self.progress = true;
        match copy.piece {
            Some(piece) => {
                if let Some(errno) = copy.errno {
                    self.pieces.fail(piece, errno);
                }
                self.unwind(piece, copy.errno.is_none(), slots);
            }
            None => self.part_done(&Over { owner: copy.owner, errno: copy.errno, flush: false }, slots),
        }
    }

    /// Ends the reads of copies that have not reached the queue.
    pub fn cancel(&mut self, slots: &mut Slots) {
        while let Some(id) = self.copies.as_mut().and_then(|copies| copies.to_start.pop_front()) {
            self.call_off(id, slots);
        }
    }
}

/// A request of a copy's, from byte `at` of its place on.
fn own(copies: &Copies, index: u32, op: Op, (offset, len): (u64, u64), at: usize, slots: &mut Slots) -> RequestId {
    let id = slots.take_own().expect("there are as many as copies need");
    let request = slots.get_mut(id);
    let place = index as usize * copies.place + at;
    request.payload.set(&copies.memory, place, len as u32);
    (request.op, request.offset, request.len) = (op, offset, len);
    (request.tag, request.born) = (MARK | u64::from(index), crate::stats::now());
    request.origin = Origin::Layer(copies.copies[index as usize].map_or(0, |copy| copy.layer as u16));
    (request.planning, request.planned) = (false, 0);
    id
}
