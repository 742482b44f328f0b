//! Guests that another process shakes hands with: blktap's tapback reads their nodes in XenStore, and names each ring
//! through the control socket.
//!
//! A disk can have several such guests at a time, as when a device model's domain uses it beside the guest, or two guests
//! read the same CD. Each has a [`Vbd`] of its own, which is made when it connects, and goes when its last request is
//! finished: a disk without a guest takes nothing.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use slog::{Logger, info, o, warn};

use super::ring::{ConnectError, RingAt};
use super::vbd::{Connection, Limits, Vbd};
use crate::config::Xen;
use crate::frontend::blkif::wire::{Abi, MAX_SEGMENTS};
use crate::frontend::{Frontend, Intake};
use crate::memory::{self, Part};
use crate::request::Request;
use crate::stats::shm::Place;
use crate::sys;
use crate::sys::gntdev::domid_t;
use crate::sys::memory::PAGE_SIZE;

/// Guests of a disk at a time.
pub const GUESTS_MAX: usize = 16;

/// log2 of the most pages of a ring: the message that names them has room for so many.
pub const RING_PAGE_ORDER_MAX: u32 = 3;

/// The place of a guest's number in a request's tag, above what the guest's vbd says there.
const TAG: u32 = 16;

/// A guest's device and its ring.
#[derive(Clone, Debug)]
pub struct GuestAt {
    /// The guest.
    pub domain: domid_t,
    /// Its device.
    pub device: u32,
    /// The layout of its ring.
    pub abi: Abi,
    /// Where the ring is.
    pub ring: RingAt,
    /// What blktap would take memory from. Each guest has its own here; it is only shown.
    pub pool: String,
}

/// Why a guest is not connected or not disconnected.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The disk has a guest by its configuration.
    #[error("its guest is that of [frontend.xen], and nobody else's")]
    Configured,
    /// There is no time for it.
    #[error("it is being closed")]
    Closing,
    /// It is there.
    #[error("device {1} of domain {0} is connected already")]
    Connected(domid_t, u32),
    /// It was disconnected a moment ago.
    #[error("device {1} of domain {0} was disconnected, and its requests are not finished")]
    Leaving(domid_t, u32),
    /// There is no place for one more.
    #[error("it has {GUESTS_MAX} guests, and can't have more")]
    TooMany,
    /// It is not there.
    #[error("device {1} of domain {0} is not connected")]
    Unknown(u32, u32),
    /// It can't be what the message says.
    #[error("{0}")]
    Malformed(String),
    /// Its ring can't be served.
    #[error(transparent)]
    Ring(#[from] ConnectError),
    /// Its events can't be heard.
    #[error("cannot watch event channels: {0}")]
    Events(io::Error),
}

impl GuestError {
    /// As a client is told.
    pub fn errno(&self) -> Errno {
        match self {
            GuestError::Connected(..) => Errno::EALREADY,
            GuestError::Configured | GuestError::Closing | GuestError::Leaving(..) => Errno::EBUSY,
            GuestError::TooMany => Errno::ENOSPC,
            GuestError::Unknown(..) => Errno::ENODEV,
            GuestError::Malformed(_) => Errno::EINVAL,
            GuestError::Ring(error) => error.errno(),
            GuestError::Events(error) => sys::errno_of(error),
        }
    }
}

/// A guest with a ring.
struct Guest {
    domain: domid_t,
    device: u32,
    pool: String,
    limits: Limits,
    vbd: Vbd,
    /// It was disconnected, and some of its requests are not finished.
    leaving: bool,
    /// Why its ring is served no more, though nobody has disconnected it.
    broken: Option<String>,
}

/// What holds for all guests of a disk.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Request slots of the disk.
    pub requests: usize,
    /// What is made for a guest is kept resident.
    pub lock_memory: bool,
    /// Where the folders of the shared statistics are.
    pub statistics: PathBuf,
}

/// The frontend.
pub struct Tapback {
    settings: Settings,
    /// By their number: that of their events, and in their requests' tags.
    guests: Vec<Option<Guest>>,
    /// The guest that is asked first, in this turn; modulo their number.
    first: usize,
    registry: Option<(Registry, usize)>,
    log: Logger,
}

impl Tapback {
    /// Without guests.
    pub fn new(settings: Settings, log: Logger) -> Tapback {
        let guests = std::iter::repeat_with(|| None).take(GUESTS_MAX).collect();
        Tapback { settings, guests, first: 0, registry: None, log }
    }

