//! One disk: its turn of the main loop, from the rings to the engine and back.

mod coalesce;
mod guest;
mod inspect;
mod metrics;
mod pause;
mod recording;
mod resize;
mod switch;
mod throttle;
mod watchdog;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use drivers::Origin;
use mio::Registry;
use mio::event::Event;
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use slog::{Logger, error, info, o, warn};

use self::coalesce::{Checking, Coalescing};
pub use self::coalesce::{CoalesceError, CoalesceReport, Stage};
pub use self::inspect::{DebugQueue, RequestReport};
use self::pause::{After, Resuming};
pub use self::pause::{PauseError, Reopen, Resume, parse_name};
use self::recording::Recording;
pub use self::resize::ResizeError;
use self::resize::Resizing;
use self::switch::Switching;
pub use self::switch::{EngineReport, SwitchError, Wanted};
pub use self::throttle::{LimitReport, ThrottleError, ThrottleReport};
pub use self::watchdog::Watchdog;
use crate::engine::{Engine, Opener};
use crate::frontend::{DiskInfo, Frontend, Intake, gathered, xen};
use crate::job::{self, Apart, Job};
use crate::log::Limiter;
use crate::memory::{Budget, Part};
use crate::queue::{Queue, Transfer};
use crate::request::{Op, RequestId, Slots};
use crate::stack::{Closed, Hits, HostLayer, Stack, Started};
use crate::stats::{Stats, now};
use crate::store::{Identity, Stores};
use crate::sys;

/// A disk's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    /// Pulls nothing any more, and finishes what it has.
    Draining,
    /// All is finished; what was written is being made durable.
    Flushing,
    /// Nothing is under way, and the image is closed.
    Paused,
    Closed,
}

/// What a turn did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Turn {
    /// Nothing: there was nothing to do.
    Nothing,
    /// Something; what comes next is told by an event.
    Worked,
    /// Something, and so few I/Os are in flight that somebody is likely to wait for each.
    Submitted,
    /// Somebody got an answer whose next request, which may come soon, memory will show.
    Answered,
}

/// I/Os in flight up to which a completion is looked for: with more, there is enough to do, and waiting batches them.
const LONELY: usize = 2;

/// How far a write barrier is; it is the last request that was pulled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Barrier {
    /// What came before it is not finished.
    Draining,
    /// What came before it is being made durable.
    Flushing,
    /// Its own data is written.
    Writing,
}

/// A disk.
pub struct Disk {
    /// What clients are told.
    info: DiskInfo,
    frontends: Vec<Box<dyn Frontend>>,
    /// Slots that each of them has.
    used: Vec<usize>,
    /// The frontend that is asked first, in this turn; modulo their number.
    first: usize,
    slots: Slots,
    stack: Stack,
    queue: Queue,
    stats: Stats,
    /// Pulled, and not wholly planned.
    started: VecDeque<RequestId>,
    /// Started, and waiting for the image's metadata.
    waiting: VecDeque<RequestId>,
    barrier: Option<RequestId>,
    barrier_state: Barrier,
    /// When a frontend whose requests memory shows last brought one or got an answer.
    last_in_memory: Option<u64>,
    state: State,
    /// What follows the last flush.
    after: After,
    /// When a pause is over although nobody ends it, ns of [`now`].
    lease_until: Option<u64>,
    reopen: Option<Reopen>,
    /// The image that it goes on with is being opened.
    resuming: Option<Resuming>,
    /// What it serves, or that it is paused, is being put on record.
    recording: Option<Recording>,
    /// What leaves the image whole, when everything else is done.
    closing: Option<Job<Closed>>,
    /// How the last attempt to go on went.
    resumed: Result<(), PauseError>,
    /// The pause is not somebody's, but for what the disk does itself.
    pauses_for_itself: bool,
    /// Whether a coalesce can begin is being looked at; and how that ended last.
    checking: Option<Checking>,
    coalesce_begun: Result<(), CoalesceError>,
    coalescing: Option<Coalescing>,
    /// An error of the last flush.
    flush_error: Option<Errno>,
    /// An error of a flush for a pause, which the next flush of a client's gets: what it is about may be lost.
    owed_error: Option<Errno>,
    failed_flush_is_logged: bool,
    /// Where the image's bytes are, and with that its locks; the first is also the one whose size is asked for. Empty: it is closed.
    stores: Apart<Stores>,
    log: Logger,
    limiter: Limiter,
    /// Until when answers wait for more of them, ns of [`now`].
    held_until: Option<u64>,
    watchdog: Watchdog,
    /// Opens other engines. None: the image is its engine.
    opener: Option<Apart<Opener>>,
    switching: Option<Switching>,
    resizing: Option<Resizing>,
    /// Writes wait for space.
    without_space: bool,
}

