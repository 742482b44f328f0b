//! Disks that are paused, resumed and get other images while clients use them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::common::PATIENCE;
use crate::common::guest::{Guest, page};
use crate::common::live::*;
use crate::common::served::{Served, folder, run, tool};
use crate::common::small_fs::SmallFs;
use crate::common::vhd::good;
use crate::common::vhd_made::{stop, table};
use nix::libc;
use nix::sys::signal::Signal;
use tapdisk::client::Wake;
use tapdisk::control::proto::kind;
use tapdisk::frontend::blkif::wire::{OP_FLUSH_DISKCACHE, OP_WRITE};
use tempfile::TempDir;

/// An empty VHD image of 64 MiB that is served, and its folder.
fn vhd(rest: &str) -> (Served, PathBuf, TempDir) {
    let folder = folder();
    let path = folder.path().join("disk.vhd");
    good("create -n {} -s 64", &[&path]);
    (Served::start(&table(&path), &format!("{BOTH}{rest}")), path, folder)
}

/// The same in a raw image.
fn raw(keys: &str, rest: &str) -> (Served, PathBuf, TempDir) {
    let folder = folder();
    let path = folder.path().join("disk.img");
    let image = format!("path = '{}'\ncreate = '64 MiB'\n{keys}", path.display());
    (Served::start(&image, &format!("{BOTH}{rest}")), path, folder)
}

/// Sends a write of that byte to the beginning, and does not wait for it.
fn send(guest: &mut Guest, byte: u8) {
    guest.queue.memory().write(guest.queue.page_at(0), &[byte; 4096]);
    let entry = guest.entry(OP_WRITE).with_sector(0).with_segments(1, &[page(0)]);
    guest.queue.ring.push(&entry);
    guest.queue.publish().unwrap();
}

fn unanswered(guest: &mut Guest) {
    assert!(guest.try_response(Duration::from_millis(200)).is_none(), "it is answered");
}

#[test]
fn clients_under_load_see_nothing_of_a_pause() {
    for (kind, engine) in [("vhd", "io_uring"), ("vhd", "threads"), ("aio", "aio")] {
        let rest = format!("[engine]\nname = '{engine}'\n");
        let (served, path, folder) = if kind == "vhd" { vhd(&rest) } else { raw("", &rest) };
        keep(&served);
        let load = Load::start(&served);
        for _ in 0..5 {
            pause(&served);
            assert_eq!((open_files(&served, folder.path()), locked(&path)), (Vec::new(), false), "{kind}, {engine}");
            let queue = served.debug_queue();
            assert!(queue["slots_used"] == 0 && queue["queue"]["in_flight"] == 0, "{queue}");
            // Anybody can have it meanwhile.
            std::fs::rename(&path, folder.path().join("elsewhere")).unwrap();
            std::fs::rename(folder.path().join("elsewhere"), &path).unwrap();
            unpause(&served);
            assert!(locked(&path) && !open_files(&served, folder.path()).is_empty());
            std::thread::sleep(Duration::from_millis(100));
        }
        load.finish();
        kept(&served);
        if kind == "vhd" {
            stop(served, &path);
        } else {
            assert_eq!(served.stop().0, Some(0));
        }
    }
}

#[test]
fn what_is_sent_during_a_pause_is_answered_after_it() {
    let (served, _path, _folder) = vhd("");
    let mut guest = Guest::connect(&served.ring());
    refused(&served, &["unpause"], libc::EINVAL, "disk.vhd: it is not paused");
    pause(&served);
    pause(&served);
    send(&mut guest, 1);
    unanswered(&mut guest);
    // Who comes now is let in, and waits.
    let socket = served.ring();
    let late = std::thread::spawn(move || Guest::connect(&socket).read(4096, 512));
    let uri = served.nbd();
    let nbd = std::thread::spawn(move || run(Command::new("nbdinfo").arg("--size").arg(uri)));
    pause(&served);
    unanswered(&mut guest);
    assert!(!late.is_finished());
    unpause(&served);
    assert_eq!((guest.response().status, late.join().unwrap()), (0, Ok(vec![0; 512])));
    assert_eq!(nbd.join().unwrap().trim(), "67108864");
    assert_eq!(guest.read(0, 4096), Ok(vec![1; 4096]));
    refused(&served, &["unpause"], libc::EINVAL, "it is not paused");
    let flush = guest.entry(OP_FLUSH_DISKCACHE);
    assert_eq!(guest.status(&flush), 0);
}

