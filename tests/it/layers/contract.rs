//! The contract of layers where it is easy to break: what waits for what, files of a layer, blocks beyond ends.

use super::{Chain, FILE, pattern};
use drivers::{
    Ask, Extent, LastStep, Layer, LayerFile, Meta, MetaId, MetaOp, OddSize, Op, Plan, Raw, Settled, Through, Ticket,
};
use nix::errno::Errno;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tapdisk::blocking::Blocking;
use tapdisk::request;
use tapdisk::stack::HostLayer;
use tapdisk::store::{self, Identity, Means, Store};
use tapdisk::sys::file::Geometry;
use tapdisk::sys::io::{FileId, IoOp};

const WRITE: request::Op = request::Op::Write { fua: false };
const FUA: request::Op = request::Op::Write { fua: true };

fn raw(bytes: &[u8]) -> Box<dyn Layer> {
    Box::new(Raw::new(bytes.len() as u64, 512, OddSize::Refuse).unwrap())
}

/// A flush that waits for the layer's metadata.
struct Waiting {
    dirty: bool,
    under_way: bool,
    settled: VecDeque<Settled>,
}
impl Layer for Waiting {
    fn name(&self) -> &'static str {
        "waiting"
    }
    fn size(&self) -> Option<u64> {
        Some(8192)
    }
    fn plan(&mut self, ask: &Ask) -> Plan {
        match ask.op {
            Op::Flush if self.dirty => Plan::Wait { until: None },
            Op::Flush => Plan::Data { file: FILE, at: 0, count: 0, ticket: None },
            Op::Write => {
                Plan::Data { file: FILE, at: ask.extent.offset, count: ask.extent.len, ticket: Some(Ticket(0)) }
            }
            _ => Plan::Data { file: FILE, at: ask.extent.offset, count: ask.extent.len, ticket: None },
        }
    }
    fn tickets(&self) -> usize {
        1
    }
    // Metadata is written back lazily: dirty, until it is written before a flush.
    fn ended(&mut self, ticket: Ticket, done: bool) {
        self.dirty = true;
        self.settled.push_back(Settled { ticket, done });
    }
    fn settled(&mut self) -> Option<Settled> {
        self.settled.pop_front()
    }
    fn next_meta(&mut self) -> Option<Meta> {
        if !self.dirty || self.under_way {
            return None;
        }
        self.under_way = true;
        Some(Meta { id: MetaId(1), op: MetaOp::Write, file: FILE, at: 8192, len: 512 })
    }
    fn meta_done(&mut self, _: MetaId, _: Option<&[u8]>) {
        (self.dirty, self.under_way) = (false, false);
    }
    fn meta_len(&self) -> usize {
        512
    }
}

#[test]
fn a_flush_for_a_durable_write_may_wait_for_metadata() {
    let layer = Waiting { dirty: false, under_way: false, settled: VecDeque::new() };
    let mut chain = Chain::new(vec![(Box::new(layer), true)], vec![vec![0; 9000]], 1);
    // Some metadata is written, and not durable.
    assert_eq!(chain.write(0, &pattern(1, 512)), Ok(()));
    // FUA: its data dirties the metadata again.
    assert_eq!(chain.run(FUA, 512, 512, &pattern(2, 512)), Ok(None));
}

