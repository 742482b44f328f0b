//! Sockets that send from and receive into a [`Memory`] without a copy on the way.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::io::last_error;
use super::memory::Memory;

/// The most pieces that one [`send`] takes.
pub const MAX_PIECES: usize = 256;

/// A run of bytes to send.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    /// Bytes of our own.
    Bytes(&'a [u8]),
    /// `len` bytes at `offset` of a memory.
    Memory {
        /// Where they are.
        memory: &'a Memory,
        /// First byte.
        offset: usize,
        /// Bytes.
        len: usize,
    },
}

impl Piece<'_> {
    fn iovec(self) -> libc::iovec {
        match self {
            Piece::Bytes(bytes) => libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() },
            Piece::Memory { memory, offset, len } => {
                libc::iovec { iov_base: memory.at(offset, len).cast(), iov_len: len }
            }
        }
    }
}

const NO_BYTES: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

fn message(iovecs: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeros is a valid `msghdr`: no name, no control data, no pieces.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len();
    message
}

fn bytes_done(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| last_error())
}

/// Sends the first [`MAX_PIECES`] of `pieces` with one system call, and gives how many bytes went. Neither blocks nor
/// raises SIGPIPE.
pub fn send<'a>(socket: BorrowedFd, pieces: impl Iterator<Item = Piece<'a>>) -> io::Result<usize> {
    let mut iovecs = [NO_BYTES; MAX_PIECES];
    let mut count = 0;
    for (to, piece) in iovecs.iter_mut().zip(pieces) {
        *to = piece.iovec();
        count += 1;
    }
    let message = message(&mut iovecs[..count]);
    // SAFETY: each iovec is a slice or a checked range of a mapping that `pieces` borrows until after the call; the
    // kernel only reads it.
    bytes_done(unsafe {
        libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    })
}

/// Receives into `len` bytes at `offset` of `memory` and what then comes into `bytes`, with one system call that does
/// not block. Gives how many bytes came; 0 is the end of the stream. Descriptors that come with them are dropped.
pub fn receive(
    socket: BorrowedFd,
    (memory, offset, len): (&Memory, usize, usize),
    bytes: &mut [u8],
) -> io::Result<usize> {
    let mut iovecs = [
        libc::iovec { iov_base: memory.at(offset, len).cast(), iov_len: len },
        libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() },
    ];
    let mut message = message(&mut iovecs);
    // SAFETY: the first iovec is a checked range of a mapping, which anyone may write at any time, and the second is
    // borrowed exclusively; both outlive the call.
    bytes_done(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) })
}

/// The groups of the process at the other end, besides its own, when it connected (SO_PEERGROUPS, unix(7), since Linux 4.13).
pub fn peer_groups(socket: BorrowedFd) -> io::Result<Vec<libc::gid_t>> {
    const SO_PEERGROUPS: libc::c_int = 59;
    // More than that: none of them is known, and the access refused.
    let mut groups = vec![0; 1024];
    let mut bytes = size_of_val(groups.as_slice()) as libc::socklen_t;
    // SAFETY: the kernel stores at most `bytes` bytes of group ids there, and how many these are.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    if result < 0 {
        return Err(last_error());
    }
    groups.truncate(bytes as usize / size_of::<libc::gid_t>());
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn bytes_and_memory_go_out_in_order_and_come_in_across_both() {
        let (left, right) = UnixStream::pair().unwrap();
        let memory = Memory::anonymous(8192).unwrap();
        memory.write(4094, b"memory");
        let pieces = [Piece::Bytes(b"head"), Piece::Memory { memory: &memory, offset: 4094, len: 6 }];
        assert_eq!(send(left.as_fd(), pieces.into_iter()).unwrap(), 10);
        let mut rest = [0; 8];
        assert_eq!(receive(right.as_fd(), (&memory, 0, 7), &mut rest).unwrap(), 10);
        let mut first = [0; 7];
        memory.read(0, &mut first);
        assert_eq!((&first, &rest[..4]), (b"headmem", &b"ory\0"[..]));
        let error = receive(right.as_fd(), (&memory, 0, 0), &mut rest).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(right);
        let error = send(left.as_fd(), pieces.into_iter()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
