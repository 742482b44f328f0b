//! A file system whose operations hang on command (FUSE): it hands files of a folder through.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, MountOption, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request, Session, TimeOrNow, WriteFlags,
};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::unistd::{Whence, lseek};
use tempfile::TempDir;

use super::PATIENCE;
use super::needs::skipped;
use super::served::folder;

/// What can hang. A close(2) is a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Lookup,
    Getattr,
    Setattr,
    Open,
    Read,
    Write,
    Flush,
    Fsync,
    Fallocate,
    Lseek,
    Statfs,
}

pub const ALL: [Operation; 11] = [
    Operation::Lookup,
    Operation::Getattr,
    Operation::Setattr,
    Operation::Open,
    Operation::Read,
    Operation::Write,
    Operation::Flush,
    Operation::Fsync,
    Operation::Fallocate,
    Operation::Lseek,
    Operation::Statfs,
];

#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    hangs: Option<Operation>,
    /// So many operations are held now.
    held: usize,
    /// So many of them may go on.
    released: usize,
}

impl Gate {
    fn pass(&self, operation: Operation) {
        let mut state = self.state.lock().unwrap();
        if state.hangs != Some(operation) {
            return;
        }
        state.held += 1;
        let held = |state: &mut GateState| state.hangs == Some(operation) && state.released == 0;
        state = self.changed.wait_while(state, held).unwrap();
        state.released = state.released.saturating_sub(1);
        state.held -= 1;
    }
}

/// A folder, and the same folder behind the file system.
pub struct HangingFs {
    gate: Arc<Gate>,
    session: Option<BackgroundSession>,
    behind: TempDir,
    mount: TempDir,
}

impl HangingFs {
    /// None where the machine has no FUSE for us.
    #[track_caller]
    pub fn new() -> Option<HangingFs> {
        let (behind, mount, gate) = (folder(), folder(), Arc::<Gate>::default());
        let files = Files { gate: Arc::clone(&gate), folder: behind.path().to_owned(), state: Mutex::default() };
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("hanging".into())];
        let session = Session::new(files, mount.path(), &config).and_then(Session::spawn);
        match session {
            Ok(session) => Some(HangingFs { gate, session: Some(session), behind, mount }),
            Err(error) => {
                skipped(&format!("no FUSE: {error}"));
                None
            }
        }
    }

    /// A file, where operations hang.
    pub fn path(&self, name: &str) -> PathBuf {
        self.mount.path().join(name)
    }

    /// The same file, where none does.
    pub fn behind(&self, name: &str) -> PathBuf {
        self.behind.path().join(name)
    }

    /// Each operation of that kind hangs from now on until it is released. None: no operation does, and those that hang go on.
    pub fn hang(&self, operation: Option<Operation>) {
        let mut state = self.gate.state.lock().unwrap();
        (state.hangs, state.released) = (operation, 0);
        self.gate.changed.notify_all();
    }

    /// Whether an operation hangs now.
    pub fn hangs(&self) -> bool {
        let state = self.gate.state.lock().unwrap();
        state.held > state.released
    }

    /// The operation that hangs goes on. The next one of its kind hangs.
    pub fn release(&self) {
        self.gate.state.lock().unwrap().released += 1;
        self.gate.changed.notify_all();
    }
}

impl Drop for HangingFs {
    fn drop(&mut self) {
        self.hang(None);
        // Somebody may have a file open if a test has failed.
        let _ = self.session.take().map(BackgroundSession::umount_and_join);
    }
}

#[derive(Default)]
struct FileTable {
    /// By inode, from 2 on.
    names: Vec<String>,
    open: HashMap<u64, Arc<File>>,
    next: u64,
}

struct Files {
    gate: Arc<Gate>,
    folder: PathBuf,
    state: Mutex<FileTable>,
}

/// Nothing is remembered: each stat asks.
const TTL: Duration = Duration::ZERO;

