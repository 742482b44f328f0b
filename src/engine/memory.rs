//! Bytes in memory: RAM, and memory that keeps nothing, which measures everything else.

use std::any::{Any, TypeId};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::{Completion, Engine, Inline, Reap, Submit, hand_out};
use crate::blocking::{Blocking, Caller};
use crate::store::Ram;
use crate::sys::io::{FileId, Io, IoOp};

/// An engine for one RAM of `size` bytes, zeroed. Takes its time where that is much.
pub fn ram(blocking: &Blocking, size: u64, depth: usize) -> std::io::Result<Engine> {
    let ram = Ram::zeroed(blocking, size)?;
    Ok(open("ram", Arc::new([Arc::new(ram)]), depth, super::event()?))
}

/// One that completes everything and moves nothing: a read leaves the memory as it was.
pub fn null(depth: usize) -> std::io::Result<Engine> {
    Ok(open("null", Arc::new([Arc::new(Ram::null(u64::MAX))]), depth, super::event()?))
}

/// One that stands in for `engine` while there is nothing to do, and has its depth and event.
pub fn idle(engine: &Engine) -> Engine {
    open("idle", Arc::new([]), engine.depth, Arc::clone(engine.submit.event()))
}

/// An engine for these, the first of which a [`FileId`](crate::sys::io::FileId) of 0 names.
pub(super) fn open(name: &'static str, files: Arc<[Arc<Ram>]>, depth: usize, event: Arc<EventFd>) -> Engine {
    let shared = Arc::new(Shared {
        files,
        done: Mutex::new(VecDeque::with_capacity(depth)),
        ready: AtomicBool::new(false),
        event,
    });
    let reap = Box::new(MemoryReap { shared: Arc::clone(&shared), taken: VecDeque::with_capacity(depth) });
    Engine { name, depth, inline: Inline::Always, submit: shared, reap }
}

struct Shared {
    files: Arc<[Arc<Ram>]>,
    done: Mutex<VecDeque<Completion>>,
    ready: AtomicBool,
    event: Arc<EventFd>,
}

fn run(bytes: &mut [u8], io: &Io) -> Result<u64, Errno> {
    if io.op == IoOp::Flush {
        return Ok(0);
    }
    let start = usize::try_from(io.offset).map_err(|_| Errno::EINVAL)?;
    let len = usize::try_from(io.len).map_err(|_| Errno::EINVAL)?;
    let range = bytes.get_mut(start..).and_then(|tail| tail.get_mut(..len)).ok_or(Errno::EINVAL)?;
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
        let mut done = self.done.lock().unwrap();
        // Of one file, nearly always. That of the one before is let go of before another is taken.
        let mut open: Option<(FileId, _)> = None;
        for io in batch.drain(..count) {
            if open.as_ref().is_none_or(|(file, _)| *file != io.file) {
                drop(open.take());
                open = Some((io.file, self.files[usize::from(io.file.0)].bytes()));
            }
            let result = match &mut open {
                Some((_, Some(bytes))) => run(bytes, &io),
                _ => {
                    if io.op == IoOp::Status {
                        io.put(&io.len.to_ne_bytes());
                    }
                    Ok(io.len)
                }
            };
            done.push_back((io, result));
        }
        drop(open);
        drop(done);
        self.ready.store(true, Ordering::Release);
        // The main loop reaps after it has submitted, and need not be told.
        if let Caller::Thread(_) = by {
            self.wake();
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
        std::mem::swap(&mut self.taken, &mut *self.shared.done.lock().unwrap());
        hand_out(&mut self.taken, done)
    }
}