#[test]
fn an_image_that_is_not_what_the_guest_has_is_refused() {
    let (served, path, folder) = vhd("");
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.write(0, &[5; 4096]), 0);
    let [missing, small, text, busy] =
        ["missing.vhd", "small.vhd", "text", "busy.vhd"].map(|f| folder.path().join(f));
    good("create -n {} -s 32", &[&small]);
    good("create -n {} -s 64", &[&busy]);
    std::fs::write(&text, "this is no image").unwrap();
    let _other = Served::start(&table(&busy), BOTH);
    pause(&served);
    send(&mut guest, 6);
    let shrink = "has 33554432 bytes, and a disk in use cannot shrink from 67108864";
    for (image, errno, words) in [
        (name("vhd", &missing), libc::ENOENT, "missing.vhd: cannot open"),
        (name("vhd", &small), libc::EINVAL, shrink),
        (name("vhd", &text), libc::EINVAL, "text: "),
        (name("aio", &text), libc::EINVAL, "text: "),
        (name("vhd", &busy), libc::EBUSY, "busy.vhd: in use by process"),
        (path.display().to_string(), libc::EINVAL, "is no type:path of an image; types are aio and vhd"),
        (name("qcow2", &path), libc::EINVAL, "is no type:path"),
        ("vhd:".into(), libc::EINVAL, "is no type:path"),
        (name("vhd", folder.path()), libc::EISDIR, "Is a directory"),
    ] {
        let said = ctl(&served, &["unpause", "-a", &image, "--debug"]);
        assert!(said.code == errno && said.err.contains(words), "{image}: {} {}", said.code, said.err);
        assert_eq!(state(&served), "0x2a", "{image}");
        assert_eq!(open_files(&served, folder.path()), Vec::<PathBuf>::new(), "{image}");
    }
    unanswered(&mut guest);
    refused(&served, &["engine", "--name", "threads"], libc::EBUSY, "paused");
    refused(&served, &["coalesce"], libc::EBUSY, "it is paused");
    refused(&served, &["resize"], libc::EBUSY, "it is paused, and takes on its image's size when it goes on");
    unpause(&served);
    assert_eq!(guest.response().status, 0);
    assert_eq!(guest.read(0, 4096), Ok(vec![6; 4096]));
    drop(guest);
    stop(served, &path);
}

#[test]
fn an_image_of_other_sectors_is_refused() {
    let (served, path, folder) = raw("sector_size = 4096", "");
    let vhd = folder.path().join("disk.vhd");
    good("create -n {} -s 64", &[&vhd]);
    pause(&served);
    refused(
        &served,
        &["unpause", "-a", &name("vhd", &vhd)],
        libc::EINVAL,
        "its sectors have 512 bytes, and the guest's 4096",
    );
    assert_eq!(state(&served), "0x2a");
    // A raw image can become a VHD, and the other way round.
    let copy = folder.path().join("copy.img");
    std::fs::copy(&path, &copy).unwrap();
    run(served.tap_ctl().args(["unpause", "-a", &name("aio", &copy)]));
    assert!(run(served.tap_ctl().arg("list")).contains("copy.img"));
    assert_eq!(served.stop().0, Some(0));
}

#[test]
fn a_raw_image_gets_a_snapshot_on_top() {
    let (served, path, folder) = raw("", "");
    keep(&served);
    let load = Load::start(&served);
    let top = folder.path().join("top.vhd");
    pause(&served);
    good("snapshot -n {} -p {} -m", &[&top, &path]);
    unpause_with(&served, &top);
    load.finish();
    kept(&served);
    assert_eq!(chain(&served), [top.display().to_string(), path.display().to_string()]);
    stop(served, &top);
}

#[test]
fn a_paused_disk_ends_in_order() {
    for by_signal in [true, false] {
        let (served, path, folder) = vhd("");
        let mut guest = Guest::connect(&served.ring());
        assert_eq!(guest.write(0, &[5; 4096]), 0);
        pause(&served);
        send(&mut guest, 6);
        if !by_signal {
            run(served.tap_ctl().arg("exit"));
        }
        let (code, log) = if by_signal { served.stop() } else { ended(served) };
        assert_eq!(code, Some(0), "{log}");
        // What was not pulled is not answered: the ring is the guest's, who takes it along.
        while guest.queue.wait(Some(Duration::from_secs(10))).unwrap() != Wake::HungUp {}
        assert!(open_and_valid(&path) && folder.path().exists());
    }
}

