//! The other side of the control socket: for tap-ctl.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::proto::{
    Coalesce, EngineChange, FaultChange, List, MESSAGE_SIZE, Message, NO_MINOR, Params, Poll, Resized, Response,
    Stat, kind, poll, text,
};
use crate::polling::Settings;

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

/// Why one of our own messages is refused.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Refused {
    /// A positive errno.
    pub errno: i32,
    /// The tapdisk's words.
    pub text: String,
}

fn send(socket: &Path, request: &Message) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(request.as_bytes())?;
    Ok(stream)
}

fn ask(socket: &Path, request: &Message) -> io::Result<(UnixStream, Message)> {
    let mut stream = send(socket, request)?;
    let answer = receive(&mut stream)?;
    Ok((stream, answer))
}

/// Asks what is ours; an error is [`Refused`] within. The answer's type is the request's plus one.
fn ask_ours(socket: &Path, request: &Message) -> io::Result<Message> {
    ask_ours_for_more(socket, request).map(|(_, answer)| answer)
}

/// The same, for an answer that is followed by more.
fn ask_ours_for_more(socket: &Path, request: &Message) -> io::Result<(UnixStream, Message)> {
    let mut stream = send(socket, request)?;
    let answer = receive_any(&mut stream)?;
    if answer.kind == kind::ERROR {
        let response: Response = answer.member();
        let text = text(&response.message).unwrap_or("refused").to_owned();
        return Err(io::Error::other(Refused { errno: response.error, text }));
    }
    expect(&answer, request.kind + 1).map(|()| (stream, answer))
}

fn receive_any(stream: &mut UnixStream) -> io::Result<Message> {
    let mut bytes = [0; MESSAGE_SIZE];
    stream.read_exact(&mut bytes)?;
    Ok(Message::read_from_bytes(&bytes).map_err(|_| ErrorKind::InvalidData)?)
}

fn receive(stream: &mut UnixStream) -> io::Result<Message> {
    let message = receive_any(stream)?;
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
    receive_text(stream, &message)
}

fn receive_text(stream: UnixStream, message: &Message) -> io::Result<String> {
    let stat: Stat = message.member();
    if stat.length > TEXT_MAX {
        return Err(Errno::EPROTO.into());
    }
    let mut answer = String::new();
    stream.take(stat.length).read_to_string(&mut answer)?;
    if answer.len() as u64 == stat.length { Ok(answer) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

/// Changes a disk's engine, or only asks for it: the JSON of [`EngineReport`](crate::disk::EngineReport).
pub fn engine(directory: &Path, pid: i32, minor: u16, change: &EngineChange) -> io::Result<String> {
    let request = Message::new(kind::ENGINE, minor).with(change);
    let (stream, answer) = ask_ours_for_more(&path(directory, pid), &request)?;
    receive_text(stream, &answer)
}

/// Steers a disk's faults, [`fault`](super::proto::fault) bits: the JSON of
/// [`FaultsReport`](crate::engine::fault::FaultsReport).
pub fn faults(directory: &Path, pid: i32, minor: u16, flags: u32) -> io::Result<String> {
    let request = Message::new(kind::FAULT, minor).with(&FaultChange { flags });
    let (stream, answer) = ask_ours_for_more(&path(directory, pid), &request)?;
    receive_text(stream, &answer)
}

/// Sets what is given of a main loop's polling, and gives what is in force then.
pub fn poll(
    directory: &Path,
    pid: i32,
    minor: u16,
    poll_us: Option<u32>,
    poll_idle_percent: Option<u32>,
) -> io::Result<Settings> {
    let flag = |flag, value: Option<u32>| if value.is_some() { flag } else { 0 };
    let wanted = Poll {
        poll_us: poll_us.unwrap_or(0),
        poll_idle_percent: poll_idle_percent.unwrap_or(0),
        flags: flag(poll::SET_US, poll_us) | flag(poll::SET_IDLE_PERCENT, poll_idle_percent),
    };
    let answer = ask_ours(&path(directory, pid), &Message::new(kind::POLL, minor).with(&wanted))?;
    let Poll { poll_us, poll_idle_percent, .. } = answer.member();
    Ok(Settings { poll_us, poll_idle_percent })
}

/// Has a disk look whether its file has grown, and gives its size in bytes before and now.
pub fn resize(directory: &Path, pid: i32, minor: u16) -> io::Result<(u64, u64)> {
    let answer = ask_ours(&path(directory, pid), &Message::new(kind::RESIZE, minor))?;
    let Resized { old, new } = answer.member();
    Ok((old, new))
}

/// Pauses a disk, and waits until it is: nothing is under way, and its image is closed.
pub fn pause(directory: &Path, pid: i32, minor: u16) -> io::Result<()> {
    ask_ours(&path(directory, pid), &Message::new(kind::PAUSE, minor)).map(drop)
}

/// Lets a paused disk go on, with another image if one is named, as `type:path`.
pub fn resume(directory: &Path, pid: i32, minor: u16, image: Option<&str>) -> io::Result<()> {
    let params = Params::with_path(image.unwrap_or_default());
    let request = Message::new(kind::RESUME, minor).with(&params.ok_or(Errno::ENAMETOOLONG)?);
    ask_ours(&path(directory, pid), &request).map(drop)
}

/// Merges an image of a disk's chain into its parent, [`coalesce`](super::proto::coalesce) bits, at most `rate` bytes a second; an
/// empty path means the image below the leaf. Gives the JSON of [`CoalesceReport`](crate::disk::CoalesceReport).
pub fn coalesce(directory: &Path, pid: i32, minor: u16, flags: u32, rate: u64, image: &str) -> io::Result<String> {
    let wanted = Coalesce::new(flags, rate, image).ok_or(Errno::ENAMETOOLONG)?;
    let request = Message::new(kind::COALESCE, minor).with(&wanted);
    let (stream, answer) = ask_ours_for_more(&path(directory, pid), &request)?;
    receive_text(stream, &answer)
}

/// Tells a process to drain, flush and exit.
pub fn exit(directory: &Path, pid: i32) -> io::Result<()> {
    ask(&path(directory, pid), &Message::new(kind::EXIT, NO_MINOR)).map(drop)
}
