//! Another engine, or another way to submit, while the disk is in use: at a moment when the engine has nothing.

use std::time::Duration;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use slog::{info, warn};

use super::Disk;
use crate::config::{EngineName, THREADS_MAX};
use crate::engine::Engine;
use crate::engine::pool::{Pool, PoolReport};
use crate::queue::SubmitMode;
use crate::stats::now;

/// How long what is in flight may take to finish; requests wait meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is wanted; what is not named stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The engine.
    pub name: Option<EngineName>,
    /// Who submits.
    pub submit: Option<SubmitMode>,
}

/// A disk's engine, as it is shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EngineReport {
    /// Its name; "ram" and "null" are images too.
    pub name: String,
    /// Who submits.
    pub submit: SubmitMode,
    /// I/Os that it can have in flight.
    pub depth: usize,
    /// Its threads; none if it is in memory.
    pub pool: Option<PoolReport>,
}

/// Why a disk keeps its engine.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SwitchError {
    /// The image is its engine.
    #[error("its image is in memory, and has no other engine")]
    OnlyOne,
    /// There is no time for it.
    #[error("it is being closed")]
    Closing,
    /// One at a time.
    #[error("it is changing its engine already")]
    Busy,
    /// It has no engine now.
    #[error("it is paused")]
    Paused,
    /// Something in flight did not finish.
    #[error("{0} I/Os in flight did not finish in 5 s: tap-ctl debug-queue shows them")]
    Stuck(usize),
    /// Numbers of threads that can't be.
    #[error("{0}")]
    Threads(String),
    /// The engine can't be opened.
    #[error("{1}")]
    Open(Errno, String),
}

impl SwitchError {
    /// As a client is told.
    pub fn errno(&self) -> Errno {
        match self {
            SwitchError::OnlyOne => Errno::EOPNOTSUPP,
            SwitchError::Closing | SwitchError::Busy | SwitchError::Paused => Errno::EBUSY,
            SwitchError::Stuck(_) => Errno::ETIMEDOUT,
            SwitchError::Threads(_) => Errno::EINVAL,
            SwitchError::Open(errno, _) => *errno,
        }
    }
}

impl From<std::io::Error> for SwitchError {
    fn from(error: std::io::Error) -> SwitchError {
        SwitchError::Open(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw), error.to_string())
    }
}

/// A change under way, the queue being plugged, or how it ended.
pub(super) struct Switching {
    /// None: it is over.
    next: Option<Next>,
    /// When it is called off, ns of [`now`].
    until: u64,
    outcome: Result<(), SwitchError>,
}

/// What takes the engine's place.
struct Next {
    /// As it was asked for.
    name: EngineName,
    engine: Engine,
    mode: SubmitMode,
}

impl Switching {
    /// When it is called off.
    pub(super) fn deadline(&self) -> Option<u64> {
        self.next.as_ref().map(|_| self.until)
    }
}

impl Disk {
    /// Begins to change the engine, or who submits to it. How that ends, [`switched`](Self::switched) tells.
    pub fn switch(&mut self, wanted: Wanted) -> Result<(), SwitchError> {
        if self.is_draining() {
            return Err(SwitchError::Closing);
        }
        if self.is_paused() || self.is_pausing() {
            return Err(SwitchError::Paused);
        }
        if self.is_switching() {
            return Err(SwitchError::Busy);
        }
        let opener = self.opener.as_mut().ok_or(SwitchError::OnlyOne)?;
        // The new one is there before the old one is touched: an error changes nothing.
        let name = wanted.name.unwrap_or(opener.name);
        let engine = opener.open(name)?;
        opener.lock_memory();
        let mode = wanted.submit.unwrap_or(self.queue.mode());
        self.queue.plug();
        let until = now() + PATIENCE.as_nanos() as u64;
        self.switching = Some(Switching { next: Some(Next { name, engine, mode }), until, outcome: Ok(()) });
        Ok(())
    }

    /// Whether a change is under way.
    pub(super) fn is_switching(&self) -> bool {
        self.switching.as_ref().is_some_and(|switching| switching.next.is_some())
    }

    /// How the last change ended. None: it is under way.
    pub fn switched(&mut self) -> Option<Result<(), SwitchError>> {
        self.switching.take_if(|switching| switching.next.is_none()).map(|switching| switching.outcome)
    }

    /// Whether there was something to do.
    pub(super) fn switch_if_drained(&mut self) -> bool {
        let Some(switching) = &mut self.switching else { return false };
        let drained = self.queue.is_drained();
        let Some(next) = switching.next.take_if(|_| drained || now() >= switching.until) else { return false };
        switching.outcome = if drained {
            let (engine, submit) = (next.engine.name, next.mode);
            let done = self.queue.switch(next.engine, next.mode).map_err(SwitchError::from);
            if let (Ok(()), Some(opener)) = (&done, &mut self.opener) {
                opener.name = next.name;
            }
            info!(self.log, "engine changed"; "engine" => engine, "submit" => ?submit, "error" => ?done.as_ref().err());
            done
        } else {
            warn!(self.log, "engine not changed: I/O in flight does not finish"; "in_flight" => self.queue.in_flight());
            Err(SwitchError::Stuck(self.queue.in_flight()))
        };
        self.queue.unplug(&self.slots);
        true
    }

    /// Sets how many threads the engine's pool has at least and at most; what is not given stays.
    pub fn set_threads(&mut self, min: Option<u32>, max: Option<u32>) -> Result<(), SwitchError> {
        let pool = self.queue.engine().submit.pool().ok_or(SwitchError::OnlyOne)?;
        let report = pool.report();
        let given = |value: Option<u32>, now| value.map_or(now, |value| value as usize);
        let (min, max) = (given(min, report.min), given(max, report.max));
        if max > THREADS_MAX as usize {
            return Err(SwitchError::Threads(format!("at most {THREADS_MAX} threads")));
        }
        pool.set(min, max).map_err(|error| SwitchError::Threads(error.to_string()))?;
        info!(self.log, "threads set"; "min" => min, "max" => max);
        if let Some(opener) = &mut self.opener {
            opener.set_threads(min, max);
        }
        Ok(())
    }

    /// What is in force.
    pub fn engine_report(&self) -> EngineReport {
        let engine = self.queue.engine();
        EngineReport {
            name: engine.name.to_owned(),
            submit: self.queue.mode(),
            depth: engine.depth,
            pool: engine.submit.pool().map(Pool::report),
        }
    }
}
