//! Requests of frontends, in slots that are made at the start.

use std::sync::Arc;

use drivers::Origin;
use nix::errno::Errno;

use crate::sys::io::MAX_MEMORIES;
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

/// That a layer has a request wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Which one, 0 being the one that is asked first.
    pub layer: u16,
    /// Since when, ns of [`now`](crate::stats::now).
    pub since: u64,
    /// For a time to come, and for nothing that could hang.
    pub timed: bool,
}

/// A run of bytes of one of the payload's memories. Small, because each slot has room for as many as a request may have: a place has 48
/// bits, which is more than the addresses of a process.
#[derive(Clone, Copy, Debug)]
struct Segment {
    /// Bytes.
    len: u32,
    /// The lower part of its first byte's place in that memory.
    low: u32,
    /// The upper one.
    high: u16,
    /// Which of the payload's memories.
    memory: u16,
}

impl Segment {
    fn new(memory: u16, offset: usize, len: u32) -> Segment {
        debug_assert!(offset >> 48 == 0);
        Segment { len, low: offset as u32, high: (offset >> 32) as u16, memory }
    }

    fn offset(&self) -> usize {
        usize::from(self.high) << 32 | self.low as usize
    }
}

/// A request has more segments, or lies in more memories, than there is room for: it is refused where it comes in, and answered as
/// the frontend's protocol answers what a server does not take (blkif: RSP_ERROR; virtio: VIRTIO_BLK_S_IOERR).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request's data is in more places than a request can name")]
pub struct TooScattered;

/// Where a request's data is or goes to: segments of a client's memory, or of several memories of it, which may come and go while the
/// request is in flight. The payload has a share of each that it names, until the request is answered.
///
/// There are no more memories than one I/O holds, so that a request is always one I/O if its extents are contiguous.
#[derive(Debug)]
pub struct Payload {
    memories: Vec<Arc<Memory>>,
    segments: Vec<Segment>,
}

impl Payload {
    /// With room for so many segments, at least one.
    fn new(segments: usize) -> Payload {
        assert!(segments > 0);
        let memories = Vec::with_capacity(segments.min(MAX_MEMORIES));
        Payload { memories, segments: Vec::with_capacity(segments) }
    }

    fn bytes(&self) -> usize {
        self.memories.capacity() * size_of::<Arc<Memory>>() + self.segments.capacity() * size_of::<Segment>()
    }

    fn clear(&mut self) {
        // Nearly always there is one, and this is the quickest for one.
        while self.memories.pop().is_some() {}
        self.segments.clear();
    }

    /// Makes it a single run of `len` bytes at `offset` of `memory`.
    pub fn set(&mut self, memory: &Arc<Memory>, offset: usize, len: u32) {
        self.clear();
        self.memories.push(Arc::clone(memory));
        self.segments.push(Segment::new(0, offset, len));
    }

    /// Where its first segment is in its memory.
    pub fn place(&self) -> usize {
        self.segments.first().map_or(0, Segment::offset)
    }

    /// Adds `len` bytes at `offset` of `memory`, which must be in it. On an error no segment is added.
    pub fn push(&mut self, memory: &Arc<Memory>, offset: usize, len: u32) -> Result<(), TooScattered> {
        self.within(memory)?.push(offset, len)
    }

    /// To add segments of `memory`, of which the payload has a share from here on.
    pub fn within(&mut self, memory: &Arc<Memory>) -> Result<Within<'_>, TooScattered> {
        let index = match self.memories.iter().position(|known| Arc::ptr_eq(known, memory)) {
            Some(index) => index,
            None if self.memories.len() == self.memories.capacity() => return Err(TooScattered),
            None => {
                self.memories.push(Arc::clone(memory));
                self.memories.len() - 1
            }
        };
        Ok(Within { segments: &mut self.segments, memory: index as u16 })
    }

    /// The memories that it names, each once; none for a request without data.
    pub fn memories(&self) -> &[Arc<Memory>] {
        &self.memories
    }

    /// The segments of `len` bytes from byte `at` on, as (memory, offset in it, length).
    pub fn slice(&self, at: u64, len: u64) -> impl Iterator<Item = (&Arc<Memory>, usize, usize)> {
        let (mut skip, mut left) = (at, len);
        self.segments.iter().filter_map(move |segment| {
            let full = u64::from(segment.len);
            let from = skip.min(full);
            skip -= from;
            let count = (full - from).min(left);
            left -= count;
            let memory = &self.memories[usize::from(segment.memory)];
            (count > 0).then_some((memory, segment.offset() + from as usize, count as usize))
        })
    }

    /// Copies `bytes`, or what there is memory for, to byte `at` and on.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        let mut from = bytes;
        for (memory, offset, count) in self.slice(at, bytes.len() as u64) {
            let (now, rest) = from.split_at(count);
            memory.write(offset, now);
            from = rest;
        }
    }

    /// Copies the bytes from byte `at` on, as many as `to` has, out.
    pub fn get(&self, at: u64, to: &mut [u8]) {
        let mut rest = to;
        for (memory, offset, count) in self.slice(at, rest.len() as u64) {
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
        self.memories.is_empty()
    }

    /// Zeroes `len` bytes from byte `at` on.
    pub fn zero(&self, at: u64, len: u64) {
        self.slice(at, len).for_each(|(memory, offset, count)| memory.zero(offset, count));
    }
}

