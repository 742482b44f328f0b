use std::time::Instant;

use super::super::io::{FileId, last_error};
use super::*;

fn files(file: std::fs::File) -> Arc<[Backing]> {
    Arc::new([Backing { file, direct: false, block_device: false }])
}

fn ring(settings: Settings) -> (Arc<Ring>, Completions) {
    setup(&Blocking::before_main_loop(), settings, &files(tempfile::tempfile().unwrap()), &EventFd::new().unwrap())
        .unwrap()
}

const PLAIN: Settings = Settings { depth: 8, sqpoll_idle_ms: None, cq_entries: None };

fn wait(completions: &mut Completions, count: usize) -> Vec<(Box<Io>, Result<u64, Errno>)> {
    let mut done = Vec::new();
    let end = Instant::now() + Duration::from_secs(10);
    while done.len() < count {
        completions.reap(&mut |io, result| done.push((io, result)));
        assert!(Instant::now() < end, "{} of {count} completed", done.len());
    }
    done
}

/// One I/O to its end, with pieces of `memory`.
fn run(
    ends: &mut (Arc<Ring>, Completions),
    op: IoOp,
    offset: u64,
    memory: &Arc<Memory>,
    pieces: &[(usize, usize)],
) -> Result<u64, Errno> {
    let mut io = Io::new(1, 4);
    io.begin(op, FileId(0), offset);
    pieces.iter().for_each(|(at, len)| io.push(memory, *at, *len));
    let mut batch = VecDeque::from([io]);
    assert_eq!(ends.0.submit(&mut batch, 64, Caller::MainLoop), Ok(1));
    wait(&mut ends.1, 1).pop().unwrap().1
}

#[test]
fn writes_flushes_and_reads_with_and_without_the_kernels_thread() {
    for sqpoll_idle_ms in [None, Some(1)] {
        let mut ends = ring(Settings { sqpoll_idle_ms, ..PLAIN });
        let memory = Arc::new(Memory::anonymous(8192).unwrap());
        memory.write(0, &[7; 4096]);
        let fua = IoOp::Write { fua: true };
        assert_eq!(run(&mut ends, fua, 512, &memory, &[(0, 1024), (2048, 512)]), Ok(1536));
        assert_eq!(run(&mut ends, IoOp::Flush, 0, &memory, &[]), Ok(0));
        // The kernel's thread is asleep by now.
        std::thread::sleep(Duration::from_millis(20));
        // A read across the end of the file comes back short.
        assert_eq!(run(&mut ends, IoOp::Read, 0, &memory, &[(4096, 4096)]), Ok(2048));
        let mut got = [9; 2048];
        memory.read(4096, &mut got);
        assert!(got[..512].iter().all(|b| *b == 0) && got[512..].iter().all(|b| *b == 7));
        assert!(!ends.1.ready());
    }
}

#[test]
fn a_memory_that_has_gone_leaves_its_buffer_to_the_next_which_may_have_its_address() {
    let mut ends = ring(PLAIN);
    for round in 1..=200u8 {
        let memory = Arc::new(Memory::anonymous(4096).unwrap());
        memory.write(0, &[round; 4096]);
        assert_eq!(run(&mut ends, IoOp::Write { fua: false }, 0, &memory, &[(0, 4096)]), Ok(4096));
        memory.zero(0, 4096);
        assert_eq!(run(&mut ends, IoOp::Read, 0, &memory, &[(0, 4096)]), Ok(4096));
        assert_eq!(memory.read_once::<8>(64), [round; 8]);
        let submitting = ends.0.submitting.lock().unwrap();
        let is_it = |buffer: &&Buffer| buffer.id == memory.id() && buffer.fixed;
        assert!(submitting.buffers.is_empty() || submitting.buffers.iter().flatten().any(|buffer| is_it(&buffer)));
    }
    ends.0.tidy();
    let submitting = ends.0.submitting.lock().unwrap();
    assert_eq!(submitting.buffers.iter().flatten().count(), 0, "all have gone");
}

