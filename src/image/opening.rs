//! An image that is being opened by a thread of its own: files can hang, locks are waited for, and chains are long, while the main
//! loop has other things to do.

use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use slog::Logger;

use super::{Error, Image};
use crate::config::Config;
use crate::job::Job;
use crate::store;

/// One that is being opened; `E` is why it may not be wanted. If this is dropped, the image is closed again as soon as it is open.
pub struct Opening<E> {
    job: Job<Result<Image, Error>>,
    /// It is not wanted, and closed by a thread as soon as it is open.
    refused: Option<E>,
    closing: Option<Job<()>>,
    /// Tells of the end.
    wake: Arc<EventFd>,
    /// What is opened.
    pub config: Arc<Config>,
}

impl<E: From<Error>> Opening<E> {
    /// Begins to open what `config` names, for an engine with `event`, if it is to follow one that has it. `fits` looks at it, and may wait
    /// for others. `wake` tells of the end.
    pub fn start(
        config: Arc<Config>,
        event: Option<Arc<EventFd>>,
        wake: Arc<EventFd>,
        log: &Logger,
        fits: impl FnOnce(&Image) -> Result<(), Error> + Send + 'static,
    ) -> Opening<E> {
        let (wanted, log) = (Arc::clone(&config), log.clone());
        let path = wanted.image.path.clone().unwrap_or_default();
        let refused = |source| Err(store::Error::Io { path, action: "get a thread to open it", source }.into());
        let job = Job::start("open", &wake, refused, move |blocking| {
            let image = super::open(blocking, &wanted, event, &log)?;
            if let Err(error) = fits(&image) {
                image.close(blocking);
                return Err(error);
            }
            Ok(image)
        });
        Opening { job, refused: None, closing: None, wake, config }
    }

    /// What is done, in a word, and since when, as [`Job::under_way`] has it.
    pub fn under_way(&self) -> (&'static str, u64) {
        self.closing.as_ref().map_or_else(|| self.job.under_way(), Job::under_way)
    }

    /// Whether it is being closed again.
    pub fn is_closing(&self) -> bool {
        self.closing.is_some()
    }

    /// It is not wanted any more.
    pub fn refuse(&mut self, why: E) {
        self.refused.get_or_insert(why);
    }

    /// The image, once it is open, if it is wanted and `fits`; or, once nobody has it open, why not.
    pub fn outcome(&mut self, fits: impl FnOnce(&Image) -> Result<(), E>) -> Option<Result<Image, E>> {
        if let Some(closing) = &self.closing {
            closing.outcome()?;
            return self.refused.take().map(Err);
        }
        let image = match self.job.outcome()? {
            Ok(image) => image,
            Err(error) => return Some(Err(self.refused.take().unwrap_or_else(|| error.into()))),
        };
        if self.refused.is_none() {
            match fits(&image) {
                Ok(()) => return Some(Ok(image)),
                Err(why) => self.refused = Some(why),
            }
        }
        self.closing = Some(Job::insist("close", &self.wake, move |blocking| image.close(blocking)));
        None
    }
}
