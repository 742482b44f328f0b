//! Futures that are polled by hand.

use std::cell::Cell;
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use nix::errno::Errno;

/// Where a reply's payload goes.
pub(super) type Slot = Rc<Cell<Option<Result<Vec<u8>, Errno>>>>;

/// The reply to a request that is on its way. Whoever does not want to know may drop it.
#[must_use = "the request is sent, but nobody sees whether it failed"]
pub struct Reply<T> {
    slot: Slot,
    parse: fn(Vec<u8>) -> Result<T, Errno>,
}

impl<T> Reply<T> {
    pub(super) fn new(slot: Slot, parse: fn(Vec<u8>) -> Result<T, Errno>) -> Reply<T> {
        Reply { slot, parse }
    }

    /// What has come, if it has.
    pub(super) fn take(&self) -> Option<Result<T, Errno>> {
        self.slot.take().map(|answer| answer.and_then(self.parse))
    }
}

impl<T> Future for Reply<T> {
    type Output = Result<T, Errno>;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        self.take().map_or(Poll::Pending, Poll::Ready)
    }
}

impl<T> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reply")
    }
}

/// A future that is polled by hand. Dropping it ends it wherever it is.
pub struct Task<T>(Option<Pin<Box<dyn Future<Output = T>>>>);

impl<T> Task<T> {
    /// A task; nothing of it has run yet.
    pub fn new(future: impl Future<Output = T> + 'static) -> Task<T> {
        Task(Some(Box::pin(future)))
    }

    /// Runs it as far as it can. What it results in comes once.
    pub fn poll(&mut self) -> Option<T> {
        let mut context = Context::from_waker(Waker::noop());
        match self.0.as_mut()?.as_mut().poll(&mut context) {
            Poll::Ready(result) => {
                self.0 = None;
                Some(result)
            }
            Poll::Pending => None,
        }
    }
}