/// One that always fills from below, and whose fills may be many.
struct Fills {
    free: Vec<u32>,
    settled: VecDeque<Settled>,
    size: Option<u64>,
    blk: u64,
}
impl Layer for Fills {
    fn name(&self) -> &'static str {
        "fills"
    }
    fn size(&self) -> Option<u64> {
        self.size
    }
    fn plan(&mut self, ask: &Ask) -> Plan {
        let Extent { offset, len } = ask.extent;
        let count = len.min(self.blk - offset % self.blk);
        match ask.op {
            Op::Read => {
                let Some(ticket) = self.free.pop() else { return Plan::Wait { until: None } };
                let block = Extent { offset: offset / self.blk * self.blk, len: self.blk };
                Plan::Through(Through {
                    file: FILE,
                    at: block.offset,
                    stored: self.blk,
                    block,
                    count,
                    fill: true,
                    mark: 0,
                    ticket: Some(Ticket(ticket)),
                })
            }
            _ => Plan::Below { count },
        }
    }
    fn tickets(&self) -> usize {
        16
    }
    fn ended(&mut self, ticket: Ticket, _: bool) {
        self.free.push(ticket.0);
        self.settled.push_back(Settled { ticket, done: true });
    }
    fn settled(&mut self) -> Option<Settled> {
        self.settled.pop_front()
    }
    fn block_len(&self) -> usize {
        self.blk as usize
    }
}
fn fills(size: Option<u64>, blk: u64) -> Box<dyn Layer> {
    Box::new(Fills { free: (0..16).collect(), settled: VecDeque::new(), size, blk })
}

/// A write that is a copy; the rest of its block is read from below.
struct CowWhole {
    free: Vec<u32>,
    settled: VecDeque<Settled>,
    size: u64,
    blk: u64,
}
impl Layer for CowWhole {
    fn name(&self) -> &'static str {
        "cow"
    }
    fn size(&self) -> Option<u64> {
        Some(self.size)
    }
    fn plan(&mut self, ask: &Ask) -> Plan {
        let Extent { offset, len } = ask.extent;
        let count = len.min(self.blk - offset % self.blk);
        match ask.op {
            Op::Write => {
                let Some(ticket) = self.free.pop() else { return Plan::Wait { until: None } };
                let block = Extent { offset: offset / self.blk * self.blk, len: self.blk };
                Plan::Through(Through {
                    file: FILE,
                    at: block.offset,
                    stored: self.blk,
                    block,
                    count,
                    fill: false,
                    mark: 0,
                    ticket: Some(Ticket(ticket)),
                })
            }
            Op::Flush => Plan::Data { file: FILE, at: 0, count: 0, ticket: None },
            _ => Plan::Below { count },
        }
    }
    fn tickets(&self) -> usize {
        16
    }
    fn ended(&mut self, ticket: Ticket, done: bool) {
        self.free.push(ticket.0);
        self.settled.push_back(Settled { ticket, done });
    }
    fn settled(&mut self) -> Option<Settled> {
        self.settled.pop_front()
    }
    fn block_len(&self) -> usize {
        self.blk as usize
    }
}

fn nested(blk: u64, writes: u64) {
    // An image with copy on write over a cache that fills (a golden image's, on a slow store) over a raw one.
    let size = 8 * blk;
    let base = pattern(3, size as usize);
    let cow = CowWhole { free: (0..16).collect(), settled: VecDeque::new(), size, blk };
    let layers: Vec<(Box<dyn Layer>, bool)> =
        vec![(Box::new(cow), true), (fills(None, blk), true), (raw(&base), true)];
    let mut chain = Chain::new(layers, vec![vec![0; size as usize], vec![0; size as usize], base], 1);
    for n in 0..writes {
        chain.begin(WRITE, n * blk + 512, 512, &pattern(9, 512));
    }
    chain.drain();
    assert!(chain.answers().iter().all(|(_, result, _)| *result == Ok(())));
}

#[test]
fn copies_within_copies_do_not_wait_for_each_other() {
    nested(4096, 8);
}

#[test]
fn one_copy_of_a_large_block_has_room_for_those_within() {
    nested(1 << 20, 1);
}

