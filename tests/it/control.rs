//! The control socket's server: the life of minors and their images, what it refuses, and clients that behave badly.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use crate::common::guest::Guest;
use crate::common::host::{Host, said};
use crate::common::live::{locked, name, wait_for};
use crate::common::needs;
use crate::common::served::{Served, folder, output, run, tool};
use crate::common::small_fs::SmallFs;
use crate::common::vhd::good;
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use serde_json::Value;
use tapdisk::control::client;
use tapdisk::control::proto::{
    Blkif, Image, List, MESSAGE_SIZE, Message, MinorList, NO_MINOR, Params, Response, kind, open, string, text,
};
use tapdisk::minors::marker;
use tempfile::TempDir;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const LOCAL: &str = "[frontend.local]\nsocket = '{s}/ring'\n";

/// A tapdisk in the foreground that waits for tap-ctl.
struct Waiting {
    host: Host,
    child: Child,
    socket: PathBuf,
}

impl Waiting {
    /// With these defaults, in which `{s}` is its control directory.
    fn start(defaults: &str) -> Waiting {
        let host = Host::new();
        let defaults = defaults.replace("{s}", host.directory().to_str().unwrap());
        let file = host.directory().join("defaults.toml");
        std::fs::write(&file, format!("{defaults}\n[log]\nfile = '{}/log'\n", host.directory().display())).unwrap();
        let mut command = tool("tapdisk");
        command.arg("-D").arg("--defaults").arg(&file).arg("--control-directory").arg(host.directory());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = [0; 512];
        let count = child.stdout.as_mut().unwrap().read(&mut line).unwrap();
        let socket = PathBuf::from(std::str::from_utf8(&line[..count]).unwrap().trim_end());
        assert_eq!(socket, client::path(host.directory(), child.id() as i32));
        Waiting { host, child, socket }
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Allocates and attaches a minor.
    fn attach(&self) -> u16 {
        let (minor, _) = marker::allocate(self.host.directory()).unwrap();
        self.good(&Message::new(kind::ATTACH, minor));
        minor
    }

    fn ask(&self, request: &Message) -> Message {
        ask(&self.socket, request.as_bytes())
    }

    /// The answer, which is no error.
    fn good(&self, request: &Message) -> Message {
        let answer = self.ask(request);
        let wanted = if request.kind == kind::FORCE_SHUTDOWN { kind::CLOSE_RSP } else { request.kind + 1 };
        assert_eq!(answer.kind, wanted, "{:?}", told(&answer));
        answer
    }

    /// The errno and words of an answer that is an error.
    fn bad(&self, request: &Message) -> (i32, String) {
        told(&self.ask(request)).expect("it is refused")
    }

    fn open(&self, minor: u16, image: &Path, flags: u32) -> Message {
        let mut params = params(&name("aio", image));
        params.flags = flags;
        Message::new(kind::OPEN, minor).with(&params)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.host.directory().join("log")).unwrap()
    }

