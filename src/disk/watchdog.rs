//! Tells of requests that are not answered for long, each once, and of writes that wait for space.

use slog::{info, warn};

use super::Disk;
use crate::stats::now;

/// Requests that are told of one by one, each time.
const TOLD: usize = 8;

/// When to look, and what to tell of.
#[derive(Debug, Default)]
pub struct Watchdog {
    /// Age from which a request is stuck, ns. 0: none is.
    limit: u64,
    /// When to look next, ns of [`now`].
    next: u64,
}

impl Watchdog {
    /// Tells of requests that are older than `seconds`; 0: of none.
    pub fn new(seconds: u32) -> Watchdog {
        Watchdog { limit: u64::from(seconds) * 1_000_000_000, next: 0 }
    }

    /// When to look although nothing happens, ns of [`now`]. A disk without requests is not looked at.
    pub(super) fn deadline(&self, requests: usize) -> Option<u64> {
        (self.limit > 0 && requests > 0).then_some(self.next)
    }
}

impl Disk {
    /// Looks at all requests, if it is time to.
    pub(super) fn watch(&mut self, now: u64) {
        let limit = self.watchdog.limit;
        if self.slots.used() == 0 || now < self.watchdog.next || limit == 0 {
            return;
        }
        self.watchdog.next = now + limit / 8;
        let mut new = Vec::new();
        for (slot, request) in self.slots.iter_mut() {
            if !request.stuck && now.saturating_sub(request.born) > limit {
                request.stuck = true;
                new.push((request.born, slot));
            }
        }
        if !new.is_empty() {
            new.sort_unstable();
            self.tell_of_stuck(&new);
        }
    }

    fn tell_of_stuck(&self, new: &[(u64, u32)]) {
        let tiocbs = self.queue.inspect();
        for &(born, slot) in new.iter().take(TOLD) {
            let Some((_, request)) = self.slots.iter().find(|(id, _)| id.index() == slot) else { continue };
            let tiocb = tiocbs.iter().find(|(owner, _)| owner.index() == slot).map(|(_, tiocb)| tiocb);
            let held_by = tiocb.map_or("stack", |tiocb| &tiocb.held_by);
            let (layer, path) =
                tiocb.map_or_else(|| (0, self.info.name.clone()), |tiocb| self.stack.place(tiocb.file));
            warn!(self.log, "request is stuck"; "op" => request.op.name(),
                "age_s" => (now() - born) / 1_000_000_000, "held_by" => held_by, "layer" => layer, "file" => path,
                "offset" => tiocb.map_or(request.offset, |tiocb| tiocb.offset),
                "len" => tiocb.map_or(request.len, |tiocb| tiocb.len));
        }
        let submitting_us = self.queue.report().submitting_us;
        warn!(self.log, "requests are stuck: see tap-ctl debug-queue"; "new" => new.len(),
            "unanswered" => self.slots.used(), "submission_runs_for_us" => submitting_us);
    }

    /// Tells when writes begin to wait for space, and when they go on.
    pub(super) fn watch_space(&mut self) {
        let waiting = self.queue.lacks_space();
        if (waiting > 0) != self.without_space {
            self.without_space = waiting > 0;
            if waiting > 0 {
                warn!(self.log, "no space for writes: they are held until there is some"; "held" => waiting,
                    "file" => %self.stack.leaf().path.display());
            } else {
                info!(self.log, "there is space again: writes go on");
            }
        }
    }
}
