//! The command line of `tapdisk`; man page and shell completions are made of it.

use std::path::{Path, PathBuf};

use clap::Parser;

use crate::config::{Config, Error};

/// Where the defaults are for disks that tap-ctl opens.
pub const DEFAULTS: &str = "/etc/tapdisk/defaults.toml";

/// Serves virtual disks from user space.
///
/// With a configuration it serves the image that this names, and stays in the foreground. It says by which engine, and how clients
/// reach the disk: as a disk of a Xen guest, by a blkif ring in shared memory, or by NBD.
///
/// Without one it goes into the background and waits for tap-ctl(8) to attach minors and open images, as blktap's tapdisk does, and
/// ends when the last minor is detached. What tap-ctl does not say of a disk is as in /etc/tapdisk/defaults.toml, if that is there: a
/// configuration without an image, whose sockets may have {minor} and {pid} in their names. Each disk is also exported by NBD, at
/// `nbd<pid>.<minor>` in the control directory.
///
/// It prints the path of its control socket on standard output as soon as clients can connect. In the background its log goes to
/// syslog, unless log.file says where.
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
  tapdisk                                  wait in the background for tap-ctl: tap-ctl spawn does that
  tapdisk -D                               the same in the foreground

The files in conf/ say what each key means. Exit codes: 0 after an orderly end, 1 on an error, 2 for a wrong command
line or configuration; an errno if it waits for tap-ctl and could not begin to."
)]
pub struct Args {
    /// Validate the configuration, print it as TOML with all defaults filled in, and stop
    #[arg(long)]
    pub check: bool,

    /// Stay in the foreground, without a configuration too
    #[arg(short = 'D', long, conflicts_with = "background")]
    pub foreground: bool,

    /// Go into the background, with a configuration too
    #[arg(short = 'B', long)]
    pub background: bool,

    /// What holds for the disks that tap-ctl opens, instead of /etc/tapdisk/defaults.toml
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    pub defaults: Option<PathBuf>,

    /// Where the control socket is made, instead of control.directory
    #[arg(long, value_name = "DIRECTORY")]
    pub control_directory: Option<PathBuf>,

    /// The configuration, a TOML file
    pub config: Option<PathBuf>,
}

impl Args {
    /// The configuration that they name.
    pub fn configuration(&self) -> Result<Config, Error> {
        let mut config = match (&self.config, &self.defaults) {
            (Some(config), _) => Config::load(config)?,
            (None, Some(defaults)) => Config::load_defaults(defaults)?,
            (None, None) if Path::new(DEFAULTS).exists() => Config::load_defaults(Path::new(DEFAULTS))?,
            (None, None) => Config::default(),
        };
        if let Some(directory) = &self.control_directory {
            config.control.directory.clone_from(directory);
        }
        if self.config.is_none() {
            // Its folder is another one when it serves.
            for path in [Some(&mut config.control.directory), config.log.file.as_mut()].into_iter().flatten() {
                *path = std::path::absolute(&*path).unwrap_or_else(|_| path.clone());
            }
        }
        Ok(config)
    }

    /// Whether the process is to go into the background.
    pub fn in_background(&self) -> bool {
        self.background || (self.config.is_none() && !self.foreground)
    }
}
