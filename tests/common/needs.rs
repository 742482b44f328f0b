//! What a machine may lack. A test that can't run says so, and `tests/run` counts those at its end.

use std::fs::OpenOptions;
use std::io::Write;
use std::panic::Location;

use nix::unistd::geteuid;

/// Says that the calling test, or the rest of it, does not run: to the file that TAPDISK_TESTS_SKIPPED names, a line for each,
/// or to standard error, which the test harness would keep to itself if this were `eprintln!`.
#[track_caller]
pub fn skipped(why: &str) {
    let at = Location::caller();
    let line = format!("{}:{}: {}\n", at.file(), at.line(), why.trim());
    let file = std::env::var_os("TAPDISK_TESTS_SKIPPED");
    let file = file.and_then(|path| OpenOptions::new().create(true).append(true).open(path).ok());
    // One write, so that lines of several tests do not mix.
    match file {
        Some(mut file) => file.write_all(line.as_bytes()).unwrap(),
        None => std::io::stderr().write_all(format!("SKIPPED {line}").as_bytes()).unwrap(),
    }
}

/// Whether the test runs as root; says so if it does not.
#[track_caller]
pub fn root() -> bool {
    if !geteuid().is_root() {
        skipped("needs root");
    }
    geteuid().is_root()
}
