//! Linux AIO: `io_submit(2)` and the completion ring that the kernel shares with us.
//!
//! The ring's layout is `struct aio_ring` in the kernel's fs/aio.c; libaio reads it the same way, and its magic and
//! `incompat_features` exist so that others can. Where they are not what we know, `io_getevents(2)` serves instead.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicIsize, AtomicU32, AtomicUsize, Ordering};

use libc::{c_long, c_uint, iocb};
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::file::Backing;
use super::io::{BATCH_MAX, Io, IoOp, last_error};

// include/uapi/linux/aio_abi.h
const IOCB_CMD_PREAD: u16 = 0;
const IOCB_CMD_PWRITE: u16 = 1;
const IOCB_CMD_FDSYNC: u16 = 3;
const IOCB_CMD_PREADV: u16 = 7;
const IOCB_CMD_PWRITEV: u16 = 8;
const IOCB_FLAG_RESFD: u32 = 1;

// fs/aio.c
const AIO_RING_MAGIC: u32 = 0xa10a_10a1;

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Event {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

/// `struct aio_ring`, the head of the completion ring.
#[derive(Debug)]
#[repr(C)]
struct Ring {
    id: u32,
    nr: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
    compat_features: u32,
    incompat_features: u32,
    header_length: u32,
}

/// The kernel's control block, rebuilt at each submission.
pub(super) struct Iocb(iocb);

impl Default for Iocb {
    fn default() -> Iocb {
        // SAFETY: the struct holds only integers, for which zero is a value.
        Iocb(unsafe { std::mem::zeroed() })
    }
}

impl std::fmt::Debug for Iocb {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Iocb(op {})", self.0.aio_lio_opcode)
    }
}

/// Stack of the thread that makes a system call, bytes.
const STACK_SIZE: usize = 64 << 10;

/// How completions are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// From the shared ring where its layout is known, otherwise by system call.
    Ring,
    /// By `io_getevents(2)`.
    SystemCall,
}

/// The submitting half; any thread may submit.
#[derive(Debug)]
pub struct Context {
    id: usize,
    /// Address of the control block of each I/O, by tag, once it was submitted. An I/O keeps its place as long as it lives.
    blocks: Box<[AtomicUsize]>,
    files: Arc<[Backing]>,
    completed: Arc<EventFd>,
    /// I/Os that the kernel took, less those that were reaped; for a moment less than nothing.
    in_flight: AtomicIsize,
}

/// The completing half. There is one: the ring has one consumer.
#[derive(Debug)]
pub struct Completions {
    context: Arc<Context>,
    ring: Option<&'static Ring>,
}

// SAFETY: `ring` is memory of the context, which stays mapped until `io_destroy`, and so at least as long as `context`.
unsafe impl Send for Completions {}

/// A context for `depth` I/Os in flight on `files`, whose indices are the [`FileId`](super::io::FileId)s.
/// `completed` becomes readable with each completion; nobody needs to read it where the poll is edge-triggered.
pub fn setup(
    depth: usize,
    files: Arc<[Backing]>,
    reading: Reading,
    completed: Arc<EventFd>,
) -> io::Result<(Arc<Context>, Completions)> {
    let mut id: usize = 0;
    // SAFETY: `id` is where the kernel stores the context's id, and must be 0 before.
    if unsafe { libc::syscall(libc::SYS_io_setup, depth as c_long, &raw mut id) } < 0 {
        return Err(last_error());
    }
    let blocks = std::iter::repeat_with(|| AtomicUsize::new(0)).take(depth).collect();
    let context = Arc::new(Context { id, blocks, files, completed, in_flight: AtomicIsize::new(0) });
    // SAFETY: the id is the address of the ring, mapped into this process by io_setup, until io_destroy.
    let ring = unsafe { &*(id as *const Ring) };
    let known = ring.magic == AIO_RING_MAGIC && ring.incompat_features == 0 && ring.nr > 0;
    let ring = (known && reading == Reading::Ring).then_some(ring);
    Ok((Arc::clone(&context), Completions { context, ring }))
}

