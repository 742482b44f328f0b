//! The queue and the submit thread, on an engine that does what the test says.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use crate::common::PATIENCE;
use crate::common::double::{Double, Seen};
use nix::errno::Errno;
use tapdisk::blocking::Blocking;
use tapdisk::engine::Inline;
use tapdisk::queue::{Limits, Queue, Submission, SubmitMode, Transfer};
use tapdisk::request::{Op, RequestId, Slots};
use tapdisk::retry::Retry;
use tapdisk::sys::io::{FileId, IoOp, MAX_MEMORIES};
use tapdisk::sys::memory::Memory;

const WRITE: IoOp = IoOp::Write { fua: false };

struct Bench {
    slots: Slots,
    queue: Queue,
    double: Double,
    memory: Arc<Memory>,
}

impl Bench {
    fn new(depth: usize, mode: SubmitMode) -> Bench {
        Self::with_iovecs(depth, mode, 16)
    }

    fn with_iovecs(depth: usize, mode: SubmitMode, iovecs: usize) -> Bench {
        let inline = if mode == SubmitMode::Inline { Inline::Always } else { Inline::Never };
        Bench::with(depth, mode, inline, iovecs)
    }

    fn with(depth: usize, mode: SubmitMode, inline: Inline, iovecs: usize) -> Bench {
        let (double, engine) = Double::engine(depth, inline);
        let limits = Limits { tiocbs: 256, iovecs, merge_bytes: 64 << 10, retry: Retry::default() };
        let submission = Submission::start(&Blocking::before_main_loop(), engine, mode).unwrap();
        let queue = Queue::new(submission.into(), mode, limits);
        let memory = Arc::new(Memory::anonymous(1 << 20).unwrap());
        Bench { slots: Slots::new(256, MAX_MEMORIES, 0), queue, double, memory }
    }

    /// Queues a request of one transfer, with memory that is apart from the others'.
    fn push(&mut self, op: IoOp, file: u16, offset: u64, len: u64) -> RequestId {
        let place = self.slots.used() * 4096;
        let memory = Arc::clone(&self.memory);
        self.push_into(op, file, offset, &[(&memory, place, len as u32)])
    }

    /// The same with these segments of memory.
    fn push_into(&mut self, op: IoOp, file: u16, offset: u64, data: &[(&Arc<Memory>, usize, u32)]) -> RequestId {
        let request = self.slots.vacant().unwrap();
        request.op = Op::Read;
        for (memory, place, len) in data {
            request.payload.push(memory, *place, *len).unwrap();
        }
        let len = request.payload.len();
        let owner = self.slots.take().unwrap();
        assert!(self.queue.push(Transfer { op, file: FileId(file), offset, len, owner, at: 0, piece: None }));
        owner
    }

    fn kick(&mut self) {
        self.queue.kick(&self.slots);
    }

    /// Turns until `count` transfers are finished: their requests' slots and results.
    fn finished(&mut self, count: usize) -> Vec<(u32, Result<u64, Errno>)> {
        let end = Instant::now() + PATIENCE;
        let mut all = Vec::new();
        while all.len() < count {
            self.queue.reap();
            while let Some((transfer, result)) = self.queue.next_finished() {
                all.push((transfer.owner.index(), result));
            }
            self.kick();
            assert!(Instant::now() < end, "only {} of {count} are finished", all.len());
            std::thread::sleep(Duration::from_micros(100));
        }
        all
    }
}

fn seen(op: IoOp, offset: u64, len: u64) -> Seen {
    Seen { op, offset, len }
}

