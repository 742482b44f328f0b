//! A VHD image in a file on a raw one in memory: files of two kinds, through the whole disk.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use slog::{Discard, Logger, o};
use tapdisk::blocking::Blocking;
use tapdisk::config::{Config, EngineName};
use tapdisk::disk::{Disk, Turn, Wanted};
use tapdisk::engine::Inline;
use tapdisk::engine::fault::Faults;
use tapdisk::frontend::{Frontend, Intake};
use tapdisk::queue::SubmitMode;
use tapdisk::request::{Op, Request};
use tapdisk::store::{self, How, MemoryStore, Ram, Store};
use tapdisk::sys::memory::Memory;
use tapdisk::{image, serve};

use crate::common::model::{Model, Moment, SECTOR, pattern};
use crate::common::served::folder;
use crate::common::vhd::good;

const SIZE: u64 = 12 << 20;
/// Requests at a time, and the most bytes of one.
const AT_ONCE: usize = 16;
const BYTES: u64 = 96 << 10;

/// A request, and when it began.
#[derive(Clone, Copy, Debug)]
struct Asked {
    op: Op,
    offset: u64,
    len: u64,
    begun: Moment,
}

/// What the test and its frontend share.
#[derive(Default)]
struct Shared {
    /// By tag, which is also the place in memory.
    to_pull: VecDeque<(u64, Asked)>,
    answered: Vec<(u64, Result<(), Errno>)>,
}

/// A frontend of one client, whose memory has a place for each of its requests.
struct Client(Rc<RefCell<Shared>>, Arc<Memory>);

