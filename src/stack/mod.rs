//! The chain of image layers: plans a request, one extent at a time, into transfers for the queue, and takes their
//! ends back.
//!
//! A read of what a layer has not goes to the layer below. What takes more than its data has a ticket of its layer's format, and
//! is done when that is [settled](drivers::Format::settled); what that takes, `meta.rs` moves.

mod meta;

use std::any::Any;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use drivers::{Extent, Fail, Format, LastWrite, OpenError, Plan, Ticket};
use nix::errno::Errno;

use self::meta::MetaMemory;
use crate::blocking::Blocking;
use crate::job::Apart;
use crate::queue::{Queue, Transfer};
use crate::request::{Op, RequestId, Slots};
use crate::stats::now;
use crate::sys::file::{CHANGE, forget_cached, lock_changes, unlock_changes};
use crate::sys::io::{FileId, IoOp};

/// I/Os of metadata at a time, at most.
pub const METAS: usize = 32;

/// The frontend of the stack's own requests.
pub const OWN: u16 = u16::MAX - 1;

/// Something that lives at least as long as this.
pub type Held = Arc<dyn Any + Send + Sync>;

/// One image of the chain.
pub struct Layer {
    /// What says where data is.
    pub format: Box<dyn Format>,
    /// The file's name, for messages.
    pub path: PathBuf,
    /// The file, through the page cache, for what is written when nothing more is under way; none if nothing is.
    pub plain: Option<File>,
    /// The engine's file is read and written through the page cache.
    pub cached: bool,
    /// What is to be held until the image's end is written, its locks; none if nothing is written.
    pub held: Option<Held>,
}

/// What is to be written so that others find an image whole.
struct Closing {
    file: File,
    writes: Vec<LastWrite>,
    /// Bytes that the file is to have; none: as it is.
    size: Option<u64>,
    /// Let go of when it is written.
    _held: Option<Held>,
}

impl Closing {
    /// Writes it. Blocks.
    fn write(&self) -> io::Result<()> {
        // Who has it for longer than a moment does not change what is kept: closing goes on.
        let locked = lock_changes(&self.file, CHANGE).is_ok();
        forget_cached(&self.file)?;
        for LastWrite { at, bytes, keep } in &self.writes {
            let mut bytes = bytes.clone();
            if let Some(keep) = keep {
                let mut now = vec![0; keep.len];
                let read = self.file.read_at(&mut now, keep.at)?;
                now.truncate(read);
                (keep.put)(&now, &mut bytes);
            }
            self.file.write_all_at(&bytes, *at)?;
        }
        if locked {
            unlock_changes(&self.file)?;
        }
        if let Some(size) = self.size {
            self.file.set_len(size)?;
        }
        self.file.sync_all()
    }
}

impl Layer {
    /// What is still to be written of the image.
    fn close(&mut self) -> Option<Closing> {
        let file = self.plain.take()?;
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let mut writes = Vec::new();
        let size = self.format.close(time, &mut |write| writes.push(write));
        Some(Closing { file, writes, size, _held: self.held.take() })
    }
}

impl Drop for Layer {
    /// One that was opened and never served, or whose process ends by an error.
    fn drop(&mut self) {
        if let Some(closing) = self.close() {
            // Opening it again mends what could not be written.
            let _ = closing.write();
        }
    }
}

/// What a layer has moved for requests, in 512-byte sectors: read and written. Each layer counts what it served itself, with or
/// without error, and the last one also what nobody has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    /// All of it.
    pub all: [u64; 2],
    /// What failed.
    pub failed: [u64; 2],
}

impl Hits {
    fn count(&mut self, op: IoOp, len: u64, ok: bool) {
        let direction = match op {
            IoOp::Read => 0,
            IoOp::Write { .. } => 1,
            _ => return,
        };
        let sectors = len / drivers::SECTOR_SIZE;
        self.all[direction] += sectors;
        if !ok {
            self.failed[direction] += sectors;
        }
    }
}

/// How far a request could be planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Started {
    /// Wholly.
    Planned,
    /// The queue has no room for more.
    NoRoom,
    /// Some metadata has to be there first.
    Waits,
}

