//! `cbt-util`: output and exit codes, row by row, as storage managers know them from blktap's; files that are cut off, too large, links, in
//! use, or devices.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use tempfile::TempDir;

use crate::common::needs;
use crate::common::served::{folder, output, run, tool};
use crate::common::small_fs::Loop;

const UUID: &str = "0f0e0d0c-0b0a-0908-0706-050403020100";
const NIL: &str = "00000000-0000-0000-0000-000000000000";
/// A disk of 17 blocks, the last in part, whose map has three bytes.
const SIZE: u64 = 16 * 65536 + 512;

fn util(words: &str, paths: &[&Path]) -> Output {
    let mut command = tool("cbt-util");
    let mut paths = paths.iter();
    for word in words.split_whitespace() {
        match word {
            "{}" => command.arg(paths.next().unwrap()),
            word => command.arg(word),
        };
    }
    output(&mut command)
}

/// What it prints; it must succeed, and say nothing else.
#[track_caller]
fn good(words: &str, paths: &[&Path]) -> Vec<u8> {
    let said = util(words, paths);
    let errors = String::from_utf8_lossy(&said.stderr).into_owned();
    assert_eq!((said.status.code(), errors.as_str()), (Some(0), ""), "{words}");
    said.stdout
}

/// It must fail so, print nothing, and name the file and `text` in one line.
#[track_caller]
fn bad(words: &str, paths: &[&Path], errno: i32, text: &str) {
    let said = util(words, paths);
    let errors = String::from_utf8_lossy(&said.stderr).into_owned();
    assert_eq!((said.status.code(), said.stdout.as_slice()), (Some(errno), &b""[..]), "{words}: {errors}");
    let names_one = paths.iter().any(|path| errors.contains(&*path.to_string_lossy()));
    assert!(errors.contains(text) && names_one && errors.lines().count() == 1, "{words}: {errors}");
}

fn line(words: &str, paths: &[&Path]) -> String {
    let line = String::from_utf8(good(words, paths)).unwrap();
    line.strip_suffix('\n').unwrap().to_owned()
}

fn log(folder: &TempDir, name: &str, size: u64) -> PathBuf {
    let path = folder.path().join(name);
    assert_eq!(good(&format!("create -n {{}} -s {size}"), &[&path]), b"");
    path
}

/// Sets bytes of the map.
fn mark(path: &Path, at: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, 48 + at).unwrap();
}

fn names(folder: &TempDir) -> Vec<String> {
    let names = std::fs::read_dir(folder.path()).unwrap();
    let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_new_log_has_no_bit_and_its_file_is_as_blktap_makes_it() {
    let folder = folder();
    let path = log(&folder, "a.cbtlog", SIZE);
    let mut whole = vec![0; 51];
    whole[40..48].copy_from_slice(&SIZE.to_le_bytes());
    assert_eq!(std::fs::read(&path).unwrap(), whole);
    for (what, told) in [("-p", NIL), ("-c", NIL), ("-f", "0"), ("-s", "1049088")] {
        assert_eq!(line(&format!("get -n {{}} {what}"), &[&path]), told);
    }
    assert_eq!(good("get -n {} -b", &[&path]), [0; 3], "no end of line");
    assert_eq!(names(&folder), ["a.cbtlog"]);
}

#[test]
fn what_is_set_is_what_is_got_and_nothing_else_changes() {
    let folder = folder();
    let path = log(&folder, "a.cbtlog", SIZE);
    mark(&path, 0, &[1, 2, 3]);
    let all = || ["-p", "-c", "-f", "-s"].map(|what| line(&format!("get -n {{}} {what}"), &[&path]));
    let other = UUID.to_uppercase();
    for (words, after) in [
        (format!("-p {UUID}"), [UUID, NIL, "0", "1049088"]),
        (format!("-c {other}"), [UUID, UUID, "0", "1049088"]),
        ("-f 1".into(), [UUID, UUID, "1", "1049088"]),
        (format!("-p {NIL} -f 0"), [NIL, UUID, "0", "1049088"]),
        // As blktap's: it is ignored.
        ("-p nonsense -f 1".into(), [NIL, UUID, "1", "1049088"]),
        (format!("-c {UUID}0"), [NIL, UUID, "1", "1049088"]),
        ("-s 1049088".into(), [NIL, UUID, "1", "1049088"]),
        // The last one counts.
        ("-f 1 -f 0".into(), [NIL, UUID, "0", "1049088"]),
    ] {
        assert_eq!(good(&format!("set -n {{}} {words}"), &[&path]), b"");
        assert_eq!(all(), after, "{words}");
    }
    assert_eq!(good("get -n {} -b", &[&path]), [1, 2, 3]);
}

#[test]
fn a_log_grows_with_its_disk_and_what_is_new_was_not_written() {
    let folder = folder();
    let path = log(&folder, "a.cbtlog", SIZE);
    // One that has something behind its map, and in the bits of blocks that there are not.
    mark(&path, 0, &[0xff; 5]);
    bad("set -n {} -s 1049087", &[&path], libc::EINVAL, "no disk becomes smaller");
    assert_eq!(line("get -n {} -s", &[&path]), "1049088");
    good("set -n {} -s 2097152", &[&path]);
    assert_eq!(good("get -n {} -b", &[&path]), [0xff, 0xff, 1, 0]);
    good("set -n {} -s 20971520", &[&path]);
    let map = good("get -n {} -b", &[&path]);
    assert_eq!(
        (map.len(), &map[..5], map[5..].iter().any(|byte| *byte != 0)),
        (40, &[0xff, 0xff, 1, 0, 0][..], false)
    );
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 88, "and the file has all of it");
    // Within the last block there is nothing to add.
    let path = log(&folder, "b.cbtlog", SIZE);
    mark(&path, 0, &[0, 0, 1]);
    good("set -n {} -s 1049600", &[&path]);
    assert_eq!(good("get -n {} -b", &[&path]), [0, 0, 1]);
}

