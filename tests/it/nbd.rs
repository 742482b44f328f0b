//! The NBD server, with clients that others wrote, and with some that break the rules.

use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use crate::common::PATIENCE;
use crate::common::served::{Served, folder, output, run};
use tempfile::TempDir;

const NBD: &str = "[frontend.nbd]\nsocket = '{s}/nbd'\nexport = 'disk'\n";
const SIZE: usize = 8 << 20;

fn serve(image: &str, rest: &str) -> (TempDir, PathBuf, Served) {
    let folder = folder();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![0x11; SIZE]).unwrap();
    let served = Served::start(&format!("path = '{}'\n{image}", path.display()), &format!("{NBD}{rest}"));
    (folder, path, served)
}

/// nbdsh is Debian's, and so must be the Python that it finds.
fn python() -> Command {
    let mut command = Command::new("nbdsh");
    command.env("PATH", "/usr/bin:/bin");
    command
}

fn nbdsh(served: &Served, script: &str) -> String {
    run(python().args(["-u", &served.nbd(), "-c", script]))
}

#[test]
fn nbdinfo_sees_the_export_and_its_holes() {
    let (_folder, path, served) = serve("", "");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    run(Command::new("fallocate").args(["--punch-hole", "--offset", "1MiB", "--length", "2MiB"]).arg(&path));
    file.sync_all().unwrap();
    let json: serde_json::Value =
        serde_json::from_str(&run(Command::new("nbdinfo").args(["--json", &served.nbd()]))).unwrap();
    let export = &json["exports"][0];
    assert_eq!((&json["structured"], &export["export-size"]), (&true.into(), &SIZE.into()));
    for able in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df"] {
        assert_eq!(export[able], true, "{able} in {export}");
    }
    assert_eq!((&export["is_read_only"], &export["block_size_minimum"]), (&false.into(), &512.into()));
    assert!(run(Command::new("nbdinfo").args(["--list", &served.nbd()])).contains("export=\"disk\""));
    let map: serde_json::Value =
        serde_json::from_str(&run(Command::new("nbdinfo").args(["--map", "--json", &served.nbd()]))).unwrap();
    let runs: Vec<_> =
        map.as_array().unwrap().iter().map(|run| (run["length"].as_u64(), run["type"].as_u64())).collect();
    let mib = |n: u64| Some(n << 20);
    assert_eq!(runs, [(mib(1), Some(0)), (mib(2), Some(3)), (mib(5), Some(0))]);
    let missing = output(Command::new("nbdinfo").arg(format!("{}&", served.nbd().replace(":///", ":///other"))));
    assert!(!missing.status.success(), "there is no such export");
}

#[test]
fn nbdsh_reads_writes_zeroes_trims_and_flushes() {
    let (_folder, path, served) = serve("", "");
    nbdsh(
        &served,
        "h.pwrite(b'A' * 1048576, 0)
h.pwrite(b'B' * 512, 4096, nbd.CMD_FLAG_FUA)
h.zero(4096, 8192)
h.zero(4096, 16384, nbd.CMD_FLAG_NO_HOLE)
h.trim(65536, 65536)
h.flush()
d = h.pread(131072, 0)
assert d[:4096] == b'A' * 4096 and d[4096:4608] == b'B' * 512
assert d[8192:12288] == bytes(4096) and d[16384:20480] == bytes(4096)
assert d[65536:131072] == bytes(65536)
assert h.pread(512, 8388096) == b'\\x11' * 512",
    );
    let mut byte = [0; 1];
    std::fs::File::open(&path).unwrap().read_exact_at(&mut byte, 4096).unwrap();
    assert_eq!(byte, *b"B");
    assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < SIZE as u64, "the trim gave space back");
    let ops = served.debug_queue()["operations"].clone();
    let count =
        |name: &str| ops.as_array().unwrap().iter().find(|op| op["op"] == name).map(|op| op["completed"].clone());
    assert_eq!((count("flush"), count("discard")), (Some(1.into()), Some(1.into())), "{ops}");
}

