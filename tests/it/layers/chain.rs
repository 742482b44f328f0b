//! A chain of layers, its queue, and an engine that a test steers.

use std::any::{Any, TypeId};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use drivers::{Layer, LayerFile};
use fastrand::Rng;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tapdisk::blocking::{Blocking, Caller};
use tapdisk::engine::{Engine, Inline, Reap, Submit};
use tapdisk::queue::{Limits, Queue, Submission, SubmitMode};
use tapdisk::request::{Op, RequestId, Slots};
use tapdisk::retry::Retry;
use tapdisk::stack::{HostLayer, OWN_REQUESTS, Stack, Started};
use tapdisk::sys::io::{FileId, Io, IoOp};
use tapdisk::sys::memory::Memory;

/// The first file of a layer.
pub(super) const FILE: LayerFile = LayerFile(0);

/// Requests at a time.
const REQUESTS: usize = 16;
/// Bytes of memory of each.
const PLACE: usize = 64 << 10;

/// Bytes that tell where they belong.
pub(super) fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| seed.wrapping_add((at / 512) as u8).wrapping_mul(31) ^ at as u8).collect()
}

/// What the engine has: files, and what is under way.
#[derive(Default)]
pub(super) struct State {
    pub(super) files: Vec<Vec<u8>>,
    /// Fails what is done on these files: reads, others.
    pub(super) fails: Vec<(FileId, IoOp)>,
    /// What was done, in its order.
    pub(super) seen: Vec<(FileId, IoOp, u64, u64)>,
    /// Nothing completes by itself.
    pub(super) holds: bool,
    #[allow(clippy::vec_box)] // as they come
    held: Vec<Box<Io>>,
    done: VecDeque<(Box<Io>, Result<u64, Errno>)>,
}

impl State {
    fn run(&mut self, io: &Io) -> Result<u64, Errno> {
        self.seen.push((io.file, io.op, io.offset, io.len));
        let kind = |op: IoOp| std::mem::discriminant(&op);
        if self.fails.iter().any(|(file, op)| *file == io.file && kind(*op) == kind(io.op)) {
            return Err(Errno::EIO);
        }
        let file = &mut self.files[usize::from(io.file.0)];
        let (start, end) = (io.offset as usize, (io.offset + io.len) as usize);
        if file.len() < end && io.op != IoOp::Read {
            file.resize(end, 0);
        }
        match io.op {
            IoOp::Read if file.len() < end => return Err(Errno::EINVAL),
            IoOp::Read => io.fill(&file[start..end]),
            IoOp::Write { .. } => io.drain(&mut file[start..end]),
            IoOp::Discard | IoOp::WriteZeroes { .. } => file[start..end].fill(0),
            IoOp::Flush | IoOp::Status => {}
        }
        Ok(io.len)
    }

    /// Does the held I/O of that index.
    fn release(&mut self, index: usize) {
        let io = self.held.swap_remove(index);
        let result = self.run(&io);
        self.done.push_back((io, result));
    }
}

struct Shared {
    state: Arc<Mutex<State>>,
    event: Arc<EventFd>,
}

impl Submit for Shared {
    fn submit(&self, batch: &mut VecDeque<Box<Io>>, limit: usize, _: Caller) -> Result<usize, Errno> {
        let count = batch.len().min(limit);
        self.state.lock().unwrap().held.extend(batch.drain(..count));
        Ok(count)
    }

    fn offers(&self, _: TypeId) -> Option<&dyn Any> {
        None
    }

    fn event(&self) -> &Arc<EventFd> {
        &self.event
    }
}

impl Reap for Shared {
    fn ready(&self) -> bool {
        !self.state.lock().unwrap().done.is_empty()
    }

    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        let finished = std::mem::take(&mut self.state.lock().unwrap().done);
        let count = finished.len();
        finished.into_iter().for_each(|(io, result)| done(io, result));
        count
    }
}

/// A request's tag, its result, and what a read has got.
type Answer = (u64, Result<(), Errno>, Option<Vec<u8>>);

/// A chain in use.
pub(super) struct Chain {
    pub(super) stack: Stack,
    slots: Slots,
    queue: Queue,
    pub(super) engine: Arc<Mutex<State>>,
    started: VecDeque<RequestId>,
    waiting: VecDeque<RequestId>,
    memory: Arc<Memory>,
    places: Vec<usize>,
    /// Answers, by the tag of their request.
    answers: Vec<Answer>,
    next: u64,
    pub(super) rng: Rng,
    pub(super) now: u64,
}

impl Chain {
    /// Of layers, the first one first, with one file or none each; the files have these contents.
    pub(super) fn new(layers: Vec<(Box<dyn Layer>, bool)>, files: Vec<Vec<u8>>, seed: u64) -> Chain {
        let mut next = 0;
        let layers: Vec<_> = layers
            .into_iter()
            .map(|(layer, has_file)| match has_file {
                true => {
                    next += 1;
                    HostLayer::new(layer, format!("file{}", next - 1).as_ref(), FileId(next - 1), false)
                }
                false => HostLayer::without_file(layer),
            })
            .collect();
        assert_eq!(usize::from(next), files.len());
        Chain::of(layers, files, seed)
    }

