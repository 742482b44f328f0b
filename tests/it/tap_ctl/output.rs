//! `tap-ctl`: each command's output, word by word, and its exit code.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::host::{Host, said, said_with_input, strerror};
use crate::common::live::{name, wait_for};
use crate::common::served::{folder, run, tool};
use crate::common::vhd::{Said, good};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use serde_json::{Value, json};
use tapdisk::control::proto::{List, MESSAGE_SIZE, Message, kind, string};
use tapdisk::minors::marker::{self, Marker};
use tempfile::TempDir;
use zerocopy::IntoBytes;

/// A raw image of 16 MiB.
fn raw() -> (TempDir, PathBuf) {
    let folder = folder();
    let path = folder.path().join("disk with = and space.img");
    File::create(&path).unwrap().set_len(16 << 20).unwrap();
    (folder, path)
}

fn json_of(said: &Said) -> Value {
    assert_eq!((said.code, said.err.as_str(), said.out.lines().count()), (0, "", 1), "{}", said.out);
    serde_json::from_str(&said.out).unwrap()
}

#[test]
fn a_wrong_command_line_is_einval_and_help_is_not() {
    let run = |words: &[&str]| said(tool("tap-ctl").args(words));
    for words in [&[][..], &["--help"], &["-h"], &["help"], &["--debug"]] {
        let said = run(words);
        assert_eq!((said.code, said.err.as_str()), (0, ""), "{words:?}");
        assert!(said.out.contains("Usage: tap-ctl") && said.out.contains("allocate"), "{words:?}: {}", said.out);
    }
    let wrong: [&[&str]; 16] = [
        &["nonsense"],
        &["list", "-x"],
        &["list", "-p", "one"],
        &["allocate", "-x"],
        &["free"],
        &["free", "-m", "65536"],
        &["free", "-m", "-1"],
        &["spawn", "now"],
        &["attach", "-p", "1"],
        &["detach", "-m", "1"],
        &["open", "-p", "1", "-m", "0"],
        &["close", "-p", "1", "-m", "0", "-t", "soon"],
        &["create"],
        &["destroy", "-p", "1"],
        &["commit", "-p", "1", "-m", "0"],
        &["unpause", "-p", "1", "-m", "0", "-z"],
    ];
    for words in wrong {
        let said = run(words);
        assert_eq!((said.code, said.out.as_str()), (libc::EINVAL, ""), "{words:?}");
        assert!(said.err.contains("Usage: tap-ctl"), "{words:?}: {}", said.err);
        let json = run(&[words, &["--json"]].concat());
        let value: Value = serde_json::from_str(&json.out).unwrap();
        assert_eq!(
            (json.code, &value["error"]["errno"], &value["error"]["name"]),
            (22, &22.into(), &"EINVAL".into())
        );
    }
    let said = run(&["free", "--json", "-m", "x"]);
    let text = "invalid value 'x' for '--minor <MINOR>': invalid digit found in string";
    let error = json!({ "errno": 22, "name": "EINVAL", "text": text });
    assert_eq!(serde_json::from_str::<Value>(&said.out).unwrap(), json!({ "error": error }));
}

#[test]
fn a_minor_is_allocated_and_given_back() {
    let host = Host::new();
    let directory = host.directory().display();
    assert_eq!(host.good(&["allocate"]), format!("{directory}/tapdisk/tapdisk-0"));
    assert_eq!(host.good(&["allocate", "-d", "xvda"]), format!("{directory}/tapdisk/tapdisk-1"));
    let path = format!("{directory}/tapdisk/tapdisk-2");
    assert_eq!(json_of(&host.ctl(&["allocate", "--json"])), json!({ "minor": 2, "path": path }));
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    host.done(&["free", "-m", "1"]);
    assert_eq!(json_of(&host.ctl(&["--json", "free", "-m", "0"])), json!({ "minor": 0 }));
    host.bad(&["free", "-m", "1"], libc::ENOENT, "nobody has taken it");
    assert_eq!(host.good(&["allocate"]), format!("{directory}/tapdisk/tapdisk-0"), "the lowest that is free");
    let nowhere = said(tool("tap-ctl").args(["--directory", "/proc/nowhere", "allocate"]));
    assert_eq!((nowhere.code, nowhere.err), (libc::ENOENT, strerror(libc::ENOENT) + "\n"));
}