/// Waits until it has ended by itself.
fn ended(mut served: Served) -> (Option<i32>, String) {
    wait_for(|| (!served.alive()).then_some(()));
    (served.code(), served.log())
}

fn open_and_valid(path: &Path) -> bool {
    good("check -n {}", &[path]) == format!("{} is valid\n", path.display()) && !locked(path)
}

#[test]
fn an_image_in_memory_can_wait_but_not_be_exchanged() {
    let (_other, path, _folder) = raw("", "");
    let served = Served::start("type = 'ram'\nsize = '16 MiB'", BOTH);
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.write(0, &[5; 4096]), 0);
    pause(&served);
    send(&mut guest, 6);
    unanswered(&mut guest);
    let image = name("aio", &path);
    refused(
        &served,
        &["unpause", "-a", &image],
        libc::EOPNOTSUPP,
        "its image is in memory, and there can be no other",
    );
    assert_eq!(state(&served), "0x2a");
    unpause(&served);
    assert_eq!(guest.response().status, 0);
    assert_eq!(guest.read(0, 4096), Ok(vec![6; 4096]));
    assert_eq!(served.stop().0, Some(0));
}

const LEASE: &str = "[control]\npause_lease_s = 1\ndirectory = '{s}'\n";

#[test]
#[ignore = "slow"]
fn a_lease_ends_a_pause_that_nobody_ends() {
    for kind in ["vhd", "aio"] {
        let (served, path, folder) = if kind == "vhd" { vhd(LEASE) } else { raw("", LEASE) };
        let mut guest = Guest::connect(&served.ring());
        assert_eq!(guest.write(0, &[5; 4096]), 0);
        run(served.tap_ctl().arg("pause"));
        send(&mut guest, 6);
        assert_eq!(guest.response().status, 0);
        assert_eq!((state(&served).as_str(), guest.read(0, 4096)), ("0", Ok(vec![6; 4096])));
        served.wait_log("nobody has resumed the disk in time");
        // Where its image is not there, it stays paused until it is.
        let away = folder.path().join("away");
        run(served.tap_ctl().arg("pause"));
        std::fs::rename(&path, &away).unwrap();
        send(&mut guest, 7);
        wait_for(|| {
            (served.log().matches("the disk cannot be resumed, and stays paused").count() >= 2).then_some(())
        });
        assert!(state(&served) == "0x2a" && !path.exists(), "{kind}");
        unanswered(&mut guest);
        refused(&served, &["unpause"], libc::ENOENT, path.file_name().unwrap().to_str().unwrap());
        std::fs::rename(&away, &path).unwrap();
        assert_eq!(guest.response().status, 0);
        assert_eq!((state(&served).as_str(), guest.read(0, 4096)), ("0", Ok(vec![7; 4096])));
        // One that is ended in time does not end later once more.
        let told = served.log().matches("nobody has resumed").count();
        run(served.tap_ctl().arg("pause"));
        run(served.tap_ctl().arg("unpause"));
        std::thread::sleep(Duration::from_millis(1500));
        assert_eq!(served.log().matches("nobody has resumed").count(), told);
        drop(guest);
        assert_eq!(served.stop().0, Some(0));
    }
}