fn attributes(ino: INodeNo, path: &Path) -> io::Result<FileAttr> {
    let meta = path.metadata()?;
    let kind = if meta.is_dir() { FileType::Directory } else { FileType::RegularFile };
    let mtime = meta.modified()?;
    Ok(FileAttr {
        ino,
        size: meta.len(),
        blocks: meta.blocks(),
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: UNIX_EPOCH,
        kind,
        perm: (meta.mode() & 0o7777) as u16,
        nlink: 1,
        uid: meta.uid(),
        gid: meta.gid(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    })
}

impl Files {
    fn path(&self, ino: INodeNo) -> PathBuf {
        let state = self.state.lock().unwrap();
        let name = ino.0.checked_sub(2).and_then(|index| state.names.get(index as usize));
        name.map_or_else(|| self.folder.clone(), |name| self.folder.join(name))
    }

    fn file(&self, handle: FileHandle) -> Arc<File> {
        Arc::clone(&self.state.lock().unwrap().open[&handle.0])
    }
}

macro_rules! answer {
    ($reply:ident, $result:expr, $done:expr) => {
        match $result {
            Ok(done) => $done(done),
            Err(error) => $reply.error(io::Error::from(error).into()),
        }
    };
}

impl Filesystem for Files {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.gate.pass(Operation::Lookup);
        let name = name.to_str().unwrap().to_owned();
        let mut state = self.state.lock().unwrap();
        let index = state.names.iter().position(|known| *known == name).unwrap_or_else(|| {
            state.names.push(name.clone());
            state.names.len() - 1
        });
        drop(state);
        let found = attributes(INodeNo(index as u64 + 2), &self.folder.join(name));
        answer!(reply, found, |attr| reply.entry(&TTL, &attr, Generation(0)));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.gate.pass(Operation::Getattr);
        answer!(reply, attributes(ino, &self.path(ino)), |attr| reply.attr(&TTL, &attr));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<std::time::SystemTime>,
        _: Option<FileHandle>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.gate.pass(Operation::Setattr);
        let path = self.path(ino);
        let set = size.map(|size| OpenOptions::new().write(true).open(&path)?.set_len(size)).transpose();
        answer!(reply, set.and_then(|_| attributes(ino, &path)), |attr| reply.attr(&TTL, &attr));
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.gate.pass(Operation::Open);
        let write = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let opened = OpenOptions::new().read(true).write(write).open(self.path(ino));
        answer!(reply, opened, |file| {
            let mut state = self.state.lock().unwrap();
            state.next += 1;
            let handle = state.next;
            state.open.insert(handle, Arc::new(file));
            reply.opened(FileHandle(handle), FopenFlags::empty());
        });
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.gate.pass(Operation::Read);
        let mut bytes = vec![0; size as usize];
        answer!(reply, self.file(handle).read_at(&mut bytes, offset), |read: usize| reply.data(&bytes[..read]));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.gate.pass(Operation::Write);
        let written = self.file(handle).write_all_at(data, offset);
        answer!(reply, written, |()| reply.written(data.len() as u32));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.gate.pass(Operation::Flush);
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.state.lock().unwrap().open.remove(&handle.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        self.gate.pass(Operation::Fsync);
        answer!(reply, self.file(handle).sync_data(), |()| reply.ok());
    }

    fn fallocate(&self, _: &Request, _: INodeNo, fh: FileHandle, at: u64, len: u64, mode: i32, reply: ReplyEmpty) {
        self.gate.pass(Operation::Fallocate);
        let how = FallocateFlags::from_bits_truncate(mode);
        answer!(reply, fallocate(self.file(fh).as_fd(), how, at as i64, len as i64), |()| reply.ok());
    }

    fn lseek(&self, _: &Request, _: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        self.gate.pass(Operation::Lseek);
        let whence = if whence == libc::SEEK_DATA { Whence::SeekData } else { Whence::SeekHole };
        answer!(reply, lseek(self.file(fh).as_fd(), offset, whence), |at| reply.offset(at));
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        self.gate.pass(Operation::Statfs);
        reply.statfs(1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 4096, 255, 4096);
    }
}

/// Until something is so. A hang of what is tested is found by this.
pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + PATIENCE;
    while !is() {
        assert!(std::time::Instant::now() < end, "{what}: it does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}
