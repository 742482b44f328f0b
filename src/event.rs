//! The main loop: one mio `Poll`, whose tokens name the source in their upper half and the source's own index in
//! their lower half.

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use slog::{Logger, error, info, warn};

use crate::blocking::Blocking;
use crate::config::{self, Config};
use crate::control::Control;
use crate::disk::Turn;
use crate::job;
use crate::log::Log;
use crate::memory;
use crate::metrics::text::Exposition;
use crate::metrics::{self, ProcessMetrics};
use crate::minors::{Minor, Minors};
use crate::polling::{Look, Polling, Settings, watch};
use crate::stats::now;

const SIGNALS: usize = 0;
const CONTROL: usize = 1;
const METRICS: usize = 2;
/// The first of the disks'.
const MINORS: usize = 3;

const fn token(source: usize, index: usize) -> usize {
    source << 32 | index
}

/// Turns that may follow each other before the poll is asked: a busy ring must not shut out the control socket.
const TURNS_MAX: u32 = 64;

/// The signals that the loop handles. They must be blocked before the first thread starts.
pub fn signals() -> SigSet {
    SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGHUP])
}

/// Those, and SIGXFSZ: a write beyond the limit of file sizes (setrlimit(2)) is an error of that write, EFBIG, and not the end of all disks.
pub fn blocked() -> SigSet {
    let mut blocked = signals();
    blocked.add(Signal::SIGXFSZ);
    blocked
}

/// The main loop of a process.
pub struct MainLoop {
    poll: Poll,
    minors: Minors,
    control: Control,
    metrics: Option<metrics::http::Server>,
    signals: SignalFd,
    /// After answers: for the requests that follow them.
    after_answer: Spin,
    /// After submissions: for their completions.
    after_submit: Spin,
    /// After requests, if that is set.
    polling: Polling,
    logging: Log,
    log: Logger,
}

