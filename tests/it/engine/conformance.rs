//! One suite for all engines, all ways to submit, and the faults around them.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::PATIENCE;
use crate::common::model::{Model, Moment, SECTOR, pattern};
use crate::common::served::folder;
use nix::errno::Errno;
use slog::{Discard, Logger, o};
use tapdisk::blocking::Blocking;
use tapdisk::config::Config;
use tapdisk::engine::Opener;
use tapdisk::queue::{Limits, Queue, Submission, SubmitMode, Transfer};
use tapdisk::request::{Op, RequestId, Slots};
use tapdisk::retry::{NoSpace, Retry};
use tapdisk::store::{self, Means};
use tapdisk::sys::file::Backing;
use tapdisk::sys::io::{FileId, IoOp};
use tapdisk::sys::memory::Memory;
use tempfile::TempDir;

const SIZE: u64 = 4 << 20;
const DEPTH: usize = 32;
const SLOTS: usize = 64;
/// The most bytes of a request.
const BYTES: u64 = 64 << 10;

/// What one of the disk's files is on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum On {
    /// A file, with O_DIRECT.
    Direct,
    /// A file, through the page cache.
    Buffered,
    /// Memory.
    Ram,
}
use On::{Buffered, Direct, Ram};

/// Parts of the disk that take turns to be in one of the files.
const PART: u64 = 128 << 10;

/// Engines, as `[engine]`, and the files of the disk. With several, what is at the beginning is in the first.
const ENGINES: [(&str, &str, &[On]); 14] = [
    ("aio", "name = 'aio'", &[Direct]),
    ("aio, one at a time", "name = 'aio'\nbatch = 1", &[Direct]),
    ("threads", "name = 'threads'", &[Direct]),
    ("threads, buffered", "name = 'threads'\nthreads_min = 2\nthreads_max = 4", &[Buffered]),
    ("io_uring", "name = 'io_uring'", &[Direct]),
    ("io_uring, buffered", "name = 'io_uring'", &[Buffered]),
    ("io_uring, sqpoll", "name = 'io_uring'\nsqpoll = true", &[Direct]),
    ("ram", "", &[Ram]),
    ("aio, beside a buffered file", "name = 'aio'", &[Direct, Buffered]),
    ("io_uring, beside a buffered file", "name = 'io_uring'", &[Direct, Buffered]),
    ("aio and ram", "name = 'aio'", &[Direct, Ram]),
    ("threads and ram", "name = 'threads'", &[Buffered, Ram]),
    ("ram and io_uring", "name = 'io_uring'", &[Ram, Direct]),
    ("all of them", "name = 'auto'", &[Direct, Ram, Buffered, Ram]),
];
const MODES: [SubmitMode; 3] = [SubmitMode::Auto, SubmitMode::Thread, SubmitMode::Inline];
const NO_FAULTS: &str = "";
/// Completions in another order than submissions, short I/Os, errors that pass.
const ADVERSE: &str = "[[fault]]\ntype = 'delay'\nrate = 0.2\nus = 300\ndistribution = 'exponential'\n\
                       [[fault]]\ntype = 'error'\nerrno = 'EBUSY'\nrate = 0.02\non = ['read', 'write', 'discard', 'write-zeroes']\n\
                       [[fault]]\ntype = 'short'\nrate = 0.2\non = ['read', 'write']\n";

/// A queue on an engine, its image and its clients' memory.
struct Bench {
    queue: Queue,
    slots: Slots,
    memory: Arc<Memory>,
    opener: Opener,
    /// Files of the disk.
    files: u64,
    _folder: TempDir,
}

fn config(engine: &str, rest: &str) -> Config {
    // Locked memory is counted for all tests of this process together.
    let text = format!("[image]\npath = 'x'\n[memory]\nlock = false\n[engine]\ndepth = {DEPTH}\n{engine}\n{rest}");
    Config::parse(&text, Path::new("test")).unwrap()
}

fn opener(config: &Config, folder: &Path, files: &[On], size: u64) -> Opener {
    let open = |(index, on): (usize, &On)| {
        if *on == Ram {
            return Means::Memory(Arc::new(store::Ram::zeroed(&Blocking::before_main_loop(), size).unwrap()));
        }
        let direct = *on == Direct;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).custom_flags(if direct { libc::O_DIRECT } else { 0 });
        let file = options.open(folder.join(format!("image{index}"))).unwrap();
        file.set_len(size).unwrap();
        Means::File(Backing { file, direct, block_device: false })
    };
    let files = files.iter().enumerate().map(open).collect();
    Opener::new(files, config, None, Logger::root(Discard, o!())).unwrap()
}

