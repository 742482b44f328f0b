//! `vhd-util`: looks at VHD images.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    tools::vhd_util::run(&tools::vhd_util::Args::parse())
}
