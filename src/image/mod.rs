//! Opens an image: its stores and their locks, its formats, and the engine.

mod filters;
mod opening;
mod vhd;

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use drivers::Raw;
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use slog::{Logger, info, warn};

pub use self::opening::Opening;
use crate::blocking::Blocking;
use crate::chain;
use crate::config::{self, Config, ImageType, Member, OddSize, Size};
use crate::engine::Opener;
use crate::frontend::DiskInfo;
use crate::job::Apart;
use crate::queue::Submission;
use crate::stack::HostLayer;
use crate::store::{self, How, MemoryStore, Ram, Store, Stores, check_place};
use crate::sys;
use crate::sys::credentials::Guard;
use crate::sys::io::FileId;

/// Why an image can't be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its store can't be had.
    #[error(transparent)]
    Store(#[from] store::Error),
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
}

impl Error {
    /// As a client is told.
    pub fn errno(&self) -> Errno {
        match self {
            Error::Store(error) => error.errno(),
            Error::NoMinor { source, .. } => sys::errno_of(source),
            Error::Rights { .. } => Errno::EACCES,
            Error::Chain(error) => error.errno(),
            Error::Format { .. } | Error::ChangedBlocks { .. } => Errno::EINVAL,
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
    /// Where its bytes are, the leaf's first, and with that its locks; none for one that is closed.
    pub stores: Apart<Stores>,
}

impl Image {
    /// One that is memory and nothing else.
    fn in_memory(
        blocking: &Blocking,
        config: &Config,
        info: DiskInfo,
        path: &Path,
        ram: io::Result<Ram>,
        log: &Logger,
    ) -> Result<Image, Error> {
        let no_memory = |source| store::Error::Io { path: path.to_owned(), action: "get memory for it", source };
        let store = MemoryStore::new(path, Arc::new(ram.map_err(no_memory)?));
        let means = store.means(blocking).map_err(no_memory)?;
        let opener = Opener::new(vec![means], config, None, log.clone());
        let engine = opener.and_then(|opener| opener.open(blocking, opener.name));
        let submission = engine.and_then(|engine| Submission::start(blocking, engine, config.engine.submit));
        let submission = submission.map_err(no_memory)?;
        let raw = Raw::new(info.size, info.sector_size.into(), drivers::OddSize::Refuse)
            .map_err(|source| Error::Format { path: path.to_owned(), source })?;
        let mut layers = vec![HostLayer::new(Box::new(raw), path, FileId(0), false)];
        filters::throttle(config, &mut layers);
        let stores: Stores = Arc::new([Arc::new(store)]);
        Ok(Image { info, layers: layers.into(), submission: submission.into(), opener: None, stores: stores.into() })
    }

    /// Where the image that it is based on is, if there is one.
    pub fn parent(&self) -> Option<&Arc<dyn Store>> {
        let parent = self.layers.iter().filter(|layer| layer.layer.size().is_some()).nth(1)?;
        parent.files.first().and_then(|FileId(id)| self.stores.get(usize::from(*id)))
    }

    /// Leaves it whole, and closes its files. Waits for them.
    pub fn close(self, blocking: &Blocking) {
        drop(self.layers.take(blocking));
        close_files(blocking, self.submission, self.opener, self.stores);
    }
}

/// Ends what reads and writes an image's files, closes them, and lets go of their locks. Waits for them.
pub fn close_files(
    blocking: &Blocking,
    submission: Apart<Submission>,
    opener: Option<Apart<Opener>>,
    stores: Apart<Stores>,
) {
    submission.take(blocking).close(blocking);
    drop(opener.map(|opener| opener.take(blocking)));
    drop(stores.take(blocking));
}

/// Opens what the configuration says. `event` is that of the engine that it follows, if it does. Waits for files, locks and threads.
pub fn open(blocking: &Blocking, config: &Config, event: Option<Arc<EventFd>>, log: &Logger) -> Result<Image, Error> {
    open_with(blocking, config, event, &store::open, log)
}

/// The same, with stores that are opened by `open`.
pub fn open_with(
    blocking: &Blocking,
    config: &Config,
    event: Option<Arc<EventFd>>,
    open: &store::Open,
    log: &Logger,
) -> Result<Image, Error> {
    let image = &config.image;
    let path = || image.path.as_deref().unwrap_or(Path::new(""));
    let to_open = ToOpen { blocking, config, path: path(), open, log };
    let files = |open: fn(&ToOpen) -> Result<Chain, Error>| {
        let _rights = rights_of(image.by.as_deref(), path())?;
        open(&to_open)
    };
    let size = image.size.map_or(0, |size| size.0);
    let ram = match image.kind {
        ImageType::Aio => return with_engine(&to_open, files(open_raw)?, event),
        ImageType::Vhd => return with_engine(&to_open, files(vhd::open)?, event),
        ImageType::Ram => Ram::zeroed(blocking, size),
        ImageType::Null => Ok(Ram::null(size)),
    };
    let name = if image.kind == ImageType::Ram { "ram" } else { "null" };
    let sector_size = image.sector_size.unwrap_or(512);
    let info = DiskInfo {
        size,
        sector_size,
        physical_sector_size: 4096,
        read_only: image.read_only,
        name: format!("{name}:{}", Size(size)),
    };
    Image::in_memory(blocking, config, info, Path::new(name), ram, log)
}

/// What opening an image takes.
struct ToOpen<'a> {
    blocking: &'a Blocking,
    config: &'a Config,
    path: &'a Path,
    open: &'a store::Open<'a>,
    log: &'a Logger,
}

impl ToOpen<'_> {
    /// Opens one of the image's stores. Nobody has asked for its lock yet.
    fn store(&self, path: &Path, read_only: bool, sector_size: Option<u32>) -> store::OpenResult {
        let image = &self.config.image;
        let metadata = image.kind == ImageType::Vhd;
        let by = image.by.as_deref();
        let how = How { read_only, metadata, direct: image.direct, sector_size, lock: image.lock, log: false, by };
        (self.open)(self.blocking, path, &how, self.log)
    }
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
    let io = |source| store::Error::Io { path: path.to_owned(), action: "take it from its disk: open it", source };
    let _rights = rights_of(Some(member), path)?;
    sys::file::check_storage(path).map_err(io)?;
    let file = store::options(image.read_only, false).open(path).map_err(io)?;
    Ok(check_place(&file, path, Some(member))?)
}

