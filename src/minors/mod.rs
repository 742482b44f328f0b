//! The disks of this process, by minor. One is attached, and an image may be opened and closed for it any number of times; the process
//! ends when the last one is detached.

pub mod marker;
mod parent;

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::Arc;

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use slog::{Logger, error, info, o};

use self::marker::{MINOR_MAX, Marker};
use crate::config::{ChangedBlocks, Config, Direct, ImageType, Member};
use crate::control::client;
use crate::disk::{Disk, Turn};
use crate::frontend::DiskInfo;
use crate::image::{self, Image, Opening};
use crate::memory;
use crate::serve;

/// Tokens of a disk: its engine's, and then its frontends'.
const SOURCES: usize = 8;

/// Why something can't be done with a minor.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{text}")]
pub struct MinorError {
    /// As a client is told.
    pub errno: Errno,
    /// What, and what to do.
    pub text: String,
}

impl MinorError {
    /// With that text.
    pub fn new(errno: Errno, text: impl Into<String>) -> MinorError {
        MinorError { errno, text: text.into() }
    }

    /// Nobody has attached it.
    pub fn no_such(minor: u16, errno: Errno) -> MinorError {
        MinorError::new(errno, format!("this tapdisk has no minor {minor}"))
    }
}

impl From<image::Error> for MinorError {
    fn from(error: image::Error) -> MinorError {
        MinorError::new(error.errno(), error.to_string())
    }
}

/// What OPEN says of an image.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its type and path.
    pub image: (ImageType, PathBuf),
    /// The member of the control socket's group who names it; none: root.
    pub by: Option<Arc<Member>>,
    /// What is written is marked in this log.
    pub changed_blocks: Option<ChangedBlocks>,
    /// Writes are refused.
    pub read_only: bool,
    /// It is read and written through the page cache.
    pub buffered: bool,
    /// For how long I/O that fails is tried again, in seconds; none: as configured.
    pub timeout_s: Option<u16>,
    /// The minor, of this process or of another one, whose image has to be its parent.
    pub parent: Option<u16>,
}

/// One that is attached.
pub struct Minor {
    marker: Marker,
    /// Names the disk's sources. None is used twice, so that no event reaches another disk.
    serial: usize,
    disk: Option<Disk>,
    /// What is being opened, and the minor of this process whose image has to be its parent.
    opening: Option<(Opening<MinorError>, Option<u16>)>,
    /// It was paused without an image.
    paused: bool,
    /// How the last OPEN went.
    opened: Result<(), MinorError>,
    /// How the last image's end went. None: there was none.
    closed: Option<Result<(), Errno>>,
    /// It is detached when its disk is closed.
    goes: bool,
}

impl Minor {
    /// Its number.
    pub fn number(&self) -> u16 {
        self.marker.minor()
    }

    /// The disk, if an image is open.
    pub fn disk(&self) -> Option<&Disk> {
        self.disk.as_ref()
    }

    /// Its number and the disk, if an image is open.
    pub fn with_disk(&self) -> Option<(u16, &Disk)> {
        Some((self.number(), self.disk()?))
    }

    /// Whether there was an image, and is none.
    pub fn is_closed(&self) -> bool {
        self.disk.is_none() && self.closed.is_some()
    }

    /// Whether it was paused while there was no image.
    pub fn is_paused_empty(&self) -> bool {
        self.disk.is_none() && self.paused
    }
}

/// All that are attached.
pub struct Minors {
    /// By number.
    list: Vec<Minor>,
    registry: Registry,
    /// The first source of a disk, in the upper half of a token.
    base: usize,
    serials: usize,
    /// Tells the main loop that an image is open.
    wake: Arc<EventFd>,
    /// For what OPEN does not say.
    settings: Arc<Config>,
    /// Something was attached.
    served: bool,
    ending: bool,
    /// An error of a last flush.
    error: Option<Errno>,
    log: Logger,
}

