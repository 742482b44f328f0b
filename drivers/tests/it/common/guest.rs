//! A guest that writes and flushes at random, and knows what it must find after a crash.

use std::collections::{HashMap, HashSet};

use drivers::vhd::{Corrupt, Disk, Image as Vhd, Kind, Problem, Settings};
use drivers::{Ask, Durability, Extent, Fail, Layer, MetaId, MetaOp, Op, Plan, Ticket};
use fastrand::Rng;

use super::medium::{Cut, Image, Medium};
use super::{Where, empty};

/// What is tried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) kind: Kind,
    pub(crate) on: Where,
    pub(crate) durability: Durability,
    pub(crate) blocks: u32,
    pub(crate) block_size: u32,
    /// One of so many I/Os fails; 0: none.
    pub(crate) faults: u32,
}

/// What a sector may have: a number that counts its writes; 0 what was below the image.
#[derive(Clone, Debug, Default)]
struct Known {
    /// What it must have if nothing of `later`.
    stable: u64,
    /// The last one that was answered.
    answered: u64,
    /// Written after `stable`.
    later: Vec<u64>,
    busy: bool,
}

#[derive(Debug)]
enum Under {
    Data {
        first: u64,
        versions: Vec<u64>,
        ticket: Option<Ticket>,
    },
    Meta {
        id: MetaId,
        op: MetaOp,
        at: u64,
        len: u64,
    },
    /// The guest's flush, and what was answered when it began.
    Flush(Vec<(u64, u64)>),
}

pub(crate) struct Guest {
    setup: Setup,
    rng: Rng,
    disk: Disk,
    medium: Medium,
    sectors: HashMap<u64, Known>,
    under_way: Vec<(u64, Under)>,
    /// What is wrong with the image before anything is written.
    flaws: Vec<Problem>,
    /// Data that is down, and whose ticket is not settled.
    tickets: HashMap<Ticket, (u64, Vec<u64>)>,
    version: u64,
    /// Blocks that are written more than others.
    hot: Vec<u64>,
    pub(crate) cuts: u64,
    pub(crate) out_of_space: u64,
}

/// When it is looked at, seconds of Unix.
const NOW: u64 = 2_000_000_000;

fn stamp(sector: u64, version: u64) -> [u8; 512] {
    let mut bytes = [0x5a; 512];
    bytes[..8].copy_from_slice(&(sector + 1).to_be_bytes());
    bytes[8..16].copy_from_slice(&version.to_be_bytes());
    bytes
}

fn settings(setup: &Setup, image: &Image) -> Settings {
    let file = setup.on == Where::File;
    Settings {
        durability: setup.durability,
        zeros: file,
        usable: image.size,
        limit: if file { u64::MAX } else { image.size },
        step: 8 * u64::from(setup.block_size),
        preallocate: false,
        bitmap_cache: 16 * 3 * 512,
        tickets: 24,
        footer_at: None,
    }
}

fn open(setup: &Setup, mut image: Image) -> (Disk, Image) {
    let (vhd, _) = check(&image);
    if setup.on == Where::File {
        // Whoever opens a file to write it cuts off what is behind the image, but for a sector of zeros.
        let end = vhd.end().next_multiple_of(512);
        image.sectors.retain(|sector, _| (sector + 1) * 512 <= end);
        image.size = end + 512;
    }
    (Disk::new(&vhd, &settings(setup, &image)).unwrap(), image)
}

/// Reads an image after a crash. Whatever is wrong with it is what opening mends.
fn check(image: &Image) -> (Vhd, Vec<Problem>) {
    let mut problems = Vec::new();
    let vhd = Vhd::read(image, &mut problems).unwrap_or_else(|error| panic!("{error}"));
    let mended = |problem: &Problem| matches!(problem.what, Corrupt::Cookie { what: "footer" });
    assert!(problems.iter().all(mended), "{problems:?}");
    (vhd, problems)
}

impl Guest {
    pub(crate) fn new(setup: Setup, seed: u64) -> Guest {
        let mut rng = Rng::with_seed(seed);
        let bytes = empty(setup.kind, setup.blocks, setup.block_size);
        let mut image = Image { size: bytes.len() as u64, ..Image::default() };
        if setup.on == Where::Device {
            // Of somebody who had the device before.
            image.size += (u64::from(setup.blocks) * u64::from(setup.block_size + 4096)) * 2 / 3;
            let old: Vec<u64> = (0..image.size / 512).collect();
            old.iter().for_each(|sector| drop(image.sectors.insert(*sector, stamp(1 << 40 | sector, 99).into())));
        }
        for (sector, data) in (0..).zip(bytes.chunks_exact(512)) {
            image.sectors.insert(sector, <[u8; 512]>::try_from(data).unwrap().into());
        }
        let flaws = Vhd::check(&image, NOW).unwrap();
        let (disk, image) = open(&setup, image);
        let hot = (0..4).map(|_| rng.u64(..u64::from(setup.blocks))).collect();
        Guest {
            setup,
            flaws,
            rng,
            disk,
            medium: Medium::new(image),
            sectors: HashMap::new(),
            under_way: Vec::new(),
            tickets: HashMap::new(),
            version: 0,
            hot,
            cuts: 0,
            out_of_space: 0,
        }
    }

