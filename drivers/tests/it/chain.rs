//! Chains of images in memory that are written, cut, snapshot, merged and opened again at random: the whole disk is what a
//! vector of bytes says.

use std::collections::HashSet;

use crate::common::{Where, empty};
use drivers::vhd::{Batmap, Disk, FOOTER_SIZE, Image, Kind, Settings, Source};
use drivers::{Ask, Durability, Extent, LastStep, Layer, Meta, MetaOp, Op, Plan, Ticket};
use fastrand::Rng;

const BLOCKS: u32 = 24;
const BLOCK_SIZE: u32 = 8192;
const SIZE: u64 = BLOCKS as u64 * BLOCK_SIZE as u64;
/// What a device has that others had before.
const OLD: u8 = 0xee;

/// Says which seed it was, if this is dropped by a panic.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}", self.0);
        }
    }
}

struct File(Vec<u8>);

impl Source for File {
    fn size(&self) -> std::io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> std::io::Result<()> {
        to.copy_from_slice(&self.0[at as usize..][..to.len()]);
        Ok(())
    }
}

/// Something that is not done yet.
enum Under {
    Data { at: u64, bytes: Vec<u8>, ticket: Option<Ticket> },
    Meta { meta: Meta, bytes: Vec<u8> },
}

/// An image in use, whose I/Os are done in any order.
struct OpenImage {
    file: File,
    on: Where,
    disk: Disk,
    under_way: Vec<Under>,
    /// Of writes that are not settled.
    tickets: HashSet<Ticket>,
}

impl OpenImage {
    fn new(kind: Kind, rng: &mut Rng) -> OpenImage {
        let mut bytes = empty(kind, BLOCKS, BLOCK_SIZE);
        let last = bytes[..FOOTER_SIZE].to_vec();
        if rng.bool() {
            let full = Batmap::empty(bytes.len() as u64, BLOCKS);
            bytes.extend(full.header());
            bytes.extend(full.bits());
        }
        let on = if rng.bool() { Where::File } else { Where::Device };
        if on == Where::Device {
            bytes.resize((SIZE + u64::from(BLOCKS + 2) * 4096) as usize, OLD);
        }
        bytes.extend(last);
        OpenImage::open(File(bytes), on, rng)
    }

    /// Opens it as whoever writes it does.
    fn open(mut file: File, on: Where, rng: &mut Rng) -> OpenImage {
        let mut problems = Vec::new();
        let image = Image::read(&file, &mut problems).unwrap();
        assert_eq!(problems, [], "it was closed");
        if on == Where::File {
            // The end is nobody's, and zeros.
            file.0.truncate(image.end() as usize);
            file.0.resize(image.end() as usize + 512, 0);
        }
        let usable = if on == Where::File { file.0.len() as u64 } else { image.footer_at };
        let settings = Settings {
            durability: if rng.bool() { Durability::Flush } else { Durability::Order },
            zeros: on == Where::File,
            usable,
            limit: if on == Where::File { u64::MAX } else { usable },
            step: u64::from(BLOCK_SIZE) * rng.u64(1..5),
            preallocate: rng.bool(),
            bitmap_cache: 8 * 3 * 512,
            tickets: rng.usize(1..10),
            footer_at: (on == Where::Device).then_some(image.footer_at),
        };
        let disk = Disk::new(&image, &settings).unwrap();
        OpenImage { file, on, disk, under_way: Vec::new(), tickets: HashSet::new() }
    }

    fn close(mut self) -> (File, Where) {
        let file = &mut self.file;
        self.disk.close(1_000_000_000, &mut |step| match step {
            LastStep::Write { at, bytes, .. } => put(file, at, &bytes),
            LastStep::Resize { size, .. } => file.0.resize(size as usize, 0),
            LastStep::Flush { .. } => {}
        });
        (self.file, self.on)
    }

    fn reopen(&mut self, rng: &mut Rng) {
        let other = OpenImage::new(Kind::Dynamic, rng);
        let (file, on) = std::mem::replace(self, other).close();
        *self = OpenImage::open(file, on, rng);
    }

    /// Begins what the image wants.
    fn pump(&mut self) {
        while let Some(meta) = self.disk.next_meta() {
            let mut bytes = Vec::new();
            if meta.op == MetaOp::Write {
                bytes.resize(meta.len as usize, 0);
                self.disk.meta_bytes(meta.id, &mut bytes);
            }
            self.under_way.push(Under::Meta { meta, bytes });
        }
    }

    /// Does something that is under way. False: there is nothing.
    fn complete(&mut self, rng: &mut Rng) -> bool {
        self.pump();
        if self.under_way.is_empty() {
            return false;
        }
        match self.under_way.swap_remove(rng.usize(..self.under_way.len())) {
            Under::Data { at, bytes, ticket } => {
                put(&mut self.file, at, &bytes);
                if let Some(ticket) = ticket {
                    self.disk.ended(ticket, true);
                }
            }
            Under::Meta { meta, mut bytes } => {
                match meta.op {
                    MetaOp::Read => bytes.extend(&self.file.0[meta.at as usize..][..meta.len as usize]),
                    MetaOp::Write => put(&mut self.file, meta.at, &bytes),
                    MetaOp::Extend => put(&mut self.file, meta.at, &vec![0; meta.len as usize]),
                    MetaOp::Flush | MetaOp::Discard => {}
                }
                let read = if meta.op == MetaOp::Read { bytes.as_slice() } else { &[] };
                self.disk.meta_done(meta.id, Some(read));
            }
        }
        while let Some(settled) = self.disk.settled() {
            assert!(settled.done && self.tickets.remove(&settled.ticket), "{settled:?}");
        }
        true
    }