    fn debug_queue(&self, minor: u16) -> Value {
        let text = client::text_of(self.host.directory(), self.pid(), minor, kind::DEBUG_QUEUE).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// Waits for its end, and gives its exit code. Nothing but the log and the defaults is left.
    fn end(mut self) -> Option<i32> {
        let code = wait_for(|| self.child.try_wait().unwrap()).code();
        let mut names: Vec<_> = self.host.files().iter().map(|path| path.file_name().unwrap().to_owned()).collect();
        names.retain(|name| !name.to_str().unwrap().starts_with("tapdisk-"));
        names.sort();
        assert_eq!(names, ["defaults.toml", "log"]);
        code
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An image's `type:path`, and nothing else.
fn params(image: &str) -> Params {
    let mut params = Params::new_zeroed();
    params.path = string(image);
    params
}

fn ask(socket: &Path, request: &[u8]) -> Message {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(request).unwrap();
    receive(&mut stream)
}

fn receive(stream: &mut UnixStream) -> Message {
    let mut bytes = [0; MESSAGE_SIZE];
    stream.read_exact(&mut bytes).unwrap();
    Message::read_from_bytes(&bytes).unwrap()
}

fn told(answer: &Message) -> Option<(i32, String)> {
    let response: Response = answer.member();
    (answer.kind == kind::ERROR).then(|| (response.error, text(&response.message).unwrap().to_owned()))
}

fn raw(folder: &TempDir, size: u64) -> PathBuf {
    let path = folder.path().join(format!("{size}.img"));
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

#[test]
fn several_disks_live_in_one_process_which_ends_with_the_last() {
    let (folder, tapdisk) = (folder(), Waiting::start("[frontend.local]\nsocket = '{s}/{pid}.{minor}.ring'\n"));
    let images = [raw(&folder, 1 << 20), raw(&folder, 2 << 20), raw(&folder, 3 << 20)];
    let minors: Vec<_> = images.iter().map(|_| tapdisk.attach()).collect();
    assert_eq!(minors, [0, 1, 2]);
    for (minor, path) in minors.iter().zip(&images) {
        let image: Image = tapdisk.good(&tapdisk.open(*minor, path, 0)).member();
        assert_eq!((image.sectors, image.sector_size, image.info), ((u64::from(*minor) + 1) * 2048, 512, 0));
        let info: Image = tapdisk.good(&Message::new(kind::DISK_INFO, *minor)).member();
        assert_eq!(info.as_bytes(), image.as_bytes());
    }
    let all: MinorList = tapdisk.good(&Message::new(kind::LIST_MINORS, NO_MINOR)).member();
    assert_eq!((all.count, &all.list[..4]), (3, &[0, 1, 2, 0][..]));
    // Each has its own data, by NBD in both styles.
    for minor in minors.iter().rev() {
        let pattern = format!("write -P {} 0 4096", minor + 7);
        let uri = tapdisk.host.nbd(&tapdisk.pid().to_string(), &minor.to_string());
        run(Command::new("qemu-io").args(["-f", "raw", "-c", &pattern, &uri]));
    }
    for (minor, path) in minors.iter().zip(&images) {
        assert_eq!(std::fs::read(path).unwrap()[..4096], [*minor as u8 + 7; 4096]);
        let old = format!("{}/nbd-old{}.{minor}", tapdisk.host.directory().display(), tapdisk.pid());
        let copied = output(Command::new("nbdcopy").args([&format!("nbd+unix:///?socket={old}"), "-"]));
        assert!(copied.status.success() && copied.stdout == std::fs::read(path).unwrap(), "{old}");
    }
    let stats = client::text_of(tapdisk.host.directory(), tapdisk.pid(), NO_MINOR, kind::STATS).unwrap();
    let stats: Value = serde_json::from_str(&stats).unwrap();
    let written: Vec<_> = stats.as_array().unwrap().iter().map(|disk| disk["secs"][1].as_u64().unwrap()).collect();
    assert_eq!(written, [8, 8, 8]);
    // An image is closed, and another one opened for the same minor.
    tapdisk.good(&Message::new(kind::CLOSE, 1));
    let list: List = tapdisk.good(&Message::new(kind::LIST, 1)).member();
    assert_eq!((list.count, list.minor, list.state, list.path[0]), (1, 1, 2, 0));
    tapdisk.good(&Message::new(kind::CLOSE, 1));
    let image: Image = tapdisk.good(&tapdisk.open(1, &raw(&folder, 4 << 20), 0)).member();
    assert_eq!(image.sectors, 8192);
    for (minor, how) in minors.iter().zip([kind::CLOSE, kind::FORCE_SHUTDOWN, kind::CLOSE]) {
        tapdisk.good(&Message::new(how, *minor));
        tapdisk.good(&Message::new(kind::DETACH, *minor));
    }
    let host = tapdisk.host.directory().to_owned();
    for minor in minors {
        marker::free(&host, minor).unwrap();
    }
    assert_eq!(tapdisk.end(), Some(0));
}

#[test]
fn each_step_out_of_turn_has_its_errno() {
    let (folder, tapdisk) = (folder(), Waiting::start(""));
    let path = raw(&folder, 1 << 20);
    let errno = |kind, minor| tapdisk.bad(&Message::new(kind, minor)).0;
    assert_eq!(errno(kind::ATTACH, 3), libc::ENOENT, "nobody has allocated it");
    assert_eq!(errno(kind::ATTACH, 16384), libc::EINVAL);
    for kind in [kind::PAUSE, kind::RESUME, kind::STATS, kind::DISK_INFO, kind::CLOSE, kind::DETACH, kind::COMMIT] {
        assert_eq!(errno(kind, 3), libc::ENODEV, "type {kind}");
    }
    assert_eq!(tapdisk.bad(&tapdisk.open(3, &path, 0)).0, libc::EINVAL, "it is not attached");
    let minor = tapdisk.attach();
    assert_eq!(errno(kind::ATTACH, minor), libc::EEXIST);
    assert_eq!(errno(kind::RESUME, minor), libc::EINVAL, "it is not paused, and has no image");
    tapdisk.good(&Message::new(kind::PAUSE, minor));
    tapdisk.good(&Message::new(kind::RESUME, minor));
    let other = Waiting::start("");
    let held = marker::Marker::take(other.host.directory(), Some(5)).unwrap();
    assert_eq!(other.bad(&Message::new(kind::ATTACH, 5)).0, libc::EAGAIN, "another process has it");
    drop(held);
    tapdisk.good(&tapdisk.open(minor, &path, 0));
    assert_eq!(tapdisk.bad(&tapdisk.open(minor, &path, 0)).0, libc::EALREADY);
    assert_eq!(errno(kind::DETACH, minor), libc::EBUSY);
    assert_eq!(errno(kind::RESUME, minor), libc::EINVAL, "it is not paused");
    assert_eq!(errno(kind::ERROR, minor), libc::EINVAL, "no request");
    assert_eq!(errno(kind::ATTACH_RSP, minor), libc::EINVAL, "no request");
    assert_eq!(errno(0xffff, minor), libc::EINVAL);
    let second = tapdisk.attach();
    let (errno, words) = tapdisk.bad(&tapdisk.open(second, &path, 0));
    assert!(errno == libc::EBUSY && words.contains("in use by process"), "{words}");
    let missing = params("vhd:/nonexistent");
    let (errno, words) = tapdisk.bad(&Message::new(kind::OPEN, second).with(&missing));
    assert!(errno == libc::ENOENT && words.contains("/nonexistent"), "{words}");
}

#[test]
fn what_open_can_not_do_is_refused_and_nothing_is_ignored() {
    let (folder, tapdisk) = (folder(), Waiting::start(""));
    let (path, minor) = (raw(&folder, 1 << 20), tapdisk.attach());
    let unknown = 0x8000;
    for (flags, words) in [
        (open::SECONDARY, "a second image (-2)"),
        (open::SECONDARY | open::STANDBY, "a second image"),
        (open::STANDBY, "where there is no space (-s)"),
        (open::OPEN_ENCRYPTED, "an encryption key (-E)"),
        (open::ADD_LCACHE, "a local cache of the parent (-r)"),
        (open::ADD_CACHE, "a cache of blocks"),
        (open::VHD_INDEX, "an index"),
        (unknown, "flags 0x8000"),
    ] {
        let request = tapdisk.open(minor, &path, flags);
        // What follows the message is sent by who speaks the protocol, and must not be cut off.
        let more = if flags & open::OPEN_ENCRYPTED != 0 { 65 } else { 0 };
        let mut stream = UnixStream::connect(&tapdisk.socket).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let (errno, said) = told(&receive(&mut stream)).unwrap();
        assert!(errno == libc::EOPNOTSUPP && said.contains(words), "{flags:#x}: {said}");
        stream.write_all(&vec![1; more]).unwrap();
    }
    assert_eq!(tapdisk.bad(&tapdisk.open(minor, &path, open::SHARED)).0, libc::EINVAL, "shared, and written");
    let list: List = tapdisk.good(&Message::new(kind::LIST, minor)).member();
    assert_eq!((list.state, list.path[0]), (0, 0), "no image is open");
    // Read-only.
    let image: Image = tapdisk.good(&tapdisk.open(minor, &path, open::RDONLY | open::SHARED)).member();
    assert_eq!(image.info, 4);
    let uri = tapdisk.host.nbd(&tapdisk.pid().to_string(), &minor.to_string());
    assert!(run(Command::new("nbdinfo").arg(&uri)).contains("is_read_only: true"));
    assert_eq!(tapdisk.debug_queue(minor)["read_only"], true);
    tapdisk.good(&Message::new(kind::CLOSE, minor));
    // Through the page cache.
    tapdisk.good(&tapdisk.open(minor, &path, open::NO_O_DIRECT));
    assert_eq!(tapdisk.debug_queue(minor)["engine"]["name"], "threads");
    let stats = client::text_of(tapdisk.host.directory(), tapdisk.pid(), minor, kind::STATS).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&stats).unwrap()["read_caching"], "true");
}

#[test]
fn a_time_out_bounds_how_long_errors_are_tried_again() {
    let folder = folder();
    let tapdisk =
        Waiting::start("[retry]\nlimit_s = 300\n[[fault]]\ntype = 'error'\non = ['write']\nerrno = 'EBUSY'\n");
    let (path, minor) = (raw(&folder, 1 << 20), tapdisk.attach());
    let mut params = params(&name("aio", &path));
    params.req_timeout = 1;
    tapdisk.good(&Message::new(kind::OPEN, minor).with(&params));
    let uri = tapdisk.host.nbd(&tapdisk.pid().to_string(), &minor.to_string());
    let said = output(Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 4096", &uri]));
    let text = String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr);
    assert!(text.contains("write failed"), "{text}");
    assert!(tapdisk.debug_queue(minor)["queue"]["retried"].as_u64().unwrap() > 0, "it was tried again");
}

#[test]
fn a_parent_that_another_minor_has_open_is_used_again() {
    let (folder, tapdisk) = (folder(), Waiting::start(""));
    let at = |name: &str| folder.path().join(name);
    let util = |words: &[&str]| run(tool("vhd-util").args(words));
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    util(&["create", "-n", &path(&at("base.vhd")), "-s", "16"]);
    run(Command::new("qemu-io").args(["-f", "vpc", "-c", "write -P 5 0 4096", &path(&at("base.vhd"))]));
    util(&["snapshot", "-n", &path(&at("child.vhd")), "-p", &path(&at("base.vhd"))]);
    util(&["create", "-n", &path(&at("other.vhd")), "-s", "16"]);
    let (base, other, child) = (tapdisk.attach(), tapdisk.attach(), tapdisk.attach());
    let open_vhd = |minor, image: &str, flags, prt_devnum| {
        let mut params = params(&name("vhd", &at(image)));
        (params.flags, params.prt_devnum) = (flags, prt_devnum);
        Message::new(kind::OPEN, minor).with(&params)
    };
    tapdisk.good(&open_vhd(base, "base.vhd", open::RDONLY, 0));
    tapdisk.good(&open_vhd(other, "other.vhd", open::RDONLY, 0));
    let refused = |prt| tapdisk.bad(&open_vhd(child, "child.vhd", open::REUSE_PRT, prt));
    assert_eq!(refused(9).0, libc::ENODEV);
    assert_eq!(refused(70_000).0, libc::ENODEV);
    assert_eq!(refused(child.into()).0, libc::ENODEV, "it has no image");
    let (errno, words) = refused(other.into());
    assert!(errno == libc::EINVAL && words.contains("its parent is not the image of minor 1"), "{words}");
    tapdisk.good(&open_vhd(child, "child.vhd", open::REUSE_PRT, base.into()));
    let uri = tapdisk.host.nbd(&tapdisk.pid().to_string(), &child.to_string());
    let read = run(Command::new("qemu-io").args(["-f", "raw", "-c", "read -P 5 0 4096", &uri]));
    assert!(!read.contains("failed"), "{read}");
}

#[test]
fn a_close_waits_for_what_is_under_way_and_holds_nobody_up() {
    let folder = folder();
    let tapdisk =
        Waiting::start("[frontend.local]\nsocket = '{s}/{minor}.ring'\n[[fault]]\ntype = 'stuck'\non = ['write']\n");
    let (path, minor) = (raw(&folder, 1 << 20), tapdisk.attach());
    tapdisk.good(&tapdisk.open(minor, &path, 0));
    let mut write = Command::new("qemu-io");
    write.args(["-f", "raw", "-c", "write 0 4096", &tapdisk.host.nbd(&tapdisk.pid().to_string(), "0")]);
    let mut write = write.stdout(Stdio::null()).spawn().unwrap();
    // What is released before it is stuck stays so.
    wait_for(|| (tapdisk.debug_queue(minor)["faults"]["stuck"] == 1).then_some(()));
    let mut close = UnixStream::connect(&tapdisk.socket).unwrap();
    close.write_all(Message::new(kind::CLOSE, minor).as_bytes()).unwrap();
    wait_for(|| {
        let list: List = tapdisk.good(&Message::new(kind::LIST, minor)).member();
        (list.state == 4).then_some(())
    });
    assert_eq!(tapdisk.bad(&Message::new(kind::DETACH, minor)).0, libc::EBUSY);
    let second = tapdisk.attach();
    tapdisk.good(&tapdisk.open(second, &raw(&folder, 2 << 20), 0));
    run(tapdisk.host.tap_ctl().args(["fault", "--release", "-p", &tapdisk.pid().to_string(), "-m", "0"]));
    assert_eq!(receive(&mut close).kind, kind::CLOSE_RSP);
    write.wait().unwrap();
}

#[test]
fn sigterm_closes_all_disks_and_ends_a_process_without_any() {
    let (folder, tapdisk) = (folder(), Waiting::start(""));
    for size in [1 << 20, 2 << 20] {
        let minor = tapdisk.attach();
        tapdisk.good(&tapdisk.open(minor, &raw(&folder, size), 0));
    }
    tapdisk.attach();
    for tapdisk in [tapdisk, Waiting::start("")] {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(tapdisk.pid()), Signal::SIGTERM).unwrap();
        assert_eq!(tapdisk.end(), Some(0));
    }
}

#[test]
fn the_background_holds_nothing_of_its_starter_and_a_failure_has_its_errno() {
    let host = Host::new();
    let start = |directory: &Path| output(tool("tapdisk").arg("--control-directory").arg(directory));
    // `output` returns at the end of the process's output, which is when nobody has it any more.
    let started = start(host.directory());
    let path = String::from_utf8(started.stdout).unwrap();
    assert_eq!((started.status.code(), String::from_utf8(started.stderr).unwrap().as_str()), (Some(0), ""));
    let pid: i32 = path.trim_end().rsplit_once("/ctl").unwrap().1.parse().unwrap();
    assert_eq!(host.good(&["list"]), format!("pid={pid}"));
    let cwd = std::fs::read_link(format!("/proc/{pid}/fd/1")).unwrap();
    assert_eq!(cwd, Path::new("/dev/null"));
    client::exit(host.directory(), pid).unwrap();
    host.wait_empty();
    let failed = start(Path::new("/proc/nowhere"));
    assert_eq!((failed.status.code(), failed.stdout.as_slice()), (Some(libc::ENOENT), &b""[..]));
    let text = String::from_utf8(failed.stderr).unwrap();
    assert!(text.contains("/proc/nowhere") && text.contains("control.directory"), "{text}");
}

#[test]
fn the_configuration_of_disks_that_are_opened_later_names_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("defaults.toml");
    for (text, key) in [
        ("[image]\npath = '/x'\n", "image"),
        ("[image]\ntype = 'vhd'\n", "image"),
        ("[image]\nchanged_blocks = '/x'\n", "image"),
        ("[frontend.xen]\ndomain = 1\ndevice = 'xvda'\n", "frontend.xen"),
        ("[engine]\nthreads_min = 5\nthreads_max = 4\n", "engine.threads_max"),
    ] {
        std::fs::write(&path, text).unwrap();
        let said = said(tool("tapdisk").args(["--check", "--defaults"]).arg(&path));
        assert!(said.code == 2 && said.err.contains(&format!("{key}: ")), "{text}: {}", said.err);
    }
    std::fs::write(&path, "[image]\ndurability = 'order'\n").unwrap();
    let said = said(tool("tapdisk").args(["--check", "--defaults"]).arg(&path));
    assert!(said.code == 0 && said.out.contains("durability = \"order\""), "{}", said.err);
}

