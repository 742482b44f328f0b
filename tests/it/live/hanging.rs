//! Two disks in one process: whatever operation of the first one's files hangs, the other disk and the control socket go on.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::common::guest::Guest;
use crate::common::hanging_fs::{ALL, HangingFs, Operation, until};
use crate::common::live::*;
use crate::common::served::{Served, folder, run, tool};
use crate::common::vhd::good;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tapdisk::control::client;
use tapdisk::control::proto::kind;
use tempfile::TempDir;

const FRONTENDS: &str = "[frontend.local]\nsocket = '{s}/ring.{minor}'\n[frontend.nbd]\nsocket = '{s}/nbd.{minor}'\n";

/// The disk that has to go on, whose guest's requests are counted, and the one whose files hang.
struct Disks {
    fs: HangingFs,
    served: Served,
    guest: Guest,
    requests: u8,
    /// Operations that hung.
    hung: usize,
    _folder: TempDir,
}

impl Disks {
    /// The second disk is a chain of three images, and a log of changed blocks, of which nothing is open yet.
    fn new() -> Option<Disks> {
        Disks::new_with("")
    }

    fn new_with(rest: &str) -> Option<Disks> {
        let fs = HangingFs::new()?;
        let folder = folder();
        let path = folder.path().join("disk.img");
        let served =
            Served::start(&format!("path = '{}'\ncreate = '1 MiB'\n", path.display()), &format!("{FRONTENDS}{rest}"));
        let guest = Guest::connect(&served.sockets().join("ring.0"));
        good("create -n {} -s 16", &[&fs.behind("base.vhd")]);
        for (child, parent) in [("middle.vhd", "base.vhd"), ("leaf.vhd", "middle.vhd")] {
            good("snapshot -n {} -p {} -e", &[&fs.behind(child), &fs.behind(parent)]);
        }
        std::fs::File::create(fs.behind("leaf.aio")).unwrap().set_len(16 << 20).unwrap();
        run(tool("cbt-util").args(["create", "-s", "16777216", "-n"]).arg(fs.behind("log")));
        run(served.tap_ctl().arg("allocate"));
        run(served.tap_ctl().args(["attach", "-m", "1", "-p", &served.pid().to_string()]));
        Some(Disks { fs, served, guest, requests: 0, hung: 0, _folder: folder })
    }

    /// The other disk serves its guest, and the control socket answers.
    fn others_go_on(&mut self) {
        self.requests = self.requests.wrapping_add(1);
        let data = [self.requests; 4096];
        assert_eq!(self.guest.write(0, &data), 0);
        assert_eq!(self.guest.read(0, 4096).unwrap(), data);
        run(self.served.tap_ctl().args(["stats", "-m", "0"]));
    }

    /// What is asked of the disk that hangs comes to its end, and whenever an operation hangs meanwhile, the others go on.
    fn ask(&mut self, words: &[&str]) {
        let mut command = self.served.tap_ctl();
        command.args(words).args(["-p", &self.served.pid().to_string(), "-m", "1"]);
        self.finish(command);
    }

    fn finish(&mut self, mut command: Command) {
        let mut asking = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut status = None;
        loop {
            until(&format!("{command:?}"), || {
                status = asking.try_wait().unwrap();
                status.is_some() || self.fs.hangs()
            });
            if self.fs.hangs() {
                self.hung += 1;
                self.others_go_on();
                self.fs.release();
            } else if let Some(status) = status {
                assert!(status.success(), "{command:?}: {}\n{}", errors(asking), self.served.log());
                return;
            }
        }
    }

    /// What one script of nbdsh does with the disk.
    fn nbdsh(&mut self, script: &str) {
        let uri = format!("nbd+unix:///?socket={}/nbd.1", self.served.sockets().display());
        let mut command = Command::new("nbdsh");
        command.env("PATH", "/usr/bin:/bin").args(["--base-allocation", "-u", &uri, "-c", script]);
        self.finish(command);
    }

    /// Everything that is done with a disk of that type, from its opening to its closing.
    fn live(&mut self, kind: &str) {
        let image = name(kind, &self.fs.path(&format!("leaf.{kind}")));
        let log = self.fs.path("log").to_str().unwrap().to_owned();
        self.ask(&["open", "-a", &image, "-C", &log]);
        self.nbdsh(
            "h.pwrite(b'x' * 65536, 1 << 20); h.flush(); h.trim(4096, 1 << 20); h.zero(4096, 2 << 20)
h.block_status(4 << 20, 0, lambda *args: 0)",
        );
        self.ask(&["resize"]);
        for engine in ["threads", "aio", "io_uring"] {
            self.ask(&["engine", "--name", engine]);
        }
        self.ask(&["pause"]);
        self.ask(&["unpause", "-c", &log]);
        if kind == "vhd" {
            self.ask(&["coalesce", "--wait", "--image", self.fs.path("middle.vhd").to_str().unwrap()]);
        }
        self.ask(&["pause"]);
        self.ask(&["unpause", "-a", &image, "-c", &log]);
        self.nbdsh("h.pwrite(b'x' * 4096, 3 << 20)");
        self.ask(&["close"]);
        self.ask(&["detach"]);
    }
}