impl Bench {
    fn new(engine: (&str, &str, &[On]), mode: SubmitMode, faults: &str) -> Bench {
        Self::with_size(engine, mode, faults, SIZE)
    }

    fn with_size((name, table, files): (&str, &str, &[On]), mode: SubmitMode, faults: &str, size: u64) -> Bench {
        let folder = folder();
        let config = config(table, faults);
        let opener = opener(&config, folder.path(), files, size);
        let blocking = Blocking::before_main_loop();
        let engine = opener.open(&blocking, opener.name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let retry = Retry { limit: 60_000_000_000, no_space: NoSpace::Report };
        let limits = Limits { tiocbs: SLOTS, iovecs: 256, merge_bytes: 256 << 10, retry };
        let submission = Submission::start(&blocking, engine, mode).unwrap();
        let queue = Queue::new(submission.into(), mode, limits);
        let memory = Arc::new(Memory::anonymous(SLOTS * BYTES as usize).unwrap());
        let (slots, files) = (Slots::new(SLOTS, 4, 0), files.len() as u64);
        Bench { queue, slots, memory, opener, files, _folder: folder }
    }

    /// The file that a part of the disk is in.
    fn file(&self, offset: u64) -> FileId {
        FileId((offset / PART % self.files) as u16)
    }

    /// Queues a request whose data, if it has some, is in its slot's part of the memory. False: there is no room.
    fn push(&mut self, op: IoOp, offset: u64, len: u64) -> Option<RequestId> {
        let request = self.slots.vacant()?;
        request.op = Op::Read;
        let id = self.slots.take()?;
        let data = matches!(op, IoOp::Read | IoOp::Write { .. });
        if data {
            let at = self.at(id);
            self.slots.get_mut(id).payload.set(&self.memory, at, len as u32);
        }
        let file = self.file(offset);
        assert!(self.queue.push(Transfer { op, file, offset, len, owner: id, at: 0, piece: None }));
        Some(id)
    }

    fn at(&self, id: RequestId) -> usize {
        id.index() as usize * BYTES as usize
    }

    /// A write of `number`.
    fn write(&mut self, op: IoOp, number: u64, offset: u64, len: u64) -> RequestId {
        let id = self.push(op, offset, len).unwrap();
        self.memory.write(self.at(id), &pattern(number, len));
        id
    }

    fn data(&self, id: RequestId, len: u64) -> Vec<u8> {
        let mut data = vec![0; len as usize];
        self.memory.read(self.at(id), &mut data);
        data
    }

    /// One turn. Gives what has finished, whose slots are free then.
    fn turn(&mut self, finished: &mut Vec<(Transfer, Result<u64, Errno>)>) {
        self.queue.kick(&self.slots);
        self.queue.reap();
        while let Some(end) = self.queue.next_finished() {
            finished.push(end);
        }
    }

    /// Turns until `count` are finished, in the order in which they did.
    fn finish(&mut self, count: usize) -> Vec<(Transfer, Result<u64, Errno>)> {
        let end = Instant::now() + PATIENCE;
        let mut finished = Vec::new();
        while finished.len() < count {
            self.turn(&mut finished);
            assert!(Instant::now() < end, "{} of {count} finished: {:?}", finished.len(), self.queue.report());
        }
        finished
    }

    fn finish_and_release(&mut self, count: usize) -> Vec<(u64, Result<u64, Errno>)> {
        let finished = self.finish(count);
        finished.iter().for_each(|(transfer, _)| self.slots.release(transfer.owner));
        finished.into_iter().map(|(transfer, result)| (transfer.offset, result)).collect()
    }
}

/// For every engine and every way to submit.
fn each(faults: &str, test: impl Fn(&mut Bench)) {
    for engine in ENGINES {
        for mode in MODES {
            println!("{}, {mode:?}", engine.0);
            test(&mut Bench::new(engine, mode, faults));
        }
    }
}

const WRITE: IoOp = IoOp::Write { fua: false };

#[test]
fn what_is_written_is_read_and_the_last_write_wins() {
    each(NO_FAULTS, |bench| {
        for round in 1..4 {
            for op in [WRITE, IoOp::Write { fua: true }] {
                bench.write(op, round * 10, 8192, 8192);
                assert_eq!(bench.finish_and_release(1), [(8192, Ok(8192))]);
                bench.push(IoOp::Flush, 0, 0);
                assert_eq!(bench.finish_and_release(1), [(0, Ok(0))]);
                let id = bench.push(IoOp::Read, 4096, 16384).unwrap();
                assert_eq!(bench.finish(1)[0].1, Ok(16384));
                let data = bench.data(id, 16384);
                bench.slots.release(id);
                assert_eq!(data[4096..12288], pattern(round * 10, 8192));
                assert!(data[..4096].iter().chain(&data[12288..]).all(|byte| *byte == 0));
            }
        }
    });
}

#[test]
fn zeroed_and_discarded_ranges_read_as_zeros_and_neighbours_stay() {
    each(NO_FAULTS, |bench| {
        for op in [IoOp::WriteZeroes { unmap: false }, IoOp::WriteZeroes { unmap: true }, IoOp::Discard] {
            bench.write(WRITE, 5, 0, 32768);
            bench.finish_and_release(1);
            bench.push(op, 8192, 4096);
            assert_eq!(bench.finish_and_release(1), [(8192, Ok(4096))], "{op:?}");
            let id = bench.push(IoOp::Read, 0, 32768).unwrap();
            bench.finish(1);
            let data = bench.data(id, 32768);
            bench.slots.release(id);
            assert!(data[8192..12288].iter().all(|byte| *byte == 0), "{op:?}");
            assert!(data[..8192] == pattern(5, 8192) && data[12288..] == pattern(5, 20480), "{op:?}");
        }
    });
}

#[test]
fn an_error_within_a_merged_io_is_that_requests_alone() {
    let faults = "[[fault]]\ntype = 'error'\nfrom = 16384\nto = 16896\nerrno = 'EREMOTEIO'\n";
    each(faults, |bench| {
        for op in [WRITE, IoOp::Read] {
            // Plugged, so that they are merged.
            bench.queue.plug();
            for i in 0..16 {
                bench.push(op, i * 4096, 4096);
            }
            bench.queue.unplug(&bench.slots);
            let finished = bench.finish_and_release(16);
            for (offset, result) in finished {
                let expected = if offset == 16384 { Err(Errno::EREMOTEIO) } else { Ok(4096) };
                assert_eq!(result, expected, "{op:?} at {offset}");
            }
        }
        let report = bench.queue.report();
        assert!(report.split == 2 && report.merged == 30, "{report:?}");
    });
}

#[test]
fn short_ios_are_completed() {
    each("[[fault]]\ntype = 'short'\non = ['read', 'write']\n", |bench| {
        bench.write(WRITE, 77, 4096, BYTES);
        assert_eq!(bench.finish_and_release(1), [(4096, Ok(BYTES))]);
        let id = bench.push(IoOp::Read, 4096, BYTES).unwrap();
        assert_eq!(bench.finish(1)[0].1, Ok(BYTES));
        assert_eq!(bench.data(id, BYTES), pattern(77, BYTES));
        assert!(bench.queue.report().resubmitted >= 2);
    });
}

#[test]
fn a_read_that_meets_the_end_of_the_file_says_how_much_there_was() {
    // Nothing in memory is shorter than the disk.
    for engine in ENGINES.iter().filter(|engine| !engine.2.contains(&Ram)) {
        for mode in MODES {
            let mut bench = Bench::with_size(*engine, mode, NO_FAULTS, 8192 + 100);
            bench.push(IoOp::Read, 4096, 8192);
            bench.push(IoOp::Read, 65536, 4096);
            let mut finished = bench.finish_and_release(2);
            finished.sort_unstable_by_key(|(offset, _)| *offset);
            assert_eq!(finished, [(4096, Ok(4196)), (65536, Ok(0))], "{}, {mode:?}", engine.0);
        }
    }
}

#[test]
fn more_than_fits_waits_and_is_never_an_error() {
    each(NO_FAULTS, |bench| {
        bench.queue.plug();
        for i in 0..SLOTS as u64 {
            // Apart from each other: nothing is merged.
            bench.write(WRITE, i + 1, i * 65536, 512);
        }
        let transfer = Transfer {
            op: IoOp::Flush,
            file: FileId(0),
            offset: 0,
            len: 0,
            owner: bench.slots.iter().next().unwrap().0,
            at: 0,
            piece: None,
        };
        assert!(!bench.queue.push(transfer), "there are {SLOTS} tiocbs");
        assert!(bench.slots.vacant().is_none());
        bench.queue.unplug(&bench.slots);
        assert!(bench.queue.in_flight() <= DEPTH);
        let finished = bench.finish_and_release(SLOTS);
        assert!(finished.iter().all(|(_, result)| *result == Ok(512)), "{finished:?}");
        assert!(bench.queue.is_idle());
    });
}

#[test]
fn plugs_nest_and_what_waits_behind_them_goes_together() {
    each(NO_FAULTS, |bench| {
        bench.queue.plug();
        bench.queue.plug();
        for i in 0..8 {
            bench.write(WRITE, 9, i * 4096, 4096);
        }
        bench.queue.unplug(&bench.slots);
        assert_eq!((bench.queue.in_flight(), bench.queue.report().submitted), (0, 0), "a plug is left");
        bench.queue.unplug(&bench.slots);
        bench.finish_and_release(8);
        // The submit thread counts an I/O when its submission is over, and that may have been completed before.
        while bench.queue.report().submitted == 0 {
            std::thread::yield_now();
        }
        assert_eq!(bench.queue.report().submitted, 1, "all are one I/O");
    });
}

#[test]
fn cancel_ends_what_waits_and_what_is_in_flight_completes() {
    each("[[fault]]\ntype = 'delay'\nus = 20000\n", |bench| {
        for i in 0..SLOTS as u64 {
            bench.write(WRITE, i + 1, i * 65536, 512);
        }
        bench.queue.kick(&bench.slots);
        bench.queue.cancel();
        let finished = bench.finish_and_release(SLOTS);
        let cancelled = finished.iter().filter(|(_, result)| *result == Err(Errno::ECANCELED)).count();
        assert!(cancelled >= SLOTS - DEPTH, "{cancelled} of {SLOTS} were cancelled");
        assert!(finished.iter().all(|(_, result)| matches!(result, Ok(512) | Err(Errno::ECANCELED))), "{finished:?}");
        assert!(bench.queue.is_idle());
        // And it goes on.
        bench.push(IoOp::Read, 0, 4096);
        assert_eq!(bench.finish_and_release(1), [(0, Ok(4096))]);
    });
}

#[test]
fn a_flush_that_fails_fails_once_and_is_not_tried_again() {
    each("[[fault]]\ntype = 'error'\non = ['flush']\nerrno = 'EBUSY'\n", |bench| {
        bench.push(IoOp::Flush, 0, 0);
        assert_eq!(bench.finish_and_release(1), [(0, Err(Errno::EBUSY))]);
        assert_eq!(bench.queue.report().retried, 0);
    });
}

/// A request in flight.
struct Flight {
    op: IoOp,
    offset: u64,
    len: u64,
    begun: Moment,
}

/// Random requests, overlapping, against the model; now and then another engine, if there are others.
fn random_load(bench: &mut Bench, requests: u64, seed: u64, switch: bool) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut model = Model::new(SIZE);
    let mut flights: HashMap<u32, Flight> = HashMap::new();
    let (mut begun, mut ended) = (0, 0);
    let mut finished = Vec::new();
    let mut switching = false;
    let mut end = Instant::now() + Duration::from_secs(60);
    while ended < requests {
        // Sometimes all of it ends before anything new begins.
        let most = if begun % 1000 < 990 { SLOTS } else { 1 };
        while begun < requests && flights.len() < most && random.u32(..8) != 0 {
            let flight = begin(bench, &mut model, &mut random, begun + 1);
            flights.insert(flight.0.index(), flight.1);
            begun += 1;
        }
        bench.turn(&mut finished);
        for (transfer, result) in finished.drain(..) {
            let flight = flights.remove(&transfer.owner.index()).unwrap();
            assert_eq!(result, Ok(flight.len), "seed {seed}: {:?} at {}", flight.op, flight.offset);
            match flight.op {
                IoOp::Read => {
                    let data = bench.data(transfer.owner, flight.len);
                    let checked = model.check(flight.begun, flight.offset, &data);
                    checked.unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
                }
                IoOp::Write { .. } | IoOp::WriteZeroes { .. } => {
                    model.end_write(flight.begun, true, flight.offset, flight.len);
                }
                IoOp::Discard => model.end_write(flight.begun, false, flight.offset, flight.len),
                IoOp::Flush | IoOp::Status => {}
            }
            bench.slots.release(transfer.owner);
            ended += 1;
            end = Instant::now() + Duration::from_secs(60);
        }
        if flights.is_empty() {
            model.settle();
        }
        if switch && !switching && random.u32(..2000) == 0 {
            bench.queue.plug();
            switching = true;
        }
        if switching && bench.queue.is_drained() {
            change_engine(bench, &mut random);
            switching = false;
        }
        assert!(Instant::now() < end, "seed {seed}: {:?}", bench.queue.report());
    }
    assert!(bench.queue.is_idle());
}

