//! A ring whose requests are being served: what has been taken and not answered, and what was wrong.

use std::sync::Arc;

use serde::Serialize;

use super::ring::{BackRing, Indices, Overflow};
use super::wire::{Entry, RSP_OKAY, Response, Segment};
use super::{parse, response_operation, status};
use crate::frontend::Intake;
use crate::request::{Request, TooScattered};
use crate::sys::memory::Memory;

/// The memory that a client's grant references name.
pub trait Pages {
    /// All of it.
    fn memory(&self) -> &Arc<Memory>;

    /// The page's byte offset in it; none if the client has no such page.
    fn offset(&self, gref: u32) -> Option<usize>;
}

/// What a client may ask for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Segments of an indirect request.
    pub indirect_segments: usize,
    /// Logical sector in bytes.
    pub sector_size: u32,
}

/// What a queue has counted.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Counters {
    /// Requests taken from the ring.
    pub requests: u64,
    /// Responses put into it.
    pub responses: u64,
    /// Of those, errors.
    pub errors: u64,
    /// Of those, requests that could not even be parsed.
    pub malformed: u64,
    /// Notifications that came in.
    pub kicks_in: u64,
    /// Of those, the ones without a request.
    pub kicks_idle: u64,
    /// Notifications that went out.
    pub kicks_out: u64,
}

impl std::ops::Add for Counters {
    type Output = Counters;

    fn add(self, other: Counters) -> Counters {
        Counters {
            requests: self.requests + other.requests,
            responses: self.responses + other.responses,
            errors: self.errors + other.errors,
            malformed: self.malformed + other.malformed,
            kicks_in: self.kicks_in + other.kicks_in,
            kicks_idle: self.kicks_idle + other.kicks_idle,
            kicks_out: self.kicks_out + other.kicks_out,
        }
    }
}

/// A ring with what was counted on it.
#[derive(Debug)]
pub struct CountedRing {
    ring: BackRing,
    /// What was counted.
    pub counters: Counters,
}

impl CountedRing {
    /// Nothing is counted yet.
    pub fn new(ring: BackRing) -> CountedRing {
        CountedRing { ring, counters: Counters::default() }
    }

    /// Requests that are there and not taken.
    pub fn pending(&self) -> Result<u32, Overflow> {
        self.ring.pending()
    }

    /// Takes the next request out. [`pending`](Self::pending) has said that there is one.
    pub fn pop(&mut self) -> Entry {
        self.counters.requests += 1;
        self.ring.pop()
    }

    /// Puts a response in, not yet visible.
    pub fn respond(&mut self, response: Response) {
        self.counters.responses += 1;
        self.counters.errors += u64::from(response.status != RSP_OKAY);
        self.ring.push(response);
    }

    /// The same for a request that makes no sense.
    pub fn refuse(&mut self, response: Response) {
        self.counters.malformed += 1;
        self.respond(response);
    }

    /// Makes the responses visible. True: the client is to be notified.
    pub fn publish(&mut self) -> bool {
        let notify = self.ring.unpublished() && self.ring.publish();
        self.counters.kicks_out += u64::from(notify);
        notify
    }

    /// Whether there is something to take.
    pub fn ready(&self) -> bool {
        self.ring.pending() != Ok(0)
    }

    /// Asks for a notification; true: something is there already.
    pub fn arm(&mut self) -> bool {
        self.ring.arm()
    }

    /// Asks for a notification when `count` requests are there; true: they are there already.
    pub fn arm_at(&mut self, count: u32) -> bool {
        self.ring.arm_at(count)
    }

    /// Entries of the ring.
    pub fn entries(&self) -> u32 {
        self.ring.shared().entries()
    }

    /// The ring's indices.
    pub fn indices(&self) -> Indices {
        self.ring.indices()
    }
}

/// Doorbells without a request, one after the other, after which a client's doorbell is left alone for a while.
const IDLE_KICKS_MAX: u32 = 1000;
/// That while, in ns.
pub const MUTE: u64 = 10_000_000;

/// Finds out a client that rings its doorbell for nothing.
#[derive(Debug, Default)]
pub struct Doorbell {
    kicked: bool,
    idle_kicks: u32,
}

