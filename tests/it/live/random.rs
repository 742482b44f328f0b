//! Disks whose chains are changed while they are used: killed at any moment, and against a model.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use crate::common::guest::Guest;
use crate::common::killed::{Numbered, kill_after, seed};
use crate::common::live::*;
use crate::common::served::{Served, folder, output, run};
use crate::common::vhd::{good, vhd_util};
use crate::common::vhd_made::table;
use drivers::vhd::Parts;
use fastrand::Rng;
use nix::sys::signal::Signal;
use serde_json::Value;
use tapdisk::chain;
use tapdisk::frontend::blkif::wire::{OP_DISCARD, OP_FLUSH_DISKCACHE};

/// Images of a chain, the leaf first.
fn images(top: &Path) -> Vec<PathBuf> {
    chain::chain(top, &chain::Rules::tool(&[], Parts::Heads)).unwrap().into_iter().map(|layer| layer.path).collect()
}

/// A storage manager, whose commands fail when the tapdisk is gone.
struct Manager {
    folder: PathBuf,
    /// The image that is served, or was last.
    top: PathBuf,
    made: u32,
    random: Rng,
    snapshots: u32,
    merged: u32,
}

impl Manager {
    fn new(folder: &Path, raw: bool, seed: u64) -> Manager {
        let (base, top) = (folder.join(if raw { "base.img" } else { "base.vhd" }), folder.join("0.vhd"));
        if raw {
            std::fs::File::create(&base).unwrap().set_len(64 << 20).unwrap();
            good("snapshot -n {} -p {} -m", &[&top, &base]);
        } else {
            good("create -n {} -s 64", &[&base]);
            good("snapshot -n {} -p {} -e", &[&top, &base]);
        }
        let random = Rng::with_seed(seed);
        Manager { folder: folder.to_owned(), top, made: 0, random, snapshots: 0, merged: 0 }
    }

    /// Snapshots and merges until the tapdisk is gone.
    fn work(&mut self, directory: &Path) {
        while self.one(directory) {}
    }

    fn ctl(directory: &Path, words: &[&str], image: &Path) -> Output {
        let mut command = crate::common::served::tool("tap-ctl");
        output(command.arg("--directory").arg(directory).args(words).arg(image))
    }

    fn one(&mut self, directory: &Path) -> bool {
        let chain = images(&self.top);
        if chain.len() > 6 || chain.len() > 2 && self.random.bool() {
            let image = &chain[self.random.usize(1..chain.len() - 1)];
            let done = Self::ctl(directory, &["coalesce", "--wait", "--image"], image);
            if done.status.success() {
                std::fs::remove_file(image).unwrap();
                self.merged += 1;
            }
            return done.status.success();
        }
        let mut pause = crate::common::served::tool("tap-ctl");
        if !output(pause.arg("--directory").arg(directory).arg("pause")).status.success() {
            return false;
        }
        self.made += 1;
        let new = self.folder.join(format!("{}.vhd", self.made));
        good("snapshot -n {} -p {}", &[&new, &self.top]);
        // From now on it is this one, whether it is resumed or begins again.
        let resumed = Self::ctl(directory, &["unpause", "-a"], Path::new(&name("vhd", &new)));
        self.top = new;
        self.snapshots += u32::from(resumed.status.success());
        resumed.status.success()
    }
}

fn killed_again_and_again(raw: bool, seed: u64) {
    let folder = folder();
    let mut manager = Manager::new(folder.path(), raw, seed);
    let mut numbered = Numbered::new(1024, 127, seed);
    let mut random = Rng::with_seed(seed);
    let mut round = 0;
    // On a busy host less comes to its end before it is killed.
    while round < 15 || round < 150 && (manager.snapshots <= 3 || manager.merged <= 3 || numbered.acknowledged <= 20)
    {
        round += 1;
        let served = Served::start(&table(&manager.top), BOTH);
        let mut guest = Guest::connect(&served.ring());
        numbered.check(&mut guest, &format!("seed {seed}, round {round}"));
        let killer = kill_after(&served, Duration::from_millis(random.u64(20..600)));
        let directory = served.sockets().to_owned();
        let worker = std::thread::spawn(move || {
            manager.work(&directory);
            manager
        });
        numbered.write_until_it_is_gone(&mut guest);
        killer.join().unwrap();
        manager = worker.join().unwrap();
        drop(served);
        let said = vhd_util("check -i -p -n {}", &[&manager.top]);
        assert!(said.code == 0, "seed {seed}, round {round}: {}{}", said.out, said.err);
        assert!(said.out.lines().all(|line| line.ends_with(" is valid")), "{}", said.out);
    }
    // All of it into the base, also what was interrupted.
    let served = Served::start(&table(&manager.top), BOTH);
    while images(&manager.top).len() > 2 {
        coalesce(&served, &images(&manager.top)[1]);
    }
    numbered.check(&mut Guest::connect(&served.ring()), &format!("seed {seed}, at the end"));
    crate::common::vhd_made::stop(served, &manager.top);
    let Manager { snapshots, merged, .. } = manager;
    let acknowledged = numbered.acknowledged;
    assert!(snapshots > 3 && merged > 3 && acknowledged > 20, "{snapshots} {merged} {acknowledged}");
}

