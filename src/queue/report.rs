//! What debug-queue shows of the queue.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::{Finished, Queue, State, Tiocb, Transfer};
use crate::engine::pool::{Pool, PoolReport};
use crate::memory::Part;
use crate::request::RequestId;
use crate::stats::now;
use crate::submit::STACK_SIZE;
use crate::sys::io::{FileId, Io};

/// What the queue counts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct QueueReport {
    /// I/Os that the engine can have in flight.
    pub depth: usize,
    /// tiocbs that there are.
    pub size: usize,
    /// tiocbs that wait.
    pub waiting: usize,
    /// tiocbs in I/Os that are submitted or being submitted.
    pub pending: usize,
    /// I/Os that are submitted or being submitted.
    pub in_flight: usize,
    /// tiocbs so far.
    pub queued: u64,
    /// tiocbs that were merged into the I/O of another.
    pub merged: u64,
    /// Merged I/Os that failed and were split.
    pub split: u64,
    /// I/Os that came back short and were submitted again.
    pub resubmitted: u64,
    /// Times that a failed tiocb was to be tried again.
    pub retried: u64,
    /// tiocbs that wait to be tried again.
    pub parked: usize,
    /// tiocbs that lack space: they are held, or just being tried again.
    pub without_space: usize,
    /// I/Os the main loop submitted by itself.
    pub inline: u64,
    /// Of those, the ones that would have blocked and went to the thread.
    pub would_block: u64,
    /// Calls of the engine's submit.
    pub batches: u64,
    /// Largest batch it took at once.
    pub largest_batch: u64,
    /// I/Os it took.
    pub submitted: u64,
    /// Times it said EAGAIN.
    pub busy: u64,
    /// I/Os it refused.
    pub refused: u64,
    /// How long the submission that runs now has taken, µs; none if none runs.
    pub submitting_us: Option<u64>,
}

/// Where a tiocb is, for debug-queue.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TiocbReport {
    /// "waiting", "submit thread" (not yet begun), "engine", or "retry: " and why.
    pub held_by: String,
    /// Its I/O's tag.
    pub io: Option<u32>,
    /// The tiocb that leads its I/O, where it is not itself.
    pub merged_into: Option<u32>,
    /// Its own number.
    pub tiocb: u32,
    /// Byte offset in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// The file, in the engine.
    #[serde(skip)]
    pub file: FileId,
    /// Its layer of the image; 0 is the one that is written.
    pub layer: u32,
    /// Its path.
    pub path: String,
}

impl Queue {
    /// What was counted.
    pub fn report(&self) -> QueueReport {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let since = load(&self.submission.counters.since);
        QueueReport {
            waiting: self.waiting_count,
            pending: self.tiocbs.iter().filter(|tiocb| matches!(tiocb.state, State::Pending(_))).count(),
            in_flight: self.in_flight,
            parked: self.parked.len(),
            without_space: self.lacks_space(),
            batches: load(&self.submission.counters.batches),
            largest_batch: load(&self.submission.counters.largest),
            submitted: load(&self.submission.counters.accepted),
            busy: load(&self.submission.counters.busy),
            refused: load(&self.submission.counters.refused),
            submitting_us: (since != 0).then(|| (now() - since) / 1000),
            ..self.report.clone()
        }
    }

    /// What its memory is.
    pub fn memory(&self) -> Vec<Part> {
        let (size, depth) = (self.tiocbs.len(), self.submission.engine.depth);
        let tiocb = size_of::<Tiocb>() + size_of::<(Finished, u64)>() + size_of::<u32>();
        // Idle or batched, head; and waiting for the thread, taken by it, or refused.
        let lists = 2 * size_of::<Box<Io>>() + size_of::<u32>();
        let handed_over = if self.submission.thread.is_some() { 4 * size_of::<Box<Io>>() } else { 0 };
        let mut parts = vec![
            Part::fixed("tiocbs", size * tiocb),
            Part::fixed("statistics of files", size_of_val(&*self.traffic)),
            Part::fixed("I/Os", depth * (Io::bytes(self.iovecs) + lists + handed_over)),
        ];
        if self.submission.thread.is_some() {
            parts.push(Part::threads("submit thread", 1));
        }
        if let Some(pool) = self.submission.engine.submit.capability::<Pool>() {
            let PoolReport { min, max, .. } = pool.report();
            parts.push(Part::threads("pool and its maker", min + 1));
            parts.push(Part::each("thread of the pool", STACK_SIZE, max - min));
        }
        parts
    }

    /// All tiocbs, each with its request.
    pub fn inspect(&self) -> Vec<(RequestId, TiocbReport)> {
        let mut unbegun = Vec::new();
        if let Some(thread) = &self.submission.thread {
            thread.handover().look(|io| unbegun.push(io.tag));
        }
        let used = (0..).zip(&self.tiocbs).filter_map(|(index, tiocb)| Some((index, tiocb.state, tiocb.transfer?)));
        used.map(|(tiocb, state, transfer)| {
            let io = if let State::Pending(tag) = state { Some(tag) } else { None };
            let held_by = match (state, io) {
                (State::Parked(errno), _) => format!("retry: {errno}"),
                (_, None) => "waiting".to_owned(),
                (_, Some(tag)) if unbegun.contains(&tag) => "submit thread".to_owned(),
                (_, Some(_)) => "engine".to_owned(),
            };
            let merged_into = io.map(|tag| self.heads[tag as usize]).filter(|head| *head != tiocb);
            let Transfer { offset, len, owner, file, .. } = transfer;
            (owner, TiocbReport { held_by, io, merged_into, tiocb, offset, len, file, layer: 0, path: String::new() })
        })
        .collect()
    }
}