fn begin(bench: &mut Bench, model: &mut Model, random: &mut fastrand::Rng, count: u64) -> (RequestId, Flight) {
    let sectors = match random.u32(..4) {
        0 => random.u64(1..=BYTES / SECTOR),
        _ => random.u64(1..=8),
    };
    let len = sectors * SECTOR;
    // Half of the requests meet in a small part of the disk.
    let space = if random.bool() { SIZE } else { 256 << 10 };
    let offset = random.u64(..=(space - len) / SECTOR) * SECTOR;
    // Within one part.
    let offset = offset - (offset % PART + len).saturating_sub(PART);
    let op = match random.u32(..512) {
        // Few: each may take a file system milliseconds.
        0 => IoOp::Flush,
        1 => IoOp::Write { fua: true },
        2..16 => IoOp::Discard,
        16..32 => IoOp::WriteZeroes { unmap: random.bool() },
        32..280 => WRITE,
        _ => IoOp::Read,
    };
    let (number, offset, len) = match op {
        IoOp::Write { .. } => (count, offset, len),
        IoOp::Flush => (0, 0, 0),
        _ => (0, offset, len),
    };
    let (id, begun) = match op {
        IoOp::Read | IoOp::Flush | IoOp::Status => (bench.push(op, offset, len).unwrap(), model.begin()),
        IoOp::Write { .. } => (bench.write(op, number, offset, len), model.begin_write(number, offset, len)),
        IoOp::Discard | IoOp::WriteZeroes { .. } => {
            (bench.push(op, offset, len).unwrap(), model.begin_write(number, offset, len))
        }
    };
    (id, Flight { op, offset, len, begun })
}

