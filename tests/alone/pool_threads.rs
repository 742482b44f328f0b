//! Whose CPUs and priority the pool's threads have, and what happens where the system has no more threads. These look at
//! all of their process, so nothing else is tested in it.

use std::collections::VecDeque;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::alone;
use crate::common::PATIENCE;
use crate::common::served::{folder, output, run};
use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::unistd::gettid;
use tapdisk::blocking::{Blocking, Caller};
use tapdisk::engine::pool::{self, Pool, Threads};
use tapdisk::engine::{Engine, Setup};
use tapdisk::stats::now;
use tapdisk::sys::file::Backing;
use tapdisk::sys::io::{FileId, Io, IoOp};
use tapdisk::sys::memory::Memory;

fn open(path: &Path, min: usize, max: usize) -> Engine {
    std::fs::write(path, vec![0x5a; 1 << 20]).unwrap();
    let files: Arc<[Backing]> =
        Arc::new([Backing { file: std::fs::File::open(path).unwrap(), direct: false, block_device: false }]);
    let threads = Threads { min, max, idle: Duration::from_secs(600) };
    pool::open(&Blocking::before_main_loop(), &Setup { threads, ..Setup::new(files, 64).unwrap() }).unwrap()
}

fn reads(count: u32) -> VecDeque<Box<Io>> {
    let memory = Arc::new(Memory::anonymous(4096).unwrap());
    let read = |tag| {
        let mut io = Io::new(tag, 1);
        io.begin(IoOp::Read, FileId(0), 0);
        io.push(&memory, 0, 4096);
        io
    };
    (0..count).map(read).collect()
}

/// CPUs and nice value of each of this process's threads with that name (proc(5)).
fn threads(name: &str) -> Vec<(String, i32)> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let read = |path: &Path, file| std::fs::read_to_string(path.join(file)).unwrap();
    let ours = tasks.filter(|task| read(task, "comm").trim() == name);
    ours.map(|task| {
        let status = read(&task, "status");
        let cpus = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
        let stat = read(&task, "stat");
        let nice = stat.rsplit(')').next().unwrap().split_whitespace().nth(16).unwrap();
        (cpus.trim().to_owned(), nice.parse().unwrap())
    })
    .collect()
}

/// Gives the calling thread one CPU and a nice value.
fn become_one(cpu: &str, nice: i32) {
    let tid = gettid().to_string();
    run(Command::new("taskset").args(["--cpu-list", "--pid", cpu, &tid]));
    run(Command::new("renice").args(["-n", &nice.to_string(), "-p", &tid]));
}

/// The first and the last CPU that we may use; the same one where there is only one.
fn cpus() -> [String; 2] {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let list = text.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned();
    let numbers = || list.split([',', '-']).map(str::to_owned);
    [numbers().next().unwrap(), numbers().next_back().unwrap()]
}

#[test]
fn threads_are_the_loops_and_never_the_requesters() {
    let _alone = alone();
    let folder = folder();
    let [first, last] = cpus();
    become_one(&first, 3);
    let mut engine = open(&folder.path().join("disk.img"), 1, 8);
    let submit = Arc::clone(&engine.submit);
    let theirs = last.clone();
    let requester = std::thread::Builder::new().name("requester".into());
    let requester = requester.spawn(move || {
        become_one(&theirs, 7);
        for _ in 0..200 {
            let mut batch = reads(32);
            assert_eq!(submit.submit(&mut batch, usize::MAX, Caller::MainLoop), Ok(32));
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(threads("requester"), [(theirs, 7)]);
    });
    let requester = requester.unwrap();
    let mut count = 0;
    let end = Instant::now() + PATIENCE;
    while count < 200 * 32 {
        count += engine.reap.reap(&mut |_, result| assert_eq!(result, Ok(4096)));
        assert!(Instant::now() < end, "{count}");
    }
    requester.join().unwrap();
    // The last one that was made may not have its name yet.
    let report = || engine.submit.capability::<Pool>().unwrap().report();
    while report().idle < report().threads {
        assert!(Instant::now() < end, "{:?}", report());
    }
    let report = report();
    assert!(report.created > 1, "one thread was enough: {report:?}");
    let seen = threads("pool");
    assert_eq!(seen.len(), report.threads);
    assert!(seen.iter().all(|thread| *thread == (first.clone(), 3)), "{seen:?}");
}

#[test]
fn a_thread_that_the_system_does_not_have_is_tried_again_later() {
    let _alone = alone();
    let name = "pool_threads::in_own_process::with_no_more_address_space";
    let mut child = Command::new(std::env::current_exe().unwrap());
    // As tapdisk has it: another arena takes address space at a time that nobody knows.
    child.env("MALLOC_ARENA_MAX", "1");
    let output = output(child.args(["--exact", name, "--ignored"]));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// What a test before it runs, with an environment of its own.
mod in_own_process {
    use super::*;

    /// Bytes of this process's address space.
    fn space() -> u64 {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        text.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 4096
    }

    #[test]
    #[ignore = "a_thread_that_the_system_does_not_have_is_tried_again_later runs it"]
    fn with_no_more_address_space() {
        let folder = folder();
        let mut engine = open(&folder.path().join("disk.img"), 1, 8);
        let submit = Arc::clone(&engine.submit);
        let pool = submit.capability::<Pool>().unwrap();
        let mut batch = reads(64);
        // What threads need of the heap is there, between what is in use: only their stacks are to find no room.
        let mut blocks: Vec<_> = (0..17).map(|_| vec![1_u8; 65536]).collect();
        let last = blocks.pop();
        drop(blocks);
        setrlimit(Resource::RLIMIT_AS, space() + 65536, RLIM_INFINITY).unwrap();
        let begin = now();
        pool.set(4, 8).unwrap();
        assert_eq!(submit.submit(&mut batch, usize::MAX, Caller::MainLoop), Ok(64));
        let mut count = 0;
        let end = Instant::now() + PATIENCE;
        while count < 64 || pool.report().failed < 5 {
            count += engine.reap.reap(&mut |_, result| assert_eq!(result, Ok(4096)));
            assert!(Instant::now() < end, "{count}, {:?}", pool.report());
            std::thread::sleep(Duration::from_millis(1));
        }
        let report = pool.report();
        assert_eq!((report.threads, report.created), (1, 1), "{report:?}");
        assert!(report.failed <= 1 + (now() - begin) / pool::RETRY.as_nanos() as u64, "no busy loop: {report:?}");
        setrlimit(Resource::RLIMIT_AS, RLIM_INFINITY, RLIM_INFINITY).unwrap();
        drop(last);
        while pool.report().threads < 4 {
            assert_eq!(engine.reap.reap(&mut |_, _: Result<u64, Errno>| {}), 0);
            assert!(Instant::now() < end, "{:?}", pool.report());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