    /// Serves a guest's ring.
    pub fn connect(&mut self, at: &GuestAt, sector_size: u32) -> Result<(), GuestError> {
        let &GuestAt { domain, device, abi, .. } = at;
        if let Some(guest) = self.guest(domain.into(), device) {
            let error = if guest.leaving { GuestError::Leaving } else { GuestError::Connected };
            return Err(error(domain, device));
        }
        let number = self.guests.iter().position(Option::is_none).ok_or(GuestError::TooMany)?;
        let limits = limits(self.settings.requests, abi.entries(at.ring.grefs.len().ilog2()) as usize);
        let log = self.log.new(o!("domain" => domain, "device" => device));
        // All but the buffers, which can fail.
        memory::room(limits.bytes() - limits.buffers).map_err(ConnectError::Memory)?;
        let mut vbd = Vbd::new(limits, sector_size, log.clone())?;
        vbd.show_statistics(Place { directory: self.settings.statistics.clone(), device });
        if self.settings.lock_memory {
            memory::lock_of_client(vbd.memory());
        }
        // What is read-only is the disk, which sees to that itself.
        let rings = vec![at.ring.clone()];
        vbd.connect(&Connection { domain, abi, rings, read_only: false, live: false })?;
        if let Some((registry, base)) = &self.registry {
            let fd = vbd.evtchn().as_fd().as_raw_fd();
            let token = Token(base + number);
            registry.register(&mut SourceFd(&fd), token, Interest::READABLE).map_err(GuestError::Events)?;
        }
        info!(log, "guest connected"; "ring_pages" => at.ring.grefs.len(), "abi" => ?abi, "buffers" => limits.buffers);
        // What was made for it may have been the last that there was.
        memory::room(0).map_err(ConnectError::Memory)?;
        let pool = at.pool.clone();
        self.guests[number] = Some(Guest { domain, device, pool, limits, vbd, leaving: false, broken: None });
        Ok(())
    }

    /// Unmaps a guest's ring. What was taken from it is finished first: see [`is_leaving`](Self::is_leaving).
    pub fn disconnect(&mut self, domain: u32, device: u32) -> Result<(), GuestError> {
        let known = |guest: &&mut Guest| (u32::from(guest.domain), guest.device) == (domain, device);
        let guest = self.guests.iter_mut().flatten().find(known).ok_or(GuestError::Unknown(domain, device))?;
        guest.leave();
        self.sweep();
        Ok(())
    }

    /// Whether requests of a guest that was disconnected are not finished.
    pub fn is_leaving(&self, domain: u32, device: u32) -> bool {
        self.guest(domain, device).is_some_and(|guest| guest.leaving)
    }

    /// Whether that guest is connected, or leaving.
    pub fn has(&self, domain: u32, device: u32) -> bool {
        self.guest(domain, device).is_some()
    }

    fn guest(&self, domain: u32, device: u32) -> Option<&Guest> {
        self.present().find(|guest| (u32::from(guest.domain), guest.device) == (domain, device))
    }

    fn present(&self) -> impl Iterator<Item = &Guest> {
        self.guests.iter().flatten()
    }

    /// Forgets the guests that have left.
    fn sweep(&mut self) {
        for place in &mut self.guests {
            let Some(guest) = place.as_ref().filter(|guest| guest.leaving && guest.vbd.in_flight() == 0) else {
                continue;
            };
            info!(self.log, "guest disconnected"; "domain" => guest.domain, "device" => guest.device);
            if let Some((registry, _)) = &self.registry {
                // It goes with its descriptor anyway.
                let _ = registry.deregister(&mut SourceFd(&guest.vbd.evtchn().as_fd().as_raw_fd()));
            }
            *place = None;
        }
    }
}

impl Tapback {
    /// What STATS shows as `xenbus`, in blktap's words: of the first guest.
    pub(super) fn xenbus(&self) -> Option<serde_json::Value> {
        let guest = self.present().find(|guest| !guest.leaving)?;
        Some(guest.vbd.xenbus(&guest.pool, guest.domain, guest.device))
    }
}

impl Guest {
    fn leave(&mut self) {
        self.vbd.disconnect();
        self.leaving = true;
    }
}

