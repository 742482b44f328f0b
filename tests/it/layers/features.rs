//! The features, one after the other.

use std::collections::{HashMap, VecDeque};

use drivers::{Ask, Descent, Extent, Layer, OddSize, Op, Plan, Raw, Settled, Through, Ticket};
use nix::errno::Errno;
use tapdisk::request;
use tapdisk::sys::io::{FileId, IoOp};

use super::cow::{CLUSTER, Cluster, Cow, pack};
use super::{Chain, FILE, pattern};

const WRITE: request::Op = request::Op::Write { fua: false };
const TABLE_LEN: usize = 8 * 512;

fn raw(bytes: &[u8]) -> Box<dyn Layer> {
    Box::new(Raw::new(bytes.len() as u64, 512, OddSize::Refuse).unwrap())
}

/// A chain of a [`Cow`] of eight clusters over a raw image, and what the disk reads as.
fn cow(clusters: Vec<Cluster>, key: u8, file: Vec<u8>, seed: u64) -> (Chain, Vec<u8>) {
    let base = pattern(7, 8 * CLUSTER as usize);
    let layer = Cow::new(clusters, key, file.len() as u64);
    let chain = Chain::new(vec![(Box::new(layer), true), (raw(&base), true)], vec![file, base.clone()], seed);
    (chain, base)
}

/// qcow2's first write to a cluster that a snapshot shares, or that is the backing file's:
///
/// 1. `plan(Write)` gives `Through` with the whole cluster as block, a new place in the file, and a ticket;
/// 2. the walk reads the rest of the cluster, from this layer (shared) or below (not here), puts the guest's part over it, and writes all of it;
/// 3. `ended(ticket)`; the layer writes its table by `next_meta`; other writes to the cluster get `Wait` until then;
/// 4. `meta_done`, `settled(ticket)`: the guest is answered.
#[test]
fn qcow2s_first_write_to_a_shared_cluster() {
    let mut file = vec![0; TABLE_LEN];
    let shared = pattern(50, CLUSTER as usize);
    file.extend(&shared);
    let mut clusters = vec![Cluster::Nowhere; 8];
    clusters[2] = Cluster::Shared(TABLE_LEN as u64);
    let (mut chain, mut model) = cow(clusters, 0, file, 1);
    model[2 * CLUSTER as usize..3 * CLUSTER as usize].copy_from_slice(&shared);
    // Two writes to the shared cluster and one to a cluster of the backing image, at the same time.
    let tags = [(2 * CLUSTER + 512, 1), (2 * CLUSTER + 2048, 2), (5 * CLUSTER, 3)].map(|(offset, seed)| {
        let data = pattern(seed, 1024);
        model[offset as usize..][..1024].copy_from_slice(&data);
        chain.begin(WRITE, offset, 1024, &data)
    });
    chain.drain();
    let answers = chain.answers();
    assert!(tags.iter().all(|tag| answers.iter().any(|(answered, result, _)| answered == tag && result.is_ok())));
    assert_eq!(chain.read(0, 8 * CLUSTER), model);
    assert_eq!(chain.file(0)[TABLE_LEN..][..CLUSTER as usize], shared, "the snapshot has what it had");
    // Of the shared cluster one copy was made: before its entry was written the other write waited.
    let tables = |chain: &mut Chain| {
        chain
            .seen()
            .iter()
            .filter(|(file, op, at, _)| *file == FileId(0) && *op != IoOp::Read && *at < TABLE_LEN as u64)
            .count()
    };
    assert_eq!(tables(&mut chain), 2);
    // An error of the copy's reading, of its writing, or of the table is the guest's, and nothing has changed.
    for (file, op) in [(1, IoOp::Read), (0, IoOp::Write { fua: false })] {
        chain.engine.lock().unwrap().fails.push((FileId(file), op));
        assert_eq!(chain.write(6 * CLUSTER + 512, &pattern(9, 512)), Err(Errno::EIO));
        chain.engine.lock().unwrap().fails.clear();
        assert_eq!(chain.read(0, 8 * CLUSTER), model);
    }
    assert_eq!(chain.write(6 * CLUSTER + 512, &pattern(9, 512)), Ok(()), "and it can be done again");
}

