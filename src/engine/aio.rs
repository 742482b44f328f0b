//! The Linux AIO engine: `io_submit` in batches, completions from the shared ring. What the kernel's AIO lacks goes
//! to a pool of threads.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::pool::{Finishing, Pool, Threads};
use super::{Engine, Inline, Reap, Submit};
use crate::sys::aio::{BATCH_MAX, Completions, Context, Reading, setup, system_limit};
use crate::sys::file::Backing;
use crate::sys::io::{Io, IoOp};

/// Opens the engine for `depth` I/Os in flight on `files`, at most `batch` of them in one system call; `threads` do what
/// the kernel's AIO lacks.
pub fn open(
    files: &Arc<[Backing]>,
    depth: usize,
    batch: usize,
    threads: Threads,
    event: &Arc<EventFd>,
) -> io::Result<Engine> {
    let (context, completions) =
        setup(depth, Arc::clone(files), Reading::Ring, Arc::clone(event)).map_err(|error| explain(error, depth))?;
    let (pool, finished) = Pool::start(files, depth, threads, event)?;
    let submit = AioSubmit {
        context,
        pool,
        flushes: AtomicBool::new(true),
        batch: batch.min(BATCH_MAX),
        event: Arc::clone(event),
    };
    let reap = Box::new(AioReap { completions, finished });
    Ok(Engine { name: "aio", depth, inline: Inline::of_files(files), submit: Arc::new(submit), reap, faults: None })
}

fn explain(error: io::Error, depth: usize) -> io::Error {
    match (error.raw_os_error(), system_limit()) {
        (Some(libc::EAGAIN), Some((most, taken))) => io::Error::new(
            error.kind(),
            format!(
                "io_setup for {depth} I/Os: {error}: {taken} of the machine's {most} are taken; raise the sysctl \
                 fs.aio-max-nr, or lower engine.depth"
            ),
        ),
        _ => io::Error::new(error.kind(), format!("io_setup for {depth} I/Os: {error}")),
    }
}

struct AioSubmit {
    context: Arc<Context>,
    pool: Pool,
    /// The kernel has an asynchronous fdsync for the file, as far as we know.
    flushes: AtomicBool,
    /// I/Os in one system call.
    batch: usize,
    event: Arc<EventFd>,
}

impl AioSubmit {
    fn for_pool(&self, io: &Io) -> bool {
        match io.op {
            IoOp::Read | IoOp::Write { .. } => false,
            IoOp::Flush => !self.flushes.load(Ordering::Relaxed),
            IoOp::Discard | IoOp::WriteZeroes { .. } | IoOp::Status => true,
        }
    }

    /// Gives the first `count` of `batch` to the pool.
    fn divert(&self, batch: &mut VecDeque<Box<Io>>, count: usize) -> usize {
        self.pool.give(batch.drain(..count));
        count
    }
}

impl Submit for AioSubmit {
    fn submit(&self, batch: &mut VecDeque<Box<Io>>, limit: usize) -> Result<usize, Errno> {
        let limit = limit.min(self.batch);
        let diverted = batch.iter().take(limit).take_while(|io| self.for_pool(io)).count();
        if diverted > 0 {
            return Ok(self.divert(batch, diverted));
        }
        let limit = batch.iter().take_while(|io| !self.for_pool(io)).count().min(limit);
        match self.context.submit(batch, limit) {
            Err(Errno::EINVAL) if batch.front().is_some_and(|io| io.op == IoOp::Flush) => {
                self.flushes.store(false, Ordering::Relaxed);
                Ok(self.divert(batch, 1))
            }
            other => other,
        }
    }

    fn cancel(&self, tag: u32) -> bool {
        self.pool.cancel(tag) || self.context.cancel(tag)
    }

    fn pool(&self) -> Option<&Pool> {
        Some(&self.pool)
    }

    fn event(&self) -> &EventFd {
        &self.event
    }
}

struct AioReap {
    completions: Completions,
    finished: Finishing,
}

impl Reap for AioReap {
    fn ready(&self) -> bool {
        self.completions.ready() || self.finished.ready()
    }

    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        self.completions.reap(usize::MAX, done) + self.finished.reap(done)
    }
}
