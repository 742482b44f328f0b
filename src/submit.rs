//! The submit thread: tiocbs go to it through a mutex and a condvar.
//!
//! `io_submit` can block until memory is free, and what frees memory may be the completion of I/O that is already in
//! flight. So the thread that completes never submits while anything is in flight: it hands over, and goes on
//! completing. Only what the kernel refused comes back from the thread; completions reach the main loop from the
//! engine.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
#[cfg(not(loom))]
use std::time::Duration;

use nix::errno::Errno;

use self::sync::{AtomicBool, Condvar, Mutex, Ordering, fence};
use crate::blocking::{Blocking, Caller, spawn};
use crate::engine::Submit;
use crate::sys::io::Io;

#[cfg(not(loom))]
mod sync {
    pub(super) use std::sync::atomic::{AtomicBool, Ordering, fence};
    pub(super) use std::sync::{Condvar, Mutex};
}
#[cfg(loom)]
mod sync {
    pub(super) use loom::sync::atomic::{AtomicBool, Ordering, fence};
    pub(super) use loom::sync::{Condvar, Mutex};
}

/// Stack of each of our threads, in bytes; it is locked in memory.
pub const STACK_SIZE: usize = 128 * 1024;

/// How long the thread waits for a completion after EAGAIN before it tries again all the same: the kernel also says
/// EAGAIN for resources that other processes hold, and nobody tells us when they are free.
#[cfg(not(loom))]
const EAGAIN_WAIT: Duration = Duration::from_millis(10);

/// What the main loop and a thread hand to each other. All its room is made at the start.
#[derive(Debug)]
pub struct Handover<T> {
    state: Mutex<State<T>>,
    wake: Condvar,
    /// Something is in `State::refused`, seen without the lock.
    refused: AtomicBool,
    /// The thread waits for a completion, seen without the lock.
    starved: AtomicBool,
}

#[derive(Debug)]
struct State<T> {
    todo: VecDeque<T>,
    refused: VecDeque<(T, Errno)>,
    /// The thread waits for something to do, and has not been woken yet.
    asleep: bool,
    /// Something has completed since the thread began to wait for it.
    completed: bool,
    stop: bool,
}

impl<T> Handover<T> {
    /// With room for `capacity` items each way.
    pub fn new(capacity: usize) -> Handover<T> {
        Handover {
            state: Mutex::new(State {
                todo: VecDeque::with_capacity(capacity),
                refused: VecDeque::with_capacity(capacity),
                asleep: false,
                completed: false,
                stop: false,
            }),
            wake: Condvar::new(),
            refused: AtomicBool::new(false),
            starved: AtomicBool::new(false),
        }
    }

    /// Main loop: hands over all of `items`, and wakes the thread if nobody has yet.
    pub fn give(&self, items: impl Iterator<Item = T>) {
        let mut state = self.state.lock().unwrap();
        state.todo.extend(items);
        let wake = std::mem::take(&mut state.asleep);
        drop(state);
        if wake {
            self.wake.notify_one();
        }
    }

    /// Thread: waits until there is something to do and moves it to `batch`. False: the end, and nothing is left.
    pub fn take(&self, batch: &mut VecDeque<T>) -> bool {
        let mut state = self.state.lock().unwrap();
        while state.todo.is_empty() {
            if state.stop {
                return false;
            }
            state.asleep = true;
            state = self.wake.wait(state).unwrap();
        }
        state.asleep = false;
        batch.append(&mut state.todo);
        true
    }

    /// Thread: the kernel refused this one. The caller then wakes the main loop.
    pub fn refuse(&self, item: T, errno: Errno) {
        let mut state = self.state.lock().unwrap();
        state.refused.push_back((item, errno));
        self.refused.store(true, Ordering::Release);
    }

    /// Main loop: whether something was refused.
    pub fn has_refused(&self) -> bool {
        self.refused.load(Ordering::Acquire)
    }

    /// Main loop: one of those that were refused.
    pub fn take_refused(&self) -> Option<(T, Errno)> {
        if !self.has_refused() {
            return None;
        }
        let mut state = self.state.lock().unwrap();
        let item = state.refused.pop_front();
        self.refused.store(!state.refused.is_empty(), Ordering::Release);
        item
    }

    /// Main loop: takes back what the thread has not yet begun, newest first.
    pub fn cancel(&self) -> Option<T> {
        self.state.lock().unwrap().todo.pop_back()
    }

    /// Thread: says that it is about to ask for what a completion frees. From here on none is missed.
    pub fn starve(&self) {
        self.state.lock().unwrap().completed = false;
        self.starved.store(true, Relaxed);
        // Either our next submission sees the room that a completion made, or `completed` sees that we starve.
        fence(Ordering::SeqCst);
    }

    /// Thread: waits for a completion since [`starve`](Self::starve), or a while.
    pub fn wait_completed(&self) {
        let mut state = self.state.lock().unwrap();
        if !state.completed && !state.stop {
            #[cfg(not(loom))]
            {
                state = self.wake.wait_timeout(state, EAGAIN_WAIT).unwrap().0;
            }
            #[cfg(loom)]
            {
                state = self.wake.wait(state).unwrap();
            }
        }
        drop(state);
        self.starved.store(false, Relaxed);
    }

