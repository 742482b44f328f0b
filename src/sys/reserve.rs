//! Memory that is kept for when there is no more: where the system gives none (RLIMIT_AS, RLIMIT_DATA, the host's limit of what is
//! committed), a small allocation takes it from there, instead of being the end of the process and of all its disks.
//!
//! Rust's collections end the process where an allocation fails. What a client brings is made in many small ones: tables, names, lines
//! of the log, answers. Each could be asked for in a way that fails, but for those of the standard library and of other crates, such as
//! JSON's. So what is small takes from the reserve, and what is large is asked for in a way that fails ([`room`], `try_reserve`, `mmap`).
//! As long as the reserve is spent, nobody is let in: [`room`] says so. So what is left of it is for those who are.
//!
//! It is a mapping of its own, and spent as a whole: the allocator finds the addresses free then, and takes as it needs. A program has it by
//! naming [`Reserve`] as its `global_allocator`, and calling [`keep`].

use std::alloc::{GlobalAlloc, Layout, System};
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use libc::c_void;
use nix::errno::Errno;

/// Bytes that are kept. The C library takes 132 KiB at least when it takes any.
const BYTES: usize = 512 << 10;
/// What is larger does not take from it.
const SMALL: usize = BYTES / 4;

/// Whether it is to be there.
static WANTED: AtomicBool = AtomicBool::new(false);
/// Where it is. Null: it is spent, or was never there. Who changes it has it [`Held`].
static KEPT: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
/// Whether some thread changes the reserve.
static HELD: AtomicBool = AtomicBool::new(false);

/// The right to change the reserve, which one thread has at a time. What is done meanwhile is a system call or two, and one question to the system's
/// allocator, which asks for nothing here: who wants it looks again and again. A mutex of the standard library's would panic where it is poisoned.
struct Held;

impl Held {
    fn new() -> Held {
        while HELD.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            std::thread::yield_now();
        }
        Held
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.store(false, Ordering::Release);
    }
}

/// The system's allocator, with the reserve behind it.
#[derive(Debug)]
pub struct Reserve;

// SAFETY: all is done by the system's allocator, which is asked once more at most.
unsafe impl GlobalAlloc for Reserve {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: what the caller promises is what the system's allocator asks for.
        or_spend(layout.size(), || unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        or_spend(layout.size(), || unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above; all blocks are the system's.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above; a block that could not grow is as it was, so that it can be tried again.
        or_spend(size, || unsafe { System.realloc(block, layout, size) })
    }
}

/// Asks; where there is nothing, spends the reserve, and asks again. Another thread may have spent it meanwhile: then its memory is free by now. None
/// keeps it anew before this one has got what it asks for.
fn or_spend(size: usize, ask: impl Fn() -> *mut u8) -> *mut u8 {
    let block = ask();
    if !block.is_null() || size > SMALL || !WANTED.load(Ordering::Relaxed) {
        return block;
    }
    let _held = Held::new();
    let kept = KEPT.swap(ptr::null_mut(), Ordering::AcqRel);
    if !kept.is_null() {
        unmap(kept, BYTES);
    }
    ask()
}

/// A mapping that counts, and has no page: where all memory to come is locked (MCL_FUTURE, mlockall(2)), the kernel would find the pages at once, and the
/// main loop wait for them.
fn map(len: usize) -> io::Result<*mut c_void> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, which overlaps nothing.
    let at = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping just made, which nobody else knows of. Where it is not locked, munlock(2) changes nothing.
    let writable =
        unsafe { libc::munlock(at, len) == 0 && libc::mprotect(at, len, libc::PROT_READ | libc::PROT_WRITE) == 0 };
    if writable {
        return Ok(at);
    }
    let error = io::Error::last_os_error();
    unmap(at, len);
    Err(error)
}

/// Of a mapping that [`map`] has made, and nobody has a pointer into.
fn unmap(at: *mut c_void, len: usize) {
    // SAFETY: as above. It can't fail for a whole mapping.
    unsafe { libc::munmap(at, len) };
}

/// Gives the pages of such a mapping back, which it has where all memory is locked. What the reserve keeps is what the system counts and limits,
/// and that is the mapping.
fn give_pages_back(at: *mut c_void, len: usize) {
    // SAFETY: the mapping is ours, and nobody has a pointer into it. Where it can't be, the pages stay.
    unsafe {
        if libc::munlock(at, len) == 0 {
            libc::madvise(at, len, libc::MADV_DONTNEED);
        }
    }
}

/// The reserve takes no pages: after all memory was locked, to be said again. Who has to spend it waits for that moment.
pub fn stay_empty() {
    let _held = Held::new();
    let kept = KEPT.load(Ordering::Acquire);
    if !kept.is_null() {
        give_pages_back(kept, BYTES);
    }
}

/// Keeps the reserve, from now on; again, where it was spent. False: there is no memory for it.
pub fn keep() -> bool {
    WANTED.store(true, Ordering::Relaxed);
    is_kept() || restore()
}

