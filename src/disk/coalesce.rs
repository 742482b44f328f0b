//! Coalesce while the disk is in use: an image of the chain is merged into the one below it, and then left out.
//!
//! What is merged is hidden by the image that it comes from, so a thread of its own does that with the files alone, and requests go on
//! as before. Then the disk is paused for a moment: the image above gets another parent, and the chain is opened again.
//! A crash at any time leaves the chain as it was, or as it is to be; a merge that was interrupted is begun again.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use drivers::vhd::{FOOTER_SIZE, Source, relink};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use slog::{error, info};

use super::pause::PauseError;
use super::{Disk, State};
use crate::blocking::Blocking;
use crate::chain;
use crate::config::Member;
use crate::image::{self, rights_of};
use crate::job::Job;
use crate::store::{Identity, Stores, check_place};
use crate::sys::file::file_id;
use crate::vhd::file::{ImageFile, Medium, write_pieces};
use crate::vhd::merge::merge;
use crate::vhd::parent::new_parent;

/// How long the thread sleeps at a time, so that it can be told to stop.
const NAP: Duration = Duration::from_millis(100);

/// Why nothing is coalesced.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CoalesceError {
    /// One at a time.
    #[error("it is coalescing already: tap-ctl coalesce --cancel ends that")]
    Busy,
    /// It has no chain now.
    #[error("it is paused or being closed")]
    NotRunning,
    /// The chain is too short, or the image is not within it.
    #[error("{0}")]
    Chain(String),
    /// Another member of the control socket's group has named the disk's image, and may have changed its files' names.
    #[error("its image was named by user {0}: only that user and root may have it merged")]
    Named(u32),
    /// Somebody else would see another parent than before.
    #[error("{}: another process uses it, and would find other data in it", .0.display())]
    Shared(PathBuf),
    /// It is not for the member who asks.
    #[error("{0}")]
    Image(Arc<image::Error>),
    /// It was paused or closed meanwhile.
    #[error("it was paused or closed, or that cancelled, before it began")]
    CutShort,
    /// The system says no.
    #[error("cannot start a thread: {0}")]
    Thread(Arc<io::Error>),
}

impl CoalesceError {
    /// As a client is told.
    pub fn errno(&self) -> Errno {
        match self {
            CoalesceError::Busy | CoalesceError::NotRunning | CoalesceError::CutShort | CoalesceError::Shared(_) => {
                Errno::EBUSY
            }
            CoalesceError::Chain(_) => Errno::EINVAL,
            CoalesceError::Image(error) => error.errno(),
            CoalesceError::Named(_) => Errno::EACCES,
            CoalesceError::Thread(error) => error.raw_os_error().map_or(Errno::EAGAIN, crate::sys::errno),
        }
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Nothing was coalesced.
    #[default]
    None,
    /// Data is merged.
    Merging,
    /// All of it is, and the image is about to be left out.
    Relinking,
    /// It was left out.
    Done,
    /// It was not, and the chain is as before.
    Failed,
}

/// What is shown of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct CoalesceReport {
    /// How far it is.
    pub stage: Stage,
    /// The image that is merged.
    pub image: String,
    /// What it is merged into.
    pub parent: String,
    /// Per cent.
    pub percent: u64,
    /// Bytes that were merged.
    pub bytes: u64,
    /// Why it failed.
    pub error: Option<String>,
}

/// What the thread that merges and the main loop tell each other.
struct Shared {
    cancel: AtomicBool,
    /// Bytes a second; 0: as fast as can be.
    rate: u64,
    percent: AtomicU64,
    bytes: AtomicU64,
}

/// Whether what was wanted can be: the images that are merged, and into which.
pub(super) struct Checking {
    job: Job<Result<(PathBuf, PathBuf), CoalesceError>>,
    rate: u64,
    by: Option<Arc<Member>>,
    cancelled: bool,
}

/// One that is under way, or the last one. If this is dropped, a merge ends soon, and nobody waits for that.
pub(super) struct Coalescing {
    image: PathBuf,
    parent: PathBuf,
    stage: Stage,
    /// The data is being merged; the outcome is in 512-byte sectors.
    merging: Job<Result<u64, String>>,
    /// The merged image is being left out.
    leaving_out: Option<Job<Result<(), String>>>,
    /// It is, and the disk about to go on.
    left_out: bool,
    error: Option<String>,
    /// With whose rights the files are opened; none: those of the tapdisk.
    by: Option<Arc<Member>>,
    shared: Arc<Shared>,
}

impl Drop for Coalescing {
    fn drop(&mut self) {
        self.shared.cancel.store(true, Relaxed);
    }
}

