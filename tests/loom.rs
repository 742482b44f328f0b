//! The hand-over between main loop and submit thread, and the pool's threads, in every order of events that there is.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom`

#![cfg(loom)]

use std::collections::VecDeque;
use std::sync::Arc as StdArc;
use std::time::Duration;

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use nix::errno::Errno;
use tapdisk::engine::pool::life::{Come, Life, Sleeper, Step};
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

/// A pool whose jobs are numbers, and whose threads are loom's.
struct Pool {
    life: Life<u32, u32>,
    /// Times that the main loop's event was written.
    event: Mutex<usize>,
    written: Condvar,
    being_made: AtomicUsize,
    alive: Mutex<usize>,
    made: Condvar,
    most: usize,
    handles: Mutex<Vec<thread::JoinHandle<()>>>,
}

impl Pool {
    /// `most` is what the test never lets the bounds exceed.
    fn new(min: usize, max: usize, most: usize) -> StdArc<Pool> {
        let pool = Pool::with_none(min, max, most);
        (1..=min as u64).for_each(|id| pool.spawn(id, Come::Looking));
        pool
    }

    /// The same, with the thread that makes others.
    fn with_maker(min: usize, max: usize, most: usize) -> StdArc<Pool> {
        let pool = Pool::new(min, max, most);
        let theirs = StdArc::clone(&pool);
        let maker = thread::spawn(move || {
            while let Some(id) = theirs.life.birth() {
                theirs.create(id);
            }
        });
        pool.handles.lock().unwrap().push(maker);
        pool
    }

    /// The same without its first threads, which the test makes or is.
    fn with_none(min: usize, max: usize, most: usize) -> StdArc<Pool> {
        StdArc::new(Pool {
            life: Life::new(4, min, max).unwrap(),
            event: Mutex::new(0),
            written: Condvar::new(),
            being_made: AtomicUsize::new(0),
            alive: Mutex::new(min),
            made: Condvar::new(),
            most,
            handles: Mutex::new(Vec::new()),
        })
    }

    fn spawn(self: &StdArc<Self>, id: u64, come: Come<u32>) {
        let theirs = StdArc::clone(self);
        let handle = thread::spawn(move || theirs.run(id, come));
        self.handles.lock().unwrap().push(handle);
    }

    fn tell(&self, due: bool) {
        if due {
            *self.event.lock().unwrap() += 1;
            self.written.notify_one();
        }
    }

    fn create(self: &StdArc<Self>, id: u64) {
        assert_eq!(self.being_made.fetch_add(1, Ordering::AcqRel), 0, "one at a time");
        let mut alive = self.alive.lock().unwrap();
        assert!(*alive < self.most, "above the maximum");
        *alive += 1;
        self.made.notify_one();
        drop(alive);
        self.spawn(id, Come::Born);
    }

    fn run(self: StdArc<Self>, id: u64, mut come: Come<u32>) {
        let me = Sleeper::new(id);
        if matches!(come, Come::Born) {
            self.being_made.fetch_sub(1, Ordering::AcqRel);
        }
        loop {
            come = match self.life.next(&me, come, Duration::ZERO) {
                Step::Run(job) => Come::Done(job),
                Step::Tell => {
                    self.tell(true);
                    Come::Looking
                }
                Step::End => break,
            };
        }
        *self.alive.lock().unwrap() -= 1;
    }

    /// What the main loop does in a turn that an event began.
    fn turn(self: &StdArc<Self>, seen: &mut Vec<u32>) {
        let mut taken = VecDeque::new();
        self.life.drain(&mut taken);
        seen.extend(taken);
    }

    /// Turns whenever the event says so, as an edge-triggered poll does, until all `jobs` are seen.
    fn serve(self: &StdArc<Self>, jobs: &[u32]) {
        let (mut seen, mut events) = (Vec::new(), 0);
        while seen.len() < jobs.len() {
            let mut event = self.event.lock().unwrap();
            while *event == events {
                event = self.written.wait(event).unwrap();
            }
            events = *event;
            drop(event);
            self.turn(&mut seen);
        }
        seen.sort_unstable();
        assert_eq!(seen, jobs, "each once");
    }

