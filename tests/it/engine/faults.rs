//! What a disk does when its engine misbehaves: the faults that ship with the product, retries, the watchdog, and changing
//! the engine while it is in use.

use std::time::{Duration, Instant};

use crate::common::PATIENCE;
use crate::common::guest::{Guest, page};
use crate::common::live::wait_for;
use crate::common::served::{Served, folder, output, run, tool};
use crate::common::small_fs::SmallFs;
use nix::libc;
use nix::sys::signal::Signal;
use serde_json::Value;
use tapdisk::frontend::blkif::wire::{OP_READ, OP_WRITE};
use tempfile::TempDir;

const LOCAL: &str = "[frontend.local]\nsocket = '{s}/ring'\n";

/// A disk of 16 MiB with such faults, and its folder.
fn disk(rest: &str) -> (Served, TempDir) {
    let folder = folder();
    let image = folder.path().join("disk.img");
    let served =
        Served::start(&format!("path = '{}'\ncreate = '16 MiB'", image.display()), &format!("{LOCAL}{rest}"));
    (served, folder)
}

fn fault(served: &Served, arguments: &[&str]) -> Value {
    serde_json::from_str(&run(served.tap_ctl().args(["fault", "--json"]).args(arguments))).unwrap()
}

/// `ring-load run` with these arguments, to its end: it checks every byte where it is told to.
fn load(served: &Served, arguments: &[&str]) -> String {
    run(tool("ring-load").args(["run", "--socket"]).arg(served.ring()).args(arguments))
}

const VERIFY: [&str; 8] = ["--rw", "randwrite", "--bs", "512-64k", "--depth", "32", "--verify", "--seed=3"];

#[test]
fn errors_hit_what_they_are_to_hit_and_nothing_else() {
    let (served, _folder) =
        disk("[[fault]]\ntype = 'error'\non = ['read']\nfrom = '64 KiB'\nto = '68 KiB'\nerrno = 'EREMOTEIO'\n");
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.write(128, &[7; 4096]), 0, "writes are not concerned");
    assert_eq!(guest.read(128, 4096), Err(-1));
    assert_eq!(guest.read(127, 1024), Err(-1), "its end is concerned");
    assert!(guest.read(0, 4096).is_ok() && guest.read(136, 4096).is_ok(), "what is around it is not");
    served.wait_log("EREMOTEIO");
    assert_eq!(fault(&served, &["--off"])["faults"][0]["hits"], 2);
    assert_eq!(guest.read(128, 4096), Ok(vec![7; 4096]));
    fault(&served, &["--on"]);
    assert_eq!(guest.read(128, 4096), Err(-1));
}

#[test]
fn an_error_in_a_merged_io_hits_one_request() {
    // The merged I/O is hit, and so is, alone, the one request that is concerned.
    let (served, _folder) = disk("[[fault]]\ntype = 'error'\non = ['write']\nfrom = 8192\nto = 8704\n");
    let mut guest = Guest::connect(&served.ring());
    for i in 0..16 {
        let entry = guest.entry(OP_WRITE).with_sector(8 * i).with_segments(1, &[page(i as u32)]);
        guest.queue.ring.push(&entry);
    }
    guest.queue.publish().unwrap();
    let failed: Vec<u64> = (0..16).map(|_| guest.response()).filter(|r| r.status != 0).map(|r| r.id).collect();
    assert_eq!(failed, [4], "the third of ids from 2 on");
    assert!(served.debug_queue()["queue"]["split"].as_u64().unwrap() > 0);
}

#[test]
fn short_ios_are_completed_by_the_queue() {
    let (served, _folder) = disk("[[fault]]\ntype = 'short'\non = ['read', 'write']\nrate = 0.4\n");
    load(&served, &VERIFY);
    let queue = served.debug_queue();
    assert!(queue["queue"]["resubmitted"].as_u64().unwrap() > 100, "{queue}");
    assert_eq!(
        queue["operations"].as_array().unwrap().iter().map(|op| op["errors"].as_u64().unwrap()).sum::<u64>(),
        0
    );
}

