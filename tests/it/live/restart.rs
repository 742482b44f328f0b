//! Disks whose process ends while they are paused, or serve another image than their configuration says, and is started again.

use std::path::{Path, PathBuf};

use crate::common::guest::Guest;
use crate::common::live::*;
use crate::common::served::{Served, folder, run};
use crate::common::vhd::good;
use crate::common::vhd_made::table;
use nix::sys::signal::Signal::{self, SIGKILL, SIGTERM};
use tempfile::TempDir;

/// A disk that began with a.vhd, which has ones, and has b.vhd, a snapshot, with twos in its first sector.
struct Disk {
    served: Served,
    folder: TempDir,
}

impl Disk {
    fn new() -> Disk {
        let folder = folder();
        let first = folder.path().join("a.vhd");
        good("create -n {} -s 16", &[&first]);
        Disk { served: Served::start(&table(&first), BOTH), folder }
    }

    fn with_snapshot() -> Disk {
        let disk = Disk::new();
        disk.write(&[1; 1024]);
        pause(&disk.served);
        disk.snapshot();
        disk.unpause_with("b.vhd");
        disk.write(&[2; 512]);
        disk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn snapshot(&self) {
        good("snapshot -n {} -p {}", &[&self.path("b.vhd"), &self.path("a.vhd")]);
    }

    fn unpause_with(&self, name: &str) {
        run(self.served.tap_ctl().args(["unpause", "-a"]).arg(format!("vhd:{}", self.path(name).display())));
    }

    fn write(&self, bytes: &[u8]) {
        assert_eq!(Guest::connect(&self.served.ring()).write(0, bytes), 0);
    }

    fn first_bytes(&self) -> (u8, u8) {
        let read = Guest::connect(&self.served.ring()).read(0, 1024).unwrap();
        (read[0], read[512])
    }

    fn start_again(&mut self, signal: Signal) {
        self.served.start_again(signal).unwrap();
    }

    /// The record of what it serves, if there is one.
    fn record(&self) -> Option<PathBuf> {
        let folder = self.served.sockets().join("tapdisk");
        let mut files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        files.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with("served-"))
    }

    fn configure(&self, name: &str) {
        let file = self.served.configuration();
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replace("a.vhd", name)).unwrap();
    }
}

#[test]
fn what_was_served_last_is_served_again() {
    let mut disk = Disk::with_snapshot();
    let parent = std::fs::read(disk.path("a.vhd")).unwrap();
    for signal in [SIGKILL, SIGTERM, SIGKILL] {
        disk.start_again(signal);
        assert_eq!(disk.first_bytes(), (2, 1), "{signal}");
        disk.write(&[2; 512]);
    }
    assert!(std::fs::read(disk.path("a.vhd")).unwrap() == parent, "the parent was written");
    disk.served.wait_log("goes on with the image and the log of changed blocks that it had last");
    // Back where its configuration has it, there is nothing to tell.
    pause(&disk.served);
    good("coalesce -n {}", &[&disk.path("b.vhd")]);
    disk.unpause_with("a.vhd");
    assert_eq!(disk.record(), None);
    std::fs::remove_file(disk.path("b.vhd")).unwrap();
    disk.start_again(SIGKILL);
    assert_eq!(disk.first_bytes(), (2, 1));
}

#[test]
fn a_disk_that_was_paused_begins_paused_and_its_image_is_anybodys() {
    let mut disk = Disk::new();
    disk.write(&[1; 1024]);
    pause(&disk.served);
    for signal in [SIGKILL, SIGTERM] {
        disk.start_again(signal);
        assert_eq!(state(&disk.served), "0x2a", "{signal}");
    }
    disk.snapshot();
    good("modify -z -n {}", &[&disk.path("b.vhd")]);
    let mut guest = Guest::connect(&disk.served.ring());
    disk.unpause_with("b.vhd");
    assert_eq!(guest.read(0, 512), Ok(vec![1; 512]), "a client that came meanwhile has waited");
    assert_eq!(guest.write(0, &[2; 512]), 0);
    drop(guest);
    disk.start_again(SIGKILL);
    assert_eq!((state(&disk.served).as_str(), disk.first_bytes()), ("0", (2, 1)));
    // With the image that it had.
    pause(&disk.served);
    disk.start_again(SIGKILL);
    unpause(&disk.served);
    assert_eq!(disk.first_bytes(), (2, 1));
    assert_eq!(disk.served.stop().0, Some(0));
}

