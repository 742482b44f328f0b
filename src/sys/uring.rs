//! io_uring (io_uring(7), io_uring_setup(2), io_uring_enter(2), io_uring_register(2)): the rings are the crate `io-uring`'s;
//! here is who may touch which end, and who owns an I/O meanwhile.
//!
//! The submission ring has one user at a time, by a lock; the completion ring has one, the main loop. Both ends are memory
//! that the kernel shares, so completions are seen without a system call.
//!
//! The kernel posts completions by task work, in the context of the task that submitted them. A submit thread that is
//! blocked inside `io_uring_enter`, without an interruptible sleep, holds up the completions of what it submitted before;
//! with Linux AIO, which posts from the interrupt, it does not. On the other hand the ring seldom blocks: what would wait is
//! given to a worker of the kernel. What is left is waiting for memory for the request itself.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread::ThreadId;
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{EnterFlags, IoUring, opcode};
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::file::Backing;
use super::io::{Io, IoOp};
use super::memory::Memory;

/// Memories whose pages the kernel keeps pinned, so that it need not look them up for each I/O.
const BUFFERS: usize = 64;
/// How long a submit thread waits where the kernel has no memory for a submission.
const NO_MEMORY_WAIT: Duration = Duration::from_millis(1);
/// Set in the `user_data` of a cancellation; an I/O's is its address, which is even.
const CANCELLATION: u64 = 1;

/// What a ring is set up with.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// I/Os in flight.
    pub depth: usize,
    /// A thread of the kernel submits, and sleeps after so many milliseconds without work.
    pub sqpoll_idle_ms: Option<u32>,
    /// Entries of the completion queue; not set: as many as can ever be used. With fewer, the kernel keeps what does not fit.
    pub cq_entries: Option<u32>,
}

/// The submitting end's own.
#[derive(Debug)]
struct Submitting {
    /// Memory behind each fixed buffer, by its index. Named by its id: another can have its address later.
    buffers: Vec<Option<(u64, Weak<Memory>)>>,
    /// The kernel lets us have fixed buffers, as far as we know.
    fixed: bool,
    /// [`Memory::gone`] when the buffers were last looked through.
    gone: u64,
}

/// A ring; the submitting end.
pub struct Ring {
    ring: IoUring,
    sqpoll: bool,
    /// The completion ring does not hold all that can be in flight.
    may_overflow: bool,
    submitting: Mutex<Submitting>,
    /// Address of each I/O, by tag, once it was submitted. An I/O keeps its place as long as it lives.
    places: Box<[AtomicU64]>,
    /// The submission ring has entries that the kernel had no room for.
    leftover: AtomicBool,
    /// The main loop's thread, which must not wait.
    looper: ThreadId,
}

/// The completing end. There is one.
pub struct Completions {
    ring: Arc<Ring>,
}

/// A ring for I/O on `files`, whose indices are the [`FileId`](super::io::FileId)s. `event` becomes readable with each
/// completion. The caller is the main loop's thread.
pub fn setup(settings: Settings, files: &[Backing], event: &EventFd) -> io::Result<(Arc<Ring>, Completions)> {
    let mut builder = IoUring::builder();
    // Each I/O in flight may have a cancellation.
    builder.dontfork().setup_clamp().setup_cqsize(settings.cq_entries.unwrap_or(settings.depth as u32 * 2));
    if let Some(idle) = settings.sqpoll_idle_ms {
        builder.setup_sqpoll(idle);
    }
    let entries = settings.cq_entries.map_or(settings.depth as u32, |cq| cq.min(settings.depth as u32));
    let ring: IoUring = builder.build(entries)?;
    let submitter = ring.submitter();
    let descriptors: Vec<_> = files.iter().map(|file| file.file.as_raw_fd()).collect();
    submitter.register_files(&descriptors)?;
    submitter.register_eventfd(event.as_raw_fd())?;
    // Since Linux 5.19.
    let fixed = submitter.register_buffers_sparse(BUFFERS as u32).is_ok();
    // The kernel rounds up, and down where it has a limit.
    let may_overflow = (ring.params().cq_entries() as usize) < settings.depth * 2;
    let submitting = Submitting { buffers: vec![None; BUFFERS], fixed, gone: Memory::gone() };
    let ring = Arc::new(Ring {
        ring,
        sqpoll: settings.sqpoll_idle_ms.is_some(),
        may_overflow,
        submitting: Mutex::new(submitting),
        places: std::iter::repeat_with(|| AtomicU64::new(0)).take(settings.depth).collect(),
        leftover: AtomicBool::new(false),
        looper: std::thread::current().id(),
    });
    Ok((Arc::clone(&ring), Completions { ring }))
}

