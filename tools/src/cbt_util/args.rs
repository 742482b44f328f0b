//! The command line. All of it is blktap's, and means the same.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};

/// Makes, reads and changes logs of changed blocks, by which backup programs know what was written to a disk.
///
/// A tapdisk that is given a log (tap-ctl open -C, unpause -c, image.changed_blocks) sets a bit in it for each block of 64 KiB that is
/// written. All else of it is the storage manager's: which log is older, which is newer, and whether the log tells of everything.
///
/// A log is a regular file or a block device. A link is followed only to a block device. What is told to be done is on the disk when
/// the program ends.
///
/// The exit code is 0, or the errno of what went wrong: EIO (5) for a file that is too short, EBUSY (16) for a log that is in use, EINVAL
/// (22) for a wrong command line. A command that does not exist is 0, as with blktap's.
#[derive(Debug, Parser)]
#[command(
    name = "cbt-util",
    version,
    after_help = "Examples:
  cbt-util create -n disk.cbtlog -s 10737418240
  cbt-util set -n disk.cbtlog -f 0
  tap-ctl unpause -p 4711 -m 0 -c /srv/vm/disk.cbtlog
  cbt-util get -n disk.cbtlog -b >changed
  cbt-util coalesce -p older.cbtlog -c newer.cbtlog"
)]
pub struct Args {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes a log in which no block was written, in the place of what is there
    ///
    /// It has neither an older nor a newer log, and its flag is 0. A file is replaced when the new one is whole; a block device is
    /// written, and has no log until that is done.
    #[command(args_override_self = true)]
    Create(Create),
    /// Changes what a log says of itself; its bits stay
    #[command(args_override_self = true)]
    Set(Set),
    /// Prints what a log says of itself, or its bits
    #[command(args_override_self = true)]
    Get(Get),
    /// Adds an older log's bits to a newer one's
    ///
    /// Cut short, it has added some of them, which does no harm: done again, it adds the others.
    #[command(args_override_self = true)]
    Coalesce(Coalesce),
}

/// What `create` makes.
#[derive(Debug, ClapArgs)]
pub struct Create {
    /// The log
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// The disk's size, in bytes
    #[arg(short, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    pub size: u64,
}

/// What `set` sets.
#[derive(Debug, ClapArgs)]
#[command(group = clap::ArgGroup::new("what").args(["parent", "child", "flag", "size"]).required(true).multiple(true))]
pub struct Set {
    /// The log
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// The older log; zeros: none. What is no UUID changes nothing
    #[arg(short, value_name = "UUID")]
    pub parent: Option<String>,
    /// The newer log; zeros: none. What is no UUID changes nothing
    #[arg(short, value_name = "UUID")]
    pub child: Option<String>,
    /// Whether it tells of everything that was written: 1 or 0
    #[arg(short, value_parser = clap::value_parser!(i32).range(0..=1))]
    pub flag: Option<i32>,
    /// The disk's size, in bytes, which may have become larger; what is new of it was not written
    #[arg(short, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    pub size: Option<u64>,
}

/// What `get` prints.
#[derive(Debug, ClapArgs)]
#[command(group = clap::ArgGroup::new("what").args(["parent", "child", "flag", "size", "bitmap"]).required(true))]
pub struct Get {
    /// The log
    #[arg(short, value_name = "FILE")]
    pub name: PathBuf,
    /// The older log's UUID; zeros: none
    #[arg(short)]
    pub parent: bool,
    /// The newer log's UUID; zeros: none
    #[arg(short)]
    pub child: bool,
    /// Whether it tells of everything that was written
    #[arg(short)]
    pub flag: bool,
    /// The disk's size, in bytes
    #[arg(short)]
    pub size: bool,
    /// The bits, as they are in the file: one for each block of 64 KiB, in each byte the least significant first
    #[arg(short)]
    pub bitmap: bool,
}

/// What `coalesce` adds.
#[derive(Debug, ClapArgs)]
pub struct Coalesce {
    /// The older log, whose disk is not larger; it is not changed
    #[arg(short, value_name = "FILE")]
    pub parent: PathBuf,
    /// The newer log, which gets the bits
    #[arg(short, value_name = "FILE")]
    pub child: PathBuf,
}
