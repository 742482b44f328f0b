//! What is shown of layers, and what they have moved.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{HostLayer, Stack};
use crate::sys::io::IoOp;

/// What a layer has moved for requests, in 512-byte sectors: read and written. Each layer counts what it served itself, with or
/// without error, and the last one also what nobody has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    /// All of it.
    pub all: [u64; 2],
    /// What failed.
    pub failed: [u64; 2],
}

impl Hits {
    pub(super) fn count(&mut self, op: IoOp, len: u64, ok: bool) {
        let direction = match op {
            IoOp::Read => 0,
            IoOp::Write { .. } => 1,
            _ => return,
        };
        let sectors = len / drivers::SECTOR_SIZE;
        self.all[direction] += sectors;
        if !ok {
            self.failed[direction] += sectors;
        }
    }
}

/// What has waited for a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    /// Requests that went on.
    pub requests: u64,
    /// How long they had waited, all together, ns.
    pub ns: u64,
}

/// What is to be shown of a layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerReport {
    /// The file; empty: a filter without one.
    pub path: String,
    /// The format's name.
    pub format: String,
    /// Bytes of the disk.
    pub size: u64,
    /// The format's counters.
    pub counters: BTreeMap<String, u64>,
}

impl Stack {
    /// The layers and their counters, the first one first, without filters that are idle.
    pub fn inspect(&self) -> Vec<LayerReport> {
        let size = self.leaf().layer.size().unwrap_or(0);
        let idle = |layer: &&HostLayer| layer.layer.size().is_none() && layer.layer.is_idle();
        let layers = self.layers.iter().filter(|layer| !idle(layer)).map(|layer| {
            let mut counters = BTreeMap::new();
            layer.layer.inspect(&mut |name, value| {
                counters.insert(name.to_owned(), value);
            });
            let (path, format) = (layer.path.display().to_string(), layer.layer.name().to_owned());
            LayerReport { path, format, size: layer.layer.size().unwrap_or(size), counters }
        });
        layers.collect()
    }
}