fn errors(child: Child) -> String {
    String::from_utf8_lossy(&child.wait_with_output().unwrap().stderr).into_owned()
}

fn others_go_on_while_it_hangs(operations: &[Operation]) {
    for operation in operations {
        let Some(mut disks) = Disks::new() else { return };
        disks.fs.hang(Some(*operation));
        disks.live("vhd");
        run(disks.served.tap_ctl().args(["attach", "-m", "1", "-p", &disks.served.pid().to_string()]));
        disks.live("aio");
        println!("{operation:?}: {} hung", disks.hung);
        assert!(disks.hung > 0, "{operation:?} was never asked for");
        disks.fs.hang(None);
        good("check -n {}", &[&disks.fs.behind("leaf.vhd")]);
        assert_eq!(disks.served.stop().0, Some(0));
    }
}

#[test]
fn others_go_on_while_opening_and_closing_hangs() {
    others_go_on_while_it_hangs(&ALL[..4]);
}

#[test]
fn others_go_on_while_moving_data_hangs() {
    others_go_on_while_it_hangs(&ALL[4..]);
}

/// The main loop calls none of these, on any file: they wait for threads, for memory, or for a file that may hang.
const WAITING: [&str; 22] = [
    "clone",
    "clone3",
    "vfork",
    "mlockall",
    "mlock",
    "munlockall",
    "io_setup",
    "io_destroy",
    "io_uring_setup",
    "flock",
    "fsync",
    "fdatasync",
    "sync_file_range",
    "fallocate",
    "ftruncate",
    "fadvise64",
    "lseek",
    "pread64",
    "pwrite64",
    "preadv2",
    "pwritev2",
    "clock_nanosleep",
];

#[test]
fn the_main_loop_waits_for_no_thread_no_memory_and_no_file() {
    let Some(mut disks) = Disks::new() else { return };
    let trace = disks.served.sockets().join("trace");
    let mut strace = disks.served.strace(&["-y"], &trace);
    disks.live("vhd");
    disks.served.signal(Signal::SIGTERM);
    assert_eq!(disks.served.code(), Some(0));
    strace.wait().unwrap();
    let trace = std::fs::read_to_string(trace).unwrap();
    let folder = disks.fs.path("leaf.vhd").parent().unwrap().display().to_string();
    let minors = format!("<{}/tapdisk/tapdisk-", disks.served.sockets().display());
    let main = format!("{} ", disks.served.pid());
    let ended = trace.rfind("drained and flushed; the end").unwrap_or(trace.len());
    let calls = trace[..ended].lines().filter_map(|line| line.strip_prefix(&main));
    let waits = |call: &str| {
        let name = call.trim_start().split('(').next().unwrap();
        // The marker of a minor is in the control directory, which is the host's own.
        WAITING.contains(&name) && !call.contains(&minors) || call.contains(&folder)
    };
    let (waiting, others): (Vec<_>, Vec<_>) = calls.partition(|call| waits(call));
    assert!(others.iter().any(|call| call.contains("epoll_wait(")), "that is not the main loop's");
    assert!(waiting.is_empty(), "{waiting:#?}");
    // The job maker is not the main loop.
    assert!(trace.contains("clone3(") && trace.contains(&folder));
}

#[test]
fn a_file_that_hangs_is_told_of() {
    let Some(mut disks) = Disks::new_with("[watchdog]\nstuck_s = 1\n") else { return };
    disks.ask(&["open", "-a", &name("vhd", &disks.fs.path("leaf.vhd"))]);
    disks.fs.hang(Some(Operation::Flush));
    let pausing = disks.served.tap_ctl().args(["pause", "-m", "1"]).spawn().unwrap();
    disks.served.wait_log("a file of the image hangs");
    disks.served.wait_log("job: close");
    disks.others_go_on();
    disks.fs.hang(None);
    assert!(pausing.wait_with_output().unwrap().status.success());
}

