//! Ring entries as bytes (Xen's public header `io/blkif.h`; `struct blkif_request` and its variants, and
//! `struct blkif_response`), for both sides.
//!
//! The ABIs differ in the alignment of u64: on x86_32 `id` is at byte 4 and all behind it 4 bytes earlier than on
//! x86_64, where it is at byte 8. The native ABI of a 64-bit host is that of x86_64.

use serde::{Deserialize, Serialize};

use crate::sys::memory::{Memory, PAGE_SIZE};

/// `grant_ref_t`: names a page that the client lets us use.
pub type GrantRef = u32;

/// BLKIF_OP_READ.
pub const OP_READ: u8 = 0;
/// BLKIF_OP_WRITE.
pub const OP_WRITE: u8 = 1;
/// BLKIF_OP_WRITE_BARRIER.
pub const OP_WRITE_BARRIER: u8 = 2;
/// BLKIF_OP_FLUSH_DISKCACHE.
pub const OP_FLUSH_DISKCACHE: u8 = 3;
/// BLKIF_OP_DISCARD.
pub const OP_DISCARD: u8 = 5;
/// BLKIF_OP_INDIRECT.
pub const OP_INDIRECT: u8 = 6;

/// BLKIF_RSP_OKAY.
pub const RSP_OKAY: i16 = 0;
/// BLKIF_RSP_ERROR.
pub const RSP_ERROR: i16 = -1;
/// BLKIF_RSP_EOPNOTSUPP.
pub const RSP_EOPNOTSUPP: i16 = -2;

/// BLKIF_MAX_SEGMENTS_PER_REQUEST.
pub const MAX_SEGMENTS: usize = 11;
/// BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST.
pub const MAX_INDIRECT_PAGES: usize = 8;
/// Segments described by one indirect page.
pub const SEGMENTS_PER_PAGE: usize = PAGE_SIZE / SEGMENT_SIZE;
/// BLKIF_DISCARD_SECURE.
pub const DISCARD_SECURE: u8 = 1;
/// Bytes of the ring's head (`struct *_sring` up to `ring`): four indices and padding.
pub const RING_HEADER: usize = 64;
/// Bytes of a `struct blkif_request_segment`.
pub const SEGMENT_SIZE: usize = 8;
/// The largest entry of any ABI, in bytes.
pub const ENTRY_MAX: usize = 112;

/// Whose struct layout the ring has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Abi {
    /// That of the machine this was compiled for.
    #[default]
    Native,
    /// `x86_32-abi`.
    X86_32,
    /// `x86_64-abi`.
    X86_64,
}

impl Abi {
    /// Byte of `id` in a request.
    const fn id_at(self) -> usize {
        match self {
            Abi::X86_32 => 4,
            Abi::X86_64 => 8,
            Abi::Native => size_of::<u64>().next_multiple_of(align_of::<u64>()),
        }
    }

    /// Bytes of an entry.
    pub const fn entry_size(self) -> usize {
        match self.id_at() {
            4 => 108,
            _ => ENTRY_MAX,
        }
    }

    /// Bytes of a response.
    const fn response_size(self) -> usize {
        match self.id_at() {
            4 => 12,
            _ => 16,
        }
    }

    /// Entries of a ring of `1 << order` pages: a power of two.
    pub const fn entries(self, order: u32) -> u32 {
        let fit = ((PAGE_SIZE << order) - RING_HEADER) / self.entry_size();
        1 << fit.ilog2()
    }
}

/// `struct blkif_request_segment`: sectors (of 512 bytes) of a granted page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The page.
    pub gref: GrantRef,
    /// First sector in it, 0 to 7.
    pub first_sect: u8,
    /// Last sector in it, inclusive.
    pub last_sect: u8,
}

impl Segment {
    /// From its 8 bytes.
    pub fn from_bytes(bytes: [u8; SEGMENT_SIZE]) -> Segment {
        let [a, b, c, d, first_sect, last_sect, ..] = bytes;
        Segment { gref: u32::from_ne_bytes([a, b, c, d]), first_sect, last_sect }
    }