#[test]
fn a_disk_of_a_configuration_takes_a_minor_of_its_own() {
    let sockets = tempfile::tempdir().unwrap();
    let control = |more: &str| format!("[control]\ndirectory = '{}'\n{more}", sockets.path().display());
    let ram = "type = 'ram'\nsize = '1 MiB'";
    let listed = |served: &Served| {
        let mut tap_ctl = tool("tap-ctl");
        tap_ctl.arg("--directory").arg(sockets.path()).args(["list", "--json", "-p", &served.pid().to_string()]);
        serde_json::from_str::<Value>(&run(&mut tap_ctl)).unwrap()[0]["minor"].as_i64().unwrap()
    };
    let first = Served::start(ram, &control(""));
    let second = Served::start(ram, &control(""));
    let third = Served::start(ram, &control("minor = 7\n"));
    assert_eq!((listed(&first), listed(&second), listed(&third)), (0, 1, 7));
    let (code, text) = Served::refused(ram, &control("minor = 7\n"));
    assert!(code == 1 && text.contains("control.minor") && text.contains("minor 7"), "{text}");
    assert_eq!(third.stop().0, Some(0));
    assert!(!marker::path(sockets.path(), 7).exists());
    first.signal(Signal::SIGKILL);
    drop(first);
    assert_eq!(listed(&Served::start(ram, &control(""))), 0, "what a killed process had");
}