#[test]
fn where_the_system_has_no_thread_whoever_asks_is_told_and_what_has_to_be_done_is_done_later() {
    let folder = folder();
    let (base, leaf) = (folder.path().join("base.vhd"), folder.path().join("leaf.vhd"));
    good("create -n {} -s 16", &[&base]);
    good("snapshot -n {} -p {} -e", &[&leaf, &base]);
    let mut served = Served::start(&format!("type = 'vhd'\npath = '{}'\n", leaf.display()), FRONTENDS);
    run(served.tap_ctl().arg("allocate"));
    run(served.tap_ctl().args(["attach", "-m", "1", "-p", &served.pid().to_string()]));
    let trace = served.sockets().join("trace");
    let mut strace = served.strace(&["-e", "trace=clone3", "-e", "inject=clone3:error=EAGAIN"], &trace);
    let image = name("vhd", &base);
    let pid = served.pid().to_string();
    refused(&served, &["open", "-p", &pid, "-m", "1", "-a", &image], libc::EAGAIN, "cannot get a thread to open it");
    refused(&served, &["resize", "-m", "0"], libc::EAGAIN, "Resource temporarily unavailable");
    refused(&served, &["engine", "-m", "0", "--name", "threads"], libc::EAGAIN, "Resource temporarily unavailable");
    refused(&served, &["coalesce", "-m", "0"], libc::EAGAIN, "cannot start a thread");
    // Nobody is to find the image in use, and half of its footer missing.
    let pausing = ask(&served, kind::PAUSE);
    wait_for(|| (state(&served).starts_with("0x10")).then_some(()));
    assert!(pausing.waits());
    kill(Pid::from_raw(strace.id() as i32), Signal::SIGTERM).unwrap();
    strace.wait().unwrap();
    assert_eq!(pausing.errno(), 0);
    good("check -n {}", &[&leaf]);
    run(served.tap_ctl().args(["unpause", "-m", "0"]));
    assert!(served.alive());
}

/// strace of the job maker alone, of whose threads some can't be made.
fn without_threads(served: &Served, which: &str) -> Child {
    let is_maker =
        |task: &PathBuf| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "job maker\n");
    // A thread gives itself its name, some time after it was made.
    let maker = wait_for(|| {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", served.pid())).unwrap();
        tasks.filter_map(|task| Some(task.ok()?.path())).find(is_maker)
    });
    let mut strace = Command::new("strace");
    strace.args(["-e", "trace=clone3", "-e", &format!("inject=clone3:error=EAGAIN:when={which}")]);
    strace.arg("-p").arg(maker.file_name().unwrap()).args(["-o", "/dev/null"]);
    let strace = strace.stderr(Stdio::null()).spawn().unwrap();
    let traced = format!("TracerPid:\t{}", strace.id());
    wait_for(|| std::fs::read_to_string(maker.join("status")).unwrap().contains(&traced).then_some(()));
    strace
}

fn end(mut strace: Child) {
    kill(Pid::from_raw(strace.id() as i32), Signal::SIGTERM).unwrap();
    strace.wait().unwrap();
}

fn aio(name: &str) -> (TempDir, PathBuf) {
    let folder = folder();
    let path = folder.path().join(name);
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    (folder, path)
}

#[test]
fn no_file_is_open_in_a_pause_though_an_engine_that_was_changed_ends_late() {
    let (folder, path) = aio("disk.img");
    let served = Served::start(&format!("path = '{}'\n", path.display()), FRONTENDS);
    // The first makes the new engine, and the second ends the old one, or tries to.
    let strace = without_threads(&served, "2+2");
    run(served.tap_ctl().args(["engine", "-m", "0", "--name", "threads"]));
    assert_eq!(ask(&served, kind::PAUSE).errno(), 0);
    assert_eq!(open_files(&served, folder.path()), [] as [PathBuf; 0]);
    end(strace);
}

#[test]
fn what_waits_for_a_thread_does_not_wait_for_others_to_ask_for_none() {
    let (_folder, path) = aio("disk.img");
    let (_other_folder, other) = aio("other.img");
    let served = Served::start(&format!("path = '{}'\n", path.display()), FRONTENDS);
    run(served.tap_ctl().arg("allocate"));
    run(served.tap_ctl().args(["attach", "-m", "1", "-p", &served.pid().to_string()]));
    let pid = served.pid().to_string();
    run(served.tap_ctl().args(["open", "-m", "1", "-p", &pid, "-a", &name("aio", &other)]));
    let strace = without_threads(&served, "1");
    let pausing = ask(&served, kind::PAUSE);
    // Its job is the first one, and gets no thread. It is tried again although others have jobs all the time.
    wait_for(|| (state(&served) == "0x10" || !pausing.waits()).then_some(()));
    wait_for(|| {
        // It may be the one without a thread, if the pause was slow.
        let _ = client::resize(served.sockets(), served.pid(), 1);
        std::thread::sleep(Duration::from_millis(20));
        (!pausing.waits()).then_some(())
    });
    assert_eq!(pausing.errno(), 0);
    end(strace);
}

#[test]
fn an_image_that_is_opened_is_not_made_whatever_the_configured_one_is() {
    let (folder, path) = aio("disk.img");
    let served = Served::start(&format!("path = '{}'\ncreate = '1 MiB'\n", path.display()), FRONTENDS);
    run(served.tap_ctl().arg("allocate"));
    let pid = served.pid().to_string();
    run(served.tap_ctl().args(["attach", "-m", "1", "-p", &pid]));
    let wrong = folder.path().join("wrong.img");
    refused(&served, &["open", "-m", "1", "-p", &pid, "-a", &name("aio", &wrong)], libc::ENOENT, "cannot open it");
    assert!(!wrong.exists());
}
