//! Images that are merged into their parents while the disk that they are part of is in use.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::guest::Guest;
use crate::common::live::*;
use crate::common::served::{Served, folder, run};
use crate::common::small_fs::SmallFs;
use crate::common::vhd::{good, vhd_util};
use crate::common::vhd_made::{stop, table};
use nix::libc;
use nix::sys::signal::Signal;
use tapdisk::frontend::blkif::wire::OP_FLUSH_DISKCACHE;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn image(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("{number}.vhd"))
}

/// A chain of images of 64 MiB, of which each has a MiB of its number in the same place and one beside it; the last is served.
fn chain_of(folder: &Path, count: usize, rest: &str) -> Served {
    for i in 0..count {
        if i == 0 {
            good("create -n {} -s 64", &[&image(folder, 0)]);
        } else {
            good("snapshot -n {} -p {}", &[&image(folder, i), &image(folder, i - 1)]);
        }
        crate::common::vhd::write(&image(folder, i), 4 * MIB, MIB, i as u8 + 1);
        crate::common::vhd::write(&image(folder, i), (8 + i as u64) * MIB, MIB, i as u8 + 1);
    }
    Served::start(&table(&image(folder, count - 1)), &format!("{BOTH}{rest}"))
}

fn made(count: usize) -> (Served, TempDir) {
    let folder = folder();
    (chain_of(folder.path(), count, ""), folder)
}

/// What is in a chain of so many images.
fn intact(served: &Served, count: usize) {
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.read(4 * 2048 + 8, 4096), Ok(vec![count as u8; 4096]));
    for i in 0..count as u64 {
        assert_eq!(guest.read((8 + i) * 2048, 4096), Ok(vec![i as u8 + 1; 4096]), "image {i}");
    }
}

fn numbers(served: &Served) -> Vec<String> {
    let name = |path: &String| Path::new(path).file_stem().unwrap().to_str().unwrap().to_owned();
    chain(served).iter().map(name).collect()
}

/// Begins to merge, so slowly that it does not end by itself in a test.
fn begin_slowly(served: &Served, image: &Path) {
    run(served.tap_ctl().args(["coalesce", "--rate", "64 KiB", "--image"]).arg(image));
    let report = wait_for(|| Some(coalesce_report(served)).filter(|report| report["bytes"].as_u64() > Some(0)));
    assert!(report["stage"] == "merging" && report["percent"].as_u64() < Some(100), "{report}");
}

fn cancel(served: &Served) {
    run(served.tap_ctl().args(["coalesce", "--cancel"]));
    let report = wait_stage(served, "failed");
    assert!(report["error"].as_str().unwrap().contains("canceled"), "{report}");
}

#[test]
fn ten_images_are_merged_under_load() {
    for from_the_top in [true, false] {
        let folder = folder();
        let path = |number| image(folder.path(), number);
        good("create -n {} -s 64", &[&path(0)]);
        let served = Served::start(&table(&path(0)), BOTH);
        keep(&served);
        let load = Load::start(&served);
        for i in 1..=10 {
            snapshot(&served, &path(i), &path(i - 1));
            std::thread::sleep(Duration::from_millis(30));
        }
        let mut order: Vec<_> = (1..10).collect();
        if from_the_top {
            order.reverse();
        }
        for (i, number) in order.into_iter().enumerate() {
            coalesce(&served, &path(number));
            // It is nobody's any more.
            assert!(!locked(&path(number)));
            std::fs::remove_file(path(number)).unwrap();
            assert_eq!(chain(&served).len(), 10 - i);
        }
        assert_eq!(numbers(&served), ["10", "0"]);
        load.finish();
        kept(&served);
        stop(served, &path(10));
        let check = good("check -b -p -n {}", &[&path(10)]);
        assert!(check.lines().count() == 2 && check.lines().all(|line| line.ends_with(" is valid")), "{check}");
        kept(&Served::start(&table(&path(10)), BOTH));
    }
}

#[test]
fn how_far_it_is_is_shown_and_it_is_held_back_and_ended() {
    let (served, folder) = made(4);
    let (leaf, middle) = (image(folder.path(), 3), image(folder.path(), 2));
    let show = |words: &[&str]| run(served.tap_ctl().arg("coalesce").args(words));
    assert_eq!(show(&["--show"]), "none\n");
    assert_eq!(show(&["--cancel"]), "none\n");
    begin_slowly(&served, &middle);
    let text = show(&["--show"]);
    let into = format!(": {} into {}\n", middle.display(), image(folder.path(), 1).display());
    assert!(text.starts_with("merging ") && text.ends_with(&into), "{text}");
    refused(&served, &["coalesce"], libc::EBUSY, "it is coalescing already: tap-ctl coalesce --cancel ends that");
    intact(&served, 4);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(coalesce_report(&served)["stage"], "merging");
    // Nobody else changes what it changes.
    let parent = image(folder.path(), 1);
    let said = vhd_util("set -n {} -f hidden -v 1", &[&parent]);
    assert!(said.code == libc::EBUSY && said.err.contains("a program that changes it"), "{} {}", said.code, said.err);
    cancel(&served);
    assert_eq!(numbers(&served), ["3", "2", "1", "0"]);
    good("set -n {} -f hidden -v 1", &[&parent]);
    intact(&served, 4);
    assert!(show(&["--show"]).contains("(") && state(&served) == "0");
    // Another time from the beginning, by default the one below the leaf.
    let report = show(&["--wait"]);
    assert_eq!(report, format!("done 100 % {} bytes{into}", 2 * MIB));
    assert_eq!(numbers(&served), ["3", "1", "0"]);
    intact(&served, 4);
    stop(served, &leaf);
    assert!(good("check -b -p -n {}", &[&leaf]).lines().count() == 3);
}

