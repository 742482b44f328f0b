//! The descriptor that messages go through.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc::O_NONBLOCK;
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::{read, write};

use super::wire::{HEADER_LEN, PAYLOAD_MAX};

/// Where xenstored is: on this host, or behind the kernel.
const DEFAULTS: [&str; 2] = ["/run/xenstored/socket", "/dev/xen/xenbus"];

/// xenstored's socket, or the kernel's device.
///
/// The device (Linux, `drivers/xen/xenbus/xenbus_dev_frontend.c`) takes each `write` at once, never polls writable, and
/// answers some of what it does not like with an error of the `write`. It wants each message in a `write` of its own, and
/// only when the one before is answered: it has one buffer for what is written, and sends from there later.
pub(super) struct Channel {
    fd: OwnedFd,
    device: bool,
}

impl Channel {
    pub(super) fn open(named: Option<PathBuf>) -> io::Result<Channel> {
        let paths = named.map_or_else(|| DEFAULTS.map(PathBuf::from).to_vec(), |path| vec![path]);
        let mut tried = Vec::new();
        let mut kind = io::ErrorKind::NotFound;
        for path in paths {
            match Self::open_one(&path) {
                Ok(channel) => return Ok(channel),
                Err(error) => {
                    kind = error.kind();
                    tried.push(format!("{}: {error}", path.display()));
                }
            }
        }
        let tried = tried.join("; ");
        let remedy = "start xenstored, or name its socket with XENSTORED_PATH";
        Err(io::Error::new(kind, format!("cannot connect to the XenStore ({tried}): {remedy}")))
    }

    fn open_one(path: &Path) -> io::Result<Channel> {
        if std::fs::metadata(path)?.file_type().is_char_device() {
            let file = OpenOptions::new().read(true).write(true).custom_flags(O_NONBLOCK).open(path)?;
            return Ok(Channel { fd: file.into(), device: true });
        }
        let socket = UnixStream::connect(path)?;
        socket.set_nonblocking(true)?;
        Ok(Channel { fd: socket.into(), device: false })
    }

    /// The most bytes of a payload. The device's buffer has room for no more than that with the header.
    pub(super) fn payload_max(&self) -> usize {
        if self.device { PAYLOAD_MAX - HEADER_LEN } else { PAYLOAD_MAX }
    }

    /// Whether it takes one request at a time only, and an error of [`send`](Channel::send) is about that one.
    pub(super) fn single(&self) -> bool {
        self.device
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes of one message. Gives how many went.
    pub(super) fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        again(|| match self.device {
            true => write(&self.fd, bytes),
            false => send(self.fd.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL),
        })
    }

    /// What is there, 0 at the end of the stream.
    pub(super) fn receive(&self, bytes: &mut [u8]) -> Result<usize, Errno> {
        again(|| read(&self.fd, bytes))
    }
}

#[cfg(test)]
impl From<UnixStream> for Channel {
    fn from(socket: UnixStream) -> Channel {
        socket.set_nonblocking(true).unwrap();
        Channel { fd: socket.into(), device: false }
    }
}

/// Again after a signal.
fn again(mut call: impl FnMut() -> Result<usize, Errno>) -> Result<usize, Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}
