//! The process: its command line, signals, log, control socket, and tap-ctl's output.

use std::io::Read;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::PATIENCE;
use crate::common::guest::{Guest, page};
use crate::common::served::{Served, folder, output, run, tool};
use nix::sys::signal::Signal;

const RAM: &str = "type = 'ram'\nsize = '1 MiB'";
const LOCAL: &str = "[frontend.local]\nsocket = '{s}/ring'\n";

#[test]
fn check_prints_all_keys_and_refuses_with_file_line_key_and_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.toml");
    std::fs::write(&path, "[image]\ntype = 'ram'\nsize = '1 MiB'\n").unwrap();
    let tapdisk = || Command::new(env!("CARGO_BIN_EXE_tapdisk"));
    let printed = run(tapdisk().arg("--check").arg(&path));
    assert!(printed.contains("spin_us = ") && printed.contains("[engine]"), "{printed}");
    std::fs::write(&path, "[image]\ntype = 'ram'\nsize = '1 MiB'\n[engine]\ndepth = 70000\n").unwrap();
    let refused = output(tapdisk().arg("--check").arg(&path));
    assert_eq!(refused.status.code(), Some(2));
    let message = String::from_utf8(refused.stderr).unwrap();
    let expected = format!("tapdisk: {}:5: engine.depth: ", path.display());
    assert!(message.starts_with(&expected) && message.contains("an integer from 1 to 65536"), "{message}");
    assert_eq!(output(tapdisk().arg("/nonexistent.toml")).status.code(), Some(2));
    let help = run(tapdisk().arg("--help"));
    assert!(help.contains("SIGTERM") && help.contains("Examples:"), "{help}");
}

#[test]
fn sigterm_and_sigint_finish_what_is_in_flight_flush_and_exit_0() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let folder = folder();
        let image = folder.path().join("disk.img");
        let mut served = Served::start(&format!("path = '{}'\ncreate = '16 MiB'", image.display()), LOCAL);
        let mut guest = Guest::connect(&served.ring());
        guest.queue.memory().write(guest.queue.page_at(0), &[0x42; 4096]);
        for i in 0..32 {
            let entry = guest.entry(1).with_sector(i * 64).with_segments(1, &[page(0)]);
            guest.queue.ring.push(&entry);
        }
        guest.queue.publish().unwrap();
        let first = guest.response();
        assert_eq!(first.status, 0);
        served.signal(signal);
        while guest.try_response(Duration::from_secs(5)).is_some() {}
        let end = Instant::now() + PATIENCE;
        while served.alive() {
            assert!(Instant::now() < end);
        }
        assert!(served.log().contains("drained and flushed"), "{}", served.log());
        assert!(!served.ring().exists(), "the socket is gone");
        assert_eq!(served.code(), Some(0));
        assert_eq!(std::fs::read(&image).unwrap()[..4096], [0x42; 4096]);
    }
}

#[test]
fn sighup_reopens_the_log_and_sigusr1_dumps_the_queue_into_it() {
    let served = Served::start(RAM, LOCAL);
    let log = served.sockets().join("log");
    let old = served.sockets().join("log.1");
    std::fs::rename(&log, &old).unwrap();
    served.signal(Signal::SIGHUP);
    served.wait_log("log reopened");
    served.signal(Signal::SIGUSR1);
    served.wait_log("debug-queue");
    served.wait_log("slots_used");
    assert!(!std::fs::read_to_string(old).unwrap().contains("debug-queue"));
}

#[test]
fn the_json_log_has_an_object_a_line() {
    let rest = format!("{LOCAL}[log]\nformat = 'json'\nfile = '{{s}}/log'\n");
    let (code, log) = Served::start(RAM, &rest).stop();
    assert_eq!(code, Some(0));
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().any(|line| line["msg"] == "serving" && line["level"] == "INFO"), "{log}");
}

