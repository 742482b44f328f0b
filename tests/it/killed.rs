//! A tapdisk that is frozen or killed under load: what was acknowledged as flushed is there afterwards.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::guest::Guest;
use crate::common::killed::{Numbered, kill_after};
use crate::common::served::{Served, folder, tool};
use crate::common::vhd_made as vhd;
use nix::sys::signal::Signal;

const FRONTENDS: &str = "[frontend.local]\nsocket = '{s}/ring'\n[frontend.nbd]\nsocket = '{s}/nbd'\n";

#[test]
#[ignore = "slow"]
fn frozen_for_ten_seconds_it_goes_on_and_nothing_is_lost() {
    let folder = folder();
    let image = folder.path().join("disk.img");
    let served = Served::start(&format!("path = '{}'\ncreate = '64 MiB'", image.display()), FRONTENDS);
    let mut ring = tool("ring-load");
    ring.args([
        "run",
        "--rw",
        "randwrite",
        "--bs",
        "512-64k",
        "--verify",
        "--range",
        "32M",
        "--fsync",
        "64",
        "--runtime",
    ]);
    let mut ring = ring.arg("13s").arg("--socket").arg(served.ring()).stdout(Stdio::null()).spawn().unwrap();
    let mut nbd = Command::new("fio");
    nbd.args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bsrange=4k-64k", "--iodepth=16", "--verify=crc32c"])
        .args(["--offset=32m", "--size=32m", "--fsync=64", "--runtime=13", "--time_based", "--output-format=terse"])
        .arg("--verify_state_save=0")
        .arg(format!("--uri={}", served.nbd()));
    let mut nbd = nbd.stdout(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    served.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(10));
    assert!(
        ring.try_wait().unwrap().is_none() && nbd.try_wait().unwrap().is_none(),
        "the loads ended while it was frozen"
    );
    served.signal(Signal::SIGCONT);
    assert!(ring.wait().unwrap().success() && nbd.wait().unwrap().success());
    assert_eq!(served.stop().0, Some(0));
}

/// What is written while it is killed.
struct Load<'a> {
    /// The `[image]` table, and what comes after it.
    image: &'a str,
    rest: &'a str,
    /// Sectors that are written.
    sectors: u64,
    /// How many sectors each is after the one before.
    apart: u64,
    kills: u32,
    seed: u64,
}

fn killed_again_and_again(load: &Load) {
    let Load { image, rest, .. } = load;
    let mut random = fastrand::Rng::with_seed(load.seed);
    let mut numbered = Numbered::new(load.sectors, load.apart, load.seed);
    for round in 0..load.kills {
        let served = Served::start(image, &format!("{FRONTENDS}{rest}"));
        let mut guest = Guest::connect(&served.ring());
        numbered.check(&mut guest, &format!("{image}, {rest}, round {round}"));
        let killer = kill_after(&served, Duration::from_millis(random.u64(5..150)));
        numbered.write_until_it_is_gone(&mut guest);
        killer.join().unwrap();
    }
    let acknowledged = numbered.acknowledged;
    assert!(acknowledged > 20, "only {acknowledged} writes were acknowledged as flushed in {} rounds", load.kills);
}

#[test]
fn killed_at_any_moment_it_has_all_that_was_acknowledged_as_flushed() {
    for (seed, (keys, rest)) in (1..).zip([
        ("direct = 'on'", "[engine]\nname = 'aio'\n"),
        ("direct = 'on'", "[engine]\nname = 'io_uring'\n"),
        ("direct = 'off'", "[engine]\nname = 'threads'\n"),
    ]) {
        let folder = folder();
        let image = format!("path = '{}'\ncreate = '4 MiB'\n{keys}", folder.path().join("disk.img").display());
        killed_again_and_again(&Load { image: &image, rest, sectors: 256, apart: 8, kills: 12, seed });
    }
}

/// Sectors that are so far apart that most writes are the first of their block, or of their part of it.
#[test]
#[ignore = "slow"]
fn killed_while_vhd_images_grow_they_have_all_that_was_acknowledged_as_flushed() {
    const BLOCKS: u64 = 2048;
    for (seed, (kind, durability, apart)) in (10..).zip([
        ("dynamic", "flush", 2048),
        ("dynamic", "order", 128),
        ("differencing", "flush", 128),
        ("differencing", "order", 2048),
    ]) {
        let folder = folder();
        let path = folder.path().join("disk.vhd");
        let base = if kind == "dynamic" { path.clone() } else { folder.path().join("base.vhd") };
        vhd::create(&base, "dynamic", 2 * BLOCKS);
        if base != path {
            vhd::snapshot(&path, 2, &base);
        }
        let image = format!("{}\ndurability = '{durability}'", vhd::table(&path));
        killed_again_and_again(&Load { image: &image, rest: "", sectors: 4096, apart, kills: 25, seed });
        assert_eq!(vhd::check(&path, &["-i"]).1, 0, "{kind}, {durability}");
    }
}
