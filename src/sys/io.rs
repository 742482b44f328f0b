//! One I/O as an engine gets it: an operation on a run of bytes of one file, and the pieces of memory that its data
//! goes to or comes from.
//!
//! An `Io` owns a share of the memory that it points into. Whoever has it in flight owns the `Io`, so memory can't go
//! before the kernel is done with it.

use std::io;
use std::sync::Arc;

use super::copy;
use super::memory::Memory;

/// The kernel's limit on the pieces of one vectored I/O (`UIO_MAXIOV`).
pub const MAX_IOVECS: usize = 1024;

/// The most I/Os in one system call.
pub(super) const BATCH_MAX: usize = 256;

/// Different memories that one I/O may point into. A frontend whose clients bring several takes no more of each: then all requests
/// fit.
pub const MAX_MEMORIES: usize = 32;

/// Index of a file that an engine has registered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileId(pub u16);

/// What an I/O does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoOp {
    /// File to memory.
    #[default]
    Read,
    /// Memory to file. With `fua` the data is on stable storage when it completes.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// All writes that completed before are on stable storage when it completes.
    Flush,
    /// Give the range's space back; it reads as zeros or as what it was.
    Discard,
    /// The range reads as zeros; with `unmap` its space may be given back.
    WriteZeroes {
        /// Whether the space may be given back.
        unmap: bool,
    },
    /// Which parts of the range have data. The memory gets native u64 words: lengths in bytes of runs that alternate
    /// between data and hole, data first (0 where the range begins with a hole), until the range or the memory
    /// ends; a 0 after the first ends them earlier.
    Status,
}

/// One I/O. Made at start, used again and again.
#[derive(Debug)]
pub struct Io {
    /// The owner's mark.
    pub tag: u32,
    /// What to do.
    pub op: IoOp,
    /// On which file.
    pub file: FileId,
    /// From which byte of the file.
    pub offset: u64,
    /// Bytes; for reads and writes also the sum of the pieces of memory.
    pub len: u64,
    /// Fail with EAGAIN rather than block.
    pub nowait: bool,
    /// For an engine around another one; 0 at the beginning.
    pub mark: u8,
    iovecs: Vec<libc::iovec>,
    /// First piece that is not wholly done.
    first: usize,
    /// What [`cut`](Io::cut) took off.
    off: Option<Cut>,
    memories: Vec<Arc<Memory>>,
    pub(super) iocb: super::aio::Iocb,
}

/// The end of an I/O, set aside.
#[derive(Clone, Copy, Debug)]
struct Cut {
    /// Bytes before it was cut.
    len: u64,
    /// Pieces up to and with the one that was shortened.
    end: usize,
    /// Bytes of that one before.
    last: usize,
}

// SAFETY: the pointers in `iovecs` are into `memories`, which are Send and Sync; those in `iocb` are used only while
// the `Io` is in flight and are made again at each submission.
unsafe impl Send for Io {}

impl Io {
    /// An I/O with room for `iovecs` pieces of memory, [`MAX_IOVECS`] at most. Boxed, because its address must not
    /// change while it is in flight.
    #[allow(clippy::unnecessary_box_returns)]
    pub fn new(tag: u32, iovecs: usize) -> Box<Io> {
        assert!((1..=MAX_IOVECS).contains(&iovecs));
        Box::new(Io {
            tag,
            op: IoOp::Read,
            file: FileId(0),
            offset: 0,
            len: 0,
            nowait: false,
            mark: 0,
            iovecs: Vec::with_capacity(iovecs),
            first: 0,
            off: None,
            memories: Vec::with_capacity(MAX_MEMORIES),
            iocb: super::aio::Iocb::default(),
        })
    }

    /// Memory of one with room for `iovecs` pieces, bytes.
    pub fn bytes(iovecs: usize) -> usize {
        size_of::<Io>() + iovecs * size_of::<libc::iovec>() + MAX_MEMORIES * size_of::<Arc<Memory>>()
    }

