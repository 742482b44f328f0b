//! The command line of `tapdisk`; man page and shell completions are made of it.

use std::path::PathBuf;

use clap::Parser;

/// Serves one virtual disk from user space.
///
/// The configuration says which image is served, by which engine, and how clients reach it: as a disk of a Xen guest, by
/// a blkif ring in shared memory, or by NBD. tapdisk stays in the foreground. It prints the path of its control socket on standard
/// output as soon as clients can connect; tap-ctl(1) speaks to that socket.
///
/// SIGTERM and SIGINT finish the requests that are in flight, make everything durable, and end the process with
/// exit code 0; a second one gives up the requests that have not reached the engine. SIGUSR1 writes what
/// `tap-ctl debug-queue` shows to the log. SIGHUP reopens the log file.
#[derive(Debug, Parser)]
#[command(
    name = "tapdisk",
    version,
    after_help = "Examples:
  tapdisk conf/quick-start.toml            serve the disk of that file
  tapdisk --check conf/quick-start.toml    print the configuration with all defaults, and stop

The files in conf/ say what each key means. Exit codes: 0 after an orderly end, 1 on an error, 2 for a wrong command
line or configuration."
)]
pub struct Args {
    /// Validate the configuration, print it as TOML with all defaults filled in, and stop
    #[arg(long)]
    pub check: bool,

    /// The configuration, a TOML file
    pub config: PathBuf,
}