#[test]
fn more_memories_than_buffers_are_served_too() {
    let mut ends = ring(PLAIN);
    let memories: Vec<_> = (0..BUFFERS + 8).map(|_| Arc::new(Memory::anonymous(4096).unwrap())).collect();
    for (i, memory) in memories.iter().enumerate() {
        memory.write(0, &[i as u8; 512]);
        assert_eq!(run(&mut ends, IoOp::Write { fua: false }, i as u64 * 512, memory, &[(0, 512)]), Ok(512));
    }
    assert_eq!(run(&mut ends, IoOp::Read, 512 * 70, &memories[0], &[(0, 512)]), Ok(512));
    assert_eq!(memories[0].read_once::<4>(0), [70; 4]);
}

#[test]
fn a_memory_that_can_not_be_fixed_is_served_and_hinders_no_other() {
    let mut ends = ring(PLAIN);
    // The kernel takes 1 GiB at most. Only what is used of it is there.
    let huge = Arc::new(Memory::anonymous((1 << 30) + 4096).unwrap());
    let small = Arc::new(Memory::anonymous(4096).unwrap());
    for _ in 0..3 {
        assert_eq!(run(&mut ends, IoOp::Write { fua: false }, 0, &huge, &[(0, 4096)]), Ok(4096));
        assert_eq!(run(&mut ends, IoOp::Read, 0, &small, &[(0, 4096)]), Ok(4096));
    }
    let submitting = ends.0.submitting.lock().unwrap();
    if submitting.buffers.is_empty() {
        return eprintln!("SKIPPED: this kernel has no table of buffers");
    }
    let fixed: Vec<_> = submitting.buffers.iter().flatten().map(|buffer| (buffer.id, buffer.fixed)).collect();
    assert_eq!(fixed, [(huge.id(), false), (small.id(), true)], "each is tried once");
}

/// What the kernel has pinned for this process, bytes.
fn pinned() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

#[test]
fn pages_of_a_memory_that_has_gone_are_let_go_by_the_main_loop_or_the_next_submission() {
    // Far more than what tests that run at the same time pin.
    const SIZE: usize = 64 << 20;
    for by_submission in [false, true] {
        let mut ends = ring(PLAIN);
        let memory = Arc::new(Memory::anonymous(SIZE).unwrap());
        assert_eq!(run(&mut ends, IoOp::Write { fua: false }, 0, &memory, &[(0, 4096)]), Ok(4096));
        if !ends.0.submitting.lock().unwrap().buffers.iter().flatten().any(|buffer| buffer.fixed) {
            return eprintln!("SKIPPED: the kernel would not pin 64 MiB");
        }
        assert!(pinned() >= SIZE, "{}", pinned());
        drop(memory);
        assert!(pinned() >= SIZE, "the pages outlive the mapping: {}", pinned());
        if by_submission {
            let other = Arc::new(Memory::anonymous(4096).unwrap());
            assert_eq!(run(&mut ends, IoOp::Write { fua: false }, 0, &other, &[(0, 4096)]), Ok(4096));
        } else {
            ends.0.tidy();
        }
        assert!(pinned() < SIZE, "{}", pinned());
    }
}

#[test]
fn a_completion_queue_that_is_too_small_holds_submissions_back() {
    let (ring, mut completions) = ring(Settings { depth: 64, cq_entries: Some(4), ..PLAIN });
    let memory = Arc::new(Memory::anonymous(4096).unwrap());
    let mut batch: VecDeque<_> = (0..64)
        .map(|tag| {
            let mut io = Io::new(tag, 1);
            io.begin(IoOp::Write { fua: false }, FileId(0), u64::from(tag) * 512);
            io.push(&memory, 0, 512);
            io
        })
        .collect();
    let mut tags = Vec::new();
    while !batch.is_empty() {
        while let Ok(n) = ring.submit(&mut batch, 64, Caller::MainLoop) {
            assert!((1..=4).contains(&n) || batch.is_empty());
            if batch.is_empty() {
                break;
            }
        }
        assert!(ring.to_reap.load(Ordering::Relaxed) <= 4);
        assert!(!ring.cancel(63) || tags.len() > 56, "a cancellation needs an entry too");
        // SAFETY: nobody else has the ring.
        assert!(!unsafe { ring.ring.submission_shared() }.cq_overflow());
        tags.extend(wait(&mut completions, 1).iter().map(|(io, _)| io.tag));
    }
    while tags.len() < 64 {
        tags.extend(wait(&mut completions, 1).iter().map(|(io, _)| io.tag));
    }
    tags.sort_unstable();
    assert_eq!(tags, (0..64).collect::<Vec<_>>());
    assert!(!completions.ready());
}

