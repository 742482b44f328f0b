//! How the pool's threads live: who waits, who is woken, who is made and who ends. Without a system call, so that every
//! order of events can be tried (`tests/loom.rs`).
//!
//! A thread is *coming* from when it is woken until it has looked for work under the lock. What holds whenever the lock is
//! free, but for the moments in which [`Life::give`] wakes one thread after the other: where there are more jobs than threads
//! that are coming, no thread is idle; and if one more may be made, one is being made, or the maker has been told. Nothing
//! counts on a thread that is being made: that may take as long as it likes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::sync::{AtomicBool, Condvar, Mutex, MutexGuard, Ordering};

#[cfg(not(loom))]
mod sync {
    pub(super) use std::sync::atomic::{AtomicBool, Ordering};
    pub(super) use std::sync::{Condvar, Mutex, MutexGuard};
}
#[cfg(loom)]
mod sync {
    pub(super) use loom::sync::atomic::{AtomicBool, Ordering};
    pub(super) use loom::sync::{Condvar, Mutex, MutexGuard};
}

/// What a pool is and has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolReport {
    /// Threads that there are at least.
    pub min: usize,
    /// Threads that there are at most.
    pub max: usize,
    /// Threads, with one that is being made.
    pub threads: usize,
    /// Threads that wait for work, and have not been woken for some.
    pub idle: usize,
    /// I/Os that no thread has begun.
    pub queued: usize,
    /// I/Os that a thread carries out.
    pub running: usize,
    /// Threads that were made so far.
    pub created: u64,
    /// Times that the system had no more threads for us.
    pub failed: u64,
}

/// Numbers of threads that can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BoundsError {
    /// Nobody would do the work.
    #[error("at least one thread is needed")]
    NoThread,
    /// They contradict each other.
    #[error("a minimum of {min} threads is above the maximum of {max}")]
    Crossed {
        /// As asked for.
        min: usize,
        /// As asked for.
        max: usize,
    },
}

/// A thread's bed: newest sleepers are woken first, so that the others can end.
#[derive(Clone, Debug)]
pub struct Sleeper {
    id: u64,
    wake: Arc<Condvar>,
}

impl Sleeper {
    /// For the thread with that number, which no other living thread of the pool has.
    pub fn new(id: u64) -> Sleeper {
        Sleeper { id, wake: Arc::new(Condvar::new()) }
    }
}

/// Where a thread comes from when it looks for work.
#[derive(Debug)]
pub enum Come<D> {
    /// The maker made it.
    Born,
    /// From the main loop's event, or it is one of the first.
    Looking,
    /// From a job, with what came of it.
    Done(D),
}

/// What a thread does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<J> {
    /// A job.
    Run(J),
    /// Write the main loop's event, and come back.
    Tell,
    /// Its own end.
    End,
}

#[derive(Debug)]
struct State<J, D> {
    todo: VecDeque<J>,
    finished: VecDeque<D>,
    /// Threads that wait and were not woken, newest last.
    idle: Vec<Sleeper>,
    min: usize,
    max: usize,
    /// All of them, with one that is being made.
    threads: usize,
    coming: usize,
    running: usize,
    /// One is being made, and has not looked for work yet.
    being_born: bool,
    stop: bool,
    created: u64,
    failed: u64,
    #[cfg(loom)]
    expiries: u32,
}

impl<J, D> State<J, D> {
    /// Whether a thread is to be made now.
    fn wanted(&self) -> bool {
        let waits = self.todo.len() > self.coming && self.idle.is_empty();
        let lacks = self.threads < self.min || (waits && self.threads < self.max);
        lacks && !self.being_born && !self.stop
    }

    /// What there is to do for a thread that looks. None: to rest.
    fn step(&mut self) -> Option<Step<J>> {
        if self.threads > self.max {
            return Some(Step::End);
        }
        if let Some(job) = self.todo.pop_front() {
            self.running += 1;
            return Some(Step::Run(job));
        }
        self.stop.then_some(Step::End)
    }
}

/// Jobs `J` on their way to threads, and what came of them, `D`, on its way to the main loop. Its room is made at the start.
#[derive(Debug)]
pub struct Life<J, D> {
    state: Mutex<State<J, D>>,
    /// `State::finished` is not empty, seen without the lock.
    finished: AtomicBool,
    /// Wakes the maker.
    maker: Condvar,
}

