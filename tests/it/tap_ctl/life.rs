//! Disks by `tap-ctl`, as a storage manager makes and ends them, and many at a time.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::host::{Host, said};
use crate::common::live::{name, wait_for};
use crate::common::served::{folder, output, run, tool};
use crate::common::vhd::{disk, good};
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tapdisk::control::client;

/// Runs commands of qemu-io on a disk.
fn qemu_io(uri: &str, commands: &[&str]) {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", "raw", uri]);
    qemu_io.args(commands.iter().flat_map(|command| ["-c", command]));
    let output = output(&mut qemu_io);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !text.contains("failed"), "{commands:?}: {text}");
}

#[test]
fn what_a_storage_manager_does_with_a_disk() {
    let (host, folder) = (Host::new(), folder());
    let [base, leaf] = ["base.vhd", "leaf.vhd"].map(|name| folder.path().join(name));
    good("create -n {} -s 64", &[&base]);
    let (pid, minor) = host.opened(&name("vhd", &base));
    let uri = host.nbd(&pid, &minor);
    let with = |words: &[&'static str]| host.good(&[words, &["-p", &pid, "-m", &minor]].concat());
    qemu_io(&uri, &["write -P 0x11 0 4M", "write -P 0x22 32M 1M", "flush"]);
    // A snapshot.
    with(&["pause"]);
    good("snapshot -n {} -p {}", &[&leaf, &base]);
    host.done(&["unpause", "-p", &pid, "-m", &minor, "-a", &name("vhd", &leaf)]);
    assert_eq!(
        host.good(&["list", "-t", "vhd", "-f", leaf.to_str().unwrap()]),
        format!("pid={pid} minor={minor} state=0 args=vhd:{}", leaf.display())
    );
    assert_eq!(host.good(&["list", "-f", base.to_str().unwrap()]), "");
    qemu_io(
        &uri,
        &["write -P 0x33 1M 64k", "flush", "read -P 0x11 0 1M", "read -P 0x33 1M 64k", "read -P 0x22 32M 1M"],
    );
    let stats: Value = serde_json::from_str(&with(&["stats"])).unwrap();
    let written = (5 << 20) + (64 << 10);
    assert_eq!((&stats["name"], &stats["secs"][1]), (&name("vhd", &leaf).into(), &(written / 512).into()), "{stats}");
    let image = |path: &Path, read: u64, written: u64| {
        let driver = json!({ "type": 4, "name": "vhd", "status": null });
        json!({ "name": path, "hits": [read, written], "fail": [0, 0], "driver": driver })
    };
    assert_eq!(stats["images"], json!([image(&leaf, 128, 128), image(&base, 4096, 0)]), "each since it was opened");
    let copy = folder.path().join("copy.img");
    run(Command::new("nbdcopy").arg(&uri).arg(&copy));
    for step in [&["close", "-t", "120"][..], &["detach"]] {
        assert_eq!(with(step), "");
    }
    host.done(&["free", "-m", &minor]);
    host.wait_empty();
    assert!(std::fs::read(copy).unwrap() == disk(&leaf));
    assert!(disk(&leaf)[1 << 20..][..64 << 10].iter().all(|byte| *byte == 0x33));
    assert!(disk(&base)[..4 << 20].iter().all(|byte| *byte == 0x11));
}

#[test]
fn a_parent_that_any_tapdisk_of_the_host_has_open_is_used_again() {
    let (host, folder) = (Host::new(), folder());
    let [base, other, leaf] = ["base.vhd", "other.vhd", "leaf.vhd"].map(|name| folder.path().join(name));
    good("create -n {} -s 16", &[&base]);
    good("create -n {} -s 16", &[&other]);
    run(Command::new("qemu-io").args(["-f", "vpc", "-c", "write -P 5 0 4096"]).arg(&base));
    good("snapshot -n {} -p {}", &[&leaf, &base]);
    let read_only = |path: &Path| {
        let (pid, minor) = host.begun();
        host.done(&["attach", "-p", &pid, "-m", &minor]);
        host.done(&["open", "-p", &pid, "-m", &minor, "-a", &name("vhd", path), "-R"]);
        (pid, minor)
    };
    let ((base_pid, base_minor), (_, other_minor)) = (read_only(&base), read_only(&other));
    let (pid, minor) = host.begun();
    host.done(&["attach", "-p", &pid, "-m", &minor]);
    let image = name("vhd", &leaf);
    let open = |parent: &'static str| ["open", "-p", &pid, "-m", &minor, "-a", &image, "-e", parent];
    assert_eq!((base_minor.as_str(), other_minor.as_str()), ("0", "1"));
    host.bad(&open("7"), libc::ENODEV, "the image of minor 7, and that can't be found");
    host.bad(&open("1"), libc::EINVAL, "its parent is not the image of minor 1, which is vhd:");
    // One that is allocated, and that nobody has attached; and one that is paused.
    assert!(host.good(&["allocate"]).ends_with("tapdisk-3"));
    host.bad(&open("3"), libc::ENODEV, "the image of minor 3, and that can't be found");
    host.done(&["pause", "-p", &base_pid, "-m", "0"]);
    host.bad(&open("0"), libc::EINVAL, "is paused");
    host.done(&["unpause", "-p", &base_pid, "-m", "0"]);
    host.done(&open("0"));
    qemu_io(&host.nbd(&pid, &minor), &["read -P 5 0 4096", "write -P 6 4096 4096", "read -P 6 4096 4096"]);
}

/// Does the same for each of these numbers, eight at a time.
fn each(count: usize, what: impl Fn(usize) + Sync) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    if number >= count {
                        return;
                    }
                    what(number);
                }
            });
        }
    });
}