#[test]
fn many_small_runs_are_held_back_as_a_large_one_is() {
    let folder = folder();
    let path = |number| image(folder.path(), number);
    good("create -n {} -s 1024", &[&path(0)]);
    good("snapshot -e -n {} -p {}", &[&path(1), &path(0)]);
    // A page takes less than a millisecond, all of them half a second.
    let blocks = 512;
    (0..blocks).for_each(|block| crate::common::vhd::write(&path(1), block * 2 * MIB, 4096, 7));
    good("snapshot -n {} -p {}", &[&path(2), &path(1)]);
    let served = Served::start(&table(&path(2)), BOTH);
    let rate = 4 * MIB;
    let begin = Instant::now();
    run(served.tap_ctl().args(["coalesce", "--wait", "--rate", &rate.to_string()]));
    let took = begin.elapsed();
    let (data, least) = (blocks * 4096, Duration::from_millis(blocks * 4096 * 1000 / rate));
    assert!(took >= least, "{data} bytes in {took:?}");
    assert_eq!(coalesce_report(&served)["bytes"], data);
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.read((blocks - 1) * 4096, 8192), Ok([[7; 4096], [0; 4096]].concat()));
    drop(guest);
    stop(served, &path(2));
}

#[test]
fn what_cannot_be_merged_is_refused() {
    let (served, folder) = made(3);
    let [base, middle, leaf] = [0, 1, 2].map(|i| image(folder.path(), i));
    let stranger = folder.path().join("stranger.vhd");
    good("create -n {} -s 64", &[&stranger]);
    let refused_image = |image: &Path, errno, text: &str| {
        refused(&served, &["coalesce", "--image", image.to_str().unwrap()], errno, text);
    };
    refused_image(&leaf, libc::EINVAL, "is written: take a snapshot first");
    refused_image(&stranger, libc::EINVAL, "stranger.vhd is none of its images");
    refused_image(&folder.path().join("missing"), libc::EINVAL, "missing is none of its images");
    refused_image(&base, libc::EINVAL, "there is no image between");
    // Another tapdisk would find other data in the parent.
    let child = folder.path().join("child.vhd");
    good("snapshot -n {} -p {}", &[&child, &base]);
    let other = Served::start(&table(&child), BOTH);
    refused_image(&middle, libc::EBUSY, "0.vhd: another process uses it, and would find other data in it");
    assert!(locked(&base));
    stop(other, &child);
    pause(&served);
    refused_image(&middle, libc::EBUSY, "it is paused or being closed");
    unpause(&served);
    let said = ctl(&served, &["coalesce", "--wait", "--image", middle.to_str().unwrap()]);
    assert_eq!(said.code, 0, "{}", said.err);
    refused(&served, &["coalesce"], libc::EINVAL, "there is no image between");
    intact(&served, 3);
    for served in [Served::start("type = 'ram'\nsize = '1 MiB'", BOTH), Served::start(&table(&stranger), BOTH)] {
        refused(&served, &["coalesce"], libc::EINVAL, "there is no image between");
    }
}

#[test]
fn an_operators_pause_stays() {
    // During the merge: it is over before, in or after the pause, and the disk stays paused.
    let (served, folder) = made(4);
    let middle = image(folder.path(), 2);
    begin_slowly(&served, &middle);
    pause(&served);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!((state(&served).as_str(), &coalesce_report(&served)["stage"]), ("0x2a", &"merging".into()));
    unpause(&served);
    intact(&served, 4);
    cancel(&served);
    // A snapshot while it merges.
    begin_slowly(&served, &middle);
    let top = image(folder.path(), 4);
    snapshot(&served, &top, &image(folder.path(), 3));
    cancel(&served);
    intact(&served, 4);
    // At any moment of a short merge and of the change of the chain.
    let mut random = fastrand::Rng::with_seed(5);
    let mut guest = Guest::connect(&served.ring());
    for round in 0..8 {
        let next = image(folder.path(), 5 + round);
        // One that holds nothing is no parent.
        assert_eq!(guest.write((20 + round as u64) * 2048, &vec![round as u8; 32768]), 0);
        snapshot(&served, &next, &image(folder.path(), 4 + round));
        run(served.tap_ctl().arg("coalesce"));
        std::thread::sleep(Duration::from_millis(random.u64(..25)));
        pause(&served);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(state(&served), "0x2a");
        // What the merge needs, it may have open; the image that is written, nobody has.
        assert!(!locked(&next));
        unpause(&served);
        wait_stage(&served, "done");
        assert_eq!(numbers(&served)[0], format!("{}", 5 + round));
    }
    assert_eq!(numbers(&served), ["12", "3", "2", "1", "0"]);
    intact(&served, 4);
    for round in 0..8 {
        assert_eq!(guest.read((20 + round) * 2048, 32768), Ok(vec![round as u8; 32768]));
    }
    drop(guest);
    stop(served, &image(folder.path(), 12));
}