/// Adds segments of one memory to a payload.
#[derive(Debug)]
pub struct Within<'a> {
    segments: &'a mut Vec<Segment>,
    memory: u16,
}

impl Within<'_> {
    /// Adds `len` bytes at `offset`, which must be in the memory. On an error nothing is added.
    pub fn push(&mut self, offset: usize, len: u32) -> Result<(), TooScattered> {
        let memory = self.memory;
        if let Some(last) = self.segments.last_mut()
            && last.memory == memory
            && last.offset() + last.len as usize == offset
            && let Some(sum) = last.len.checked_add(len)
        {
            last.len = sum;
            return Ok(());
        }
        if self.segments.len() == self.segments.capacity() {
            return Err(TooScattered);
        }
        self.segments.push(Segment::new(memory, offset, len));
        Ok(())
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
    pub origin: Origin,
    /// The frontend's own mark.
    pub tag: u64,
    /// When it was pulled, ns of [`crate::stats::now`].
    pub born: u64,
    /// The watchdog has told of it.
    pub stuck: bool,
    /// When the watchdog last saw that it [is held](Self::is_held), ns of [`crate::stats::now`]. Before `born`: never.
    pub held_at: u64,
    /// It is among those that the stack has to plan.
    pub planning: bool,
    /// Bytes that the stack has planned.
    pub planned: u64,
    /// The layer that has it wait.
    pub waits_for: Option<Waiting>,
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
        if !self.payload.is_empty() {
            self.payload.clear();
        }
        (self.planned, self.pieces, self.error, self.stuck, self.metadata) = (0, 0, None, false, false);
        self.waits_for = None;
    }

    /// What it does, for those who look.
    pub fn name(&self) -> &'static str {
        match self.origin {
            Origin::Layer(_) => "metadata",
            Origin::Frontend(_) | Origin::Disk => self.op.name(),
        }
    }

    /// Whether a layer holds it back for a while.
    pub fn is_held(&self) -> bool {
        self.planning && self.waits_for.is_some_and(|waiting| waiting.timed)
    }

    /// Its end, as the frontend answers it.
    pub fn result(&self) -> Result<(), Errno> {
        self.error.map_or(Ok(()), Err)
    }
}

