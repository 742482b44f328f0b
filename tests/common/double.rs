//! An engine that does what a test tells it: it holds I/Os until they are completed, accepts as many at a time as it
//! may, refuses, or blocks in submit.

use std::any::{Any, TypeId};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tapdisk::blocking::Caller;
use tapdisk::engine::{Engine, Inline, Reap, Submit};
use tapdisk::sys::io::{Io, IoOp};

use super::PATIENCE;

/// What the engine has seen of an I/O.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub op: IoOp,
    pub offset: u64,
    pub len: u64,
}

#[derive(Default)]
struct State {
    /// Accepted, not completed.
    held: VecDeque<Box<Io>>,
    /// Completed, not reaped.
    done: VecDeque<(Box<Io>, Result<u64, Errno>)>,
    seen: Vec<Seen>,
    /// At most so many at once.
    accept: usize,
    /// Answers of the next submissions, before it accepts again.
    refusals: VecDeque<Errno>,
    /// Submit blocks while as many are held or done.
    block_at: Option<usize>,
    submissions: usize,
}

/// The test's hand on the engine.
#[derive(Clone)]
pub struct Double {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    reaped: Condvar,
    event: Arc<EventFd>,
}

impl Double {
    pub fn engine(depth: usize, inline: Inline) -> (Double, Engine) {
        let state = State { accept: usize::MAX, ..State::default() };
        let event = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
        let shared = Arc::new(Shared { state: Mutex::new(state), reaped: Condvar::new(), event });
        let reap = Box::new(Reaper(Arc::clone(&shared)));
        let engine = Engine { name: "double", depth, inline, submit: Arc::clone(&shared) as Arc<dyn Submit>, reap };
        (Double { shared }, engine)
    }

    pub fn accept(&self, at_once: usize) {
        self.shared.state.lock().unwrap().accept = at_once;
    }

    pub fn refuse(&self, errno: Errno) {
        self.shared.state.lock().unwrap().refusals.push_back(errno);
    }

    /// From now on submit blocks until there are fewer than `count` unreaped.
    pub fn block_at(&self, count: usize) {
        self.shared.state.lock().unwrap().block_at = Some(count);
    }

    /// What was accepted so far, once there are `count`.
    pub fn wait_seen(&self, count: usize) -> Vec<Seen> {
        let end = Instant::now() + PATIENCE;
        loop {
            let seen = self.shared.state.lock().unwrap().seen.clone();
            if seen.len() >= count {
                return seen;
            }
            assert!(Instant::now() < end, "only {} of {count} I/Os were submitted", seen.len());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn submissions(&self) -> usize {
        self.shared.state.lock().unwrap().submissions
    }

    /// I/Os that are accepted and not completed.
    #[allow(dead_code)] // fuzzing uses it
    pub fn held(&self) -> usize {
        self.shared.state.lock().unwrap().held.len()
    }

    /// Completes the oldest I/O; `None`: wholly. Reads are filled with 0xab.
    pub fn complete(&self, result: Option<Result<u64, Errno>>) {
        let mut state = self.shared.state.lock().unwrap();
        let io = state.held.pop_front().expect("an I/O is held");
        Self::finish(&mut state, io, result);
        drop(state);
        self.shared.wake();
    }

    /// Completes the newest I/O wholly.
    pub fn complete_newest(&self) {
        let mut state = self.shared.state.lock().unwrap();
        let io = state.held.pop_back().expect("an I/O is held");
        Self::finish(&mut state, io, None);
    }

    fn finish(state: &mut State, io: Box<Io>, result: Option<Result<u64, Errno>>) {
        if io.op == IoOp::Read && result.is_none_or(|result| result.is_ok()) {
            io.fill(&vec![0xab; io.len as usize]);
        }
        let all = io.len;
        state.done.push_back((io, result.unwrap_or(Ok(all))));
    }

    /// Completes everything that is held, wholly.
    pub fn complete_all(&self) -> usize {
        let mut state = self.shared.state.lock().unwrap();
        let count = state.held.len();
        for _ in 0..count {
            let io = state.held.pop_front().unwrap();
            Self::finish(&mut state, io, None);
        }
        count
    }
}

impl Submit for Shared {
    fn submit(&self, batch: &mut VecDeque<Box<Io>>, limit: usize, _: Caller) -> Result<usize, Errno> {
        let mut state = self.state.lock().unwrap();
        while state.block_at.is_some_and(|count| state.held.len() + state.done.len() >= count) {
            state = self.reaped.wait(state).unwrap();
        }
        state.submissions += 1;
        if let Some(errno) = state.refusals.pop_front() {
            return Err(errno);
        }
        let room = state.block_at.map_or(usize::MAX, |count| count - state.held.len() - state.done.len());
        let count = state.accept.min(batch.len()).min(limit).min(room);
        for io in batch.drain(..count) {
            state.seen.push(Seen { op: io.op, offset: io.offset, len: io.len });
            state.held.push_back(io);
        }
        Ok(count)
    }

    fn offers(&self, _: TypeId) -> Option<&dyn Any> {
        None
    }

    fn event(&self) -> &Arc<EventFd> {
        &self.event
    }
}

struct Reaper(Arc<Shared>);

impl Reap for Reaper {
    fn ready(&self) -> bool {
        !self.0.state.lock().unwrap().done.is_empty()
    }

    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        let finished = std::mem::take(&mut self.0.state.lock().unwrap().done);
        let count = finished.len();
        finished.into_iter().for_each(|(io, result)| done(io, result));
        self.0.reaped.notify_all();
        count
    }
}
