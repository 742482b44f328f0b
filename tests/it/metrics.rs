//! What monitoring sees: metrics, counted exactly, as a strict parser reads them; the socket that gives them; `tap-ctl top`.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use crate::common::PATIENCE;
use crate::common::guest::Guest;
use crate::common::host::Host;
use crate::common::live;
use crate::common::served::{Served, folder, output, run, tool};
use crate::common::vhd_made as vhd;
use nix::sys::signal::Signal;
use serde_json::Value;
use tapdisk::control::client;
use tapdisk::control::proto::kind;
use tempfile::TempDir;

const LOCAL: &str = "[frontend.local]\nsocket = '{s}/ring'\n";
const NULL: &str = "type = 'null'\nsize = '64 MiB'";
const SOCKET: &str = "[metrics]\nsocket = '{s}/metrics.{pid}'\n";

/// Prometheus' own parser of OpenMetrics, which refuses what is not valid, and what it reads.
const PARSE: &str = "
import json, sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
families = {}
for family in parse(open(sys.argv[1], encoding='utf-8', newline='\\n').read()):
    assert family.name not in families
    families[family.name] = dict(type=family.type, unit=family.unit, samples=[
        dict(name=s.name, labels=s.labels, value=s.value) for s in family.samples])
print(json.dumps(families))
";

/// What a text says.
struct Parsed(Value);

impl Parsed {
    fn of(text: &str) -> Parsed {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        // Debian's Python has it.
        let json = run(Command::new("python3").env("PATH", "/usr/bin:/bin").args(["-c", PARSE]).arg(file.path()));
        Parsed(serde_json::from_str(&json).unwrap())
    }

    /// Labels and values of all samples with that name and these labels.
    fn all(&self, name: &str, labels: &[(&str, &str)]) -> Vec<(BTreeMap<String, String>, f64)> {
        let samples = self.0.as_object().unwrap().values().flat_map(|family| family["samples"].as_array().unwrap());
        let wanted = samples.filter(|sample| {
            sample["name"] == name && labels.iter().all(|(label, value)| sample["labels"][label] == *value)
        });
        wanted
            .map(|sample| {
                let labels = serde_json::from_value(sample["labels"].clone()).unwrap();
                (labels, sample["value"].as_f64().unwrap())
            })
            .collect()
    }

    /// The value of the only one.
    fn one(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let all = self.all(name, labels);
        assert_eq!(all.len(), 1, "{name} {labels:?}: {all:?}");
        all[0].1
    }
}

/// `tap-ctl metrics`.
fn metrics(served: &Served) -> Parsed {
    Parsed::of(&run(served.tap_ctl().arg("metrics")))
}

fn ring_load(served: &Served, words: &str) {
    run(tool("ring-load").args(["run", "--socket"]).arg(served.ring()).args(words.split_whitespace()));
}

fn raw(name: &str) -> (TempDir, PathBuf, String) {
    let folder = folder();
    let path = folder.path().join(name);
    let image = format!("path = {}\ncreate = '16 MiB'", serde_json::to_string(path.to_str().unwrap()).unwrap());
    (folder, path, image)
}

