//! Where a layer's bytes are: in a file, on a block device, in memory; on a server or in a cluster, one day.
//!
//! The room has the [contract](Store), [`file`](FileStore) for files and block devices, [`memory`](MemoryStore), and what goes wrong
//! ([`Error`]). It may use `sys`, `config`, `volume` and `blocking`, and knows neither formats nor engines. Begin with [`Store`]; who opens stores
//! is `image` (a disk's) and `chain` (those that it is based on), and whose they are then is the disk.
//!
//! # What is to come, as sequences of calls
//!
//! An **RBD image that grows while it is served.** Opening, in a job: [`open`](fn@open) connects and opens the image;
//! [`lock`](Store::lock) takes the exclusive lock in the cluster, after a look at who has it; [`means`](Store::means) gives the image to the
//! engine of its kind. A watch's callback sets an eventfd; the main loop then begins what `tap-ctl resize` begins
//! ([`Disk::resize`](crate::disk::Disk::resize)): a job asks [`size_now`](Store::size_now), and on the main loop the leaf's `file_grown` takes the size
//! on. Requests go on meanwhile: no call of these is made by the main loop, and none touches the engine.
//!
//! An **NBD store whose server goes away.** Its I/Os stay in its engine, whose submit half hands them to its own thread and never blocks
//! (`Inline::Always`), and complete when the server is back, or with an error that `[retry]` tries again, as the configuration says. The router has
//! the other files' I/Os go on: they are in other engines. The watchdog tells of what is stuck. [`size_now`](Store::size_now),
//! [`read_at`](Store::read_at) and [`sync`](Store::sync) hang in their jobs, and the disk says so (`under_way`). Closing hangs likewise, in
//! the job that drops the store after its engine.
//!
//! The **lock of either.** RBD: [`lock`](Store::lock) acquires, and where the owner is a dead process of ours, which the record tells by its address,
//! breaks it, by which the dead one is fenced off; a stranger's is [`Error::Locked`] with its name. [`holds_off`](Store::holds_off): all other
//! hosts too. NBD has none: `lock` does nothing, `holds_off` says that it holds off nobody, and who may write is the server's affair. Dropping the store lets go.

mod aligned;
mod error;
mod file;
mod memory;

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use drivers::vhd::Source;
use nix::errno::Errno;
use slog::Logger;

pub use self::error::Error;
pub use self::file::{FileStore, Lock, check_place, is_within, lock, open_log, open_to_write, options};
pub use self::memory::{MemoryStore, Ram};
use crate::blocking::Blocking;
use crate::config::{Direct, Member};
use crate::sys::file::{Backing, FileIdentity, Geometry};

/// One store: the bytes of a layer's file.
///
/// **Who calls.** A job, or a tool: all that can hang takes [`Blocking`]. What does not take it looks at what is known since the opening, and anybody
/// may call that, the main loop too. Its end may hang as well, so the disk keeps it [apart](crate::job::Apart).
///
/// **In which order.** It is opened; looked at, whether it may be what it is to be; [locked](Self::lock), once; its metadata is read; then
/// its [means](Self::means) are asked for, once for each engine that is to move its bytes. From there on the data is the engine's, and
/// what is read and written plainly is metadata, at the opening before the first request and at the end after the last one, when the engine has
/// nothing in flight. The engine goes first, then the store, and with that the lock.
///
/// **What may fail.** Everything that takes `Blocking`. After a failed write the bytes are old, new, or both in parts.
pub trait Store: Debug + Send + Sync {
    /// Its name, for messages and for finding it again.
    fn path(&self) -> &Path;

    /// What tells it from all others, whatever its name.
    fn identity(&self) -> Identity;

    /// Its size and sectors when it was opened, and whether its size is for others to change.
    fn geometry(&self) -> Geometry;

    /// Nothing of the host's is between it and its engine that has bytes of its own: no page cache.
    fn is_direct(&self) -> bool;

    /// The open file, where it is one of this host's: where that is, and who else has it, are asked of it.
    fn file(&self) -> Option<&File>;

    /// Takes its lock, as it was opened: shared for a reader, exclusive for a writer. Waits a moment for one that is about to go. Until
    /// the store is dropped it holds off what [`holds_off`](Self::holds_off) says.
    fn lock(&mut self, blocking: &Blocking) -> Result<(), Error>;