impl<J, D> Life<J, D> {
    /// With room for `depth` jobs, and `min` threads, numbered from 1, which the caller makes now. They begin with
    /// [`Come::Looking`].
    pub fn new(depth: usize, min: usize, max: usize) -> Result<Life<J, D>, BoundsError> {
        check(min, max)?;
        Ok(Life {
            state: Mutex::new(State {
                todo: VecDeque::with_capacity(depth),
                finished: VecDeque::with_capacity(depth),
                idle: Vec::with_capacity(max),
                min,
                max,
                threads: min,
                coming: min,
                running: 0,
                being_born: false,
                stop: false,
                created: min as u64,
                failed: 0,
                #[cfg(loom)]
                expiries: 0,
            }),
            finished: AtomicBool::new(false),
            maker: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State<J, D>> {
        self.state.lock().unwrap()
    }

    /// Wakes threads for the jobs that nobody is coming for, or the maker.
    fn settle<'a>(&'a self, mut state: MutexGuard<'a, State<J, D>>) {
        while state.todo.len() > state.coming
            && let Some(sleeper) = state.idle.pop()
        {
            state.coming += 1;
            // Not under the lock, which is the first thing that it needs.
            drop(state);
            sleeper.wake.notify_one();
            state = self.lock();
        }
        self.tell_maker(&state);
    }

    fn tell_maker(&self, state: &State<J, D>) {
        if state.wanted() {
            self.maker.notify_one();
        }
    }

    /// All that wait look again.
    fn wake_all(state: &mut State<J, D>) {
        while let Some(sleeper) = state.idle.pop() {
            state.coming += 1;
            sleeper.wake.notify_one();
        }
    }

    /// Any thread: hands over all of `jobs`. Makes no thread and waits for none.
    pub fn give(&self, jobs: impl Iterator<Item = J>) {
        let mut state = self.lock();
        state.todo.extend(jobs);
        self.settle(state);
    }

    /// Main loop: takes back the first job for which `found` says so, if no thread has begun it.
    pub fn cancel(&self, found: impl FnMut(&J) -> bool) -> Option<J> {
        let mut state = self.lock();
        let at = state.todo.iter().position(found)?;
        state.todo.remove(at)
    }

    /// What came of a job that no thread did. True: the event is to be written.
    pub fn finish(&self, done: D) -> bool {
        let mut state = self.lock();
        self.push_finished(&mut state, done)
    }

    /// The main loop is told of the first only: it takes the others with it.
    fn push_finished(&self, state: &mut State<J, D>, done: D) -> bool {
        let first = state.finished.is_empty();
        state.finished.push_back(done);
        if first {
            self.finished.store(true, Ordering::Release);
        }
        first
    }

    /// Main loop: whether [`drain`](Self::drain) finds something.
    pub fn has_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// Main loop: swaps what came of jobs with `taken`, which is empty and has the same room.
    pub fn drain(&self, taken: &mut VecDeque<D>) {
        if self.has_finished() {
            let mut state = self.lock();
            std::mem::swap(&mut state.finished, taken);
            self.finished.store(false, Ordering::Release);
        }
    }

    /// Maker: waits until a thread is wanted, and gives its number; [`unborn`](Self::unborn) if it can't be made. None: the
    /// end.
    pub fn birth(&self) -> Option<u64> {
        let mut state = self.lock();
        while !state.wanted() {
            if state.stop {
                return None;
            }
            state = self.maker.wait(state).unwrap();
        }
        state.threads += 1;
        state.being_born = true;
        state.created += 1;
        Some(state.created)
    }

    /// Maker: that thread can't be made. Waits a while: the system will not have more of them at once.
    pub fn unborn(&self, pause: Duration) {
        let mut state = self.lock();
        state.threads -= 1;
        state.created -= 1;
        state.failed += 1;
        // As long as this is set none is wanted.
        let mut clock = Clock::new(true, pause, &state);
        while !state.stop {
            let over;
            (state, over) = clock.wait(&self.maker, state);
            if over {
                break;
            }
        }
        state.being_born = false;
    }

    /// Thread: what to do next. Waits for it, `idle` at most while there are more threads than the minimum.
    pub fn next(&self, me: &Sleeper, come: Come<D>, idle: Duration) -> Step<J> {
        let mut state = self.lock();
        match come {
            Come::Born => {
                state.being_born = false;
                self.tell_maker(&state);
            }
            Come::Looking => state.coming -= 1,
            Come::Done(done) => {
                state.running -= 1;
                if self.push_finished(&mut state, done) {
                    // With no job in its hands: the main loop that it wakes may take its CPU.
                    state.coming += 1;
                    return Step::Tell;
                }
            }
        }
        loop {
            match state.step() {
                Some(Step::End) => break,
                Some(step) => {
                    self.tell_maker(&state);
                    return step;
                }
                None => {}
            }
            let (guard, goes_on) = self.rest(state, me, idle);
            state = guard;
            if !goes_on {
                break;
            }
        }
        // Nobody rests while there are too many threads: no job waits for this one while another thread could be woken.
        state.threads -= 1;
        Step::End
    }

    /// Waits until it is woken. False: it is one too many, and nobody has needed it for the time.
    fn rest<'a>(
        &'a self,
        mut state: MutexGuard<'a, State<J, D>>,
        me: &Sleeper,
        idle: Duration,
    ) -> (MutexGuard<'a, State<J, D>>, bool) {
        // Where it is not, others are made or the minimum changes only after it was woken.
        let surplus = state.threads > state.min;
        let mut clock = Clock::new(surplus, idle, &state);
        state.idle.push(me.clone());
        loop {
            let expired;
            (state, expired) = clock.wait(&me.wake, state);
            let Some(at) = state.idle.iter().rposition(|sleeper| sleeper.id == me.id) else {
                state.coming -= 1;
                return (state, true);
            };
            if expired {
                state.idle.remove(at);
                let stays = state.threads <= state.min || state.todo.len() > state.coming;
                return (state, stays);
            }
        }
    }

    /// Changes the bounds. Missing threads are made, and those that are too many end when their work is done.
    pub fn set(&self, min: usize, max: usize) -> Result<(), BoundsError> {
        check(min, max)?;
        let mut state = self.lock();
        (state.min, state.max) = (min, max);
        let missing = max.saturating_sub(state.idle.len());
        state.idle.reserve(missing);
        Self::wake_all(&mut state);
        self.settle(state);
        Ok(())
    }

    /// No more jobs will come; threads end when none is left, and the maker at once.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stop = true;
        Self::wake_all(&mut state);
        self.maker.notify_one();
    }

