//! Faults around an engine, as configured: errors, delays, short I/Os, I/Os that are stuck, submissions that block.
//!
//! Each fault is a part of the product: the tests use them, and whoever wants to see what a guest or the queue does when a
//! disk misbehaves. An I/O that is hit by an error is not done; one that is delayed or stuck is done, and only its
//! completion is held back. Chances come from a seed, so that a run can be repeated as far as the order of I/Os is the same.

use std::any::{Any, TypeId};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use serde::{Deserialize, Serialize};

use super::{Completion, Engine, Reap, Submit, hand_out};
use crate::blocking::{Blocking, Caller, spawn};
use crate::config::{Distribution, Fault, FaultKind, FaultOp};
use crate::stats::now;
use crate::submit::STACK_SIZE;
use crate::sys::io::{Io, IoOp};

/// A fault, for those who look.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FaultReport {
    /// As configured.
    #[serde(flatten)]
    pub fault: Fault,
    /// I/Os that it has hit.
    pub hits: u64,
}

/// All faults of an engine, for those who look.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FaultsReport {
    /// Whether I/Os are hit at all.
    pub enabled: bool,
    /// I/Os that are done and do not complete until they are released.
    pub stuck: usize,
    /// I/Os that are done and complete later.
    pub delayed: usize,
    /// Each of them.
    pub faults: Vec<FaultReport>,
}

#[derive(Debug)]
struct Armed {
    fault: Fault,
    chance: fastrand::Rng,
    hits: u64,
}

impl Armed {
    fn concerns(&self, io: &Io) -> bool {
        let overlaps =
            || io.offset < self.fault.to.map_or(u64::MAX, |to| to.0) && io.offset + io.len > self.fault.from.0;
        self.fault.on.contains(&FaultOp::of(io.op)) && (io.op == IoOp::Flush || overlaps())
    }

    /// Whether it hits, drawn anew each time.
    fn hits(&mut self, io: &Io) -> bool {
        let hit = self.concerns(io) && self.chance.f64() < self.fault.rate;
        self.hits += u64::from(hit);
        hit
    }

    /// A delay, ns.
    fn delay(&mut self) -> u64 {
        let factor = match self.fault.distribution {
            Distribution::Fixed => 1.0,
            Distribution::Uniform => 2.0 * self.chance.f64(),
            Distribution::Exponential => -(1.0 - self.chance.f64()).ln(),
        };
        (f64::from(self.fault.us) * 1000.0 * factor) as u64
    }
}

/// Marks of I/Os: what is decided of one is kept while the engine has no room for it.
mod mark {
    /// Nothing is decided.
    pub(super) const OPEN: u8 = 0;
    /// It is not hit by an error.
    pub(super) const SPARED: u8 = 1;
    /// It is hit by the first fault; the others follow.
    pub(super) const FAILS: u8 = 2;
}

struct State {
    enabled: bool,
    faults: Vec<Armed>,
    /// Completions that are held back, by tag.
    held: Vec<Option<Completion>>,
    /// When each of the delayed is due, ns of [`now`], and its tag.
    due: BinaryHeap<Reverse<(u64, u32)>>,
    /// Tags of those that are stuck.
    stuck: Vec<u32>,
    /// To be reaped.
    done: VecDeque<Completion>,
    stop: bool,
}

/// What the halves, the clock's thread and those who steer share.
pub struct Faults {
    state: Mutex<State>,
    /// Something is due that was not, or the end.
    clock: Condvar,
    /// Something was reaped, or the end.
    reaped: Condvar,
    /// `done` is not empty, seen without the lock.
    ready: AtomicBool,
    /// I/Os that were accepted and not reaped.
    in_flight: AtomicUsize,
    event: Arc<dyn Submit>,
}

impl Faults {
    /// Lets all that is stuck complete.
    pub fn release(&self) -> usize {
        let mut state = self.state.lock().unwrap();
        let count = state.stuck.len();
        while let Some(tag) = state.stuck.pop() {
            let finished = state.held[tag as usize].take();
            state.done.extend(finished);
        }
        self.tell(&state);
        count
    }

    /// Whether I/Os are hit from now on.
    pub fn enable(&self, enabled: bool) {
        self.state.lock().unwrap().enabled = enabled;
        // A submission that blocks looks again.
        self.reaped.notify_all();
    }

    /// What there is to see.
    pub fn report(&self) -> FaultsReport {
        let state = self.state.lock().unwrap();
        let report = |armed: &Armed| FaultReport { fault: armed.fault.clone(), hits: armed.hits };
        FaultsReport {
            enabled: state.enabled,
            stuck: state.stuck.len(),
            delayed: state.due.len(),
            faults: state.faults.iter().map(report).collect(),
        }
    }

