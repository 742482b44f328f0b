//! The queue: tiocbs wait, are merged where they are contiguous, and are pending until the engine is done with them.
//!
//! A tiocb is one transfer between one file and a run of a request's payload. Contiguous tiocbs of the same file and
//! direction become one [`Io`]; the tiocbs stay linked behind it and are kept. Where a merged I/O comes back short,
//! what is wholly done succeeds and the rest is submitted again; where it fails, it is split, and each tiocb stands
//! for itself.

mod report;

use std::collections::VecDeque;
use std::sync::Arc;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

pub use self::report::{QueueReport, TiocbReport};
use crate::blocking::{Blocking, Caller};
use crate::engine::{self, Engine, Inline, Reap};
use crate::job::Apart;
use crate::request::{Op, PieceId, RequestId, Slots};
use crate::retry::{Failures, Retry, is_no_space};
use crate::stats::{Traffic, now};
use crate::submit::{Counters, SubmitThread, submit_all};
use crate::sys::io::{FileId, Io, IoOp};

/// Who submits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SubmitMode {
    /// The main loop where it can't be blocked for long, otherwise the thread.
    #[default]
    Auto,
    /// Always the submit thread.
    Thread,
    /// Always the main loop. It can deadlock a host that is short of memory; for measuring.
    Inline,
}

impl SubmitMode {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            SubmitMode::Auto => "auto",
            SubmitMode::Thread => "thread",
            SubmitMode::Inline => "inline",
        }
    }
}

/// Sizes of a queue, and what it does about errors.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// tiocbs.
    pub tiocbs: usize,
    /// Pieces of memory in one I/O.
    pub iovecs: usize,
    /// Bytes in one merged I/O. A single tiocb may be larger.
    pub merge_bytes: u64,
    /// What is done about an I/O that failed.
    pub retry: Retry,
}

const NONE: u32 = u32::MAX;

/// What a tiocb is to transfer.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// What to do.
    pub op: IoOp,
    /// On which file.
    pub file: FileId,
    /// From which byte of it.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// For which request.
    pub owner: RequestId,
    /// From which byte of that request's payload.
    pub at: u64,
    /// Which piece of the request that is, if layers want to hear of its end.
    pub piece: Option<PieceId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Waiting,
    /// In the I/O with that tag.
    Pending(u32),
    /// It failed with that, and is tried again later.
    Parked(Errno),
}

#[derive(Debug)]
struct Tiocb {
    transfer: Option<Transfer>,
    /// Bytes that an earlier, short I/O has done.
    done: u64,
    /// Not to be merged: it was part of a merged I/O that failed.
    alone: bool,
    failures: Failures,
    /// When it is tried again, ns of [`now`].
    due: u64,
    /// One of its failures was a lack of space.
    no_space: bool,
    state: State,
    /// When it was queued, ns of [`now`].
    queued: u64,
    /// The next in whichever list it is in: free, waiting, or merged into the same I/O.
    next: u32,
}

impl Tiocb {
    /// For `transfer`, that is queued at `queued`; `next` is the next in the list that it goes to.
    fn new(transfer: Option<Transfer>, state: State, queued: u64, next: u32) -> Tiocb {
        let failures = Failures::default();
        Tiocb { transfer, done: 0, alone: false, failures, due: 0, no_space: false, state, queued, next }
    }
}

/// A tiocb that is finished: with its bytes, fewer than asked only where the file ended, or its error.
pub type Finished = (Transfer, Result<u64, Errno>);

/// An engine, and the thread that submits to it.
pub struct Submission {
    engine: Engine,
    /// If one can be needed. Whoever ends both ends it first.
    thread: Option<SubmitThread>,
    counters: Arc<Counters>,
}

