//! Writes whose data is not all that has to be written.

use std::collections::VecDeque;

use crate::{Settled, Ticket};

const NONE: u32 = u32::MAX;

/// Tickets one after the other, linked by [`State::next`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct List {
    head: u32,
    tail: u32,
}

impl Default for List {
    fn default() -> List {
        List { head: NONE, tail: NONE }
    }
}

impl List {
    pub(super) fn is_empty(self) -> bool {
        self.head == NONE
    }
}

/// What a write needs before it may be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    /// Its sectors' bits in the bitmap of that slot.
    Bits { slot: u32 },
    /// What that new block needs.
    Block { new: u32 },
}

#[derive(Clone, Copy, Debug)]
pub(super) struct State {
    pub(super) needs: Needs,
    /// First sector in the block.
    pub(super) first: u32,
    /// Sectors.
    pub(super) count: u32,
    next: u32,
}

/// All that there can be.
#[derive(Debug)]
pub(super) struct Tickets {
    states: Vec<State>,
    free: Vec<u32>,
    settled: VecDeque<Settled>,
}

impl Tickets {
    pub(super) fn new(count: usize) -> Tickets {
        let state = State { needs: Needs::Bits { slot: NONE }, first: 0, count: 0, next: NONE };
        Tickets {
            states: vec![state; count],
            free: (0..count as u32).rev().collect(),
            settled: VecDeque::with_capacity(count),
        }
    }

    /// All that there can be.
    pub(super) fn count(&self) -> usize {
        self.states.len()
    }

    pub(super) fn room(&self) -> bool {
        !self.free.is_empty()
    }

    /// A ticket for `count` sectors of a block from `first` on. There must be room.
    pub(super) fn take(&mut self, needs: Needs, first: u32, count: u32) -> Ticket {
        let index = self.free.pop().expect("somebody has asked for room");
        self.states[index as usize] = State { needs, first, count, next: NONE };
        Ticket(index)
    }

    pub(super) fn get(&mut self, ticket: Ticket) -> &mut State {
        &mut self.states[ticket.0 as usize]
    }

    pub(super) fn push(&mut self, list: &mut List, ticket: Ticket) {
        self.states[ticket.0 as usize].next = NONE;
        match list.head {
            NONE => list.head = ticket.0,
            _ => self.states[list.tail as usize].next = ticket.0,
        }
        list.tail = ticket.0;
    }

    pub(super) fn pop(&mut self, list: &mut List) -> Option<Ticket> {
        let index = list.head;
        if index == NONE {
            return None;
        }
        list.head = self.states[index as usize].next;
        Some(Ticket(index))
    }

    pub(super) fn iter(&self, list: List) -> impl Iterator<Item = &State> {
        let state = |index: u32| self.states.get(index as usize);
        std::iter::successors(state(list.head), move |last| state(last.next))
    }

    /// Nothing more is needed, or it can't be had.
    pub(super) fn settle(&mut self, ticket: Ticket, done: bool) {
        self.settled.push_back(Settled { ticket, done });
    }

    /// One that is settled; it may be used again from now on.
    pub(super) fn next_settled(&mut self) -> Option<Settled> {
        let settled = self.settled.pop_front()?;
        self.free.push(settled.ticket.0);
        Some(settled)
    }

    /// Tickets that are not settled, or of which nobody has taken notice.
    pub(super) fn used(&self) -> usize {
        self.states.len() - self.free.len()
    }
}