    fn tell(&self, state: &State) {
        if !state.done.is_empty() {
            self.ready.store(true, Ordering::Release);
            self.event.wake();
        }
    }

    /// Makes what is due ready to be reaped, at its time.
    fn run_clock(&self) {
        let mut state = self.state.lock().unwrap();
        while !state.stop {
            let now = now();
            while let Some(&Reverse((due, tag))) = state.due.peek()
                && due <= now
            {
                state.due.pop();
                let finished = state.held[tag as usize].take();
                state.done.extend(finished);
            }
            self.tell(&state);
            state = match state.due.peek() {
                Some(&Reverse((due, _))) => {
                    self.clock.wait_timeout(state, Duration::from_nanos(due - now)).unwrap().0
                }
                None => self.clock.wait(state).unwrap(),
            };
        }
    }

    /// Holds the caller up, if the first I/O is hit by that. EAGAIN: it is one that the kernel would not wait for either.
    fn block(&self, io: &Io) -> Result<(), Errno> {
        let mut state = self.state.lock().unwrap();
        let State { faults, enabled, .. } = &mut *state;
        if io.nowait && *enabled && faults.iter().any(|armed| armed.fault.kind == FaultKind::Block) {
            return Err(Errno::EAGAIN);
        }
        let mut blocks = faults.iter_mut().filter(|armed| armed.fault.kind == FaultKind::Block);
        let Some((us, most)) = enabled
            .then(|| blocks.find_map(|armed| armed.hits(io).then_some((armed.fault.us, armed.fault.in_flight))))
            .flatten()
        else {
            return Ok(());
        };
        let full = |state: &mut State| {
            most > 0 && state.enabled && !state.stop && self.in_flight.load(Ordering::Acquire) >= most as usize
        };
        drop(self.reaped.wait_while(state, full).unwrap());
        std::thread::sleep(Duration::from_micros(us.into()));
        Ok(())
    }

    /// Decides what happens to an I/O at its submission. Gives its error, if that is one.
    fn decide(state: &mut State, io: &mut Io) -> Option<Errno> {
        let State { faults, enabled, .. } = state;
        if io.mark == mark::OPEN && *enabled {
            io.mark = mark::SPARED;
            for (i, armed) in (0..).zip(faults.iter_mut()) {
                let kind = armed.fault.kind;
                match kind {
                    FaultKind::Error if armed.hits(io) => {
                        io.mark = mark::FAILS + i;
                        break;
                    }
                    // Whole sectors: the kernel gives others only at the end of a file.
                    FaultKind::Short if io.len > drivers::SECTOR_SIZE && armed.hits(io) => {
                        let sectors = (io.len - 1) / drivers::SECTOR_SIZE;
                        let some = 1 + (armed.chance.f64() * sectors as f64) as u64;
                        io.cut(some * drivers::SECTOR_SIZE);
                        break;
                    }
                    _ => {}
                }
            }
        }
        let hit = io.mark.checked_sub(mark::FAILS)?;
        Some(faults[usize::from(hit)].fault.errno.0)
    }

    /// Holds a completion back, if it is hit by that.
    fn hold(&self, state: &mut State, (io, result): Completion) {
        let tag = io.tag;
        let State { faults, enabled, .. } = state;
        for armed in faults.iter_mut().filter(|_| *enabled) {
            let kind = armed.fault.kind;
            match kind {
                FaultKind::Delay if armed.hits(&io) => {
                    let due = now() + armed.delay();
                    state.held[tag as usize] = Some((io, result));
                    state.due.push(Reverse((due, tag)));
                    return self.clock.notify_one();
                }
                FaultKind::Stuck if armed.hits(&io) => {
                    state.held[tag as usize] = Some((io, result));
                    return state.stuck.push(tag);
                }
                _ => {}
            }
        }
        state.done.push_back((io, result));
    }
}

struct FaultSubmit {
    inner: Arc<dyn Submit>,
    faults: Arc<Faults>,
    clock: Option<std::thread::JoinHandle<()>>,
}

impl Submit for FaultSubmit {
    fn submit(&self, batch: &mut VecDeque<Box<Io>>, limit: usize, by: Caller) -> Result<usize, Errno> {
        let Some(first) = batch.front() else { return Ok(0) };
        self.faults.block(first)?;
        let mut state = self.faults.state.lock().unwrap();
        let mut spared = 0;
        for io in batch.iter_mut().take(limit) {
            match Faults::decide(&mut state, io) {
                None => spared += 1,
                Some(errno) if spared == 0 => {
                    let io = batch.pop_front().expect("it is the first");
                    self.faults.in_flight.fetch_add(1, Ordering::AcqRel);
                    state.done.push_back((io, Err(errno)));
                    self.faults.tell(&state);
                    return Ok(1);
                }
                Some(_) => break,
            }
        }
        drop(state);
        // Counted first: they can be reaped before the call comes back.
        self.faults.in_flight.fetch_add(spared, Ordering::AcqRel);
        let result = self.inner.submit(batch, spared, by);
        let accepted = *result.as_ref().unwrap_or(&0);
        self.faults.in_flight.fetch_sub(spared - accepted, Ordering::AcqRel);
        if result.is_err()
            && let Some(refused) = batch.front_mut()
        {
            // It goes back to the queue, or is submitted again and decided anew.
            refused.uncut();
            refused.mark = mark::OPEN;
        }
        result
    }

