//! What debug-queue shows of a disk.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{CoalesceReport, Disk, EngineReport};
use crate::engine::fault::{Faults, FaultsReport};
use crate::polling::{Polling, PollingReport};
use crate::queue::{QueueReport, TiocbReport};
use crate::request::Request;
use crate::stack::LayerReport;
use crate::stats::{OpReport, now};

/// All that debug-queue shows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DebugQueue {
    /// `type:path`.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Logical sector in bytes.
    pub sector_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// The log of changed blocks that it was given.
    #[serde(default)]
    pub changed_blocks: Option<PathBuf>,
    /// The disk's state.
    pub state: String,
    /// Request slots.
    pub slots: usize,
    /// Of those, in use.
    pub slots_used: usize,
    /// Why no flush succeeds any more, until the image is opened anew: one has failed.
    #[serde(default)]
    pub failed_flush: Option<String>,
    /// Requests that are not answered for longer than the watchdog allows.
    pub stuck: usize,
    /// The image and those below it.
    #[serde(default)]
    pub layers: Vec<LayerReport>,
    /// The last coalesce.
    #[serde(default)]
    pub coalesce: CoalesceReport,
    /// The engine and who submits to it.
    pub engine: EngineReport,
    /// The faults that are configured.
    pub faults: Option<FaultsReport>,
    /// The queue's counters.
    pub queue: QueueReport,
    /// The main loop's polling.
    pub polling: PollingReport,
    /// Requests that are not answered, oldest first.
    pub requests: Vec<RequestReport>,
    /// Counters and latencies by operation.
    pub operations: Vec<OpReport>,
    /// Frontends and their clients.
    pub frontends: Vec<serde_json::Value>,
}

/// One request that is not answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RequestReport {
    /// Its slot.
    pub slot: u32,
    /// Its operation.
    pub op: String,
    /// First byte of the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Since it was pulled, µs.
    pub age_us: u64,
    /// That is longer than the watchdog allows.
    pub stuck: bool,
    /// "stack" until all of it is planned, or "waits for" the layer that has it wait; then "queue".
    pub held_by: String,
    /// Its transfers that are not finished.
    pub tiocbs: Vec<TiocbReport>,
}

impl Disk {
    /// The state, in a word: one of [`STATES`](crate::metrics::STATES).
    pub(super) fn state_name(&self) -> String {
        if self.is_pausing() { "pausing".into() } else { format!("{:?}", self.state).to_lowercase() }
    }

    /// The log of changed blocks that it was given.
    fn changed_blocks(&self) -> Option<&Path> {
        self.reopen.as_ref().and_then(|reopen| reopen.config.image.changed_blocks.as_deref())
    }

    /// Who has a request, as far as its transfers do not say that.
    pub(super) fn held_by(&self, request: &Request) -> Cow<'static, str> {
        match (request.planning, request.waits_for) {
            (false, _) => "queue".into(),
            (true, None) => "stack".into(),
            (true, Some(waiting)) => format!("waits for {}", self.stack.name_of(waiting.layer)).into(),
        }
    }

    /// Everything there is to see.
    pub fn inspect(&self, polling: &Polling) -> DebugQueue {
        let now = now();
        let mut tiocbs: Vec<Vec<TiocbReport>> = vec![Vec::new(); self.slots.capacity()];
        for (owner, mut tiocb) in self.queue.inspect() {
            (tiocb.layer, tiocb.path) = self.stack.place(tiocb.file);
            tiocbs[owner.index() as usize].push(tiocb);
        }
        let mut requests: Vec<_> = self
            .slots
            .iter()
            .map(|(id, request)| RequestReport {
                slot: id.index(),
                op: request.name().to_owned(),
                offset: request.offset,
                len: request.len,
                age_us: (now - request.born) / 1000,
                stuck: request.stuck,
                held_by: self.held_by(request).into_owned(),
                tiocbs: std::mem::take(&mut tiocbs[id.index() as usize]),
            })
            .collect();
        requests.sort_by_key(|request| std::cmp::Reverse(request.age_us));
        DebugQueue {
            name: self.info.name.clone(),
            size: self.info.size,
            sector_size: self.info.sector_size,
            read_only: self.info.read_only,
            changed_blocks: self.changed_blocks().map(Path::to_owned),
            state: self.state_name(),
            slots: self.slots.count(),
            slots_used: self.slots.used(),
            failed_flush: self.stack.failed_flush().map(|errno| errno.to_string()),
            stuck: requests.iter().filter(|request| request.stuck).count(),
            layers: self.stack.inspect(),
            coalesce: self.coalesce_report(),
            engine: self.engine_report(),
            faults: self.queue.engine().submit.capability().map(Faults::report),
            queue: self.queue.report(),
            polling: polling.report(),
            requests,
            operations: self.stats.report(),
            frontends: self.frontends.iter().map(|frontend| frontend.inspect()).collect(),
        }
    }
}