    /// As its 8 bytes.
    pub fn to_bytes(self) -> [u8; SEGMENT_SIZE] {
        let [a, b, c, d] = self.gref.to_ne_bytes();
        [a, b, c, d, self.first_sect, self.last_sect, 0, 0]
    }
}

/// A private copy of a request entry.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    bytes: [u8; ENTRY_MAX],
    abi: Abi,
}

impl Entry {
    /// An entry of zeros but for its operation and id.
    pub fn new(abi: Abi, operation: u8, id: u64) -> Entry {
        let mut entry = Entry { bytes: [0; ENTRY_MAX], abi };
        entry.bytes[0] = operation;
        entry.set(abi.id_at(), id.to_ne_bytes());
        entry
    }

    /// An entry from any bytes, as a hostile client might write it.
    pub fn from_bytes(abi: Abi, bytes: [u8; ENTRY_MAX]) -> Entry {
        Entry { bytes, abi }
    }

    /// Copies the entry at `offset` out of the ring, each word once.
    pub fn read(abi: Abi, memory: &Memory, offset: usize) -> Entry {
        let mut bytes = [0; ENTRY_MAX];
        match abi.entry_size() {
            ENTRY_MAX => bytes = memory.read_once(offset),
            _ => bytes[..108].copy_from_slice(&memory.read_once::<108>(offset)),
        }
        Entry { bytes, abi }
    }

    /// Writes the entry into the ring.
    pub fn write(&self, memory: &Memory, offset: usize) {
        memory.write(offset, &self.bytes[..self.abi.entry_size()]);
    }

    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|i| self.bytes[at + i])
    }

    fn set<const N: usize>(&mut self, at: usize, value: [u8; N]) {
        self.bytes[at..at + N].copy_from_slice(&value);
    }

    fn tail(&self) -> usize {
        self.abi.id_at() + 16
    }

    /// The operation.
    pub fn operation(&self) -> u8 {
        self.bytes[0]
    }

    /// `id`, echoed in the response.
    pub fn id(&self) -> u64 {
        u64::from_ne_bytes(self.get(self.abi.id_at()))
    }

    /// `sector_number`, in 512-byte sectors.
    pub fn sector(&self) -> u64 {
        u64::from_ne_bytes(self.get(self.abi.id_at() + 8))
    }

    /// Sets `sector_number`.
    pub fn with_sector(mut self, sector: u64) -> Entry {
        self.set(self.abi.id_at() + 8, sector.to_ne_bytes());
        self
    }

    /// `nr_segments` of a direct request.
    pub fn segment_count(&self) -> usize {
        usize::from(self.bytes[1])
    }

    /// Segment `index`, below [`MAX_SEGMENTS`], of a direct request.
    pub fn segment(&self, index: usize) -> Segment {
        assert!(index < MAX_SEGMENTS);
        Segment::from_bytes(self.get(self.tail() + index * SEGMENT_SIZE))
    }

    /// Sets the segments of a direct request; `count` is what the request claims.
    pub fn with_segments(mut self, count: u8, segments: &[Segment]) -> Entry {
        self.bytes[1] = count;
        for (i, segment) in segments.iter().enumerate() {
            self.set(self.tail() + i * SEGMENT_SIZE, segment.to_bytes());
        }
        self
    }

    /// `flag` of a discard.
    pub fn discard_flag(&self) -> u8 {
        self.bytes[1]
    }

    /// `nr_sectors` of a discard, of 512 bytes.
    pub fn discard_sectors(&self) -> u64 {
        u64::from_ne_bytes(self.get(self.tail()))
    }

    /// Sets flag and length of a discard.
    pub fn with_discard(mut self, flag: u8, sectors: u64) -> Entry {
        self.bytes[1] = flag;
        self.set(self.tail(), sectors.to_ne_bytes());
        self
    }

    /// `indirect_op`.
    pub fn indirect_operation(&self) -> u8 {
        self.bytes[1]
    }

    /// `nr_segments` of an indirect request.
    pub fn indirect_count(&self) -> usize {
        usize::from(u16::from_ne_bytes(self.get(2)))
    }

    /// Page `index`, below [`MAX_INDIRECT_PAGES`], of an indirect request. `handle` and its padding come before.
    pub fn indirect_page(&self, index: usize) -> GrantRef {
        assert!(index < MAX_INDIRECT_PAGES);
        u32::from_ne_bytes(self.get(self.tail() + 4 + index * 4))
    }

    /// Sets the inner operation, the number of segments and the pages that describe them.
    pub fn with_indirect(mut self, operation: u8, count: u16, pages: &[GrantRef]) -> Entry {
        self.bytes[1] = operation;
        self.set(2, count.to_ne_bytes());
        for (i, page) in pages.iter().enumerate() {
            self.set(self.tail() + 4 + i * 4, page.to_ne_bytes());
        }
        self
    }
}

