//! One file or block device of an image: how it is opened, and its lock.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use slog::{Logger, warn};

use super::Error;
use crate::chain::is_below;
use crate::config::{Direct, Image, Member, Size};
use crate::sys::file::{
    Geometry, check_storage, direct_alignment, geometry, is_read_only, lock_as_reader, lock_holder, open_storage,
    same_file,
};

/// A file that is open for an engine.
pub(super) struct Opened {
    pub(super) file: File,
    /// With O_DIRECT.
    pub(super) direct: bool,
    pub(super) geometry: Geometry,
    pub(super) sector_size: u32,
    /// On the file itself: the engine's descriptor shares it.
    pub(super) lock: Lock,
}

/// The lock of an image's file, for as long as this lives.
#[derive(Debug)]
pub enum Lock {
    /// Taken.
    Held(Flock<File>),
    /// Not taken: the configuration says so.
    Without(File),
}

impl Deref for Lock {
    type Target = File;

    fn deref(&self) -> &File {
        match self {
            Lock::Held(file) => file,
            Lock::Without(file) => file,
        }
    }
}

impl Lock {
    /// Takes it: shared for a reader, exclusive for a writer. Waits a moment for one that is about to go.
    pub fn take(file: File, path: &Path, read_only: bool) -> Result<Lock, Error> {
        let file = lock(file, path, read_only)?;
        if read_only {
            let locked = lock_as_reader(&file);
            locked.map_err(|errno| Error::Io { path: path.to_owned(), action: "lock it", source: errno.into() })?;
        }
        Ok(Lock::Held(file))
    }
}

/// Opens a file for writing, and a block device exclusively (O_EXCL, open(2)): as long as it is open nobody else opens the device so, by
/// whatever node, and nothing that needs a device for itself has it: no mount, no device mapper, no partition of it, or whole disk. Zeroing
/// takes it, too: the kernel refuses that to others while a device is held like this. Waits a moment for one that is about to go.
pub fn open_to_write(path: &Path, direct: bool) -> Result<File, Error> {
    let io = |source| Error::Io { path: path.to_owned(), action: "open it", source };
    check_storage(path).map_err(io)?;
    if !std::fs::metadata(path).map_err(io)?.file_type().is_block_device() {
        return options(false, direct).open(path).map_err(io);
    }
    let flags = libc::O_EXCL | if direct { libc::O_DIRECT } else { 0 };
    let begin = Instant::now();
    loop {
        match options(false, false).custom_flags(flags).open(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let (file, _) = open_storage(path).map_err(io)?;
                let holder = holder(&file);
                if begin.elapsed() > patience(&file, holder.as_ref()) {
                    let other = "something that has the device for itself: a mount, a volume manager, a partition, or a tapdisk by another name";
                    let holder = holder.map_or_else(|| other.to_owned(), |holder| holder.name);
                    return Err(Error::Locked { path: path.to_owned(), holder });
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(device) if is_read_only(&device).map_err(io)? => {
                return Err(Error::ReadOnly { path: path.to_owned() });
            }
            file => return file.map_err(io),
        }
    }
}

/// How long a file's holder is waited for.
fn patience(file: &File, holder: Option<&Holder>) -> Duration {
    match holder {
        Some(holder) if !holder.alive => KILLED,
        Some(_) if file.metadata().is_ok_and(|meta| meta.is_file()) => Duration::ZERO,
        _ => UDEV,
    }
}

/// Opens a file as the configuration says and takes its lock, in sectors of `sector_size` or, if that is not given, of its own.
pub(super) fn open(
    image: &Image,
    path: &Path,
    read_only: bool,
    sector_size: Option<u32>,
    log: &Logger,
) -> Result<Opened, Error> {
    let io = |action| move |source| Error::Io { path: path.to_owned(), action, source };
    let unfit = |message: String| Error::Unfit { path: path.to_owned(), message };
    check_storage(path).map_err(io("open it"))?;
    let plain = options(read_only, false).open(path).map_err(io("open it"))?;
    let geometry = geometry(&plain).map_err(io("serve it"))?;
    let sector_size = sector_size.unwrap_or(geometry.logical);
    let direct = match image.direct {
        Direct::Off => false,
        wanted => match open_direct(path, read_only, sector_size) {
            Ok(()) => true,
            Err(why) if wanted == Direct::Auto => {
                warn!(log, "image is not opened with O_DIRECT, but through the host's page cache";
                    "image" => %path.display(), "why" => why);
                false
            }
            Err(why) => {
                return Err(unfit(format!(
                    "O_DIRECT is not possible: {why}; set image.direct to \"auto\" or \"off\""
                )));
            }
        },
    };
    drop(plain);
    let file = match read_only {
        true => options(true, direct).open(path).map_err(io("open it"))?,
        false => open_to_write(path, direct)?,
    };
    check_place(&file, path, image.by.as_deref())?;
    if direct && sector_size < geometry.logical {
        let logical = geometry.logical;
        return Err(unfit(format!(
            "sector_size {sector_size} is below the device's {logical}-byte sectors; leave it out, or set image.direct \
             to \"off\""
        )));
    }
    let held = file.try_clone().map_err(io("lock it"))?;
    let lock = match image.lock {
        true => Lock::take(held, path, read_only)?,
        false => Lock::Without(held),
    };
    Ok(Opened { file, direct, geometry, sector_size, lock })
}

pub(super) fn options(read_only: bool, direct: bool) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(!read_only).custom_flags(if direct { libc::O_DIRECT } else { 0 });
    options
}

