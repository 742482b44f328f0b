//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use tapdisk::frontend::blkif::wire::Abi;

use super::units::{SizeRange, parse_duration, parse_size};

const EXAMPLES: &str = "\
Examples:
  ring-load info --socket /run/tapdisk/ring
  ring-load run --socket /run/tapdisk/ring --rw randread --bs 4k --depth 128 --runtime 10s
  ring-load run --socket /run/tapdisk/ring --rw randwrite --bs 512-64k --range 1G --verify
  ring-load copy-in --socket /run/tapdisk/ring guest.img

Exit codes: 0 all is well, 1 requests failed or the connection did, 2 wrong usage, 3 data is not what was written.

Sizes are in bytes, or with k, M, G or T in powers of 1024.";

const RUN_EXAMPLES: &str = "\
Examples:
  Random reads with the deepest ring, and what they cost the server:
    ring-load run --socket S --rw randread --depth 512 --runtime 10s --server-pid $(pidof tapdisk)
  Two guests' worth of mixed load, with a flush every 100 writes:
    ring-load run --socket S --rw randrw --mix 70 --queues 2 --depth 32 --fsync 100 --runtime 1m
  Write each part of the first GiB once in random order, read it back and check it:
    ring-load run --socket S --rw randwrite --bs 512-64k --range 1G --verify --seed 7
  The same check again, after the disk was stopped and started:
    ring-load run --socket S --rw randwrite --bs 512-64k --range 1G --verify-only --seed 7

Sizes are in bytes, or with k, M, G or T in powers of 1024.";

const COPY_IN_EXAMPLES: &str = "\
Examples:
  ring-load copy-in --socket /run/tapdisk/ring guest.img
  ring-load copy-in --socket /run/tapdisk/ring --offset 1M --pad bootloader.bin";

const COPY_OUT_EXAMPLES: &str = "\
Examples:
  ring-load copy-out --socket /run/tapdisk/ring --sparse guest.img
  ring-load copy-out --socket /run/tapdisk/ring --size 512 mbr.bin";

/// Loads, checks, fills and empties a disk that tapdisk serves on its local ring
///
/// The local ring is the shared memory ring of Xen's blkif protocol without Xen: this tool is the guest.
#[derive(Debug, Parser)]
#[command(name = "ring-load", version, after_help = EXAMPLES)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs reads and writes, measures them, and checks the data if asked
    Run(Box<Run>),
    /// Copies a file into the disk, and flushes
    CopyIn(CopyIn),
    /// Copies the disk, or a part of it, into a file
    CopyOut(CopyOut),
    /// Prints the disk's properties
    Info(Info),
}

/// How to reach the disk; for all commands.
#[derive(Clone, Debug, clap::Args)]
pub struct Connection {
    /// The socket of the disk's local frontend
    #[arg(long, short, value_name = "PATH")]
    pub socket: PathBuf,
    /// Layout of the ring's entries: that of this machine, of a 32-bit guest, or of a 64-bit guest
    #[arg(long, value_enum, default_value_t = AbiName::Native)]
    pub abi: AbiName,
    /// Give up if the server answers nothing for this long
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "60s")]
    pub timeout: Duration,
}

/// Names of the layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AbiName {
    /// That of this machine.
    #[value(help = None)]
    Native,
    /// `x86_32-abi`.
    #[value(name = "x86_32", help = None)]
    X86_32,
    /// `x86_64-abi`.
    #[value(name = "x86_64", help = None)]
    X86_64,
}

impl From<AbiName> for Abi {
    fn from(name: AbiName) -> Abi {
        match name {
            AbiName::Native => Abi::Native,
            AbiName::X86_32 => Abi::X86_32,
            AbiName::X86_64 => Abi::X86_64,
        }
    }
}

/// What a job does, with fio's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Rw {
    /// Reads in order
    Read,
    /// Writes in order
    Write,
    /// Reads at random places
    Randread,
    /// Writes at random places
    Randwrite,
    /// Reads and writes in order
    Rw,
    /// Reads and writes at random places
    Randrw,
    /// Discards in order
    Discard,
    /// Discards at random places
    Randdiscard,
}

impl Rw {
    /// Whether places are random.
    pub fn random(self) -> bool {
        matches!(self, Rw::Randread | Rw::Randwrite | Rw::Randrw | Rw::Randdiscard)
    }