/// The layers of a disk, the leaf first. A layer's index is that of its file in the engine.
pub struct Stack {
    layers: Apart<Vec<Layer>>,
    /// Of each layer.
    hits: Vec<Hits>,
    /// The leaf's `zeros_from` when it was opened.
    zeros_at_open: u64,
    /// When the file was seen to have grown, ns of [`now`].
    grown_at: u64,
    /// Whose ticket it is.
    owners: Vec<Option<RequestId>>,
    /// Formats may have metadata to move.
    meta_due: bool,
    /// Something is done that a request may have waited for.
    progress: bool,
    metas: Option<MetaMemory>,
    /// Writes of metadata so far, and those of them that are durable.
    meta_written: u64,
    meta_durable: u64,
    /// A flush has failed, and what was answered before may be lost: the kernel tells of what it could not write once, and forgets it. No
    /// flush succeeds from then on, until the image is opened anew.
    failed_flush: Option<Errno>,
    /// Requests whose last piece is done and that are planned wholly.
    done: VecDeque<RequestId>,
    /// Requests that are done when what they wrote is durable, and that there was no room in the queue for.
    to_flush: VecDeque<RequestId>,
}

impl Stack {
    /// A stack of these layers, the leaf first. `requests` is how many there can be.
    pub fn new(layers: Apart<Vec<Layer>>, requests: usize, tickets: usize) -> io::Result<Stack> {
        let leaf = layers.first().expect("a disk has an image");
        let zeros_at_open = leaf.format.zeros_from();
        let longest = layers.iter().map(|layer| layer.format.meta_len()).max().unwrap_or(0);
        let metas = if longest > 0 { Some(MetaMemory::new(METAS, longest)?) } else { None };
        Ok(Stack {
            hits: vec![Hits::default(); layers.len()],
            layers,
            zeros_at_open,
            grown_at: 0,
            owners: vec![None; tickets],
            meta_due: true,
            progress: false,
            metas,
            meta_written: 0,
            meta_durable: 0,
            failed_flush: None,
            done: VecDeque::with_capacity(requests),
            to_flush: VecDeque::with_capacity(requests),
        })
    }

    /// The layer that is written.
    pub fn leaf(&self) -> &Layer {
        &self.layers[0]
    }

    /// All of them, the leaf first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The layers and what each has moved, the leaf first.
    pub fn hits(&self) -> impl Iterator<Item = (&Layer, Hits)> {
        self.layers.iter().zip(self.hits.iter().copied())
    }

    /// Of a file in the engine: its layer, 0 being the leaf, and its path.
    pub fn place(&self, file: FileId) -> (u32, String) {
        (file.0.into(), self.layers[usize::from(file.0)].path.display().to_string())
    }

    /// The leaf's file has that size now, in bytes. Gives the disk's.
    pub fn file_grown(&mut self, file_size: u64) -> Result<u64, OpenError> {
        let leaf = &mut self.layers[0];
        let before = leaf.format.zeros_from();
        let size = leaf.format.file_grown(file_size)?;
        if leaf.format.zeros_from() != before {
            self.grown_at = now();
        }
        Ok(size)
    }

    /// Plans a request as far as the queue has room.
    pub fn start(&mut self, id: RequestId, slots: &mut Slots, queue: &mut Queue) -> Started {
        let request = slots.get(id);
        let (plan_as, op) = match request.op {
            Op::Read => (drivers::Op::Read, IoOp::Read),
            Op::Write { fua } => (drivers::Op::Write, IoOp::Write { fua }),
            // The disk has drained and flushed before, and so only its own data is left to be made durable.
            Op::Barrier => (drivers::Op::Write, IoOp::Write { fua: true }),
            Op::Discard => (drivers::Op::Discard, IoOp::Discard),
            Op::WriteZeroes { unmap } => (drivers::Op::WriteZeroes, IoOp::WriteZeroes { unmap }),
            Op::Status if self.metas.is_some() => return self.status(id, slots),
            Op::Status => (drivers::Op::Read, IoOp::Status),
            Op::Flush => return if self.flush(id, slots, queue) { Started::Planned } else { Started::NoRoom },
        };
        slots.get_mut(id).metadata = matches!(op, IoOp::Write { fua: true });
        loop {
            let request = slots.get_mut(id);
            if request.planned == request.len {
                return Started::Planned;
            }
            if !queue.has_room() {
                return Started::NoRoom;
            }
            let extent = Extent { offset: request.offset + request.planned, len: request.len - request.planned };
            let (layer, plan) = self.plan(plan_as, extent);
            match plan {
                Plan::Data { at, count, ticket } => {
                    let file = FileId(layer as u16);
                    let request = slots.get_mut(id);
                    let transfer =
                        Transfer { op, file, offset: at, len: count, owner: id, at: request.planned, ticket };
                    let pushed = queue.push(transfer);
                    debug_assert!(pushed);
                    request.pieces += 1;
                    request.planned += count;
                    if let Some(ticket) = ticket {
                        self.owners[ticket.0 as usize] = Some(id);
                        self.meta_due = true;
                    }
                }
                Plan::Below { count } => {
                    if op == IoOp::Read {
                        request.payload.zero(request.planned, count);
                    }
                    request.planned += count;
                    if let Some(last) = self.hits.last_mut() {
                        last.count(op, count, true);
                    }
                }
                Plan::Wait => {
                    self.meta_due = true;
                    return Started::Waits;
                }
                Plan::Fail(why) => {
                    request.error.get_or_insert(errno(why));
                    request.planned = request.len;
                }
            }
        }
    }

