//! `ring-load` against disks that are served by a thread of the test.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;
use std::str::FromStr;
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};

use slog::Level;
use tapdisk::config::Config;
use tapdisk::control::client;
use tapdisk::log::Log;
use tapdisk::serve;

const MIB: u64 = 1 << 20;

struct Server {
    dir: tempfile::TempDir,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `dir/disk.img`, 16 MiB; `more` goes into the configuration's `[image]`.
    fn start(more: &str) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let text = format!(
            "[image]\npath = '{0}/disk.img'\ncreate = '16 MiB'\n{more}\n[frontend.local]\nsocket = '{0}/ring'\n\
             [control]\ndirectory = '{0}'\n[memory]\nlock = false\n",
            path.display()
        );
        fs::write(path.join("config.toml"), text).unwrap();
        let (started, wait) = channel();
        let thread = thread::spawn(move || {
            let config = Config::load(&path.join("config.toml")).unwrap();
            let level = Level::from_str("warning").unwrap();
            let blocking = tapdisk::blocking::Blocking::before_main_loop();
            let (logging, log) = Log::open(&blocking, config.log.format, level, tapdisk::log::Sink::Stderr).unwrap();
            let main_loop = serve::open(&blocking, &config, logging, &log).unwrap();
            started.send(()).unwrap();
            main_loop.run(blocking).unwrap();
        });
        wait.recv().unwrap();
        Server { dir, thread: Some(thread) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Exit code, standard output and standard error of a command with `args`; `@` stands for the server's directory.
    fn ring_load(&self, args: &str) -> (i32, String, String) {
        let dir = self.dir.path().to_str().unwrap();
        let (command, rest) = args.split_once(' ').unwrap_or((args, ""));
        let output = Command::new(env!("CARGO_BIN_EXE_ring-load"))
            .args([command, "--socket", &format!("{dir}/ring")])
            .args(rest.split_whitespace().map(|arg| arg.replace('@', dir)))
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    #[track_caller]
    fn good(&self, args: &str) -> String {
        let (code, out, err) = self.ring_load(args);
        assert_eq!(code, 0, "{args}: {err}");
        out
    }

    #[track_caller]
    fn bad(&self, args: &str, why: &str) {
        let (code, _, err) = self.ring_load(args);
        assert_eq!(code, 1, "{args}: {err}");
        assert!(err.contains(why), "{args}: {err}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        client::exit(self.dir.path(), std::process::id() as i32).unwrap();
        let ended = self.thread.take().unwrap().join();
        assert!(thread::panicking() || ended.is_ok());
    }
}

fn noise(len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    fastrand::Rng::with_seed(len).fill(&mut bytes);
    bytes
}

#[test]
fn what_a_job_writes_is_found_again_by_a_later_one_and_by_no_other() {
    let server = Server::start("");
    for (layout, order) in [("native", 0), ("x86_32", 2), ("x86_64", 4)] {
        let job = format!("run --abi {layout} --ring-page-order {order} --queues 3 --depth 16 --bs 512-96k");
        for rw in ["randwrite", "write", "randrw --mix 30 --size 40M --fsync 7"] {
            let job = format!("{job} --rw {rw} --seed {order}");
            assert!(server.good(&format!("{job} --verify")).contains(" 0 wrong sectors"));
            assert!(server.good(&format!("{job} --verify-only")).contains(" 0 wrong sectors"));
            let (code, out, err) = server.ring_load(&format!("{job}9 --verify-only"));
            assert_eq!(code, 3, "another seed: {out}");
            assert!(err.contains("expected offset"), "{err}");
        }
    }
}

#[test]
fn a_damaged_sector_is_named() {
    let server = Server::start("");
    let job = "run --rw randwrite --bs 4k --depth 32 --range 4M";
    server.good(&format!("{job} --verify"));
    let disk = File::options().read(true).write(true).open(server.path("disk.img")).unwrap();
    let mut sector = [0; 512];
    disk.read_exact_at(&mut sector, MIB).unwrap();
    disk.write_all_at(&sector, 2 * MIB).unwrap();
    disk.write_all_at(b"?", MIB + 4096 + 500).unwrap();
    disk.sync_all().unwrap();
    let (code, out, err) = server.ring_load(&format!("{job} --verify-only --json"));
    assert_eq!(code, 3);
    assert!(err.contains("sector at 2097152: expected offset 2097152 seed 1 pass 1, found offset 1048576"), "{err}");
    assert!(err.contains("sector at 1052672") && err.contains("damaged data"), "{err}");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["checked"]["wrong_sectors"], 2);
    assert_eq!(json["checked"]["bytes"], 4 * MIB);
}

#[test]
fn a_file_goes_in_and_comes_out() {
    let server = Server::start("");
    let mut data = noise(3 * MIB + 512);
    data[MIB as usize..2 * MIB as usize].fill(0);
    fs::write(server.path("in"), &data).unwrap();
    for bs in ["512", "48k", "1M", "64M"] {
        server.good(&format!("copy-in --bs {bs} --depth 3 --offset 5M @/in"));
        server.good(&format!("copy-out --bs {bs} --depth 3 --offset 5M --size {} --sparse @/out", data.len()));
        assert!(fs::read(server.path("out")).unwrap() == data, "{bs}");
        let blocks = fs::metadata(server.path("out")).unwrap().blocks();
        assert!(blocks * 512 < 5 * MIB / 2, "{blocks} blocks: the hole is kept");
    }
    server.good("copy-out --offset 5M --size 700 @/out");
    assert!(fs::read(server.path("out")).unwrap() == data[..700]);
    server.good("copy-out @/all");
    assert!(fs::read(server.path("all")).unwrap() == fs::read(server.path("disk.img")).unwrap());
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let server = Server::start("");
    fs::write(server.path("large"), noise(2 * MIB)).unwrap();
    fs::write(server.path("odd"), noise(1000)).unwrap();
    server.bad("copy-in --offset 15M @/large", "do not fit");
    server.bad("copy-in @/odd", "whole sectors");
    server.bad("copy-in --offset 100 @/large", "whole sectors");
    server.bad("copy-out --offset 17M @/out", "do not fit");
    server.bad("run --bs 1000", "whole sectors");
    server.bad("run --range 32M", "beyond");
    server.bad("run --depth 64 --ring-page-order 0", "32 entries");
    server.bad("run --rw read --verify", "only what a job writes");
    assert_eq!(fs::metadata(server.path("disk.img")).unwrap().blocks(), 0);
    server.good("copy-in --pad @/odd");
    server.good("copy-out --size 1024 @/out");
    let mut padded = noise(1000);
    padded.resize(1024, 0);
    assert!(fs::read(server.path("out")).unwrap() == padded);
}

#[test]
fn a_disk_of_large_sectors() {
    let server = Server::start("sector_size = 4096");
    server.good("run --rw randwrite --bs 4k-64k --depth 8 --verify");
    server.bad("run --bs 512", "4096");
    let info: serde_json::Value = serde_json::from_str(&server.good("info --json")).unwrap();
    assert_eq!((&info["size"], &info["disk"]["sector_size"]), (&(16 * MIB).into(), &4096.into()));
}