#[test]
fn a_chain_that_cannot_be_opened_again_is_tried_again() {
    let (served, folder) = made(3);
    let (leaf, away) = (image(folder.path(), 2), folder.path().join("away"));
    for paused in [false, true] {
        run(served.tap_ctl().args(["coalesce", "--rate", "1 MiB"]));
        std::fs::rename(&leaf, &away).unwrap();
        let report = wait_stage(&served, "failed");
        assert!(report["error"].as_str().unwrap().contains("2.vhd: "), "{report}");
        assert_eq!(state(&served), "0x2a");
        if paused {
            pause(&served);
        }
        std::fs::rename(&away, &leaf).unwrap();
        if paused {
            std::thread::sleep(Duration::from_millis(1500));
            assert_eq!(state(&served), "0x2a", "it is somebody's now");
            unpause(&served);
        }
        wait_for(|| (state(&served) == "0").then_some(()));
        intact(&served, 3);
    }
    coalesce(&served, &image(folder.path(), 1));
    intact(&served, 3);
    stop(served, &leaf);
}

#[test]
fn an_exit_ends_a_merge() {
    let (served, folder) = made(4);
    begin_slowly(&served, &image(folder.path(), 2));
    let (code, log) = served.stop();
    assert_eq!(code, Some(0), "{log}");
    let check = good("check -b -p -n {}", &[&image(folder.path(), 3)]);
    assert_eq!(check.lines().count(), 4, "{check}");
    let served = Served::start(&table(&image(folder.path(), 3)), BOTH);
    intact(&served, 4);
    coalesce(&served, &image(folder.path(), 2));
    intact(&served, 4);
}

#[test]
fn a_raw_base_is_merged_into() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let [base, middle, leaf] = ["base.img", "middle.vhd", "leaf.vhd"].map(path);
    std::fs::write(&base, vec![1; 64 << 20]).unwrap();
    good("snapshot -n {} -p {} -m", &[&middle, &base]);
    crate::common::vhd::write(&middle, 4 * MIB, 4 * MIB, 2);
    good("snapshot -n {} -p {}", &[&leaf, &middle]);
    let served = Served::start(&table(&leaf), BOTH);
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.write(6 * 2048, &[3; 4096]), 0);
    let flush = guest.entry(OP_FLUSH_DISKCACHE);
    assert_eq!(guest.status(&flush), 0);
    // Its time is what tells that a raw parent has changed: it must be another second.
    std::thread::sleep(Duration::from_millis(1100));
    begin_slowly(&served, &middle);
    pause(&served);
    unpause(&served);
    cancel(&served);
    pause(&served);
    unpause(&served);
    begin_slowly(&served, &middle);
    served.signal(Signal::SIGKILL);
    drop((guest, served));
    let served = Served::start(&table(&leaf), BOTH);
    let mut guest = Guest::connect(&served.ring());
    coalesce(&served, &middle);
    assert_eq!(chain(&served), [leaf.display().to_string(), base.display().to_string()]);
    let expected = [(0, 1), (4 * 2048, 2), (6 * 2048, 3), (6 * 2048 + 8, 2), (8 * 2048, 1)];
    let intact = |guest: &mut Guest| {
        for (sector, byte) in expected {
            assert_eq!(guest.read(sector, 4096), Ok(vec![byte; 4096]), "sector {sector}");
        }
    };
    intact(&mut guest);
    pause(&served);
    unpause(&served);
    intact(&mut guest);
    drop(guest);
    stop(served, &leaf);
    let served = Served::start(&table(&leaf), BOTH);
    intact(&mut Guest::connect(&served.ring()));
}

#[test]
fn a_full_file_system_leaves_the_chain_as_it_was() {
    let Some(fs) = SmallFs::new("24m") else { return };
    let folder = fs.path("");
    let served = chain_of(&folder, 3, "");
    let filler = fs.fill("filler");
    let said = ctl(&served, &["coalesce", "--wait"]);
    assert!(said.code == libc::EIO && said.err.contains("No space left"), "{} {}", said.code, said.err);
    assert_eq!((numbers(&served).len(), &coalesce_report(&served)["stage"]), (3, &"failed".into()));
    intact(&served, 3);
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.write(4 * 2048, &[9; 512]), 0, "the disk goes on");
    let base = good("check -b -n {}", &[&image(&folder, 0)]);
    assert!(base.ends_with(" is valid\n"), "{base}");
    std::fs::remove_file(&filler).unwrap();
    coalesce(&served, &image(&folder, 1));
    intact(&served, 3);
    assert_eq!(guest.read(4 * 2048, 512), Ok(vec![9; 512]));
    drop(guest);
    stop(served, &image(&folder, 2));
}
