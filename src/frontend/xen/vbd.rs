//! The virtual block device that a guest uses: its rings over granted pages, and the data on its way.
//!
//! A request's data is copied between the guest's pages and payload memory of ours (grant copy), so what the guest
//! does to its pages later touches nothing, and its pages are mapped nowhere. All copies of a turn go with one system
//! call for each direction.

use std::io;
use std::sync::Arc;

use serde::Serialize;
use slog::{Logger, warn};

use super::ring::{ConnectError, GuestRing, RingAt};
use crate::frontend::blkif::queue::{Counters, MUTE};
use crate::frontend::blkif::wire::{
    Abi, Entry, GrantRef, MAX_SEGMENTS, OP_INDIRECT, OP_READ, OP_WRITE, OP_WRITE_BARRIER, RSP_ERROR, Response,
    SEGMENT_SIZE, Segment,
};
use crate::frontend::blkif::{Command, parse, response_operation, status};
use crate::frontend::{Intake, gathered};
use crate::log::Limiter;
use crate::memory;
use crate::payload::{Arena, Run};
use crate::request::{Op, Request};
use crate::stats::now;
use crate::stats::shm::{GuestStatistics, Place};
use crate::sys::evtchn::{Evtchn, evtchn_port_t};
use crate::sys::gntdev::{CopyBatch, Gntdev, domid_t};
use crate::sys::memory::{Memory, PAGE_SIZE};

/// Indirect requests that are taken in one turn: each needs a page for its descriptors.
const INDIRECT_MAX: usize = 32;

/// Sizes of a vbd.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Segments of an indirect request, 256 at most: they fit into one page.
    pub indirect_segments: usize,
    /// Bytes of payload memory; the largest request must fit.
    pub buffers: usize,
    /// Requests that are taken and not answered.
    pub requests: usize,
    /// How long requests and answers may wait for more of them, where many are in flight; ns.
    pub gather_ns: u64,
}

impl Limits {
    /// Memory that a vbd has from the start, bytes.
    pub fn bytes(&self) -> usize {
        let segments = self.indirect_segments.max(MAX_SEGMENTS) * size_of::<Segment>();
        self.buffers + INDIRECT_MAX * PAGE_SIZE + self.requests * (size_of::<Flight>() + segments)
    }
}

/// What a guest says of its rings, and the toolstack of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The guest.
    pub domain: domid_t,
    /// The layout of its rings.
    pub abi: Abi,
    /// One for each queue.
    pub rings: Vec<RingAt>,
    /// The guest may not write, whatever the image allows.
    pub read_only: bool,
    /// The rings have been in use: nothing may be left half done in them.
    pub live: bool,
}

/// A request that is taken and not answered.
#[derive(Debug)]
struct Flight {
    /// The connection that it came by.
    connection: u64,
    queue: usize,
    id: u64,
    operation: u8,
    command: Command,
    /// Where its data is, its segments one behind the other.
    run: Option<Run>,
    segments: Vec<Segment>,
}

/// A request on its way from the ring to the disk, or from the disk to the ring.
#[derive(Clone, Copy, Debug)]
struct Passing {
    flight: u16,
    /// Status so far.
    status: Result<(), i16>,
    /// Its copies in the batch: first and number.
    copies: (usize, usize),
}

impl Passing {
    /// Its status after its copies in `batch` were carried out.
    fn copied(&self, batch: &CopyBatch, counters: &mut VbdCounters) -> Result<(), i16> {
        let (first, count) = self.copies;
        if batch.done(first, count) {
            return self.status;
        }
        counters.copy_errors += 1;
        Err(RSP_ERROR)
    }
}

/// What was counted of all guests.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct VbdCounters {
    /// Guests that have connected.
    pub connections: u64,
    /// Grant copies: system calls.
    pub copy_calls: u64,
    /// Grant copies: segments.
    pub copy_segments: u64,
    /// Grant copies: time, ns. No other way to the guest's data could save more than that.
    pub copy_ns: u64,
    /// Requests whose copy failed: the grant was bad, foreign or revoked.
    pub copy_errors: u64,
    /// Requests that waited for payload memory.
    pub starved: u64,
    /// Rings that broke the protocol.
    pub broken: u64,
}

