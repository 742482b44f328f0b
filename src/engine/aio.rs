//! The Linux AIO engine: `io_submit` in batches, completions from the shared ring. What the kernel's AIO lacks goes
//! to a pool of threads.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use super::kernel::{self, Kernel};
use super::{Engine, Reap, Setup};
use crate::blocking::{Blocking, Caller};
use crate::sys::aio::{self, Completions, Context, Reading, system_limit};
use crate::sys::io::{Io, IoOp};

/// Opens the engine. Where the machine's AIO contexts are used up, the error names the sysctl.
pub fn open(blocking: &Blocking, setup: &Setup) -> io::Result<Engine> {
    let depth = setup.depth;
    let (context, completions) = aio::setup(depth, Arc::clone(&setup.files), Reading::Ring, Arc::clone(&setup.event))
        .map_err(|error| explain(error, depth))?;
    kernel::engine("aio", Aio { context, flushes: AtomicBool::new(true) }, completions, setup, blocking)
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

struct Aio {
    context: Arc<Context>,
    /// The kernel has an asynchronous fdsync for the file, as far as we know.
    flushes: AtomicBool,
}

impl Kernel for Aio {
    fn lacks(&self, io: &Io) -> bool {
        match io.op {
            IoOp::Read | IoOp::Write { .. } => false,
            IoOp::Flush => !self.flushes.load(Ordering::Relaxed),
            IoOp::Discard | IoOp::WriteZeroes { .. } | IoOp::Status => true,
        }
    }

    fn submit(&self, batch: &mut VecDeque<Box<Io>>, count: usize, _: Caller) -> Result<usize, Errno> {
        let result = self.context.submit(batch, count);
        if result == Err(Errno::EINVAL) && batch.front().is_some_and(|io| io.op == IoOp::Flush) {
            self.flushes.store(false, Ordering::Relaxed);
        }
        result
    }

    fn cancel(&self, tag: u32) -> bool {
        self.context.cancel(tag)
    }
}

impl Reap for Completions {
    fn ready(&self) -> bool {
        Completions::ready(self)
    }

    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        Completions::reap(self, usize::MAX, done)
    }
}