#[test]
fn delays_hold_completions_back_and_mix_their_order() {
    let (served, _folder) = disk(
        "[[fault]]\ntype = 'delay'\nus = 2000\ndistribution = 'exponential'\nrate = 0.5\n\
         [[fault]]\ntype = 'delay'\non = ['flush']\nus = 30000\n",
    );
    load(&served, &VERIFY);
    let (served, _folder) = disk("[[fault]]\ntype = 'delay'\nus = 30000\n");
    let mut guest = Guest::connect(&served.ring());
    let begin = Instant::now();
    assert!(guest.read(0, 512).is_ok());
    assert!(begin.elapsed() >= Duration::from_millis(30));
}

#[test]
fn what_is_stuck_is_told_once_and_shown_first_until_it_is_released() {
    let (served, folder) =
        disk("[[fault]]\ntype = 'stuck'\non = ['write']\nfrom = '1 MiB'\nto = '2 MiB'\n[watchdog]\nstuck_s = 1\n");
    let mut guest = Guest::connect(&served.ring());
    guest.queue.memory().write(guest.queue.page_at(0), &[0x42; 4096]);
    let stuck = guest.entry(OP_WRITE).with_sector(2056).with_segments(1, &[page(0)]);
    guest.queue.ring.push(&stuck);
    guest.queue.publish().unwrap();
    served.wait_log("request is stuck");
    // Others go on, and the newest is not the first that is shown.
    assert_eq!(guest.write(0, &[1; 512]), 0);
    let queue = served.debug_queue();
    let first = &queue["requests"][0];
    assert_eq!(
        (&queue["stuck"], &first["stuck"], &first["op"]),
        (&1.into(), &true.into(), &"write".into()),
        "{queue}"
    );
    let tiocb = &first["tiocbs"][0];
    let path = folder.path().join("disk.img").display().to_string();
    assert_eq!((&tiocb["layer"], &tiocb["path"], &tiocb["offset"]), (&0.into(), &path.into(), &(2056 * 512).into()));
    assert!(run(served.tap_ctl().arg("debug-queue")).contains("STUCK"));
    std::thread::sleep(Duration::from_millis(1500));
    let log = served.log();
    let told: Vec<_> = log.lines().filter(|line| line.contains("request is stuck")).collect();
    assert_eq!(told.len(), 1, "{log}");
    for expected in ["op: write", "layer: 0", "disk.img", "offset: 1052672", "len: 4096", "age_s: "] {
        assert!(told[0].contains(expected), "{expected} in {}", told[0]);
    }
    let faults = fault(&served, &["--release"]);
    assert_eq!((&faults["stuck"], &faults["faults"][0]["hits"]), (&0.into(), &1.into()));
    assert_eq!(guest.response().status, 0);
    served.wait_log("stuck request is answered");
    // It was done, only its completion was held back.
    assert_eq!(guest.read(2056, 4096), Ok(vec![0x42; 4096]));
    assert_eq!(served.stop().0, Some(0));
}

#[test]
fn a_submission_that_waits_for_a_completion_does_not_hold_the_thread_mode_up() {
    let (served, _folder) = disk("[engine]\nsubmit = 'thread'\n[[fault]]\ntype = 'block'\nin_flight = 2\n");
    load(&served, &VERIFY);
    let (served, _folder) = disk("[engine]\nsubmit = 'inline'\n[[fault]]\ntype = 'block'\nin_flight = 2\n");
    let mut guest = Guest::connect(&served.ring());
    for i in 0..8 {
        let entry = guest.entry(OP_READ).with_sector(64 * i).with_segments(1, &[page(i as u32)]);
        guest.queue.ring.push(&entry);
    }
    guest.queue.publish().unwrap();
    let answered = std::iter::from_fn(|| guest.try_response(Duration::from_secs(2))).count();
    assert!(answered < 8, "inline submission would have deadlocked");
}

#[test]
fn transient_errors_are_tried_again_and_reported_when_they_stay() {
    let (served, _folder) = disk("[[fault]]\ntype = 'error'\nerrno = 'EBUSY'\nrate = 0.3\non = ['read', 'write']\n");
    load(&served, &VERIFY);
    let queue = served.debug_queue();
    assert!(queue["queue"]["retried"].as_u64().unwrap() > 50, "{queue}");
    served.wait_log("I/O failed and is tried again");
    let (served, _folder) = disk("[retry]\nlimit_s = 1\n[[fault]]\ntype = 'error'\nerrno = 'EAGAIN'\n");
    let mut guest = Guest::connect(&served.ring());
    let begin = Instant::now();
    assert_eq!(guest.read(0, 512), Err(-1));
    assert!(begin.elapsed() >= Duration::from_secs(1));
    let (served, _folder) = disk("[retry]\nlimit_s = 0\n[[fault]]\ntype = 'error'\nerrno = 'EBUSY'\n");
    assert_eq!(Guest::connect(&served.ring()).read(0, 512), Err(-1));
    assert_eq!(served.debug_queue()["queue"]["retried"], 0);
}

