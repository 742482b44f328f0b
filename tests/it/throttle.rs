//! A disk with limits: what they hold, what goes all the same, and who gets how much.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::world::{self, SIZE};
use drivers::Throttle;
use tapdisk::blocking::Blocking;
use tapdisk::config;
use tapdisk::disk::{Disk, Resume, Turn};
use tapdisk::frontend::Frontend;
use tapdisk::frontend::blkif::ring::FrontRing;
use tapdisk::frontend::blkif::wire::*;
use tapdisk::polling::{Polling, Settings};
use tapdisk::stack::HostLayer;

/// A disk in memory with so many rings, as [`disk_and_clients`] gives it.
fn disk(rings: usize) -> (Disk, Vec<FrontRing>) {
    let (disk, fronts, _) = disk_and_clients(rings);
    (disk, fronts)
}

/// A disk in memory with so many rings, whose first request of a sector, and no other, goes before an hour is over; and what says that a ring's
/// client is gone.
fn disk_and_clients(rings: usize) -> (Disk, Vec<FrontRing>, Vec<Arc<AtomicBool>>) {
    let mut gone = Vec::new();
    let mut fronts = Vec::new();
    let mut frontends: Vec<Box<dyn Frontend>> = Vec::new();
    for _ in 0..rings {
        let (ring, front, ..) = world::ring(Abi::Native, 512);
        gone.push(ring.gone());
        frontends.push(Box::new(ring));
        fronts.push(front);
    }
    let engine = tapdisk::engine::memory::ram(&Blocking::before_main_loop(), SIZE, 8).unwrap();
    let mut throttle = config::Throttle::default();
    (throttle.all.bytes_per_s, throttle.all.bytes_burst) = (Some(config::Size(1)), Some(config::Size(1)));
    let filter = HostLayer::without_file(Box::new(Throttle::new(throttle.limits())));
    (world::disk_of(frontends, vec![filter], world::info(512, false), engine), fronts, gone)
}

fn requests(rate: u64, burst: u64) -> config::Throttle {
    let mut throttle = config::Throttle::default();
    (throttle.all.requests_per_s, throttle.all.requests_burst) = (Some(rate), Some(burst));
    throttle
}

/// Reads a page, or flushes.
fn push(front: &mut FrontRing, operation: u8, id: u64) {
    let segment = Segment { gref: id as u32 % 16, first_sect: 0, last_sect: 7 };
    let segments = u8::from(operation != OP_FLUSH_DISKCACHE);
    front.push(&Entry::new(Abi::Native, operation, id).with_sector(0).with_segments(segments, &[segment]));
    front.publish();
}

fn turns(disk: &mut Disk) {
    while disk.turn() != Turn::Nothing {}
}

fn answers(front: &mut FrontRing) -> Vec<(u64, i16)> {
    std::iter::from_fn(|| front.pop()).map(|response| (response.id, response.status)).collect()
}

#[test]
fn what_is_held_is_shown_goes_with_a_pause_and_is_held_again_after_it() {
    let (mut disk, mut fronts) = disk(1);
    let front = &mut fronts[0];
    (1..=4).for_each(|id| push(front, OP_READ, id));
    turns(&mut disk);
    assert_eq!(answers(front), [(1, 0)]);
    let held = |disk: &Disk| {
        let queue = disk.inspect(&Polling::new(Settings::default()));
        assert!(queue.requests.iter().all(|request| request.held_by == "waits for throttle"), "{:?}", queue.requests);
        let filter = &queue.layers[0];
        assert_eq!((filter.format.as_str(), filter.path.as_str()), ("throttle", ""));
        assert_eq!(disk.throttle_report().held, queue.requests.len());
        assert_eq!(disk.metrics(0).throttle, disk.throttle_report());
        (queue.requests.len(), filter.counters["bytes owed"])
    };
    let (count, owed) = held(&disk);
    assert!(count == 3 && (4090..=4096).contains(&owed), "{owed}");
    // A flush does not wait.
    push(front, OP_FLUSH_DISKCACHE, 9);
    turns(&mut disk);
    assert_eq!(answers(front), [(9, 0)]);
    for round in 0..2 {
        disk.pause_for_client().unwrap();
        turns(&mut disk);
        assert!(disk.is_paused() && matches!(disk.pause_outcome(), Some(Ok(()))), "without an hour's wait");
        assert_eq!(answers(front).len(), if round == 0 { 3 } else { 1 });
        assert_eq!(disk.throttle_report().held_before, 3 + round);
        disk.resume(Resume::default()).unwrap();
        push(front, OP_READ, 5);
        turns(&mut disk);
        // It is paid back.
        let (count, owed) = held(&disk);
        assert!(count == 1 && owed > 4 * 4090 + round * 4090, "{owed}");
    }
    // Limits that are taken off let go at once what waits for them.
    disk.set_throttle(config::Throttle::default()).unwrap();
    turns(&mut disk);
    assert_eq!(answers(front), [(5, 0)]);
    let queue = disk.inspect(&Polling::new(Settings::default()));
    assert_eq!((queue.layers.len(), disk.throttle()), (1, config::Throttle::default()));
    let error = disk.set_throttle(requests(1000, 1)).unwrap_err().to_string();
    assert!(error.starts_with("throttle.all.requests_burst: expected from 20"), "{error}");
    disk.set_throttle(requests(1, 1)).unwrap();
    (10..13).for_each(|id| push(front, OP_READ, id));
    disk.drain();
    turns(&mut disk);
    assert_eq!(disk.closed(), Some(Ok(())), "nor does the end of the disk wait");
}