#[test]
fn a_pause_waits_for_what_is_stuck_and_can_be_called_off() {
    let (served, path, folder) = raw("", "[[fault]]\ntype = 'stuck'\non = ['write']\nto = '1 MiB'\n");
    let mut guest = Guest::connect(&served.ring());
    send(&mut guest, 1);
    wait_for(|| (served.debug_queue()["faults"]["stuck"] == 1).then_some(()));
    let pausing = |served: &Served| {
        let child = served.tap_ctl().arg("pause").stderr(std::process::Stdio::piped()).spawn().unwrap();
        wait_for(|| (state(served) == "0x10").then_some(()));
        child
    };
    let first = pausing(&served);
    // Others are answered, and the guest's next request waits.
    assert_eq!(served.debug_queue()["slots_used"], 1);
    let mut second = Guest::connect(&served.ring());
    let entry = second.entry(OP_WRITE).with_sector(4096).with_segments(1, &[page(0)]);
    second.queue.ring.push(&entry);
    second.queue.publish().unwrap();
    unanswered(&mut second);
    refused(&served, &["engine", "--name", "threads"], libc::EBUSY, "paused");
    assert!(ctl(&served, &["unpause", "-a", &name("aio", &path)]).code == libc::EINVAL, "it is not paused yet");
    unpause(&served);
    let first = first.wait_with_output().unwrap();
    assert_eq!(first.status.code(), Some(libc::EINVAL), "{}", String::from_utf8_lossy(&first.stderr));
    assert_eq!(second.response().status, 0, "it goes on");
    unanswered(&mut guest);
    // And another time, to the end.
    let mut pausing = pausing(&served);
    run(served.tap_ctl().args(["fault", "--release"]));
    assert_eq!(pausing.wait().unwrap().code(), Some(0));
    assert_eq!(guest.response().status, 0, "it was pulled before the pause");
    assert_eq!((state(&served).as_str(), open_files(&served, folder.path()).len()), ("0x2a", 0));
    unpause(&served);
    assert_eq!(guest.read(0, 4096), Ok(vec![1; 4096]));
    assert_eq!(served.stop().0, Some(0));
}

/// An image on a file system that is frozen, so that it can't be opened to the end; a disk that is about to go on with it.
#[test]
fn a_pause_during_a_resume_waits_until_the_image_is_let_go() {
    let Some(fs) = SmallFs::new("24m") else { return };
    let path = fs.path("disk.vhd");
    good("create -n {} -s 16", &[&path]);
    let served = Served::start(&table(&path), BOTH);
    for end in [kind::PAUSE, kind::CLOSE] {
        pause(&served);
        let frozen = fs.freeze();
        let resuming = ask(&served, kind::RESUME);
        wait_for(|| locked(&path).then_some(()));
        let ending = ask(&served, end);
        std::thread::sleep(Duration::from_millis(300));
        assert!(ending.waits(), "{end}: the image is being opened");
        drop(frozen);
        assert_eq!(ending.errno(), 0, "{end}");
        assert!(!locked(&path) && open_files(&served, &fs.path("")).is_empty(), "{end}");
        good("check -n {}", &[&path]);
        let resuming = resuming.errno();
        if end == kind::PAUSE {
            assert_eq!(resuming, libc::EBUSY);
            unpause(&served);
        } else {
            assert!([libc::EBUSY, libc::ENODEV].contains(&resuming), "{resuming}");
        }
    }
    run(served.tap_ctl().args(["detach", "-p", &served.pid().to_string(), "-m", "0"]));
    let mut served = served;
    assert_eq!(served.code(), Some(0));
}

#[test]
fn a_disk_whose_image_can_not_be_closed_is_still_told_of() {
    let Some(fs) = SmallFs::new("24m") else { return };
    let path = fs.path("disk.vhd");
    good("create -n {} -s 16", &[&path]);
    let mut served = Served::start(&table(&path), BOTH);
    let frozen = fs.freeze();
    let mut pausing = served.tap_ctl().arg("pause").spawn().unwrap();
    wait_for(|| (state(&served) == "0x10").then_some(()));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!((state(&served).as_str(), pausing.try_wait().unwrap().is_none()), ("0x10", true));
    refused(&served, &["unpause"], libc::EBUSY, "it is being paused, and its image being closed");
    drop(frozen);
    assert_eq!(pausing.wait().unwrap().code(), Some(0));
    good("check -n {}", &[&path]);
    unpause(&served);
    let frozen = fs.freeze();
    served.signal(Signal::SIGTERM);
    wait_for(|| (state(&served) == "0x4").then_some(()));
    assert!(served.alive());
    drop(frozen);
    assert_eq!(served.code(), Some(0));
    good("check -n {}", &[&path]);
}