impl Submission {
    /// Starts the submit thread if `mode` can need one. Errors are those of [`spawn`](crate::blocking::spawn).
    pub fn start(blocking: &Blocking, engine: Engine, mode: SubmitMode) -> std::io::Result<Submission> {
        let needed = mode == SubmitMode::Thread || (mode == SubmitMode::Auto && engine.inline != Inline::Always);
        let counters = Arc::new(Counters::default());
        let start = || SubmitThread::start(blocking, Arc::clone(&engine.submit), Arc::clone(&counters), engine.depth);
        let thread = needed.then(start).transpose()?;
        Ok(Submission { engine, thread, counters })
    }

    /// What a disk has as long as it has no image: nothing is submitted to it.
    pub fn idle(&self) -> Submission {
        Submission { engine: engine::memory::idle(&self.engine), thread: None, counters: Arc::default() }
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Ends the thread, and then the engine. Waits for what it has in flight.
    pub fn close(self, _: &Blocking) {
        drop(self.thread);
        drop(self.engine);
    }
}

/// The queue of a disk.
pub struct Queue {
    tiocbs: Vec<Tiocb>,
    free: u32,
    waiting: (u32, u32),
    waiting_count: usize,
    /// I/Os that are not in flight. In boxes, because they move between threads and the kernel keeps their address.
    #[allow(clippy::vec_box)]
    idle: Vec<Box<Io>>,
    /// First tiocb of each I/O in flight, by its tag.
    heads: Vec<u32>,
    in_flight: usize,
    /// I/Os to be submitted.
    batch: VecDeque<Box<Io>>,
    /// Those of a batch that the engine refuses, until they are taken in. Empty otherwise.
    refused: VecDeque<(Box<Io>, Errno)>,
    /// With when it was queued.
    finished: VecDeque<(Finished, u64)>,
    /// The time, as of the last look at the clock, ns of [`now`].
    time: u64,
    /// Of each file.
    traffic: Vec<Traffic>,
    /// tiocbs that failed and are tried again.
    parked: Vec<u32>,
    /// tiocbs that have lacked space and are not finished.
    no_space: usize,
    /// The last of those whose first failure nobody has asked for.
    retried: Option<(Transfer, Errno)>,
    /// The first write that was to be durable and has failed.
    failed_fua: Option<(FileId, Errno)>,
    retry: Retry,
    /// As long as it is not 0, nothing is submitted.
    plugs: u32,
    merge_bytes: u64,
    mode: SubmitMode,
    /// The engine's, until a file turns out not to have it.
    inline: Inline,
    submission: Apart<Submission>,
    report: QueueReport,
    /// Pieces of memory in one I/O.
    iovecs: usize,
}

impl Queue {
    /// A queue on an engine, whose submit thread is one for `mode`.
    pub fn new(submission: Apart<Submission>, mode: SubmitMode, limits: Limits) -> Queue {
        let Limits { tiocbs: size, iovecs, merge_bytes, retry } = limits;
        let engine = &submission.engine;
        let mut tiocbs: Vec<_> = (1..=size as u32).map(|next| Tiocb::new(None, State::Free, 0, next)).collect();
        tiocbs[size - 1].next = NONE;
        Queue {
            tiocbs,
            free: 0,
            waiting: (NONE, NONE),
            waiting_count: 0,
            idle: (0..engine.depth as u32).rev().map(|tag| Io::new(tag, iovecs)).collect(),
            heads: vec![NONE; engine.depth],
            in_flight: 0,
            batch: VecDeque::with_capacity(engine.depth),
            refused: VecDeque::with_capacity(engine.depth),
            finished: VecDeque::with_capacity(size),
            time: 0,
            traffic: Vec::new(),
            parked: Vec::with_capacity(size),
            no_space: 0,
            retried: None,
            failed_fua: None,
            retry,
            plugs: 0,
            merge_bytes,
            mode,
            inline: engine.inline.clone(),
            report: QueueReport { depth: engine.depth, size, ..QueueReport::default() },
            submission,
            iovecs,
        }
    }

    /// The engine and who submits to it.
    pub fn submission(&self) -> &Submission {
        &self.submission
    }

