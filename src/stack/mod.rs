//! The chain of layers: plans a request, one extent at a time, into transfers for the queue, and takes their
//! ends back.
//!
//! The walk asks one layer after the other, the first one first, until one says where the beginning of the extent is
//! ([`drivers::layer`] has the contract). What layers want to hear the end of is a piece (`pieces.rs`), and is done when all of them have
//! settled it. What metadata takes, `meta.rs` moves, and what
//! goes through memory of the stack's, `through.rs`.

mod layer;
mod locate;
mod meta;
mod pieces;
mod report;
#[cfg(test)]
mod tests;
mod through;

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::path::Path;

use drivers::{Ask, Extent, Fail, Layer, LayerFile, OpenError, Origin, Plan, Through, Ticket};
use nix::errno::Errno;

use self::layer::Closing;
pub use self::layer::{Closed, HostLayer};
use self::meta::MetaMemory;
use self::pieces::{HOLDERS_MAX, Holders, Over, Pieces};
pub use self::report::{Hits, LayerReport, Waits};
use self::through::{COPIES_MAX, Copies, READS_MAX, Wanted};
use crate::blocking::Blocking;
use crate::job::Apart;
use crate::queue::{Queue, Transfer};
use crate::request::{Op, PieceId, Request, RequestId, Slots, Waiting};
use crate::stats::now;
use crate::sys::io::{FileId, IoOp};

/// What O_DIRECT asks of memory at most.
const ALIGN: usize = 4096;

/// I/Os of metadata at a time, at most.
pub const METAS: usize = 32;

/// Requests of the stack's own at a time, at most.
pub const OWN_REQUESTS: usize = METAS + COPIES_MAX * READS_MAX;

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

/// The layers of a disk, the first one first: filters, the image that is written, and those that it is based on.
pub struct Stack {
    layers: Apart<Vec<HostLayer>>,
    /// The layer that is written, and not a filter.
    leaf: usize,
    /// The first that is asked: those before are idle.
    first: usize,
    /// Of each file of the engine, whose it is.
    files: Vec<(u16, LayerFile)>,
    /// Of each layer.
    hits: Vec<Hits>,
    /// Of each layer.
    waits: Vec<Waits>,
    /// The leaf's `zeros_from` when it was opened.
    zeros_at_open: u64,
    /// When the file was seen to have grown, ns of [`now`].
    grown_at: u64,
    /// The time of this turn, ns of [`now`].
    time: u64,
    /// The disk only finishes what it has.
    draining: bool,
    /// Layers that hear where the walk went on: those of the walk that is under way.
    passed: Vec<Passed>,
    /// Transfers that one step of the walk can take.
    transfers_most: usize,
    /// Whether the file's own holes say where data is.
    locates_by_file: bool,
    pieces: Pieces,
    /// When a layer wants to be asked again although nothing is done, ns of [`now`].
    ask_again_at: Option<u64>,
    /// Layers may have metadata to move.
    meta_due: bool,
    /// Something is done that a request may have waited for.
    progress: bool,
    metas: Option<MetaMemory>,
    copies: Option<Copies>,
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

/// A part of a request that is to be done, and what is asked for it: the extent is cut to what is done at a time.
#[derive(Clone, Copy)]
struct Part {
    id: RequestId,
    op: IoOp,
    ask: Ask,
}

/// A layer that the walk has passed by, which wants to hear of that; and what is done there at the same time.
#[derive(Clone, Copy)]
struct Passed {
    layer: u16,
    both: Option<(LayerFile, u64)>,
}

impl Stack {
    /// A stack of these layers, the first one first. `requests` is how many there can be.
    pub fn new(layers: Apart<Vec<HostLayer>>, requests: usize) -> io::Result<Stack> {
        let is_image = |layer: &&HostLayer| layer.layer.size().is_some();
        let leaf = layers.iter().position(|layer| is_image(&layer)).expect("a disk has an image");
        let longest = layers.iter().map(|layer| layer.layer.meta_len()).max().unwrap_or(0);
        let metas = if longest > 0 { Some(MetaMemory::new(METAS, longest)?) } else { None };
        let block = layers.iter().map(|layer| layer.layer.block_len()).max().unwrap_or(0);
        let copies = if block > 0 { Some(Copies::new(block)?) } else { None };
        let hearing = || layers[..leaf].iter().filter(|layer| layer.layer.descends());
        assert!(hearing().count() < HOLDERS_MAX, "more filters than a piece can have");
        let mut files = vec![(0, LayerFile(0)); layers.iter().map(|layer| layer.files.len()).sum()];
        for (index, layer) in (0..).zip(layers.iter()) {
            for (number, FileId(id)) in (0..).zip(&layer.files) {
                files[usize::from(*id)] = (index, LayerFile(number));
            }
        }
        Ok(Stack {
            leaf,
            first: 0,
            files,
            hits: vec![Hits::default(); layers.len()],
            waits: vec![Waits::default(); layers.len()],
            zeros_at_open: layers[leaf].layer.zeros_from(LayerFile(0)),
            grown_at: 0,
            time: 0,
            draining: false,
            passed: Vec::with_capacity(hearing().count()),
            // Who does something itself has a file for it.
            transfers_most: 1 + hearing().filter(|layer| !layer.files.is_empty()).count(),
            locates_by_file: layers.iter().filter(is_image).count() == 1 && layers[leaf].layer.meta_len() == 0,
            pieces: Pieces::new(layers.iter().map(|layer| layer.layer.tickets())),
            ask_again_at: None,
            meta_due: true,
            progress: false,
            metas,
            copies,
            meta_written: 0,
            meta_durable: 0,
            failed_flush: None,
            done: VecDeque::with_capacity(requests),
            to_flush: VecDeque::with_capacity(requests),
            layers,
        })
    }

