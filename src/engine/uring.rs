//! The io_uring engine. What the kernel would do by waiting in a worker thread of its own, and what differs between files
//! and block devices, goes to the pool.
//!
//! The submit thread is less of a promise here than with Linux AIO: see [`sys::uring`](crate::sys::uring).

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use nix::errno::Errno;

use super::kernel::{self, Kernel};
use super::{Engine, Reap, Setup};
use crate::blocking::{Blocking, Caller};
use crate::sys::io::{Io, IoOp};
pub use crate::sys::uring::Settings;
use crate::sys::uring::{self, Completions, Ring, SetupError};

/// Opens the engine. Where the system forbids io_uring, the error says what does, and what to use instead.
pub fn open(blocking: &Blocking, setup: &Setup, settings: Settings) -> io::Result<Engine> {
    let (ring, completions) = uring::setup(blocking, settings, &setup.files, &setup.event).map_err(explain)?;
    kernel::engine("io_uring", ring, completions, setup, blocking)
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

impl Kernel for Arc<Ring> {
    fn lacks(&self, io: &Io) -> bool {
        matches!(io.op, IoOp::Discard | IoOp::WriteZeroes { .. } | IoOp::Status)
    }

    fn submit(&self, batch: &mut VecDeque<Box<Io>>, count: usize, by: Caller) -> Result<usize, Errno> {
        Ring::submit(self, batch, count, by)
    }

    fn cancel(&self, tag: u32) -> bool {
        Ring::cancel(self, tag)
    }

    fn tidy(&self) {
        Ring::tidy(self);
    }
}

impl Reap for Completions {
    fn ready(&self) -> bool {
        Completions::ready(self)
    }

    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        Completions::reap(self, done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::file::Backing;

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
        uring::tests::forbidden(Errno::EPERM, || {
            let file = tempfile::tempfile().unwrap();
            let files: Arc<[Backing]> = Arc::new([Backing { file, direct: false, block_device: false }]);
            let settings = Settings { depth: 8, sqpoll_idle_ms: None, cq_entries: None };
            let text = open(&Blocking::before_main_loop(), &Setup::new(files, 8).unwrap(), settings)
                .unwrap_err()
                .to_string();
            assert!(text.contains("seccomp") && text.contains("engine.name"), "{text}");
        });
    }
}