/// Zeroing of a whole cluster, over a backing image with data: `plan(WriteZeroes)` gives `Zeros` with a ticket, which has ended at once; the entry is
/// written as metadata; reads get `Zeros` from then on.
#[test]
fn qcow2s_zeroing_of_a_cluster_is_metadata_alone() {
    let (mut chain, mut model) = cow(vec![Cluster::Nowhere; 8], 0, vec![0; TABLE_LEN], 2);
    assert_eq!(chain.run(request::Op::WriteZeroes { unmap: true }, CLUSTER, CLUSTER, &[]), Ok(None));
    model[CLUSTER as usize..2 * CLUSTER as usize].fill(0);
    assert!(chain.seen().iter().all(|(_, op, at, _)| *op == (IoOp::Write { fua: false }) && *at < TABLE_LEN as u64));
    assert_eq!(chain.read(0, 8 * CLUSTER), model);
    // Where it was is given back, once nothing points there.
    chain.write(4 * CLUSTER, &pattern(8, CLUSTER as usize)).unwrap();
    let at =
        chain.seen().iter().find(|(_, op, _, len)| matches!(op, IoOp::Write { .. }) && *len == CLUSTER).unwrap().2;
    assert_eq!(chain.run(request::Op::WriteZeroes { unmap: true }, 4 * CLUSTER, CLUSTER, &[]), Ok(None));
    model[4 * CLUSTER as usize..5 * CLUSTER as usize].fill(0);
    assert_eq!(chain.seen().last(), Some(&(FileId(0), IoOp::Discard, at, CLUSTER)));
    // A part of one is a copy on write, whose guest's part is zeros.
    assert_eq!(chain.run(request::Op::WriteZeroes { unmap: false }, 3 * CLUSTER + 512, 1024, &[]), Ok(None));
    model[3 * CLUSTER as usize + 512..][..1024].fill(0);
    assert_eq!(chain.read(0, 8 * CLUSTER), model);
}

/// A read of a compressed cluster: `plan(Read)` gives `Through` with what is stored and the cluster as block; `transform` unpacks it; the guest gets
/// its part. Over a copy on write of such a cluster its read is a copy within a copy.
#[test]
fn a_compressed_cluster_is_read_and_written_over() {
    let mut cluster = vec![3; 1500];
    cluster.resize(CLUSTER as usize, 9);
    let packed = pack(&cluster);
    let mut file = vec![0; TABLE_LEN];
    file.extend(&packed);
    let mut clusters = vec![Cluster::Nowhere; 8];
    clusters[1] = Cluster::Packed(TABLE_LEN as u64, packed.len() as u64);
    clusters[4] = Cluster::Packed(TABLE_LEN as u64 + 2, 2);
    let (mut chain, mut model) = cow(clusters, 0, file, 3);
    model[CLUSTER as usize..2 * CLUSTER as usize].copy_from_slice(&cluster);
    assert_eq!(chain.read(CLUSTER + 1024, 1024), model[CLUSTER as usize + 1024..][..1024]);
    // Many at a time: more than there are places.
    let tags: Vec<_> = (0..12).map(|n| chain.begin(request::Op::Read, CLUSTER + n % 4 * 512, 1024, &[])).collect();
    chain.drain();
    let answers = chain.answers();
    for (n, tag) in (0..).zip(tags) {
        let (_, result, data) = answers.iter().find(|(answered, ..)| *answered == tag).unwrap();
        assert_eq!(*result, Ok(()));
        assert_eq!(data.as_deref(), Some(&model[(CLUSTER + n % 4 * 512) as usize..][..1024]));
    }
    chain.write(CLUSTER + 512, &pattern(1, 512)).unwrap();
    model[CLUSTER as usize + 512..][..512].copy_from_slice(&pattern(1, 512));
    assert_eq!(chain.read(0, 2 * CLUSTER), model[..2 * CLUSTER as usize]);
    assert_eq!(chain.run(request::Op::Read, 4 * CLUSTER, 512, &[]), Err(Errno::EIO), "what is packed makes no sense");
}