#[test]
fn who_has_many_requests_held_leaves_slots_to_others_and_the_loop_sleeps() {
    let (mut disk, mut fronts) = disk(2);
    (0..20).for_each(|id| push(&mut fronts[0], OP_READ, id));
    turns(&mut disk);
    assert_eq!((answers(&mut fronts[0]).len(), disk.outstanding()), (1, 12), "of sixteen");
    assert!(!disk.ready() && !disk.arm(), "what is in the ring is no reason to look at it");
    (0..20).for_each(|id| push(&mut fronts[1], OP_READ, id));
    assert!(disk.ready());
    turns(&mut disk);
    assert_eq!(disk.outstanding(), 16);
    assert!(!disk.ready() && !disk.arm());
    // Both get all, though neither has all slots.
    disk.set_throttle(requests(1_000_000, 1_000_000)).unwrap();
    turns(&mut disk);
    assert_eq!((answers(&mut fronts[0]).len(), answers(&mut fronts[1]).len(), disk.outstanding()), (19, 20, 0));
    // Without limits nothing is left to anybody.
    disk.set_throttle(config::Throttle::default()).unwrap();
    let (mut alone, mut front) = self::disk(1);
    (0..20).for_each(|id| push(&mut front[0], OP_READ, id));
    turns(&mut alone);
    assert_eq!(alone.outstanding(), 16, "nor where there is nobody else");
}

#[test]
fn frontends_that_wait_get_the_same_though_one_has_many_requests_and_the_other_one() {
    for deep in [0, 1] {
        let (mut disk, mut fronts) = disk(2);
        disk.set_throttle(requests(2000, 40)).unwrap();
        for (index, front) in fronts.iter_mut().enumerate() {
            (0..if index == deep { 24 } else { 1 }).for_each(|id| push(front, OP_READ, id));
        }
        let mut counts = [0, 0];
        while counts[0] + counts[1] < 1000 {
            disk.turn();
            for (front, count) in fronts.iter_mut().zip(&mut counts) {
                for (id, status) in answers(front) {
                    assert_eq!(status, 0);
                    *count += 1;
                    push(front, OP_READ, id);
                }
            }
        }
        // In the order in which they come, one would get a thirteenth.
        assert!(counts.iter().all(|count| (350..=650).contains(count)), "{counts:?}");
    }
}

#[test]
fn what_is_held_for_a_client_that_is_gone_ends_at_once_uncharged_and_that_of_others_stays() {
    let (mut disk, mut fronts, gone) = disk_and_clients(2);
    (0..20).for_each(|id| push(&mut fronts[0], OP_READ, id));
    (0..20).for_each(|id| push(&mut fronts[1], OP_READ, id));
    turns(&mut disk);
    assert_eq!((disk.outstanding(), disk.throttle_report().held), (16, 16));
    let owed = |disk: &Disk| disk.inspect(&Polling::new(Settings::default())).layers[0].counters["bytes owed"];
    let before = owed(&disk);
    let passed: usize = fronts.iter_mut().map(|front| answers(front).len()).sum();
    assert_eq!(passed, 1);
    gone[0].store(true, Ordering::Relaxed);
    turns(&mut disk);
    let ended = answers(&mut fronts[0]);
    assert!(ended.len() >= 15 && ended.iter().all(|(_, status)| *status == RSP_ERROR), "{ended:?}");
    assert_eq!((answers(&mut fronts[1]), disk.outstanding()), (Vec::new(), disk.throttle_report().held));
    assert!(disk.outstanding() >= 8, "those of the other");
    assert!(owed(&disk) <= before);
    // With the last of them.
    gone[1].store(true, Ordering::Relaxed);
    turns(&mut disk);
    assert_eq!((disk.outstanding(), disk.throttle_report().held), (0, 0));
    assert!(owed(&disk) <= before);
}