impl Context {
    /// Gives the first I/Os of `batch`, at most `limit`, to the kernel with one system call, and takes those that it
    /// accepted out of it. On an error nothing was accepted. The operations are read, write and flush: Linux AIO has
    /// no other.
    pub fn submit(&self, batch: &mut VecDeque<Box<Io>>, limit: usize) -> Result<usize, Errno> {
        let mut ios = [std::ptr::null_mut::<Io>(); BATCH_MAX];
        let mut iocbs = [std::ptr::null_mut::<iocb>(); BATCH_MAX];
        let count = batch.len().min(limit).min(BATCH_MAX);
        for (i, io) in batch.drain(..count).enumerate() {
            // From here on the kernel, and with it the completing thread, may own the I/O.
            ios[i] = Box::into_raw(io);
            // SAFETY: just made from a box, and not yet submitted: nobody else has it.
            let io = unsafe { &mut *ios[i] };
            iocbs[i] = self.prepare(io);
        }
        // SAFETY: `iocbs` has `count` valid control blocks, whose buffers and iovecs live in the `Io`s, which live
        // until their completion is reaped, because they are no longer owned here.
        let done = unsafe { libc::syscall(libc::SYS_io_submit, self.id, count as c_long, iocbs.as_mut_ptr()) };
        let result = Errno::result(done).map(|n| n as usize);
        let accepted = *result.as_ref().unwrap_or(&0);
        self.in_flight.fetch_add(accepted as isize, Ordering::Relaxed);
        for &io in ios[accepted..count].iter().rev() {
            // SAFETY: made by `into_raw` above, and the kernel did not take it.
            batch.push_front(unsafe { Box::from_raw(io) });
        }
        result
    }

    /// Asks the kernel to end the I/O with that tag, which is in flight, early. True: it does; the I/O completes soon. Only
    /// few drivers can: for files and most disks the kernel says EINVAL, and the I/O can only be waited for.
    pub fn cancel(&self, tag: u32) -> bool {
        let block = self.blocks.get(tag as usize).map_or(0, |block| block.load(Ordering::Acquire));
        if block == 0 {
            return false;
        }
        // SAFETY: integers only.
        let mut unused: Event = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel only looks the address up among what it has in flight, and reads the key there, of an I/O that
        // is in flight and therefore alive; `unused` has room for an event.
        let done = unsafe { libc::syscall(libc::SYS_io_cancel, self.id, block as *mut iocb, &raw mut unused) };
        // EINPROGRESS: it is being cancelled, and its completion comes through the ring.
        done == 0 || Errno::last() == Errno::EINPROGRESS
    }

    fn prepare(&self, io: &mut Io) -> *mut iocb {
        let data = std::ptr::from_mut(io) as u64;
        let iovecs = io.iovecs();
        let (single, buffer, bytes) = match iovecs {
            [one] => (true, one.iov_base as u64, one.iov_len as u64),
            many => (false, many.as_ptr() as u64, many.len() as u64),
        };
        let (opcode, dsync) = match (io.op, single) {
            (IoOp::Read, true) => (IOCB_CMD_PREAD, 0),
            (IoOp::Read, false) => (IOCB_CMD_PREADV, 0),
            (IoOp::Write { fua }, true) => (IOCB_CMD_PWRITE, if fua { libc::RWF_DSYNC } else { 0 }),
            (IoOp::Write { fua }, false) => (IOCB_CMD_PWRITEV, if fua { libc::RWF_DSYNC } else { 0 }),
            (IoOp::Flush, _) => (IOCB_CMD_FDSYNC, 0),
            (IoOp::Discard | IoOp::WriteZeroes { .. } | IoOp::Status, _) => {
                unreachable!("Linux AIO has no {:?}", io.op)
            }
        };
        let flush = io.op == IoOp::Flush;
        let fd = self.files[usize::from(io.file.0)].file.as_raw_fd();
        let nowait = if io.nowait { libc::RWF_NOWAIT } else { 0 };
        let tag = io.tag as usize;
        let block = &mut io.iocb.0;
        if let Some(place) = self.blocks.get(tag) {
            place.store(std::ptr::from_mut(block) as usize, Ordering::Release);
        }
        block.aio_data = data;
        block.aio_key = 0;
        block.aio_rw_flags = dsync | nowait;
        block.aio_lio_opcode = opcode;
        block.aio_reqprio = 0;
        block.aio_fildes = fd as u32;
        block.aio_buf = if flush { 0 } else { buffer };
        block.aio_nbytes = if flush { 0 } else { bytes };
        block.aio_offset = if flush { 0 } else { io.offset as i64 };
        block.aio_flags = IOCB_FLAG_RESFD;
        block.aio_resfd = self.completed.as_fd().as_raw_fd() as u32;
        block
    }
}