    /// The image that is written.
    pub fn leaf(&self) -> &HostLayer {
        &self.layers[self.leaf]
    }

    /// The images, the one that is written first.
    pub fn images(&self) -> &[HostLayer] {
        &self.layers[self.leaf..]
    }

    /// The images and what each has moved, the leaf first.
    pub fn hits(&self) -> impl Iterator<Item = (&HostLayer, Hits)> {
        self.images().iter().zip(self.hits[self.leaf..].iter().copied())
    }

    /// Whose each file of the engine is, in the order of their ids.
    pub fn files(&self) -> impl Iterator<Item = &HostLayer> {
        self.files.iter().map(|(layer, _)| &self.layers[usize::from(*layer)])
    }

    /// Of a file of the engine: its image, 0 being the leaf or a filter's, and its path.
    pub fn place(&self, FileId(id): FileId) -> (u32, String) {
        let (layer, _) = self.files[usize::from(id)];
        let image = usize::from(layer).saturating_sub(self.leaf);
        (image as u32, self.layers[usize::from(layer)].path.display().to_string())
    }

    /// The name of a layer that has a request wait.
    pub fn name_of(&self, layer: u16) -> &'static str {
        self.layers[usize::from(layer)].layer.name()
    }

    fn layer_of(&self, FileId(id): FileId) -> usize {
        usize::from(self.files[usize::from(id)].0)
    }

    /// What is asked from here on is asked at `time`, ns of [`now`].
    pub fn set_time(&mut self, time: u64) {
        self.time = time;
        let idle = |layer: &&HostLayer| layer.layer.is_idle();
        self.first = self.layers[..self.leaf].iter().take_while(idle).count();
    }

    /// The layer of that type, if there is one, and its number: to look at it.
    pub fn get<T: Layer>(&self) -> Option<(u16, &T)> {
        let typed = |layer: &HostLayer| <dyn Any>::is::<T>(layer.layer.as_ref());
        let index = self.layers.iter().position(typed)?;
        Some((index as u16, <dyn Any>::downcast_ref(self.layers[index].layer.as_ref())?))
    }

    /// What has waited for a layer.
    pub fn waits(&self, layer: u16) -> Waits {
        self.waits[usize::from(layer)]
    }

    /// The layer of that type takes the place of one for which so much has waited.
    pub fn set_waits<T: Layer>(&mut self, waits: Waits) {
        if let Some((layer, _)) = self.get::<T>() {
            self.waits[usize::from(layer)] = waits;
        }
    }

