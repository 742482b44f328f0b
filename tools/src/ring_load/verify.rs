//! Data that can be checked: each sector says where it belongs, which run wrote it and in which pass, and has a
//! checksum of all that. So each sector is judged alone, and a lost, misplaced, stale or torn write is told apart.

use std::fmt;

use super::pattern::Region;

/// First bytes of a stamped sector.
const MAGIC: u64 = u64::from_le_bytes(*b"RINGLOAD");
/// Bytes before the filling: magic, offset, seed, generation, checksum.
const HEADER: usize = 32;
/// Where the checksum is. It is of all bytes but itself.
const CRC_AT: usize = 28;
/// Sectors that are kept track of, at 4 bytes each.
const MAX_SECTORS: u64 = 1 << 28;

/// What a sector must say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// Its first byte on the disk.
    pub(super) offset: u64,
    /// The run's.
    pub(super) seed: u64,
    /// The pass that wrote it, counted from 1.
    pub(super) generation: u32,
}

/// What it says instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// No stamp: its first 8 bytes.
    Foreign(u64),
    /// A stamp, but the checksum of the rest is another: the one it has, and the one it ought to have.
    Damaged { stored: u32, computed: u32 },
    /// A good sector of another place, run or pass.
    Other(Stamp),
}

impl fmt::Display for Stamp {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        write!(to, "offset {} seed {} pass {}", self.offset, self.seed, self.generation)
    }
}

impl fmt::Display for Found {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Found::Foreign(bytes) => write!(to, "data of someone else, beginning {:016x}", bytes.swap_bytes()),
            Found::Damaged { stored, computed } => {
                write!(to, "damaged data: checksum {computed:08x}, but it says {stored:08x}")
            }
            Found::Other(stamp) => write!(to, "{stamp}"),
        }
    }
}

impl Stamp {
    /// Fills `sector` with what can be checked.
    pub(super) fn write(self, sector: &mut [u8]) {
        let (header, filling) = sector.split_at_mut(HEADER);
        header[..8].copy_from_slice(&MAGIC.to_le_bytes());
        header[8..16].copy_from_slice(&self.offset.to_le_bytes());
        header[16..24].copy_from_slice(&self.seed.to_le_bytes());
        header[24..CRC_AT].copy_from_slice(&self.generation.to_le_bytes());
        // Data that neither compresses nor repeats, so no layer below can take a short cut.
        let mut state =
            (self.offset ^ u64::from(self.generation) << 40 ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for word in filling.as_chunks_mut::<8>().0 {
            state = state.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(0x6a09_e667_f3bc_c909);
            *word = (state ^ state >> 29).to_le_bytes();
        }
        let crc = checksum(sector);
        sector[CRC_AT..HEADER].copy_from_slice(&crc.to_le_bytes());
    }

    /// Checks `sector`.
    pub(super) fn check(self, sector: &[u8]) -> Result<(), Found> {
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| sector[at + i]));
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| sector[at + i]));
        if u64_at(0) != MAGIC {
            return Err(Found::Foreign(u64_at(0)));
        }
        let (stored, computed) = (u32_at(CRC_AT), checksum(sector));
        if stored != computed {
            return Err(Found::Damaged { stored, computed });
        }
        let found = Stamp { offset: u64_at(8), seed: u64_at(16), generation: u32_at(24) };
        if found == self { Ok(()) } else { Err(Found::Other(found)) }
    }
}

fn checksum(sector: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&sector[..CRC_AT]), &sector[HEADER..])
}

/// A sector that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mismatch {
    pub(super) expected: Stamp,
    pub(super) found: Found,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        let Mismatch { expected, found } = self;
        write!(to, "sector at {}: expected {expected}, found {found}", expected.offset)
    }
}

/// What must be in each sector of a region.
#[derive(Debug)]
pub(super) struct Expected {
    region: Region,
    sector: u32,
    seed: u64,
    /// 0: not known.
    generations: Vec<u32>,
}

impl Expected {
    /// Nothing is known yet.
    pub(super) fn new(region: Region, sector: u32, seed: u64) -> Result<Expected, String> {
        let sectors = region.len() / u64::from(sector);
        if sectors > MAX_SECTORS {
            return Err(format!("{sectors} sectors are too many to keep track of: use --range"));
        }
        Ok(Expected { region, sector, seed, generations: vec![0; sectors as usize] })
    }

