//! What the storage managers of XenServer and XCP-ng do below and with a disk in use, whole, with every program killed at some moment: nothing
//! is lost, and the next run of the sequence completes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::common::live::*;
use crate::common::served::{Served, folder, run, tool};
use crate::common::vhd::good;
use crate::common::vhd_made::{stop, table};
use fastrand::Rng;
use nix::sys::signal::Signal::SIGKILL;
use tempfile::TempDir;

struct Manager {
    served: Served,
    folder: TempDir,
    random: Rng,
}

impl Manager {
    fn new(seed: u64) -> Manager {
        let folder = folder();
        let first = folder.path().join("0.vhd");
        good("create -n {} -s 64", &[&first]);
        let manager = Manager { served: Served::start(&table(&first), BOTH), folder, random: Rng::with_seed(seed) };
        keep(&manager.served);
        manager
    }

    fn image(&self, number: usize) -> PathBuf {
        self.folder.path().join(format!("{number}.vhd"))
    }

    fn snapshots(&self, from: usize, to: usize) {
        for number in from + 1..=to {
            snapshot(&self.served, &self.image(number), &self.image(number - 1));
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Runs vhd-util, which is killed some times before it comes to its end.
    fn killed(&mut self, words: &str, images: &[&Path]) {
        for _ in 0..self.random.usize(1..4) {
            let mut command = tool("vhd-util");
            let mut images = images.iter();
            for word in words.split_whitespace() {
                if word == "{}" {
                    command.arg(images.next().unwrap())
                } else {
                    command.arg(word)
                };
            }
            let mut child = command.stdout(std::process::Stdio::null()).spawn().unwrap();
            std::thread::sleep(Duration::from_micros(self.random.u64(..8000)));
            // It may be done.
            let _ = child.kill();
            child.wait().unwrap();
        }
        good(words, images);
    }

    /// Merges an image that is not the leaf into its parent, and gives its child, perhaps the running leaf, that parent.
    fn leave_out(&mut self, [child, image, parent]: [usize; 3]) {
        let [child, image, parent] = [child, image, parent].map(|number| self.image(number));
        self.killed("set -f hidden -v 1 -n {}", &[&image]);
        self.killed("coalesce -n {}", &[&image]);
        self.killed("modify -n {} -p {}", &[&child, &parent]);
        pause(&self.served);
        unpause(&self.served);
        std::fs::remove_file(&image).unwrap();
    }
}

#[test]
fn a_chain_is_shortened_below_a_running_leaf() {
    for (seed, order) in [(1, [3, 2, 1]), (2, [1, 2, 3]), (3, [2, 3, 1])] {
        let mut manager = Manager::new(seed);
        let load = Load::start(&manager.served);
        manager.snapshots(0, 4);
        let mut chain_now = vec![4, 3, 2, 1, 0];
        for number in order {
            let at = chain_now.iter().position(|each| *each == number).unwrap();
            manager.leave_out([chain_now[at - 1], number, chain_now[at + 1]]);
            chain_now.remove(at);
            assert_eq!(chain(&manager.served).len(), chain_now.len());
        }
        load.finish();
        kept(&manager.served);
        let (leaf, base) = (manager.image(4), manager.image(0));
        stop(manager.served, &leaf);
        let check = good("check -b -p -n {}", &[&leaf]);
        assert!(check.lines().count() == 2 && check.lines().all(|line| line.ends_with(" is valid")), "{check}");
        kept(&Served::start(&table(&leaf), BOTH));
        assert!(base.exists());
    }
}

#[test]
fn a_leaf_that_is_relinked_and_killed_has_its_new_parent() {
    let mut manager = Manager::new(4);
    manager.snapshots(0, 2);
    let [leaf, middle, base] = [2, 1, 0].map(|number| manager.image(number));
    manager.killed("coalesce -n {}", &[&middle]);
    manager.killed("modify -n {} -p {}", &[&leaf, &base]);
    std::fs::remove_file(&middle).unwrap();
    manager.served.start_again(SIGKILL).unwrap();
    assert_eq!(chain(&manager.served).len(), 2);
    kept(&manager.served);
    // What is hidden while it is in use stays hidden, and shown.
    for hidden in ["1", "0"] {
        run(tool("vhd-util").args(["set", "-f", "hidden", "-v", hidden, "-n"]).arg(&leaf));
        pause(&manager.served);
        assert_eq!(good("query -f -n {}", &[&leaf]), format!("hidden: {hidden}\n"));
        unpause(&manager.served);
    }
    kept(&manager.served);
}

#[test]
fn a_leaf_is_merged_into_its_parent_while_its_disk_is_paused() {
    let mut manager = Manager::new(5);
    let load = Load::start(&manager.served);
    manager.snapshots(0, 1);
    load.finish();
    let [leaf, base] = [1, 0].map(|number| manager.image(number));
    pause(&manager.served);
    manager.served.start_again(SIGKILL).unwrap();
    assert_eq!(state(&manager.served), "0x2a");
    manager.killed("coalesce -n {}", &[&leaf]);
    run(manager.served.tap_ctl().args(["unpause", "-a"]).arg(format!("vhd:{}", base.display())));
    std::fs::remove_file(&leaf).unwrap();
    manager.served.start_again(SIGKILL).unwrap();
    kept(&manager.served);
    let load = Load::start(&manager.served);
    load.finish();
    stop(manager.served, &base);
    assert_eq!(good("check -b -n {}", &[&base]), format!("{} is valid\n", base.display()));
}
