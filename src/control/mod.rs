//! The control socket, `ctl<pid>` in the control directory: blktap's protocol, on the main loop.
//!
//! It never waits for a disk, so that it answers while one is stuck in I/O; nor for a client. Who may connect is root, who runs the
//! tapdisk, and a group, if one is configured.

mod answer;
mod blkif;
pub mod client;
mod engine;
pub mod following;
mod life;
mod pause;
mod peer;
pub mod proto;

use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use mio::net::UnixStream;
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use nix::unistd::{Gid, Group};
use slog::{Logger, warn};
use zerocopy::{FromBytes, IntoBytes};

use self::answer::without_room;
pub use self::answer::{Late, respond};
pub use self::following::Request;
pub use self::peer::Peer;
use self::proto::{MESSAGE_SIZE, Message, NO_MINOR, PATH_SIZE};
use crate::config;
use crate::listen::UnixSocket;
use crate::log::Limiter;
use crate::minors::Minors;
use crate::polling::Polling;
use crate::stats::now;

/// Connections at a time. One more takes the place of the one that is missed least.
const CONNECTIONS_MAX: usize = 64;
/// How long a client may take to say what it wants, and to take the answer, in ns.
const TIMEOUT: u64 = 10_000_000_000;

/// Bytes of a message and what follows it, at most.
const REQUEST_SIZE: usize = MESSAGE_SIZE + PATH_SIZE;
/// Bytes that a client may send although it is answered: more than may follow a message that is refused.
const LINGERING_MAX: usize = 1024;

/// What a connection does; whoever comes first is let go first, if there are too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It is answered, and what it may still send, in so many bytes, is of no account.
    Lingering(usize),
    /// It has not said all of what it wants.
    Receiving,
    /// It has not taken all of the answer.
    Sending,
    /// The answer comes when a disk has done that.
    Waiting(Late),
}

impl Stage {
    fn rank(self) -> u8 {
        match self {
            Stage::Lingering(_) => 0,
            Stage::Receiving => 1,
            Stage::Sending => 2,
            Stage::Waiting(_) => 3,
        }
    }
}

struct Connection {
    socket: UnixStream,
    /// None: nobody who may say something.
    peer: Option<Peer>,
    stage: Stage,
    /// A message, what follows it, and a byte that shows that there is more.
    request: [u8; REQUEST_SIZE + 1],
    received: usize,
    response: Vec<u8>,
    sent: usize,
    /// When its time is over. None: a disk has it.
    until: Option<u64>,
}

/// The control socket.
pub struct Control {
    socket: UnixSocket,
    /// Whose members may connect too.
    group: Option<Gid>,
    /// Where the images are that they may name.
    folders: Vec<PathBuf>,
    registry: Registry,
    base: usize,
    connections: Vec<Option<Box<Connection>>>,
    /// Some may wait for a disk.
    waiting: bool,
    /// For those who are refused.
    limiter: Limiter,
    log: Logger,
}

impl Control {
    /// Makes the directory and the socket. Tokens are `base` and up.
    pub fn bind(config: &config::Control, registry: Registry, base: usize, log: Logger) -> io::Result<Control> {
        let path = client::path(&config.directory, std::process::id() as i32);
        let explain = |error: io::Error| {
            let path = path.display();
            io::Error::new(
                error.kind(),
                format!("control socket {path}: {error}; control.directory says where it is"),
            )
        };
        let group = config.group.as_deref().map(find_group).transpose()?;
        std::fs::create_dir_all(&config.directory).map_err(explain)?;
        let mut socket = UnixSocket::bind_for(&path, group).map_err(explain)?;
        registry.register(socket.source(), Token(base), Interest::READABLE)?;
        let connections = std::iter::repeat_with(|| None).take(CONNECTIONS_MAX).collect();
        let (folders, limiter) = (config.folders.clone(), Limiter::default());
        Ok(Control { socket, group, folders, registry, base, connections, waiting: false, limiter, log })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        self.socket.path()
    }

    /// An event for token `base + index`.
    pub fn event(&mut self, index: usize, minors: &mut Minors, polling: &mut Polling) {
        match index.checked_sub(1) {
            None => self.accept(minors, polling),
            Some(index) => self.advance(index, minors, polling),
        }
    }

