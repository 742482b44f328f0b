//! Requests of frontends, in slots that are made at the start.

use std::sync::Arc;

use nix::errno::Errno;

use crate::sys::memory::Memory;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Image to client.
    Read,
    /// Client to image; with `fua` on stable storage when it is answered.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// BLKIF_OP_WRITE_BARRIER: everything before it is on stable storage before it begins, it is on stable storage
    /// when it is answered, and nothing after it begins before. May have no data.
    Barrier,
    /// What was answered before is on stable storage.
    Flush,
    /// The range is no longer needed.
    Discard,
    /// The range reads as zeros; with `unmap` its space may be given back.
    WriteZeroes {
        /// Whether the space may be given back.
        unmap: bool,
    },
    /// Which parts of the range have data, answered in the payload as
    /// [`IoOp::Status`](crate::sys::io::IoOp::Status) says.
    Status,
}

impl Op {
    /// Kinds, for counters and histograms.
    pub const KINDS: [&'static str; 7] =
        ["read", "write", "barrier", "flush", "discard", "write_zeroes", "block_status"];

    /// Index into [`KINDS`](Self::KINDS).
    pub fn kind(self) -> usize {
        match self {
            Op::Read => 0,
            Op::Write { .. } => 1,
            Op::Barrier => 2,
            Op::Flush => 3,
            Op::Discard => 4,
            Op::WriteZeroes { .. } => 5,
            Op::Status => 6,
        }
    }

    /// Its kind's name.
    pub fn name(self) -> &'static str {
        Self::KINDS[self.kind()]
    }

    /// Whether it changes the image.
    pub fn writes(self) -> bool {
        !matches!(self, Op::Read | Op::Flush | Op::Status)
    }
}

/// A run of bytes in the payload's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub offset: u32,
    /// Bytes.
    pub len: u32,
}

/// Where a request's data is or goes to: segments of the client's memory.
#[derive(Debug, Default)]
pub struct Payload {
    memory: Option<Arc<Memory>>,
    segments: Vec<Segment>,
}

impl Payload {
    fn clear(&mut self) {
        self.memory = None;
        self.segments.clear();
    }

    /// Names the memory.
    pub fn set_memory(&mut self, memory: &Arc<Memory>) {
        self.memory = Some(Arc::clone(memory));
    }

    /// Where its first segment is in the memory.
    pub fn place(&self) -> usize {
        self.segments.first().map_or(0, |segment| segment.offset as usize)
    }

    /// Adds a segment, which must be in the memory. Panics where there is no room: the limit is the frontend's own.
    pub fn push(&mut self, offset: u32, len: u32) {
        match self.segments.last_mut() {
            Some(last) if last.offset.checked_add(last.len) == Some(offset) => last.len += len,
            _ => {
                assert!(self.segments.len() < self.segments.capacity());
                self.segments.push(Segment { offset, len });
            }
        }
    }

    /// The memory; none for a request without data.
    pub fn memory(&self) -> Option<&Arc<Memory>> {
        self.memory.as_ref()
    }

    /// The segments of `len` bytes from byte `at` on, as (offset, length) in the memory.
    pub fn slice(&self, at: u64, len: u64) -> impl Iterator<Item = (usize, usize)> {
        let (mut skip, mut left) = (at, len);
        self.segments.iter().filter_map(move |segment| {
            let full = u64::from(segment.len);
            let from = skip.min(full);
            skip -= from;
            let count = (full - from).min(left);
            left -= count;
            (count > 0).then_some((segment.offset as usize + from as usize, count as usize))
        })
    }

    /// Copies `bytes`, or what there is memory for, to byte `at` and on.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        let Some(memory) = &self.memory else { return };
        let mut from = bytes;
        for (offset, count) in self.slice(at, bytes.len() as u64) {
            let (now, rest) = from.split_at(count);
            memory.write(offset, now);
            from = rest;
        }
    }

    /// Copies the bytes from byte `at` on, as many as `to` has, out.
    pub fn get(&self, at: u64, to: &mut [u8]) {
        let Some(memory) = &self.memory else { return };
        let mut rest = to;
        for (offset, count) in self.slice(at, rest.len() as u64) {
            let (now, later) = rest.split_at_mut(count);
            memory.read(offset, now);
            rest = later;
        }
    }

    /// Bytes of memory.
    pub fn len(&self) -> u64 {
        self.segments.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Zeroes `len` bytes from byte `at` on.
    pub fn zero(&self, at: u64, len: u64) {
        if let Some(memory) = &self.memory {
            self.slice(at, len).for_each(|(offset, count)| memory.zero(offset, count));
        }
    }
}

