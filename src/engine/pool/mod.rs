//! A pool of threads that carry I/Os out with the system calls that wait for them: an engine of its own, and what other
//! engines give to it that the kernel does not do asynchronously.
//!
//! ## Who makes threads
//!
//! A thread of its own, the maker, and nobody else: where the host is short of memory, a `clone` waits until there is some,
//! and what waits then must not be a request, nor the main loop, which would reap nothing meanwhile, nor a thread of the pool
//! that the memory's coming may depend on. (With pool threads that made each other, a host that swapped to such a disk stood
//! still: the only thread was making the second one.) The first threads, as many as the minimum, and the maker are made at
//! the start; all descend from the thread that called [`Pool::start`], and by that from the first one, whose CPUs and priority they
//! have, never a requester's. One is being made at a time, never under the lock; one that was just made calls for the next if there still
//! are too few. Nothing counts on a thread before it is there.
//!
//! ## What is promised
//!
//! The minimum is all that the data path needs. Threads beyond it make it faster; making one allocates, and where the
//! system has none for us (EAGAIN, ENOMEM), that is counted and tried again [a while](RETRY) later. Nothing else here
//! allocates: the queues have their room from the start.

use std::any::{Any, TypeId};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

pub use self::life::{BoundsError, PoolReport};
use self::life::{Come, Life, Sleeper, Step};
use super::{Completion, Engine, Inline, Reap, Setup, Submit, hand_out, wake};
use crate::blocking::{Blocking, Caller, spawn};
use crate::submit::STACK_SIZE;
use crate::sys::file::Backing;
use crate::sys::io::Io;

pub mod life;

/// How long no thread is made after one could not be.
pub const RETRY: Duration = Duration::from_millis(100);

/// How many threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threads {
    /// At least; 1 or more. They exist before anything is served.
    pub min: usize,
    /// At most.
    pub max: usize,
    /// Those beyond the minimum end when nobody has needed them for so long.
    pub idle: Duration,
}

impl Default for Threads {
    fn default() -> Threads {
        Threads { min: 1, max: 64, idle: Duration::from_secs(10) }
    }
}

/// Opens the pool as an engine. Errors are those of [`Pool::start`].
pub fn open(blocking: &Blocking, setup: &Setup) -> io::Result<Engine> {
    let (pool, finishing) = Pool::start(blocking, setup)?;
    // Handing over never blocks, whatever the I/O does.
    Ok(Engine {
        name: "threads",
        depth: setup.depth,
        inline: Inline::Always,
        submit: Arc::new(pool),
        reap: Box::new(finishing),
    })
}

/// The threads of a pool, to be joined.
#[derive(Debug, Default)]
struct Handles {
    /// Of those that have not ended, by number.
    live: Vec<(u64, JoinHandle<()>)>,
    /// Of the one that ended last. The next one joins it: what a thread leaves behind goes no sooner.
    ended: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    life: Life<Box<Io>, Completion>,
    files: Arc<[Backing]>,
    event: Arc<EventFd>,
    idle: Duration,
    handles: Mutex<Handles>,
}

impl Shared {
    /// Starts the thread with that number.
    fn spawn(self: &Arc<Self>, blocking: &Blocking, id: u64, come: Come<Completion>) -> io::Result<()> {
        let shared = Arc::clone(self);
        // Held over the call: the thread's handle is here before it can end. Nothing else waits for it.
        let mut handles = self.handles.lock().unwrap();
        let handle = spawn(blocking, "pool", STACK_SIZE, move |_| shared.run(id, come))?;
        handles.live.push((id, handle));
        Ok(())
    }

    /// Makes threads that are wanted, as long as the pool lives.
    fn make(self: &Arc<Self>, blocking: &Blocking) {
        while let Some(id) = self.life.birth() {
            if self.spawn(blocking, id, Come::Born).is_err() {
                self.life.unborn(RETRY);
            }
        }
    }

