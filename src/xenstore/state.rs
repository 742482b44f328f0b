//! What a connection remembers: the requests on their way, the watches, and the tokens that fired.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::rc::Rc;

use nix::errno::Errno;

use super::task::Slot;
use super::wire::{self, Decoder, Kind, Message};

/// A request that has no reply yet.
struct Pending {
    id: u32,
    kind: Kind,
    /// Of a watch that is to be set or removed.
    token: Option<Box<str>>,
    slot: Slot,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) decoder: Decoder,
    /// Messages that have not been sent, with their ids.
    pub(super) outgoing: VecDeque<(u32, Vec<u8>)>,
    /// Bytes of the first of them that have.
    pub(super) sent: usize,
    last_id: u32,
    /// In the order of sending, which is that of the replies, too, but for what the kernel's device says by itself.
    pending: VecDeque<Pending>,
    /// The number of watches with a token.
    watches: HashMap<Box<str>, usize>,
    /// Tokens that fired, each once.
    pub(super) fired: Vec<String>,
    /// Why the connection is no more.
    pub(super) lost: Option<io::Error>,
}

impl State {
    /// A request is to be sent; `texts` go first, each with a NUL.
    pub(super) fn request(&mut self, kind: Kind, tx: u32, texts: &[&str], rest: &[u8], slot: Slot) {
        let id = self.next_id();
        let token: Option<Box<str>> = match kind {
            Kind::WATCH | Kind::UNWATCH => texts.get(1).map(|token| Box::from(*token)),
            _ => None,
        };
        // Counted now: the watch's first event can come before the reply.
        if kind == Kind::WATCH
            && let Some(token) = &token
        {
            *self.watches.entry(token.clone()).or_default() += 1;
        }
        self.outgoing.push_back((id, wire::encode(kind, id, tx, texts, rest)));
        self.pending.push_back(Pending { id, kind, token, slot });
    }

    /// Never 0, which the kernel's device uses itself.
    fn next_id(&mut self) -> u32 {
        self.last_id = self.last_id.checked_add(1).unwrap_or(1);
        self.last_id
    }

    /// A message came. An error is the end of the connection.
    pub(super) fn take(&mut self, message: Message) -> io::Result<()> {
        let Message { kind, id, payload, .. } = message;
        if kind == Kind::WATCH_EVENT {
            return self.event(&payload);
        }
        // The device answers these by itself, and without an id.
        let nameless = id == 0 && matches!(kind, Kind::WATCH | Kind::UNWATCH);
        let found = self
            .pending
            .iter()
            .position(|pending| if nameless { pending.kind == kind } else { pending.id == id })
            .filter(|i| kind == Kind::ERROR || self.pending[*i].kind == kind);
        let Some(pending) = found.and_then(|i| self.pending.remove(i)) else {
            return Err(invalid(format!("a reply of type {} to request {id}, which was not made, came", kind.0)));
        };
        let answer = if kind == Kind::ERROR { Err(wire::errno(&payload)) } else { Ok(payload) };
        self.resolve(pending, answer);
        Ok(())
    }

    fn event(&mut self, payload: &[u8]) -> io::Result<()> {
        let Some(token) = wire::texts(payload).nth(1) else {
            return Err(invalid("a watch event without a token came".into()));
        };
        // Only tokens that are ours are kept, so their number is limited.
        if let Ok(token) = str::from_utf8(token)
            && self.watches.contains_key(token)
            && self.fired.iter().all(|fired| fired != token)
        {
            self.fired.push(token.to_owned());
        }
        Ok(())
    }

    fn resolve(&mut self, pending: Pending, answer: Result<Vec<u8>, Errno>) {
        // A watch that could not be set is none, nor is one that was removed.
        if let Some(token) = &pending.token
            && answer.is_ok() == (pending.kind == Kind::UNWATCH)
        {
            self.forget(token);
        }
        if pending.kind == Kind::TRANSACTION_START
            && Rc::strong_count(&pending.slot) == 1
            && let Some(tx) = answer.as_ref().ok().and_then(|payload| number(payload))
        {
            // Nobody waits for it any more, so nobody else can end it.
            self.request(Kind::TRANSACTION_END, tx, &["F"], b"", Slot::default());
        }
        pending.slot.set(Some(answer));
    }

    fn forget(&mut self, token: &str) {
        if let Some(count) = self.watches.get_mut(token) {
            *count -= 1;
            if *count == 0 {
                self.watches.remove(token);
                self.fired.retain(|fired| fired != token);
            }
        }
    }

    /// The first message is sent, or was refused with an error.
    pub(super) fn sent(&mut self, result: Result<(), Errno>) {
        self.sent = 0;
        let Some((id, _)) = self.outgoing.pop_front() else { return };
        if let Err(errno) = result
            && let Some(i) = self.pending.iter().position(|pending| pending.id == id)
            && let Some(pending) = self.pending.remove(i)
        {
            self.resolve(pending, Err(errno));
        }
    }

    /// Whether a request is sent and not answered.
    pub(super) fn awaits(&self) -> bool {
        self.pending.len() > self.outgoing.len()
    }

    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.outgoing.is_empty()
    }

    /// The connection is no more.
    pub(super) fn lose(&mut self, error: io::Error) {
        self.lost = Some(error);
        self.outgoing.clear();
        for pending in self.pending.drain(..) {
            pending.slot.set(Some(Err(Errno::ECONNRESET)));
        }
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// A decimal number, such as a transaction's.
pub(super) fn number(payload: &[u8]) -> Option<u32> {
    str::from_utf8(wire::texts(payload).next()?).ok()?.parse().ok()
}