    /// Where the beginning of an extent is, and in which layer.
    fn plan(&mut self, op: drivers::Op, mut extent: Extent) -> (usize, Plan) {
        if op != drivers::Op::Read {
            return (0, self.layers[0].format.plan(op, extent));
        }
        let mut waits = None;
        for (index, layer) in self.layers.iter_mut().enumerate() {
            // A disk may be larger than what it was made of.
            let size = layer.format.size();
            if extent.offset >= size {
                break;
            }
            extent.len = extent.len.min(size - extent.offset);
            match layer.format.plan(op, extent) {
                Plan::Below { count } => extent.len = count,
                // What those below have to read is read meanwhile.
                Plan::Wait => waits = waits.or(Some(index)),
                plan if waits.is_none() => return (index, plan),
                _ => break,
            }
        }
        waits.map_or((0, Plan::Below { count: extent.len }), |index| (index, Plan::Wait))
    }

    /// Says which parts of a range have data. It ends where that is not known without waiting, if something is known.
    fn status(&mut self, id: RequestId, slots: &mut Slots) -> Started {
        let (offset, len) = (slots.get(id).offset, slots.get(id).len);
        let words = slots.get(id).payload.len() / 8;
        let (mut at, mut word, mut data, mut run) = (0, 0, true, 0_u64);
        let put = |slots: &Slots, word: u64, run: u64| slots.get(id).payload.put(word * 8, &run.to_ne_bytes());
        while at < len && word < words {
            let (here, count) = match self.plan(drivers::Op::Read, Extent { offset: offset + at, len: len - at }) {
                (_, Plan::Data { count, .. }) => (true, count),
                (_, Plan::Below { count }) => (false, count),
                (_, Plan::Wait) if at > 0 => break,
                (_, Plan::Wait) => {
                    self.meta_due = true;
                    return Started::Waits;
                }
                (_, Plan::Fail(why)) => {
                    slots.get_mut(id).error = Some(errno(why));
                    return Started::Planned;
                }
            };
            if here != data {
                put(slots, word, run);
                (word, data, run) = (word + 1, here, 0);
            }
            run += count;
            at += count;
        }
        if word < words {
            put(slots, word, run);
            put(slots, word + 1, 0);
        }
        slots.get_mut(id).planned = len;
        Started::Planned
    }

    /// Makes what is written durable, on behalf of a request. True: the queue had room.
    pub fn flush(&mut self, id: RequestId, slots: &mut Slots, queue: &mut Queue) -> bool {
        let (op, file) = (IoOp::Flush, FileId(0));
        let room = queue.push(Transfer { op, file, offset: 0, len: 0, owner: id, at: 0, ticket: None });
        if room {
            let request = slots.get_mut(id);
            request.pieces += 1;
            request.meta_seen = self.meta_written;
        }
        room
    }

    /// A transfer has ended. Gives its error, if it is the request's first one for what the caller logs. Requests that are done by
    /// it are told by [`next_done`](Self::next_done).
    pub fn finish(&mut self, transfer: &Transfer, result: Result<u64, Errno>, slots: &mut Slots) -> Option<Errno> {
        let mut result = self.whole(transfer, result, slots);
        if transfer.op == IoOp::Flush {
            // One that was called off says nothing.
            if let Some(errno) = result.err().filter(|errno| *errno != Errno::ECANCELED) {
                self.failed_flush.get_or_insert(errno);
            }
            result = self.failed_flush.map_or(result, Err);
        }
        let error = result.err();
        if transfer.op == IoOp::Flush && transfer.file == FileId(0) && error.is_none() {
            self.meta_durable = self.meta_durable.max(slots.get(transfer.owner).meta_seen);
        }
        if slots.get(transfer.owner).frontend == OWN {
            self.meta_finished(transfer, result, slots);
            return error;
        }
        self.hits[usize::from(transfer.file.0)].count(transfer.op, transfer.len, error.is_none());
        if let Some(errno) = error {
            slots.get_mut(transfer.owner).error.get_or_insert(errno);
        }
        match transfer.ticket {
            Some(ticket) => {
                self.layers[usize::from(transfer.file.0)].format.written(ticket, error.is_none());
                self.settle(usize::from(transfer.file.0), slots);
            }
            None => self.piece_done(transfer.owner, slots),
        }
        error
    }

