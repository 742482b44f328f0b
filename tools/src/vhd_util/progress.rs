//! Long work: how far it is, and whether somebody wants it to end.

use std::io;
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::failure::{Failure, Result};

/// A bar on standard error, if that is a terminal.
pub(super) fn bar(len: u64) -> ProgressBar {
    let bar = ProgressBar::new(len);
    let style = "{bar:40} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar
}

/// Whether somebody wants it to end (SIGINT, SIGTERM, SIGHUP).
pub(super) struct Stop(SignalFd);

impl Stop {
    /// Signals do not end the process from now on. An error is told of the file at a path.
    pub(super) fn new(path: &Path) -> Result<Stop> {
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            signals.add(signal);
        }
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let stop = signals.thread_block().and_then(|()| SignalFd::with_flags(&signals, flags));
        stop.map(Stop).map_err(|errno| Failure::io(path, "listen to signals")(errno.into()))
    }

    /// EINTR: it is to end.
    pub(super) fn look(&self) -> io::Result<()> {
        match self.0.read_signal() {
            Ok(Some(_)) => Err(Errno::EINTR.into()),
            _ => Ok(()),
        }
    }
}