/// A guest that is connected.
struct Guest {
    domain: domid_t,
    read_only: bool,
    rings: Vec<GuestRing>,
}

/// The vbd: at most one guest at a time.
pub struct Vbd {
    gntdev: Gntdev,
    evtchn: Arc<Evtchn>,
    limits: Limits,
    sector_size: u32,
    arena: Arena,
    /// Where indirect requests' descriptors are copied to.
    descriptors: Run,
    incoming: CopyBatch,
    outgoing: CopyBatch,
    flights: Vec<Flight>,
    free: Vec<u16>,
    /// Taken in this turn.
    taken: Vec<(Entry, Passing)>,
    /// Done in this turn.
    done: Vec<Passing>,
    guest: Option<Guest>,
    /// The queue that is asked first, in this turn.
    first: usize,
    /// Until when a few requests wait for more, ns of [`now`].
    gathers_until: Option<u64>,
    /// Requests were taken or answered since the rings were armed.
    moving: bool,
    /// A request waits for payload memory, and none has come back since.
    starved: bool,
    /// Why the guest had to be let go.
    broken: Option<String>,
    counters: VbdCounters,
    /// Of the rings of guests that are gone.
    past: Counters,
    /// When the rings are to be looked at though no event comes, ns of [`now`].
    wake_at: Option<u64>,
    /// Of the guest, for xentop.
    statistics: GuestStatistics,
    limiter: Limiter,
    log: Logger,
}

/// Pages that a request's data takes at most, from the number of its segments.
fn pages(entry: &Entry, limits: &Limits) -> usize {
    match entry.operation() {
        OP_INDIRECT if entry.indirect_count() <= limits.indirect_segments => entry.indirect_count(),
        OP_READ | OP_WRITE | OP_WRITE_BARRIER if entry.segment_count() <= MAX_SEGMENTS => entry.segment_count(),
        // It has no data, or is refused.
        _ => 0,
    }
}

impl Vbd {
    /// Opens Xen's devices and makes all memory.
    pub fn new(limits: Limits, sector_size: u32, log: Logger) -> Result<Vbd, ConnectError> {
        let explain = |path, module| move |error| ConnectError::Device { path, module, error };
        let gntdev = Gntdev::open().map_err(explain(crate::sys::gntdev::PATH, "xen-gntdev"))?;
        let evtchn = Evtchn::open().map_err(explain(crate::sys::evtchn::PATH, "xen-evtchn"))?;
        let descriptor_bytes = INDIRECT_MAX * PAGE_SIZE;
        let mut arena = Arena::new(limits.buffers + descriptor_bytes).map_err(ConnectError::Memory)?;
        let none = || ConnectError::Memory(io::ErrorKind::OutOfMemory.into());
        let descriptors = arena.alloc(descriptor_bytes).ok_or_else(none)?;
        // Each copy fills at least a part of a page that is lent out.
        let copies = limits.buffers / PAGE_SIZE;
        let flight = || Flight {
            connection: 0,
            queue: 0,
            id: 0,
            operation: 0,
            command: Command { op: Op::Flush, offset: 0, len: 0 },
            run: None,
            segments: Vec::with_capacity(limits.indirect_segments.max(MAX_SEGMENTS)),
        };
        Ok(Vbd {
            gntdev,
            evtchn: Arc::new(evtchn),
            limits,
            sector_size,
            incoming: CopyBatch::new(Arc::clone(arena.memory()), copies.max(INDIRECT_MAX)),
            outgoing: CopyBatch::new(Arc::clone(arena.memory()), copies),
            arena,
            descriptors,
            flights: std::iter::repeat_with(flight).take(limits.requests).collect(),
            free: (0..limits.requests as u16).rev().collect(),
            taken: Vec::with_capacity(limits.requests),
            done: Vec::with_capacity(limits.requests),
            guest: None,
            first: 0,
            gathers_until: None,
            moving: false,
            starved: false,
            broken: None,
            counters: VbdCounters::default(),
            past: Counters::default(),
            wake_at: None,
            statistics: GuestStatistics::default(),
            limiter: Limiter::default(),
            log,
        })
    }

    /// Shows the statistics of the guests to come in that place.
    pub fn show_statistics(&mut self, place: Place) {
        self.statistics.set_place(place);
    }

    /// What an event says that a guest has sent one.
    pub fn evtchn(&self) -> &Evtchn {
        &self.evtchn
    }

