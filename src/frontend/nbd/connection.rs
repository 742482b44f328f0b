//! One client: its bytes become requests to the disk, and their ends become replies.
//!
//! All memory is made when it connects. Where something runs out - memory, a place in a table or in the transmit
//! queue, requests that the disk takes - the client's stream is not read on, and what it sends waits in the socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use mio::net::{TcpStream, UnixStream};
use mio::{Interest, Registry, Token, event::Source};
use nix::errno::Errno;
use zerocopy::FromBytes;

use super::command::{Command, Part, Table};
use super::listen::Style;
use super::negotiate::{Export, MAX_OPTION, Negotiation, Session, Step};
use super::status;
use super::transmit::{Sent, Transmit};
use super::wire::{CMD_DISC, CMD_WRITE, REQUEST_MAGIC, RequestHead};
use crate::frontend::{DiskInfo, Intake};
use crate::payload::{Arena, Run};
use crate::request::Op;
use crate::sys::memory::Memory;
use crate::sys::socket;

/// Bytes of payload memory.
const ARENA: usize = 4 << 20;
/// Memory of a client, bytes.
pub(super) const BYTES: usize = ARENA + RECEIVE;
/// Bytes received before they are taken apart.
const RECEIVE: usize = 64 * 1024;
/// Commands that a client may have in flight, and parts of them.
const COMMANDS: u16 = 128;
/// Replies that wait to be sent; as each command and part in flight may add one, more than both.
const REPLIES: usize = 512;
/// System calls to receive in one turn, so that one client can't hold up the others.
const READS_A_TURN: u32 = 8;

const _: () = assert!(RECEIVE >= MAX_OPTION as usize + 16 && REPLIES > 2 * COMMANDS as usize);

/// The client's end.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Unix(stream) => stream.as_fd(),
            Socket::Tcp(stream) => stream.as_fd(),
        }
    }

    fn source(&mut self) -> &mut dyn Source {
        match self {
            Socket::Unix(stream) => stream,
            Socket::Tcp(stream) => stream,
        }
    }
}

/// Where in its life the connection is.
#[derive(Debug)]
enum Phase {
    Handshake(Negotiation),
    Transmission,
    /// Nothing more is taken from the client; what is in flight is answered.
    Leaving,
    /// Nothing can be said any more, and why.
    Dead(&'static str),
}

/// Where in the client's stream we are.
#[derive(Clone, Copy, Debug)]
enum Stream {
    /// Before a request.
    Head,
    /// Behind the head of a command without payload, of which parts are to be handed in.
    Issue(u16),
    /// In a write's payload, without memory for the next part of it.
    Payload(u16),
    /// In a write's payload, of which the next `len` bytes go to `run`; `have` are there.
    Fill { command: u16, run: Run, len: u32, have: u32 },
    /// In a refused write's payload, with so many bytes left.
    Drain(u16, u32),
}

/// Why the client's stream is not read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// It may be: this turn has done its share, or room has come.
    No,
    /// The client must send more.
    Input,
    /// Something of ours must be answered or sent.
    Room,
    /// The disk takes no more requests.
    Slots,
    /// It ends here.
    End,
}

