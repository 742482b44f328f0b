//! `ring-load`: a client of tapdisk's local ring. See [`tools::ring_load`].

use std::process::ExitCode;

use clap::Parser;
use tools::ring_load::{Args, main_with};

fn main() -> ExitCode {
    main_with(&Args::parse())
}
