//! The pool of threads, on real files: its bounds, its end, and whose threads they are.

use std::collections::VecDeque;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::PATIENCE;
use crate::common::served::folder;
use crate::common::small_fs::SmallFs;
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use tapdisk::blocking::{Blocking, Caller};
use tapdisk::engine::pool::{self, BoundsError, PoolReport, Threads};
use tapdisk::engine::{Engine, Inline, Setup};
use tapdisk::sys::file::Backing;
use tapdisk::sys::io::{FileId, Io, IoOp};
use tapdisk::sys::memory::Memory;

const WRITE: IoOp = IoOp::Write { fua: false };
const LONG: Duration = Duration::from_secs(600);

fn threads(min: usize, max: usize) -> Threads {
    Threads { min, max, idle: LONG }
}

/// A pool on a file, and a main loop that turns only where a test says so.
struct Bench {
    engine: Engine,
    event: Arc<EventFd>,
    memory: Arc<Memory>,
}

impl Bench {
    fn on(path: &Path, threads: Threads) -> Bench {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let files: Arc<[Backing]> = Arc::new([Backing { file, direct: false, block_device: false }]);
        let setup = Setup { threads, ..Setup::new(files, 128).unwrap() };
        let engine = pool::open(&Blocking::before_main_loop(), &setup).unwrap();
        Bench { engine, event: setup.event, memory: Arc::new(Memory::anonymous(128 * 4096).unwrap()) }
    }

    fn io(&self, op: IoOp, tag: u32) -> Box<Io> {
        let mut io = Io::new(tag, 1);
        io.begin(op, FileId(0), u64::from(tag) * 4096);
        if op != IoOp::Flush {
            io.push(&self.memory, tag as usize * 4096, 4096);
        }
        io
    }

    fn submit(&self, op: IoOp, tags: std::ops::Range<u32>) {
        let mut batch: VecDeque<_> = tags.map(|tag| self.io(op, tag)).collect();
        let count = batch.len();
        assert_eq!(self.engine.submit.submit(&mut batch, usize::MAX, Caller::MainLoop), Ok(count));
    }

    fn reap(&mut self) -> Vec<(u32, Result<u64, Errno>)> {
        let mut done = Vec::new();
        self.engine.reap.reap(&mut |io, result| done.push((io.tag, result)));
        done
    }

    /// Turns until `count` I/Os are done.
    fn done(&mut self, count: usize) -> Vec<(u32, Result<u64, Errno>)> {
        let mut all = Vec::new();
        until(|| {
            all.extend(self.reap());
            all.len() >= count
        });
        assert_eq!(all.len(), count);
        all
    }

    fn pool(&self) -> &pool::Pool {
        self.engine.submit.capability().unwrap()
    }

    fn report(&self) -> PoolReport {
        self.pool().report()
    }

    /// Turns until the pool looks like that.
    fn until(&mut self, is: impl Fn(&PoolReport) -> bool) -> PoolReport {
        let mut seen = self.report();
        until(|| {
            assert_eq!(self.reap(), []);
            seen = self.report();
            is(&seen)
        });
        seen
    }

    /// Times that the event was written since this was asked last.
    fn events(&self) -> u64 {
        self.event.read().unwrap_or(0)
    }
}

fn until(mut is: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < end, "it does not come to that");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn image() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = folder();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![0x5a; 1 << 20]).unwrap();
    (folder, path)
}

#[test]
fn all_operations_are_carried_out() {
    let (_folder, path) = image();
    let mut bench = Bench::on(&path, threads(1, 4));
    assert_eq!((bench.engine.name, &bench.engine.inline), ("threads", &Inline::Always));
    bench.memory.write(4096, &[7; 4096]);
    bench.submit(IoOp::Write { fua: true }, 1..2);
    assert_eq!(bench.done(1), [(1, Ok(4096))]);
    bench.submit(IoOp::Flush, 0..1);
    assert_eq!(bench.done(1), [(0, Ok(0))]);
    bench.submit(IoOp::Discard, 2..3);
    bench.submit(IoOp::WriteZeroes { unmap: false }, 3..4);
    bench.submit(IoOp::Status, 9..10);
    assert!(bench.done(3).iter().all(|(_, result)| *result == Ok(4096)));
    assert_eq!(bench.memory.read_once::<8>(9 * 4096), 4096u64.to_ne_bytes(), "all data");
    bench.submit(IoOp::Read, 1..5);
    assert_eq!(bench.done(4).len(), 4);
    for (page, byte) in [(1, 7), (2, 0), (3, 0), (4, 0x5a)] {
        assert_eq!(bench.memory.read_once::<4>(page * 4096), [byte; 4], "{page}");
    }
    // Beyond the end of the file.
    let mut io = bench.io(IoOp::Read, 0);
    io.offset = 1 << 30;
    bench.pool().give(std::iter::once(io));
    assert_eq!(bench.done(1), [(0, Ok(0))]);
}

