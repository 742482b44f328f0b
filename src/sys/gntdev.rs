//! `/dev/xen/gntdev`: pages that a guest has granted, mapped or copied (the kernel's `include/uapi/xen/gntdev.h`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::errno::Errno;
pub use xen_sys::domid_t;

use super::known;
use super::memory::{Memory, PAGE_SIZE};

/// The device.
pub const PATH: &str = "/dev/xen/gntdev";

/// `grant_ref_t`: names a page that a domain has granted.
pub type GrantRef = u32;

/// `GNTST_okay`; whatever else a copy has for its status is an error.
const GNTST_OKAY: i16 = 0;
/// `GNTST_general_error`.
const GNTST_GENERAL_ERROR: i16 = -1;
/// `GNTCOPY_source_gref` and `GNTCOPY_dest_gref`.
const SOURCE_GREF: u16 = 1;
const DEST_GREF: u16 = 2;

/// `struct ioctl_gntdev_grant_ref`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Ref {
    domain: u32,
    gref: GrantRef,
}

/// The most pages of one mapping: a ring of order 4.
const MAP_MAX: usize = 16;

/// `struct ioctl_gntdev_map_grant_ref`, with room for more than its one reference.
#[repr(C)]
struct Map {
    count: u32,
    pad: u32,
    index: u64,
    refs: [Ref; MAP_MAX],
}

/// `struct ioctl_gntdev_unmap_grant_ref`.
#[repr(C)]
struct Unmap {
    index: u64,
    count: u32,
    pad: u32,
}

/// Either member of the union in `struct gntdev_grant_copy_segment`: an address of ours, or a reference (32 bits), an
/// offset in its page (16 bits) and a domain (16 bits).
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Place(u64);

impl Place {
    fn foreign(domain: domid_t, gref: GrantRef, offset: u16) -> Place {
        let ([a, b, c, d], [e, f], [g, h]) = (gref.to_ne_bytes(), offset.to_ne_bytes(), domain.to_ne_bytes());
        Place(u64::from_ne_bytes([a, b, c, d, e, f, g, h]))
    }
}

/// `struct gntdev_grant_copy_segment`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Segment {
    source: Place,
    dest: Place,
    len: u16,
    flags: u16,
    status: i16,
    pad: u16,
}

/// `struct ioctl_gntdev_grant_copy`.
#[repr(C)]
struct Copy {
    count: u32,
    pad: u32,
    segments: *mut Segment,
}

#[expect(clippy::disallowed_methods, reason = "of the macros")]
mod ioctl {
    use super::super::xen_ioctl;

    nix::ioctl_readwrite_bad!(map, xen_ioctl(b'G', 0, 24), super::Map);
    nix::ioctl_readwrite_bad!(unmap, xen_ioctl(b'G', 1, 16), super::Unmap);
    nix::ioctl_readwrite_bad!(copy, xen_ioctl(b'G', 8, 16), super::Copy);
}

const _: () = {
    assert!(size_of::<Map>() == 16 + MAP_MAX * 8 && size_of::<Unmap>() == 16 && size_of::<Copy>() == 16);
    assert!(size_of::<Segment>() == 24 && std::mem::offset_of!(Segment, status) == 20);
};

/// The open device.
#[derive(Clone, Debug)]
pub struct Gntdev {
    file: Arc<File>,
}

impl Gntdev {
    /// Opens it.
    pub fn open() -> io::Result<Gntdev> {
        let file = OpenOptions::new().read(true).write(true).open(PATH)?;
        Ok(Gntdev { file: Arc::new(file) })
    }

    /// Maps pages of a domain, 16 at most, one behind the other, to be read and written. They are unmapped when the
    /// memory is dropped. A reference that the domain has not granted is an error.
    pub fn map(&self, domain: domid_t, grefs: &[GrantRef]) -> io::Result<Memory> {
        if !(1..=MAP_MAX).contains(&grefs.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let refs = std::array::from_fn(|i| Ref { domain: domain.into(), gref: grefs.get(i).copied().unwrap_or(0) });
        let count = grefs.len() as u32;
        let mut map = Map { count, pad: 0, index: 0, refs };
        // SAFETY: the kernel reads `count` references behind the head, which are there, and writes `index`.
        unsafe { ioctl::map(self.file.as_raw_fd(), &raw mut map) }?;
        let grants = Grants { file: Arc::clone(&self.file), index: map.index, count };
        Memory::granted(grants, grefs.len() * PAGE_SIZE)
    }

    /// Carries out all copies of `batch` with one system call. Afterwards [`CopyBatch::done`] says of each how it
    /// went. An error means that none can be trusted.
    pub fn copy(&self, batch: &mut CopyBatch) -> Result<(), Errno> {
        if batch.segments.is_empty() {
            return Ok(());
        }
        let mut copy = Copy { count: batch.segments.len() as u32, pad: 0, segments: batch.segments.as_mut_ptr() };
        // SAFETY: `segments` has that many; each local place in them is a checked range of `batch.memory`, which lives
        // as long as `batch`, and which the kernel reads or writes as it does for read(2) and write(2). The foreign
        // places are the hypervisor's affair.
        let result = unsafe { ioctl::copy(self.file.as_raw_fd(), &raw mut copy) }.map(drop).map_err(known);
        if result.is_err() {
            batch.segments.iter_mut().for_each(|segment| segment.status = GNTST_GENERAL_ERROR);
        }
        result
    }
}

/// A mapping that the device has not forgotten yet.
#[derive(Debug)]
pub(super) struct Grants {
    pub(super) file: Arc<File>,
    pub(super) index: u64,
    count: u32,
}

impl Drop for Grants {
    fn drop(&mut self) {
        let mut unmap = Unmap { index: self.index, count: self.count, pad: 0 };
        // SAFETY: the kernel only reads the struct, and forgets what `map` made; the memory itself is unmapped already.
        let unmapped = unsafe { ioctl::unmap(self.file.as_raw_fd(), &raw mut unmap) };
        debug_assert!(unmapped.is_ok());
    }
}

/// Copies between a domain's granted pages and a memory of ours, to be carried out at once.
pub struct CopyBatch {
    memory: Arc<Memory>,
    segments: Vec<Segment>,
}

impl std::fmt::Debug for CopyBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("CopyBatch").field("segments", &self.segments.len()).finish()
    }
}

