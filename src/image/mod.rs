//! Opens an image: file, lock, geometry, format, engine.

mod file;
mod filters;
mod opening;
mod vhd;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use drivers::Raw;
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use slog::{Logger, info, warn};

use self::file::Opened;
pub use self::file::{Lock, check_place, lock, open_to_write};
pub use self::opening::Opening;
use crate::blocking::Blocking;
use crate::chain;
use crate::config::{self, Config, ImageType, Member, OddSize, Size};
use crate::engine::{self, Engine, Opener};
use crate::frontend::DiskInfo;
use crate::job::Apart;
use crate::queue::Submission;
use crate::stack::HostLayer;
use crate::store::Means;
use crate::sys;
use crate::sys::credentials::Guard;
use crate::sys::file::{Backing, FileIdentity, file_id};
use crate::sys::io::FileId;

/// Why an image can't be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system says no.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Another process serves or uses it.
    #[error("{}: in use by {holder}; two writers would destroy the image", path.display())]
    Locked {
        /// The image.
        path: PathBuf,
        /// The process, as far as it can be known.
        holder: String,
    },
    /// A member of `control.group` has named it, and may not.
    #[error(
        "{}: members of control.group may name images only in the folders of control.folders, or below, and not by a link out of those{}",
        path.display(), if *none { "; none is configured" } else { "" }
    )]
    Outside {
        /// The image.
        path: PathBuf,
        /// There are no such folders.
        none: bool,
    },
    /// A member of `control.group` is to have it, and this process can't open it as that user.
    #[error("{}: cannot open it with the rights of user {uid}, who is a member of control.group: {source}; that takes a tapdisk with CAP_SETUID and CAP_SETGID", path.display())]
    Rights {
        /// The image.
        path: PathBuf,
        /// The user.
        uid: u32,
        /// Why not.
        source: io::Error,
    },
    /// It is a device that can't be written.
    #[error("{}: the device is read-only: open it so (image.read_only, tap-ctl open -R), or make it writable (blockdev --setrw)", path.display())]
    ReadOnly {
        /// The image.
        path: PathBuf,
    },
    /// Its content does not fit.
    #[error("{}: {source}", path.display())]
    Format {
        /// The image.
        path: PathBuf,
        /// Why.
        source: drivers::OpenError,
    },
    /// A log of changed blocks does not fit its disk.
    #[error("{}: {source}", path.display())]
    ChangedBlocks {
        /// The log.
        path: PathBuf,
        /// Why.
        source: drivers::changed_blocks::Unfit,
    },
    /// It or what it is based on is no good.
    #[error(transparent)]
    Chain(#[from] chain::Error),
    /// Its parent is to be the image of a minor that is not to be found.
    #[error("{}: its parent is to be the image of minor {minor}, and that can't be found: {source}", path.display())]
    NoMinor {
        /// The image.
        path: PathBuf,
        /// The minor.
        minor: u16,
        /// Why not.
        source: io::Error,
    },
    /// The configuration asks for what the image can't do.
    #[error("{}: {message}", path.display())]
    Unfit {
        /// The image.
        path: PathBuf,
        /// What, and what to do.
        message: String,
    },
}

impl Error {
    /// As a client is told.
    pub fn errno(&self) -> Errno {
        match self {
            Error::Io { source, .. } | Error::NoMinor { source, .. } => sys::errno_of(source),
            Error::Locked { .. } => Errno::EBUSY,
            Error::ReadOnly { .. } => Errno::EROFS,
            Error::Outside { .. } | Error::Rights { .. } => Errno::EACCES,
            Error::Chain(error) => error.errno(),
            Error::Format { .. } | Error::Unfit { .. } | Error::ChangedBlocks { .. } => Errno::EINVAL,
        }
    }
}

/// An image that is open, and locked for as long as this lives. Nobody has to wait for its end, and where somebody does, there is
/// [`close`](Self::close).
pub struct Image {
    /// What clients are told.
    pub info: DiskInfo,
    /// The formats and their files, the leaf first.
    pub layers: Apart<Vec<HostLayer>>,
    /// The engine, and who submits to it.
    pub submission: Apart<Submission>,
    /// What opens another one; none for an image in memory, which is its engine.
    pub opener: Option<Apart<Opener>>,
    /// The locks of its files, the leaf's first; none for an image without a file.
    pub locks: Apart<Arc<[Lock]>>,
    /// What tells those files from all others ([`file_id`]).
    pub file_ids: Vec<FileIdentity>,
}

