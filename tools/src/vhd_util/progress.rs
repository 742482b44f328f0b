//! Long work: how far it is, and whether somebody wants it to end.

use std::io;
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::failure::{Failure, Result};

/// Work that is shown by a bar on standard error, if that is a terminal, as long as this lives; and that ends in order when there is a signal
/// (SIGINT, SIGTERM, SIGHUP).
pub(super) struct Work {
    bar: ProgressBar,
    signals: SignalFd,
}

impl Work {
    /// Work of so many bytes. Signals do not end the process from now on. An error is told of the file at a path.
    pub(super) fn new(path: &Path, len: u64) -> Result<Work> {
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            signals.add(signal);
        }
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = signals.thread_block().and_then(|()| SignalFd::with_flags(&signals, flags));
        let signals = signals.map_err(|errno| Failure::io(path, "listen to signals")(errno.into()))?;
        let bar = ProgressBar::new(len);
        let style = "{bar:40} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        Ok(Work { bar, signals })
    }

    /// So many bytes are done.
    pub(super) fn at(&self, bytes: u64) {
        self.bar.set_position(bytes);
    }

    /// EINTR: it is to end.
    pub(super) fn look(&self) -> io::Result<()> {
        match self.signals.read_signal() {
            Ok(Some(_)) => Err(Errno::EINTR.into()),
            _ => Ok(()),
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
