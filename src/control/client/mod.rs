//! The other side of the control socket: for tap-ctl, and for tests that play tapback.
//!
//! An error of these functions is a [`Refused`] within: its errno, and words for people. [`errno`] gives the former.

mod disk;
mod ours;

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket, sockopt};
use zerocopy::{FromBytes, IntoBytes};

use super::proto::{MESSAGE_SIZE, Message, NO_MINOR, Response, Stat, kind, text};
use crate::sys;
use crate::sys::process::Process;
use crate::text::one_line;

pub use disk::*;
pub use ours::*;

/// How long an answer may take, where nothing else is said.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// More than any answer has, in bytes.
pub const TEXT_MAX: u64 = 64 << 20;

/// Why something is refused, or not done.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Refused {
    /// A positive errno; or the exit code of a tapdisk that did not start, which need not be one.
    pub errno: i32,
    /// The tapdisk's words, or ours where it says nothing.
    pub text: String,
}

/// An error with an errno and words.
pub fn refused(errno: Errno, text: String) -> io::Error {
    io::Error::other(Refused { errno: errno as i32, text })
}

/// The errno of an error, whoever it comes from.
pub fn errno(error: &io::Error) -> Errno {
    let refused = error.get_ref().and_then(|error| error.downcast_ref::<Refused>());
    let raw = refused.map(|refused| refused.errno).or(error.raw_os_error());
    match (raw, error.kind()) {
        (Some(raw), _) => sys::errno(raw),
        (None, ErrorKind::NotFound) => Errno::ENOENT,
        (None, ErrorKind::InvalidInput) => Errno::EINVAL,
        (None, ErrorKind::PermissionDenied) => Errno::EACCES,
        (None, ErrorKind::AddrInUse) => Errno::EADDRINUSE,
        (None, ErrorKind::AlreadyExists) => Errno::EEXIST,
        (None, ErrorKind::StorageFull) => Errno::ENOSPC,
        (None, ErrorKind::ReadOnlyFilesystem) => Errno::EROFS,
        (None, ErrorKind::InvalidData | ErrorKind::UnexpectedEof) => Errno::EPROTO,
        _ => Errno::EIO,
    }
}

/// Whether an error says that there is no such process, or that it is no tapdisk any more.
pub fn is_gone(error: &io::Error) -> bool {
    matches!(errno(error), Errno::ENOENT | Errno::ECONNREFUSED)
}

/// The process ids that have a control socket in `directory`, in order.
pub fn pids(directory: &Path) -> io::Result<Vec<i32>> {
    let mut pids: Vec<i32> = std::fs::read_dir(directory)?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("ctl")?.parse().ok())
        .collect();
    pids.sort_unstable();
    Ok(pids)
}

/// The control socket of a process.
pub fn path(directory: &Path, pid: i32) -> PathBuf {
    directory.join(format!("ctl{pid}"))
}

/// A connection that has sent its request.
struct Connection {
    stream: UnixStream,
    path: PathBuf,
}

impl Connection {
    /// Connects, and sends a message and what follows it. Each step, and each part of the answer, may take `limit`; None: as long as
    /// it takes.
    fn send(path: PathBuf, request: &Message, more: &[u8], limit: Option<Duration>) -> io::Result<Connection> {
        let stream = open_stream(&path, limit).map_err(|errno| match errno {
            Errno::ENOENT | Errno::ECONNREFUSED => {
                refused(errno, format!("{}: no tapdisk has this process id", path.display()))
            }
            Errno::EAGAIN => refused(Errno::ETIMEDOUT, format!("{}: it lets nobody in", path.display())),
            errno => refused(errno, format!("{}: {}", path.display(), errno.desc())),
        })?;
        let mut connection = Connection { stream, path };
        connection.stream.set_read_timeout(limit)?;
        let bytes = [request.as_bytes(), more].concat();
        connection.stream.write_all(&bytes).map_err(|error| connection.explain(&error))?;
        Ok(connection)
    }

    /// Receives a message of a type. One that refuses is an error.
    fn expect(&mut self, wanted: u16) -> io::Result<Message> {
        let mut bytes = [0; MESSAGE_SIZE];
        self.stream.read_exact(&mut bytes).map_err(|error| self.explain(&error))?;
        message(&bytes, wanted)
    }

    /// The same where the answer only says that it is done, or with some tapdisks, blktap's, that it is not.
    fn done(&mut self, wanted: u16) -> io::Result<()> {
        check(&self.expect(wanted)?)
    }

    /// The text that a message has announced.
    fn text(self, message: &Message) -> io::Result<String> {
        let stat: Stat = message.member();
        if stat.length > TEXT_MAX {
            return Err(Errno::EPROTO.into());
        }
        // It takes memory for what comes, not for what is announced.
        let mut bytes = Vec::new();
        (&self.stream).take(stat.length).read_to_end(&mut bytes).map_err(|error| self.explain(&error))?;
        if bytes.len() as u64 != stat.length {
            return Err(self.explain(&ErrorKind::UnexpectedEof.into()));
        }
        String::from_utf8(bytes).map_err(|_| Errno::EPROTO.into())
    }