impl Doorbell {
    /// It was rung.
    pub fn ring(&mut self, counters: &mut Counters) {
        self.kicked = true;
        counters.kicks_in += 1;
    }

    /// The client's requests were looked at, and so many were there. True: it rang for nothing too often.
    pub fn storm(&mut self, there: u32, counters: &mut Counters) -> bool {
        if !std::mem::take(&mut self.kicked) && there == 0 {
            return false;
        }
        if there > 0 {
            self.idle_kicks = 0;
            return false;
        }
        counters.kicks_idle += 1;
        self.idle_kicks += 1;
        let storm = self.idle_kicks >= IDLE_KICKS_MAX;
        if storm {
            self.idle_kicks = 0;
        }
        storm
    }
}

/// A ring being served, whose requests name memory that we can use as it is.
#[derive(Debug)]
pub struct RingQueue {
    ring: CountedRing,
    limits: Limits,
    /// Id and operation of each request that is taken and not answered.
    pending: Vec<(u64, u8)>,
    free: Vec<u16>,
    segments: Vec<Segment>,
}

impl RingQueue {
    /// Serves `ring`.
    pub fn new(ring: BackRing, limits: Limits) -> RingQueue {
        let ring = CountedRing::new(ring);
        RingQueue {
            pending: vec![(0, 0); ring.entries() as usize],
            free: (0..ring.entries() as u16).rev().collect(),
            segments: Vec::with_capacity(limits.indirect_segments.max(super::wire::MAX_SEGMENTS)),
            ring,
            limits,
        }
    }

    /// The ring.
    pub fn ring(&self) -> &CountedRing {
        &self.ring
    }

    /// The ring.
    pub fn ring_mut(&mut self) -> &mut CountedRing {
        &mut self.ring
    }

    /// Moves requests from the ring to `intake`, at most one ring full, while there is room. A request is tagged with
    /// `tag` plus its place here, which is below 2^16. Gives the number taken.
    pub fn pull(&mut self, intake: &mut Intake, pages: &impl Pages, tag: u64) -> Result<u32, Overflow> {
        let count = self.ring.pending()?;
        for taken in 0..count {
            if intake.room() == 0 {
                return Ok(taken);
            }
            self.take(intake, pages, tag);
        }
        Ok(count)
    }

    fn take(&mut self, intake: &mut Intake, pages: &impl Pages, tag: u64) {
        let entry = self.ring.pop();
        let (id, operation) = (entry.id(), response_operation(&entry));
        let read_page =
            |gref, to: &mut [u8]| pages.offset(gref).map(|offset| pages.memory().read(offset, to)).is_some();
        let Limits { indirect_segments, sector_size } = self.limits;
        let parsed = parse(&entry, indirect_segments, sector_size, &mut self.segments, read_page);
        let filled = parsed.and_then(|command| {
            let request = intake.vacant().ok_or(super::wire::RSP_ERROR)?;
            (request.op, request.offset, request.len) = (command.op, command.offset, command.len);
            if !self.segments.is_empty() {
                let mut data =
                    request.payload.within(pages.memory()).map_err(|TooScattered| super::wire::RSP_ERROR)?;
                for segment in &self.segments {
                    let page = pages.offset(segment.gref).ok_or(super::wire::RSP_ERROR)?;
                    let (first, last) = (u32::from(segment.first_sect), u32::from(segment.last_sect));
                    let (offset, len) = (page + first as usize * 512, (last + 1 - first) * 512);
                    data.push(offset, len).map_err(|TooScattered| super::wire::RSP_ERROR)?;
                }
            }
            let place = self.free.pop().ok_or(super::wire::RSP_ERROR)?;
            self.pending[usize::from(place)] = (id, operation);
            request.tag = tag + u64::from(place);
            Ok(())
        });
        match filled {
            Ok(()) => intake.accept(),
            Err(status) => {
                intake.give_up();
                self.ring.refuse(Response { id, operation, status });
            }
        }
    }

    /// Answers the request at `place`.
    pub fn answer(&mut self, place: u16, request: &Request) {
        let (id, operation) = self.pending[usize::from(place)];
        self.free.push(place);
        self.ring.respond(Response { id, operation, status: status(request.result()) });
    }

    /// Requests that are taken and not answered.
    pub fn in_flight(&self) -> usize {
        self.pending.len() - self.free.len()
    }
}