/// Encrypted reads and writes: `Through` with just the guest's sectors as block, no rest to be read; `transform` decrypts and encrypts in memory of the
/// stack's, so the guest's memory is read once.
#[test]
fn an_encrypted_image_has_no_plain_byte_in_its_file() {
    let (mut chain, mut model) = cow(vec![Cluster::Nowhere; 8], 0x5a, vec![0; TABLE_LEN], 4);
    for (offset, len) in [(512, 1024), (CLUSTER - 512, 2048), (1024, 512), (4 * CLUSTER, 2 * CLUSTER)] {
        let data = pattern(offset as u8, len as usize);
        chain.write(offset, &data).unwrap();
        model[offset as usize..][..len as usize].copy_from_slice(&data);
    }
    assert_eq!(chain.read(0, 8 * CLUSTER), model);
    let file = chain.file(0);
    let plain = |needle: &[u8]| file.windows(needle.len()).any(|window| window == needle);
    assert!(!plain(&model[512..1024]) && !plain(&model[4 * CLUSTER as usize..][..512]));
    let sealed: Vec<_> = model[512..1024].iter().map(|byte| byte ^ 0x5a).collect();
    assert!(plain(&sealed));
}

/// A mirror: every write goes here and below.
struct Mirror {
    /// What became of each side of a write.
    writes: HashMap<u32, [Option<bool>; 2]>,
    free: Vec<u32>,
    settled: VecDeque<Settled>,
    failed: bool,
}

impl Mirror {
    fn new() -> Mirror {
        Mirror { writes: HashMap::new(), free: (0..16).collect(), settled: VecDeque::new(), failed: false }
    }
}

impl Layer for Mirror {
    fn name(&self) -> &'static str {
        "mirror"
    }

    fn size(&self) -> Option<u64> {
        None
    }

    fn plan(&mut self, ask: &Ask) -> Plan {
        let Extent { offset, len } = ask.extent;
        match ask.op {
            Op::Read | Op::Locate => Plan::Below { count: len },
            _ if self.failed => Plan::Below { count: len },
            _ if self.free.is_empty() => Plan::Wait { until: None },
            _ => Plan::Both { file: FILE, at: offset, count: len },
        }
    }

    fn descends(&self) -> bool {
        true
    }

    fn descend(&mut self, ask: &Ask) -> Descent {
        if self.failed || matches!(ask.op, Op::Read | Op::Locate) {
            return Descent::default();
        }
        let write = self.free.pop().unwrap();
        self.writes.insert(write, [None; 2]);
        Descent { here: Some(Ticket(2 * write)), below: Some(Ticket(2 * write + 1)) }
    }

    fn tickets(&self) -> usize {
        32
    }

    fn ended(&mut self, ticket: Ticket, done: bool) {
        let (write, side) = (ticket.0 / 2, ticket.0 as usize % 2);
        let sides = self.writes.get_mut(&write).unwrap();
        sides[side] = Some(done);
        // The mirror's own error is not the guest's.
        self.failed |= side == 0 && !done;
        self.settled.push_back(Settled { ticket, done: done || side == 0 });
        if sides.iter().all(Option::is_some) {
            self.writes.remove(&write);
            self.free.push(write);
        }
    }

    fn settled(&mut self) -> Option<Settled> {
        self.settled.pop_front()
    }
}

