//! Work that may wait, done by a thread of its own, since the main loop waits for nothing.
//!
//! Not even for the thread: clone(2) waits where memory is short. So the main loop only hands the work over, to a thread that makes the
//! others, the job maker. What is still to be closed when nobody expects it any more goes the same way: [`Apart`].

use std::collections::VecDeque;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;

use crate::blocking::{Blocking, spawn, spawn_if};
use crate::stats::now;

/// Stack of a job's thread, bytes.
const STACK_SIZE: usize = 256 << 10;
/// The maker's, which is there all the time, and resident.
pub const MAKER_STACK_SIZE: usize = 64 << 10;
/// How long the maker waits before it tries again to make a thread that the system did not have.
const RETRY: Duration = Duration::from_millis(100);

/// What is done in a thread of its own; or without leave to wait, where there is none for it, and the reason.
type Run = dyn FnOnce(Result<&Blocking, io::Error>) + Send;

/// One piece of work, on its way to its thread.
struct Work {
    /// The thread's name.
    name: &'static str,
    run: Box<Run>,
    /// Where the system has no thread for it now, it is done later.
    must: bool,
}

static MAKER: OnceLock<Sender<Work>> = OnceLock::new();

/// Starts the job maker, unless it runs. Before the main loop does.
pub fn start_maker(blocking: &Blocking) -> io::Result<()> {
    if MAKER.get().is_none() {
        let (sender, receiver) = channel();
        // Two of them are one too many, and the second one ends at once: nobody sends it anything.
        spawn(blocking, "job maker", MAKER_STACK_SIZE, move |blocking| make_threads(blocking, &receiver))?;
        MAKER.get_or_init(|| sender);
    }
    Ok(())
}

