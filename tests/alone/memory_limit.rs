//! A tapdisk that is not allowed any more memory: under load it takes none, and is not killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::alone;
use crate::common::PATIENCE;
use crate::common::needs::skipped;
use crate::common::served::{Served, folder, tool};

/// A memory cgroup (the kernel's cgroup-v1/memory and cgroup-v2 documents), gone when this is dropped.
struct Group {
    path: PathBuf,
    second: bool,
}

impl Group {
    /// None where the machine does not let us have one.
    #[track_caller]
    fn new() -> Option<Group> {
        let name = format!("tapdisk-test-{}", std::process::id());
        let second = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let parent = Path::new("/sys/fs/cgroup").join(if second { "" } else { "memory" });
        let path = parent.join(name);
        let made = fs::create_dir(&path).is_ok();
        let group = Group { path, second };
        if made && group.path.join(group.usage_file()).exists() {
            return Some(group);
        }
        skipped("no memory cgroup can be made");
        None
    }

    fn usage_file(&self) -> &'static str {
        if self.second { "memory.current" } else { "memory.usage_in_bytes" }
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path.join(file)).unwrap()
    }

    fn usage(&self) -> u64 {
        self.read(self.usage_file()).trim().parse().unwrap()
    }

    fn limit(&self, bytes: u64) {
        let file = if self.second { "memory.max" } else { "memory.limit_in_bytes" };
        fs::write(self.path.join(file), bytes.to_string()).unwrap();
    }

    /// Times that the limit was met, and processes that were killed for it.
    fn trouble(&self) -> (u64, u64) {
        let count = |text: &str, key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
            line.unwrap_or_else(|| panic!("no {key} in {text}"))
        };
        if self.second {
            let events = self.read("memory.events");
            (count(&events, "max "), count(&events, "oom_kill "))
        } else {
            (
                self.read("memory.failcnt").trim().parse().unwrap(),
                count(&self.read("memory.oom_control"), "oom_kill "),
            )
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Empty once its last process is reaped, which takes a moment.
        let end = Instant::now() + PATIENCE;
        while fs::remove_dir(&self.path).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn load(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

#[test]
fn at_its_limit_it_serves_on_and_takes_no_memory() {
    let _alone = alone();
    let Some(group) = Group::new() else { return };
    let folder = folder();
    let image = folder.path().join("disk.img");
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("echo $$ >'{}'; exec \"$@\"", group.path.join("cgroup.procs").display())).arg("sh");
    command.arg(tool("tapdisk").get_program());
    let table = format!("path = '{}'\ncreate = '64 MiB'\ndirect = 'on'", image.display());
    let rest = "[frontend.local]\nsocket = '{s}/ring'\n[frontend.nbd]\nsocket = '{s}/nbd'\n[log]\nlevel = 'error'\n";
    let mut served = Served::start_by(command, "", &table, rest);
    let mut ring = load(
        tool("ring-load")
            .args(["run", "--rw", "randrw", "--bs", "512-256k", "--depth", "32", "--runtime", "6s", "--fsync", "100"])
            .arg("--socket")
            .arg(served.ring()),
    );
    let mut nbd = load(
        Command::new("fio")
            .args(["--name=load", "--ioengine=nbd", "--rw=randrw", "--bsrange=512-512k", "--blockalign=512"])
            .args(["--iodepth=32", "--runtime=6", "--time_based", "--fsync=100", "--size=64m"])
            .arg(format!("--uri={}", served.nbd())),
    );
    // Clients are connected, and each path was used.
    std::thread::sleep(Duration::from_secs(2));
    let usage = group.usage();
    // The kernel charges in portions of 64 pages a CPU.
    group.limit(usage + (1 << 20));
    let (met_before, _) = group.trouble();
    std::thread::sleep(Duration::from_secs(2));
    let (met, killed) = group.trouble();
    let grown = group.usage() as i64 - usage as i64;
    assert!(ring.try_wait().unwrap().is_none() && nbd.try_wait().unwrap().is_none(), "the loads ended early");
    assert!(ring.wait().unwrap().success() && nbd.wait().unwrap().success());
    println!("{usage} bytes, {grown} more after two seconds at the limit, which was met {} times", met - met_before);
    assert!(served.alive() && killed == 0, "it was killed");
    assert!(grown < 1 << 20, "it took {grown} bytes more");
    // The disk is served although no page is left.
    assert_eq!(served.debug_queue()["state"], "running");
}
