//! One ring of a front end: what was said of it so far, and the queue that serves it once all of it was.

use std::os::fd::{AsRawFd, OwnedFd};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use serde_json::json;

use super::files;
use super::wire::RingAddresses;
use crate::frontend::Intake;
use crate::frontend::blkif::queue::{Doorbell, MUTE};
use crate::frontend::virtio::feature;
use crate::frontend::virtio::guest::Regions;
use crate::frontend::virtio::queue::{Client, Queue};
use crate::frontend::virtio::ring::Layout;

/// Entries of a ring, at most: what a chain has at most too, so that a request's tables are small.
pub(super) const ENTRIES_MAX: u32 = 1024;

/// A ring.
#[derive(Default)]
pub(super) struct Vring {
    size: u16,
    addresses: Option<RingAddresses>,
    base: u16,
    /// The driver writes it. It is never read: each write is an event of its own for an edge-triggered poll.
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    pub(super) enabled: bool,
    /// It takes nothing more, and is stopped when all is answered.
    stopping: bool,
    queue: Option<Queue>,
    doorbell: Doorbell,
    muted_until: Option<u64>,
}

impl Vring {
    /// The queue that serves it.
    pub(super) fn queue(&mut self) -> Option<&mut Queue> {
        self.queue.as_mut()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.queue.as_ref().map_or(0, Queue::in_flight)
    }

    pub(super) fn set_size(&mut self, size: u32) -> Result<(), String> {
        self.is_stopped()?;
        if !size.is_power_of_two() || size > ENTRIES_MAX {
            return Err(format!("a ring of {size} entries: expected a power of two up to {ENTRIES_MAX}"));
        }
        self.size = size as u16;
        Ok(())
    }

    pub(super) fn set_addresses(&mut self, addresses: RingAddresses) -> Result<(), String> {
        // Said again for a ring that is in use, it is about a log of writes, which is not offered.
        if self.queue.is_none() {
            self.addresses = Some(addresses);
        }
        Ok(())
    }

    pub(super) fn set_base(&mut self, base: u32) -> Result<(), String> {
        self.is_stopped()?;
        self.base = u16::try_from(base).map_err(|_| format!("a ring goes on at {base}"))?;
        Ok(())
    }

    fn is_stopped(&self) -> Result<(), String> {
        if self.queue.is_some() { Err("the ring is in use".into()) } else { Ok(()) }
    }

    pub(super) fn set_kick(
        &mut self,
        kick: Option<OwnedFd>,
        token: usize,
        registry: &Registry,
    ) -> Result<(), String> {
        let Some(kick) = kick else {
            return Err("a ring without a descriptor for its notifications: nobody would look at it".into());
        };
        let kick = files::eventfd(kick)?;
        self.deregister(registry);
        (self.kick, self.muted_until) = (Some(kick), None);
        self.watch(token, registry).map_err(|error| format!("cannot listen to a ring: {error}"))
    }

    fn watch(&self, token: usize, registry: &Registry) -> std::io::Result<()> {
        let Some(kick) = &self.kick else { return Ok(()) };
        registry.register(&mut SourceFd(&kick.as_raw_fd()), Token(token), Interest::READABLE)
    }

    pub(super) fn deregister(&self, registry: &Registry) {
        if let Some(kick) = &self.kick {
            // One that is muted is not registered, which is no matter here.
            let _ = registry.deregister(&mut SourceFd(&kick.as_raw_fd()));
        }
    }

    pub(super) fn set_call(&mut self, call: Option<OwnedFd>) -> Result<(), String> {
        self.call = call.map(files::eventfd).transpose()?;
        self.notify_anew();
        Ok(())
    }

    /// Answers may be there that the driver was not notified of: by a tapdisk that died in between, or before there was a way to.
    fn notify_anew(&self) {
        if let (Some(call), Some(_)) = (&self.call, &self.queue) {
            files::ring(call);
        }
    }

    pub(super) fn set_error(&mut self, error: Option<OwnedFd>) -> Result<(), String> {
        self.error = error.map(files::eventfd).transpose()?;
        Ok(())
    }

