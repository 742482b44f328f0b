//! A file or a block device of this host: how it is opened, and its lock.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, OFlag, fcntl};
use slog::{Logger, warn};

use super::{Error, How, Identity, Means, Store, aligned};
use crate::blocking::Blocking;
use crate::config::{Direct, Member};
use crate::sys::file::{
    Backing, FileIdentity, Geometry, check_storage, direct_alignment, file_id, forget_cached, geometry,
    has_other_readers, is_read_only, lock_as_reader, lock_changes, lock_holder, open_storage, same_file,
    unlock_changes,
};
use crate::volume;

/// A file or a block device.
#[derive(Debug)]
pub struct FileStore {
    path: PathBuf,
    /// As the engine has it: the lock is of this open file, and so it is held as long as the kernel has I/O in flight there.
    file: Lock,
    /// Through the page cache, for writing metadata, where the other one passes it by.
    plain: Option<File>,
    direct: bool,
    read_only: bool,
    /// The lock is wanted.
    lock: bool,
    /// Who has named it, if that is a member, whose place it has to be in.
    by: Option<Member>,
    geometry: Geometry,
    identity: FileIdentity,
}

impl FileStore {
    /// Opens it as `how` says.
    pub fn open(blocking: &Blocking, path: &Path, how: &How, log: &Logger) -> Result<FileStore, Error> {
        let io = |action| move |source| Error::Io { path: path.to_owned(), action, source };
        let How { read_only, sector_size, .. } = *how;
        if how.log {
            return FileStore::log(blocking, path, how);
        }
        check_storage(path).map_err(io("open it"))?;
        let plain = options(read_only, false).open(path).map_err(io("open it"))?;
        let geometry = geometry(&plain).map_err(io("serve it"))?;
        let sector_size = sector_size.unwrap_or(geometry.logical);
        let direct = match how.direct {
            Direct::Off => None,
            wanted => match open_direct(path, read_only, sector_size) {
                Ok(file) => Some(file),
                Err(why) if wanted == Direct::Auto => {
                    warn!(log, "image is not opened with O_DIRECT, but through the host's page cache";
                        "image" => %path.display(), "why" => why);
                    None
                }
                Err(why) => {
                    let message = format!("O_DIRECT is not possible: {why}; set image.direct to \"auto\" or \"off\"");
                    return Err(Error::Unfit { path: path.to_owned(), message });
                }
            },
        };
        let is_direct = direct.is_some();
        if is_direct && sector_size < geometry.logical {
            let logical = geometry.logical;
            let message = format!(
                "sector_size {sector_size} is below the device's {logical}-byte sectors; leave it out, or set image.direct to \"off\""
            );
            return Err(Error::Unfit { path: path.to_owned(), message });
        }
        let another = match (read_only, direct) {
            (true, direct) => direct,
            (false, _) => Some(open_to_write(blocking, path, is_direct)?),
        };
        let (file, plain) = match another {
            None => (plain, None),
            Some(file) => {
                let meta = file.metadata().map_err(io("serve it"))?;
                if !same_file(&meta, &plain) {
                    return Err(Error::Replaced { path: path.to_owned() });
                }
                (file, Some(plain))
            }
        };
        let plain = plain.filter(|_| how.metadata && !read_only && is_direct);
        let (lock, by) = (how.lock, how.by.cloned());
        Ok(FileStore { plain, direct: is_direct, read_only, lock, by, ..FileStore::of(path, file, geometry)? })
    }

    fn log(blocking: &Blocking, path: &Path, how: &How) -> Result<FileStore, Error> {
        let (file, geometry) = open_log(blocking, path, true, true)?;
        Ok(FileStore {
            read_only: false,
            lock: how.lock,
            by: how.by.cloned(),
            ..FileStore::of(path, file, geometry)?
        })
    }

    /// Opens it only to look at its metadata, through the page cache: without a lock, and waiting for nobody.
    pub fn look(_: &Blocking, path: &Path) -> Result<FileStore, Error> {
        // A path comes from an image that anybody may have made, and opening a FIFO would wait for its writer, which never comes.
        let opened = open_storage(path);
        let (file, geometry) =
            opened.map_err(|source| Error::Io { path: path.to_owned(), action: "open it", source })?;
        FileStore::of(path, file, geometry)
    }

    fn of(path: &Path, file: File, geometry: Geometry) -> Result<FileStore, Error> {
        let explain = |source| Error::Io { path: path.to_owned(), action: "serve it", source };
        let identity = file_id(&file.metadata().map_err(explain)?);
        Ok(FileStore {
            path: path.to_owned(),
            file: Lock::Without(file),
            plain: None,
            direct: false,
            read_only: true,
            lock: false,
            by: None,
            geometry,
            identity,
        })
    }

    /// For what is written plainly.
    fn plain(&self) -> &File {
        self.plain.as_ref().unwrap_or(&self.file)
    }
}

impl Store for FileStore {
    fn path(&self) -> &Path {
        &self.path
    }