/// Whether it is there, or nobody wants it.
pub fn is_kept() -> bool {
    !WANTED.load(Ordering::Relaxed) || !KEPT.load(Ordering::Acquire).is_null()
}

fn restore() -> bool {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes an integer only. What was freed goes back to the system, which gives it to the reserve.
    unsafe {
        libc::malloc_trim(0);
    }
    let _held = Held::new();
    if KEPT.load(Ordering::Acquire).is_null() {
        let Ok(at) = map(BYTES) else { return false };
        KEPT.store(at, Ordering::Release);
    }
    true
}

/// Whether somebody may be let in, or something begun, that takes so many bytes beyond what is asked for in a way that fails: the reserve is
/// there, and so much memory beside it, now.
pub fn room(bytes: usize) -> io::Result<()> {
    if !is_kept() && !restore() {
        return Err(Errno::ENOMEM.into());
    }
    if bytes > 0 && WANTED.load(Ordering::Relaxed) {
        unmap(map(bytes)?, bytes);
    }
    Ok(())
}

/// Bytes that a thread takes beside its stack: what guards that, and the stack of its signals.
const BESIDE_STACK: usize = 64 << 10;
/// Bytes that others, such as clients that connect, may take between the question and the thread's first moment.
const OF_OTHERS: usize = 16 << 20;

/// Whether a thread with so much stack can be started. One that can't have the stack of its signals would be the end of the process: the
/// standard library panics. So there has to be more, unless the thread is to be had `at_any_price`.
pub fn room_for_thread(stack: usize, at_any_price: bool) -> io::Result<()> {
    room(stack + BESIDE_STACK + if at_any_price { 0 } else { OF_OTHERS })
}

#[cfg(test)]
mod tests {
    use nix::sys::mman::{MlockAllFlags, mlockall, munlockall};

    use super::*;

    /// In a process of its own, as nextest has it.
    #[test]
    #[cfg_attr(miri, ignore = "Miri locks no memory")]
    fn to_look_for_room_waits_for_no_page() {
        const LEN: usize = 16 << 20;
        if mlockall(MlockAllFlags::MCL_FUTURE).is_err() {
            return;
        }
        let resident = || crate::memory::of_process().0;
        let was = resident();
        let at = map(LEN).unwrap();
        let is = resident();
        unmap(at, LEN);
        munlockall().unwrap();
        assert!(is < was + LEN as u64 / 4, "{was} {is}");
    }

    /// As where nothing is left but the reserve: there is something as long as that is spent.
    #[test]
    #[cfg_attr(miri, ignore = "Miri has no mincore")]
    fn who_spends_the_reserve_gets_memory_whatever_other_threads_do_with_it() {
        let nothing = AtomicBool::new(false);
        let left = std::sync::atomic::AtomicUsize::new(4);
        let was = AtomicPtr::new(ptr::null_mut());
        std::thread::scope(|scope| {
            for _ in 0..left.load(Ordering::Relaxed) {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let block = or_spend(1, || {
                            // The other threads get their chance.
                            std::thread::yield_now();
                            let mut page = 0;
                            // SAFETY: there is a byte for the page that is asked about.
                            let mapped = unsafe { libc::mincore(was.load(Ordering::Acquire), 1, &raw mut page) } == 0;
                            if mapped || !KEPT.load(Ordering::Acquire).is_null() {
                                ptr::null_mut()
                            } else {
                                ptr::dangling_mut()
                            }
                        });
                        nothing.fetch_or(block.is_null(), Ordering::Relaxed);
                    }
                    left.fetch_sub(1, Ordering::Relaxed);
                });
            }
            while left.load(Ordering::Relaxed) > 0 {
                keep();
                let kept = KEPT.load(Ordering::Acquire);
                if !kept.is_null() {
                    was.store(kept, Ordering::Release);
                }
                stay_empty();
            }
        });
        assert!(!nothing.load(Ordering::Relaxed), "a thread got nothing although the reserve was spent for it");
    }

    fn resident(at: *mut c_void, len: usize) -> usize {
        let mut pages = vec![0_u8; len / 4096];
        // SAFETY: there is a byte for each page of the mapping.
        let done = unsafe { libc::mincore(at, len, pages.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        pages.iter().filter(|page| **page & 1 != 0).count()
    }

    #[test]
    fn the_reserve_takes_no_pages_though_all_memory_is_locked() {
        let at = map(BYTES).unwrap();
        // SAFETY: the mapping is writable, and nobody else's; what is locked has its pages. Where a limit forbids it, they come by the write.
        unsafe {
            let _ = libc::mlock(at, BYTES);
            at.cast::<u8>().write_bytes(1, BYTES);
        }
        assert_eq!(resident(at, BYTES), BYTES / 4096);
        give_pages_back(at, BYTES);
        assert_eq!(resident(at, BYTES), 0);
        unmap(at, BYTES);
    }
}