#[test]
fn every_request_and_every_transfer_is_counted_once() {
    // A label's value, with all that has to be escaped in it.
    let (_folder, path, image) = raw("a \"b\" \\c\nd.img");
    let served = Served::start(&image, LOCAL);
    ring_load(&served, "--rw randwrite --bs 4k --size 4M --depth 32");
    ring_load(&served, "--rw randread --bs 8k --size 2M --depth 1");
    let mut guest = Guest::connect(&served.ring());
    assert!(guest.read((16 << 20) / 512, 4096).is_err(), "beyond the end");
    let seen = metrics(&served);
    let name = format!("aio:{}", path.display());
    let (pid, disk) = (served.pid().to_string(), [("minor", "0"), ("image", name.as_str())]);
    for (op, count, bytes, errors) in
        [("write", 1024.0, 4 << 20, 0.0), ("read", 257.0, 2 << 20, 1.0), ("discard", 0.0, 0, 0.0)]
    {
        let labels = [("pid", pid.as_str()), disk[0], disk[1], ("op", op)];
        assert_eq!(seen.one("tapdisk_requests_total", &labels), count);
        assert_eq!(seen.one("tapdisk_request_bytes_total", &labels), f64::from(bytes));
        assert_eq!(seen.one("tapdisk_request_errors_total", &labels), errors);
        let buckets = seen.all("tapdisk_request_duration_seconds_bucket", &labels);
        assert_eq!(buckets.len(), 28);
        assert_eq!(buckets[27], (buckets[27].0.clone(), count), "the last has all");
        assert_eq!(seen.one("tapdisk_request_duration_seconds_count", &labels), count);
        assert_eq!(seen.one("tapdisk_request_duration_seconds_sum", &labels) > 0.0, count > 0.0);
    }
    // What the disk refuses reaches no layer.
    for (op, count, bytes) in [("write", 1024.0, 4 << 20), ("read", 256.0, 2 << 20)] {
        let labels = [("path", path.to_str().unwrap()), ("op", op)];
        assert_eq!(seen.one("tapdisk_layer_transfer_duration_seconds_count", &labels), count);
        assert_eq!(seen.one("tapdisk_layer_bytes_total", &labels), f64::from(bytes));
        assert_eq!(seen.one("tapdisk_layer_errors_total", &labels), 0.0);
    }
    assert_eq!(seen.one("tapdisk_queue_transfers_total", &disk), 1280.0);
    assert_eq!(seen.one("tapdisk_disk_size_bytes", &disk), f64::from(16 << 20));
    assert_eq!(seen.one("tapdisk_requests_outstanding", &disk), 0.0);
    assert_eq!(seen.one("tapdisk_disk_info", &[disk[1], ("engine", "aio"), ("submit", "auto")]), 1.0);
    assert_eq!(seen.one("tapdisk_disk_state", &[("tapdisk_disk_state", "running")]), 1.0);
    assert_eq!(seen.one("tapdisk_disk_state", &[("tapdisk_disk_state", "paused")]), 0.0);
    assert!(seen.one("tapdisk_process_resident_memory_bytes", &[("pid", &pid)]) > 1e6);
    let family = &seen.0["tapdisk_request_duration_seconds"];
    assert_eq!((&family["type"], &family["unit"]), (&"histogram".into(), &"seconds".into()));
}

#[test]
fn each_layer_has_its_own_and_keeps_it_when_the_chain_changes() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let (base, leaf, new) = (path("base.vhd"), path("leaf.vhd"), path("new.vhd"));
    vhd::create(&base, "dynamic", 64);
    crate::common::vhd::write(&base, 0, 1 << 20, 0x55);
    vhd::snapshot(&leaf, 2, &base);
    let served = Served::start(&vhd::table(&leaf), LOCAL);
    let mut guest = Guest::connect(&served.ring());
    for i in 0..10 {
        assert_eq!(guest.read(i * 8, 4096), Ok(vec![0x55; 4096]));
    }
    let count = |seen: &Parsed, path: &PathBuf, op: &str| {
        let labels = [("path", path.to_str().unwrap()), ("op", op)];
        let name = "tapdisk_layer_transfer_duration_seconds_count";
        seen.all(name, &labels).first().map_or(0.0, |sample| sample.1)
    };
    let seen = metrics(&served);
    // Ten of data; a bitmap may have been read, too.
    assert!((10.0..=11.0).contains(&count(&seen, &base, "read")), "{}", count(&seen, &base, "read"));
    assert_eq!(count(&seen, &base, "write") + count(&seen, &leaf, "read"), 0.0);
    assert_eq!(guest.write(0, &[0x66; 4096]), 0);
    let written = count(&metrics(&served), &leaf, "write");
    assert!(written >= 1.0);
    live::snapshot(&served, &new, &leaf);
    assert_eq!(guest.write(0, &[0x77; 4096]), 0);
    let seen = metrics(&served);
    assert_eq!(count(&seen, &leaf, "write"), written, "as before, although it is not the leaf any more");
    assert!(count(&seen, &new, "write") >= 1.0 && count(&seen, &base, "read") >= 10.0);
    let layer = |path: &PathBuf, depth| {
        seen.one("tapdisk_layer_info", &[("path", path.to_str().unwrap()), ("format", "vhd"), ("depth", depth)])
    };
    assert_eq!((layer(&new, "0"), layer(&leaf, "1"), layer(&base, "2")), (1.0, 1.0, 1.0));
}

