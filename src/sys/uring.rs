//! io_uring (io_uring(7), io_uring_setup(2), io_uring_enter(2), io_uring_register(2), the kernel's io_uring/): the rings are
//! the crate `io-uring`'s; here is who may touch which end, and who owns an I/O meanwhile.
//!
//! The submission ring has one user at a time, by a lock; the completion ring has one, the main loop. Both ends are memory
//! that the kernel shares, so completions are seen without a system call.
//!
//! ## Completions wait for whoever submitted
//!
//! The end of an I/O is only noted in the interrupt. Its completion is posted by task work, which runs in the context of the
//! task that submitted it, when that returns to user space or sleeps interruptibly. As long as a submit thread is held up
//! inside `io_uring_enter`, nothing that it submitted before completes, whatever the disk has done. Seen on Linux 6.18, with
//! a thread that waits for a page of its last read's memory: of 16 finished reads before it, 0 are posted meanwhile (with
//! `IORING_SETUP_COOP_TASKRUN` and in the context of SQPOLL's thread too), and with Linux AIO, which posts in the interrupt,
//! all 16. So *reaping never waits for submitting* holds for what this file does, and not for what the kernel does. Nothing
//! that can be set up changes it: `IORING_SETUP_DEFER_TASKRUN` has the submitting task itself wait for completions, and
//! SQPOLL's thread is one that submits. With `IOSQE_ASYNC` a thread of the kernel's pool does each I/O, and then the 16 are
//! posted; that is a thread pool, with its price.
//!
//! What can still hold a submission up? Not the disk: the kernel tries each I/O as with `RWF_NOWAIT`, and gives one that
//! would wait (a full request queue, a suspended device mapper) to its pool. Not a frozen file system either, since 6.12 and
//! the stable kernels of that time ("io_uring/rw: fix missing NOWAIT check for O_DIRECT start write"); before, a write to one
//! was held up, and for good, because the freeze waits for completions that wait for the write. What is left is memory: to
//! look up an I/O's pages, for its bio, and for a thread of the pool. The kernel's requests themselves are all made at the
//! start, by as many NOPs.
//!
//! ## What the main loop may do
//!
//! `io_uring_enter` that submits, and `io_uring_register`, take the ring's mutex in the kernel, which a submission keeps while
//! it is held up (with SQPOLL, by the kernel's thread). So registering buffers is the submitter's business, at the first I/O
//! that points into a memory; the main loop does it only while nothing is in flight, and enters the kernel only if it gets our
//! lock at once.
//!
//! The completion ring can't overflow, after which only a system call with that mutex would bring completions back: what is
//! submitted never has more completions to come than the ring has entries.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{Builder, IoUring, opcode};
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::file::Backing;
use super::io::{BATCH_MAX, Io, IoOp};
use super::memory::Memory;
use super::{completed, errno_of};
use crate::blocking::{Blocking, Caller};

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
    /// Entries of both rings, at least; not set: as many as the depth can use. With fewer, I/Os are refused with EAGAIN.
    pub cq_entries: Option<u32>,
}

/// What the kernel refused at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetupError {
    /// The system call, or what was to be registered.
    pub step: &'static str,
    /// Why.
    pub errno: Errno,
    /// Without SQPOLL it is not refused.
    pub only_sqpoll: bool,
}

/// A memory that I/Os point into.
#[derive(Clone, Debug)]
struct Buffer {
    /// [`Memory::id`]: another memory can have its address later.
    id: u64,
    memory: Weak<Memory>,
    /// The kernel has it. Otherwise it would not pin it, because it is larger than 1 GiB, of a kind that it can't, or more
    /// than RLIMIT_MEMLOCK allows: its pages are looked up for each I/O.
    fixed: bool,
}

/// The submitting end's own.
#[derive(Debug)]
struct Submitting {
    /// By index in the kernel's table. Empty: the kernel has no such table.
    buffers: Vec<Option<Buffer>>,
    /// The ring can't be used any more.
    broken: Option<Errno>,
}

