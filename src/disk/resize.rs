//! The image's file has grown: the disk takes on its size while it is in use.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use slog::info;

use super::{Disk, State};
use crate::job::Job;
use crate::sys;

/// Why a disk does not take on its file's new size.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ResizeError {
    /// Its image is no file.
    #[error("it has no file that could grow")]
    NoFile,
    /// Its image is closed.
    #[error("it is paused, and takes on its image's size when it goes on")]
    Paused,
    /// The system says no.
    #[error("cannot see its size: {0}")]
    Io(Arc<io::Error>),
    /// There is no time for it.
    #[error("it is being closed")]
    Closed,
    /// A file of it does not go with that size.
    #[error("{}: {error}", path.display())]
    Format {
        /// Which.
        path: PathBuf,
        /// Why.
        error: Arc<drivers::OpenError>,
    },
}

impl ResizeError {
    /// As a client is told.
    pub fn errno(&self) -> Errno {
        match self {
            ResizeError::NoFile => Errno::EOPNOTSUPP,
            ResizeError::Paused | ResizeError::Closed => Errno::EBUSY,
            ResizeError::Io(error) => sys::errno_of(error),
            ResizeError::Format { .. } => Errno::EINVAL,
        }
    }
}

/// The file's size is being asked for, or how that ended: the disk's size before and now, in bytes.
pub(super) enum Resizing {
    Asking {
        job: Job<io::Result<u64>>,
        /// Somebody asked after the job began: it may have seen the old size.
        again: bool,
    },
    Over(Result<(u64, u64), ResizeError>),
}

impl Disk {
    /// Begins to look whether the image's file has grown. If so, the disk takes requests for all of it from then on, and tells the
    /// frontends. How that ends, [`resized`](Self::resized) tells.
    pub fn resize(&mut self) -> Result<(), ResizeError> {
        if self.is_paused() || self.is_pausing() {
            return Err(ResizeError::Paused);
        }
        if self.state != State::Running {
            return Err(ResizeError::Closed);
        }
        // One in memory is its engine, and has the size that it was made with.
        if self.opener.is_none() || self.stores.is_empty() {
            return Err(ResizeError::NoFile);
        }
        match &mut self.resizing {
            Some(Resizing::Asking { again, .. }) => *again = true,
            _ => self.ask_for_size(),
        }
        Ok(())
    }

    fn ask_for_size(&mut self) {
        let stores = Arc::clone(&self.stores);
        let job = Job::start("resize", self.wake(), Err, move |blocking| stores[0].size_now(blocking));
        self.resizing = Some(Resizing::Asking { job, again: false });
    }

    /// The disk's size before and now, in bytes, as the last look found it. None: it is under way.
    pub fn resized(&self) -> Option<Result<(u64, u64), ResizeError>> {
        match &self.resizing {
            Some(Resizing::Asking { .. }) => None,
            Some(Resizing::Over(outcome)) => Some(outcome.clone()),
            None => Some(Err(ResizeError::NoFile)),
        }
    }

    /// The size of one of the image's files is being asked for.
    pub(super) fn asking_for_size(&self) -> Option<(&'static str, u64)> {
        if let Some(Resizing::Asking { job, .. }) = &self.resizing { Some(job.under_way()) } else { None }
    }

    /// Takes on the size that was found, and says whether there was something to do.
    pub(super) fn advance_resize(&mut self) -> bool {
        let Some(Resizing::Asking { job, again }) = &self.resizing else { return false };
        let Some(outcome) = job.outcome() else { return false };
        if *again {
            self.ask_for_size();
            return true;
        }
        let outcome = outcome.map_err(|error| ResizeError::Io(Arc::new(error)));
        let outcome = outcome.and_then(|file_size| self.take_on(file_size));
        self.resizing = Some(Resizing::Over(outcome));
        true
    }

    fn take_on(&mut self, file_size: u64) -> Result<(u64, u64), ResizeError> {
        let refused =
            |(path, error): (&Path, _)| ResizeError::Format { path: path.to_owned(), error: Arc::new(error) };
        let new = self.stack.file_grown(file_size).map_err(refused)?;
        let old = std::mem::replace(&mut self.info.size, new);
        if new != old {
            info!(self.log, "the disk has grown"; "from" => old, "to" => new, "file" => file_size);
            self.frontends.iter_mut().for_each(|frontend| frontend.resized(&self.info));
        }
        Ok((old, new))
    }
}
