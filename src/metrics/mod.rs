//! What monitoring sees of the disks of a host.
//!
//! A tapdisk tells of its disks as [`ProcessMetrics`], in JSON (the control message METRICS), so that `tap-ctl metrics` can put
//! all tapdisks of a host into one exposition, and `tap-ctl top` can compare two moments. [`text`] makes OpenMetrics of them,
//! for `tap-ctl metrics` and for the tapdisk's own [socket](http).

pub mod http;
pub mod text;

use serde::{Deserialize, Serialize};

use crate::disk::{Disk, ThrottleReport};
use crate::memory;
use crate::queue::{QueueReport, SubmitMode};
use crate::stats::OpTraffic;

/// The states of a disk.
pub const STATES: [&str; 6] = ["running", "pausing", "paused", "draining", "flushing", "closed"];

/// A process and its disks.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ProcessMetrics {
    /// Its id.
    pub pid: i32,
    /// It answers. If not, all else is unknown.
    pub up: bool,
    /// Resident memory, the program included, bytes.
    pub resident: u64,
    /// Locked memory, bytes.
    pub locked: u64,
    /// Its disks.
    pub disks: Vec<DiskMetrics>,
}

/// A disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DiskMetrics {
    /// Its number.
    pub minor: u16,
    /// `type:path`.
    pub image: String,
    /// One of [`STATES`].
    pub state: String,
    /// Bytes.
    pub size: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// The engine's name.
    pub engine: String,
    /// Who submits.
    pub submit: SubmitMode,
    /// Requests that are taken and not answered.
    pub outstanding: usize,
    /// Of those, the ones that take longer than the watchdog allows.
    pub stuck: usize,
    /// The age of the oldest of them, µs; 0 if there is none.
    pub oldest_us: u64,
    /// What the disk has allocated at its start, bytes.
    pub memory: u64,
    /// The queue.
    pub queue: QueueReport,
    /// The limits, and what they hold back.
    #[serde(default)]
    pub throttle: ThrottleReport,
    /// Requests, from when they were pulled until they are answered; all kinds.
    pub operations: Vec<OpTraffic>,
    /// The image and those below it.
    pub layers: Vec<LayerMetrics>,
}

/// One image of the chain.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LayerMetrics {
    /// The file.
    pub path: String,
    /// The format's name.
    pub format: String,
    /// Transfers of data and of the format's metadata, from when they were queued to their end; the kinds that occurred.
    pub operations: Vec<OpTraffic>,
}

impl ProcessMetrics {
    /// This process, with these of its disks and their minors.
    pub fn here<'a>(disks: impl IntoIterator<Item = (u16, &'a Disk)>) -> ProcessMetrics {
        let (resident, locked) = memory::of_process();
        let disks = disks.into_iter().map(|(minor, disk)| disk.metrics(minor)).collect();
        ProcessMetrics { pid: std::process::id() as i32, up: true, resident, locked, disks }
    }
}

impl DiskMetrics {
    /// The requests of one kind, of [`Op::KINDS`](crate::request::Op::KINDS).
    pub fn op(&self, name: &str) -> Option<&OpTraffic> {
        self.operations.iter().find(|op| op.op == name)
    }
}
