//! A tapdisk that is killed again and again under load, and between that snapshots as a storage manager takes them: what differs between two
//! snapshots is in the log of that time, and what nobody touched is not.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use super::{BLOCK, bits, create, header};
use crate::common::PATIENCE;
use crate::common::guest::{Guest, page};
use crate::common::killed::{kill_after, seed};
use crate::common::live::*;
use crate::common::served::{Served, folder, run, tool};
use crate::common::vhd::{good, write};
use crate::common::vhd_made::{content, table};
use fastrand::Rng;
use nix::sys::signal::Signal::SIGKILL;
use tapdisk::frontend::blkif::wire::{Entry, OP_DISCARD, OP_FLUSH_DISKCACHE, OP_WRITE, Segment};
use tempfile::TempDir;

const SIZE: u64 = 48 << 20;
const BLOCKS: u64 = SIZE / BLOCK;

/// A disk, the storage manager that takes its snapshots, and its guest.
struct World {
    folder: TempDir,
    served: Served,
    /// Images of the chain; 0: it is raw.
    images: usize,
    snapshots: usize,
    random: Rng,
    number: u64,
}

impl World {
    fn new(images: usize, engine: &str, seed: u64) -> World {
        let folder = folder();
        let path = |name: &str| folder.path().join(name);
        create(&path("D.cbtlog"), SIZE);
        for number in 0..images {
            match number {
                0 => good("create -n {} -s 48", &[&path("0.vhd")]),
                _ => {
                    let [new, top] = [number, number - 1].map(|number| path(&format!("{number}.vhd")));
                    good("snapshot -e -n {} -p {}", &[&new, &top])
                }
            };
            write(&path(&format!("{number}.vhd")), number as u64 * (5 << 20), 3 << 20, 0xa0 | number as u8);
        }
        let image = match images {
            0 => format!("path = '{}'\ncreate = '48 MiB'", path("disk").display()),
            _ => table(&path(&format!("{}.vhd", images - 1))),
        };
        let image = format!("{image}\nchanged_blocks = '{}'", path("D.cbtlog").display());
        // Both filters: requests wait for a limit now and then.
        let limit = "[throttle.all]\nrequests_per_s = 4000\nrequests_burst = 80\n";
        let served = Served::start(&image, &format!("{BOTH}[engine]\nname = '{engine}'\n{limit}"));
        World { folder, served, images, snapshots: 0, random: Rng::with_seed(seed), number: 0 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Sixteen requests at a time, on blocks one after the other so that there are always new ones, until the tapdisk is gone.
    fn write_until_it_is_gone(&mut self, blocks: &Range<u64>) {
        let mut guest = Guest::connect(&self.served.ring());
        let killer = kill_after(&self.served, Duration::from_micros(self.random.u64(2_000..40_000)));
        let mut at = self.random.u64(blocks.clone());
        loop {
            let entries: Vec<_> = (0..16).map(|place| self.entry(&mut guest, place, &mut at, blocks)).collect();
            entries.iter().for_each(|entry| guest.queue.ring.push(entry));
            let answered = |guest: &mut Guest| guest.try_response(PATIENCE).is_some();
            if guest.queue.publish().is_err() || !entries.iter().all(|_| answered(&mut guest)) {
                break;
            }
        }
        killer.join().unwrap();
    }

    fn entry(&mut self, guest: &mut Guest, place: u32, at: &mut u64, blocks: &Range<u64>) -> Entry {
        self.number += 1;
        // Most are the first in their block, and some reach into the next one, or by a discard into the one behind that.
        *at = if *at + 3 >= blocks.end { blocks.start } else { *at + 1 };
        let pages = self.random.u32(1..=8);
        let sector = *at * BLOCK / 512 + self.random.u64(..128 - 7);
        match self.random.u32(..20) {
            0 => guest.entry(OP_FLUSH_DISKCACHE),
            1 => guest.entry(OP_DISCARD).with_sector(sector).with_discard(0, self.random.u64(1..200)),
            _ => {
                let first = place * 8;
                let bytes = self.number.to_le_bytes().repeat(512);
                (first..first + pages).for_each(|page| {
                    guest.queue.memory().write(guest.queue.page_at(page), &bytes);
                });
                let segments: Vec<Segment> = (first..first + pages).map(page).collect();
                guest.entry(OP_WRITE).with_sector(sector).with_segments(pages as u8, &segments)
            }
        }
    }

    /// What the storage manager does for a snapshot. Gives the log of the time before it.
    fn snapshot(&mut self) -> PathBuf {
        self.snapshots += 1;
        let set = |log: &PathBuf, option: &str, value: &str| {
            run(tool("cbt-util").args(["set", option, value, "-n"]).arg(log));
        };
        let [log, old] =
            ["D".to_owned(), format!("S{}", self.snapshots)].map(|name| self.path(&format!("{name}.cbtlog")));
        let of_it = header(&log);
        pause(&self.served);
        assert!(of_it == header(&log) && of_it[32..36] == [0; 4], "the header is the storage manager's");
        std::fs::rename(&log, &old).unwrap();
        set(&old, "-f", "1");
        create(&log, SIZE);
        set(&log, "-p", "6ba7b810-9dad-11d1-80b4-00c04fd430c8");
        set(&old, "-c", "6ba7b811-9dad-11d1-80b4-00c04fd430c8");
        set(&log, "-f", "0");
        let log = log.to_str().unwrap();
        if self.images == 0 {
            run(self.served.tap_ctl().args(["unpause", "-c", log]));
        } else {
            let [new, top] = [self.images, self.images - 1].map(|number| self.path(&format!("{number}.vhd")));
            self.images += 1;
            good("snapshot -e -n {} -p {}", &[&new, &top]);
            run(self.served.tap_ctl().args(["unpause", "-a", &name("vhd", &new), "-c", log]));
        }
        old
    }

    fn content(&self) -> Vec<u8> {
        content(&self.served, self.folder.path())
    }
}

fn what_differs_is_marked(images: usize, first_seed: u64) {
    for (number, engine) in (0..).zip(["aio", "io_uring", "threads"]) {
        let seed = seed().unwrap_or(first_seed + number);
        let mut world = World::new(images, engine, seed);
        let mut before = world.content();
        let (mut differing, mut round) = (0, 0);
        // Until there was something to see: a busy host gets little done before it is killed.
        while round < 3 || differing <= 30 {
            assert!(round < 50, "{differing} blocks differ: what was there to see?");
            // A third of the disk, which is another one each time, with what is before and behind it untouched.
            let begin = world.random.u64(1..BLOCKS * 2 / 3 - 1);
            let blocks = begin..begin + BLOCKS / 3;
            for _ in 0..2 {
                world.write_until_it_is_gone(&blocks);
                world.served.start_again(SIGKILL).unwrap();
            }
            let now = world.content();
            let log = world.snapshot();
            let set = bits(&log);
            let context = format!("{images} images, {engine}, seed {seed}, round {round}");
            for (block, (old, new)) in before.chunks(BLOCK as usize).zip(now.chunks(BLOCK as usize)).enumerate() {
                assert!(
                    old == new || set[block],
                    "{context}: block {block} has changed, and the log does not say so"
                );
                assert!(!set[block] || blocks.contains(&(block as u64)), "{context}: block {block} was not touched");
                differing += usize::from(old != new);
            }
            before = now;
            round += 1;
        }
    }
}

#[test]
#[ignore = "slow"]
fn killed_under_load_over_a_raw_image_the_log_has_all_that_has_changed() {
    what_differs_is_marked(0, 1);
}

#[test]
#[ignore = "slow"]
fn killed_under_load_over_a_vhd_image_the_log_has_all_that_has_changed() {
    what_differs_is_marked(1, 11);
}

#[test]
#[ignore = "slow"]
fn killed_under_load_over_a_chain_of_five_images_the_log_has_all_that_has_changed() {
    what_differs_is_marked(5, 21);
}
