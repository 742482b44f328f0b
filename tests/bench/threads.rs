//! What making threads costs the requests that come meanwhile: our pool beside one whose requester makes the threads, as
//! the obvious implementation does. `tests/bench/threads` builds and runs it.
//!
//! Each round has a new pool with one thread, which is to have 64. A main loop reads 4 KiB at random places, with so many
//! in flight at a time; each read is timed from when it could be submitted until the main loop has it back.

use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use nix::sys::mman::{MlockAllFlags, mlockall};
use tapdisk::blocking::{Blocking, Caller};
use tapdisk::engine::pool::{self, Pool, Threads};
use tapdisk::engine::{Engine, Setup};
use tapdisk::submit::STACK_SIZE;
use tapdisk::sys::file::Backing;
use tapdisk::sys::io::{FileId, Io, IoOp};
use tapdisk::sys::memory::Memory;

const THREADS: usize = 64;
const READS: usize = 256;
const BLOCK: u64 = 4096;
const SIZE: u64 = 64 << 20;

type Finished = (Box<Io>, Result<u64, Errno>);

/// A pool as the driver sees it.
trait Target {
    fn submit(&self, io: Box<Io>);
    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>));
}

impl Target for Engine {
    fn submit(&self, io: Box<Io>) {
        let mut batch = VecDeque::from([io]);
        assert_eq!(self.submit.submit(&mut batch, 1, Caller::MainLoop), Ok(1));
    }

    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) {
        self.reap.reap(done);
    }
}

#[derive(Default)]
struct State {
    todo: VecDeque<Box<Io>>,
    finished: VecDeque<Finished>,
    threads: Vec<JoinHandle<()>>,
    idle: usize,
    stop: bool,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    files: Arc<[Backing]>,
    event: Arc<EventFd>,
}

/// The plain one: where a thread is wanted, the requester makes it, and then enqueues.
struct Plain {
    shared: Arc<Shared>,
    /// Whether a thread is wanted for each request as long as there are too few, and not only where none is idle.
    always: bool,
}

impl Plain {
    fn new(files: &Arc<[Backing]>, always: bool, event: &Arc<EventFd>) -> Plain {
        let (files, event) = (Arc::clone(files), Arc::clone(event));
        let plain = Plain {
            shared: Arc::new(Shared { state: Mutex::default(), wake: Condvar::new(), files, event }),
            always,
        };
        plain.spawn();
        plain
    }

    fn spawn(&self) {
        let shared = Arc::clone(&self.shared);
        let builder = std::thread::Builder::new().stack_size(STACK_SIZE);
        let thread = builder.spawn(move || shared.run()).expect("a thread");
        self.shared.state.lock().unwrap().threads.push(thread);
    }
}

impl Shared {
    fn run(&self) {
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some(io) = state.todo.pop_front() {
                drop(state);
                let result = self.files[0].carry_out(&io);
                state = self.state.lock().unwrap();
                let first = state.finished.is_empty();
                state.finished.push_back((io, result));
                if first {
                    self.event.write(1).unwrap();
                }
            } else if state.stop {
                return;
            } else {
                state.idle += 1;
                state = self.wake.wait(state).unwrap();
                state.idle -= 1;
            }
        }
    }
}

impl Target for Plain {
    fn submit(&self, io: Box<Io>) {
        let state = self.shared.state.lock().unwrap();
        let wanted = state.threads.len() < THREADS && (self.always || state.idle <= state.todo.len());
        drop(state);
        if wanted {
            self.spawn();
        }
        self.shared.state.lock().unwrap().todo.push_back(io);
        self.shared.wake.notify_one();
    }

    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) {
        let finished = std::mem::take(&mut self.shared.state.lock().unwrap().finished);
        finished.into_iter().for_each(|(io, result)| done(io, result));
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        self.shared.state.lock().unwrap().stop = true;
        self.shared.wake.notify_all();
        let threads = std::mem::take(&mut self.shared.state.lock().unwrap().threads);
        threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    }
}

/// Times in ns.
#[derive(Default)]
struct Times {
    submit: Vec<u64>,
    whole: Vec<u64>,
}