#[test]
fn contiguous_transfers_of_one_file_and_direction_are_one_io() {
    let mut bench = Bench::new(8, SubmitMode::Thread);
    for (op, file, offset, len) in [
        (WRITE, 0, 0, 4096),
        (WRITE, 0, 4096, 512),
        (WRITE, 0, 4608, 1024),
        (WRITE, 0, 8192, 512),      // a gap
        (WRITE, 1, 8704, 512),      // another file
        (IoOp::Read, 1, 9216, 512), // another direction
        (IoOp::Write { fua: true }, 1, 9728, 512),
        (IoOp::Flush, 0, 0, 0),
        (IoOp::Flush, 0, 0, 0),
        (IoOp::Discard, 0, 0, 4096),
        (IoOp::Discard, 0, 4096, 4096),
    ] {
        bench.push(op, file, offset, len);
    }
    bench.kick();
    let fua = IoOp::Write { fua: true };
    let expected = [
        seen(WRITE, 0, 5632),
        seen(WRITE, 8192, 512),
        seen(WRITE, 8704, 512),
        seen(IoOp::Read, 9216, 512),
        seen(fua, 9728, 512),
        seen(IoOp::Flush, 0, 0),
        seen(IoOp::Discard, 0, 4096),
        seen(IoOp::Discard, 4096, 4096),
    ];
    assert_eq!(bench.double.wait_seen(8), expected);
    bench.double.complete_all();
    let finished = bench.finished(11);
    assert!(finished.iter().all(|(_, result)| result.is_ok()), "{finished:?}");
    let report = bench.queue.report();
    assert_eq!((report.queued, report.merged, report.submitted), (11, 3, 8));
}

#[test]
fn merging_stops_at_its_limits() {
    let mut bench = Bench::new(8, SubmitMode::Thread);
    // 64 KiB and 16 pieces of memory; pieces that are neighbours in memory are one.
    for i in 0..20 {
        bench.push(WRITE, 0, i * 512, 512);
    }
    bench.push(WRITE, 0, 1 << 20, 40 << 10);
    bench.push(WRITE, 0, (1 << 20) + (40 << 10), 40 << 10);
    bench.kick();
    let sizes: Vec<_> = bench.double.wait_seen(4).iter().map(|seen| seen.len).collect();
    assert_eq!(sizes, [16 * 512, 4 * 512, 40 << 10, 40 << 10]);
    bench.double.complete_all();
    bench.finished(22);
}

#[test]
fn requests_whose_data_is_in_different_memories_are_one_io() {
    let mut bench = Bench::new(8, SubmitMode::Thread);
    let [a, b] = [(); 2].map(|()| Arc::new(Memory::anonymous(8192).unwrap()));
    bench.push_into(IoOp::Read, 0, 0, &[(&a, 7680, 512), (&b, 0, 1024)]);
    bench.push_into(IoOp::Read, 0, 1536, &[(&b, 4096, 512), (&a, 0, 512)]);
    bench.kick();
    assert_eq!(bench.double.wait_seen(1), [seen(IoOp::Read, 0, 2560)]);
    let shares = || (Arc::strong_count(&a), Arc::strong_count(&b));
    assert_eq!(shares(), (4, 4), "those of two requests and of the I/O");
    // Short, within the second piece; the rest is submitted again.
    bench.double.complete(Some(Ok(1024)));
    bench.queue.reap();
    bench.double.wait_seen(2);
    bench.double.complete_all();
    assert_eq!(bench.finished(2), [(0, Ok(1536)), (1, Ok(1024))]);
    assert_eq!(shares(), (3, 3));
    let filled = |memory: &Memory| -> Vec<bool> {
        let mut bytes = [0; 8192];
        memory.read(0, &mut bytes);
        bytes.chunks(512).map(|sector| sector.iter().all(|byte| *byte == 0xab)).collect()
    };
    let expected = |sectors: &[usize]| (0..16).map(|i| sectors.contains(&i)).collect::<Vec<_>>();
    assert_eq!((filled(&a), filled(&b)), (expected(&[0, 15]), expected(&[0, 1, 8])));
}

#[test]
fn merging_stops_where_an_io_would_point_into_too_many_memories() {
    let mut bench = Bench::with_iovecs(8, SubmitMode::Thread, 256);
    let memories: Vec<_> = (0..=MAX_MEMORIES).map(|_| Arc::new(Memory::anonymous(4096).unwrap())).collect();
    let most: Vec<_> = memories[1..].iter().map(|memory| (memory, 0, 512)).collect();
    let len = 512 * MAX_MEMORIES as u64;
    bench.push_into(WRITE, 0, 0, &most);
    bench.push_into(WRITE, 0, len, &[(&memories[1], 1024, 512), (&memories[2], 1024, 512)]);
    bench.push_into(WRITE, 0, len + 1024, &[(&memories[1], 2048, 512), (&memories[0], 2048, 512)]);
    bench.push_into(WRITE, 0, len + 2048, &most);
    bench.kick();
    let expected = [seen(WRITE, 0, len + 1024), seen(WRITE, len + 1024, 1024), seen(WRITE, len + 2048, len)];
    assert_eq!(bench.double.wait_seen(3), expected);
    bench.double.complete_all();
    bench.finished(4);
}