/// A ring; the submitting end.
pub struct Ring {
    ring: IoUring,
    sqpoll: bool,
    submitting: Mutex<Submitting>,
    /// Completions that have not been reaped, or are still to come.
    to_reap: AtomicUsize,
    /// So many there may be.
    room: usize,
    /// Address of each I/O that the ring has, by tag. An I/O keeps its place as long as it lives. Compared, and never followed.
    places: Box<[AtomicU64]>,
    /// The submission ring has entries that the kernel had no memory for.
    leftover: AtomicBool,
    /// [`Memory::gone`] when the buffers were last looked through.
    gone: AtomicU64,
}

/// The completing end. There is one, of one thread at a time: even a look at the completion ring stores its head.
pub struct Completions {
    ring: Arc<Ring>,
    not_sync: PhantomData<Cell<()>>,
}

/// A ring for I/O on `files`, whose indices are the [`FileId`](super::io::FileId)s. `event` becomes readable with each
/// completion. Waits for the kernel's memory.
pub fn setup(
    _: &Blocking,
    settings: Settings,
    files: &[Backing],
    event: &EventFd,
) -> Result<(Arc<Ring>, Completions), SetupError> {
    let ring = build(settings).map_err(|errno| SetupError {
        step: "io_uring_setup",
        errno,
        only_sqpoll: settings.sqpoll_idle_ms.is_some()
            && build(Settings { sqpoll_idle_ms: None, ..settings }).is_ok(),
    })?;
    let step = |step| move |error: io::Error| SetupError { step, errno: errno_of(&error), only_sqpoll: false };
    prepare_requests(&ring, settings.depth).map_err(step("io_uring_enter"))?;
    let submitter = ring.submitter();
    let descriptors: Vec<_> = files.iter().map(|file| file.file.as_raw_fd()).collect();
    submitter.register_files(&descriptors).map_err(step("IORING_REGISTER_FILES"))?;
    submitter.register_eventfd(event.as_raw_fd()).map_err(step("IORING_REGISTER_EVENTFD"))?;
    // Since Linux 5.19.
    let table = submitter.register_buffers_sparse(BUFFERS as u32).is_ok();
    let room = ring.params().cq_entries() as usize;
    let ring = Arc::new(Ring {
        ring,
        sqpoll: settings.sqpoll_idle_ms.is_some(),
        submitting: Mutex::new(Submitting { buffers: vec![None; if table { BUFFERS } else { 0 }], broken: None }),
        to_reap: AtomicUsize::new(0),
        room,
        places: std::iter::repeat_with(|| AtomicU64::new(0)).take(settings.depth).collect(),
        leftover: AtomicBool::new(false),
        gone: AtomicU64::new(Memory::gone()),
    });
    Ok((Arc::clone(&ring), Completions { ring, not_sync: PhantomData }))
}

/// With what this kernel knows of that makes it better.
fn build(settings: Settings) -> Result<IoUring, Errno> {
    // An entry that is refused does not hold up those behind it; since Linux 5.18.
    let submit_all: fn(&mut Builder) = |builder| {
        builder.setup_submit_all();
    };
    // One indirection less; since 6.6.
    let newest: fn(&mut Builder) = |builder| {
        builder.setup_submit_all().setup_no_sqarray();
    };
    let mut last = Errno::EINVAL;
    for improve in [newest, submit_all, |_| {}] {
        let mut builder = IoUring::builder();
        // Each I/O in flight may have a cancellation.
        let entries = settings.cq_entries.unwrap_or(settings.depth as u32 * 2);
        builder.dontfork().setup_clamp().setup_cqsize(entries);
        if let Some(idle) = settings.sqpoll_idle_ms {
            builder.setup_sqpoll(idle);
        }
        improve(&mut builder);
        match builder.build(entries) {
            Ok(ring) => return Ok(ring),
            Err(error) => last = errno_of(&error),
        }
        if last != Errno::EINVAL {
            break;
        }
    }
    Err(last)
}

