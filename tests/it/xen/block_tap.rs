//! libxl's hotplug script `conf/block-tap`, with the real tap-ctl, tapdisk and xenstored.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::common::host::Host;
use crate::common::served::{folder, output, run, tool};
use crate::common::vhd::good;
use crate::common::xenstored::Xenstored;
use tempfile::TempDir;

/// A host with a XenStore, and images.
struct Xen {
    folder: TempDir,
    host: Host,
    xenstored: Xenstored,
}

impl Xen {
    fn new() -> Xen {
        let xen = Xen { folder: folder(), host: Host::new(), xenstored: Xenstored::start() };
        std::fs::create_dir_all(xen.path("bin")).unwrap();
        std::fs::create_dir_all(xen.path("run")).unwrap();
        xen.xenstored.programs(&xen.path("bin"));
        xen
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// An image of 2 MiB.
    fn image(&self, name: &str) -> String {
        let path = self.path(name);
        if name.ends_with(".vhd") {
            good("create -n {} -s 2", &[&path]);
        } else {
            std::fs::write(&path, vec![0x11; 2 << 20]).unwrap();
        }
        path.to_str().unwrap().to_owned()
    }

    fn script(&self, shell: &[&str], command: &str, backend: &str) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("conf/block-tap");
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        let mut run = match shell {
            [] => Command::new(&script),
            [program, options @ ..] => {
                let mut run = Command::new(program);
                run.args(options).arg(&script);
                run
            }
        };
        run.arg(command).env("XENBUS_PATH", backend).env("PATH", path);
        run.env("TAP_CTL", tool("tap-ctl").get_program()).env("TAPDISK", tool("tapdisk").get_program());
        run.env("BLKTAP_CONTROL", self.host.directory()).env("BLOCK_TAP_RUN", self.path("run"));
        output(&mut run)
    }

    /// What the toolstack makes of a device.
    fn make(&self, domain: u32, device: u32, params: &str, mode: &str) -> String {
        let backend = format!("/local/domain/0/backend/vbd3/{domain}/{device}");
        for (name, value) in [("state", "2"), ("params", params), ("mode", mode)] {
            self.set(&format!("{backend}/{name}"), value);
        }
        backend
    }

    fn set(&self, node: &str, value: &str) {
        self.xenstored.client().write(node, value).unwrap();
    }

    fn get(&self, backend: &str, name: &str) -> String {
        self.xenstored.client().read(&format!("{backend}/{name}")).unwrap_or_default()
    }

    fn forget(&self, backend: &str) {
        self.xenstored.client().remove(backend).unwrap();
    }

    fn add(&self, backend: &str) {
        let said = self.script(&[], "add", backend);
        assert!(said.status.success(), "{said:?}");
        assert_eq!(self.get(backend, "hotplug-status"), "connected");
    }

    /// `add` fails with these words, and leaves no tapdisk that was not there.
    fn refuse(&self, backend: &str, words: &str) {
        let before = self.list();
        let said = self.script(&[], "add", backend);
        let errors = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(said.status.code() == Some(1) && errors.contains(words), "{words}: {errors}");
        let error = self.get(backend, "hotplug-error");
        assert!(error.starts_with("block-tap: ") && error.contains(words), "{words}: {error}");
        assert_eq!(self.get(backend, "hotplug-status"), "error");
        assert_eq!((self.get(backend, "pid"), self.list()), (String::new(), before));
    }

    fn remove(&self, backend: &str) {
        let said = self.script(&[], "remove", backend);
        assert!(said.status.success(), "{said:?}");
    }

    /// `tap-ctl list`
    fn list(&self) -> String {
        self.host.good(&["list"])
    }

    /// No tapdisk, nothing of one, and nobody who uses one.
    fn wait_empty(&self) {
        self.host.wait_empty();
        let left: Vec<_> =
            std::fs::read_dir(self.path("run")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| name.to_string_lossy().starts_with("lock-")), "{left:?}");
    }
}