    /// The layer of that type, if there is one: for those who steer it. What waits is asked for again, for it may wait for that.
    pub fn find<T: Layer>(&mut self) -> Option<&mut T> {
        self.progress = true;
        self.layers.iter_mut().find_map(|layer| (layer.layer.as_mut() as &mut dyn Any).downcast_mut())
    }

    /// Whether some filter is asked.
    pub fn is_filtered(&self) -> bool {
        self.first < self.leaf
    }

    /// Whether the disk only finishes what it has.
    pub fn set_draining(&mut self, draining: bool) {
        if std::mem::replace(&mut self.draining, draining) != draining {
            self.layers[..self.leaf].iter_mut().for_each(|filter| filter.layer.drain(draining));
            self.progress = true;
        }
    }

    /// The leaf's file has that size now, in bytes. Gives the disk's; or the file that does not go with that, and why.
    pub fn file_grown(&mut self, file_size: u64) -> Result<u64, (&Path, OpenError)> {
        let (filters, images) = self.layers.split_at_mut(self.leaf);
        let (path, leaf) = (&images[0].path, &mut images[0].layer);
        let before = leaf.zeros_from(LayerFile(0));
        let size = leaf.file_grown(LayerFile(0), file_size).map_err(|error| (path.as_path(), error))?;
        if leaf.zeros_from(LayerFile(0)) != before {
            self.grown_at = now();
        }
        // The disk keeps its size then, and what is beyond is asked for by nobody.
        for filter in filters.iter() {
            filter.layer.check_size(size).map_err(|error| (filter.path.as_path(), error))?;
        }
        Ok(size)
    }

    /// Plans a request as far as the queue has room.
    #[inline(always)] // of each request
    pub fn start(&mut self, id: RequestId, slots: &mut Slots, queue: &mut Queue) -> Started {
        let request = slots.get(id);
        let (plan_as, op) = match request.op {
            Op::Read => (drivers::Op::Read, IoOp::Read),
            Op::Write { fua } => (drivers::Op::Write, IoOp::Write { fua }),
            // The disk has drained and flushed before, and so only its own data is left to be made durable.
            Op::Barrier => (drivers::Op::Write, IoOp::Write { fua: true }),
            Op::Discard => (drivers::Op::Discard, IoOp::Discard),
            Op::WriteZeroes { unmap } => (drivers::Op::WriteZeroes, IoOp::WriteZeroes { unmap }),
            Op::Status if !self.locates_by_file => return self.status(id, slots),
            Op::Status => (drivers::Op::Locate, IoOp::Status),
            Op::Flush => return self.flush(id, slots, queue),
        };
        let request = slots.get_mut(id);
        request.metadata = matches!(op, IoOp::Write { fua: true });
        let (origin, own) = (request.origin, own_tag(request).filter(|_| self.copies.is_some()));
        let first = own.and_then(|tag| self.begins_at(tag)).unwrap_or(self.first);
        loop {
            let request = slots.get_mut(id);
            if request.planned == request.len {
                return Started::Planned;
            }
            if !queue.has_room_for(self.transfers_most) {
                self.waits_no_longer(request);
                return Started::NoRoom;
            }
            if self.copies.is_some() && !self.may_copy(own) {
                return Started::Waits;
            }
            let extent = Extent { offset: request.offset + request.planned, len: request.len - request.planned };
            let ask = Ask { op: plan_as, extent, origin, begins: request.planned == 0, now: self.time };
            if first > self.leaf {
                // As the layer above it would have said.
                let below = Plan::Below { count: ask.extent.len };
                if !self.start_part(Part { id, op, ask }, first - 1, below, slots, queue) {
                    return Started::Waits;
                }
                continue;
            }
            let layer = &mut self.layers[first];
            match layer.layer.plan(&ask) {
                // Nearly always this is all there is to it.
                Plan::Data { file, at: offset, count, ticket: None } => {
                    let (file, at) = (layer.file(file), request.planned);
                    self.waits_no_longer(request);
                    let pushed = queue.push(Transfer { op, file, offset, len: count, owner: id, at, piece: None });
                    debug_assert!(pushed);
                    request.pieces += 1;
                    request.planned += count;
                }
                // Nor is more than this to what nobody has written.
                Plan::Zeros { count, ticket: None } => {
                    self.waits_no_longer(request);
                    self.zeros(request, op, first, count);
                }
                plan => {
                    if !self.start_part(Part { id, op, ask }, first, plan, slots, queue) {
                        return Started::Waits;
                    }
                }
            }
        }
    }

