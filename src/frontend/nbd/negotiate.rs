//! The handshake: *sans-I/O*. Bytes of the client go in, bytes for it come out (section "Protocol phases", fixed
//! newstyle, and "Option types").
//!
//! There is one export; the empty name means it too.

use std::sync::Arc;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::wire::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, FLAG_CAN_MULTI_CONN, FLAG_HAS_FLAGS, FLAG_READ_ONLY, FLAG_SEND_DF,
    FLAG_SEND_FLUSH, FLAG_SEND_FUA, FLAG_SEND_TRIM, FLAG_SEND_WRITE_ZEROES, HANDSHAKE_FIXED_NEWSTYLE,
    HANDSHAKE_NO_ZEROES, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_EXPORT, INFO_NAME, MAGIC, MAX_STRING, OLD_MAGIC,
    OPT_ABORT, OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHead, OptionReplyHead, REP_ACK, REP_ERR_INVALID,
    REP_ERR_TOO_BIG, REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_INFO, REP_META_CONTEXT, REP_SERVER,
};
use crate::frontend::DiskInfo;
use crate::text::one_line;

/// The most bytes of data that an option may have; more is read, thrown away and refused. A caller's buffer holds this
/// and an [`OptionHead`].
pub const MAX_OPTION: u32 = 16 * 1024;

/// The most bytes that one read or write may have.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// The most options of one client. None needs more than about ten.
const MAX_OPTIONS: u32 = 256;

/// Bytes of zeros that end the answer to NBD_OPT_EXPORT_NAME where the client did not decline them.
const EXPORT_NAME_ZEROES: usize = 124;

/// What clients are told of the disk.
#[derive(Clone, Debug)]
pub struct Export {
    /// The name that clients ask for.
    pub name: String,
    /// The disk.
    pub disk: DiskInfo,
}

impl Export {
    fn is_named(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }

    /// Transmission flags. A flush is of the whole image, whichever connection wrote, so clients may use several.
    fn flags(&self, structured: bool) -> u16 {
        let mut flags = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_CAN_MULTI_CONN;
        if self.disk.read_only {
            flags |= FLAG_READ_ONLY;
        } else {
            flags |= FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES;
        }
        if structured { flags | FLAG_SEND_DF } else { flags }
    }
}

/// What the client has asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Session {
    /// Replies to reads are structured.
    pub structured: bool,
    /// `base:allocation` was chosen, so NBD_CMD_BLOCK_STATUS may be asked.
    pub block_status: bool,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// More bytes of the client.
    Continue,
    /// Requests.
    Transmission(Session),
    /// The end of the connection, once the answers are sent.
    Close,
}

#[derive(Clone, Copy, Debug)]
enum State {
    ClientFlags,
    Option,
    /// Throwing away what is left of an option that is too long.
    Discard(u32),
    Ended(Step),
}

/// One client's handshake.
#[derive(Debug)]
pub struct Negotiation {
    export: Arc<Export>,
    state: State,
    session: Session,
    fixed: bool,
    no_zeroes: bool,
    options: u32,
}

/// Takes a `T` off the front of `data`.
fn take<T: FromBytes + KnownLayout + Immutable + Unaligned>(data: &mut &[u8]) -> Option<T> {
    let (value, rest) = T::read_from_prefix(data).ok()?;
    *data = rest;
    Some(value)
}

/// Takes a string of the protocol, its length before it, off the front of `data`.
fn take_string<'a>(data: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = take::<U32>(data)?.get();
    if length > MAX_STRING {
        return None;
    }
    let (string, rest) = data.split_at_checked(length as usize)?;
    *data = rest;
    Some(string)
}

impl Negotiation {
    /// A new client; `out` gets the greeting.
    pub fn new(export: Arc<Export>, out: &mut Vec<u8>) -> Negotiation {
        out.extend(MAGIC);
        out.extend(OPTION_MAGIC);
        out.extend((HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES).to_be_bytes());
        let state = State::ClientFlags;
        Negotiation { export, state, session: Session::default(), fixed: false, no_zeroes: false, options: 0 }
    }

