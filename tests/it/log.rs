//! The log, and what tools print: whole lines, each a record, whatever names there are and however full the disk is.

use std::path::Path;
use std::process::Command;

use crate::common::live::wait_for;
use crate::common::served::{Served, folder, run, tool};
use crate::common::small_fs::SmallFs;
use nix::sys::signal::Signal;

const RAM: &str = "type = 'ram'\nsize = '1 MiB'";

/// What a terminal obeys, and what ends a line.
const NAME: &str = "a\nforged\r\u{1b}[2J\u{9b}2J\u{2028}\u{202e}b";

fn has_no_commands(text: &str) {
    for line in text.lines() {
        let obeyed = line.chars().find(|shown| shown.is_control() || "\u{2028}\u{202e}".contains(*shown));
        assert!(obeyed.is_none() && !line.starts_with("forged"), "{line:?}");
    }
}

fn in_toml(text: &str) -> String {
    serde_json::to_string(text).unwrap().replace('\u{9b}', "\\u009b")
}

#[test]
fn names_make_no_lines_and_steer_no_terminal() {
    let folder = folder();
    let path = folder.path().join(NAME);
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    for format in ["terminal", "json"] {
        let image = format!("path = {}", in_toml(path.to_str().unwrap()));
        let rest = format!(
            "[frontend.nbd]\nsocket = '{{s}}/nbd'\nexport = {}\n[log]\nformat = '{format}'\nfile = '{{s}}/log'\n",
            in_toml(NAME)
        );
        let served = Served::start(&image, &rest);
        for words in [
            &["list"][..],
            &["list", "--json"],
            &["debug-queue"],
            &["debug-queue", "--json"],
            &["stats"],
            &["metrics"],
            &["metrics", "--json"],
            &["top", "--count", "1", "--interval", "0.1"],
            &["top", "--count", "1", "--interval", "0.1", "--json"],
        ] {
            let said = run(served.tap_ctl().args(words));
            assert!(said.contains("forged"), "{words:?}: {said}");
            has_no_commands(&said);
        }
        served.signal(Signal::SIGUSR1);
        served.wait_log("debug-queue");
        let (code, log) = served.stop();
        assert_eq!(code, Some(0));
        has_no_commands(&log);
        for what in ["image open", "NBD server listens", "debug-queue"] {
            let line = log.lines().find(|line| line.contains(what)).unwrap();
            assert!(line.contains("\\n") && line.contains("forged"), "{line}");
        }
        if format == "json" {
            let name = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["export"].clone();
            assert!(log.lines().map(name).any(|name| name == NAME), "{log}");
        }
    }
}

#[test]
fn what_a_tapdisk_says_that_does_not_start_is_one_line() {
    let folder = folder();
    let path = folder.path().join(NAME);
    let (code, said) = Served::refused(&format!("path = {}", in_toml(path.to_str().unwrap())), "");
    assert!(code == 1 && said.contains("forged") && said.ends_with('\n'), "{code} {said}");
    has_no_commands(&said);
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// All lines are records. Each begins with its time.
fn whole_lines(log: &Path) -> Vec<String> {
    // A part is there for a moment, until it is taken back.
    let whole = |text: &String| text.is_empty() || text.ends_with('\n');
    let text = wait_for(|| Some(std::fs::read_to_string(log).unwrap_or_default()).filter(whole));
    for line in text.lines() {
        let level = line.split(' ').nth(3).unwrap_or_default();
        assert!(["INFO", "WARN", "DEBG"].contains(&level) && line.contains("pid: "), "no record: {line:?}");
    }
    text.lines().map(str::to_owned).collect()
}

/// Has something logged that often, and says what is in the log then, when all is written that can be.
fn log_some(served: &Served, count: u32) {
    for us in 1..=count {
        run(served.tap_ctl().args(["poll", "--us", &us.to_string()]));
    }
}

/// The records of [`log_some`] that are there, and how many are said to be lost.
fn logged_and_lost(lines: &[String]) -> (usize, u64) {
    let logged = lines.iter().filter(|line| line.contains("polling set")).count();
    let lost = lines.iter().filter(|line| line.contains("log records were lost"));
    let count = |line: &String| line.rsplit_once("count: ").unwrap().1.parse::<u64>().unwrap();
    (logged, lost.map(count).sum())
}

#[test]
fn a_full_disk_loses_whole_records_and_the_log_says_how_many() {
    let Some(small) = SmallFs::new("2m") else { return };
    let log = small.path("log");
    let served = Served::start(RAM, &format!("[log]\nfile = '{}'\n", log.display()));
    let ballast = small.fill("ballast");
    log_some(&served, 100);
    let (before, none) = logged_and_lost(&whole_lines(&log));
    assert!(none == 0 && before < 100, "{before} records are logged: the disk was not full");
    std::fs::remove_file(ballast).unwrap();
    // Without that anything else is logged.
    let lost = wait_for(|| Some(logged_and_lost(&whole_lines(&log)).1).filter(|lost| *lost > 0));
    log_some(&served, 3);
    let text = wait_for(|| Some(whole_lines(&log)).filter(|lines| logged_and_lost(lines).0 == before + 3));
    assert_eq!((before as u64 + lost, logged_and_lost(&text).1), (100, lost), "{text:#?}");
    drop(served);
}

#[test]
fn a_limit_of_file_sizes_loses_whole_records_and_a_rotated_log_says_how_many() {
    let mut command = Command::new("prlimit");
    command.arg("--fsize=8000").arg(tool("tapdisk").get_program());
    let served = Served::start_by(command, "", RAM, "[log]\nfile = '{s}/log'\n");
    log_some(&served, 100);
    let (log, old) = (served.sockets().join("log"), served.sockets().join("log.1"));
    let (before, none) = logged_and_lost(&whole_lines(&log));
    assert!(none == 0 && before > 0 && before < 100, "{before} are logged");
    std::fs::rename(&log, &old).unwrap();
    served.signal(Signal::SIGHUP);
    let lost = wait_for(|| Some(logged_and_lost(&whole_lines(&log)).1).filter(|lost| *lost > 0));
    assert_eq!(before as u64 + lost, 100, "{}", served.log());
    whole_lines(&old);
}