#[test]
fn what_the_kernel_refuses_completes_with_the_error_and_alone() {
    let write_only = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
    let (ring, mut completions) =
        setup(&Blocking::before_main_loop(), PLAIN, &files(write_only), &EventFd::new().unwrap()).unwrap();
    let memory = Arc::new(Memory::anonymous(4096).unwrap());
    let mut batch = VecDeque::new();
    for (tag, op) in [IoOp::Write { fua: false }, IoOp::Read, IoOp::Write { fua: false }].into_iter().enumerate() {
        let mut io = Io::new(tag as u32, 1);
        io.begin(op, FileId(0), 0);
        io.push(&memory, 0, 512);
        batch.push_back(io);
    }
    assert_eq!(ring.submit(&mut batch, 64, Caller::MainLoop), Ok(3));
    let mut results: Vec<_> = wait(&mut completions, 3).into_iter().map(|(io, result)| (io.tag, result)).collect();
    results.sort_unstable_by_key(|(tag, _)| *tag);
    assert_eq!(results, [(0, Ok(512)), (1, Err(Errno::EBADF)), (2, Ok(512))]);
}

#[test]
fn a_read_that_nothing_ends_is_cancelled() {
    // An empty pipe.
    let (reader, _writer) = nix::unistd::pipe().unwrap();
    let (ring, mut completions) =
        setup(&Blocking::before_main_loop(), PLAIN, &files(reader.into()), &EventFd::new().unwrap()).unwrap();
    let memory = Arc::new(Memory::anonymous(4096).unwrap());
    let mut io = Io::new(3, 1);
    io.begin(IoOp::Read, FileId(0), u64::MAX);
    io.push(&memory, 0, 512);
    assert!(!ring.cancel(3), "it was not submitted");
    assert_eq!(ring.submit(&mut VecDeque::from([io]), 64, Caller::MainLoop), Ok(1));
    std::thread::sleep(Duration::from_millis(20));
    assert!(!completions.ready());
    assert!(ring.cancel(3));
    assert_eq!(wait(&mut completions, 1)[0].1, Err(Errno::ECANCELED));
}

#[test]
fn the_event_tells_of_completions() {
    let event = EventFd::from_flags(nix::sys::eventfd::EfdFlags::EFD_NONBLOCK).unwrap();
    let (ring, mut completions) =
        setup(&Blocking::before_main_loop(), PLAIN, &files(tempfile::tempfile().unwrap()), &event).unwrap();
    let mut io = Io::new(0, 1);
    io.begin(IoOp::Flush, FileId(0), 0);
    assert_eq!(ring.submit(&mut VecDeque::from([io]), 64, Caller::MainLoop), Ok(1));
    wait(&mut completions, 1);
    let end = Instant::now() + Duration::from_secs(5);
    while event.read().is_err() {
        assert!(Instant::now() < end, "the event is not written");
    }
}