    /// The engine. Its event says that something can be reaped.
    pub fn engine(&self) -> &Engine {
        &self.submission.engine
    }

    /// Who submits.
    pub fn mode(&self) -> SubmitMode {
        self.mode
    }

    /// Whether [`push`](Self::push) would take one.
    pub fn has_room(&self) -> bool {
        self.free != NONE
    }

    /// Whether it would take `count` of them.
    pub fn has_room_for(&self, count: usize) -> bool {
        let mut free = self.free;
        let mut more = count;
        while more > 1 && free != NONE {
            free = self.tiocbs[free as usize].next;
            more -= 1;
        }
        free != NONE
    }

    /// Adds a tiocb to those that wait. False: there is no free one.
    pub fn push(&mut self, transfer: Transfer) -> bool {
        let index = self.free;
        if index == NONE {
            return false;
        }
        let tiocb = &mut self.tiocbs[index as usize];
        self.free = tiocb.next;
        *tiocb = Tiocb::new(Some(transfer), State::Waiting, self.time, NONE);
        self.append(index);
        self.report.queued += 1;
        true
    }

    fn append(&mut self, index: u32) {
        match self.waiting {
            (NONE, _) => self.waiting = (index, index),
            (head, tail) => {
                self.tiocbs[tail as usize].next = index;
                self.waiting = (head, index);
            }
        }
        self.waiting_count += 1;
    }

    fn pop(&mut self) -> u32 {
        let index = self.waiting.0;
        let next = std::mem::replace(&mut self.tiocbs[index as usize].next, NONE);
        self.waiting = (next, if next == NONE { NONE } else { self.waiting.1 });
        self.waiting_count -= 1;
        index
    }

    /// From here until as many [`unplug`](Self::unplug)s nothing is submitted, so that what comes meanwhile goes together.
    pub fn plug(&mut self) {
        self.plugs += 1;
    }

    /// Takes a plug out. The last one submits what has come together.
    pub fn unplug(&mut self, slots: &Slots) {
        self.plugs -= 1;
        self.kick(slots);
    }

    /// Submits what waits, as far as the depth allows, unless there is a plug.
    pub fn kick(&mut self, slots: &Slots) {
        if self.plugs > 0 {
            return;
        }
        if !self.parked.is_empty() {
            self.unpark(now());
        }
        while self.waiting_count > 0 {
            let Some(io) = self.idle.pop() else { break };
            self.in_flight += 1;
            let io = self.merge(io, slots);
            self.batch.push_back(io);
        }
        if !self.batch.is_empty() {
            self.submit();
        }
    }

    /// Builds an I/O of the first tiocb that waits and those that are contiguous with it.
    fn merge(&mut self, mut io: Box<Io>, slots: &Slots) -> Box<Io> {
        let head = self.pop();
        let first = &self.tiocbs[head as usize];
        let (transfer, done, alone) = (first.transfer.expect("it waits"), first.done, first.alone);
        io.begin(transfer.op, transfer.file, transfer.offset + done);
        add(&mut io, &transfer, done, slots);
        self.heads[io.tag as usize] = head;
        self.tiocbs[head as usize].state = State::Pending(io.tag);
        let mut tail = head;
        while !alone && self.waiting_count > 0 && self.fits(&io, slots) {
            let next = self.pop();
            let tiocb = &mut self.tiocbs[next as usize];
            tiocb.state = State::Pending(io.tag);
            let transfer = tiocb.transfer.expect("it waits");
            add(&mut io, &transfer, 0, slots);
            self.tiocbs[tail as usize].next = next;
            tail = next;
            self.report.merged += 1;
        }
        io
    }