/// What a disk is made of.
pub struct Parts {
    /// What clients are told.
    pub info: DiskInfo,
    /// Where requests come from.
    pub frontends: Vec<Box<dyn Frontend>>,
    /// Room for requests.
    pub slots: Slots,
    /// The image.
    pub stack: Stack,
    /// What has the engine.
    pub queue: Queue,
    /// Where the image's bytes are, and with that its locks, the leaf's first.
    pub stores: Apart<Stores>,
    /// What opens other engines for the image, if it can have others.
    pub opener: Option<Apart<Opener>>,
    /// What opens the image again after a pause; none: it stays open.
    pub reopen: Option<Reopen>,
    /// What looks for requests that are stuck.
    pub watchdog: Watchdog,
    /// The log.
    pub log: Logger,
}

impl Disk {
    /// A disk of these parts.
    pub fn new(parts: Parts) -> Disk {
        let Parts { info, frontends, slots, stack, queue, stores, opener, reopen, watchdog, log } = parts;
        let capacity = slots.capacity();
        let mut disk = Disk {
            info,
            used: vec![0; frontends.len()],
            frontends,
            first: 0,
            slots,
            stack,
            queue,
            stats: Stats::default(),
            started: VecDeque::with_capacity(capacity),
            waiting: VecDeque::with_capacity(capacity),
            barrier: None,
            barrier_state: Barrier::Draining,
            last_in_memory: None,
            state: State::Running,
            after: After::Close,
            lease_until: None,
            reopen,
            closing: None,
            resuming: None,
            recording: None,
            resumed: Ok(()),
            pauses_for_itself: false,
            checking: None,
            coalesce_begun: Ok(()),
            coalescing: None,
            flush_error: None,
            owed_error: None,
            failed_flush_is_logged: false,
            stores,
            log,
            limiter: Limiter::default(),
            held_until: None,
            watchdog,
            opener,
            switching: None,
            resizing: None,
            without_space: false,
        };
        disk.count_files(None);
        disk
    }

    /// Registers frontend `i` with tokens from `base(i)` on.
    pub fn register(&mut self, registry: &Registry, base: impl Fn(usize) -> usize) -> io::Result<()> {
        for (i, frontend) in self.frontends.iter_mut().enumerate() {
            frontend.register(registry.try_clone()?, base(i))?;
        }
        Ok(())
    }

    /// An event for a frontend.
    pub fn event(&mut self, frontend: usize, index: usize, event: &Event) {
        if let Some(frontend) = self.frontends.get_mut(frontend) {
            frontend.event(index, event);
        }
    }

    /// What a job of the disk's wakes the main loop with.
    fn wake(&self) -> &Arc<EventFd> {
        self.queue.engine().submit.event()
    }

    /// Its engine, whose event says that something completed. Engines may change, and the event stays.
    pub fn engine(&self) -> &Engine {
        self.queue.engine()
    }

    /// Everything that can be done without waiting.
    pub fn turn(&mut self) -> Turn {
        let now = now();
        self.queue.set_time(now);
        self.stack.set_time(now);
        self.stack.set_draining(self.state != State::Running);
        self.queue.plug();
        let mut worked = self.pull(now);
        worked |= self.start();
        self.queue.unplug(&self.slots);
        worked |= self.queue.reap() > 0;
        worked |= self.finish();
        worked |= self.advance_switch();
        worked |= self.end_lease(now);
        worked |= self.advance_closing();
        worked |= self.advance_recording();
        worked |= self.advance_resume();
        worked |= self.advance_resize();
        worked |= self.advance_coalesce();
        self.watch(now);
        self.watch_space();
        if self.holds() {
            return if worked { Turn::Worked } else { Turn::Nothing };
        }
        let (answered, in_memory) = self.answer();
        for frontend in &mut self.frontends {
            frontend.publish();
        }
        worked |= self.drop_orphans();
        match answered | worked | self.advance() {
            false => Turn::Nothing,
            true if in_memory => Turn::Answered,
            true if (1..=LONELY).contains(&self.queue.in_flight()) => Turn::Submitted,
            true => Turn::Worked,
        }
    }