#[test]
fn a_disk_from_spawn_to_free() {
    let ((_folder, path), host) = (raw(), Host::new());
    let image = name("aio", &path);
    let (pid, minor) = host.begun();
    let disk = ["-p", pid.as_str(), "-m", minor.as_str()];
    let with = |command: &'static str| [&[command][..], &disk].concat();
    let open = |image: &str| host.ctl(&[&with("open")[..], &["-a", image]].concat()).code;
    assert_eq!(host.good(&["list"]), format!("pid={pid}\nminor={minor}"), "what is allocated, and nobody's yet, too");
    assert_eq!(open(&image), libc::EINVAL, "it is not attached");
    host.bad(&with("close"), libc::ENODEV, "this tapdisk has no minor 0");
    host.bad(&with("detach"), libc::ENODEV, "this tapdisk has no minor 0");
    host.bad(&with("stats"), libc::ENODEV, "no disk with minor 0");
    host.done(&with("attach"));
    host.bad(&with("attach"), libc::EEXIST, "it is attached already");
    host.bad(&["attach", "-p", &pid, "-m", "7"], libc::ENOENT, "tap-ctl allocate makes one");
    host.bad(&["free", "-m", &minor], libc::EAGAIN, "a tapdisk has it");
    assert_eq!(host.good(&["list"]), format!("pid={pid} minor={minor} state=0"));
    host.bad(&with("unpause"), libc::EINVAL, "it is not paused, and has no image");
    host.done(&with("pause"));
    assert_eq!(host.good(&["list"]), format!("pid={pid} minor={minor} state=0x2a"));
    host.bad(&[&with("unpause")[..], &["-a", &image]].concat(), libc::EINVAL, "tap-ctl open opens one");
    host.done(&with("unpause"));
    assert_eq!(host.good(&["list"]), format!("pid={pid} minor={minor} state=0"));
    host.done(&with("pause"));
    let stats = json_of(&host.ctl(&with("stats")));
    assert_eq!((&stats["name"], &stats["images"]), (&json!(null), &json!([])), "no image is open");
    host.bad(&[&with("open")[..], &["-a", "aio:/nonexistent"]].concat(), libc::ENOENT, "/nonexistent");
    host.bad(&[&with("open")[..], &["-a", "qcow:/x"]].concat(), libc::EINVAL, "is no type:path");
    let opened = json_of(&host.ctl(&[&with("open")[..], &["-a", &image, "--json"]].concat()));
    let expected =
        json!({ "pid": pid.parse::<i32>().unwrap(), "minor": 0, "sectors": 32768, "sector_size": 512, "info": 0 });
    assert_eq!(opened, expected);
    host.bad(&[&with("open")[..], &["-a", &image]].concat(), libc::EALREADY, "is open");
    host.bad(&with("detach"), libc::EBUSY, "is open: tap-ctl close closes it");
    assert_eq!(host.good(&["list"]), format!("pid={pid} minor={minor} state=0 args={image}"));
    host.bad(&with("unpause"), libc::EINVAL, "it is not paused");
    host.done(&with("pause"));
    assert_eq!(host.good(&["list"]), format!("pid={pid} minor={minor} state=0x2a args={image}"));
    host.bad(&[&with("unpause")[..], &["-a", "aio:/nonexistent"]].concat(), libc::ENOENT, "/nonexistent");
    host.done(&[&with("unpause")[..], &["-a", &image]].concat());
    wait_for(|| host.good(&["list"]).contains("state=0 ").then_some(()));
    let stats = host.good(&with("stats"));
    let (blktaps, ours) = stats.split_once(",\"memory\":").unwrap();
    let expected = format!(
        "{{\"name\":\"{image}\",\"secs\":[0,0],\"images\":[{{\"name\":\"{}\",\"hits\":[0,0],\"fail\":[0,0],\
         \"driver\":{{\"type\":0,\"name\":\"aio\",\"status\":null}}}}],\"FIXME_enospc_redirect_count\":0,\
         \"nbd_mirror_failed\":0,\"reqs_outstanding\":0,\"read_caching\":\"false\"",
        path.display()
    );
    assert_eq!(blktaps, expected);
    assert!(ours.starts_with('{') && ours.ends_with("}}"), "{ours}");
    host.done(&with("close"));
    assert_eq!(host.good(&["list"]), format!("pid={pid} minor={minor} state=0x2"));
    host.done(&with("close"));
    host.done(&[&with("open")[..], &["-a", &image, "-R", "-D", "-t", "30"]].concat());
    host.done(&[&with("close")[..], &["-f", "-t", "120"]].concat());
    host.done(&with("detach"));
    host.done(&["free", "-m", &minor]);
    host.wait_empty();
    for command in ["attach", "detach", "close", "stats", "pause", "unpause"] {
        host.bad(&with(command), libc::ENOENT, "no tapdisk has this process id");
    }
    assert_eq!(host.good(&["list"]), "");
}

#[test]
fn what_an_image_is_named_makes_no_lines() {
    let (folder, host) = (folder(), Host::new());
    let path = folder.path().join("a\npid=1 minor=7 state=0 args=vhd:victim.vhd\u{1b}[2J");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let (pid, minor) = host.opened(&name("aio", &path));
    let listed = host.good(&["list"]);
    assert_eq!(listed.lines().count(), 1, "{listed}");
    assert!(listed.starts_with(&format!("pid={pid} minor={minor} ")) && !listed.contains('\u{1b}'), "{listed}");
    let said = host.ctl(&["open", "--debug", "-p", &pid, "-m", &minor, "-a", &name("aio", &path)]);
    assert!(
        said.code == libc::EALREADY && said.err.lines().count() == 2 && !said.err.contains('\u{1b}'),
        "{}",
        said.err
    );
}