#[test]
fn writes_without_space_are_held_until_there_is_some() {
    let Some(fs) = SmallFs::new("8m") else { return };
    let image = fs.path("disk.img");
    let rest = format!("{LOCAL}[retry]\nno_space = 'hold'\n");
    let mut served = Served::start(&format!("path = '{}'\ncreate = '4 MiB'", image.display()), &rest);
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.write(0, &[1; 32768]), 0);
    let filler = fs.fill("filler");
    let held = |guest: &mut Guest| {
        let entry = guest.entry(OP_WRITE).with_sector(4096).with_segments(1, &[page(0)]);
        guest.queue.ring.push(&entry);
        guest.queue.publish().unwrap();
        assert!(guest.try_response(Duration::from_millis(500)).is_none(), "it has space after all");
    };
    held(&mut guest);
    served.wait_log("no space for writes");
    // It is tried again now and then.
    let queue = wait_for(|| {
        let queue = served.debug_queue();
        assert_eq!(queue["queue"]["without_space"], 1, "{queue}");
        let held = queue["requests"][0]["tiocbs"][0]["held_by"].as_str().unwrap().contains("ENOSPC");
        held.then_some(queue)
    });
    assert!(guest.read(0, 512).is_ok(), "reads go on");
    assert!(queue["queue"]["retried"].as_u64() > Some(3), "{queue}");
    assert_eq!(
        served.log().matches("no space for writes").count(),
        1,
        "a retry in vain is no news: {}",
        served.log()
    );
    std::fs::remove_file(&filler).unwrap();
    assert_eq!(guest.response().status, 0);
    served.wait_log("there is space again");
    // A drain waits for them; a second signal does not.
    fs.fill("filler");
    let entry = guest.entry(OP_WRITE).with_sector(6144).with_segments(1, &[page(0)]);
    guest.queue.ring.push(&entry);
    guest.queue.publish().unwrap();
    wait_for(|| (served.debug_queue()["queue"]["without_space"] == 1).then_some(()));
    served.signal(Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(300));
    assert!(served.alive(), "{}", served.log());
    assert_eq!(served.stop().0, Some(0));
    assert_eq!(guest.response().status, -1);
}

/// What `tap-ctl engine` prints, or its exit code and words.
fn engine(served: &Served, arguments: &[&str]) -> Result<Value, (i32, String)> {
    let output = output(served.tap_ctl().args(["engine", "--json"]).args(arguments));
    if output.status.success() {
        Ok(serde_json::from_slice(&output.stdout).unwrap())
    } else {
        Err((output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap()))
    }
}

#[test]
fn engines_are_changed_under_load() {
    let (served, _folder) = disk("");
    assert_eq!(engine(&served, &[]).unwrap()["name"], "aio");
    let mut command = tool("ring-load");
    command.args(["run", "--socket"]).arg(served.ring()).args(VERIFY).args(["--runtime", "4s"]);
    let mut load = command.stdout(std::process::Stdio::null()).spawn().unwrap();
    let mut changes = 0;
    while load.try_wait().unwrap().is_none() {
        let name = ["aio", "threads", "io_uring"][changes % 3];
        let submit = ["thread", "auto", "inline", "auto"][changes % 4];
        let report = engine(&served, &["--name", name, "--submit", submit]).unwrap();
        assert_eq!((&report["name"], &report["submit"]), (&name.into(), &submit.into()));
        changes += 1;
    }
    assert!(load.wait().unwrap().success() && changes >= 6, "{changes} changes");
    assert_eq!(engine(&served, &["--name", "auto"]).unwrap()["name"], "aio");
}