    /// The payloads'.
    pub fn memory(&self) -> &Arc<Memory> {
        self.arena.memory()
    }

    /// Maps a guest's rings and binds its event channels.
    pub fn connect(&mut self, connection: &Connection) -> Result<(), ConnectError> {
        self.disconnect();
        self.broken = None;
        memory::room(0).map_err(ConnectError::Memory)?;
        let domain = connection.domain;
        let connect = |at: &RingAt| GuestRing::connect(&self.gntdev, &self.evtchn, domain, connection.abi, at);
        let rings = connection.rings.iter().map(connect).collect::<Result<Vec<_>, _>>()?;
        if connection.live
            && let Some(at) = rings.iter().position(|ring| ring.ring.pending() != Ok(0))
        {
            return Err(ConnectError::HalfDone(at));
        }
        self.counters.connections += 1;
        self.statistics.connect(domain, &self.log);
        self.guest = Some(Guest { domain, read_only: connection.read_only, rings });
        Ok(())
    }

    /// Unmaps the guest's rings and gives its event channels back. What it had taken is finished, and not answered.
    pub fn disconnect(&mut self) {
        self.past = self.ring_counters();
        self.guest = None;
        self.statistics.disconnect();
        self.starved = false;
    }

    /// Requests that are taken and not answered, those of guests that are gone included.
    pub fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Whether requests are in flight of a guest that is gone.
    pub fn has_orphans(&self) -> bool {
        self.guest.is_none() && self.in_flight() > 0
    }

    /// Whether the request with that tag, which is in flight, is of a guest that is gone.
    pub fn is_orphan(&self, tag: u64) -> bool {
        self.guest.is_none() || self.flights[usize::from(tag as u16)].connection != self.counters.connections
    }

    /// Why the guest had to be let go, once.
    pub fn take_broken(&mut self) -> Option<String> {
        self.broken.take()
    }

    /// Whether there is something for [`take_broken`](Self::take_broken).
    pub fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// Takes the events that came. Their ports stay masked until [`arm`](Self::arm).
    pub fn events(&mut self) {
        let mut ports: [evtchn_port_t; 32] = [0; 32];
        loop {
            let count = match self.evtchn.pending(&mut ports) {
                Ok(count) => count,
                Err(error) => return warn!(self.log, "cannot read event channels"; "error" => %error),
            };
            let rings = self.guest.iter_mut().flat_map(|guest| &mut guest.rings);
            for ring in rings.filter(|ring| ports[..count].contains(&ring.port.number())) {
                ring.kicked();
            }
            if count < ports.len() {
                return;
            }
        }
    }

    /// Puts the guest's requests into `intake`, each tagged with `tag` plus its place here, which is below 2^16.
    pub fn pull(&mut self, intake: &mut Intake, tag: u64) {
        if self.gathers(intake.now) {
            return;
        }
        self.take(intake);
        if self.taken.is_empty() {
            return;
        }
        self.moving = true;
        self.copy_descriptors();
        self.parse_taken();
        self.copy(true);
        let mut taken = std::mem::take(&mut self.taken);
        for (_, passing) in taken.drain(..) {
            self.hand_over(intake, passing, tag);
        }
        self.taken = taken;
        self.incoming.clear();
    }

    /// Whether there are so few requests, with many in flight, that more are waited for.
    fn gathers(&mut self, now: u64) -> bool {
        let rings = self.guest.iter().flat_map(|guest| &guest.rings);
        let pending = rings.fold(0, |sum: usize, ring| match ring.ring.pending() {
            Ok(pending) if ring.held.is_none() => sum + pending as usize,
            // Not to be waited with.
            _ => usize::MAX / 2,
        });
        if pending == 0 || pending >= gathered(self.in_flight(), 2) {
            self.gathers_until = None;
            return false;
        }
        let until = *self.gathers_until.get_or_insert(now + self.limits.gather_ns);
        if now >= until {
            self.gathers_until = None;
        }
        self.gathers_until.is_some()
    }