#[test]
fn an_older_logs_bits_are_added_to_a_newer_ones() {
    let folder = folder();
    let (older, newer) = (log(&folder, "older", SIZE), log(&folder, "newer", 2 << 20));
    mark(&older, 0, &[1, 0x80, 1]);
    mark(&newer, 0, &[2, 0x80, 0, 4]);
    let before = std::fs::read(&older).unwrap();
    good(&format!("set -n {{}} -p {UUID} -f 1"), &[&newer]);
    // Done again, as after it was cut short, it is the same.
    for _ in 0..2 {
        assert_eq!(good("coalesce -p {} -c {}", &[&older, &newer]), b"");
        assert_eq!(good("get -n {} -b", &[&newer]), [3, 0x80, 1, 4]);
    }
    assert!(std::fs::read(&older).unwrap() == before);
    assert_eq!((line("get -n {} -p", &[&newer]), line("get -n {} -f", &[&newer])), (UUID.to_owned(), "1".to_owned()));
    bad("coalesce -p {} -c {}", &[&newer, &older], libc::EINVAL, "cbt-util set -s 2097152 makes room");
    assert!(std::fs::read(&older).unwrap() == before);
    // Of many pieces.
    let size = (5 << 20) * 8 * 65536_u64;
    let (older, newer) = (log(&folder, "large older", size), log(&folder, "large newer", size));
    for at in [0, (1 << 20) - 1, 1 << 20, (5 << 20) - 1] {
        mark(&older, at, &[0x11]);
        mark(&newer, at, &[0x22]);
    }
    good("coalesce -p {} -c {}", &[&older, &newer]);
    let map = good("get -n {} -b", &[&newer]);
    assert_eq!((map.len(), map.iter().filter(|byte| **byte == 0x33).count()), (5 << 20, 4));
    assert_eq!(map.iter().filter(|byte| **byte != 0).count(), 4);
}

#[test]
fn wrong_command_lines_end_as_blktaps() {
    let folder = folder();
    let path = log(&folder, "a.cbtlog", SIZE);
    let before = std::fs::read(&path).unwrap();
    for words in [
        "get",
        "get -p",
        "get -n {}",
        "get -n {} -p -c",
        "get -n {} -s -b",
        "get -n {} -x",
        "set -n {}",
        "set -f 1",
        "set -n {} -f 2",
        "set -n {} -f x",
        "set -n {} -s 0",
        "set -n {} -s 1x",
        "create -n {}",
        "create -s 1",
        "create -n {} -s 0",
        "create -n {} -s -1",
        "create -n {} -s 99999999999999999999",
        "coalesce -p {}",
        "coalesce -c {}",
    ] {
        let said = util(words, &[&path, &path]);
        let errors = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(said.status.code() == Some(libc::EINVAL) && said.stdout.is_empty(), "{words}: {errors}");
        assert!(errors.contains("--help"), "{words}: {errors}");
    }
    assert!(std::fs::read(&path).unwrap() == before);
    for command in ["create", "set", "get", "coalesce"] {
        for (option, code) in [("-h", libc::EINVAL), ("--help", 0)] {
            let said = util(&format!("{command} {option}"), &[]);
            let text = String::from_utf8(said.stdout).unwrap();
            assert!(
                said.status.code() == Some(code) && text.contains(&format!("Usage: cbt-util {command}")),
                "{text}"
            );
        }
    }
    for (words, first) in [("", ""), ("nonsense", "nonsense: no such command\n"), ("-h", "-h: no such command\n")] {
        let said = util(words, &[]);
        assert_eq!((said.status.code(), String::from_utf8(said.stderr).unwrap().as_str()), (Some(0), first));
        assert!(String::from_utf8(said.stdout).unwrap().contains("Usage: cbt-util <COMMAND>"), "{words}");
    }
    assert_eq!(util("--version", &[]).status.code(), Some(0));
}