impl Frontend for Client {
    fn register(&mut self, _: mio::Registry, _: usize) -> std::io::Result<()> {
        Ok(())
    }
    fn event(&mut self, _: usize, _: &mio::event::Event) {}
    fn pull(&mut self, intake: &mut Intake) {
        let mut shared = self.0.borrow_mut();
        while let Some((tag, asked)) = shared.to_pull.front().copied() {
            let Some(request) = intake.vacant() else { return };
            (request.op, request.offset, request.len, request.tag) = (asked.op, asked.offset, asked.len, tag);
            if matches!(asked.op, Op::Read | Op::Write { .. }) {
                request.payload.set(&self.1, tag as usize * BYTES as usize, asked.len as u32);
            }
            intake.accept();
            shared.to_pull.pop_front();
        }
    }
    fn answer(&mut self, request: &Request) {
        self.0.borrow_mut().answered.push((request.tag, request.result()));
    }
    fn publish(&mut self) {}
    fn in_memory(&self) -> bool {
        false
    }
    fn ready(&self) -> bool {
        !self.0.borrow().to_pull.is_empty()
    }
    fn arm(&mut self) -> bool {
        false
    }
    fn close(&mut self) {}
    fn inspect(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

struct Bench {
    disk: Disk,
    shared: Rc<RefCell<Shared>>,
    memory: Arc<Memory>,
}

impl Bench {
    /// The image `child`, with `base` in the place of its parent.
    fn open(child: &Path, base: &Arc<Ram>, engine: &str) -> Bench {
        let text = format!(
            "requests = {AT_ONCE}\n[image]\ntype = 'vhd'\npath = '{}'\nchanged_parent = 'serve'\n[memory]\nlock = false\n[engine]\n\
             depth = 16\n{engine}",
            child.display()
        );
        let config = Config::parse(&text, Path::new("test")).unwrap();
        let (blocking, log) = (Blocking::before_main_loop(), Logger::root(Discard, o!()));
        let open = |blocking: &Blocking, path: &Path, how: &How, log: &Logger| {
            if path.ends_with("base.raw") {
                assert!(how.read_only);
                return Ok(Box::new(MemoryStore::new(path, Arc::clone(base))) as Box<dyn Store>);
            }
            store::open(blocking, path, how, log)
        };
        let image = image::open_with(&blocking, &config, None, &open, &log).unwrap();
        assert!(image.stores[1].file().is_none() && image.stores.len() == 2);
        assert_eq!(image.info.size, SIZE);
        let memory = Arc::new(Memory::anonymous(AT_ONCE * BYTES as usize).unwrap());
        let shared = Rc::default();
        let client = Client(Rc::clone(&shared), Arc::clone(&memory));
        let disk = serve::disk(config.into(), image, vec![Box::new(client)], None, &log).unwrap();
        Bench { disk, shared, memory }
    }

    fn ask(&mut self, tag: u64, asked: Asked) {
        self.shared.borrow_mut().to_pull.push_back((tag, asked));
    }

    fn turn(&mut self) -> Vec<(u64, Result<(), Errno>)> {
        if self.disk.turn() == Turn::Nothing {
            std::thread::sleep(Duration::from_micros(50));
        }
        std::mem::take(&mut self.shared.borrow_mut().answered)
    }

    fn data(&self, tag: u64, len: u64) -> Vec<u8> {
        let mut data = vec![0; len as usize];
        self.memory.read(tag as usize * BYTES as usize, &mut data);
        data
    }

    /// Random requests against the model; half-way, the other engine.
    fn load(&mut self, model: &mut Model, first: u64, requests: u64, seed: u64, other: EngineName) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut flights: HashMap<u64, Asked> = HashMap::new();
        let (mut begun, mut ended, mut switched) = (0, 0, false);
        let end = Instant::now() + Duration::from_secs(120);
        while ended < requests {
            while begun < requests && flights.len() < AT_ONCE && random.u32(..8) != 0 {
                let tag = (0..).find(|tag| !flights.contains_key(tag)).unwrap();
                let asked = self.begin(model, &mut random, tag, first + begun);
                flights.insert(tag, asked);
                begun += 1;
            }
            if begun > requests / 2 && !std::mem::replace(&mut switched, true) {
                self.disk.switch(Wanted { name: Some(other), submit: None }).unwrap();
            }
            for (tag, result) in self.turn() {
                let Asked { op, offset, len, begun } = flights.remove(&tag).unwrap();
                assert_eq!(result, Ok(()), "seed {seed}: {op:?} at {offset}");
                match op {
                    Op::Read => {
                        let checked = model.check(begun, offset, &self.data(tag, len));
                        checked.unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
                    }
                    Op::Write { .. } => model.end_write(begun, true, offset, len),
                    _ => {}
                }
                ended += 1;
            }
            if flights.is_empty() {
                model.settle();
            }
            assert!(Instant::now() < end, "seed {seed}: {ended} of {requests}");
        }
        while self.disk.switched().is_none() {
            self.turn();
            assert!(Instant::now() < end, "seed {seed}: the engine stays");
        }
        assert_eq!(self.disk.engine().name, other.name());
    }

    fn begin(&mut self, model: &mut Model, random: &mut fastrand::Rng, tag: u64, number: u64) -> Asked {
        let most = if random.bool() { 8 } else { BYTES / SECTOR };
        let len = random.u64(1..=most) * SECTOR;
        // Many meet in two blocks.
        let space = if random.bool() { SIZE } else { 4 << 20 };
        let offset = random.u64(..=(space - len) / SECTOR) * SECTOR;
        let op = match random.u32(..64) {
            0 => Op::Flush,
            1 => Op::Write { fua: true },
            2..20 => Op::Write { fua: false },
            _ => Op::Read,
        };
        let begun = match op {
            Op::Write { .. } => {
                self.memory.write(tag as usize * BYTES as usize, &pattern(number, len));
                model.begin_write(number, offset, len)
            }
            _ => model.begin(),
        };
        let (offset, len) = if op == Op::Flush { (0, 0) } else { (offset, len) };
        let asked = Asked { op, offset, len, begun };
        self.ask(tag, asked);
        asked
    }

    fn close(mut self) {
        self.disk.drain();
        let end = Instant::now() + Duration::from_secs(60);
        while self.disk.closed().is_none() {
            self.turn();
            assert!(Instant::now() < end, "it does not close");
        }
    }
}

/// An empty child of a raw base, whose file is nothing any more but a name; and the base in memory, whose content the model knows.
fn images(folder: &Path, model: &mut Model) -> (PathBuf, Arc<Ram>) {
    let (base, child) = (folder.join("base.raw"), folder.join("child.vhd"));
    std::fs::write(&base, vec![0xee; SIZE as usize]).unwrap();
    good("snapshot -n {} -p {} -m", &[&child, &base]);
    std::fs::write(&base, b"").unwrap();
    let blocking = Blocking::before_main_loop();
    let ram = Arc::new(Ram::zeroed(&blocking, SIZE).unwrap());
    for number in 0..SIZE >> 16 {
        let (at, len) = (number << 16, 1 << 16);
        // Apart from those of the requests.
        let number = number | 1 << 40;
        ram.write_at(&blocking, at, &pattern(number, len)).unwrap();
        let begun = model.begin_write(number, at, len);
        model.end_write(begun, true, at, len);
    }
    model.settle();
    (child, ram)
}

fn loaded(requests: u64) {
    use EngineName::{Aio, IoUring, Threads};
    for (seed, (name, other)) in (1..).zip([(Aio, IoUring), (IoUring, Threads), (Threads, Aio)]) {
        for submit in ["auto", "thread", "inline"] {
            println!("{} to {}, {submit}", name.name(), other.name());
            let folder = folder();
            let mut model = Model::new(SIZE);
            let (child, base) = images(folder.path(), &mut model);
            let engine = format!("name = '{}'\nsubmit = '{submit}'\n", name.name());
            let mut bench = Bench::open(&child, &base, &engine);
            assert_eq!(bench.disk.engine().name, name.name());
            let files_differ = name != Threads;
            assert_eq!(matches!(bench.disk.engine().inline, Inline::ByFile(_)), files_differ);
            bench.load(&mut model, 1, requests, seed, other);
            bench.close();
            // And what was written is there.
            let mut bench = Bench::open(&child, &base, &engine);
            bench.load(&mut model, 1 << 20, requests, seed + 10, other);
            bench.close();
            good("check -n {} -i", &[&child]);
        }
    }
}

#[test]
fn random_requests_to_a_file_on_memory_agree_with_the_model() {
    loaded(300);
}

#[test]
#[ignore = "slow"]
fn many_random_requests_to_a_file_on_memory_agree_with_the_model() {
    loaded(20_000);
}

#[test]
fn reads_of_the_parent_are_memorys_and_go_on_while_the_file_hangs() {
    let folder = folder();
    let mut model = Model::new(SIZE);
    let (child, base) = images(folder.path(), &mut model);
    // Whatever is on the file is stuck; what is in memory is at other places.
    let engine = "name = 'aio'\n[[fault]]\ntype = 'stuck'\non = ['write', 'flush']\n";
    let mut bench = Bench::open(&child, &base, engine);
    let begun = model.begin_write(7, 0, 4096);
    bench.memory.write(0, &pattern(7, 4096));
    bench.ask(0, Asked { op: Op::Write { fua: false }, offset: 0, len: 4096, begun });
    let submit = Arc::clone(&bench.disk.engine().submit);
    let faults = submit.capability::<Faults>().unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while faults.report().stuck == 0 {
        assert_eq!(bench.turn(), []);
        assert!(Instant::now() < end);
    }
    for at in 1..20 {
        let asked = Asked { op: Op::Read, offset: at << 19, len: 8192, begun: model.begin() };
        bench.ask(1, asked);
        let answered = loop {
            let answered = bench.turn();
            if !answered.is_empty() {
                break answered;
            }
            assert!(Instant::now() < end, "the read waits for the file");
        };
        assert_eq!(answered, [(1, Ok(()))]);
        model.check(asked.begun, asked.offset, &bench.data(1, asked.len)).unwrap();
    }
    assert_eq!(bench.disk.engine_report().submit, SubmitMode::Auto);
    faults.enable(false);
    faults.release();
    while bench.disk.outstanding() > 0 {
        bench.turn();
        assert!(Instant::now() < end, "the write does not end");
    }
    bench.close();
}

/// Disks whose stores misbehave where a log of changed blocks is.
mod logs {
    use std::fs::File;
    use std::io;

