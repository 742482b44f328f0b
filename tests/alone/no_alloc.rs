//! Nothing is allocated on the data path: with two mixed loads running, one through the ring and one through NBD, a
//! counting allocator sees nothing from any thread of the server.

use std::alloc::System;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::alone;
use crate::common::PATIENCE;
use crate::common::served::{folder, tool};
use crate::common::vhd_made as vhd;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tapdisk::blocking::Blocking;
use tapdisk::config::Config;
use tapdisk::log::Log;
use tapdisk::{control, event, serve};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn quiet(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

#[test]
fn none_between_warm_up_and_the_end_of_a_mixed_load() {
    let _alone = alone();
    event::signals().thread_block().unwrap();
    // A pool that grows makes threads; one whose minimum is its maximum has all that it will have.
    for engine in ["name = 'aio'", "name = 'io_uring'", "name = 'threads'\nthreads_min = 8\nthreads_max = 8"] {
        println!("{engine}");
        let folder = folder();
        none_with(&format!("path = '{}'\ncreate = '64 MiB'", folder.path().join("disk.img").display()), engine);
    }
    // So large that blocks are added all the time, and with room for few bitmaps.
    for kind in ["dynamic", "differencing"] {
        println!("{kind}");
        let folder = folder();
        let (base, leaf) = (folder.path().join("base.vhd"), folder.path().join("leaf.vhd"));
        vhd::create(&base, "dynamic", 64 << 10);
        vhd::snapshot(&leaf, 2, &base);
        let path = if kind == "dynamic" { base } else { leaf };
        none_with(&format!("{}\nbitmap_cache = '128 KiB'", vhd::table(&path)), "");
    }
}

/// Waits until a client of the ring and one of NBD have had a few hundred requests answered: machines can be slow.
fn wait_until_loaded(sockets: &Path) {
    let end = Instant::now() + PATIENCE;
    let pid = std::process::id() as i32;
    let loaded = || {
        let text = control::client::text_of(sockets, pid, 0, control::proto::kind::DEBUG_QUEUE).unwrap();
        let queue: serde_json::Value = serde_json::from_str(&text).unwrap();
        let clients = |index: usize| queue["frontends"][index]["clients"].as_array().unwrap().clone();
        let nbd = clients(1).iter().any(|client| client["requests"].as_u64() > Some(300));
        let completed: u64 =
            queue["operations"].as_array().unwrap().iter().map(|op| op["completed"].as_u64().unwrap()).sum();
        !clients(0).is_empty() && nbd && completed > 1000
    };
    while !loaded() {
        assert!(Instant::now() < end, "the loads do not run");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn none_with(image: &str, engine: &str) {
    let sockets = tempfile::tempdir().unwrap();
    let s = sockets.path();
    let text = format!(
        "[image]\n{image}\n[control]\ndirectory = '{s}'\n[frontend.local]\nsocket = '{s}/ring'\n\
         [frontend.nbd]\nsocket = '{s}/nbd'\n[engine]\n{engine}\n",
        s = s.display()
    );
    let config = Config::parse(&text, Path::new("test")).unwrap();
    let (logging, log) =
        Log::open(&Blocking::before_main_loop(), config.log.format, slog::Level::Error, tapdisk::log::Sink::Stderr)
            .unwrap();
    let (ready, serving) = std::sync::mpsc::channel();
    let server = std::thread::spawn(move || {
        let blocking = Blocking::before_main_loop();
        let main_loop = serve::open(&blocking, &config, logging, &log).unwrap();
        ready.send(()).unwrap();
        main_loop.run(blocking).unwrap();
    });
    serving.recv().unwrap();
    let mut ring = quiet(
        tool("ring-load")
            .args(["run", "--rw", "randrw", "--bs", "512-256k", "--depth", "32", "--queues", "2", "--runtime", "6s"])
            .args(["--fsync", "100", "--ring-page-order", "2", "--socket"])
            .arg(s.join("ring")),
    );
    let mut nbd = quiet(
        Command::new("fio")
            .args(["--name=load", "--ioengine=nbd", "--rw=randrw", "--bsrange=512-512k"])
            .args(["--blockalign=512", "--iodepth=32", "--runtime=6", "--time_based", "--fsync=100", "--size=64m"])
            .arg(format!("--uri=nbd+unix:///?socket={}/nbd", s.display())),
    );
    // Connections are set up, and every buffer has been used.
    wait_until_loaded(s);
    std::thread::sleep(Duration::from_millis(500));
    assert!(ring.try_wait().unwrap().is_none() && nbd.try_wait().unwrap().is_none(), "the loads do not run");
    let probe = Region::new(ALLOCATOR);
    drop(std::hint::black_box(vec![0u8; 100]));
    assert!(probe.change().allocations > 0, "the allocator does not count");
    let region = Region::new(ALLOCATOR);
    std::thread::sleep(Duration::from_millis(1500));
    let change = region.change();
    assert!(ring.try_wait().unwrap().is_none() && nbd.try_wait().unwrap().is_none(), "the loads ended early");
    assert!(ring.wait().unwrap().success() && nbd.wait().unwrap().success());
    // The control socket allocates; it is no part of the data path.
    control::client::exit(s, std::process::id() as i32).unwrap();
    server.join().unwrap();
    assert_eq!((change.allocations, change.reallocations, change.deallocations), (0, 0, 0), "{change:?}");
}