#[test]
fn bounds_are_checked_and_kept_and_change_while_it_runs() {
    let (_folder, path) = image();
    let file = std::fs::File::open(&path).unwrap();
    let files: Arc<[Backing]> = Arc::new([Backing { file, direct: false, block_device: false }]);
    for (min, max) in [(0, 4), (3, 2)] {
        let setup = Setup { threads: threads(min, max), ..Setup::new(Arc::clone(&files), 8).unwrap() };
        let error = pool::open(&Blocking::before_main_loop(), &setup).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "{error}");
    }
    let mut bench = Bench::on(&path, threads(3, 5));
    let report = bench.report();
    assert_eq!((report.threads, report.created), (3, 3), "before anything is served");
    for _ in 0..20 {
        bench.submit(IoOp::Read, 0..128);
        bench.done(128);
        assert!((3..=5).contains(&bench.report().threads));
    }
    assert_eq!(bench.pool().set(0, 2), Err(BoundsError::NoThread));
    assert_eq!(bench.pool().set(3, 2), Err(BoundsError::Crossed { min: 3, max: 2 }));
    assert_eq!((bench.report().min, bench.report().max), (3, 5));
    bench.pool().set(20, 64).unwrap();
    bench.until(|report| report.threads == 20 && report.idle == 20);
    bench.submit(IoOp::Read, 0..128);
    bench.pool().set(1, 2).unwrap();
    bench.done(128);
    let report = bench.until(|report| report.threads <= 2);
    assert_eq!((report.min, report.max, report.queued, report.running), (1, 2, 0, 0));
    bench.pool().set(1, 128).unwrap();
    bench.submit(WRITE, 0..128);
    bench.done(128);
}

#[test]
fn idle_threads_beyond_the_minimum_end() {
    let (_folder, path) = image();
    let mut bench = Bench::on(&path, Threads { min: 2, max: 16, idle: Duration::from_millis(100) });
    bench.pool().set(12, 16).unwrap();
    bench.until(|report| report.idle == 12);
    bench.pool().set(2, 16).unwrap();
    let created = bench.until(|report| report.threads == 2).created;
    std::thread::sleep(Duration::from_millis(300));
    let report = bench.report();
    assert_eq!((report.threads, report.idle, report.created), (2, 2, created), "the minimum stays");
    // One job at a time keeps one thread awake, not all of them.
    bench.pool().set(12, 16).unwrap();
    bench.until(|report| report.idle == 12);
    bench.pool().set(1, 16).unwrap();
    until(|| {
        bench.submit(IoOp::Read, 0..1);
        bench.done(1);
        bench.report().threads == 1
    });
}

#[test]
fn what_is_queued_can_be_cancelled_and_what_runs_can_not() {
    let Some(fs) = SmallFs::new("16m") else { return };
    let path = fs.path("disk.img");
    std::fs::write(&path, vec![0x5a; 1 << 20]).unwrap();
    let mut bench = Bench::on(&path, threads(1, 2));
    let frozen = fs.freeze();
    bench.submit(WRITE, 0..5);
    let report = bench.until(|report| report.running == 2);
    assert_eq!((report.threads, report.queued), (2, 3), "the loop made the second one, and no third");
    let submit = Arc::clone(&bench.engine.submit);
    assert!(!submit.cancel(0) && !submit.cancel(1), "they run");
    assert!(submit.cancel(3) && !submit.cancel(3) && !submit.cancel(77));
    assert_eq!(bench.done(1), [(3, Err(Errno::ECANCELED))]);
    // With more threads, what is queued gets stuck too, and new ones still get through to what is not frozen.
    bench.pool().set(1, 5).unwrap();
    bench.until(|report| report.running == 4);
    bench.submit(IoOp::Read, 5..6);
    assert_eq!(bench.done(1), [(5, Ok(4096))]);
    drop(frozen);
    let mut rest = bench.done(4);
    rest.sort_unstable_by_key(|(tag, _)| *tag);
    assert_eq!(rest, [0, 1, 2, 4].map(|tag| (tag, Ok(4096))));
    drop((bench, submit));
}

#[test]
fn the_loop_is_woken_once_for_a_batch() {
    let (_folder, path) = image();
    let mut bench = Bench::on(&path, threads(4, 4));
    bench.until(|report| report.idle == 4);
    assert_eq!((bench.events(), bench.engine.reap.ready()), (0, false));
    bench.submit(IoOp::Read, 0..100);
    until(|| bench.report().idle == 4 && bench.report().queued == 0);
    assert_eq!((bench.events(), bench.engine.reap.ready()), (1, true), "nobody has reaped");
    assert_eq!(bench.reap().len(), 100);
    assert!(!bench.engine.reap.ready());
    bench.submit(IoOp::Read, 0..1);
    until(|| bench.report().idle == 4 && bench.engine.reap.ready());
    assert_eq!(bench.events(), 1);
    assert_eq!(bench.reap().len(), 1);
}

#[test]
fn dropping_it_under_load_does_all_of_the_work_and_leaves_no_thread() {
    let (_folder, path) = image();
    for round in 1..=20 {
        let bench = Bench::on(&path, Threads { min: 1, max: 32, idle: Duration::from_millis(1) });
        bench.memory.write(0, &[round; 128 * 4096]);
        bench.submit(WRITE, 0..128);
        let Bench { engine, memory, .. } = bench;
        let Engine { submit, reap, .. } = engine;
        drop(submit);
        let mut reap = reap;
        let mut count = 0;
        reap.reap(&mut |io, result| {
            assert_eq!(result, Ok(io.len));
            count += 1;
        });
        assert_eq!((count, reap.ready()), (128, false));
        drop(reap);
        assert_eq!(Arc::strong_count(&memory), 1);
        let mut bytes = vec![0; 128 * 4096];
        std::fs::File::open(&path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == round));
    }
}
