//! Linux AIO: `io_submit(2)` and the completion ring that the kernel shares with us.
//!
//! The ring's layout is `struct aio_ring` in the kernel's fs/aio.c; libaio reads it the same way, and its magic and
//! `incompat_features` exist so that others can. Where they are not what we know, `io_getevents(2)` serves instead.
//!
//! An I/O's address goes through the kernel as an integer, `aio_data`: it is exposed in [`Context::submit`], and the only
//! place that makes a pointer of one is `Completions::complete`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicIsize, AtomicPtr, AtomicU32, Ordering};

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

/// `struct aio_ring`, the head of the completion ring; the events follow it.
#[repr(C)]
struct Header {
    id: u32,
    nr: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
    compat_features: u32,
    incompat_features: u32,
    header_length: u32,
}

/// The completion ring: memory of the kernel's making, which it fills, and which goes with `io_destroy`. So there are only
/// pointers to it, and no reference that would last longer than a call. The kernel moves the tail; the head is the consumer's.
#[derive(Debug)]
struct Ring {
    head: NonNull<AtomicU32>,
    tail: NonNull<AtomicU32>,
    events: NonNull<Event>,
    /// How many events follow the head; not 0.
    entries: u32,
}

// SAFETY: it is the one consumer's, wherever that is, and all that others access meanwhile is the atomic words and events that
// they no longer or not yet touch. It is not `Sync`: two consumers would get the same event.
unsafe impl Send for Ring {}

impl Ring {
    /// None where its layout is not known.
    ///
    /// # Safety
    ///
    /// `header` is the head of a ring, with the events that it tells of behind it, all of it valid for as long as this is used, and
    /// this is the only consumer.
    unsafe fn at(header: NonNull<Header>) -> Option<Ring> {
        let at = header.as_ptr();
        // SAFETY: the caller's. Nobody writes these fields once the ring is made.
        let (magic, incompatible, entries, length) =
            unsafe { ((*at).magic, (*at).incompat_features, (*at).nr, (*at).header_length) };
        if magic != AIO_RING_MAGIC || incompatible != 0 || entries == 0 {
            return None;
        }
        // SAFETY: the caller's: fields and events are within the ring.
        unsafe {
            Some(Ring {
                head: NonNull::from(&(*at).head),
                tail: NonNull::from(&(*at).tail),
                events: header.byte_add(length as usize).cast(),
                entries,
            })
        }
    }

    /// The index of the next event, and the one where they end.
    fn bounds(&self) -> (u32, u32) {
        // SAFETY: valid, as `at` demands, and the references end here. Acquire pairs with the kernel's barrier between filling an
        // event and moving the tail.
        unsafe { (self.head.as_ref().load(Ordering::Relaxed), self.tail.as_ref().load(Ordering::Acquire)) }
    }

    fn is_empty(&self) -> bool {
        let (head, tail) = self.bounds();
        head == tail
    }

    /// Takes the next event out; `None` where `head` has come to `tail`, which is from [`bounds`](Self::bounds).
    fn take(&mut self, head: &mut u32, tail: u32) -> Option<Event> {
        if *head == tail {
            return None;
        }
        assert!(*head < self.entries, "the ring's head is {head} of {}", self.entries);
        // SAFETY: one of the ring's events, as just checked; whoever filled it did so before the tail moved past it, and
        // does not touch it until the head has.
        let event = unsafe { self.events.add(*head as usize).read() };
        *head = (*head + 1) % self.entries;
        // The event is copied: its place may be used again.
        // SAFETY: valid, as `at` demands.
        unsafe { self.head.as_ref() }.store(*head, Ordering::Release);
        Some(event)
    }
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
    /// The control block of each I/O, by tag, once it was submitted. Never followed here: the kernel looks for it among its own.
    blocks: Box<[AtomicPtr<iocb>]>,
    files: Arc<[Backing]>,
    completed: Arc<EventFd>,
    /// I/Os that the kernel took, less those that were reaped; for a moment less than nothing.
    in_flight: AtomicIsize,
}

