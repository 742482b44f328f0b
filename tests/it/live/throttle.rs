//! Limits of a disk that is in use: set, shown, kept over what happens to it, and in the way of nobody but clients.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::guest::{Guest, page};
use crate::common::live::*;
use crate::common::served::{Served, folder, run, tool};
use crate::common::vhd::good;
use crate::common::vhd_made::table;
use nix::libc;
use serde_json::{Value, json};
use tapdisk::frontend::blkif::wire::OP_READ;
use tempfile::TempDir;

const NONE: Value = Value::Null;

/// A raw image of 64 MiB.
fn raw(rest: &str) -> (Served, PathBuf, TempDir) {
    let folder = folder();
    let path = folder.path().join("disk.img");
    let image = format!("path = '{}'\ncreate = '64 MiB'", path.display());
    (Served::start(&image, &format!("{BOTH}{rest}")), path, folder)
}

fn nbdsh(served: &Served, script: &str) {
    run(Command::new("nbdsh").env("PATH", "/usr/bin:/bin").args(["-u", &served.nbd(), "-c", script]));
}

fn throttle(served: &Served, words: &[&str]) -> Value {
    let words = [&["throttle", "--json"], words].concat();
    serde_json::from_str(&run(served.tap_ctl().args(words))).unwrap()
}

fn limits(report: &Value, of: &str) -> [Value; 4] {
    ["bytes_per_s", "bytes_burst", "requests_per_s", "requests_burst"].map(|key| report[of][key].clone())
}

/// Sends a read, and does not wait for it.
fn send(guest: &mut Guest) {
    let entry = guest.entry(OP_READ).with_sector(0).with_segments(1, &[page(0)]);
    guest.queue.ring.push(&entry);
    guest.queue.publish().unwrap();
}

/// What has one request wait, as debug-queue shows it.
fn wait_held(served: &Served) {
    wait_for(|| {
        let queue = served.debug_queue();
        let requests = queue["requests"].as_array().unwrap();
        (requests.len() == 1 && requests[0]["held_by"] == "waits for throttle").then_some(())
    });
}

#[test]
fn limits_that_are_set_stay_over_pauses_snapshots_and_engines_and_others_are_left() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    good("create -n {} -s 64", &[&path("disk.vhd")]);
    let rest = format!("{BOTH}[throttle.read]\nbytes_per_s = '100MiB'\n[throttle.write]\nrequests_per_s = 500\n");
    let mut served = Served::start(&table(&path("disk.vhd")), &rest);
    let mib = 1 << 20;
    let configured = [json!(100 * mib), json!(10 * mib), NONE, NONE];
    assert_eq!(limits(&throttle(&served, &[]), "read"), configured);
    let set = throttle(&served, &["--read-bytes-burst", "7M", "--write-bytes", "1G", "--requests", "9000"]);
    let writes = [json!(1 << 30), json!((1 << 30) / 10), json!(500), json!(50)];
    assert_eq!(limits(&set, "read"), [json!(100 * mib), json!(7 * mib), NONE, NONE]);
    assert_eq!(limits(&set, "write"), writes);
    assert_eq!(limits(&set, "all"), [NONE, NONE, json!(9000), json!(900)]);
    let same = |served: &Served| {
        let now = throttle(served, &[]);
        ["read", "write", "all"].iter().for_each(|of| assert_eq!(now[of], set[of], "{now}"));
    };
    // What makes no sense changes nothing.
    refused(&served, &["throttle", "--read-bytes", "100"], libc::EINVAL, "throttle.read.bytes_per_s: expected from");
    let words = ["throttle", "--write-bytes", "2T", "--read-bytes", "1M"];
    refused(&served, &words, libc::EINVAL, "throttle.write.bytes_per_s: expected from");
    same(&served);
    pause(&served);
    same(&served);
    unpause(&served);
    same(&served);
    snapshot(&served, &path("new.vhd"), &path("disk.vhd"));
    same(&served);
    run(served.tap_ctl().args(["engine", "--name", "threads"]));
    same(&served);
    // Also those that are set in a pause.
    pause(&served);
    throttle(&served, &["--requests", "8000"]);
    unpause(&served);
    assert_eq!(limits(&throttle(&served, &[]), "all"), [NONE, NONE, json!(8000), json!(800)]);
    let text = run(served.tap_ctl().arg("throttle"));
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "read: 104857600 bytes/s (burst 7340032)");
    assert_eq!(lines[1], "write: 1073741824 bytes/s (burst 107374182), 500 requests/s (burst 50)");
    assert_eq!(lines[2], "all: 8000 requests/s (burst 800)");
    assert!(lines[3].starts_with("held: 0 now, "), "{text}");
    let off = throttle(&served, &["--off", "--write-requests", "3"]);
    assert_eq!(limits(&off, "write"), [NONE, NONE, json!(3), json!(1)]);
    assert_eq!((limits(&off, "read"), limits(&off, "all")), ([NONE; 4], [NONE; 4]));
    throttle(&served, &["--write-requests", "0"]);
    assert_eq!(run(served.tap_ctl().arg("throttle")).matches("no limit").count(), 3);
    assert!(served.alive());
}

