//! Pause and resume: clients stay connected and wait, while their image may become another one. That is how a snapshot is taken
//! of a disk in use: the new image that goes on top has the old one as its parent.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use slog::{error, info, warn};

use super::{Disk, State};
use crate::config::{self, ChangedBlocks, Config, ImageType, Member};
use crate::frontend::DiskInfo;
use crate::image::{self, Image, Opening};
use crate::job::{Apart, Job};
use crate::memory;
use crate::queue::Submission;
use crate::record;
use crate::stack::{Closed, Stack};
use crate::stats::now;
use crate::store::Stores;

/// How long a lease that did not help waits for its next try.
const AGAIN: Duration = Duration::from_secs(1);

/// What follows when nothing is under way any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    Close,
    Pause,
}

/// What is needed to open the image again, or another one.
pub struct Reopen {
    /// The configuration, whose image is the one that is served.
    pub config: Arc<Config>,
    /// How long a pause lasts at most; none: until somebody ends it.
    pub lease: Option<Duration>,
    /// Where it is on record what the disk serves; none: nobody starts it again by a configuration.
    pub record: Option<record::Place>,
}

/// What a disk goes on with that somebody lets go on.
#[derive(Clone, Debug, Default)]
pub struct Resume<'a> {
    /// Another image, by type and path.
    pub image: Option<(ImageType, PathBuf)>,
    /// The member of the control socket's group who says so; none: root.
    pub by: Option<&'a Arc<Member>>,
    /// Its log of changed blocks; none: what is written from then on is in none, as with blktap, whatever was before.
    pub changed_blocks: Option<ChangedBlocks>,
}

/// Why a disk is not paused, or not resumed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PauseError {
    /// There is no time for it.
    #[error("it is being closed")]
    Closing,
    /// It changes its engine.
    #[error("it is changing its engine")]
    Busy,
    /// What was written could not be made durable, or the image not be left whole.
    #[error("it is paused, but what was written last may not be on the disk: {0}")]
    Flush(Errno),
    /// It is too late to call the pause off, and too early to end it.
    #[error("it is being paused, and its image being closed")]
    Pausing,
    /// Nobody has paused it.
    #[error("it is not paused")]
    NotPaused,
    /// The image is its engine.
    #[error("its image is in memory, and there can be no other")]
    OnlyOne,
    /// Nothing of it lasts.
    #[error("its image is in memory, and has no log of changed blocks")]
    NoLog,
    /// A type of image that is not known here.
    #[error("\"{0}\" is no type:path of an image; types are aio and vhd")]
    Name(String),
    /// One at a time.
    #[error("it is being resumed already")]
    Resuming,
    /// A coalesce has not come to its end.
    #[error("the image that was merged is being left out of its chain")]
    LeavingOut,
    /// Somebody was faster.
    #[error("it was paused or closed again")]
    PausedAgain,
    /// The image can't be opened.
    #[error("{0}")]
    Open(String, Errno),
    /// The image is not what the guest has.
    #[error("{0}")]
    Other(String),
}

impl PauseError {
    /// As a client is told.
    pub fn errno(&self) -> Errno {
        match self {
            PauseError::Closing
            | PauseError::Busy
            | PauseError::Pausing
            | PauseError::Resuming
            | PauseError::LeavingOut
            | PauseError::PausedAgain => Errno::EBUSY,
            PauseError::Flush(errno) | PauseError::Open(_, errno) => *errno,
            PauseError::OnlyOne | PauseError::NoLog => Errno::EOPNOTSUPP,
            PauseError::NotPaused | PauseError::Name(_) | PauseError::Other(_) => Errno::EINVAL,
        }
    }
}

impl From<image::Error> for PauseError {
    fn from(error: image::Error) -> PauseError {
        PauseError::Open(error.to_string(), error.errno())
    }
}

/// An image's type and path, of `type:path`.
pub fn parse_name(name: &str) -> Result<(ImageType, PathBuf), PauseError> {
    match name.split_once(':') {
        Some(("aio", path)) if !path.is_empty() => Ok((ImageType::Aio, path.into())),
        Some(("vhd", path)) if !path.is_empty() => Ok((ImageType::Vhd, path.into())),
        _ => Err(PauseError::Name(name.to_owned())),
    }
}

