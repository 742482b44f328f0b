//! Room for new blocks, at the end of the file.

use crate::SECTOR_SIZE;
use crate::vhd::SECTORS_MAX;
use crate::vhd::layout::{DATA_ALIGN, aligned};

/// What is being done about the file's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Growing {
    No,
    /// It is to become as large as this, bytes.
    Wanted(u64),
    /// It is becoming that.
    Extending(u64),
    /// It is, and that is to be made durable.
    Flush(u64),
    /// That is being done.
    Flushing(u64),
    /// It does not: there is no space.
    Failed,
    /// It can't be made durable.
    FlushFailed,
}

/// The end of an image.
#[derive(Debug)]
pub(super) struct Space {
    /// Where the next block can begin.
    pub(super) end: u64,
    /// Bytes of the file that blocks can have.
    usable: u64,
    /// Bytes behind them that stay zeros, the place of a footer. A guest that had its data there could write a footer of its own,
    /// which after a crash would be taken for the image's.
    tail: u64,
    /// Bytes that it can have.
    limit: u64,
    /// Bytes that it grows by.
    step: u64,
    /// Bytes that the next block takes with all before it: if the file can't grow by a step, it grows to that.
    least: u64,
    /// All of those get their blocks of the file system at once, rather than when they are written.
    preallocate: bool,
    pub(super) growing: Growing,
}

/// Whether there is room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// Here, in bytes.
    At(u64),
    /// As soon as the file has grown.
    Soon,
    /// No.
    None,
    /// There may be, and the file's growth can't be made durable.
    Failed,
}

impl Space {
    /// Of a file of `size` bytes, of which those from `end` on are free, but for `tail` at its end; it grows by `step` bytes at a
    /// time, to `limit`.
    pub(super) fn new(end: u64, size: u64, tail: u64, limit: u64, step: u64, preallocate: bool) -> Space {
        Space {
            end,
            usable: size.saturating_sub(tail),
            tail,
            limit,
            step,
            least: 0,
            preallocate,
            growing: Growing::No,
        }
    }

    /// Takes room for a bitmap and its block, `len` bytes together.
    pub(super) fn take(&mut self, bitmap_len: u64, len: u64) -> Room {
        let at = aligned(self.end, bitmap_len);
        let end = at + len;
        if end > self.limit || at / SECTOR_SIZE >= SECTORS_MAX {
            return Room::None;
        }
        if end > self.usable {
            match self.growing {
                Growing::Failed => {
                    self.growing = Growing::No;
                    return Room::None;
                }
                Growing::FlushFailed => {
                    self.growing = Growing::No;
                    return Room::Failed;
                }
                _ => {}
            }
            self.want(end);
            return Room::Soon;
        }
        self.end = end;
        // The next ones need not wait.
        if self.usable - end < self.step / 2 && self.usable < self.limit && self.growing == Growing::No {
            self.want(end + len);
        }
        Room::At(at)
    }

    fn want(&mut self, least: u64) {
        if self.growing == Growing::No {
            self.least = least.max(self.usable);
            self.growing = Growing::Wanted(self.size(self.step));
        }
    }

    /// Bytes of the file with what is wanted at least, and so many more.
    fn size(&self, more: u64) -> u64 {
        (self.least + self.tail + more).next_multiple_of(DATA_ALIGN).min(self.limit)
    }

    /// What is to be zeros so that the file grows: offset and length in bytes.
    pub(super) fn extend(&mut self) -> Option<(u64, u64)> {
        let Growing::Wanted(size) = self.growing else { return None };
        self.growing = Growing::Extending(size);
        // Without preallocation a hole, with something at its end that makes the file as large.
        let from = if self.preallocate { self.usable } else { self.usable.max(size.saturating_sub(DATA_ALIGN)) };
        Some((from, size - from))
    }

    pub(super) fn extended(&mut self, done: bool) {
        let Growing::Extending(size) = self.growing else { return };
        let least = self.size(0);
        self.growing = match done {
            // What the table points to, and the zeros at the end, are there also after a crash.
            true => Growing::Flush(size),
            // There is no room, or a limit of file sizes, for all of that.
            false if least < size => Growing::Wanted(least),
            false => Growing::Failed,
        };
    }

    /// Whether a flush is wanted. It is the one that begins now.
    pub(super) fn flush(&mut self) -> bool {
        let Growing::Flush(size) = self.growing else { return false };
        self.growing = Growing::Flushing(size);
        true
    }

    pub(super) fn flushed(&mut self, done: bool) {
        let Growing::Flushing(size) = self.growing else { return };
        if done {
            (self.usable, self.growing) = (size - self.tail, Growing::No);
        } else {
            self.growing = Growing::FlushFailed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_their_data_at_a_page_and_the_file_grows_ahead() {
        let mut space = Space::new(2048, 2560, 512, 1 << 30, 8 << 20, false);
        let take = |space: &mut Space| space.take(512, 512 + (2 << 20));
        assert_eq!(take(&mut space), Room::Soon);
        let (at, len) = space.extend().unwrap();
        assert_eq!((at + len, len), ((2 << 20) + 8192 + (8 << 20), 4096));
        space.extended(true);
        assert_eq!(take(&mut space), Room::Soon);
        assert!(space.flush());
        space.flushed(true);
        assert_eq!(take(&mut space), Room::At(3584));
        assert_eq!(space.end, 4096 + (2 << 20));
        assert_eq!(take(&mut space), Room::At(4096 + (2 << 20) + 4096 - 512));
        assert_eq!(space.growing, Growing::No);
        take(&mut space);
        assert!(matches!(space.growing, Growing::Wanted(_)), "half of it is used");
        let (at, len) = space.extend().unwrap();
        space.extended(false);
        let (less_at, less) = space.extend().unwrap();
        assert!(at + len - (less_at + less) == 8 << 20, "one block, and nothing ahead");
        space.extended(false);
        assert!(matches!(take(&mut space), Room::At(_)), "there is room left");
        assert_eq!((take(&mut space), take(&mut space)), (Room::None, Room::Soon), "it is tried again");
    }

    #[test]
    fn the_end_of_a_file_is_never_a_blocks() {
        for preallocate in [false, true] {
            let mut space = Space::new(2048, 2560, 512, 1 << 40, 1 << 20, preallocate);
            let mut size = 2560;
            for _ in 0..50 {
                match space.take(512, 512 + (2 << 20)) {
                    Room::At(at) => assert!(at + 512 + (2 << 20) + 512 <= size),
                    room => assert_eq!(room, Room::Soon),
                }
                if let Some((at, len)) = space.extend() {
                    size = at + len;
                    space.extended(true);
                    assert!(space.flush());
                    space.flushed(true);
                }
            }
            assert!(space.end > 40 << 20);
        }
    }

    #[test]
    fn a_device_and_a_table_have_an_end() {
        let mut space = Space::new(512, 3 << 20, 0, 3 << 20, 1 << 20, false);
        assert_eq!(space.take(512, 512 + (2 << 20)), Room::At(3584));
        assert_eq!(space.take(512, 512 + (2 << 20)), Room::None);
        let end = SECTORS_MAX * SECTOR_SIZE - 4096;
        let mut space = Space::new(end, u64::MAX, 0, u64::MAX, 1 << 20, false);
        assert!(matches!(space.take(512, 4096 + 512), Room::At(_)));
        assert_eq!(space.take(512, 4096 + 512), Room::None);
    }
}