/// Received bytes that are not yet taken apart.
#[derive(Debug)]
struct Received {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Received {
    fn data(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn consume(&mut self, count: usize) {
        self.start += count;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Moves what there is to the front, so that there is room behind it.
    fn compact(&mut self) {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
    }
}

/// A connected client.
#[derive(Debug)]
pub(super) struct Connection {
    socket: Socket,
    token: Token,
    /// When it came, ns of [`crate::stats::now`].
    pub(super) born: u64,
    /// The part of its tags that is the same in all.
    tag: u64,
    phase: Phase,
    session: Session,
    stream: Stream,
    stop: Stop,
    /// A read may give something.
    readable: bool,
    /// The client has closed its side, so reads end only with the end of the stream.
    hung_up: bool,
    /// It has closed both sides: nobody hears anything any more.
    gone: bool,
    /// The socket took all that it was given.
    writable: bool,
    /// An event is asked for when it takes more.
    watches_writable: bool,
    received: Received,
    arena: Arena,
    commands: Table<Command>,
    parts: Table<Part>,
    /// A serial read is under way; nothing else may be answered.
    serial: bool,
    /// Commands that are done but for a flush. Never more than there are commands.
    flushes: Vec<u16>,
    transmit: Transmit,
    requests: u64,
    errors: u64,
    bytes_received: u64,
}

impl Connection {
    /// A client that has just connected. Its tags are `tag` and the low 16 bits.
    pub(super) fn new(
        socket: Socket,
        style: Style,
        token: Token,
        tag: u64,
        export: &Arc<Export>,
    ) -> io::Result<Connection> {
        let mut transmit = Transmit::new(REPLIES);
        let negotiation = match style {
            Style::New => Negotiation::new(Arc::clone(export), &mut transmit.handshake),
            Style::Old => Negotiation::old(Arc::clone(export), &mut transmit.handshake),
        };
        Ok(Connection {
            socket,
            token,
            born: crate::stats::now(),
            tag,
            phase: Phase::Handshake(negotiation),
            session: Session::default(),
            stream: Stream::Head,
            stop: Stop::Input,
            readable: false,
            hung_up: false,
            gone: false,
            writable: true,
            watches_writable: false,
            received: Received { bytes: vec![0; RECEIVE].into(), start: 0, end: 0 },
            arena: Arena::new(ARENA)?,
            commands: Table::new(COMMANDS),
            parts: Table::new(COMMANDS),
            serial: false,
            flushes: Vec::with_capacity(usize::from(COMMANDS)),
            transmit,
            requests: 0,
            errors: 0,
            bytes_received: 0,
        })
    }

    /// The payloads'.
    pub(super) fn memory(&self) -> &Arc<Memory> {
        self.arena.memory()
    }

    /// Asks for events. Not for writable ones until a send falls short: of a Unix socket they come each time that the
    /// client reads.
    pub(super) fn register(&mut self, registry: &Registry) -> io::Result<()> {
        registry.register(self.socket.source(), self.token, Interest::READABLE)
    }

    pub(super) fn deregister(&mut self, registry: &Registry) {
        // Closing it does the same; this only comes first.
        let _ = registry.deregister(self.socket.source());
    }

    pub(super) fn event(&mut self, event: &mio::event::Event) {
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.hung_up |= event.is_read_closed() || event.is_error();
        self.gone |= event.is_write_closed();
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
    }

    pub(super) fn is_negotiating(&self) -> bool {
        matches!(self.phase, Phase::Handshake(_))
    }

    /// Whether it ends now: nothing can be said, or all is said.
    pub(super) fn is_over(&self) -> bool {
        match self.phase {
            Phase::Dead(_) => true,
            Phase::Leaving => {
                self.gone || (self.in_flight() == 0 && self.flushes.is_empty() && self.transmit.is_empty())
            }
            // What it has sent is read on to the end, but not if that has to wait for answers.
            Phase::Transmission => self.gone && matches!(self.stop, Stop::Room | Stop::Slots),
            Phase::Handshake(_) => false,
        }
    }

    /// Requests with the disk. Parts of a simple read that were answered, and wait for those before them, are none.
    pub(super) fn in_flight(&self) -> usize {
        self.parts.iter().filter(|part| !part.done).count()
    }

    /// Whether a pull or a publish can do something now, if the disk takes requests.
    pub(super) fn is_ready(&self) -> bool {
        match self.stop {
            Stop::No | Stop::Slots => true,
            Stop::Input => self.readable,
            Stop::Room | Stop::End => false,
        }
    }

    /// Takes no more commands.
    pub(super) fn leave(&mut self) {
        if !matches!(self.phase, Phase::Dead(_)) {
            self.phase = Phase::Leaving;
        }
    }

    /// Hands in what the client has sent, as long as there is room for it.
    pub(super) fn pull(&mut self, intake: &mut Intake) {
        let mut reads = READS_A_TURN;
        self.stop = loop {
            match self.step(intake) {
                Stop::No => {}
                Stop::Input if !self.readable => break Stop::Input,
                Stop::Input if reads == 0 => break Stop::No,
                Stop::Input => {
                    reads -= 1;
                    self.receive();
                }
                stop => break stop,
            }
        }
    }

    /// One step through the client's stream, or why there is none.
    fn step(&mut self, intake: &mut Intake) -> Stop {
        while let Some(&id) = self.flushes.last() {
            if self.parts.is_full() {
                return Stop::Room;
            }
            if !self.issue(intake, id, Op::Flush, 0, None) {
                return Stop::Slots;
            }
            self.flushes.pop();
            self.commands.get(id).open = false;
        }
        match (&self.phase, self.stream) {
            (Phase::Leaving | Phase::Dead(_), _) => Stop::End,
            (Phase::Handshake(_), _) => self.handshake(),
            (Phase::Transmission, Stream::Head) => self.head(intake.disk),
            (Phase::Transmission, Stream::Issue(id)) => self.next_part(intake, id),
            (Phase::Transmission, Stream::Payload(id)) => self.next_payload(id),
            (Phase::Transmission, Stream::Fill { command, run, len, have }) => {
                self.fill(intake, command, run, len, have)
            }
            (Phase::Transmission, Stream::Drain(id, left)) => self.drain(id, left),
        }
    }

    fn handshake(&mut self) -> Stop {
        let Phase::Handshake(negotiation) = &mut self.phase else { return Stop::No };
        let (taken, step) = negotiation.feed(self.received.data(), &mut self.transmit.handshake);
        self.received.consume(taken);
        match step {
            Step::Continue => return Stop::Input,
            Step::Close => self.phase = Phase::Leaving,
            Step::Transmission(session) => {
                self.session = session;
                self.phase = Phase::Transmission;
            }
        }
        Stop::No
    }

    /// The head of a request.
    fn head(&mut self, disk: &DiskInfo) -> Stop {
        // Each command and part that is in flight may still add a reply.
        let replies = self.commands.used() + self.parts.used() + 2;
        if self.serial || self.commands.is_full() || self.transmit.room() < replies {
            return Stop::Room;
        }
        let Ok((head, _)) = RequestHead::read_from_prefix(self.received.data()) else { return Stop::Input };
        self.received.consume(size_of::<RequestHead>());
        if head.magic.get() != REQUEST_MAGIC {
            self.phase = Phase::Dead("it sent what is no request");
            return Stop::No;
        }
        if head.command.get() == CMD_DISC {
            self.phase = Phase::Leaving;
            return Stop::No;
        }
        self.requests += 1;
        let command = Command::new(&head, self.session, disk);
        let refused = !command.open;
        let id = self.commands.add(command);
        if head.command.get() == CMD_WRITE {
            self.stream = if refused { Stream::Drain(id, head.length.get()) } else { Stream::Payload(id) };
        } else if refused {
            self.end_if_done(id);
        } else {
            self.stream = Stream::Issue(id);
        }
        Stop::No
    }

    /// The next part of a command without payload.
    fn next_part(&mut self, intake: &mut Intake, id: u16) -> Stop {
        let others = self.commands.used() > 1;
        let command = self.commands.get(id);
        if command.is_serial() && command.issued == 0 && others {
            return Stop::Room;
        }
        self.serial = command.is_serial();
        let (op, (len, bytes)) = (command.op, command.next_part());
        if self.parts.is_full() || self.transmit.room() < self.commands.used() + self.parts.used() + 1 {
            return Stop::Room;
        }
        if intake.room() == 0 {
            return Stop::Slots;
        }
        let run = if bytes == 0 { None } else { self.arena.alloc(bytes as usize) };
        if bytes > 0 && run.is_none() {
            return Stop::Room;
        }
        self.issue(intake, id, op, len, run);
        let command = self.commands.get(id);
        if command.issued == command.len {
            command.open = false;
            self.stream = Stream::Head;
        }
        Stop::No
    }

    /// Memory for the next part of a write's payload.
    fn next_payload(&mut self, id: u16) -> Stop {
        let command = self.commands.get(id);
        let (len, _) = command.next_part();
        if command.error.is_some() {
            self.stream = Stream::Drain(id, command.len - command.issued);
        } else if let Some(run) = self.arena.alloc(len as usize) {
            self.stream = Stream::Fill { command: id, run, len, have: 0 };
        } else {
            return Stop::Room;
        }
        Stop::No
    }

    /// More of a part of a write's payload; when all is there, it goes to the disk.
    fn fill(&mut self, intake: &mut Intake, id: u16, run: Run, len: u32, have: u32) -> Stop {
        let data = self.received.data();
        let now = data.len().min((len - have) as usize);
        self.arena.memory().write(run.offset() + have as usize, &data[..now]);
        self.received.consume(now);
        let have = have + now as u32;
        self.stream = Stream::Fill { command: id, run, len, have };
        if have < len {
            return Stop::Input;
        }
        if self.parts.is_full() {
            return Stop::Room;
        }
        let op = self.commands.get(id).op;
        if !self.issue(intake, id, op, len, Some(run)) {
            return Stop::Slots;
        }
        let command = self.commands.get(id);
        command.open = command.issued < command.len;
        self.stream = if command.open { Stream::Payload(id) } else { Stream::Head };
        Stop::No
    }

    /// Throws a payload away; then the command that it came with can end.
    fn drain(&mut self, id: u16, left: u32) -> Stop {
        let now = self.received.data().len().min(left as usize);
        self.received.consume(now);
        let left = left - now as u32;
        if left > 0 {
            self.stream = Stream::Drain(id, left);
            return Stop::Input;
        }
        self.stream = Stream::Head;
        self.commands.get(id).open = false;
        self.end_if_done(id);
        Stop::No
    }

    /// Hands in a part of a command. False: the disk takes none now. There must be room for it in the table.
    fn issue(&mut self, intake: &mut Intake, id: u16, op: Op, len: u32, run: Option<Run>) -> bool {
        let Some(request) = intake.vacant() else { return false };
        let command = self.commands.get(id);
        let at = command.issued;
        (request.op, request.offset, request.len) = (op, command.offset + u64::from(at), u64::from(len));
        if let Some(run) = run {
            let (_, bytes) = command.next_part();
            request.payload.set(self.arena.memory(), run.offset(), bytes);
            if op == Op::Status {
                self.arena.memory().zero(run.offset(), bytes as usize);
            }
        }
        command.issued += len;
        command.parts += 1;
        let part = self.parts.add(Part { command: id, at, len, run, done: false });
        request.tag = self.tag | u64::from(part);
        intake.accept();
        true
    }

    /// A part of a command is done.
    pub(super) fn answer(&mut self, slot: u16, result: Result<(), Errno>) {
        let part = *self.parts.get(slot);
        let command = self.commands.get(part.command);
        command.parts -= 1;
        let last = !command.open && command.parts == 0;
        match (command.op, result, part.run) {
            (Op::Read, Ok(()), Some(run)) if command.chunked => {
                self.transmit.data_chunk(command, part.at, run, part.len, last);
            }
            (Op::Read, Ok(()), Some(_)) => {
                self.parts.get(slot).done = true;
                return self.send_in_order(part.command);
            }
            (Op::Status, Ok(()) | Err(Errno::EOPNOTSUPP), Some(run)) => {
                let offset = run.offset();
                let bytes = status::describe(self.arena.memory(), offset, part.len, command.one_descriptor);
                self.transmit.status_chunk(command, run, bytes);
            }
            (op, result, run) => {
                if let Err(errno) = result {
                    command.error.get_or_insert(errno);
                    if op == Op::Read && command.chunked {
                        self.transmit.error_chunk(command, part.at, errno, last);
                    } else if op == Op::Read && command.open {
                        // It can't be sent, and what is read already would keep the memory that the rest needs.
                        command.open = false;
                        self.stream = Stream::Head;
                    }
                }
                if let Some(run) = run {
                    self.arena.free(run);
                }
            }
        }
        self.parts.remove(slot);
        self.end_if_done(part.command);
    }

    /// Sends the parts of a simple read that are there, as far as none before them is missing.
    fn send_in_order(&mut self, id: u16) {
        let command = self.commands.get(id);
        let next = |at: u32| move |part: &Part| part.command == id && part.done && part.at == at;
        while let Some(slot) = self.parts.find(next(command.queued)) {
            let part = self.parts.remove(slot);
            if let Some(run) = part.run {
                self.transmit.simple_data(command, part.at, run, part.len);
            }
            command.queued += part.len;
        }
        self.end_if_done(id);
    }

    /// Ends a command of which nothing is left to do.
    fn end_if_done(&mut self, id: u16) {
        // Answers make room.
        if self.stop != Stop::Input {
            self.stop = Stop::No;
        }
        let command = self.commands.get(id);
        if command.open || command.parts > 0 {
            return;
        }
        if command.flush_after && command.error.is_none() {
            command.flush_after = false;
            command.open = true;
            self.flushes.push(id);
            self.stop = Stop::No;
            return;
        }
        let command = self.commands.remove(id);
        self.errors += u64::from(command.error.is_some());
        match command.op {
            Op::Read if !command.chunked => self.end_simple_read(id, &command),
            // Their chunks were sent as they came, and the last one said so.
            Op::Read => {}
            Op::Status if command.error.is_none() => {}
            _ => self.transmit.end(&command),
        }
    }

    fn end_simple_read(&mut self, id: u16, command: &Command) {
        self.serial = false;
        if command.error.is_none() {
            return;
        }
        while let Some(slot) = self.parts.find(|part| part.command == id) {
            if let Some(run) = self.parts.remove(slot).run {
                self.arena.free(run);
            }
        }
        if command.queued > 0 {
            // The head said that all is well.
            self.phase = Phase::Dead("a read failed after its reply had begun");
        } else {
            self.transmit.end(command);
        }
    }

    /// Receives what there is: the missing part of a payload into its place, the rest into the buffer.
    fn receive(&mut self) {
        self.received.compact();
        let (mut direct, mut buffer) =
            ((self.arena.memory().as_ref(), 0, 0), &mut self.received.bytes[self.received.end..]);
        if let Stream::Fill { command, run, len, have } = self.stream {
            direct = (self.arena.memory(), run.offset() + have as usize, (len - have) as usize);
            let command = self.commands.get(command);
            if command.issued + len < command.len {
                // What comes behind is payload too, and should get to its place without a copy.
                buffer = &mut [];
            }
        }
        let (wanted, direct_len) = (direct.2 + buffer.len(), direct.2);
        match socket::receive(self.socket.fd(), direct, buffer) {
            Ok(0) => self.phase = Phase::Leaving,
            Ok(count) => {
                self.bytes_received += count as u64;
                // Less than there is room for is all there is; the next byte is a new event.
                self.readable = count == wanted || self.hung_up;
                let placed = count.min(direct_len);
                if let Stream::Fill { have, .. } = &mut self.stream {
                    *have += placed as u32;
                }
                self.received.end += count - placed;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => self.phase = Phase::Dead("receiving failed"),
        }
    }

    /// Sends what there is to send.
    pub(super) fn publish(&mut self, registry: &Registry) {
        if self.transmit.is_empty() || !self.writable || matches!(self.phase, Phase::Dead(_)) {
            return;
        }
        let before = self.transmit.total;
        match self.transmit.send(self.socket.fd(), &mut self.arena) {
            Ok(sent) => self.writable = sent == Sent::All,
            Err(_) => self.phase = Phase::Dead("sending failed"),
        }
        if self.transmit.total > before && self.stop == Stop::Room {
            self.stop = Stop::No;
        }
        self.watch_writable(registry, !self.writable);
    }

    fn watch_writable(&mut self, registry: &Registry, watch: bool) {
        if watch == self.watches_writable {
            return;
        }
        let interest = if watch { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
        match registry.reregister(self.socket.source(), self.token, interest) {
            Ok(()) => self.watches_writable = watch,
            Err(_) => self.phase = Phase::Dead("its socket can't be watched"),
        }
    }

    /// Why it ended, unless the client or we wanted it so.
    pub(super) fn failure(&self) -> Option<&'static str> {
        if let Phase::Dead(why) = self.phase { Some(why) } else { None }
    }

    /// Ends it without a word.
    pub(super) fn kill(&mut self, why: &'static str) {
        self.phase = Phase::Dead(why);
    }

    /// For debug-queue.
    pub(super) fn inspect(&self) -> serde_json::Value {
        let state = match self.phase {
            Phase::Handshake(_) => "handshake",
            Phase::Transmission => "transmission",
            Phase::Leaving => "leaving",
            Phase::Dead(why) => why,
        };
        serde_json::json!({
            "state": state,
            "structured": self.session.structured,
            "stream": format!("{:?}", self.stream),
            "stop": format!("{:?}", self.stop),
            "in_flight": self.in_flight(),
            "commands": self.commands.used(),
            "memory_used": self.arena.lent(),
            "replies_waiting": self.transmit.waiting(),
            "requests": self.requests,
            "errors": self.errors,
            "bytes_received": self.bytes_received,
            "bytes_sent": self.transmit.total,
        })
    }
}
