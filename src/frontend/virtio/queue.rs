//! A ring being served: what has been taken and not answered, and what broke it.

use std::sync::Arc;

use super::guest::{Place, Regions};
use super::request::{Chain, Command, IOERR, Negotiated, OK, SERIAL};
use super::ring::{Broken, Layout, Ring, chain_max};
use crate::frontend::Intake;
use crate::frontend::blkif::queue::Counters;
use crate::payload::{Arena, Run};
use crate::request::{Op, Payload, Request};
use crate::sys::memory::Memory;

/// Requests at a time whose data is not aligned as the image's file wants it.
const BOUNCES: usize = 16;
/// Memory for their data, bytes; one that has more fails.
pub const BOUNCE_BYTES: usize = 4 << 20;
/// Descriptors that are looked at in one turn of a ring, and those of one chain.
const LOOKS_MAX: usize = 4096;
/// Bytes that are copied at a time.
const PIECE: usize = 4096;

/// A request that goes through memory of ours: its own memory is not aligned to sectors, which O_DIRECT asks for.
#[derive(Debug)]
struct Bounce {
    run: Run,
    /// Where its data is, in the guest's memory.
    places: Vec<(Arc<Memory>, usize, usize)>,
}

/// The memory for such requests of one client.
#[derive(Debug)]
pub struct Bounces {
    arena: Arena,
    /// Lists that are free, with room for `segments` places.
    free: Vec<Vec<(Arc<Memory>, usize, usize)>>,
    segments: usize,
    /// So many were needed.
    count: u64,
    /// A request waits for one to come back.
    short: bool,
}

enum Room {
    There(Bounce),
    /// When others have ended.
    Later,
    Never,
}

impl Bounces {
    /// For data of at most `segments` places.
    pub fn new(segments: usize) -> std::io::Result<Bounces> {
        Bounces::with_lists(segments, BOUNCES)
    }

    pub(super) fn with_lists(segments: usize, count: usize) -> std::io::Result<Bounces> {
        let free = (0..count).map(|_| Vec::with_capacity(segments)).collect();
        Ok(Bounces { arena: Arena::new(BOUNCE_BYTES)?, free, segments, count: 0, short: false })
    }

    /// Whether it has come to its end, until a request that has some of it ends: rings that wait for that have nothing to take till then.
    pub fn is_short(&self) -> bool {
        self.short
    }

    /// How many requests had to go through it.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Has a payload lie in memory of ours instead.
    fn take(&mut self, payload: &mut Payload, len: u64, copy: bool) -> Room {
        if len > BOUNCE_BYTES as u64 || payload.slice(0, len).count() > self.segments {
            return Room::Never;
        }
        self.short = true;
        let Some(mut places) = self.free.pop() else { return Room::Later };
        let Some(run) = self.arena.alloc(len as usize) else {
            self.free.push(places);
            return Room::Later;
        };
        self.short = false;
        places.extend(payload.slice(0, len).map(|(memory, offset, count)| (Arc::clone(memory), offset, count)));
        payload.set(self.arena.memory(), run.offset(), len as u32);
        self.count += 1;
        let bounce = Bounce { run, places };
        if copy {
            self.copy(&bounce, |(guest, at), (ours, offset), piece| {
                guest.read(at, piece);
                ours.write(offset, piece);
            });
        }
        Room::There(bounce)
    }

    fn copy(&self, bounce: &Bounce, mut each: impl FnMut((&Memory, usize), (&Memory, usize), &mut [u8])) {
        let mut piece = [0; PIECE];
        let mut offset = bounce.run.offset();
        for (memory, from, count) in &bounce.places {
            for at in (0..*count).step_by(PIECE) {
                let piece = &mut piece[..PIECE.min(count - at)];
                each((memory, from + at), (self.arena.memory(), offset), piece);
                offset += piece.len();
            }
        }
    }

    /// Its request has ended; what was read goes to the guest.
    fn give_back(&mut self, mut bounce: Bounce, read: bool) {
        if read {
            self.copy(&bounce, |(guest, at), (ours, offset), piece| {
                ours.read(offset, piece);
                guest.write(at, piece);
            });
        }
        self.short = false;
        bounce.places.clear();
        self.arena.free(bounce.run);
        self.free.push(bounce.places);
    }
}

/// A chain that is taken and not answered.
#[derive(Debug)]
struct Taken {
    status: Place,
    bounce: Option<Bounce>,
}

/// What all rings of a client have in common.
pub struct Client<'a> {
    /// The guest's memory.
    pub regions: &'a Regions,
    /// For data that is not aligned.
    pub bounces: &'a mut Bounces,
    /// What was negotiated.
    pub negotiated: Negotiated,
    /// The disk's.
    pub serial: &'a [u8; SERIAL],
}

/// A ring that is served.
#[derive(Debug)]
pub struct Queue {
    ring: Ring,
    chain: Chain,
    /// By the first descriptor.
    taken: Box<[Option<Taken>]>,
    in_flight: usize,
    /// The next one waits for memory that others bounce in.
    waits: bool,
    broken: Option<Broken>,
    /// What was counted.
    pub counters: Counters,
}

impl Queue {
    /// Serves the ring at `layout` from the chain `base` on.
    pub fn new(layout: Layout, base: u16) -> Queue {
        let size = layout.size;
        Queue {
            ring: Ring::new(layout, base),
            chain: Chain::new(chain_max(size)),
            taken: (0..size).map(|_| None).collect(),
            in_flight: 0,
            waits: false,
            broken: None,
            counters: Counters::default(),
        }
    }

    /// The ring.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Chains that are taken and not answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Why it is not served any more.
    pub fn broken(&self) -> Option<Broken> {
        self.broken
    }