/// Has the kernel make its requests for so many I/Os, which it keeps until the ring is closed: submitting allocates none.
fn prepare_requests(ring: &IoUring, depth: usize) -> io::Result<()> {
    // SAFETY: nobody else has the ring.
    let mut queue = unsafe { ring.submission_shared() };
    let count = depth.min(queue.capacity());
    for _ in 0..count {
        // SAFETY: a NOP has no memory.
        unsafe { queue.push(&opcode::Nop::new().build()) }.expect("it is empty");
    }
    drop(queue);
    let mut done = 0;
    while done < count {
        match ring.submitter().submit_and_wait(1) {
            Err(error) if error.raw_os_error() != Some(libc::EINTR) => return Err(error),
            _ => {}
        }
        // SAFETY: as above.
        done += unsafe { ring.completion_shared() }.count();
    }
    Ok(())
}

impl Ring {
    /// Gives the first I/Os of `batch`, at most `limit`, to the kernel with one system call (none, where its own thread is
    /// awake), and takes them out of it. EAGAIN: there is no room until something is reaped, or the main loop would wait for
    /// who submits just now. Any other error is the ring's end. What the kernel says about an I/O comes as its completion.
    /// The operations are read, write and flush.
    pub fn submit(&self, batch: &mut VecDeque<Box<Io>>, limit: usize, by: Caller) -> Result<usize, Errno> {
        let mut submitting = match by {
            Caller::MainLoop => self.submitting.try_lock().map_err(|_| Errno::EAGAIN)?,
            Caller::Thread(_) => self.submitting.lock().unwrap(),
        };
        if let Some(errno) = submitting.broken {
            return Err(errno);
        }
        // The kernel's mutex is held only for I/O in flight: by who submits it, and where its completions are posted.
        let may_register = matches!(by, Caller::Thread(_)) || self.to_reap.load(Ordering::Acquire) == 0;
        if may_register {
            self.let_go(&mut submitting);
        }
        let mut ios = [std::ptr::null_mut::<Io>(); BATCH_MAX];
        // SAFETY: the lock is held: this is the only user of the submission ring.
        let mut queue = unsafe { self.ring.submission_shared() };
        let wanted = batch.len().min(limit).min(BATCH_MAX);
        let count = self.claim(wanted.min(queue.capacity() - queue.len()));
        for (i, io) in batch.drain(..count).enumerate() {
            // From the moment of the push the kernel, and with it the completing thread, may own the I/O.
            ios[i] = Box::into_raw(io);
            let address = ios[i].expose_provenance() as u64;
            // SAFETY: just made from a box, and not yet submitted: nobody else has it.
            let entry = self.prepare(&mut submitting, unsafe { &*ios[i] }, address, may_register);
            // SAFETY: the entry's buffers and iovecs live in the `Io`, which lives until its completion is reaped, because
            // it is no longer owned here; its file and buffer are registered.
            let pushed = unsafe { queue.push(&entry) };
            pushed.expect("there is room, as was just seen");
        }
        drop(queue);
        if let Err(errno) = self.enter(&submitting, by) {
            submitting.broken = Some(errno);
            let accepted = count.saturating_sub(self.queued(&submitting));
            for &io in ios[accepted..count].iter().rev() {
                // SAFETY: made by `into_raw` above. The kernel has not seen its entry, and never will: nobody enters again.
                batch.push_front(unsafe { Box::from_raw(io) });
            }
            self.to_reap.fetch_sub(count - accepted, Ordering::Release);
            return if accepted > 0 { Ok(accepted) } else { Err(errno) };
        }
        if count == 0 && wanted > 0 { Err(Errno::EAGAIN) } else { Ok(count) }
    }

