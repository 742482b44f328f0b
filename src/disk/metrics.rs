//! What metrics tell of a disk.

use drivers::Origin;

use super::Disk;
use crate::metrics::{DiskMetrics, LayerMetrics};
use crate::request::Request;
use crate::stack::Stack;
use crate::stats::{Traffic, now};

impl Disk {
    /// Its metrics; it is minor `minor` of this process. It answers while the disk is stuck in I/O.
    pub fn metrics(&self, minor: u16) -> DiskMetrics {
        let now = now();
        let metadata = |request: &&Request| matches!(request.origin, Origin::Layer(_));
        let requests = || self.slots.iter().map(|(_, request)| request).filter(|request| !metadata(request));
        let memory = self.memory();
        let engine = self.engine_report();
        let layers = self.stack.files().zip(self.queue.traffic()).map(|(layer, traffic)| LayerMetrics {
            path: layer.path.display().to_string(),
            format: layer.layer.name().to_owned(),
            operations: traffic.report().filter(|op| op.latency.count() > 0).collect(),
        });
        DiskMetrics {
            minor,
            image: self.info.name.clone(),
            state: self.state_name(),
            size: self.info.size,
            read_only: self.info.read_only,
            engine: engine.name,
            submit: engine.submit,
            outstanding: self.slots.used(),
            stuck: requests().filter(|request| request.stuck).count(),
            oldest_us: requests().map(|request| now.saturating_sub(request.born) / 1000).max().unwrap_or(0),
            memory: memory.iter().filter(|part| part.most == 0).map(|part| part.bytes).sum(),
            queue: self.queue.report(),
            throttle: self.throttle_report(),
            operations: self.stats.traffic().report().collect(),
            layers: layers.collect(),
        }
    }

    /// Counts the transfers of the files that there are now; those that were in `old`, whose counters the queue has, go on.
    pub(super) fn count_files(&mut self, old: Option<&Stack>) {
        let traffic = self.stack.files().map(|layer| {
            let before = old.and_then(|old| old.files().position(|old| old.path == layer.path));
            before.and_then(|at| self.queue.traffic().get(at)).map_or_else(Traffic::default, Traffic::clone)
        });
        self.queue.set_traffic(traffic.collect());
    }
}