#[test]
fn what_may_not_wait_comes_back_with_again() {
    // An empty pipe.
    let (reader, _writer) = nix::unistd::pipe().unwrap();
    let (ring, mut completions) =
        setup(&Blocking::before_main_loop(), PLAIN, &files(reader.into()), &EventFd::new().unwrap()).unwrap();
    let memory = Arc::new(Memory::anonymous(4096).unwrap());
    let mut io = Io::new(3, 1);
    io.begin(IoOp::Read, FileId(0), u64::MAX);
    io.nowait = true;
    io.push(&memory, 0, 512);
    assert_eq!(ring.submit(&mut VecDeque::from([io]), 64, Caller::MainLoop), Ok(1));
    assert_eq!(wait(&mut completions, 1)[0].1, Err(Errno::EAGAIN));
    assert!(!ring.cancel(3), "it is not in the ring");
}

#[test]
fn a_ring_that_breaks_gives_back_what_it_has_not_taken() {
    let (ring, _completions) = ring(PLAIN);
    let null = std::fs::File::open("/dev/null").unwrap();
    // SAFETY: from here on the ring's descriptor is another file.
    assert!(unsafe { libc::dup2(null.as_raw_fd(), ring.ring.as_raw_fd()) } >= 0);
    let flush = |tag| {
        let mut io = Io::new(tag, 1);
        io.begin(IoOp::Flush, FileId(0), 0);
        io
    };
    let mut batch = VecDeque::from([flush(1), flush(2)]);
    for _ in 0..3 {
        assert_eq!(ring.submit(&mut batch, 64, Caller::MainLoop), Err(Errno::EOPNOTSUPP));
        assert_eq!(batch.iter().map(|io| io.tag).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(ring.to_reap.load(Ordering::Relaxed), 0);
    }
    assert!(!ring.cancel(1));
}

#[test]
fn a_ring_that_is_dropped_has_let_go_of_its_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for round in 0..20 {
        let open = || std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path).unwrap();
        let file = open();
        file.try_lock().unwrap_or_else(|error| panic!("round {round}: {error}"));
        // The descriptor is closed, and with it the lock is gone, as soon as nobody has the file.
        drop(setup(&Blocking::before_main_loop(), PLAIN, &files(file), &EventFd::new().unwrap()).unwrap());
    }
}

/// Runs `run` in a thread for which the kernel answers `io_uring_setup` with `errno` (seccomp(2)).
pub(crate) fn forbidden(errno: Errno, run: impl FnOnce() + Send + 'static) {
    let forbid = move || {
        let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
        let mut filter = [
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0), // the number of the call
            libc::sock_filter {
                jf: 1,
                ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_io_uring_setup as u32)
            },
            statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32),
            statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: both concern this thread only; the program is four valid statements, which the kernel copies.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
                | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
        };
        assert_eq!(done, 0, "{}", last_error());
        run();
    };
    std::thread::spawn(forbid).join().unwrap();
}

#[test]
fn a_filter_that_forbids_it_is_told_of() {
    for errno in [Errno::EPERM, Errno::ENOSYS] {
        forbidden(errno, move || {
            for sqpoll_idle_ms in [None, Some(1)] {
                let settings = Settings { sqpoll_idle_ms, ..PLAIN };
                let error = setup(
                    &Blocking::before_main_loop(),
                    settings,
                    &files(tempfile::tempfile().unwrap()),
                    &EventFd::new().unwrap(),
                )
                .err();
                assert_eq!(error, Some(SetupError { step: "io_uring_setup", errno, only_sqpoll: false }));
            }
        });
    }
}

/// A memory of one page that whoever touches it waits for, until it is let go (userfaultfd(2), ioctl_userfaultfd(2)).
struct Held {
    descriptor: std::os::fd::OwnedFd,
    memory: Arc<Memory>,
}