#[test]
fn what_is_made_is_not_everybodys_to_write_whatever_the_umask() {
    let (folder, host) = (folder(), Host::new());
    let script = "umask 0; exec \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(tool("tap-ctl").get_program());
    let directory = folder.path().join("new");
    let pid = run(command.arg("--directory").arg(&directory).arg("spawn"));
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o022;
    assert_eq!(mode(&directory), 0);
    run(tool("tap-ctl").arg("--directory").arg(&directory).args(["exit", "-p", pid.trim()]));
    drop(host);
}

#[test]
fn each_command_says_in_json_what_it_is_about() {
    let ((_folder, path), host) = (raw(), Host::new());
    let image = name("aio", &path);
    host.good(&["allocate"]);
    let pid = json_of(&host.ctl(&["spawn", "--json"]))["pid"].as_i64().unwrap();
    let (number, disk) = (pid.to_string(), json!({ "pid": pid, "minor": 0 }));
    assert_eq!(
        json_of(&host.ctl(&["list", "--json"])),
        json!([
            { "pid": pid, "minor": null, "state": null, "name": null, "error": null },
            { "pid": null, "minor": 0, "state": null, "name": null, "error": null },
        ])
    );
    let done = |words: &[&str]| {
        let words = [&words[..1], &["--json", "-p", &number, "-m", "0"], &words[1..]].concat();
        assert_eq!(json_of(&host.ctl(&words)), disk, "{words:?}");
    };
    done(&["attach"]);
    assert_eq!(
        json_of(&host.ctl(&["list", "--json"])),
        json!([{ "pid": pid, "minor": 0, "state": 0, "name": null, "error": null }])
    );
    host.done(&["open", "-p", &number, "-m", "0", "-a", &image]);
    done(&["pause"]);
    assert_eq!(
        json_of(&host.ctl(&["list", "--json"])),
        json!([{ "pid": pid, "minor": 0, "state": 42, "name": image, "error": null }])
    );
    done(&["unpause"]);
    for words in [
        &["stats"][..],
        &["debug-queue"],
        &["poll"],
        &["engine"],
        &["throttle"],
        &["coalesce", "--show"],
        &["resize"],
    ] {
        assert!(json_of(&host.ctl(&[words, &["--json"]].concat())).is_object(), "{words:?}");
    }
    let refused = host.ctl(&["fault", "--json"]);
    let error = json!({ "errno": 95, "name": "EOPNOTSUPP", "text": "no faults are configured: [[fault]] in its configuration" });
    assert_eq!(serde_json::from_str::<Value>(&refused.out).unwrap(), json!({ "error": error }));
    assert_eq!(
        (refused.code, refused.err.as_str()),
        (95, "no faults are configured: [[fault]] in its configuration\n")
    );
    done(&["close"]);
    done(&["detach"]);
    let made = json_of(&host.ctl(&["create", "--json", "-a", &image]));
    assert_eq!(
        (&made["minor"], &made["path"]),
        (&1.into(), &format!("{}/tapdisk/tapdisk-1", host.directory().display()).into())
    );
    let number = made["pid"].to_string();
    assert_eq!(json_of(&host.ctl(&["exit", "--json", "-p", &number])), json!({ "pid": made["pid"] }));
    let destroyed =
        wait_for(|| Some(host.ctl(&["destroy", "--json", "-p", &number, "-m", "1"])).filter(|said| said.code == 0));
    assert_eq!(json_of(&destroyed), json!({ "pid": made["pid"], "minor": 1 }));
    host.done(&["free", "-m", "0"]);
    host.wait_empty();
}

