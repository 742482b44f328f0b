//! One ring of a guest: its pages, mapped, and its event channel, bound.

use std::io;
use std::sync::Arc;

use nix::errno::Errno;

use crate::frontend::blkif::queue::{CountedRing, Doorbell};
use crate::frontend::blkif::ring::{BackRing, Shared};
use crate::frontend::blkif::wire::{Abi, Entry, GrantRef};
use crate::sys;
use crate::sys::evtchn::{Evtchn, evtchn_port_t};
use crate::sys::gntdev::{Gntdev, domid_t};

/// Where a guest has a ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingAt {
    /// `ring-ref` or `ring-ref0` and so on: its pages, a power of two.
    pub grefs: Vec<GrantRef>,
    /// `event-channel`: the guest's port.
    pub event_channel: evtchn_port_t,
}

/// Why a guest's rings are not served. The text is for the guest's administrator.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no Xen, or this domain may have no backends.
    #[error("{path}: {error}; is this a Xen domain with backends, and is {module} loaded?")]
    Device {
        /// What is missing.
        path: &'static str,
        /// The kernel's module for it.
        module: &'static str,
        /// What the system says.
        error: io::Error,
    },
    /// There is no memory for the guest's rings and data.
    #[error("no memory for the guest's rings and data: {0}")]
    Memory(io::Error),
    /// The guest has not granted what it says, or not to this domain.
    #[error("cannot map the ring, grant references {grefs:?}: {error}")]
    Map {
        /// The ring's pages.
        grefs: Vec<GrantRef>,
        /// What the system says.
        error: io::Error,
    },
    /// The guest has no such port, or not for this domain.
    #[error("cannot bind event channel {port}: {error}")]
    Bind {
        /// The guest's port.
        port: evtchn_port_t,
        /// What the system says.
        error: io::Error,
    },
    /// What was served by somebody else is not finished.
    #[error(
        "the guest has requests in queue {0} of which nobody knows whether they were done; it has to be restarted"
    )]
    HalfDone(usize),
}

impl ConnectError {
    /// As a client is told.
    pub fn errno(&self) -> Errno {
        match self {
            ConnectError::HalfDone(_) => Errno::EBUSY,
            ConnectError::Device { error, .. }
            | ConnectError::Memory(error)
            | ConnectError::Map { error, .. }
            | ConnectError::Bind { error, .. } => sys::errno_of(error),
        }
    }
}

/// A port of ours, given back when it is dropped.
pub struct Port {
    evtchn: Arc<Evtchn>,
    number: evtchn_port_t,
}

impl Port {
    /// As the device numbers it.
    pub fn number(&self) -> evtchn_port_t {
        self.number
    }

    /// Sends an event. A guest that is gone has nobody to hear it.
    pub fn notify(&self) {
        let _ = self.evtchn.notify(self.number);
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        // Nothing can be done about it, and the port goes with the process.
        let _ = self.evtchn.unbind(self.number);
    }
}

/// A ring that is served.
pub struct GuestRing {
    /// The ring.
    pub ring: CountedRing,
    /// Its event channel.
    pub port: Port,
    /// A request that was taken from the ring, and has no room yet.
    pub held: Option<Entry>,
    /// Finds out event storms.
    pub doorbell: Doorbell,
    /// Until when its events are left alone, ns of [`crate::stats::now`].
    pub muted_until: Option<u64>,
    /// An event came, and its port is masked.
    masked: bool,
}

impl GuestRing {
    /// Maps the ring and binds its port.
    pub fn connect(
        gntdev: &Gntdev,
        evtchn: &Arc<Evtchn>,
        domain: domid_t,
        abi: Abi,
        at: &RingAt,
    ) -> Result<GuestRing, ConnectError> {
        let memory =
            gntdev.map(domain, &at.grefs).map_err(|error| ConnectError::Map { grefs: at.grefs.clone(), error })?;
        let port = at.event_channel;
        let number = evtchn.bind_interdomain(domain, port).map_err(|error| ConnectError::Bind { port, error })?;
        let shared = Shared::new(Arc::new(memory), 0, abi, at.grefs.len().ilog2());
        Ok(GuestRing {
            ring: CountedRing::new(BackRing::attach(shared)),
            port: Port { evtchn: Arc::clone(evtchn), number },
            held: None,
            doorbell: Doorbell::default(),
            muted_until: None,
            masked: false,
        })
    }

    /// An event came.
    pub fn kicked(&mut self) {
        self.masked = true;
        self.doorbell.ring(&mut self.ring.counters);
    }

    /// Asks for an event when `count` requests are there. True: they are there already.
    pub fn arm(&mut self, now: u64, count: u32) -> bool {
        if self.muted_until.is_some_and(|until| now < until) {
            return self.ring.ready();
        }
        self.muted_until = None;
        if self.masked {
            // What came while it was masked comes now.
            self.masked = self.port.evtchn.unmask(&[self.port.number]).is_err();
        }
        self.ring.arm_at(count)
    }

    /// For debug-queue.
    pub fn inspect(&self) -> serde_json::Value {
        serde_json::json!({
            "entries": self.ring.entries(),
            "port": self.port.number,
            "masked": self.masked,
            "muted": self.muted_until.is_some(),
            "held": self.held.is_some(),
            "indices": self.ring.indices(),
            "counters": self.ring.counters,
        })
    }
}
