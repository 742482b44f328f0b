//! Which logs are opened, with what lock, and how long that is held; disks that grow beyond theirs.

use std::fs::File;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{create, marked};
use crate::common::hanging_fs::{HangingFs, Operation, until};
use crate::common::live::*;
use crate::common::served::{Served, folder, run, tool};
use crate::common::small_fs::Loop;
use crate::common::vhd::good;
use crate::common::vhd_made::table;
use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::sys::signal::Signal::SIGKILL;
use tapdisk::control::proto::kind;
use tempfile::TempDir;

/// A raw disk of a MiB that is served, and names in its folder.
struct Disk {
    folder: TempDir,
    served: Served,
}

impl Disk {
    fn new(log: Option<&str>) -> Disk {
        let folder = folder();
        let path = folder.path().join("disk");
        create(&folder.path().join("log"), 1 << 20);
        let log =
            log.map_or_else(String::new, |log| format!("changed_blocks = '{}'", folder.path().join(log).display()));
        let served = Served::start(&format!("path = '{}'\ncreate = '1 MiB'\n{log}", path.display()), BOTH);
        Disk { folder, served }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// It does not go on with a log of that name, and stays paused.
    fn refuses(&self, log: &Path, errno: i32, text: &str) {
        pause(&self.served);
        refused(&self.served, &["unpause", "-c", log.to_str().unwrap()], errno, text);
        assert_eq!(state(&self.served), "0x2a", "{text}");
        unpause(&self.served);
    }
}

fn qemu_io(served: &Served, command: &str) {
    run(Command::new("qemu-io").args(["-f", "raw", "-c", command, &served.nbd()]));
}

#[test]
fn a_log_that_is_none_or_too_small_or_a_link_to_a_file_is_refused() {
    let disk = Disk::new(None);
    let (log, link) = (disk.path("log"), disk.path("link"));
    disk.refuses(&disk.path("missing"), libc::ENOENT, "missing: cannot open it");
    symlink("log", &link).unwrap();
    disk.refuses(&link, libc::ELOOP, "link: it is a link, and leads to no block device: name the log itself");
    symlink("nowhere", disk.path("dangling")).unwrap();
    disk.refuses(&disk.path("dangling"), libc::ELOOP, "it is a link");
    symlink("/dev/null", disk.path("null")).unwrap();
    disk.refuses(&disk.path("null"), libc::ELOOP, "it is a link");
    run(Command::new("mkfifo").arg(disk.path("fifo")));
    disk.refuses(&disk.path("fifo"), libc::EIO, "neither a regular file nor a block device");
    disk.refuses(disk.folder.path(), libc::EISDIR, "cannot open it");
    let whole = std::fs::read(&log).unwrap();
    for (len, text) in [(47, "log: it has 47 bytes, and a log of changed blocks has 48"), (49, "has 50")] {
        std::fs::write(&log, &whole[..len]).unwrap();
        disk.refuses(&log, libc::EINVAL, text);
    }
    create(&log, (1 << 20) - (64 << 10));
    disk.refuses(
        &log,
        libc::EINVAL,
        "the disk has 1048576 bytes, and this log is for 983040: cbt-util set -s 1048576",
    );
    // When it is opened, too.
    let image =
        format!("path = '{}'\nlock = false\nchanged_blocks = '{}'", disk.path("disk").display(), log.display());
    let (code, said) = Served::refused(&image, BOTH);
    assert!(code == 1 && said.contains("this log is for 983040"), "{said}");
}

#[test]
fn a_log_is_for_one_disk_as_long_as_that_is_open_and_until_it_is_on_the_disk() {
    let mut disk = Disk::new(Some("log"));
    let (other, log) = (Disk::new(None), disk.path("log"));
    let used = |disk: &Disk| {
        assert!(locked(&log));
        other.refuses(&log, libc::EBUSY, "log: in use by process");
        let said = crate::common::served::output(tool("cbt-util").args(["create", "-s", "1048576", "-n"]).arg(&log));
        assert_eq!(said.status.code(), Some(libc::EBUSY));
        qemu_io(&disk.served, "write 0 512");
        assert_eq!(marked(&log)[0], 0);
    };
    used(&disk);
    pause(&disk.served);
    assert!(!locked(&log));
    run(disk.served.tap_ctl().args(["unpause", "-c", log.to_str().unwrap()]));
    used(&disk);
    disk.served.start_again(SIGKILL).unwrap();
    used(&disk);
    disk.served.signal(SIGKILL);
    disk.served.code();
    wait_for(|| (!locked(&log)).then_some(()));
}

#[test]
fn a_logs_lock_goes_when_its_last_bytes_are_on_the_disk() {
    let disk = Disk::new(None);
    let Some(fs) = HangingFs::new() else { return };
    create(&fs.behind("log"), 1 << 20);
    pause(&disk.served);
    run(disk.served.tap_ctl().arg("unpause").arg("-c").arg(fs.path("log")));
    qemu_io(&disk.served, "write 0 512");
    // While an operation hangs, the file system does no other; a lock is none of its operations.
    let log = File::open(fs.path("log")).unwrap();
    let lock = |log: File| Flock::lock(log, FlockArg::LockExclusiveNonblock).map_err(|(log, _)| log);
    fs.hang(Some(Operation::Fsync));
    let asked = ask(&disk.served, kind::PAUSE);
    until("the log is synced", || fs.hangs());
    let (waits, locked) = (asked.waits(), lock(log));
    fs.hang(None);
    assert!(waits && asked.errno() == 0);
    let log = locked.expect_err("the lock was let go of");
    assert!(lock(log).is_ok());
}

#[test]
fn a_log_on_a_volume_is_written_where_it_is() {
    let disk = Disk::new(None);
    std::fs::write(disk.path("volume"), vec![0; 4 << 20]).unwrap();
    let Some(device) = Loop::new(&disk.path("volume"), 512) else { return };
    let (node, link) = (Path::new(&device.0), disk.path("link"));
    symlink(node, &link).unwrap();
    create(&link, 1 << 20);
    for engine in ["aio", "io_uring", "threads"] {
        run(disk.served.tap_ctl().args(["engine", "--name", engine]));
        create(&link, 1 << 20);
        pause(&disk.served);
        run(disk.served.tap_ctl().arg("unpause").arg("-c").arg(&link));
        qemu_io(&disk.served, "write 128k 64k");
        assert_eq!(marked(node), [2], "{engine}");
        // Another one does not get it by another name.
        Disk::new(None).refuses(node, libc::EBUSY, "in use by");
        pause(&disk.served);
        unpause(&disk.served);
    }
}

#[test]
fn a_disk_does_not_grow_beyond_its_log_while_it_is_in_use() {
    let disk = Disk::new(Some("log"));
    let grow = |mib: u64| File::options().write(true).open(disk.path("disk")).unwrap().set_len(mib << 20).unwrap();
    let size = || disk.served.debug_queue()["size"].as_u64().unwrap() >> 20;
    let log = disk.path("log");
    let log = log.to_str().unwrap();
    grow(2);
    let text = "the disk has 2097152 bytes, and this log is for 1048576: cbt-util set -s 2097152";
    let named = format!("{log}: its log of changed blocks does not fit: {text}");
    refused(&disk.served, &["resize"], libc::EINVAL, &named);
    assert_eq!(size(), 1);
    qemu_io(&disk.served, "write 960k 64k");
    assert_eq!(marked(&disk.path("log")), [15], "it goes on as it was");
    // At the end of a pause it would be of that size, and stays paused.
    pause(&disk.served);
    refused(&disk.served, &["unpause", "-c", log], libc::EINVAL, &format!("{log}: {text}"));
    assert_eq!(state(&disk.served), "0x2a");
    run(tool("cbt-util").args(["set", "-n", log, "-s", "3145728"]));
    run(disk.served.tap_ctl().args(["unpause", "-c", log]));
    assert_eq!(size(), 2);
    grow(3);
    assert_eq!(run(disk.served.tap_ctl().arg("resize")), "old_size=2097152 new_size=3145728\n");
    qemu_io(&disk.served, "write 3008k 64k");
    assert_eq!(marked(&disk.path("log")), [15, 47]);
}

#[test]
fn a_larger_image_does_not_go_on_with_a_log_that_is_too_small() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    good("create -n {} -s 16 -S 64", &[&path("small.vhd")]);
    create(&path("log"), 16 << 20);
    let served =
        Served::start(&format!("{}\nchanged_blocks = '{}'", table(&path("small.vhd")), path("log").display()), BOTH);
    pause(&served);
    good("snapshot -n {} -p {} -e -S 64", &[&path("large.vhd"), &path("small.vhd")]);
    good("resize -n {} -s 32 -j {}", &[&path("large.vhd"), &path("journal")]);
    let unpause = format!("unpause -a vhd:{} -c {}", path("large.vhd").display(), path("log").display());
    let unpause: Vec<_> = unpause.split(' ').collect();
    refused(&served, &unpause, libc::EINVAL, "the disk has 33554432 bytes, and this log is for 16777216");
    assert_eq!(state(&served), "0x2a");
    run(tool("cbt-util").args(["set", "-s", "33554432", "-n"]).arg(path("log")));
    run(served.tap_ctl().args(&unpause));
    qemu_io(&served, "write 32704k 64k");
    assert_eq!(marked(&path("log")), [511]);
}