#[test]
fn no_more_than_the_depth_is_in_flight_and_the_rest_merges_meanwhile() {
    let mut bench = Bench::new(2, SubmitMode::Thread);
    for i in 0..6 {
        bench.push(WRITE, 0, i * 8192, 512);
        bench.kick();
    }
    assert_eq!(bench.double.wait_seen(2).len(), 2);
    let report = bench.queue.report();
    assert_eq!((report.waiting, report.in_flight), (4, 2));
    bench.push(WRITE, 0, 5 * 8192 + 512, 512);
    for _ in 0..3 {
        bench.double.complete_all();
        bench.finished(2);
        bench.double.wait_seen(0);
        std::thread::sleep(Duration::from_millis(20));
    }
    let all = bench.double.wait_seen(6);
    assert_eq!(all[5], seen(WRITE, 5 * 8192, 1024), "the last two became one");
}

#[test]
fn who_submits_is_for_the_file_to_say_and_one_that_must_not_wait_turns_off_no_other() {
    let inline = Inline::ByFile([Inline::Never, Inline::Always, Inline::Idle { writes: false }].into());
    let mut bench = Bench::with(16, SubmitMode::Auto, inline, 16);
    for file in [0, 1, 2, 0, 1, 1] {
        bench.push(WRITE, file, u64::from(file) * 65536 + bench.slots.used() as u64 * 8192, 512);
    }
    bench.kick();
    assert_eq!(bench.queue.report().inline, 3, "those of the second");
    bench.double.wait_seen(6);
    bench.double.complete_all();
    assert!(bench.finished(6).iter().all(|(_, result)| result.is_ok()));
    // A single one.
    for (op, file, expected) in [(WRITE, 0, 3), (WRITE, 1, 4), (WRITE, 2, 4), (IoOp::Read, 2, 5), (IoOp::Read, 0, 5)]
    {
        let before = bench.double.wait_seen(0).len();
        bench.push(op, file, 4096, 512);
        bench.kick();
        assert_eq!(bench.queue.report().inline, expected, "{op:?} on {file}");
        bench.double.wait_seen(before + 1);
        bench.double.complete_all();
        bench.finished(1);
    }
    // The kernel has no way not to block for it.
    bench.double.refuse(Errno::EOPNOTSUPP);
    for (file, expected) in [(2, 5), (2, 5), (1, 6)] {
        let before = bench.double.wait_seen(0).len();
        bench.push(IoOp::Read, file, 4096, 512);
        bench.kick();
        bench.double.wait_seen(before + 1);
        assert_eq!(bench.queue.report().inline, expected, "{file}");
        bench.double.complete_all();
        bench.finished(1);
    }
    assert_eq!(bench.queue.report().would_block, 1);
}

#[test]
fn partial_acceptance_goes_on_with_the_rest() {
    let mut bench = Bench::new(16, SubmitMode::Thread);
    bench.double.accept(1);
    for i in 0..10 {
        bench.push(WRITE, 0, i * 8192, 512);
    }
    bench.kick();
    assert_eq!(bench.double.wait_seen(10).len(), 10);
    assert_eq!(bench.double.submissions(), 10);
    bench.double.complete_all();
    bench.finished(10);
}

#[test]
fn again_waits_for_a_completion() {
    let mut bench = Bench::new(16, SubmitMode::Thread);
    bench.push(WRITE, 0, 0, 512);
    bench.kick();
    bench.double.wait_seen(1);
    for _ in 0..3 {
        bench.double.refuse(Errno::EAGAIN);
    }
    bench.push(WRITE, 0, 8192, 512);
    bench.kick();
    bench.double.complete(None);
    assert_eq!(bench.finished(1), [(0, Ok(512))]);
    assert_eq!(bench.double.wait_seen(2)[1], seen(WRITE, 8192, 512));
    assert_eq!(bench.queue.report().busy, 3);
    bench.double.complete(None);
    assert_eq!(bench.finished(1), [(1, Ok(512))]);
}