#[test]
fn what_waits_for_half_an_hour_holds_up_no_pause_no_resize_and_no_other_engine() {
    let (served, path, _folder) = raw("");
    throttle(&served, &["--bytes", "512", "--bytes-burst", "512"]);
    let mut guest = Guest::connect(&served.ring());
    // One passes, and is to be paid for.
    nbdsh(&served, "h.zero(1048576, 0)");
    send(&mut guest);
    wait_held(&served);
    assert!(guest.try_response(Duration::from_millis(200)).is_none());
    let text = run(served.tap_ctl().arg("debug-queue"));
    let filter = "filter: throttle; 512 bytes burst, ";
    assert!(text.contains(filter) && text.contains(&format!("\nlayer 0: {}", path.display())), "{text}");
    assert!(text.contains("held by waits for throttle"), "{text}");
    let shown = run(served.tap_ctl().arg("metrics"));
    for (name, value) in [
        ("tapdisk_requests_held", "1"),
        ("tapdisk_limit_bytes", "512"),
        ("tapdisk_limit_burst_bytes", "512"),
        ("tapdisk_requests_held_before_total", "0"),
        ("tapdisk_requests_held_seconds_total", "0.000000000"),
    ] {
        let mut samples = shown.lines().filter(|line| line.starts_with(&format!("{name}{{")));
        let sample = samples.next().unwrap_or_else(|| panic!("no {name} in {shown}"));
        assert!(sample.ends_with(&format!(" {value}")) && samples.next().is_none(), "{sample}");
    }
    let stats: Value = serde_json::from_str(&run(served.tap_ctl().arg("stats"))).unwrap();
    assert_eq!((&stats["throttle"]["held"], &stats["reqs_outstanding"]), (&json!(1), &json!(1)));
    run(served.tap_ctl().args(["resize", "--size", "65M"]));
    run(served.tap_ctl().args(["engine", "--name", "threads"]));
    wait_held(&served);
    assert!(guest.try_response(Duration::from_millis(100)).is_none());
    pause(&served);
    assert_eq!(guest.response().status, 0);
    unpause(&served);
    send(&mut guest);
    wait_held(&served);
    let report = throttle(&served, &[]);
    assert_eq!((&report["held"], &report["held_before"]), (&json!(1), &json!(1)));
    assert!(report["held_us"].as_u64().unwrap() >= 300_000, "{report}");
    // What is owed is owed also where the rate is another one: two thousand to the second.
    assert_eq!(run(served.tap_ctl().args(["throttle", "--off"])).matches("no limit").count(), 3);
    assert_eq!(guest.response().status, 0);
}