    fn plan(&mut self, op: Op, extent: Extent, rng: &mut Rng) -> Plan {
        loop {
            match self.disk.plan(&Ask::of(op, extent.offset, extent.len)) {
                Plan::Wait { .. } => assert!(self.complete(rng), "it waits for nothing"),
                plan => return plan,
            }
        }
    }

    /// Writes, zeroes or discards: `data` goes where the image says.
    fn change(&mut self, op: Op, offset: u64, data: &[u8], rng: &mut Rng) {
        let mut done = 0;
        while done < data.len() as u64 {
            let extent = Extent { offset: offset + done, len: data.len() as u64 - done };
            done += match self.plan(op, extent, rng) {
                Plan::Data { file: _, at, count, ticket } => {
                    let bytes = data[done as usize..][..count as usize].to_vec();
                    self.under_way.push(Under::Data { at, bytes, ticket });
                    assert!(ticket.is_none_or(|ticket| self.tickets.insert(ticket)), "{ticket:?} is another's");
                    count
                }
                Plan::Zeros { count, ticket: None } if op != Op::Write => count,
                plan => panic!("{op:?} {extent:?}: {plan:?}"),
            };
            if rng.bool() {
                self.complete(rng);
            }
        }
        while self.complete(rng) {}
        assert!(self.tickets.is_empty(), "writes that nobody answers");
    }
}

fn put(file: &mut File, at: u64, bytes: &[u8]) {
    let end = at as usize + bytes.len();
    if file.0.len() < end {
        file.0.resize(end, 0);
    }
    file.0[at as usize..end].copy_from_slice(bytes);
}

/// Images, the leaf first, and what the disk is.
struct Chain {
    layers: Vec<OpenImage>,
    model: Vec<u8>,
    rng: Rng,
}

impl Chain {
    fn new(seed: u64) -> Chain {
        let mut rng = Rng::with_seed(seed);
        let kind = if rng.bool() { Kind::Dynamic } else { Kind::Differencing };
        Chain { layers: vec![OpenImage::new(kind, &mut rng)], model: vec![0; SIZE as usize], rng }
    }

    fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < len {
            let done = bytes.len() as u64;
            let mut extent = Extent { offset: offset + done, len: len - done };
            let found = self.layers.iter_mut().find_map(|layer| match layer.plan(Op::Read, extent, &mut self.rng) {
                Plan::Data { file: _, at, count, ticket: None } => {
                    Some(layer.file.0[at as usize..][..count as usize].to_vec())
                }
                Plan::Zeros { count, ticket: None } => Some(vec![0; count as usize]),
                Plan::Below { count } => {
                    extent.len = count;
                    None
                }
                plan => panic!("{extent:?}: {plan:?}"),
            });
            match found {
                Some(data) => bytes.extend(data),
                None => bytes.resize((done + extent.len) as usize, 0),
            }
        }
        bytes
    }

    /// Some sectors.
    fn extent(&mut self) -> std::ops::Range<usize> {
        let most = [4, 40][self.rng.usize(..2)];
        let sectors = self.rng.usize(1..most);
        let first = self.rng.usize(..SIZE as usize / 512 - sectors);
        first * 512..(first + sectors) * 512
    }

    fn step(&mut self) {
        let range = self.extent();
        let offset = range.start as u64;
        match self.rng.u32(..100) {
            0..50 => {
                let data = vec![self.rng.u8(1..OLD); range.len()];
                self.layers[0].change(Op::Write, offset, &data, &mut self.rng);
                self.model[range].copy_from_slice(&data);
            }
            50..65 => {
                self.layers[0].change(Op::WriteZeroes, offset, &vec![0; range.len()], &mut self.rng);
                self.model[range].fill(0);
            }
            65..80 => {
                self.layers[0].change(Op::Discard, offset, &vec![0; range.len()], &mut self.rng);
                let found = self.read(offset, range.len() as u64);
                for (new, old) in found.iter().zip(&self.model[range.clone()]) {
                    assert!(*new == *old || *new == 0, "{range:?}: discarded, it is {new}, and was {old}");
                }
                self.model[range].copy_from_slice(&found);
            }
            80..88 => {
                let index = self.rng.usize(..self.layers.len());
                self.layers[index].reopen(&mut self.rng);
            }
            88..95 if self.layers.len() < 10 => {
                self.layers.insert(0, OpenImage::new(Kind::Differencing, &mut self.rng));
            }
            _ if self.layers.len() > 1 => self.merge(),
            _ => {}
        }
        let whole = self.read(0, SIZE);
        let wrong = whole.iter().zip(&self.model).position(|(found, expected)| found != expected);
        assert_eq!(wrong, None, "byte of the disk, which has {} layers", self.layers.len());
    }

    /// A layer's data goes to the one below it.
    fn merge(&mut self) {
        let index = self.rng.usize(..self.layers.len() - 1);
        let mut upper = self.layers.remove(index);
        let lower = &mut self.layers[index];
        let mut offset = 0;
        while offset < SIZE {
            offset += match upper.plan(Op::Read, Extent { offset, len: SIZE - offset }, &mut self.rng) {
                Plan::Data { file: _, at, count, .. } => {
                    let data = upper.file.0[at as usize..][..count as usize].to_vec();
                    lower.change(Op::Write, offset, &data, &mut self.rng);
                    count
                }
                Plan::Below { count } => count,
                plan => panic!("{plan:?}"),
            };
        }
    }
}

#[test]
fn a_chain_is_what_was_written_to_it() {
    for seed in 0..60 {
        let _seed = Seed(seed);
        let mut chain = Chain::new(seed);
        for _ in 0..300 {
            chain.step();
        }
    }
}
