//! `/dev/xen/gntalloc`: pages of ours that another domain may use (the kernel's `include/uapi/xen/gntalloc.h`). What a
//! frontend does; here it serves a client in the host's own domain.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::gntdev::{GrantRef, domid_t};
use super::memory::{Memory, PAGE_SIZE};

/// The device.
pub const PATH: &str = "/dev/xen/gntalloc";

/// `GNTALLOC_FLAG_WRITABLE`.
const WRITABLE: u16 = 1;

/// The most pages of one allocation.
pub const PAGES_MAX: usize = 256;

/// `struct ioctl_gntalloc_alloc_gref`, with room for all references.
#[repr(C)]
struct Alloc {
    domain: u16,
    flags: u16,
    count: u32,
    index: u64,
    grefs: [GrantRef; PAGES_MAX],
}

#[expect(clippy::disallowed_methods, reason = "of the macros")]
mod ioctl {
    use super::super::xen_ioctl;

    nix::ioctl_readwrite_bad!(alloc, xen_ioctl(b'G', 5, 24), super::Alloc);
}

/// Pages that a domain may use, until this and the memory are dropped. What the domain still has mapped stays its own.
#[derive(Debug)]
pub struct Granted {
    /// What it is closed with takes the grants back.
    _file: File,
    memory: Arc<Memory>,
    /// The pages' references, in the memory's order.
    pub grefs: Vec<GrantRef>,
}

impl Granted {
    /// `count` zeroed pages, [`PAGES_MAX`] at most, that `domain` may read and, if it says so, write.
    pub fn new(domain: domid_t, count: usize, writable: bool) -> io::Result<Granted> {
        if !(1..=PAGES_MAX).contains(&count) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let file = OpenOptions::new().read(true).write(true).open(PATH)?;
        let flags = if writable { WRITABLE } else { 0 };
        let mut alloc = Alloc { domain, flags, count: count as u32, index: 0, grefs: [0; PAGES_MAX] };
        // SAFETY: the kernel writes the index and `count` references, for which there is room.
        unsafe { ioctl::alloc(file.as_raw_fd(), &raw mut alloc) }?;
        let memory = Arc::new(Memory::at_offset(&file, alloc.index, count * PAGE_SIZE)?);
        Ok(Granted { _file: file, memory, grefs: alloc.grefs[..count].to_vec() })
    }

    /// The pages.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }
}