impl Minors {
    /// None. Sources are `base` and up.
    pub fn new(settings: Arc<Config>, registry: Registry, base: usize, log: Logger) -> io::Result<Minors> {
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        registry.register(&mut SourceFd(&wake.as_fd().as_raw_fd()), Token(base << 32), Interest::READABLE)?;
        let (list, base) = (Vec::new(), base + 1);
        Ok(Minors {
            list,
            registry,
            base,
            serials: 0,
            wake,
            settings,
            served: false,
            ending: false,
            error: None,
            log,
        })
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Minor> {
        self.list.iter()
    }

    fn find(&self, minor: u16) -> Result<usize, usize> {
        self.list.binary_search_by_key(&minor, Minor::number)
    }

    fn get_mut(&mut self, minor: u16) -> Option<&mut Minor> {
        self.find(minor).ok().map(|index| &mut self.list[index])
    }

    /// The disk with that minor, if its image is open.
    pub fn disk_mut(&mut self, minor: u16) -> Option<&mut Disk> {
        self.get_mut(minor)?.disk.as_mut()
    }

    /// The disk that serves a guest's device, or has not finished its requests.
    pub fn disk_of_guest(&mut self, domain: u32, device: u32) -> Option<&mut Disk> {
        let mut disks = self.list.iter_mut().filter_map(|minor| minor.disk.as_mut());
        disks.find_map(|disk| disk.has_guest(domain, device).then_some(disk))
    }

    /// Attaches a minor that somebody has allocated. EEXIST: it is attached. ENOENT: nobody has allocated it. EAGAIN: another process
    /// has it.
    pub fn attach(&mut self, minor: u16) -> Result<(), MinorError> {
        let refused = |errno, text: &str| Err(MinorError::new(errno, format!("minor {minor}: {text}")));
        if self.ending {
            return refused(Errno::ESHUTDOWN, "this tapdisk is about to end");
        }
        if self.find(minor).is_ok() {
            return refused(Errno::EEXIST, "it is attached already");
        }
        if minor > MINOR_MAX {
            return refused(Errno::EINVAL, &format!("expected at most {MINOR_MAX}"));
        }
        let directory = &self.settings.control.directory;
        let path = marker::path(directory, minor);
        match Marker::hold(directory, minor) {
            Ok(marker) => self.add(marker, None, false).map_err(|error| of_io(&error, "cannot attach it")),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                refused(Errno::ENOENT, &format!("there is no {}: tap-ctl allocate makes one", path.display()))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                refused(Errno::EAGAIN, &format!("another tapdisk holds {}", path.display()))
            }
            Err(error) => Err(of_io(&error, &path.display().to_string())),
        }
    }

    /// Adds a minor, with a disk or without; if it `goes`, for as long as the disk is open.
    pub fn add(&mut self, marker: Marker, disk: Option<Disk>, goes: bool) -> io::Result<()> {
        let number = marker.minor();
        let mut minor =
            Minor { marker, serial: 0, disk: None, opening: None, paused: false, opened: Ok(()), closed: None, goes };
        if let Some(disk) = disk {
            self.put(&mut minor, disk)?;
        }
        let index = self.find(number).unwrap_or_else(|index| index);
        self.list.insert(index, minor);
        self.served = true;
        Ok(())
    }

    /// Watches a disk's sources and gives it to its minor.
    fn put(&mut self, minor: &mut Minor, mut disk: Disk) -> io::Result<()> {
        let source = self.base + self.serials * SOURCES;
        let event = disk.engine().submit.event().as_fd().as_raw_fd();
        self.registry.register(&mut SourceFd(&event), Token(source << 32), Interest::READABLE)?;
        disk.register(&self.registry, |i| (source + 1 + i) << 32)?;
        (minor.serial, minor.disk) = (self.serials, Some(disk));
        self.serials += 1;
        Ok(())
    }

