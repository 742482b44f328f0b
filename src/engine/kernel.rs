//! What the kernel's asynchronous engines have in common: a pool behind them, for what the kernel would do by waiting.

use std::any::{Any, TypeId};
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
///
/// Where some files are open with O_DIRECT and some are not, the pool does all that is on the latter: `io_submit` would do it itself, and
/// hold up what is submitted behind it, or the main loop.
pub(super) fn engine(
    name: &'static str,
    kernel: impl Kernel,
    completions: impl Reap + 'static,
    setup: &Setup,
    blocking: &Blocking,
) -> io::Result<Engine> {
    let (pool, finished) = Pool::start(blocking, setup)?;
    let files = &setup.files;
    let mixed = files.iter().any(|file| file.direct) && files.iter().any(|file| !file.direct);
    let (batch, event) = (setup.batch, Arc::clone(&setup.event));
    let inline = files.iter().map(|file| match Inline::of_file(file) {
        // It is handed to the pool, whatever it is.
        Inline::Never if mixed => Inline::Always,
        inline => inline,
    });
    let inline = Inline::of_files(inline);
    let submit: Arc<dyn Submit> = if mixed {
        let kernel = DirectOnly { kernel, direct: files.iter().map(|file| file.direct).collect() };
        Arc::new(KernelSubmit { kernel, pool, batch, event })
    } else {
        Arc::new(KernelSubmit { kernel, pool, batch, event })
    };
    let reap = Box::new(KernelReap { completions, finished });
    Ok(Engine { name, depth: setup.depth, inline, submit, reap })
}

/// The kernel's side for the files that are open with O_DIRECT.
struct DirectOnly<K> {
    kernel: K,
    /// Of each file.
    direct: Box<[bool]>,
}

impl<K: Kernel> Kernel for DirectOnly<K> {
    fn lacks(&self, io: &Io) -> bool {
        !self.direct[usize::from(io.file.0)] || self.kernel.lacks(io)
    }

    fn submit(&self, batch: &mut VecDeque<Box<Io>>, count: usize, by: Caller) -> Result<usize, Errno> {
        self.kernel.submit(batch, count, by)
    }

    fn cancel(&self, tag: u32) -> bool {
        self.kernel.cancel(tag)
    }

    fn tidy(&self) {
        self.kernel.tidy();
    }
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

    fn offers(&self, kind: TypeId) -> Option<&dyn Any> {
        self.pool.offers(kind)
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Mutex;

    use super::*;
    use crate::engine::Completion;
    use crate::sys::file::Backing;
    use crate::sys::io::{FileId, IoOp};

    /// Notes the files of what it is given, and does nothing with it.
    #[derive(Default)]
    struct Noting(Mutex<Vec<u16>>);

    impl Kernel for Arc<Noting> {
        fn lacks(&self, io: &Io) -> bool {
            io.op == IoOp::Discard
        }

        fn submit(&self, batch: &mut VecDeque<Box<Io>>, count: usize, _: Caller) -> Result<usize, Errno> {
            self.0.lock().unwrap().extend(batch.drain(..count).map(|io| io.file.0));
            Ok(count)
        }

        fn cancel(&self, _: u32) -> bool {
            false
        }
    }

    struct Nothing;

    impl Reap for Nothing {
        fn ready(&self) -> bool {
            false
        }

        fn reap(&mut self, _: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
            0
        }
    }

    fn made(kinds: &[(bool, bool)]) -> (Arc<Noting>, Engine) {
        let blocking = Blocking::before_main_loop();
        let file = |(direct, block_device): &(bool, bool)| Backing {
            file: File::open("/dev/null").unwrap(),
            direct: *direct,
            block_device: *block_device,
        };
        let setup = Setup::new(kinds.iter().map(file).collect(), 8).unwrap();
        let kernel = Arc::new(Noting::default());
        let engine = engine("noting", Arc::clone(&kernel), Nothing, &setup, &blocking).unwrap();
        (kernel, engine)
    }

    #[test]
    fn beside_direct_files_the_pool_does_all_that_is_on_a_buffered_one() {
        let (kernel, mut engine) = made(&[(true, false), (false, false), (true, true)]);
        let idle = |writes| Inline::Idle { writes };
        assert_eq!(engine.inline, Inline::ByFile([idle(false), Inline::Always, idle(true)].into()));
        let mut batch: VecDeque<_> = VecDeque::new();
        for (tag, file) in (0..).zip([0, 1, 1, 2, 1]) {
            let mut io = Io::new(tag, 1);
            io.begin(IoOp::Flush, FileId(file), 0);
            batch.push_back(io);
        }
        let blocking = Blocking::before_main_loop();
        while !batch.is_empty() {
            engine.submit.submit(&mut batch, 8, Caller::Thread(&blocking)).unwrap();
        }
        assert_eq!(*kernel.0.lock().unwrap(), [0, 2]);
        let mut done: Vec<Completion> = Vec::new();
        while done.len() < 3 {
            engine.reap.reap(&mut |io, result| done.push((io, result)));
        }
        assert!(done.iter().all(|(io, _)| io.file == FileId(1)));
    }

    #[test]
    fn files_of_one_kind_are_the_kernels() {
        for (kinds, inline) in [
            ([(false, false), (false, true)], Inline::Never),
            ([(true, false), (true, false)], Inline::Idle { writes: false }),
            ([(true, true), (true, true)], Inline::Idle { writes: true }),
        ] {
            let (kernel, engine) = made(&kinds);
            assert_eq!(engine.inline, inline);
            let mut io = Io::new(0, 1);
            io.begin(IoOp::Read, FileId(1), 0);
            let mut batch = VecDeque::from([io]);
            engine.submit.submit(&mut batch, 1, Caller::MainLoop).unwrap();
            assert_eq!(*kernel.0.lock().unwrap(), [1]);
        }
    }
}
