//! A VHD image with some bytes changed, in use: requests, failures and ends in any order. It never hangs, each write is
//! answered, and no two blocks have the same place.
#![no_main]

use std::collections::{BTreeMap, HashMap, HashSet};

use drivers::vhd::{
    Batmap, Disk, FOOTER_SIZE, Footer, HEADER_SIZE, Header, Image, Kind, Settings, Source, Table, Uuid,
};
use drivers::{Ask, Durability, Extent, Fail, LastStep, Layer, Meta, MetaOp, Op, Plan, Ticket};
use libfuzzer_sys::fuzz_target;
use zerocopy::{FromBytes, IntoBytes};

const TABLE: usize = FOOTER_SIZE + HEADER_SIZE;
const SECTOR: u64 = 512;

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self) -> Option<u64> {
        Some(u64::from(self.byte()?) << 8 | u64::from(self.byte()?))
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

/// An image of up to 300 blocks, some of which are there, and some of whose bytes are changed.
fn file(input: &mut Input) -> Option<File> {
    let (kind, blocks, there) = (input.byte()?, 1 + input.number()? as u32 % 300, input.byte()?);
    let block_size = 4096_u32 << (kind / 4 % 3);
    let size = u64::from(blocks) * u64::from(block_size) - SECTOR * u64::from(kind / 16 % 8);
    let with_parent = if kind % 2 == 0 { Kind::Dynamic } else { Kind::Differencing };
    let footer = Footer::new(with_parent, size, Uuid([7; 16]), 1_000_000_000);
    let header = Header::new(TABLE as u64, blocks, block_size);
    let mut table = Table::empty(blocks);
    let mut bytes = [footer.as_bytes(), header.as_bytes()].concat();
    bytes.resize(TABLE + Table::bytes(blocks) as usize, 0);
    if kind / 2 % 2 == 0 {
        let mut full = Batmap::empty(bytes.len() as u64, blocks);
        full.set(0, there & 1 != 0);
        bytes.extend([full.header().as_slice(), full.bits()].concat());
    }
    for block in (0..blocks.min(8)).filter(|block| there & 1 << block != 0) {
        table.set(block, bytes.len() as u64);
        bytes.extend([there; 512]);
        bytes.resize(bytes.len() + block_size as usize, there);
    }
    table.write(0, &mut bytes[TABLE..TABLE + Table::bytes(blocks) as usize]);
    bytes.extend(footer.as_bytes());
    // Near the beginning, where the metadata is.
    for _ in 0..input.byte()? % 8 {
        let at = input.number()? as usize % (bytes.len() - FOOTER_SIZE).min(TABLE + 4096);
        bytes[at] = input.byte()?;
    }
    let last = bytes.len() - FOOTER_SIZE;
    bytes.copy_within(..FOOTER_SIZE, last);
    for at in [0, last] {
        Footer::mut_from_bytes(&mut bytes[at..at + FOOTER_SIZE]).unwrap().seal();
    }
    Header::mut_from_bytes(&mut bytes[FOOTER_SIZE..TABLE]).unwrap().seal();
    Some(File(bytes))
}

enum Under {
    Data(Option<Ticket>),
    Meta(Meta, Vec<u8>),
}

struct Use {
    file: File,
    image: Image,
    disk: Disk,
    limit: u64,
    under_way: Vec<Under>,
    tickets: HashSet<Ticket>,
    /// Metadata that was written.
    sectors: HashMap<u64, Vec<u8>>,
    /// Whose place it is, and where it ends, by where it begins.
    places: BTreeMap<u64, (u32, u64)>,
}

impl Use {
    fn new(file: File, image: Image, input: &mut Input) -> Option<Use> {
        let (how, bitmaps) = (input.byte()?, input.byte()?);
        let device = how & 1 != 0;
        let device_end = image.footer_at + u64::from(how / 8) * 10_000;
        let settings = Settings {
            durability: if how & 2 != 0 { Durability::Flush } else { Durability::Order },
            zeros: !device,
            usable: if device { device_end } else { image.end() },
            limit: if device { device_end } else { i64::MAX as u64 },
            step: 4096 * u64::from(bitmaps),
            preallocate: how & 4 != 0,
            bitmap_cache: usize::from(bitmaps) * 1536,
            tickets: 1 + usize::from(how / 8),
            footer_at: device.then_some(device_end),
        };
        let disk = Disk::new(&image, &settings)?;
        let header = image.header.as_ref()?;
        let bitmaps = u64::from(bitmaps) * (1536 + 200) + 32 * (header.bitmap_size() + 200);
        assert!(disk.bytes() as u64 <= 2 * file.0.len() as u64 + bitmaps, "{} bytes of memory", disk.bytes());
        let places = image.table.allocated().map(|(block, at)| (at, (block, at + header.block_len()))).collect();
        Some(Use {
            file,
            image,
            disk,
            limit: settings.limit,
            under_way: Vec::new(),
            tickets: HashSet::new(),
            sectors: HashMap::new(),
            places,
        })
    }

    fn header(&self) -> &Header {
        self.image.header.as_ref().unwrap()
    }

    /// A block's bitmap begins there, and nobody else's.
    fn claim(&mut self, block: u32, at: u64) {
        let end = at + self.header().block_len();
        if self.places.get(&at) == Some(&(block, end)) {
            return;
        }
        assert!(at >= self.image.metadata_end && end <= self.limit, "block {block} is at {at}");
        self.nobodys(at, end);
        self.places.insert(at, (block, end));
    }

    /// No block has any of that.
    fn nobodys(&self, at: u64, end: u64) {
        if let Some((_, (owner, ends))) = self.places.range(..end).next_back() {
            assert!(*ends <= at, "bytes {at} to {end} are block {owner}'s");
        }
    }

    fn request(&mut self, op: Op, input: &mut Input) -> Option<()> {
        let (size, block_size) = (self.disk.size().unwrap(), u64::from(self.header().block_size()));
        let sectors = size / SECTOR;
        let near = input.number()? % 300 * block_size / SECTOR;
        let first = (near + input.number()?) % sectors;
        let len = (1 + input.number()? % 70).min(sectors - first);
        let mut extent = Extent { offset: first * SECTOR, len: len * SECTOR };
        while extent.len > 0 {
            let count = match self.disk.plan(&Ask::of(op, extent.offset, extent.len)) {
                Plan::Data { file: _, at, count, ticket } => {
                    let block = (extent.offset / block_size) as u32;
                    let from = self.header().bitmap_size() + extent.offset % block_size;
                    self.claim(block, at - from);
                    assert!(ticket.is_none() || op == Op::Write || op == Op::WriteZeroes);
                    assert!(ticket.is_none_or(|ticket| self.tickets.insert(ticket)), "a ticket is given twice");
                    self.under_way.push(Under::Data(ticket));
                    count
                }
                Plan::Below { count } | Plan::Zeros { count, .. } => count,
                Plan::Wait { .. } => {
                    self.pump();
                    assert!(!self.under_way.is_empty(), "it waits for nothing");
                    return Some(());
                }
                Plan::Fail(Fail::NoSpace | Fail::Io) => return Some(()),
                other @ (Plan::Both { .. } | Plan::Through(_)) => panic!("{other:?} is none of an image's"),
            };
            assert!(count > 0 && count <= extent.len && count % SECTOR == 0);
            (extent.offset, extent.len) = (extent.offset + count, extent.len - count);
            self.pump();
        }
        Some(())
    }

    fn pump(&mut self) {
        for asked in 0.. {
            assert!(asked < 1000, "it always wants something");
            let Some(meta) = self.disk.next_meta() else { break };
            let mut bytes = Vec::new();
            if meta.op == MetaOp::Write {
                assert!(meta.len as usize <= self.disk.meta_len() && meta.at.is_multiple_of(SECTOR), "{meta:?}");
                bytes.resize(meta.len as usize, 0);
                self.disk.meta_bytes(meta.id, &mut bytes);
                if !self.places.contains_key(&meta.at) {
                    self.look_at_table(&meta, &bytes);
                }
            }
            self.under_way.push(Under::Meta(meta, bytes));
        }
    }

    /// Entries of the table that are about to be written.
    fn look_at_table(&mut self, meta: &Meta, bytes: &[u8]) {
        self.nobodys(meta.at, meta.at + meta.len);
        let first = meta.at.wrapping_sub(self.header().table_at()) / 4;
        let blocks = u64::from(self.image.table.blocks());
        assert!(first < blocks, "{meta:?} is neither a block's nor the table's");
        for (block, at) in Table::parse(bytes, (blocks - first).min(128) as u32).unwrap().allocated() {
            self.claim(first as u32 + block, at);
        }
    }

    fn complete(&mut self, which: usize, done: bool) {
        if self.under_way.is_empty() {
            return;
        }
        match self.under_way.swap_remove(which % self.under_way.len()) {
            Under::Data(Some(ticket)) => self.disk.ended(ticket, done),
            Under::Data(None) => {}
            Under::Meta(Meta { id, op, at, len, .. }, bytes) => {
                let mut read = Vec::new();
                let wanted = if op == MetaOp::Read { at..at + len } else { 0..0 };
                for sector in wanted.step_by(512) {
                    let there = self.file.0.get(sector as usize..(sector + SECTOR) as usize);
                    let there = there.map_or(vec![0; 512], <[u8]>::to_vec);
                    read.extend(self.sectors.get(&sector).unwrap_or(&there));
                }
                for (sector, bytes) in (at..).step_by(512).zip(bytes.chunks(512)).filter(|_| done) {
                    self.sectors.insert(sector, bytes.to_vec());
                }
                self.disk.meta_done(id, done.then_some(&read));
            }
        }
        while let Some(settled) = self.disk.settled() {
            assert!(self.tickets.remove(&settled.ticket), "{settled:?} is nobody's");
        }
        self.pump();
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let Some(file) = file(&mut input) else { return };
    let Ok(image) = Image::read(&file, &mut Vec::new()) else { return };
    let Some(mut used) = Use::new(file, image, &mut input) else { return };
    while let Some(what) = input.byte() {
        let done = match what % 8 {
            0..2 => used.request(Op::Write, &mut input),
            2 => used.request([Op::Read, Op::WriteZeroes, Op::Discard][usize::from(what / 8) % 3], &mut input),
            // One of eight fails.
            _ => Some(used.complete(what.into(), what / 32 != 7)),
        };
        if done.is_none() {
            break;
        }
    }
    for _ in 0..100_000 {
        if used.under_way.is_empty() {
            break;
        }
        used.complete(0, true);
    }
    assert!(used.under_way.is_empty() && used.tickets.is_empty(), "{} writes are not answered", used.tickets.len());
    let mut last = 0;
    let metadata = FOOTER_SIZE as u64..used.header().table_at() + Table::bytes(used.image.table.blocks());
    let (mut written, mut length) = (Vec::new(), None);
    used.disk.close(1_000_000_000, &mut |step| match step {
        LastStep::Write { at, bytes, .. } => written.push((at, at + bytes.len() as u64)),
        LastStep::Resize { size, .. } => length = Some(size),
        LastStep::Flush { .. } => {}
    });
    for (at, end) in written {
        used.nobodys(at, end);
        assert!(end <= metadata.start || at >= metadata.end, "bytes {at} to {end} are metadata");
        last = end;
    }
    assert!(length.is_none_or(|length| length == last));
});