    /// Begins to open an image; [`open_outcome`](Self::open_outcome) says how it went. EINVAL: it is not attached. EALREADY: an image
    /// is open.
    pub fn open(&mut self, minor: u16, wanted: Wanted) -> Result<(), MinorError> {
        let index = self.find(minor).map_err(|_| MinorError::no_such(minor, Errno::EINVAL))?;
        let refused = |errno, text: &str| Err(MinorError::new(errno, format!("minor {minor}: {text}")));
        if self.list[index].opening.is_some() {
            return refused(Errno::EBUSY, "an image is being opened for it");
        }
        if let Some(disk) = self.list[index].disk() {
            return refused(Errno::EALREADY, &format!("{} is open", disk.info().name));
        }
        let (ours, others) = match wanted.parent {
            Some(parent) => match self.find(parent) {
                Ok(index) if self.list[index].disk.is_some() => (Some(parent), None),
                Ok(_) => return Err(MinorError::no_such(parent, Errno::ENODEV)),
                Err(_) => (None, Some(parent)),
            },
            None => (None, None),
        };
        let config = self.configure(minor, &wanted);
        let log = self.log.new(o!("minor" => minor));
        let directory = self.settings.control.directory.clone();
        let fits = move |image: &Image| others.map_or(Ok(()), |parent| parent::check(image, &directory, parent));
        let opening = Opening::start(config.into(), None, Arc::clone(&self.wake), &log, fits);
        self.list[index].opening = Some((opening, ours));
        Ok(())
    }

    /// Pauses a minor without an image, of which nothing is under way, as blktap does, or ends that. EBUSY: an image is being opened.
    /// EINVAL: it is not paused. None: it has an image, or nobody has attached it.
    pub fn pause_empty(&mut self, minor: u16, paused: bool) -> Option<Result<(), MinorError>> {
        let minor = self.get_mut(minor).filter(|minor| minor.disk.is_none())?;
        let refused = |errno, text| Some(Err(MinorError::new(errno, format!("minor {}: {text}", minor.number()))));
        if minor.opening.is_some() {
            return refused(Errno::EBUSY, "an image is being opened for it");
        }
        if !paused && !minor.paused {
            return refused(Errno::EINVAL, "it is not paused, and has no image");
        }
        minor.paused = paused;
        Some(Ok(()))
    }

    /// The configuration of a disk that OPEN opens.
    fn configure(&self, minor: u16, wanted: &Wanted) -> Config {
        let mut config = (*self.settings).clone();
        let image = &mut config.image;
        (image.kind, image.path) = (wanted.image.0, Some(wanted.image.1.clone()));
        // That is of the configured one: whoever names another one means one that there is.
        image.create = None;
        image.by.clone_from(&wanted.by);
        image.keep_log(wanted.changed_blocks.as_ref());
        image.read_only |= wanted.read_only;
        if wanted.buffered {
            image.direct = Direct::Off;
        }
        if let Some(timeout) = wanted.timeout_s {
            config.retry.limit_s = timeout.into();
        }
        // blktap exports each of its disks so.
        let nbd = config.frontend.nbd.get_or_insert_default();
        let directory = &config.control.directory;
        nbd.socket.get_or_insert_with(|| directory.join("nbd{pid}.{minor}"));
        nbd.old_socket.get_or_insert_with(|| directory.join("nbd-old{pid}.{minor}"));
        serve::place_sockets(&mut config, minor);
        config
    }

    /// How the last OPEN went, if it is over: then its disk is there.
    pub fn open_outcome(&self, minor: u16) -> Option<Result<&DiskInfo, MinorError>> {
        let gone = || MinorError::no_such(minor, Errno::ENODEV);
        let Ok(index) = self.find(minor) else { return Some(Err(gone())) };
        let minor = &self.list[index];
        if minor.opening.is_some() {
            return None;
        }
        let outcome = minor.opened.clone();
        Some(outcome.and_then(|()| minor.disk().map(Disk::info).ok_or_else(gone)))
    }