    /// Moves requests from the ring to `intake`, at most one ring full, while there is room. A request is tagged with `tag` plus its first
    /// descriptor. Gives how many there were. An error, given once, has broken the ring.
    pub fn pull(&mut self, intake: &mut Intake, client: &mut Client, tag: u64) -> Result<u32, Broken> {
        if self.broken.is_some() {
            return Ok(0);
        }
        let pulled = self.pull_all(intake, client, tag);
        self.broken = pulled.err();
        pulled
    }

    fn pull_all(&mut self, intake: &mut Intake, client: &mut Client, tag: u64) -> Result<u32, Broken> {
        let count = self.ring.pending()?;
        // What is answered at once takes no slot: it is only so much at a time, for those who wait behind it.
        let mut looks = LOOKS_MAX;
        self.waits = false;
        for taken in 0..count {
            if intake.room() == 0 || looks == 0 || !self.take(intake, client, tag)? {
                return Ok(taken.into());
            }
            looks = looks.saturating_sub(self.chain.buffers.len());
        }
        Ok(count.into())
    }

    /// Takes the next chain. False: it has to wait until others have ended.
    fn take(&mut self, intake: &mut Intake, client: &mut Client, tag: u64) -> Result<bool, Broken> {
        let head = self.ring.head()?;
        if self.taken[usize::from(head)].is_some() {
            return Err(Broken::InUse(head));
        }
        self.ring.chain(head, client.regions, &mut self.chain.buffers)?;
        self.chain.measure();
        let status = self.chain.status(client.regions)?;
        let command = self.chain.command(client.regions, client.negotiated)?;
        let (result, written) = match command {
            Command::Disk(op, offset, len) => {
                match self.fill(intake, client, (op, offset, len), tag + u64::from(head))? {
                    Filled::Later => {
                        self.waits = client.bounces.is_short();
                        return Ok(false);
                    }
                    Filled::Refused => (IOERR, 0),
                    Filled::Taken(bounce) => {
                        intake.accept();
                        self.taken[usize::from(head)] = Some(Taken { status, bounce });
                        self.in_flight += 1;
                        self.ring.advance();
                        self.counters.requests += 1;
                        return Ok(true);
                    }
                }
            }
            Command::Serial => (OK, self.chain.put_serial(client.regions, client.serial)?),
            Command::Status(status) => (status, 0),
        };
        self.ring.advance();
        self.counters.requests += 1;
        self.counters.malformed += u64::from(result != OK);
        self.end(head, &status, result, written);
        Ok(true)
    }

    fn fill(
        &self,
        intake: &mut Intake,
        client: &mut Client,
        (op, offset, len): (Op, u64, u64),
        tag: u64,
    ) -> Result<Filled, Broken> {
        let sector = u64::from(intake.disk.sector_size);
        let Some(request) = intake.vacant() else { return Ok(Filled::Later) };
        (request.op, request.offset, request.len, request.tag) = (op, offset, len, tag);
        let filled = match self.chain.data(client.regions, op, &mut request.payload) {
            Err(broken) => Err(broken),
            Ok(Err(_)) => Ok(Filled::Refused),
            Ok(Ok(())) => {
                let aligned = request
                    .payload
                    .slice(0, u64::MAX)
                    .all(|(_, offset, count)| (offset | count) & (sector as usize - 1) == 0);
                // What is no whole number of sectors the disk refuses.
                if aligned || len % sector != 0 {
                    Ok(Filled::Taken(None))
                } else {
                    Ok(match client.bounces.take(&mut request.payload, len, op != Op::Read) {
                        Room::There(bounce) => Filled::Taken(Some(bounce)),
                        Room::Later => Filled::Later,
                        Room::Never => Filled::Refused,
                    })
                }
            }
        };
        if !matches!(filled, Ok(Filled::Taken(_))) {
            intake.give_up();
        }
        filled
    }

    /// A request of this ring has ended.
    pub fn answer(&mut self, head: u16, request: &Request, bounces: &mut Bounces) {
        let Some(Taken { status, bounce }) = self.taken.get_mut(usize::from(head)).and_then(Option::take) else {
            debug_assert!(false, "{head} is not taken");
            return;
        };
        self.in_flight -= 1;
        let done = request.result().is_ok();
        let read = done && request.op == Op::Read;
        if let Some(bounce) = bounce {
            bounces.give_back(bounce, read);
        }
        let written = if read { request.len as u32 } else { 0 };
        self.end(head, &status, if done { OK } else { IOERR }, written);
    }

    fn end(&mut self, head: u16, status: &Place, result: u8, written: u32) {
        status.memory.write(status.offset, &[result]);
        self.ring.answer(head, written + 1);
        self.counters.responses += 1;
        self.counters.errors += u64::from(result != OK);
    }

    /// Makes the answers visible. True: the driver is to be notified.
    pub fn publish(&mut self) -> bool {
        let notify = self.ring.publish();
        self.counters.kicks_out += u64::from(notify);
        notify
    }

    /// Whether there is something to take. `short`: as [`Bounces::is_short`] says; then what waits for them is not there.
    pub fn ready(&self, short: bool) -> bool {
        self.broken.is_none() && !(self.waits && short) && self.ring.pending() != Ok(0)
    }

    /// Asks for a notification; true: something is there already, as [`ready`](Self::ready) sees it.
    pub fn arm(&mut self, short: bool) -> bool {
        self.broken.is_none() && self.ring.arm() && !(self.waits && short)
    }

    /// Asks for none.
    pub fn disarm(&mut self) {
        self.ring.disarm();
    }
}

enum Filled {
    /// The intake's vacant request has all of it.
    Taken(Option<Bounce>),
    Refused,
    Later,
}