    use drivers::changed_blocks::Header;
    use tapdisk::store::{Error, Identity, Means};
    use tapdisk::sys::file::Geometry;
    use zerocopy::IntoBytes;

    use super::*;

    /// A store of which nothing can be made durable.
    #[derive(Debug)]
    struct Failing(Box<dyn Store>);
    impl Store for Failing {
        fn path(&self) -> &Path {
            self.0.path()
        }
        fn identity(&self) -> Identity {
            self.0.identity()
        }
        fn geometry(&self) -> Geometry {
            self.0.geometry()
        }
        fn is_direct(&self) -> bool {
            self.0.is_direct()
        }
        fn file(&self) -> Option<&File> {
            self.0.file()
        }
        fn lock(&mut self, b: &Blocking) -> Result<(), Error> {
            self.0.lock(b)
        }
        fn holds_off(&self) -> &'static str {
            self.0.holds_off()
        }
        fn lock_changes(&self, b: &Blocking, p: Duration) -> Result<(), Errno> {
            self.0.lock_changes(b, p)
        }
        fn unlock_changes(&self, b: &Blocking) -> Result<(), Errno> {
            self.0.unlock_changes(b)
        }
        fn has_other_readers(&self, b: &Blocking) -> Result<bool, Errno> {
            self.0.has_other_readers(b)
        }
        fn size_now(&self, b: &Blocking) -> io::Result<u64> {
            self.0.size_now(b)
        }
        fn read_at(&self, b: &Blocking, at: u64, to: &mut [u8]) -> io::Result<usize> {
            self.0.read_at(b, at, to)
        }
        fn write_at(&self, b: &Blocking, at: u64, from: &[u8]) -> io::Result<()> {
            self.0.write_at(b, at, from)
        }
        fn set_len(&self, b: &Blocking, len: u64) -> io::Result<()> {
            self.0.set_len(b, len)
        }
        fn sync(&self, _: &Blocking, _: bool) -> io::Result<()> {
            Err(Errno::ENOSPC.into())
        }
        fn refresh(&self, b: &Blocking) -> io::Result<()> {
            self.0.refresh(b)
        }
        fn means(&self, b: &Blocking) -> io::Result<Means> {
            self.0.means(b)
        }
    }