/// An image that is being opened for a disk that is to go on.
pub(super) struct Resuming {
    opening: Opening<PauseError>,
    /// Nobody has asked for it.
    by_itself: bool,
}

impl Resuming {
    /// It is not wanted, and open: it is being closed.
    pub(super) fn is_closing(&self) -> bool {
        self.opening.is_closing()
    }

    pub(super) fn under_way(&self) -> (&'static str, u64) {
        self.opening.under_way()
    }
}

impl Disk {
    /// Begins to pause: pulls nothing more, finishes what was pulled, makes it durable, and lets go of the image. Whether that is
    /// over, [`pause_outcome`](Self::pause_outcome) says.
    pub fn pause_for_client(&mut self) -> Result<(), PauseError> {
        // If the disk pauses for itself, it stays paused.
        self.pauses_for_itself = false;
        if self.is_paused() {
            // Nor does it try again to go on, where it could not.
            self.begin_lease();
            self.record_pause();
        }
        self.pause()
    }

    /// Begins the time that a pause may last, and says how long that is.
    fn begin_lease(&mut self) -> Option<Duration> {
        let lease = self.reopen.as_ref().and_then(|reopen| reopen.lease);
        self.lease_until = lease.map(|lease| now() + lease.as_nanos() as u64);
        lease
    }

    pub(super) fn pause(&mut self) -> Result<(), PauseError> {
        match self.state {
            State::Paused => {
                self.end_resuming();
                Ok(())
            }
            _ if self.is_switching() => Err(PauseError::Busy),
            State::Running => {
                info!(self.log, "pausing"; "requests" => self.slots.used());
                (self.state, self.after) = (State::Draining, After::Pause);
                Ok(())
            }
            State::Draining | State::Flushing if self.after == After::Pause => Ok(()),
            _ => Err(PauseError::Closing),
        }
    }

    /// How the pause began, if it has.
    pub fn pause_outcome(&self) -> Option<Result<(), PauseError>> {
        match (self.state, self.after) {
            (State::Paused, _) if self.resuming.is_some() || self.is_leaving_out() || self.recording.is_some() => {
                None
            }
            (State::Paused, _) => Some(self.flush_error.map_or(Ok(()), |errno| Err(PauseError::Flush(errno)))),
            (State::Draining | State::Flushing, After::Pause) => None,
            (State::Running, _) => Some(Err(PauseError::NotPaused)),
            _ => Some(Err(PauseError::Closing)),
        }
    }

    /// Whether it is paused.
    pub fn is_paused(&self) -> bool {
        self.state == State::Paused
    }

    /// Whether it will be.
    pub fn is_pausing(&self) -> bool {
        self.after == After::Pause && matches!(self.state, State::Draining | State::Flushing)
    }

    /// What was written is durable: leaves the image whole and closes it, by a job. One without a file stays as it is in a pause.
    pub(super) fn close_image(&mut self) {
        let finish = self.stack.close();
        if self.after == After::Pause && self.opener.is_none() {
            debug_assert!(finish.is_none(), "who has something to write has a file");
            return self.image_closed(&Closed::default());
        }
        if let (Some(opener), Some(reopen)) = (&self.opener, &mut self.reopen) {
            let config = Arc::make_mut(&mut reopen.config);
            opener.keep_in(config);
            // The next one starts a thread for it, if it takes one.
            config.engine.submit = self.queue.mode();
        }
        // Files that nobody has open can be taken apart by whoever paused the disk.
        let submission = self.exchange(self.queue.submission().idle().into());
        let (opener, stores) = (self.opener.take(), std::mem::replace(&mut self.stores, no_stores()));
        self.closing = Some(Job::insist("close", self.wake(), move |blocking| {
            let finished = finish.map_or_else(Closed::default, |finish| finish(blocking));
            image::close_files(blocking, submission, opener, stores);
            finished
        }));
    }

    /// Nothing is under way any more, and the image is closed.
    pub(super) fn paused(&mut self) {
        self.state = State::Paused;
        let lease = self.begin_lease();
        self.record_pause();
        info!(self.log, "paused"; "image" => &self.info.name, "lease_s" => lease.map_or(0, |lease| lease.as_secs()));
        self.leave_out_merged();
    }

    fn exchange(&mut self, submission: Apart<Submission>) -> Apart<Submission> {
        self.queue.plug();
        let old = self.queue.switch(submission, self.queue.mode());
        self.queue.unplug(&self.slots);
        old
    }