#[test]
#[ignore = "slow"]
fn killed_while_its_chain_changes_it_has_what_was_flushed() {
    killed_again_and_again(false, seed().unwrap_or(1));
}

#[test]
fn killed_while_its_chain_on_a_raw_base_changes_it_has_what_was_flushed() {
    killed_again_and_again(true, seed().unwrap_or(2));
}

/// Sectors of a request, at most.
const MOST: u64 = 88;
/// Images of the chain, at most.
const DEEPEST: usize = 8;

/// A disk, and what it must hold.
struct Checked {
    folder: PathBuf,
    served: Option<Served>,
    guest: Option<Guest>,
    top: PathBuf,
    made: u32,
    model: Vec<u8>,
    random: Rng,
    /// What was done, to be shown.
    steps: Vec<String>,
    merged: u32,
}

impl Drop for Checked {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.steps.join("\n"));
            if let Some(served) = &self.served {
                eprintln!("{}", served.log());
            }
        }
    }
}

impl Checked {
    fn new(folder: &Path, seed: u64) -> Checked {
        let top = folder.join("0.vhd");
        good("create -n {} -s 16 -S 128", &[&top]);
        let (folder, random, model) = (folder.to_owned(), Rng::with_seed(seed), vec![0; 16 << 20]);
        let steps = vec![format!("seed {seed}")];
        let mut new = Checked { folder, served: None, guest: None, top, made: 0, model, random, steps, merged: 0 };
        new.open();
        new
    }

    fn open(&mut self) {
        let served = Served::start(&table(&self.top), BOTH);
        self.guest = Some(Guest::connect(&served.ring()));
        self.served = Some(served);
    }

    fn served(&self) -> &Served {
        self.served.as_ref().unwrap()
    }

    fn guest(&mut self) -> &mut Guest {
        self.guest.as_mut().unwrap()
    }

    fn range(&mut self) -> (u64, usize) {
        let sectors = self.random.u64(1..=MOST);
        let sector = self.random.u64(..=self.model.len() as u64 / 512 - sectors);
        (sector, sectors as usize * 512)
    }

    fn part(&mut self, (sector, len): (u64, usize)) -> &mut [u8] {
        &mut self.model[sector as usize * 512..][..len]
    }

    fn write(&mut self) {
        let range = self.range();
        let mut data = vec![0; range.1];
        self.random.fill(&mut data);
        assert_eq!(self.guest().write(range.0, &data), 0);
        self.part(range).copy_from_slice(&data);
    }

    fn read(&mut self) {
        let range = self.range();
        let data = self.guest().read(range.0, range.1).unwrap();
        assert!(data == self.part(range), "{range:?}");
    }

    /// Each sector is there still, or is zeros; and stays what it is.
    fn discard(&mut self) {
        let sectors = self.random.u64(1..8192).min(self.model.len() as u64 / 512);
        let sector = self.random.u64(..=self.model.len() as u64 / 512 - sectors);
        let entry = self.guest().entry(OP_DISCARD).with_sector(sector).with_discard(0, sectors);
        assert_eq!(self.guest().status(&entry), 0);
        for at in (sector..sector + sectors).step_by(MOST as usize) {
            let range = (at, (sector + sectors - at).min(MOST) as usize * 512);
            let data = self.guest().read(range.0, range.1).unwrap();
            let old = self.part(range);
            let each = old.chunks(512).zip(data.chunks(512));
            for (i, (old, new)) in each.enumerate() {
                assert!(new == old || new.iter().all(|byte| *byte == 0), "sector {}", at + i as u64);
            }
            old.copy_from_slice(&data);
        }
    }

    fn all(&mut self) {
        for sector in (0..self.model.len() as u64 / 512).step_by(64) {
            let data = self.guest().read(sector, 32768).unwrap();
            assert!(data == self.part((sector, 32768)), "sector {sector}");
        }
    }

