//! What a tapdisk may do once it serves, and under the restrictions of its systemd units.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::host::Host;
use crate::common::live::name;
use crate::common::needs::{self, skipped};
use crate::common::served::{Served, folder, output, run, tool};
use crate::common::vhd::good;

const RAM: &str = "type = 'ram'\nsize = '1 MiB'";
const UNITS: [&str; 2] = ["tapdisk@.service", "tapdisk-vbd@.service"];

/// DAC_OVERRIDE, SETGID, SETUID, IPC_LOCK.
const KEPT: u64 = 1 << 1 | 1 << 6 | 1 << 7 | 1 << 14;

/// Of each thread: its name, and that it has no capability but those, and gets none by a program.
fn threads(pid: i32, kept: u64) -> Vec<String> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = threads.filter_map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")).ok());
    let check = |status: String| {
        let value = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        for set in ["CapEff:", "CapPrm:"] {
            assert_eq!(value(set) & !kept, 0, "{status}");
        }
        assert_eq!((value("CapInh:"), value("CapAmb:"), value("NoNewPrivs:")), (0, 0, 1), "{status}");
        status.lines().next().unwrap().trim_start_matches("Name:\t").to_owned()
    };
    status.map(check).collect()
}

#[test]
fn each_thread_has_the_capabilities_that_it_needs_and_no_others() {
    let folder = folder();
    let path = folder.path().join("image");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    for engine in ["aio", "threads", "io_uring"] {
        let image = format!("path = '{}'\ndirect = 'off'", path.display());
        let served =
            Served::start(&image, &format!("[frontend.nbd]\nsocket = '{{s}}/nbd'\n[engine]\nname = '{engine}'\n"));
        run(Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 64k", "-c", "flush"]).arg(served.nbd()));
        let names = threads(served.pid(), KEPT);
        assert!(names.len() > 2 && names.iter().any(|name| name == "log"), "{names:?}");
    }
    // In the background, too, after it has opened an image.
    let host = Host::new();
    let (pid, minor) = host.opened(&name("aio", &path));
    threads(pid.parse().unwrap(), KEPT);
    host.done(&["destroy", "-p", &pid, "-m", &minor]);
    // What is asked for and takes one more.
    let served = Served::start(RAM, "[engine]\nsqpoll = true\n");
    threads(served.pid(), KEPT | 1 << 23);
}

/// To see what a process has open takes its capabilities (ptrace(2)), and one of before an upgrade has all.
#[test]
fn a_parent_of_a_tapdisk_with_more_capabilities_is_known_too() {
    if !needs::root() {
        return;
    }
    let folder = folder();
    let [base, leaf] = ["base.vhd", "leaf.vhd"].map(|name| folder.path().join(name));
    good("create -n {} -s 16", &[&base]);
    good("snapshot -n {} -p {} -e", &[&leaf, &base]);
    let image = format!("type = 'vhd'\npath = '{}'\nread_only = true", base.display());
    let served = Served::start(&image, "[engine]\nsqpoll = true\n");
    let word = |words: &[&str]| run(served.tap_ctl().args(words)).trim().rsplit('-').next().unwrap().to_owned();
    let (minor, pid) = (word(&["allocate"]), word(&["spawn"]));
    run(served.tap_ctl().args(["attach", "-m", &minor, "-p", &pid]));
    run(served.tap_ctl().args(["open", "-m", &minor, "-p", &pid, "-a", &name("vhd", &leaf), "-e", "0"]));
    for step in ["close", "detach"] {
        run(served.tap_ctl().args([step, "-m", &minor, "-p", &pid]));
    }
}

/// A command that goes on with the unit's capabilities, and gets none by running a program.
fn restricted(unit: &str) -> Command {
    let mut command = Command::new("setpriv");
    let set = capabilities(unit).join(",+");
    command.arg("--no-new-privs").arg(format!("--bounding-set=-all,+{set}")).arg(tool("tapdisk").get_program());
    command
}

fn unit(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("conf").join(name)
}

fn capabilities(name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(unit(name)).unwrap();
    let set = text.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let names = set.split(' ').map(|name| name.strip_prefix("CAP_").unwrap().to_lowercase());
    // A machine that lacks one has none to keep.
    let all = run(Command::new("setpriv").arg("--dump"));
    let bounding = all.lines().find_map(|line| line.strip_prefix("Capability bounding set: ")).unwrap();
    let there: BTreeSet<_> = bounding.split(',').collect();
    names.filter(|name| there.contains(name.as_str())).collect()
}

#[test]
fn it_serves_with_the_capabilities_of_its_units() {
    if !needs::root() {
        return;
    }
    let folder = folder();
    let path = folder.path().join("image");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    // Another user's, and the control socket is another group's.
    std::os::unix::fs::chown(&path, Some(65534), Some(65534)).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    for unit in UNITS {
        let rest = "[frontend.nbd]\nsocket = '{s}/nbd'\n[control]\ndirectory = '{s}'\ngroup = 'nogroup'\n";
        let served = Served::start_by(restricted(unit), "", &format!("path = '{}'", path.display()), rest);
        run(Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 64k", "-c", "flush"]).arg(served.nbd()));
        let member = "import socket,struct,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n";
        std::fs::set_permissions(served.sockets(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--reuid=1", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", member]);
        run(command.arg(tapdisk::control::client::path(served.sockets(), served.pid())));
        run(served.tap_ctl().arg("pause"));
        run(served.tap_ctl().arg("unpause"));
        let (code, log) = served.stop();
        assert_eq!(code, Some(0), "{log}");
    }
}

#[test]
fn the_units_are_valid_and_restricted() {
    let Ok(there) = Command::new("systemd-analyze").arg("--version").output() else {
        return skipped("no systemd-analyze");
    };
    assert!(there.status.success());
    for name in UNITS {
        let folder = folder();
        // The programs are where they were built. An instance of it.
        let text = std::fs::read_to_string(unit(name)).unwrap();
        let text = text.replace("/usr/bin/tapdisk", tool("tapdisk").get_program().to_str().unwrap());
        let path = folder.path().join(name.replace('@', "@1-51712"));
        std::fs::write(&path, text).unwrap();
        let said = output(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path));
        let errors = String::from_utf8_lossy(&said.stderr);
        let ours: Vec<_> = errors.lines().filter(|line| line.contains("51712")).collect();
        assert!(said.status.success() && ours.is_empty(), "{errors}");
        // 100 is no restriction at all.
        let how = ["security", "--offline=true", "--no-pager", "--threshold=40"];
        let said = output(Command::new("systemd-analyze").args(how).arg(&path));
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stdout));
    }
}

