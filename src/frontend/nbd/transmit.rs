//! What a client is sent: heads of replies and data out of the arena, gathered into as few system calls as possible.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::command::Command;
use super::wire::{
    BASE_ALLOCATION_ID, CHUNK_BLOCK_STATUS, CHUNK_DONE, CHUNK_ERROR, CHUNK_ERROR_OFFSET, CHUNK_MAGIC,
    CHUNK_OFFSET_DATA, ChunkError, ChunkErrorOffset, ChunkHead, SIMPLE_REPLY_MAGIC, SimpleReply, error,
};
use crate::payload::{Arena, Run};
use crate::sys::socket::{self, Piece};

/// The longest head: that of a chunk, and an error with its place.
const HEAD: usize = size_of::<ChunkHead>() + size_of::<ChunkErrorOffset>();

/// A head, and data out of the arena behind it.
#[derive(Debug)]
struct Reply {
    head: [u8; HEAD],
    head_len: u8,
    data: Option<(Run, u32)>,
}

impl Reply {
    fn new() -> Reply {
        Reply { head: [0; HEAD], head_len: 0, data: None }
    }

    fn with(mut self, part: &(impl IntoBytes + Immutable)) -> Reply {
        let from = usize::from(self.head_len);
        let to = from + size_of_val(part);
        self.head[from..to].copy_from_slice(part.as_bytes());
        self.head_len = to as u8;
        self
    }

    fn with_data(mut self, run: Run, len: u32) -> Reply {
        self.data = Some((run, len));
        self
    }

    fn simple(command: &Command, error: u32) -> Reply {
        let head = SimpleReply { magic: SIMPLE_REPLY_MAGIC.into(), error: error.into(), cookie: command.cookie };
        Reply::new().with(&head)
    }

    fn chunk(command: &Command, kind: u16, done: bool, length: usize) -> Reply {
        Reply::new().with(&ChunkHead {
            magic: CHUNK_MAGIC.into(),
            flags: U16::new(if done { CHUNK_DONE } else { 0 }),
            kind: kind.into(),
            cookie: command.cookie,
            length: U32::new(length as u32),
        })
    }

    fn len(&self) -> usize {
        usize::from(self.head_len) + self.data.map_or(0, |(_, len)| len as usize)
    }
}

fn chunk_error(errno: Errno) -> ChunkError {
    ChunkError { error: error(errno).into(), message_length: U16::ZERO }
}

/// How far [`Transmit::send`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// All is sent.
    All,
    /// The socket takes no more for now.
    Full,
}

/// A client's transmit queue.
#[derive(Debug)]
pub(super) struct Transmit {
    /// Answers of the handshake, before all replies.
    pub(super) handshake: Vec<u8>,
    replies: VecDeque<Reply>,
    /// Bytes that are sent of the handshake or else of the first reply.
    sent: usize,
    /// Bytes sent in all.
    pub(super) total: u64,
}

impl Transmit {
    /// A queue with room for so many replies.
    pub(super) fn new(replies: usize) -> Transmit {
        Transmit { handshake: Vec::new(), replies: VecDeque::with_capacity(replies), sent: 0, total: 0 }
    }

    /// Replies that still fit.
    pub(super) fn room(&self) -> usize {
        self.replies.capacity() - self.replies.len()
    }

    /// Replies that are not wholly sent.
    pub(super) fn waiting(&self) -> usize {
        self.replies.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.replies.is_empty() && self.handshake.is_empty()
    }

    fn push(&mut self, reply: Reply) {
        debug_assert!(self.room() > 0);
        self.replies.push_back(reply);
    }

    /// The one reply to a command that sends no data, or the refusal of one that would.
    pub(super) fn end(&mut self, command: &Command) {
        self.push(match command.error {
            Some(errno) if command.chunked => {
                let error = chunk_error(errno);
                Reply::chunk(command, CHUNK_ERROR, true, size_of_val(&error)).with(&error)
            }
            result => Reply::simple(command, result.map_or(0, error)),
        });
    }

    /// A part of a structured read's data.
    pub(super) fn data_chunk(&mut self, command: &Command, at: u32, run: Run, len: u32, done: bool) {
        let offset = U64::new(command.offset + u64::from(at));
        let length = size_of_val(&offset) + len as usize;
        self.push(Reply::chunk(command, CHUNK_OFFSET_DATA, done, length).with(&offset).with_data(run, len));
    }

    /// A part of a structured read that failed.
    pub(super) fn error_chunk(&mut self, command: &Command, at: u32, errno: Errno, done: bool) {
        let offset = U64::new(command.offset + u64::from(at));
        let error = ChunkErrorOffset { error: chunk_error(errno), offset };
        self.push(Reply::chunk(command, CHUNK_ERROR_OFFSET, done, size_of_val(&error)).with(&error));
    }

    /// The answer to a block status: descriptors of `len` bytes.
    pub(super) fn status_chunk(&mut self, command: &Command, run: Run, len: u32) {
        let context = U32::new(BASE_ALLOCATION_ID);
        let length = size_of_val(&context) + len as usize;
        self.push(Reply::chunk(command, CHUNK_BLOCK_STATUS, true, length).with(&context).with_data(run, len));
    }

    /// The next part of a simple read's data, with the head before the first.
    pub(super) fn simple_data(&mut self, command: &Command, at: u32, run: Run, len: u32) {
        let head = if at == 0 { Reply::simple(command, 0) } else { Reply::new() };
        self.push(head.with_data(run, len));
    }

    /// Sends what the socket takes, and gives the memory of what is sent back to the arena.
    pub(super) fn send(&mut self, socket: BorrowedFd, arena: &mut Arena) -> io::Result<Sent> {
        while !self.is_empty() {
            let done = match socket::send(socket, self.pieces(arena)) {
                Ok(done) => done,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Sent::Full),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.total += done as u64;
            self.advance(done, arena);
        }
        Ok(Sent::All)
    }

    /// All that is to be sent, without what is sent already.
    fn pieces<'a>(&'a self, arena: &'a Arena) -> impl Iterator<Item = Piece<'a>> {
        let replies = self.replies.iter().flat_map(|reply| {
            let data = reply.data.map(|(run, len)| Piece::Memory {
                memory: arena.memory(),
                offset: run.offset(),
                len: len as usize,
            });
            [Some(Piece::Bytes(&reply.head[..usize::from(reply.head_len)])), data].into_iter().flatten()
        });
        let mut skip = self.sent;
        std::iter::once(Piece::Bytes(&self.handshake)).chain(replies).filter_map(move |piece| {
            let now = skip.min(piece_len(piece));
            skip -= now;
            let rest = match piece {
                Piece::Bytes(bytes) => Piece::Bytes(&bytes[now..]),
                Piece::Memory { memory, offset, len } => {
                    Piece::Memory { memory, offset: offset + now, len: len - now }
                }
            };
            (piece_len(rest) > 0).then_some(rest)
        })
    }

    fn advance(&mut self, done: usize, arena: &mut Arena) {
        self.sent += done;
        if self.sent < self.handshake.len() {
            return;
        }
        self.sent -= self.handshake.len();
        self.handshake.clear();
        while let Some(reply) = self.replies.front()
            && self.sent >= reply.len()
        {
            self.sent -= reply.len();
            if let Some((run, _)) = reply.data {
                arena.free(run);
            }
            self.replies.pop_front();
        }
    }
}

fn piece_len(piece: Piece) -> usize {
    match piece {
        Piece::Bytes(bytes) => bytes.len(),
        Piece::Memory { len, .. } => len,
    }
}