/// Copy-on-read over a parent that is smaller than the disk.
#[test]
fn a_fill_reads_zeros_beyond_the_end_of_what_is_below() {
    struct Strict(u64);
    impl Layer for Strict {
        fn name(&self) -> &'static str {
            "strict"
        }
        fn size(&self) -> Option<u64> {
            Some(self.0)
        }
        fn plan(&mut self, ask: &Ask) -> Plan {
            assert!(ask.extent.offset + ask.extent.len <= self.0, "asked beyond its size: {ask:?} of {}", self.0);
            Plan::Data { file: FILE, at: ask.extent.offset, count: ask.extent.len, ticket: None }
        }
    }
    let layers: Vec<(Box<dyn Layer>, bool)> = vec![(fills(Some(16384), 4096), true), (Box::new(Strict(8192)), true)];
    let mut chain = Chain::new(layers, vec![vec![0; 16384], pattern(1, 8192)], 1);
    assert_eq!(chain.read(4096, 4096), pattern(1, 8192)[4096..]);
    let beyond = chain.run(request::Op::Read, 12288, 512, &[]);
    assert_eq!(beyond, Ok(Some(vec![0; 512])));
}

/// Its table is in file 0, its data in file 1 (qcow2's data file); data is durable before the entry that points to it is written.
#[derive(Default)]
struct TwoFiles {
    known: [bool; 8],
    to_flush: Vec<u32>,
    flushing: Vec<u32>,
    to_write: Vec<u32>,
    settled: VecDeque<Settled>,
    busy: bool,
    of: [usize; 8],
    next: u32,
}
impl Layer for TwoFiles {
    fn name(&self) -> &'static str {
        "two"
    }
    fn size(&self) -> Option<u64> {
        Some(8 * 4096)
    }
    fn plan(&mut self, ask: &Ask) -> Plan {
        if ask.op == Op::Flush {
            return Plan::Data { file: LayerFile(0), at: 0, count: 0, ticket: None };
        }
        let cluster = (ask.extent.offset / 4096) as usize;
        let data = |ticket| Plan::Data { file: LayerFile(1), at: ask.extent.offset, count: ask.extent.len, ticket };
        if self.known[cluster] || !ask.op.writes() {
            return data(None);
        }
        let ticket = self.next;
        self.next += 1;
        self.of[ticket as usize] = cluster;
        data(Some(Ticket(ticket)))
    }
    fn tickets(&self) -> usize {
        8
    }
    fn ended(&mut self, ticket: Ticket, _: bool) {
        self.to_flush.push(ticket.0);
    }
    fn settled(&mut self) -> Option<Settled> {
        self.settled.pop_front()
    }
    fn next_meta(&mut self) -> Option<Meta> {
        if let Some(ticket) = self.to_write.pop() {
            return Some(Meta {
                id: MetaId(u64::from(ticket)),
                op: MetaOp::Write,
                file: LayerFile(0),
                at: u64::from(ticket) * 512,
                len: 512,
            });
        }
        if self.to_flush.is_empty() || self.busy {
            return None;
        }
        (self.flushing, self.busy) = (std::mem::take(&mut self.to_flush), true);
        Some(Meta { id: MetaId(100), op: MetaOp::Flush, file: LayerFile(1), at: 0, len: 0 })
    }
    fn meta_done(&mut self, id: MetaId, _: Option<&[u8]>) {
        if id.0 == 100 {
            self.busy = false;
            self.to_write.append(&mut self.flushing);
            return;
        }
        self.known[self.of[id.0 as usize]] = true;
        self.settled.push_back(Settled { ticket: Ticket(id.0 as u32), done: true });
    }
    fn meta_len(&self) -> usize {
        512
    }
}

#[test]
fn a_durable_write_waits_for_the_file_that_says_where_it_is() {
    let mut early = Vec::new();
    for seed in 0..40 {
        let mut host = HostLayer::new(Box::new(TwoFiles::default()), "two".as_ref(), FileId(0), false);
        host.files = [FileId(0), FileId(1)].into();
        let mut chain = Chain::of(vec![host], vec![vec![0; 8 * 512], vec![0; 8 * 4096]], seed);
        assert_eq!(chain.write(0, &pattern(1, 512)), Ok(())); // D: its entry is written, and not durable
        chain.hold(true);
        chain.begin(WRITE, 4096, 512, &pattern(2, 512)); // B: has file 1 flushed
        for _ in 0..2 {
            chain.turn();
            chain.release_one();
        }
        chain.turn();
        let c = chain.begin(FUA, 0, 512, &pattern(3, 512)); // C: where D's entry says
        for _ in 0..6 {
            chain.turn();
            if chain.answers().iter().any(|(tag, ..)| *tag == c) {
                let seen = chain.seen();
                if !seen.iter().any(|(file, op, ..)| *file == FileId(0) && *op == IoOp::Flush) {
                    early.push((seed, seen));
                }
                break;
            }
            chain.release_one();
        }
    }
    assert!(early.is_empty(), "FUA is answered, and the entry's file was never flushed: {:?}", early[0]);
}