fn make_threads(blocking: &Blocking, works: &Receiver<Work>) {
    let mut late = VecDeque::new();
    // However much comes meanwhile.
    let mut due = Instant::now();
    loop {
        let next = match late.is_empty() {
            true => works.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => works.recv_timeout(due.saturating_duration_since(Instant::now())),
        };
        match next {
            Ok(work) => {
                if let Some(work) = begin(blocking, work, false) {
                    if late.is_empty() {
                        due = Instant::now() + RETRY;
                    }
                    late.push_back(work);
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if !late.is_empty() && Instant::now() >= due {
            let again = std::mem::take(&mut late);
            late.extend(again.into_iter().filter_map(|work| begin(blocking, work, true)));
            due = Instant::now() + RETRY;
        }
    }
}

/// Starts its thread; one that was late, at any price. Gives it back if the system has none now, and it has to be done.
fn begin(blocking: &Blocking, work: Work, late: bool) -> Option<Work> {
    let (name, must) = (work.name, work.must);
    // What is handed to a thread that can't be made is lost.
    let place = Arc::new(Mutex::new(Some(work)));
    let take = |place: &Mutex<Option<Work>>| place.lock().unwrap_or_else(PoisonError::into_inner).take();
    let theirs = Arc::clone(&place);
    let made = spawn_if(blocking, late, name, STACK_SIZE, move |blocking| {
        if let Some(work) = take(&theirs) {
            (work.run)(Ok(blocking));
        }
    });
    let (error, work) = (made.err()?, take(&place)?);
    if must {
        return Some(work);
    }
    (work.run)(Err(error));
    None
}

fn hand_over(work: Work) {
    match MAKER.get() {
        // It runs as long as the process.
        Some(maker) => drop(maker.send(work)),
        // No main loop, and so nobody who must not wait.
        None => (work.run)(Ok(&Blocking::of_thread())),
    }
}

/// Has something done that nobody waits for. Where the system has no thread for it now, it is done later. A program without a main
/// loop does it at once.
pub fn aside(name: &'static str, run: impl FnOnce(&Blocking) + Send + 'static) {
    in_thread(name, true, run);
}

/// The same; where the system has no thread for it, it is not done.
pub fn aside_if_possible(name: &'static str, run: impl FnOnce(&Blocking) + Send + 'static) {
    in_thread(name, false, run);
}

fn in_thread(name: &'static str, must: bool, run: impl FnOnce(&Blocking) + Send + 'static) {
    let run = move |thread: Result<&Blocking, io::Error>| drop(thread.map(run));
    hand_over(Work { name, run: Box::new(run), must });
}

/// Work under way, whose outcome somebody asks for. If this is dropped the work goes on, and nobody is told what came of it.
pub struct Job<T> {
    outcome: Arc<Mutex<Option<T>>>,
    name: &'static str,
    /// When it began, ns of [`now`].
    since: u64,
}

impl<T: Send + 'static> Job<T> {
    /// Begins it. Where the system has no thread for it, the outcome is what `refused` makes of that. `wake` tells of the end.
    pub fn start(
        name: &'static str,
        wake: &Arc<EventFd>,
        refused: impl FnOnce(io::Error) -> T + Send + 'static,
        work: impl FnOnce(&Blocking) -> T + Send + 'static,
    ) -> Job<T> {
        let (job, tell) = Job::new(name, wake);
        let run = move |thread: Result<&Blocking, io::Error>| tell(thread.map_or_else(refused, work));
        hand_over(Work { name, run: Box::new(run), must: false });
        job
    }

    /// Begins what has to be done: where the system has no thread for it now, later. `wake` tells of the end.
    pub fn insist(
        name: &'static str,
        wake: &Arc<EventFd>,
        work: impl FnOnce(&Blocking) -> T + Send + 'static,
    ) -> Job<T> {
        let (job, tell) = Job::new(name, wake);
        aside(name, move |blocking| tell(work(blocking)));
        job
    }

    fn new(name: &'static str, wake: &Arc<EventFd>) -> (Job<T>, impl FnOnce(T) + Send + use<T>) {
        let outcome = Arc::new(Mutex::new(None));
        let (weak, wake) = (Arc::downgrade(&outcome), Arc::clone(wake));
        let tell = move |done| {
            // Where nobody asks any more, it is dropped here, by a thread that may wait.
            let Some(outcome) = weak.upgrade() else { return };
            *outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
            // Not the last one here: what is in it may be for the main loop to drop, which waits for nothing.
            drop(outcome);
            // An eventfd's counter can't reach its limit by ones.
            let _ = wake.write(1);
        };
        (Job { outcome, name, since: now() }, tell)
    }

    /// What it does, in a word, and since when, ns of [`now`].
    pub fn under_way(&self) -> (&'static str, u64) {
        (self.name, self.since)
    }

    /// What came of it, once, as soon as it is done.
    pub fn outcome(&self) -> Option<T> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Something whose end may wait: a file, whose close(2) can hang; threads, which are joined. Whoever has leave to wait takes it out; if
/// this is dropped, a thread that may wait drops what is in it.
pub struct Apart<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> Apart<T> {
    /// Takes it out, where its end may be waited for.
    pub fn take(mut self, _: &Blocking) -> T {
        self.0.take().expect("it is there until this is dropped")
    }
}

impl<T: Send + 'static> From<T> for Apart<T> {
    fn from(kept: T) -> Apart<T> {
        Apart(Some(kept))
    }
}

impl<T: Send + 'static> Deref for Apart<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("it is there until this is dropped")
    }
}

impl<T: Send + 'static> DerefMut for Apart<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("it is there until this is dropped")
    }
}

impl<T: Send + 'static> Drop for Apart<T> {
    fn drop(&mut self) {
        if let Some(kept) = self.0.take() {
            aside("close", move |_| drop(kept));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;
    use std::thread::ThreadId;

    use super::*;

    struct Hangs(std::sync::mpsc::SyncSender<ThreadId>, Receiver<()>);

    impl Drop for Hangs {
        fn drop(&mut self) {
            self.1.recv().unwrap();
            self.0.send(std::thread::current().id()).unwrap();
        }
    }

    #[test]
    fn what_is_kept_apart_is_dropped_by_another_thread_and_not_waited_for() {
        start_maker(&Blocking::before_main_loop()).unwrap();
        let me = std::thread::current().id();
        for outcome_of_a_job in [false, true] {
            let ((sender, dropped), (release, wait)) = (sync_channel(1), sync_channel(1));
            let kept = Apart::from(Hangs(sender, wait));
            if outcome_of_a_job {
                let wake = Arc::new(EventFd::new().unwrap());
                let job = Job::start("kept", &wake, |error| panic!("{error}"), move |_| kept);
                let _ = wake.read().unwrap();
                drop(job);
            } else {
                drop(kept);
            }
            assert!(dropped.try_recv().is_err(), "it hangs, and this does not");
            release.send(()).unwrap();
            assert_ne!(dropped.recv().unwrap(), me);
        }
    }
}