#[test]
fn a_pause_that_is_overtaken_by_the_end_says_so() {
    let (mut served, _path, _folder) = raw("", "[[fault]]\ntype = 'stuck'\non = ['write']\n");
    let mut guest = Guest::connect(&served.ring());
    send(&mut guest, 1);
    wait_for(|| (served.debug_queue()["faults"]["stuck"] == 1).then_some(()));
    let mut pausing = served.tap_ctl().arg("pause").stderr(std::process::Stdio::piped()).spawn().unwrap();
    wait_for(|| (state(&served) == "0x10").then_some(()));
    served.signal(Signal::SIGTERM);
    wait_for(|| (state(&served) == "0x4").then_some(()));
    assert_eq!(pausing.wait().unwrap().code(), Some(libc::EBUSY));
    let closing = ask(&served, kind::CLOSE);
    std::thread::sleep(Duration::from_millis(100));
    assert!(served.alive() && closing.waits());
    run(served.tap_ctl().args(["fault", "--release"]));
    assert_eq!((served.code(), closing.errno()), (Some(0), 0), "nobody has to detach it");
}

#[test]
fn ten_snapshots_are_taken_under_load() {
    let (served, base, folder) = vhd("");
    keep(&served);
    let load = Load::start(&served);
    let mut top = base;
    for i in 1..=10 {
        let next = folder.path().join(format!("{i}.vhd"));
        snapshot(&served, &next, &top);
        assert!(locked(&next));
        std::thread::sleep(Duration::from_millis(50));
        top = next;
    }
    assert_eq!(chain(&served).len(), 11);
    load.finish();
    kept(&served);
    stop(served, &top);
    let check = good("check -n {} -p", &[&top]);
    assert!(check.lines().count() == 11 && check.lines().all(|line| line.ends_with(" is valid")), "{check}");
    assert!(good("query -d -n {}", &[&top]).contains("11"));
    kept(&Served::start(&table(&top), BOTH));
}

/// Writes eight pages at once and reads them back, one by one, again and again; sleeps whenever it waits. Counts in `rounds`.
fn sleeping_client(ring: &Path, rounds: &AtomicU32, stop: &AtomicBool) {
    let mut guest = Guest::connect(ring);
    for byte in (1..=u8::MAX).cycle() {
        if stop.load(SeqCst) {
            return;
        }
        for i in 0..8 {
            guest.queue.memory().write(guest.queue.page_at(i), &[byte; 4096]);
            let entry = guest.entry(OP_WRITE).with_sector(u64::from(i) * 4096).with_segments(1, &[page(i)]);
            guest.queue.ring.push(&entry);
        }
        guest.queue.publish().unwrap();
        (0..8).for_each(|_| assert_eq!(guest.response().status, 0));
        (0..8).for_each(|i| assert_eq!(guest.read(i * 4096, 4096), Ok(vec![byte; 4096])));
        rounds.fetch_add(1, SeqCst);
    }
}

/// Each of ten snapshots, many times over: TAPDISK_TEST_ROUNDS says how many.
#[test]
#[ignore = "slow"]
fn a_client_that_sleeps_is_woken_after_every_resume() {
    let rounds = std::env::var("TAPDISK_TEST_ROUNDS").map_or(20, |rounds| rounds.parse().unwrap());
    for round in 0..rounds {
        let (served, base, folder) = vhd("");
        let (done, stop) = (AtomicU32::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| sleeping_client(&served.ring(), &done, &stop));
            let mut top = base;
            for i in 0..10 {
                let next = folder.path().join(format!("{i}.vhd"));
                snapshot(&served, &next, &top);
                // Two rounds: one may have been under way.
                let before = done.load(SeqCst);
                let end = Instant::now() + PATIENCE;
                while done.load(SeqCst) < before + 2 && Instant::now() < end {
                    std::thread::yield_now();
                }
                let woken = done.load(SeqCst) >= before + 2;
                stop.fetch_or(!woken, SeqCst);
                assert!(woken, "round {round}, snapshot {i}: {}", served.debug_queue());
                top = next;
            }
            stop.store(true, SeqCst);
        });
    }
}