impl Image {
    /// One without a file.
    fn in_memory(
        blocking: &Blocking,
        config: &Config,
        info: DiskInfo,
        path: PathBuf,
        engine: io::Result<Engine>,
    ) -> Result<Image, Error> {
        let submission = engine.and_then(|engine| Submission::start(blocking, engine, config.engine.submit));
        let submission =
            submission.map_err(|source| Error::Io { path: path.clone(), action: "get memory for it", source })?;
        let raw = Raw::new(info.size, info.sector_size.into(), drivers::OddSize::Refuse)
            .map_err(|source| Error::Format { path: path.clone(), source })?;
        let layers = vec![HostLayer::new(Box::new(raw), &path, FileId(0), false)];
        Ok(Image {
            info,
            layers: layers.into(),
            submission: submission.into(),
            opener: None,
            locks: Apart::from(Arc::from([])),
            file_ids: Vec::new(),
        })
    }

    /// Leaves it whole, and closes its files. Waits for them.
    pub fn close(self, blocking: &Blocking) {
        drop(self.layers.take(blocking));
        close_files(blocking, self.submission, self.opener, self.locks);
    }
}

/// Ends what reads and writes an image's files, closes them, and lets go of their locks. Waits for them.
pub fn close_files(
    blocking: &Blocking,
    submission: Apart<Submission>,
    opener: Option<Apart<Opener>>,
    locks: Apart<Arc<[Lock]>>,
) {
    submission.take(blocking).close(blocking);
    drop(opener.map(|opener| opener.take(blocking)));
    drop(locks.take(blocking));
}

/// Opens what the configuration says. `event` is that of the engine that it follows, if it does. Waits for files, locks and threads.
pub fn open(blocking: &Blocking, config: &Config, event: Option<Arc<EventFd>>, log: &Logger) -> Result<Image, Error> {
    let image = &config.image;
    let depth = config.engine.depth as usize;
    let path = || image.path.as_deref().unwrap_or(Path::new(""));
    let files = |open: fn(&Config, &Path, &Logger) -> Result<Chain, Error>| {
        let _rights = rights_of(image.by.as_deref(), path())?;
        open(config, path(), log)
    };
    let name = match image.kind {
        ImageType::Aio => return with_engine(blocking, files(open_raw)?, config, event, log),
        ImageType::Vhd => return with_engine(blocking, files(vhd::open)?, config, event, log),
        ImageType::Ram => "ram",
        ImageType::Null => "null",
    };
    let size = image.size.map_or(0, |size| size.0);
    let path = PathBuf::from(name);
    let engine = match image.kind {
        ImageType::Ram => engine::memory::ram(blocking, size, depth),
        _ => engine::memory::null(depth),
    };
    let engine = engine.and_then(|engine| match config.faults.as_slice() {
        [] => Ok(engine),
        faults => engine::fault::wrap(blocking, engine, faults),
    });
    let sector_size = image.sector_size.unwrap_or(512);
    let info = DiskInfo {
        size,
        sector_size,
        physical_sector_size: 4096,
        read_only: image.read_only,
        name: format!("{name}:{}", Size(size)),
    };
    Image::in_memory(blocking, config, info, path, engine)
}

/// This thread opens files with a member's rights, if there is one, as long as the guard lives.
pub fn rights_of(member: Option<&Member>, path: &Path) -> Result<Option<Guard>, Error> {
    let take_on = |member: &Member| {
        let uid = member.credentials.uid;
        member.credentials.take_on().map_err(|source| Error::Rights { path: path.to_owned(), uid, source })
    };
    member.map(take_on).transpose()
}

/// Whether a member may have an image that another one has named: as it is served, and where it is.
pub fn could_open(image: &config::Image, member: &Member) -> Result<(), Error> {
    let path = image.path.as_deref().unwrap_or(Path::new(""));
    let io = |source| Error::Io { path: path.to_owned(), action: "take it from its disk: open it", source };
    let _rights = rights_of(Some(member), path)?;
    sys::file::check_storage(path).map_err(io)?;
    let file = file::options(image.read_only, false).open(path).map_err(io)?;
    check_place(&file, path, Some(member))
}

