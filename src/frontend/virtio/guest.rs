//! The memory of a guest: regions of its addresses, each a part of a mapping. They come and go while requests are in flight, which keep what they
//! use of them.

use std::sync::Arc;

use crate::sys::memory::Memory;

/// A place in memory that is mapped.
#[derive(Clone, Debug)]
pub struct Place {
    /// Where.
    pub memory: Arc<Memory>,
    /// First byte in it.
    pub offset: usize,
}

/// A range of the guest's addresses.
#[derive(Clone, Debug)]
pub struct Region {
    /// First address of the guest.
    pub guest: u64,
    /// Bytes, at least one; `guest + len` and `user + len` are no overflow.
    pub len: u64,
    /// Address that the client has it at, by which it names the rings.
    pub user: u64,
    /// Where it is here: `len` bytes are in that memory.
    pub place: Place,
}

/// An address that no region has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outside;

/// All regions.
#[derive(Clone, Debug, Default)]
pub struct Regions(Vec<Region>);

impl Regions {
    /// Adds one. Outside: some of its addresses, or of its client's, are another one's.
    pub fn add(&mut self, region: Region) -> Result<(), Outside> {
        let apart = |a: u64, a_len: u64, b: u64, b_len: u64| a + a_len <= b || b + b_len <= a;
        let fits = self.0.iter().all(|other| {
            apart(other.guest, other.len, region.guest, region.len)
                && apart(other.user, other.len, region.user, region.len)
        });
        if !fits {
            return Err(Outside);
        }
        let at = self.0.partition_point(|other| other.guest < region.guest);
        self.0.insert(at, region);
        Ok(())
    }

    /// Takes one away. None: there is none like that.
    pub fn remove(&mut self, guest: u64, len: u64, user: u64) -> Option<Region> {
        let is = |region: &Region| (region.guest, region.len, region.user) == (guest, len, user);
        let at = self.0.iter().position(is)?;
        Some(self.0.remove(at))
    }

    /// All of them, by address.
    pub fn iter(&self) -> impl Iterator<Item = &Region> {
        self.0.iter()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Gives `each` the places of `len` bytes of the guest, in order. It may reach from one region into the next. Where it is outside, `each` has got
    /// what comes before that.
    #[inline]
    pub fn places<E: From<Outside>>(
        &self,
        mut at: u64,
        mut len: u64,
        mut each: impl FnMut(&Arc<Memory>, usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        while len > 0 {
            let region = match self.0.as_slice() {
                // Nearly always.
                [region] => region,
                regions => {
                    let behind = regions.partition_point(|region| region.guest <= at);
                    behind.checked_sub(1).map(|index| &regions[index]).ok_or(Outside)?
                }
            };
            let within = at.checked_sub(region.guest).filter(|within| *within < region.len).ok_or(Outside)?;
            let count = len.min(region.len - within);
            each(&region.place.memory, region.place.offset + within as usize, count as usize)?;
            (at, len) = (at + count, len - count);
        }
        Ok(())
    }

    /// Where `len` bytes are that the client names by its own address; in one region, and at a multiple of `align` here.
    pub fn of_client(&self, user: u64, len: usize, align: usize) -> Option<Place> {
        self.0.iter().find_map(|region| {
            let within = user.checked_sub(region.user).filter(|within| *within < region.len)?;
            let offset = region.place.offset + within as usize;
            let fits = len as u64 <= region.len - within && offset.is_multiple_of(align);
            fits.then(|| Place { memory: Arc::clone(&region.place.memory), offset })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest: u64, len: u64, user: u64) -> Region {
        let memory = Arc::new(Memory::anonymous(1 << 16).unwrap());
        Region { guest, len, user, place: Place { memory, offset: 4096 } }
    }

    fn places(regions: &Regions, at: u64, len: u64) -> Result<Vec<(u64, usize, usize)>, Outside> {
        let mut all = Vec::new();
        regions.places(at, len, |memory, offset, count| {
            all.push((memory.id(), offset, count));
            Ok::<_, Outside>(())
        })?;
        Ok(all)
    }

    #[test]
    fn a_range_reaches_from_one_region_into_the_next_and_not_beyond() {
        let mut regions = Regions::default();
        let (a, b) = (region(0x1000, 0x1000, 0x9000), region(0x2000, 0x2000, 0x5000));
        let (in_a, in_b) = (a.place.memory.id(), b.place.memory.id());
        regions.add(b).unwrap();
        assert_eq!(places(&regions, 0x2000, 16), Ok(vec![(in_b, 4096, 16)]));
        assert_eq!(places(&regions, 0x1fff, 2), Err(Outside));
        regions.add(a).unwrap();
        assert_eq!(places(&regions, 0x1ff0, 0x20), Ok(vec![(in_a, 4096 + 0xff0, 16), (in_b, 4096, 16)]));
        for (at, len) in [(0xfff, 2), (0x3fff, 2), (0x4000, 1), (u64::MAX, 1), (u64::MAX, u64::MAX), (0, 1)] {
            assert_eq!(places(&regions, at, len), Err(Outside), "{at:#x} {len}");
        }
        assert_eq!(places(&regions, 0x7777_7777, 0), Ok(vec![]));
    }

    #[test]
    fn regions_have_no_address_in_common_and_go_as_they_came() {
        let mut regions = Regions::default();
        regions.add(region(0x1000, 0x1000, 0x9000)).unwrap();
        for (guest, user) in [(0x1fff, 0x20000), (0x800, 0x20000), (0x5000, 0x9fff)] {
            assert_eq!(regions.add(region(guest, 0x1000, user)), Err(Outside));
        }
        assert!(regions.remove(0x1000, 0x800, 0x9000).is_none() && regions.count() == 1);
        assert!(regions.remove(0x1000, 0x1000, 0x9000).is_some() && regions.count() == 0);
    }

    #[test]
    fn rings_are_named_by_the_clients_addresses_and_aligned() {
        let mut regions = Regions::default();
        regions.add(region(0, 0x1000, 0x9000)).unwrap();
        assert_eq!(regions.of_client(0x9010, 0x10, 16).map(|place| place.offset), Some(4096 + 16));
        assert!(regions.of_client(0x9008, 0x10, 16).is_none());
        assert!(regions.of_client(0x9ff0, 0x11, 16).is_none() && regions.of_client(0x8fff, 1, 1).is_none());
    }
}