    /// Puts images to use that have been opened.
    fn advance_opening(&mut self) -> bool {
        let mut worked = false;
        for index in 0..self.list.len() {
            let Some((mut opening, parent)) = self.list[index].opening.take() else { continue };
            let (config, number) = (Arc::clone(&opening.config), self.list[index].number());
            let log = self.log.new(o!("minor" => number));
            let mut frontends = Vec::new();
            let outcome = opening.outcome(|image| {
                parent.map_or(Ok(()), |parent| self.check_parent(image, parent))?;
                frontends = serve::frontends(&config, &image.info, &log).map_err(|error| {
                    MinorError::new(error.downcast_ref().map_or(Errno::EIO, client::errno), error.to_string())
                })?;
                Ok(())
            });
            let Some(outcome) = outcome else {
                self.list[index].opening = Some((opening, parent));
                continue;
            };
            worked = true;
            let disk = outcome.and_then(|image| {
                serve::disk(config, image, frontends, None, &log).map_err(|error| of_io(&error, "cannot serve it"))
            });
            let outcome = disk.and_then(|disk| self.put_in(index, disk));
            if self.settings.memory.lock {
                memory::lock_aside(&log);
            }
            if let Err(error) = &outcome {
                error!(log, "not opened"; "error" => %error);
            }
            self.list[index].opened = outcome;
        }
        worked
    }

    fn put_in(&mut self, index: usize, disk: Disk) -> Result<(), MinorError> {
        let mut minor = self.list.remove(index);
        let done = self.put(&mut minor, disk);
        (minor.closed, minor.paused) = (None, false);
        self.list.insert(index, minor);
        done.map_err(|error| of_io(&error, "cannot watch it"))
    }

    /// Whether the image right below is the one of that minor, of this process.
    fn check_parent(&self, image: &Image, parent: u16) -> Result<(), MinorError> {
        let of_parent = self.find(parent).ok().and_then(|index| self.list[index].disk()).and_then(Disk::identity);
        match image.parent() {
            Some(below) if of_parent == Some(below.identity()) => Ok(()),
            _ => {
                let text = format!("{}: its parent is not the image of minor {parent}", image.info.name);
                Err(MinorError::new(Errno::EINVAL, text))
            }
        }
    }

    /// Begins to close a minor's image, if one is open: finishes what is under way, or with `force` gives up what has not reached the
    /// engine. ENODEV: it is not attached. EBUSY: an image is being opened.
    pub fn close(&mut self, minor: u16, force: bool) -> Result<(), MinorError> {
        let index = self.find(minor).map_err(|_| MinorError::no_such(minor, Errno::ENODEV))?;
        let minor = &mut self.list[index];
        if minor.opening.is_some() {
            let text = format!("minor {}: an image is being opened for it", minor.number());
            return Err(MinorError::new(Errno::EBUSY, text));
        }
        if let Some(disk) = &mut minor.disk {
            // Whoever closes it detaches it too, if there is time for that.
            minor.goes &= self.ending;
            disk.drain();
            if force {
                disk.cancel();
            }
        } else {
            minor.paused = false;
            if minor.closed.is_some() {
                // Whoever closed it was told how that went; whoever repeats it is to get on.
                minor.closed = Some(Ok(()));
            }
        }
        Ok(())
    }

    /// How closing it went, if that is over.
    pub fn close_outcome(&self, minor: u16) -> Option<Result<(), Errno>> {
        match self.find(minor) {
            Ok(index) if self.list[index].disk.is_some() => None,
            Ok(index) => Some(self.list[index].closed.unwrap_or(Ok(()))),
            // It went with its process.
            Err(_) => Some(self.error.map_or(Ok(()), Err)),
        }
    }

    /// Lets go of a minor. ENODEV: it is not attached. EBUSY: its image is open.
    pub fn detach(&mut self, minor: u16) -> Result<(), MinorError> {
        let index = self.find(minor).map_err(|_| MinorError::no_such(minor, Errno::ENODEV))?;
        let busy = match &self.list[index] {
            Minor { disk: Some(disk), .. } => format!("{} is open: tap-ctl close closes it", disk.info().name),
            Minor { opening: Some(_), .. } => "an image is being opened for it".into(),
            _ => {
                self.list.remove(index);
                return Ok(());
            }
        };
        Err(MinorError::new(Errno::EBUSY, format!("minor {minor}: {busy}")))
    }

