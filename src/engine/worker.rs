//! One thread for what Linux AIO can't do, or does only by blocking: discard, writing zeroes, and a flush where the
//! kernel has no asynchronous one.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use crate::submit::{Handover, STACK_SIZE};
use crate::sys::file::Backing;
use crate::sys::io::Io;

type Finished = (Box<Io>, Result<u64, Errno>);

#[derive(Debug)]
struct Shared {
    todo: Handover<Box<Io>>,
    finished: Mutex<VecDeque<Finished>>,
    /// `finished` is not empty, seen without the lock.
    ready: AtomicBool,
}

/// The thread. Dropping it waits for what it has begun.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Worker {
    pub(super) fn start(files: Arc<[Backing]>, event: Arc<EventFd>, capacity: usize) -> std::io::Result<Worker> {
        let shared = Arc::new(Shared {
            todo: Handover::new(capacity),
            finished: Mutex::new(VecDeque::with_capacity(capacity)),
            ready: AtomicBool::new(false),
        });
        let mine = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("worker".into()).stack_size(STACK_SIZE).spawn(move || {
            let mut batch = VecDeque::with_capacity(capacity);
            while mine.todo.take(&mut batch) {
                for io in batch.drain(..) {
                    let result = files[usize::from(io.file.0)].carry_out(&io);
                    mine.finished.lock().unwrap().push_back((io, result));
                    mine.ready.store(true, Ordering::Release);
                    let _ = event.write(1);
                }
            }
        })?;
        Ok(Worker { shared, thread: Some(thread) })
    }

    pub(super) fn give(&self, ios: impl Iterator<Item = Box<Io>>) {
        self.shared.todo.give(ios);
    }

    pub(super) fn finished(&self) -> Finishing {
        Finishing(Arc::clone(&self.shared))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.todo.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the worker has finished, for the completing half.
#[derive(Debug)]
pub(super) struct Finishing(Arc<Shared>);

impl Finishing {
    pub(super) fn ready(&self) -> bool {
        self.0.ready.load(Ordering::Acquire)
    }

    pub(super) fn pop(&self) -> Option<Finished> {
        if !self.ready() {
            return None;
        }
        let mut finished = self.0.finished.lock().unwrap();
        let item = finished.pop_front();
        self.0.ready.store(!finished.is_empty(), Ordering::Release);
        item
    }
}