impl CopyBatch {
    /// A batch on `memory`, of `capacity` copies at most.
    pub fn new(memory: Arc<Memory>, capacity: usize) -> CopyBatch {
        CopyBatch { memory, segments: Vec::with_capacity(capacity) }
    }

    /// Copies that are in it.
    pub fn len(&self) -> usize {
        self.segments.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Copies that still fit.
    pub fn room(&self) -> usize {
        self.segments.capacity() - self.segments.len()
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        self.segments.clear();
    }

    /// From `offset` (bytes) in a domain's page to byte `to` of the memory. Panics where it is no part of one page, or
    /// where there is no room: the caller has checked.
    pub fn push_from(&mut self, domain: domid_t, gref: GrantRef, offset: u16, len: u16, to: usize) {
        let dest = self.local(offset, len, to);
        self.push(Place::foreign(domain, gref, offset), dest, len, SOURCE_GREF);
    }

    /// From byte `from` of the memory to `offset` (bytes) in a domain's page. Panics as
    /// [`push_from`](Self::push_from).
    pub fn push_to(&mut self, domain: domid_t, gref: GrantRef, offset: u16, len: u16, from: usize) {
        let source = self.local(offset, len, from);
        self.push(source, Place::foreign(domain, gref, offset), len, DEST_GREF);
    }

    fn local(&self, offset: u16, len: u16, at: usize) -> Place {
        assert!(usize::from(offset) + usize::from(len) <= PAGE_SIZE && self.room() > 0);
        // The kernel, or rather the hypervisor, makes a pointer of it again.
        Place(self.memory.at(at, len.into()).expose_provenance() as u64)
    }

    fn push(&mut self, source: Place, dest: Place, len: u16, flags: u16) {
        self.segments.push(Segment { source, dest, len, flags, status: GNTST_GENERAL_ERROR, pad: 0 });
    }

    /// Whether all copies from `first` on, `count` of them, were carried out.
    pub fn done(&self, first: usize, count: usize) -> bool {
        self.segments[first..first + count].iter().all(|segment| segment.status == GNTST_OKAY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_laid_out_as_gntdev_h_says_and_is_not_done_before_it_is_carried_out() {
        let memory = Arc::new(Memory::anonymous(8192).unwrap());
        let mut batch = CopyBatch::new(Arc::clone(&memory), 2);
        batch.push_from(0x0506, 0x0102_0304, 0x0708, 0x200, 4096);
        batch.push_to(1, 2, 0, 4096, 0);
        let segment = batch.segments[0];
        assert_eq!(segment.source.0.to_ne_bytes(), [4, 3, 2, 1, 8, 7, 6, 5]);
        assert_eq!((segment.dest.0, segment.flags), (memory.at(4096, 1).addr() as u64, 1));
        assert_eq!((batch.segments[1].source.0, batch.segments[1].flags), (memory.at(0, 1).addr() as u64, 2));
        assert!(!batch.done(0, 1) && !batch.done(1, 1) && batch.room() == 0);
    }

    #[test]
    #[should_panic(expected = "offset")]
    fn a_copy_does_not_cross_a_page_of_the_guest() {
        let mut batch = CopyBatch::new(Arc::new(Memory::anonymous(8192).unwrap()), 1);
        batch.push_from(0, 0, 512, 4096, 0);
    }

    #[test]
    #[should_panic(expected = "beyond the mapping")]
    fn a_copy_does_not_leave_the_memory() {
        let mut batch = CopyBatch::new(Arc::new(Memory::anonymous(4096).unwrap()), 1);
        batch.push_to(0, 0, 0, 512, 4096);
    }
}
