//! Mapped memory that the kernel, a client or a guest may write at any time.
//!
//! No reference to its bytes is ever made (only atomics for ring indices): what is in it is copied out once, by `sys::copy`, which
//! bears that others write meanwhile, and the copy is checked. Offsets and lengths are in bytes; an access beyond the mapping
//! panics, so callers check what a client chose before they come here.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap, mmap_anonymous, mprotect, munlock, munmap};
#[cfg(not(miri))]
use nix::sys::mman::{MmapAdvise, madvise};

use super::copy;
use super::gntdev::Grants;
use crate::blocking::Blocking;

/// Bytes in a page of the ring and of grants.
pub const PAGE_SIZE: usize = 4096;

static GONE: AtomicU64 = AtomicU64::new(0);

fn new_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A page-aligned mapping, unmapped when the last owner drops it.
#[derive(Debug)]
pub struct Memory {
    /// No other mapping of this process ever has it.
    id: u64,
    base: NonNull<u8>,
    len: usize,
    /// What Xen is told when the pages, which are a guest's, are unmapped.
    grants: Option<Grants>,
    /// The pages are the same as long as it is there: nobody punches holes into its file, and what is pinned of it is what is read and written.
    stays: bool,
}

// SAFETY: `Memory` is a plain range of addresses. All access is atomic, by `copy` and by words, or the kernel's: any number of
// threads, and others, may do it at the same time.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Private memory of at least `len` bytes, zeroed.
    pub fn anonymous(len: usize) -> io::Result<Memory> {
        let size = Self::size(len)?;
        let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address the kernel chooses touches no memory of ours.
        let base = unsafe { mmap_anonymous(None, size, rw, MapFlags::MAP_PRIVATE) }?;
        Ok(Memory { id: new_id(), base: base.cast(), len: size.get(), grants: None, stays: true }.left_out_of_dumps())
    }

    /// The first `len` bytes of `fd`, shared. A file that shrinks under its mapping makes an access a SIGBUS, so a
    /// server maps only a memfd that it made and sealed itself, or a file that it made for root alone to open.
    pub fn shared(fd: impl AsFd, len: usize) -> io::Result<Memory> {
        Self::at_offset(fd, 0, len)
    }

    /// The same, of a client that may have very much: no page of it is found or locked, though all memory of this process is
    /// (mlockall(2)); it is the client's to keep its memory where it is. Whoever maps it looks at its seals.
    pub fn shared_as_it_is(fd: impl AsFd, len: usize) -> io::Result<Memory> {
        let size = Self::size(len)?;
        // SAFETY: as in `anonymous`.
        let base = unsafe { mmap(None, size, ProtFlags::PROT_NONE, MapFlags::MAP_SHARED, fd, 0) }?;
        let memory = Memory { id: new_id(), base: base.cast(), len: size.get(), grants: None, stays: false };
        // SAFETY: the mapping just made, which nobody else knows of. Where it is not locked, munlock(2) changes nothing.
        unsafe {
            munlock(base, size.get())?;
            mprotect(base, size.get(), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        }
        Ok(memory.left_out_of_dumps())
    }

    /// The same as [`shared`](Self::shared) from byte `offset` of `fd` on.
    pub(super) fn at_offset(fd: impl AsFd, offset: u64, len: usize) -> io::Result<Memory> {
        let size = Self::size(len)?;
        let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: as in `anonymous`.
        let base = unsafe { mmap(None, size, rw, MapFlags::MAP_SHARED, fd, offset as i64) }?;
        Ok(Memory { id: new_id(), base: base.cast(), len: size.get(), grants: None, stays: true }.left_out_of_dumps())
    }

    /// What guests write and read is in no core dump.
    fn left_out_of_dumps(self) -> Memory {
        // SAFETY: the range is this mapping, and its content stays as it is. Where the kernel refuses, it is in dumps.
        #[cfg(not(miri))]
        let _ = unsafe { madvise(self.base.cast(), self.len, MmapAdvise::MADV_DONTDUMP) };
        self
    }

    /// Pages of a guest, `len` bytes.
    pub(super) fn granted(grants: Grants, len: usize) -> io::Result<Memory> {
        let mut memory = Self::at_offset(&*grants.file, grants.index, len)?;
        memory.grants = Some(grants);
        Ok(memory)
    }

    fn size(len: usize) -> io::Result<std::num::NonZeroUsize> {
        std::num::NonZeroUsize::new(len.next_multiple_of(PAGE_SIZE)).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Tells it from all others of this process, also from those that are gone.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// How many have gone so far.
    pub fn gone() -> u64 {
        GONE.load(Ordering::Acquire)
    }

    /// Bytes mapped, a multiple of the page.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether an engine may pin its pages and go on using those. A guest's memory has holes punched into it by a balloon, and other pages there
    /// later.
    pub fn may_be_pinned(&self) -> bool {
        self.stays
    }

    /// Keeps all of it resident. Waits until it is.
    pub fn lock(&self, _: &Blocking) -> io::Result<()> {
        // SAFETY: the range is this mapping, which lives as long as `self`.
        unsafe { mlock(self.base.cast(), self.len) }.map_err(Into::into)
    }

    /// The address of `len` bytes at `offset`, after the check that every access goes through.
    pub(super) fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{offset}+{len} is beyond the mapping's {} bytes",
            self.len
        );
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// An index or entry of a virtio ring. `offset` must be a multiple of 2.
    pub fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        assert!(offset.is_multiple_of(2));
        // SAFETY: as in `atomic_u32`.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }

    /// A ring index. `offset` must be a multiple of 4.
    pub fn atomic_u32(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4));
        // SAFETY: in bounds, aligned, and lives as long as `self`; everyone else accesses it as an atomic word,
        // and whatever they write is a valid u32.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }
    }

    /// A word that others read while it is written. `offset` must be a multiple of 8.
    pub fn atomic_u64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8));
        // SAFETY: as in `atomic_u32`; mappings are aligned to pages, so the word is aligned.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }
    }

    /// Copies `N` bytes (a multiple of 4, at a multiple of 4) out, reading each word exactly once and whole: the copy can't
    /// change between its check and its use.
    pub fn read_once<const N: usize>(&self, offset: usize) -> [u8; N] {
        const { assert!(N.is_multiple_of(4)) };
        assert!(offset.is_multiple_of(4));
        let from = self.at(offset, N).cast::<u32>();
        let mut copy = [0; N];
        if N.is_multiple_of(8) && offset.is_multiple_of(8) {
            for (i, word) in copy.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                // SAFETY: as below; mappings are aligned to pages, and so are words of eight bytes.
                *word =
                    unsafe { AtomicU64::from_ptr(from.cast::<u64>().add(i)) }.load(Ordering::Relaxed).to_ne_bytes();
            }
            return copy;
        }
        for (i, word) in copy.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            // SAFETY: in bounds and aligned; others access it as atomic words, or are not of this program. The compiler makes
            // no second load of an atomic one.
            *word = unsafe { AtomicU32::from_ptr(from.add(i)) }.load(Ordering::Relaxed).to_ne_bytes();
        }
        copy
    }

    /// Copies `N` bytes (a multiple of 4) to `offset` (too), writing each word exactly once and whole.
    pub fn write_once<const N: usize>(&self, offset: usize, from: [u8; N]) {
        const { assert!(N.is_multiple_of(4)) };
        assert!(offset.is_multiple_of(4));
        let to = self.at(offset, N).cast::<u32>();
        for (i, word) in from.as_chunks::<4>().0.iter().enumerate() {
            // SAFETY: as in `read_once`.
            unsafe { AtomicU32::from_ptr(to.add(i)) }.store(u32::from_ne_bytes(*word), Ordering::Relaxed);
        }
    }

    /// Copies `to.len()` bytes at `offset` out.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        let from = self.at(offset, to.len());
        // SAFETY: `from` is valid for that length, and nobody accesses it but atomically.
        unsafe { copy::out(from, to) };
    }

    /// Copies `from` to `offset`.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len());
        // SAFETY: as in `read`.
        unsafe { copy::into(from, to) };
    }

    /// Zeroes `len` bytes at `offset`.
    pub fn zero(&self, offset: usize, len: usize) {
        let to = self.at(offset, len);
        // SAFETY: as in `read`.
        unsafe { copy::zero(to, len) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        GONE.fetch_add(1, Ordering::Release);
        // SAFETY: the mapping is ours, and no `Io` points into it: each holds an `Arc` of the memory it uses.
        let unmapped = unsafe { munmap(self.base.cast(), self.len) };
        debug_assert!(unmapped.is_ok());
        drop(self.grants.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no /proc")]
    fn what_guests_write_is_in_no_core_dump() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        for memory in [Memory::anonymous(8192).unwrap(), Memory::shared(&file, 8192).unwrap()] {
            // The flags of the mapping that has it, by its address (proc(5), VmFlags; dd: do not dump).
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let at = memory.base.addr().get();
            let has = |line: &str| {
                let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
                let bound = |text: &str| usize::from_str_radix(text, 16).ok();
                range.is_some_and(|(begin, end)| {
                    bound(begin) <= Some(at) && Some(at) < bound(end) && bound(begin).is_some()
                })
            };
            let flags = maps.lines().skip_while(|line| !has(line)).find_map(|line| line.strip_prefix("VmFlags:"));
            assert!(flags.unwrap().split_whitespace().any(|flag| flag == "dd"), "{flags:?}");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let memory = Memory::anonymous(1).unwrap();
        assert_eq!(memory.len(), PAGE_SIZE);
        memory.write(4090, &[1, 2, 3, 4, 5, 6]);
        assert_eq!(memory.read_once::<8>(4088), [0, 0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(memory.read_once::<8>(4084), [0, 0, 0, 0, 0, 0, 1, 2]);
        memory.write_once(4, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(memory.read_once::<16>(0), [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]);
        memory.zero(4091, 4);
        let mut tail = [9; 6];
        memory.read(4090, &mut tail);
        assert_eq!(tail, [1, 0, 0, 0, 0, 6]);
    }

    #[test]
    #[should_panic(expected = "beyond the mapping")]
    fn nothing_beyond_the_mapping_can_be_named() {
        Memory::anonymous(PAGE_SIZE).unwrap().zero(1, PAGE_SIZE);
    }

    #[test]
    #[should_panic(expected = "beyond the mapping")]
    fn an_offset_that_wraps_is_no_way_in() {
        Memory::anonymous(PAGE_SIZE).unwrap().zero(usize::MAX, 2);
    }
}
