//! A disk's turn: order, barriers, errors, drain — on an engine that does what the test says.

use crate::common::double::{Double, Seen};
use crate::common::world::{self, World};
use nix::errno::Errno;
use tapdisk::disk::{Resume, Turn};
use tapdisk::engine::Inline;
use tapdisk::frontend::blkif::wire::*;
use tapdisk::polling::{Polling, Settings};
use tapdisk::sys::io::IoOp;

const WRITE: IoOp = IoOp::Write { fua: false };

fn world() -> (Double, World) {
    // Always inline: each turn's submissions are seen at its end.
    let (double, engine) = Double::engine(16, Inline::Always);
    (double, world::world(Abi::Native, 512, false, engine))
}

fn push(world: &mut World, operation: u8, id: u64, sector: u64, segments: u8) {
    let segment = Segment { gref: id as u32, first_sect: 0, last_sect: 0 };
    world.front.push(&Entry::new(Abi::Native, operation, id).with_sector(sector).with_segments(segments, &[segment]));
    world.front.publish();
}

fn turns(world: &mut World) {
    while world.disk.turn() != Turn::Nothing {}
}

fn answers(world: &mut World) -> Vec<(u64, i16)> {
    std::iter::from_fn(|| world.front.pop()).map(|response| (response.id, response.status)).collect()
}

fn seen(op: IoOp, offset: u64) -> Seen {
    Seen { op, offset, len: if op == IoOp::Flush { 0 } else { 512 } }
}

#[test]
fn a_barrier_waits_for_what_came_before_and_what_comes_after_waits_for_it() {
    let (double, mut world) = world();
    push(&mut world, OP_WRITE, 1, 0, 1);
    push(&mut world, OP_WRITE_BARRIER, 2, 8, 1);
    push(&mut world, OP_WRITE, 3, 16, 1);
    turns(&mut world);
    let expected =
        [seen(WRITE, 0), seen(IoOp::Flush, 0), seen(IoOp::Write { fua: true }, 8 * 512), seen(WRITE, 16 * 512)];
    for step in 1..=4 {
        assert_eq!(double.wait_seen(step), expected[..step], "nothing more before this is done");
        double.complete(None);
        turns(&mut world);
    }
    assert_eq!(answers(&mut world), [(1, 0), (2, 0), (3, 0)]);
}

#[test]
fn a_barrier_without_data_is_a_flush_of_what_came_before() {
    let (double, mut world) = world();
    push(&mut world, OP_WRITE, 1, 0, 1);
    push(&mut world, OP_WRITE_BARRIER, 2, 0, 0);
    turns(&mut world);
    assert_eq!(double.wait_seen(1), [seen(WRITE, 0)]);
    double.complete(None);
    turns(&mut world);
    assert_eq!(double.wait_seen(2)[1], seen(IoOp::Flush, 0));
    double.complete(None);
    turns(&mut world);
    assert_eq!(answers(&mut world), [(1, 0), (2, 0)]);
}

#[test]
fn a_barrier_whose_flush_fails_is_not_written_and_lets_the_next_through() {
    let (double, mut world) = world();
    push(&mut world, OP_WRITE_BARRIER, 1, 0, 1);
    push(&mut world, OP_WRITE, 2, 8, 1);
    turns(&mut world);
    double.complete(Some(Err(Errno::EIO)));
    turns(&mut world);
    assert_eq!(double.wait_seen(2)[1], seen(WRITE, 8 * 512));
    double.complete(None);
    turns(&mut world);
    assert_eq!(answers(&mut world), [(1, RSP_ERROR), (2, 0)]);
}

#[test]
fn answers_come_in_the_order_of_completion() {
    let (double, mut world) = world();
    for id in 1..4 {
        push(&mut world, OP_READ, id, id * 16, 1);
    }
    turns(&mut world);
    double.complete_newest();
    turns(&mut world);
    double.complete(Some(Err(Errno::EIO)));
    double.complete(None);
    turns(&mut world);
    assert_eq!(answers(&mut world), [(3, 0), (1, RSP_ERROR), (2, 0)]);
}

#[test]
fn what_the_image_does_not_support_is_said_so() {
    let (double, mut world) = world();
    let discard = Entry::new(Abi::Native, OP_DISCARD, 7).with_discard(0, 8);
    world.front.push(&discard);
    world.front.publish();
    turns(&mut world);
    double.complete(Some(Err(Errno::EOPNOTSUPP)));
    turns(&mut world);
    assert_eq!(answers(&mut world), [(7, RSP_EOPNOTSUPP)]);
}

#[test]
fn more_requests_than_slots_wait_in_the_ring() {
    let (double, mut world) = world();
    for id in 0..20 {
        push(&mut world, OP_READ, id % 16, id * 4, 1);
    }
    turns(&mut world);
    assert_eq!(world.disk.outstanding(), 16, "all slots");
    assert!(!world.disk.arm(), "the loop may sleep: a completion will wake it");
    double.complete_all();
    turns(&mut world);
    double.complete_all();
    turns(&mut world);
    assert_eq!(answers(&mut world).len(), 20);
}

