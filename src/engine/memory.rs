//! Images without a file: RAM, and one that moves no data at all, which measures everything else.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::{Completion, Engine, Inline, Reap, Submit, hand_out};
use crate::blocking::{Blocking, Caller};
use crate::sys::io::{Io, IoOp};

/// A RAM image of `size` bytes, zeroed. Takes its time where that is much.
pub fn ram(_: &Blocking, size: u64, depth: usize) -> std::io::Result<Engine> {
    let size = usize::try_from(size).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
    let mut image = Vec::new();
    image.try_reserve_exact(size).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
    image.resize(size, 0);
    Ok(open("ram", Some(image), depth, super::event()?))
}

/// An image that completes everything and moves nothing: a read leaves the memory as it was.
pub fn null(depth: usize) -> std::io::Result<Engine> {
    Ok(open("null", None, depth, super::event()?))
}

/// One that stands in for `engine` while there is nothing to do, and has its depth and event.
pub fn idle(engine: &Engine) -> Engine {
    open("idle", None, engine.depth, Arc::clone(engine.submit.event()))
}

fn open(name: &'static str, image: Option<Vec<u8>>, depth: usize, event: Arc<EventFd>) -> Engine {
    let shared = Arc::new(Shared {
        state: Mutex::new(State { image, done: VecDeque::with_capacity(depth) }),
        ready: AtomicBool::new(false),
        event,
    });
    let reap = Box::new(MemoryReap { shared: Arc::clone(&shared), taken: VecDeque::with_capacity(depth) });
    Engine { name, depth, inline: Inline::Always, submit: shared, reap, faults: None }
}

struct Shared {
    state: Mutex<State>,
    ready: AtomicBool,
    event: Arc<EventFd>,
}

struct State {
    /// None: the null image.
    image: Option<Vec<u8>>,
    done: VecDeque<Completion>,
}

fn run(image: &mut [u8], io: &Io) -> Result<u64, Errno> {
    if io.op == IoOp::Flush {
        return Ok(0);
    }
    let start = usize::try_from(io.offset).map_err(|_| Errno::EINVAL)?;
    let len = usize::try_from(io.len).map_err(|_| Errno::EINVAL)?;
    let range = image.get_mut(start..).and_then(|tail| tail.get_mut(..len)).ok_or(Errno::EINVAL)?;
    match io.op {
        IoOp::Read => io.fill(range),
        IoOp::Write { .. } => io.drain(range),
        IoOp::Discard | IoOp::WriteZeroes { .. } => range.fill(0),
        IoOp::Status => io.put(&io.len.to_ne_bytes()),
        IoOp::Flush => {}
    }
    Ok(io.len)
}

impl Submit for Shared {
    fn submit(&self, batch: &mut VecDeque<Box<Io>>, limit: usize, by: Caller) -> Result<usize, Errno> {
        let count = batch.len().min(limit);
        let mut state = self.state.lock().unwrap();
        let State { image, done } = &mut *state;
        for io in batch.drain(..count) {
            let result = match image {
                Some(image) => run(image, &io),
                None => {
                    if io.op == IoOp::Status {
                        io.put(&io.len.to_ne_bytes());
                    }
                    Ok(io.len)
                }
            };
            done.push_back((io, result));
        }
        drop(state);
        self.ready.store(true, Ordering::Release);
        // The main loop reaps after it has submitted, and need not be told.
        if let Caller::Thread(_) = by {
            self.wake();
        }
        Ok(count)
    }

    fn event(&self) -> &Arc<EventFd> {
        &self.event
    }
}

struct MemoryReap {
    shared: Arc<Shared>,
    /// Swapped with what is done.
    taken: VecDeque<Completion>,
}

impl Reap for MemoryReap {
    fn ready(&self) -> bool {
        self.shared.ready.load(Ordering::Acquire)
    }

    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        if !self.shared.ready.swap(false, Ordering::AcqRel) {
            return 0;
        }
        std::mem::swap(&mut self.taken, &mut self.shared.state.lock().unwrap().done);
        hand_out(&mut self.taken, done)
    }
}