/// `struct blkif_response`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// The request's id.
    pub id: u64,
    /// The request's operation; of an indirect one the inner operation.
    pub operation: u8,
    /// RSP_*.
    pub status: i16,
}

impl Response {
    /// Writes it into the ring, its padding as zeros: what was there before is no client's business (XSA-216).
    pub fn write(&self, abi: Abi, memory: &Memory, offset: usize) {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&self.id.to_ne_bytes());
        bytes[8] = self.operation;
        bytes[10..].copy_from_slice(&self.status.to_ne_bytes());
        memory.write_once(offset, bytes);
        if abi.response_size() > bytes.len() {
            memory.write_once(offset + bytes.len(), [0; 4]);
        }
    }

    /// Copies it out of the ring.
    pub fn read(memory: &Memory, offset: usize) -> Response {
        let bytes: [u8; 12] = memory.read_once(offset);
        let [a, b, c, d, e, f, g, h, operation, _, low, high] = bytes;
        Response {
            id: u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
            operation,
            status: i16::from_ne_bytes([low, high]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_sizes_are_those_of_the_specification() {
        let sizes = |abi: Abi| [0, 1, 2, 3, 4].map(|order| abi.entries(order));
        assert_eq!(sizes(Abi::X86_64), [32, 64, 128, 256, 512]);
        assert_eq!(sizes(Abi::X86_32), [32, 64, 128, 256, 512]);
    }

    #[test]
    fn fields_are_where_blkif_h_puts_them() {
        let segment = Segment { gref: 0x0102_0304, first_sect: 5, last_sect: 6 };
        for (abi, id_at) in [(Abi::X86_32, 4), (Abi::X86_64, 8)] {
            let entry =
                Entry::new(abi, OP_WRITE, 0xa1a2_a3a4_a5a6_a7a8).with_sector(0xb1).with_segments(1, &[segment]);
            assert_eq!(entry.bytes[id_at..id_at + 8], 0xa1a2_a3a4_a5a6_a7a8_u64.to_ne_bytes());
            assert_eq!(entry.bytes[id_at + 8], 0xb1);
            assert_eq!(entry.bytes[id_at + 16..id_at + 24], [4, 3, 2, 1, 5, 6, 0, 0]);
            let entry = Entry::new(abi, OP_INDIRECT, 1).with_indirect(OP_READ, 0x1234, &[7, 9]);
            assert_eq!(entry.bytes[1..4], [0, 0x34, 0x12]);
            assert_eq!((entry.bytes[id_at + 20], entry.bytes[id_at + 24]), (7, 9));
            let entry = Entry::new(abi, OP_DISCARD, 1).with_discard(1, 0xc1);
            assert_eq!((entry.bytes[1], entry.bytes[id_at + 16]), (1, 0xc1));
        }
    }

    #[test]
    fn a_response_leaves_nothing_of_what_was_there() {
        let memory = Memory::anonymous(4096).unwrap();
        memory.write(0, &[0xee; 64]);
        let response = Response { id: 7, operation: OP_WRITE, status: RSP_EOPNOTSUPP };
        response.write(Abi::X86_64, &memory, 0);
        assert_eq!(memory.read_once::<16>(0), [7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0xfe, 0xff, 0, 0, 0, 0]);
        assert_eq!(Response::read(&memory, 0), response);
        response.write(Abi::X86_32, &memory, 32);
        assert_eq!(memory.read_once::<4>(44), [0xee; 4]);
    }
}
