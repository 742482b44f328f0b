//! What the kernel's asynchronous engines have in common: a pool behind them, for what the kernel would do by waiting.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::pool::{Finishing, Pool};
use super::{Engine, Inline, Reap, Setup, Submit};
use crate::blocking::{Blocking, Caller};
use crate::sys::io::Io;

/// The kernel's side of an engine.
pub(super) trait Kernel: Send + Sync + 'static {
    /// Whether the pool is to do this one, as far as is known.
    fn lacks(&self, io: &Io) -> bool;

    /// As [`Submit::submit`], for the first `count` of `batch`, none of which it [lacks](Self::lacks). On an error it may
    /// have learnt that it lacks the first.
    fn submit(&self, batch: &mut VecDeque<Box<Io>>, count: usize, by: Caller) -> Result<usize, Errno>;

    /// As [`Submit::cancel`].
    fn cancel(&self, tag: u32) -> bool;

    /// As [`Submit::tidy`].
    fn tidy(&self) {}
}

/// An engine of the kernel's two halves and a pool.
pub(super) fn engine(
    name: &'static str,
    kernel: impl Kernel,
    completions: impl Reap + 'static,
    setup: &Setup,
    blocking: &Blocking,
) -> io::Result<Engine> {
    let (pool, finished) = Pool::start(blocking, setup)?;
    let submit = KernelSubmit { kernel, pool, batch: setup.batch, event: Arc::clone(&setup.event) };
    Ok(Engine {
        name,
        depth: setup.depth,
        inline: Inline::of_files(&setup.files),
        submit: Arc::new(submit),
        reap: Box::new(KernelReap { completions, finished }),
        faults: None,
    })
}

struct KernelSubmit<K> {
    kernel: K,
    pool: Pool,
    /// I/Os in one system call.
    batch: usize,
    event: Arc<EventFd>,
}

impl<K: Kernel> KernelSubmit<K> {
    fn divert(&self, batch: &mut VecDeque<Box<Io>>, count: usize) -> usize {
        self.pool.give(batch.drain(..count));
        count
    }
}

impl<K: Kernel> Submit for KernelSubmit<K> {
    fn submit(&self, batch: &mut VecDeque<Box<Io>>, limit: usize, by: Caller) -> Result<usize, Errno> {
        let limit = limit.min(self.batch);
        let lacking = batch.iter().take(limit).take_while(|io| self.kernel.lacks(io)).count();
        if lacking > 0 {
            return Ok(self.divert(batch, lacking));
        }
        let count = batch.iter().take(limit).take_while(|io| !self.kernel.lacks(io)).count();
        match self.kernel.submit(batch, count, by) {
            Err(_) if batch.front().is_some_and(|io| self.kernel.lacks(io)) => Ok(self.divert(batch, 1)),
            other => other,
        }
    }

    fn cancel(&self, tag: u32) -> bool {
        self.pool.cancel(tag) || self.kernel.cancel(tag)
    }

    fn tidy(&self) {
        self.kernel.tidy();
    }

    fn pool(&self) -> Option<&Pool> {
        Some(&self.pool)
    }

    fn event(&self) -> &Arc<EventFd> {
        &self.event
    }
}

struct KernelReap<C> {
    completions: C,
    finished: Finishing,
}

impl<C: Reap> Reap for KernelReap<C> {
    fn ready(&self) -> bool {
        self.completions.ready() || self.finished.ready()
    }

    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        self.completions.reap(done) + self.finished.reap(done)
    }
}
