//! `tap-ctl`: starts, lists, steers and ends the tapdisks of a host, with the commands and the output of blktap's, which toolstacks
//! parse; what is ours has long options.

mod args;
mod coalesce;
mod collect;
mod commit;
mod engine;
mod failure;
#[cfg(test)]
mod hostile_tests;
mod life;
mod list;
mod metrics;
mod resize;
mod show;
mod spawn;
mod throttle;
mod top;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, error::ErrorKind};
use nix::errno::Errno;
use serde_json::{Value, json};
use tapdisk::control::client::{self, Opening};
use tapdisk::control::proto::{fault, kind};
use tapdisk::text::Plain;

pub use args::*;
pub use top::Top;

/// Does what this process' command line says.
pub fn main() -> ExitCode {
    tapdisk::sys::process::keep_from_others();
    match Args::try_parse() {
        Ok(args) => run(&args),
        Err(error) => usage(&error),
    }
}

/// Prints help, or what is wrong with the command line.
fn usage(error: &clap::Error) -> ExitCode {
    let mut command = Args::command();
    let shown = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => command.print_help(),
        ErrorKind::ValueValidation | ErrorKind::InvalidValue => {
            command.build();
            let name = std::env::args().skip(1).find(|word| command.find_subcommand(word).is_some());
            let about = name.and_then(|name| command.find_subcommand_mut(name)).map(clap::Command::render_usage);
            error.print().map(|()| eprintln!("{}", about.unwrap_or_default()))
        }
        _ => error.print(),
    };
    // Where nobody can read it, the exit code says it.
    drop(shown);
    match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        | ErrorKind::MissingSubcommand => ExitCode::SUCCESS,
        _ => {
            if std::env::args_os().skip(1).take_while(|word| word != "--").any(|word| word == "--json") {
                let text = error.render().to_string();
                // The usage follows, which is for people.
                let text = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ").trim_end();
                failure::print_json(Errno::EINVAL as i32, text);
            }
            ExitCode::from(Errno::EINVAL as u8)
        }
    }
}

/// Does what the command line says.
pub fn run(args: &Args) -> ExitCode {
    match command(args, &mut io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(args, &error),
    }
}

/// Does the same, with `out` as standard output; the exit code, and what is said of an error, are the error.
pub fn run_to(args: &Args, out: &mut impl Write) -> Result<(), (i32, String)> {
    command(args, out).map_err(|error| failure::told(&error))
}