/// Sizes for a ring. A request without indirect segments, and tapback offers no others, has 44 KiB at most, and the ring
/// no more requests than entries: what is beyond that, nobody could fill. A page of ring takes 1.4 MiB so. A frontend that
/// sends indirect requests all the same must not wait for ever: there is room for the largest of them, 1 MiB, too.
fn limits(requests: usize, entries: usize) -> Limits {
    let requests = requests.min(entries);
    let indirect_segments = Xen::INDIRECT_SEGMENTS as usize;
    let buffers = (requests * MAX_SEGMENTS + indirect_segments) * PAGE_SIZE;
    Limits { indirect_segments, buffers, requests, gather_ns: u64::from(Xen::GATHER_US) * 1000 }
}

impl Frontend for Tapback {
    fn register(&mut self, registry: Registry, base: usize) -> io::Result<()> {
        self.registry = Some((registry, base));
        Ok(())
    }

    fn event(&mut self, index: usize, _event: &Event) {
        if let Some(Some(guest)) = self.guests.get_mut(index) {
            guest.vbd.events();
        }
    }

    fn pull(&mut self, intake: &mut Intake) {
        // Another one is first each turn: where slots are short, none must get them all.
        self.first = (self.first + 1) % GUESTS_MAX;
        for number in (0..GUESTS_MAX).map(|i| (self.first + i) % GUESTS_MAX) {
            if let Some(guest) = &mut self.guests[number] {
                guest.vbd.pull(intake, (number as u64) << TAG);
            }
        }
    }

    fn answer(&mut self, request: &Request) {
        if let Some(Some(guest)) = self.guests.get_mut((request.tag >> TAG) as usize) {
            guest.vbd.answer(request);
        }
    }

    fn publish(&mut self) {
        for guest in self.guests.iter_mut().flatten() {
            guest.vbd.publish();
            if let Some(why) = guest.vbd.take_broken() {
                warn!(self.log, "guest is not served"; "domain" => guest.domain, "device" => guest.device, "why" => &why);
                guest.broken = Some(why);
            }
        }
        self.sweep();
    }

    fn in_memory(&self) -> bool {
        true
    }

    fn ready(&self) -> bool {
        self.present().any(|guest| guest.vbd.ready())
    }

    fn arm(&mut self) -> bool {
        self.guests.iter_mut().flatten().fold(false, |ready, guest| guest.vbd.arm() | ready)
    }

    fn pull_deadline(&self) -> Option<u64> {
        self.present().filter_map(|guest| guest.vbd.deadline()).min()
    }

    fn has_orphans(&self) -> bool {
        self.present().any(|guest| guest.vbd.has_orphans())
    }

    fn is_orphan(&self, tag: u64) -> bool {
        let place = self.guests.get((tag >> TAG) as usize);
        place.and_then(Option::as_ref).is_none_or(|guest| guest.vbd.is_orphan(tag))
    }

    fn gather_ns(&self) -> Option<u64> {
        self.present().map(|guest| guest.limits.gather_ns).min()
    }

    fn close(&mut self) {
        self.guests.iter_mut().flatten().for_each(Guest::leave);
        self.sweep();
    }

    fn is_closed(&self) -> bool {
        self.present().next().is_none()
    }

    fn memory(&self) -> Vec<Part> {
        self.present().map(|guest| Part::fixed("buffers of a Xen guest", guest.limits.bytes())).collect()
    }

    fn inspect(&self) -> serde_json::Value {
        let guests = self.present().map(|guest| {
            let mut value = guest.vbd.inspect();
            // Also when its ring is unmapped.
            value["domain"] = guest.domain.into();
            value["device"] = guest.device.into();
            value["leaving"] = guest.leaving.into();
            value["broken"] = guest.broken.clone().into();
            value
        });
        serde_json::json!({ "type": "tapback", "guests": guests.collect::<Vec<_>>() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_ring_could_never_fill_is_not_made() {
        let buffers = |requests, order| limits(requests, Abi::X86_64.entries(order) as usize).buffers;
        assert_eq!(buffers(256, 0), (32 * 44 + 1024) << 10);
        assert_eq!(buffers(256, RING_PAGE_ORDER_MAX), (256 * 44 + 1024) << 10);
        assert_eq!(buffers(1, 0), (44 + 1024) << 10, "a disk of one slot");
        assert!(limits(256, 32).bytes() < 4 << 20);
    }
}
