//! An image that is being opened by a thread of its own: files can hang, locks are waited for, and chains are long, while the main
//! loop has other things to do.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::EventFd;
use slog::Logger;

use super::{Error, Image};
use crate::config::Config;

/// Stack of the thread, bytes.
const STACK_SIZE: usize = 256 << 10;

/// How it went, as soon as that is known.
type Outcome = Arc<Mutex<Option<Result<Image, Error>>>>;

/// One that is being opened. If this is dropped, the image is closed again as soon as it is open.
pub struct Opening {
    outcome: Outcome,
    /// What is opened.
    pub config: Arc<Config>,
}

impl Opening {
    /// Begins to open what `config` names, for an engine with `event`, if it is to follow one that has it. `wake` tells of the end.
    pub fn start(
        config: Arc<Config>,
        event: Option<Arc<EventFd>>,
        wake: Arc<EventFd>,
        log: &Logger,
    ) -> io::Result<Opening> {
        let outcome: Outcome = Arc::default();
        let thread = std::thread::Builder::new().name("open".into()).stack_size(STACK_SIZE);
        thread.spawn({
            let (outcome, config, log) = (Arc::downgrade(&outcome), Arc::clone(&config), log.clone());
            move || {
                let image = super::open(&config, event, &log);
                let Some(outcome) = outcome.upgrade() else { return };
                *outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(image);
                drop(outcome);
                // An eventfd's counter can't reach its limit by ones.
                let _ = wake.write(1);
            }
        })?;
        Ok(Opening { outcome, config })
    }

    /// The image, once it is open, or why it can't be.
    pub fn outcome(&self) -> Option<Result<Image, Error>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