    /// Begins to go on, with what is wanted. Whether it does, [`resume_outcome`](Self::resume_outcome) says; on an error the disk stays
    /// paused.
    pub fn resume(&mut self, wanted: Resume<'_>) -> Result<(), PauseError> {
        let Resume { image, by, changed_blocks } = wanted;
        // A log that it has not yet takes that the image is opened again.
        let same_log = changed_blocks.as_ref().is_none_or(|log| self.keeps_log(log));
        match self.state {
            State::Paused => self.may_open_again()?,
            // The pause has not begun, and does not. A flush for it may be under way, whose end is of no account. All stays as it was, the
            // log too.
            State::Draining | State::Flushing
                if self.after == After::Pause && self.closing.is_none() && image.is_none() && same_log =>
            {
                (self.state, self.after, self.resumed) = (State::Running, After::Close, Ok(()));
                return Ok(());
            }
            State::Flushing if self.after == After::Pause => return Err(PauseError::Pausing),
            State::Draining if self.after == After::Pause && !same_log => return Err(PauseError::Pausing),
            _ => return Err(PauseError::NotPaused),
        }
        match self.configured() {
            Some(mut config) => {
                config.image.keep_log(changed_blocks.as_ref());
                // What others have named goes on with their rights, whoever asks.
                let mut taken_from = None;
                if let Some((kind, path)) = image {
                    taken_from = by
                        .filter(|_| config.image.by.as_ref() != by)
                        .map(|by| (config.image.clone(), Arc::clone(by)));
                    (config.image.kind, config.image.path, config.image.by) = (kind, Some(path), by.cloned());
                }
                self.open_again(config, taken_from, false);
            }
            None if image.is_some() => return Err(PauseError::OnlyOne),
            None if changed_blocks.is_some() => return Err(PauseError::NoLog),
            None => self.go_on(),
        }
        Ok(())
    }

    /// Whether nothing is in the way of a paused disk that is to go on.
    fn may_open_again(&self) -> Result<(), PauseError> {
        if self.resuming.is_some() || self.is_recording_resume() {
            return Err(PauseError::Resuming);
        }
        if self.is_leaving_out() { Err(PauseError::LeavingOut) } else { Ok(()) }
    }

    fn keeps_log(&self, named: &ChangedBlocks) -> bool {
        let image = self.reopen.as_ref().map(|reopen| &reopen.config.image);
        image.is_some_and(|image| {
            image.changed_blocks.as_ref() == Some(&named.path) && image.changed_blocks_by == named.by
        })
    }

    /// What is to be opened when the disk goes on with all that it had. None: it has no file.
    fn configured(&self) -> Option<Config> {
        let reopen = self.reopen.as_ref().filter(|reopen| reopen.config.image.path.is_some())?;
        let mut config = (*reopen.config).clone();
        // One that is not there any more must not become an empty one.
        config.image.create = None;
        Some(config)
    }

    /// Begins to open an image for the paused disk. `taken_from` is the one before, if a member has named another.
    fn open_again(&mut self, config: Config, taken_from: Option<(config::Image, Arc<Member>)>, by_itself: bool) {
        // A guest's data goes to a member's image only if the member could have had it from the one before.
        let fits = move |_: &Image| match taken_from {
            Some((before, by)) => image::could_open(&before, &by),
            None => Ok(()),
        };
        let event = Arc::clone(self.queue.engine().submit.event());
        let opening = Opening::start(config.into(), Some(Arc::clone(&event)), event, &self.log, fits);
        self.resuming = Some(Resuming { opening, by_itself });
    }

    /// How the last attempt to go on went, if it is over.
    pub fn resume_outcome(&self) -> Option<Result<(), PauseError>> {
        (self.resuming.is_none() && !self.is_recording_resume()).then(|| self.resumed.clone())
    }

    /// Goes on without being asked. If it can't, it tries again, until somebody pauses the disk.
    pub(super) fn resume_by_itself(&mut self) {
        match (self.may_open_again(), self.configured()) {
            // With its log, too: nobody has said otherwise.
            (Ok(()), Some(config)) => self.open_again(config, None, true),
            (Ok(()), None) => self.go_on(),
            (Err(error), _) => self.try_again_soon(&error),
        }
    }

