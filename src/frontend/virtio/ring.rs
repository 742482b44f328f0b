//! A split ring (Virtual I/O Device 1.2, section 2.7): a table of descriptors, the ring of what is available to us, and that of what we have used.

use std::sync::atomic::{Ordering, fence};

use super::guest::{Outside, Place, Regions};

/// The driver made something that makes no sense: the ring is not served any more, until it is set up anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// More than the ring has entries.
    #[error("{0} chains are said to be available, more than the ring has")]
    Available(u16),
    /// No descriptor.
    #[error("descriptor {0} does not exist")]
    Index(u16),
    /// A descriptor of the chain comes again, or there are too many.
    #[error("a chain has more buffers than any may have: a loop?")]
    Loop,
    /// Its chain has not been answered yet.
    #[error("the chain at descriptor {0} is in use")]
    InUse(u16),
    /// In a table.
    #[error("a table of descriptors names a table")]
    TableInTable,
    /// A descriptor of a table that the chain goes on behind.
    #[error("a descriptor of a table has a next one")]
    TableHasNext,
    /// No multiple of a descriptor, or none.
    #[error("a table of descriptors has {0} bytes")]
    TableLength(u32),
    /// Tables were not negotiated.
    #[error("a table of descriptors, which the driver has not asked for")]
    NoTables,
    /// Out of order.
    #[error("a buffer that is read comes behind one that is written")]
    Order,
    /// Nothing that we could answer to.
    #[error("a chain has no byte for its status")]
    NoStatus,
    /// Nowhere.
    #[error("an address is outside the guest's memory")]
    Outside,
    /// More than can be.
    #[error("the buffers of a chain have more than 4 GiB together")]
    Length,
}

impl From<Outside> for Broken {
    fn from(Outside: Outside) -> Broken {
        Broken::Outside
    }
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Of the available ring: no notification, please. The used ring's, which says the same of ours, has this value too.
const QUIET: u16 = 1;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;

/// Buffers of a chain, at most. A ring may be smaller than a request in a table, which Linux makes for `seg_max` buffers, whatever the ring's size.
pub fn chain_max(size: u16) -> u16 {
    size.max(super::SEG_MAX as u16 + 2)
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// The guest's address of its first byte.
    pub at: u64,
    /// Bytes.
    pub len: u32,
    /// It is for us to write; otherwise to read.
    pub writable: bool,
}

struct Descriptor {
    at: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn of(bytes: [u8; DESCRIPTOR]) -> Descriptor {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let long = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Descriptor {
            at: u64::from(long(0)) | u64::from(long(4)) << 32,
            len: long(8),
            flags: word(12),
            next: word(14),
        }
    }
}

/// Where a ring's parts are, and what was negotiated of it.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Entries, a power of two up to 32768.
    pub size: u16,
    /// The table, at a multiple of 16.
    pub table: Place,
    /// The available ring, at a multiple of 2.
    pub available: Place,
    /// The used ring, at a multiple of 4.
    pub used: Place,
    /// EVENT_IDX.
    pub event_idx: bool,
    /// INDIRECT_DESC.
    pub tables: bool,
}

impl Layout {
    /// Bytes of the table, of the available and of the used ring, and what each is aligned to.
    pub fn parts(size: u16) -> [(usize, usize); 3] {
        let size = usize::from(size);
        [(DESCRIPTOR * size, 16), (6 + 2 * size, 2), (6 + 8 * size, 4)]
    }
}

/// The device's side of a ring.
#[derive(Debug)]
pub struct Ring {
    layout: Layout,
    /// Free-running: the chain that is taken next, the entry that is used next, and how many of these the driver sees.
    taken: u16,
    used: u16,
    published: u16,
    /// Notified of none since it was set up: the first time always.
    fresh: bool,
}

/// Indices, for those who look.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Indices {
    available: u16,
    taken: u16,
    used: u16,
    published: u16,
}

impl Ring {
    /// Goes on at the chain `base`, and in the used ring where that says.
    pub fn new(layout: Layout, base: u16) -> Ring {
        let used = layout.used.memory.atomic_u16(layout.used.offset + 2).load(Ordering::Acquire);
        Ring { layout, taken: base, used, published: used, fresh: true }
    }