impl Drop for Context {
    /// Waits for what is in flight. Where that is nothing, the kernel takes its time all the same (some 50 ms: it waits until no CPU
    /// can still look at the context), and so a thread waits that nobody waits for.
    fn drop(&mut self) {
        let id = self.id;
        let thread = std::thread::Builder::new().name("io_destroy".into()).stack_size(STACK_SIZE);
        if *self.in_flight.get_mut() > 0 || thread.spawn(move || destroy(id)).is_err() {
            destroy(id);
        }
    }
}

fn destroy(id: usize) {
    // SAFETY: the id is that of a context that was dropped, and dropped once; where I/Os are in flight, io_destroy waits for them.
    unsafe { libc::syscall(libc::SYS_io_destroy, id) };
}

impl Completions {
    /// Whether there is something to reap, as far as can be seen without a system call.
    pub fn ready(&self) -> bool {
        self.ring.is_some_and(|ring| ring.head.load(Ordering::Relaxed) != ring.tail.load(Ordering::Acquire))
    }

    /// Hands each completed I/O, with its bytes or error, to `done`, at most `limit` of them.
    pub fn reap(&mut self, limit: usize, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        let count = match self.ring {
            Some(ring) => Self::reap_ring(ring, limit, done),
            None => self.reap_by_call(limit, done),
        };
        if count > 0 {
            self.context.in_flight.fetch_sub(count as isize, Ordering::Relaxed);
        }
        count
    }

    fn reap_ring(ring: &Ring, limit: usize, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        let events = std::ptr::from_ref(ring).wrapping_byte_add(ring.header_length as usize).cast::<Event>();
        let mut head = ring.head.load(Ordering::Relaxed);
        // Pairs with the kernel's barrier between filling an event and moving the tail.
        let tail = ring.tail.load(Ordering::Acquire);
        let mut count = 0;
        while head != tail && count < limit {
            // SAFETY: head is below nr, which counts the events that follow the header; the kernel filled this one
            // before it moved the tail past it.
            let event = unsafe { events.add(head as usize).read() };
            head = (head + 1) % ring.nr;
            // The event is copied: the kernel may use its place again.
            ring.head.store(head, Ordering::Release);
            Self::complete(&event, done);
            count += 1;
        }
        count
    }

    fn reap_by_call(&mut self, limit: usize, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        // SAFETY: integers only.
        let mut events: [Event; BATCH_MAX] = unsafe { std::mem::zeroed() };
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let most = limit.min(BATCH_MAX) as c_long;
        // SAFETY: `events` has room for `most`.
        let got = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context.id,
                0 as c_long,
                most,
                events.as_mut_ptr(),
                &raw mut now,
            )
        };
        let got = usize::try_from(got).unwrap_or(0);
        for event in &events[..got] {
            Self::complete(event, done);
        }
        got
    }

    fn complete(event: &Event, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) {
        // SAFETY: `data` is the pointer that `submit` made from a box and gave away; the kernel is done with it, and
        // each completion comes once.
        let io = unsafe { Box::from_raw(event.data as *mut Io) };
        let result = u64::try_from(event.res).map_err(|_| Errno::from_raw(-event.res as i32));
        done(io, result);
    }
}

/// The most I/Os that all contexts of the machine may have in flight, and how many are taken.
pub fn system_limit() -> Option<(c_uint, c_uint)> {
    let read = |name| std::fs::read_to_string(name).ok()?.trim().parse().ok();
    Some((read("/proc/sys/fs/aio-max-nr")?, read("/proc/sys/fs/aio-nr")?))
}

