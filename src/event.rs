//! The main loop: one mio `Poll`, whose tokens name the source in their upper half and the source's own index in
//! their lower half.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use slog::{Logger, error, info, warn};

use crate::config;
use crate::control::Control;
use crate::disk::{Disk, Turn};
use crate::log::Log;
use crate::polling::{Look, Polling, Settings, watch};
use crate::stats::now;

const ENGINE: usize = 0;
const SIGNALS: usize = 1;
const CONTROL: usize = 2;
/// The first frontend.
const FRONTENDS: usize = 3;

const fn token(source: usize, index: usize) -> usize {
    source << 32 | index
}

/// Turns that may follow each other before the poll is asked: a busy ring must not shut out the control socket.
const TURNS_MAX: u32 = 64;

/// The signals that the loop handles. They must be blocked before the first thread starts.
pub fn signals() -> SigSet {
    SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGHUP])
}

/// The main loop of one disk.
pub struct MainLoop {
    poll: Poll,
    disk: Disk,
    control: Control,
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
    /// A loop for `disk`. `settings` are in range.
    pub fn new(
        mut disk: Disk,
        control: (&Path, u16),
        settings: &config::MainLoop,
        logging: Log,
        log: Logger,
    ) -> io::Result<MainLoop> {
        let poll = Poll::new()?;
        let registry = poll.registry();
        let signals = SignalFd::with_flags(&signals(), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let watch =
            |fd: i32, source| registry.register(&mut SourceFd(&fd), Token(token(source, 0)), Interest::READABLE);
        watch(signals.as_raw_fd(), SIGNALS)?;
        watch(disk.engine().submit.event().as_fd().as_raw_fd(), ENGINE)?;
        disk.register(registry, |i| token(FRONTENDS + i, 0))?;
        let control = Control::bind(control.0, control.1, registry.try_clone()?, token(CONTROL, 0), log.clone())?;
        let &config::MainLoop { spin_us, poll_us, poll_idle_percent } = settings;
        Ok(MainLoop {
            poll,
            disk,
            control,
            signals,
            after_answer: Spin::new(spin_us),
            after_submit: Spin::new(spin_us),
            polling: Polling::new(Settings { poll_us, poll_idle_percent }),
            logging,
            log,
        })
    }

    /// The disk that it serves.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Where the control socket is.
    pub fn control_path(&self) -> &Path {
        self.control.path()
    }

    /// Serves until the disk is drained. An error is one of the last flush.
    pub fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(256);
        let mut turns = 0;
        let mut last = Turn::Nothing;
        loop {
            let turn = self.disk.turn();
            let worked = turn != Turn::Nothing;
            if worked {
                last = turn;
                self.polling.worked();
                self.control.settle(&mut self.disk);
            }
            if let Some(result) = self.disk.closed() {
                return self.end(result.map_err(io::Error::from));
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
        match self.polling.look(self.disk.last_in_memory(), || self.disk.ready()) {
            Look::Over if self.spin(last) || self.disk.arm() => Look::Found,
            look => look,
        }
    }

    /// Looks at memory for a while, if that may pay after such a turn. True: there is something.
    fn spin(&self, last: Turn) -> bool {
        match last {
            Turn::Answered => self.after_answer.run(|| self.disk.ready()),
            Turn::Submitted => self.after_submit.run(|| self.disk.ready()),
            Turn::Worked | Turn::Nothing => false,
        }
    }

    /// Waits for events if there are none, and handles them. Gives the time it waited, in ns.
    fn wait(&mut self, events: &mut Events, sleep: bool) -> io::Result<u64> {
        let begin = now();
        let deadline = self.disk.deadline().into_iter().chain(self.control.deadline()).min();
        let timeout = match deadline {
            _ if !sleep => Some(Duration::ZERO),
            Some(deadline) => Some(Duration::from_nanos(deadline.saturating_sub(begin))),
            None => None,
        };
        match self.poll.poll(events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => other?,
        }
        let slept = now() - begin;
        for event in &*events {
            let (source, index) = (event.token().0 >> 32, event.token().0 & 0xffff_ffff);
            match source {
                // Its next turn reaps.
                ENGINE => {}
                SIGNALS => self.signal(),
                CONTROL => self.control.event(index, &mut self.disk, &mut self.polling),
                frontend => self.disk.event(frontend - FRONTENDS, index, event),
            }
        }
        // Who waits for a pause is told that there will be none, though the disk has nothing to do.
        self.control.settle(&mut self.disk);
        self.control.expire();
        Ok(slept)
    }

    fn signal(&mut self) {
        // An error means that there is no signal, after all.
        while let Ok(Some(received)) = self.signals.read_signal() {
            match Signal::try_from(received.ssi_signo as i32) {
                Ok(Signal::SIGUSR1) => match serde_json::to_string(&self.disk.inspect(&self.polling)) {
                    Ok(dump) => {
                        info!(self.log, "debug-queue"; "dump" => dump, "log_dropped" => self.logging.dropped());
                    }
                    Err(error) => error!(self.log, "debug-queue"; "error" => %error),
                },
                Ok(Signal::SIGHUP) => {
                    self.logging.reopen();
                    info!(self.log, "log reopened");
                }
                Ok(signal) if self.disk.is_draining() => {
                    warn!(self.log, "second signal: cancelling what still waits"; "signal" => %signal);
                    self.disk.cancel();
                }
                Ok(signal) => {
                    info!(self.log, "signal"; "signal" => %signal);
                    self.disk.drain();
                }
                Err(_) => {}
            }
        }
    }

    fn end(self, result: io::Result<()>) -> io::Result<()> {
        match &result {
            Ok(()) => info!(self.log, "drained and flushed; the end"),
            Err(error) => error!(self.log, "drained, but the last flush failed"; "error" => %error),
        }
        // The disk, and with it the engine, goes before the log.
        drop((self.control, self.disk));
        result
    }
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

    /// A sleep took that long, in ns: would spinning have seen its end?
    fn slept(&mut self, took: u64) {
        if self.max == 0 {
            return;
        }
        if took + self.window <= self.max {
            self.window = (self.window * 2).clamp(Self::START, self.max);
        } else {
            self.window /= 2;
            if self.window < Self::START {
                self.window = 0;
            }
        }
    }
}