    /// The next `count` bytes of a request are zeros, as a layer says: what is read gets them.
    #[inline(always)] // of each request that reads a hole
    fn zeros(&mut self, request: &mut Request, op: IoOp, layer: usize, count: u64) {
        if op == IoOp::Read {
            request.payload.zero(request.planned, count);
            self.hits[layer].count(op, count, true);
        }
        request.planned += count;
    }

    /// Begins what the first layer does not answer with data alone. False: it has to wait.
    fn start_part(
        &mut self,
        mut part: Part,
        first: usize,
        mut plan: Plan,
        slots: &mut Slots,
        queue: &mut Queue,
    ) -> bool {
        let layer = self.walk(&mut part.ask, first, &mut plan);
        let request = slots.get_mut(part.id);
        match plan {
            Plan::Wait { until } => {
                self.wait(until);
                let (layer, timed) = (layer as u16, until.is_some());
                if request.waits_for.is_none_or(|waiting| (waiting.layer, waiting.timed) != (layer, timed)) {
                    self.waits_no_longer(request);
                    request.waits_for = Some(Waiting { layer, since: self.time, timed });
                }
                return false;
            }
            Plan::Fail(why) => {
                self.waits_no_longer(request);
                request.error.get_or_insert(errno(why));
                request.planned = request.len;
            }
            _ => {
                self.waits_no_longer(request);
                self.go(&part, layer, &plan, slots, queue);
            }
        }
        true
    }

    fn waits_no_longer(&mut self, request: &mut Request) {
        if let Some(Waiting { layer, since, .. }) = request.waits_for.take() {
            let waits = &mut self.waits[usize::from(layer)];
            waits.requests += 1;
            waits.ns += self.time.saturating_sub(since);
        }
    }

    fn wait(&mut self, until: Option<u64>) {
        self.meta_due = true;
        self.ask_again_at = self.ask_again_at.into_iter().chain(until).min();
    }

    /// Where the beginning of an extent is: `plan`, which is what layer `index` has said, becomes that, and the extent is cut to it. Gives the layer
    /// that it is in. Which layers it passed is in `passed`.
    #[inline(always)] // of each request whose data is not in the first layer
    fn walk(&mut self, ask: &mut Ask, mut index: usize, plan: &mut Plan) -> usize {
        self.passed.clear();
        let mut waits = None;
        loop {
            let (count, both) = match *plan {
                Plan::Below { count } => (count, None),
                Plan::Both { file, at, count } => (count, Some((file, at))),
                // What those below have to read for it is read meanwhile.
                Plan::Wait { until: None } if matches!(ask.op, drivers::Op::Read | drivers::Op::Locate) => {
                    waits = waits.or(Some(index));
                    ask.op = drivers::Op::Locate;
                    (ask.extent.len, None)
                }
                _ if waits.is_none() => return index,
                _ => break,
            };
            ask.extent.len = count;
            if index < self.leaf && waits.is_none() && self.layers[index].layer.descends() {
                self.passed.push(Passed { layer: index as u16, both });
            }
            index += 1;
            if index > self.leaf && !matches!(ask.op, drivers::Op::Read | drivers::Op::Locate) {
                // Nothing but the leaf is written.
                debug_assert!(false, "{} sends {:?} below itself", self.layers[self.leaf].layer.name(), ask.op);
                *plan = Plan::Fail(Fail::Io);
                return self.leaf;
            }
            let Some(HostLayer { layer, .. }) = self.layers.get_mut(index) else { break };
            if index > self.leaf {
                // A disk may be larger than what it was made of.
                let size = layer.size().unwrap_or(u64::MAX);
                if ask.extent.offset >= size {
                    break;
                }
                ask.extent.len = ask.extent.len.min(size - ask.extent.offset);
            }
            *plan = layer.plan(ask);
        }
        *plan = match waits {
            Some(_) => Plan::Wait { until: None },
            None => Plan::Zeros { count: ask.extent.len, ticket: None },
        };
        waits.unwrap_or(self.layers.len() - 1)
    }