    /// Takes requests out of the rings as long as there is room for them and their data.
    fn take(&mut self, intake: &Intake) {
        if self.starved {
            return;
        }
        let Some(mut guest) = self.guest.take() else { return };
        self.first = (self.first + 1) % guest.rings.len();
        let mut room = intake.room().min(self.free.len());
        let mut broken = None;
        for i in 0..guest.rings.len() {
            let index = (self.first + i) % guest.rings.len();
            let ring = &mut guest.rings[index];
            let before = self.taken.len();
            match ring.ring.pending() {
                Ok(pending) => {
                    let there = pending + u32::from(ring.held.is_some());
                    if !self.take_from(ring, index, room.min(there as usize)) {
                        room = 0;
                    }
                    if ring.doorbell.storm(there, &mut ring.ring.counters) {
                        ring.muted_until = Some(intake.now + MUTE);
                    }
                }
                Err(overflow) => broken = Some(format!("queue {index}: {overflow}")),
            }
            room = room.saturating_sub(self.taken.len() - before);
        }
        self.guest = Some(guest);
        if let Some(why) = broken {
            self.let_go(why);
        }
    }

    /// The guest broke the protocol: it is served no more, though what it had taken is finished.
    fn let_go(&mut self, why: String) {
        self.counters.broken += 1;
        while let Some((_, passing)) = self.taken.pop() {
            self.release(passing.flight);
        }
        self.disconnect();
        self.broken = Some(why);
    }

    /// Takes `count` requests from a ring. False: nothing more may be taken from any ring in this turn.
    fn take_from(&mut self, ring: &mut GuestRing, queue: usize, count: usize) -> bool {
        let mut indirect = self.taken.iter().filter(|(entry, _)| entry.operation() == OP_INDIRECT).count();
        for _ in 0..count {
            let Some(&number) = self.free.last() else { return false };
            let entry = ring.held.take().unwrap_or_else(|| ring.ring.pop());
            let pages = pages(&entry, &self.limits);
            indirect += usize::from(entry.operation() == OP_INDIRECT);
            let run = if pages > 0 { self.arena.alloc(pages * PAGE_SIZE) } else { None };
            self.starved = pages > 0 && run.is_none();
            if self.starved || indirect > INDIRECT_MAX {
                if self.starved {
                    self.counters.starved += 1;
                    self.statistics.out_of_memory();
                }
                run.into_iter().for_each(|run| self.arena.free(run));
                ring.held = Some(entry);
                return !self.starved;
            }
            self.free.pop();
            let flight = &mut self.flights[usize::from(number)];
            (flight.connection, flight.queue, flight.run) = (self.counters.connections, queue, run);
            (flight.id, flight.operation) = (entry.id(), response_operation(&entry));
            self.taken.push((entry, Passing { flight: number, status: Ok(()), copies: (0, 0) }));
            if entry.operation() == OP_WRITE_BARRIER {
                // What comes behind it must not be handed over before it is answered.
                return false;
            }
        }
        true
    }

    /// Copies the pages that describe the segments of indirect requests.
    fn copy_descriptors(&mut self) {
        let Some(guest) = &self.guest else { return };
        for (entry, passing) in &mut self.taken {
            let count = entry.indirect_count();
            if entry.operation() == OP_INDIRECT && self.flights[usize::from(passing.flight)].run.is_some() {
                let first = self.incoming.len();
                let to = self.descriptors.offset() + first * PAGE_SIZE;
                let len = (count * SEGMENT_SIZE) as u16;
                self.incoming.push_from(guest.domain, entry.indirect_page(0), 0, len, to);
                passing.copies = (first, 1);
            }
        }
        self.copy(true);
        for (_, passing) in &mut self.taken {
            passing.status = passing.copied(&self.incoming, &mut self.counters);
        }
        self.incoming.clear();
    }

    /// Finds out what is asked for, and which pages have the data of writes.
    fn parse_taken(&mut self) {
        let Some(guest) = &self.guest else { return };
        let memory = self.arena.memory();
        for (entry, passing) in &mut self.taken {
            let flight = &mut self.flights[usize::from(passing.flight)];
            let at = self.descriptors.offset() + passing.copies.0 * PAGE_SIZE;
            let copied = passing.copies.1 > 0 && passing.status.is_ok();
            let read_page = |_: GrantRef, to: &mut [u8]| {
                if copied {
                    memory.read(at, to);
                }
                copied
            };
            let max = self.limits.indirect_segments;
            passing.copies = (self.incoming.len(), 0);
            match parse(entry, max, self.sector_size, &mut flight.segments, read_page) {
                Err(status) => passing.status = Err(status),
                Ok(command) if command.op.writes() && guest.read_only => passing.status = Err(RSP_ERROR),
                Ok(command) => {
                    flight.command = command;
                    if matches!(command.op, Op::Write { .. } | Op::Barrier) {
                        for (segment, at) in placed(flight) {
                            let (offset, len) = extent(segment);
                            self.incoming.push_from(guest.domain, segment.gref, offset, len, at);
                        }
                        passing.copies.1 = self.incoming.len() - passing.copies.0;
                    }
                }
            }
        }
    }