/// An image that is not open: what a disk has that begins paused, with that many bytes, until somebody ends that.
pub fn closed(
    blocking: &Blocking,
    config: &Config,
    size: u64,
    sector_size: u32,
    log: &Logger,
) -> Result<Image, Error> {
    let path = config.image.path.clone().unwrap_or_default();
    let kind = if config.image.kind == ImageType::Vhd { "vhd" } else { "aio" };
    let info = DiskInfo {
        size,
        sector_size,
        physical_sector_size: sector_size.max(4096),
        read_only: config.image.read_only,
        name: format!("{kind}:{}", path.display()),
    };
    let config = Config { faults: Vec::new(), ..config.clone() };
    let mut image = Image::in_memory(blocking, &config, info, &path, Ok(Ram::null(size)), log)?;
    image.stores = Apart::from(Arc::from([]));
    Ok(image)
}

fn open_raw(to_open: &ToOpen) -> Result<Chain, Error> {
    let (image, path, blocking) = (&to_open.config.image, to_open.path, to_open.blocking);
    if let Some(size) = image.create {
        let made = create(path, size);
        made.map_err(|source| store::Error::Io { path: path.to_owned(), action: "create it", source })?;
    }
    let mut store = to_open.store(path, image.read_only, image.sector_size)?;
    store.lock(blocking)?;
    let geometry = store.geometry();
    let sector_size = image.sector_size.unwrap_or(geometry.logical);
    let odd = match image.odd_size {
        OddSize::Refuse => drivers::OddSize::Refuse,
        OddSize::RoundUp => drivers::OddSize::RoundUp,
        OddSize::RoundDown => drivers::OddSize::RoundDown,
    };
    let raw = Raw::new(geometry.size, sector_size.into(), odd)
        .map_err(|source| Error::Format { path: path.to_owned(), source })?;
    let size = drivers::Layer::size(&raw).unwrap_or(0);
    if size != geometry.size {
        warn!(to_open.log, "image size is no multiple of the sector and was rounded";
            "image" => %path.display(), "file" => geometry.size, "disk" => size, "sector" => sector_size);
    }
    let info = DiskInfo {
        size,
        sector_size,
        physical_sector_size: geometry.physical.max(sector_size),
        read_only: image.read_only,
        name: format!("aio:{}", path.display()),
    };
    let layer = HostLayer::new(Box::new(raw), path, FileId(0), !store.is_direct());
    Ok(Chain { info, layers: vec![layer], stores: vec![store.into()] })
}

/// Makes a sparse file, unless there is one.
fn create(path: &Path, size: Size) -> io::Result<()> {
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent)?;
    }
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(file) => file.set_len(size.0),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// The files of a disk, the leaf first, without an engine.
struct Chain {
    info: DiskInfo,
    layers: Vec<HostLayer>,
    stores: Vec<Arc<dyn Store>>,
}

fn with_engine(to_open: &ToOpen, mut chain: Chain, event: Option<Arc<EventFd>>) -> Result<Image, Error> {
    let ToOpen { blocking, config, log, .. } = *to_open;
    let image = chain.layers[0].path.clone();
    filters::add(to_open, &mut chain)?;
    let Chain { info, layers, stores } = chain;
    let image = image.as_path();
    let io = |action| move |source| store::Error::Io { path: image.to_owned(), action, source };
    let means =
        stores.iter().map(|store| store.means(blocking)).collect::<io::Result<_>>().map_err(io("serve it"))?;
    let opener = Opener::new(means, config, event, log.clone()).map_err(io("start its engine"))?;
    let engine = opener.open(blocking, opener.name).map_err(io("start its engine"))?;
    info!(log, "image open"; "image" => &info.name, "size" => info.size, "sector_size" => info.sector_size,
        "direct" => stores[0].is_direct(), "block_device" => stores[0].geometry().block_device,
        "lock_holds_off" => stores[0].holds_off(), "read_only" => info.read_only,
        "layers" => layers.iter().filter(|layer| layer.layer.size().is_some()).count(), "engine" => engine.name,
        "depth" => engine.depth);
    let submission = Submission::start(blocking, engine, config.engine.submit).map_err(io("start its engine"))?;
    Ok(Image {
        info,
        layers: layers.into(),
        submission: submission.into(),
        opener: Some(opener.into()),
        stores: Stores::from(stores).into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_drive_is_told_of_as_one() {
        // As open(2) has it for /dev/sr0: storage managers wait for exit code 123.
        let source = io::Error::from_raw_os_error(libc::ENOMEDIUM);
        let error = store::Error::Io { path: "/dev/sr0".into(), action: "open it", source };
        let error = Error::from(error);
        assert_eq!((error.errno(), error.errno() as i32), (Errno::ENOMEDIUM, 123));
    }
}