#[test]
fn a_drain_finishes_flushes_and_takes_nothing_new() {
    let (double, mut world) = world();
    push(&mut world, OP_WRITE, 1, 0, 1);
    turns(&mut world);
    world.disk.drain();
    push(&mut world, OP_WRITE, 2, 8, 1);
    turns(&mut world);
    assert_eq!((double.wait_seen(1).len(), world.disk.closed()), (1, None));
    double.complete(None);
    turns(&mut world);
    assert_eq!(double.wait_seen(2)[1], seen(IoOp::Flush, 0));
    double.complete(Some(Err(Errno::EIO)));
    turns(&mut world);
    assert_eq!(world.disk.closed(), Some(Err(Errno::EIO)), "the last flush's error is told");
    assert_eq!(answers(&mut world), [(1, 0)]);
}

#[test]
fn cancel_answers_what_has_not_reached_the_engine() {
    let (double, mut world) = world();
    double.refuse(Errno::EAGAIN);
    push(&mut world, OP_WRITE, 1, 0, 1);
    world.disk.turn();
    world.disk.drain();
    world.disk.cancel();
    turns(&mut world);
    assert_eq!(answers(&mut world), [(1, RSP_ERROR)]);
}

#[test]
fn debug_queue_shows_who_holds_what() {
    let (_double, mut world) = world();
    push(&mut world, OP_WRITE, 1, 0, 1);
    push(&mut world, OP_WRITE, 2, 1, 1);
    push(&mut world, OP_WRITE, 3, 64, 1);
    turns(&mut world);
    let queue = world.disk.inspect(&Polling::new(Settings::default()));
    assert_eq!((queue.queue.pending, queue.queue.in_flight, queue.queue.merged), (3, 2, 1));
    let by_offset = |offset| queue.requests.iter().find(|request| request.offset == offset).unwrap();
    let head = &by_offset(0).tiocbs[0];
    assert_eq!((head.held_by.as_str(), head.merged_into), ("engine", None));
    assert_eq!(by_offset(512).tiocbs[0].merged_into, Some(head.tiocb));
    assert_eq!(by_offset(512).tiocbs[0].io, head.io);
    assert_eq!(by_offset(64 * 512).tiocbs[0].merged_into, None);
}

#[test]
fn a_pause_is_called_off_in_its_flush_and_an_error_of_that_is_the_next_flushs() {
    let (double, mut world) = world();
    push(&mut world, OP_WRITE, 1, 0, 1);
    turns(&mut world);
    double.complete(None);
    turns(&mut world);
    world.disk.pause_for_client().unwrap();
    turns(&mut world);
    assert_eq!(double.wait_seen(2)[1], seen(IoOp::Flush, 0), "that is all it waits for");
    push(&mut world, OP_WRITE, 2, 8, 1);
    turns(&mut world);
    assert!(world.disk.is_pausing() && world.disk.pause_outcome().is_none());
    world.disk.resume(Resume::default()).unwrap();
    turns(&mut world);
    assert_eq!(double.wait_seen(3)[2], seen(WRITE, 8 * 512), "it goes on");
    // The flush fails, which nobody is told of who could know what that means; then the write is done. What was written before is lost, and
    // so no flush succeeds.
    double.complete(Some(Err(Errno::EIO)));
    double.complete(None);
    turns(&mut world);
    for id in [3, 4] {
        push(&mut world, OP_FLUSH_DISKCACHE, id, 0, 0);
        turns(&mut world);
    }
    assert_eq!(answers(&mut world), [(1, 0), (2, 0), (3, -1), (4, -1)]);
    // The same with one that is not called off.
    world.disk.pause_for_client().unwrap();
    turns(&mut world);
    double.complete(Some(Err(Errno::EIO)));
    turns(&mut world);
    assert!(matches!(world.disk.pause_outcome(), Some(Err(_))) && world.disk.is_paused());
    world.disk.resume(Resume::default()).unwrap();
    push(&mut world, OP_FLUSH_DISKCACHE, 5, 0, 0);
    turns(&mut world);
    assert_eq!(answers(&mut world), [(5, -1)]);
}

#[test]
fn what_is_to_be_pulled_is_not_due_while_nothing_is_pulled() {
    let (double, mut world) = world();
    assert_eq!(world.disk.deadline(), Some(1));
    world.disk.pause_for_client().unwrap();
    turns(&mut world);
    assert_ne!(world.disk.deadline(), Some(1), "the loop would never sleep");
    double.complete(None);
    turns(&mut world);
    assert!(world.disk.is_paused());
    assert_ne!(world.disk.deadline(), Some(1));
    world.disk.resume(Resume::default()).unwrap();
    turns(&mut world);
    assert_eq!(world.disk.deadline(), Some(1));
}

#[test]
fn an_error_that_is_owed_outlives_a_pause_without_one() {
    let (double, mut world) = world();
    for result in [Some(Err(Errno::EIO)), None] {
        world.disk.pause_for_client().unwrap();
        turns(&mut world);
        double.complete(result);
        turns(&mut world);
        world.disk.resume(Resume::default()).unwrap();
    }
    push(&mut world, OP_FLUSH_DISKCACHE, 1, 0, 0);
    turns(&mut world);
    assert_eq!(answers(&mut world), [(1, -1)]);
}