#[test]
fn half_a_message_and_too_much_and_strings_without_end_are_einval() {
    let tapdisk = Waiting::start("");
    let minor = tapdisk.attach();
    for bytes in [1, 100, MESSAGE_SIZE - 1] {
        let mut half = UnixStream::connect(&tapdisk.socket).unwrap();
        half.write_all(&vec![3; bytes]).unwrap();
        half.shutdown(std::net::Shutdown::Write).unwrap();
        let (errno, words) = told(&receive(&mut half)).unwrap();
        assert!(errno == libc::EINVAL && words.contains(&format!("not {bytes}")), "{words}");
    }
    let pid = Message::new(kind::PID, 0);
    for more in [1, 56, 100_000] {
        let mut long = UnixStream::connect(&tapdisk.socket).unwrap();
        long.write_all(&[pid.as_bytes(), &vec![0; more]].concat()).unwrap();
        assert_eq!(told(&receive(&mut long)).unwrap().0, libc::EINVAL, "{more} bytes too many");
    }
    let (mut endless, mut secondary) = (Params::new_zeroed(), params("aio:/x"));
    endless.path = [b'a'; 256];
    secondary.secondary = [b'a'; 256];
    for request in [
        Message::new(kind::OPEN, minor).with(&endless),
        Message::new(kind::OPEN, minor).with(&secondary),
        Message::new(kind::OPEN, minor).with(&params("aio:")),
        Message::new(kind::OPEN, minor).with(&params("no type")),
    ] {
        assert_eq!(tapdisk.bad(&request).0, libc::EINVAL);
    }
    let folder = folder();
    tapdisk.good(&tapdisk.open(minor, &raw(&folder, 1 << 20), 0));
    let pool = Blkif { pool: [b'a'; 256], ..Blkif::new_zeroed() };
    for request in [
        Message::new(kind::RESUME, minor).with(&endless),
        Message::new(kind::RESUME, minor).with(&secondary),
        Message::new(kind::COMMIT, minor).with(&endless),
        Message::new(kind::XENBLKIF_CONNECT, minor).with(&pool),
    ] {
        assert_eq!(tapdisk.bad(&request).0, libc::EINVAL, "type {}", request.kind);
    }
    assert_eq!(tapdisk.good(&pid).member::<i32>(), tapdisk.pid());
}

