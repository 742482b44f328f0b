//! `vhd-util`: looks at VHD images that no tapdisk serves. Options and output are blktap's, which storage managers parse; what
//! is ours has long options.

mod show;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args as ClapArgs, Parser, Subcommand};
use nix::errno::Errno;
use tapdisk::chain::Error;

/// Looks at VHD images.
///
/// The exit code is 0, or the errno of what went wrong: EINVAL (22) for an image that is no good.
#[derive(Debug, Parser)]
#[command(
    name = "vhd-util",
    version,
    after_help = "Examples:
  vhd-util info disk.vhd
  vhd-util check -n disk.vhd -p
  vhd-util query -vsf -n disk.vhd"
)]
pub struct Args {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Prints what is asked for, each on a line, in the order of the options here
    #[command(disable_version_flag = true)]
    Query(Query),
    /// Looks for all that is wrong with an image, and changes nothing
    Check(Check),
    /// Shows an image and its parents
    Info {
        /// The image
        image: PathBuf,
        /// Prints JSON
        #[arg(long)]
        json: bool,
    },
}

/// What `query` prints.
#[derive(Debug, ClapArgs)]
pub struct Query {
    /// The image
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// The disk's size, in MiB
    #[arg(short = 'v')]
    pub size: bool,
    /// The bytes of the file that the image takes
    #[arg(short = 's')]
    pub physical: bool,
    /// The parent's path, or that there is none
    #[arg(short)]
    pub parent: bool,
    /// Whether it is hidden
    #[arg(short)]
    pub fields: bool,
    /// How many images its chain has
    #[arg(short)]
    pub depth: bool,
    /// The size, in MiB, to which it can grow without moving its blocks
    #[arg(short = 'S')]
    pub largest: bool,
    /// How many blocks it has
    #[arg(short)]
    pub allocated: bool,
}

/// What `check` looks at.
#[derive(Debug, ClapArgs)]
pub struct Check {
    /// The image
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// Does not mind a footer at the end that is no good, if the copy at the beginning is: such is an image that was in use
    /// when the host stopped
    #[arg(short)]
    pub ignore_footer: bool,
    /// Does not mind blocks that overlap
    #[arg(short = 'B')]
    pub ignore_overlaps: bool,
    /// Checks its parents, too
    #[arg(short)]
    pub parents: bool,
}

/// Does what the command line says.
pub fn run(args: &Args) -> ExitCode {
    let mut out = io::stdout().lock();
    let done = match &args.command {
        Command::Query(query) => show::query(query, &mut out),
        Command::Check(check) => show::check(check, &mut out),
        Command::Info { image, json } => show::info(image, *json, &mut out),
    };
    match done {
        Ok(code) => code,
        // Whoever read our output has enough of it.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// The errno that an error stands for.
fn errno(error: &Error) -> Errno {
    let system = match error {
        Error::Open { source, .. } => source.raw_os_error(),
        Error::Image { source: drivers::vhd::ReadError::Io { source, .. }, .. } => source.raw_os_error(),
        Error::NoParent { .. } => return Errno::ENOENT,
        Error::Image { .. }
        | Error::OtherParent { .. }
        | Error::ChangedParent { .. }
        | Error::Folder { .. }
        | Error::Endless { .. } => return Errno::EINVAL,
    };
    system.map_or(Errno::EIO, Errno::from_raw)
}

/// The exit code that says so.
fn exit_code(error: &Error) -> ExitCode {
    ExitCode::from(u8::try_from(errno(error) as i32).unwrap_or(1))
}