    /// The same, of layers whose files have their numbers.
    pub(super) fn of(layers: Vec<HostLayer>, files: Vec<Vec<u8>>, seed: u64) -> Chain {
        let engine = Arc::new(Mutex::new(State { files, ..State::default() }));
        let event = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
        let shared = || Shared { state: Arc::clone(&engine), event: Arc::clone(&event) };
        let submit = Arc::new(shared());
        let reap = Box::new(shared());
        let double = Engine { name: "double", depth: 8, inline: Inline::Always, submit, reap };
        let limits = Limits { tiocbs: 64, iovecs: 16, merge_bytes: 1 << 20, retry: Retry::default() };
        let submission = Submission::start(&Blocking::before_main_loop(), double, SubmitMode::Inline).unwrap();
        Chain {
            stack: Stack::new(layers.into(), REQUESTS).unwrap(),
            slots: Slots::new(REQUESTS, 4, OWN_REQUESTS),
            queue: Queue::new(submission.into(), SubmitMode::Inline, limits),
            engine,
            started: VecDeque::new(),
            waiting: VecDeque::new(),
            memory: Arc::new(Memory::anonymous(REQUESTS * PLACE).unwrap()),
            places: (0..REQUESTS).rev().collect(),
            answers: Vec::new(),
            next: 0,
            rng: Rng::with_seed(seed),
            now: 1,
        }
    }

    /// Begins a request, with `data` of a write, and gives its tag.
    pub(super) fn begin(&mut self, op: Op, offset: u64, len: u64, data: &[u8]) -> u64 {
        let place = self.places.pop().expect("there is a place");
        self.memory.write(place * PLACE, data);
        let request = self.slots.vacant().unwrap();
        (request.op, request.offset, request.len, request.planning) = (op, offset, len, true);
        request.tag = self.next << 8 | place as u64;
        if len > 0 {
            // In two segments.
            let half = len / 1024 * 512;
            let first = place * PLACE;
            let mut payload = request.payload.within(&self.memory).unwrap();
            payload.push(first, half.max(512) as u32).unwrap();
            if half > 0 {
                payload.push(first + half as usize, (len - half) as u32).unwrap();
            }
        }
        self.next += 1;
        let tag = request.tag;
        self.started.extend(self.slots.take());
        tag
    }

    /// Room for another request.
    pub(super) fn has_room(&self) -> bool {
        !self.places.is_empty()
    }

    /// Everything that can be done without the engine.
    pub(super) fn turn(&mut self) {
        for _ in 0..100 {
            self.stack.set_time(self.now);
            let mut worked = self.stack.move_metadata(&mut self.slots, &mut self.queue);
            if self.stack.progress() {
                while let Some(id) = self.waiting.pop_back() {
                    self.started.push_front(id);
                }
            }
            while let Some(id) = self.started.pop_front() {
                match self.stack.start(id, &mut self.slots, &mut self.queue) {
                    Started::Planned => {
                        let request = self.slots.get_mut(id);
                        request.planning = false;
                        if request.pieces == 0 {
                            self.stack.all_done(id, &mut self.slots);
                        }
                        worked = true;
                    }
                    Started::Waits => self.waiting.push_back(id),
                    Started::NoRoom => {
                        self.started.push_front(id);
                        break;
                    }
                }
            }
            worked |= self.stack.move_metadata(&mut self.slots, &mut self.queue);
            self.queue.kick(&self.slots);
            if !self.engine.lock().unwrap().holds {
                self.release_one();
            }
            worked |= self.queue.reap() > 0;
            worked |= self.finish();
            if !worked {
                return;
            }
        }
    }

    fn finish(&mut self) -> bool {
        let mut worked = false;
        while let Some((transfer, result)) = self.queue.next_finished() {
            self.stack.finish(&transfer, result, &mut self.slots);
            worked = true;
        }
        while let Some(id) = self.stack.next_done() {
            let request = self.slots.get(id);
            let data = (request.op == Op::Read).then(|| {
                let mut data = vec![0; request.len as usize];
                request.payload.get(0, &mut data);
                data
            });
            self.answers.push((request.tag, request.result(), data));
            self.places.push((request.tag & 0xff) as usize);
            self.slots.release(id);
            worked = true;
        }
        worked
    }

    /// Completes one I/O of those that are held, any of them.
    pub(super) fn release_one(&mut self) {
        let mut state = self.engine.lock().unwrap();
        let count = state.held.len();
        if count > 0 {
            state.release(self.rng.usize(..count));
        }
    }

    /// I/Os that are held.
    pub(super) fn held(&self) -> usize {
        self.engine.lock().unwrap().held.len()
    }

    /// From now on nothing completes by itself, or all does.
    pub(super) fn hold(&mut self, on: bool) {
        self.engine.lock().unwrap().holds = on;
    }

    /// Answers that have come since it was last asked.
    pub(super) fn answers(&mut self) -> Vec<Answer> {
        std::mem::take(&mut self.answers)
    }

    /// Turns until everything is answered.
    pub(super) fn drain(&mut self) {
        for _ in 0..10_000 {
            self.turn();
            self.release_one();
            if self.places.len() == REQUESTS && self.slots.own_used() == 0 && self.queue.is_idle() {
                return;
            }
        }
        panic!("{} requests are never answered", REQUESTS - self.places.len());
    }

    /// Does a request and waits for its answer.
    pub(super) fn run(&mut self, op: Op, offset: u64, len: u64, data: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
        let tag = self.begin(op, offset, len, data);
        self.drain();
        let (_, result, data) = self.answers().into_iter().find(|(answered, ..)| *answered == tag).unwrap();
        result.map(|()| data)
    }

    pub(super) fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        self.run(Op::Read, offset, len, &[]).unwrap().unwrap()
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.run(Op::Write { fua: false }, offset, data.len() as u64, data).map(drop)
    }

    /// Bytes of a file.
    pub(super) fn file(&self, id: u16) -> Vec<u8> {
        self.engine.lock().unwrap().files[usize::from(id)].clone()
    }

    /// What was done on a file, as (operation, first byte, bytes), since it was last asked.
    pub(super) fn seen(&mut self) -> Vec<(FileId, IoOp, u64, u64)> {
        std::mem::take(&mut self.engine.lock().unwrap().seen)
    }
}
