//! The hotplug script `conf/block-tapdisk` where there is no systemd: whom it takes for its tapdisk, and ends, and what it leaves in XenStore. A
//! program of this test's own stands in for tapdisk.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};

use crate::common::live::wait_for;
use crate::common::needs::skipped;
use crate::common::served::{folder, output};
use crate::common::xenstored::Xenstored;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const BACKEND: &str = "/local/domain/0/backend/vbd/1/51712";
const TAPDISK: &str =
    "#!/bin/sh\n[ \"$1\" != --check ] || exit 0\n[ ! -e \"$0.fails\" ] || exit 1\necho /x/ctl$$\nexec sleep 1000\n";

struct Xen {
    folder: TempDir,
    xenstored: Xenstored,
}

impl Xen {
    /// None: the script would ask the systemd of this machine.
    fn new() -> Option<Xen> {
        if Path::new("/run/systemd/system").exists() {
            skipped("systemd runs here");
            return None;
        }
        let xen = Xen { folder: folder(), xenstored: Xenstored::start() };
        let programs = xen.path("bin");
        std::fs::create_dir_all(&programs).unwrap();
        xen.xenstored.programs(&programs);
        let tapdisk = programs.join("tapdisk");
        std::fs::write(&tapdisk, TAPDISK).unwrap();
        std::fs::set_permissions(&tapdisk, PermissionsExt::from_mode(0o755)).unwrap();
        let client = xen.xenstored.client();
        for (name, value) in [("script", "block-tapdisk"), ("params", "/x.img"), ("state", "1")] {
            client.write(&format!("{BACKEND}/{name}"), value).unwrap();
        }
        Some(xen)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn script(&self, command: &[&str]) -> Output {
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        let mut script = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("conf/block-tapdisk"));
        script.args(command).env("XENBUS_PATH", BACKEND).env("BACKEND", "vbd").env("PATH", path);
        script.env("TAPDISK_RUN", self.path("run")).env("TAPDISK_CONTROL_DIRECTORY", self.path("control"));
        output(&mut script)
    }

    fn done(&self, command: &str) {
        let said = self.script(&command.split(' ').collect::<Vec<_>>());
        assert!(said.status.success(), "{command}: {said:?}");
    }

    fn pid_file(&self) -> PathBuf {
        self.path("run/vbd-1-51712.pid")
    }

    fn pid(&self) -> i32 {
        std::fs::read_to_string(self.pid_file()).unwrap().trim().parse().unwrap()
    }
}

fn lives(pid: i32) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !state.is_empty() && !state.contains(") Z ")
}

struct Stranger(Child);

impl Stranger {
    fn new() -> Stranger {
        Stranger(Command::new("sleep").arg("1000").spawn().unwrap())
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        // It may have been killed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn its_own_tapdisk_is_found_and_ended() {
    let Some(xen) = Xen::new() else { return };
    xen.done("spawn");
    let pid = xen.pid();
    assert!(lives(pid));
    // The same one: a disk has one.
    xen.done("spawn");
    assert_eq!(xen.pid(), pid);
    xen.done("add");
    xen.done("remove");
    assert!(!lives(pid) && !xen.pid_file().exists());
    xen.done("remove");
    std::fs::write(xen.path("bin/tapdisk.fails"), "").unwrap();
    assert!(!xen.script(&["spawn"]).status.success());
}

#[test]
fn a_process_that_has_got_the_id_of_a_tapdisk_that_is_gone_is_left_alone() {
    let Some(xen) = Xen::new() else { return };
    for killed in [true, false] {
        if killed {
            xen.done("spawn");
            let pid = xen.pid();
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
            wait_for(|| (!lives(pid)).then_some(()));
        }
        let mut stranger = Stranger::new();
        std::fs::create_dir_all(xen.path("run")).unwrap();
        std::fs::write(xen.pid_file(), format!("{}\n", stranger.0.id())).unwrap();
        let said = xen.script(&["add"]);
        assert!(!said.status.success(), "a stranger serves no disk: {said:?}");
        xen.done("remove");
        assert!(stranger.lives() && !xen.pid_file().exists());
        std::fs::write(xen.pid_file(), format!("{}\n", stranger.0.id())).unwrap();
        xen.done("spawn");
        assert!(stranger.lives() && lives(xen.pid()) && xen.pid() != stranger.0.id() as i32);
        xen.done("remove");
        assert!(stranger.lives());
    }
}

/// A tapdisk whose guest has gone removes the backend's directory; it may do so between two steps of `detach`.
#[test]
fn detach_leaves_nothing_of_a_disk_whichever_of_its_directories_have_gone_before() {
    let Some(xen) = Xen::new() else { return };
    let client = xen.xenstored.client();
    let front = "/local/domain/1/device/vbd/51712";
    for (guest, backend) in [(true, true), (true, false), (false, true), (false, false)] {
        // Both say nothing of what was not there.
        let _ = (client.remove(BACKEND), client.remove("/local/domain/1"));
        if guest {
            client.write(&format!("{front}/state"), "6").unwrap();
        }
        // Without its `frontend-id`: this is what `detach` finds that wrote into a directory just after its end.
        client.write(&format!("{BACKEND}/state"), "5").unwrap();
        if backend {
            client.write(&format!("{BACKEND}/frontend-id"), "1").unwrap();
        }
        std::thread::scope(|scope| {
            let detach = scope.spawn(|| xen.done("detach 1 51712"));
            if backend {
                wait_for(|| client.read(&format!("{BACKEND}/online")).ok());
                client.write(&format!("{BACKEND}/state"), "6").unwrap();
            }
            detach.join().unwrap();
        });
        let left = [BACKEND, front].map(|directory| client.directory(directory).is_ok());
        assert_eq!(left, [false, false], "guest {guest}, backend {backend}");
    }
}