/// An image that is not open: what a disk has that begins paused, with that many bytes, until somebody ends that.
pub fn closed(blocking: &Blocking, config: &Config, size: u64, sector_size: u32) -> Result<Image, Error> {
    let path = config.image.path.clone().unwrap_or_default();
    let kind = if config.image.kind == ImageType::Vhd { "vhd" } else { "aio" };
    let engine = engine::memory::null(config.engine.depth as usize);
    let info = DiskInfo {
        size,
        sector_size,
        physical_sector_size: sector_size.max(4096),
        read_only: config.image.read_only,
        name: format!("{kind}:{}", path.display()),
    };
    Image::in_memory(blocking, config, info, path, engine)
}

fn open_raw(config: &Config, path: &Path, log: &Logger) -> Result<Chain, Error> {
    let image = &config.image;
    let io = |action| move |source| Error::Io { path: path.to_owned(), action, source };
    if let Some(size) = image.create {
        file::create(path, size).map_err(io("create it"))?;
    }
    let Opened { file, direct, geometry, sector_size, lock } =
        file::open(image, path, image.read_only, image.sector_size, log)?;
    let odd = match image.odd_size {
        OddSize::Refuse => drivers::OddSize::Refuse,
        OddSize::RoundUp => drivers::OddSize::RoundUp,
        OddSize::RoundDown => drivers::OddSize::RoundDown,
    };
    let raw = Raw::new(geometry.size, sector_size.into(), odd)
        .map_err(|source| Error::Format { path: path.to_owned(), source })?;
    let size = drivers::Layer::size(&raw).unwrap_or(0);
    if size != geometry.size {
        warn!(log, "image size is no multiple of the sector and was rounded";
            "image" => %path.display(), "file" => geometry.size, "disk" => size, "sector" => sector_size);
    }
    let files = vec![Backing { file, direct, block_device: geometry.block_device }];
    let info = DiskInfo {
        size,
        sector_size,
        physical_sector_size: geometry.physical.max(sector_size),
        read_only: image.read_only,
        name: format!("aio:{}", path.display()),
    };
    let layer = HostLayer::new(Box::new(raw), path, FileId(0), !direct);
    Ok(Chain { info, layers: vec![layer], files, locks: vec![lock] })
}

/// The files of a disk, the leaf first, without an engine.
struct Chain {
    info: DiskInfo,
    layers: Vec<HostLayer>,
    files: Vec<Backing>,
    locks: Vec<Lock>,
}

fn with_engine(
    blocking: &Blocking,
    mut chain: Chain,
    config: &Config,
    event: Option<Arc<EventFd>>,
    log: &Logger,
) -> Result<Image, Error> {
    let image = chain.layers[0].path.clone();
    filters::add(&config.image, &mut chain)?;
    let Chain { info, mut layers, files, locks } = chain;
    let locks: Arc<[Lock]> = locks.into();
    let written = layers.iter_mut().filter(|layer| !layer.plain.is_empty() && layer.held.is_none());
    written.for_each(|layer| layer.held = Some(Arc::new(Arc::clone(&locks))));
    let image = image.as_path();
    let io = |action| move |source| Error::Io { path: image.to_owned(), action, source };
    let (direct, block_device) = (files[0].direct, files[0].block_device);
    // A filter's file is none that others could be told from the image by.
    let file_ids = files.iter().take(locks.len()).map(|file| Ok(file_id(&file.file.metadata()?)));
    let file_ids = file_ids.collect::<io::Result<_>>().map_err(io("serve it"))?;
    let files = files.into_iter().map(Means::File).collect();
    let opener = Opener::new(files, config, event, log.clone()).map_err(io("start its engine"))?;
    let engine = opener.open(blocking, opener.name).map_err(io("start its engine"))?;
    info!(log, "image open"; "image" => &info.name, "size" => info.size, "sector_size" => info.sector_size,
        "direct" => direct, "block_device" => block_device, "read_only" => info.read_only,
        "layers" => layers.len(), "engine" => engine.name, "depth" => engine.depth);
    let submission = Submission::start(blocking, engine, config.engine.submit).map_err(io("start its engine"))?;
    Ok(Image {
        info,
        layers: layers.into(),
        submission: submission.into(),
        opener: Some(opener.into()),
        locks: locks.into(),
        file_ids,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_drive_is_told_of_as_one() {
        // As open(2) has it for /dev/sr0: storage managers wait for exit code 123.
        let source = io::Error::from_raw_os_error(libc::ENOMEDIUM);
        let error = Error::Io { path: "/dev/sr0".into(), action: "open it", source };
        assert_eq!((error.errno(), error.errno() as i32), (Errno::ENOMEDIUM, 123));
    }
}
