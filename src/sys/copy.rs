//! Copies from and to memory that others may write at the same moment: guests, clients, and threads of ours.
//!
//! A plain copy of such memory is a data race, whatever the bytes are good for afterwards, and one with volatile accesses is too
//! ([`std::ptr::read_volatile`]). So this side is only accessed with atomic words, relaxed: what another writes meanwhile
//! comes old or new, word by word, and is at worst nonsense that the copy's checks find. Words are of eight bytes where
//! the address lets them be, and of one at both ends. Nothing else accesses such memory, but for the ring indices.
//!
//! What is long is copied by an instruction of the processor, where it has one: as fast as memcpy(3), and a third to a
//! half of the time that words take. To the compiler that is no plain access but something that it can't look into; it does
//! what one atomic access for each byte would do.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

const WORD: usize = size_of::<u64>();
/// Words between two looks at how far it is.
const STRIDE: usize = 8;

/// From so many bytes on the processor's own instructions are faster than words.
const LONG: usize = 512;

/// The processor's instructions; false where there are none.
#[cfg(all(target_arch = "x86_64", not(miri)))]
mod long {
    use std::arch::asm;

    /// # Safety
    ///
    /// `from` and `to` are valid for `len` bytes that do not overlap.
    pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) -> bool {
        // SAFETY: reads and writes these bytes once each, and nothing else; the direction flag is clear, as it always is here.
        unsafe {
            asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags));
        }
        true
    }

    /// # Safety
    ///
    /// `to` is valid for `len` bytes.
    pub(super) unsafe fn zero(to: *mut u8, len: usize) -> bool {
        // SAFETY: as in `copy`.
        unsafe {
            asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") 0_u8, options(nostack, preserves_flags));
        }
        true
    }
}

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
mod long {
    pub(super) unsafe fn copy(_: *const u8, _: *mut u8, _: usize) -> bool {
        false
    }

    pub(super) unsafe fn zero(_: *mut u8, _: usize) -> bool {
        false
    }
}

/// Copies `to.len()` bytes from `from` out.
///
/// # Safety
///
/// `from` is valid for reads of so many bytes, and they are only accessed atomically, or by others than this program.
#[inline]
pub(super) unsafe fn out(from: *const u8, to: &mut [u8]) {
    // SAFETY: the caller's; `to` is ours alone.
    if to.len() >= LONG && unsafe { long::copy(from, to.as_mut_ptr(), to.len()) } {
        return;
    }
    let from = from.cast_mut();
    // SAFETY: the caller's, for each index below the length.
    let byte = |at: usize| unsafe { AtomicU8::from_ptr(from.add(at)) }.load(Relaxed);
    // SAFETY: the same; and it is called for multiples of a word from an aligned address on.
    let word = |at: usize| unsafe { AtomicU64::from_ptr(from.add(at).cast()) }.load(Relaxed).to_ne_bytes();
    let mut at = from.align_offset(WORD).min(to.len());
    let (head, rest) = to.split_at_mut(at);
    head.iter_mut().enumerate().for_each(|(i, to)| *to = byte(i));
    let (strides, rest) = rest.as_chunks_mut::<{ STRIDE * WORD }>();
    for stride in strides {
        let (words, _) = stride.as_chunks_mut::<WORD>();
        (0..STRIDE).for_each(|i| words[i] = word(at + i * WORD));
        at += STRIDE * WORD;
    }
    let (words, tail) = rest.as_chunks_mut::<WORD>();
    for to in words {
        *to = word(at);
        at += WORD;
    }
    tail.iter_mut().enumerate().for_each(|(i, to)| *to = byte(at + i));
}

/// Copies `from` to `to`.
///
/// # Safety
///
/// `to` is valid for writes of so many bytes, and they are only accessed atomically, or by others than this program.
#[inline]
pub(super) unsafe fn into(from: &[u8], to: *mut u8) {
    // SAFETY: the caller's; nobody writes `from`.
    if from.len() >= LONG && unsafe { long::copy(from.as_ptr(), to, from.len()) } {
        return;
    }
    // SAFETY: the caller's, for each index below the length.
    let byte = |at: usize, value| unsafe { AtomicU8::from_ptr(to.add(at)) }.store(value, Relaxed);
    let word = |at: usize, value| {
        // SAFETY: the same; and it is called for multiples of a word from an aligned address on.
        unsafe { AtomicU64::from_ptr(to.add(at).cast()) }.store(u64::from_ne_bytes(value), Relaxed);
    };
    let mut at = to.align_offset(WORD).min(from.len());
    let (head, rest) = from.split_at(at);
    head.iter().enumerate().for_each(|(i, value)| byte(i, *value));
    let (strides, rest) = rest.as_chunks::<{ STRIDE * WORD }>();
    for stride in strides {
        let (words, _) = stride.as_chunks::<WORD>();
        (0..STRIDE).for_each(|i| word(at + i * WORD, words[i]));
        at += STRIDE * WORD;
    }
    let (words, tail) = rest.as_chunks::<WORD>();
    for value in words {
        word(at, *value);
        at += WORD;
    }
    tail.iter().enumerate().for_each(|(i, value)| byte(at + i, *value));
}

