//! `/dev/xen/evtchn`: event channels (the kernel's `include/uapi/xen/evtchn.h`).

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

pub use xen_sys::evtchn_port_t;

use super::gntdev::domid_t;

/// The device.
pub const PATH: &str = "/dev/xen/evtchn";

/// `struct ioctl_evtchn_bind_interdomain`.
#[repr(C)]
struct BindInterdomain {
    remote_domain: u32,
    remote_port: evtchn_port_t,
}

/// The argument of those that take one number.
#[repr(C)]
struct Number {
    value: u32,
}

#[expect(clippy::disallowed_methods, reason = "of the macros")]
mod ioctl {
    use super::super::xen_ioctl;

    nix::ioctl_write_ptr_bad!(bind_interdomain, xen_ioctl(b'E', 1, 8), super::BindInterdomain);
    nix::ioctl_write_ptr_bad!(bind_unbound_port, xen_ioctl(b'E', 2, 4), super::Number);
    nix::ioctl_write_ptr_bad!(unbind, xen_ioctl(b'E', 3, 4), super::Number);
    nix::ioctl_write_ptr_bad!(notify, xen_ioctl(b'E', 4, 4), super::Number);
}

/// The open device, with the ports that are bound to it.
#[derive(Debug)]
pub struct Evtchn {
    file: File,
}

impl Evtchn {
    /// Opens it. It never blocks.
    pub fn open() -> io::Result<Evtchn> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(PATH)?;
        Ok(Evtchn { file })
    }

    /// Binds a new port of ours to a domain's unbound one.
    pub fn bind_interdomain(&self, domain: domid_t, remote_port: evtchn_port_t) -> io::Result<evtchn_port_t> {
        let bind = BindInterdomain { remote_domain: domain.into(), remote_port };
        // SAFETY: the kernel reads the struct and gives the port as the result.
        Ok(unsafe { ioctl::bind_interdomain(self.file.as_raw_fd(), &raw const bind) }? as evtchn_port_t)
    }

    /// A new port that `domain` may bind to: what a frontend does.
    pub fn bind_unbound_port(&self, domain: domid_t) -> io::Result<evtchn_port_t> {
        let bind = Number { value: domain.into() };
        // SAFETY: as in `bind_interdomain`.
        Ok(unsafe { ioctl::bind_unbound_port(self.file.as_raw_fd(), &raw const bind) }? as evtchn_port_t)
    }

    /// Gives a port back.
    pub fn unbind(&self, port: evtchn_port_t) -> io::Result<()> {
        let port = Number { value: port };
        // SAFETY: the kernel reads the number.
        Ok(unsafe { ioctl::unbind(self.file.as_raw_fd(), &raw const port) }.map(drop)?)
    }

    /// Sends an event.
    pub fn notify(&self, port: evtchn_port_t) -> io::Result<()> {
        let port = Number { value: port };
        // SAFETY: as in `unbind`.
        Ok(unsafe { ioctl::notify(self.file.as_raw_fd(), &raw const port) }.map(drop)?)
    }

    /// Ports that had an event, each masked now until it is [unmasked](Self::unmask). Gives how many were stored.
    pub fn pending(&self, ports: &mut [evtchn_port_t]) -> io::Result<usize> {
        let bytes = zerocopy::IntoBytes::as_mut_bytes(ports);
        match (&self.file).read(bytes) {
            Ok(count) => Ok(count / size_of::<evtchn_port_t>()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Lets a port have events again.
    pub fn unmask(&self, ports: &[evtchn_port_t]) -> io::Result<()> {
        (&self.file).write_all(zerocopy::IntoBytes::as_bytes(ports))
    }
}

impl AsFd for Evtchn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
