//! Keeps the [record](crate::record) of what the disk serves, by jobs: when it is paused, and before it goes on.

use std::io;
use std::sync::Arc;

use slog::error;

use super::pause::PauseError;
use super::{Disk, State};
use crate::config::Config;
use crate::frontend::DiskInfo;
use crate::image::Image;
use crate::job::Job;

/// What is being recorded.
pub(super) enum Recording {
    /// That the disk is paused.
    Pause(Job<io::Result<()>>),
    /// That it goes on, with this image, as soon as that is on record.
    Resume {
        job: Job<io::Result<()>>,
        next: Box<(Image, Arc<Config>)>,
        /// Nobody has asked for it.
        by_itself: bool,
        /// It is not wanted any more.
        refused: bool,
    },
    /// An image that was not wanted is being closed.
    Close(Job<()>),
}

impl Recording {
    pub(super) fn under_way(&self) -> (&'static str, u64) {
        match self {
            Recording::Pause(job) | Recording::Resume { job, .. } => job.under_way(),
            Recording::Close(job) => job.under_way(),
        }
    }
}

impl Disk {
    fn start_recording(&self, config: &Config, info: &DiskInfo, paused: bool) -> Option<Job<io::Result<()>>> {
        let place = self.reopen.as_ref()?.record.clone()?;
        let (image, info) = (config.image.clone(), info.clone());
        image.path.as_ref()?;
        Some(Job::start("record", self.wake(), Err, move |_| place.save(&image, &info, paused)))
    }

    /// Records that the disk is paused, by somebody who has to end that.
    pub(super) fn record_pause(&mut self) {
        if self.pauses_for_itself || self.recording.is_some() {
            return;
        }
        let config = self.reopen.as_ref().map(|reopen| Arc::clone(&reopen.config));
        let job = config.and_then(|config| self.start_recording(&config, &self.info, true));
        self.recording = job.map(Recording::Pause);
    }

    /// Goes on with an image when that is on record; at once where there is none.
    pub(super) fn record_resume(
        &mut self,
        image: Image,
        config: Arc<Config>,
        by_itself: bool,
    ) -> Result<(), PauseError> {
        match self.start_recording(&config, &image.info, false) {
            Some(job) => {
                self.recording =
                    Some(Recording::Resume { job, next: Box::new((image, config)), by_itself, refused: false });
                Ok(())
            }
            None => self.put_on(image, config).map(|()| self.go_on()),
        }
    }

    /// An image that is being recorded is not wanted any more.
    pub(super) fn refuse_recorded(&mut self) {
        if let Some(Recording::Resume { refused, .. }) = &mut self.recording {
            *refused = true;
        }
    }

    /// Nobody waits any more for what is being recorded, which may be on storage that hangs; but for an image that is being closed.
    pub(super) fn cancel_recording(&mut self) {
        match self.recording.take() {
            Some(Recording::Resume { next, .. }) => self.close_unwanted(next.0),
            Some(Recording::Close(job)) => self.recording = Some(Recording::Close(job)),
            Some(Recording::Pause(_)) | None => {}
        }
    }

    /// Closes an image that is not wanted.
    fn close_unwanted(&mut self, image: Image) {
        let job = Job::insist("close", self.wake(), move |blocking| image.close(blocking));
        self.recording = Some(Recording::Close(job));
    }

    /// Whether something about an end of the pause is under way.
    pub(super) fn is_recording_resume(&self) -> bool {
        matches!(self.recording, Some(Recording::Resume { .. } | Recording::Close(_)))
    }

    /// Goes on when something is on record, and says whether there was something to do.
    pub(super) fn advance_recording(&mut self) -> bool {
        let over = match &self.recording {
            Some(Recording::Pause(job)) => job.outcome(),
            Some(Recording::Resume { job, .. }) => job.outcome(),
            Some(Recording::Close(job)) => job.outcome().map(Ok),
            None => None,
        };
        let Some(outcome) = over else { return false };
        match self.recording.take() {
            Some(Recording::Resume { next, by_itself, refused, .. }) => {
                self.recorded(*next, by_itself, refused || self.state != State::Paused, outcome);
            }
            Some(Recording::Close(_)) if self.state == State::Paused => self.record_pause(),
            _ => {
                if let Err(error) = outcome {
                    self.log_unrecorded(&error);
                }
            }
        }
        true
    }

    fn recorded(
        &mut self,
        (image, config): (Image, Arc<Config>),
        by_itself: bool,
        refused: bool,
        outcome: io::Result<()>,
    ) {
        // Without a record, only another image or log is dangerous: a start would serve the one before, and mark writes in the other.
        let is_other = |now: &Config| {
            now.image.path != config.image.path || now.image.changed_blocks != config.image.changed_blocks
        };
        let other = self.reopen.as_ref().is_some_and(|reopen| is_other(&reopen.config));
        let refusal = match outcome {
            _ if refused => Some(PauseError::PausedAgain),
            Err(error) if other => Some(super::pause::io_error(error)),
            Err(error) => {
                self.log_unrecorded(&error);
                None
            }
            Ok(()) => None,
        };
        let done = match refusal {
            None => self.put_on(image, config).map(|()| self.go_on()),
            Some(why) => {
                self.close_unwanted(image);
                Err(why)
            }
        };
        if let Err(error) = done {
            self.not_resumed(error, by_itself);
            if self.recording.is_none() && self.state == State::Paused {
                self.record_pause();
            }
        }
    }

    fn log_unrecorded(&self, error: &io::Error) {
        error!(self.log, "what the disk serves is not on record: if its process ends, a start goes by its configuration alone";
            "error" => %error);
    }
}
