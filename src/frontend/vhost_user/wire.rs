//! Messages of vhost-user (QEMU's docs/interop/vhost-user.rst), little-endian: a header, and what belongs to it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::sys::fdpass;

/// Requests of the front end, by number.
pub(super) mod request {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const RESET_OWNER: u32 = 4;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const RESET_DEVICE: u32 = 34;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
    pub(crate) const REM_MEM_REG: u32 = 38;
    pub(crate) const SET_STATUS: u32 = 39;
    pub(crate) const GET_STATUS: u32 = 40;
}

/// Of a back end's: the configuration space has changed.
const CONFIG_CHANGED: u32 = 2;

/// Features of the protocol, by bit.
pub(super) mod protocol {
    pub(crate) const MQ: u64 = 1 << 0;
    pub(crate) const REPLY_ACK: u64 = 1 << 3;
    pub(crate) const BACKEND_REQ: u64 = 1 << 5;
    pub(crate) const CONFIG: u64 = 1 << 9;
    pub(crate) const RESET_DEVICE: u64 = 1 << 13;
    pub(crate) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub(crate) const STATUS: u64 = 1 << 16;
    /// All that are offered.
    pub(crate) const ALL: u64 = MQ | REPLY_ACK | BACKEND_REQ | CONFIG | RESET_DEVICE | CONFIGURE_MEM_SLOTS | STATUS;
}

/// Among the device's features: those of the protocol are negotiated too.
pub(super) const PROTOCOL_FEATURES: u64 = 1 << 30;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Of KICK, CALL and ERR: no descriptor comes with it.
pub(super) const NO_FD: u64 = 1 << 8;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    request: u32,
    flags: u32,
    size: u32,
}

/// Of SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG. The file has the region's first byte at `offset`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct MemoryRegion {
    pub(super) guest: u64,
    pub(super) len: u64,
    pub(super) user: u64,
    pub(super) offset: u64,
}

/// Of NUM, BASE and ENABLE: a ring, and a number.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RingState {
    pub(super) ring: u32,
    pub(super) value: u32,
}

/// Of SET_VRING_ADDR: addresses of the front end.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RingAddresses {
    pub(super) ring: u32,
    pub(super) flags: u32,
    pub(super) table: u64,
    pub(super) used: u64,
    pub(super) available: u64,
    pub(super) log: u64,
}

/// Of GET_CONFIG and SET_CONFIG, before the bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ConfigRange {
    pub(super) offset: u32,
    pub(super) len: u32,
    pub(super) flags: u32,
}

const HEADER: usize = size_of::<Header>();
/// Bytes behind a header, at most: a memory table of 32 regions, and then some.
const BODY_MAX: usize = 2048;