#[test]
fn each_of_a_batch_can_be_refused_and_none_is_lost() {
    for mode in [SubmitMode::Inline, SubmitMode::Thread] {
        let mut bench = Bench::new(8, mode);
        (0..3).for_each(|_| bench.double.refuse(Errno::EIO));
        for at in 0..5 {
            bench.push(IoOp::Read, 0, at * 8192, 512);
        }
        bench.kick();
        let failed = bench.finished(3);
        assert!(failed.iter().all(|(_, result)| *result == Err(Errno::EIO)), "{failed:?}");
        bench.double.wait_seen(2);
        bench.double.complete_all();
        assert!(bench.finished(2).iter().all(|(_, result)| result.is_ok()));
        assert!(bench.queue.is_idle(), "{mode:?}");
    }
}

#[test]
fn any_other_refusal_fails_only_the_first() {
    for mode in [SubmitMode::Thread, SubmitMode::Inline] {
        let mut bench = Bench::new(16, mode);
        bench.double.refuse(Errno::EBADF);
        for i in 0..3 {
            bench.push(WRITE, 0, i * 8192, 512);
        }
        bench.kick();
        bench.double.wait_seen(2);
        bench.double.complete_all();
        let mut finished = bench.finished(3);
        finished.sort_by_key(|(slot, _)| *slot);
        assert_eq!(finished, [(0, Err(Errno::EBADF)), (1, Ok(512)), (2, Ok(512))], "{mode:?}");
    }
}

#[test]
fn a_short_merged_io_completes_what_is_done_and_submits_the_rest() {
    let mut bench = Bench::new(4, SubmitMode::Thread);
    for i in 0..4 {
        bench.push(WRITE, 0, i * 1024, 1024);
    }
    bench.kick();
    bench.double.wait_seen(1);
    bench.double.complete(Some(Ok(1536)));
    assert_eq!(bench.finished(1), [(0, Ok(1024))]);
    assert_eq!(bench.double.wait_seen(2)[1], seen(WRITE, 1536, 4096 - 1536));
    bench.double.complete(None);
    assert_eq!(bench.finished(3), [(1, Ok(1024)), (2, Ok(1024)), (3, Ok(1024))]);
    assert_eq!(bench.queue.report().resubmitted, 1);
}

#[test]
fn a_failed_merged_io_is_split_and_only_the_bad_part_fails() {
    let mut bench = Bench::new(4, SubmitMode::Thread);
    for i in 0..3 {
        bench.push(IoOp::Read, 0, i * 512, 512);
    }
    bench.kick();
    bench.double.wait_seen(1);
    bench.double.complete(Some(Err(Errno::EIO)));
    bench.queue.reap();
    bench.kick();
    let parts = bench.double.wait_seen(4);
    assert_eq!(parts[1..], [0, 512, 1024].map(|offset| seen(IoOp::Read, offset, 512)));
    bench.double.complete(None);
    bench.double.complete(Some(Err(Errno::EIO)));
    bench.double.complete(None);
    assert_eq!(bench.finished(3), [(0, Ok(512)), (1, Err(Errno::EIO)), (2, Ok(512))]);
    assert_eq!(bench.queue.report().split, 1);
}

/// The kernel would say yes to another flush.
#[test]
fn a_flush_for_several_that_fails_fails_all_of_them() {
    let mut bench = Bench::new(4, SubmitMode::Thread);
    for _ in 0..3 {
        bench.push(IoOp::Flush, 0, 0, 0);
    }
    bench.kick();
    bench.double.wait_seen(1);
    bench.double.complete(Some(Err(Errno::EIO)));
    assert_eq!(bench.finished(3), [0, 1, 2].map(|i| (i, Err(Errno::EIO))));
    assert_eq!(bench.queue.report().split, 0);
    // Of writes that were to be durable somebody keeps account, whatever becomes of each.
    for i in 0..2 {
        bench.push(IoOp::Write { fua: true }, 0, i * 512, 512);
    }
    bench.kick();
    bench.double.wait_seen(2);
    bench.double.complete(Some(Err(Errno::EIO)));
    bench.queue.reap();
    assert_eq!(bench.queue.next_failed_fua(), Some((FileId(0), Errno::EIO)));
    assert_eq!(bench.queue.next_failed_fua(), None);
    bench.kick();
    bench.double.wait_seen(4);
    bench.double.complete(None);
    bench.double.complete(None);
    assert_eq!(bench.finished(2), [(3, Ok(512)), (4, Ok(512))]);
}