    fn available_index(&self, order: Ordering) -> u16 {
        let Place { memory, offset } = &self.layout.available;
        u16::from_le(memory.atomic_u16(offset + 2).load(order))
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// The next chain that is to be taken: where the ring goes on when it is set up again.
    pub fn base(&self) -> u16 {
        self.taken
    }

    /// For those who look.
    pub fn indices(&self) -> Indices {
        let available = self.available_index(Ordering::Relaxed);
        Indices { available, taken: self.taken, used: self.used, published: self.published }
    }

    /// Chains that are there and not taken.
    pub fn pending(&self) -> Result<u16, Broken> {
        let count = self.available_index(Ordering::Acquire).wrapping_sub(self.taken);
        if count > self.layout.size { Err(Broken::Available(count)) } else { Ok(count) }
    }

    /// The first descriptor of the next one; [`pending`](Self::pending) has said that there is one. It is taken by [`advance`](Self::advance).
    pub fn head(&self) -> Result<u16, Broken> {
        let Place { memory, offset } = &self.layout.available;
        let entry = usize::from(self.taken & (self.layout.size - 1));
        let head = u16::from_le(memory.atomic_u16(offset + 4 + 2 * entry).load(Ordering::Relaxed));
        if head < self.layout.size { Ok(head) } else { Err(Broken::Index(head)) }
    }

    /// It is taken.
    pub fn advance(&mut self) {
        self.taken = self.taken.wrapping_add(1);
    }

    /// The buffers of a chain, those that are read first. `buffers` has room for [`chain_max`], so that nothing is allocated.
    pub fn chain(&self, head: u16, regions: &Regions, buffers: &mut Vec<Buffer>) -> Result<(), Broken> {
        buffers.clear();
        let size = self.layout.size;
        let (mut index, mut sum, mut seen) = (head, 0_u64, 0);
        loop {
            if index >= size {
                return Err(Broken::Index(index));
            }
            if seen == size {
                return Err(Broken::Loop);
            }
            seen += 1;
            let Place { memory, offset } = &self.layout.table;
            let descriptor = Descriptor::of(memory.read_once(offset + DESCRIPTOR * usize::from(index)));
            if descriptor.flags & INDIRECT != 0 {
                if descriptor.flags & NEXT != 0 {
                    return Err(Broken::TableHasNext);
                }
                return self.table(&descriptor, regions, &mut sum, buffers);
            }
            self.push(&descriptor, &mut sum, buffers)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    /// The buffers of a table elsewhere in the guest's memory.
    fn table(
        &self,
        table: &Descriptor,
        regions: &Regions,
        sum: &mut u64,
        buffers: &mut Vec<Buffer>,
    ) -> Result<(), Broken> {
        if !self.layout.tables {
            return Err(Broken::NoTables);
        }
        let count = table.len / DESCRIPTOR as u32;
        if count == 0 || !table.len.is_multiple_of(DESCRIPTOR as u32) {
            return Err(Broken::TableLength(table.len));
        }
        let (mut index, mut seen) = (0, 0);
        loop {
            if u32::from(index) >= count {
                return Err(Broken::Index(index));
            }
            if seen == chain_max(self.layout.size) {
                return Err(Broken::Loop);
            }
            seen += 1;
            let mut bytes = [0; DESCRIPTOR];
            let mut rest = &mut bytes[..];
            let at = table.at.checked_add(u64::from(index) * DESCRIPTOR as u64).ok_or(Broken::Outside)?;
            regions.places(at, DESCRIPTOR as u64, |memory, offset, count| {
                let (now, later) = std::mem::take(&mut rest).split_at_mut(count);
                memory.read(offset, now);
                rest = later;
                Ok::<_, Broken>(())
            })?;
            let descriptor = Descriptor::of(bytes);
            if descriptor.flags & INDIRECT != 0 {
                return Err(Broken::TableInTable);
            }
            self.push(&descriptor, sum, buffers)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    fn push(&self, descriptor: &Descriptor, sum: &mut u64, buffers: &mut Vec<Buffer>) -> Result<(), Broken> {
        let &Descriptor { at, len, flags, .. } = descriptor;
        let writable = flags & WRITE != 0;
        if !writable && buffers.last().is_some_and(|last| last.writable) {
            return Err(Broken::Order);
        }
        *sum += u64::from(len);
        if *sum >= 1 << 32 {
            return Err(Broken::Length);
        }
        if buffers.len() == usize::from(chain_max(self.layout.size)) {
            return Err(Broken::Loop);
        }
        buffers.push(Buffer { at, len, writable });
        Ok(())
    }

    /// Answers a chain, of which `written` bytes were written; not yet visible.
    pub fn answer(&mut self, head: u16, written: u32) {
        let Place { memory, offset } = &self.layout.used;
        let entry = usize::from(self.used & (self.layout.size - 1));
        let [a, b] = [u32::from(head), written].map(u32::to_le_bytes);
        memory.write_once(offset + 4 + 8 * entry, [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]);
        self.used = self.used.wrapping_add(1);
    }

    /// Makes the answers visible. True: the driver wants to be notified.
    pub fn publish(&mut self) -> bool {
        if self.used == self.published {
            return false;
        }
        let Place { memory, offset } = &self.layout.used;
        memory.atomic_u16(offset + 2).store(self.used.to_le(), Ordering::Release);
        // Either we see here that it wants to be notified, or it sees, having said so, what was just published.
        fence(Ordering::SeqCst);
        let Place { memory, offset } = &self.layout.available;
        let before = std::mem::replace(&mut self.published, self.used);
        if std::mem::take(&mut self.fresh) {
            return true;
        }
        if self.layout.event_idx {
            let event = memory.atomic_u16(offset + 4 + 2 * usize::from(self.layout.size)).load(Ordering::Relaxed);
            let event = u16::from_le(event);
            return self.used.wrapping_sub(event).wrapping_sub(1) < self.used.wrapping_sub(before);
        }
        u16::from_le(memory.atomic_u16(*offset).load(Ordering::Relaxed)) & QUIET == 0
    }

    /// Asks for a notification. True: there is something already.
    pub fn arm(&mut self) -> bool {
        let Place { memory, offset } = &self.layout.used;
        if self.layout.event_idx {
            let at = offset + 4 + 8 * usize::from(self.layout.size);
            memory.atomic_u16(at).store(self.taken.to_le(), Ordering::Relaxed);
        } else {
            memory.atomic_u16(*offset).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.available_index(Ordering::Acquire) != self.taken
    }

    /// Wants no notification as long as it looks by itself.
    pub fn disarm(&mut self) {
        // With EVENT_IDX the index that was asked for is behind by now, which says the same.
        if !self.layout.event_idx {
            let Place { memory, offset } = &self.layout.used;
            memory.atomic_u16(*offset).store(QUIET.to_le(), Ordering::Relaxed);
        }
    }
}
