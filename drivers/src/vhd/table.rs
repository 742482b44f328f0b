//! The block allocation table (specification, "Block Allocation Table and Data Blocks"), and blktap's map of full blocks.

use std::collections::TryReserveError;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Corrupt;
use super::image::{ReadError, Region};
use crate::SECTOR_SIZE;

/// An entry of a block that is not there.
const UNUSED: u32 = u32::MAX;

/// Sectors of a file that a block can begin in: the table has 32 bits for their number.
pub const SECTORS_MAX: u64 = UNUSED as u64;

/// Where each block is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table(Vec<u32>);

impl Table {
    /// Reads one from its bytes, which may be more than those of its entries.
    pub fn parse(bytes: &[u8], blocks: u32) -> Result<Table, TryReserveError> {
        let entries = bytes.chunks_exact(4).map(|entry| u32::from_be_bytes([entry[0], entry[1], entry[2], entry[3]]));
        let mut table = Vec::new();
        table.try_reserve_exact(entries.len().min(blocks as usize))?;
        table.extend(entries.take(blocks as usize));
        Ok(Table(table))
    }

    /// One of which no block is there.
    pub fn empty(blocks: u32) -> Table {
        Table(vec![UNUSED; blocks as usize])
    }

    /// Lets it have so many blocks; those that are new are not there.
    pub fn grow(&mut self, blocks: u32) {
        self.0.resize(self.0.len().max(blocks as usize), UNUSED);
    }

    /// Bytes of a table of so many entries, in whole sectors.
    pub fn bytes(entries: u32) -> u64 {
        (4 * u64::from(entries)).next_multiple_of(SECTOR_SIZE)
    }

    /// Blocks that it has an entry for.
    pub fn blocks(&self) -> u32 {
        self.0.len() as u32
    }

    /// Where a block's bitmap begins in the file, in bytes. None: the block is not there.
    pub fn get(&self, block: u32) -> Option<u64> {
        let sector = *self.0.get(block as usize)?;
        (sector != UNUSED).then(|| u64::from(sector) * SECTOR_SIZE)
    }

    /// Says where a block's bitmap begins, in bytes: whole sectors, of which an entry can count [`SECTORS_MAX`].
    pub fn set(&mut self, block: u32, at: u64) {
        debug_assert!(at.is_multiple_of(SECTOR_SIZE) && at / SECTOR_SIZE < SECTORS_MAX);
        self.0[block as usize] = (at / SECTOR_SIZE) as u32;
    }

    /// The bytes of an entry of a block whose bitmap begins at byte `at`.
    pub fn entry(at: u64) -> [u8; 4] {
        ((at / SECTOR_SIZE) as u32).to_be_bytes()
    }

    /// Says that a block is not there.
    pub fn clear(&mut self, block: u32) {
        self.0[block as usize] = UNUSED;
    }

    /// The bytes, from entry `from` on, as many as `to` has room for; what is beyond the last entry is unused.
    pub fn write(&self, from: u32, to: &mut [u8]) {
        let entries = self.0[from as usize..].iter().copied().chain(std::iter::repeat(UNUSED));
        for (place, entry) in to.chunks_exact_mut(4).zip(entries) {
            place.copy_from_slice(&entry.to_be_bytes());
        }
    }

    /// Blocks that are there.
    pub fn allocated(&self) -> impl Iterator<Item = (u32, u64)> {
        (0..self.blocks()).filter_map(|block| Some((block, self.get(block)?)))
    }

    /// Looks whether each block, of `len` bytes with its bitmap, ends before byte `end` of the file, and overlaps no other and
    /// nothing of what is `taken`.
    pub(super) fn check(&self, len: u64, taken: &[Region], end: u64) -> Result<(), ReadError> {
        let mut places = Vec::new();
        let (count, at) = (self.allocated().count(), taken.last().map_or(0, |region| region.at));
        places.try_reserve_exact(count).map_err(|_| ReadError::memory(at, count * size_of::<(u64, u32)>()))?;
        for (block, at) in self.allocated() {
            let own = Region { at, len };
            if at + len > end || taken.iter().any(|region| region.meets(own)) {
                return Err(Corrupt::BlockPlace { block, at, len, end }.into());
            }
            places.push((at, block));
        }
        places.sort_unstable();
        let overlap = places.windows(2).find(|pair| pair[1].0 - pair[0].0 < len);
        match overlap {
            Some(pair) => Err(Corrupt::BlocksOverlap { one: pair[0].1, other: pair[1].1, at: pair[1].0 }.into()),
            None => Ok(()),
        }
    }
}

