//! The background: the process that was started ends with exit code 0 as soon as the disk is served, and another one goes on.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use nix::syslog::{Severity, syslog};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, pipe, setsid};

use crate::sys::process::fork;
use crate::text::one_line;

/// A panic of any thread ends the process, by SIGABRT: whoever waits for that thread would wait for ever. What it was goes to standard error, and
/// to the system's log, since nobody reads the former in the background.
pub fn end_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        // Nothing can be done where not even that is possible.
        let _ = syslog(Severity::LOG_CRIT, &*one_line(&panic.to_string()));
        std::process::abort();
    }));
}

/// The process in the background, before it serves.
pub struct Daemon {
    /// To the process that was started, which waits.
    starter: File,
}

impl Daemon {
    /// Gives the process in the background, and in the one that was started the exit code to end with, once that is known. Where
    /// another thread runs already, that is an error.
    pub fn start() -> io::Result<Result<Daemon, u8>> {
        let (reader, writer): (OwnedFd, OwnedFd) = pipe()?;
        if fork()?.is_none() {
            drop(reader);
            setsid()?;
            return Ok(Ok(Daemon { starter: writer.into() }));
        }
        drop(writer);
        let mut code = [0];
        // It has said why on standard error if it ended without a word here.
        let said = File::from(reader).read(&mut code)?;
        Ok(Err(if said == 1 { code[0] } else { 1 }))
    }

    /// It does not serve.
    pub fn failed(mut self, code: u8) {
        // Without it the exit code is 1.
        let _ = self.starter.write_all(&[code]);
    }

    /// It serves: lets go of what it has of whoever started it, who may wait for the end of its output.
    pub fn serves(mut self) -> io::Result<()> {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        self.starter.write_all(&[0])
    }
}