    /// Whether the first tiocb that waits goes on where `io` ends.
    fn fits(&self, io: &Io, slots: &Slots) -> bool {
        let tiocb = &self.tiocbs[self.waiting.0 as usize];
        let Some(t) = &tiocb.transfer else { return false };
        if t.op != io.op || t.file != io.file || tiocb.alone || tiocb.done > 0 {
            return false;
        }
        match t.op {
            IoOp::Flush => true,
            IoOp::Read | IoOp::Write { .. } => {
                let payload = &slots.get(t.owner).payload;
                t.offset == io.offset + io.len
                    && io.len + t.len <= self.merge_bytes
                    && payload.slice(t.at, t.len).count() <= io.room()
                    && io.accepts(payload.memories())
            }
            IoOp::Discard | IoOp::WriteZeroes { .. } | IoOp::Status => false,
        }
    }

    fn submit(&mut self) {
        let by_itself = match (self.mode, &self.inline) {
            (SubmitMode::Inline, _) | (SubmitMode::Auto, Inline::Always) => true,
            (SubmitMode::Auto, Inline::ByFile(_)) => return self.submit_by_file(),
            (SubmitMode::Auto, inline) => {
                if self.in_flight == 1 && inline.when_idle(&self.batch[0]) && self.submit_nowait() {
                    return;
                }
                false
            }
            (SubmitMode::Thread, _) => false,
        };
        match &self.submission.thread {
            Some(thread) if !by_itself => thread.handover().give(self.batch.drain(..)),
            _ => self.submit_inline(),
        }
    }

    /// Submits what never blocks, and hands over the rest; a single one may be submitted all the same.
    fn submit_by_file(&mut self) {
        let always = |io: &Io| *self.inline.of(io.file) == Inline::Always;
        if self.in_flight == 1
            && !always(&self.batch[0])
            && self.inline.when_idle(&self.batch[0])
            && self.submit_nowait()
        {
            return;
        }
        if let Some(thread) = &self.submission.thread {
            let (inline, batch) = (&self.inline, &mut self.batch);
            let mut left = batch.len();
            let rest = std::iter::from_fn(|| {
                while left > 0 {
                    left -= 1;
                    let io = batch.pop_front()?;
                    if *inline.of(io.file) != Inline::Always {
                        return Some(io);
                    }
                    batch.push_back(io);
                }
                None
            });
            thread.handover().give(rest);
        }
        if !self.batch.is_empty() {
            self.submit_inline();
        }
    }

    /// Submits the only I/O there is, which the kernel is told not to block for. False: it goes to the thread.
    fn submit_nowait(&mut self) -> bool {
        self.batch[0].nowait = true;
        let file = self.batch[0].file;
        match self.submission.engine.submit.submit(&mut self.batch, 1, Caller::MainLoop) {
            Ok(n) if n > 0 => {
                self.submission.counters.took(n);
                self.report.inline += n as u64;
                true
            }
            refused => {
                self.batch[0].nowait = false;
                // A file without RWF_NOWAIT says so at once, and always will.
                if matches!(refused, Err(Errno::EOPNOTSUPP | Errno::EINVAL)) {
                    self.inline.forbid(file);
                }
                self.report.would_block += 1;
                false
            }
        }
    }

    fn submit_inline(&mut self) {
        let mut refused = std::mem::take(&mut self.refused);
        loop {
            let before = self.batch.len();
            submit_all(
                &*self.submission.engine.submit,
                Caller::MainLoop,
                &self.submission.counters,
                &mut self.batch,
                || false,
                // Each of a batch can be.
                |io, errno| refused.push_back((io, errno)),
            );
            self.report.inline += (before - self.batch.len()) as u64;
            if refused.is_empty() {
                break;
            }
            while let Some((io, errno)) = refused.pop_front() {
                self.complete(io, Err(errno));
            }
        }
        self.refused = refused;
    }

    /// When a turn is due although nothing completes, ns of [`now`]: for I/Os that are left over and nothing in flight makes
    /// room for, and for what is to be tried again.
    pub fn deadline(&self) -> Option<u64> {
        let left_over = (!self.batch.is_empty()).then(|| now() + 1_000_000);
        self.parked.iter().map(|index| self.tiocbs[*index as usize].due).chain(left_over).min()
    }