#[test]
fn a_log_that_nobody_reads_holds_nothing_up_and_what_was_dropped_is_counted() {
    use std::os::unix::fs::FileExt;
    let folder = folder();
    let image = folder.path().join("disk.img");
    // Nobody reads this pipe's other end until the end.
    let fifo = folder.path().join("log.fifo");
    run(Command::new("mkfifo").arg(&fifo));
    let mut reader = std::fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    let rest = format!("{LOCAL}[log]\nlevel = 'debug'\nfile = '{}'\n", fifo.display());
    let served = Served::start(&format!("path = '{}'\ncreate = '1 MiB'", image.display()), &rest);
    for _ in 0..6000 {
        served.signal(Signal::SIGUSR1);
        std::thread::sleep(Duration::from_micros(50));
    }
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.write(0, &[9; 512]), 0, "the disk is served all the same");
    let mut byte = [0];
    std::fs::File::open(&image).unwrap().read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [9]);
    let drain = std::thread::spawn(move || {
        let (mut text, mut buffer) = (Vec::new(), vec![0; 65536]);
        while !String::from_utf8_lossy(&text).contains("the end") {
            let count = reader.read(&mut buffer).unwrap();
            text.extend_from_slice(&buffer[..count]);
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    std::thread::sleep(Duration::from_millis(300));
    served.signal(Signal::SIGUSR1);
    assert_eq!(served.stop().0, Some(0));
    let text = drain.join().unwrap();
    assert!(text.contains("log records were dropped"), "nothing was dropped of {} bytes", text.len());
}

#[test]
fn tap_ctl_prints_what_storage_managers_parse() {
    let served = Served::start(RAM, LOCAL);
    let pid = served.pid();
    let expected = format!("pid={pid} minor=0 state=0 args=ram:1 MiB\n");
    assert_eq!(run(served.tap_ctl().arg("list")), expected);
    assert_eq!(run(served.tap_ctl().args(["list", "-p", &pid.to_string(), "-m", "0", "-t", "ram"])), expected);
    assert_eq!(run(served.tap_ctl().args(["list", "-t", "vhd"])), "");
    assert_eq!(run(served.tap_ctl().args(["list", "-m", "1"])), "");
    let json: serde_json::Value = serde_json::from_str(&run(served.tap_ctl().args(["list", "--json"]))).unwrap();
    assert_eq!(json, serde_json::json!([{ "pid": pid, "minor": 0, "state": 0, "name": "ram:1 MiB", "error": null }]));
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.write(0, &[1; 4096]), 0);
    assert!(guest.read(0, 512).is_ok());
    let stats = run(served.tap_ctl().arg("stats"));
    assert_eq!(stats.lines().count(), 1);
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    assert_eq!((&stats["secs"], &stats["reqs_outstanding"]), (&serde_json::json!([1, 8]), &0.into()));
    let text = run(served.tap_ctl().arg("debug-queue"));
    for part in
        ["ram:1 MiB: running, 1048576 bytes", "queue: size 256, depth 128", "p99.9 us", "requests: 0", "kicks_in"]
    {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let missing = output(served.tap_ctl().args(["stats", "-p", "999999", "-m", "0"]));
    assert_eq!(missing.status.code(), Some(2), "ENOENT");
    assert_eq!(String::from_utf8(missing.stderr).unwrap(), "No such file or directory\n");
    let missing = output(served.tap_ctl().args(["stats", "-p", &pid.to_string(), "-m", "7"]));
    assert_eq!((missing.status.code(), missing.stderr.as_slice()), (Some(19), &b"No such device\n"[..]));
    run(served.tap_ctl().arg("exit"));
    served.wait_log("drained and flushed");
}

#[test]
fn man_pages_and_completions_are_made_of_the_command_lines() {
    let folder = tempfile::tempdir().unwrap();
    run(tool("docs").arg(folder.path()));
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    assert!(read("man8/tapdisk.8").contains("SIGUSR1"));
    let pages = [
        ("tap-ctl", "man8/tap-ctl.8"),
        ("vhd-util", "man8/vhd-util.8"),
        ("cbt-util", "man8/cbt-util.8"),
        ("ring-load", "man1/ring-load.1"),
    ];
    for (program, page) in pages {
        let (text, completions) = (read(page), read(&format!("completions/{program}.bash")));
        let help = run(tool(program).arg("--help"));
        let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
        let commands = listed.take_while(|line| !line.is_empty()).filter_map(|line| line.strip_prefix("  "));
        let commands: Vec<_> =
            commands.filter_map(|line| line.split(' ').next()).filter(|name| !name.is_empty()).collect();
        assert!(commands.len() >= 4, "{help}");
        for command in commands.into_iter().filter(|name| *name != "help") {
            assert!(text.contains(&format!("\n.SS {program} {command}\n")), "{page} has no {command}");
            assert!(completions.contains(command), "{program}: {command}");
            if program == "tap-ctl" {
                let help = run(tool(program).args([command, "--help"]));
                assert!(help.contains("Example") && help.contains(&format!("\n  tap-ctl {command}")), "{help}");
            }
        }
    }
    let text = read("man8/tap-ctl.8");
    assert!(text.contains("stuck in I/O") && text.contains("debug\\-queue \\-p 4711 \\-m 0 \\-\\-json"), "{text}");
    assert!(text.contains("\\fBtap\\-ctl attach\\fR \\-p PID \\-m MINOR\n"), "{text}");
    let (help, page) = (run(tool("docs").arg("--help")), read("man1/docs.1"));
    assert!(help.contains("Usage: docs <DIRECTORY>") && help.contains("Examples:\n  docs target/docs\n"), "{help}");
    assert!(page.contains("fish and zsh") && page.contains("docs target/docs"), "{page}");
    assert!(read("completions/docs.bash").contains("docs"));
    // Nothing that troff would complain of.
    for (_, page) in pages.into_iter().chain([("docs", "man1/docs.1")]) {
        let mut groff = Command::new("groff");
        let said = output(groff.args(["-man", "-Kutf8", "-Tutf8", "-ww", "-z"]).arg(folder.path().join(page)));
        assert_eq!((said.status.code(), String::from_utf8_lossy(&said.stderr).as_ref()), (Some(0), ""), "{page}");
    }
}

#[test]
fn a_reader_of_the_tools_output_may_go() {
    let served = Served::start(RAM, LOCAL);
    let mut ring_load = tool("ring-load");
    ring_load.arg("info").arg("--socket").arg(served.ring());
    let mut tap_ctl = served.tap_ctl();
    tap_ctl.arg("list");
    for mut command in [ring_load, tap_ctl] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_eq!(command.stdout(writer).status().unwrap().code(), Some(0), "{command:?}");
    }
}

#[test]
fn polling_is_set_live_finds_requests_and_shuts_nobody_out() {
    let served = Served::start(RAM, LOCAL);
    let set = |arguments: &[&str]| run(served.tap_ctl().arg("poll").args(arguments));
    assert_eq!(set(&[]), "poll_us=0 poll_idle_percent=50\n", "the defaults");
    let refused = output(served.tap_ctl().args(["poll", "--us", "1000001", "--idle-percent", "0"]));
    assert_eq!(refused.status.code(), Some(22), "EINVAL");
    let text = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(text, "poll_us 1000001: expected an integer from 0 to 1000000\n");
    assert_eq!(set(&["--us", "20000"]), "poll_us=20000 poll_idle_percent=50\n");
    // What else runs on this machine must not matter.
    assert_eq!(set(&["--idle-percent", "0", "--json"]), "{\"poll_us\":20000,\"poll_idle_percent\":0}\n");
    let polling = || served.debug_queue()["polling"].clone();
    let before = polling();
    assert_eq!((&before["poll_us"], &before["poll_idle_percent"]), (&20000.into(), &0.into()));
    assert_eq!((&before["found"], &before["sleeps_avoided"]), (&0.into(), &0.into()));
    let mut load = tool("ring-load");
    load.arg("run").arg("--socket").arg(served.ring()).args(["--depth", "1", "--size", "8M"]);
    run(&mut load);
    let after = polling();
    assert!(after["found"].as_u64().unwrap() > 0 && after["sleeps_avoided"].as_u64() >= after["found"].as_u64());
    assert!(run(served.tap_ctl().arg("debug-queue")).contains("polling: 20000 us while the host is 0 % idle"));
    // It is polling when it answers here, and new clients come in; a slow machine may need several tries.
    set(&["--us", "1000000"]);
    let mut guest = Guest::connect(&served.ring());
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        assert_eq!(guest.write(0, &[1; 512]), 0);
        drop(Guest::connect(&served.ring()));
        if polling()["active"] == true {
            break;
        }
        assert!(Instant::now() < end, "whoever asks is answered only when polling is over");
    }
}

#[test]
fn idle_means_asleep() {
    for polling in ["", "[main_loop]\npoll_us = 1000\npoll_idle_percent = 0\n"] {
        asleep_when_idle(&format!("{LOCAL}{polling}"));
    }
}

fn asleep_when_idle(rest: &str) {
    let served = Served::start(RAM, rest);
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.write(0, &[1; 512]), 0);
    let switches = || -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", served.pid())).unwrap();
        tasks
            // A job's thread may have ended meanwhile.
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok())
            .flat_map(|text| {
                let counts = text.lines().filter(|line| line.contains("voluntary_ctxt_switches"));
                counts.map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()).collect::<Vec<_>>()
            })
            .sum()
    };
    // What woke up for the write may still be on its way to sleep, on a machine that is busy.
    let end = Instant::now() + PATIENCE;
    loop {
        let before = switches();
        std::thread::sleep(Duration::from_secs(2));
        let woken = switches().abs_diff(before);
        if woken == 0 {
            return;
        }
        assert!(Instant::now() < end, "something wakes up, {woken} times in two seconds");
    }
}
