//! Commands of a client, and the parts in which they go to the disk.

use nix::errno::Errno;

use super::negotiate::{MAX_PAYLOAD, Session};
use super::wire::{
    CMD_BLOCK_STATUS, CMD_FLAG_DF, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLAG_REQ_ONE, CMD_FLUSH, CMD_READ, CMD_TRIM,
    CMD_WRITE, CMD_WRITE_ZEROES, RequestHead,
};
use crate::frontend::DiskInfo;
use crate::payload::Run;
use crate::request::Op;

/// The most bytes of a read or write that go to the disk as one request; more becomes several parts.
pub(super) const CHUNK: u32 = 256 * 1024;

/// Bytes for the answer of a block status: 64 runs. What lies behind them the client asks for again.
pub(super) const STATUS_BYTES: u32 = 512;

/// A command that is not answered yet.
#[derive(Debug)]
pub(super) struct Command {
    /// The client's mark.
    pub(super) cookie: [u8; 8],
    /// What its parts do.
    pub(super) op: Op,
    /// First byte of the disk.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) len: u32,
    /// Bytes that were handed in.
    pub(super) issued: u32,
    /// Bytes of a read that are in the transmit queue.
    pub(super) queued: u32,
    /// More parts will be handed in.
    pub(super) open: bool,
    /// Parts that are in flight.
    pub(super) parts: u16,
    /// The reply is made of chunks.
    pub(super) chunked: bool,
    /// FUA on what the disk has no FUA for.
    pub(super) flush_after: bool,
    /// NBD_CMD_FLAG_REQ_ONE.
    pub(super) one_descriptor: bool,
    /// The first error.
    pub(super) error: Option<Errno>,
}

impl Command {
    /// The command of a request. One that must be refused has an error already.
    pub(super) fn new(head: &RequestHead, session: Session, disk: &DiskInfo) -> Command {
        let (offset, len) = (head.offset.get(), head.length.get());
        let decoded = decode(head, session).and_then(|op| disk.check(op, offset, u64::from(len)).map(|()| op));
        let replies_in_chunks = matches!(head.command.get(), CMD_READ | CMD_BLOCK_STATUS);
        let fua = head.flags.get() & CMD_FLAG_FUA != 0;
        Command {
            cookie: head.cookie,
            op: decoded.unwrap_or(Op::Flush),
            offset,
            len: if decoded == Ok(Op::Flush) { 0 } else { len },
            issued: 0,
            queued: 0,
            open: decoded.is_ok(),
            parts: 0,
            chunked: session.structured && replies_in_chunks,
            flush_after: fua && matches!(decoded, Ok(Op::Discard | Op::WriteZeroes { .. })),
            one_descriptor: head.flags.get() & CMD_FLAG_REQ_ONE != 0,
            error: decoded.err(),
        }
    }

    /// Whether its data must be sent as one piece but does not fit one part.
    pub(super) fn is_serial(&self) -> bool {
        self.op == Op::Read && !self.chunked && self.len > CHUNK
    }

    /// Bytes of the next part: of the disk, and of memory.
    pub(super) fn next_part(&self) -> (u32, u32) {
        let left = self.len - self.issued;
        match self.op {
            Op::Read | Op::Write { .. } => (left.min(CHUNK), left.min(CHUNK)),
            Op::Status => (left, STATUS_BYTES),
            _ => (left, 0),
        }
    }
}

/// What a request asks for, by command and flags (sections "Request types" and "Command flags").
fn decode(head: &RequestHead, session: Session) -> Result<Op, Errno> {
    let (flags, length) = (head.flags.get(), head.length.get());
    // FUA has no meaning for the others, and is allowed.
    let (op, known) = match head.command.get() {
        CMD_READ => (Op::Read, if session.structured { CMD_FLAG_DF } else { 0 }),
        CMD_WRITE => (Op::Write { fua: flags & CMD_FLAG_FUA != 0 }, 0),
        CMD_FLUSH => (Op::Flush, 0),
        CMD_TRIM => (Op::Discard, 0),
        CMD_WRITE_ZEROES => (Op::WriteZeroes { unmap: flags & CMD_FLAG_NO_HOLE == 0 }, CMD_FLAG_NO_HOLE),
        CMD_BLOCK_STATUS if session.block_status => (Op::Status, CMD_FLAG_REQ_ONE),
        _ => return Err(Errno::EINVAL),
    };
    if flags & !(known | CMD_FLAG_FUA) != 0 {
        return Err(Errno::EINVAL);
    }
    if matches!(op, Op::Read | Op::Write { .. }) && length > MAX_PAYLOAD {
        return Err(Errno::EINVAL);
    }
    if flags & CMD_FLAG_DF != 0 && length > CHUNK {
        return Err(Errno::EOVERFLOW);
    }
    Ok(op)
}