    /// The result of a transfer, where a read that met the end of the file is whole if nothing is lost by that.
    fn whole(&self, transfer: &Transfer, result: Result<u64, Errno>, slots: &Slots) -> Result<(), Errno> {
        let done = result?;
        if done == transfer.len || transfer.op != IoOp::Read {
            return Ok(());
        }
        // The file ends here. That is in order only where it ended when it was looked at last; or, for a read
        // that was under way when it grew, earlier.
        let request = slots.get(transfer.owner);
        let format = &self.layers[usize::from(transfer.file.0)].format;
        let before = transfer.file.0 == 0 && request.born <= self.grown_at;
        let zeros = if before { self.zeros_at_open } else { format.zeros_from() };
        if transfer.offset + done < zeros {
            return Err(Errno::EIO);
        }
        request.payload.zero(transfer.at + done, transfer.len - done);
        Ok(())
    }

    /// Takes what a layer's format has settled.
    fn settle(&mut self, layer: usize, slots: &mut Slots) {
        (self.meta_due, self.progress) = (true, true);
        while let Some(settled) = self.layers[layer].format.settled() {
            let Ticket(index) = settled.ticket;
            let Some(owner) = self.owners[index as usize].take() else { continue };
            if !settled.done {
                // What failed is in the log.
                slots.get_mut(owner).error.get_or_insert(Errno::EIO);
            }
            self.piece_done(owner, slots);
        }
    }

    fn piece_done(&mut self, id: RequestId, slots: &mut Slots) {
        let request = slots.get_mut(id);
        request.pieces -= 1;
        if request.pieces > 0 || request.planning {
            return;
        }
        self.all_done(id, slots);
    }

    /// All of a request is planned and done: it is finished, or the metadata that says where its data is, which may be that of an
    /// earlier write, is to be made durable with it.
    pub fn all_done(&mut self, id: RequestId, slots: &mut Slots) {
        let request = slots.get_mut(id);
        let first = std::mem::take(&mut request.metadata);
        let flush = first && request.error.is_none() && self.meta_durable < self.meta_written;
        if flush { self.to_flush.push_back(id) } else { self.done.push_back(id) }
    }

    /// A request that is finished.
    pub fn next_done(&mut self) -> Option<RequestId> {
        self.done.pop_front()
    }

    /// A write that was to be durable has failed. Through the page cache it is a write and a flush, and gets the error of what others wrote.
    pub fn note_failed_fua(&mut self, file: FileId, errno: Errno) {
        // What there is no space or no memory for was not given to the kernel.
        if errno == Errno::EIO && self.layers[usize::from(file.0)].cached {
            self.failed_flush.get_or_insert(errno);
        }
    }

    /// Why no flush succeeds any more: what was answered before may be lost.
    pub fn failed_flush(&self) -> Option<Errno> {
        self.failed_flush
    }

    /// Whether something is done since it was last asked that a request may have waited for.
    pub fn progress(&mut self) -> bool {
        std::mem::take(&mut self.progress)
    }

    /// Nothing is under way, and nothing more will come: gives what leaves the images so that others find them whole, and blocks. None:
    /// they are.
    pub fn close(&mut self) -> Option<impl FnOnce(&Blocking) -> io::Result<()> + Send + use<>> {
        let closing: Vec<_> = self.layers.iter_mut().filter_map(Layer::close).collect();
        (!closing.is_empty()).then_some(move |_: &Blocking| closing.iter().try_for_each(Closing::write))
    }

    /// Counters of the layers that have some, the leaf first.
    pub fn inspect(&self) -> Vec<LayerReport> {
        let layers = self.layers.iter().map(|layer| {
            let mut counters = std::collections::BTreeMap::new();
            layer.format.inspect(&mut |name, value| {
                counters.insert(name.to_owned(), value);
            });
            let (path, format) = (layer.path.display().to_string(), layer.format.name().to_owned());
            LayerReport { path, format, size: layer.format.size(), counters }
        });
        layers.collect()
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        let formats: usize = self.layers.iter().map(|layer| layer.format.bytes()).sum();
        formats + self.metas.as_ref().map_or(0, MetaMemory::bytes)
    }
}

/// What is to be shown of a layer.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct LayerReport {
    /// The file.
    pub path: String,
    /// The format's name.
    pub format: String,
    /// Bytes of the disk.
    pub size: u64,
    /// The format's counters.
    pub counters: std::collections::BTreeMap<String, u64>,
}

