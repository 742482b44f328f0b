//! A file of which every sector that was written since the last flush may or may not be there after a crash.

use std::collections::HashMap;
use std::rc::Rc;

use drivers::vhd::Source;
use fastrand::Rng;

pub(crate) type Sector = Rc<[u8; 512]>;

/// How it stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// The process dies. What was completed is there.
    Kill,
    /// The power fails. What was flushed is there.
    Power,
}

/// A write of some sectors that is not known to be durable.
#[derive(Clone, Debug)]
struct Write {
    id: u64,
    first: u64,
    data: Vec<Sector>,
    complete: bool,
}

/// What a crash leaves.
#[derive(Clone, Debug, Default)]
pub(crate) struct Image {
    pub(crate) sectors: HashMap<u64, Sector>,
    pub(crate) size: u64,
}

impl Source for Image {
    fn size(&self) -> std::io::Result<u64> {
        Ok(self.size)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> std::io::Result<()> {
        assert!(at + to.len() as u64 <= self.size);
        for (i, byte) in to.iter_mut().enumerate() {
            let at = at + i as u64;
            *byte = self.sectors.get(&(at / 512)).map_or(0, |sector| sector[(at % 512) as usize]);
        }
        Ok(())
    }
}

/// The file, or device, in use.
#[derive(Debug)]
pub(crate) struct Medium {
    durable: Image,
    /// In the order in which they were begun.
    writes: Vec<Write>,
    /// Size as it is seen while in use, and the size that each extension gave it that is not durable.
    size: u64,
    next: u64,
    /// Flushes under way, and which writes they are about.
    flushes: HashMap<u64, (Vec<u64>, u64)>,
}

impl Medium {
    pub(crate) fn new(image: Image) -> Medium {
        let size = image.size;
        Medium { durable: image, writes: Vec::new(), size, next: 0, flushes: HashMap::new() }
    }

    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Begins a write of whole sectors.
    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) -> u64 {
        assert!(at.is_multiple_of(512) && bytes.len().is_multiple_of(512) && !bytes.is_empty());
        assert!(at + bytes.len() as u64 <= self.size, "a write at {at} beyond {}", self.size);
        let data = bytes.chunks_exact(512).map(|sector| Rc::new(sector.try_into().unwrap())).collect();
        let id = self.id();
        self.writes.push(Write { id, first: at / 512, data, complete: false });
        id
    }

    /// Begins a flush of what is complete.
    pub(crate) fn flush(&mut self) -> u64 {
        let about = self.writes.iter().filter(|write| write.complete).map(|write| write.id).collect();
        let id = self.id();
        self.flushes.insert(id, (about, self.size));
        id
    }

    /// The file has that size from now on.
    pub(crate) fn extend(&mut self, size: u64) {
        self.size = self.size.max(size);
    }

    /// Something is complete.
    pub(crate) fn complete(&mut self, id: u64) {
        if let Some((about, size)) = self.flushes.remove(&id) {
            self.durable.size = self.durable.size.max(size);
            for write in self.writes.extract_if(.., |write| about.contains(&write.id)) {
                for (sector, data) in (write.first..).zip(write.data) {
                    self.durable.sectors.insert(sector, data);
                }
            }
            return;
        }
        let write = self.writes.iter_mut().find(|write| write.id == id).unwrap();
        write.complete = true;
    }

    /// A write has failed. Of each of its sectors it is not known whether it is there.
    pub(crate) fn fail(&mut self, id: u64, rng: &mut Rng) {
        let index = self.writes.iter().position(|write| write.id == id).unwrap();
        let failed = self.writes.remove(index);
        let there = (failed.first..).zip(failed.data).filter(|_| rng.bool());
        let there = there.map(|(first, data)| Write { id: failed.id, first, data: vec![data], complete: true });
        self.writes.splice(index..index, there);
    }

    /// What is read while it is in use: all that is complete.
    pub(crate) fn read(&self, at: u64, to: &mut [u8]) {
        for (sector, bytes) in (at / 512..).zip(to.chunks_exact_mut(512)) {
            let written = self.writes.iter().rev().find_map(|write| {
                let index = sector.checked_sub(write.first)? as usize;
                write.complete.then(|| write.data.get(index)).flatten()
            });
            match written.or(self.durable.sectors.get(&sector)) {
                Some(data) => bytes.copy_from_slice(&data[..]),
                None => bytes.fill(0),
            }
        }
    }

    /// What is there after a crash: of each sector any of what was written to it and might be lost.
    pub(crate) fn cut(&self, cut: Cut, rng: &mut Rng) -> Image {
        let mut image = self.durable.clone();
        // A crash that leaves the most, one that leaves the least, and those between.
        let odds = [0.0, 0.1, 0.5, 0.9, 1.0][rng.usize(..5)];
        let grown = match cut {
            Cut::Kill => true,
            Cut::Power => rng.f64() < odds,
        };
        if grown {
            image.size = self.size;
        }
        for write in &self.writes {
            let certain = cut == Cut::Kill && write.complete;
            for (sector, data) in (write.first..).zip(&write.data) {
                let there = certain || rng.f64() < odds;
                if there && (sector + 1) * 512 <= self.size {
                    image.sectors.insert(sector, Rc::clone(data));
                    image.size = image.size.max((sector + 1) * 512);
                }
            }
        }
        image
    }
}