#[test]
fn wrong_requests_get_the_errno_of_the_protocol_and_the_connection_goes_on() {
    let (_folder, _path, served) = serve("", "");
    nbdsh(
        &served,
        "h.set_strict_mode(0)
import errno
def fails(e, f):
    try: f()
    except nbd.Error as x: assert x.errnum == e, x
    else: assert False
fails(errno.EINVAL, lambda: h.pread(512, 8388608))
fails(errno.ENOSPC, lambda: h.pwrite(b'x' * 1024, 8388096))
fails(errno.ENOSPC, lambda: h.pwrite(b'x' * 512, 1 << 62))
fails(errno.EINVAL, lambda: h.pread(100, 0))
fails(errno.EINVAL, lambda: h.pwrite(b'x' * 512, 100))
fails(errno.ENOSPC, lambda: h.trim(8388608, 512))
fails(errno.ENOSPC, lambda: h.zero(8388608, 512))
fails(errno.EINVAL, lambda: h.cache(512, 0))
assert h.pread(512, 0) == b'\\x11' * 512",
    );
    let (_folder, path, served) = serve("read_only = true", "");
    nbdsh(
        &served,
        "h.set_strict_mode(0)
import errno
assert h.is_read_only()
def fails(f):
    try: f()
    except nbd.Error as x: assert x.errnum == errno.EPERM, x
    else: assert False
fails(lambda: h.pwrite(b'x' * 512, 0))
fails(lambda: h.trim(512, 0))
fails(lambda: h.zero(512, 0))
h.flush()",
    );
    assert!(std::fs::read(path).unwrap().iter().all(|byte| *byte == 0x11));
}

#[test]
fn qemu_img_and_qemu_io_work_on_it() {
    let (folder, path, served) = serve("", "");
    let info = run(Command::new("qemu-img").args(["info", &served.nbd()]));
    assert!(info.contains("8 MiB"), "{info}");
    run(Command::new("qemu-io")
        .args(["-f", "raw"])
        .args(["-c", "write -P 0x5a 1M 3M", "-c", "read -P 0x5a 1M 3M"])
        .args([
            "-c",
            "write -z 2M 64k",
            "-c",
            "read -P 0 2M 64k",
            "-c",
            "discard 4M 1M",
            "-c",
            "write -f -P 7 0 4k",
            "-c",
            "flush",
        ])
        .arg(served.nbd()));
    let source = folder.path().join("source.qcow2");
    run(Command::new("qemu-img").args(["convert", "-O", "qcow2"]).arg(&path).arg(&source));
    run(Command::new("qemu-img").args(["convert", "-n", "-O", "raw"]).arg(&source).arg(served.nbd()));
    run(Command::new("qemu-img").args(["compare", "-F", "raw"]).arg(&source).arg(served.nbd()));
}

#[test]
fn large_requests_and_several_connections() {
    let (folder, path, served) = serve("", "");
    nbdsh(
        &served,
        "d = bytes(range(256)) * 32768\nh.pwrite(d, 0)\nassert h.pread(8388608, 0) == d\nassert h.can_multi_conn()",
    );
    let bytes = std::fs::read(&path).unwrap();
    assert!(bytes.chunks(256).all(|chunk| chunk.iter().enumerate().all(|(i, byte)| i == usize::from(*byte))));
    let copy = folder.path().join("copy");
    run(Command::new("nbdcopy").args(["--connections=8", "--requests=64", &served.nbd()]).arg(&copy));
    assert!(std::fs::read(&copy).unwrap() == bytes);
    // A client without structured replies.
    let simple = "import os\nh = nbd.NBD()\nh.set_request_structured_replies(False)\n\
                  h.connect_uri(os.environ['URI'])\nassert h.pread(1048576, 4096) == bytes(range(256)) * 4096";
    run(python().env("URI", served.nbd()).args(["-c", simple]));
}

#[test]
fn tcp_is_served_on_loopback_only() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (_folder, _path, _served) = serve("", &format!("listen = '127.0.0.1:{port}'\n"));
    let size = run(Command::new("nbdinfo").args(["--size", &format!("nbd://127.0.0.1:{port}/disk")]));
    assert_eq!(size.trim(), SIZE.to_string());
}