#[test]
fn options_that_are_not_to_be_had_are_refused_with_a_reason() {
    let ((_folder, path), host) = (raw(), Host::new());
    let image = name("aio", &path);
    let (pid, minor) = host.begun();
    host.done(&["attach", "-p", &pid, "-m", &minor]);
    let open = ["open", "-p", pid.as_str(), "-m", minor.as_str(), "-a", image.as_str()];
    let refused: [(&[&str], &str); 3] = [
        (&["-2", "/x"], "a second image (-2)"),
        (&["-s"], "takes over where there is no space (-s)"),
        (&["-r"], "a local cache of the parent (-r)"),
    ];
    for (option, text) in refused {
        host.bad(&[&open[..], option].concat(), libc::EOPNOTSUPP, text);
        // All of it is undone.
        host.bad(&[&["create", "-a", image.as_str()][..], option].concat(), libc::EOPNOTSUPP, text);
    }
    wait_for(|| (host.pids().len() == 1).then_some(()));
    assert_eq!(host.files().len(), 2, "{:?}", host.files());
    host.bad(&[&open[..], &["-e", "9"]].concat(), libc::ENODEV, "the image of minor 9, and that can't be found");
    let long = format!("aio:/{}", "x".repeat(251));
    assert_eq!(long.len(), 256);
    host.bad(&[&open[..6], &[&long]].concat(), libc::ENAMETOOLONG, "has 256 bytes, and may have 255");
    host.bad(&[&open[..6], &[&long[..255]]].concat(), libc::ENOENT, "xxx");
    host.done(&open);
    host.done(&["pause", "-p", &pid, "-m", &minor]);
    let unpause = ["unpause", "-p", pid.as_str(), "-m", minor.as_str()];
    host.bad(&[&unpause[..], &["-2", "/x"]].concat(), libc::EOPNOTSUPP, "a second image (-2)");
    host.done(&unpause);
    host.done(&["destroy", "-p", &pid, "-m", &minor]);
    host.wait_empty();
}

#[test]
fn a_key_comes_from_standard_input_and_has_32_or_64_bytes() {
    let ((_folder, path), host) = (raw(), Host::new());
    let (pid, minor) = host.begun();
    host.done(&["attach", "-p", &pid, "-m", &minor]);
    let image = name("aio", &path);
    let open = |size: usize| {
        let words = ["open", "-p", &pid, "-m", &minor, "-a", &image, "-E"];
        let said = said_with_input(host.tap_ctl().args(words), &vec![7; size]);
        (said.code, said.out, said.err)
    };
    for size in [0, 1, 31, 33, 63, 65, 128] {
        let text = "Unsupported keysize, use either 256 bit or 512 bit key\n";
        assert_eq!(open(size), (1, String::new(), text.to_owned()), "{size}");
    }
    for size in [32, 64] {
        assert_eq!(open(size), (95, String::new(), "Operation not supported\n".to_owned()), "{size}");
    }
}

/// A control socket whose tapdisk does what the test says with each connection.
fn pretend(host: &Host, pid: i32, mut what: impl FnMut(UnixStream) + Send + 'static) {
    let listener = UnixListener::bind(host.directory().join(format!("ctl{pid}"))).unwrap();
    std::thread::spawn(move || listener.incoming().for_each(|stream| what(stream.unwrap())));
}

#[test]
fn list_has_only_what_is_asked_for_and_survives_those_who_do_not_answer() {
    let ((_folder, path), host) = (raw(), Host::new());
    let absent = said(tool("tap-ctl").args(["--directory", "/nonexistent", "list"]));
    assert_eq!((absent.code, absent.out.as_str(), absent.err.as_str()), (0, "", ""));
    let vhd = path.with_file_name("disk.vhd");
    good("create -n {} -s 16", &[&vhd]);
    let (raw, vhd) = (name("aio", &path), name("vhd", &vhd));
    let (first, zero) = host.opened(&raw);
    let (second, one) = host.opened(&vhd);
    let (empty, minor) = host.begun();
    host.done(&["free", "-m", &minor]);
    let lines = [
        (first.parse::<i32>().unwrap(), format!("pid={first} minor={zero} state=0 args={raw}")),
        (second.parse().unwrap(), format!("pid={second} minor={one} state=0 args={vhd}")),
        (empty.parse().unwrap(), format!("pid={empty}")),
    ];
    let sorted = |mut lines: Vec<(i32, String)>| {
        lines.sort();
        lines.into_iter().map(|(_, line)| line).collect::<Vec<_>>().join("\n")
    };
    assert_eq!(host.good(&["list"]), sorted(lines.to_vec()));
    for (words, line) in [
        (&["-t", "aio"][..], 0),
        (&["-t", "vhd"], 1),
        (&["-f", &raw[4..]], 0),
        (&["-t", "vhd", "-f", &vhd[4..]], 1),
        (&["-m", &one], 1),
        (&["-p", &first], 0),
        (&["-p", &empty], 2),
    ] {
        assert_eq!(host.good(&[&["list"], words].concat()), lines[line].1, "{words:?}");
    }
    for words in
        [&["-t", "vhd", "-f", &raw[4..]][..], &["-p", "999999999"], &["-p", &empty, "-m", "0"], &["-f", "/x"]]
    {
        assert_eq!(host.good(&[&["list"], words].concat()), "", "{words:?}");
    }
    // One that never answers, one that hangs up, one that says nonsense, and the socket of one that is gone.
    let (silent, rude, mad, gone) = (900_000_001, 900_000_002, 900_000_003, 900_000_004);
    let mut kept = Vec::new();
    pretend(&host, silent, move |stream| kept.push(stream));
    pretend(&host, rude, drop);
    pretend(&host, mad, |mut stream| {
        stream.read_exact(&mut [0; MESSAGE_SIZE]).unwrap();
        stream.write_all(&[0xff; MESSAGE_SIZE]).unwrap();
    });
    drop(UnixListener::bind(host.directory().join(format!("ctl{gone}"))).unwrap());
    let all = [silent, rude, mad].map(|pid| (pid, format!("pid={pid}")));
    assert_eq!(host.good(&["list"]), sorted([&lines[..], &all].concat()));
    let why = [
        (silent, "no answer in 10 seconds"),
        (rude, "it has closed the connection"),
        (mad, "an answer of type 65535, not 20"),
    ];
    let debug = host.ctl(&["list", "--debug", "--json"]);
    let told: String = why.iter().map(|(pid, why)| format!("process {pid}: {why}\n")).collect();
    assert_eq!((debug.code, debug.err), (0, told));
    let listed: Value = serde_json::from_str(&debug.out).unwrap();
    let line =
        |(pid, why): (i32, &str)| json!({ "pid": pid, "minor": null, "state": null, "name": null, "error": why });
    assert_eq!(listed.as_array().unwrap()[3..], why.map(line));
    assert_eq!(host.good(&["list", "-p", &rude.to_string()]), format!("pid={rude}"));
    assert_eq!(host.good(&["list", "-p", &gone.to_string()]), "");
    host.bad(&["attach", "-p", &rude.to_string(), "-m", "0"], libc::EIO, "the tapdisk hung up before it answered");
    host.bad(&["attach", "-p", &mad.to_string(), "-m", "0"], libc::EPROTO, "an answer of type 65535, not 6");
    host.bad(&["attach", "-p", &gone.to_string(), "-m", "0"], libc::ECONNREFUSED, "no tapdisk has this process id");
    let late = host.ctl(&["close", "-p", &silent.to_string(), "-m", "0", "-t", "1", "--debug"]);
    assert_eq!((late.code, late.err.lines().next()), (libc::ETIMEDOUT, Some("Connection timed out")), "{}", late.err);
}