    fn pull(&mut self, now: u64) -> bool {
        if self.state != State::Running {
            return false;
        }
        let before = self.started.len();
        // Another one is first each turn: where slots are short, none must get them all.
        self.first = self.first.wrapping_add(1);
        let count = self.frontends.len();
        for i in (0..count).map(|i| (self.first % count + i) % count) {
            let (had, kept) = (self.started.len(), self.kept_from(i));
            self.frontends[i].pull(&mut Intake {
                slots: &mut self.slots,
                started: &mut self.started,
                barrier: &mut self.barrier,
                disk: &self.info,
                origin: Origin::Frontend(i as u16),
                kept,
                now,
            });
            self.used[i] += self.started.len() - had;
            if self.started.len() > had && self.frontends[i].in_memory() {
                self.last_in_memory = Some(now);
            }
        }
        self.started.len() > before
    }

    fn start(&mut self) -> bool {
        let mut worked = self.stack.move_metadata(&mut self.slots, &mut self.queue);
        if self.stack.progress() {
            // They are older than those that were pulled meanwhile.
            while let Some(id) = self.waiting.pop_back() {
                self.started.push_front(id);
            }
        }
        while let Some(&id) = self.started.front() {
            self.pay_error(id);
            if self.slots.get(id).error.is_none() {
                if self.barrier == Some(id) && !self.barrier_may_write(id) {
                    break;
                }
                match self.stack.start(id, &mut self.slots, &mut self.queue) {
                    Started::Planned => self.log_full(id),
                    Started::NoRoom => break,
                    Started::Waits => {
                        self.waiting.extend(self.started.pop_front());
                        continue;
                    }
                }
            }
            self.started.pop_front();
            let request = self.slots.get_mut(id);
            request.planning = false;
            if request.pieces == 0 {
                self.stack.all_done(id, &mut self.slots);
            }
            worked = true;
        }
        worked | self.stack.move_metadata(&mut self.slots, &mut self.queue)
    }

    /// Fails a client's flush that would say of what was lost that it is durable.
    fn pay_error(&mut self, id: RequestId) {
        let request = self.slots.get_mut(id);
        if matches!(request.op, Op::Flush | Op::Barrier) && request.origin != Origin::Disk {
            request.error = request.error.or(self.stack.failed_flush()).or_else(|| self.owed_error.take());
        }
    }

    /// Whether all that came before the barrier is on stable storage; sees to it if not.
    fn barrier_may_write(&mut self, id: RequestId) -> bool {
        match self.barrier_state {
            Barrier::Draining if self.slots.used() == 1 => {
                if self.stack.flush(id, &mut self.slots, &mut self.queue) == Started::Planned {
                    self.barrier_state = Barrier::Flushing;
                }
                false
            }
            Barrier::Draining => false,
            Barrier::Flushing => {
                let flushed = self.slots.get(id).pieces == 0;
                if flushed {
                    self.barrier_state = Barrier::Writing;
                }
                flushed
            }
            Barrier::Writing => true,
        }
    }

    /// Ends what a layer holds back for clients that are gone: they are not charged for it, and who comes next needs the slots.
    #[inline(always)] // nearly always nothing waits
    fn drop_orphans(&mut self) -> bool {
        !self.waiting.is_empty() && self.frontends.iter().any(|frontend| frontend.has_orphans()) && self.end_orphans()
    }