#[test]
fn ten_thousand_connects_disturb_nobody() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let mut served = Served::start("type = 'ram'\nsize = '1 MiB'", LOCAL);
    let socket = client::path(served.sockets(), served.pid());
    let mut guest = Guest::connect(&served.ring());
    let before = served.descriptors();
    let mut silent = Vec::new();
    for i in 0..10_000 {
        let mut stream = UnixStream::connect(&socket).unwrap();
        // Some say nothing, some half a word, some ask for much and never read; each hundredth comes and goes.
        if i % 3 == 1 {
            // It may be let go before that.
            let _ = stream.write_all(&[1; 77]);
        } else if i % 3 == 2 {
            let _ = stream.write_all(Message::new(kind::DEBUG_QUEUE, 0).as_bytes());
        }
        if i % 100 > 0 && silent.len() < 500 {
            silent.push(stream);
        }
        if i % 1000 == 0 {
            assert_eq!(guest.write(0, &[1; 512]), 0);
            assert!(run(served.tap_ctl().arg("list")).starts_with("pid="), "who asks is answered");
        }
    }
    assert!(served.descriptors() < before + 100, "{} descriptors", served.descriptors());
    drop(silent);
    served.wait_descriptors(before);
    assert!(served.alive());
}

#[test]
fn clients_that_never_stop_disturb_nobody() {
    let served = Served::start("type = 'ram'\nsize = '1 MiB'", LOCAL);
    let (socket, over) = (client::path(served.sockets(), served.pid()), AtomicBool::new(false));
    let again = |what: fn(UnixStream)| {
        while !over.load(SeqCst) {
            // The queue of those who wait to be let in may be full.
            UnixStream::connect(&socket).map(what).unwrap();
        }
    };
    let write = |mut stream: UnixStream| {
        stream.write_all(Message::new(kind::PID, 0).as_bytes()).unwrap();
        // What the socket's buffers take, and little more: then it is let go.
        let pages = std::iter::repeat_with(|| stream.write_all(&[0; 4096])).take_while(Result::is_ok).count();
        assert!(pages < 256, "{pages}");
    };
    std::thread::scope(|scope| {
        (0..2).for_each(|_| drop(scope.spawn(|| again(write))));
        (0..2).for_each(|_| drop(scope.spawn(|| again(drop))));
        let mut guest = Guest::connect(&served.ring());
        for round in 0..200 {
            assert_eq!(guest.write(round, &[1; 512]), 0);
        }
        for _ in 0..10 {
            assert_eq!(ask(&socket, Message::new(kind::PID, 0).as_bytes()).kind, kind::PID_RSP);
        }
        over.store(true, SeqCst);
    });
}