/// Zeroes `len` bytes at `to`.
///
/// # Safety
///
/// As of [`into`].
pub(super) unsafe fn zero(mut to: *mut u8, mut len: usize) {
    static NOTHING: [u8; 4096] = [0; 4096];
    // SAFETY: the caller's.
    if len >= LONG && unsafe { long::zero(to, len) } {
        return;
    }
    while len > 0 {
        let now = len.min(NOTHING.len());
        // SAFETY: the caller's: `now` is no more than is left.
        unsafe {
            into(&NOTHING[..now], to);
            to = to.add(now);
        }
        len -= now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that no reference is made to, from a word's begin on.
    struct Shared(Vec<u64>);

    impl Shared {
        fn new(words: usize) -> Shared {
            Shared(vec![u64::from_ne_bytes([0xee; 8]); words])
        }

        fn at(&mut self, offset: usize) -> *mut u8 {
            self.0.as_mut_ptr().cast::<u8>().wrapping_add(offset)
        }
    }

    #[test]
    fn every_length_at_every_offset_is_copied_and_nothing_beside_it() {
        let pattern: Vec<u8> = (0..9000_u32).map(|i| (i % 251) as u8).collect();
        let lengths = (0..40).chain(60..70).chain(124..=140).chain([LONG - 1, LONG, LONG + 9, 9000]);
        let lengths = lengths.filter(|len| !cfg!(miri) || *len < LONG);
        for (offset, len) in (0..9).flat_map(|offset| lengths.clone().map(move |len| (offset, len))) {
            let words = len / 8 + 4;
            let mut shared = Shared::new(words);
            let to = shared.at(offset);
            let mut all = vec![0; words * 8];
            // SAFETY: offset and length are within it, and nobody else has it.
            unsafe { into(&pattern[..len], to) };
            let from = shared.at(0);
            // SAFETY: the same.
            unsafe { out(from, &mut all) };
            let mut expected = vec![0xee; words * 8];
            expected[offset..offset + len].copy_from_slice(&pattern[..len]);
            assert_eq!(all, expected, "{len} at {offset}");
            let mut copy = vec![0; len];
            let from = shared.at(offset);
            // SAFETY: the same.
            unsafe { out(from, &mut copy) };
            assert_eq!(copy, pattern[..len], "{len} at {offset}");
            let to = shared.at(offset);
            // SAFETY: the same.
            unsafe { zero(to, len) };
            let from = shared.at(0);
            // SAFETY: the same.
            unsafe { out(from, &mut all) };
            expected[offset..offset + len].fill(0);
            assert_eq!(all, expected, "{len} at {offset}");
        }
    }

    /// For Miri, which finds a race of plain copies in any order of events.
    #[test]
    fn two_threads_may_copy_at_the_same_moment() {
        const LEN: usize = 100;
        struct Pointer(*mut u8);
        // SAFETY: what is behind it is accessed by the copies of this module only.
        unsafe impl Sync for Pointer {}
        impl Pointer {
            fn write(&self) {
                // SAFETY: valid until the scope has ended.
                unsafe {
                    into(&[7; LEN], self.0);
                    zero(self.0, LEN);
                }
            }
            fn read(&self) {
                let mut copy = [1; LEN];
                // SAFETY: the same.
                unsafe { out(self.0, &mut copy) };
                assert!(copy.iter().all(|byte| [0, 7].contains(byte)));
            }
        }
        let mut shared = Shared::new(14);
        // SAFETY: within it.
        unsafe { zero(shared.at(0), 14 * 8) };
        let pointer = Pointer(shared.at(3));
        std::thread::scope(|scope| {
            scope.spawn(|| (0..10).for_each(|_| pointer.write()));
            scope.spawn(|| (0..10).for_each(|_| pointer.read()));
        });
    }
}
