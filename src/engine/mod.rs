//! Engines: what moves data between memory and a file. They know nothing of formats, and get I/Os that the queue
//! has merged already.

use std::any::{Any, TypeId};
use std::collections::VecDeque;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::blocking::Caller;
use crate::sys::file::Backing;
use crate::sys::io::{FileId, Io, IoOp};

pub mod aio;
pub mod fault;
mod kernel;
pub mod memory;
mod open;
pub mod pool;
pub mod route;
pub mod uring;

pub use self::open::Opener;
use self::pool::Threads;

/// An I/O that an engine is done with: with its bytes, or its error.
pub type Completion = (Box<Io>, Result<u64, Errno>);

/// The submitting half, called from the submit thread or the main loop.
pub trait Submit: Send + Sync {
    /// Takes the first I/Os of `batch`, at most `limit`, and says how many: those are removed. On an error, none; the
    /// error is the first one's. EAGAIN (or `Ok(0)`) means that there is no room until something completes. May block; for the main
    /// loop, which reaps after it has submitted, only as [`Inline`] says.
    fn submit(&self, batch: &mut VecDeque<Box<Io>>, limit: usize, by: Caller) -> Result<usize, Errno>;

    /// Tries to end the I/O with that tag, which this engine has, before its time. It completes in any case; with
    /// ECANCELED if this took effect. False: it can only be waited for. Called from the main loop, and never blocks.
    fn cancel(&self, _tag: u32) -> bool {
        false
    }

    /// Lets go of what it has prepared for clients that are gone. Called from the main loop, before it sleeps.
    fn tidy(&self) {}

    /// What it has of that type, which is special to it; asked by `capability`. An engine around another
    /// one passes on what that has.
    fn offers(&self, kind: TypeId) -> Option<&dyn Any>;

    /// Becomes readable with each completion; every engine of a disk has the same one.
    fn event(&self) -> &Arc<EventFd>;

    /// Makes [`event`](Self::event) readable.
    fn wake(&self) {
        wake(self.event());
    }
}

impl dyn Submit {
    /// What is special to some engines, and is asked for by its type: [`Pool`](pool::Pool), that all or some of the I/Os go to, and
    /// [`Faults`](fault::Faults) around it, for those who steer them.
    pub fn capability<T: Any>(&self) -> Option<&T> {
        self.offers(TypeId::of::<T>())?.downcast_ref()
    }
}

/// The completing half, called from the main loop only; never blocks.
pub trait Reap: Send {
    /// Whether [`reap`](Self::reap) would find something, as far as memory shows.
    fn ready(&self) -> bool;

    /// Hands each completed I/O with its bytes or error to `done`, and says how many.
    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize;
}

/// When the main loop may submit by itself under `submit = "auto"`: only where that can't block, or where nothing is
/// in flight and the kernel is told not to block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Inline {
    /// Never.
    Never,
    /// Single I/Os of some kinds, when nothing is in flight, flagged `nowait`.
    Idle {
        /// Writes too. Not for regular files: a write to a frozen file system blocks in spite of the flag, in
        /// the kernel's `sb_start_write`.
        writes: bool,
    },
    /// Always: it moves memory or hands over to a thread, and never blocks.
    Always,
    /// As the I/O's file has it: one of the above for each, and not the same for all.
    ByFile(Box<[Inline]>),
}

impl Inline {
    /// For a file on which submission can wait.
    pub fn of_file(file: &Backing) -> Inline {
        // io_submit on a buffered file does the whole I/O itself.
        if file.direct { Inline::Idle { writes: file.block_device } } else { Inline::Never }
    }

    /// For files that may differ, in the order of their ids.
    pub fn of_files(files: impl IntoIterator<Item = Inline>) -> Inline {
        let files: Box<[Inline]> = files.into_iter().collect();
        match files.first() {
            Some(first) if files.iter().all(|file| file == first) => first.clone(),
            Some(_) => Inline::ByFile(files),
            None => Inline::Never,
        }
    }

    /// For a file of the engine.
    pub fn of(&self, file: FileId) -> &Inline {
        match self {
            Inline::ByFile(files) => &files[usize::from(file.0)],
            all => all,
        }
    }

    /// A file has turned out to be none that the kernel can be told not to block for.
    pub fn forbid(&mut self, file: FileId) {
        match self {
            Inline::ByFile(files) => files[usize::from(file.0)] = Inline::Never,
            all => *all = Inline::Never,
        }
    }

    /// Whether `io` may be submitted by the main loop while nothing is in flight.
    pub fn when_idle(&self, io: &Io) -> bool {
        match (self, io.op) {
            (Inline::ByFile(_), _) => self.of(io.file).when_idle(io),
            (Inline::Always, _) | (Inline::Idle { .. }, IoOp::Read) => true,
            (Inline::Idle { writes }, IoOp::Write { .. }) => *writes,
            _ => false,
        }
    }
}

/// The event of a disk's engines.
fn event() -> std::io::Result<Arc<EventFd>> {
    Ok(Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?))
}

fn wake(event: &EventFd) {
    // An eventfd's counter can't reach its limit by ones.
    let _ = event.write(1);
}

/// Hands all of `taken`, which was swapped with what is done so that no lock is held here, to `done`, and says how many.
fn hand_out(taken: &mut VecDeque<Completion>, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
    let count = taken.len();
    for (io, result) in taken.drain(..) {
        done(io, result);
    }
    count
}

/// What an engine for files is opened with.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The first of them is what a [`FileId`] of 0 names.
    pub files: Arc<[Backing]>,
    /// I/Os in flight.
    pub depth: usize,
    /// The most I/Os in one system call.
    pub batch: usize,
    /// The pool's.
    pub threads: Threads,
    /// Becomes readable with each completion.
    pub event: Arc<EventFd>,
}

impl Setup {
    /// For `depth` I/Os in flight on `files`; all else as if nothing were configured.
    pub fn new(files: Arc<[Backing]>, depth: usize) -> std::io::Result<Setup> {
        Ok(Setup::with_event(files, depth, event()?))
    }

    /// The same, with the event of the engine that it follows.
    pub fn with_event(files: Arc<[Backing]>, depth: usize, event: Arc<EventFd>) -> Setup {
        Setup { files, depth, batch: 64, threads: Threads::default(), event }
    }
}

/// An engine with its files registered, ready to use.
pub struct Engine {
    /// As in the configuration.
    pub name: &'static str,
    /// I/Os that it can have in flight.
    pub depth: usize,
    /// When the main loop may submit.
    pub inline: Inline,
    /// The submitting half.
    pub submit: Arc<dyn Submit>,
    /// The completing half.
    pub reap: Box<dyn Reap>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Engine({}, depth {}, inline {:?})", self.name, self.depth, self.inline)
    }
}
