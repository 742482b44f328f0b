//! The other side of the control socket: for tap-ctl.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::proto::{List, MESSAGE_SIZE, Message, NO_MINOR, Response, Stat, kind, text};

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// More than any answer has, in bytes.
const TEXT_MAX: u64 = 256 << 20;

/// A tapdisk's disk, as LIST tells of it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Listed {
    /// Its process.
    pub pid: i32,
    /// Its number.
    pub minor: i32,
    /// State bits, see [`state`](super::proto::state).
    pub state: i32,
    /// `type:path`.
    pub name: String,
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

fn ask(socket: &Path, request: &Message) -> io::Result<(UnixStream, Message)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(request.as_bytes())?;
    let answer = receive(&mut stream)?;
    Ok((stream, answer))
}

fn receive(stream: &mut UnixStream) -> io::Result<Message> {
    let mut bytes = [0; MESSAGE_SIZE];
    stream.read_exact(&mut bytes)?;
    let message = Message::read_from_bytes(&bytes).map_err(|_| ErrorKind::InvalidData)?;
    if message.kind == kind::ERROR {
        let response: Response = message.member();
        if response.error != 0 {
            return Err(io::Error::from_raw_os_error(response.error));
        }
    }
    Ok(message)
}

fn expect(message: &Message, wanted: u16) -> io::Result<()> {
    if message.kind == wanted { Ok(()) } else { Err(Errno::EPROTO.into()) }
}

/// The disks of a process.
pub fn list(directory: &Path, pid: i32) -> io::Result<Vec<Listed>> {
    let (mut stream, mut message) = ask(&path(directory, pid), &Message::new(kind::LIST, NO_MINOR))?;
    let mut disks = Vec::new();
    loop {
        expect(&message, kind::LIST_RSP)?;
        let list: List = message.member();
        if list.count <= 0 {
            return Ok(disks);
        }
        let name = text(&list.path).ok_or(Errno::EPROTO)?.to_owned();
        disks.push(Listed { pid, minor: list.minor, state: list.state, name });
        message = receive(&mut stream)?;
    }
}

/// The text that answers STATS or DEBUG_QUEUE.
pub fn text_of(directory: &Path, pid: i32, minor: u16, request: u16) -> io::Result<String> {
    let (stream, message) = ask(&path(directory, pid), &Message::new(request, minor))?;
    expect(&message, request + 1)?;
    let stat: Stat = message.member();
    if stat.length > TEXT_MAX {
        return Err(Errno::EPROTO.into());
    }
    let mut answer = String::new();
    stream.take(stat.length).read_to_string(&mut answer)?;
    if answer.len() as u64 == stat.length { Ok(answer) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

/// Tells a process to drain, flush and exit.
pub fn exit(directory: &Path, pid: i32) -> io::Result<()> {
    ask(&path(directory, pid), &Message::new(kind::EXIT, NO_MINOR)).map(drop)
}