    /// Begins what the walk has found for a part: a plan, and the layer that it is of.
    #[inline(always)] // likewise
    fn go(&mut self, part: &Part, layer: usize, plan: &Plan, slots: &mut Slots, queue: &mut Queue) {
        let (count, ticket) = match *plan {
            Plan::Data { count, ticket, .. }
            | Plan::Zeros { count, ticket }
            | Plan::Through(Through { count, ticket, .. }) => (count, ticket),
            _ => unreachable!("the walk ends with none of these"),
        };
        let &Part { id, op, ref ask } = part;
        let at = slots.get(id).planned;
        let piece = match (self.passed.is_empty(), ticket) {
            (true, None) => None,
            _ => self.hold(part, count, ticket.map(|ticket| (layer as u16, ticket)), slots, queue),
        };
        let request = slots.get_mut(id);
        match *plan {
            Plan::Through(through) => {
                request.planned += count;
                let offset = ask.extent.offset;
                self.copy(Wanted { owner: id, at, offset, op, layer, through, piece }, slots);
            }
            Plan::Data { file, at: offset, .. } => {
                request.planned += count;
                request.pieces += 1;
                let file = self.layers[layer].file(file);
                let pushed = queue.push(Transfer { op, file, offset, len: count, owner: id, at, piece });
                debug_assert!(pushed);
            }
            _ => {
                self.zeros(request, op, layer, count);
                if let Some(piece) = piece {
                    request.pieces += 1;
                    self.unwind(piece, true, slots);
                }
            }
        }
    }

    /// Lets layers hold on to what is about to begin, of `count` bytes: those that the walk has passed, and the one that it has come to.
    #[inline(never)] // nearly always nobody wants to
    fn hold(
        &mut self,
        part: &Part,
        count: u64,
        last: Option<(u16, Ticket)>,
        slots: &mut Slots,
        queue: &mut Queue,
    ) -> Option<PieceId> {
        let mut holders = Holders::default();
        if !self.passed.is_empty() && part.ask.op != drivers::Op::Locate {
            self.descend(part, count, &mut holders, slots, queue);
        }
        if let Some((layer, ticket)) = last {
            holders.push(layer, ticket);
        }
        let piece = self.pieces.add(part.id, part.op == IoOp::Flush, &holders);
        self.meta_due |= piece.is_some();
        piece
    }

    /// Tells the layers that the walk has passed that `count` bytes go on below, and begins what they do themselves.
    fn descend(&mut self, part: &Part, count: u64, holders: &mut Holders, slots: &mut Slots, queue: &mut Queue) {
        let &Part { id, op, ask } = part;
        let ask = Ask { extent: Extent { len: count, ..ask.extent }, ..ask };
        for index in 0..self.passed.len() {
            let Passed { layer, both } = self.passed[index];
            let host = &mut self.layers[usize::from(layer)];
            let descent = host.layer.descend(&ask);
            self.meta_due |= host.layer.meta_len() > 0;
            if let Some((file, offset)) = both {
                let file = host.file(file);
                // Whoever does it here hears of it alone.
                let mut holder = Holders::default();
                descent.here.into_iter().for_each(|ticket| holder.push(layer, ticket));
                let piece = self.pieces.add(id, op == IoOp::Flush, &holder);
                let request = slots.get_mut(id);
                request.pieces += 1;
                let at = request.planned;
                let pushed = queue.push(Transfer { op, file, offset, len: count, owner: id, at, piece });
                debug_assert!(pushed);
            }
            if let Some(ticket) = descent.below {
                holders.push(layer, ticket);
            }
        }
    }