    /// Closes all images and detaches all minors.
    pub fn end(&mut self) {
        self.ending = true;
        for minor in &mut self.list {
            minor.goes = true;
            if let Some((opening, _)) = &mut minor.opening {
                opening.refuse(MinorError::new(Errno::ESHUTDOWN, "this tapdisk is about to end"));
            }
            if let Some(disk) = &mut minor.disk {
                disk.drain();
            }
        }
        self.remove_gone();
    }

    /// Whether [`end`](Self::end) was called, or the only disk is being closed for good.
    pub fn is_ending(&self) -> bool {
        let goes = |minor: &Minor| minor.goes && minor.disk().is_some_and(Disk::is_draining);
        self.ending || (!self.list.is_empty() && self.list.iter().all(goes))
    }

    /// Gives up what has not reached the engines, and images that are being opened.
    pub fn cancel(&mut self) {
        for minor in &mut self.list {
            minor.opening = None;
            minor.disk.iter_mut().for_each(Disk::cancel);
        }
        self.remove_gone();
    }

    /// Whether the last one is detached, and with which error of a last flush.
    pub fn over(&self) -> Option<Result<(), Errno>> {
        let over = self.list.is_empty() && (self.served || self.ending);
        over.then(|| self.error.map_or(Ok(()), Err))
    }

    /// Everything that can be done without waiting.
    pub fn turn(&mut self) -> Turn {
        let mut turn = Turn::Nothing;
        let mut closed = false;
        for minor in &mut self.list {
            let Some(disk) = &mut minor.disk else { continue };
            turn = turn.max(disk.turn());
            if let Some(result) = disk.closed() {
                match &result {
                    Ok(()) => info!(self.log, "drained and flushed; the end"; "minor" => minor.marker.minor()),
                    Err(errno) => {
                        error!(self.log, "drained, but the last flush failed"; "minor" => minor.marker.minor(),
                            "error" => errno.to_string());
                    }
                }
                (minor.closed, minor.disk, closed) = (Some(result), None, true);
            }
        }
        let opened = self.advance_opening();
        if opened || closed {
            self.remove_gone();
            return turn.max(Turn::Worked);
        }
        turn
    }

    fn remove_gone(&mut self) {
        let gone = |minor: &Minor| minor.goes && minor.disk.is_none() && minor.opening.is_none();
        for minor in self.list.extract_if(.., |minor| gone(minor)) {
            self.error = self.error.or(minor.closed.and_then(Result::err));
        }
    }

    /// An event of a disk's source.
    pub fn event(&mut self, source: usize, index: usize, event: &Event) {
        let Some(source) = source.checked_sub(self.base) else { return };
        let (serial, source) = (source / SOURCES, source % SOURCES);
        let minor = self.list.iter_mut().find(|minor| minor.serial == serial && minor.disk.is_some());
        // The engine's: the next turn reaps.
        if let (Some(disk), Some(frontend)) = (minor.and_then(|minor| minor.disk.as_mut()), source.checked_sub(1)) {
            disk.event(frontend, index, event);
        }
    }

    fn disks(&self) -> impl Iterator<Item = &Disk> {
        self.list.iter().filter_map(Minor::disk)
    }

    /// Whether a turn would find something, as far as memory shows.
    pub fn ready(&self) -> bool {
        self.disks().any(Disk::ready)
    }

    /// When a frontend whose requests memory shows last brought one or got an answer, ns of [`crate::stats::now`].
    pub fn last_in_memory(&self) -> Option<u64> {
        self.disks().filter_map(Disk::last_in_memory).max()
    }

    /// Before the loop sleeps: asks clients to wake it. True: a turn is due.
    pub fn arm(&mut self) -> bool {
        self.list.iter_mut().filter_map(|minor| minor.disk.as_mut()).fold(false, |ready, disk| disk.arm() | ready)
    }

    /// When a turn is due although nothing happens, ns of [`crate::stats::now`].
    pub fn deadline(&self) -> Option<u64> {
        self.disks().filter_map(Disk::deadline).min()
    }
}

fn of_io(error: &io::Error, what: &str) -> MinorError {
    MinorError::new(client::errno(error), format!("{what}: {error}"))
}