fn command(args: &Args, out: &mut impl Write) -> io::Result<()> {
    // It steers the terminal, and takes care of the rest itself.
    if let Command::Top(options) = &args.command {
        return top::top(out, &args.directory, options, args.json);
    }
    let out = &mut Plain(out);
    let (directory, json) = (args.directory.as_path(), args.json);
    let find = |which: &Which| list::find(args, which);
    let answer = match &args.command {
        Command::List(wanted) => return list::list(out, args, wanted),
        Command::Allocate { device: _ } => life::allocate(directory)?,
        Command::Free { minor } => life::free(directory, *minor)?,
        Command::Spawn { slice } => life::spawn(directory, slice.as_deref())?,
        Command::Attach { disk } => life::attach(directory, *disk)?,
        Command::Detach { disk } => life::detach(directory, *disk)?,
        Command::Open { disk, image, encrypted } => life::open(directory, *disk, image, *encrypted)?,
        Command::Close { disk, force, limit } => life::close(directory, *disk, *force, *limit)?,
        Command::Create { image, device: _, slice } => life::create(directory, slice.as_deref(), image)?,
        Command::Destroy { disk, limit } => life::destroy(directory, *disk, *limit)?,
        Command::Pause { disk, limit } => life::pause(directory, find(disk)?, *limit)?,
        Command::Unpause { disk, image, secondary, log } => {
            let (image, secondary) = (absolute_name(image.as_deref().unwrap_or_default())?, secondary.as_deref());
            let log = log.as_deref().map(absolute_path).transpose()?;
            let opening = Opening { image: &image, secondary, log: log.as_deref(), ..Opening::default() };
            life::unpause(directory, find(disk)?, &opening)?
        }
        Command::Stats { disk } => return show::verbatim(out, &text(args, disk, kind::STATS)?, json),
        Command::Metrics => return metrics::metrics(out, directory, json),
        Command::Top(_) => unreachable!("it is done above"),
        Command::Commit { disk, image } => commit::commit(directory, find(disk)?, &absolute_name(image)?)?,
        Command::Query { disk } => commit::query(directory, find(disk)?)?,
        Command::Cancel { disk, wait } => commit::cancel(directory, find(disk)?, *wait)?,
        // It may have no disk.
        Command::Exit { disk: Which { pid: Some(pid), .. } } => life::exit(directory, *pid)?,
        Command::Exit { disk } => life::exit(directory, find(disk)?.pid)?,
        Command::DebugQueue { disk } => return show::debug_queue(out, &text(args, disk, kind::DEBUG_QUEUE)?, json),
        Command::Poll { disk, us, idle_percent } => {
            let Disk { pid, minor } = find(disk)?;
            return show::poll(out, client::poll(directory, pid, minor, *us, *idle_percent)?, json);
        }
        Command::Resize { disk, size } => resize::resize(directory, find(disk)?, size.map(|size| size.0))?,
        Command::Engine { disk, name, submit, threads_min, threads_max } => {
            let change = engine::change(*name, *submit, *threads_min, *threads_max);
            let Disk { pid, minor } = find(disk)?;
            return engine::show(out, &client::engine(directory, pid, minor, &change)?, json);
        }
        Command::Throttle(options) => {
            let Disk { pid, minor } = find(&options.disk)?;
            return throttle::show(out, &client::throttle(directory, pid, minor, &options.change())?, json);
        }
        Command::Fault { disk, release, on, off } => {
            let flag = |set: bool, flag| if set { flag } else { 0 };
            let flags = flag(*release, fault::RELEASE) | flag(*on, fault::ENABLE) | flag(*off, fault::DISABLE);
            let Disk { pid, minor } = find(disk)?;
            return engine::show_faults(out, &client::faults(directory, pid, minor, flags)?, json);
        }
        Command::Coalesce(options) => return coalesce::coalesce(out, directory, find(&options.disk)?, options, json),
    };
    answer.print(out, json)
}

/// What a command says: to people and toolstacks, perhaps nothing, and as JSON.
struct Answer {
    text: String,
    value: Value,
}

impl Answer {
    fn new(text: impl ToString, value: Value) -> Answer {
        Answer { text: text.to_string(), value }
    }

    /// Something was done to a disk.
    fn done(disk: Disk) -> Answer {
        Answer::new("", json!({ "pid": disk.pid, "minor": disk.minor }))
    }

    fn print(self, out: &mut impl Write, json: bool) -> io::Result<()> {
        match self.text.as_str() {
            _ if json => writeln!(out, "{}", self.value),
            "" => Ok(()),
            text => writeln!(out, "{text}"),
        }
    }
}

fn text(args: &Args, which: &Which, request: u16) -> io::Result<String> {
    let Disk { pid, minor } = list::find(args, which)?;
    client::text_of(&args.directory, pid, minor, request)
}

/// Where control sockets are unless somebody says otherwise.
const CONTROL_DIRECTORY: &str = "/run/blktap-control";

/// A name, `type:path` or a path alone, whose path begins at the root: a tapdisk has a folder of its own.
fn absolute_name(name: &str) -> io::Result<String> {
    let (kind, path) = match name.split_once(':') {
        Some((kind, path)) if !kind.contains('/') => (format!("{kind}:"), path),
        _ => (String::new(), name),
    };
    Ok(kind + &absolute_path(path)?)
}

/// A path that begins at the root; none is none.
fn absolute_path(path: &str) -> io::Result<String> {
    if path.is_empty() {
        return Ok(String::new());
    }
    let path = if path.starts_with('/') { path.into() } else { std::path::absolute(path)? };
    Ok(path.to_str().ok_or(Errno::EINVAL)?.to_owned())
}

/// Whether standard output is a terminal.
fn is_terminal() -> bool {
    io::stdout().is_terminal()
}