#[test]
fn all_tapdisks_are_in_one_text_and_one_that_hangs_is_told_of() {
    let one = Served::start(NULL, LOCAL);
    let there = format!("{LOCAL}[control]\ndirectory = '{}'\nminor = 7\n", one.sockets().display());
    let two = Served::start(NULL, &there);
    ring_load(&two, "--size 1M");
    let seen = metrics(&one);
    let of = |served: &Served| served.pid().to_string();
    assert_eq!(seen.one("tapdisk_process_up", &[("pid", &of(&one))]), 1.0);
    assert_eq!(seen.one("tapdisk_requests_total", &[("pid", &of(&two)), ("minor", "7"), ("op", "read")]), 256.0);
    assert_eq!(seen.one("tapdisk_requests_total", &[("pid", &of(&one)), ("minor", "0"), ("op", "read")]), 0.0);
    two.signal(Signal::SIGSTOP);
    let seen = metrics(&one);
    let up = |served: &Served| seen.one("tapdisk_process_up", &[("pid", &of(served))]);
    assert_eq!((up(&one), up(&two)), (1.0, 0.0));
    assert_eq!(seen.all("tapdisk_requests_total", &[("pid", &of(&two))]), []);
    two.signal(Signal::SIGCONT);
    assert_eq!(metrics(&one).one("tapdisk_process_up", &[("pid", &of(&two))]), 1.0);
    // A socket that was left behind is nobody's.
    drop(two);
    assert_eq!(metrics(&one).all("tapdisk_process_up", &[]).len(), 1);
    let empty = tempfile::tempdir().unwrap();
    let text = run(tool("tap-ctl").arg("--directory").arg(empty.path()).arg("metrics"));
    assert_eq!(Parsed::of(&text).all("tapdisk_process_up", &[]), []);
}

#[test]
fn each_disk_of_a_process_has_its_own() {
    let (host, folder) = (Host::new(), folder());
    let image = |number: usize| {
        let path = folder.path().join(format!("{number}.img"));
        // What is a hole, nbdcopy does not read.
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        live::name("aio", &path)
    };
    let (images, pid) = ([image(0), image(1)], host.good(&["spawn"]));
    let minors = images.each_ref().map(|image| {
        let minor = host.good(&["allocate"]).rsplit_once('-').unwrap().1.to_owned();
        host.done(&["attach", "-p", &pid, "-m", &minor]);
        host.done(&["open", "-p", &pid, "-m", &minor, "-a", image]);
        minor
    });
    let copy = folder.path().join("copy");
    run(Command::new("nbdcopy").arg(host.nbd(&pid, &minors[1])).arg(copy));
    let seen = Parsed::of(&host.good(&["metrics"]));
    let read = |number: usize| {
        let labels = [("minor", minors[number].as_str()), ("image", &images[number]), ("op", "read")];
        seen.one("tapdisk_request_bytes_total", &labels)
    };
    assert_eq!((read(0), read(1)), (0.0, f64::from(1 << 20)));
    assert_eq!(seen.one("tapdisk_process_up", &[]), 1.0);
    let ask = |minor: &str| {
        let text = client::text_of(host.directory(), pid.parse().unwrap(), minor.parse().unwrap(), kind::METRICS);
        let json: Value = serde_json::from_str(&text.unwrap()).unwrap();
        json["disks"].as_array().unwrap().iter().map(|disk| disk["minor"].to_string()).collect::<Vec<_>>()
    };
    assert_eq!((ask(&minors[0]), ask(&minors[1])), (vec![minors[0].clone()], vec![minors[1].clone()]));
    let json: Value = serde_json::from_str(&host.good(&["metrics", "--json"])).unwrap();
    assert_eq!((json.as_array().unwrap().len(), &json[0]["pid"]), (1, &pid.parse::<i32>().unwrap().into()));
    assert_eq!(json[0]["disks"].as_array().unwrap().len(), 2);
    // One that is attached, and has no image.
    host.done(&["close", "-p", &pid, "-m", &minors[0]]);
    assert_eq!(Parsed::of(&host.good(&["metrics"])).all("tapdisk_disk_info", &[]).len(), 1);
    assert_eq!(host.good(&["top", "--count", "1", "--interval", "0.1", "--json"]).lines().count(), 1);
}

