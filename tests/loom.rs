//! The hand-over between main loop and submit thread, in every order of events that there is.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom`

#![cfg(loom)]

use std::collections::VecDeque;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;
use nix::errno::Errno;
use tapdisk::submit::Handover;

/// A thread that takes all there is until it is told to stop.
fn taker(handover: &Arc<Handover<u32>>) -> thread::JoinHandle<Vec<u32>> {
    let theirs = Arc::clone(handover);
    thread::spawn(move || {
        let (mut all, mut batch) = (Vec::new(), VecDeque::new());
        while theirs.take(&mut batch) {
            all.extend(batch.drain(..));
        }
        all
    })
}

/// Whatever is given is taken once and in order, and the thread ends when it is told to.
#[test]
fn nothing_is_lost_and_no_wake_up_is_missed() {
    loom::model(|| {
        let handover = Arc::new(Handover::<u32>::new(4));
        let thread = taker(&handover);
        handover.give([1, 2].into_iter());
        handover.give([3].into_iter());
        handover.stop();
        assert_eq!(thread.join().unwrap(), [1, 2, 3]);
    });
}

/// What is refused comes back, seen through the flag that is read without the lock.
#[test]
fn every_refusal_comes_back() {
    loom::model(|| {
        let handover = Arc::new(Handover::<u32>::new(4));
        let (theirs, woken) = (Arc::clone(&handover), Arc::new(AtomicUsize::new(0)));
        let event = Arc::clone(&woken);
        let thread = thread::spawn(move || {
            let mut batch = VecDeque::new();
            while theirs.take(&mut batch) {
                for item in batch.drain(..) {
                    theirs.refuse(item, Errno::EIO);
                    event.fetch_add(1, Ordering::Release);
                }
            }
        });
        handover.give([7].into_iter());
        handover.give([8].into_iter());
        let mut back = Vec::new();
        // The event, as the main loop sees it: after it, the refusal must be visible.
        let events = woken.load(Ordering::Acquire);
        while let Some((item, Errno::EIO)) = handover.take_refused() {
            back.push(item);
        }
        assert!(back.len() >= events);
        handover.stop();
        thread.join().unwrap();
        while let Some((item, _)) = handover.take_refused() {
            back.push(item);
        }
        assert_eq!(back, [7, 8]);
    });
}

/// A thread that got EAGAIN does not sleep through the completion that makes room. (There is no time-out here.)
#[test]
fn the_completion_that_makes_room_is_not_missed() {
    loom::model(|| {
        let handover = Arc::new(Handover::<u32>::new(4));
        let room = Arc::new(AtomicBool::new(false));
        let (theirs, has_room) = (Arc::clone(&handover), Arc::clone(&room));
        let thread = thread::spawn(move || {
            let mut starved = false;
            while !has_room.load(Ordering::Relaxed) {
                starved = !starved;
                if starved {
                    theirs.starve();
                } else {
                    theirs.wait_completed();
                }
            }
        });
        room.store(true, Ordering::Relaxed);
        handover.completed();
        thread.join().unwrap();
    });
}

/// What is cancelled is not taken too.
#[test]
fn an_item_is_either_taken_or_cancelled() {
    loom::model(|| {
        let handover = Arc::new(Handover::<u32>::new(4));
        let thread = taker(&handover);
        handover.give([1, 2].into_iter());
        let cancelled = handover.cancel();
        handover.stop();
        let mut all = thread.join().unwrap();
        all.extend(cancelled);
        assert_eq!(all, [1, 2]);
    });
}