/// A control socket whose queue of connections is full, and stays so.
fn full(host: &Host, pid: i32) -> (OwnedFd, UnixStream) {
    let path = host.directory().join(format!("ctl{pid}"));
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(socket.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    listen(&socket, Backlog::new(0).unwrap()).unwrap();
    (socket, UnixStream::connect(&path).unwrap())
}

#[test]
fn list_takes_ten_seconds_for_all_who_let_nobody_in() {
    let host = Host::new();
    let pids = [900_000_001, 900_000_002, 900_000_003];
    let _sockets = pids.map(|pid| full(&host, pid));
    // One that is slow, but not that slow.
    let (listener, _waits) = full(&host, 900_000_004);
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(3));
        let listener = UnixListener::from(listener);
        drop(listener.accept().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; MESSAGE_SIZE]).unwrap();
        let disk = List { count: 1, minor: 5, state: 0, path: string("aio:/x") };
        let end = List { count: 0, minor: -1, state: 0, path: string("") };
        for list in [disk, end] {
            stream.write_all(Message::new(kind::LIST_RSP, 0).with(&list).as_bytes()).unwrap();
        }
    });
    let begin = Instant::now();
    let lines = pids.map(|pid| format!("pid={pid}")).join("\n");
    assert_eq!(host.good(&["list"]), format!("{lines}\npid=900000004 minor=5 state=0 args=aio:/x"));
    // One after the other they would take thirty.
    assert!((10..30).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
}

#[test]
fn close_is_tried_again_while_the_disk_is_busy() {
    let host = Host::new();
    let answer = |stream: &mut UnixStream, message: &Message| {
        let mut request = [0; MESSAGE_SIZE];
        stream.read_exact(&mut request).unwrap();
        stream.write_all(message.as_bytes()).unwrap();
        request
    };
    let busy = Message::error(3, libc::EBUSY, "it is opening");
    // blktap's tapdisks say it so.
    let mut busy_too = busy;
    busy_too.kind = kind::CLOSE_RSP;
    let mut answers = [busy, busy_too, Message::new(kind::CLOSE_RSP, 3)].into_iter();
    pretend(&host, 900_000_001, move |mut stream| {
        let request = answer(&mut stream, &answers.next().unwrap());
        assert_eq!((request[0], request[2]), (kind::FORCE_SHUTDOWN as u8, 3));
    });
    host.done(&["close", "-p", "900000001", "-m", "3", "-f"]);
    pretend(&host, 900_000_002, move |mut stream| assert_eq!(answer(&mut stream, &busy)[0], kind::CLOSE as u8));
    let late = host.ctl(&["close", "-p", "900000002", "-m", "3", "--debug"]);
    assert_eq!((late.code, late.err.as_str()), (libc::ETIMEDOUT, "Connection timed out\nit is opening\n"));
    let mut no = Message::error(3, libc::ENODEV, "");
    no.kind = kind::PAUSE_RSP;
    pretend(&host, 900_000_003, move |mut stream| assert_eq!(answer(&mut stream, &no)[0], kind::PAUSE as u8));
    host.bad(&["pause", "-p", "900000003", "-m", "3"], libc::ENODEV, "");
}