impl Shared {
    /// In a thread of its own: merges.
    fn run(&self, image: &Path, parents: &[PathBuf], by: Option<&Member>) -> Result<u64, String> {
        let _rights = rights_of(by, image).map_err(|error| error.to_string())?;
        let mut due = Instant::now();
        let merged = merge(image, parents, &mut |progress| {
            self.percent.store((progress.done * 100.0) as u64, Relaxed);
            self.bytes.fetch_add(progress.data, Relaxed);
            due = self.due(due, Instant::now(), progress.data + progress.bitmaps);
            self.rest(due)
        });
        merged.map_err(|error| error.to_string())
    }

    /// When so many bytes more may be done, if those before may be by `due`. What is owed is carried on to the last nanosecond:
    /// many small runs are held back as one large one is. Time that slow I/O took is not made up for later, but for a moment.
    fn due(&self, due: Instant, now: Instant, bytes: u64) -> Instant {
        if self.rate == 0 {
            return now;
        }
        let takes = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate);
        let since = now.checked_sub(NAP).map_or(due, |since| due.max(since));
        since + Duration::from_nanos(takes.try_into().unwrap_or(u64::MAX))
    }

    /// Sleeps until then. An error: it is to stop.
    fn rest(&self, until: Instant) -> io::Result<()> {
        loop {
            if self.cancel.load(Relaxed) {
                return Err(Errno::ECANCELED.into());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(NAP));
        }
    }
}

/// The images of a chain and where they are, the leaf first.
struct Chain {
    paths: Vec<PathBuf>,
    stores: Stores,
    /// Who asks; none: root.
    by: Option<Arc<Member>>,
}

impl Chain {
    /// In a thread of its own: which image is to be merged, by default the one below the leaf, and into which.
    fn choose(&self, blocking: &Blocking, image: Option<&Path>) -> Result<(PathBuf, PathBuf), CoalesceError> {
        let refused = |error| CoalesceError::Image(Arc::new(error));
        let _rights = rights_of(self.by.as_deref(), &self.paths[0]).map_err(refused)?;
        let index = match image {
            None => 1,
            Some(image) => self.index_of(image).ok_or_else(|| {
                let image = image.display();
                CoalesceError::Chain(format!("{image} is none of its images: tap-ctl debug-queue shows them"))
            })?,
        };
        if index == 0 {
            let leaf = self.paths[0].display();
            let text = format!("{leaf} is written: take a snapshot first, and coalesce it then, below that");
            return Err(CoalesceError::Chain(text));
        }
        let (Some(image), Some(parent)) = (self.paths.get(index), self.paths.get(index + 1)) else {
            let text = "there is no image between the one that is written and the one that all is based on";
            return Err(CoalesceError::Chain(text.into()));
        };
        if let Some(store) = self.stores.get(index + 1)
            && store.has_other_readers(blocking).unwrap_or(true)
        {
            return Err(CoalesceError::Shared(parent.clone()));
        }
        // Three are changed: the two, and the one above, which gets another parent.
        for store in self.stores.iter().skip(index - 1).take(3) {
            let Some(file) = store.file() else {
                let text = format!("{} is in memory, where nothing can be merged", store.path().display());
                return Err(CoalesceError::Chain(text));
            };
            check_place(file, store.path(), self.by.as_deref()).map_err(|error| refused(error.into()))?;
        }
        Ok((image.clone(), parent.clone()))
    }

    fn index_of(&self, image: &Path) -> Option<usize> {
        let wanted = Identity::File(file_id(&image.metadata().ok()?));
        self.stores.iter().position(|store| store.identity() == wanted)
    }
}

impl Disk {
    /// Begins to merge an image of the chain, by default the one below the leaf, into the one below it, at most so many bytes
    /// a second; 0: as fast as can be. `by` is the member of the control socket's group who asks; none: root. Whether it does,
    /// [`coalesce_begun`](Self::coalesce_begun) says.
    pub fn coalesce(
        &mut self,
        image: Option<&Path>,
        rate: u64,
        by: Option<&Arc<Member>>,
    ) -> Result<(), CoalesceError> {
        // First: the disk pauses by itself at the end of one.
        let under_way = self.coalescing.as_ref().is_some_and(|coalescing| coalescing.is_under_way());
        if under_way || self.checking.is_some() {
            return Err(CoalesceError::Busy);
        }
        if self.state != State::Running {
            return Err(CoalesceError::NotRunning);
        }
        let by = self.merges_by(by)?;
        let chain = Chain {
            paths: self.stack.images().iter().map(|layer| layer.path.clone()).collect(),
            stores: Arc::clone(&self.stores),
            by: by.clone(),
        };
        let image = image.map(Path::to_owned);
        let refused = |error| Err(CoalesceError::Thread(Arc::new(error)));
        let job = Job::start("chain", self.wake(), refused, move |blocking| chain.choose(blocking, image.as_deref()));
        (self.checking, self.coalesce_begun) = (Some(Checking { job, rate, by, cancelled: false }), Ok(()));
        Ok(())
    }