/// The system calls of a set of systemd's, and of the sets in it.
fn allowed(set: &str, calls: &mut BTreeSet<String>) {
    for line in run(Command::new("systemd-analyze").args(["syscall-filter", set])).lines().skip(1) {
        match line.trim() {
            inner if inner.starts_with('@') => allowed(inner, calls),
            call if call.is_empty() || call.starts_with('#') => {}
            call => drop(calls.insert(call.to_owned())),
        }
    }
}

#[test]
fn the_units_allow_the_system_calls_that_it_makes() {
    let there = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if !there("systemd-analyze") || !there("strace") {
        return skipped("no systemd-analyze, or no strace");
    }
    let mut calls = BTreeSet::new();
    allowed("@system-service", &mut calls);
    let folder = folder();
    let path = folder.path().join("image");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    for engine in ["aio", "threads", "io_uring"] {
        let trace = folder.path().join(engine);
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-o"]).arg(&trace).arg(tool("tapdisk").get_program());
        let image = format!("path = '{}'", path.display());
        let rest = format!("[frontend.nbd]\nsocket = '{{s}}/nbd'\n[engine]\nname = '{engine}'\n");
        let served = Served::start_by(command, "", &image, &rest);
        let commands = ["write 0 64k", "flush", "discard 0 64k", "write -z 0 64k", "read 0 64k"];
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        run(Command::new("qemu-io").args(["-f", "raw"]).args(commands).arg(served.nbd()));
        for words in [&["pause"][..], &["unpause"], &["exit"]] {
            run(served.tap_ctl().args(words));
        }
        let mut served = served;
        assert_eq!(served.code(), Some(0));
        let text = std::fs::read_to_string(&trace).unwrap();
        let made =
            text.lines().filter_map(|line| line.split_once(' ')?.1.trim().split_once('(').map(|(call, _)| call));
        // The first one starts the program.
        let made = made.filter(|call| call.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit()));
        // What strace makes of a thread that ends just then, whose call has a number below 0, is none.
        let made = made.filter(|call| !call.starts_with("syscall_0xffffffff"));
        let forbidden: BTreeSet<_> = made.filter(|call| *call != "execve" && !calls.contains(*call)).collect();
        assert!(forbidden.is_empty() && text.contains("capset("), "{engine}: {forbidden:?}");
    }
}