    fn accept(&mut self, minors: &mut Minors, polling: &mut Polling) {
        for mut socket in self.socket.accept_some(&self.log) {
            let index = self.place();
            let token = Token(self.base + 1 + index);
            if let Err(error) = self.registry.register(&mut socket, token, Interest::READABLE | Interest::WRITABLE) {
                if let Some(suppressed) = self.limiter.allow(now()) {
                    warn!(self.log, "cannot watch a control connection"; "error" => %error, "suppressed_before" => suppressed);
                }
                continue;
            }
            // SO_PEERCRED, unix(7): the file's mode is not all that there is.
            let peer = Peer::of(&socket, self.group, &self.folders);
            let mut connection = Connection::new(socket, peer);
            if connection.peer.is_none() {
                if let Some(suppressed) = self.limiter.allow(now()) {
                    warn!(self.log, "a client may not use the control socket"; "suppressed_before" => suppressed);
                }
                let text = "only root may use this socket, and the group that control.group names";
                let refusal = Message::error(NO_MINOR, Errno::EACCES as i32, text);
                connection.answer(refusal.as_bytes().to_vec());
            }
            self.connections[index] = Some(Box::new(connection));
            self.advance(index, minors, polling);
        }
    }

    /// A place for a connection.
    fn place(&mut self) -> usize {
        let free = self.connections.iter().position(Option::is_none);
        let order = |place: &Option<Box<Connection>>| place.as_ref().map(|place| (place.stage.rank(), place.until));
        let missed_least = || (0..CONNECTIONS_MAX).min_by_key(|&index| order(&self.connections[index]));
        free.or_else(missed_least).unwrap_or(0)
    }

    fn advance(&mut self, index: usize, minors: &mut Minors, polling: &mut Polling) {
        let Some(Some(connection)) = self.connections.get_mut(index) else { return };
        let (log, limiter) = (&self.log, &mut self.limiter);
        let goes_on = connection.advance(|request, peer| {
            if let Some(refusal) = without_room(request.message, minors, limiter, log) {
                return Ok(refusal);
            }
            if let (Err(error), Peer::Member(member)) = (peer.check(request.message), peer)
                && let Some(suppressed) = limiter.allow(now())
            {
                warn!(log, "a member of control.group may not ask for that"; "uid" => member.credentials.uid,
                    "error" => %error, "suppressed_before" => suppressed);
            }
            respond(request, peer, minors, polling, log)
        });
        self.waiting |= matches!(connection.stage, Stage::Waiting(_));
        if !goes_on {
            self.connections[index] = None;
        }
    }

    /// Answers whoever waits for a disk to do something, if it has.
    pub fn settle(&mut self, minors: &mut Minors) {
        if !std::mem::take(&mut self.waiting) {
            return;
        }
        for place in &mut self.connections {
            let Some(connection) = place else { continue };
            let Stage::Waiting(late) = connection.stage else { continue };
            let Some(response) = late.answer(minors) else {
                self.waiting = true;
                continue;
            };
            connection.answer(response);
            if !connection.advance(|_, _| Err(late)) {
                *place = None;
            }
        }
    }

    /// When somebody's time is over, or somebody may want in.
    pub fn deadline(&self) -> Option<u64> {
        self.connections.iter().flatten().filter_map(|connection| connection.until).chain(self.socket.due()).min()
    }

    /// Lets in those who wait for that, and lets go of those whose time is over.
    pub fn pass_time(&mut self, minors: &mut Minors, polling: &mut Polling) {
        let now = now();
        if self.socket.due().is_some_and(|due| due <= now) {
            self.accept(minors, polling);
        }
        for connection in &mut self.connections {
            if connection.as_ref().and_then(|connection| connection.until).is_some_and(|until| until <= now) {
                *connection = None;
            }
        }
    }
}

fn find_group(name: &str) -> io::Result<Gid> {
    let wrong = |text: String| io::Error::new(ErrorKind::InvalidInput, format!("control.group: {text}"));
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) => Err(wrong(format!("there is no group {name:?}"))),
        Err(errno) => Err(wrong(format!("cannot look for group {name:?}: {errno}"))),
    }
}