impl Ring {
    /// Gives the first I/Os of `batch`, at most `limit`, to the kernel with one system call (none, where its own thread is
    /// awake), and takes them out of it. EAGAIN: the submission ring is full. The operations are read, write and flush.
    pub fn submit(&self, batch: &mut VecDeque<Box<Io>>, limit: usize) -> Result<usize, Errno> {
        let mut submitting = self.submitting.lock().unwrap();
        self.forget_gone(&mut submitting);
        // SAFETY: the lock is held: this is the only user of the submission ring.
        let mut queue = unsafe { self.ring.submission_shared() };
        let count = batch.len().min(limit).min(queue.capacity() - queue.len());
        if count == 0 {
            drop(queue);
            self.enter(&submitting);
            return Err(Errno::EAGAIN);
        }
        for io in batch.drain(..count) {
            // From the moment of the push the kernel, and with it the completing thread, may own the I/O.
            let io = Box::into_raw(io);
            // SAFETY: just made from a box, and not yet submitted: nobody else has it.
            let entry = self.prepare(&mut submitting, unsafe { &mut *io });
            // SAFETY: the entry's buffers and iovecs live in the `Io`, which lives until its completion is reaped, because
            // it is no longer owned here; its file and buffer are registered.
            let pushed = unsafe { queue.push(&entry) };
            pushed.expect("there is room, as was just seen");
        }
        drop(queue);
        self.enter(&submitting);
        Ok(count)
    }

    fn prepare(&self, submitting: &mut Submitting, io: &mut Io) -> Entry {
        let address = std::ptr::from_mut(io) as u64;
        if let Some(place) = self.places.get(io.tag as usize) {
            place.store(address, Ordering::Release);
        }
        let file = Fixed(u32::from(io.file.0));
        // `nowait` is not passed on: the ring never waits for the I/O itself, but gives it to a worker of the kernel.
        let flags = if matches!(io.op, IoOp::Write { fua: true }) { libc::RWF_DSYNC } else { 0 };
        let fixed = io.single().and_then(|(memory, iovec)| Some((submitting.buffer(&self.ring, memory)?, iovec)));
        let iovecs = io.iovecs();
        let (pointer, pieces) = (iovecs.as_ptr(), iovecs.len() as u32);
        let entry = match (io.op, fixed) {
            (IoOp::Read, Some((index, iovec))) => {
                opcode::ReadFixed::new(file, iovec.iov_base.cast(), iovec.iov_len as u32, index)
                    .offset(io.offset)
                    .rw_flags(flags)
                    .build()
            }
            (IoOp::Read, None) => opcode::Readv::new(file, pointer, pieces).offset(io.offset).rw_flags(flags).build(),
            (IoOp::Write { .. }, Some((index, iovec))) => {
                opcode::WriteFixed::new(file, iovec.iov_base.cast(), iovec.iov_len as u32, index)
                    .offset(io.offset)
                    .rw_flags(flags)
                    .build()
            }
            (IoOp::Write { .. }, None) => {
                opcode::Writev::new(file, pointer, pieces).offset(io.offset).rw_flags(flags).build()
            }
            (IoOp::Flush, _) => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
            (IoOp::Discard | IoOp::WriteZeroes { .. } | IoOp::Status, _) => unreachable!("not given to the ring"),
        };
        entry.user_data(address)
    }

    /// Tells the kernel of what is in the submission ring.
    fn enter(&self, _: &MutexGuard<Submitting>) {
        loop {
            match self.ring.submitter().submit() {
                // SAFETY: the caller holds the lock: this is the only user of the submission ring.
                Ok(_) if self.sqpoll || unsafe { self.ring.submission_shared() }.is_empty() => break,
                // It stopped behind an entry that it refused, which completes with the error.
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // No memory for it. The main loop looks again when it reaps.
                Err(_) if std::thread::current().id() == self.looper => {
                    self.leftover.store(true, Ordering::Release);
                    return;
                }
                Err(_) => std::thread::sleep(NO_MEMORY_WAIT),
            }
        }
        self.leftover.store(false, Ordering::Release);
    }

    /// Asks the kernel to end the I/O with that tag early. False: somebody submits just now.
    pub fn cancel(&self, tag: u32) -> bool {
        let address = self.places.get(tag as usize).map_or(0, |place| place.load(Ordering::Acquire));
        let Ok(submitting) = self.submitting.try_lock() else { return false };
        if address == 0 {
            return false;
        }
        let entry = opcode::AsyncCancel::new(address).build().user_data(address | CANCELLATION);
        // SAFETY: the lock is held; the address is only compared with those in flight.
        let pushed = unsafe { self.ring.submission_shared().push(&entry) }.is_ok();
        if pushed {
            self.enter(&submitting);
        }
        pushed
    }

