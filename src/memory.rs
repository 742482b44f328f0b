//! The promise about memory: what the data path needs exists before the disk is connected, and stays resident.
//!
//! # What is promised
//!
//! A host that is short of memory writes pages out, among others through this disk. If serving that took memory, the host
//! would wait for itself. So:
//!
//! - All that a request needs is made at the start: its slot, tiocb, I/O and iovecs, the queues between the threads, the
//!   engine's rings, and the minimum of the pool's threads; more of them are made by a thread that nothing waits for. A
//!   client's data pages are made when it connects.
//! - All of it is locked (`mlockall`), and what comes later too, such as what a client brings; stacks of threads are small
//!   for that reason ([`STACK_SIZE`]). Needs CAP_IPC_LOCK, or no limit (RLIMIT_MEMLOCK); with a limit that suffices, what
//!   is there at the start and the clients' data pages are locked.
//! - The kernel is told (`PR_SET_IO_FLUSHER`, since Linux 5.6) that this process writes memory back: when it allocates on
//!   our behalf, in `io_submit` or in `pwritev2`, it doesn't wait for other I/O. Needs CAP_SYS_RESOURCE. All threads
//!   inherit that from the first one.
//! - The kernel's OOM killer passes it by (`oom_score_adj` -1000). Needs CAP_SYS_RESOURCE.
//!
//! What the system does not let is a warning that names the remedy, and the disk is served all the same.
//!
//! What allocates after the start: a client's connection, `tap-ctl`, the log of an error, threads of the pool beyond the
//! minimum. None of them is needed for requests to go on. With buffered images (`direct = "off"`, or a file system without
//! O_DIRECT) the kernel's page cache is in the way, which takes memory: the promise holds only with O_DIRECT.
//!
//! # Memory that ends
//!
//! Where the system gives no more (RLIMIT_AS, RLIMIT_DATA, the limit of what a host commits), whoever comes is refused with ENOMEM, and all
//! others go on. What is large is asked for in a way that fails: payload memory, mappings, an image's tables. For all else 512 KiB are kept
//! ([`reserve`]): once they are spent, nobody is let in until they can be had again ([`admit`], [`room`]). A memory cgroup refuses
//! nothing: it takes from others, or kills.
//!
//! # What a disk takes
//!
//! [`Budget`] adds it up; it is logged at the start and shown by `tap-ctl stats` under `memory`. With the defaults, in KiB:
//! requests 37, or 860 with the local ring, whose requests may have 256 segments; tiocbs 41; I/Os 570, most of it iovecs
//! (`engine.depth` × `engine.merge_iovecs` × 16 bytes); statistics 140; stacks 128 for each thread. A Xen guest takes
//! `frontend.xen.buffers` for data, 16 MiB, a client of NBD 4 MiB, one of the local ring what it asks for,
//! `frontend.local.max_data` at most. The rest is the program itself.

use std::fs;
use std::sync::Arc;

use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use serde::{Deserialize, Serialize};
use slog::{Logger, info, warn};

use crate::blocking::Blocking;
use crate::config::Memory;
use crate::job;
use crate::submit::STACK_SIZE;
use crate::sys;
use crate::sys::capability::{Capabilities, IPC_LOCK};
use crate::sys::process::{set_io_flusher, share_one_arena};
use crate::sys::reserve;

/// Something that takes memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What it is.
    pub what: String,
    /// Bytes.
    pub bytes: u64,
    /// 0: it is there from the start. Otherwise it comes and goes, so often at most.
    pub most: u32,
}

impl Part {
    /// There from the start.
    pub fn fixed(what: &str, bytes: usize) -> Part {
        Part { what: what.to_owned(), bytes: bytes as u64, most: 0 }
    }

    /// Comes and goes.
    pub fn each(what: &str, bytes: usize, most: usize) -> Part {
        Part { what: what.to_owned(), bytes: bytes as u64, most: most as u32 }
    }

    /// Stacks of threads.
    pub fn threads(what: &str, count: usize) -> Part {
        Part::fixed(what, count * STACK_SIZE)
    }
}

/// What a disk takes, as computed from its configuration, and what the process has.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Budget {
    /// Sum of the parts that are there from the start, bytes.
    pub fixed: u64,
    /// The most that the others can take, bytes.
    pub clients_max: u64,
    /// All of them.
    pub parts: Vec<Part>,
    /// Resident memory of the process, the program included, bytes.
    pub resident: u64,
    /// Locked memory of the process, bytes.
    pub locked: u64,
}

impl Budget {
    /// Adds up, and looks what the process has.
    pub fn new(parts: Vec<Part>) -> Budget {
        let fixed = parts.iter().filter(|part| part.most == 0).map(|part| part.bytes).sum();
        let clients_max = parts.iter().map(|part| part.bytes * u64::from(part.most)).sum();
        let (resident, locked) = of_process();
        Budget { fixed, clients_max, parts, resident, locked }
    }

