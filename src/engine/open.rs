//! Which engine: the one that was asked for, or the best one for the files.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use slog::{Logger, warn};

use super::pool::{self, Threads};
use super::route::{FilePlace, route};
use super::{Engine, Setup, aio, fault, memory as in_memory, uring};
use crate::blocking::Blocking;
use crate::config::{Config, EngineName, Fault};
use crate::memory;
use crate::store::{Means, Ram};
use crate::sys::file::Backing;
use crate::sys::io::FileId;

/// Opens a disk's engines: at its start, and when it goes on with another one.
#[derive(Clone)]
pub struct Opener {
    /// The engine that serves, as it was asked for.
    pub name: EngineName,
    /// The disk's files but those in memory.
    setup: Setup,
    memories: Arc<[Arc<Ram>]>,
    /// Where each of the disk's files is: with the engine of that name, 0, or with that of memory, 1.
    places: Arc<[FilePlace]>,
    sqpoll_idle_ms: Option<u32>,
    faults: Vec<Fault>,
    /// What an engine brings is kept resident.
    lock_memory: bool,
    log: Logger,
}

impl Opener {
    /// For `files`, the first of which a [`FileId`] of 0 names. `event` is that of the engine that they follow, if they do.
    pub fn new(files: Vec<Means>, config: &Config, event: Option<Arc<EventFd>>, log: Logger) -> io::Result<Opener> {
        let (mut open, mut memories, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for means in files {
            let (engine, file) = match &means {
                Means::File(_) => (0, open.len()),
                Means::Memory(_) => (1, memories.len()),
            };
            places.push(FilePlace { engine, file: FileId(file as u16) });
            match means {
                Means::File(file) => open.push(file),
                Means::Memory(ram) => memories.push(ram),
            }
        }
        let engine = &config.engine;
        let threads = Threads {
            min: engine.threads_min as usize,
            max: engine.threads_max as usize,
            idle: Duration::from_secs(engine.threads_idle_s.into()),
        };
        let event = event.map_or_else(super::event, Ok)?;
        let setup = Setup::with_event(open.into(), engine.depth as usize, event);
        let setup = Setup { batch: engine.batch as usize, threads, ..setup };
        let sqpoll_idle_ms = engine.sqpoll.then_some(engine.sqpoll_idle_ms);
        let (name, faults, lock_memory) = (engine.name, config.faults.clone(), config.memory.lock);
        let (memories, places) = (memories.into(), places.into());
        Ok(Opener { name, setup, memories, places, sqpoll_idle_ms, faults, lock_memory, log })
    }

    /// Opens the engine of that name. Under `auto` that is the best one for the files, or the next best where the system
    /// doesn't let it, with the reason in the log; any other either opens, or the error says why not and what to do.
    pub fn open(&self, blocking: &Blocking, name: EngineName) -> io::Result<Engine> {
        let memory = || {
            let event = Arc::clone(&self.setup.event);
            in_memory::open(self.memories[0].name(), Arc::clone(&self.memories), self.setup.depth, event)
        };
        let engine = match (self.setup.files.is_empty(), self.memories.is_empty()) {
            (_, true) => self.named(blocking, name)?,
            (true, false) => memory(),
            (false, false) => route(vec![self.named(blocking, name)?, memory()], &self.places),
        };
        if self.faults.is_empty() { Ok(engine) } else { fault::wrap(blocking, engine, &self.faults) }
    }

    /// Whether the disk's first file is read and written through the page cache.
    pub fn is_buffered(&self) -> bool {
        let FilePlace { engine, file } = self.places[0];
        engine == 0 && !self.setup.files[usize::from(file.0)].direct
    }

    /// Keeps what was opened resident, if that is wanted.
    pub fn lock_memory(&self, blocking: &Blocking) {
        if self.lock_memory {
            memory::lock(blocking, &self.log);
        }
    }

    /// Has the engines that are opened from now on have so many threads at least and at most.
    pub fn set_threads(&mut self, min: usize, max: usize) {
        (self.setup.threads.min, self.setup.threads.max) = (min, max);
    }

    /// What was set since the start, for another one to begin with.
    pub fn keep_in(&self, config: &mut Config) {
        let threads = &self.setup.threads;
        config.engine.name = self.name;
        (config.engine.threads_min, config.engine.threads_max) = (threads.min as u32, threads.max as u32);
    }

    fn best(&self, blocking: &Blocking) -> io::Result<Engine> {
        let candidates = candidates(&self.setup.files);
        let (last, others) = candidates.split_last().expect("there is always one");
        for name in others {
            match self.named(blocking, *name) {
                Ok(engine) => return Ok(engine),
                Err(error) => {
                    warn!(self.log, "the best engine cannot be had: trying the next"; "engine" => name.name(),
                        "why" => %error);
                }
            }
        }
        self.named(blocking, *last)
    }

    fn named(&self, blocking: &Blocking, name: EngineName) -> io::Result<Engine> {
        let setup = &self.setup;
        let uring = || uring::Settings { depth: setup.depth, sqpoll_idle_ms: self.sqpoll_idle_ms, cq_entries: None };
        match name {
            EngineName::Auto => self.best(blocking),
            EngineName::Aio => aio::open(blocking, setup),
            EngineName::IoUring => uring::open(blocking, setup, uring()),
            EngineName::Threads => pool::open(blocking, setup),
        }
    }
}

/// What is best for the files, and what is next best where that can't be had.
fn candidates(files: &[Backing]) -> &'static [EngineName] {
    // What is on the others goes to the pool, with any engine.
    if files.iter().any(|file| file.direct) {
        &[EngineName::Aio, EngineName::IoUring, EngineName::Threads]
    } else {
        &[EngineName::Threads, EngineName::Aio]
    }
}