    fn log(path: &Path, size: u64) {
        let header = Header::new(size);
        let mut bytes = header.as_bytes().to_vec();
        bytes.resize(header.file_len() as usize, 0);
        std::fs::write(path, bytes).unwrap();
    }

    fn config(kind: &str, image: &Path, log: &Path) -> Config {
        let text = format!(
            "requests = {AT_ONCE}\n[image]\ntype = '{kind}'\npath = '{}'\nchanged_blocks = '{}'\n[memory]\nlock = false\n[engine]\nname = 'threads'\ndepth = 16\n",
            image.display(),
            log.display()
        );
        Config::parse(&text, Path::new("test")).unwrap()
    }

    fn opened(kind: &str, image: &Path, log: &Path, open: &store::Open) -> Result<image::Image, image::Error> {
        let log_of_test = Logger::root(Discard, o!());
        image::open_with(&Blocking::before_main_loop(), &config(kind, image, log), None, open, &log_of_test)
    }

    fn bench(kind: &str, image: &Path, log: &Path, open: &store::Open) -> Bench {
        let opened = opened(kind, image, log, open).unwrap();
        let memory = Arc::new(Memory::anonymous(AT_ONCE * BYTES as usize).unwrap());
        let shared = Rc::default();
        let client = Client(Rc::clone(&shared), Arc::clone(&memory));
        let config = config(kind, image, log);
        let disk =
            serve::disk(config.into(), opened, vec![Box::new(client)], None, &Logger::root(Discard, o!())).unwrap();
        Bench { disk, shared, memory }
    }