#[test]
fn one_minor_or_all_can_be_asked_for() {
    let served = Served::start(NULL, LOCAL);
    let ask = |minor| client::text_of(served.sockets(), served.pid(), minor, kind::METRICS);
    for minor in [0, u16::MAX] {
        let json: Value = serde_json::from_str(&ask(minor).unwrap()).unwrap();
        assert_eq!((&json["pid"], &json["disks"][0]["minor"]), (&served.pid().into(), &0.into()));
    }
    assert_eq!(client::errno(&ask(5).unwrap_err()), nix::errno::Errno::ENODEV);
}

fn curl(served: &Served, words: &[&str]) -> String {
    let socket = served.sockets().join(format!("metrics.{}", served.pid()));
    run(Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "20", "--unix-socket"])
        .arg(socket)
        .args(words))
}

#[test]
fn the_socket_answers_a_scraper_and_refuses_what_it_has_not() {
    let served = Served::start(NULL, &format!("{LOCAL}{SOCKET}"));
    ring_load(&served, "--size 1M");
    let seen = Parsed::of(&curl(&served, &["http://localhost/metrics"]));
    assert_eq!(seen.one("tapdisk_requests_total", &[("op", "read")]), 256.0);
    let told = |words: &[&str]| {
        curl(&served, &[words, &["--output", "/dev/null", "--write-out", "%{http_code} %{content_type}"]].concat())
    };
    let openmetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert_eq!(told(&["http://localhost/metrics"]), format!("200 {openmetrics}"));
    assert_eq!(told(&["http://localhost/"]), "404 text/plain");
    assert_eq!(told(&["-d", "x", "http://localhost/metrics"]), "405 text/plain");
    let socket = served.sockets().join(format!("metrics.{}", served.pid()));
    assert_eq!(served.stop().0, Some(0));
    assert!(!socket.exists());
}

#[test]
fn clients_of_the_socket_that_say_nothing_are_let_go() {
    let served = Served::start(NULL, SOCKET);
    let socket = served.sockets().join(format!("metrics.{}", served.pid()));
    let connect = || {
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let mut idle: Vec<_> = (0..8).map(|_| connect()).collect();
    idle[0].write_all(b"GET /metrics HTTP/1.1\r\n").unwrap();
    let end = |stream: &mut UnixStream| stream.read(&mut [0; 1]).unwrap_or(0);
    assert_eq!(end(&mut connect()), 0, "one too many");
    assert!(idle.iter_mut().all(|stream| end(stream) == 0));
    let mut stream = connect();
    // A byte at a time.
    for byte in b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" {
        stream.write_all(&[*byte]).unwrap();
    }
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("# EOF\n"), "{text}");
}

#[test]
fn a_socket_that_cannot_be_had_is_an_error_that_names_it() {
    let (code, text) = Served::refused(NULL, "[metrics]\nsocket = '/nonexistent/metrics'\n");
    assert_eq!(code, 1);
    assert!(text.contains("/nonexistent/metrics") && text.contains("metrics.socket"), "{text}");
}

