//! The blkif protocol (Xen's public header `io/blkif.h`): ring entries, the ring, and what a request means.
//!
//! Nothing here knows where the pages come from: the local ring has them in a memfd, Xen grants them.

pub mod queue;
pub mod ring;
pub mod wire;

use nix::errno::Errno;

use self::wire::{
    DISCARD_SECURE, Entry, MAX_SEGMENTS, OP_DISCARD, OP_FLUSH_DISKCACHE, OP_INDIRECT, OP_READ, OP_WRITE,
    OP_WRITE_BARRIER, RSP_EOPNOTSUPP, RSP_ERROR, RSP_OKAY, SEGMENT_SIZE, SEGMENTS_PER_PAGE, Segment,
};
use crate::request::Op;
use crate::sys::memory::PAGE_SIZE;

/// What a ring entry asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// What.
    pub op: Op,
    /// First byte of the disk.
    pub offset: u64,
    /// Bytes; for reads and writes the sum of the segments.
    pub len: u64,
}

/// The operation that the response must name: of an indirect request the inner one, or newer frontends disable the
/// disk.
pub fn response_operation(entry: &Entry) -> u8 {
    if entry.operation() == OP_INDIRECT { entry.indirect_operation() } else { entry.operation() }
}

/// The status that tells `result`. A frontend takes EOPNOTSUPP to mean that it must not ask again.
pub fn status(result: Result<(), Errno>) -> i16 {
    match result {
        Ok(()) => RSP_OKAY,
        Err(Errno::EOPNOTSUPP) => RSP_EOPNOTSUPP,
        Err(_) => RSP_ERROR,
    }
}

/// Takes an entry apart. `read_page` copies an indirect page; it gives false for a page that the client does not have.
/// The segments go to `segments`. An error is the response's status.
pub fn parse(
    entry: &Entry,
    max_indirect: usize,
    sector_size: u32,
    segments: &mut Vec<Segment>,
    mut read_page: impl FnMut(u32, &mut [u8]) -> bool,
) -> Result<Command, i16> {
    segments.clear();
    let op = match response_operation(entry) {
        OP_READ => Op::Read,
        OP_WRITE => Op::Write { fua: false },
        OP_WRITE_BARRIER if entry.operation() != OP_INDIRECT => Op::Barrier,
        OP_FLUSH_DISKCACHE if entry.operation() != OP_INDIRECT => Op::Flush,
        OP_DISCARD if entry.operation() != OP_INDIRECT => Op::Discard,
        // An indirect request for anything but a read or a write is malformed, not unsupported.
        _ if entry.operation() == OP_INDIRECT => return Err(RSP_ERROR),
        _ => return Err(RSP_EOPNOTSUPP),
    };
    let offset = entry.sector().checked_mul(drivers::SECTOR_SIZE).ok_or(RSP_ERROR);
    if op == Op::Discard {
        if entry.discard_flag() & DISCARD_SECURE != 0 {
            return Err(RSP_EOPNOTSUPP);
        }
        let len = entry.discard_sectors().checked_mul(drivers::SECTOR_SIZE).ok_or(RSP_ERROR)?;
        return Ok(Command { op, offset: offset?, len });
    }
    if entry.operation() == OP_INDIRECT {
        indirect_segments(entry, max_indirect, segments, &mut read_page)?;
    } else {
        let count = entry.segment_count();
        if count > MAX_SEGMENTS {
            return Err(RSP_ERROR);
        }
        segments.extend((0..count).map(|i| entry.segment(i)));
    }
    if op == Op::Flush {
        // Linux sends no data with a flush; what a client may send all the same has no meaning.
        segments.clear();
    }
    if segments.is_empty() && !matches!(op, Op::Flush | Op::Barrier) {
        return Err(RSP_ERROR);
    }
    // Of 512-byte sectors, in one of the disk's: a power of two.
    let within_sector = (u64::from(sector_size) / drivers::SECTOR_SIZE) as u8 - 1;
    let mut len = 0;
    for segment in &*segments {
        let (first, last) = (segment.first_sect, segment.last_sect);
        if first > last || last > 7 || (first | (last + 1)) & within_sector != 0 {
            return Err(RSP_ERROR);
        }
        len += u64::from(last - first + 1) * drivers::SECTOR_SIZE;
    }
    // Where there is no data there is no place: Linux says sector -1 in a flush.
    let offset = if segments.is_empty() { 0 } else { offset? };
    Ok(Command { op, offset, len })
}

fn indirect_segments(
    entry: &Entry,
    max: usize,
    segments: &mut Vec<Segment>,
    read_page: &mut impl FnMut(u32, &mut [u8]) -> bool,
) -> Result<(), i16> {
    let count = entry.indirect_count();
    if count == 0 || count > max {
        return Err(RSP_ERROR);
    }
    let mut copy = [0; PAGE_SIZE];
    for page in 0..count.div_ceil(SEGMENTS_PER_PAGE) {
        let here = (count - page * SEGMENTS_PER_PAGE).min(SEGMENTS_PER_PAGE) * SEGMENT_SIZE;
        if !read_page(entry.indirect_page(page), &mut copy[..here]) {
            return Err(RSP_ERROR);
        }
        let (chunks, _) = copy[..here].as_chunks::<SEGMENT_SIZE>();
        segments.extend(chunks.iter().map(|bytes| Segment::from_bytes(*bytes)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::wire::Abi;
    use super::*;

    #[test]
    fn a_flush_and_an_empty_barrier_are_nowhere_and_all_else_is_somewhere() {
        let parse = |operation| {
            let entry = Entry::new(Abi::X86_64, operation, 1).with_sector(u64::MAX);
            parse(&entry, 8, 512, &mut Vec::new(), |_, _| false)
        };
        assert_eq!(parse(OP_FLUSH_DISKCACHE), Ok(Command { op: Op::Flush, offset: 0, len: 0 }));
        assert_eq!(parse(OP_WRITE_BARRIER), Ok(Command { op: Op::Barrier, offset: 0, len: 0 }));
        assert_eq!(parse(OP_DISCARD), Err(RSP_ERROR));
        let segment = Segment { gref: 1, first_sect: 0, last_sect: 7 };
        for operation in [OP_READ, OP_WRITE, OP_WRITE_BARRIER] {
            let entry = Entry::new(Abi::X86_64, operation, 1).with_sector(u64::MAX).with_segments(1, &[segment]);
            assert_eq!(super::parse(&entry, 8, 512, &mut Vec::new(), |_, _| false), Err(RSP_ERROR));
        }
    }
}