    /// Carries a batch of copies out.
    fn copy(&mut self, incoming: bool) {
        let batch = if incoming { &mut self.incoming } else { &mut self.outgoing };
        if batch.is_empty() {
            return;
        }
        self.counters.copy_calls += 1;
        self.counters.copy_segments += batch.len() as u64;
        let begin = now();
        let result = self.gntdev.copy(batch);
        self.counters.copy_ns += now() - begin;
        if let Err(errno) = result
            && let Some(suppressed) = self.limiter.allow(now())
        {
            warn!(self.log, "grant copy failed"; "errno" => %errno, "suppressed_before" => suppressed);
        }
    }

    /// Gives a request to the disk, or answers it if it can't be done.
    fn hand_over(&mut self, intake: &mut Intake, passing: Passing, tag: u64) {
        let malformed = passing.status.is_err();
        let status = passing.copied(&self.incoming, &mut self.counters);
        let flight = &self.flights[usize::from(passing.flight)];
        let request = status.and_then(|()| intake.vacant().ok_or(RSP_ERROR));
        match request {
            Ok(request) => {
                (request.op, request.offset, request.len) =
                    (flight.command.op, flight.command.offset, flight.command.len);
                if let Some(run) = flight.run
                    && !flight.segments.is_empty()
                {
                    request.payload.set(self.arena.memory(), run.offset(), request.len as u32);
                }
                request.tag = tag + u64::from(passing.flight);
                self.statistics.submitted(request.op, request.len);
                intake.accept();
            }
            Err(status) => {
                self.statistics.failed();
                let response = Response { id: flight.id, operation: flight.operation, status };
                if let Some(ring) = self.guest.as_mut().and_then(|guest| guest.rings.get_mut(flight.queue)) {
                    if malformed { ring.ring.refuse(response) } else { ring.ring.respond(response) }
                }
                self.release(passing.flight);
            }
        }
    }

    /// A request is done.
    pub fn answer(&mut self, request: &Request) {
        let number = request.tag as u16;
        let flight = &self.flights[usize::from(number)];
        let Some(guest) = self.guest.as_ref().filter(|_| flight.connection == self.counters.connections) else {
            // Whoever asked for it is gone.
            return self.release(number);
        };
        self.statistics.answered(request);
        let first = self.outgoing.len();
        if request.op == Op::Read && request.error.is_none() {
            for (segment, at) in placed(flight) {
                let (offset, len) = extent(segment);
                self.outgoing.push_to(guest.domain, segment.gref, offset, len, at);
            }
        }
        let copies = (first, self.outgoing.len() - first);
        let status = status(request.result());
        self.done.push(Passing { flight: number, status: if status == 0 { Ok(()) } else { Err(status) }, copies });
    }

    /// Makes the answers of this turn visible, the data of reads first.
    pub fn publish(&mut self) {
        if !self.done.is_empty() {
            self.moving = true;
            self.copy(false);
            let mut done = std::mem::take(&mut self.done);
            for passing in done.drain(..) {
                self.respond(passing);
            }
            self.done = done;
            self.outgoing.clear();
        }
        self.statistics.publish();
        self.wake_at = None;
        for ring in self.guest.iter_mut().flat_map(|guest| &mut guest.rings) {
            if ring.ring.publish() {
                ring.port.notify();
            }
        }
    }

    fn respond(&mut self, passing: Passing) {
        let status = passing.copied(&self.outgoing, &mut self.counters);
        if status.is_err() {
            self.statistics.failed();
        }
        let flight = &self.flights[usize::from(passing.flight)];
        let response = Response { id: flight.id, operation: flight.operation, status: status.err().unwrap_or(0) };
        if let Some(ring) = self.guest.as_mut().and_then(|guest| guest.rings.get_mut(flight.queue)) {
            ring.ring.respond(response);
        }
        self.release(passing.flight);
    }