/// The handshake up to transmission, by hand.
fn connect(served: &Served) -> UnixStream {
    let mut socket = UnixStream::connect(served.sockets().join("nbd")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    socket.write_all(&3u32.to_be_bytes()).unwrap();
    socket.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk").unwrap();
    let mut export = [0; 10];
    socket.read_exact(&mut export).unwrap();
    assert_eq!(u64::from_be_bytes(export[..8].try_into().unwrap()), SIZE as u64);
    socket
}

fn request(kind: u16, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend([0, 0]);
    bytes.extend(kind.to_be_bytes());
    bytes.extend(7u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

#[test]
fn clients_that_leave_stall_or_lie_disturb_nobody() {
    let (_folder, path, mut served) = serve("", "max_connections = 40\n");
    let before = served.descriptors();
    for round in 0..60 {
        let mut socket = connect(&served);
        for _ in 0..20 {
            socket.write_all(&request(0, 0, 131_072)).unwrap();
        }
        if round % 3 == 0 {
            // Half a write, and gone.
            socket.write_all(&request(1, 0, 65536)).unwrap();
            socket.write_all(&[0x99; 1000]).unwrap();
        }
    }
    // No request at all.
    let mut garbage = connect(&served);
    garbage.write_all(&[0xab; 28]).unwrap();
    assert_eq!(garbage.read(&mut [0; 100]).unwrap(), 0, "the connection is closed");
    // More than the limit.
    let mut greedy = connect(&served);
    greedy.write_all(&request(0, 0, u32::MAX)).unwrap();
    let mut reply = [0; 16];
    greedy.read_exact(&mut reply).unwrap();
    assert_eq!((&reply[..4], reply[7]), (&[0x67, 0x44, 0x66, 0x98][..], 22), "EINVAL");
    // Asks for much and reads nothing; waits in the middle of a write; says nothing at all.
    let mut deaf = connect(&served);
    for _ in 0..200 {
        deaf.write_all(&request(0, 0, 1 << 20)).unwrap();
    }
    let mut stalled = connect(&served);
    stalled.write_all(&request(1, 0, 1 << 20)).unwrap();
    stalled.write_all(&[0x99; 1 << 19]).unwrap();
    let silent: Vec<_> = (0..20).map(|_| UnixStream::connect(served.sockets().join("nbd")).unwrap()).collect();
    nbdsh(&served, "assert h.pread(1048576, 4194304) == b'\\x11' * 1048576\nh.pwrite(b'\\x11' * 4096, 0)\nh.flush()");
    drop((garbage, greedy, deaf, stalled, silent));
    served.wait_descriptors(before);
    assert_eq!(served.debug_queue()["slots_used"], 0);
    assert!(served.alive());
    assert_eq!(served.stop().0, Some(0));
    // A write that never came whole was not begun, but for the parts that came.
    let bytes = std::fs::read(path).unwrap();
    assert!(bytes[1 << 20..].iter().all(|byte| *byte == 0x11));
}

#[test]
fn what_the_file_system_does_not_say_is_no_hole() {
    for errno in ["EIO", "ESTALE", "EINTR"] {
        let (folder, path, served) = serve("", "");
        let (copy, trace) = (folder.path().join("copy"), folder.path().join("trace"));
        let inject = format!("inject=lseek:error={errno}:when=1");
        let mut strace = served.strace(&["-e", "trace=lseek", "-e", &inject], &trace);
        let copied = output(Command::new("nbdcopy").arg(served.nbd()).arg(&copy));
        drop(served);
        strace.wait().unwrap();
        assert!(std::fs::read_to_string(&trace).unwrap().contains("INJECTED"), "{errno}: nothing was injected");
        // A call that was interrupted is made again.
        assert_eq!(copied.status.success(), errno == "EINTR", "{errno}");
        assert!(errno != "EINTR" || std::fs::read(&copy).unwrap() == std::fs::read(&path).unwrap());
    }
}

#[test]
fn a_flush_is_a_real_one() {
    let (folder, _path, served) = serve("", "");
    let trace = folder.path().join("trace");
    let mut strace = served.strace(&["-e", "trace=io_submit,fdatasync"], &trace);
    nbdsh(&served, "h.pwrite(b'x' * 512, 0)\nh.flush()\nh.pwrite(b'y' * 512, 512, nbd.CMD_FLAG_FUA)");
    drop(served);
    strace.wait().unwrap();
    let calls = std::fs::read_to_string(&trace).unwrap_or_default();
    assert!(calls.contains("IOCB_CMD_FDSYNC") || calls.contains("fdatasync("), "no flush in:\n{calls}");
    assert!(calls.contains("RWF_DSYNC"), "no FUA in:\n{calls}");
}
