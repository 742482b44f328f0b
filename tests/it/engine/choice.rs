//! Which engine serves an image: the best one, the next best where the system forbids it, or a clear error.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::common::guest::{Guest, page};
use crate::common::served::{Served, folder, output, tool};
use crate::common::small_fs::SmallFs;
use tapdisk::frontend::blkif::wire::{OP_READ, OP_WRITE};

const LOCAL: &str = "[frontend.local]\nsocket = '{s}/ring'\n";

/// Runs its arguments with system calls forbidden that are given as "number=errno": a seccomp filter (seccomp(2)), as
/// container runtimes install one.
const WITHOUT: &str = r#"
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
load = struct.pack("HBBI", 0x20, 0, 0, 0)                                   # A = seccomp_data.nr
rules = b"".join(struct.pack("HBBI", 0x15, 0, 1, int(nr)) +                 # if A == nr
                 struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | int(errno))   # return the errno
                 for nr, errno in (rule.split("=") for rule in sys.argv[1].split(",")))
code = load + rules + struct.pack("HBBI", 0x06, 0, 0, 0x7fff0000)           # otherwise allow
class Prog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
assert libc.prctl(38, 1, 0, 0, 0) == 0                                      # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.byref(Prog(len(code) // 8, code))) == 0     # PR_SET_SECCOMP, filter
os.execv(sys.argv[2], sys.argv[2:])
"#;

/// What `tapdisk` says and its exit code, with these system calls forbidden: it is told to end at once.
fn start_without(calls: &[(i64, i32)], engine: &str, image: &Path) -> (i32, String) {
    let sockets = tempfile::tempdir().unwrap();
    let config = sockets.path().join("disk.toml");
    let text = format!(
        "[image]\npath = '{}'\ncreate = '1 MiB'\n[engine]\nname = '{engine}'\n[control]\ndirectory = '{}'\n",
        image.display(),
        sockets.path().display()
    );
    std::fs::write(&config, text).unwrap();
    let rules: Vec<_> = calls.iter().map(|(number, errno)| format!("{number}={errno}")).collect();
    let tapdisk = tool("tapdisk");
    let mut command = Command::new("timeout");
    // In the foreground: timeout would also signal its group, and a second signal cancels what still waits.
    command.args(["--foreground", "--preserve-status", "-s", "TERM", "2"]);
    command.args(["python3", "-c", WITHOUT, &rules.join(",")]);
    let output = output(command.arg(tapdisk.get_program()).arg(&config));
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

const URING: (i64, i32) = (libc::SYS_io_uring_setup, libc::EPERM);
const AIO: (i64, i32) = (libc::SYS_io_setup, libc::ENOSYS);

#[test]
fn an_engine_that_is_forbidden_is_an_error_by_name_and_another_one_under_auto() {
    let folder = folder();
    let image = folder.path().join("disk.img");
    let (code, text) = start_without(&[URING], "io_uring", &image);
    assert!(code == 1 && text.contains("kernel.io_uring_disabled") && text.contains("disk.img"), "{text}");
    let (code, text) = start_without(&[AIO], "aio", &image);
    assert!(code == 1 && text.contains("io_setup") && text.contains("disk.img"), "{text}");
    let (code, text) = start_without(&[URING], "auto", &image);
    assert!(code == 0 && text.contains("engine: aio") && !text.contains("cannot be had"), "{text}");
    let (code, text) = start_without(&[AIO], "auto", &image);
    assert!(code == 0 && text.contains("engine: io_uring"), "{text}");
    assert!(text.contains("trying the next") && text.contains("io_setup for 128 I/Os"), "{text}");
    let (code, text) = start_without(&[AIO, URING], "auto", &image);
    assert!(code == 0 && text.contains("engine: threads") && text.contains("kernel.io_uring_disabled"), "{text}");
}

#[test]
fn more_ios_than_the_machine_has_name_the_sysctl() {
    let folder = folder();
    let image = folder.path().join("disk.img");
    // As io_setup says it where fs.aio-max-nr is exhausted.
    let (code, text) = start_without(&[(libc::SYS_io_setup, libc::EAGAIN)], "aio", &image);
    assert!(code == 1 && text.contains("fs.aio-max-nr") && text.contains("engine.depth"), "{text}");
}

#[test]
fn auto_is_linux_aio_with_o_direct_and_threads_without() {
    let folder = folder();
    let image = folder.path().join("disk.img");
    let engine = |image: &str, rest: &str| {
        let served = Served::start(image, &format!("{LOCAL}{rest}"));
        let mut guest = Guest::connect(&served.ring());
        assert_eq!(guest.write(0, &[1; 512]), 0);
        served.debug_queue()["engine"]["name"].as_str().unwrap().to_owned()
    };
    let table = format!("path = '{}'\ncreate = '1 MiB'", image.display());
    assert_eq!(engine(&table, ""), "aio");
    assert_eq!(engine(&format!("{table}\ndirect = 'off'"), ""), "threads");
    assert_eq!(engine(&table, "[engine]\nname = 'io_uring'\nsqpoll = true\n"), "io_uring");
    assert_eq!(engine(&table, "[engine]\nname = 'threads'\n"), "threads");
}

#[test]
fn whatever_the_engine_was_nothing_keeps_the_image_busy_afterwards() {
    let Some(fs) = SmallFs::new("8m") else { return };
    for name in ["aio", "threads", "io_uring"] {
        let image = format!("path = '{}'\ncreate = '1 MiB'", fs.path("disk.img").display());
        let served = Served::start(&image, &format!("{LOCAL}[engine]\nname = '{name}'\n"));
        let mut guest = Guest::connect(&served.ring());
        assert_eq!(guest.write(0, &[1; 4096]), 0);
        drop(guest);
        assert_eq!(served.stop().0, Some(0));
        fs.remount();
    }
}

/// A frozen file system holds writes up. Linux AIO waits for it in `io_submit`, and with it all that comes later; the pool
/// has other threads, and io_uring (since Linux 6.12, and in stable kernels of that time) gives such a write to a worker.
#[test]
fn reads_pass_writes_that_are_stuck() {
    for name in ["threads", "io_uring"] {
        let Some(fs) = SmallFs::new("32m") else { return };
        let image = format!("path = '{}'\ncreate = '16 MiB'", fs.path("disk.img").display());
        let served = Served::start(&image, &format!("{LOCAL}[engine]\nname = '{name}'\n"));
        let mut guest = Guest::connect(&served.ring());
        assert_eq!(guest.write(0, &[7; 4096]), 0);
        let frozen = fs.freeze();
        for i in 0..4 {
            let entry = guest.entry(OP_WRITE).with_sector(1024 + 64 * i).with_segments(1, &[page(1 + i as u32)]);
            guest.queue.ring.push(&entry);
        }
        guest.queue.publish().unwrap();
        assert!(guest.try_response(Duration::from_millis(300)).is_none(), "the file system is not frozen");
        let read = guest.entry(OP_READ).with_sector(0).with_segments(1, &[page(0)]);
        guest.queue.ring.push(&read);
        guest.queue.publish().unwrap();
        let response = guest.response();
        assert_eq!((response.id, response.status), (read.id(), 0), "{name}");
        drop(frozen);
        for _ in 0..4 {
            assert_eq!(guest.response().status, 0, "{name}");
        }
    }
}
