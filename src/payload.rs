//! Payload memory that is ours: one mapping, made at the start or when a client connects, of which runs of pages are lent
//! out.

use std::io;
use std::sync::Arc;

use crate::sys::memory::{Memory, PAGE_SIZE};

/// Pages that are lent out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    first: usize,
    pages: usize,
}

impl Run {
    /// Its first byte in the memory.
    pub fn offset(self) -> usize {
        self.first * PAGE_SIZE
    }
}

/// The memory and which of its pages are lent out.
#[derive(Debug)]
pub struct Arena {
    memory: Arc<Memory>,
    used: Box<[bool]>,
    free: usize,
    /// No page before this one is free.
    from: usize,
}

impl Arena {
    /// `bytes` of memory, rounded up to pages.
    pub fn new(bytes: usize) -> io::Result<Arena> {
        let memory = Arc::new(Memory::anonymous(bytes)?);
        let pages = memory.len() / PAGE_SIZE;
        Ok(Arena { memory, used: vec![false; pages].into(), free: pages, from: 0 })
    }

    /// The memory of all runs.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The first run of free pages that has `bytes`.
    pub fn alloc(&mut self, bytes: usize) -> Option<Run> {
        let pages = bytes.div_ceil(PAGE_SIZE);
        if pages > self.free {
            return None;
        }
        let mut length = 0;
        for page in self.from..self.used.len() {
            length = if self.used[page] { 0 } else { length + 1 };
            if length == pages {
                let first = page + 1 - pages;
                self.used[first..=page].fill(true);
                self.free -= pages;
                if first == self.from {
                    self.from = page + 1;
                }
                return Some(Run { first, pages });
            }
        }
        None
    }

    /// Takes a run back.
    pub fn free(&mut self, run: Run) {
        let Run { first, pages: count } = run;
        let pages = &mut self.used[first..first + count];
        debug_assert!(pages.iter().all(|used| *used), "a run is given back twice");
        pages.fill(false);
        self.free += count;
        self.from = self.from.min(first);
    }

    /// Bytes that are lent out.
    pub fn lent(&self) -> usize {
        (self.used.len() - self.free) * PAGE_SIZE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_gap_that_fits_is_taken_and_no_page_twice() {
        let mut arena = Arena::new(8 * PAGE_SIZE).unwrap();
        let at = |page| Run { first: page, pages: 0 }.offset();
        let [a, b, c] = [1, 4097, 4096 * 3].map(|bytes| arena.alloc(bytes).unwrap());
        assert_eq!([a, b, c].map(Run::offset), [at(0), at(1), at(3)]);
        assert_eq!(arena.lent(), 6 * PAGE_SIZE);
        arena.free(b);
        assert_eq!(arena.alloc(3 * 4096), None);
        let d = arena.alloc(4096).unwrap();
        assert_eq!(d.offset(), at(1));
        let e = arena.alloc(2 * 4096).unwrap();
        assert_eq!(e.offset(), at(6));
        assert_eq!(arena.alloc(4096).unwrap().offset(), at(2));
        assert_eq!(arena.alloc(1), None);
    }

    #[test]
    fn all_comes_back() {
        let mut arena = Arena::new(64 * PAGE_SIZE).unwrap();
        let mut runs = Vec::new();
        let mut random: u32 = 1;
        // Miri takes its time.
        for _ in 0..if cfg!(miri) { 500 } else { 10_000 } {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            match arena.alloc((random >> 16) as usize % 40_000 + 1) {
                Some(run) => runs.push(run),
                None => arena.free(runs.swap_remove((random >> 8) as usize % runs.len())),
            }
        }
        let mut pages: Vec<usize> = runs.iter().flat_map(|run| run.first..run.first + run.pages).collect();
        assert_eq!(pages.len() * PAGE_SIZE, arena.lent());
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(pages.len() * PAGE_SIZE, arena.lent());
        runs.drain(..).for_each(|run| arena.free(run));
        assert_eq!(arena.alloc(64 * 4096), Some(Run { first: 0, pages: 64 }));
    }
}