#[test]
fn a_close_that_failed_is_over_when_it_is_repeated() {
    let (folder, tapdisk) = (folder(), Waiting::start("[[fault]]\ntype = 'error'\non = ['flush']\n"));
    let minor = tapdisk.attach();
    tapdisk.good(&tapdisk.open(minor, &raw(&folder, 1 << 20), 0));
    let (errno, words) = tapdisk.bad(&Message::new(kind::CLOSE, minor));
    assert!(errno == libc::EIO && words.contains("may not be on the disk"), "{errno} {words}");
    tapdisk.good(&Message::new(kind::CLOSE, minor));
    tapdisk.good(&Message::new(kind::DETACH, minor));
    assert_eq!(tapdisk.end(), Some(0));
}

/// Has python send PID to a socket as another user, and gives what the answer is.
fn as_user(uid: u32, gid: u32, groups: &str, socket: &Path) -> String {
    let script = "import socket,struct,sys\ns=socket.socket(socket.AF_UNIX)\ntry:\n s.connect(sys.argv[1])\n \
                  s.sendall(struct.pack('<HHI',3,0,0)+bytes(536))\n d=s.recv(544,socket.MSG_WAITALL)\n \
                  print(struct.unpack('<H',d[:2])[0],struct.unpack('<i',d[8:12])[0])\n\
                  except PermissionError: print('not let in')";
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={uid}")).arg(format!("--regid={gid}")).arg(groups);
    run(command.args(["/usr/bin/python3", "-c", script]).arg(socket)).trim_end().to_owned()
}

