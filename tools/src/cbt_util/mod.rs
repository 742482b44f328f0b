//! `cbt-util`: logs of changed blocks. Options, output and exit codes are blktap's, which storage managers know.

mod args;
mod change;
mod file;

use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use drivers::changed_blocks::{HEADER_SIZE, map_len};
use nix::errno::Errno;
use tapdisk::store;
use tapdisk::sys::errno_of;
use tapdisk::text::one_line;

pub use args::*;
use file::{LogFile, pieces};

/// Why a command failed: what is printed on standard error, and the exit code.
#[derive(Debug)]
struct Failure {
    errno: Errno,
    text: String,
}

type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// Something about a file.
    fn new(errno: Errno, path: &Path, text: impl std::fmt::Display) -> Failure {
        Failure { errno, text: format!("{}: {text}", path.display()) }
    }

    /// The system said no to what `action` says.
    fn io<'a>(path: &'a Path, action: &'a str) -> impl Fn(io::Error) -> Failure + 'a {
        move |error| Failure::new(errno_of(&error), path, format!("cannot {action}: {error}"))
    }

    /// The same of standard output.
    fn output(error: io::Error) -> Failure {
        Failure { errno: errno_of(&error), text: format!("standard output: {error}") }
    }
}

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Failure {
        let text = match &error {
            store::Error::Locked { path, holder } => {
                format!("{}: in use by {holder}: pause the disk first, or close it", path.display())
            }
            other => other.to_string(),
        };
        Failure { errno: error.errno(), text }
    }
}

/// For a disk of how many bytes a log is. The errno and the text of an error tell why that is not known.
pub fn disk_size(log: &Path) -> std::result::Result<u64, (Errno, String)> {
    let header = LogFile::open(log, false).and_then(|log| log.header());
    header.map(|header| header.size()).map_err(|failure| (failure.errno, failure.text))
}

/// Does what this process' command line says.
pub fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().collect();
    let first = words.get(1).map_or(OsStr::new(""), |word| word.as_os_str());
    let is_command = Args::command().get_subcommands().any(|command| first == command.get_name());
    if !is_command && !["--help", "--version", "help", "-V"].iter().any(|word| first == *word) {
        // As blktap's has it.
        if !first.is_empty() {
            eprintln!("{}: no such command", one_line(&first.to_string_lossy()));
        }
        let _ = Args::command().print_help();
        return ExitCode::SUCCESS;
    }
    match Args::try_parse_from(&words) {
        Ok(args) => run(&args),
        Err(error) => {
            // Where nobody can read it, the exit code says it.
            let _ = error.print();
            let asked = |word: &str| words.iter().any(|given| given == word);
            match error.kind() {
                ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                // With -h, blktap's fails.
                ErrorKind::DisplayHelp if !is_command || asked("--help") => ExitCode::SUCCESS,
                _ => ExitCode::from(Errno::EINVAL as u8),
            }
        }
    }
}

fn run(args: &Args) -> ExitCode {
    let mut out = io::stdout().lock();
    let done = command(args, &mut out).and_then(|()| out.flush().map_err(Failure::output));
    let Err(failure) = done else { return ExitCode::SUCCESS };
    eprintln!("{}", one_line(&failure.text));
    ExitCode::from(u8::try_from(failure.errno as i32).unwrap_or(1))
}

fn command(args: &Args, out: &mut dyn Write) -> Result<()> {
    match &args.command {
        Command::Create(args) => change::create(args),
        Command::Set(args) => change::set(args),
        Command::Get(args) => get(args, out),
        Command::Coalesce(args) => change::coalesce(args),
    }
}

fn get(args: &Get, out: &mut dyn Write) -> Result<()> {
    let log = LogFile::open(&args.name, false)?;
    let header = log.header()?;
    let line = match args {
        Get { parent: true, .. } => header.parent.to_string(),
        Get { child: true, .. } => header.child.to_string(),
        Get { flag: true, .. } => header.consistent().to_string(),
        Get { size: true, .. } => header.size().to_string(),
        _ => {
            log.check_map(&header)?;
            return pieces(map_len(header.size())).try_for_each(|(at, len)| {
                let piece = log.read(at + HEADER_SIZE as u64, len)?;
                out.write_all(&piece).map_err(Failure::output)
            });
        }
    };
    writeln!(out, "{line}").map_err(Failure::output)
}