impl Times {
    /// [`READS`] reads, `depth` at a time.
    fn drive(&mut self, target: &mut dyn Target, depth: usize, memory: &Arc<Memory>, event: &EventFd) {
        let mut random = 0x9e37_79b9u64;
        let mut idle: Vec<_> = (0..depth as u32).map(|tag| Io::new(tag, 1)).collect();
        let mut begun = vec![Instant::now(); depth];
        let (mut submitted, mut done) = (0, 0);
        while done < READS {
            // All of these come now; that one waits for another's submission is part of its time.
            let arrived = Instant::now();
            while submitted < READS
                && let Some(mut io) = idle.pop()
            {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                io.begin(IoOp::Read, FileId(0), (random >> 33) % (SIZE / BLOCK) * BLOCK);
                io.push(memory, io.tag as usize * BLOCK as usize, BLOCK as usize);
                begun[io.tag as usize] = arrived;
                let begin = Instant::now();
                target.submit(io);
                self.submit.push(begin.elapsed().as_nanos() as u64);
                submitted += 1;
            }
            let before = done;
            target.reap(&mut |io, result| {
                assert_eq!(result, Ok(BLOCK));
                self.whole.push(begun[io.tag as usize].elapsed().as_nanos() as u64);
                idle.push(io);
                done += 1;
            });
            if done == before {
                event.read().expect("it waits");
            }
        }
    }
}

/// p50, p99 and the longest, µs.
fn figures(times: &mut [u64]) -> [f64; 3] {
    times.sort_unstable();
    [times.len() / 2, times.len() * 99 / 100, times.len() - 1].map(|at| times[at] as f64 / 1000.0)
}

fn row(what: &str, ours: [f64; 3], theirs: [f64; 3]) {
    let text = |values: [f64; 3]| values.map(|value| format!("{value:9.1}")).concat();
    let ratios: [f64; 3] = std::array::from_fn(|i| theirs[i] / ours[i]);
    println!("{what:44}{} |{} |{}", text(ours), text(theirs), ratios.map(|ratio| format!("{ratio:7.1}")).concat());
}

/// A file of that size with nothing that the disk could leave out.
fn file(path: &Path, direct: bool) -> io::Result<Arc<[Backing]>> {
    if !path.exists() {
        let mut bytes = vec![0u8; SIZE as usize];
        bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = ((i * 31) >> 7) as u8);
        std::fs::write(path, bytes)?;
        std::fs::File::open(path)?.sync_all()?;
    }
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !direct {
        io::copy(&mut &file, &mut io::sink())?;
    }
    Ok(Arc::new([Backing { file, direct, block_device: false }]))
}

/// Both pools in turn, with `depth` reads in flight. With `all`, all threads are wanted at once, whatever the load.
fn compare(what: &str, files: &Arc<[Backing]>, depth: usize, all: bool, rounds: usize) -> io::Result<()> {
    let memory = Arc::new(Memory::anonymous(depth * BLOCK as usize)?);
    let (mut ours, mut theirs) = (Times::default(), Times::default());
    let mut made = 0;
    for _ in 0..rounds {
        let event = Arc::new(EventFd::new()?);
        let threads = Threads { min: 1, max: THREADS, idle: Duration::from_secs(60) };
        let setup = Setup { threads, event: Arc::clone(&event), ..Setup::new(Arc::clone(files), depth)? };
        let mut engine = pool::open(&Blocking::before_main_loop(), &setup)?;
        let submit = Arc::clone(&engine.submit);
        let pool = submit.capability::<Pool>().expect("it is one");
        if all {
            pool.set(THREADS, THREADS).map_err(io::Error::other)?;
        }
        ours.drive(&mut engine, depth, &memory, &event);
        made += pool.report().created;
        drop((engine, submit));
        let event = Arc::new(EventFd::new()?);
        theirs.drive(&mut Plain::new(files, all, &event), depth, &memory, &event);
    }
    println!("{what}, {} threads were made", made / rounds as u64);
    row("  the requester's time in submit", figures(&mut ours.submit), figures(&mut theirs.submit));
    row("  the whole read", figures(&mut ours.whole), figures(&mut theirs.whole));
    Ok(())
}

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().expect("the name of a file of 64 MiB, which is made where it is not there");
    let rounds = arguments.next().map_or(50, |number| number.parse().expect("a number of rounds"));
    // As tapdisk has it: a new stack is memory at once.
    match mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE) {
        Ok(()) => println!("memory is locked, as tapdisk's is"),
        Err(errno) => println!("memory is not locked ({errno}): threads are made sooner than in tapdisk"),
    }
    println!(
        "{rounds} rounds, {READS} reads of {BLOCK} bytes each; times in us; ratio: the requester makes them / our pool"
    );
    println!("{:44}{:>27} |{:>27} |{:>21}", "", "our pool: p50, p99, max", "the requester makes them", "ratios");
    for (name, direct) in [("O_DIRECT", true), ("cached in RAM", false)] {
        let files = file(path.as_ref(), direct)?;
        compare(&format!("{name}, 8 in flight while 64 are made"), &files, 8, true, rounds)?;
        compare(&format!("{name}, 64 in flight, as many as they need"), &files, 64, false, rounds)?;
    }
    Ok(())
}
