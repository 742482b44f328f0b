//! A disk of 64 KiB with a ring in plain memory and no doorbells, on any engine: turned by hand.

#![allow(dead_code)] // the tests use a part, and fuzzing the other

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use slog::{Discard, Logger, o};
use tapdisk::blocking::Blocking;
use tapdisk::disk::{Disk, Parts, Watchdog};
use tapdisk::engine::Engine;
use tapdisk::frontend::blkif::queue::{Limits, Pages, RingQueue};
use tapdisk::frontend::blkif::ring::{BackRing, FrontRing, Shared};
use tapdisk::frontend::blkif::wire::Abi;
use tapdisk::frontend::{DiskInfo, Frontend, Intake};
use tapdisk::queue::{Queue, Submission, SubmitMode};
use tapdisk::request::{Request, Slots};
use tapdisk::retry::Retry;
use tapdisk::stack::{HostLayer, Stack};
use tapdisk::sys::io::FileId;
use tapdisk::sys::memory::{Memory, PAGE_SIZE};

/// Bytes of the disk.
pub const SIZE: u64 = 64 << 10;
/// Data pages of the ring's client; the ring itself is the page before them.
pub const PAGES: u32 = 16;

/// Data pages.
pub struct DataPages(Arc<Memory>);

impl Pages for DataPages {
    fn memory(&self) -> &Arc<Memory> {
        &self.0
    }
    fn offset(&self, gref: u32) -> Option<usize> {
        (gref < PAGES).then(|| (gref as usize + 1) * PAGE_SIZE)
    }
}

/// One ring in memory, without doorbells.
pub struct Ring {
    queue: Arc<Mutex<RingQueue>>,
    pages: DataPages,
    gone: Arc<AtomicBool>,
}

impl Ring {
    /// Set: its client is gone.
    pub fn gone(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.gone)
    }
}

impl Frontend for Ring {
    fn register(&mut self, _: mio::Registry, _: usize) -> std::io::Result<()> {
        Ok(())
    }
    fn event(&mut self, _: usize, _: &mio::event::Event) {}
    fn pull(&mut self, intake: &mut Intake) {
        // A ring that overflows gives nothing any more.
        let _ = self.queue.lock().unwrap().pull(intake, &self.pages, 0);
    }
    fn answer(&mut self, request: &Request) {
        self.queue.lock().unwrap().answer(request.tag as u16, request);
    }
    fn publish(&mut self) {
        self.queue.lock().unwrap().ring_mut().publish();
    }
    fn in_memory(&self) -> bool {
        true
    }
    fn ready(&self) -> bool {
        self.queue.lock().unwrap().ring().ready()
    }
    fn pull_deadline(&self) -> Option<u64> {
        // Long ago.
        Some(1)
    }

    fn arm(&mut self) -> bool {
        self.queue.lock().unwrap().ring_mut().arm()
    }
    fn has_orphans(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
    fn is_orphan(&self, _: u64) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
    fn close(&mut self) {}
    fn inspect(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

/// A disk, the client's side of its ring, and the ring's memory.
pub struct World {
    pub disk: Disk,
    pub front: FrontRing,
    pub queue: Arc<Mutex<RingQueue>>,
    pub memory: Arc<Memory>,
}

/// One on RAM.
pub fn ram(abi: Abi, sector_size: u32, read_only: bool) -> World {
    world(abi, sector_size, read_only, tapdisk::engine::memory::ram(&Blocking::before_main_loop(), SIZE, 8).unwrap())
}

/// One on `engine`.
pub fn world(abi: Abi, sector_size: u32, read_only: bool, engine: Engine) -> World {
    let (ring, front, queue, memory) = ring(abi, sector_size);
    World { disk: disk(Box::new(ring), info(sector_size, read_only), engine), front, queue, memory }
}

/// A ring, its client's side, and its memory.
pub fn ring(abi: Abi, sector_size: u32) -> (Ring, FrontRing, Arc<Mutex<RingQueue>>, Arc<Memory>) {
    let memory = Arc::new(Memory::anonymous((PAGES as usize + 1) * PAGE_SIZE).unwrap());
    let shared = Shared::new(Arc::clone(&memory), 0, abi, 0);
    let front = FrontRing::init(shared.clone());
    let limits = Limits { indirect_segments: 32, sector_size };
    let queue = Arc::new(Mutex::new(RingQueue::new(BackRing::attach(shared), limits)));
    let ring = Ring { queue: Arc::clone(&queue), pages: DataPages(Arc::clone(&memory)), gone: Arc::default() };
    (ring, front, queue, memory)
}

/// What clients are told of such a disk.
pub fn info(sector_size: u32, read_only: bool) -> DiskInfo {
    DiskInfo { size: SIZE, sector_size, physical_sector_size: 4096, read_only, name: "test:image".into() }
}

/// A disk on `engine` with another frontend.
pub fn disk(frontend: Box<dyn Frontend>, info: DiskInfo, engine: Engine) -> Disk {
    disk_of(vec![frontend], Vec::new(), info, engine)
}

/// A disk on `engine` with other frontends, and with filters.
pub fn disk_of(
    frontends: Vec<Box<dyn Frontend>>,
    mut layers: Vec<HostLayer>,
    info: DiskInfo,
    engine: Engine,
) -> Disk {
    let sector_size = info.sector_size;
    let raw = drivers::Raw::new(SIZE, sector_size.into(), drivers::OddSize::Refuse).unwrap();
    layers.push(HostLayer::new(Box::new(raw), Path::new("image"), FileId(0), false));
    let limits = tapdisk::queue::Limits { tiocbs: 16, iovecs: 256, merge_bytes: 1 << 20, retry: Retry::default() };
    let submission = Submission::start(&Blocking::before_main_loop(), engine, SubmitMode::Auto).unwrap();
    let queue_of_disk = Queue::new(submission.into(), SubmitMode::Auto, limits);
    let slots = Slots::new(16, 32, 0);
    let log = Logger::root(Discard, o!());
    Disk::new(Parts {
        info,
        frontends,
        slots,
        stack: Stack::new(layers.into(), 16).unwrap(),
        queue: queue_of_disk,
        stores: Arc::<[_]>::from([]).into(),
        opener: None,
        reopen: None,
        watchdog: Watchdog::default(),
        log,
    })
}
