//! Opens an image: file, lock, geometry, format, engine.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use drivers::Raw;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use slog::{Logger, info, warn};

use crate::config::{Config, Direct, ImageType, OddSize, Size};
use crate::engine::{self, Engine, Opener};
use crate::frontend::DiskInfo;
use crate::stack::Layer;
use crate::sys::file::{Backing, direct_alignment, geometry};
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
    /// Its content does not fit.
    #[error("{}: {source}", path.display())]
    Format {
        /// The image.
        path: PathBuf,
        /// Why.
        source: drivers::OpenError,
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

/// An image that is open, and locked for as long as this lives.
pub struct Image {
    /// What clients are told.
    pub info: DiskInfo,
    /// The format and its file.
    pub layer: Layer,
    /// The engine.
    pub engine: Engine,
    /// What opens another one; none for an image in memory, which is its engine.
    pub opener: Option<Opener>,
    /// The lock; none for an image without a file.
    pub lock: Option<Flock<File>>,
}

/// Opens what the configuration says.
pub fn open(config: &Config, log: &Logger) -> Result<Image, Error> {
    let image = &config.image;
    let depth = config.engine.depth as usize;
    let name = match image.kind {
        ImageType::Aio => return open_file(config, image.path.as_deref().unwrap_or(Path::new("")), log),
        ImageType::Ram => "ram",
        ImageType::Null => "null",
    };
    let size = image.size.map_or(0, |size| size.0);
    let path = PathBuf::from(name);
    let engine = match image.kind {
        ImageType::Ram => engine::memory::ram(size, depth),
        _ => engine::memory::null(depth),
    };
    let engine = engine.and_then(|engine| match config.faults.as_slice() {
        [] => Ok(engine),
        faults => engine::fault::wrap(engine, faults),
    });
    let engine = engine.map_err(|source| Error::Io { path: path.clone(), action: "get memory for it", source })?;
    let sector_size = image.sector_size.unwrap_or(512);
    let info = DiskInfo {
        size,
        sector_size,
        physical_sector_size: 4096,
        read_only: image.read_only,
        name: format!("{name}:{}", Size(size)),
    };
    let raw = Raw::new(size, sector_size.into(), drivers::OddSize::Refuse)
        .map_err(|source| Error::Format { path: path.clone(), source })?;
    Ok(Image {
        info,
        layer: Layer { format: Box::new(raw), file: FileId(0), path },
        engine,
        opener: None,
        lock: None,
    })
}

fn open_file(config: &Config, path: &Path, log: &Logger) -> Result<Image, Error> {
    let image = &config.image;
    let io = |action| move |source| Error::Io { path: path.to_owned(), action, source };
    let unfit = |message: String| Error::Unfit { path: path.to_owned(), message };
    if let Some(size) = image.create {
        create(path, size).map_err(io("create it"))?;
    }
    let plain = options(image.read_only, false).open(path).map_err(io("open it"))?;
    let geometry = geometry(&plain).map_err(io("serve it"))?;
    let sector_size = image.sector_size.unwrap_or(geometry.logical);
    let (file, direct) = if image.direct == Direct::Off {
        (plain, false)
    } else {
        match open_direct(path, image.read_only, sector_size) {
            Ok(file) => (file, true),
            Err(why) if image.direct == Direct::Auto => {
                warn!(log, "image is not opened with O_DIRECT, but through the host's page cache";
                    "image" => %path.display(), "why" => why);
                (plain, false)
            }
            Err(why) => {
                return Err(unfit(format!(
                    "O_DIRECT is not possible: {why}; set image.direct to \"auto\" or \"off\""
                )));
            }
        }
    };
    if direct && sector_size < geometry.logical {
        let logical = geometry.logical;
        return Err(unfit(format!(
            "sector_size {sector_size} is below the device's {logical}-byte sectors; leave it out, or set image.direct \
             to \"off\""
        )));
    }
    // The engine's own descriptor shares the lock.
    let lock = lock(file.try_clone().map_err(io("lock it"))?, path, image.read_only)?;
    let odd = match image.odd_size {
        OddSize::Refuse => drivers::OddSize::Refuse,
        OddSize::RoundUp => drivers::OddSize::RoundUp,
        OddSize::RoundDown => drivers::OddSize::RoundDown,
    };
    let raw = Raw::new(geometry.size, sector_size.into(), odd)
        .map_err(|source| Error::Format { path: path.to_owned(), source })?;
    let size = drivers::Format::size(&raw);
    if size != geometry.size {
        warn!(log, "image size is no multiple of the sector and was rounded";
            "image" => %path.display(), "file" => geometry.size, "disk" => size, "sector" => sector_size);
    }
    let files: Arc<[Backing]> = Arc::new([Backing { file, direct, block_device: geometry.block_device }]);
    let opener = Opener::new(files, config, log.clone()).map_err(io("start its engine"))?;
    let engine = opener.open(opener.name).map_err(io("start its engine"))?;
    info!(log, "image open"; "image" => %path.display(), "size" => size, "sector_size" => sector_size,
        "direct" => direct, "block_device" => geometry.block_device, "read_only" => image.read_only,
        "engine" => engine.name, "depth" => engine.depth);
    let info = DiskInfo {
        size,
        sector_size,
        physical_sector_size: geometry.physical.max(sector_size),
        read_only: image.read_only,
        name: format!("aio:{}", path.display()),
    };
    let layer = Layer { format: Box::new(raw), file: FileId(0), path: path.to_owned() };
    Ok(Image { info, layer, engine, opener: Some(opener), lock: Some(lock) })
}

fn options(read_only: bool, direct: bool) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(!read_only).custom_flags(if direct { libc::O_DIRECT } else { 0 });
    options
}

