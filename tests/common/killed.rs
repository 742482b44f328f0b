//! Writes of which it is known what was acknowledged as flushed, to a tapdisk that is killed meanwhile.

use std::collections::{HashMap, HashSet};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tapdisk::frontend::blkif::wire::{OP_FLUSH_DISKCACHE, OP_WRITE, Segment};

use super::PATIENCE;
use super::guest::{Guest, page};
use super::served::Served;

/// The seed that somebody wants.
pub fn seed() -> Option<u64> {
    std::env::var("TAPDISK_TEST_SEED").ok().map(|seed| seed.parse().unwrap())
}

/// Kills a tapdisk after a while.
pub fn kill_after(served: &Served, pause: Duration) -> JoinHandle<()> {
    let pid = Pid::from_raw(served.pid());
    std::thread::spawn(move || {
        std::thread::sleep(pause);
        kill(pid, Signal::SIGKILL).unwrap();
    })
}

/// Sectors that numbers are written to.
pub struct Numbered {
    /// How many.
    sectors: u64,
    /// How many sectors each is after the one before.
    apart: u64,
    random: fastrand::Rng,
    /// That was written last.
    number: u64,
    /// Of each sector the number that was acknowledged as flushed last, and the last one that was sent.
    flushed: HashMap<u64, (u64, u64)>,
    /// How often a write was acknowledged as flushed.
    pub acknowledged: usize,
}

impl Numbered {
    pub fn new(sectors: u64, apart: u64, seed: u64) -> Numbered {
        let (random, flushed) = (fastrand::Rng::with_seed(seed), HashMap::new());
        Numbered { sectors, apart, random, number: 0, flushed, acknowledged: 0 }
    }

    /// All that was acknowledged as flushed is there, or what was written after it.
    pub fn check(&self, guest: &mut Guest, context: &str) {
        for (&sector, &(least, most)) in &self.flushed {
            let data = guest.read(sector * self.apart, 512).unwrap();
            let numbers: Vec<_> = data.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
            assert!(numbers.iter().all(|n| *n == numbers[0]), "{context}: sector {sector} is torn: {numbers:?}");
            assert!(
                (least..=most).contains(&numbers[0]),
                "{context}: sector {sector} has {}, {least} was flushed and {most} written",
                numbers[0]
            );
        }
    }

    /// Writes until the server is gone.
    pub fn write_until_it_is_gone(&mut self, guest: &mut Guest) {
        for (sector, (least, most)) in self.write(guest) {
            let entry = self.flushed.entry(sector).or_default();
            *entry = (entry.0.max(least), most);
            self.acknowledged += usize::from(least > 0);
        }
    }

    /// Writes numbers to sectors, sixteen at a time and then a flush, until the server is gone. Gives for each sector the number
    /// that was acknowledged as flushed last, and the last one that was sent.
    fn write(&mut self, guest: &mut Guest) -> HashMap<u64, (u64, u64)> {
        let mut sectors: HashMap<u64, (u64, u64)> = HashMap::new();
        let segment = |gref| Segment { last_sect: 0, ..page(gref) };
        loop {
            let chosen: HashSet<u64> = (0..16).map(|_| self.random.u64(..self.sectors)).collect();
            let mut written = Vec::new();
            for (i, &sector) in (0u32..).zip(&chosen) {
                self.number += 1;
                guest.queue.memory().write(guest.queue.page_at(i), &self.number.to_le_bytes().repeat(64));
                let entry = guest.entry(OP_WRITE).with_sector(sector * self.apart).with_segments(1, &[segment(i)]);
                guest.queue.ring.push(&entry);
                sectors.entry(sector).or_default().1 = self.number;
                written.push((sector, self.number));
            }
            let all = |guest: &mut Guest, count| {
                (0..count).all(|_| matches!(guest.try_response(PATIENCE), Some(r) if r.status == 0))
            };
            if guest.queue.publish().is_err() || !all(guest, written.len()) {
                return sectors;
            }
            let flush = guest.entry(OP_FLUSH_DISKCACHE);
            guest.queue.ring.push(&flush);
            if guest.queue.publish().is_err() || !all(guest, 1) {
                return sectors;
            }
            for (sector, number) in written {
                sectors.entry(sector).or_default().0 = number;
            }
        }
    }
}