    /// Whether the engine has nothing of ours.
    pub fn is_drained(&self) -> bool {
        self.in_flight == self.batch.len()
    }

    /// Goes on with another engine of the same depth, and another way to submit. The queue is plugged and drained. Gives what it had.
    pub fn switch(&mut self, submission: Apart<Submission>, mode: SubmitMode) -> Apart<Submission> {
        let Submission { engine, counters, .. } = &*submission;
        assert!(self.plugs > 0 && self.is_drained() && engine.depth == self.report.depth);
        counters.add(&self.submission.counters);
        (self.mode, self.inline) = (mode, engine.inline.clone());
        std::mem::replace(&mut self.submission, submission)
    }

    /// Whether [`reap`](Self::reap) would find something.
    pub fn ready(&self) -> bool {
        self.submission.engine.reap.ready()
            || self.submission.thread.as_ref().is_some_and(|thread| thread.handover().has_refused())
    }

    /// Takes in what the engine completed and refused. What is finished by that is in
    /// [`next_finished`](Self::next_finished).
    pub fn reap(&mut self) -> usize {
        // The completions are in the kernel's ring while each is taken in, so the reaper is apart from the rest.
        let mut reap = std::mem::replace(&mut self.submission.engine.reap, Box::new(Nothing));
        let count = reap.reap(&mut |io, result| self.complete(io, result));
        self.submission.engine.reap = reap;
        if count > 0
            && let Some(thread) = &self.submission.thread
        {
            thread.handover().completed();
        }
        let refused = |queue: &Queue| queue.submission.thread.as_ref()?.handover().take_refused();
        while let Some((io, errno)) = refused(self) {
            self.complete(io, Err(errno));
        }
        if !self.finished.is_empty() {
            self.time = now();
        }
        count
    }

    fn complete(&mut self, io: Box<Io>, result: Result<u64, Errno>) {
        match result {
            Err(Errno::EAGAIN | Errno::EOPNOTSUPP) if io.nowait => {
                if result == Err(Errno::EOPNOTSUPP) {
                    self.inline.forbid(io.file);
                }
                self.report.would_block += 1;
                self.again(io);
            }
            Err(errno) => self.fail(io, errno),
            Ok(n) if n < io.len && matches!(io.op, IoOp::Read | IoOp::Write { .. }) => self.short(io, n),
            Ok(_) => {
                let mut index = self.release(io);
                while index != NONE {
                    index = self.finish(index, None);
                }
            }
        }
    }

    /// Submits an I/O that is still in flight again.
    fn again(&mut self, mut io: Box<Io>) {
        io.nowait = false;
        match &self.submission.thread {
            Some(thread) => thread.handover().give(std::iter::once(io)),
            None => self.batch.push_back(io),
        }
    }

    /// A failed I/O fails its only tiocb; a merged one is split. A flush fails all of its tiocbs: the kernel would say yes to another one,
    /// and has forgotten what is lost.
    fn fail(&mut self, io: Box<Io>, errno: Errno) {
        let (op, file) = (io.op, io.file);
        let mut head = self.release(io);
        if op == IoOp::Flush {
            while head != NONE {
                head = self.finish(head, Some(Err(errno)));
            }
            return;
        }
        if op == (IoOp::Write { fua: true }) {
            self.failed_fua.get_or_insert((file, errno));
        }
        if self.tiocbs[head as usize].next == NONE {
            self.park_or_finish(head, errno);
        } else {
            self.report.split += 1;
            self.wait_alone(head);
        }
    }