/// A mirror with one side failing: `plan(Write)` gives `Both`; `descend` gives a ticket for each side, with the bytes that the layers below really take;
/// each side ends by itself. The mirror settles its own failed side as done, and plans `Below` from then on. A failure below is the guest's.
#[test]
fn a_mirror_goes_on_without_the_side_that_fails() {
    let base = pattern(7, 8 * CLUSTER as usize);
    let cow = Cow::new(vec![Cluster::Nowhere; 8], 0, TABLE_LEN as u64);
    let mirror = vec![0; base.len()];
    let layers: Vec<(Box<dyn Layer>, bool)> =
        vec![(Box::new(Mirror::new()), true), (Box::new(cow), true), (raw(&base), true)];
    let mut chain = Chain::new(layers, vec![mirror, vec![0; TABLE_LEN], base.clone()], 5);
    let mut model = base;
    let mut write = |chain: &mut Chain, offset: u64, len: usize, seed| {
        let data = pattern(seed, len);
        model[offset as usize..][..len].copy_from_slice(&data);
        chain.write(offset, &data)
    };
    // Cut by the layer below where its clusters end.
    write(&mut chain, CLUSTER - 512, 2 * CLUSTER as usize, 1).unwrap();
    assert_eq!(chain.file(0)[CLUSTER as usize - 512..][..2 * CLUSTER as usize], pattern(1, 2 * CLUSTER as usize));
    assert_eq!(chain.run(request::Op::Flush, 0, 0, &[]), Ok(None));
    let flushed: Vec<_> = chain.seen().into_iter().filter(|seen| seen.1 == IoOp::Flush).map(|seen| seen.0).collect();
    assert_eq!((flushed.contains(&FileId(0)), flushed.contains(&FileId(1))), (true, true));
    chain.engine.lock().unwrap().fails.extend([(FileId(0), IoOp::Write { fua: false }), (FileId(0), IoOp::Flush)]);
    write(&mut chain, 0, 1024, 2).unwrap();
    chain.seen();
    write(&mut chain, 512, 1024, 3).unwrap();
    assert!(chain.seen().iter().all(|seen| seen.0 != FileId(0)), "it is left alone from then on");
    assert_eq!(chain.run(request::Op::Flush, 0, 0, &[]), Ok(None));
    assert_eq!(chain.read(0, 8 * CLUSTER), model);
    chain.engine.lock().unwrap().fails.push((FileId(1), IoOp::Write { fua: false }));
    assert_eq!(chain.write(0, &pattern(4, 512)), Err(Errno::EIO), "the disk's own error is the guest's");
}

/// A cache of what was read from below: one block at a time is filled.
struct Cache {
    cached: Vec<bool>,
    /// The block that is being filled.
    filling: Option<u64>,
    writing: HashMap<u32, u64>,
    free: Vec<u32>,
    settled: VecDeque<Settled>,
}

impl Cache {
    fn new(blocks: usize) -> Cache {
        let free = (1..16).collect();
        Cache { cached: vec![false; blocks], filling: None, writing: HashMap::new(), free, settled: VecDeque::new() }
    }
}