    /// Gives so many of `wanted` as the completion ring has entries for. The caller has the lock.
    fn claim(&self, wanted: usize) -> usize {
        // Others only ever make it less. Acquire: the entries that were reaped are free.
        let count = wanted.min(self.room - self.to_reap.load(Ordering::Acquire));
        self.to_reap.fetch_add(count, Ordering::Relaxed);
        count
    }

    fn prepare(&self, submitting: &mut Submitting, io: &Io, address: u64, may_register: bool) -> Entry {
        if let Some(place) = self.places.get(io.tag as usize) {
            place.store(address, Ordering::Release);
        }
        let file = Fixed(u32::from(io.file.0));
        let dsync = if matches!(io.op, IoOp::Write { fua: true }) { libc::RWF_DSYNC } else { 0 };
        // Without it the kernel gives an I/O that would wait to its pool, and may first have to make a thread.
        let flags = dsync | if io.nowait { libc::RWF_NOWAIT } else { 0 };
        let fixed =
            io.single().and_then(|(memory, iovec)| Some((self.buffer(submitting, memory, may_register)?, iovec)));
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

    /// Entries of the submission ring that the kernel has not taken.
    fn queued(&self, _: &MutexGuard<Submitting>) -> usize {
        // SAFETY: the caller holds the lock: this is the only user of the submission ring. (Even a look stores its tail.)
        unsafe { self.ring.submission_shared() }.len()
    }

    /// Tells the kernel of what is in the submission ring. Where it has no memory for that, a submit thread waits, and the
    /// main loop looks again when it reaps. An error is for good.
    fn enter(&self, submitting: &MutexGuard<Submitting>, by: Caller) -> Result<(), Errno> {
        while self.queued(submitting) > 0 {
            match self.ring.submitter().submit().map_err(|error| errno_of(&error)) {
                Ok(_) if self.sqpoll => break,
                // It stopped behind an entry that it refused, which completes with the error.
                Ok(n) if n > 0 => {}
                Err(Errno::EINTR) => {}
                Ok(_) | Err(Errno::EAGAIN | Errno::EBUSY | Errno::ENOMEM) => match by {
                    Caller::MainLoop => {
                        self.leftover.store(true, Ordering::Release);
                        return Ok(());
                    }
                    Caller::Thread(_) => std::thread::sleep(NO_MEMORY_WAIT),
                },
                Err(errno) => return Err(errno),
            }
        }
        self.leftover.store(false, Ordering::Release);
        Ok(())
    }

    /// Asks the kernel to end the I/O with that tag early. False: the ring does not have it, or somebody submits just now.
    pub fn cancel(&self, tag: u32) -> bool {
        let address = self.places.get(tag as usize).map_or(0, |place| place.load(Ordering::Acquire));
        if address == 0 {
            return false;
        }
        let Ok(submitting) = self.submitting.try_lock() else { return false };
        // SAFETY: the lock is held: this is the only user of the submission ring.
        let mut queue = unsafe { self.ring.submission_shared() };
        if submitting.broken.is_some() || queue.is_full() || self.claim(1) == 0 {
            return false;
        }
        let entry = opcode::AsyncCancel::new(address).build().user_data(CANCELLATION);
        // SAFETY: the address is only compared with those in flight.
        unsafe { queue.push(&entry) }.expect("there is room, as was just seen");
        drop(queue);
        self.enter(&submitting, Caller::MainLoop).is_ok()
    }

    /// Main loop: lets go of the pages of memories that are gone. Not while anything is in flight, when registering could wait
    /// for a submission; then the next submission does it.
    pub fn tidy(&self) {
        if self.gone.load(Ordering::Relaxed) != Memory::gone()
            && self.to_reap.load(Ordering::Acquire) == 0
            && let Ok(mut submitting) = self.submitting.try_lock()
        {
            self.let_go(&mut submitting);
        }
    }

    fn let_go(&self, submitting: &mut Submitting) {
        let gone = Memory::gone();
        if self.gone.swap(gone, Ordering::Relaxed) == gone {
            return;
        }
        for (index, buffer) in submitting.buffers.iter_mut().enumerate() {
            if let Some(Buffer { fixed: true, .. }) = buffer.take_if(|buffer| buffer.memory.strong_count() == 0) {
                let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
                // SAFETY: an empty buffer names no memory. An error leaves the pages pinned, and the index unused: what is
                // registered there next replaces it.
                let _ = unsafe { self.ring.submitter().register_buffers_update(index as u32, &[nothing], None) };
            }
        }
    }

    /// The index of the fixed buffer that is all of `memory`, which is made one if it may be, there is room, and the kernel
    /// lets us.
    fn buffer(&self, submitting: &mut Submitting, memory: &Arc<Memory>, may_register: bool) -> Option<u16> {
        if !memory.may_be_pinned() {
            return None;
        }
        let buffers = &mut submitting.buffers;
        if let Some(index) = buffers.iter().position(|buffer| buffer.as_ref().is_some_and(|b| b.id == memory.id())) {
            return buffers[index].as_ref().filter(|buffer| buffer.fixed).map(|_| index as u16);
        }
        let index = buffers.iter().position(Option::is_none).filter(|_| may_register)?;
        let all = libc::iovec { iov_base: memory.at(0, memory.len()).cast(), iov_len: memory.len() };
        // SAFETY: the mapping is there; its pages stay pinned by the kernel until the buffer is replaced, whatever becomes of
        // the mapping; and the index is used only for I/Os that own a share of this very memory.
        let fixed = unsafe { self.ring.submitter().register_buffers_update(index as u32, &[all], None) }.is_ok();
        buffers[index] = Some(Buffer { id: memory.id(), memory: Arc::downgrade(memory), fixed });
        fixed.then_some(index as u16)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel takes a closed ring apart some time later. Files that it holds until then would keep their locks, and a
        // file system from being unmounted. Errors are for a ring that has none.
        let submitter = self.ring.submitter();
        let _ = submitter.unregister_files();
        let _ = submitter.unregister_buffers();
    }
}

impl Completions {
    /// Whether there is something to reap or to be submitted again, as far as memory shows.
    pub fn ready(&self) -> bool {
        // SAFETY: this is the only user of the completion ring: no other thread has a reference to `self`, which is not Sync, and
        // `reap` has `self` alone.
        let empty = unsafe { self.ring.ring.completion_shared() }.is_empty();
        !empty || self.ring.leftover.load(Ordering::Acquire)
    }