/// A message that has come whole.
pub(super) struct Message {
    pub(super) request: u32,
    /// Its front end wants to hear what came of it.
    pub(super) need_reply: bool,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Message {
    /// The body, which has exactly that form.
    pub(super) fn body<T: FromBytes>(&self) -> Result<T, String> {
        T::read_from_bytes(&self.body)
            .map_err(|_| format!("message {} has {} bytes and not {}", self.request, self.body.len(), size_of::<T>()))
    }

    /// The one descriptor that has come with it. It stays with the message as long as nobody has found it good.
    pub(super) fn fd(&self) -> Result<&OwnedFd, String> {
        match self.fds.as_slice() {
            [fd] => Ok(fd),
            fds => Err(format!("message {} comes with {} descriptors and not one", self.request, fds.len())),
        }
    }
}

/// What has come of the next message.
#[derive(Default)]
pub(super) struct Input {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Input {
    /// The next message, as soon as it is whole. Its descriptors come with its first byte.
    pub(super) fn next(&mut self, socket: &OwnedFd) -> io::Result<Option<Message>> {
        loop {
            let (wanted, header) = match Header::read_from_prefix(&self.bytes) {
                Ok((header, _)) => (HEADER + Self::check(&header)?, Some(header)),
                Err(_) => (HEADER, None),
            };
            if let Some(header) = header
                && self.bytes.len() == wanted
            {
                let body = self.bytes.split_off(HEADER);
                self.bytes.clear();
                let (request, need_reply) = (header.request, header.flags & NEED_REPLY != 0);
                return Ok(Some(Message { request, need_reply, body, fds: std::mem::take(&mut self.fds) }));
            }
            let mut more = [0; HEADER + BODY_MAX];
            let more = &mut more[..wanted - self.bytes.len()];
            match fdpass::receive(socket.as_fd(), more, MsgFlags::MSG_DONTWAIT) {
                Ok((0, _)) => return Err(io::Error::other("hung up")),
                Ok((count, fds)) => {
                    let (is_first, has_fds) = (self.bytes.is_empty() && self.fds.is_empty(), !fds.is_empty());
                    // Kept, also where they end the connection: with that they are closed.
                    self.fds.extend(fds);
                    if has_fds && !is_first {
                        return Err(io::Error::other("descriptors in the middle of a message"));
                    }
                    self.bytes.extend(&more[..count]);
                }
                Err(error) if error.raw_os_error() == Some(Errno::EAGAIN as i32) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn check(header: &Header) -> io::Result<usize> {
        if header.flags & VERSION_MASK != VERSION || header.flags & REPLY != 0 {
            return Err(io::Error::other(format!("message {} has flags {:#x}", header.request, header.flags)));
        }
        if header.size as usize > BODY_MAX {
            return Err(io::Error::other(format!("message {} has {} bytes", header.request, header.size)));
        }
        Ok(header.size as usize)
    }
}

/// Sends a message whole, or not at all: a front end that takes none is none.
fn send(socket: &OwnedFd, header: Header, body: &[u8]) -> io::Result<()> {
    let bytes = [header.as_bytes(), body].concat();
    let sent = fdpass::send(socket.as_fd(), &bytes, &[])?;
    if sent == bytes.len() { Ok(()) } else { Err(io::Error::other("takes no replies")) }
}

/// Sends the reply to a request.
pub(super) fn reply(socket: &OwnedFd, request: u32, body: &[u8]) -> io::Result<()> {
    send(socket, Header { request, flags: VERSION | REPLY, size: body.len() as u32 }, body)
}

/// Tells the front end that the configuration space has changed.
pub(super) fn tell_config_changed(socket: &OwnedFd) -> io::Result<()> {
    send(socket, Header { request: CONFIG_CHANGED, flags: VERSION, size: 0 }, &[])
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_message_that_comes_byte_by_byte_is_one() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (ours, theirs) = (OwnedFd::from(ours), OwnedFd::from(theirs));
        let mut input = Input::default();
        let state = RingState { ring: 1, value: 256 };
        let header = Header { request: 8, flags: VERSION | NEED_REPLY, size: 8 };
        let bytes = [header.as_bytes(), state.as_bytes()].concat();
        for (i, byte) in bytes.iter().enumerate() {
            assert!(input.next(&ours).unwrap().is_none(), "{i}");
            fdpass::send(theirs.as_fd(), &[*byte], &[]).unwrap();
        }
        let message = input.next(&ours).unwrap().unwrap();
        assert_eq!((message.request, message.need_reply, message.fds.len()), (8, true, 0));
        let found: RingState = message.body().unwrap();
        assert_eq!((found.ring, found.value), (1, 256));
        assert!(message.body::<ConfigRange>().is_err() && input.next(&ours).unwrap().is_none());
        drop(theirs);
        assert!(input.next(&ours).is_err());
    }

    #[test]
    fn wrong_versions_replies_and_lengths_are_no_messages() {
        for (flags, size) in [(0, 0), (VERSION | REPLY, 0), (2, 8), (VERSION, 2049), (VERSION, u32::MAX)] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let header = Header { request: 1, flags, size };
            fdpass::send(theirs.as_fd(), header.as_bytes(), &[]).unwrap();
            assert!(Input::default().next(&ours.into()).is_err(), "{flags:#x} {size}");
        }
    }

    #[test]
    fn descriptors_come_with_the_first_byte_or_not_at_all() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ours = OwnedFd::from(ours);
        let header = Header { request: 12, flags: VERSION, size: 8 };
        let bytes = [header.as_bytes(), &[0; 8]].concat();
        let mut input = Input::default();
        fdpass::send(theirs.as_fd(), &bytes[..4], &[theirs.as_fd()]).unwrap();
        assert!(input.next(&ours).unwrap().is_none());
        fdpass::send(theirs.as_fd(), &bytes[4..], &[]).unwrap();
        let mut message = input.next(&ours).unwrap().unwrap();
        assert!(message.fd().is_ok());
        message.fds.clear();
        assert!(message.fd().is_err());
        fdpass::send(theirs.as_fd(), &bytes[..4], &[]).unwrap();
        assert!(input.next(&ours).unwrap().is_none());
        fdpass::send(theirs.as_fd(), &bytes[4..], &[theirs.as_fd()]).unwrap();
        assert!(input.next(&ours).is_err());
    }
}
