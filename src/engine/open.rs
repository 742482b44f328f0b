//! Which engine: the one that was asked for, or the best one for the files.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use slog::{Logger, warn};

use super::pool::{self, Threads};
use super::{Engine, aio, fault, uring};
use crate::config::{self, Config, EngineName, Fault};
use crate::memory;
use crate::sys::file::Backing;

/// Opens a disk's engines: at its start, and when it goes on with another one.
pub struct Opener {
    files: Arc<[Backing]>,
    settings: config::Engine,
    faults: Vec<Fault>,
    /// What an engine brings is kept resident.
    lock_memory: bool,
    event: Arc<EventFd>,
    log: Logger,
}

impl Opener {
    /// For `files`, the first of which a [`FileId`](crate::sys::io::FileId) of 0 names.
    pub fn new(files: Arc<[Backing]>, config: &Config, log: Logger) -> io::Result<Opener> {
        let (settings, faults) = (config.engine.clone(), config.faults.clone());
        Ok(Opener { files, settings, faults, lock_memory: config.memory.lock, event: super::event()?, log })
    }

    /// Opens the engine of that name, or the one that was opened last. Under `auto` that is the best one for the files, or
    /// the next best where the system doesn't let it, with the reason in the log; any other either opens, or the error says
    /// why not and what to do.
    pub fn open(&mut self, name: Option<EngineName>) -> io::Result<Engine> {
        let name = name.unwrap_or(self.settings.name);
        let engine = match name {
            EngineName::Auto => self.best()?,
            name => self.named(name)?,
        };
        self.settings.name = name;
        if self.faults.is_empty() { Ok(engine) } else { fault::wrap(engine, &self.faults) }
    }

    /// Keeps what was opened resident, if that is wanted.
    pub fn lock_memory(&self) {
        if self.lock_memory {
            memory::lock(&self.log);
        }
    }

    /// Has the engines that are opened from now on have so many threads at least and at most.
    pub fn set_threads(&mut self, min: usize, max: usize) {
        (self.settings.threads_min, self.settings.threads_max) = (min as u32, max as u32);
    }

    fn best(&self) -> io::Result<Engine> {
        let candidates = candidates(&self.files);
        let (last, others) = candidates.split_last().expect("there is always one");
        for name in others {
            match self.named(*name) {
                Ok(engine) => return Ok(engine),
                Err(error) => {
                    warn!(self.log, "the best engine cannot be had: trying the next"; "engine" => name.name(), "why" => %error);
                }
            }
        }
        self.named(*last)
    }

    fn named(&self, name: EngineName) -> io::Result<Engine> {
        let (depth, batch) = (self.settings.depth as usize, self.settings.batch as usize);
        let (files, event) = (&self.files, &self.event);
        let threads = Threads {
            min: self.settings.threads_min as usize,
            max: self.settings.threads_max as usize,
            idle: Duration::from_secs(self.settings.threads_idle_s.into()),
        };
        match name {
            EngineName::Auto | EngineName::Aio => aio::open(files, depth, batch, threads, event),
            EngineName::IoUring => {
                let sqpoll_idle_ms = self.settings.sqpoll.then_some(self.settings.sqpoll_idle_ms);
                uring::open(files, uring::Settings { depth, sqpoll_idle_ms, cq_entries: None }, batch, threads, event)
            }
            EngineName::Threads => pool::open(files, depth, threads, event),
        }
    }
}

/// What is best for the files, and what is next best where that can't be had.
fn candidates(files: &[Backing]) -> &'static [EngineName] {
    if files.iter().all(|file| file.direct) {
        &[EngineName::Aio, EngineName::IoUring, EngineName::Threads]
    } else {
        &[EngineName::Threads, EngineName::Aio]
    }
}