    fn snapshot(&mut self) {
        if images(&self.top).len() >= DEEPEST {
            return self.merge();
        }
        self.made += 1;
        let new = self.folder.join(format!("{}.vhd", self.made));
        pause(self.served());
        good("snapshot -n {} -p {} -S 128", &[&new, &self.top]);
        unpause_with(self.served(), &new);
        self.top = new;
    }

    /// Begins a merge if none is under way, and may wait for it, or end it.
    fn merge(&mut self) {
        let chain = images(&self.top);
        if chain.len() < 3 {
            return;
        }
        let image = self.random.usize(1..chain.len() - 1);
        let begun = output(self.served().tap_ctl().args(["coalesce", "--image"]).arg(&chain[image]));
        // One that is under way may have come to its end since the chain was looked at.
        let text = String::from_utf8_lossy(&begun.stderr);
        let late = ["it is coalescing already", "is none of its images", "there is no image between"];
        assert!(begun.status.success() || late.iter().any(|late| text.contains(late)), "{text}");
        match self.random.u32(..4) {
            0 => {}
            1 => drop(run(self.served().tap_ctl().args(["coalesce", "--cancel"]))),
            _ => self.merged(),
        }
    }

    /// Waits for the end of a merge.
    fn merged(&mut self) {
        let over = |report: &Value| ["done", "failed", "none"].contains(&report["stage"].as_str().unwrap());
        let report = wait_for(|| Some(coalesce_report(self.served())).filter(over));
        self.steps.push(report.to_string());
        self.merged += u32::from(report["stage"] == "done");
        let error = report["error"].as_str().unwrap_or("canceled");
        if error.contains("resize it first") {
            // As storage managers do while the disk is in use.
            let mib = (self.model.len() >> 20).to_string();
            let parent = PathBuf::from(report["parent"].as_str().unwrap());
            good(&format!("resize -f -n {{}} -s {mib}"), &[&parent]);
            coalesce(self.served(), Path::new(report["image"].as_str().unwrap()));
        } else {
            assert!(error.contains("canceled"), "{report}");
        }
    }

    fn grow(&mut self) {
        let mib = (self.model.len() >> 20) + 2 * self.random.usize(1..3);
        if mib > 128 {
            return;
        }
        pause(self.served());
        good(&format!("resize -f -n {{}} -s {mib}"), &[&self.top]);
        unpause(self.served());
        self.model.resize(mib << 20, 0);
    }

    fn again(&mut self) {
        let flush = self.guest().entry(OP_FLUSH_DISKCACHE);
        assert_eq!(self.guest().status(&flush), 0);
        self.guest = None;
        let served = self.served.take().unwrap();
        if self.random.bool() {
            served.signal(Signal::SIGKILL);
            drop(served);
        } else {
            let (code, log) = served.stop();
            assert_eq!(code, Some(0), "{log}");
            // A merge that was ended leaves data that its bitmap does not have, and a killed one no footer.
            good("check -i -p -n {}", &[&self.top]);
        }
        self.open();
    }
}

/// How likely a step is, and what it does.
type Kind = (u32, &'static str, fn(&mut Checked));

fn like_the_model(seed: u64) {
    let folder = folder();
    let mut disk = Checked::new(folder.path(), seed);
    for step in 0..300 {
        let kinds: [Kind; 8] = [
            (120, "write", Checked::write),
            (60, "read", Checked::read),
            (20, "discard", Checked::discard),
            (25, "snapshot", Checked::snapshot),
            (30, "merge", Checked::merge),
            (8, "grow", Checked::grow),
            (12, "again", Checked::again),
            (10, "all", Checked::all),
        ];
        let mut choice = disk.random.u32(..kinds.iter().map(|kind| kind.0).sum::<u32>());
        let (_, name, what) =
            kinds.into_iter().find(|kind| choice.checked_sub(kind.0).map(|n| choice = n).is_none()).unwrap();
        disk.steps.push(format!("{step}: {name}"));
        what(&mut disk);
    }
    disk.all();
    while images(&disk.top).len() > 2 {
        let below = images(&disk.top)[1].clone();
        let _ = output(disk.served().tap_ctl().args(["coalesce", "--image"]).arg(below));
        disk.merged();
    }
    disk.again();
    disk.all();
    assert!(disk.merged > 0, "{} were merged", disk.merged);
}

#[test]
#[ignore = "slow"]
fn a_disk_whose_chain_changes_is_like_its_model() {
    let seeds = seed().map_or(vec![1, 2, fastrand::u64(..1 << 32)], |seed| vec![seed]);
    seeds.into_iter().for_each(like_the_model);
}