#[test]
fn a_file_that_is_not_there_or_is_too_short_has_its_errno() {
    let folder = folder();
    let whole = log(&folder, "whole", SIZE);
    let missing = folder.path().join("missing");
    for words in ["get -n {} -p", "set -n {} -f 1", "coalesce -p {} -c {}"] {
        bad(words, &[&missing, &whole], libc::ENOENT, "cannot open it");
    }
    bad("coalesce -p {} -c {}", &[&whole, &missing], libc::ENOENT, "cannot open it");
    bad("create -n {} -s 512", &[&folder.path().join("no/folder")], libc::ENOENT, "cannot make it");
    let short = folder.path().join("short");
    for len in [0, 47] {
        std::fs::write(&short, &std::fs::read(&whole).unwrap()[..len]).unwrap();
        for words in
            ["get -n {} -p", "get -n {} -b", "set -n {} -f 1", "set -n {} -s 9999999", "coalesce -p {} -c {}"]
        {
            bad(
                words,
                &[&short, &whole],
                libc::EIO,
                &format!("it has {len} bytes, and a log of changed blocks has 48"),
            );
        }
        bad("coalesce -p {} -c {}", &[&whole, &short], libc::EIO, "cbt-util create makes one");
    }
    // A map that is cut off: what the header says can be seen and set.
    std::fs::write(&short, &std::fs::read(&whole).unwrap()[..50]).unwrap();
    assert_eq!(line("get -n {} -s", &[&short]), "1049088");
    good("set -n {} -f 1", &[&short]);
    let text = "it has 50 bytes, and the log of a disk of 1049088 bytes has 51";
    for words in ["get -n {} -b", "set -n {} -s 9999999", "coalesce -p {} -c {}"] {
        bad(words, &[&short, &whole], libc::EIO, text);
    }
    bad("coalesce -p {} -c {}", &[&whole, &short], libc::EIO, text);
    assert_eq!(std::fs::metadata(&short).unwrap().len(), 50);
    // One that is for no disk.
    std::fs::write(&short, [0; 100]).unwrap();
    assert_eq!(line("get -n {} -s", &[&short]), "0");
    bad("get -n {} -b", &[&short], libc::EIO, "0 bytes");
}

#[test]
fn a_log_is_made_whole_or_not_at_all() {
    let folder = folder();
    let path = log(&folder, "a.cbtlog", SIZE);
    mark(&path, 0, &[7; 3]);
    // As blktap's, it takes the place of what is there; its owner and mode stay.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    if needs::root() {
        std::os::unix::fs::chown(&path, Some(65534), Some(65533)).unwrap();
    }
    let before = std::fs::metadata(&path).unwrap();
    good("create -n {} -s 512", &[&path]);
    let after = std::fs::metadata(&path).unwrap();
    assert_eq!(
        (after.len(), after.mode(), after.uid(), after.gid()),
        (49, before.mode(), before.uid(), before.gid())
    );
    // Something that a killed one has left, or somebody has put there.
    let (victim, new) = (folder.path().join("victim"), folder.path().join("a.cbtlog.new"));
    std::fs::write(&victim, "precious").unwrap();
    symlink("victim", &new).unwrap();
    good("create -n {} -s 1024", &[&path]);
    assert_eq!(
        (line("get -n {} -s", &[&path]).as_str(), std::fs::read(&victim).unwrap().as_slice()),
        ("1024", &b"precious"[..])
    );
    // A size for which there is no room: what was there stays.
    for size in [u64::MAX, 1 << 60] {
        bad(&format!("create -n {{}} -s {size}"), &[&path], libc::ENOSPC, "make room first");
        bad(&format!("set -n {{}} -s {size}"), &[&path], libc::ENOSPC, "make room first");
    }
    assert_eq!(line("get -n {} -s", &[&path]), "1024");
    assert_eq!(names(&folder), ["a.cbtlog", "victim"]);
    // A write that fails in between.
    let limited = output(
        Command::new("prlimit")
            .arg("--fsize=100")
            .arg(tool("cbt-util").get_program())
            .args(["create", "-s", "999999999", "-n"])
            .arg(&path),
    );
    assert!(!limited.status.success(), "{limited:?}");
    assert_eq!(line("get -n {} -s", &[&path]), "1024");
}

