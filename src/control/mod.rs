//! The control socket, `ctl<pid>` in the control directory: blktap's protocol, on the main loop.
//!
//! It never waits for the disk, so that it answers while the disk is stuck in I/O.

pub mod client;
mod engine;
mod pause;
pub mod proto;

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use mio::net::{UnixListener, UnixStream};
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use serde::Serialize;
use serde_json::json;
use slog::{Logger, info, warn};
use zerocopy::{FromBytes, IntoBytes};

use self::proto::{List, MESSAGE_SIZE, Message, NO_MINOR, Poll, Resized, Stat, kind, poll, state, string};
use crate::disk::Disk;
use crate::polling::Polling;
use crate::stats::now;

/// Connections at a time, as in blktap.
const CONNECTIONS_MAX: usize = 10;
/// How long a client may take, in ns.
const TIMEOUT: u64 = 10_000_000_000;

struct Connection {
    socket: UnixStream,
    request: [u8; MESSAGE_SIZE],
    received: usize,
    response: Vec<u8>,
    sent: usize,
    until: u64,
    /// The answer comes when the disk has done that.
    waits: Option<Late>,
}

/// What a disk does not do at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Late {
    /// It changes its engine.
    Engine,
    /// It is paused.
    Pause,
}

/// What a connection is at after it did what it could.
enum Progress {
    Waiting,
    Done,
}

/// The control socket.
pub struct Control {
    path: PathBuf,
    minor: u16,
    listener: UnixListener,
    registry: Registry,
    base: usize,
    connections: Vec<Option<Connection>>,
    log: Logger,
}

impl Control {
    /// Makes the directory and the socket. Tokens are `base` and up.
    pub fn bind(directory: &Path, minor: u16, registry: Registry, base: usize, log: Logger) -> io::Result<Control> {
        let path = directory.join(format!("ctl{}", std::process::id()));
        let explain = |error: io::Error| {
            let path = path.display();
            io::Error::new(
                error.kind(),
                format!("control socket {path}: {error}; control.directory says where it is"),
            )
        };
        std::fs::create_dir_all(directory).map_err(explain)?;
        // Only a process that had our id can have left it.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(explain(error)),
            _ => {}
        }
        let mut listener = UnixListener::bind(&path).map_err(explain)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(explain)?;
        registry.register(&mut listener, Token(base), Interest::READABLE)?;
        let connections = std::iter::repeat_with(|| None).take(CONNECTIONS_MAX).collect();
        Ok(Control { path, minor, listener, registry, base, connections, log })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An event for token `base + index`.
    pub fn event(&mut self, index: usize, disk: &mut Disk, polling: &mut Polling) {
        match index.checked_sub(1) {
            None => self.accept(disk, polling),
            Some(index) => self.advance(index, disk, polling),
        }
    }