    /// Waits until there are `count` threads, with nothing from the main loop.
    fn wait_alive(&self, count: usize) {
        let mut alive = self.alive.lock().unwrap();
        while *alive < count {
            alive = self.made.wait(alive).unwrap();
        }
    }

    /// Ends all threads, the ones included that are made meanwhile.
    fn end(self: &StdArc<Self>) {
        self.life.stop();
        loop {
            let next = self.handles.lock().unwrap().pop();
            let Some(handle) = next else { break };
            handle.join().unwrap();
        }
        assert_eq!(*self.alive.lock().unwrap(), 0);
        assert_eq!(self.life.report().threads, 0);
    }
}

/// With few preemptions, where there are too many orders: errors need two or three (Musuvathi and Qadeer, 2007).
fn few_preemptions(bound: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(bound);
    builder.check(model);
}

/// Jobs that come one after the other are done once each, the loop is woken for each batch, and the pool ends.
#[test]
fn a_pool_of_one_loses_no_job_and_no_wake_up() {
    loom::model(|| {
        let pool = Pool::new(1, 1, 1);
        pool.life.give([1].into_iter());
        pool.life.give([2].into_iter());
        pool.serve(&[1, 2]);
        pool.end();
    });
}

/// What was given before the end is done before the end, and finished even where nobody has seen it.
#[test]
fn a_pool_ends_after_its_work() {
    loom::model(|| {
        let pool = Pool::new(1, 1, 1);
        pool.life.give([1, 2].into_iter());
        pool.end();
        let mut taken = VecDeque::new();
        pool.life.drain(&mut taken);
        assert_eq!(taken, [1, 2]);
    });
}

/// A thread that is wanted is made, one at a time, and no more of them than the maximum.
#[test]
fn a_pool_grows_within_its_bounds() {
    few_preemptions(3, || {
        let pool = Pool::with_maker(1, 2, 2);
        pool.life.give([1, 2].into_iter());
        pool.serve(&[1, 2]);
        pool.end();
        assert!(pool.life.report().created <= 2);
    });
}

/// With all threads in jobs one is made, and that one, once it is there, calls for the next.
#[test]
fn a_pool_grows_where_all_threads_are_busy() {
    loom::model(|| {
        let life = Life::<u32, u32>::new(4, 1, 3).unwrap();
        let next = |id, come| life.next(&Sleeper::new(id), come, Duration::ZERO);
        life.give([1].into_iter());
        assert_eq!(next(1, Come::Looking), Step::Run(1));
        life.give([2, 3, 4, 5].into_iter());
        assert_eq!((life.birth(), life.report().threads), (Some(2), 2));
        assert_eq!(next(2, Come::Born), Step::Run(2));
        assert_eq!((life.birth(), life.report().threads), (Some(3), 3));
        assert_eq!(next(3, Come::Born), Step::Run(3));
        assert_eq!(next(1, Come::Done(1)), Step::Tell, "with no job in its hands");
        assert_eq!(next(1, Come::Looking), Step::Run(4));
        assert_eq!(next(2, Come::Done(2)), Step::Run(5), "the batch is told already");
    });
}

/// The end of an idle time against a new job: it is done, by that thread or another one, and the minimum stays.
#[test]
fn a_job_that_meets_the_end_of_an_idle_time_is_done() {
    few_preemptions(2, || {
        let pool = Pool::new(2, 2, 2);
        pool.life.set(1, 2).unwrap();
        let theirs = StdArc::clone(&pool);
        let clock = thread::spawn(move || theirs.life.expire());
        pool.life.give([1].into_iter());
        pool.serve(&[1]);
        clock.join().unwrap();
        assert!(pool.life.report().threads >= 1);
        pool.end();
    });
}

