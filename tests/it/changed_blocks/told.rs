//! How a tapdisk is told of a log of changed blocks: after a message, by `tap-ctl`, by its configuration; and which one it goes on with. The
//! disks here are read-only, and mark nothing.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::host::Host;
use crate::common::live::*;
use crate::common::served::{Served, folder, run, tool};
use crate::common::vhd::good;
use crate::common::vhd_made::table;
use nix::libc;
use nix::sys::signal::Signal::{SIGKILL, SIGTERM};
use tapdisk::control::client;
use tapdisk::control::proto::{MESSAGE_SIZE, Message, PATH_SIZE, Params, Response, kind, open, text};
use tempfile::TempDir;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// A raw image and a log in a folder.
struct Files(TempDir);

impl Files {
    fn new() -> Files {
        let files = Files(folder());
        std::fs::write(files.path("disk"), [7; 1 << 20]).unwrap();
        run(tool("cbt-util").args(["create", "-s", "1048576", "-n"]).arg(files.path("log")));
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The path of a log, as a word.
    fn word(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// A disk of a configuration, with more keys of its image and more tables.
    fn serve(&self, keys: &str, rest: &str) -> Served {
        let image = format!("path = '{}'\nread_only = true\n{keys}", self.path("disk").display());
        Served::start(&image, &format!("{BOTH}{rest}"))
    }
}

/// The log that a disk was given.
fn log_of(served: &Served) -> Option<String> {
    served.debug_queue()["changed_blocks"].as_str().map(str::to_owned)
}

fn unpause_with_log(served: &Served, log: &str) {
    run(served.tap_ctl().args(["unpause", "-c", log]));
}

/// A connection that has sent that.
fn sent(served: &Served, bytes: &[u8]) -> UnixStream {
    let mut stream = UnixStream::connect(client::path(served.sockets(), served.pid())).unwrap();
    stream.write_all(bytes).unwrap();
    stream
}

/// The errno and the words of an answer; 0: it is done.
fn answer(stream: &mut UnixStream) -> (i32, String) {
    let mut bytes = [0; MESSAGE_SIZE];
    stream.read_exact(&mut bytes).unwrap();
    let message = Message::read_from_bytes(&bytes).unwrap();
    let Response { error, message: words } = message.member();
    if message.kind == kind::ERROR { (error, text(&words).unwrap().to_owned()) } else { (0, String::new()) }
}

/// RESUME with a log, whose path is to follow.
fn resume(flags: u32) -> Message {
    let mut params = Params::new_zeroed();
    params.flags = open::ADD_LOG | flags;
    Message::new(kind::RESUME, 0).with(&params)
}

/// A path's field, with garbage behind the NUL.
fn field(path: &str) -> [u8; PATH_SIZE] {
    let mut field = [0xee; PATH_SIZE];
    field[..path.len()].copy_from_slice(path.as_bytes());
    field[path.len()] = 0;
    field
}

#[test]
fn a_path_follows_in_as_many_pieces_as_its_sender_likes() {
    let files = Files::new();
    let served = files.serve("", "");
    // By a write of its own, as blktap's tap-ctl does; in one with the message; and byte by byte.
    for pieces in [vec![MESSAGE_SIZE, PATH_SIZE], vec![MESSAGE_SIZE + PATH_SIZE], vec![1; MESSAGE_SIZE + PATH_SIZE]] {
        pause(&served);
        let bytes = [resume(0).as_bytes(), &field(&files.word("log"))].concat();
        let mut rest = bytes.as_slice();
        let mut stream = sent(&served, &[]);
        stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let few = pieces.len() < 3;
        for len in pieces {
            let (now, later) = rest.split_at(len);
            stream.write_all(now).unwrap();
            rest = later;
            if few && !rest.is_empty() {
                let waits = stream.read(&mut [0]).unwrap_err().kind();
                assert!(
                    matches!(waits, ErrorKind::WouldBlock | ErrorKind::TimedOut),
                    "it is not answered before the path is there"
                );
            }
        }
        stream.set_read_timeout(None).unwrap();
        assert_eq!(answer(&mut stream), (0, String::new()));
        assert_eq!(log_of(&served), Some(files.word("log")));
        pause(&served);
        unpause(&served);
        assert_eq!(log_of(&served), None, "it does not stick");
    }
}

#[test]
fn a_path_that_is_none_is_einval_and_the_disk_stays_paused() {
    let files = Files::new();
    let served = files.serve("", "");
    pause(&served);
    let refused = |more: &[u8], words: &str| {
        let mut stream = sent(&served, &[resume(0).as_bytes(), more].concat());
        stream.shutdown(Shutdown::Write).unwrap();
        let (errno, said) = answer(&mut stream);
        assert!(errno == libc::EINVAL && said.contains(words), "{words}: {errno} {said}");
        assert_eq!(state(&served), "0x2a", "{words}");
    };
    refused(&[b'/'; PATH_SIZE], "its path has no end");
    refused(&field("/caf\u{e9}").map(|byte| if byte == 0xc3 { 0xff } else { byte }), "its path has no end");
    refused(&field(""), "expected a path from the root on");
    refused(&field("log"), "expected a path from the root on");
    // Cut off, or with more behind it.
    refused(&[], "800 bytes, not 544");
    refused(&field("/log")[..255], "800 bytes, not 799");
    refused(&[field("/log"), field("/log")].concat(), "800 bytes, not more");
    // With what is not to be had, the path is taken all the same.
    let mut stream = sent(&served, &[resume(open::SECONDARY).as_bytes(), &field("/log")].concat());
    let (errno, said) = answer(&mut stream);
    assert!(errno == libc::EOPNOTSUPP && said.contains("a second image"), "{said}");
    // Who hangs up before the path, or in it, has said nothing.
    for more in [0, 1, 255] {
        drop(sent(&served, &[resume(0).as_bytes(), &field("/log")[..more]].concat()));
    }
    assert_eq!(state(&served), "0x2a");
    unpause(&served);
    assert!(!served.log().contains("panicked"));
}

#[test]
#[ignore = "slow"]
fn who_never_sends_the_path_is_let_go() {
    let files = Files::new();
    let served = files.serve("", "");
    pause(&served);
    let begin = Instant::now();
    let mut streams: Vec<_> =
        [0, 100].map(|more| sent(&served, &[resume(0).as_bytes(), &field("/log")[..more]].concat())).into();
    assert_eq!(state(&served), "0x2a", "others are answered");
    for stream in &mut streams {
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    let took = begin.elapsed();
    assert!((Duration::from_secs(9)..Duration::from_secs(60)).contains(&took), "{took:?}");
}

#[test]
fn a_disk_that_goes_on_by_itself_keeps_its_log() {
    // When a pause is not ended.
    let files = Files::new();
    let served = files.serve("", "[control]\ndirectory = '{s}'\npause_lease_s = 1\n");
    pause(&served);
    unpause_with_log(&served, &files.word("log"));
    pause(&served);
    wait_for(|| (state(&served) == "0").then_some(()));
    assert_eq!(log_of(&served), Some(files.word("log")));
    assert!(run(served.tap_ctl().arg("debug-queue")).contains(&format!("\nchanged blocks: {}\n", files.word("log"))));
    // When its engine changes.
    run(served.tap_ctl().args(["engine", "--name", "threads"]));
    assert_eq!(log_of(&served), Some(files.word("log")));
    // When an image of its chain was merged.
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    good("create -n {} -s 16", &[&path("base.vhd")]);
    good("snapshot -n {} -p {}", &[&path("mid.vhd"), &path("base.vhd")]);
    good("snapshot -n {} -p {} -e", &[&path("leaf.vhd"), &path("mid.vhd")]);
    let image = format!("{}\nread_only = true\nchanged_blocks = '{}'", table(&path("leaf.vhd")), files.word("log"));
    let served = Served::start(&image, BOTH);
    assert_eq!(log_of(&served), Some(files.word("log")));
    coalesce(&served, &path("mid.vhd"));
    assert_eq!((chain(&served).len(), log_of(&served)), (2, Some(files.word("log"))));
}

#[test]
fn a_pause_that_is_called_off_before_it_began_changes_no_log() {
    let files = Files::new();
    let keys = format!("changed_blocks = '{}'", files.word("log"));
    let stuck = "[[fault]]\ntype = 'stuck'\non = ['read']\n";
    let served = files.serve(&keys, stuck);
    let mut read = Command::new("qemu-io");
    read.args(["-r", "-f", "raw", "-c", "read 0 4096", &served.nbd()]).stdout(Stdio::null());
    let mut read = read.spawn().unwrap();
    wait_for(|| (served.debug_queue()["faults"]["stuck"] == 1).then_some(()));
    let asked = ask(&served, kind::PAUSE);
    wait_for(|| (state(&served) == "0x10").then_some(()));
    assert!(asked.waits());
    refused(&served, &["unpause", "-c", "/another"], libc::EBUSY, "it is being paused");
    for words in [&["unpause", "-c", &files.word("log")][..], &["unpause"]] {
        let pausing = ask(&served, kind::PAUSE);
        wait_for(|| (state(&served) == "0x10").then_some(()));
        run(served.tap_ctl().args(words));
        drop(pausing);
        assert_eq!((state(&served).as_str(), log_of(&served)), ("0", Some(files.word("log"))));
    }
    run(served.tap_ctl().args(["fault", "--release", "--off"]));
    read.wait().unwrap();
}

#[test]
fn a_disk_goes_on_with_its_log_when_its_process_was_killed() {
    let files = Files::new();
    let mut served = files.serve("", "");
    pause(&served);
    unpause_with_log(&served, &files.word("log"));
    for signal in [SIGKILL, SIGTERM] {
        served.start_again(signal).unwrap();
        assert_eq!((state(&served).as_str(), log_of(&served)), ("0", Some(files.word("log"))), "{signal}");
    }
    // In a pause: whoever ends it says which log it is to be.
    for log in [None, Some("log")] {
        pause(&served);
        served.start_again(SIGKILL).unwrap();
        assert_eq!((state(&served).as_str(), log_of(&served)), ("0x2a", Some(files.word("log"))));
        match log {
            None => unpause(&served),
            Some(log) => unpause_with_log(&served, &files.word(log)),
        }
        assert_eq!(log_of(&served), log.map(|log| files.word(log)));
        served.start_again(SIGKILL).unwrap();
        assert_eq!(log_of(&served), log.map(|log| files.word(log)));
        unpause_again(&served, &files);
    }
}

/// With the log.
fn unpause_again(served: &Served, files: &Files) {
    pause(served);
    unpause_with_log(served, &files.word("log"));
}

#[test]
fn what_a_configuration_says_of_the_log_holds_until_somebody_says_otherwise() {
    let files = Files::new();
    let mut served = files.serve(&format!("changed_blocks = '{}'", files.word("log")), "");
    let record = |served: &Served| {
        let names = std::fs::read_dir(served.sockets().join("tapdisk")).unwrap();
        names.filter(|name| name.as_ref().unwrap().file_name().to_str().unwrap().starts_with("served-")).count()
    };
    served.start_again(SIGKILL).unwrap();
    assert_eq!((log_of(&served), record(&served)), (Some(files.word("log")), 0));
    pause(&served);
    unpause(&served);
    served.start_again(SIGKILL).unwrap();
    assert_eq!((log_of(&served), record(&served)), (None, 1), "it was switched off");
    // Somebody has changed the configuration since: what that says holds.
    let text = std::fs::read_to_string(served.configuration()).unwrap();
    std::fs::write(served.configuration(), text.replace("/log'", "/other'")).unwrap();
    served.start_again(SIGKILL).unwrap();
    assert_eq!(log_of(&served), Some(files.word("other")));
    std::fs::write(served.configuration(), text).unwrap();
    served.start_again(SIGKILL).unwrap();
    pause(&served);
    unpause_with_log(&served, &files.word("log"));
    served.start_again(SIGKILL).unwrap();
    assert_eq!(
        (log_of(&served), record(&served)),
        (Some(files.word("log")), 0),
        "as it is configured, there is nothing to tell"
    );
}

#[test]
fn an_image_that_is_written_is_not_served_without_the_log_that_is_wanted() {
    let files = Files::new();
    let image = format!("path = '{}'", files.path("disk").display());
    let log = files.word("missing");
    let text = format!("{log}: cannot open it: No such file");
    let (code, said) = Served::refused(&format!("{image}\nchanged_blocks = '{log}'"), BOTH);
    assert!(code == 1 && said.contains(&text), "{said}");
    let served = Served::start(&image, BOTH);
    pause(&served);
    refused(&served, &["unpause", "-c", &log], libc::ENOENT, &text);
    assert_eq!(state(&served), "0x2a");
    unpause(&served);
    // One in memory has nothing that lasts.
    let served = Served::start("type = 'ram'\nsize = '1 MiB'", BOTH);
    pause(&served);
    refused(&served, &["unpause", "-c", &files.word("log")], libc::EOPNOTSUPP, "has no log of changed blocks");
    unpause(&served);
}

#[test]
fn tap_ctl_names_a_log_from_where_it_is_run() {
    let files = Files::new();
    let served = files.serve("", "");
    pause(&served);
    let tap_ctl = served.tap_ctl();
    let mut there = Command::new("env");
    there.arg("-C").arg(files.0.path()).arg(tap_ctl.get_program()).args(tap_ctl.get_args());
    run(there.args(["unpause", "-c", "log"]));
    assert_eq!(log_of(&served), Some(files.word("log")));
    pause(&served);
    refused(&served, &["unpause", "-c", ""], libc::EINVAL, "expected a path from the root on");
    let long = "/x".repeat(128);
    refused(&served, &["unpause", "-c", &long], libc::ENAMETOOLONG, "the log's path has 256 bytes, and may have 255");
    drop(served);
    let host = Host::new();
    let (pid, minor) = host.begun();
    host.done(&["attach", "-p", &pid, "-m", &minor]);
    let image = name("aio", &files.path("disk"));
    let open = ["open", "-p", pid.as_str(), "-m", minor.as_str(), "-a", image.as_str(), "-C", &long[..255]];
    host.bad(&open, libc::ENOENT, "/x/x");
    host.done(&[&open[..], &["-R"]].concat());
    let queue = json(&host.good(&["debug-queue", "--json"]));
    assert_eq!(queue["changed_blocks"], long[..255]);
    host.done(&["close", "-p", &pid, "-m", &minor]);
    host.done(&open[..7]);
    assert_eq!(json(&host.good(&["debug-queue", "--json"]))["changed_blocks"], serde_json::Value::Null);
    // A minor without an image goes on without one.
    host.done(&["close", "-p", &pid, "-m", &minor]);
    host.done(&["pause", "-p", &pid, "-m", &minor]);
    host.bad(&["unpause", "-p", &pid, "-m", &minor, "-c", "/log"], libc::EINVAL, "it was paused without an image");
    host.done(&["unpause", "-p", &pid, "-m", &minor]);
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_disk_that_grows_keeps_its_log_which_has_to_have_bits_for_it() {
    let (files, folder) = (Files::new(), folder());
    let path = folder.path().join("disk.vhd");
    good("create -n {} -s 16 -S 1024", &[&path]);
    let image = format!("{}\nread_only = true\nchanged_blocks = '{}'", table(&path), files.word("log"));
    let served = Served::start(&image, BOTH);
    let set = format!("cbt-util set -n {} -s 33554432", files.word("log"));
    refused(&served, &["resize", "--size", "31M"], libc::EINVAL, &set);
    assert_eq!(served.debug_queue()["size"], 16 << 20);
    run(tool("cbt-util").args(set.split(' ').skip(1)));
    assert_eq!(run(served.tap_ctl().args(["resize", "--size", "31M"])), "old_size=16777216 new_size=33554432\n");
    assert_eq!(log_of(&served), Some(files.word("log")));
    // A raw one, too.
    let served = files.serve(&format!("changed_blocks = '{}'", files.word("log")), "");
    refused(&served, &["resize", "--size", "64M"], libc::EINVAL, "is for a disk of 33554432 bytes");
    assert_eq!(run(served.tap_ctl().args(["resize", "--size", "2M"])), "old_size=1048576 new_size=2097152\n");
    std::fs::remove_file(files.path("log")).unwrap();
    refused(&served, &["resize", "--size", "3M"], libc::ENOENT, "cannot open it");
}