    /// Begins anew: no memory, no bytes.
    pub fn begin(&mut self, op: IoOp, file: FileId, offset: u64) {
        (self.op, self.file, self.offset, self.len, self.nowait, self.mark) = (op, file, offset, 0, false, 0);
        self.clear();
    }

    /// Lets go of the memory.
    pub fn clear(&mut self) {
        self.iovecs.clear();
        self.memories.clear();
        self.first = 0;
        self.off = None;
    }

    /// Pieces of memory that still fit.
    pub fn room(&self) -> usize {
        self.iovecs.capacity() - self.iovecs.len()
    }

    /// Whether pieces of all these `memories`, which are different, may be added.
    pub fn accepts(&self, memories: &[Arc<Memory>]) -> bool {
        let room = MAX_MEMORIES - self.memories.len();
        memories.len() <= room || memories.iter().filter(|memory| !self.has(memory)).count() <= room
    }

    fn has(&self, memory: &Arc<Memory>) -> bool {
        self.memories.iter().any(|mine| Arc::ptr_eq(mine, memory))
    }

    /// Adds `len` bytes at `offset` of `memory`. Panics where there is no room: the caller has asked.
    pub fn push(&mut self, memory: &Arc<Memory>, offset: usize, len: usize) {
        let base = memory.at(offset, len);
        if !self.has(memory) {
            assert!(self.memories.len() < MAX_MEMORIES);
            self.memories.push(Arc::clone(memory));
        }
        self.len += len as u64;
        match self.iovecs.last_mut() {
            // Two mappings may be neighbours by chance; one iovec over both is just as valid.
            Some(last) if std::ptr::eq(last.iov_base.cast::<u8>().wrapping_add(last.iov_len), base) => {
                last.iov_len += len;
            }
            _ => {
                assert!(self.room() > 0);
                self.iovecs.push(libc::iovec { iov_base: base.cast(), iov_len: len });
            }
        }
    }

    /// Drops the first `n` bytes, which are done. `n` is less than the length.
    pub fn advance(&mut self, n: u64) {
        assert!(n < self.len);
        self.offset += n;
        self.len -= n;
        let mut left = n as usize;
        for iovec in &mut self.iovecs[self.first..] {
            let step = left.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(step).cast();
            iovec.iov_len -= step;
            left -= step;
            if iovec.iov_len > 0 {
                break;
            }
            self.first += 1;
        }
    }

    /// Lets only the first `n` bytes be done, more than none and fewer than the length, until [`uncut`](Self::uncut).
    pub fn cut(&mut self, n: u64) {
        assert!(self.off.is_none() && n > 0 && n < self.len);
        let mut left = n as usize;
        let mut end = self.first;
        while left > self.iovecs[end].iov_len {
            left -= self.iovecs[end].iov_len;
            end += 1;
        }
        let last = std::mem::replace(&mut self.iovecs[end].iov_len, left);
        self.off = Some(Cut { len: self.len, end: end + 1, last });
        self.len = n;
    }

    /// Takes back what [`cut`](Self::cut) did, if it did anything.
    pub fn uncut(&mut self) {
        if let Some(cut) = self.off.take() {
            self.iovecs[cut.end - 1].iov_len = cut.last;
            self.len = cut.len;
        }
    }

    /// The pieces of memory that are not yet done.
    pub(super) fn iovecs(&self) -> &[libc::iovec] {
        let end = self.off.map_or(self.iovecs.len(), |cut| cut.end);
        &self.iovecs[self.first..end]
    }

    /// The only memory that it points into, and the only piece; none if there are several.
    pub(super) fn single(&self) -> Option<(&Arc<Memory>, libc::iovec)> {
        match (self.memories.as_slice(), self.iovecs()) {
            ([memory], [iovec]) => Some((memory, *iovec)),
            _ => None,
        }
    }

    /// Copies the bytes of `from` into the I/O's memory, as a read does; `from` has as many as the memory.
    pub fn fill(&self, from: &[u8]) {
        assert_eq!(from.len(), self.memory_len());
        self.put(from);
    }

