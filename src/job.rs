//! Work that may wait for files, done by a thread of its own, since the main loop waits for nothing.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::EventFd;

/// Stack of the thread, bytes.
const STACK_SIZE: usize = 256 << 10;

/// Work under way. If this is dropped it goes on, and nobody is told what came of it.
pub struct Job<T>(Arc<Mutex<Option<T>>>);

impl<T: Send + 'static> Job<T> {
    /// Begins it. `wake` tells of the end.
    pub fn start(name: &str, wake: Arc<EventFd>, work: impl FnOnce() -> T + Send + 'static) -> io::Result<Job<T>> {
        let outcome = Arc::new(Mutex::new(None));
        let weak = Arc::downgrade(&outcome);
        let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_SIZE);
        thread.spawn(move || {
            let done = work();
            let Some(outcome) = weak.upgrade() else { return };
            *outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
            drop(outcome);
            // An eventfd's counter can't reach its limit by ones.
            let _ = wake.write(1);
        })?;
        Ok(Job(outcome))
    }

    /// What came of it, once, as soon as it is done.
    pub fn outcome(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
