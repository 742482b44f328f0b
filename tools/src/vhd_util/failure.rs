//! Why a command failed: what is printed, and the exit code.

use std::io::{self, Write};
use std::path::Path;

use drivers::vhd::ReadError;
use drivers::vhd::layout::LayoutError;
use nix::errno::Errno;
use tapdisk::sys::errno_of;
use tapdisk::text::one_line;
use tapdisk::vhd::merge;
use tapdisk::{chain, store};

/// Why a command failed.
#[derive(Debug)]
pub(super) struct Failure {
    /// The exit code.
    pub(super) errno: Errno,
    /// What storage managers know, on standard output; they look for it in some cases.
    pub(super) line: Option<String>,
    /// For people, on standard error: what, why, and what to do.
    pub(super) text: String,
}

/// What commands give.
pub(super) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// Something about a file.
    pub(super) fn new(errno: Errno, path: &Path, text: impl std::fmt::Display) -> Failure {
        Failure { errno, line: None, text: format!("{}: {text}", path.display()) }
    }

    /// The system said no to what `action` says.
    pub(super) fn io<'a>(path: &'a Path, action: &'a str) -> impl Fn(io::Error) -> Failure + 'a {
        move |error| Failure::new(errno_of(&error), path, format!("cannot {action}: {error}"))
    }

    /// What is written on standard output, where not even that is possible.
    pub(super) fn output(error: io::Error) -> Failure {
        // Whoever read our output has enough of it.
        let enough = error.kind() == io::ErrorKind::BrokenPipe;
        let text = if enough { String::new() } else { format!("standard output: {error}") };
        Failure { errno: if enough { Errno::UnknownErrno } else { errno_of(&error) }, line: None, text }
    }

    /// The same with a line on standard output.
    pub(super) fn saying(self, line: impl FnOnce(i32) -> String) -> Failure {
        Failure { line: Some(line(-(self.errno as i32))), ..self }
    }
}

/// Prints a line, of which nothing that an image or a path brings makes two.
pub(super) fn print_line(out: &mut dyn Write, line: &str) -> Result<()> {
    writeln!(out, "{}", one_line(line)).map_err(Failure::output)
}

impl From<chain::Error> for Failure {
    fn from(error: chain::Error) -> Failure {
        let errno = error.errno();
        Failure { errno, line: None, text: error.to_string() }
    }
}

impl From<merge::Error> for Failure {
    fn from(error: merge::Error) -> Failure {
        match error {
            merge::Error::Chain(error) => error.into(),
            merge::Error::Store(error) => error.into(),
            other => Failure { errno: other.errno(), line: None, text: other.to_string() },
        }
    }
}

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Failure {
        let remedy = if matches!(error, store::Error::Locked { .. }) { ": stop it first" } else { "" };
        let errno = error.errno();
        Failure { errno, line: None, text: format!("{error}{remedy}") }
    }
}

/// Of a layout for the image at a path.
pub(super) fn layout(path: &Path) -> impl Fn(LayoutError) -> Failure + '_ {
    |error| {
        let errno = match &error {
            LayoutError::Name { .. } => Errno::ENAMETOOLONG,
            LayoutError::Size { .. } | LayoutError::Room { .. } => Errno::EFBIG,
            LayoutError::Empty => Errno::EINVAL,
        };
        Failure::new(errno, path, error)
    }
}

/// Of metadata that was read from the image at a path.
pub(super) fn read(path: &Path) -> impl Fn(ReadError) -> Failure + '_ {
    |source| chain::Error::Image { path: path.to_owned(), source }.into()
}