impl Layer for Cache {
    fn name(&self) -> &'static str {
        "cache"
    }

    fn size(&self) -> Option<u64> {
        None
    }

    fn plan(&mut self, ask: &Ask) -> Plan {
        let Extent { offset, len } = ask.extent;
        let block = offset / CLUSTER;
        let count = len.min(CLUSTER - offset % CLUSTER);
        match ask.op {
            Op::Read if self.cached[block as usize] => Plan::Data { file: FILE, at: offset, count, ticket: None },
            // What is written meanwhile is not in the cache; what is filled meanwhile is read past it.
            Op::Read if self.filling.is_some() || self.writing.values().any(|writing| *writing == block) => {
                Plan::Below { count }
            }
            Op::Read => {
                self.filling = Some(block);
                let block = Extent { offset: block * CLUSTER, len: CLUSTER };
                Plan::Through(Through {
                    file: FILE,
                    at: block.offset,
                    stored: CLUSTER,
                    block,
                    count,
                    fill: true,
                    mark: 0,
                    ticket: Some(Ticket(0)),
                })
            }
            // The fill would put what it has read over what is written: the write waits for its end.
            op if op.writes() && self.filling == Some(block) => Plan::Wait { until: None },
            op if op.writes() && self.free.is_empty() => Plan::Wait { until: None },
            _ => Plan::Below { count: if ask.op == Op::Flush { 0 } else { count } },
        }
    }

    fn descends(&self) -> bool {
        true
    }

    fn descend(&mut self, ask: &Ask) -> Descent {
        if !ask.op.writes() {
            return Descent::default();
        }
        let ticket = self.free.pop().unwrap();
        let block = ask.extent.offset / CLUSTER;
        self.cached[block as usize] = false;
        self.writing.insert(ticket, block);
        Descent { below: Some(Ticket(ticket)), here: None }
    }

    fn tickets(&self) -> usize {
        16
    }

    fn ended(&mut self, ticket: Ticket, done: bool) {
        match self.writing.remove(&ticket.0) {
            Some(_) => {
                self.free.push(ticket.0);
                self.settled.push_back(Settled { ticket, done });
            }
            None => {
                let block = self.filling.take().unwrap();
                self.cached[block as usize] = done;
                // The guest has its data, whether it is kept or not.
                self.settled.push_back(Settled { ticket, done: true });
            }
        }
    }

    fn settled(&mut self) -> Option<Settled> {
        self.settled.pop_front()
    }

    fn block_len(&self) -> usize {
        CLUSTER as usize
    }
}

/// A read cache's late fill beside a guest's write: `plan(Read)` gives `Through` with `fill`; the walk reads the block from below, the guest gets its part, the
/// block is stored. A write to the block gets `Wait` until the fill's ticket has ended, so the old data never lands over the new. An error of the
/// store is nobody's.
#[test]
fn a_read_caches_late_fill_never_lands_over_a_guests_write() {
    let base = pattern(7, 8 * CLUSTER as usize);
    let layers: Vec<(Box<dyn Layer>, bool)> = vec![(Box::new(Cache::new(8)), true), (raw(&base), true)];
    let mut chain = Chain::new(layers, vec![vec![0; base.len()], base.clone()], 6);
    let mut model = base;
    chain.hold(true);
    let read = chain.begin(request::Op::Read, CLUSTER + 512, 512, &[]);
    chain.turn();
    let data = pattern(1, 1024);
    let write = chain.begin(WRITE, CLUSTER, 1024, &data);
    chain.turn();
    assert_eq!(chain.held(), 1, "the read's, and not the write's");
    chain.release_one();
    chain.turn();
    assert!(chain.answers().is_empty());
    assert_eq!((chain.held(), chain.file(1) == model), (1, true), "the fill's store");
    chain.drain();
    let answers = chain.answers();
    let answer = |tag| answers.iter().find(|(answered, ..)| *answered == tag).unwrap();
    assert_eq!(answer(read).2.as_deref(), Some(&model[CLUSTER as usize + 512..][..512]));
    assert_eq!(answer(write).1, Ok(()));
    model[CLUSTER as usize..][..1024].copy_from_slice(&data);
    chain.hold(false);
    assert_eq!(chain.read(0, 8 * CLUSTER), model);
    // One is filled at a time.
    (0..8).for_each(|block| drop(chain.read(block * CLUSTER, CLUSTER)));
    chain.seen();
    assert_eq!(chain.read(0, 8 * CLUSTER), model, "from the cache");
    assert!(chain.seen().iter().all(|seen| seen.0 == FileId(0)), "and from nowhere else");
    chain.write(0, &pattern(3, 512)).unwrap();
    model[..512].copy_from_slice(&pattern(3, 512));
    chain.engine.lock().unwrap().fails.push((FileId(0), IoOp::Write { fua: false }));
    assert_eq!(chain.read(0, CLUSTER), model[..CLUSTER as usize], "what can't be stored is read all the same");
    chain.engine.lock().unwrap().fails[0] = (FileId(1), IoOp::Read);
    assert_eq!(chain.run(request::Op::Read, 0, 512, &[]), Err(Errno::EIO), "and what can't be read is not");
}

