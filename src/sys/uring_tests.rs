use std::time::Instant;

use super::super::io::FileId;
use super::*;

fn files(file: std::fs::File) -> Arc<[Backing]> {
    Arc::new([Backing { file, direct: false, block_device: false }])
}

fn ring(settings: Settings) -> (Arc<Ring>, Completions) {
    setup(settings, &files(tempfile::tempfile().unwrap()), &EventFd::new().unwrap()).unwrap()
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
    assert_eq!(ends.0.submit(&mut batch, 64), Ok(1));
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
        if submitting.fixed {
            assert!(submitting.buffers.iter().flatten().any(|(id, _)| *id == memory.id()), "it is not fixed");
        }
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
fn completions_beyond_the_completion_queue_are_not_lost() {
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
    let mut accepted = 0;
    while accepted < 64 {
        accepted += ring.submit(&mut batch, 64).unwrap_or(0);
    }
    // Written through the page cache: all of them are done by now.
    std::thread::sleep(Duration::from_millis(50));
    assert!(completions.overflown(), "64 completions fit into 4 entries");
    let mut tags: Vec<_> = wait(&mut completions, 64).iter().map(|(io, _)| io.tag).collect();
    tags.sort_unstable();
    assert_eq!(tags, (0..64).collect::<Vec<_>>());
    assert!(!completions.ready());
}

#[test]
fn what_the_kernel_refuses_completes_with_the_error_and_alone() {
    let write_only = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
    let (ring, mut completions) = setup(PLAIN, &files(write_only), &EventFd::new().unwrap()).unwrap();
    let memory = Arc::new(Memory::anonymous(4096).unwrap());
    let mut batch = VecDeque::new();
    for (tag, op) in [IoOp::Write { fua: false }, IoOp::Read, IoOp::Write { fua: false }].into_iter().enumerate() {
        let mut io = Io::new(tag as u32, 1);
        io.begin(op, FileId(0), 0);
        io.push(&memory, 0, 512);
        batch.push_back(io);
    }
    assert_eq!(ring.submit(&mut batch, 64), Ok(3));
    let mut results: Vec<_> = wait(&mut completions, 3).into_iter().map(|(io, result)| (io.tag, result)).collect();
    results.sort_unstable_by_key(|(tag, _)| *tag);
    assert_eq!(results, [(0, Ok(512)), (1, Err(Errno::EBADF)), (2, Ok(512))]);
}

#[test]
fn a_read_that_nothing_ends_is_cancelled() {
    // An empty pipe.
    let (reader, _writer) = nix::unistd::pipe().unwrap();
    let (ring, mut completions) = setup(PLAIN, &files(reader.into()), &EventFd::new().unwrap()).unwrap();
    let memory = Arc::new(Memory::anonymous(4096).unwrap());
    let mut io = Io::new(3, 1);
    io.begin(IoOp::Read, FileId(0), u64::MAX);
    io.push(&memory, 0, 512);
    assert!(!ring.cancel(3), "it was not submitted");
    assert_eq!(ring.submit(&mut VecDeque::from([io]), 64), Ok(1));
    std::thread::sleep(Duration::from_millis(20));
    assert!(!completions.ready());
    assert!(ring.cancel(3));
    assert_eq!(wait(&mut completions, 1)[0].1, Err(Errno::ECANCELED));
}

#[test]
fn the_event_tells_of_completions() {
    let event = EventFd::from_flags(nix::sys::eventfd::EfdFlags::EFD_NONBLOCK).unwrap();
    let (ring, mut completions) = setup(PLAIN, &files(tempfile::tempfile().unwrap()), &event).unwrap();
    let mut io = Io::new(0, 1);
    io.begin(IoOp::Flush, FileId(0), 0);
    assert_eq!(ring.submit(&mut VecDeque::from([io]), 64), Ok(1));
    wait(&mut completions, 1);
    let end = Instant::now() + Duration::from_secs(5);
    while event.read().is_err() {
        assert!(Instant::now() < end, "the event is not written");
    }
}