    #[inline(never)]
    fn end_orphans(&mut self) -> bool {
        let Disk { waiting, slots, stack, frontends, .. } = self;
        let before = waiting.len();
        waiting.retain(|&id| {
            let request = slots.get_mut(id);
            let orphan = match request.origin {
                Origin::Frontend(index) => frontends[usize::from(index)].is_orphan(request.tag),
                Origin::Disk | Origin::Layer(_) => false,
            };
            if !orphan || !request.is_held() {
                return true;
            }
            stack.call_off(id, slots);
            false
        });
        waiting.len() < before
    }

    fn finish(&mut self) -> bool {
        let mut worked = false;
        while let Some((transfer, result)) = self.queue.next_finished() {
            worked = true;
            if let Some(errno) = self.stack.finish(&transfer, result, &mut self.slots) {
                self.log_failure(&transfer, errno, false);
            }
        }
        if let Some((file, errno)) = self.queue.next_failed_fua() {
            self.stack.note_failed_fua(file, errno);
        }
        self.log_failed_flush();
        if let Some((transfer, errno)) = self.queue.next_retried() {
            self.log_failure(&transfer, errno, true);
        }
        worked
    }

    /// Whether answers wait for more of them: few of many requests in flight are done, and clients whose answers cost much
    /// want them together.
    fn holds(&mut self) -> bool {
        let many = gathered(self.queue.in_flight(), 4);
        let longest = self.frontends.iter().filter_map(|frontend| frontend.gather_ns()).min().unwrap_or(0);
        let done = self.stack.done();
        if longest == 0 || done == 0 || done >= many || self.state != State::Running {
            self.held_until = None;
            return false;
        }
        let now = now();
        let until = *self.held_until.get_or_insert(now + longest);
        if now >= until {
            self.held_until = None;
        }
        self.held_until.is_some()
    }

    fn log_failure(&mut self, transfer: &Transfer, errno: Errno, tried_again: bool) {
        let Some(suppressed) = self.limiter.allow(now()) else { return };
        let log = self.log.new(o!("op" => format!("{:?}", transfer.op), "offset" => transfer.offset,
            "file" => self.stack.place(transfer.file).1, "len" => transfer.len, "errno" => errno.to_string(),
            "suppressed_before" => suppressed));
        if tried_again {
            warn!(log, "I/O failed and is tried again");
        } else {
            error!(log, "I/O error");
        }
    }

    /// Logs, once, that no flush succeeds any more.
    fn log_failed_flush(&mut self) {
        let Some(errno) = self.stack.failed_flush().filter(|_| !self.failed_flush_is_logged) else { return };
        self.failed_flush_is_logged = true;
        error!(self.log, "a flush failed, and what was written before may be lost: no flush succeeds any more until the image is opened anew \
            (tap-ctl pause and unpause)"; "image" => &self.info.name, "errno" => errno.to_string());
    }

    /// Logs that the image has no room for a request that was planned just now. No I/O failed by that, or another's.
    fn log_full(&mut self, id: RequestId) {
        let request = self.slots.get(id);
        if request.error != Some(Errno::ENOSPC) {
            return;
        }
        let Some(suppressed) = self.limiter.allow(now()) else { return };
        error!(self.log, "the image has no room for a write"; "image" => &self.info.name, "op" => request.op.name(),
            "offset" => request.offset, "len" => request.len, "errno" => Errno::ENOSPC.to_string(),
            "suppressed_before" => suppressed);
    }

    /// Whether there was something to answer, and for a frontend whose requests memory shows.
    fn answer(&mut self) -> (bool, bool) {
        let mut in_memory = false;
        if self.stack.done() == 0 {
            return (false, false);
        }
        let now = now();
        while let Some(id) = self.stack.next_done() {
            if self.barrier == Some(id) {
                (self.barrier, self.barrier_state) = (None, Barrier::Draining);
            }
            let request = self.slots.get(id);
            if request.stuck {
                info!(self.log, "stuck request is answered"; "op" => request.op.name(), "offset" => request.offset,
                    "len" => request.len, "age_s" => (now - request.born) / 1_000_000_000, "result" => ?request.result());
            }
            self.stats.record(request.op, request.len, request.error.is_none(), now - request.born);
            match request.origin {
                Origin::Frontend(index) => {
                    let frontend = &mut self.frontends[usize::from(index)];
                    in_memory |= frontend.in_memory();
                    frontend.answer(request);
                    self.used[usize::from(index)] -= 1;
                    self.slots.release(id);
                }
                Origin::Disk => {
                    let error = request.error;
                    self.slots.release(id);
                    self.flushed(error);
                }
                Origin::Layer(_) => unreachable!("the stack keeps those to itself"),
            }
        }
        if in_memory {
            self.last_in_memory = Some(now);
        }
        (true, in_memory)
    }