    fn identity(&self) -> Identity {
        Identity::File(self.identity)
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn is_direct(&self) -> bool {
        self.direct
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn lock(&mut self, blocking: &Blocking) -> Result<(), Error> {
        check_place(&self.file, &self.path, self.by.as_ref())?;
        if self.lock {
            // The same open file by another descriptor, which has the lock as well.
            let file = self.file.try_clone();
            let file = file.map_err(|source| Error::Io { path: self.path.clone(), action: "lock it", source })?;
            self.file = Lock::take(blocking, file, &self.path, self.read_only)?;
            // Who has put another file in its place before it was locked goes on without it: what is written here would be nobody's.
            match self.path.metadata() {
                Ok(now) if same_file(&now, &self.file) => {}
                _ => return Err(Error::Replaced { path: self.path.clone() }),
            }
        }
        Ok(())
    }

    fn holds_off(&self) -> &'static str {
        match &self.file {
            Lock::Without(_) => "nobody",
            Lock::Held(_) if self.geometry.block_device && !self.read_only => {
                "all of this host that take the lock, or want the device for themselves"
            }
            Lock::Held(_) => "all of this host that take the lock: tapdisk and vhd-util",
        }
    }

    fn lock_changes(&self, _: &Blocking, patience: Duration) -> Result<(), Errno> {
        lock_changes(self.plain(), patience)
    }

    fn unlock_changes(&self, _: &Blocking) -> Result<(), Errno> {
        unlock_changes(self.plain())
    }

    fn has_other_readers(&self, _: &Blocking) -> Result<bool, Errno> {
        has_other_readers(&self.file)
    }

    fn size_now(&self, _: &Blocking) -> io::Result<u64> {
        Ok(geometry(&self.file)?.size)
    }

    fn read_at(&self, _: &Blocking, at: u64, to: &mut [u8]) -> io::Result<usize> {
        if self.direct {
            return aligned::read_at(&self.file, at, to);
        }
        let mut done = 0;
        while done < to.len() {
            match self.file.read_at(&mut to[done..], at + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, _: &Blocking, at: u64, from: &[u8]) -> io::Result<()> {
        self.plain().write_all_at(from, at)
    }

    fn set_len(&self, _: &Blocking, len: u64) -> io::Result<()> {
        self.plain().set_len(len)
    }

    fn sync(&self, _: &Blocking, all: bool) -> io::Result<()> {
        if all { self.plain().sync_all() } else { self.plain().sync_data() }
    }

    fn refresh(&self, _: &Blocking) -> io::Result<()> {
        Ok(forget_cached(self.plain())?)
    }

    fn means(&self, _: &Blocking) -> io::Result<Means> {
        let file = self.file.try_clone()?;
        Ok(Means::File(Backing { file, direct: self.direct, block_device: self.geometry.block_device }))
    }
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
    pub fn take(blocking: &Blocking, file: File, path: &Path, read_only: bool) -> Result<Lock, Error> {
        let file = lock(blocking, file, path, read_only)?;
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
pub fn open_to_write(_: &Blocking, path: &Path, direct: bool) -> Result<File, Error> {
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

/// Opens a log of changed blocks: a regular file, which is no link, or a block device, which is opened exclusively as by [`open_to_write`] if
/// that is wanted. Root opens names in folders that others may write: a link is followed to a block device at the most, as a volume's name
/// is one.
pub fn open_log(blocking: &Blocking, path: &Path, write: bool, exclusive: bool) -> Result<(File, Geometry), Error> {
    let io = |source| Error::Io { path: path.to_owned(), action: "open it", source };
    let link = || Error::Link { path: path.to_owned() };
    let by_link = std::fs::symlink_metadata(path).map_err(io)?.is_symlink();
    let no_storage = |error| if by_link { link() } else { io(error) };
    check_storage(path).map_err(no_storage)?;
    let device = std::fs::metadata(path).map_err(io)?.file_type().is_block_device();
    let file = match device {
        true if exclusive => open_to_write(blocking, path, false)?,
        // It may have become something else meanwhile.
        _ => {
            let flags = libc::O_NONBLOCK | if device { 0 } else { libc::O_NOFOLLOW };
            let opened = OpenOptions::new().read(true).write(write).custom_flags(flags).open(path);
            opened.map_err(|error| if error.raw_os_error() == Some(libc::ELOOP) { link() } else { io(error) })?
        }
    };
    let geometry = geometry(&file).map_err(io)?;
    if device != geometry.block_device {
        return Err(io(Errno::ESTALE.into()));
    }
    // Only to open it must not wait.
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).map_err(|errno| io(errno.into()))?;
    Ok((file, geometry))
}

/// How long a file's holder is waited for.
fn patience(file: &File, holder: Option<&Holder>) -> Duration {
    match holder {
        Some(holder) if !holder.alive => KILLED,
        Some(_) if file.metadata().is_ok_and(|meta| meta.is_file()) => Duration::ZERO,
        _ => UDEV,
    }
}

/// For opening it so.
pub fn options(read_only: bool, direct: bool) -> OpenOptions {
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

/// Whether a folder without links is one of those, or below one.
pub fn is_within(folder: &Path, folders: &[PathBuf]) -> bool {
    folders.iter().any(|allowed| allowed.canonicalize().is_ok_and(|allowed| folder.starts_with(allowed)))
}

/// Whether an open file or block device is in one of those folders, or below one: by what is open, and not by the name or the link that it was
/// opened by. Where a device is, its node says, or the device mapper's name of it.
fn is_below(file: &File, folders: &[PathBuf]) -> bool {
    let node = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok();
    let mapped = || file.metadata().ok().as_ref().and_then(volume::mapper_name);
    let below = |place: PathBuf| place.parent().is_some_and(|folder| is_within(folder, folders));
    node.is_some_and(below) || mapped().is_some_and(below)
}

/// Opens it with O_DIRECT, or says why that is no good.
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

/// How long a lock is waited for that udev may hold, which looks at a block device for a moment.
const UDEV: Duration = Duration::from_millis(500);
/// How long a lock is waited for whose process has ended: the kernel takes a killed one's io_uring apart some time later,
/// when what it had in flight is done, and keeps the file and its lock until then.
const KILLED: Duration = Duration::from_secs(20);

/// Takes the lock of an image's file: shared for a reader, exclusive for a writer. Waits a moment for one that is about to go.
pub fn lock(_: &Blocking, file: File, path: &Path, read_only: bool) -> Result<Flock<File>, Error> {
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