    /// Copies `from`, or what fits of it, to the beginning of the I/O's memory.
    pub fn put(&self, mut from: &[u8]) {
        for iovec in self.iovecs() {
            let (now, rest) = from.split_at(iovec.iov_len.min(from.len()));
            // SAFETY: the iovec is within a memory that `self` keeps, and which nobody accesses but atomically.
            unsafe { copy::into(now, iovec.iov_base.cast()) };
            from = rest;
        }
    }

    /// Bytes of memory.
    pub fn memory_len(&self) -> usize {
        self.iovecs().iter().map(|iovec| iovec.iov_len).sum()
    }

    /// Copies the I/O's memory to `to`, as a write does; `to` has as many bytes.
    pub fn drain(&self, mut to: &mut [u8]) {
        assert_eq!(to.len(), self.memory_len());
        for iovec in self.iovecs() {
            let (now, rest) = to.split_at_mut(iovec.iov_len);
            // SAFETY: as in `put`, in the other direction.
            unsafe { copy::out(iovec.iov_base.cast(), now) };
            to = rest;
        }
    }
}

/// The system call's error, for the ones that have no wrapper.
pub(super) fn last_error() -> io::Error {
    io::Error::last_os_error()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(io: &Io) -> Vec<u8> {
        let mut to = vec![0; io.len as usize];
        io.drain(&mut to);
        to
    }

    #[test]
    fn neighbours_share_an_iovec_and_advance_drops_what_is_done() {
        let memory = Arc::new(Memory::anonymous(8192).unwrap());
        memory.write(0, b"abcdefgh");
        memory.write(4096, b"ijkl");
        let mut io = Io::new(0, 2);
        io.begin(IoOp::Write { fua: false }, FileId(0), 512);
        io.push(&memory, 0, 3);
        io.push(&memory, 3, 5);
        assert_eq!(io.room(), 1);
        io.push(&memory, 4096, 4);
        assert_eq!((io.len, io.room()), (12, 0));
        assert_eq!(bytes(&io), b"abcdefghijkl");
        io.advance(2);
        assert_eq!((io.offset, bytes(&io).as_slice()), (514, &b"cdefghijkl"[..]));
        io.advance(6);
        assert_eq!(bytes(&io), b"ijkl");
        io.advance(3);
        assert_eq!((io.offset, bytes(&io).as_slice()), (523, &b"l"[..]));
        io.fill(b"L");
        assert_eq!(memory.read_once::<4>(4096), *b"ijkL");
    }

    #[test]
    fn what_is_cut_off_comes_back() {
        let memory = Arc::new(Memory::anonymous(12288).unwrap());
        memory.write(0, b"abcdefgh");
        memory.write(4096, b"ijkl");
        memory.write(8192, b"mn");
        let mut io = Io::new(0, 3);
        io.begin(IoOp::Write { fua: false }, FileId(0), 0);
        io.push(&memory, 0, 8);
        io.push(&memory, 4096, 4);
        io.push(&memory, 8192, 2);
        for (n, expected) in [(1, &b"a"[..]), (8, b"abcdefgh"), (10, b"abcdefghij"), (13, b"abcdefghijklm")] {
            io.cut(n);
            assert_eq!((io.len, bytes(&io).as_slice()), (n, expected));
            io.uncut();
            assert_eq!((io.len, bytes(&io).as_slice()), (14, &b"abcdefghijklmn"[..]));
        }
        io.advance(9);
        io.cut(2);
        assert_eq!(bytes(&io), b"jk");
        io.uncut();
        io.uncut();
        assert_eq!(bytes(&io), b"jklmn");
    }

    #[test]
    fn an_io_keeps_its_memory() {
        let memory = Arc::new(Memory::anonymous(4096).unwrap());
        let mut io = Io::new(0, 1);
        io.begin(IoOp::Read, FileId(0), 0);
        io.push(&memory, 0, 512);
        assert_eq!(Arc::strong_count(&memory), 2);
        io.clear();
        assert_eq!(Arc::strong_count(&memory), 1);
    }
}
