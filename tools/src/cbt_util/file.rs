//! Files of logs.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use drivers::changed_blocks::{HEADER_SIZE, Header, Unfit};
use nix::errno::Errno;
use nix::sys::statvfs::fstatvfs;
use tapdisk::blocking::Blocking;
use tapdisk::store::{self, Lock, lock, open_log};
use zerocopy::IntoBytes;

use super::{Failure, Result};

/// Where the header has the disk's size.
const SIZE_AT: usize = 40;

/// Bytes that are in memory at a time, whatever size a log claims.
const PIECE: u64 = 1 << 20;

/// The pieces of so many bytes: where each begins, and its bytes.
pub(super) fn pieces(len: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..len.div_ceil(PIECE)).map(move |index| (index * PIECE, PIECE.min(len - index * PIECE) as usize))
}

/// A log that is there.
pub(super) struct LogFile {
    path: PathBuf,
    file: Lock,
    len: u64,
    device: bool,
}

impl LogFile {
    /// Opens one.
    pub(super) fn open(path: &Path, write: bool) -> Result<LogFile> {
        let (file, found) = open_log(&Blocking::before_main_loop(), path, write, false)?;
        Ok(LogFile { path: path.to_owned(), file: Lock::Without(file), len: found.size, device: found.block_device })
    }

    /// Opens one for writing that no tapdisk uses. A device, nobody else has for itself.
    fn open_unused(path: &Path) -> Result<LogFile> {
        let (file, found) = open_log(&Blocking::before_main_loop(), path, true, true)?;
        let copy = file.try_clone().map_err(Failure::io(path, "lock it"))?;
        let file = match lock(&Blocking::before_main_loop(), copy, path, false) {
            Ok(held) => Lock::Held(held),
            // On a file system without locks nobody has one.
            Err(store::Error::Unfit { .. }) => Lock::Without(file),
            Err(error) => return Err(error.into()),
        };
        Ok(LogFile { path: path.to_owned(), file, len: found.size, device: found.block_device })
    }

    /// Opens one whose map is to be changed.
    pub(super) fn open_map(path: &Path) -> Result<LogFile> {
        LogFile::open_unused(path)
    }

    /// Its header.
    pub(super) fn header(&self) -> Result<Header> {
        let len = self.len.min(HEADER_SIZE as u64) as usize;
        Header::parse(&self.read(0, len)?, self.len).map_err(|unfit| self.unfit(&unfit))
    }

    /// EIO if the map is cut off, or there is none.
    pub(super) fn check_map(&self, header: &Header) -> Result<()> {
        if header.size() == 0 {
            let text =
                "it is for a disk of 0 bytes, as one that was not made to the end is: cbt-util create makes it anew";
            return Err(Failure::new(Errno::EIO, &self.path, text));
        }
        header.check_len(self.len).map_err(|unfit| self.unfit(&unfit))
    }

    fn unfit(&self, unfit: &Unfit) -> Failure {
        Failure::new(Errno::EIO, &self.path, unfit)
    }

    pub(super) fn read(&self, at: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, at).map_err(Failure::io(&self.path, "read it"))?;
        Ok(bytes)
    }

    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, at).map_err(Failure::io(&self.path, "write it"))
    }

    /// Makes zeros of what is from one byte of the file to another, and has the file system find room for them: who writes a hole later
    /// may find none.
    pub(super) fn zero(&self, from: u64, to: u64) -> Result<()> {
        self.check_room(to)?;
        let zeros = vec![0; PIECE.min(to - from.min(to)) as usize];
        pieces(to.saturating_sub(from)).try_for_each(|(at, len)| self.write(from + at, &zeros[..len]))
    }

    /// Before anything is written of what there is no room for.
    fn check_room(&self, len: u64) -> Result<()> {
        let path = &self.path;
        let none = |has: u64, what: &str| {
            let text = format!("the log needs {len} bytes, and {what} has {has}: make room first");
            Err(Failure::new(Errno::ENOSPC, path, text))
        };
        if self.device {
            return if len > self.len { none(self.len, "the device") } else { Ok(()) };
        }
        let stat = fstatvfs(&**self.file()).map_err(|errno| Failure::io(path, "look for room")(errno.into()))?;
        let free = stat.blocks_available().saturating_mul(stat.fragment_size());
        if len.saturating_sub(self.len) > free { none(free, "its file system") } else { Ok(()) }
    }

    fn file(&self) -> &Lock {
        &self.file
    }

    /// What was written before is on the disk when this returns, also by a tapdisk that has mapped it.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(Failure::io(&self.path, "write it"))
    }

    /// Writes a header when all that it tells of is on the disk, and then that. Without the size, which is for who has the log locked.
    pub(super) fn write_header(&self, header: &Header, size: bool) -> Result<()> {
        self.sync()?;
        let bytes = header.as_bytes();
        self.write(0, if size { bytes } else { &bytes[..SIZE_AT] })?;
        self.sync()
    }
}