/// One request.
#[derive(Debug)]
pub struct Request {
    /// What.
    pub op: Op,
    /// First byte of the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// The data of reads and writes, `len` bytes; of a status, room for the answer.
    pub payload: Payload,
    /// Whose it is.
    pub frontend: u16,
    /// The frontend's own mark.
    pub tag: u64,
    /// When it was pulled, ns of [`crate::stats::now`].
    pub born: u64,
    /// The watchdog has told of it.
    pub stuck: bool,
    /// It is among those that the stack has to plan.
    pub planning: bool,
    /// Bytes that the stack has planned.
    pub planned: u64,
    /// The layer that has it wait.
    pub waits_for: Option<u16>,
    /// tiocbs that are not finished, and tickets that are not settled.
    pub pieces: u32,
    /// The image's metadata has to be durable with it.
    pub metadata: bool,
    /// How many writes of that its flush has seen.
    pub meta_seen: u64,
    /// The first error of a piece.
    pub error: Option<Errno>,
}

impl Request {
    fn reset(&mut self) {
        self.payload.clear();
        (self.planned, self.pieces, self.error, self.stuck, self.metadata) = (0, 0, None, false, false);
        self.waits_for = None;
    }

    /// Its end, as the frontend answers it.
    pub fn result(&self) -> Result<(), Errno> {
        self.error.map_or(Ok(()), Err)
    }
}

/// Names a request's slot; in debug builds also which use of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestId {
    index: u32,
    #[cfg(debug_assertions)]
    generation: u32,
}

impl RequestId {
    /// The slot's number.
    pub fn index(self) -> u32 {
        self.index
    }
}

#[derive(Debug)]
struct Slot {
    request: Request,
    used: bool,
    #[cfg(debug_assertions)]
    generation: u32,
}

/// All slots: those of clients, and behind them those of the stack, for the image's metadata.
#[derive(Debug)]
pub struct Slots {
    slots: Vec<Slot>,
    /// Of clients' slots.
    free: Vec<u32>,
    /// Of the stack's.
    own: Vec<u32>,
    /// Clients' slots.
    count: usize,
}

impl Slots {
    /// `count` slots for clients, each with room for `segments` segments, and `own` for the stack.
    pub fn new(count: usize, segments: usize, own: usize) -> Slots {
        let slot = |segments| Slot {
            request: Request {
                op: Op::Flush,
                offset: 0,
                len: 0,
                payload: Payload { memory: None, segments: Vec::with_capacity(segments) },
                frontend: 0,
                tag: 0,
                born: 0,
                stuck: false,
                planning: false,
                planned: 0,
                waits_for: None,
                pieces: 0,
                metadata: false,
                meta_seen: 0,
                error: None,
            },
            used: false,
            #[cfg(debug_assertions)]
            generation: 0,
        };
        let slots = (0..count + own).map(|index| slot(if index < count { segments } else { 1 })).collect();
        let own = (count as u32..(count + own) as u32).rev().collect();
        Slots { slots, free: (0..count as u32).rev().collect(), own, count }
    }

    /// Memory of all of them, bytes.
    pub fn bytes(&self) -> usize {
        let segments: usize = self.slots.iter().map(|slot| slot.request.payload.segments.capacity()).sum();
        self.slots.len() * (size_of::<Slot>() + size_of::<u32>()) + segments * size_of::<Segment>()
    }

    /// Clients' slots that are free.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Clients' slots that are in use.
    pub fn used(&self) -> usize {
        self.count - self.free.len()
    }

    /// Clients' slots.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Slots of the stack that are in use.
    pub fn own_used(&self) -> usize {
        self.slots.len() - self.count - self.own.len()
    }

    /// Takes a slot of the stack.
    pub fn take_own(&mut self) -> Option<RequestId> {
        let index = self.own.pop()?;
        self.slots[index as usize].used = true;
        self.slots[index as usize].request.reset();
        Some(self.id(index))
    }