    fn try_again_soon(&mut self, error: &PauseError) {
        error!(self.log, "the disk cannot be resumed, and stays paused: it is tried again"; "error" => %error);
        self.lease_until = Some(now() + AGAIN.as_nanos() as u64);
    }

    /// What is being opened is not wanted any more.
    pub(super) fn end_resuming(&mut self) {
        if let Some(resuming) = &mut self.resuming {
            resuming.opening.refuse(PauseError::PausedAgain);
        }
        self.refuse_recorded();
    }

    /// Goes on if the image is open, and says whether there was something to do.
    pub(super) fn advance_resume(&mut self) -> bool {
        if self.recording.is_some() {
            return false;
        }
        let Some(resuming) = &mut self.resuming else { return false };
        let outcome = resuming.opening.outcome(|image| fits(&self.info, &image.info));
        let Some(outcome) = outcome else { return false };
        let (config, by_itself) = (Arc::clone(&resuming.opening.config), resuming.by_itself);
        self.resuming = None;
        if let Err(error) = outcome.and_then(|image| self.record_resume(image, config, by_itself)) {
            self.not_resumed(error, by_itself);
        }
        true
    }

    pub(super) fn not_resumed(&mut self, error: PauseError, by_itself: bool) {
        if by_itself && self.state == State::Paused && !matches!(error, PauseError::PausedAgain) {
            self.try_again_soon(&error);
        }
        self.resumed = Err(error);
    }

    /// It begins paused, as it was when its last process ended: its image is anybody's.
    pub fn start_paused(&mut self) {
        (self.state, self.after) = (State::Paused, After::Pause);
        let lease = self.begin_lease();
        info!(self.log, "begins paused, as it was when its last process ended"; "image" => &self.info.name,
            "lease_s" => lease.map_or(0, |lease| lease.as_secs()));
    }

    pub(super) fn go_on(&mut self) {
        (self.state, self.after, self.lease_until, self.resumed) = (State::Running, After::Close, None, Ok(()));
        // The guest has not been told.
        self.owed_error = self.flush_error.take().or(self.owed_error);
        info!(self.log, "resumed"; "image" => &self.info.name);
    }

    /// Puts an image in the place of the one that was closed.
    pub(super) fn put_on(&mut self, image: Image, config: Arc<Config>) -> Result<(), PauseError> {
        let mut stack = Stack::new(image.layers, self.slots.count()).map_err(io_error)?;
        let config = self.keep_throttle(&mut stack, config);
        // The one that had nothing to do meanwhile.
        drop(self.exchange(image.submission));
        let grown = image.info.size != self.info.size;
        let old = std::mem::replace(&mut self.stack, stack);
        self.failed_flush_is_logged = false;
        self.count_files(Some(&old));
        (self.opener, self.stores, self.info) = (image.opener, image.stores, image.info);
        if config.memory.lock {
            memory::lock_aside(&self.log);
        }
        if let Some(reopen) = &mut self.reopen {
            reopen.config = config;
        }
        if grown {
            self.frontends.iter_mut().for_each(|frontend| frontend.resized(&self.info));
        }
        Ok(())
    }

    /// Whoever paused the disk has not come back in time: it goes on with the image that it had.
    pub(super) fn end_lease(&mut self, now: u64) -> bool {
        let busy = self.resuming.is_some() || self.recording.is_some();
        if self.state != State::Paused || busy || self.lease_until.is_none_or(|until| now < until) {
            return false;
        }
        warn!(self.log, "nobody has resumed the disk in time: it goes on with its old image");
        self.resume_by_itself();
        true
    }
}

/// Of a disk that has no image open.
fn no_stores() -> Apart<Stores> {
    Apart::from(Arc::from([]))
}

/// Whether an image can take the place of the one that the guest has.
fn fits(old: &DiskInfo, new: &DiskInfo) -> Result<(), PauseError> {
    if new.size < old.size {
        let text = format!("{} has {} bytes, and a disk in use cannot shrink from {}", new.name, new.size, old.size);
        return Err(PauseError::Other(text));
    }
    if new.sector_size != old.sector_size {
        let (new, old) = (new.sector_size, old.sector_size);
        return Err(PauseError::Other(format!("its sectors have {new} bytes, and the guest's {old}")));
    }
    Ok(())
}

pub(super) fn io_error(error: std::io::Error) -> PauseError {
    PauseError::Open(error.to_string(), crate::sys::errno_of(&error))
}