#[test]
fn a_disk_whose_image_was_renamed_during_a_pause_begins_paused() {
    // As the storage manager for files makes a snapshot: the name goes on with the new image.
    let mut disk = Disk::new();
    disk.write(&[1; 1024]);
    pause(&disk.served);
    std::fs::rename(disk.path("a.vhd"), disk.path("base.vhd")).unwrap();
    good("snapshot -n {} -p {}", &[&disk.path("a.vhd"), &disk.path("base.vhd")]);
    disk.start_again(SIGKILL);
    assert_eq!(state(&disk.served), "0x2a");
    unpause(&disk.served);
    assert_eq!((disk.first_bytes(), disk.record()), ((1, 1), None));
}

#[test]
fn a_pause_that_overtakes_a_resume_is_on_record() {
    for seed in 0..20 {
        let mut disk = Disk::with_snapshot();
        pause(&disk.served);
        let resuming = ask_resume(&disk.served, &name("vhd", &disk.path("b.vhd")));
        std::thread::sleep(std::time::Duration::from_micros(700 * seed));
        pause(&disk.served);
        assert!([0, libc::EBUSY].contains(&resuming.errno()));
        disk.start_again(SIGKILL);
        assert_eq!(state(&disk.served), "0x2a", "{seed}");
        run(disk.served.tap_ctl().arg("unpause"));
        assert_eq!(disk.first_bytes(), (2, 1));
    }
}

#[test]
fn a_pause_that_is_over_leaves_no_record() {
    let disk = Disk::new();
    pause(&disk.served);
    let record = disk.record().unwrap();
    let name = disk.served.configuration().canonicalize().unwrap();
    let text = std::fs::read_to_string(&record).unwrap();
    assert!(
        text.contains(&format!("configuration = \"{}\"", name.display())) && text.contains("paused = true"),
        "{text}"
    );
    unpause(&disk.served);
    assert_eq!(disk.record(), None);
}

#[test]
fn a_configuration_that_was_changed_counts() {
    let mut disk = Disk::with_snapshot();
    disk.configure("b.vhd");
    disk.start_again(SIGKILL);
    assert_eq!((disk.first_bytes(), disk.record()), ((2, 1), None));
}

#[test]
fn another_image_in_its_place_has_nothing_to_do_with_the_record() {
    let mut disk = Disk::with_snapshot();
    std::fs::remove_file(disk.path("a.vhd")).unwrap();
    good("create -n {} -s 16", &[&disk.path("a.vhd")]);
    disk.start_again(SIGTERM);
    assert_eq!((disk.first_bytes(), disk.record()), ((0, 0), None));
}

/// What a start says that is refused.
fn refused(disk: &mut Disk) -> String {
    disk.served.start_again(SIGTERM).unwrap_err()
}

#[test]
fn without_the_image_that_was_served_last_it_is_not_started() {
    let mut disk = Disk::with_snapshot();
    let (first, last) = (disk.path("a.vhd"), disk.path("b.vhd"));
    let gone = disk.path("gone.vhd");
    std::fs::rename(&last, &gone).unwrap();
    let said = refused(&mut disk);
    let names = |path: &Path| said.contains(path.to_str().unwrap());
    assert!(
        names(&first) && names(&last) && names(&disk.record().unwrap()) && said.contains("it is not there"),
        "{said}"
    );
    good("create -n {} -s 16", &[&last]);
    assert!(refused(&mut disk).contains("another one is in its place"));
    std::fs::rename(&gone, &last).unwrap();
    disk.served.start_again(SIGTERM).unwrap();
    assert_eq!(disk.first_bytes(), (2, 1));
    // One who wants the older image, and says so.
    std::fs::remove_file(&last).unwrap();
    refused(&mut disk);
    std::fs::remove_file(disk.record().unwrap()).unwrap();
    disk.start_again(SIGTERM);
    assert_eq!(disk.first_bytes(), (1, 1));
}