/// Opens with O_DIRECT, or says why that is no good.
fn open_direct(path: &Path, read_only: bool, sector_size: u32) -> Result<File, String> {
    let file = options(read_only, true).open(path).map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => "the file system does not have it".to_owned(),
        _ => error.to_string(),
    })?;
    match direct_alignment(&file) {
        Some((memory, offset)) if memory > sector_size || offset > sector_size => Err(format!(
            "it wants memory aligned to {memory} and offsets to {offset} bytes, and the disk's sectors have {sector_size}"
        )),
        _ => Ok(file),
    }
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

/// How long a lock is waited for that udev may hold, which looks at a block device for a moment.
const UDEV: Duration = Duration::from_millis(500);
/// How long a lock is waited for whose process has ended: the kernel takes a killed one's io_uring apart some time later,
/// when what it had in flight is done, and keeps the file and its lock until then.
const KILLED: Duration = Duration::from_secs(20);

/// Takes the lock of an image's file: shared for a reader, exclusive for a writer. Waits a moment for one that is about to go.
pub fn lock(file: File, path: &Path, read_only: bool) -> Result<Flock<File>, Error> {
    let how = if read_only { FlockArg::LockSharedNonblock } else { FlockArg::LockExclusiveNonblock };
    let begin = Instant::now();
    let mut file = file;
    loop {
        file = match Flock::lock(file, how) {
            Ok(lock) => return Ok(lock),
            Err((file, Errno::EWOULDBLOCK)) => file,
            Err((_, errno)) => {
                return Err(Error::Io { path: path.to_owned(), action: "lock it", source: errno.into() });
            }
        };
        let holder = holder(&file);
        let patience = match &holder {
            Some(holder) if !holder.alive => KILLED,
            Some(_) if file.metadata().is_ok_and(|meta| meta.is_file()) => Duration::ZERO,
            _ => UDEV,
        };
        if begin.elapsed() > patience {
            let holder = holder.map_or("a process that /proc/locks does not name".into(), |holder| holder.name);
            return Err(Error::Locked { path: path.to_owned(), holder });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

struct Holder {
    /// For the message.
    name: String,
    alive: bool,
}

/// Who holds a lock on the file, from /proc/locks (proc(5)).
fn holder(file: &File) -> Option<Holder> {
    let meta = file.metadata().ok()?;
    let (major, minor) = (nix::sys::stat::major(meta.dev()), nix::sys::stat::minor(meta.dev()));
    let wanted = format!("{major:02x}:{minor:02x}:{}", meta.ino());
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let pid = locks.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().filter(|field| *field != "->").collect();
        (fields.get(1) == Some(&"FLOCK") && fields.get(5) == Some(&wanted.as_str()))
            .then(|| fields.get(4).copied())?
    })?;
    // 0 and -1 are processes that this one cannot see.
    let hidden = pid.parse().is_ok_and(|pid: i32| pid <= 0);
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => Some(Holder { name: format!("process {pid} ({})", name.trim()), alive: true }),
        Err(_) if hidden => Some(Holder { name: "a process of another container".into(), alive: true }),
        Err(_) => {
            Some(Holder { name: format!("process {pid}, which has ended but left I/O in flight"), alive: false })
        }
    }
}