    fn cancel(&self, tag: u32) -> bool {
        self.inner.cancel(tag)
    }

    fn tidy(&self) {
        self.inner.tidy();
    }

    fn offers(&self, kind: TypeId) -> Option<&dyn Any> {
        if kind == TypeId::of::<Faults>() { Some(&*self.faults) } else { self.inner.offers(kind) }
    }

    fn event(&self) -> &Arc<EventFd> {
        self.inner.event()
    }
}

impl Drop for FaultSubmit {
    fn drop(&mut self) {
        self.faults.state.lock().unwrap().stop = true;
        self.faults.clock.notify_all();
        self.faults.reaped.notify_all();
        if let Some(clock) = self.clock.take() {
            let _ = clock.join();
        }
    }
}

struct FaultReap {
    inner: Box<dyn Reap>,
    faults: Arc<Faults>,
    /// Swapped with what is done.
    taken: VecDeque<Completion>,
}

impl Reap for FaultReap {
    fn ready(&self) -> bool {
        self.inner.ready() || self.faults.ready.load(Ordering::Acquire)
    }

    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        let faults = &self.faults;
        self.inner.reap(&mut |mut io, result| {
            io.uncut();
            io.mark = mark::OPEN;
            faults.hold(&mut faults.state.lock().unwrap(), (io, result));
        });
        let mut state = faults.state.lock().unwrap();
        faults.ready.store(false, Ordering::Release);
        std::mem::swap(&mut self.taken, &mut state.done);
        drop(state);
        let count = self.taken.len();
        faults.in_flight.fetch_sub(count, Ordering::AcqRel);
        if count > 0 {
            // The lock, so that a submission that is about to wait does not miss it.
            drop(faults.state.lock().unwrap());
            faults.reaped.notify_all();
        }
        hand_out(&mut self.taken, done)
    }
}

/// `engine` with faults around it.
pub fn wrap(blocking: &Blocking, engine: Engine, faults: &[Fault]) -> std::io::Result<Engine> {
    let depth = engine.depth;
    let armed =
        |fault: &Fault| Armed { fault: fault.clone(), chance: fastrand::Rng::with_seed(fault.seed.into()), hits: 0 };
    let state = State {
        enabled: true,
        faults: faults.iter().map(armed).collect(),
        held: std::iter::repeat_with(|| None).take(depth).collect(),
        due: BinaryHeap::with_capacity(depth),
        stuck: Vec::with_capacity(depth),
        done: VecDeque::with_capacity(depth),
        stop: false,
    };
    let shared = Arc::new(Faults {
        state: Mutex::new(state),
        clock: Condvar::new(),
        reaped: Condvar::new(),
        ready: AtomicBool::new(false),
        in_flight: AtomicUsize::new(0),
        event: Arc::clone(&engine.submit),
    });
    let mine = Arc::clone(&shared);
    let clock = spawn(blocking, "fault clock", STACK_SIZE, move |_| mine.run_clock())?;
    let submit = FaultSubmit { inner: engine.submit, faults: Arc::clone(&shared), clock: Some(clock) };
    let taken = VecDeque::with_capacity(depth);
    let reap = FaultReap { inner: engine.reap, faults: shared, taken };
    Ok(Engine { submit: Arc::new(submit), reap: Box::new(reap), ..engine })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::pool::{self, Pool};
    use crate::engine::{Setup, memory};

    #[test]
    #[cfg_attr(miri, ignore = "threads and their eventfd")]
    fn what_is_special_to_the_engine_within_is_reached_through_faults() {
        let blocking = Blocking::before_main_loop();
        let special = |engine: &Engine| {
            let pool = engine.submit.capability::<Pool>().map(|pool| pool.report().max);
            (pool, engine.submit.capability::<Faults>().map(|faults| faults.report().enabled))
        };
        let pool = || pool::open(&blocking, &Setup::new([].into(), 4).unwrap()).unwrap();
        assert_eq!(special(&pool()), (Some(64), None));
        assert_eq!(special(&wrap(&blocking, pool(), &[]).unwrap()), (Some(64), Some(true)));
        assert_eq!(special(&wrap(&blocking, memory::null(4).unwrap(), &[]).unwrap()), (None, Some(true)));
        assert_eq!(special(&memory::idle(&pool())), (None, None));
    }
}