    /// What the lock holds off, in a few words.
    fn holds_off(&self) -> &'static str;

    /// Takes what others than the program that writes it, and only they, have while they change its metadata, and waits for that. EAGAIN: another one kept it.
    fn lock_changes(&self, blocking: &Blocking, patience: Duration) -> Result<(), Errno>;

    /// Lets go of that.
    fn unlock_changes(&self, blocking: &Blocking) -> Result<(), Errno>;

    /// Whether others may be reading it.
    fn has_other_readers(&self, blocking: &Blocking) -> Result<bool, Errno>;

    /// Its size in bytes, now.
    fn size_now(&self, blocking: &Blocking) -> io::Result<u64>;

    /// Reads what is at byte `at`, as much as there is, and says how much that is.
    fn read_at(&self, blocking: &Blocking, at: u64, to: &mut [u8]) -> io::Result<usize>;

    /// Writes all of it from byte `at` on. Only of one that was [opened](How::metadata) for that.
    fn write_at(&self, blocking: &Blocking, at: u64, from: &[u8]) -> io::Result<()>;

    /// Lets it grow by zeros, or cuts it off. Of one whose size is for others to change, an error.
    fn set_len(&self, blocking: &Blocking, len: u64) -> io::Result<()>;

    /// What was written plainly is durable when this returns, and with `all` also what is known of the file.
    fn sync(&self, blocking: &Blocking, all: bool) -> io::Result<()>;

    /// Forgets what is cached of it: others have written it by another way, the engine, say.
    fn refresh(&self, blocking: &Blocking) -> io::Result<()>;

    /// For an engine that is to move its bytes.
    fn means(&self, blocking: &Blocking) -> io::Result<Means>;
}

impl dyn Store + '_ {
    /// For reading a format's metadata.
    pub fn reading<'a>(&'a self, blocking: &'a Blocking) -> StoreReader<'a> {
        StoreReader { store: self, blocking }
    }
}

/// What a disk keeps of its stores, in the order of its engine's [`FileId`](crate::sys::io::FileId)s: the image that is written, those that it
/// is based on, and what filters have.
pub type Stores = Arc<[Arc<dyn Store>]>;

/// What tells a store from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// A file or a block device of this host.
    File(FileIdentity),
    /// Memory of this process, by its number.
    Memory(u64),
}

/// What an engine needs of the bytes that it moves, by the kind of engine.
#[derive(Debug)]
pub enum Means {
    /// An open file or block device, for the engines of the kernel and of threads.
    File(Backing),
    /// Memory.
    Memory(Arc<Ram>),
}

/// How a store is opened.
#[derive(Clone, Copy, Debug)]
pub struct How<'a> {
    /// It is not written.
    pub read_only: bool,
    /// Its metadata is read and written plainly, besides what the engine does.
    pub metadata: bool,
    /// Whether the page cache is passed by.
    pub direct: Direct,
    /// Of the disk; none: the store's own.
    pub sector_size: Option<u32>,
    /// Its lock is taken when that is asked for.
    pub lock: bool,
    /// It is a log of changed blocks: read and written through the page cache, and a link leads to it only if it is a block device ([`open_log`]).
    pub log: bool,
    /// Who has named it, if that is a member of the control socket's group.
    pub by: Option<&'a Member>,
}

/// A store that is open, or why it is not.
pub type OpenResult = Result<Box<dyn Store>, Error>;

/// Who opens stores by their names: [`open`](fn@open), or a test.
pub type Open<'a> = dyn Fn(&Blocking, &Path, &How, &Logger) -> OpenResult + Send + Sync + 'a;

/// Opens a file or a block device.
pub fn open(blocking: &Blocking, path: &Path, how: &How, log: &Logger) -> OpenResult {
    Ok(Box::new(FileStore::open(blocking, path, how, log)?))
}

/// A store of which metadata is read.
#[derive(Clone, Copy)]
pub struct StoreReader<'a> {
    store: &'a dyn Store,
    blocking: &'a Blocking,
}

impl Source for StoreReader<'_> {
    fn size(&self) -> io::Result<u64> {
        self.store.size_now(self.blocking)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        match self.store.read_at(self.blocking, at, to)? {
            count if count == to.len() => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}