/// What is before the batmap's bits, as it is in the file (blktap's libvhd).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct BatmapHeader {
    cookie: [u8; 8],
    offset: U64,
    /// 512-byte sectors.
    size: U32,
    version: U32,
    checksum: U32,
    marker: u8,
    /// For encrypted images: a cookie, a nonce of 32 bytes, SHA-256 of nonce and key.
    key_hash: [u8; 65],
    reserved: [u8; 418],
}

const _: () = assert!(size_of::<BatmapHeader>() == SECTOR_SIZE as usize);

/// Which blocks are full: all of their sectors are there, and nobody need look at the block's bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batmap {
    /// Where its header is in the file.
    pub at: u64,
    /// Where its bits are.
    pub bits_at: u64,
    bits: Vec<u8>,
    /// A number for storage managers.
    pub marker: u8,
    /// The hash of the key that an image is encrypted with. None: it is not.
    pub key_hash: Option<KeyHash>,
}

/// What tells whether a key is an image's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyHash {
    /// What is hashed before the key.
    pub nonce: [u8; 32],
    /// SHA-256 of nonce and key.
    pub hash: [u8; 32],
}

/// What a batmap's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatmapPlace {
    /// Where the bits are in the file.
    pub bits_at: u64,
    /// Their bytes, whole sectors.
    pub len: u64,
    version: u32,
    checksum: u32,
    marker: u8,
    key_hash: Option<KeyHash>,
}

impl Batmap {
    const COOKIE: [u8; 8] = *b"tdbatmap";
    const VERSION: u32 = 0x0001_0002;
    /// Its checksum adds up signed bytes, by mistake.
    const VERSION_SIGNED: u32 = 0x0001_0001;

    /// Reads the header of one, a sector. None: there is none.
    pub fn parse_header(bytes: &[u8]) -> Result<Option<BatmapPlace>, Corrupt> {
        let what = "batmap";
        let header =
            BatmapHeader::read_from_bytes(bytes).map_err(|_| Corrupt::Short { what, len: bytes.len() as u64 })?;
        if header.cookie != Self::COOKIE {
            return Ok(None);
        }
        let version = header.version.get();
        if version > Self::VERSION {
            return Err(Corrupt::Version { what, version });
        }
        let (mut nonce, mut hash) = ([0; 32], [0; 32]);
        nonce.copy_from_slice(&header.key_hash[1..33]);
        hash.copy_from_slice(&header.key_hash[33..]);
        Ok(Some(BatmapPlace {
            bits_at: header.offset.get(),
            len: u64::from(header.size.get()) * SECTOR_SIZE,
            version,
            checksum: header.checksum.get(),
            marker: header.marker,
            key_hash: (header.key_hash[0] == 1).then_some(KeyHash { nonce, hash }),
        }))
    }

    /// Of one whose header is at byte `at`, whatever its bits are: no block is known to be full.
    pub fn unknown(place: &BatmapPlace, at: u64) -> Batmap {
        let (bits_at, bits) = (place.bits_at, vec![0; place.len as usize]);
        Batmap { at, bits_at, bits, marker: place.marker, key_hash: place.key_hash }
    }

    /// Reads the bits of one whose header is at byte `at`.
    pub fn parse(place: &BatmapPlace, at: u64, bits: Vec<u8>) -> Result<Batmap, Corrupt> {
        let computed = if place.version == Self::VERSION_SIGNED {
            !bits.iter().fold(0, |sum: u32, byte| sum.wrapping_add_signed((*byte as i8).into()))
        } else {
            super::checksum(&bits)
        };
        if computed != place.checksum {
            return Err(Corrupt::Checksum { what: "batmap", found: place.checksum, computed });
        }
        Ok(Batmap { bits, ..Batmap::unknown(place, at) })
    }

    /// One for so many blocks, none of which is full, with its header at byte `at` and its bits after that.
    pub fn empty(at: u64, blocks: u32) -> Batmap {
        let (bits_at, bits) = (at + SECTOR_SIZE, vec![0; Batmap::bytes(blocks) as usize]);
        Batmap { at, bits_at, bits, marker: 0, key_hash: None }
    }