#[cfg(test)]
mod tests {
    use super::super::io::FileId;
    use super::super::memory::Memory;
    use super::*;

    fn wait(completions: &mut Completions, count: usize) -> Vec<(Box<Io>, Result<u64, Errno>)> {
        let mut done = Vec::new();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while done.len() < count {
            completions.reap(usize::MAX, &mut |io, result| done.push((io, result)));
            assert!(std::time::Instant::now() < end, "no completion");
        }
        done
    }

    fn set_up(file: std::fs::File, reading: Reading) -> (Arc<Context>, Completions) {
        let files = Arc::new([Backing { file, direct: false, block_device: false }]);
        setup(8, files, reading, Arc::new(EventFd::new().unwrap())).unwrap()
    }

    #[test]
    fn writes_flushes_and_reads_with_either_way_of_reading() {
        for reading in [Reading::Ring, Reading::SystemCall] {
            let file = tempfile::tempfile().unwrap();
            let (context, mut completions) = set_up(file, reading);
            let memory = Arc::new(Memory::anonymous(8192).unwrap());
            memory.write(0, &[7; 4096]);
            let mut io = Io::new(1, 4);
            let mut batch = VecDeque::new();
            io.begin(IoOp::Write { fua: true }, FileId(0), 512);
            io.push(&memory, 0, 1024);
            io.push(&memory, 2048, 512);
            batch.push_back(io);
            assert_eq!(context.submit(&mut batch, 64), Ok(1));
            let (mut io, result) = wait(&mut completions, 1).pop().unwrap();
            assert_eq!((io.tag, result), (1, Ok(1536)));
            io.begin(IoOp::Flush, FileId(0), 0);
            batch.push_back(io);
            assert_eq!(context.submit(&mut batch, 64), Ok(1));
            let (mut io, result) = wait(&mut completions, 1).pop().unwrap();
            assert_eq!(result, Ok(0));
            // A read across the end of the file comes back short.
            io.begin(IoOp::Read, FileId(0), 0);
            io.push(&memory, 4096, 4096);
            batch.push_back(io);
            assert_eq!(context.submit(&mut batch, 64), Ok(1));
            let (_, result) = wait(&mut completions, 1).pop().unwrap();
            assert_eq!(result, Ok(2048));
            let mut got = [9; 2048];
            memory.read(4096, &mut got);
            assert!(got[..512].iter().all(|b| *b == 0) && got[512..].iter().all(|b| *b == 7));
            assert!(!completions.ready());
        }
    }

    #[test]
    fn what_is_in_flight_can_be_asked_to_end_and_completes_in_any_case() {
        let (context, mut completions) = set_up(tempfile::tempfile().unwrap(), Reading::Ring);
        assert!(!context.cancel(1) && !context.cancel(1000), "nothing was submitted");
        let mut io = Io::new(1, 1);
        io.begin(IoOp::Flush, FileId(0), 0);
        let mut batch = VecDeque::from([io]);
        assert_eq!(context.submit(&mut batch, 64), Ok(1));
        let cancelled = context.cancel(1);
        let (_, result) = wait(&mut completions, 1).pop().unwrap();
        assert!(result == Ok(0) || (cancelled && result.is_err()), "{cancelled}: {result:?}");
    }

    #[test]
    fn what_the_kernel_refuses_stays_in_the_batch() {
        let write_only = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
        let (context, mut completions) = set_up(write_only, Reading::Ring);
        let memory = Arc::new(Memory::anonymous(4096).unwrap());
        let mut batch = VecDeque::new();
        for (tag, op) in [IoOp::Write { fua: false }, IoOp::Read].into_iter().enumerate() {
            let mut io = Io::new(tag as u32, 1);
            io.begin(op, FileId(0), 0);
            io.push(&memory, 0, 512);
            batch.push_back(io);
        }
        assert_eq!(context.submit(&mut batch, 64), Ok(1));
        assert_eq!((batch.len(), batch[0].tag), (1, 1));
        assert_eq!(context.submit(&mut batch, 64), Err(Errno::EBADF));
        assert_eq!(batch.len(), 1);
        assert_eq!(wait(&mut completions, 1)[0].1, Ok(512));
    }
}