    /// Serves it, if all that takes has been said.
    pub(super) fn start(&mut self, regions: &Regions, acked: u64) -> Result<(), String> {
        if !self.enabled || self.kick.is_none() || self.size == 0 || self.queue.is_some() {
            return Ok(());
        }
        let Some(RingAddresses { table, available, used, .. }) = self.addresses else { return Ok(()) };
        let mut places = [table, available, used].into_iter().zip(Layout::parts(self.size));
        let mut next = || {
            let (at, (len, align)) = places.next()?;
            regions.of_client(at, len, align)
        };
        let (Some(table), Some(available), Some(used)) = (next(), next(), next()) else {
            return Err("a ring is not in the guest's memory, or not aligned".into());
        };
        let (event_idx, tables) = (acked & feature::EVENT_IDX != 0, acked & feature::INDIRECT_DESC != 0);
        let layout = Layout { size: self.size, table, available, used, event_idx, tables };
        self.queue = Some(Queue::new(layout, self.base));
        self.notify_anew();
        Ok(())
    }

    /// Takes nothing more.
    pub(super) fn begin_stopping(&mut self) {
        self.stopping = true;
    }

    /// Once nothing of it is in flight: stops it, and gives where it would go on.
    pub(super) fn stopped(&mut self, registry: &Registry) -> Option<u16> {
        if self.in_flight() > 0 {
            return None;
        }
        if let Some(queue) = self.queue.take() {
            self.base = queue.ring().base();
        }
        self.deregister(registry);
        (self.kick, self.muted_until, self.stopping) = (None, None, false);
        Some(self.base)
    }

    fn is_served(&self) -> bool {
        self.enabled && !self.stopping && self.queue.is_some()
    }

    pub(super) fn kicked(&mut self) {
        if let Some(queue) = &mut self.queue {
            self.doorbell.ring(&mut queue.counters);
        }
    }

    /// Takes what is there. An error has broken it, and is told once.
    pub(super) fn pull(
        &mut self,
        intake: &mut Intake,
        client: &mut Client,
        tag: u64,
        (token, registry): (usize, &Registry),
    ) -> Result<(), String> {
        if !self.is_served() {
            return Ok(());
        }
        let Some(queue) = &mut self.queue else { return Ok(()) };
        queue.disarm();
        let taken = queue.pull(intake, client, tag).map_err(|broken| {
            if let Some(error) = &self.error {
                files::ring(error);
            }
            broken.to_string()
        })?;
        if self.doorbell.storm(taken, &mut queue.counters) {
            self.deregister(registry);
            self.muted_until = Some(intake.now + MUTE);
        } else if self.muted_until.is_some_and(|until| intake.now >= until) {
            self.muted_until = None;
            self.watch(token, registry).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    pub(super) fn publish(&mut self) {
        if let Some(queue) = &mut self.queue
            && queue.publish()
            && let Some(call) = &self.call
        {
            files::ring(call);
        }
    }

    /// `short`: as [`Queue::ready`] wants to know.
    pub(super) fn ready(&self, short: bool) -> bool {
        self.is_served() && self.queue.as_ref().is_some_and(|queue| queue.ready(short))
    }

    /// The same.
    pub(super) fn arm(&mut self, short: bool) -> bool {
        self.is_served() && self.queue.as_mut().is_some_and(|queue| queue.arm(short))
    }

    /// When it is listened to again. One that is not served is, as soon as it is.
    pub(super) fn deadline(&self) -> Option<u64> {
        self.muted_until.filter(|_| self.is_served())
    }

    pub(super) fn inspect(&self) -> serde_json::Value {
        let queue = self.queue.as_ref();
        json!({
            "entries": self.size,
            "enabled": self.enabled,
            "in_flight": self.in_flight(),
            "indices": queue.map(|queue| queue.ring().indices()),
            "counters": queue.map(|queue| queue.counters).unwrap_or_default(),
            "broken": queue.and_then(Queue::broken).map(|broken| broken.to_string()),
            "muted": self.muted_until.is_some(),
        })
    }
}