    /// What there is to see.
    pub fn report(&self) -> PoolReport {
        let state = self.lock();
        PoolReport {
            min: state.min,
            max: state.max,
            threads: state.threads,
            idle: state.idle.len(),
            queued: state.todo.len(),
            running: state.running,
            created: state.created,
            failed: state.failed,
        }
    }

    /// The time of all that wait is over: there is no time in the model.
    #[cfg(loom)]
    pub fn expire(&self) {
        let mut state = self.lock();
        state.expiries += 1;
        state.idle.iter().for_each(|sleeper| sleeper.wake.notify_one());
        self.maker.notify_one();
    }
}

fn check(min: usize, max: usize) -> Result<(), BoundsError> {
    match min {
        0 => Err(BoundsError::NoThread),
        _ if min > max => Err(BoundsError::Crossed { min, max }),
        _ => Ok(()),
    }
}

/// A rest's end, for one that has an end.
#[cfg(not(loom))]
struct Clock(Option<std::time::Instant>);

#[cfg(not(loom))]
impl Clock {
    fn new<J, D>(ends: bool, idle: Duration, _: &State<J, D>) -> Clock {
        Clock(ends.then(|| std::time::Instant::now() + idle))
    }

    /// Waits once, and says whether the end is reached.
    fn wait<'a, T>(&mut self, wake: &Condvar, state: MutexGuard<'a, T>) -> (MutexGuard<'a, T>, bool) {
        match self.0 {
            None => (wake.wait(state).unwrap(), false),
            Some(end) => {
                let left = end.saturating_duration_since(std::time::Instant::now());
                let (state, _) = wake.wait_timeout(state, left).unwrap();
                (state, std::time::Instant::now() >= end)
            }
        }
    }
}

#[cfg(loom)]
struct Clock(Option<u32>);

#[cfg(loom)]
impl Clock {
    fn new<J, D>(ends: bool, _: Duration, state: &State<J, D>) -> Clock {
        Clock(ends.then_some(state.expiries))
    }

    fn wait<'a, J, D>(
        &mut self,
        wake: &Condvar,
        state: MutexGuard<'a, State<J, D>>,
    ) -> (MutexGuard<'a, State<J, D>>, bool) {
        let state = wake.wait(state).unwrap();
        let expired = self.0.is_some_and(|seen| seen != state.expiries);
        (state, expired)
    }
}
