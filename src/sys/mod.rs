//! All the unsafe code: memory that others can write, the kernel's asynchronous I/O, ioctls, and descriptors that
//! arrive over a socket. What is exported is safe to call; each block says why it is sound.
#![allow(unsafe_code)]

pub mod aio;
pub mod capability;
pub mod credentials;
pub mod evtchn;
pub mod fdpass;
pub mod file;
pub mod gntalloc;
pub mod gntdev;
pub mod io;
pub mod memory;
pub mod process;
pub mod socket;
pub mod uring;

use nix::errno::Errno;

/// An errno by its number. One that nobody knows is EIO: nix has 0 for it, which says that there is no error.
pub fn errno(number: i32) -> Errno {
    match Errno::from_raw(number) {
        Errno::UnknownErrno => Errno::EIO,
        errno => errno,
    }
}

/// The number of an ioctl of Xen's devices: all are declared without a direction, and with the size of their argument.
const fn xen_ioctl(kind: u8, number: u8, size: usize) -> libc::c_ulong {
    nix::request_code_none!(kind, number) | (size as libc::c_ulong) << 16
}