fn errno(why: Fail) -> Errno {
    match why {
        Fail::NoSpace => Errno::ENOSPC,
        Fail::Io => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::queue::{Limits, SubmitMode};
    use crate::retry::Retry;
    use crate::sys::memory::Memory;

    /// Every other 4096 bytes are nowhere; the others are at half their offset.
    struct Sparse;

    impl Format for Sparse {
        fn name(&self) -> &'static str {
            "sparse"
        }
        fn size(&self) -> u64 {
            1 << 20
        }
        fn plan(&mut self, _: drivers::Op, extent: Extent) -> Plan {
            let count = extent.len.min(4096 - extent.offset % 4096);
            let at = extent.offset / 8192 * 4096 + extent.offset % 4096;
            if (extent.offset / 4096).is_multiple_of(2) {
                Plan::Data { at, count, ticket: None }
            } else {
                Plan::Below { count }
            }
        }
        fn zeros_from(&self) -> u64 {
            1 << 19
        }
    }

    #[test]
    fn a_request_is_planned_extent_by_extent_as_far_as_there_is_room() {
        let engine = crate::engine::memory::null(4).unwrap();
        let limits = Limits { tiocbs: 2, iovecs: 4, merge_bytes: 0, retry: Retry::default() };
        let blocking = Blocking::before_main_loop();
        let submission = crate::queue::Submission::start(&blocking, engine, SubmitMode::Inline).unwrap();
        let mut queue = Queue::new(submission.into(), SubmitMode::Inline, limits);
        let mut stack = Stack::new(
            vec![Layer { format: Box::new(Sparse), path: "x".into(), plain: None, cached: false, held: None }].into(),
            1,
            0,
        )
        .unwrap();
        let mut slots = Slots::new(1, 1, 0);
        let memory = Arc::new(Memory::anonymous(32768).unwrap());
        memory.write(0, &[0x77; 32768]);
        let request = slots.vacant().unwrap();
        (request.op, request.offset, request.len) = (Op::Read, 2048, 24576);
        request.payload.set_memory(&memory);
        request.payload.push(0, 24576);
        let id = slots.take().unwrap();
        assert_eq!(stack.start(id, &mut slots, &mut queue), Started::NoRoom, "a third transfer has no room");
        let mut finished = Vec::new();
        for _ in 0..3 {
            queue.kick(&slots);
            queue.reap();
            while let Some((transfer, result)) = queue.next_finished() {
                assert_eq!(stack.finish(&transfer, result, &mut slots), None);
                finished.push((transfer.offset, transfer.at, transfer.len));
            }
            stack.start(id, &mut slots, &mut queue);
        }
        let request = slots.get(id);
        assert_eq!((request.planned, request.pieces), (24576, 0));
        assert_eq!(finished, [(2048, 0, 2048), (4096, 6144, 4096), (8192, 14336, 4096), (12288, 22528, 2048)]);
        let mut data = vec![0; 24576];
        memory.read(0, &mut data);
        let zeros = |range: std::ops::Range<usize>| data[range].iter().all(|byte| *byte == 0);
        assert!(zeros(2048..6144) && zeros(10240..14336) && zeros(18432..22528), "what is nowhere is zeros");
        assert!(data[6144..10240].iter().all(|byte| *byte == 0x77), "the rest is the engine's affair");
    }

    #[test]
    fn a_read_that_met_the_end_of_the_file_just_before_it_grew_has_lost_nothing() {
        let raw = drivers::Raw::new(4097, 512, drivers::OddSize::RoundUp).unwrap();
        let mut stack = Stack::new(
            vec![Layer { format: Box::new(raw), path: "x".into(), plain: None, cached: false, held: None }].into(),
            2,
            0,
        )
        .unwrap();
        let mut slots = Slots::new(2, 1, 0);
        let mut read = |born| {
            let request = slots.vacant().unwrap();
            (request.op, request.offset, request.len, request.pieces) = (Op::Read, 4096, 512, 1);
            request.born = born;
            slots.take().unwrap()
        };
        let (before, after) = (read(now()), read(u64::MAX));
        assert_eq!(stack.file_grown(4097), Ok(4608));
        assert_eq!(stack.grown_at, 0, "it has not grown");
        assert_eq!(stack.file_grown(8192), Ok(8192));
        let mut finish = |owner| {
            let transfer =
                Transfer { op: IoOp::Read, file: FileId(0), offset: 4096, len: 512, owner, at: 0, ticket: None };
            stack.finish(&transfer, Ok(1), &mut slots)
        };
        assert_eq!((finish(before), finish(after)), (None, Some(Errno::EIO)));
    }
}