    /// A tiocb has failed by itself: it is tried again later, or it is finished.
    fn park_or_finish(&mut self, index: u32, errno: Errno) {
        let tiocb = &mut self.tiocbs[index as usize];
        let transfer = tiocb.transfer.expect("it is pending");
        let Some(due) = self.retry.judge(transfer.op, errno, &mut tiocb.failures, now()) else {
            self.finish(index, Some(Err(errno)));
            return;
        };
        (tiocb.due, tiocb.alone, tiocb.state) = (due, true, State::Parked(errno));
        if is_no_space(transfer.op, errno) && !std::mem::replace(&mut tiocb.no_space, true) {
            self.no_space += 1;
        }
        if tiocb.failures.count == 1 {
            self.retried = Some((transfer, errno));
        }
        self.report.retried += 1;
        self.parked.push(index);
    }

    /// Those whose time has come wait again.
    fn unpark(&mut self, now: u64) {
        let mut parked = std::mem::take(&mut self.parked);
        parked.retain(|&index| {
            let tiocb = &mut self.tiocbs[index as usize];
            let later = tiocb.due > now;
            if !later {
                tiocb.state = State::Waiting;
                self.append(index);
            }
            later
        });
        self.parked = parked;
    }

    /// A write that was to be durable has failed since it was last asked, whatever became of it then.
    pub fn next_failed_fua(&mut self) -> Option<(FileId, Errno)> {
        self.failed_fua.take()
    }

    /// A transfer that failed for the first time and is tried again, for the log.
    pub fn next_retried(&mut self) -> Option<(Transfer, Errno)> {
        self.retried.take()
    }

    /// Puts a list of tiocbs in front of those that wait, in their order, each to be submitted by itself.
    fn wait_alone(&mut self, head: u32) {
        if head == NONE {
            return;
        }
        let mut tail = head;
        loop {
            let tiocb = &mut self.tiocbs[tail as usize];
            (tiocb.state, tiocb.alone) = (State::Waiting, true);
            self.waiting_count += 1;
            if tiocb.next == NONE {
                break;
            }
            tail = tiocb.next;
        }
        self.tiocbs[tail as usize].next = self.waiting.0;
        self.waiting = (head, if self.waiting.1 == NONE { tail } else { self.waiting.1 });
    }

    /// `n` bytes of the I/O are done, fewer than asked. The kernel gives whole sectors unless the file ends.
    fn short(&mut self, mut io: Box<Io>, n: u64) {
        let end_of_file = io.op == IoOp::Read && (n == 0 || !n.is_multiple_of(drivers::SECTOR_SIZE));
        if n == 0 && !end_of_file {
            return self.fail(io, Errno::EIO);
        }
        let tag = io.tag;
        let mut left = n;
        let mut index = self.heads[tag as usize];
        loop {
            let tiocb = &self.tiocbs[index as usize];
            let wanted = tiocb.transfer.expect("it is pending").len - tiocb.done;
            if left < wanted {
                break;
            }
            left -= wanted;
            index = self.finish(index, None);
        }
        self.tiocbs[index as usize].done += left;
        self.heads[tag as usize] = index;
        if end_of_file {
            let head = self.release(io);
            let done = self.tiocbs[head as usize].done;
            let rest = self.finish(head, Some(Ok(done)));
            self.wait_alone(rest);
        } else {
            io.advance(n);
            self.report.resubmitted += 1;
            self.again(io);
        }
    }

    /// The I/O is over. Gives its tiocbs.
    fn release(&mut self, mut io: Box<Io>) -> u32 {
        io.clear();
        let head = std::mem::replace(&mut self.heads[io.tag as usize], NONE);
        self.idle.push(io);
        self.in_flight -= 1;
        head
    }

    /// The tiocb is finished, wholly if `result` is none. Gives the next in its list.
    fn finish(&mut self, index: u32, result: Option<Result<u64, Errno>>) -> u32 {
        let tiocb = &mut self.tiocbs[index as usize];
        let transfer = tiocb.transfer.take().expect("it is pending");
        let next = std::mem::replace(&mut tiocb.next, self.free);
        tiocb.state = State::Free;
        self.no_space -= usize::from(tiocb.no_space);
        self.free = index;
        self.finished.push_back(((transfer, result.unwrap_or(Ok(transfer.len))), tiocb.queued));
        next
    }