/// Names a part of a request of whose end layers want to hear: the stack's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PieceId(pub(crate) u32);

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
    /// `count` slots for clients, each with room for `segments` segments, at least one, and `own` for the stack.
    pub fn new(count: usize, segments: usize, own: usize) -> Slots {
        let slot = |segments| Slot {
            request: Request {
                op: Op::Flush,
                offset: 0,
                len: 0,
                payload: Payload::new(segments),
                origin: Origin::Disk,
                tag: 0,
                born: 0,
                stuck: false,
                held_at: 0,
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
        let payloads: usize = self.slots.iter().map(|slot| slot.request.payload.bytes()).sum();
        self.slots.len() * (size_of::<Slot>() + size_of::<u32>()) + payloads
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

    /// The same slot is not taken after all, and keeps nothing of what was filled in.
    pub fn give_up(&mut self) {
        if let Some(request) = self.filled() {
            request.payload.clear();
        }
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

    fn memory() -> Arc<Memory> {
        Arc::new(Memory::anonymous(8192).unwrap())
    }

    /// The segments of a slice, with the index of each one's memory.
    fn slice(payload: &Payload, at: u64, len: u64) -> Vec<(usize, usize, usize)> {
        let index = |memory| payload.memories().iter().position(|known| Arc::ptr_eq(known, memory)).unwrap();
        payload.slice(at, len).map(|(memory, offset, count)| (index(memory), offset, count)).collect()
    }

    #[test]
    fn a_slice_of_a_payload_is_cut_at_both_ends() {
        let (a, b) = (memory(), memory());
        let mut payload = Payload::new(3);
        payload.push(&a, 0, 512).unwrap();
        payload.push(&a, 512, 512).unwrap();
        payload.push(&b, 4096, 1024).unwrap();
        assert_eq!(slice(&payload, 0, 2048), [(0, 0, 1024), (1, 4096, 1024)]);
        assert_eq!(slice(&payload, 1000, 100), [(0, 1000, 24), (1, 4096, 76)]);
        assert_eq!(slice(&payload, 1536, 512), [(1, 4608, 512)]);
        assert_eq!(slice(&payload, 0, 512), [(0, 0, 512)]);
        assert_eq!(slice(&payload, 0, 0), []);
    }

    #[test]
    fn neighbours_are_one_segment_in_the_same_memory_only() {
        let (a, b) = (memory(), memory());
        let mut payload = Payload::new(8);
        payload.push(&a, 0, 4096).unwrap();
        payload.push(&b, 4096, 512).unwrap();
        payload.push(&b, 4608, 512).unwrap();
        payload.push(&a, 4096, 512).unwrap();
        assert_eq!(slice(&payload, 0, u64::MAX), [(0, 0, 4096), (1, 4096, 1024), (0, 4096, 512)]);
        assert_eq!((payload.len(), Arc::strong_count(&a), Arc::strong_count(&b)), (5632, 2, 2), "one share of each");
        payload.set(&b, 0, 512);
        assert_eq!((slice(&payload, 0, 4096), Arc::strong_count(&a)), (vec![(0, 0, 512)], 1));
    }

    #[test]
    fn places_and_lengths_are_beyond_four_gib() {
        let memory = memory();
        let mut payload = Payload::new(3);
        payload.push(&memory, 1 << 40, u32::MAX - 511).unwrap();
        let next = (1 << 40) + (u32::MAX - 511) as usize;
        payload.push(&memory, next, 512).unwrap();
        assert_eq!(payload.len(), 1 << 32);
        assert_eq!(slice(&payload, (1 << 32) - 1024, 1024), [(0, next - 512, 512), (0, next, 512)]);
    }

    #[test]
    fn what_is_put_and_zeroed_reaches_across_memories() {
        let (a, b) = (memory(), memory());
        let mut payload = Payload::new(2);
        payload.push(&a, 8180, 12).unwrap();
        payload.push(&b, 0, 8).unwrap();
        let bytes = || [a.read_once::<12>(8180).as_slice(), &b.read_once::<8>(0)].concat();
        payload.put(8, b"abcdefgh");
        assert_eq!(bytes(), b"\0\0\0\0\0\0\0\0abcdefgh\0\0\0\0");
        payload.put(16, b"ijklmnop");
        assert_eq!(bytes()[12..], *b"efghijkl", "the rest has no memory");
        payload.zero(10, 4);
        assert_eq!(bytes()[8..], *b"ab\0\0\0\0ghijkl");
    }

    #[test]
    fn more_places_than_there_is_room_for_are_refused() {
        let memories: Vec<_> = (0..=MAX_MEMORIES).map(|_| memory()).collect();
        let mut payload = Payload::new(MAX_MEMORIES + 2);
        for memory in &memories[..MAX_MEMORIES] {
            payload.push(memory, 0, 512).unwrap();
        }
        assert_eq!(payload.push(&memories[MAX_MEMORIES], 0, 512), Err(TooScattered));
        assert_eq!(Arc::strong_count(&memories[MAX_MEMORIES]), 1);
        payload.push(&memories[0], 4096, 512).unwrap();
        payload.push(&memories[1], 4096, 512).unwrap();
        assert_eq!(payload.push(&memories[0], 0, 512), Err(TooScattered), "no more segments than there is room for");
        payload.push(&memories[1], 4608, 512).unwrap();
        assert_eq!(payload.len(), (MAX_MEMORIES as u64 + 3) * 512);
    }

    #[test]
    fn a_slot_that_is_not_taken_after_all_keeps_no_memory() {
        let memory = memory();
        let mut slots = Slots::new(1, 1, 0);
        slots.vacant().unwrap().payload.push(&memory, 0, 512).unwrap();
        slots.give_up();
        assert_eq!(Arc::strong_count(&memory), 1);
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