    /// Lets go of the pages of memories that are gone, unless somebody submits just now and will do it next time.
    pub fn tidy(&self) {
        if let Ok(mut submitting) = self.submitting.try_lock() {
            self.forget_gone(&mut submitting);
        }
    }

    fn forget_gone(&self, submitting: &mut Submitting) {
        let gone = Memory::gone();
        if gone == submitting.gone {
            return;
        }
        submitting.gone = gone;
        for (index, buffer) in submitting.buffers.iter_mut().enumerate() {
            if buffer.take_if(|(_, memory)| memory.strong_count() == 0).is_some() {
                let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
                // SAFETY: an empty buffer names no memory. An error leaves the pages pinned, and the index unused: what is
                // registered there next replaces it.
                let _ = unsafe { self.ring.submitter().register_buffers_update(index as u32, &[nothing], None) };
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel takes a closed ring apart some time later. Files that it holds until then would keep a file system from
        // being unmounted. Errors are for a ring that has none.
        let submitter = self.ring.submitter();
        let _ = submitter.unregister_files();
        let _ = submitter.unregister_buffers();
    }
}

impl Submitting {
    /// The index of the fixed buffer that is all of `memory`, which is made one if there is room.
    fn buffer(&mut self, ring: &IoUring, memory: &Arc<Memory>) -> Option<u16> {
        if !self.fixed {
            return None;
        }
        let is_it = |buffer: &Option<(u64, _)>| buffer.as_ref().is_some_and(|(id, _)| *id == memory.id());
        if let Some(index) = self.buffers.iter().position(is_it) {
            return Some(index as u16);
        }
        let index = self.buffers.iter().position(Option::is_none)?;
        let all = libc::iovec { iov_base: memory.at(0, memory.len()).cast(), iov_len: memory.len() };
        // SAFETY: the mapping is there; its pages stay pinned by the kernel until the buffer is replaced, whatever becomes of
        // the mapping; and the index is used only for I/Os that own a share of this very memory.
        match unsafe { ring.submitter().register_buffers_update(index as u32, &[all], None) } {
            Ok(()) => {
                self.buffers[index] = Some((memory.id(), Arc::downgrade(memory)));
                Some(index as u16)
            }
            // No memory may be locked, or it is of a kind that can't be: without, each I/O looks its pages up.
            Err(_) => {
                self.fixed = false;
                None
            }
        }
    }
}

impl Completions {
    /// Whether there is something to reap or to be submitted again, as far as memory shows.
    pub fn ready(&self) -> bool {
        // SAFETY: this is the only user of the completion ring.
        let empty = unsafe { self.ring.ring.completion_shared() }.is_empty();
        !empty || self.overflown() || self.ring.leftover.load(Ordering::Acquire)
    }

    /// The kernel keeps completions that the ring had no room for.
    fn overflown(&self) -> bool {
        if !self.ring.may_overflow {
            return false;
        }
        // Even a look at the flags stores the submission ring's tail, and so it takes the lock. If somebody else has that, the
        // kernel is asked in any case.
        let Ok(_submitting) = self.ring.submitting.try_lock() else { return true };
        // SAFETY: the lock is held: this is the only user of the submission ring.
        unsafe { self.ring.ring.submission_shared() }.cq_overflow()
    }

    /// Hands each completed I/O, with its bytes or error, to `done`.
    pub fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        let mut count = self.reap_ring(done);
        if self.overflown() {
            // Only where the completion ring was made too small: it waits for whoever submits just now.
            // SAFETY: no argument is passed.
            let _ = unsafe { self.ring.ring.submitter().enter::<()>(0, 0, EnterFlags::GETEVENTS.bits(), None) };
            count += self.reap_ring(done);
        }
        if self.ring.leftover.load(Ordering::Acquire)
            && let Ok(submitting) = self.ring.submitting.try_lock()
        {
            self.ring.enter(&submitting);
        }
        count
    }

    fn reap_ring(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        let mut count = 0;
        // SAFETY: this is the only user of the completion ring.
        for event in unsafe { self.ring.ring.completion_shared() } {
            if event.user_data() & CANCELLATION != 0 {
                continue;
            }
            // SAFETY: `user_data` is the pointer that `submit` made from a box and gave away; the kernel is done with it, and
            // each completion comes once.
            let io = unsafe { Box::from_raw(event.user_data() as *mut Io) };
            done(io, u64::try_from(event.result()).map_err(|_| Errno::from_raw(-event.result())));
            count += 1;
        }
        count
    }
}

#[cfg(test)]
#[path = "uring_tests.rs"]
mod tests;