#[test]
fn a_tapdisk_that_lets_nobody_in_is_waited_for_as_long_as_is_said() {
    let host = Host::new();
    let _full = full(&host, 900_000_001);
    let late = host.ctl(&["close", "-p", "900000001", "-m", "3", "-t", "1", "--debug"]);
    assert_eq!((late.code, late.err.lines().next()), (libc::ETIMEDOUT, Some("Connection timed out")), "{}", late.err);
    assert!(late.err.contains("ctl900000001: it lets nobody in"), "{}", late.err);
}

/// A program that is started in place of the tapdisk.
fn script(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("script");
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_tapdisk_that_does_not_start_hands_on_its_exit_code_and_its_words() {
    let host = Host::new();
    let folder = folder();
    let spawn = |text: &str, words: &[&str]| {
        let path = script(folder.path(), text);
        said(host.tap_ctl().env("TAPDISK", path).args(words))
    };
    let failed = |text: &str, errno: i32, words: &str| {
        let plain = spawn(text, &["spawn"]);
        assert_eq!((plain.code, plain.out, plain.err), (errno, String::new(), strerror(errno) + "\n"), "{text}");
        let more = spawn(text, &["spawn", "--debug"]);
        assert!(more.code == errno && more.err.contains(words), "{text}: {}", more.err);
    };
    failed("echo no room >&2; exit 12", libc::ENOMEM, "did not start (exit status: 12): no room");
    // No errno, but no success either.
    failed("exit 200", 200, "did not start (exit status: 200)");
    failed("exit 255", 255, "did not start (exit status: 255)");
    failed("exit 0", libc::EPROTO, "it printed no control socket");
    failed("echo nonsense; exec sleep 100", libc::EINTR, "nonsense");
    failed("echo /x/ctl12x; exec sleep 100", libc::EINTR, "/x/ctl12x");
    failed("kill -9 $$", libc::EINTR, "signal: 9");
    // One that stays in the foreground.
    let foreground = spawn("echo /x/ctl$$ && exec sleep 1 >/dev/null 2>&1", &["spawn"]);
    assert_eq!((foreground.code, foreground.err.as_str()), (0, ""));
    assert!(foreground.out.trim_end().parse::<i32>().is_ok(), "{}", foreground.out);
    // It gets the directory, and what it has from us it can keep for long.
    let kept = spawn("echo \"$@\" >&2; (sleep 100 &); echo /x/ctl4711", &["spawn"]);
    assert_eq!((kept.code, kept.out.as_str(), kept.err.as_str()), (0, "4711\n", ""));
    // Not the default one, which blktap's has, without an option for it. One that goes by defaults of its own is ended.
    let by_default = |text: &str| {
        let path = script(folder.path(), text);
        said(tool("tap-ctl").env("TAPDISK", path).args(["spawn", "--debug"]))
    };
    let default = by_default("echo \"[$@]\" >&2; exit 9");
    assert!(default.code == 9 && default.err.contains(": []\n"), "{}", default.err);
    let elsewhere = by_default("echo /elsewhere/ctl$$ && exec sleep 100 >/dev/null 2>&1");
    assert!(
        elsewhere.code == libc::EINVAL && elsewhere.err.contains("/elsewhere, as its defaults say"),
        "{}",
        elsewhere.err
    );
    // Nothing of what tap-ctl's caller has open is its.
    let path = script(folder.path(), "ls /proc/$$/fd >&2; exit 9");
    let mut caller = Command::new("sh");
    caller.args(["-c", "exec 7</dev/null 9</dev/null; exec \"$@\"", "sh"]).arg(tool("tap-ctl").get_program());
    let caller = said(caller.args(["spawn", "--debug"]).env("TAPDISK", path));
    assert!(caller.code == 9 && caller.err.contains("\n1\n"), "{}", caller.err);
    assert!(!caller.err.lines().any(|line| ["7", "9"].contains(&line)), "{}", caller.err);
    let missing = said(host.tap_ctl().env("TAPDISK", "/nonexistent").args(["spawn", "--debug"]));
    assert_eq!((missing.code, missing.err.lines().count()), (libc::ENOENT, 2), "{}", missing.err);
    assert!(
        missing.err.contains("/nonexistent: ") && missing.err.contains("TAPDISK in the environment"),
        "{}",
        missing.err
    );
    // Nothing is left of a create either.
    let failed = spawn("exit 28", &["create", "-a", "aio:/x"]);
    assert_eq!((failed.code, failed.out, failed.err), (28, String::new(), strerror(28) + "\n"));
    host.wait_empty();
}

#[test]
fn a_create_that_fails_waits_for_the_minor_of_a_tapdisk_that_ends() {
    let (host, folder) = (Host::new(), folder());
    let directory = host.directory().to_owned();
    let mut held = Vec::new();
    pretend(&host, 900_000_001, move |mut stream| {
        let mut request = [0; MESSAGE_SIZE];
        stream.read_exact(&mut request).unwrap();
        let kind = u16::from_ne_bytes([request[0], request[1]]);
        let answer = match kind {
            kind::ATTACH => {
                held.push(Marker::hold(&directory, 0).unwrap());
                Message::new(kind + 1, 0)
            }
            kind::OPEN => Message::error(0, libc::EIO, "no"),
            _ => Message::new(kind + 1, 0),
        };
        stream.write_all(answer.as_bytes()).unwrap();
        if kind == kind::DETACH {
            std::thread::sleep(Duration::from_millis(500));
            held.clear();
        }
    });
    let path = script(folder.path(), "echo /x/ctl900000001");
    let made = said(host.tap_ctl().env("TAPDISK", path).args(["create", "-a", "aio:/x"]));
    assert_eq!((made.code, made.out.as_str(), made.err.as_str()), (libc::EIO, "", "Input/output error\n"));
    assert!(!marker::path(host.directory(), 0).exists());
}

#[test]
fn a_slice_is_made_by_systemd_run_or_refused() {
    let host = Host::new();
    let folder = folder();
    let without =
        said_with_input(host.tap_ctl().env("PATH", folder.path()).args(["spawn", "-c", "vm.slice", "--debug"]), b"");
    assert!(
        without.code == libc::ENOENT && without.err.contains("without it there is no slice vm.slice"),
        "{}",
        without.err
    );
    let path = script(folder.path(), "echo \"$@\" >&2; exit 9");
    std::fs::rename(path, folder.path().join("systemd-run")).unwrap();
    let with =
        said_with_input(host.tap_ctl().env("PATH", folder.path()).args(["spawn", "-c", "vm.slice", "--debug"]), b"");
    assert!(with.code == 9 && with.err.contains("--quiet --scope --slice vm.slice -- /"), "{}", with.err);
}

#[test]
fn what_is_asked_of_a_disk_or_process_that_is_not_there_has_its_errno() {
    let host = Host::new();
    let commands: [&[&str]; 3] = [&["query"], &["cancel"], &["commit", "-a", "vhd:/x"]];
    for command in commands {
        host.bad(
            &[command, &["-p", "900000009", "-m", "0"]].concat(),
            libc::ENOENT,
            "no tapdisk has this process id",
        );
        host.bad(command, libc::ENOENT, "no such tapdisk");
    }
    let (pid, minor) = host.begun();
    let disk = ["-p", pid.as_str(), "-m", minor.as_str()];
    for attached in [false, true] {
        for command in commands {
            host.bad(&[command, &disk].concat(), libc::ENODEV, "no disk with minor 0");
        }
        if !attached {
            host.done(&[&["attach"], &disk[..]].concat());
        }
    }
    // What is not there needs no end.
    host.done(&["destroy", "-p", "900000009", "-m", "9"]);
    host.done(&["destroy", "-p", &pid, "-m", "9"]);
    let held = host.ctl(&["destroy", "-p", "900000009", "-m", &minor]);
    let text = "Resource temporarily unavailable\n";
    assert_eq!((held.code, held.out.as_str(), held.err.as_str()), (libc::EAGAIN, "", text), "another has it");
    host.done(&[&["destroy"], &disk[..]].concat());
    // A step that fails is named.
    pretend(&host, 900_000_001, |mut stream| {
        stream.read_exact(&mut [0; MESSAGE_SIZE]).unwrap();
        stream.write_all(Message::error(3, libc::EIO, "it is on fire").as_bytes()).unwrap();
    });
    host.bad(&["destroy", "-p", "900000001", "-m", "3"], libc::EIO, "close: it is on fire");
    // What storage managers take for an empty CD drive.
    pretend(&host, 900_000_002, |mut stream| {
        stream.read_exact(&mut [0; MESSAGE_SIZE]).unwrap();
        stream.write_all(Message::error(3, libc::ENOMEDIUM, "/dev/sr0: cannot open it").as_bytes()).unwrap();
    });
    let open = ["open", "-p", "900000002", "-m", "3", "-a", "aio:/dev/sr0", "-R"];
    host.bad(&open, 123, "/dev/sr0: cannot open it");
}

#[test]
fn a_terminal_gets_columns_and_the_tapdisks_words() {
    let ((_folder, path), host) = (raw(), Host::new());
    let image = name("aio", &path);
    // `script` runs it on a terminal of its own, which has carriage returns.
    let on_terminal = |words: &[&str]| {
        let program = tool("tap-ctl").get_program().to_str().unwrap().to_owned();
        let line = format!("{program} --directory {} {}", host.directory().display(), words.join(" "));
        let said = said(Command::new("script").args(["--quiet", "--return", "--command", &line, "/dev/null"]));
        (said.code, said.out.replace('\r', ""))
    };
    let (code, text) = on_terminal(&["spawn"]);
    let pid = text.strip_prefix("tapdisk spawned with pid ").unwrap().trim_end().to_owned();
    assert_eq!(code, 0);
    let (disk, minor) = host.opened(&image);
    let header = "     PID  MIN STAT       TYPE ARGS\n";
    let mut lines = [
        (pid.parse::<i32>().unwrap(), format!("{pid:>8}    -    -          - -\n")),
        (disk.parse().unwrap(), format!("{disk:>8}    0    0        aio {}\n", path.display())),
    ];
    lines.sort();
    assert_eq!(on_terminal(&["list"]), (0, format!("{header}{}{}", lines[0].1, lines[1].1)));
    let (code, text) = on_terminal(&["detach", "-p", &disk, "-m", &minor]);
    assert!(code == libc::EBUSY && text.starts_with("Device or resource busy\nminor 0: "), "{text}");
}

#[test]
fn create_makes_a_disk_and_destroy_leaves_nothing_of_it() {
    let ((_folder, path), host) = (raw(), Host::new());
    let image = name("aio", &path);
    assert_eq!(
        host.good(&["create", "-a", &image, "-d", "xvda"]),
        format!("{}/tapdisk/tapdisk-0", host.directory().display())
    );
    let line = host.good(&["list"]);
    let pid = line.split(' ').next().unwrap().strip_prefix("pid=").unwrap().to_owned();
    assert_eq!(line, format!("pid={pid} minor=0 state=0 args={image}"));
    let uri = host.nbd(&pid, "0");
    assert_eq!(run(Command::new("nbdinfo").args(["--size", &uri])).trim(), "16777216");
    // It is locked.
    host.bad(&["create", "-a", &image], libc::EBUSY, "in use by process");
    wait_for(|| (host.pids().len() == 1).then_some(()));
    host.bad(&["create", "-a", "aio:/nonexistent"], libc::ENOENT, "/nonexistent");
    host.done(&["destroy", "-p", &pid, "-m", "0", "-t", "60"]);
    host.wait_empty();
    host.done(&["destroy", "-p", &pid, "-m", "0"]);
    // Whatever is missing already.
    for steps in [&["close"][..], &["close", "detach"], &["close", "detach", "free"]] {
        let (pid, minor) = host.opened(&image);
        for step in steps {
            let words = [*step, "-m", &minor, "-p", &pid];
            host.done(if *step == "free" { &words[..3] } else { &words });
        }
        host.done(&["destroy", "-p", &pid, "-m", &minor]);
        host.wait_empty();
    }
}

#[test]
fn a_merge_by_xcp_ngs_names() {
    let folder = folder();
    let [base, middle, leaf] = ["base.vhd", "middle.vhd", "leaf.vhd"].map(|name| folder.path().join(name));
    good("create -n {} -s 64", &[&base]);
    crate::common::vhd::write(&base, 0, 8 << 20, 1);
    good("snapshot -n {} -p {}", &[&middle, &base]);
    crate::common::vhd::write(&middle, 1 << 20, 16 << 20, 2);
    good("snapshot -n {} -p {}", &[&leaf, &middle]);
    let host = Host::new();
    let (pid, minor) = host.opened(&name("vhd", &leaf));
    let disk = ["-p", pid.as_str(), "-m", minor.as_str()];
    let with = |command: &'static str, more: &[&'static str]| [&[command][..], &disk, more].concat();
    // XCP-ng's collector takes a job that there is not for one that was done.
    host.bad(&with("query", &[]), libc::ENOENT, "nothing was committed");
    host.bad(&[&["commit", "-a", &name("vhd", &leaf)][..], &disk].concat(), libc::EINVAL, "is written");
    host.bad(&[&["commit", "-a", "vhd:/nonexistent.vhd"][..], &disk].concat(), libc::EINVAL, "is none of its images");
    host.done(&with("cancel", &["-w"]));
    host.done(&[&["commit", "-a", &name("vhd", &middle)][..], &disk].concat());
    wait_for(|| (host.good(&with("query", &[])) == "Commit status 'concluded' (100/100)").then_some(()));
    let json = json_of(&host.ctl(&with("query", &["--json"])));
    assert_eq!(json, json!({ "status": "concluded", "current": 100, "total": 100 }));
    std::fs::remove_file(&middle).unwrap();
    host.done(&with("pause", &[]));
    host.done(&with("unpause", &[]));
    host.done(&with("destroy", &[]));
    host.wait_empty();
}