/// All of it at once, at random: a mirror over a cache over an image with shared, packed, zeroed and encrypted clusters over a raw one; I/Os
/// complete in any order, and what was answered is what is read.
#[test]
fn chains_of_all_that_at_random() {
    for seed in 0..if cfg!(miri) { 2 } else { 200 } {
        random(seed);
    }
}

fn random(seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let base = pattern(7, 8 * CLUSTER as usize);
    let key = if rng.bool() { 0 } else { 0x33 };
    let (mut file, mut model, mut clusters) = (vec![0; TABLE_LEN], base.clone(), Vec::new());
    for index in 0..8 {
        let content = &mut model[index * CLUSTER as usize..][..CLUSTER as usize];
        let at = file.len() as u64;
        clusters.push(match rng.u32(..4) {
            0 => Cluster::Nowhere,
            1 => {
                content.fill(0);
                Cluster::Zero
            }
            2 => {
                content.fill(index as u8);
                let packed = pack(content);
                file.extend(&packed);
                Cluster::Packed(at, packed.len() as u64)
            }
            _ => {
                content.copy_from_slice(&pattern(index as u8, CLUSTER as usize));
                file.extend(content.iter().map(|byte| byte ^ key));
                if rng.bool() { Cluster::Own(at) } else { Cluster::Shared(at) }
            }
        });
    }
    file.resize(file.len().next_multiple_of(512), 0);
    let end = file.len() as u64;
    let (mirror, cache) = (model.clone(), vec![0; model.len()]);
    let layers: Vec<(Box<dyn Layer>, bool)> = vec![
        (Box::new(Mirror::new()), true),
        (Box::new(Cache::new(8)), true),
        (Box::new(Cow::new(clusters, key, end)), true),
        (raw(&base), true),
    ];
    let mut chain = Chain::new(layers, vec![mirror, cache, file, base], seed);
    chain.hold(true);
    let mut busy: HashMap<u64, (std::ops::Range<usize>, Option<Vec<u8>>)> = HashMap::new();
    for _ in 0..300 {
        let first = rng.usize(..64);
        let range = first * 512..(first + rng.usize(1..12)).min(64) * 512;
        let len = range.len() as u64;
        let apart = |other: &std::ops::Range<usize>| other.end <= range.start || range.end <= other.start;
        if chain.has_room() && busy.values().all(|(other, _)| apart(other)) {
            let (op, data) = match rng.u32(..10) {
                0..4 => (WRITE, Some(pattern(rng.u8(..), range.len()))),
                4 => (request::Op::WriteZeroes { unmap: true }, Some(vec![0; range.len()])),
                _ => (request::Op::Read, None),
            };
            let bytes = data.as_deref().filter(|_| op == WRITE).unwrap_or(&[]);
            let tag = chain.begin(op, range.start as u64, len, bytes);
            busy.insert(tag, (range, data));
        }
        chain.turn();
        if rng.bool() {
            chain.release_one();
        }
        settle(&mut chain, &mut busy, &mut model);
    }
    chain.drain();
    settle(&mut chain, &mut busy, &mut model);
    assert!(busy.is_empty());
    chain.hold(false);
    assert_eq!(chain.read(0, model.len() as u64), model, "seed {seed}");
    assert_eq!(chain.file(0), model, "seed {seed}: the mirror has the same");
}

fn settle(chain: &mut Chain, busy: &mut HashMap<u64, (std::ops::Range<usize>, Option<Vec<u8>>)>, model: &mut [u8]) {
    for (tag, result, found) in chain.answers() {
        let (range, data) = busy.remove(&tag).unwrap();
        assert_eq!(result, Ok(()));
        match data {
            Some(data) => model[range].copy_from_slice(&data),
            None => assert_eq!(found.as_deref(), Some(&model[range.clone()]), "{range:?}"),
        }
    }
}