    /// Says so at the start.
    pub fn log(&self, log: &Logger) {
        let parts: Vec<_> = self.parts.iter().map(|part| format!("{} {}", part.what, part.bytes)).collect();
        info!(log, "memory"; "fixed" => self.fixed, "clients_max" => self.clients_max, "parts" => parts.join(", "),
            "resident" => self.resident, "locked" => self.locked);
    }
}

/// Resident and locked memory of this process, bytes.
pub fn of_process() -> (u64, u64) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
    };
    (of("VmRSS"), of("VmLck"))
}

/// What the system did not let, for the log.
#[derive(Debug)]
pub struct Denied {
    what: &'static str,
    error: std::io::Error,
    remedy: &'static str,
}

impl Denied {
    /// Warns of it.
    pub fn log(&self, log: &Logger) {
        warn!(log, "{}", self.what; "error" => %self.error, "remedy" => self.remedy);
    }
}

const RESOURCE: &str = "give CAP_SYS_RESOURCE, as root has it, or say in [memory] that it is not wanted: io_flusher = false, \
                        oom_score_adj = 0";

/// Whether somebody may be let in, or something begun, for whom as many bytes are made in ways that can't fail, beside the few that the
/// reserve is for. Where it says no, that one is refused: those who are there go on. It asks for memory, and gives it back at once.
pub fn room(bytes: usize) -> std::io::Result<()> {
    reserve::room(bytes)
}

/// Lets in whom `make` makes: if there is memory, and still is afterwards.
pub fn admit<T>(make: impl FnOnce() -> std::io::Result<T>) -> std::io::Result<T> {
    room(0)?;
    let made = make()?;
    room(0).map(|()| made)
}

/// Tells the kernel what kind of process this is. Before the first thread starts, since threads inherit it.
pub fn announce(config: &Memory) -> Vec<Denied> {
    share_one_arena();
    reserve::keep();
    let mut denied = Vec::new();
    if config.io_flusher
        && let Err(error) = set_io_flusher()
    {
        let what =
            "cannot become an I/O flusher: under memory pressure the kernel may wait for this disk on its own behalf";
        denied.push(Denied { what, error, remedy: RESOURCE });
    }
    if let Err(error) = set_oom_score_adj(config.oom_score_adj) {
        let what = "cannot set oom_score_adj: when memory runs out this process may be killed";
        denied.push(Denied { what, error, remedy: RESOURCE });
    }
    denied
}

fn set_oom_score_adj(wanted: i32) -> std::io::Result<()> {
    let path = "/proc/self/oom_score_adj";
    // Writing what is there needs no privilege, but a value below the lowest ever set does.
    if fs::read_to_string(path)?.trim() == wanted.to_string() {
        return Ok(());
    }
    fs::write(path, wanted.to_string())
}

/// Waits until all of it is in memory. Keeps all that is there now resident, and all that comes: what a client's connection allocates and the stacks of the
/// pool's threads could otherwise be swapped out to the disk that they serve.
pub fn lock(_: &Blocking, log: &Logger) {
    // Where there is a limit, what is beyond it could not be had at all, and the program would end.
    let future = if may_lock_all() { MlockAllFlags::MCL_FUTURE } else { MlockAllFlags::empty() };
    if let Err(errno) = mlockall(MlockAllFlags::MCL_CURRENT | future) {
        let what = "cannot lock memory: under memory pressure the disk can be slow or stop";
        let remedy = "raise RLIMIT_MEMLOCK (systemd: LimitMEMLOCK=infinity) or give CAP_IPC_LOCK";
        Denied { what, error: errno.into(), remedy }.log(log);
    }
    reserve::stay_empty();
}

/// The same by a job: nobody waits for that.
pub fn lock_aside(log: &Logger) {
    let log = log.clone();
    job::aside("memory", move |blocking| lock(blocking, &log));
}

/// Keeps a client's memory resident, too, as soon as it is: nobody waits for that.
pub fn lock_of_client(memory: &Arc<sys::memory::Memory>) {
    let memory = Arc::downgrade(memory);
    job::aside_if_possible("memory", move |blocking| {
        // Where a limit does not let it, the log says so from the start. Where there is no thread, there is no memory to lock either.
        let _ = memory.upgrade().map(|memory| memory.lock(blocking));
    });
}

/// Whether nothing limits what this process locks: RLIMIT_MEMLOCK does not, or CAP_IPC_LOCK lifts it.
fn may_lock_all() -> bool {
    let unlimited = getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(soft, _)| soft == RLIM_INFINITY);
    unlimited || Capabilities::of_thread().is_ok_and(|capabilities| capabilities.effective() & IPC_LOCK != 0)
}
