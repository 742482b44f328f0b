//! `ring-load`: loads, checks, fills and empties a disk through tapdisk's local ring, as a guest would through Xen's.

pub mod args;
mod copy;
mod info;
mod job;
mod lane;
mod pattern;
mod report;
mod server;
mod units;
mod verify;

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use tapdisk::client;

pub use self::args::Args;
use self::args::Command;

/// Exit code where data is not what was written.
const EXIT_MISMATCH: u8 = 3;

/// Why a command ends early.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The connection.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// A file of ours.
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    /// The command line and the disk do not fit.
    #[error("{0}")]
    Usage(String),
    /// The server answers what was not asked.
    #[error("the server breaks the protocol: {0}")]
    Protocol(String),
    /// The disk refuses a request.
    #[error("{op} of {len} bytes at {offset} failed: {status}")]
    Refused { op: &'static str, offset: u64, len: u32, status: &'static str },
    /// The server says nothing.
    #[error("no answer for {seconds} s with {outstanding} requests in flight")]
    Silence { seconds: f64, outstanding: u32 },
}

/// How a command that came to its end went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Well.
    Good,
    /// Some requests failed.
    Errors,
    /// Some data is wrong.
    Mismatch,
}

/// Prints a line. Whoever read it may have gone; the exit code still says how it went.
fn say(line: fmt::Arguments) {
    match writeln!(io::stdout(), "{line}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => eprintln!("ring-load: standard output: {error}"),
        _ => {}
    }
}

/// Does what the command line says.
pub fn main_with(args: &Args) -> ExitCode {
    let outcome = match &args.command {
        Command::Run(run) => job::run(run),
        Command::CopyIn(copy) => copy::copy_in(copy),
        Command::CopyOut(copy) => copy::copy_out(copy),
        Command::Info(info) => info::info(info),
    };
    match outcome {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::Errors) => ExitCode::FAILURE,
        Ok(Outcome::Mismatch) => ExitCode::from(EXIT_MISMATCH),
        Err(failure) => {
            eprintln!("ring-load: {failure}");
            ExitCode::FAILURE
        }
    }
}