impl MainLoop {
    /// A loop without disks. Starts the [job maker](job::start_maker).
    pub fn new(blocking: &Blocking, config: Arc<Config>, logging: Log, log: Logger) -> io::Result<MainLoop> {
        job::start_maker(blocking)?;
        let poll = Poll::new()?;
        let registry = poll.registry();
        let signals = SignalFd::with_flags(&signals(), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        registry.register(&mut SourceFd(&signals.as_raw_fd()), Token(token(SIGNALS, 0)), Interest::READABLE)?;
        let control = Control::bind(&config.control, registry.try_clone()?, token(CONTROL, 0), log.clone())?;
        let bind = |socket: &PathBuf| {
            metrics::http::Server::bind(socket, registry.try_clone()?, token(METRICS, 0), log.clone())
        };
        let metrics = config.metrics.socket.as_ref().map(bind).transpose()?;
        let &config::MainLoop { spin_us, poll_us, poll_idle_percent } = &config.main_loop;
        Ok(MainLoop {
            minors: Minors::new(config, registry.try_clone()?, MINORS, log.clone())?,
            poll,
            control,
            metrics,
            signals,
            after_answer: Spin::new(spin_us),
            after_submit: Spin::new(spin_us),
            polling: Polling::new(Settings { poll_us, poll_idle_percent }),
            logging,
            log,
        })
    }

    /// The disks that it serves.
    pub fn minors(&mut self) -> &mut Minors {
        &mut self.minors
    }

    /// Where the control socket is.
    pub fn control_path(&self) -> &Path {
        self.control.path()
    }

    /// Serves until the last minor is detached. An error is one of a last flush. From here on this thread waits for events only.
    pub fn run(mut self, _: Blocking) -> io::Result<()> {
        let mut events = Events::with_capacity(256);
        let mut turns = 0;
        let mut last = Turn::Nothing;
        loop {
            let turn = self.minors.turn();
            let worked = turn != Turn::Nothing;
            if worked {
                last = turn;
                self.polling.worked();
                self.control.settle(&mut self.minors);
            }
            if let Some(result) = self.minors.over() {
                return result.map_err(io::Error::from);
            }
            turns += 1;
            let sleep = if turns >= TURNS_MAX {
                false
            } else if worked {
                continue;
            } else {
                match self.look(last) {
                    Look::Found => continue,
                    Look::Again => false,
                    Look::Over => true,
                }
            };
            turns = 0;
            let slept = self.wait(&mut events, sleep)?;
            if sleep {
                match last {
                    Turn::Answered => self.after_answer.slept(slept),
                    Turn::Submitted => self.after_submit.slept(slept),
                    Turn::Worked | Turn::Nothing => {}
                }
            }
        }
    }

    /// The last turn found nothing: looks at memory, and if it still shows nothing, says whether to sleep.
    fn look(&mut self, last: Turn) -> Look {
        match self.polling.look(self.minors.last_in_memory(), || self.minors.ready()) {
            Look::Over if self.spin(last) || self.minors.arm() => Look::Found,
            look => look,
        }
    }

    /// Looks at memory for a while, if that may pay after such a turn. True: there is something.
    fn spin(&self, last: Turn) -> bool {
        match last {
            Turn::Answered => self.after_answer.run(|| self.minors.ready()),
            Turn::Submitted => self.after_submit.run(|| self.minors.ready()),
            Turn::Worked | Turn::Nothing => false,
        }
    }

    /// Waits for events if there are none, and handles them. Gives the time until they came, in ns. None: none came until it was time for
    /// something.
    fn wait(&mut self, events: &mut Events, sleep: bool) -> io::Result<Option<u64>> {
        let begin = now();
        let deadline = self.minors.deadline().into_iter().chain(self.control.deadline());
        let deadline = deadline.chain(self.metrics.as_ref().and_then(|metrics| metrics.deadline())).min();
        let timeout = match deadline {
            _ if !sleep => Some(Duration::ZERO),
            Some(deadline) => Some(Duration::from_nanos(deadline.saturating_sub(begin))),
            None => None,
        };
        match self.poll.poll(events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => other?,
        }
        let slept = (!events.is_empty()).then(|| now() - begin);
        for event in &*events {
            let (source, index) = (event.token().0 >> 32, event.token().0 & 0xffff_ffff);
            match source {
                SIGNALS => self.signal(),
                CONTROL => self.control.event(index, &mut self.minors, &mut self.polling),
                METRICS => {
                    let text = || exposition(&self.minors);
                    self.metrics.iter_mut().for_each(|metrics| metrics.event(index, text));
                }
                source => self.minors.event(source, index, event),
            }
        }
        // Who waits for a pause is told that there will be none, though the disk has nothing to do.
        self.control.settle(&mut self.minors);
        self.control.pass_time(&mut self.minors, &mut self.polling);
        self.metrics.iter_mut().for_each(|metrics| metrics.pass_time(|| exposition(&self.minors)));
        Ok(slept)
    }

    fn signal(&mut self) {
        // An error means that there is no signal, after all.
        while let Ok(Some(received)) = self.signals.read_signal() {
            match Signal::try_from(received.ssi_signo as i32) {
                Ok(Signal::SIGUSR1) => self.dump(),
                Ok(Signal::SIGHUP) => {
                    self.logging.reopen();
                    info!(self.log, "log reopened");
                }
                Ok(signal) if self.minors.is_ending() => {
                    warn!(self.log, "second signal: cancelling what still waits"; "signal" => %signal);
                    self.minors.cancel();
                }
                Ok(signal) => {
                    info!(self.log, "signal"; "signal" => %signal);
                    self.minors.end();
                }
                Err(_) => {}
            }
        }
    }

    /// Writes to the log what debug-queue shows of each disk.
    fn dump(&self) {
        for minor in self.minors.iter() {
            let Some(disk) = minor.disk() else { continue };
            match serde_json::to_string(&disk.inspect(&self.polling)) {
                Ok(dump) => {
                    info!(self.log, "debug-queue"; "minor" => minor.number(), "dump" => dump,
                        "log_dropped" => self.logging.dropped());
                }
                Err(error) => error!(self.log, "debug-queue"; "error" => %error),
            }
        }
    }
}

/// Bytes that a disk's part of the metrics takes at most while they are made.
const METRICS_OF_EACH: usize = 64 << 10;

/// The metrics of this process. An error: there is no memory for them.
fn exposition(minors: &Minors) -> io::Result<String> {
    memory::room(METRICS_OF_EACH * minors.iter().len().max(1))?;
    Ok(Exposition(&[ProcessMetrics::here(minors.iter().filter_map(Minor::with_disk))]).to_string())
}

/// Looking at memory for a while before sleeping, where events come so often that a sleep and a wake-up cost more.
struct Spin {
    /// The longest, ns.
    max: u64,
    /// For how long now, ns. Nothing is spent on a disk that is idle.
    window: u64,
}

impl Spin {
    /// What a window begins with, ns.
    const START: u64 = 4_000;

    fn new(max_us: u32) -> Spin {
        Spin { max: u64::from(max_us) * 1000, window: 0 }
    }

    /// True: there is something.
    fn run(&self, ready: impl Fn() -> bool) -> bool {
        self.window > 0 && watch(now() + self.window, ready)
    }

    /// A sleep took that long, in ns, until an event: would spinning have seen it? None: there was no event.
    fn slept(&mut self, took: Option<u64>) {
        if self.max == 0 {
            return;
        }
        if took.is_some_and(|took| took + self.window <= self.max) {
            self.window = (self.window * 2).clamp(Self::START, self.max);
        } else {
            self.window /= 2;
            if self.window < Self::START {
                self.window = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spinning_pays_where_events_come_soon_and_not_where_time_passes() {
        let mut spin = Spin::new(50);
        (0..9).for_each(|_| spin.slept(Some(10_000)));
        assert!(spin.window >= 20_000);
        (0..9).for_each(|_| spin.slept(None));
        assert_eq!(spin.window, 0, "memory shows no deadline");
        (0..9).for_each(|_| spin.slept(Some(60_000)));
        assert_eq!(spin.window, 0);
        let mut never = Spin::new(0);
        never.slept(Some(1));
        assert_eq!(never.window, 0);
    }
}