/// Idle threads beyond the minimum end, all but the minimum, even where all of their times are over at once.
#[test]
fn the_minimum_outlives_the_idle_time() {
    few_preemptions(3, || {
        let pool = Pool::new(2, 2, 2);
        pool.life.set(1, 2).unwrap();
        pool.life.expire();
        pool.life.expire();
        let report = pool.life.report();
        assert!((1..=2).contains(&report.threads));
        pool.life.give([1].into_iter());
        pool.serve(&[1]);
        pool.end();
    });
}

/// Bounds that change under load: what is too many ends, what is missing is made, and the job is done.
#[test]
fn bounds_change_while_jobs_come() {
    few_preemptions(3, || {
        let pool = Pool::new(2, 2, 2);
        let theirs = StdArc::clone(&pool);
        let giver = thread::spawn(move || theirs.life.give([1, 2].into_iter()));
        pool.life.set(1, 1).unwrap();
        pool.serve(&[1, 2]);
        giver.join().unwrap();
        pool.end();
    });
}

/// A minimum that is raised is reached without any job.
#[test]
fn a_raised_minimum_is_reached() {
    few_preemptions(3, || {
        let pool = Pool::with_maker(1, 1, 2);
        pool.life.set(2, 2).unwrap();
        pool.wait_alive(2);
        pool.end();
        assert_eq!(pool.life.report().created, 2);
    });
}

/// A job is run or cancelled, never both and never neither.
#[test]
fn a_job_of_the_pool_is_either_run_or_cancelled() {
    loom::model(|| {
        let pool = Pool::new(1, 1, 1);
        pool.life.give([1, 2].into_iter());
        if let Some(job) = pool.life.cancel(|job| *job == 2) {
            pool.tell(pool.life.finish(job));
        }
        pool.serve(&[1, 2]);
        pool.end();
    });
}

/// Nothing counts on a thread that is being made, which may take for ever where memory is short: the others do all jobs.
#[test]
fn a_thread_that_is_never_made_holds_no_job_up() {
    loom::model(|| {
        let pool = Pool::with_none(1, 2, 2);
        pool.life.give([1].into_iter());
        let first = pool.life.next(&Sleeper::new(1), Come::Looking, Duration::ZERO);
        assert_eq!(first, Step::Run(1));
        pool.life.give([2].into_iter());
        assert_eq!(pool.life.birth(), Some(2));
        // While it is being made, the first thread goes on and may rest.
        pool.spawn(1, Come::Done(1));
        pool.life.give([3].into_iter());
        pool.serve(&[1, 2, 3]);
        pool.life.stop();
        pool.life.unborn(Duration::ZERO);
        pool.end();
    });
}

/// After a thread could not be made nobody tries again until the time has come.
#[test]
fn a_thread_that_can_not_be_made_is_tried_again_later() {
    loom::model(|| {
        let life = StdArc::new(Life::<u32, u32>::new(4, 1, 2).unwrap());
        life.give([1].into_iter());
        assert_eq!(life.next(&Sleeper::new(1), Come::Looking, Duration::ZERO), Step::Run(1));
        life.give([2, 3].into_iter());
        assert_eq!(life.birth(), Some(2));
        let theirs = StdArc::clone(&life);
        let maker = thread::spawn(move || {
            theirs.unborn(Duration::ZERO);
            theirs.birth()
        });
        while life.report().failed == 0 {
            thread::yield_now();
        }
        life.give([4].into_iter());
        assert_eq!(life.report().threads, 1);
        life.expire();
        assert_eq!(maker.join().unwrap(), Some(2));
        assert_eq!(life.next(&Sleeper::new(2), Come::Born, Duration::ZERO), Step::Run(2));
        let report = life.report();
        assert_eq!((report.threads, report.created, report.failed), (2, 2, 1));
    });
}