#[test]
fn an_image_gets_a_tapdisk_and_loses_it_whatever_its_name_and_the_shell() {
    let shells: [&[&str]; 4] = [&[], &["dash"], &["bash", "--posix"], &["busybox", "sh"]];
    for shell in shells {
        if shell.first().is_some_and(|shell| Command::new(shell).args(["-c", "true"]).output().is_err()) {
            println!("no {shell:?} here");
            continue;
        }
        let xen = Xen::new();
        let names = ["disk.img", "it's \"the\" disk, 2 $(of) `them` *.img", "a=b:c.img", "disk.vhd", "a b.vhd"];
        for (i, name) in names.into_iter().enumerate() {
            let path = xen.image(name);
            let kind = if name.ends_with("vhd") { "vhd" } else { "aio" };
            let typed = format!("{kind}:{path}");
            for params in [&typed, &path] {
                let backend = xen.make(i as u32, 51712, params, "w");
                let said = xen.script(shell, "add", &backend);
                assert!(said.status.success() && said.stderr.is_empty(), "{shell:?}, {params}: {said:?}");
                let [pid, minor] = ["pid", "minor"].map(|name| xen.get(&backend, name));
                assert_eq!(xen.list(), format!("pid={pid} minor={minor} state=0 args={typed}"));
                let socket = xen.get(&backend, "physical-device-path");
                assert_eq!(socket, format!("{}/nbd{pid}.{minor}", xen.host.directory().display()));
                assert_eq!(run(nbdinfo(&socket).arg("--size")), "2097152\n");
                assert_eq!(xen.get(&backend, "hotplug-status"), "connected");
                let said = xen.script(shell, "remove", &backend);
                assert!(said.status.success() && said.stderr.is_empty(), "{shell:?}, {params}: {said:?}");
                xen.wait_empty();
            }
        }
    }
}

fn nbdinfo(socket: &str) -> Command {
    let mut command = Command::new("nbdinfo");
    command.arg(format!("nbd+unix:///?socket={socket}"));
    command
}

#[test]
fn the_mode_says_whether_writes_are_refused_and_tapdisk_params_which_image() {
    let xen = Xen::new();
    let image = xen.image("disk.img");
    for (mode, read_only) in [("r", true), ("w", false), ("w!", false), ("", true)] {
        let backend = xen.make(1, 51712, "/not/this.img", mode);
        xen.set(&format!("{backend}/tapdisk-params"), &format!("aio:{image}"));
        xen.add(&backend);
        let info = run(nbdinfo(&xen.get(&backend, "physical-device-path")).arg("--json"));
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["exports"][0]["is_read_only"], read_only, "mode {mode:?}");
        xen.remove(&backend);
        xen.wait_empty();
    }
}

#[test]
fn guests_that_may_share_an_image_have_one_tapdisk_that_ends_with_the_last() {
    let xen = Xen::new();
    let image = xen.image("disk.img");
    let [one, two] = [1, 2].map(|domain| xen.make(domain, 51712, &image, "r"));
    xen.add(&one);
    xen.add(&two);
    let both = [&one, &two].map(|backend| (xen.get(backend, "pid"), xen.get(backend, "minor")));
    assert_eq!((&both[0], xen.list().lines().count()), (&both[1], 1));
    // Who writes is not let in, nor who reads where somebody writes.
    let writer = xen.make(3, 51712, &image, "w");
    xen.refuse(&writer, "disk.img is in use by domain ");
    xen.remove(&writer);
    xen.remove(&one);
    assert_eq!(xen.list().lines().count(), 1, "the second one uses it");
    xen.remove(&two);
    xen.wait_empty();
    let writer = xen.make(3, 51712, &image, "w");
    xen.add(&writer);
    let reader = xen.make(4, 51712, &image, "r");
    xen.refuse(&reader, "disk.img is in use by domain 3");
    // The device model's domain has what its guest has.
    let model = xen.make(5, 51712, &image, "w");
    xen.set("/local/domain/5/target", "3");
    xen.add(&model);
    let insists = xen.make(6, 51712, &image, "w!");
    xen.add(&insists);
    xen.remove(&insists);
    xen.remove(&writer);
    assert_eq!(xen.list().lines().count(), 1);
    // Nor may it only read, or somebody else.
    let reads = xen.make(5, 51728, &image, "r");
    xen.refuse(&reads, "disk.img is in use by domain ");
    // One that went without a word uses nothing.
    let gone = xen.make(7, 51712, &image, "w!");
    xen.add(&gone);
    xen.forget(&gone);
    xen.remove(&model);
    xen.wait_empty();
}