    /// Whether the disk is changed.
    pub fn changes(self) -> bool {
        !matches!(self, Rw::Read | Rw::Randread)
    }

    /// Whether it discards.
    pub fn discards(self) -> bool {
        matches!(self, Rw::Discard | Rw::Randdiscard)
    }
}

/// `ring-load run`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = RUN_EXAMPLES)]
pub struct Run {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub connection: Connection,
    /// What to do
    #[arg(long, value_enum, default_value_t = Rw::Randread)]
    pub rw: Rw,
    /// Of a mixed job, how many of 100 requests are reads
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub mix: u8,
    /// Bytes of a request, or a range of which each request takes a random size
    ///
    /// A request of more than 11 pages (44k) is sent as an indirect one, up to what the server takes.
    #[arg(long, value_name = "SIZE[-SIZE]", default_value = "4k")]
    pub bs: SizeRange,
    /// Requests in flight in each queue
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub depth: u32,
    /// Queues (rings), each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub queues: u32,
    /// log2 of the pages of each ring [default: the smallest that holds the depth]
    #[arg(long, value_name = "ORDER", value_parser = clap::value_parser!(u32).range(0..=8))]
    pub ring_page_order: Option<u32>,
    /// Stop after this time [default: 10s, but for a job that is checked, which goes once over its part of the disk]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub runtime: Option<Duration>,
    /// Stop after this many bytes, of all queues together
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: Option<u64>,
    /// Where in the disk the job's part begins
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "0")]
    pub offset: u64,
    /// How long the job's part is [default: all behind the offset]
    ///
    /// In order, or where data is checked, each queue has its own share of it; else all queues use all of it.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub range: Option<u64>,
    /// The same seed gives the same requests and the same data
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Flush after each N writes of a queue
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub fsync: u64,
    /// Write data that can be checked; check what is read, and at the end read all back
    ///
    /// Each sector says where and when it was written and has a checksum, so lost, misplaced, stale and damaged sectors
    /// are all found. Each part of the disk is written once in a pass, so it is known what must be there.
    #[arg(long, conflicts_with = "verify_only")]
    pub verify: bool,
    /// Write nothing; check what an earlier run with --verify and otherwise the same options has written
    ///
    /// That run must have come to its end by --size or by default, not by --runtime.
    #[arg(long, conflicts_with = "runtime")]
    pub verify_only: bool,
    /// Look at the ring for this long before sleeping [default: up to 20 as it has paid off lately]
    #[arg(long, value_name = "MICROSECONDS")]
    pub spin: Option<u64>,
    /// Also show what CPU time this process, the server, used
    #[arg(long, value_name = "PID")]
    pub server_pid: Option<u32>,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// How copies are done; for both directions.
#[derive(Clone, Debug, clap::Args)]
pub struct Copying {
    /// Where in the disk to begin
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "0")]
    pub offset: u64,
    /// Bytes of a request, if the server takes that many
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "1M")]
    pub bs: u64,
    /// Requests in flight
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=512))]
    pub depth: u32,
}

/// `ring-load copy-in`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = COPY_IN_EXAMPLES)]
pub struct CopyIn {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub connection: Connection,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub copying: Copying,
    /// Fill the last sector with zeros if the file ends within it; else such a file is an error
    #[arg(long)]
    pub pad: bool,
    /// The file
    pub file: PathBuf,
}

/// `ring-load copy-out`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = COPY_OUT_EXAMPLES)]
pub struct CopyOut {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub connection: Connection,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub copying: Copying,
    /// Bytes to copy [default: all behind the offset]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: Option<u64>,
    /// Leave holes in the file where the disk has zeros
    #[arg(long)]
    pub sparse: bool,
    /// The file, which is made or overwritten
    pub file: PathBuf,
}

/// `ring-load info`.
#[derive(Clone, Debug, clap::Args)]
pub struct Info {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub connection: Connection,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_check_alone_cannot_be_cut_short_by_time() {
        let parse = |more: &str| {
            Args::try_parse_from(["ring-load", "run", "--socket", "s"].into_iter().chain(more.split_whitespace()))
        };
        assert!(parse("--rw randwrite --verify-only --size 1G").is_ok());
        assert!(parse("--rw randwrite --verify-only --runtime 1s").is_err());
        assert!(parse("--rw randwrite --verify-only --verify").is_err());
        assert!(parse("--mix 101").is_err());
    }
}