    /// What was written is durable, or an error says that it may not be.
    fn flushed(&mut self, error: Option<Errno>) {
        if self.state != State::Flushing {
            // It was for a pause that was called off.
            self.owed_error = self.owed_error.or(error);
            return;
        }
        self.flush_error = error;
        self.close_image();
    }

    /// Goes on if the image is closed, and says whether there was something to do.
    fn advance_closing(&mut self) -> bool {
        let Some(outcome) = self.closing.as_ref().and_then(Job::outcome) else { return false };
        self.closing = None;
        self.image_closed(&outcome);
        true
    }

    fn image_closed(&mut self, closed: &Closed) {
        for (path, error) in &closed.images {
            error!(self.log, "the image's last footer could not be written: vhd-util repair makes it anew";
                "image" => %path.display(), "error" => %error);
            self.flush_error.get_or_insert(sys::errno_of(error));
        }
        // What a filter keeps is owed to no flush.
        for (path, error) in &closed.filters {
            error!(self.log, "a filter's file may not be on its disk: a log of changed blocks is not to be trusted if the host stops now";
                "file" => %path.display(), "error" => %error);
        }
        match self.after {
            After::Close => self.state = State::Closed,
            After::Pause => self.paused(),
        }
    }

    /// Goes on with a drain, or begins one.
    fn advance(&mut self) -> bool {
        match self.state {
            State::Running | State::Paused if self.frontends.iter().any(|frontend| frontend.is_gone()) => {
                self.drain();
                return true;
            }
            // An image that is closed has nothing more to write, and nobody has its files.
            State::Draining
                if self.slots.used() + self.slots.own_used() == 0 && self.file_jobs().next().is_none() =>
            {
                self.stack.begin_closing();
                if self.stack.move_metadata(&mut self.slots, &mut self.queue) {
                    return true;
                }
            }
            _ => return false,
        }
        self.state = State::Flushing;
        if self.after == After::Close {
            self.frontends.iter_mut().for_each(|frontend| frontend.close());
        }
        if let Some(request) = self.slots.vacant() {
            (request.op, request.offset, request.len) = (Op::Flush, 0, 0);
            (request.origin, request.born, request.planning) = (Origin::Disk, now(), true);
        }
        self.started.extend(self.slots.take());
        true
    }

    /// Stops pulling, finishes what was pulled, makes it durable, closes.
    pub fn drain(&mut self) {
        match (self.state, self.after) {
            (State::Running, _) => {
                info!(self.log, "draining"; "requests" => self.slots.used());
                self.state = State::Draining;
            }
            (State::Draining, After::Pause) => {}
            (State::Flushing, After::Pause) => self.frontends.iter_mut().for_each(|frontend| frontend.close()),
            (State::Paused, _) => {
                (self.state, self.lease_until) = (State::Closed, None);
                self.end_resuming();
                self.frontends.iter_mut().for_each(|frontend| frontend.close());
            }
            _ => return,
        }
        self.after = After::Close;
        self.cancel_coalesce();
    }

    /// Whether it is being closed.
    pub fn is_draining(&self) -> bool {
        self.after == After::Close && self.state != State::Running
    }

    /// Finishes what has not reached the engine with ECANCELED, but for the last flush: without it, all would have been in vain. An
    /// image that is being opened is not waited for.
    pub fn cancel(&mut self) {
        self.resuming.take_if(|resuming| !resuming.is_closing());
        self.cancel_recording();
        if self.state == State::Flushing {
            return;
        }
        self.queue.cancel();
        self.stack.cancel(&mut self.slots);
        while let Some(id) = self.started.pop_front().or_else(|| self.waiting.pop_front()) {
            self.stack.call_off(id, &mut self.slots);
        }
    }