#[test]
fn what_fails_is_told_and_undone() {
    let xen = Xen::new();
    let image = xen.image("disk.img");
    let missing = xen.path("missing.img").display().to_string();
    for (params, words) in [
        (missing.as_str(), "missing.img"),
        (&format!("vhd:{image}"), "disk.img"),
        (&format!("qcow2:{image}"), "qcow2"),
        ("", "has no image: neither tapdisk-params nor params"),
        ("aio:relative.img", "\"aio:relative.img\" is no image: expected type:/path"),
        ("nonsense", "\"nonsense\" is no image: expected type:/path"),
    ] {
        let backend = xen.make(1, 51712, params, "w");
        xen.refuse(&backend, words);
        // As libxl does then.
        xen.remove(&backend);
        xen.wait_empty();
    }
    // An image that somebody else has.
    let held = std::fs::File::open(&image).unwrap();
    let held = nix::fcntl::Flock::lock(held, nix::fcntl::FlockArg::LockExclusiveNonblock).unwrap();
    let backend = xen.make(1, 51712, &image, "w");
    xen.refuse(&backend, "disk.img");
    drop(held);
    xen.wait_empty();
    // Nor is a tapdisk used, or ended, that somebody else has started.
    let (pid, minor) = xen.host.opened(&format!("aio:{image}"));
    xen.refuse(&backend, &format!("in use by process {pid}"));
    xen.remove(&backend);
    xen.host.done(&["destroy", "-p", &pid, "-m", &minor]);
    xen.wait_empty();
    xen.add(&backend);
    xen.remove(&backend);
    xen.remove(&backend);
    let said = xen.script(&[], "status", &backend);
    assert_eq!(said.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&said.stdout).contains("block-tap add | remove"), "{said:?}");
    xen.wait_empty();
}

#[test]
fn a_tapdisk_that_was_killed_is_removed_and_its_image_is_served_again() {
    let xen = Xen::new();
    let image = xen.image("disk.img");
    let backend = xen.make(1, 51712, &image, "w");
    for _ in 0..2 {
        xen.add(&backend);
        let pid: i32 = xen.get(&backend, "pid").parse().unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
        xen.remove(&backend);
        assert_eq!(xen.list(), "");
    }
    xen.add(&backend);
    assert_eq!(xen.list().lines().count(), 1);
    xen.remove(&backend);
}

#[test]
fn a_tapdisk_that_has_got_the_id_of_one_that_was_killed_is_left_alone() {
    let xen = Xen::new();
    let backend = xen.make(1, 51712, &xen.image("disk.img"), "w");
    xen.add(&backend);
    let killed: i32 = xen.get(&backend, "pid").parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(killed), nix::sys::signal::Signal::SIGKILL).unwrap();
    let other = format!("aio:{}", xen.image("other.img"));
    let (pid, minor) = xen.host.opened(&other);
    let user = xen.path("run").join("1-51712.user");
    let text = std::fs::read_to_string(&user).unwrap();
    let minor_of_killed = xen.get(&backend, "minor");
    std::fs::write(&user, text.replace(&format!(" {killed} {minor_of_killed} "), &format!(" {pid} {minor} ")))
        .unwrap();
    xen.remove(&backend);
    assert!(xen.list().contains(&format!("args={other}")), "{}", xen.list());
    assert!(!user.exists());
    xen.host.done(&["destroy", "-p", &pid, "-m", &minor]);
}

#[test]
fn a_tapdisk_whose_image_is_another_one_by_now_ends_all_the_same() {
    let xen = Xen::new();
    let backend = xen.make(1, 51712, &xen.image("disk.img"), "w");
    xen.add(&backend);
    let (pid, minor) = (xen.get(&backend, "pid"), xen.get(&backend, "minor"));
    let snapshot = format!("aio:{}", xen.image("snapshot.img"));
    xen.host.done(&["pause", "-p", &pid, "-m", &minor]);
    xen.host.done(&["unpause", "-p", &pid, "-m", &minor, "-a", &snapshot]);
    xen.remove(&backend);
    xen.wait_empty();
}

#[test]
fn many_at_once_do_not_disturb_each_other() {
    let xen = Xen::new();
    let shared = xen.image("shared.img");
    let disks: Vec<_> = (0..12)
        .map(|i| {
            let own = xen.image(&format!("{i}.img"));
            if i % 3 == 0 { xen.make(i, 51712, &shared, "r") } else { xen.make(i, 51712, &own, "w") }
        })
        .collect();
    for command in ["add", "remove"] {
        std::thread::scope(|scope| {
            for backend in &disks {
                let xen = &xen;
                scope.spawn(move || {
                    let said = xen.script(&[], command, backend);
                    assert!(said.status.success(), "{command} {backend}: {said:?}");
                });
            }
        });
        if command == "add" {
            assert_eq!(xen.list().lines().count(), 9, "eight, and the one that four share");
        }
    }
    xen.wait_empty();
}