/// Whether a file that is open is where a member's images may be, if it is a member who has named it.
pub fn check_place(file: &File, path: &Path, member: Option<&Member>) -> Result<(), Error> {
    match member {
        Some(member) if !is_below(file, &member.folders) => {
            Err(Error::Outside { path: path.to_owned(), none: member.folders.is_empty() })
        }
        Some(_) => {
            let refused = |source| Error::Io { path: path.to_owned(), action: "open it by its own name", source };
            is_there(file).map_err(refused)
        }
        None => Ok(()),
    }
}

/// Whether this thread gets to an open file through the folders that it is in. A link of /proc/self/fd leads to what this process has open, past
/// all folders (proc(5)).
fn is_there(file: &File) -> io::Result<()> {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    if same_file(&name.metadata()?, file) { Ok(()) } else { Err(Errno::ESTALE.into()) }
}

/// Says why O_DIRECT is no good, if it is not.
fn open_direct(path: &Path, read_only: bool, sector_size: u32) -> Result<(), String> {
    let file = options(read_only, true).open(path).map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => "the file system does not have it".to_owned(),
        _ => error.to_string(),
    })?;
    match direct_alignment(&file) {
        Some((memory, offset)) if memory > sector_size || offset > sector_size => Err(format!(
            "it wants memory aligned to {memory} and offsets to {offset} bytes, and the disk's sectors have {sector_size}"
        )),
        _ => Ok(()),
    }
}

/// Makes a sparse file, unless there is one.
pub(super) fn create(path: &Path, size: Size) -> io::Result<()> {
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
            Err((_, Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS)) => {
                let message = "its file system has no locks (flock): mount it with them (NFS: without nolock, and with a lock daemon); if \
                               nothing else writes the image, tapdisk goes without with image.lock = false";
                return Err(Error::Unfit { path: path.to_owned(), message: message.into() });
            }
            Err((_, errno)) => {
                return Err(Error::Io { path: path.to_owned(), action: "lock it", source: errno.into() });
            }
        };
        let holder = holder(&file);
        if begin.elapsed() > patience(&file, holder.as_ref()) {
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

/// Who holds a lock on the file.
fn holder(file: &File) -> Option<Holder> {
    let pid = lock_holder(file)?;
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => Some(Holder { name: format!("process {pid} ({})", name.trim()), alive: true }),
        Err(_) if pid <= 0 => Some(Holder { name: "a process of another container".into(), alive: true }),
        Err(_) => {
            Some(Holder { name: format!("process {pid}, which has ended but left I/O in flight"), alive: false })
        }
    }
}