    /// Hands each completed I/O, with its bytes or error, to `done`.
    pub fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        let (mut count, mut cancellations) = (0, 0);
        // SAFETY: this is the only user of the completion ring.
        for event in unsafe { self.ring.ring.completion_shared() } {
            if event.user_data() == CANCELLATION {
                cancellations += 1;
                continue;
            }
            // SAFETY: `user_data` is the address of what `submit` made from a box, exposed and gave away; the kernel is done with
            // it, and each completion comes once.
            let io: Box<Io> =
                unsafe { Box::from_raw(std::ptr::with_exposed_provenance_mut(event.user_data() as usize)) };
            if let Some(place) = self.ring.places.get(io.tag as usize) {
                place.store(0, Ordering::Release);
            }
            done(io, completed(event.result().into()));
            count += 1;
        }
        // The ring's head has moved past them: their entries are free.
        self.ring.to_reap.fetch_sub(count + cancellations, Ordering::Release);
        if self.ring.leftover.load(Ordering::Acquire)
            && let Ok(submitting) = self.ring.submitting.try_lock()
        {
            // An error comes again, and to the submitter.
            let _ = self.ring.enter(&submitting, Caller::MainLoop);
        }
        count
    }
}

#[cfg(test)]
#[path = "uring_tests.rs"]
pub(crate) mod tests;