    /// Something happens.
    pub(crate) fn step(&mut self) {
        match self.rng.u32(..100) {
            0..35 => self.write(),
            35..38 => self.flush(),
            38..45 => self.look(),
            _ => self.complete(),
        }
        self.pump();
    }

    fn write(&mut self) {
        let in_block = u64::from(self.setup.block_size / 512);
        let block = match self.rng.bool() {
            true => self.hot[self.rng.usize(..self.hot.len())],
            false => self.rng.u64(..u64::from(self.setup.blocks)),
        };
        let mut first = block * in_block + self.rng.u64(..in_block);
        let end = (first + self.rng.u64(1..2 * in_block)).min(u64::from(self.setup.blocks) * in_block);
        let busy = |guest: &Guest, sector| guest.sectors.get(&sector).is_some_and(|known| known.busy);
        if (first..end).any(|sector| busy(self, sector)) {
            return;
        }
        while first < end {
            let extent = Extent { offset: first * 512, len: (end - first) * 512 };
            let Plan::Data { file: _, at, count, ticket } =
                self.disk.plan(&Ask::of(Op::Write, extent.offset, extent.len)).tap(|plan| {
                    self.out_of_space += u64::from(*plan == Plan::Fail(Fail::NoSpace));
                })
            else {
                return;
            };
            let mut bytes = Vec::new();
            let mut versions = Vec::new();
            for sector in first..first + count / 512 {
                self.version += 1;
                bytes.extend(stamp(sector, self.version));
                versions.push(self.version);
                let known = self.sectors.entry(sector).or_default();
                known.later.push(self.version);
                known.busy = true;
            }
            let id = self.medium.write(at, &bytes);
            self.under_way.push((id, Under::Data { first, versions, ticket }));
            first += count / 512;
            self.pump();
        }
    }

    fn flush(&mut self) {
        let known = self.sectors.iter().map(|(sector, known)| (*sector, known.answered)).collect();
        let id = self.medium.flush();
        self.under_way.push((id, Under::Flush(known)));
    }

    /// Reads a sector that nobody writes.
    fn look(&mut self) {
        let quiet: Vec<_> = self.sectors.iter().filter(|(_, known)| !known.busy).map(|(sector, _)| *sector).collect();
        if quiet.is_empty() {
            return;
        }
        let mut quiet = quiet;
        quiet.sort_unstable();
        let sector = quiet[self.rng.usize(..quiet.len())];
        let known = &self.sectors[&sector];
        let found = match self.disk.plan(&Ask::of(Op::Read, sector * 512, 512)) {
            Plan::Data { file: _, at, count: 512, ticket: None } => {
                let mut bytes = [0; 512];
                self.medium.read(at, &mut bytes);
                version(sector, &bytes)
            }
            Plan::Below { count: 512 } | Plan::Zeros { count: 512, ticket: None } => 0,
            Plan::Wait { .. } | Plan::Fail(Fail::Io) => return,
            other => panic!("{other:?}"),
        };
        let may = if self.setup.faults > 0 {
            known.later.contains(&found) || found == known.stable
        } else {
            found == known.answered
        };
        assert!(may, "sector {sector} has {found}: {known:?}");
    }

    fn complete(&mut self) {
        if self.under_way.is_empty() {
            return;
        }
        let (id, what) = self.under_way.swap_remove(self.rng.usize(..self.under_way.len()));
        let failed = self.setup.faults > 0 && self.rng.u32(..self.setup.faults) == 0;
        match what {
            Under::Data { first, versions, ticket } => {
                if failed {
                    self.medium.fail(id, &mut self.rng);
                } else {
                    self.medium.complete(id);
                }
                match ticket {
                    Some(ticket) => {
                        self.tickets.insert(ticket, (first, versions));
                        self.disk.ended(ticket, !failed);
                    }
                    None => self.answer(first, &versions, !failed),
                }
            }
            Under::Meta { id: meta, op, at, len } => {
                let mut bytes = vec![0; len as usize];
                match op {
                    MetaOp::Read => self.medium.read(at, &mut bytes),
                    MetaOp::Write if failed => self.medium.fail(id, &mut self.rng),
                    _ if failed => {}
                    MetaOp::Write | MetaOp::Flush => self.medium.complete(id),
                    MetaOp::Extend => self.medium.extend(at + len),
                    MetaOp::Discard => unreachable!("no image asks for it"),
                }
                let result = if op == MetaOp::Read { bytes.as_slice() } else { &[] };
                self.disk.meta_done(meta, (!failed).then_some(result));
            }
            Under::Flush(known) => {
                if failed {
                    return;
                }
                self.medium.complete(id);
                for (sector, answered) in known {
                    let known = self.sectors.get_mut(&sector).unwrap();
                    if answered > known.stable {
                        known.stable = answered;
                        known.later.retain(|version| *version > answered);
                    }
                }
            }
        }
        self.take_settled();
    }