    fn index(&self, offset: u64) -> usize {
        ((offset - self.region.start) / u64::from(self.sector)) as usize
    }

    /// Sets what the sectors of a write are, or with 0 that this is not known.
    pub(super) fn set(&mut self, offset: u64, len: u32, generation: u32) {
        let (first, count) = (self.index(offset), (len / self.sector) as usize);
        self.generations[first..first + count].fill(generation);
    }

    /// Fills `data`, which is to be written at `offset`.
    pub(super) fn stamp(&self, offset: u64, generation: u32, data: &mut [u8]) {
        for (offset, sector) in self.sectors(offset).zip(data.chunks_exact_mut(self.sector as usize)) {
            Stamp { offset, seed: self.seed, generation }.write(sector);
        }
    }

    /// Checks `data`, which was read at `offset`; calls `wrong` for each bad sector, and gives the sectors checked.
    pub(super) fn check(&self, offset: u64, data: &[u8], mut wrong: impl FnMut(Mismatch)) -> u64 {
        let known = &self.generations[self.index(offset)..];
        let mut checked = 0;
        for ((offset, sector), generation) in
            self.sectors(offset).zip(data.chunks_exact(self.sector as usize)).zip(known)
        {
            if *generation == 0 {
                continue;
            }
            checked += 1;
            let expected = Stamp { offset, seed: self.seed, generation: *generation };
            if let Err(found) = expected.check(sector) {
                wrong(Mismatch { expected, found });
            }
        }
        checked
    }

    /// Whether anything is known of `len` bytes at `offset`.
    pub(super) fn knows(&self, offset: u64, len: u32) -> bool {
        let first = self.index(offset);
        self.generations[first..first + (len / self.sector) as usize].iter().any(|generation| *generation != 0)
    }

    fn sectors(&self, offset: u64) -> impl Iterator<Item = u64> + use<> {
        let sector = u64::from(self.sector);
        (0..).map(move |i| offset + i * sector)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { offset: 4096, seed: 7, generation: 2 };

    fn sector(stamp: Stamp) -> [u8; 512] {
        let mut sector = [0; 512];
        stamp.write(&mut sector);
        sector
    }

    #[test]
    fn what_was_stamped_is_good() {
        assert_eq!(STAMP.check(&sector(STAMP)), Ok(()));
        assert_ne!(sector(STAMP)[32..], sector(Stamp { offset: 0, ..STAMP })[32..], "the filling is of this place");
    }

    #[test]
    fn any_bit_that_changes_is_found() {
        for bit in 0..512 * 8 {
            let mut sector = sector(STAMP);
            sector[bit / 8] ^= 1 << (bit % 8);
            match STAMP.check(&sector) {
                Err(Found::Foreign(_)) => assert!(bit < 64),
                Err(Found::Damaged { stored, computed }) => assert!(bit >= 64 && stored != computed),
                other => panic!("bit {bit}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_good_sector_of_elsewhere_is_told_apart() {
        for other in [Stamp { offset: 8192, ..STAMP }, Stamp { seed: 8, ..STAMP }, Stamp { generation: 1, ..STAMP }] {
            assert_eq!(STAMP.check(&sector(other)), Err(Found::Other(other)));
        }
        assert_eq!(STAMP.check(&[0; 512]), Err(Found::Foreign(0)));
    }

    #[test]
    fn only_what_is_known_is_checked() {
        let region = Region { start: 1024, end: 1024 + 8 * 512 };
        let mut expected = Expected::new(region, 512, 7).unwrap();
        let mut data = [0; 4 * 512];
        expected.stamp(2048, 5, &mut data);
        let mut wrong = Vec::new();
        assert_eq!(expected.check(2048, &data, |mismatch| wrong.push(mismatch)), 0);
        assert!(!expected.knows(1024, 8 * 512));
        expected.set(2048, 1024, 5);
        expected.set(2048 + 1024, 512, 6);
        assert!(expected.knows(1024, 8 * 512) && !expected.knows(2048 + 1536, 512));
        assert_eq!(expected.check(2048, &data, |mismatch| wrong.push(mismatch)), 3);
        let stamp = |generation| Stamp { offset: 3072, seed: 7, generation };
        assert_eq!(wrong, [Mismatch { expected: stamp(6), found: Found::Other(stamp(5)) }]);
    }
}