#[test]
fn root_may_use_the_socket_and_a_group_if_it_is_configured() {
    // It becomes other users.
    if !needs::root() {
        return;
    }
    let open_to_all = std::fs::Permissions::from_mode(0o777);
    let ram = "type = 'ram'\nsize = '1 MiB'";
    let (nobody, nogroup) = (65534, 65534);
    let served = Served::start(ram, "");
    std::fs::set_permissions(served.sockets(), open_to_all.clone()).unwrap();
    let socket = client::path(served.sockets(), served.pid());
    assert_eq!(as_user(nobody, nogroup, "--clear-groups", &socket), "not let in");
    // The file's mode is not all that there is.
    std::fs::set_permissions(&socket, open_to_all.clone()).unwrap();
    assert_eq!(as_user(nobody, nogroup, "--clear-groups", &socket), format!("1 {}", libc::EACCES));
    assert_eq!(as_user(0, 0, "--clear-groups", &socket), format!("4 {}", served.pid()));
    let served = Served::start(ram, "[control]\ndirectory = '{s}'\ngroup = 'nogroup'\n");
    std::fs::set_permissions(served.sockets(), open_to_all).unwrap();
    let socket = client::path(served.sockets(), served.pid());
    let good = format!("4 {}", served.pid());
    assert_eq!(as_user(nobody, nogroup, "--clear-groups", &socket), good);
    assert_eq!(as_user(1, 1, "--groups=2,65534", &socket), good);
    assert_eq!(as_user(1, 1, "--groups=2,3", &socket), "not let in");
    let (code, text) = Served::refused(ram, "[control]\ndirectory = '{s}'\ngroup = 'no such group'\n");
    assert!(code == 1 && text.contains("control.group") && text.contains("no such group"), "{text}");
}