impl Connection {
    fn new(socket: UnixStream, peer: Option<Peer>) -> Connection {
        Connection {
            socket,
            peer,
            stage: Stage::Receiving,
            request: [0; REQUEST_SIZE + 1],
            received: 0,
            response: Vec::new(),
            sent: 0,
            until: Some(now() + TIMEOUT),
        }
    }

    /// Has an answer to send.
    fn answer(&mut self, response: Vec<u8>) {
        (self.stage, self.response, self.until) = (Stage::Sending, response, Some(now() + TIMEOUT));
    }

    /// Receives, answers and sends as far as the socket allows. False: it is over.
    fn advance(&mut self, respond: impl FnOnce(Request<'_>, &Peer) -> Result<Vec<u8>, Late>) -> bool {
        let done = match self.stage {
            Stage::Receiving => self.receive(respond).and_then(|()| self.send()),
            Stage::Waiting(_) => Ok(()),
            Stage::Sending => self.send(),
            Stage::Lingering(_) => Ok(()),
        };
        // A client that hung up early is its own affair.
        match done.and_then(|()| self.linger()) {
            Ok(()) => true,
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        }
    }

    /// Receives a message, and answers it or begins to wait for the answer. Half a message gets an answer too.
    fn receive(&mut self, respond: impl FnOnce(Request<'_>, &Peer) -> Result<Vec<u8>, Late>) -> io::Result<()> {
        let end = loop {
            match self.socket.read(&mut self.request[self.received..]) {
                Ok(0) if self.received == 0 => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(0) => break self.received,
                Ok(n) => self.received += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock && self.received >= self.wanted()?.1 => {
                    break self.received;
                }
                Err(error) => return Err(error),
            }
            if self.received > self.wanted()?.1 {
                break self.received;
            }
        };
        let (message, wanted) = self.wanted()?;
        if end == wanted || (end > wanted && following::has_key(&message)) {
            let Some(peer) = &self.peer else { return Err(ErrorKind::PermissionDenied.into()) };
            match respond(Request { message: &message, more: &self.request[MESSAGE_SIZE..wanted] }, peer) {
                Ok(response) => self.answer(response),
                Err(late) => (self.stage, self.until) = (Stage::Waiting(late), None),
            }
        } else {
            let size = if end > wanted { "more".into() } else { end.to_string() };
            let what = if wanted > MESSAGE_SIZE { "with the path of a log of changed blocks " } else { "" };
            let text = format!("a message {what}has {wanted} bytes, not {size}");
            self.answer(Message::error(NO_MINOR, Errno::EINVAL as i32, &text).as_bytes().to_vec());
        }
        Ok(())
    }

    /// The message, and how many bytes it has with what follows it, as far as what was received tells.
    fn wanted(&self) -> io::Result<(Message, usize)> {
        let message = Message::read_from_bytes(&self.request[..MESSAGE_SIZE]).map_err(|_| ErrorKind::InvalidData)?;
        let more = if self.received < MESSAGE_SIZE { 0 } else { following::len(&message) };
        Ok((message, MESSAGE_SIZE + more))
    }

    fn send(&mut self) -> io::Result<()> {
        if self.stage != Stage::Sending {
            return Ok(());
        }
        while self.sent < self.response.len() {
            match self.socket.write(&self.response[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        // Who reads to the end sees it, and who still writes, as what follows a message, is not disturbed.
        self.socket.shutdown(std::net::Shutdown::Write)?;
        self.stage = Stage::Lingering(0);
        Ok(())
    }

    /// Takes what a client says although it is answered, until it hangs up; but not for ever.
    fn linger(&mut self) -> io::Result<()> {
        let mut rest = [0; MESSAGE_SIZE];
        while let Stage::Lingering(taken) = &mut self.stage {
            match self.socket.read(&mut rest) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => *taken += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if *taken > LINGERING_MAX {
                return Err(ErrorKind::InvalidData.into());
            }
        }
        Ok(())
    }
}
