//! `tap-ctl`: inspects and steers tapdisks.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    tools::tap_ctl::run(&tools::tap_ctl::Args::parse())
}