impl Held {
    /// None where the kernel has no such thing for us.
    fn new() -> Option<Held> {
        use std::os::fd::FromRawFd;
        // SAFETY: the call makes a descriptor.
        let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) } as i32;
        if descriptor < 0 {
            eprintln!("SKIPPED: userfaultfd: {}", last_error());
            return None;
        }
        // SAFETY: just made, and ours.
        let descriptor = unsafe { std::os::fd::OwnedFd::from_raw_fd(descriptor) };
        let held = Held { descriptor, memory: Arc::new(Memory::anonymous(4096).unwrap()) };
        held.call(0xc018_aa3f, &mut [0xaa, 0, 0]); // UFFDIO_API
        held.call(0xc020_aa00, &mut [held.address(), 4096, 1, 0]); // UFFDIO_REGISTER, UFFDIO_REGISTER_MODE_MISSING
        Some(held)
    }

    fn address(&self) -> u64 {
        self.memory.at(0, 4096).expose_provenance() as u64
    }

    fn call(&self, number: u64, argument: &mut [u64]) {
        // SAFETY: the structs of these calls are three or four integers of 64 bits, which the kernel reads and writes.
        let done = unsafe { libc::ioctl(self.descriptor.as_raw_fd(), number, argument.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", last_error());
    }

    fn let_go(&self) {
        self.call(0xc020_aa04, &mut [self.address(), 4096, 0, 0]); // UFFDIO_ZEROPAGE
    }
}

/// With an I/O of one piece registering its memory is held up, with two the system call that submits it.
fn hold_up_a_submission_of(pieces: usize, settings: Settings) {
    let Some(held) = Held::new() else { return };
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let (ring, mut completions) =
        setup(&Blocking::before_main_loop(), settings, &files(zero), &EventFd::new().unwrap()).unwrap();
    let plain = Arc::new(Memory::anonymous(4096).unwrap());
    let read = |tag, memory: &Arc<Memory>, pieces| {
        let mut io = Io::new(tag, pieces);
        io.begin(IoOp::Read, FileId(0), 0);
        (0..pieces).for_each(|piece| io.push(memory, piece * 1024, 512));
        io
    };
    let gone = Arc::new(Memory::anonymous(4096).unwrap());
    assert_eq!(ring.submit(&mut VecDeque::from([read(0, &gone, 1)]), 1, Caller::MainLoop), Ok(1));
    wait(&mut completions, 1);
    let mut batch = VecDeque::from([read(1, &plain, 1), read(2, &held.memory, pieces)]);
    let mut more = VecDeque::from([read(3, &Arc::new(Memory::anonymous(4096).unwrap()), 1)]);
    std::thread::scope(|scope| {
        let submitter = scope.spawn(|| ring.submit(&mut batch, 64, Caller::Thread(&Blocking::before_main_loop())));
        // SQPOLL's thread submits what has no memory to be registered.
        let by_other = settings.sqpoll_idle_ms.is_some() && pieces > 1;
        while if by_other { !submitter.is_finished() } else { ring.submitting.try_lock().is_ok() } {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(submitter.is_finished(), by_other);
        let begun = Instant::now();
        let (to_other, from_main) = std::sync::mpsc::channel::<()>();
        let other = scope.spawn(move || {
            let in_time = from_main.recv_timeout(Duration::from_secs(5)).is_ok();
            held.let_go();
            in_time
        });
        drop(gone);
        ring.tidy();
        completions.ready();
        let mut reaped = completions.reap(&mut |_, _| {});
        // Its memory is not registered yet, and one that is has gone.
        let submitted = ring.submit(&mut more, 1, Caller::MainLoop);
        assert_eq!(submitted, if by_other { Ok(1) } else { Err(Errno::EAGAIN) });
        ring.cancel(2);
        to_other.send(()).unwrap();
        assert!(other.join().unwrap(), "the main loop waited for {:?}", begun.elapsed());
        assert_eq!(submitter.join().unwrap(), Ok(2));
        while reaped < 2 + submitted.unwrap_or(0) {
            reaped += completions.reap(&mut |_, _| {});
            assert!(begun.elapsed() < Duration::from_secs(20));
        }
    });
}

#[test]
fn the_main_loop_never_waits_for_a_submission_that_is_held_up() {
    for sqpoll_idle_ms in [None, Some(10)] {
        for pieces in [1, 2] {
            hold_up_a_submission_of(pieces, Settings { sqpoll_idle_ms, ..PLAIN });
        }
    }
}