    /// What a failed read or write means here. EIO is what blktap has for a connection that breaks off.
    fn explain(&self, error: &io::Error) -> io::Error {
        let path = self.path.display();
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                refused(Errno::ETIMEDOUT, format!("{path}: no answer; what was asked for may still be done"))
            }
            ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                let text = format!("{path}: the tapdisk hung up before it answered");
                io::Error::new(ErrorKind::ConnectionReset, Refused { errno: Errno::EIO as i32, text })
            }
            _ => refused(errno(error), format!("{path}: {error}")),
        }
    }
}

/// A message of a type. One that refuses is an error.
pub fn message(bytes: &[u8; MESSAGE_SIZE], wanted: u16) -> io::Result<Message> {
    let message = Message::read_from_bytes(bytes).map_err(|_| ErrorKind::InvalidData)?;
    if message.kind == kind::ERROR {
        check(&message)?;
    }
    if message.kind != wanted {
        return Err(refused(Errno::EPROTO, format!("an answer of type {}, not {wanted}", message.kind)));
    }
    Ok(message)
}

/// Whether a message says that something is done; otherwise why not.
fn check(message: &Message) -> io::Result<()> {
    let Response { error, message } = message.member();
    if error == 0 {
        return Ok(());
    }
    let words = text(&message).filter(|words| !words.is_empty());
    let errno = sys::errno(error);
    Err(refused(errno, words.map_or_else(|| errno.desc().to_owned(), |words| one_line(words).into_owned())))
}

/// The standard library's connect() has no limit, and waits where a stopped tapdisk has many connections to take already.
fn open_stream(path: &Path, limit: Option<Duration>) -> Result<UnixStream, Errno> {
    let stream = UnixStream::from(socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?);
    stream.set_write_timeout(limit).map_err(|_| Errno::EINVAL)?;
    connect(stream.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(stream)
}

/// Sends a signal to the tapdisk that listens at the control socket of that process id, and to no other process that has the id by now.
/// ECONNREFUSED, ENOENT: nobody listens there.
pub fn signal(directory: &Path, pid: i32, signal: Signal) -> io::Result<()> {
    // In this order: whoever listens now had the id when the process was opened, and so it is that process.
    let process = Process::open(pid)?;
    let stream = open_stream(&path(directory, pid), Some(TIMEOUT))?;
    match getsockopt(&stream, sockopt::PeerCredentials)?.pid() {
        peer if peer == pid => process.signal(signal),
        peer => Err(refused(Errno::EPERM, format!("process {peer} listens there, and not {pid}"))),
    }
}

/// Sends a request, and gives its answer, whose type is the request's plus one.
fn ask(directory: &Path, pid: i32, request: &Message, limit: Option<Duration>) -> io::Result<(Connection, Message)> {
    let mut connection = Connection::send(path(directory, pid), request, &[], limit)?;
    let answer = connection.expect(request.kind + 1)?;
    Ok((connection, answer))
}

/// Asks for something that is done or not.
fn tell(directory: &Path, pid: i32, request: &Message, limit: Option<Duration>) -> io::Result<()> {
    Connection::send(path(directory, pid), request, &[], limit)?.done(request.kind + 1)
}

/// Asks for text.
fn ask_for_text(directory: &Path, pid: i32, request: &Message) -> io::Result<String> {
    let (connection, answer) = ask(directory, pid, request, Some(TIMEOUT))?;
    connection.text(&answer)
}

/// The text that answers STATS, DEBUG_QUEUE or another that is answered like them.
pub fn text_of(directory: &Path, pid: i32, minor: u16, request: u16) -> io::Result<String> {
    ask_for_text(directory, pid, &Message::new(request, minor))
}

/// Tells a process to drain, flush and exit.
pub fn exit(directory: &Path, pid: i32) -> io::Result<()> {
    let request = Message::new(kind::EXIT, NO_MINOR);
    // It says that there was no error.
    Connection::send(path(directory, pid), &request, &[], Some(TIMEOUT))?.expect(kind::ERROR).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_error_has_the_errno_of_success() {
        // Linux has numbers of its own, such as 524; and who answers may have any.
        for number in [0, -5, 200, 524, i32::MIN] {
            assert_eq!(errno(&io::Error::from_raw_os_error(number)), Errno::EIO, "{number}");
        }
        assert_eq!(errno(&io::Error::from_raw_os_error(libc::ENOMEDIUM)), Errno::ENOMEDIUM);
        for number in [-5, 200, 524] {
            assert_eq!(errno(&check(&Message::error(0, number, "why")).unwrap_err()), Errno::EIO, "{number}");
        }
    }
}
