//! Tells of requests that are not answered for long, each once, but for what a limit holds back, and of writes that wait for space.

use slog::{info, warn};

use super::Disk;
use super::pause::Resuming;
use super::recording::Recording;
use crate::job::Job;
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
    /// The job that was told of, by when it began.
    told: Option<u64>,
}

impl Watchdog {
    /// Tells of requests that are older than `seconds`; 0: of none.
    pub fn new(seconds: u32) -> Watchdog {
        Watchdog { limit: u64::from(seconds) * 1_000_000_000, next: 0, told: None }
    }

    /// When to look although nothing happens, ns of [`now`]. A disk that has nothing to do is not looked at.
    pub(super) fn deadline(&self, busy: bool) -> Option<u64> {
        (self.limit > 0 && busy).then_some(self.next)
    }
}

impl Disk {
    /// Whether there is something that could be stuck.
    pub(super) fn is_watched(&self) -> bool {
        self.slots.used() > 0 || self.job().is_some()
    }

    /// What a thread does with the image's files, and since when, ns of [`now`]. A merge takes as long as it takes.
    fn job(&self) -> Option<(&'static str, u64)> {
        let job = |job: Option<(&'static str, u64)>| job.into_iter();
        let closing = self.closing.as_ref().map(Job::under_way);
        let resuming = self.resuming.as_ref().map(Resuming::under_way);
        let recording = self.recording.as_ref().map(Recording::under_way);
        job(closing)
            .chain(job(resuming))
            .chain(job(recording))
            .chain(self.file_jobs())
            .min_by_key(|(_, since)| *since)
    }

    /// Looks at all requests and jobs, if it is time to.
    pub(super) fn watch(&mut self, now: u64) {
        let limit = self.watchdog.limit;
        if limit == 0 || now < self.watchdog.next || !self.is_watched() {
            return;
        }
        self.watchdog.next = now + limit / 8;
        self.watch_job(now, limit);
        let mut new = Vec::new();
        for (slot, request) in self.slots.iter_mut() {
            if request.is_held() && request.pieces == 0 {
                // For as long as it is meant to be.
                request.held_at = now;
            }
            if !request.stuck && now.saturating_sub(request.born.max(request.held_at)) > limit {
                request.stuck = true;
                new.push((request.born, slot));
            }
        }
        if !new.is_empty() {
            new.sort_unstable();
            self.tell_of_stuck(&new);
        }
    }

    fn watch_job(&mut self, now: u64, limit: u64) {
        let Some((what, since)) = self.job() else { return };
        if now.saturating_sub(since) > limit && self.watchdog.told != Some(since) {
            self.watchdog.told = Some(since);
            warn!(self.log, "a file of the image hangs: the disk waits, and others do not"; "image" => &self.info.name,
                "job" => what, "age_s" => (now - since) / 1_000_000_000);
        }
    }

    fn tell_of_stuck(&self, new: &[(u64, u32)]) {
        let tiocbs = self.queue.inspect();
        for &(born, slot) in new.iter().take(TOLD) {
            let Some((_, request)) = self.slots.iter().find(|(id, _)| id.index() == slot) else { continue };
            let tiocb = tiocbs.iter().find(|(owner, _)| owner.index() == slot).map(|(_, tiocb)| tiocb);
            let held_by = tiocb.map_or_else(|| self.held_by(request), |tiocb| tiocb.held_by.as_str().into());
            let (layer, path) =
                tiocb.map_or_else(|| (0, self.info.name.clone()), |tiocb| self.stack.place(tiocb.file));
            warn!(self.log, "request is stuck"; "op" => request.name(),
                "age_s" => (now() - born) / 1_000_000_000, "held_by" => &*held_by, "layer" => layer, "file" => path,
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