#[test]
fn a_hundred_disks_begin_and_end_and_nothing_is_left() {
    let (host, folder) = (Host::new(), folder());
    let image = |number: usize| folder.path().join(format!("{number}.img"));
    each(100, |number| {
        File::create(image(number)).unwrap().set_len(1 << 20).unwrap();
        let words = ["create", "-a", &name("aio", &image(number)), "-D"];
        assert!(host.good(&words).contains("/tapdisk/tapdisk-"));
    });
    let lines = host.good(&["list"]);
    let field = |line: &str, name: &str| {
        let field = line.split(' ').find_map(|field| field.strip_prefix(name)).unwrap();
        field.to_owned()
    };
    let disks: Vec<_> = lines.lines().map(|line| (field(line, "pid="), field(line, "minor="))).collect();
    let minors: BTreeSet<usize> = disks.iter().map(|(_, minor)| minor.parse().unwrap()).collect();
    assert!(minors.iter().copied().eq(0..100), "{minors:?}");
    assert_eq!(disks.iter().map(|(pid, _)| pid).collect::<BTreeSet<_>>().len(), 100);
    each(100, |number| {
        let (pid, minor) = &disks[number];
        if number % 2 == 0 {
            return host.done(&["destroy", "-p", pid, "-m", minor]);
        }
        for step in ["pause", "unpause", "close", "detach"] {
            host.done(&[step, "-p", pid, "-m", minor]);
        }
        host.done(&["free", "-m", minor]);
    });
    host.wait_empty();
}

#[test]
fn processes_that_race_for_minors_never_get_the_same() {
    let host = Host::new();
    for _ in 0..3 {
        let children: Vec<_> = (0..50)
            .map(|_| host.tap_ctl().arg("allocate").stdout(std::process::Stdio::piped()).spawn().unwrap())
            .collect();
        let outputs = children.into_iter().map(|child| child.wait_with_output().unwrap());
        let paths: BTreeSet<_> = outputs.map(|output| String::from_utf8(output.stdout).unwrap()).collect();
        let directory = host.directory().display();
        let expected: BTreeSet<_> = (0..50).map(|minor| format!("{directory}/tapdisk/tapdisk-{minor}\n")).collect();
        assert_eq!(paths, expected);
        // Two who free the same: one of them has.
        each(50, |minor| {
            let words = ["free", "-m", &minor.to_string()];
            let mut other = host.tap_ctl().args(words).stderr(std::process::Stdio::null()).spawn().unwrap();
            let codes =
                BTreeSet::from([said(host.tap_ctl().args(words)).code, other.wait().unwrap().code().unwrap()]);
            assert!(
                codes.contains(&0) && codes.iter().all(|code| [0, libc::ENOENT, libc::EAGAIN].contains(code)),
                "{codes:?}"
            );
        });
        assert!(host.files().is_empty());
    }
}

/// A program in the place of tapdisk, which says that.
fn in_place_of_tapdisk(folder: &Path, says: &str) -> PathBuf {
    let path = folder.join("tapdisk");
    std::fs::write(&path, format!("#!/bin/sh\necho {says}\n")).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path
}

#[test]
fn only_a_process_that_is_proven_to_be_a_tapdisk_is_killed() {
    let (host, folder) = (Host::new(), folder());
    let mut stranger = Command::new("sleep").arg("1000").spawn().unwrap();
    let id = stranger.id() as i32;
    // It says that it is somebody else, in another folder than it was told.
    let program = in_place_of_tapdisk(folder.path(), &format!("/elsewhere/ctl{id}"));
    let said = said(tool("tap-ctl").env("TAPDISK", program).args(["spawn", "--debug"]));
    assert!(said.code == libc::EINVAL && said.err.contains("/elsewhere"), "{} {}", said.code, said.err);
    assert!(stranger.try_wait().unwrap().is_none());
    // A tapdisk listens by the stranger's id, and none by that.
    let pid: i32 = host.good(&["spawn"]).parse().unwrap();
    let errno = |pid| client::errno(&client::signal(host.directory(), pid, Signal::SIGTERM).unwrap_err());
    assert_eq!(errno(id), Errno::ENOENT);
    let path = |pid| client::path(host.directory(), pid);
    std::os::unix::fs::symlink(path(pid), path(id)).unwrap();
    assert_eq!(errno(id), Errno::EPERM);
    assert!(stranger.try_wait().unwrap().is_none());
    // What a killed one has left.
    client::signal(host.directory(), pid, Signal::SIGKILL).unwrap();
    wait_for(|| client::signal(host.directory(), pid, Signal::SIGTERM).err());
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    for left in [id, pid] {
        // The first one may be gone with the second.
        let _ = std::fs::remove_file(path(left));
    }
}
