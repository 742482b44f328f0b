//! The bitmaps of blocks that are not full, as many of them as there is room for.

use super::tickets::List;

/// Places of a cache that a block can be in.
pub(super) const WAYS: usize = 8;

/// No block's number.
pub(super) const NONE: u32 = u32::MAX;

/// Those that a block can be in, of `places`, a multiple of [`WAYS`].
pub(super) fn places_of(block: u32, places: usize) -> std::ops::Range<usize> {
    // Neighbours are in different sets, and so are blocks that are a power of two apart.
    let set = (block.wrapping_mul(0x9e37_79b1) >> 8) as usize % (places / WAYS);
    set * WAYS..(set + 1) * WAYS
}

/// What is known of a slot's bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It has none.
    Empty,
    /// It is being read.
    Loading,
    /// It could not be read.
    Failed,
    /// It is as in the file.
    Loaded,
}

/// Room for a bitmap.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) block: u32,
    pub(super) state: State,
    /// Used since somebody last looked for room.
    recent: bool,
    /// Writes that will change it. It stays until there are none.
    pub(super) pins: u32,
    /// Of those, whose data is down: what the next write of the bitmap is for.
    pub(super) next: List,
    /// What the write that is under way is for.
    pub(super) now: List,
    /// It is written, or will be.
    pub(super) writing: bool,
}

/// What there is of a block's bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Loaded(u32),
    Loading,
    Failed,
    /// This slot is to be loaded.
    Load(u32),
    /// There is no room until some write is finished.
    NoRoom,
}

/// A cache in which a block has its place among a few (set-associative).
#[derive(Debug)]
pub(super) struct Bitmaps {
    slots: Vec<Slot>,
    bits: Vec<u8>,
    /// Bytes of a bitmap.
    len: usize,
}

impl Bitmaps {
    /// Room for about `count` bitmaps of `len` bytes each.
    pub(super) fn new(count: usize, len: usize) -> Bitmaps {
        let count = count.next_multiple_of(WAYS).max(WAYS);
        let slot = || Slot {
            block: NONE,
            state: State::Empty,
            recent: false,
            pins: 0,
            next: List::default(),
            now: List::default(),
            writing: false,
        };
        Bitmaps { slots: std::iter::repeat_with(slot).take(count).collect(), bits: vec![0; count * len], len }
    }

    /// Slots that there are.
    pub(super) fn count(&self) -> usize {
        self.slots.len()
    }

    /// Bytes of memory.
    pub(super) fn bytes(&self) -> usize {
        self.bits.len() + self.slots.len() * size_of::<Slot>()
    }

    /// A block's bitmap, or where it is to go.
    pub(super) fn find(&mut self, block: u32) -> Found {
        let set = places_of(block, self.slots.len());
        if let Some(index) = set.clone().find(|index| self.slots[*index].block == block) {
            let slot = &mut self.slots[index];
            slot.recent = true;
            return match slot.state {
                State::Loaded => Found::Loaded(index as u32),
                State::Failed => {
                    // Whoever asks next may have more luck.
                    (slot.block, slot.state) = (NONE, State::Empty);
                    Found::Failed
                }
                State::Empty | State::Loading => Found::Loading,
            };
        }
        // The first that nobody has used since the last search, and all that were looked at before it get a second chance.
        let mut victim = set.clone().find(|index| self.slots[*index].state == State::Empty);
        for index in if victim.is_none() { set } else { 0..0 } {
            let slot = &mut self.slots[index];
            if slot.pins > 0 || slot.state == State::Loading {
                continue;
            }
            let recent = std::mem::take(&mut slot.recent);
            if victim.is_none() || !recent {
                victim = Some(index);
            }
            if !recent {
                break;
            }
        }
        let Some(index) = victim else { return Found::NoRoom };
        let slot = &mut self.slots[index];
        (slot.block, slot.state, slot.recent) = (block, State::Loading, true);
        Found::Load(index as u32)
    }

    pub(super) fn slot(&mut self, index: u32) -> &mut Slot {
        &mut self.slots[index as usize]
    }

    /// The bitmap in a slot, one bit for each sector, the first the highest of the first byte.
    pub(super) fn bits(&self, index: u32) -> &[u8] {
        &self.bits[index as usize * self.len..][..self.len]
    }

    pub(super) fn bits_mut(&mut self, index: u32) -> &mut [u8] {
        &mut self.bits[index as usize * self.len..][..self.len]
    }

    /// Forgets a block that came to nothing.
    pub(super) fn forget(&mut self, index: u32) {
        let slot = self.slot(index);
        (slot.block, slot.state) = (NONE, State::Empty);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_made_where_nobody_writes() {
        let mut bitmaps = Bitmaps::new(8, 512);
        let mut load = |block| match bitmaps.find(block) {
            Found::Load(index) => {
                bitmaps.slot(index).state = State::Loaded;
                index
            }
            other => panic!("{other:?}"),
        };
        let slots: Vec<_> = (0..8).map(&mut load).collect();
        slots.iter().for_each(|slot| bitmaps.slot(*slot).pins = 1);
        assert_eq!(bitmaps.find(8), Found::NoRoom);
        bitmaps.slot(slots[5]).pins = 0;
        assert_eq!(bitmaps.find(8), Found::Load(slots[5]));
        assert_eq!(bitmaps.find(8), Found::Loading);
        bitmaps.slot(slots[5]).state = State::Failed;
        assert_eq!((bitmaps.find(8), bitmaps.find(8)), (Found::Failed, Found::Load(slots[5])));
    }
}