    /// Makes what is written durable, on behalf of a request.
    pub fn flush(&mut self, id: RequestId, slots: &mut Slots, queue: &mut Queue) -> Started {
        if !queue.has_room_for(self.transfers_most) {
            return Started::NoRoom;
        }
        let request = slots.get_mut(id);
        request.meta_seen = self.meta_written;
        let (planned, origin) = (request.planned, request.origin);
        let mut ask = Ask {
            op: drivers::Op::Flush,
            extent: Extent { offset: 0, len: 0 },
            origin,
            begins: true,
            now: self.time,
        };
        let mut plan = self.layers[self.first].layer.plan(&ask);
        let layer = self.walk(&mut ask, self.first, &mut plan);
        match plan {
            Plan::Wait { until } => {
                self.wait(until);
                return Started::Waits;
            }
            Plan::Fail(why) => drop(slots.get_mut(id).error.get_or_insert(errno(why))),
            _ => self.go(&Part { id, op: IoOp::Flush, ask }, layer, &plan, slots, queue),
        }
        debug_assert_eq!(slots.get(id).planned, planned);
        Started::Planned
    }

    /// A transfer has ended. Gives its error, for what the caller logs. Requests that are done by
    /// it are told by [`next_done`](Self::next_done).
    pub fn finish(&mut self, transfer: &Transfer, result: Result<u64, Errno>, slots: &mut Slots) -> Option<Errno> {
        let mut result = self.whole(transfer, result, slots);
        if transfer.op == IoOp::Flush {
            // What nobody is owed is a flush of nobody's.
            let owed = || {
                own_tag(slots.get(transfer.owner)).is_none()
                    || self.layers[self.layer_of(transfer.file)].layer.flushes_metadata()
            };
            if transfer.piece.is_none() && result.is_err() && owed() {
                self.note_failed_flush(result.err());
            }
            result = self.failed_flush.map_or(result, Err);
        }
        let error = result.err();
        match own_tag(slots.get(transfer.owner)) {
            Some(tag) if self.begins_at(tag).is_none() => {
                self.meta_finished(transfer, result, slots);
                return error;
            }
            // What a copy moves is counted at its end.
            Some(_) => {}
            None => {
                let layer = self.layer_of(transfer.file);
                self.hits[layer].count(transfer.op, transfer.len, error.is_none());
            }
        }
        match transfer.piece {
            Some(piece) => {
                if let Some(errno) = error {
                    self.pieces.fail(piece, errno);
                }
                self.unwind(piece, error.is_none(), slots);
            }
            None => self
                .part_done(&Over { owner: transfer.owner, errno: error, flush: transfer.op == IoOp::Flush }, slots),
        }
        error
    }

    fn note_failed_flush(&mut self, errno: Option<Errno>) {
        // One that was called off says nothing.
        self.failed_flush = self.failed_flush.or(errno.filter(|errno| *errno != Errno::ECANCELED));
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
        let (layer, file) = self.files[usize::from(transfer.file.0)];
        let before = usize::from(layer) == self.leaf && file == LayerFile(0) && request.born <= self.grown_at;
        let zeros = if before { self.zeros_at_open } else { self.layers[usize::from(layer)].layer.zeros_from(file) };
        if transfer.offset + done < zeros {
            return Err(Errno::EIO);
        }
        request.payload.zero(transfer.at + done, transfer.len - done);
        Ok(())
    }

    /// What a piece is about has ended, or a layer has settled its ticket: the next layer hears of it.
    fn unwind(&mut self, piece: PieceId, done: bool, slots: &mut Slots) {
        match self.pieces.next_holder(piece) {
            Some((layer, ticket)) => {
                self.layers[layer].layer.ended(ticket, done);
                self.settle(layer, slots);
            }
            None => {
                let over = self.pieces.over(piece, done);
                if over.flush {
                    self.note_failed_flush(over.errno);
                }
                self.part_done(&over, slots);
            }
        }
    }

    /// Takes what a layer has settled.
    fn settle(&mut self, layer: usize, slots: &mut Slots) {
        (self.meta_due, self.progress) = (true, true);
        while let Some(settled) = self.layers[layer].layer.settled() {
            if let Some(piece) = self.pieces.of(layer, settled.ticket) {
                self.unwind(piece, settled.done, slots);
            }
        }
    }

    /// A transfer of a request, or a piece, is over.
    #[inline(always)] // of each request
    fn part_done(&mut self, over: &Over, slots: &mut Slots) {
        let request = slots.get_mut(over.owner);
        if let Some(errno) = over.errno {
            request.error.get_or_insert(errno);
        }
        request.pieces -= 1;
        if request.pieces > 0 {
            return;
        }
        if over.flush && request.error.is_none() {
            self.meta_durable = self.meta_durable.max(request.meta_seen);
        }
        if !request.planning {
            self.all_done(over.owner, slots);
        }
    }