#[test]
fn a_read_that_meets_the_end_of_the_file_says_so_and_those_behind_it_ask_for_themselves() {
    let mut bench = Bench::new(4, SubmitMode::Thread);
    for i in 0..3 {
        bench.push(IoOp::Read, 0, i * 512, 512);
    }
    bench.kick();
    bench.double.wait_seen(1);
    // 512 and 100 bytes: an odd number is the end of the file.
    bench.double.complete(Some(Ok(612)));
    assert_eq!(bench.finished(2), [(0, Ok(512)), (1, Ok(100))]);
    assert_eq!(bench.double.wait_seen(2)[1], seen(IoOp::Read, 1024, 512));
    bench.double.complete(Some(Ok(0)));
    assert_eq!(bench.finished(1), [(2, Ok(0))]);
}

#[test]
fn a_write_of_nothing_is_an_error_not_a_loop() {
    let mut bench = Bench::new(4, SubmitMode::Thread);
    bench.push(WRITE, 0, 0, 512);
    bench.kick();
    bench.double.wait_seen(1);
    bench.double.complete(Some(Ok(0)));
    assert_eq!(bench.finished(1), [(0, Err(Errno::EIO))]);
}

#[test]
fn cancel_ends_what_has_not_reached_the_engine() {
    let mut bench = Bench::new(2, SubmitMode::Thread);
    for i in 0..5 {
        bench.push(WRITE, 0, i * 8192, 512);
    }
    bench.kick();
    bench.double.wait_seen(2);
    bench.queue.cancel();
    let mut cancelled = bench.finished(3);
    cancelled.sort_by_key(|(slot, _)| *slot);
    assert_eq!(cancelled, [2, 3, 4].map(|slot| (slot, Err(Errno::ECANCELED))));
    bench.double.complete_all();
    assert_eq!(bench.finished(2), [(0, Ok(512)), (1, Ok(512))]);
    assert!(bench.queue.is_idle());
}

#[test]
fn completions_in_any_order_end_the_right_request() {
    let mut bench = Bench::new(8, SubmitMode::Thread);
    for i in 0..4 {
        bench.push(WRITE, 0, i * 8192, 512 * (i + 1));
    }
    bench.kick();
    bench.double.wait_seen(4);
    for slot in (0..4).rev() {
        bench.double.complete_newest();
        assert_eq!(bench.finished(1), [(slot, Ok(512 * u64::from(slot + 1)))]);
    }
}

/// The load of the deadlock tests: more I/Os than the engine lets in before something is reaped.
fn load(mode: SubmitMode) -> usize {
    let mut bench = Bench::new(32, mode);
    bench.double.block_at(2);
    let (mut queued, mut done) = (0, 0);
    while done < 64 {
        while queued < 64 && queued - done < 32 {
            bench.push(WRITE, 0, queued as u64 * 8192, 512);
            queued += 1;
        }
        bench.kick();
        bench.double.complete_all();
        bench.queue.reap();
        while let Some((transfer, result)) = bench.queue.next_finished() {
            result.unwrap();
            bench.slots.release(transfer.owner);
            done += 1;
        }
    }
    done
}

/// Whether the load ends within a time.
fn ends(mode: SubmitMode, within: Duration) -> bool {
    let (sender, receiver) = channel();
    // Where it hangs, the thread stays behind until the test process ends.
    std::thread::spawn(move || sender.send(load(mode)));
    receiver.recv_timeout(within) == Ok(64)
}

#[test]
fn the_submit_thread_outlives_a_submission_that_waits_for_a_completion() {
    assert!(ends(SubmitMode::Thread, PATIENCE));
}

#[test]
fn without_the_submit_thread_the_same_load_deadlocks() {
    assert!(!ends(SubmitMode::Inline, Duration::from_secs(2)));
}