#[test]
fn links_are_followed_to_no_file_and_what_is_no_storage_is_not_opened() {
    let folder = folder();
    let victim = log(&folder, "victim", SIZE);
    mark(&victim, 0, &[5; 3]);
    let before = std::fs::read(&victim).unwrap();
    let at = |name: &str| folder.path().join(name);
    let (link, dangling, null, fifo) = (at("link"), at("dangling"), at("null"), at("fifo"));
    symlink("victim", &link).unwrap();
    symlink("nowhere", &dangling).unwrap();
    symlink("/dev/null", &null).unwrap();
    run(Command::new("mkfifo").arg(&fifo));
    let all = ["create -n {} -s 512", "set -n {} -f 1", "get -n {} -b", "coalesce -p {} -c {}"];
    for path in [&link, &dangling, &null] {
        for words in all {
            bad(words, &[path, &victim], libc::ELOOP, "it is a link, and leads to no block device");
        }
        bad("coalesce -p {} -c {}", &[&victim, path], libc::ELOOP, "it is a link");
    }
    for words in all {
        bad(words, &[&fifo, &victim], libc::EIO, "neither a regular file nor a block device");
        bad(words, &[folder.path(), &victim], libc::EISDIR, "cannot open it");
    }
    assert!(std::fs::read(&victim).unwrap() == before && !at("nowhere").exists());
}

#[test]
fn the_map_of_a_log_in_use_is_left_alone() {
    let folder = folder();
    let (path, other) = (log(&folder, "a.cbtlog", SIZE), log(&folder, "b.cbtlog", SIZE));
    let held = Flock::lock(File::open(&path).unwrap(), FlockArg::LockShared).map_err(|(_, errno)| errno).unwrap();
    for words in ["create -n {} -s 512", "set -n {} -s 2097152", "coalesce -c {} -p {}"] {
        bad(words, &[&path, &other], libc::EBUSY, "pause the disk first, or close it");
    }
    // What the storage manager says of it, and what is only read.
    good(&format!("set -n {{}} -f 1 -p {UUID}"), &[&path]);
    good("get -n {} -b", &[&path]);
    good("coalesce -p {} -c {}", &[&path, &other]);
    drop(held);
    good("create -n {} -s 512", &[&path]);
}

#[test]
fn a_volume_is_written_where_it_is() {
    let folder = folder();
    let file = folder.path().join("volume");
    std::fs::write(&file, vec![0xee; 4 << 20]).unwrap();
    let Some(device) = Loop::new(&file, 512) else { return };
    let node = Path::new(&device.0);
    let link = folder.path().join("link");
    symlink(node, &link).unwrap();
    let size = (4 << 20) * 8 * 65536_u64;
    bad(&format!("create -n {{}} -s {size}"), &[&link], libc::ENOSPC, "the device has 4194304");
    assert_eq!(std::fs::read(node).unwrap()[..64], [0xee; 64], "it is as it was");
    good("create -n {} -s 1049088", &[&link]);
    assert_eq!(good("get -n {} -b", &[&link]), [0; 3]);
    good("set -n {} -s 2097152", &[node]);
    assert_eq!(good("get -n {} -b", &[node]), [0; 4]);
    let other = log(&folder, "other", 2 << 20);
    mark(&other, 0, &[1, 2, 3, 4]);
    good("coalesce -p {} -c {}", &[&other, &link]);
    assert_eq!(good("get -n {} -b", &[node]), [1, 2, 3, 4]);
    assert!(link.is_symlink() && std::fs::read(node).unwrap()[52..64] == [0xee; 12]);
    // One that something else has for itself.
    let mounted = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(node).unwrap();
    bad("create -n {} -s 512", &[node], libc::EBUSY, "has the device for itself");
    drop(mounted);
}