#[test]
fn a_disk_grows_with_its_snapshot() {
    let (served, base, folder) = vhd("");
    let top = folder.path().join("top.vhd");
    let mut guest = Guest::connect(&served.ring());
    let last = guest.disk.sectors - 8;
    assert_eq!(guest.write(last, &[3; 4096]), 0);
    pause(&served);
    good("snapshot -n {} -p {} -S 256", &[&top, &base]);
    good("resize -f -n {} -s 128", &[&top]);
    unpause_with(&served, &top);
    // The ring takes it at once; who comes later is told.
    assert_eq!((guest.write(128 * 2048 - 8, &[4; 4096]), guest.write(last + 8, &[5; 4096])), (0, 0));
    assert_eq!(guest.write(128 * 2048, &[4; 512]), -1, "beyond the end");
    assert_eq!(Guest::connect(&served.ring()).disk.sectors, 128 * 2048);
    assert!(run(tool("ring-load").args(["info", "--socket"]).arg(served.ring())).contains("134217728"));
    assert_eq!(run(Command::new("nbdinfo").arg("--size").arg(served.nbd())).trim(), "134217728");
    for (sector, byte) in [(last, 3), (last + 8, 5), (128 * 2048 - 8, 4)] {
        assert_eq!(guest.read(sector, 4096), Ok(vec![byte; 4096]));
    }
    // The base alone is too small now.
    pause(&served);
    refused(&served, &["unpause", "-a", &name("vhd", &base)], libc::EINVAL, "cannot shrink from 134217728");
    // The image itself grows in a pause, too.
    good("resize -f -n {} -s 256", &[&top]);
    unpause(&served);
    assert_eq!(Guest::connect(&served.ring()).disk.sectors, 256 * 2048);
    assert_eq!(guest.write(256 * 2048 - 1, &[6; 512]), 0);
    drop(guest);
    stop(served, &top);
}

#[test]
fn a_pause_whose_flush_fails_says_so() {
    let (served, path, folder) = raw("", "[[fault]]\ntype = 'error'\non = ['flush']\n");
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.write(0, &[5; 4096]), 0);
    let text = "disk.img: it is paused, but what was written last may not be on the disk: EIO";
    for _ in 0..2 {
        refused(&served, &["pause"], libc::EIO, text);
        assert_eq!(
            (state(&served).as_str(), open_files(&served, folder.path()).len(), locked(&path)),
            ("0x2a", 0, false)
        );
    }
    unpause(&served);
    assert_eq!(guest.read(0, 4096), Ok(vec![5; 4096]));
    assert_eq!(served.stop().0, Some(1));
}

#[test]
fn a_disk_that_cannot_grow_for_a_failed_flush_goes_on() {
    let (served, path, _folder) = vhd("[[fault]]\ntype = 'error'\non = ['flush']\n");
    let mut guest = Guest::connect(&served.ring());
    for _ in 0..2 {
        refused(&served, &["resize", "--size", "128 MiB"], libc::EIO, "it was resumed, and is as large as before");
        assert_eq!((state(&served).as_str(), locked(&path)), ("0", true));
        assert_eq!(guest.read(0, 4096), Ok(vec![0; 4096]));
    }
    assert_eq!(served.debug_queue()["size"], 64 << 20);
}

#[test]
fn the_engine_that_was_set_stays() {
    let (served, _path, _folder) = vhd("[engine]\nname = 'aio'\n");
    let engine = |more: &[&str]| -> serde_json::Value {
        serde_json::from_str(&run(served.tap_ctl().args(["engine", "--json"]).args(more))).unwrap()
    };
    engine(&["--name", "threads", "--submit", "inline"]);
    engine(&["--threads-min", "2", "--threads-max", "5"]);
    pause(&served);
    unpause(&served);
    let shown = engine(&[]);
    assert_eq!((&shown["name"], &shown["submit"]), (&"threads".into(), &"inline".into()), "{shown}");
    assert_eq!((&shown["pool"]["min"], &shown["pool"]["max"]), (&2.into(), &5.into()), "{shown}");
}

#[test]
fn who_submits_stays_and_has_a_thread_for_it_where_the_configuration_names_none() {
    let (served, _path, _folder) = vhd("[engine]\nsubmit = 'inline'\n");
    let threads = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", served.pid())).unwrap();
        let name =
            |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.ok()?.path().join("comm")).ok();
        tasks.filter_map(name).filter(|name| name.trim() == "submit").count()
    };
    assert_eq!(threads(), 0);
    run(served.tap_ctl().args(["engine", "--submit", "thread"]));
    // A thread gives itself its name, some time after it was made.
    wait_for(|| (threads() == 1).then_some(()));
    pause(&served);
    unpause(&served);
    // Without it the main loop would submit, and wait.
    wait_for(|| (threads() == 1).then_some(()));
}
