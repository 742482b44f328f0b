//! All the unsafe code: memory that others can write, the kernel's asynchronous I/O, ioctls, and descriptors that
//! arrive over a socket. What is exported is safe to call; each block says why it is sound.
//!
//! Where a pointer travels through the kernel as an integer, its provenance is exposed on the way in
//! ([`std::ptr`], "exposed provenance") and taken up again on the way out. An integer that is only compared is none.
#![allow(unsafe_code)]

use nix::errno::Errno;

pub mod aio;
pub mod capability;
mod copy;
pub mod credentials;
pub mod evtchn;
pub mod fdpass;
pub mod file;
pub mod gntalloc;
pub mod gntdev;
pub mod io;
pub mod memory;
pub mod process;
pub mod reserve;
pub mod socket;
pub mod uring;

// Pointers are given to the kernel in fields of 64 bits, and BLKGETSIZE64 stores as many in a `usize`.
const _: () = assert!(usize::BITS == 64);

/// An errno by its number: the one way to make one. One that nobody knows is EIO: nix has 0 for it, which says that there is no error.
pub fn errno(number: i32) -> Errno {
    #[expect(clippy::disallowed_methods, reason = "this is what the others are to call")]
    let errno = Errno::from_raw(number);
    known(errno)
}

/// What a function of nix's gave, which has 0 for errnos that it does not know.
pub fn known(errno: Errno) -> Errno {
    if errno == Errno::UnknownErrno { Errno::EIO } else { errno }
}

/// The errno of an error; EIO if it has none.
pub fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, errno)
}

/// What a system call without a wrapper said: a result, or that there is an error (-1).
fn result(value: impl Into<i64>) -> Result<u64, Errno> {
    u64::try_from(value.into()).map_err(|_| errno_of(&std::io::Error::last_os_error()))
}

/// What the kernel says of an I/O that completes: its bytes, or an errno with a minus.
fn completed(value: i64) -> Result<u64, Errno> {
    let number = || value.checked_neg().and_then(|number| i32::try_from(number).ok());
    u64::try_from(value).map_err(|_| number().map_or(Errno::EIO, errno))
}

/// The number of an ioctl of Xen's devices: all are declared without a direction, and with the size of their argument.
const fn xen_ioctl(kind: u8, number: u8, size: usize) -> libc::c_ulong {
    nix::request_code_none!(kind, number) | (size as libc::c_ulong) << 16
}

/// Which threads may have what, for all that has pointers or stands for the kernel's memory. What changes that does not compile.
#[cfg(test)]
mod threads {
    use static_assertions::{assert_impl_all, assert_not_impl_any};

    use super::{aio, gntdev, io, memory, uring};

    // Any number of threads at once: all access is atomic, under a lock, or the kernel's.
    assert_impl_all!(memory::Memory: Send, Sync);
    assert_impl_all!(aio::Context: Send, Sync);
    assert_impl_all!(uring::Ring: Send, Sync);
    // One at a time, whichever: each is the one consumer of a ring, or one I/O with its one owner.
    assert_impl_all!(aio::Completions: Send);
    assert_not_impl_any!(aio::Completions: Sync);
    assert_impl_all!(uring::Completions: Send);
    assert_not_impl_any!(uring::Completions: Sync);
    assert_impl_all!(io::Io: Send);
    assert_not_impl_any!(io::Io: Sync);
    // Numbers.
    assert_impl_all!(gntdev::CopyBatch: Send);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `ENOTSUPP`, the kernel's own, which some drivers let out.
    const NOT_FOR_USERS: i32 = 524;

    #[test]
    fn an_errno_that_nobody_knows_is_eio_and_none_is_0() {
        for number in [NOT_FOR_USERS, 0, -5, i32::MIN, i32::MAX] {
            assert_eq!(errno(number), Errno::EIO, "{number}");
            assert_eq!(errno_of(&std::io::Error::from_raw_os_error(number)), Errno::EIO, "{number}");
        }
        assert_eq!(errno(libc::ENOSPC), Errno::ENOSPC);
        assert_eq!((known(Errno::UnknownErrno), known(Errno::ENOSPC)), (Errno::EIO, Errno::ENOSPC));
        assert_eq!(errno_of(&std::io::ErrorKind::InvalidData.into()), Errno::EIO);
    }

    #[test]
    fn what_completes_has_its_bytes_or_an_errno_that_is_none_of_0() {
        for (value, expected) in [
            (0, Ok(0)),
            (4096, Ok(4096)),
            (i64::MAX, Ok(i64::MAX as u64)),
            (-28, Err(Errno::ENOSPC)),
            (-i64::from(NOT_FOR_USERS), Err(Errno::EIO)),
            (i64::MIN, Err(Errno::EIO)),
            // Its low half is 0.
            (-(1 << 32), Err(Errno::EIO)),
        ] {
            assert_eq!(completed(value), expected, "{value}");
        }
    }

    #[test]
    fn what_a_system_call_says_has_its_errno() {
        assert_eq!(result(3_i64), Ok(3));
        // SAFETY: no descriptor has that number.
        assert_eq!(result(unsafe { libc::close(-1) }), Err(Errno::EBADF));
    }
}