    /// All of a request is planned and done: it is finished, or the metadata that says where its data is, which may be that of an
    /// earlier write, is to be made durable with it.
    #[inline(always)] // of each request
    pub fn all_done(&mut self, id: RequestId, slots: &mut Slots) {
        let request = slots.get_mut(id);
        let lasting = std::mem::take(&mut request.metadata) && request.error.is_none();
        if lasting && self.meta_durable < self.meta_written {
            self.to_flush.push_back(id);
        } else if self.copies.is_some() && own_tag(request).is_some() {
            self.copied(id, slots);
        } else {
            self.done.push_back(id);
        }
    }

    /// What is not planned of a request is not done: it ends with ECANCELED, when what has begun of it has ended.
    pub fn call_off(&mut self, id: RequestId, slots: &mut Slots) {
        let request = slots.get_mut(id);
        request.error.get_or_insert(Errno::ECANCELED);
        request.planning = false;
        if request.pieces == 0 {
            self.all_done(id, slots);
        }
    }

    /// A request that is finished.
    pub fn next_done(&mut self) -> Option<RequestId> {
        self.done.pop_front()
    }

    /// How many are.
    pub fn done(&self) -> usize {
        self.done.len()
    }

    /// A write that was to be durable has failed. Through the page cache it is a write and a flush, and gets the error of what others wrote.
    pub fn note_failed_fua(&mut self, file: FileId, errno: Errno) {
        // What there is no space or no memory for was not given to the kernel.
        if errno == Errno::EIO && self.layers[self.layer_of(file)].cached {
            self.note_failed_flush(Some(errno));
        }
    }

    /// Why no flush succeeds any more: what was answered before may be lost.
    pub fn failed_flush(&self) -> Option<Errno> {
        self.failed_flush
    }

    /// Whether something is done since it was last asked that a request may have waited for, or the time has come that one waits for.
    pub fn progress(&mut self) -> bool {
        let due = self.ask_again_at.take_if(|at| *at <= self.time).is_some();
        std::mem::take(&mut self.progress) | due
    }

    /// When there is [progress](Self::progress) although nothing is done, ns of [`now`].
    pub fn deadline(&self) -> Option<u64> {
        self.ask_again_at
    }

    /// Nothing is under way, and no request will be started: what the layers still have to write as metadata is moved from here on.
    pub fn begin_closing(&mut self) {
        self.layers.iter_mut().for_each(|layer| layer.layer.closing());
        self.meta_due = true;
    }

    /// Nothing is under way, and nothing more will come: gives what leaves the images so that others find them whole, and blocks. None:
    /// they are.
    pub fn close(&mut self) -> Option<impl FnOnce(&Blocking) -> Closed + Send + use<>> {
        // The image first: what a filter can't write must not leave that as it is.
        let (filters, images) = self.layers.split_at_mut(self.leaf);
        let closings = |layers: &mut [HostLayer]| layers.iter_mut().filter_map(HostLayer::close).collect::<Vec<_>>();
        let (images, filters) = (closings(images), closings(filters));
        let some = !images.is_empty() || !filters.is_empty();
        some.then_some(move |blocking: &Blocking| Closed {
            images: Closing::all(images, blocking),
            filters: Closing::all(filters, blocking),
        })
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        let layers: usize = self.layers.iter().map(|layer| layer.layer.bytes()).sum();
        layers
            + self.pieces.bytes()
            + self.metas.as_ref().map_or(0, MetaMemory::bytes)
            + self.copies.as_ref().map_or(0, Copies::bytes)
    }
}

/// The tag of a request of the stack's own.
fn own_tag(request: &Request) -> Option<u64> {
    matches!(request.origin, Origin::Layer(_)).then_some(request.tag)
}

fn errno(why: Fail) -> Errno {
    match why {
        Fail::NoSpace => Errno::ENOSPC,
        Fail::Io => Errno::EIO,
    }
}