#[test]
fn a_client_that_hangs_up_before_its_answer_changes_nothing() {
    let (folder, tapdisk) = (folder(), Waiting::start(""));
    let (path, minor) = (raw(&folder, 1 << 20), tapdisk.attach());
    let send = |request: &Message| {
        let mut stream = UnixStream::connect(&tapdisk.socket).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
    };
    send(&tapdisk.open(minor, &path, 0));
    let is = |state: i32, open: bool| {
        wait_for(|| {
            let list: List = tapdisk.good(&Message::new(kind::LIST, minor)).member();
            (list.state == state && (list.path[0] != 0) == open).then_some(())
        });
    };
    is(0, true);
    send(&Message::new(kind::PAUSE, minor));
    is(0x2a, true);
    send(&Message::new(kind::RESUME, minor).with(&Params::new_zeroed()));
    is(0, true);
    send(&Message::new(kind::CLOSE, minor));
    is(2, false);
    assert!(!tapdisk.log().contains("panicked"));
    let mut stream = UnixStream::connect(&tapdisk.socket).unwrap();
    stream.write_all(Message::new(kind::DETACH, minor).as_bytes()).unwrap();
    assert_eq!(receive(&mut stream).kind, kind::DETACH_RSP, "it is answered before the process ends");
    assert_eq!(stream.read(&mut [0]).map_err(|error| error.kind()).unwrap_or(0), 0);
    assert_eq!(tapdisk.end(), Some(0));
}

#[test]
fn the_end_waits_until_an_image_that_is_being_opened_is_let_go() {
    let Some(fs) = SmallFs::new("24m") else { return };
    let (host, path) = (Host::new(), fs.path("disk.vhd"));
    good("create -n {} -s 16", &[&path]);
    let (pid, minor) = host.begun();
    host.done(&["attach", "-p", &pid, "-m", &minor]);
    let frozen = fs.freeze();
    let image = name("vhd", &path);
    let mut opening = host.tap_ctl();
    opening.args(["open", "-p", &pid, "-m", &minor, "-a", &image]).stderr(Stdio::null());
    let mut opening = opening.spawn().unwrap();
    wait_for(|| locked(&path).then_some(()));
    let begin = std::time::Instant::now();
    host.bad(&["close", "-p", &pid, "-m", &minor, "-t", "2"], libc::ETIMEDOUT, "an image is being opened for it");
    assert!(begin.elapsed() < Duration::from_secs(20), "-t is kept");
    host.done(&["exit", "-p", &pid]);
    std::thread::sleep(Duration::from_millis(300));
    assert!(locked(&path) && host.pids().len() == 1, "it is being opened");
    drop(frozen);
    wait_for(|| host.pids().is_empty().then_some(()));
    good("check -n {}", &[&path]);
    assert_ne!(opening.wait().unwrap().code(), Some(0));
}