/// A cache as that of features.rs would be, but a second read of a block that is being filled waits for it.
#[test]
fn a_part_of_a_copy_that_waits_holds_up_no_other() {
    struct Once {
        inner: Fills,
        filling: Option<u64>,
        done: Vec<u64>,
    }
    impl Layer for Once {
        fn name(&self) -> &'static str {
            "once"
        }
        fn size(&self) -> Option<u64> {
            None
        }
        fn plan(&mut self, ask: &Ask) -> Plan {
            let block = ask.extent.offset / 4096;
            let count = ask.extent.len.min(4096 - ask.extent.offset % 4096);
            if ask.op != Op::Read {
                return Plan::Below { count };
            }
            if self.done.contains(&block) {
                return Plan::Data { file: FILE, at: ask.extent.offset, count, ticket: None };
            }
            if self.filling.is_some() {
                return Plan::Wait { until: None };
            }
            self.filling = Some(block);
            self.inner.plan(ask)
        }
        fn tickets(&self) -> usize {
            16
        }
        fn ended(&mut self, ticket: Ticket, done: bool) {
            self.done.extend(self.filling.take());
            self.inner.ended(ticket, done);
        }
        fn settled(&mut self) -> Option<Settled> {
            self.inner.settled()
        }
        fn block_len(&self) -> usize {
            4096
        }
    }
    let base = pattern(3, 8 * 4096);
    let cow = CowWhole { free: (0..16).collect(), settled: VecDeque::new(), size: 8 * 4096, blk: 4096 };
    let inner = Fills { free: (0..16).collect(), settled: VecDeque::new(), size: None, blk: 4096 };
    let once = Once { inner, filling: None, done: Vec::new() };
    let layers: Vec<(Box<dyn Layer>, bool)> = vec![(Box::new(cow), true), (Box::new(once), true), (raw(&base), true)];
    let mut chain = Chain::new(layers, vec![vec![0; 8 * 4096], vec![0; 8 * 4096], base], 1);
    assert_eq!(chain.write(512, &pattern(9, 512)), Ok(()));
}

/// A layer that fills, with nothing below it: "below the last one a read gets zeros".
#[test]
fn a_fill_with_nothing_below_it_is_of_zeros() {
    let mut chain = Chain::new(vec![(fills(Some(8192), 4096), true)], vec![vec![1; 8192]], 1);
    assert_eq!(chain.run(request::Op::Read, 0, 512, &[]), Ok(Some(vec![0; 512])));
}

/// As qcow2 will be closed: counts are written as metadata, then bitmaps, and when those are durable the flag that says that they are right.
struct Flagged {
    counts: bool,
}

impl Layer for Flagged {
    fn name(&self) -> &'static str {
        "flagged"
    }
    fn size(&self) -> Option<u64> {
        Some(4096)
    }
    fn plan(&mut self, ask: &Ask) -> Plan {
        Plan::Data { file: FILE, at: ask.extent.offset, count: ask.extent.len, ticket: None }
    }
    fn closing(&mut self) {
        self.counts = true;
    }
    fn next_meta(&mut self) -> Option<Meta> {
        std::mem::take(&mut self.counts).then_some(Meta {
            id: MetaId(0),
            op: MetaOp::Write,
            file: LayerFile(1),
            at: 512,
            len: 512,
        })
    }
    fn meta_len(&self) -> usize {
        512
    }
    fn close(&mut self, _: u64, step: &mut dyn FnMut(LastStep)) {
        step(LastStep::Write { file: LayerFile(1), at: 1024, bytes: vec![1; 512], keep: None });
        step(LastStep::Flush { file: LayerFile(1) });
        step(LastStep::Write { file: FILE, at: 0, bytes: vec![2; 512], keep: None });
        step(LastStep::Resize { file: FILE, size: 4096 });
    }
}

