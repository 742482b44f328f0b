//! `vhd-util`: VHD images that no tapdisk serves. Options and output are blktap's, which storage managers parse; what is ours
//! has long options.

mod args;
mod check;
mod coalesce;
mod convert;
mod create;
mod disk;
mod failure;
mod file;
mod fill;
mod journal;
mod key;
mod progress;
mod read;
mod repair;
mod resize;
mod scan;
mod set;
mod show;
#[cfg(test)]
mod testing;
mod volumes;

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use nix::errno::Errno;
use tapdisk::text::one_line;

pub use args::*;
use failure::Result;

/// Lets an image that nobody serves have a disk of `size` bytes, rounded up to whole MiB and blocks, if it need not move a block. The
/// errno and the text of an error tell why not.
pub fn grow(image: &Path, size: u64) -> std::result::Result<(), (Errno, String)> {
    let (name, size) = (image.to_owned(), size.div_ceil(1 << 20));
    let done = resize::resize(&Resize { name, size, journal: None, fast: true });
    done.map_err(|failure| (failure.errno, failure.text))
}

/// Does what this process' command line says. One that is wrong is EINVAL.
pub fn main() -> ExitCode {
    match Args::try_parse() {
        Ok(args) => run(&args),
        Err(error) => {
            // Where nobody can read it, the exit code says it.
            let _ = error.print();
            if error.use_stderr() { ExitCode::from(Errno::EINVAL as u8) } else { ExitCode::SUCCESS }
        }
    }
}

/// Does what the command line says.
pub fn run(args: &Args) -> ExitCode {
    let mut out = io::stdout().lock();
    let done = command(args, &mut out).and_then(|()| out.flush().map_err(failure::Failure::output));
    let Err(failure) = done else { return ExitCode::SUCCESS };
    if let Some(line) = failure.line {
        // Where it can't be written, the exit code still says that something is wrong.
        let _ = writeln!(out, "{}", one_line(&line));
    }
    if !failure.text.is_empty() {
        eprintln!("{}", one_line(&failure.text));
    }
    ExitCode::from(u8::try_from(failure.errno as i32).unwrap_or(1))
}

/// Does the same, with `out` as standard output; what standard error would say of it, and the exit code's errno, are the error.
pub fn run_to(args: &Args, out: &mut dyn Write) -> std::result::Result<(), (Errno, String)> {
    command(args, out).map_err(|failure| (failure.errno, one_line(&failure.text).into_owned()))
}

fn command(args: &Args, out: &mut dyn Write) -> Result<()> {
    let parents = args.folders.as_slice();
    match &args.command {
        Command::Create(args) => create::create(args),
        Command::Snapshot(args) => create::snapshot(args, parents),
        Command::Query(args) => show::query(args, parents, out),
        Command::Check(args) => check::check(args, parents, out),
        Command::Info { image, json } => show::info(image, parents, *json, out),
        Command::Read(args) => read::read(args, parents, out),
        Command::Set(args) => set::set(args),
        Command::Modify(args) => set::modify(args),
        Command::Coalesce(args) => coalesce::coalesce(args, parents, out),
        Command::Repair(args) => repair::repair(args, out),
        Command::Convert(args) => convert::convert(args, parents),
        Command::Copy(args) => convert::copy(args),
        Command::Fill(args) => fill::fill(args, parents),
        Command::Resize(args) => resize::resize(args),
        Command::Revert(args) => resize::revert(args),
        Command::Key(args) => key::key(args, out),
        Command::Scan(args) => scan::scan(args, out),
    }
}