/// A request of ours that is with the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    /// Whose it is.
    pub(super) command: u16,
    /// First byte, from the command's on.
    pub(super) at: u32,
    /// Bytes.
    pub(super) len: u32,
    /// Its memory, if it has some.
    pub(super) run: Option<Run>,
    /// Read, and waiting for those before it.
    pub(super) done: bool,
}

/// A table of fixed size, in which an entry keeps its number.
#[derive(Debug)]
pub(super) struct Table<T> {
    entries: Box<[Option<T>]>,
    free: Vec<u16>,
}

impl<T> Table<T> {
    pub(super) fn new(entries: u16) -> Table<T> {
        Table { entries: (0..entries).map(|_| None).collect(), free: (0..entries).rev().collect() }
    }

    /// Entries that are used.
    pub(super) fn used(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Adds an entry. Panics when full: the caller has asked.
    pub(super) fn add(&mut self, entry: T) -> u16 {
        let index = self.free.pop().expect("the caller has seen room");
        self.entries[usize::from(index)] = Some(entry);
        index
    }

    pub(super) fn get(&mut self, index: u16) -> &mut T {
        self.entries[usize::from(index)].as_mut().expect("only what was added is named")
    }

    pub(super) fn remove(&mut self, index: u16) -> T {
        let entry = self.entries[usize::from(index)].take().expect("only what was added is named");
        self.free.push(index);
        entry
    }

    /// The entries that are used.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().flatten()
    }

    pub(super) fn find(&self, mut which: impl FnMut(&T) -> bool) -> Option<u16> {
        self.entries.iter().position(|entry| entry.as_ref().is_some_and(&mut which)).map(|index| index as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::nbd::wire::{CMD_DISC, REQUEST_MAGIC};

    const ALL: Session = Session { structured: true, block_status: true };

    fn command(command: u16, flags: u16, length: u32, session: Session) -> Result<Op, Errno> {
        let head = RequestHead {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: [0; 8],
            offset: 0.into(),
            length: length.into(),
        };
        decode(&head, session)
    }

    #[test]
    fn commands_and_flags_mean_what_the_protocol_says() {
        let plain = Session::default();
        assert_eq!(command(CMD_READ, 0, 512, plain), Ok(Op::Read));
        assert_eq!(command(CMD_READ, CMD_FLAG_DF, 512, plain), Err(Errno::EINVAL));
        assert_eq!(command(CMD_READ, CMD_FLAG_DF, 64 << 10, ALL), Ok(Op::Read));
        assert_eq!(command(CMD_READ, CMD_FLAG_DF, CHUNK + 512, ALL), Err(Errno::EOVERFLOW));
        assert_eq!(command(CMD_READ, 0, MAX_PAYLOAD, ALL), Ok(Op::Read));
        assert_eq!(command(CMD_READ, 0, MAX_PAYLOAD + 512, ALL), Err(Errno::EINVAL));
        assert_eq!(command(CMD_WRITE, CMD_FLAG_FUA, 512, ALL), Ok(Op::Write { fua: true }));
        assert_eq!(command(CMD_WRITE, CMD_FLAG_DF, 512, ALL), Err(Errno::EINVAL));
        assert_eq!(command(CMD_WRITE, 0, MAX_PAYLOAD + 512, ALL), Err(Errno::EINVAL));
        assert_eq!(command(CMD_FLUSH, CMD_FLAG_FUA, 0, ALL), Ok(Op::Flush));
        assert_eq!(command(CMD_TRIM, 0, u32::MAX, ALL), Ok(Op::Discard));
        assert_eq!(command(CMD_WRITE_ZEROES, 0, 512, ALL), Ok(Op::WriteZeroes { unmap: true }));
        assert_eq!(command(CMD_WRITE_ZEROES, CMD_FLAG_NO_HOLE, 512, ALL), Ok(Op::WriteZeroes { unmap: false }));
        assert_eq!(command(CMD_WRITE_ZEROES, 1 << 4, 512, ALL), Err(Errno::EINVAL));
        assert_eq!(command(CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, 512, ALL), Ok(Op::Status));
        assert_eq!(command(CMD_BLOCK_STATUS, 0, 512, plain), Err(Errno::EINVAL));
        for unknown in [CMD_DISC, 5, 8, u16::MAX] {
            assert_eq!(command(unknown, 0, 512, ALL), Err(Errno::EINVAL));
        }
    }

    #[test]
    fn a_table_keeps_numbers_and_gives_them_out_again() {
        let mut table = Table::new(2);
        let (a, b) = (table.add("a"), table.add("b"));
        assert!(table.is_full() && *table.get(a) == "a");
        assert_eq!((table.remove(a), table.used(), table.find(|entry| *entry == "b")), ("a", 1, Some(b)));
        assert_eq!((table.add("c"), table.find(|entry| *entry == "x")), (a, None));
    }
}