    /// Frees a request's place and payload memory.
    fn release(&mut self, number: u16) {
        if let Some(run) = self.flights[usize::from(number)].run.take() {
            self.arena.free(run);
            self.starved = false;
        }
        self.free.push(number);
    }

    /// Whether there is something to pull.
    pub fn ready(&self) -> bool {
        // Where payload memory is short, what frees it is an answer, and then the rings are looked at anyway.
        !self.starved
            && self.gathers_until.is_none()
            && self.guest.iter().flat_map(|guest| &guest.rings).any(|ring| ring.held.is_some() || ring.ring.ready())
    }

    /// Asks the guest to send events again. True: there is something to pull already.
    pub fn arm(&mut self) -> bool {
        let now = now();
        // With many requests in flight an answer comes soon, and with it a look at the rings: a few more can gather until
        // then. If none comes, the rings are looked at in a while, and then each request is worth an event again.
        let gathers = std::mem::take(&mut self.moving) && self.limits.gather_ns > 0;
        let count = if gathers { gathered(self.in_flight(), 2) as u32 } else { 1 };
        let rings = self.guest.iter_mut().flat_map(|guest| &mut guest.rings);
        let armed = rings.fold(false, |ready, ring| ring.arm(now, count) | ready);
        let muted = self.guest.iter().flat_map(|guest| &guest.rings).filter_map(|ring| ring.muted_until);
        let look = (count > 1).then_some(now + self.limits.gather_ns);
        self.wake_at = muted.chain(look).chain(self.gathers_until).min();
        let held = self.guest.iter().flat_map(|guest| &guest.rings).any(|ring| ring.held.is_some());
        !self.starved && self.gathers_until.is_none() && (armed || held)
    }

    /// When the rings are to be looked at though no event comes.
    pub fn deadline(&self) -> Option<u64> {
        self.wake_at
    }

    /// Counters of all rings of all guests together.
    pub fn ring_counters(&self) -> Counters {
        let rings = self.guest.iter().flat_map(|guest| &guest.rings);
        rings.fold(self.past, |sum, ring| sum + ring.ring.counters)
    }

    /// What STATS shows of a guest's device, in blktap's words.
    pub fn xenbus(&self, pool: &str, domain: domid_t, device: u32) -> serde_json::Value {
        let (rings, counters) = (self.ring_counters(), self.counters);
        let image = rings.errors.saturating_sub(rings.malformed + counters.copy_errors);
        serde_json::json!({
            "pool": pool,
            "domid": domain,
            "devid": device,
            "reqs": [rings.requests, rings.responses],
            "kicks": [rings.kicks_in, rings.kicks_out],
            "errors": {
                "msg": rings.malformed, "map": counters.copy_errors, "vbd": counters.broken, "img": image,
            },
        })
    }

    /// For debug-queue.
    pub fn inspect(&self) -> serde_json::Value {
        let rings = self.guest.iter().flat_map(|guest| &guest.rings);
        serde_json::json!({
            "connected": self.guest.is_some(),
            "domain": self.guest.as_ref().map(|guest| guest.domain),
            "read_only": self.guest.as_ref().map(|guest| guest.read_only),
            "in_flight": self.in_flight(),
            "payload_bytes": self.arena.lent() - INDIRECT_MAX * PAGE_SIZE,
            "starved": self.starved,
            "counters": self.counters,
            "queues": rings.map(GuestRing::inspect).collect::<Vec<_>>(),
        })
    }
}

/// Offset in its page and length of a segment, in bytes.
fn extent(segment: &Segment) -> (u16, u16) {
    let (first, last) = (u16::from(segment.first_sect), u16::from(segment.last_sect));
    (first * 512, (last + 1 - first) * 512)
}

/// The segments of a request, each with its place in payload memory.
fn placed(flight: &Flight) -> impl Iterator<Item = (&Segment, usize)> {
    let mut at = flight.run.map_or(0, |run| run.offset());
    flight.segments.iter().map(move |segment| {
        let here = at;
        at += usize::from(extent(segment).1);
        (segment, here)
    })
}