    /// tiocbs that have lacked space and are not finished: they are held, or just being tried again.
    pub fn lacks_space(&self) -> usize {
        self.no_space
    }

    /// A tiocb that has finished.
    pub fn next_finished(&mut self) -> Option<Finished> {
        let (finished, queued) = self.finished.pop_front()?;
        let (transfer, result) = &finished;
        if let Some(traffic) = self.traffic.get_mut(usize::from(transfer.file.0)) {
            let ns = self.time.saturating_sub(queued);
            traffic.record(kind(transfer.op), transfer.len, result.is_ok(), ns);
        }
        Some(finished)
    }

    /// What is queued from here on counts as queued at `time`, ns of [`now`].
    pub fn set_time(&mut self, time: u64) {
        self.time = time;
    }

    /// Of each file, in the order of their ids: transfers from when they were queued to their end.
    pub fn traffic(&self) -> &[Traffic] {
        &self.traffic
    }

    /// Counts these files from now on.
    pub fn set_traffic(&mut self, traffic: Vec<Traffic>) {
        self.traffic = traffic;
    }

    /// Finishes all that has not reached the engine with ECANCELED, and asks the engine to end what it has.
    pub fn cancel(&mut self) {
        while let Some(index) = self.parked.pop() {
            self.finish(index, Some(Err(Errno::ECANCELED)));
        }
        while self.waiting_count > 0 {
            let index = self.pop();
            self.finish(index, Some(Err(Errno::ECANCELED)));
        }
        let given = |queue: &Queue| queue.submission.thread.as_ref()?.handover().cancel();
        while let Some(io) = self.batch.pop_front().or_else(|| given(self)) {
            let mut index = self.release(io);
            while index != NONE {
                index = self.finish(index, Some(Err(Errno::ECANCELED)));
            }
        }
        for tag in (0..).zip(&self.heads).filter_map(|(tag, head)| (*head != NONE).then_some(tag)) {
            self.submission.engine.submit.cancel(tag);
        }
    }

    /// I/Os that are submitted or being submitted.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether nothing waits, is in flight, is to be tried again, or is finished and not taken.
    pub fn is_idle(&self) -> bool {
        self.waiting_count == 0 && self.in_flight == 0 && self.parked.is_empty() && self.finished.is_empty()
    }
}

/// The kind of a request that does as much, an index of [`Op::KINDS`].
fn kind(op: IoOp) -> usize {
    let like = match op {
        IoOp::Read => Op::Read,
        IoOp::Write { fua } => Op::Write { fua },
        IoOp::Flush => Op::Flush,
        IoOp::Discard => Op::Discard,
        IoOp::WriteZeroes { unmap } => Op::WriteZeroes { unmap },
        IoOp::Status => Op::Status,
    };
    like.kind()
}

/// Adds a transfer's memory, without its first `done` bytes, to `io`.
fn add(io: &mut Io, transfer: &Transfer, done: u64, slots: &Slots) {
    match transfer.op {
        IoOp::Flush => {}
        IoOp::Discard | IoOp::WriteZeroes { .. } => io.len += transfer.len,
        IoOp::Read | IoOp::Write { .. } | IoOp::Status => {
            let payload = &slots.get(transfer.owner).payload;
            debug_assert!(!payload.is_empty(), "data comes with memory");
            for (memory, offset, len) in payload.slice(transfer.at + done, transfer.len - done) {
                io.push(memory, offset, len);
            }
            // Of a status the memory is for the answer, and the range is what it is about.
            if transfer.op == IoOp::Status {
                io.len = transfer.len;
            }
        }
    }
}

/// Stands in while the reaper is taken out.
struct Nothing;

impl Reap for Nothing {
    fn ready(&self) -> bool {
        false
    }

    fn reap(&mut self, _: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        0
    }
}