    /// Whether the last coalesce that was asked for has begun. None: that is not known yet.
    pub fn coalesce_begun(&self) -> Option<Result<(), CoalesceError>> {
        self.checking.is_none().then(|| self.coalesce_begun.clone())
    }

    /// It is being looked at whether a coalesce can begin.
    pub(super) fn checking_chain(&self) -> Option<(&'static str, u64)> {
        self.checking.as_ref().map(|checking| checking.job.under_way())
    }

    /// Begins a coalesce that was looked at, and says whether there was something to do.
    fn advance_checking(&mut self) -> bool {
        let Some(checking) = &self.checking else { return false };
        let Some(outcome) = checking.job.outcome() else { return false };
        let (rate, by, cancelled) = (checking.rate, checking.by.clone(), checking.cancelled);
        self.checking = None;
        self.coalesce_begun = match outcome {
            Ok(_) if cancelled || self.state != State::Running => Err(CoalesceError::CutShort),
            Ok((image, parent)) => {
                self.begin_merge(image, parent, rate, by);
                Ok(())
            }
            Err(error) => Err(error),
        };
        true
    }

    fn begin_merge(&mut self, image: PathBuf, parent: PathBuf, rate: u64, by: Option<Arc<Member>>) {
        let shared = Arc::new(Shared {
            cancel: AtomicBool::new(false),
            rate,
            percent: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        });
        info!(self.log, "coalescing"; "image" => %image.display(), "parent" => %parent.display(), "rate" => rate);
        let (theirs, path, rights) = (Arc::clone(&shared), image.clone(), by.clone());
        let parents = self.reopen.as_ref().map_or_else(Vec::new, |reopen| reopen.config.image.parents.clone());
        let refused = |error: io::Error| Err(format!("cannot start a thread: {error}"));
        let merging =
            Job::start("coalesce", self.wake(), refused, move |_| theirs.run(&path, &parents, rights.as_deref()));
        let (stage, error) = (Stage::Merging, None);
        self.coalescing =
            Some(Coalescing { image, parent, stage, merging, leaving_out: None, left_out: false, error, by, shared });
    }

    /// With whose rights files are merged: the asker's, and where a member has named the image, and with it the names of its parents, those of
    /// that member.
    fn merges_by(&self, asker: Option<&Arc<Member>>) -> Result<Option<Arc<Member>>, CoalesceError> {
        let named = self.reopen.as_ref().and_then(|reopen| reopen.config.image.by.as_ref());
        match (named, asker) {
            (Some(named), Some(asker)) if named.credentials.uid != asker.credentials.uid => {
                Err(CoalesceError::Named(named.credentials.uid))
            }
            (named, asker) => Ok(asker.or(named).cloned()),
        }
    }

    /// Ends a merge that is under way. The chain stays as it is.
    pub fn cancel_coalesce(&mut self) {
        if let Some(checking) = &mut self.checking {
            checking.cancelled = true;
        }
        if let Some(coalescing) = &self.coalescing {
            coalescing.shared.cancel.store(true, Relaxed);
        }
    }

    /// What is to be shown of it.
    pub fn coalesce_report(&self) -> CoalesceReport {
        let Some(coalescing) = &self.coalescing else { return CoalesceReport::default() };
        CoalesceReport {
            stage: coalescing.stage,
            image: coalescing.image.display().to_string(),
            parent: coalescing.parent.display().to_string(),
            percent: coalescing.shared.percent.load(Relaxed),
            bytes: coalescing.shared.bytes.load(Relaxed),
            error: coalescing.error.clone(),
        }
    }

    /// Goes on with what is under way, and says whether there was something to do.
    pub(super) fn advance_coalesce(&mut self) -> bool {
        if self.advance_checking() {
            return true;
        }
        let may_pause = self.state == State::Running && !self.is_switching();
        // Whoever wants it to stay paused does not wait for the end of that.
        let goes_on =
            self.state != State::Paused || matches!(self.resume_outcome(), Some(Err(PauseError::PausedAgain)));
        let Some(coalescing) = &mut self.coalescing else { return false };
        match coalescing.stage {
            Stage::Merging => {
                let Some(outcome) = coalescing.merging.outcome() else { return false };
                match outcome {
                    Ok(sectors) => {
                        info!(self.log, "merged"; "image" => %coalescing.image.display(), "sectors" => sectors);
                        coalescing.stage = Stage::Relinking;
                    }
                    Err(error) => {
                        error!(self.log, "not coalesced: the chain is as before"; "error" => %error);
                        (coalescing.stage, coalescing.error) = (Stage::Failed, Some(error));
                    }
                }
                true
            }
            Stage::Relinking if coalescing.left_out => {
                if goes_on {
                    coalescing.stage = Stage::Done;
                }
                goes_on
            }
            Stage::Relinking if may_pause => {
                self.pauses_for_itself = true;
                self.pause().is_ok()
            }
            Stage::Relinking => match coalescing.leaving_out.as_ref().and_then(Job::outcome) {
                None => false,
                Some(outcome) => {
                    self.merged_left_out(outcome);
                    true
                }
            },
            _ => false,
        }
    }