#[test]
fn clients_of_a_throttled_disk_get_what_they_wrote() {
    let rest = "[throttle.all]\nbytes_per_s = '64 MiB'\nbytes_burst = '2 MiB'\nrequests_per_s = 3000\n";
    let (served, path, folder) = raw(rest);
    keep(&served);
    let load = Load::start(&served);
    pause(&served);
    unpause(&served);
    load.finish();
    kept(&served);
    // Larger than the burst, and of more than a part.
    let script = "d = bytes(range(256)) * 65536\nh.pwrite(d, 1048576 + 512)\nassert h.pread(len(d), 1048576 + 512) == d\n\
                  h.zero(4194304, 2097152)\nassert h.pread(4194304, 2097152) == bytes(4194304)\nh.flush()";
    nbdsh(&served, script);
    let copy = folder.path().join("copy.img");
    run(Command::new("nbdcopy").arg(served.nbd()).arg(&copy));
    assert!(throttle(&served, &[])["held_before"].as_u64().unwrap() > 100);
    assert_eq!(served.stop().0, Some(0));
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(&path).unwrap());
}

#[test]
fn a_client_with_one_request_gets_its_share_beside_another_frontends_with_many() {
    let (served, _path, _folder) = raw("[throttle.all]\nrequests_per_s = 400\nrequests_burst = 8\n");
    let mut load = tool("ring-load");
    load.args(["run", "--rw", "randread", "--depth", "32", "--runtime", "100s", "--timeout", "200s", "--socket"]);
    let mut load = load.arg(served.ring()).stdout(Stdio::null()).spawn().unwrap();
    wait_for(|| throttle(&served, &[])["held"].as_u64().filter(|held| *held > 16));
    let reads = || {
        let stats: Value = serde_json::from_str(&run(served.tap_ctl().arg("stats"))).unwrap();
        stats["secs"][0].as_u64().unwrap() / 8
    };
    let before = reads();
    nbdsh(&served, "for i in range(300): h.pread(4096, i * 4096)");
    let all = reads() - before;
    load.kill().unwrap();
    load.wait().unwrap();
    // Three hundred each, and what the programs took to begin and end. In the order in which they come it would be ten thousand.
    assert!((450..3000).contains(&all), "{all}");
}

#[test]
fn what_is_held_for_clients_that_are_gone_is_in_nobodys_way() {
    let (served, _path, _folder) = raw("[throttle.all]\nbytes_per_s = 4096\nbytes_burst = 4096\n");
    let script = |count: u32| {
        format!(
            "import os\nb = [nbd.Buffer(4096) for i in range({count})]\nfor x in b: h.aio_pread(x, 0)\nfor i in range(10): h.poll(50)\nos._exit(0)"
        )
    };
    for count in [20, 400] {
        // The one, or so many that the server does not come to the end of what the client has sent.
        nbdsh(&served, &script(count));
        let mut guest = Guest::connect(&served.ring());
        (0..20).for_each(|_| send(&mut guest));
        wait_for(|| throttle(&served, &[])["held"].as_u64().filter(|held| *held > 10));
        drop(guest);
        wait_for(|| (throttle(&served, &[])["held"] == 0).then_some(()));
        let begin = Instant::now();
        nbdsh(&served, "h.pread(4096, 0)");
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    }
}

#[test]
fn what_a_limit_holds_back_is_not_stuck_and_what_is_stuck_after_it_is() {
    let rest = "[throttle.all]\nbytes_per_s = 512\nbytes_burst = 512\n[watchdog]\nstuck_s = 1\n[[fault]]\ntype = 'stuck'\non = ['read']\nfrom = '0'\nto = '4096'\n";
    let (served, _path, _folder) = raw(rest);
    let mut guest = Guest::connect(&served.ring());
    nbdsh(&served, "h.zero(1048576, 1048576)");
    send(&mut guest);
    wait_held(&served);
    std::thread::sleep(Duration::from_millis(2500));
    let stuck = |log: &str| log.matches("request is stuck").count();
    assert_eq!((stuck(&served.log()), &served.debug_queue()["stuck"]), (0, &json!(0)));
    // Its time begins when it is let go.
    throttle(&served, &["--off"]);
    let begin = Instant::now();
    served.wait_log("request is stuck");
    assert!(begin.elapsed() > Duration::from_millis(500), "{:?}", begin.elapsed());
    run(served.tap_ctl().args(["fault", "--release"]));
    assert_eq!(guest.response().status, 0);
}