    /// All of them.
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// The slot that [`take`](Self::take) would take, to be filled in.
    pub fn vacant(&mut self) -> Option<&mut Request> {
        let &index = self.free.last()?;
        let request = &mut self.slots[index as usize].request;
        request.reset();
        Some(request)
    }

    /// The same slot again, as it was filled in.
    pub fn filled(&mut self) -> Option<&mut Request> {
        let &index = self.free.last()?;
        Some(&mut self.slots[index as usize].request)
    }

    /// Takes the slot of [`vacant`](Self::vacant).
    pub fn take(&mut self) -> Option<RequestId> {
        let index = self.free.pop()?;
        self.slots[index as usize].used = true;
        Some(self.id(index))
    }

    /// Frees a slot.
    pub fn release(&mut self, id: RequestId) {
        let slot = self.slot(id);
        slot.request.payload.clear();
        slot.used = false;
        #[cfg(debug_assertions)]
        {
            slot.generation += 1;
        }
        let free = if (id.index as usize) < self.count { &mut self.free } else { &mut self.own };
        free.push(id.index);
    }

    fn id(&self, index: u32) -> RequestId {
        RequestId {
            index,
            #[cfg(debug_assertions)]
            generation: self.slots[index as usize].generation,
        }
    }

    fn slot(&mut self, id: RequestId) -> &mut Slot {
        let slot = &mut self.slots[id.index as usize];
        debug_assert!(slot.used);
        #[cfg(debug_assertions)]
        assert_eq!(slot.generation, id.generation, "stale request id");
        slot
    }

    /// The request.
    pub fn get(&self, id: RequestId) -> &Request {
        let slot = &self.slots[id.index as usize];
        #[cfg(debug_assertions)]
        assert_eq!(slot.generation, id.generation, "stale request id");
        &slot.request
    }

    /// The request.
    pub fn get_mut(&mut self, id: RequestId) -> &mut Request {
        &mut self.slot(id).request
    }

    /// Those in use, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut Request)> {
        (0..).zip(&mut self.slots).filter(|(_, slot)| slot.used).map(|(i, slot)| (i, &mut slot.request))
    }

    /// Those in use.
    pub fn iter(&self) -> impl Iterator<Item = (RequestId, &Request)> {
        (0..).zip(&self.slots).filter(|(_, slot)| slot.used).map(|(i, slot)| (self.id(i), &slot.request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_of_a_payload_is_cut_at_both_ends() {
        let mut slots = Slots::new(1, 3, 0);
        let payload = &mut slots.vacant().unwrap().payload;
        payload.push(0, 512);
        payload.push(512, 512);
        payload.push(4096, 1024);
        assert_eq!(payload.slice(0, 2048).collect::<Vec<_>>(), [(0, 1024), (4096, 1024)]);
        assert_eq!(payload.slice(1000, 100).collect::<Vec<_>>(), [(1000, 24), (4096, 76)]);
        assert_eq!(payload.slice(1536, 512).collect::<Vec<_>>(), [(4608, 512)]);
        assert_eq!(payload.slice(0, 0).count(), 0);
    }

    #[test]
    fn slots_run_out_and_come_back() {
        let mut slots = Slots::new(2, 1, 0);
        assert!(slots.vacant().is_some());
        let first = slots.take().unwrap();
        slots.take().unwrap();
        assert!(slots.vacant().is_none() && slots.take().is_none());
        slots.release(first);
        assert_eq!((slots.room(), slots.used()), (1, 1));
    }

    #[test]
    fn the_stack_has_slots_of_its_own() {
        let mut slots = Slots::new(1, 1, 1);
        assert!(slots.vacant().is_some());
        let (client, own) = (slots.take().unwrap(), slots.take_own().unwrap());
        assert!(slots.take_own().is_none() && slots.vacant().is_none());
        assert_eq!((slots.used(), slots.own_used(), slots.iter().count()), (1, 1, 2));
        slots.release(own);
        assert!(slots.vacant().is_none() && slots.own_used() == 0);
        slots.release(client);
        assert!(slots.vacant().is_some());
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "stale request id")]
    fn a_stale_id_is_caught() {
        let mut slots = Slots::new(1, 1, 0);
        let old = slots.take().unwrap();
        slots.release(old);
        slots.take().unwrap();
        slots.get(old);
    }
}