    /// The disk is paused: begins to leave out the image that was merged, if there is one.
    pub(super) fn leave_out_merged(&mut self) {
        let to_leave_out =
            |coalescing: &&mut Coalescing| coalescing.stage == Stage::Relinking && !coalescing.left_out;
        let Some(coalescing) = self.coalescing.as_mut().filter(to_leave_out) else {
            self.pauses_for_itself = false;
            return;
        };
        let paths: Vec<_> = self.stack.images().iter().map(|layer| layer.path.clone()).collect();
        let (image, wake) = (coalescing.image.clone(), self.queue.engine().submit.event());
        let refused = |error: io::Error| Err(format!("cannot start a thread: {error}"));
        let by = coalescing.by.clone();
        coalescing.leaving_out = Some(Job::start("relink", wake, refused, move |_| {
            let _rights = rights_of(by.as_deref(), &image).map_err(|error| error.to_string())?;
            leave_out(&paths, &image)
        }));
    }

    /// Whether the files of the paused disk are still being changed.
    pub(super) fn is_leaving_out(&self) -> bool {
        self.coalescing.as_ref().is_some_and(|coalescing| coalescing.leaving_out.is_some())
    }

    /// Whether a thread has files of the chain that others must not have meanwhile.
    pub(super) fn changes_files(&self) -> bool {
        self.is_leaving_out() || self.coalescing.as_ref().is_some_and(|coalescing| coalescing.stage == Stage::Merging)
    }

    /// The merged image is left out, or not; goes on, unless somebody wants the disk to stay paused.
    fn merged_left_out(&mut self, outcome: Result<(), String>) {
        let goes_on = std::mem::take(&mut self.pauses_for_itself) && self.state == State::Paused;
        let Some(coalescing) = &mut self.coalescing else { return };
        coalescing.leaving_out = None;
        match outcome {
            Ok(()) => {
                info!(self.log, "coalesced"; "image" => %coalescing.image.display());
                coalescing.left_out = true;
                if !goes_on {
                    coalescing.stage = Stage::Done;
                }
            }
            Err(text) => {
                error!(self.log, "not coalesced: the chain is as before"; "error" => &text);
                (coalescing.stage, coalescing.error) = (Stage::Failed, Some(text));
            }
        }
        if goes_on {
            self.resume_by_itself();
        }
    }
}

impl Coalescing {
    fn is_under_way(&self) -> bool {
        matches!(self.stage, Stage::Merging | Stage::Relinking)
    }
}

/// Gives the image above `merged` the one below as its parent.
fn leave_out(chain: &[PathBuf], merged: &Path) -> Result<(), String> {
    let index = chain.iter().position(|path| path == merged);
    let child = match index {
        Some(index) if index > 0 && index + 1 < chain.len() => &chain[index - 1],
        _ => return Err(format!("{} is not within the chain any more", merged.display())),
    };
    let explain = |error: &dyn std::fmt::Display| error.to_string();
    let layer = chain::layer(merged).map_err(|error| explain(&error))?;
    let below = layer.image.as_ref().map(|image| chain::below(merged, image)).transpose();
    let below = below.map_err(|error| explain(&error))?.flatten();
    let below = below.ok_or_else(|| format!("{} has no parent", merged.display()))?;
    let file = ImageFile::open(child).map_err(|error| explain(&error))?;
    let image = file.image().map_err(|error| explain(&error))?;
    let named = new_parent(child, &below).map_err(|error| explain(&error))?;
    let size = file.size().map_err(|error| format!("{}: cannot see its size: {error}", child.display()))?;
    let device_end = file.is_device().then(|| size.saturating_sub(FOOTER_SIZE as u64));
    let steps = relink(&image, &named, device_end).map_err(|error| format!("{}: {error}", child.display()))?;
    let written = steps.iter().try_for_each(|step| write_pieces(&file, step).and_then(|()| file.sync()));
    let end = steps.last().and_then(|step| step.last()).map_or(0, |last| last.at + FOOTER_SIZE as u64);
    let written = written.and_then(|()| file.set_len(end)).and_then(|()| file.sync());
    written.map_err(|error| format!("{}: {error}", child.display()))
}
