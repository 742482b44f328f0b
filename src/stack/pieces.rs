//! Parts of requests of whose end layers want to hear.

use drivers::Ticket;
use nix::errno::Errno;

use crate::request::{PieceId, RequestId};

/// Layers that can hear of the end of one piece, at most.
pub(super) const HOLDERS_MAX: usize = 8;

const NONE: u32 = u32::MAX;

/// Layers that want to hear of the end of a piece, and their tickets; the one that hears first is the last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Holders {
    of: [(u16, Ticket); HOLDERS_MAX],
    count: u8,
}

impl Default for Holders {
    fn default() -> Holders {
        Holders { of: [(0, Ticket(0)); HOLDERS_MAX], count: 0 }
    }
}

impl Holders {
    /// Adds one, which hears before all others.
    pub(super) fn push(&mut self, layer: u16, ticket: Ticket) {
        self.of[usize::from(self.count)] = (layer, ticket);
        self.count += 1;
    }

    /// Takes out the one that hears next.
    fn pop(&mut self) -> Option<(u16, Ticket)> {
        self.count = self.count.checked_sub(1)?;
        Some(self.of[usize::from(self.count)])
    }
}

/// One part of a request: what a transfer, or a change of metadata alone, does for it.
#[derive(Clone, Copy, Debug)]
struct Piece {
    owner: Option<RequestId>,
    holders: Holders,
    /// What the transfer failed with.
    errno: Option<Errno>,
    flush: bool,
    next: u32,
}

/// All pieces there can be, and whose ticket is about which.
pub(super) struct Pieces {
    pieces: Vec<Piece>,
    free: u32,
    /// Of each layer, the first of its tickets in `of_ticket`.
    first: Vec<u32>,
    of_ticket: Vec<Option<PieceId>>,
}

/// The end of a piece.
pub(super) struct Over {
    pub(super) owner: RequestId,
    /// What it failed with, if it did.
    pub(super) errno: Option<Errno>,
    pub(super) flush: bool,
}

impl Pieces {
    /// For layers that can have so many tickets each.
    pub(super) fn new(tickets: impl Iterator<Item = usize>) -> Pieces {
        let mut first = Vec::new();
        let mut count = 0;
        for tickets in tickets {
            first.push(count);
            count += tickets as u32;
        }
        let holders = Holders::default();
        let piece = |next| Piece { owner: None, holders, errno: None, flush: false, next };
        let mut pieces: Vec<_> = (1..=count).map(piece).collect();
        if let Some(last) = pieces.last_mut() {
            last.next = NONE;
        }
        let free = if pieces.is_empty() { NONE } else { 0 };
        Pieces { pieces, free, first, of_ticket: vec![None; count as usize] }
    }

    /// A piece of a request that these layers hold on to. None: no layer does.
    pub(super) fn add(&mut self, owner: RequestId, flush: bool, holders: &Holders) -> Option<PieceId> {
        if holders.count == 0 {
            return None;
        }
        // Each has a ticket, and there are as many pieces as tickets.
        let index = self.free;
        let piece = &mut self.pieces[index as usize];
        self.free = piece.next;
        (piece.owner, piece.holders, piece.errno, piece.flush) = (Some(owner), *holders, None, flush);
        for (layer, ticket) in &holders.of[..usize::from(holders.count)] {
            let place = self.place(*layer, *ticket);
            debug_assert!(self.of_ticket[place].is_none(), "a ticket is given twice");
            self.of_ticket[place] = Some(PieceId(index));
        }
        Some(PieceId(index))
    }

    fn place(&self, layer: u16, ticket: Ticket) -> usize {
        (self.first[usize::from(layer)] + ticket.0) as usize
    }

    /// The piece of a ticket that is settled.
    pub(super) fn of(&mut self, layer: usize, ticket: Ticket) -> Option<PieceId> {
        let place = self.place(layer as u16, ticket);
        self.of_ticket[place].take()
    }

    /// Notes what the transfer of a piece failed with.
    pub(super) fn fail(&mut self, PieceId(index): PieceId, errno: Errno) {
        self.pieces[index as usize].errno = Some(errno);
    }

    /// The layer that hears next that a piece has ended, and its ticket. None: all have, and it is [over](Self::over).
    pub(super) fn next_holder(&mut self, PieceId(index): PieceId) -> Option<(usize, Ticket)> {
        let (layer, ticket) = self.pieces[index as usize].holders.pop()?;
        Some((usize::from(layer), ticket))
    }

    /// Nobody holds on to it any more.
    pub(super) fn over(&mut self, PieceId(index): PieceId, done: bool) -> Over {
        let free = std::mem::replace(&mut self.free, index);
        let piece = &mut self.pieces[index as usize];
        piece.next = free;
        let owner = piece.owner.take().expect("it is over once");
        let errno = (!done).then(|| piece.errno.unwrap_or(Errno::EIO));
        Over { owner, errno, flush: piece.flush }
    }

    /// Bytes of memory.
    pub(super) fn bytes(&self) -> usize {
        self.pieces.len() * (size_of::<Piece>() + size_of::<Option<PieceId>>())
    }
}