    /// A new client that is told of the export and asked for nothing (oldstyle negotiation); `out` gets all of it.
    pub fn old(export: Arc<Export>, out: &mut Vec<u8>) -> Negotiation {
        out.extend(MAGIC);
        out.extend(OLD_MAGIC);
        out.extend(export.disk.size.to_be_bytes());
        out.extend(u32::from(export.flags(false)).to_be_bytes());
        out.extend([0; EXPORT_NAME_ZEROES]);
        let session = Session::default();
        let state = State::Ended(Step::Transmission(session));
        Negotiation { export, state, session, fixed: false, no_zeroes: false, options: 0 }
    }

    /// Takes what is complete of `input` and answers it in `out`. Gives the bytes taken: those behind must come again,
    /// with more, or are the first ones of the transmission.
    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) -> (usize, Step) {
        let mut rest = input;
        let step = loop {
            if let State::Ended(step) = self.state {
                break step;
            }
            match self.one(rest, out) {
                Some(taken) => rest = &rest[taken..],
                None => break Step::Continue,
            }
        };
        (input.len() - rest.len(), step)
    }

    /// Takes one message off the front of `input`, if it is complete, and gives its length.
    fn one(&mut self, input: &[u8], out: &mut Vec<u8>) -> Option<usize> {
        match self.state {
            State::ClientFlags => {
                let (flags, _) = U32::read_from_prefix(input).ok()?;
                self.client_flags(flags.get());
                Some(size_of::<U32>())
            }
            State::Option => {
                let (head, data) = OptionHead::read_from_prefix(input).ok()?;
                let (option, length) = (head.option.get(), head.length.get());
                if head.magic != OPTION_MAGIC || !(self.fixed || option == OPT_EXPORT_NAME) {
                    self.state = State::Ended(Step::Close);
                } else if length > MAX_OPTION {
                    self.too_long(option, length, out);
                } else {
                    let data = data.get(..length as usize)?;
                    self.option(option, data, out);
                    return Some(size_of::<OptionHead>() + data.len());
                }
                Some(size_of::<OptionHead>())
            }
            State::Discard(left) => {
                let now = (left as usize).min(input.len());
                self.state = match left - now as u32 {
                    0 => State::Option,
                    left => State::Discard(left),
                };
                (now > 0).then_some(now)
            }
            State::Ended(_) => None,
        }
    }

    fn client_flags(&mut self, flags: u32) {
        let known = u32::from(HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES);
        self.fixed = flags & u32::from(HANDSHAKE_FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(HANDSHAKE_NO_ZEROES) != 0;
        self.state = if flags & !known == 0 { State::Option } else { State::Ended(Step::Close) };
    }

    fn too_long(&mut self, option: u32, length: u32, out: &mut Vec<u8>) {
        self.options += 1;
        if option == OPT_EXPORT_NAME || length > MAX_PAYLOAD || self.options > MAX_OPTIONS {
            self.state = State::Ended(Step::Close);
        } else {
            reply(out, option, REP_ERR_TOO_BIG, b"the option has too much data");
            self.state = State::Discard(length);
        }
    }

    fn option(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) {
        self.options += 1;
        if self.options > MAX_OPTIONS {
            self.state = State::Ended(Step::Close);
            return;
        }
        match option {
            OPT_EXPORT_NAME => self.export_name(data, out),
            OPT_ABORT => {
                reply(out, option, REP_ACK, &[]);
                self.state = State::Ended(Step::Close);
            }
            OPT_LIST if data.is_empty() => self.list(out),
            OPT_INFO | OPT_GO => self.info(option, data, out),
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.session.structured = true;
                reply(out, option, REP_ACK, &[]);
            }
            OPT_LIST | OPT_STRUCTURED_REPLY => invalid(out, option),
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.meta_context(option, data, out),
            _ => reply(out, option, REP_ERR_UNSUP, b"this server does not know the option"),
        }
    }

    /// The one option that has no way to say no but to hang up.
    fn export_name(&mut self, name: &[u8], out: &mut Vec<u8>) {
        if !self.export.is_named(name) {
            self.state = State::Ended(Step::Close);
            return;
        }
        out.extend(self.export.disk.size.to_be_bytes());
        out.extend(self.export.flags(self.session.structured).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; EXPORT_NAME_ZEROES]);
        }
        self.state = State::Ended(Step::Transmission(self.session));
    }

    fn list(&self, out: &mut Vec<u8>) {
        let name = self.export.name.as_bytes();
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend(name);
        data.extend(one_line(&self.export.disk.name).as_bytes());
        reply(out, OPT_LIST, REP_SERVER, &data);
        reply(out, OPT_LIST, REP_ACK, &[]);
    }

    fn info(&mut self, option: u32, mut data: &[u8], out: &mut Vec<u8>) {
        let name = take_string(&mut data);
        let count = take::<U16>(&mut data).map(U16::get);
        let wanted = <[U16]>::ref_from_bytes(data).ok();
        let (Some(name), Some(count), Some(wanted)) = (name, count, wanted) else { return invalid(out, option) };
        if usize::from(count) != wanted.len() {
            return invalid(out, option);
        }
        if !self.export.is_named(name) {
            return reply(out, option, REP_ERR_UNKNOWN, b"there is no export of that name");
        }
        let disk = &self.export.disk;
        let mut info = |kind: u16, parts: [&[u8]; 3]| {
            let data = [&kind.to_be_bytes()[..], &parts.concat()].concat();
            reply(out, option, REP_INFO, &data);
        };
        let flags = self.export.flags(self.session.structured);
        info(INFO_EXPORT, [&disk.size.to_be_bytes(), &flags.to_be_bytes(), &[]]);
        // Also for those who did not ask: they may send what is not aligned, and learn so at once.
        let preferred = disk.physical_sector_size.max(4096);
        let sizes = [disk.sector_size, preferred, MAX_PAYLOAD].map(u32::to_be_bytes);
        info(INFO_BLOCK_SIZE, [&sizes[0], &sizes[1], &sizes[2]]);
        for kind in [INFO_NAME, INFO_DESCRIPTION] {
            let text = if kind == INFO_NAME { self.export.name.as_str().into() } else { one_line(&disk.name) };
            if wanted.iter().any(|wanted| wanted.get() == kind) {
                info(kind, [text.as_bytes(), &[], &[]]);
            }
        }
        reply(out, option, REP_ACK, &[]);
        if option == OPT_GO {
            self.state = State::Ended(Step::Transmission(self.session));
        }
    }

    fn meta_context(&mut self, option: u32, mut data: &[u8], out: &mut Vec<u8>) {
        let set = option == OPT_SET_META_CONTEXT;
        if set {
            // Each time replaces what was chosen before, also when it fails.
            self.session.block_status = false;
        }
        let (Some(name), Some(count)) = (take_string(&mut data), take::<U32>(&mut data)) else {
            return invalid(out, option);
        };
        let (mut queries, mut chosen) = (0, !set && count.get() == 0);
        while !data.is_empty() {
            let Some(query) = take_string(&mut data) else { return invalid(out, option) };
            queries += 1;
            // A namespace alone lists what is in it and chooses nothing.
            chosen |= query == BASE_ALLOCATION.as_bytes() || (!set && query == b"base:");
        }
        if queries != count.get() || !self.session.structured {
            return invalid(out, option);
        }
        if !self.export.is_named(name) {
            return reply(out, option, REP_ERR_UNKNOWN, b"there is no export of that name");
        }
        if chosen {
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            reply(out, option, REP_META_CONTEXT, &[&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()].concat());
        }
        self.session.block_status |= set && chosen;
        reply(out, option, REP_ACK, &[]);
    }
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    let head = OptionReplyHead {
        magic: U64::new(OPTION_REPLY_MAGIC),
        option: U32::new(option),
        kind: U32::new(kind),
        length: U32::new(data.len() as u32),
    };
    out.extend(head.as_bytes());
    out.extend(data);
}

fn invalid(out: &mut Vec<u8>, option: u32) {
    reply(out, option, REP_ERR_INVALID, b"the option's data is malformed, or it comes too early");
}

#[cfg(test)]
#[path = "negotiate_tests.rs"]
mod tests;
