//! One ring of a front end: what was said of it so far, and the queue that serves it once all of it was.

use std::os::fd::{AsRawFd, OwnedFd};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use serde_json::json;

use super::files;
use super::wire::RingAddresses;
use crate::frontend::Intake;
use crate::frontend::blkif::queue::{Counters, Doorbell, MUTE};
use crate::frontend::virtio::feature;
use crate::frontend::virtio::guest::Regions;
use crate::frontend::virtio::queue::{Client, Queue};
use crate::frontend::virtio::ring::Layout;

/// Entries of a ring, at most: each has a place for what is taken of it.
const ENTRIES_MAX: u32 = 1024;

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

    pub(super) fn set_addresses(&mut self, addresses: RingAddresses) {
        // Said again for a ring that is in use, it is about a log of writes, which is not offered.
        if self.queue.is_none() {
            self.addresses = Some(addresses);
        }
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

    pub(super) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call;
        self.notify_anew();
    }

    /// Answers may be there that the driver was not notified of: by a tapdisk that died in between, or before there was a way to.
    fn notify_anew(&self) {
        if let (Some(call), Some(_)) = (&self.call, &self.queue) {
            files::ring(call);
        }
    }

    pub(super) fn set_error(&mut self, error: Option<OwnedFd>) {
        self.error = error;
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

    /// Stops it, and gives where it would go on. Nothing of it is in flight.
    pub(super) fn stop(&mut self, registry: &Registry) -> u16 {
        debug_assert!(self.in_flight() == 0);
        if let Some(queue) = self.queue.take() {
            self.base = queue.ring().base();
        }
        self.deregister(registry);
        (self.kick, self.muted_until, self.stopping) = (None, None, false);
        self.base
    }

    fn is_served(&self) -> bool {
        self.enabled && !self.stopping && self.queue.is_some()
    }

    pub(super) fn kicked(&mut self) {
        // One that is not served has a doorbell too, and can be rung for nothing.
        let mut unserved = Counters::default();
        self.doorbell.ring(self.queue.as_mut().map_or(&mut unserved, |queue| &mut queue.counters));
    }

    /// Takes what is there. An error has broken it, and is told once.
    pub(super) fn pull(
        &mut self,
        intake: &mut Intake,
        client: &mut Client,
        tag: u64,
        (token, registry): (usize, &Registry),
    ) -> Result<(), String> {
        let taken = if self.is_served() { self.take(intake, client, tag)? } else { 0 };
        let mut unserved = Counters::default();
        let counters = self.queue.as_mut().map_or(&mut unserved, |queue| &mut queue.counters);
        if self.doorbell.storm(taken, counters) {
            self.deregister(registry);
            self.muted_until = Some(intake.now + MUTE);
        } else if self.is_served() && self.muted_until.is_some_and(|until| intake.now >= until) {
            self.muted_until = None;
            self.watch(token, registry).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn take(&mut self, intake: &mut Intake, client: &mut Client, tag: u64) -> Result<u32, String> {
        let Some(queue) = &mut self.queue else { return Ok(0) };
        queue.disarm();
        queue.pull(intake, client, tag).map_err(|broken| {
            if let Some(error) = &self.error {
                files::ring(error);
            }
            broken.to_string()
        })
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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Arc;

    use drivers::Origin;
    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;
    use crate::frontend::DiskInfo;
    use crate::frontend::virtio::guest::{Place, Region};
    use crate::frontend::virtio::queue::Bounces;
    use crate::frontend::virtio::request::Negotiated;
    use crate::request::Slots;
    use crate::sys::memory::Memory;

    const RINGS_AT: u64 = 1 << 20;

    struct Bed {
        poll: mio::Poll,
        ring: Vring,
        regions: Regions,
        bounces: Bounces,
        slots: Slots,
    }

    impl Bed {
        fn new() -> Bed {
            let memory = Arc::new(Memory::anonymous(1 << 16).unwrap());
            let mut regions = Regions::default();
            let place = Place { memory, offset: 0 };
            regions.add(Region { guest: 0, len: 1 << 16, user: RINGS_AT, place }).unwrap();
            let (bounces, slots) = (Bounces::new(8).unwrap(), Slots::new(8, 8, 0));
            Bed { poll: mio::Poll::new().unwrap(), ring: Vring::default(), regions, bounces, slots }
        }

        fn set_up(&mut self) {
            let addresses = |at| RingAddresses {
                ring: 0,
                flags: 0,
                table: at,
                available: at + 0x1000,
                used: at + 0x2000,
                log: 0,
            };
            self.ring.set_size(16).unwrap();
            self.ring.set_addresses(addresses(RINGS_AT));
            self.ring.set_base(0).unwrap();
            self.kick();
            self.ring.enabled = true;
            self.ring.start(&self.regions, 0).unwrap();
        }

        fn kick(&mut self) {
            let kick = OwnedFd::from(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap());
            self.ring.set_kick(Some(kick), 1, self.poll.registry()).unwrap();
        }

        /// Rings for nothing so often that it is muted at `now`.
        fn storm(&mut self, now: u64) {
            for _ in 0..1001 {
                self.ring.kicked();
                self.pull(now);
            }
        }

        fn pull(&mut self, now: u64) {
            let name = "x".into();
            let disk =
                DiskInfo { size: 1 << 20, sector_size: 512, physical_sector_size: 512, read_only: false, name };
            let (mut started, mut barrier) = (VecDeque::new(), None);
            let mut intake = Intake {
                slots: &mut self.slots,
                started: &mut started,
                barrier: &mut barrier,
                disk: &disk,
                origin: Origin::Frontend(0),
                kept: 0,
                now,
            };
            let mut client = Client {
                regions: &self.regions,
                bounces: &mut self.bounces,
                negotiated: Negotiated::default(),
                serial: &[0; 20],
            };
            self.ring.pull(&mut intake, &mut client, 0, (1, self.poll.registry())).unwrap();
        }
    }

    #[test]
    fn a_doorbell_that_rings_for_nothing_is_muted_for_a_while_whether_its_ring_is_served_or_not() {
        let mut bed = Bed::new();
        bed.set_up();
        bed.storm(5);
        assert_eq!(bed.ring.deadline(), Some(5 + MUTE));
        bed.pull(5 + MUTE);
        assert_eq!(bed.ring.deadline(), None);
        // Muted, and disabled meanwhile: nobody is to be woken for it; enabled again, it is listened to.
        bed.storm(MUTE * 2);
        bed.ring.enabled = false;
        assert_eq!(bed.ring.deadline(), None);
        bed.ring.enabled = true;
        assert_eq!(bed.ring.deadline(), Some(MUTE * 3));
        // Stopped, set up anew: nothing of that is left.
        assert_eq!(bed.ring.stop(bed.poll.registry()), 0);
        assert_eq!(bed.ring.deadline(), None);
        bed.set_up();
        bed.pull(MUTE * 4);
        assert_eq!(bed.ring.deadline(), None);
        // Before it is served at all.
        let mut bed = Bed::new();
        bed.kick();
        bed.storm(5);
        assert!(bed.ring.muted_until.is_some() && bed.ring.deadline().is_none());
    }

    #[test]
    fn a_ring_is_served_when_all_of_it_has_been_said_and_in_the_guests_memory() {
        let mut bed = Bed::new();
        assert!(bed.ring.start(&bed.regions, 0).is_ok() && bed.ring.queue().is_none());
        for size in [0, 3, 2048, u32::MAX] {
            assert!(bed.ring.set_size(size).is_err(), "{size}");
        }
        bed.ring.set_size(16).unwrap();
        assert!(bed.ring.set_base(1 << 16).is_err());
        assert!(bed.ring.set_kick(None, 1, bed.poll.registry()).is_err());
        assert!(files::check_eventfd(&tempfile::tempfile().unwrap().into()).is_err(), "no eventfd");
        bed.ring.enabled = true;
        bed.kick();
        for table in [RINGS_AT - 16, RINGS_AT + 8, RINGS_AT + (1 << 16) - 16] {
            let addresses = RingAddresses { ring: 0, flags: 0, table, available: RINGS_AT, used: RINGS_AT, log: 0 };
            bed.ring.set_addresses(addresses);
            assert!(bed.ring.start(&bed.regions, 0).is_err(), "{table:#x}");
        }
        bed.set_up();
        assert!(bed.ring.queue().is_some() && bed.ring.set_size(32).is_err());
        // A driver that waits for a notification gets one, however it was lost.
        let call = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
        let ours = nix::unistd::dup(&call).unwrap();
        files::check_eventfd(&ours).unwrap();
        bed.ring.set_call(Some(ours));
        assert_eq!(call.read().unwrap(), 1);
    }
}