    /// The same for so many blocks, with its header at byte `at`; those that are new are not full.
    pub fn moved(&self, at: u64, blocks: u32) -> Batmap {
        let empty = Batmap::empty(at, blocks);
        let mut bits = self.bits.clone();
        bits.resize(empty.bits.len().max(bits.len()), 0);
        Batmap { bits, marker: self.marker, key_hash: self.key_hash, ..empty }
    }

    /// Bytes of the bits of so many blocks, in whole sectors.
    pub fn bytes(blocks: u32) -> u64 {
        u64::from(blocks).div_ceil(8).next_multiple_of(SECTOR_SIZE).max(SECTOR_SIZE)
    }

    /// The bits, as they are in the file.
    pub fn bits(&self) -> &[u8] {
        &self.bits
    }

    /// The header that goes with the bits as they are now.
    pub fn header(&self) -> [u8; SECTOR_SIZE as usize] {
        let mut key_hash = [0; 65];
        if let Some(key) = &self.key_hash {
            key_hash[0] = 1;
            key_hash[1..33].copy_from_slice(&key.nonce);
            key_hash[33..].copy_from_slice(&key.hash);
        }
        zerocopy::transmute!(BatmapHeader {
            cookie: Self::COOKIE,
            offset: self.bits_at.into(),
            size: ((self.bits.len() as u64 / SECTOR_SIZE) as u32).into(),
            version: Self::VERSION.into(),
            checksum: super::checksum(&self.bits).into(),
            marker: self.marker,
            key_hash,
            reserved: [0; 418],
        })
    }

    /// Forgets what it says of blocks that the table does not have: whoever believed it would show zeros in the place of the parent's
    /// data as soon as such a block is made. Gives the first of those, and how many there are.
    pub(super) fn forget_absent(&mut self, table: &Table) -> Option<(u32, u32)> {
        let full = (0..8 * self.bits.len() as u32).filter(|block| self.is_full(*block));
        let absent: Vec<_> = full.filter(|block| table.get(*block).is_none()).collect();
        absent.iter().for_each(|block| self.set(*block, false));
        Some((*absent.first()?, absent.len() as u32))
    }

    /// Says whether a block is full. One that it has no bit for never is.
    pub fn set(&mut self, block: u32, full: bool) {
        let bit = 0x80 >> (block % 8);
        if let Some(byte) = self.bits.get_mut(block as usize / 8) {
            *byte = if full { *byte | bit } else { *byte & !bit };
        }
    }

    /// Whether a block is full.
    pub fn is_full(&self, block: u32) -> bool {
        self.bits.get(block as usize / 8).is_some_and(|byte| byte & (0x80 >> (block % 8)) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batmap_is_written_and_read() {
        let mut batmap = Batmap::empty(4096, 5000);
        assert_eq!(batmap.bits().len(), 1024);
        batmap.key_hash = Some(KeyHash { nonce: [7; 32], hash: [9; 32] });
        batmap.marker = 5;
        batmap.set(4999, true);
        batmap.set(3, true);
        batmap.set(4, true);
        batmap.set(4, false);
        let place = Batmap::parse_header(&batmap.header()).unwrap().unwrap();
        assert_eq!((place.bits_at, place.len), (4608, 1024));
        let read = Batmap::parse(&place, 4096, batmap.bits().to_vec()).unwrap();
        assert_eq!(read, batmap);
        assert!(read.is_full(3) && read.is_full(4999) && !read.is_full(4) && !read.is_full(1 << 30));
        let wrong = Batmap::parse(&place, 4096, vec![0; 1024]).unwrap_err();
        assert!(matches!(wrong, Corrupt::Checksum { what: "batmap", .. }), "{wrong}");
    }

    #[test]
    fn a_table_is_written_and_read() {
        let mut table = Table::empty(200);
        table.set(130, 3 << 39);
        table.set(7, 1024);
        table.set(8, 1024);
        table.clear(8);
        assert_eq!(table.allocated().collect::<Vec<_>>(), [(7, 1024), (130, 3 << 39)]);
        let mut grown = table.clone();
        grown.grow(1000);
        assert!(grown.blocks() == 1000 && grown.allocated().eq(table.allocated()));
        let mut bytes = vec![0; Table::bytes(200) as usize];
        table.write(0, &mut bytes);
        assert_eq!(Table::parse(&bytes, 200).as_ref(), Ok(&table));
        let mut sector = [0; 512];
        table.write(128, &mut sector);
        assert_eq!(sector, bytes[512..]);
    }
}