    fn write(bench: &mut Bench) {
        let begun = Model::new(SIZE).begin();
        bench.ask(0, Asked { op: Op::Write { fua: false }, offset: 0, len: 4096, begun });
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let answered = bench.turn();
            if !answered.is_empty() {
                assert_eq!(answered, [(0, Ok(()))]);
                return;
            }
            assert!(Instant::now() < end);
        }
    }

    /// The image is left whole all the same, and the error is nobody's flush's.
    #[test]
    fn an_image_is_whole_where_its_log_can_not_be_synced() {
        for fails in [false, true] {
            let folder = folder();
            let (image, cbt) = (folder.path().join("a.vhd"), folder.path().join("log"));
            good("create -n {} -s 12", &[&image]);
            log(&cbt, SIZE);
            let open = |b: &Blocking, path: &Path, how: &How, l: &Logger| {
                let store = store::open(b, path, how, l)?;
                Ok(if fails && path.ends_with("log") { Box::new(Failing(store)) as Box<dyn Store> } else { store })
            };
            let mut bench = bench("vhd", &image, &cbt, &open);
            write(&mut bench);
            bench.disk.drain();
            while bench.disk.closed().is_none() {
                bench.turn();
            }
            assert_eq!(bench.disk.closed(), Some(Ok(())));
            let bytes = std::fs::read(&image).unwrap();
            assert_eq!(&bytes[bytes.len() - 512..][..8], b"conectix", "the image is whole");
        }
    }

    /// Bits in a file that has no name any more are lost.
    #[test]
    fn a_log_that_is_replaced_before_it_is_locked_is_refused() {
        let folder = folder();
        let place = |name: &str| folder.path().join(name);
        let (image, cbt, new) = (place("a.raw"), place("log"), place("log.new"));
        std::fs::write(&image, vec![0; SIZE as usize]).unwrap();
        log(&cbt, SIZE);
        log(&new, SIZE);
        let open = |b: &Blocking, path: &Path, how: &How, l: &Logger| {
            let store = store::open(b, path, how, l)?;
            if path.ends_with("log") {
                std::fs::rename(&new, &cbt).unwrap();
            }
            Ok(store)
        };
        let error = opened("aio", &image, &cbt, &open).err().unwrap();
        assert!(error.to_string().contains("another file has taken its place"), "{error}");
        assert_eq!(error.errno(), Errno::EAGAIN);
    }

    #[test]
    fn a_pause_does_not_fail_for_a_log_that_can_not_be_synced() {
        let folder = folder();
        let (image, cbt) = (folder.path().join("a.raw"), folder.path().join("log"));
        std::fs::write(&image, vec![0; SIZE as usize]).unwrap();
        log(&cbt, SIZE);
        let open = |b: &Blocking, path: &Path, how: &How, l: &Logger| {
            let store = store::open(b, path, how, l)?;
            Ok(if path.ends_with("log") { Box::new(Failing(store)) as Box<dyn Store> } else { store })
        };
        let mut bench = bench("aio", &image, &cbt, &open);
        write(&mut bench);
        bench.disk.pause_for_client().unwrap();
        while bench.disk.pause_outcome().is_none() {
            bench.turn();
        }
        assert_eq!(bench.disk.pause_outcome().map(|paused| paused.is_ok()), Some(true));
        assert!(bench.disk.is_paused());
    }
}