    fn accept(&mut self, disk: &mut Disk, polling: &mut Polling) {
        loop {
            let mut socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {
                    continue;
                }
                Err(error) => return warn!(self.log, "cannot accept a control connection"; "error" => %error),
            };
            // One too many is closed at once: it can try again.
            let Some(index) = self.connections.iter().position(Option::is_none) else { continue };
            let token = Token(self.base + 1 + index);
            if let Err(error) = self.registry.register(&mut socket, token, Interest::READABLE | Interest::WRITABLE) {
                warn!(self.log, "cannot watch a control connection"; "error" => %error);
                continue;
            }
            let (request, response) = ([0; MESSAGE_SIZE], Vec::new());
            let until = now() + TIMEOUT;
            self.connections[index] =
                Some(Connection { socket, request, received: 0, response, sent: 0, until, waits: None });
            self.advance(index, disk, polling);
        }
    }

    fn advance(&mut self, index: usize, disk: &mut Disk, polling: &mut Polling) {
        let Some(Some(connection)) = self.connections.get_mut(index) else { return };
        let respond = |request: &Message| respond(request, self.minor, disk, polling, &self.log);
        match connection.advance(respond) {
            Ok(Progress::Waiting) => {}
            // A client that hung up early is its own affair.
            Ok(Progress::Done) | Err(_) => self.connections[index] = None,
        }
    }

    /// Answers whoever waits for the disk to do something, if it has.
    pub fn settle(&mut self, disk: &mut Disk) {
        for place in &mut self.connections {
            let Some(connection) = place else { continue };
            let response = match connection.waits {
                None => None,
                Some(Late::Engine) => disk.switched().map(|outcome| engine::switched(self.minor, disk, &outcome)),
                Some(Late::Pause) => disk.pause_outcome().map(|outcome| pause::paused(self.minor, disk, &outcome)),
            };
            let Some(response) = response else { continue };
            (connection.waits, connection.response) = (None, response);
            if !matches!(connection.advance(|_| Err(Late::Engine)), Ok(Progress::Waiting)) {
                *place = None;
            }
        }
    }

    /// When somebody's time is over.
    pub fn deadline(&self) -> Option<u64> {
        self.connections.iter().flatten().map(|connection| connection.until).min()
    }

    /// Lets go of those whose time is over.
    pub fn expire(&mut self) {
        let now = now();
        for connection in &mut self.connections {
            if connection.as_ref().is_some_and(|connection| connection.until <= now) {
                *connection = None;
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Nothing can be done about a file that is gone already.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Connection {
    /// Receives, answers and sends as far as the socket allows.
    fn advance(&mut self, respond: impl FnOnce(&Message) -> Result<Vec<u8>, Late>) -> io::Result<Progress> {
        while self.received < MESSAGE_SIZE {
            match self.socket.read(&mut self.request[self.received..]) {
                // It says no more: half a message gets an answer too.
                Ok(0) if self.received > 0 && self.response.is_empty() => {
                    let text = format!("a message has {MESSAGE_SIZE} bytes, not {}", self.received);
                    self.response = Message::error(NO_MINOR, Errno::EINVAL as i32, &text).as_bytes().to_vec();
                    self.received = MESSAGE_SIZE;
                }
                Ok(0) => return Ok(Progress::Done),
                Ok(n) => self.received += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Progress::Waiting),
                Err(error) => return Err(error),
            }
        }
        if self.waits.is_some() {
            return Ok(Progress::Waiting);
        }
        if self.response.is_empty() {
            let request = Message::read_from_bytes(&self.request).map_err(|_| ErrorKind::InvalidData)?;
            match respond(&request) {
                Ok(response) => self.response = response,
                Err(late) => {
                    self.waits = Some(late);
                    return Ok(Progress::Waiting);
                }
            }
        }
        while self.sent < self.response.len() {
            match self.socket.write(&self.response[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Progress::Waiting),
                Err(error) => return Err(error),
            }
        }
        Ok(Progress::Done)
    }
}

/// The whole answer to a request; or what it waits for.
pub fn respond(
    request: &Message,
    minor: u16,
    disk: &mut Disk,
    polling: &mut Polling,
    log: &Logger,
) -> Result<Vec<u8>, Late> {
    let cookie = request.cookie;
    let ours = cookie == minor;
    let no_disk = || Message::error(cookie, Errno::ENODEV as i32, "no such disk").as_bytes().to_vec();
    Ok(match request.kind {
        kind::ENGINE if ours => engine::change(request, disk).ok_or(Late::Engine)?,
        kind::PAUSE if ours => pause::pause(cookie, disk).ok_or(Late::Pause)?,
        kind::RESUME if ours => pause::resume(request, disk),
        kind::PID => {
            let pid = std::process::id() as i32;
            Message::new(kind::PID_RSP, cookie).with(&pid).as_bytes().to_vec()
        }
        kind::LIST => list(cookie, minor, disk),
        kind::STATS if ours => with_text(kind::STATS_RSP, cookie, &stats(disk).to_string()),
        kind::DEBUG_QUEUE if ours => with_json(kind::DEBUG_QUEUE_RSP, cookie, &disk.inspect(polling)),
        kind::COALESCE if ours => pause::coalesce(request, disk),
        kind::POLL if ours => set_polling(request, polling, log).as_bytes().to_vec(),
        kind::RESIZE if ours => resize(cookie, disk).as_bytes().to_vec(),
        kind::FAULT if ours => engine::faults(request, disk, log),
        kind::STATS
        | kind::DEBUG_QUEUE
        | kind::POLL
        | kind::RESIZE
        | kind::ENGINE
        | kind::FAULT
        | kind::PAUSE
        | kind::RESUME
        | kind::COALESCE => no_disk(),
        kind::EXIT => {
            info!(log, "told to exit by a control connection");
            disk.drain();
            Message::error(cookie, 0, "").as_bytes().to_vec()
        }
        other => {
            let text = format!("message type {other} is not known here");
            Message::error(cookie, Errno::EOPNOTSUPP as i32, &text).as_bytes().to_vec()
        }
    })
}

fn set_polling(request: &Message, polling: &mut Polling, log: &Logger) -> Message {
    let wanted: Poll = request.member();
    let given = |flag, value| (wanted.flags & flag != 0).then_some(value);
    let (us, percent) =
        (given(poll::SET_US, wanted.poll_us), given(poll::SET_IDLE_PERCENT, wanted.poll_idle_percent));
    let set = match wanted.flags & !(poll::SET_US | poll::SET_IDLE_PERCENT) {
        0 => polling.set(us, percent),
        unknown => Err(format!("flags {unknown:#x} are not known here")),
    };
    if let Err(text) = set {
        return Message::error(request.cookie, Errno::EINVAL as i32, &text);
    }
    let settings = polling.settings();
    if us.is_some() || percent.is_some() {
        info!(log, "polling set"; "poll_us" => settings.poll_us, "poll_idle_percent" => settings.poll_idle_percent);
    }
    let answer = Poll { poll_us: settings.poll_us, poll_idle_percent: settings.poll_idle_percent, flags: 0 };
    Message::new(kind::POLL_RSP, request.cookie).with(&answer)
}

fn resize(cookie: u16, disk: &mut Disk) -> Message {
    match disk.resize() {
        Ok((old, new)) => Message::new(kind::RESIZE_RSP, cookie).with(&Resized { old, new }),
        Err(error) => {
            let text = format!("{}: {error}", disk.info().name);
            Message::error(cookie, error.errno() as i32, &text)
        }
    }
}

fn list(cookie: u16, minor: u16, disk: &Disk) -> Vec<u8> {
    let state = match () {
        () if disk.is_paused() => state::PAUSED,
        () if disk.is_pausing() => state::PAUSE_REQUESTED,
        () if disk.is_draining() => state::QUIESCE_REQUESTED,
        () => 0,
    };
    let shown = List { count: 1, minor: minor.into(), state, path: string(&disk.info().name) };
    let end = List { count: 0, minor: -1, state: 0, path: [0; 256] };
    let wanted = cookie == NO_MINOR || cookie == minor;
    let messages = wanted.then_some(shown).into_iter().chain([end]);
    messages.flat_map(|list| Message::new(kind::LIST_RSP, cookie).with(&list).as_bytes().to_vec()).collect()
}

fn with_text(kind: u16, cookie: u16, text: &str) -> Vec<u8> {
    let mut bytes = Message::new(kind, cookie).with(&Stat::new(kind, cookie, text.len())).as_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn with_json(kind: u16, cookie: u16, shown: &impl Serialize) -> Vec<u8> {
    match serde_json::to_string(shown) {
        Ok(text) => with_text(kind, cookie, &text),
        Err(error) => Message::error(cookie, Errno::EIO as i32, &error.to_string()).as_bytes().to_vec(),
    }
}

/// STATS, in blktap's words.
fn stats(disk: &Disk) -> serde_json::Value {
    let sectors = disk.stats().sectors();
    let name = &disk.info().name;
    let (driver, path) = name.split_once(':').unwrap_or(("", name));
    let mut stats = json!({
        "name": name,
        "secs": sectors,
        "images": [{
            "name": path,
            "hits": sectors,
            "fail": disk.stats().failed(),
            "driver": { "type": 0, "name": driver, "status": null },
        }],
        "FIXME_enospc_redirect_count": 0,
        "nbd_mirror_failed": 0,
        "reqs_outstanding": disk.outstanding(),
        "read_caching": false,
        "memory": disk.budget(),
    });
    if let Some(xenbus) = disk.xenbus() {
        stats["xenbus"] = xenbus;
    }
    stats
}
