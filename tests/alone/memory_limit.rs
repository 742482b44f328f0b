//! A tapdisk that is not allowed any more memory: under load it takes none, and is not killed.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::alone;
use crate::common::PATIENCE;
use crate::common::live::wait_for;
use crate::common::needs::skipped;
use crate::common::served::{Served, folder, output, run, tool};
use tapdisk::client::{self, Client, Options};

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

/// Lets a process have no more of something (prlimit(1)): `as` are addresses, `data` what it can write. None: as much as it likes.
fn limit(served: &Served, what: &str, bytes: Option<u64>) {
    let limit = bytes.map_or("unlimited".to_owned(), |bytes| bytes.to_string());
    run(Command::new("prlimit").args(["--pid", &served.pid().to_string()]).arg(format!("--{what}={limit}:")));
}

/// What it has of that now, bytes (proc(5), `statm` and `status`).
fn present(served: &Served, what: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", served.pid())).unwrap();
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    };
    if what == "as" { of("VmSize") } else { of("VmData") }
}

/// Who connects to a tapdisk, in each way that there is; what the log says of one that is refused; and whether one is let in.
const CLIENTS: [(&str, &str); 4] = [
    ("ring", "cannot admit a ring client|ring client gone"),
    ("nbd", "an NBD client is refused"),
    ("control", "a control message is refused"),
    ("metrics", "a client of metrics is refused|"),
];

/// Those of the ring stay in `held`: others have to come where one that leaves leaves its memory behind.
fn connects(served: &Served, client: &str, held: &mut Vec<Client>) -> bool {
    let mut command = match client {
        "ring" => {
            let options = Options { data_pages: 16, ring_page_order: 4, ..Options::default() };
            let client = Client::connect(&served.ring(), &options);
            let let_in = client.is_ok();
            held.extend(client);
            return let_in;
        }
        "nbd" => Command::new("nbdinfo"),
        "control" => served.tap_ctl(),
        _ => Command::new("curl"),
    };
    match client {
        "nbd" => command.arg("--size").arg(served.nbd()),
        "control" => command.args(["stats", "-p", &served.pid().to_string(), "-m", "0"]),
        _ => {
            command.args(["--silent", "--fail", "--max-time", "20", "--unix-socket"]);
            command.arg(served.sockets().join("metrics")).arg("http://localhost/metrics")
        }
    };
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
}

/// A raw image of 64 MiB with all frontends.
fn serve_all(folder: &Path) -> Served {
    let table = format!("path = '{}'\ncreate = '64 MiB'", folder.join("disk.img").display());
    let rest = "[frontend.local]\nsocket = '{s}/ring'\nmax_clients = 1000\nmax_ring_page_order = 4\n[frontend.nbd]\nsocket = '{s}/nbd'\n\
                [metrics]\nsocket = '{s}/metrics'\n[engine]\nname = 'aio'\n";
    Served::start(&table, rest)
}

#[test]
fn who_comes_when_memory_ends_is_refused_and_nobody_else_notices() {
    let _alone = alone();
    for what in ["as", "data"] {
        let folder = folder();
        let mut served = serve_all(folder.path());
        // As each has been used, what it needs once is there.
        let mut held = Vec::new();
        CLIENTS.iter().for_each(|(client, _)| assert!(connects(&served, client, &mut held), "{client}"));
        let mut at_work = load(
            tool("ring-load")
                .args(["run", "--rw", "randrw", "--bs", "512-64k", "--depth", "16", "--runtime", "12s", "--verify"])
                .arg("--socket")
                .arg(served.ring()),
        );
        std::thread::sleep(Duration::from_secs(1));
        limit(&served, what, Some(present(&served, what)));
        for (client, said) in CLIENTS {
            // What was freed before the limit was reached is there for the first.
            let refused = (0..900).filter(|_| !connects(&served, client, &mut held)).take(10).count();
            wait_for(|| {
                assert!(served.alive(), "{what}: {client} was its end: {}", served.log());
                said.split('|').any(|said| served.log().contains(said)).then_some(())
            });
            assert_eq!(refused, 10, "{what}: {client} is let in again and again");
        }
        assert!(at_work.try_wait().unwrap().is_none(), "{what}: the load ended early");
        println!("{what}: {} clients of the ring were let in", held.len());
        limit(&served, what, None);
        for (client, _) in CLIENTS {
            assert!(connects(&served, client, &mut held), "{what}: {client} is not let in although there is memory");
        }
        assert!(at_work.wait().unwrap().success(), "{what}: the load has seen it");
        let lines =
            served.log().lines().filter(|line| line.contains("refused") || line.contains("cannot admit")).count();
        println!("{what}: {lines} lines say so");
        goes_on_later(&served, what);
        assert_eq!(served.stop().0, Some(0), "{what}");
    }
}

/// A disk that can't go on for want of memory stays paused, and goes on when there is some.
fn goes_on_later(served: &Served, what: &str) {
    let tell = |word: &str| {
        let mut command = served.tap_ctl();
        command.args([word, "-p", &served.pid().to_string(), "-m", "0", "--debug"]);
        output(&mut command)
    };
    assert!(tell("pause").status.success());
    limit(served, what, Some(present(served, what)));
    let refused = tell("unpause");
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(libc::ENOMEM), "{what}: {text}");
    assert!(text.contains("there is no memory for that"), "{text}");
    limit(served, what, None);
    assert!(tell("unpause").status.success(), "{what}: {}", served.log());
    assert!(connects(served, "nbd", &mut Vec::new()));
}

/// Seconds of CPU that it has taken (proc(5), `stat`).
fn cpu(served: &Served) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", served.pid())).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<f64>().unwrap();
    (ticks(11) + ticks(12)) / 100.0
}

#[test]
fn who_comes_when_descriptors_end_waits_and_takes_no_cpu() {
    let _alone = alone();
    let folder = folder();
    let mut served = serve_all(folder.path());
    let mut held = Vec::new();
    CLIENTS.iter().for_each(|(client, _)| assert!(connects(&served, client, &mut held), "{client}"));
    limit(&served, "nofile", Some(served.descriptors() as u64));
    let s = served.sockets();
    let waiting: Vec<_> = ["nbd", "metrics", &format!("ctl{}", served.pid())]
        .map(|name| UnixStream::connect(s.join(name)).unwrap())
        .into_iter()
        .map(|stream| stream.into())
        .chain([client::open_socket(&served.ring()).unwrap()])
        .collect();
    served.wait_log("clients can't be accepted for now");
    let before = cpu(&served);
    std::thread::sleep(Duration::from_secs(2));
    let taken = cpu(&served) - before;
    assert!(served.alive() && taken < 1.0, "{taken} s of CPU in two seconds");
    drop::<Vec<OwnedFd>>(waiting);
    limit(&served, "nofile", Some(1024));
    for (client, _) in CLIENTS {
        assert!(connects(&served, client, &mut held), "{client} is not let in although there are descriptors");
    }
}