/// The completing half. There is one: the ring has one consumer.
#[derive(Debug)]
pub struct Completions {
    /// The ring is mapped as long as this is.
    context: Arc<Context>,
    ring: Option<Ring>,
}

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
    let blocks = std::iter::repeat_with(AtomicPtr::default).take(depth).collect();
    let context = Arc::new(Context { id, blocks, files, completed, in_flight: AtomicIsize::new(0) });
    // The id is the address of the ring, mapped by io_setup: memory that no code of ours has made, whose provenance counts as exposed.
    let header = NonNull::new(std::ptr::with_exposed_provenance_mut(id));
    // SAFETY: it stays mapped until io_destroy, which is when `context` is dropped, and `Completions` has a share of that; the
    // context is new, and so is its consumer.
    let ring = header.filter(|_| reading == Reading::Ring).and_then(|header| unsafe { Ring::at(header) });
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
            let data = ios[i].expose_provenance() as u64;
            // SAFETY: just made from a box, and not yet submitted: nobody else has it.
            iocbs[i] = self.prepare(unsafe { &mut *ios[i] }, data);
        }
        // SAFETY: `iocbs` has `count` valid control blocks, whose buffers and iovecs live in the `Io`s, which live
        // until their completion is reaped, because they are no longer owned here.
        let done = unsafe { libc::syscall(libc::SYS_io_submit, self.id, count as c_long, iocbs.as_mut_ptr()) };
        let result = super::result(done).map(|n| n as usize);
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
        let block = self.blocks.get(tag as usize).map_or(std::ptr::null_mut(), |block| block.load(Ordering::Acquire));
        if block.is_null() {
            return false;
        }
        // SAFETY: integers only.
        let mut unused: Event = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel looks the address up among what it has in flight, and reads four bytes there, the key, as it reads
        // any memory of a process: an I/O that is gone is an error. `unused` has room for an event.
        let done = unsafe { libc::syscall(libc::SYS_io_cancel, self.id, block, &raw mut unused) };
        // EINPROGRESS: it is being cancelled, and its completion comes through the ring.
        matches!(super::result(done), Ok(_) | Err(Errno::EINPROGRESS))
    }

    /// The control block of an I/O, whose completion has `data`.
    fn prepare(&self, io: &mut Io, data: u64) -> *mut iocb {
        let iovecs = io.iovecs();
        let (single, buffer, bytes) = match iovecs {
            [one] => (true, one.iov_base.expose_provenance(), one.iov_len),
            many => (false, many.as_ptr().expose_provenance(), many.len()),
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
        let nowait = if io.nowait { libc::RWF_NOWAIT } else { 0 };
        let fd = self.files[usize::from(io.file.0)].file.as_raw_fd();
        let block = &mut io.iocb.0;
        if let Some(place) = self.blocks.get(io.tag as usize) {
            place.store(block, Ordering::Release);
        }
        block.aio_data = data;
        block.aio_key = 0;
        block.aio_rw_flags = dsync | nowait;
        block.aio_lio_opcode = opcode;
        block.aio_reqprio = 0;
        block.aio_fildes = fd as u32;
        block.aio_buf = if flush { 0 } else { buffer as u64 };
        block.aio_nbytes = if flush { 0 } else { bytes as u64 };
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
        let room = super::reserve::room_for_thread(STACK_SIZE, false).is_ok();
        if *self.in_flight.get_mut() > 0 || !room || thread.spawn(move || destroy(id)).is_err() {
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
        self.ring.as_ref().is_some_and(|ring| !ring.is_empty())
    }

    /// Hands each completed I/O, with its bytes or error, to `done`, at most `limit` of them.
    pub fn reap(&mut self, limit: usize, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        let count = match &mut self.ring {
            Some(ring) => Self::reap_ring(ring, limit, done),
            None => self.reap_by_call(limit, done),
        };
        if count > 0 {
            self.context.in_flight.fetch_sub(count as isize, Ordering::Relaxed);
        }
        count
    }

    fn reap_ring(ring: &mut Ring, limit: usize, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        let (mut head, tail) = ring.bounds();
        let mut count = 0;
        while count < limit
            && let Some(event) = ring.take(&mut head, tail)
        {
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
        // SAFETY: `data` is the address of what `submit` made from a box, exposed and gave away; the kernel is done with it, and
        // each completion comes once.
        let io = unsafe { Box::from_raw(std::ptr::with_exposed_provenance_mut(event.data as usize)) };
        done(io, super::completed(event.res));
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

    /// A ring of ours, laid out as the kernel's.
    struct Made {
        memory: Vec<u64>,
    }

    impl Made {
        const ENTRIES: u32 = 3;

        fn new(magic: u32) -> Made {
            let header = Header {
                id: 0,
                nr: Made::ENTRIES,
                head: AtomicU32::new(0),
                tail: AtomicU32::new(0),
                magic,
                compat_features: 1,
                incompat_features: 0,
                header_length: size_of::<Header>() as u32,
            };
            let words = (size_of::<Header>() + Made::ENTRIES as usize * size_of::<Event>()) / 8;
            let mut made = Made { memory: vec![0; words] };
            // SAFETY: there is room for it, and it is aligned.
            unsafe { made.header().write(header) };
            made
        }

        fn header(&mut self) -> NonNull<Header> {
            NonNull::new(self.memory.as_mut_ptr()).unwrap().cast()
        }
    }

    #[test]
    fn the_ring_is_read_around_its_end_and_each_event_once() {
        let mut made = Made::new(AIO_RING_MAGIC);
        let header = made.header();
        // SAFETY: it has its events, and outlives what reads it, which is the only one.
        let mut ring = unsafe { Ring::at(header) }.unwrap();
        // As the kernel does it.
        let fill = |io: Box<Io>, res| {
            let data = Box::into_raw(io).expose_provenance() as u64;
            // SAFETY: the pointers are within the ring, and nobody reads the event before the tail has moved.
            unsafe {
                let tail = (*header.as_ptr()).tail.load(Ordering::Relaxed);
                let events = header.byte_add(size_of::<Header>()).cast::<Event>();
                events.add(tail as usize).write(Event { data, obj: 0, res, res2: 0 });
                (*header.as_ptr()).tail.store((tail + 1) % Made::ENTRIES, Ordering::Release);
            }
        };
        assert!(ring.is_empty());
        for round in 0..4 {
            fill(Io::new(round, 1), 512);
            fill(Io::new(round + 10, 1), -524);
            let mut done = Vec::new();
            let mut reap = |ring: &mut Ring, limit| {
                Completions::reap_ring(ring, limit, &mut |io, result| done.push((io.tag, result)))
            };
            assert!(!ring.is_empty());
            assert_eq!((reap(&mut ring, 1), reap(&mut ring, 9), reap(&mut ring, 9)), (1, 1, 0));
            assert_eq!(done, [(round, Ok(512)), (round + 10, Err(Errno::EIO))]);
            assert!(ring.is_empty());
        }
    }

    #[test]
    fn a_ring_of_another_layout_is_not_read() {
        let mut made = Made::new(AIO_RING_MAGIC + 1);
        // SAFETY: as above.
        assert!(unsafe { Ring::at(made.header()) }.is_none());
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