/// Where a log is made: nobody finds half of one.
pub(super) struct NewLog {
    log: LogFile,
    /// What takes the place of another file, or of none, when it is whole.
    replaces: Option<Replaces>,
}

struct Replaces {
    path: PathBuf,
    /// It holds the lock of the file that is replaced.
    old: Option<LogFile>,
}

impl NewLog {
    /// In a new file beside the other one, or in the place of what is on a device.
    pub(super) fn begin(path: &Path) -> Result<NewLog> {
        let old = match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // Nobody loses what is mounted.
            _ => Some(LogFile::open_unused(path)?),
        };
        match old {
            Some(log) if log.device => Ok(NewLog { log, replaces: None }),
            old => NewLog::beside(path, old),
        }
    }

    fn beside(path: &Path, old: Option<LogFile>) -> Result<NewLog> {
        let mut new = path.to_owned().into_os_string();
        new.push(".new");
        let new = PathBuf::from(new);
        // One that was killed has left it.
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Failure::io(&new, "remove it")(error));
            }
            _ => {}
        }
        // It makes the file, and follows no link that somebody puts there.
        let made = OpenOptions::new().read(true).write(true).create_new(true).open(&new);
        let file = made.map_err(Failure::io(&new, "make it"))?;
        let log = LogFile { path: new, file: Lock::Without(file), len: 0, device: false };
        let made = NewLog { log, replaces: Some(Replaces { path: path.to_owned(), old }) };
        made.take_after_old()?;
        Ok(made)
    }

    /// Whoever could open the old file can open the new one.
    fn take_after_old(&self) -> Result<()> {
        let Some(Replaces { path, old: Some(old) }) = &self.replaces else { return Ok(()) };
        let take = || {
            let (meta, new) = (old.file.metadata()?, &**self.log.file());
            if new.metadata()?.uid() != meta.uid() || new.metadata()?.gid() != meta.gid() {
                fchown(new, Some(meta.uid()), Some(meta.gid()))?;
            }
            new.set_permissions(std::fs::Permissions::from_mode(meta.mode() & 0o7777))
        };
        take().map_err(Failure::io(path, "give the new one its owner and mode"))
    }

    /// Makes it, with no block written.
    pub(super) fn finish(mut self, header: &Header) -> Result<()> {
        let begin = HEADER_SIZE as u64;
        self.log.check_room(header.file_len())?;
        if self.log.device {
            // Cut short, it is none any more, rather than the old one with bits that are gone.
            self.log.write_header(&Header::new(0), true)?;
        }
        self.log.zero(begin, header.file_len())?;
        self.log.write_header(header, true)?;
        let Some(Replaces { path, .. }) = &self.replaces else { return Ok(()) };
        std::fs::rename(&self.log.path, path).map_err(Failure::io(path, "put the new log there"))?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let synced = File::open(folder).and_then(|folder| folder.sync_all()).map_err(Failure::io(folder, "sync it"));
        self.replaces = None;
        synced
    }
}

impl Drop for NewLog {
    fn drop(&mut self) {
        if self.replaces.is_some() {
            // There is nothing to be done about it, and the reason for all this is told of.
            let _ = std::fs::remove_file(&self.log.path);
        }
    }
}