/// It ends by itself in 256 MiB of addresses.
fn limited(words: &[&str], path: &Path) -> (i32, String) {
    let mut command = Command::new("prlimit");
    command.args(["--as=268435456", "--core=0", "timeout", "60"]).arg(tool("cbt-util").get_program());
    let done = output(command.args(words).arg("-n").arg(path));
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    let code = done.status.code().unwrap_or(128 + done.status.signal().unwrap_or(0));
    assert!(code < 124 && !said.contains("panicked") && !said.contains("allocation"), "{words:?}: {said}");
    (code, said)
}

#[test]
fn what_a_log_claims_of_its_size_decides_no_allocation() {
    let folder = folder();
    let path = log(&folder, "a.cbtlog", SIZE);
    for size in [1 << 50, 1 << 63, u64::MAX] {
        change_size(&path, size);
        for words in [&["get", "-b"][..], &["set", "-s", "18446744073709551615"], &["coalesce", "-p"]] {
            let (code, said) = match words {
                ["coalesce", _] => coalesce_limited(&path),
                words => limited(words, &path),
            };
            assert_eq!(code, libc::EIO, "{words:?}: {said}");
        }
    }
    // A map of 512 MiB that is there, most of it a hole.
    change_size(&path, 1 << 48);
    OpenOptions::new().write(true).open(&path).unwrap().set_len(48 + (1 << 29)).unwrap();
    assert_eq!(limited(&["get", "-b"], &path).0, 0);
    assert_eq!(coalesce_limited(&path).0, 0);
}

fn change_size(path: &Path, size: u64) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(&size.to_le_bytes(), 40).unwrap();
}

/// Of a log with itself.
fn coalesce_limited(path: &Path) -> (i32, String) {
    let mut command = Command::new("prlimit");
    command.args(["--as=268435456", "--core=0", "timeout", "60"]).arg(tool("cbt-util").get_program());
    let done = output(command.args(["coalesce", "-p"]).arg(path).arg("-c").arg(path));
    (done.status.code().unwrap(), String::from_utf8_lossy(&done.stderr).into_owned())
}

/// What the storage manager's cbtutil.py runs, and what it makes of the output.
const STORAGE_MANAGER: &str = r#"
import subprocess, sys, uuid
tool, folder = sys.argv[1:]
def call(*words):
    done = subprocess.run([tool, *words], capture_output=True)
    assert done.returncode == 0 and done.stderr == b"", done
    return done.stdout
older, newer = folder + "/s.cbtlog", folder + "/d.cbtlog"
size = 10 << 30
# Tracking is switched on for a disk that is attached.
call("create", "-n", newer, "-s", str(size))
call("set", "-n", newer, "-f", "0")
assert bool(int(call("get", "-n", newer, "-f").strip())) is False
# A snapshot of it.
import os
os.rename(newer, older)
s, d = uuid.uuid4(), uuid.uuid4()
call("set", "-n", older, "-f", "1")
call("create", "-n", newer, "-s", str(size))
for path, option, other in (older, "-c", d), (newer, "-p", s):
    call("set", "-n", path, option, str(other))
    assert uuid.UUID(call("get", "-n", path, option).decode().strip()) == other
with open(older, "r+b") as log:
    log.seek(48 + 100)
    log.write(b"\x0a")
# Its size is compared with that of the disk.
for path in older, newer:
    assert int(call("get", "-n", path, "-s").strip()) == size
    assert len(call("get", "-n", path, "-b")) == (size // 65536 + 7) // 8
# The disk grows.
call("set", "-n", newer, "-s", str(2 * size))
assert len(call("get", "-n", newer, "-b")) == 2 * size // 65536 // 8
# The snapshot is deleted.
call("coalesce", "-p", older, "-c", newer)
call("set", "-n", newer, "-p", str(uuid.UUID(int=0)))
os.remove(older)
map = call("get", "-n", newer, "-b")
assert map[100] == 10 and sum(map) == 10
assert uuid.UUID(call("get", "-n", newer, "-p").decode().strip()).int == 0
call("set", "-n", newer, "-f", "1")
assert bool(int(call("get", "-n", newer, "-f").strip())) is True
"#;

#[test]
fn a_storage_manager_does_with_it_what_it_does_with_blktaps() {
    let folder = folder();
    let mut python = Command::new("python3");
    python.args(["-c", STORAGE_MANAGER]).arg(tool("cbt-util").get_program()).arg(folder.path());
    assert_eq!(run(&mut python), "");
    assert_eq!(names(&folder), ["d.cbtlog"]);
}