/// A store that tells what is done with it.
#[derive(Debug)]
struct Told(u8, Arc<Mutex<Vec<String>>>);

impl Told {
    fn tell(&self, what: &str) -> std::io::Result<()> {
        self.1.lock().unwrap().push(format!("{}: {what}", self.0));
        Ok(())
    }
}

impl Store for Told {
    fn path(&self) -> &Path {
        Path::new("told")
    }
    fn identity(&self) -> Identity {
        Identity::Memory(self.0.into())
    }
    fn geometry(&self) -> Geometry {
        unreachable!("nobody asks at the end")
    }
    fn is_direct(&self) -> bool {
        false
    }
    fn file(&self) -> Option<&std::fs::File> {
        None
    }
    fn lock(&mut self, _: &Blocking) -> Result<(), store::Error> {
        Ok(())
    }
    fn holds_off(&self) -> &'static str {
        "nobody"
    }
    fn lock_changes(&self, _: &Blocking, _: Duration) -> Result<(), Errno> {
        Ok(())
    }
    fn unlock_changes(&self, _: &Blocking) -> Result<(), Errno> {
        Ok(())
    }
    fn has_other_readers(&self, _: &Blocking) -> Result<bool, Errno> {
        Ok(false)
    }
    fn size_now(&self, _: &Blocking) -> std::io::Result<u64> {
        Ok(4096)
    }
    fn read_at(&self, _: &Blocking, _: u64, _: &mut [u8]) -> std::io::Result<usize> {
        Ok(0)
    }
    fn write_at(&self, _: &Blocking, at: u64, from: &[u8]) -> std::io::Result<()> {
        self.tell(&format!("{} at {at}", from[0]))
    }
    fn set_len(&self, _: &Blocking, len: u64) -> std::io::Result<()> {
        self.tell(&format!("{len} bytes"))
    }
    fn sync(&self, _: &Blocking, all: bool) -> std::io::Result<()> {
        self.tell(if all { "all durable" } else { "durable" })
    }
    fn refresh(&self, _: &Blocking) -> std::io::Result<()> {
        Ok(())
    }
    fn means(&self, _: &Blocking) -> std::io::Result<Means> {
        unreachable!("the engine has what it needs")
    }
}

#[test]
fn an_image_is_closed_by_metadata_and_then_by_steps_in_their_order() {
    let told = Arc::default();
    let mut host = HostLayer::new(Box::new(Flagged { counts: false }), "flagged".as_ref(), FileId(0), false);
    host.files = [FileId(0), FileId(1)].into();
    host.written = vec![Arc::new(Told(0, Arc::clone(&told))), Arc::new(Told(1, Arc::clone(&told)))];
    let mut chain = Chain::of(vec![host], vec![vec![0; 4096], vec![0; 4096]], 1);
    chain.write(0, &pattern(1, 512)).unwrap();
    chain.seen();
    chain.stack.begin_closing();
    chain.drain();
    assert_eq!(chain.seen(), [(FileId(1), IoOp::Write { fua: false }, 512, 512)]);
    let closed = chain.stack.close().unwrap()(&Blocking::before_main_loop());
    assert!(closed.images.is_empty() && closed.filters.is_empty());
    let steps = ["1: 1 at 1024", "1: durable", "0: 2 at 0", "0: 4096 bytes", "0: all durable", "1: all durable"];
    assert_eq!(*told.lock().unwrap(), steps);
}