    /// Whether it is drained, and with which error of the last flush.
    pub fn closed(&self) -> Option<Result<(), Errno>> {
        let opens = self.resuming.is_some() || self.recording.is_some();
        let unused = self.state == State::Closed && !opens && !self.changes_files();
        let closed = unused && self.frontends.iter().all(|frontend| frontend.is_closed());
        closed.then(|| self.flush_error.map_or(Ok(()), Err))
    }

    /// The jobs that have the image's files while it is served, as [`Job::under_way`] has it.
    fn file_jobs(&self) -> impl Iterator<Item = (&'static str, u64)> {
        [self.changing_engine(), self.asking_for_size(), self.checking_chain()].into_iter().flatten()
    }

    /// Whether a turn would find something, as far as memory shows.
    pub fn ready(&self) -> bool {
        let ready = |index: usize| self.may_pull(index) && self.frontends[index].ready();
        self.queue.ready() || (0..self.frontends.len()).any(ready)
    }

    /// When a frontend whose requests memory shows last brought one or got an answer, ns of [`now`].
    pub fn last_in_memory(&self) -> Option<u64> {
        self.last_in_memory
    }

    /// Before the loop sleeps: asks clients to wake it. True: a turn is due.
    pub fn arm(&mut self) -> bool {
        self.queue.engine().submit.tidy();
        // Where nothing can be pulled, a completion is what wakes the loop, and then it looks at the rings anyway.
        let mut requests = false;
        for index in 0..self.frontends.len() {
            requests |= self.may_pull(index) && self.frontends[index].arm();
        }
        requests || self.queue.ready()
    }

    fn may_pull(&self, frontend: usize) -> bool {
        self.state == State::Running && self.barrier.is_none() && self.slots.room() > self.kept_from(frontend)
    }

    /// When a turn is due although nothing happens, ns of [`now`].
    pub fn deadline(&self) -> Option<u64> {
        let frontends = self.frontends.iter().filter_map(|frontend| frontend.deadline());
        // Where nothing is pulled, what is to be pulled would be due again and again.
        let pulls = self.frontends.iter().filter(|_| self.state == State::Running);
        frontends
            .chain(pulls.filter_map(|frontend| frontend.pull_deadline()))
            .chain(self.queue.deadline())
            .chain(self.stack.deadline())
            .chain(self.held_until)
            .chain(self.lease_until.filter(|_| self.resuming.is_none() && self.recording.is_none()))
            .chain(self.switching.as_ref().and_then(Switching::deadline))
            .chain(self.watchdog.deadline(self.is_watched()))
            .min()
    }

    /// What clients are told.
    pub fn info(&self) -> &DiskInfo {
        &self.info
    }

    /// What tells the store that is written from all others, as far as the disk is not paused.
    pub fn identity(&self) -> Option<Identity> {
        self.stores.first().map(|store| store.identity())
    }

    /// Whether its image is read and written through the page cache.
    pub fn is_buffered(&self) -> bool {
        self.opener.as_ref().is_some_and(|opener| opener.is_buffered())
    }

    /// What it takes.
    pub fn budget(&self) -> Budget {
        Budget::new(self.memory())
    }

    fn memory(&self) -> Vec<Part> {
        let mut parts = vec![
            Part::fixed("requests", self.slots.bytes()),
            Part::fixed("statistics", self.stats.bytes()),
            Part::fixed("image", self.stack.bytes()),
            Part::threads("log", 1),
            Part::fixed("job maker", job::MAKER_STACK_SIZE),
        ];
        parts.extend(self.queue.memory());
        parts.extend(self.frontends.iter().flat_map(|frontend| frontend.memory()));
        parts
    }

    /// Counters by operation.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The images, the one that is written first, and what each has moved since they were opened.
    pub fn hits(&self) -> impl Iterator<Item = (&HostLayer, Hits)> {
        self.stack.hits()
    }

    /// What STATS shows of a Xen guest.
    pub fn xenbus(&self) -> Option<serde_json::Value> {
        self.frontends.iter().find_map(|frontend| xen::xenbus_stats(&**frontend))
    }

    /// Requests that are not answered.
    pub fn outstanding(&self) -> usize {
        self.slots.used()
    }
}