fn change_engine(bench: &mut Bench, random: &mut fastrand::Rng) {
    use tapdisk::config::EngineName::{Aio, IoUring, Threads};
    let name = *random.choice(&[Aio, IoUring, Threads]).unwrap();
    let mode = *random.choice(&MODES).unwrap();
    let blocking = Blocking::before_main_loop();
    let engine = bench.opener.open(&blocking, name).unwrap();
    let next = Submission::start(&blocking, engine, mode).unwrap();
    bench.queue.switch(next.into(), mode).take(&blocking).close(&blocking);
    bench.queue.unplug(&bench.slots);
}

/// So many requests of each run, and more if TAPDISK_TEST_REQUESTS says so.
fn requests(default: u64) -> u64 {
    std::env::var("TAPDISK_TEST_REQUESTS").map_or(default, |text| text.parse().expect("a number of requests"))
}

#[test]
#[ignore = "slow"]
fn random_requests_agree_with_the_model_on_every_engine() {
    for engine in ENGINES {
        for mode in MODES {
            for (seed, faults) in [(1, NO_FAULTS), (2, ADVERSE)] {
                println!("{}, {mode:?}, seed {seed}", engine.0);
                random_load(&mut Bench::new(engine, mode, faults), requests(4000), seed, false);
            }
        }
    }
}

#[test]
#[ignore = "slow"]
fn a_hundred_thousand_random_requests_with_completions_in_any_order_and_engines_that_change() {
    random_load(&mut Bench::new(ENGINES[0], SubmitMode::Auto, ADVERSE), requests(100_000), 3, true);
}

#[test]
#[ignore = "slow"]
fn a_hundred_thousand_random_requests_on_files_of_all_kinds_and_engines_that_change() {
    random_load(&mut Bench::new(ENGINES[13], SubmitMode::Auto, ADVERSE), requests(100_000), 5, true);
}

#[test]
fn a_hundred_thousand_random_requests_on_ram() {
    random_load(&mut Bench::new(ENGINES[7], SubmitMode::Thread, ADVERSE), requests(100_000), 4, false);
}