#[test]
fn top_prints_each_disk_in_each_interval() {
    let served = Served::start(NULL, LOCAL);
    let there = format!("{LOCAL}[control]\ndirectory = '{}'\nminor = 7\n", served.sockets().display());
    let hangs = Served::start(NULL, &there);
    hangs.signal(Signal::SIGSTOP);
    let mut load = tool("ring-load");
    load.args(["run", "--rw", "randread", "--runtime", "20s", "--socket"]).arg(served.ring());
    let mut load = load.stdout(std::process::Stdio::null()).spawn().unwrap();
    let top = |words: &str| run(served.tap_ctl().arg("top").args(words.split_whitespace()));
    let text = top("--interval 0.3 --count 2");
    let json = top("--interval 0.3 --count 2 --json");
    load.kill().unwrap();
    load.wait().unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!((lines.len(), lines[0]), (6, lines[3]), "a header and two disks, twice: {text}");
    assert!(lines[1].contains("hangs") && lines[2].ends_with("null:64 MiB"), "{text}");
    let rows: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 4);
    assert_eq!((&rows[0]["pid"], &rows[0]["state"]), (&hangs.pid().into(), &"hangs".into()));
    for row in [&rows[1], &rows[3]] {
        assert_eq!((&row["pid"], &row["minor"], &row["state"]), (&served.pid().into(), &0.into(), &"running".into()));
        let of = |name: &str| row[name].as_f64().unwrap();
        assert!(of("reads_per_s") > 0.0 && of("read_us") > 0.0 && of("writes_per_s") == 0.0, "{row}");
        let bytes = of("reads_per_s") * 4096.0 / 1e6;
        assert!((of("mb_per_s") / bytes - 1.0).abs() < 0.01, "{row}");
    }
    let nothing = output(tool("tap-ctl").args(["--directory", "/nonexistent", "top", "--count", "1"]));
    assert_eq!(nothing.status.code(), Some(0), "no tapdisk has run yet");
    for wrong in ["0", "-1", "NaN", "x", "4000"] {
        assert_eq!(output(served.tap_ctl().args(["top", "--interval", wrong])).status.code(), Some(22), "{wrong}");
    }
}

/// Runs `top` in a terminal of 20 lines of 60 characters, presses a key when it has drawn, and looks what it leaves.
const TERMINAL: &str = "
import fcntl, os, pty, select, struct, sys, termios, time
master, slave = pty.openpty()
fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 20, 60, 0, 0))
before = termios.tcgetattr(slave)
key = bytes.fromhex(sys.argv[1])
pid = os.fork()
if pid == 0:
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for fd in range(3): os.dup2(slave, fd)
    os.execv(sys.argv[2], sys.argv[2:])
seen, end, pressed = b'', time.time() + 60, False
while True:
    assert time.time() < end, seen
    if select.select([master], [], [], 0.1)[0]:
        seen += os.read(master, 65536)
    if not pressed and b'q ends' in seen and b'running' in seen:
        assert termios.tcgetattr(slave)[3] & termios.ECHO == 0
        os.write(master, key)
        pressed = True
    done, status = os.waitpid(pid, os.WNOHANG)
    if done: break
while select.select([master], [], [], 0.2)[0]:
    seen += os.read(master, 65536)
assert os.waitstatus_to_exitcode(status) == 0, status
assert termios.tcgetattr(slave) == before
assert seen.count(b'\\x1b[?1049h') == 1 and seen.count(b'\\x1b[?1049l') == 1, seen
assert seen.index(b'\\x1b[?25l') < seen.index(b'\\x1b[?25h'), seen
print('fits' if b'MEAN' in seen and b'IMAGE' not in seen else 'does not fit')
";

#[test]
fn top_in_a_terminal_fits_it_and_leaves_it_as_it_was() {
    let served = Served::start(NULL, LOCAL);
    for key in ["71", "03"] {
        let tap_ctl = tool("tap-ctl");
        let mut python = Command::new("python3");
        python.env("PATH", "/usr/bin:/bin").args(["-c", TERMINAL, key]).arg(tap_ctl.get_program());
        let said = run(python.arg("--directory").arg(served.sockets()).args(["top", "--interval", "0.2"]));
        assert_eq!(said, "fits\n", "the last column is beyond the terminal");
    }
}
