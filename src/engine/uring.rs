//! The io_uring engine. What the kernel would do by waiting in a worker thread of its own, and what differs between files
//! and block devices, goes to the pool.
//!
//! The submit thread is less of a promise here than with Linux AIO: see [`sys::uring`](crate::sys::uring).

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::pool::{Finishing, Pool, Threads};
use super::{Engine, Inline, Reap, Submit};
use crate::sys::file::Backing;
use crate::sys::io::{Io, IoOp};
pub use crate::sys::uring::Settings;
use crate::sys::uring::{Completions, Ring, SetupError, setup};

/// Opens the engine for I/O on `files`, at most `batch` I/Os in one system call.
pub fn open(
    files: &Arc<[Backing]>,
    settings: Settings,
    batch: usize,
    threads: Threads,
    event: &Arc<EventFd>,
) -> io::Result<Engine> {
    let depth = settings.depth;
    let (ring, completions) = setup(settings, files, event).map_err(explain)?;
    let (pool, finished) = Pool::start(files, depth, threads, event)?;
    let submit = UringSubmit { ring, pool, batch, event: Arc::clone(event) };
    let reap = Box::new(UringReap { completions, finished });
    Ok(Engine {
        name: "io_uring",
        depth,
        inline: Inline::of_files(files),
        submit: Arc::new(submit),
        reap,
        faults: None,
    })
}

fn explain(error: SetupError) -> io::Error {
    let SetupError { step, errno, only_sqpoll } = error;
    let why = match errno {
        _ if only_sqpoll => "engine.sqpoll = false would do; with it, kernels before 5.11 want CAP_SYS_NICE",
        Errno::ENOSYS => "this kernel has no io_uring, or a seccomp filter says so",
        Errno::EPERM | Errno::EACCES => {
            "io_uring is forbidden here, by the sysctl kernel.io_uring_disabled or a seccomp filter (of a container, or \
             SystemCallFilter= of a systemd unit)"
        }
        Errno::ENOMEM => "no memory may be locked for it: raise RLIMIT_MEMLOCK",
        _ => "it cannot be set up",
    };
    let kind = io::Error::from(errno).kind();
    let text = format!("{step}: {}: {why}; engine.name = \"aio\" or \"threads\" does without", errno.desc());
    io::Error::new(kind, text)
}

struct UringSubmit {
    ring: Arc<Ring>,
    pool: Pool,
    /// I/Os in one system call.
    batch: usize,
    event: Arc<EventFd>,
}

fn for_pool(io: &Io) -> bool {
    matches!(io.op, IoOp::Discard | IoOp::WriteZeroes { .. } | IoOp::Status)
}

impl Submit for UringSubmit {
    fn submit(&self, batch: &mut VecDeque<Box<Io>>, limit: usize) -> Result<usize, Errno> {
        let diverted = batch.iter().take(limit).take_while(|io| for_pool(io)).count();
        if diverted > 0 {
            self.pool.give(batch.drain(..diverted));
            return Ok(diverted);
        }
        let count = batch.iter().take(limit.min(self.batch)).take_while(|io| !for_pool(io)).count();
        self.ring.submit(batch, count)
    }

    fn cancel(&self, tag: u32) -> bool {
        self.pool.cancel(tag) || self.ring.cancel(tag)
    }

    fn pool(&self) -> Option<&Pool> {
        Some(&self.pool)
    }

    fn tidy(&self) {
        self.ring.tidy();
    }

    fn event(&self) -> &EventFd {
        &self.event
    }
}

struct UringReap {
    completions: Completions,
    finished: Finishing,
}

impl Reap for UringReap {
    fn ready(&self) -> bool {
        self.completions.ready() || self.finished.ready()
    }

    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        self.completions.reap(done) + self.finished.reap(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_it_is_explained_with_a_remedy() {
        for (errno, expected) in [
            (Errno::ENOSYS, "this kernel has no io_uring"),
            (Errno::EPERM, "kernel.io_uring_disabled"),
            (Errno::ENOMEM, "RLIMIT_MEMLOCK"),
            (Errno::EINVAL, "Invalid argument"),
        ] {
            let text = explain(SetupError { step: "io_uring_setup", errno, only_sqpoll: false }).to_string();
            assert!(text.contains(expected) && text.contains("engine.name = \"aio\""), "{text}");
        }
        let text = explain(SetupError { step: "io_uring_setup", errno: Errno::EPERM, only_sqpoll: true }).to_string();
        assert!(text.contains("engine.sqpoll") && text.contains("CAP_SYS_NICE"), "{text}");
    }

    #[test]
    fn where_it_is_forbidden_the_error_says_so() {
        crate::sys::uring::tests::forbidden(Errno::EPERM, || {
            let file = tempfile::tempfile().unwrap();
            let files: Arc<[Backing]> = Arc::new([Backing { file, direct: false, block_device: false }]);
            let settings = Settings { depth: 8, sqpoll_idle_ms: None, cq_entries: None };
            let event = super::super::event().unwrap();
            let text = open(&files, settings, 64, Threads::default(), &event).unwrap_err().to_string();
            assert!(text.contains("seccomp") && text.contains("engine.name"), "{text}");
        });
    }
}
