//! Guests that tapback shakes hands with.

use super::Disk;
use crate::frontend::xen::tapback::{GuestAt, GuestError, Tapback};

impl Disk {
    /// Serves a guest's ring. While the disk is paused, the guest waits.
    pub fn connect_guest(&mut self, at: &GuestAt) -> Result<(), GuestError> {
        if self.is_draining() {
            return Err(GuestError::Closing);
        }
        let sector_size = self.info.sector_size;
        self.tapback().ok_or(GuestError::Configured)?.connect(at, sector_size)
    }

    /// Serves a guest's ring no more. Whether its last request is finished, [`guest_leaves`](Self::guest_leaves) says.
    pub fn disconnect_guest(&mut self, domain: u32, device: u32) -> Result<(), GuestError> {
        self.tapback().ok_or(GuestError::Unknown(domain, device))?.disconnect(domain, device)
    }

    /// Whether that guest was disconnected, and some of its requests are not finished.
    pub fn guest_leaves(&mut self, domain: u32, device: u32) -> bool {
        self.tapback().is_some_and(|tapback| tapback.is_leaving(domain, device))
    }

    /// Whether that guest is connected, or some of its requests are not finished.
    pub fn has_guest(&mut self, domain: u32, device: u32) -> bool {
        self.tapback().is_some_and(|tapback| tapback.has(domain, device))
    }

    fn tapback(&mut self) -> Option<&mut Tapback> {
        self.frontends.iter_mut().find_map(|frontend| frontend.kind_mut())
    }
}