#[test]
fn an_engine_is_kept_where_it_cannot_be_changed() {
    let (served, _folder) = disk("[[fault]]\ntype = 'stuck'\non = ['read']\n");
    let mut guest = Guest::connect(&served.ring());
    let entry = guest.entry(OP_READ).with_sector(0).with_segments(1, &[page(0)]);
    guest.queue.ring.push(&entry);
    guest.queue.publish().unwrap();
    let (code, text) = engine(&served, &["--name", "threads"]).unwrap_err();
    assert_eq!(code, libc::ETIMEDOUT, "{text}");
    assert!(text.contains("did not finish"), "{text}");
    assert_eq!(engine(&served, &[]).unwrap()["name"], "aio");
    assert_eq!(guest.write(0, &[1; 512]), 0, "requests go on");
    fault(&served, &["--release"]);
    assert_eq!(guest.response().status, 0);
    let report = engine(&served, &["--submit", "thread"]).unwrap();
    assert_eq!(report["name"], "aio", "what was asked for in vain is forgotten");
    let (code, text) = engine(&served, &["--name", "floppy"]).unwrap_err();
    assert!(code == libc::EINVAL && text.contains("io_uring"), "{text}");
    let ram = Served::start("type = 'ram'\nsize = '1 MiB'", LOCAL);
    let (code, text) = engine(&ram, &["--submit", "thread"]).unwrap_err();
    assert!(code == libc::EOPNOTSUPP && text.contains("in memory"), "{text}");
    let refused = output(ram.tap_ctl().args(["fault", "--off"]));
    let text = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.status.code() == Some(libc::EOPNOTSUPP) && text.contains("[[fault]]"), "{text}");
}

#[test]
fn threads_are_set_while_the_pool_works() {
    let (served, _folder) = disk("[engine]\nname = 'threads'\nthreads_max = 8\nthreads_idle_s = 1\n");
    let pool = |arguments: &[&str]| engine(&served, arguments).map(|report| report["pool"].clone());
    assert_eq!(pool(&[]).unwrap()["threads"], 1);
    load(&served, &["--rw", "randread", "--depth", "16", "--runtime", "1s"]);
    let most = pool(&[]).unwrap()["created"].as_u64().unwrap();
    assert!((2..=20).contains(&most), "{most} threads were made for 16 requests at a time");
    let set = pool(&["--threads-min", "6", "--threads-max", "6"]).unwrap();
    assert_eq!((&set["min"], &set["max"]), (&6.into(), &6.into()));
    let end = Instant::now() + PATIENCE;
    while pool(&[]).unwrap()["threads"] != 6 {
        assert!(Instant::now() < end, "{:?}", pool(&[]));
    }
    pool(&["--threads-min", "1"]).unwrap();
    while pool(&[]).unwrap()["threads"] != 1 {
        assert!(Instant::now() < end, "idle threads do not end: {:?}", pool(&[]));
    }
    let (code, text) = pool(&["--threads-min", "0"]).unwrap_err();
    assert!(code == libc::EINVAL && text.contains("at least one"), "{text}");
    let (code, text) = pool(&["--threads-max", "5000"]).unwrap_err();
    assert!(code == libc::EINVAL && text.contains("1024"), "{text}");
    load(&served, &VERIFY);
}

#[test]
fn the_budget_is_what_a_disk_takes() {
    let budget = |requests: u32| {
        let top = format!("requests = {requests}");
        let rest = format!("{LOCAL}[engine]\ndepth = {requests}\n[frontend.nbd]\nsocket = '{{s}}/nbd'\n");
        let served = Served::start_with(&top, "type = 'ram'\nsize = '1 MiB'", &rest);
        let stats: Value = serde_json::from_str(&run(served.tap_ctl().arg("stats"))).unwrap();
        served.wait_log("fixed: ");
        let memory = &stats["memory"];
        let clients = memory["parts"].as_array().unwrap().iter().filter(|part| part["most"] != 0).count();
        assert_eq!(clients, 2, "{memory}");
        ["fixed", "resident", "locked"].map(|key| memory[key].as_u64().unwrap() as f64)
    };
    let ([small, small_resident, locked], [large, large_resident, _]) = (budget(256), budget(8192));
    if locked == 0.0 {
        return eprintln!("SKIPPED: memory cannot be locked here, and what is not touched is not resident");
    }
    let (computed, taken) = (large - small, large_resident - small_resident);
    assert!((0.85..1.15).contains(&(computed / taken)), "computed {computed}, taken {taken} bytes");
}