    /// Main loop: something has completed.
    pub fn completed(&self) {
        fence(Ordering::SeqCst);
        if self.starved.load(Relaxed) {
            self.state.lock().unwrap().completed = true;
            self.wake.notify_one();
        }
    }

    /// Main loop: looks at what the thread has not yet begun.
    pub fn look(&self, see: impl FnMut(&T)) {
        self.state.lock().unwrap().todo.iter().for_each(see);
    }

    /// Main loop: no more will come; the thread ends when it has done what it has.
    pub fn stop(&self) {
        self.state.lock().unwrap().stop = true;
        self.wake.notify_one();
    }
}

/// What the submitter counts. Relaxed: each is only ever looked at.
#[derive(Debug, Default)]
pub struct Counters {
    /// System calls (or calls of the engine).
    pub batches: AtomicU64,
    /// I/Os that the engine took.
    pub accepted: AtomicU64,
    /// Largest batch that was taken at once.
    pub largest: AtomicU64,
    /// Times the engine said EAGAIN.
    pub busy: AtomicU64,
    /// I/Os that it refused otherwise.
    pub refused: AtomicU64,
    /// The submission that runs now began then (ns of [`crate::stats::now`]); 0: none runs.
    pub since: AtomicU64,
}

impl Counters {
    /// The engine took `n` I/Os at once.
    pub fn took(&self, n: usize) {
        self.batches.fetch_add(1, Relaxed);
        self.accepted.fetch_add(n as u64, Relaxed);
        self.largest.fetch_max(n as u64, Relaxed);
    }

    /// Goes on from what others have counted.
    pub fn add(&self, before: &Counters) {
        for (counter, before) in [
            (&self.batches, &before.batches),
            (&self.accepted, &before.accepted),
            (&self.busy, &before.busy),
            (&self.refused, &before.refused),
        ] {
            counter.fetch_add(before.load(Relaxed), Relaxed);
        }
        self.largest.fetch_max(before.largest.load(Relaxed), Relaxed);
    }
}

/// Submits all of `batch`, as `by`: first one I/O, so that the disk begins at once, then twice as many each time. Partial
/// acceptance goes on with the rest; EAGAIN calls `wait` and tries again if that says so; any other refusal fails only
/// the first, by `refuse`.
pub fn submit_all(
    engine: &dyn Submit,
    by: Caller,
    counters: &Counters,
    batch: &mut VecDeque<Box<Io>>,
    mut wait: impl FnMut() -> bool,
    mut refuse: impl FnMut(Box<Io>, Errno),
) {
    let mut limit = 1;
    while !batch.is_empty() {
        counters.since.store(crate::stats::now(), Relaxed);
        let result = engine.submit(batch, limit, by);
        counters.since.store(0, Relaxed);
        match result {
            Ok(n) if n > 0 => {
                counters.took(n);
                limit = limit.saturating_mul(2);
            }
            Ok(_) | Err(Errno::EAGAIN) => {
                counters.busy.fetch_add(1, Relaxed);
                if !wait() {
                    return;
                }
            }
            Err(errno) => {
                counters.refused.fetch_add(1, Relaxed);
                if let Some(io) = batch.pop_front() {
                    refuse(io, errno);
                }
            }
        }
    }
}

/// The thread and what it shares with the main loop. Dropping it ends the thread.
#[derive(Debug)]
pub struct SubmitThread {
    shared: Arc<Handover<Box<Io>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl SubmitThread {
    /// Starts it, with room for `capacity` I/Os.
    pub fn start(
        blocking: &Blocking,
        engine: Arc<dyn Submit>,
        counters: Arc<Counters>,
        capacity: usize,
    ) -> std::io::Result<SubmitThread> {
        let shared = Arc::new(Handover::new(capacity));
        let handover = Arc::clone(&shared);
        let run = move |blocking: &Blocking| Self::run(blocking, &handover, &*engine, &counters, capacity);
        let thread = spawn(blocking, "submit", STACK_SIZE, run)?;
        Ok(SubmitThread { shared, thread: Some(thread) })
    }

    fn run(
        blocking: &Blocking,
        handover: &Handover<Box<Io>>,
        engine: &dyn Submit,
        counters: &Counters,
        capacity: usize,
    ) {
        let mut batch = VecDeque::with_capacity(capacity);
        while handover.take(&mut batch) {
            let mut asked = false;
            let wait = || {
                // Ask once more before the wait: what frees the room may complete between the refusal and the wait.
                asked = !asked;
                if asked {
                    handover.starve();
                } else {
                    handover.wait_completed();
                }
                true
            };
            submit_all(engine, Caller::Thread(blocking), counters, &mut batch, wait, |io, errno| {
                handover.refuse(io, errno);
                engine.wake();
            });
        }
    }

    /// What the main loop talks to.
    pub fn handover(&self) -> &Handover<Box<Io>> {
        &self.shared
    }
}

impl Drop for SubmitThread {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}