    fn take_settled(&mut self) {
        while let Some(settled) = self.disk.settled() {
            let (first, versions) = self.tickets.remove(&settled.ticket).unwrap();
            self.answer(first, &versions, settled.done);
        }
    }

    fn answer(&mut self, first: u64, versions: &[u64], done: bool) {
        for (sector, version) in (first..).zip(versions) {
            let known = self.sectors.get_mut(&sector).unwrap();
            known.busy = false;
            if done {
                known.answered = *version;
            }
        }
    }

    /// Begins what the format wants.
    fn pump(&mut self) {
        while let Some(meta) = self.disk.next_meta() {
            let id = match meta.op {
                MetaOp::Write => {
                    let mut bytes = vec![0; meta.len as usize];
                    self.disk.meta_bytes(meta.id, &mut bytes);
                    self.medium.write(meta.at, &bytes)
                }
                MetaOp::Flush => self.medium.flush(),
                MetaOp::Read | MetaOp::Extend | MetaOp::Discard => 0,
            };
            self.under_way.push((id, Under::Meta { id: meta.id, op: meta.op, at: meta.at, len: meta.len }));
        }
    }

    /// Cuts it off, looks at what is there, and goes on as if nothing had happened. Gives what was left, or what is wrong.
    pub(crate) fn cut(&mut self, cut: Cut) -> Result<Image, String> {
        self.cuts += 1;
        let image = self.medium.cut(cut, &mut self.rng);
        let last = image.sectors.get(&(image.size / 512 - 1));
        if self.setup.on == Where::File && last.is_some_and(|last| last.iter().any(|byte| *byte != 0)) {
            return Err("the place of the footer has something in it".into());
        }
        let (vhd, _) = check(&image);
        // What vhd-util check says of it is what it said of the empty image, or what opening mends.
        let mended = |problem: &Problem| matches!(problem.what, Corrupt::Cookie { what: "footer" });
        let problems = Vhd::check(&image, NOW).map_err(|error| error.to_string())?;
        if let Some(problem) = problems.iter().find(|problem| !mended(problem) && !self.flaws.contains(problem)) {
            return Err(problem.what.to_string());
        }
        for (sector, known) in &self.sectors {
            let found = content(&vhd, &image, *sector);
            let lost = match cut {
                // The process dies: what was answered is there.
                Cut::Kill => {
                    found != known.answered && !known.later.iter().any(|v| *v == found && *v > known.answered)
                }
                Cut::Power => found != known.stable && !known.later.contains(&found),
            };
            // What failed may be there, and it may not.
            let excused = self.setup.faults > 0 && (found == known.stable || known.later.contains(&found));
            if lost && !excused {
                return Err(format!("sector {sector} has {found}: {known:?}"));
            }
        }
        Ok(image)
    }

    /// Goes on with what was left by a crash.
    pub(crate) fn restart(&mut self, image: Image) {
        let (vhd, _) = check(&image);
        let found: Vec<_> = self.sectors.keys().map(|sector| (*sector, content(&vhd, &image, *sector))).collect();
        self.sectors.clear();
        for (sector, version) in found {
            self.sectors.insert(sector, Known { stable: version, answered: version, ..Known::default() });
        }
        let (disk, image) = open(&self.setup, image);
        (self.disk, self.medium) = (disk, Medium::new(image));
        (self.under_way, self.tickets) = (Vec::new(), HashMap::new());
    }

    /// Completes all that is under way, and says which sectors nobody answered.
    pub(crate) fn drain(&mut self) -> HashSet<u64> {
        for _ in 0..1_000_000 {
            self.pump();
            if self.under_way.is_empty() {
                break;
            }
            self.complete();
        }
        self.sectors.iter().filter(|(_, known)| known.busy).map(|(sector, _)| *sector).collect()
    }
}

trait Tap: Sized {
    fn tap(self, look: impl FnOnce(&Self)) -> Self {
        look(&self);
        self
    }
}

impl Tap for Plan {}

/// What is in a sector, which must be its own.
fn version(sector: u64, bytes: &[u8; 512]) -> u64 {
    let number = |from: usize| u64::from_be_bytes(bytes[from..from + 8].try_into().unwrap());
    match number(0) {
        0 => 0,
        owner => {
            assert_eq!(owner, sector + 1, "sector {sector} has another's data");
            number(8)
        }
    }
}

/// What a sector has, by the table and the bitmap as they are in the file.
fn content(vhd: &Vhd, image: &Image, sector: u64) -> u64 {
    let header = vhd.header.as_ref().unwrap();
    let in_block = u64::from(header.block_size() / 512);
    let Some(at) = vhd.table.get((sector / in_block) as u32) else { return 0 };
    let within = sector % in_block;
    let bits = image.sectors.get(&(at / 512 + within / 4096)).map_or(0, |bits| bits[(within / 8 % 512) as usize]);
    if bits & (0x80 >> (within % 8)) == 0 {
        return 0;
    }
    let place = (at + header.bitmap_size()) / 512 + within;
    image.sectors.get(&place).map_or(0, |bytes| version(sector, bytes))
}