    fn run(self: Arc<Self>, id: u64, mut come: Come<Completion>) {
        let me = Sleeper::new(id);
        loop {
            come = match self.life.next(&me, come, self.idle) {
                Step::Run(io) => {
                    let result = self.files[usize::from(io.file.0)].carry_out(&io);
                    Come::Done((io, result))
                }
                Step::Tell => {
                    wake(&self.event);
                    Come::Looking
                }
                Step::End => break,
            };
        }
        let mut handles = self.handles.lock().unwrap();
        // It is not there if the pool's end is already waiting for this thread.
        let Some(at) = handles.live.iter().position(|(live, _)| *live == id) else { return };
        let (_, mine) = handles.live.swap_remove(at);
        let before = handles.ended.replace(mine);
        drop(handles);
        join(before);
    }
}

fn join(handle: Option<JoinHandle<()>>) {
    // A panic of the thread has been reported by the panic hook.
    handle.map(JoinHandle::join).transpose().ok();
}

/// The pool, for those who submit and those who steer. Dropping it waits until all that it was given is done, and for its
/// threads.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    maker: Option<JoinHandle<()>>,
}

impl Pool {
    /// Starts the minimum of threads. Fails where the bounds are wrong (EINVAL), or where the system does not have that many
    /// threads.
    pub fn start(blocking: &Blocking, setup: &Setup) -> io::Result<(Pool, Finishing)> {
        let Threads { min, max, idle } = setup.threads;
        let life =
            Life::new(setup.depth, min, max).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let shared = Arc::new(Shared {
            life,
            files: Arc::clone(&setup.files),
            event: Arc::clone(&setup.event),
            idle,
            handles: Mutex::default(),
        });
        let mut pool = Pool { shared: Arc::clone(&shared), maker: None };
        for id in 1..=min as u64 {
            shared.spawn(blocking, id, Come::Looking).map_err(|error| {
                io::Error::new(error.kind(), format!("start thread {id} of {min} of the pool: {error}"))
            })?;
        }
        let theirs = Arc::clone(&shared);
        pool.maker = Some(spawn(blocking, "pool maker", STACK_SIZE, move |blocking| theirs.make(blocking))?);
        Ok((pool, Finishing { shared, taken: VecDeque::with_capacity(setup.depth) }))
    }

    /// Hands over I/Os. Never blocks. They are begun in this order.
    pub fn give(&self, ios: impl Iterator<Item = Box<Io>>) {
        self.shared.life.give(ios);
    }

    /// Ends the I/O with that tag with ECANCELED, if no thread has begun it. False: it can only be waited for.
    pub fn cancel(&self, tag: u32) -> bool {
        let Some(io) = self.shared.life.cancel(|io| io.tag == tag) else { return false };
        if self.shared.life.finish((io, Err(Errno::ECANCELED))) {
            wake(&self.shared.event);
        }
        true
    }

    /// Changes the bounds. Missing threads are made one by one, and those that are too many end when their work is done.
    pub fn set(&self, min: usize, max: usize) -> Result<(), BoundsError> {
        self.shared.life.set(min, max)
    }

    /// What there is to see.
    pub fn report(&self) -> PoolReport {
        self.shared.life.report()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.life.stop();
        // Before the others: after it there are no new ones.
        join(self.maker.take());
        loop {
            let next = self.shared.handles.lock().unwrap().live.pop();
            let Some((_, handle)) = next else { break };
            join(Some(handle));
        }
        let ended = self.shared.handles.lock().unwrap().ended.take();
        join(ended);
    }
}

impl Submit for Pool {
    fn submit(&self, batch: &mut VecDeque<Box<Io>>, limit: usize, _: Caller) -> Result<usize, Errno> {
        let count = batch.len().min(limit);
        self.give(batch.drain(..count));
        Ok(count)
    }

    fn cancel(&self, tag: u32) -> bool {
        Pool::cancel(self, tag)
    }

    fn offers(&self, kind: TypeId) -> Option<&dyn Any> {
        (kind == TypeId::of::<Pool>()).then_some(self)
    }

    fn event(&self) -> &Arc<EventFd> {
        &self.shared.event
    }
}

/// What the pool has finished.
#[derive(Debug)]
pub struct Finishing {
    shared: Arc<Shared>,
    /// Swapped with what is finished.
    taken: VecDeque<Completion>,
}

impl Reap for Finishing {
    fn ready(&self) -> bool {
        self.shared.life.has_finished()
    }

    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        self.shared.life.drain(&mut self.taken);
        hand_out(&mut self.taken, done)
    }
}
