//! Another engine, or another way to submit, while the disk is in use: at a moment when the engine has nothing.

use std::io;
use std::time::Duration;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use slog::{info, warn};

use super::Disk;
use crate::blocking::Blocking;
use crate::config::{EngineName, THREADS_MAX};
use crate::engine::Opener;
use crate::engine::pool::{Pool, PoolReport};
use crate::job::{Apart, Job};
use crate::queue::{Submission, SubmitMode};
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

impl From<io::Error> for SwitchError {
    fn from(error: io::Error) -> SwitchError {
        SwitchError::Open(crate::sys::errno_of(&error), error.to_string())
    }
}

/// What a job opens: the engine, as it was asked for, and who is to submit to it.
type Opened = Result<(EngineName, SubmitMode, Apart<Submission>), SwitchError>;

/// A change under way, or how it ended.
pub(super) enum Switching {
    /// The new engine is being opened; an error changes nothing.
    Opening(Job<Opened>),
    /// It takes the other's place when nothing is in flight; the queue is plugged.
    Draining {
        name: EngineName,
        mode: SubmitMode,
        next: Apart<Submission>,
        /// When it is called off, ns of [`now`].
        until: u64,
    },
    /// The one that is not needed any more, which has the image's files too, is being ended; and how the change went.
    Ending(Job<()>, Result<(), SwitchError>),
    /// It is over.
    Over(Result<(), SwitchError>),
}

impl Switching {
    /// When it is called off.
    pub(super) fn deadline(&self) -> Option<u64> {
        if let Switching::Draining { until, .. } = self { Some(*until) } else { None }
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
        let opener = Opener::clone(self.opener.as_ref().ok_or(SwitchError::OnlyOne)?);
        let name = wanted.name.unwrap_or(opener.name);
        let mode = wanted.submit.unwrap_or(self.queue.mode());
        let refused = |error: io::Error| Err(error.into());
        let job = Job::start("engine", self.wake(), refused, move |blocking| {
            let submission = Submission::start(blocking, opener.open(blocking, name)?, mode)?;
            opener.lock_memory(blocking);
            Ok((name, mode, submission.into()))
        });
        self.switching = Some(Switching::Opening(job));
        Ok(())
    }

    /// The new engine is being opened, or the old one ended, with the image's files.
    pub(super) fn changing_engine(&self) -> Option<(&'static str, u64)> {
        match &self.switching {
            Some(Switching::Opening(job)) => Some(job.under_way()),
            Some(Switching::Ending(job, _)) => Some(job.under_way()),
            _ => None,
        }
    }

    /// Whether a change is under way.
    pub(super) fn is_switching(&self) -> bool {
        matches!(self.switching, Some(Switching::Opening(_) | Switching::Draining { .. } | Switching::Ending(..)))
    }

    /// How the last change ended. None: it is under way.
    pub fn switched(&mut self) -> Option<Result<(), SwitchError>> {
        match self.switching.take_if(|switching| matches!(switching, Switching::Over(_)))? {
            Switching::Over(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// Goes on with a change, and says whether there was something to do.
    pub(super) fn advance_switch(&mut self) -> bool {
        if self.switching.is_none() {
            return false;
        }
        let opened = self.take_opened_engine();
        match self.switching.take() {
            Some(Switching::Draining { name, mode, next, .. }) if self.queue.is_drained() => {
                info!(self.log, "engine changed"; "engine" => next.engine().name, "submit" => ?mode);
                let old = self.queue.switch(next, mode);
                if let Some(opener) = &mut self.opener {
                    opener.name = name;
                }
                self.end_switch(old, Ok(()));
                true
            }
            Some(Switching::Draining { next, until, .. }) if now() >= until => {
                let in_flight = self.queue.in_flight();
                warn!(self.log, "engine not changed: I/O in flight does not finish"; "in_flight" => in_flight);
                self.end_switch(next, Err(SwitchError::Stuck(in_flight)));
                true
            }
            Some(Switching::Ending(job, outcome)) if job.outcome().is_some() => {
                self.switching = Some(Switching::Over(outcome));
                true
            }
            other => {
                self.switching = other;
                opened
            }
        }
    }

    /// Begins to drain the queue if the new engine is open. True: it is, or can't be opened.
    fn take_opened_engine(&mut self) -> bool {
        let Some(Switching::Opening(job)) = &self.switching else { return false };
        let Some(outcome) = job.outcome() else { return false };
        self.switching = Some(match outcome {
            Err(error) => Switching::Over(Err(error)),
            Ok((name, mode, next)) => {
                self.queue.plug();
                Switching::Draining { name, mode, next, until: now() + PATIENCE.as_nanos() as u64 }
            }
        });
        true
    }

    /// Goes on, and has the engine ended that is not needed any more.
    fn end_switch(&mut self, engine: Apart<Submission>, outcome: Result<(), SwitchError>) {
        self.queue.unplug(&self.slots);
        let end = move |blocking: &Blocking| engine.take(blocking).close(blocking);
        self.switching = Some(Switching::Ending(Job::insist("engine", self.wake(), end), outcome));
    }

    /// Sets how many threads the engine's pool has at least and at most; what is not given stays.
    pub fn set_threads(&mut self, min: Option<u32>, max: Option<u32>) -> Result<(), SwitchError> {
        let pool = self.queue.engine().submit.capability::<Pool>().ok_or(SwitchError::OnlyOne)?;
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
            pool: engine.submit.capability().map(Pool::report),
        }
    }
}
