//! A queue with requests in flight: slots with their own data pages, ready-made entries, batches, and sleep.
//!
//! Nothing is allocated for a request.

use std::hint::spin_loop;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tapdisk::client::{Client, Disk, Limits, Options, Queue, Wake};
use tapdisk::frontend::blkif::wire::{
    Entry, MAX_INDIRECT_PAGES, MAX_SEGMENTS, OP_DISCARD, OP_FLUSH_DISKCACHE, OP_INDIRECT, OP_READ, OP_WRITE,
    RSP_EOPNOTSUPP, RSP_OKAY, SEGMENT_SIZE, SEGMENTS_PER_PAGE, Segment,
};
use tapdisk::sys::memory::{Memory, PAGE_SIZE};

use super::args::Connection;
use super::{Failure, client};

/// Until when a lane looks at its ring before sleeping, if nothing else is said.
const SPIN_DEFAULT: Duration = Duration::from_micros(20);

/// Below this it is not worth to look at all.
const SPIN_LEAST: Duration = Duration::from_micros(1);

/// At the rate of late, the answers that a sleep is for come within this time.
const SOON: Duration = Duration::from_micros(30);

/// How long to try again where the server has too many clients: it may not have seen yet that one has left.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Read,
    Write,
    Flush,
    Discard,
}

impl Op {
    /// For messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
            Op::Discard => "discard",
        }
    }

    fn code(self) -> u8 {
        match self {
            Op::Read => OP_READ,
            Op::Write => OP_WRITE,
            Op::Flush => OP_FLUSH_DISKCACHE,
            Op::Discard => OP_DISCARD,
        }
    }
}

/// The most bytes that an entry can describe.
pub(super) const MAX_REQUEST: u32 = (MAX_INDIRECT_PAGES * SEGMENTS_PER_PAGE * PAGE_SIZE) as u32;

/// The most bytes that a request to this server can have.
pub(super) fn max_request(limits: &Limits) -> u32 {
    let segments = (limits.indirect_segments as usize).max(MAX_SEGMENTS);
    segments.saturating_mul(PAGE_SIZE).min(MAX_REQUEST as usize) as u32
}

/// Pages that a request of up to `len` bytes needs: of data, and to describe them.
fn pages(len: u32) -> (u32, u32) {
    let data = len.div_ceil(PAGE_SIZE as u32);
    let direct = data as usize <= MAX_SEGMENTS;
    (data, if direct { 0 } else { data.div_ceil(SEGMENTS_PER_PAGE as u32) })
}

/// The rings that lanes of `depth` requests of up to `len` bytes need.
pub(super) fn options(abi: super::args::AbiName, queues: u32, depth: u32, len: u32, order: Option<u32>) -> Options {
    let abi = abi.into();
    let (data, indirect) = pages(len);
    let fits = |order: &u32| tapdisk::frontend::blkif::wire::Abi::entries(abi, *order) >= depth;
    let ring_page_order = order.or_else(|| (0..=8).find(fits)).unwrap_or(8);
    Options { abi, ring_page_order, queues, data_pages: depth * (data + indirect) }
}

/// Connects, and checks that requests of `len` bytes are possible.
pub(super) fn connect(connection: &Connection, options: &Options, len: u32) -> Result<Client, Failure> {
    let deadline = Instant::now() + PATIENCE;
    let client = loop {
        match Client::connect(&connection.socket, options) {
            Err(client::Error::Refused { errno: Errno::EBUSY, .. }) if Instant::now() < deadline => {
                std::thread::sleep(PATIENCE / 50);
            }
            other => break other?,
        }
    };
    let max = max_request(&client.disk.limits);
    if len > max {
        return Err(Failure::Usage(format!("requests of {len} bytes: the server takes up to {max}")));
    }
    Ok(client)
}

/// A request in flight, or room for one.
#[derive(Debug)]
struct Slot {
    /// The entry of the last request, but for its place. The next one is likely to be of the same kind.
    template: Entry,
    op: Op,
    len: u32,
    offset: u64,
    issued: u64,
    busy: bool,
    /// Of an indirect request, the segment that is shorter than a page.
    short: Option<u32>,
}

/// A request that is answered. Its data is in its slot until the next request is started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) slot: u32,
    pub(super) op: Op,
    /// First byte of the disk.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) len: u32,
    /// When it was started, as the caller said.
    pub(super) issued: u64,
    status: i16,
}

impl Done {
    /// Whether it succeeded.
    pub(super) fn ok(&self) -> bool {
        self.status == RSP_OKAY
    }

    /// Why not.
    pub(super) fn failure(&self) -> Failure {
        let status = match self.status {
            RSP_EOPNOTSUPP => "not supported",
            _ => "I/O error",
        };
        Failure::Refused { op: self.op.name(), offset: self.offset, len: self.len, status }
    }
}

/// A queue and what is in flight in it.
#[derive(Debug)]
pub(super) struct Lane {
    queue: Queue,
    slots: Box<[Slot]>,
    free: Vec<u32>,
    data_pages: u32,
    slot_pages: u32,
    timeout: Duration,
    spin: Spin,
    /// When it went to sleep last.
    slept: Instant,
    /// Answers since then.
    answers: u32,
}

impl Lane {
    /// For `depth` requests of up to `len` bytes; the queue was made with [`options`] for them. `spin` in µs.
    pub(super) fn new(queue: Queue, depth: u32, len: u32, timeout: Duration, spin: Option<u64>) -> Lane {
        let (data_pages, indirect) = pages(len);
        let slot = |_| Slot {
            template: Entry::new(queue.abi(), 0, 0),
            op: Op::Flush,
            len: u32::MAX,
            offset: 0,
            issued: 0,
            busy: false,
            short: None,
        };
        let slots = (0..depth).map(slot).collect();
        let slot_pages = data_pages + indirect;
        let mut lane = Lane {
            queue,
            slots,
            free: (0..depth).rev().collect(),
            data_pages,
            slot_pages,
            timeout,
            spin: spin.into(),
            slept: Instant::now(),
            answers: 0,
        };
        if indirect > 0 {
            for slot in 0..depth {
                for page in 0..data_pages {
                    lane.describe(slot, page, 7);
                }
            }
        }
        lane
    }

    /// The memory that data is in.
    pub(super) fn memory(&self) -> &Memory {
        self.queue.memory()
    }

    /// Where a slot's data begins in [`memory`](Self::memory), in bytes.
    pub(super) fn data_at(&self, slot: u32) -> usize {
        self.queue.page_at(slot * self.slot_pages)
    }

    /// Whether a request can be started.
    #[inline]
    pub(super) fn room(&self) -> bool {
        !self.free.is_empty()
    }

    /// The slot that the next [`start`](Self::start) takes, for a write's data. There is [`room`](Self::room).
    pub(super) fn next_slot(&self) -> u32 {
        self.free[self.free.len() - 1]
    }

    /// Requests in flight.
    #[inline]
    pub(super) fn outstanding(&self) -> u32 {
        (self.slots.len() - self.free.len()) as u32
    }

    /// Starts a request; the server sees it when it is published. There is [`room`](Self::room). `now` comes back with
    /// the answer.
    #[inline]
    pub(super) fn start(&mut self, op: Op, offset: u64, len: u32, now: u64) {
        let Some(index) = self.free.pop() else { unreachable!("a request was started without room") };
        let slot = &self.slots[index as usize];
        if slot.op != op || slot.len != len {
            self.rebuild(index, op, len);
        }
        let slot = &mut self.slots[index as usize];
        slot.offset = offset;
        slot.issued = now;
        slot.busy = true;
        self.queue.ring.push(&slot.template.with_sector(offset / 512));
    }

    /// Makes what was started visible, and wakes the server if it sleeps.
    pub(super) fn publish(&mut self) -> Result<(), Failure> {
        self.queue.publish()?;
        Ok(())
    }

    /// The next answer, if there is one.
    #[inline]
    pub(super) fn reap(&mut self) -> Result<Option<Done>, Failure> {
        let Some(response) = self.queue.ring.pop() else { return Ok(None) };
        let slot = usize::try_from(response.id).ok().and_then(|id| self.slots.get_mut(id)).filter(|slot| slot.busy);
        let Some(slot) = slot else {
            return Err(Failure::Protocol(format!("{response:?} answers nothing that was asked")));
        };
        if response.operation != slot.op.code() {
            return Err(Failure::Protocol(format!("{response:?} answers a {}", slot.op.name())));
        }
        slot.busy = false;
        self.answers = self.answers.wrapping_add(1);
        let index = response.id as u32;
        self.free.push(index);
        let Slot { op, offset, len, issued, .. } = *slot;
        Ok(Some(Done { slot: index, op, offset, len, issued, status: response.status }))
    }

    /// Waits for answers. Something must be in flight, and published.
    pub(super) fn wait(&mut self) -> Result<(), Failure> {
        let ring = &self.queue.ring;
        if ring.ready() || self.spin.until(|| ring.ready()) {
            return Ok(());
        }
        let batch = self.batch();
        while !self.queue.ring.arm_at(batch) {
            match self.queue.wait(Some(self.timeout))? {
                Wake::Called => {}
                _ if self.queue.ring.ready() => {}
                Wake::HungUp => return Err(client::Error::HungUp.into()),
                Wake::TimedOut => {
                    let outstanding = self.outstanding();
                    return Err(Failure::Silence { seconds: self.timeout.as_secs_f64(), outstanding });
                }
            }
        }
        Ok(())
    }

    /// For how many answers to sleep. One of many is not worth a wake-up, which costs both sides more than the answer
    /// itself; but they are to be seen soon, or a slow disk would seem slower than it is. What is in flight is answered
    /// whatever we do, so this many will come.
    fn batch(&mut self) -> u32 {
        let now = Instant::now();
        let since = now.duration_since(self.slept).as_nanos().max(1);
        let soon = u128::from(self.answers) * SOON.as_nanos() / since;
        (self.slept, self.answers) = (now, 0);
        soon.clamp(1, u128::from((self.outstanding() / 4).max(1))) as u32
    }

    fn rebuild(&mut self, index: u32, op: Op, len: u32) {
        let (abi, first) = (self.queue.abi(), index * self.slot_pages);
        let count = len.div_ceil(PAGE_SIZE as u32);
        let last_sect = |page: u32| ((len - page * PAGE_SIZE as u32).min(PAGE_SIZE as u32) / 512 - 1) as u8;
        let id = u64::from(index);
        let template = match op {
            Op::Flush => Entry::new(abi, OP_FLUSH_DISKCACHE, id),
            Op::Discard => Entry::new(abi, OP_DISCARD, id).with_discard(0, u64::from(len) / 512),
            Op::Read | Op::Write if count as usize <= MAX_SEGMENTS => {
                let mut segments = [Segment { gref: 0, first_sect: 0, last_sect: 0 }; MAX_SEGMENTS];
                for (segment, page) in segments.iter_mut().zip(0..count) {
                    *segment = Segment { gref: first + page, first_sect: 0, last_sect: last_sect(page) };
                }
                Entry::new(abi, op.code(), id).with_segments(count as u8, &segments[..count as usize])
            }
            Op::Read | Op::Write => {
                // The pages have been described once as whole ones; only the last can be another.
                if let Some(page) = self.slots[index as usize].short.take() {
                    self.describe(index, page, 7);
                }
                if last_sect(count - 1) != 7 {
                    self.describe(index, count - 1, last_sect(count - 1));
                    self.slots[index as usize].short = Some(count - 1);
                }
                let mut grefs = [0; MAX_INDIRECT_PAGES];
                for (gref, page) in grefs.iter_mut().zip(0..) {
                    *gref = first + self.data_pages + page;
                }
                let described = (count as usize).div_ceil(SEGMENTS_PER_PAGE);
                Entry::new(abi, OP_INDIRECT, id).with_indirect(op.code(), count as u16, &grefs[..described])
            }
        };
        let slot = &mut self.slots[index as usize];
        (slot.template, slot.op, slot.len) = (template, op, len);
    }

    /// Writes the description of a data page, numbered within its slot, into the slot's indirect pages.
    fn describe(&mut self, slot: u32, page: u32, last_sect: u8) {
        let first = slot * self.slot_pages;
        let at = self.queue.page_at(first + self.data_pages) + page as usize * SEGMENT_SIZE;
        let segment = Segment { gref: first + page, first_sect: 0, last_sect };
        self.queue.memory().write(at, &segment.to_bytes());
    }
}

/// How long to look before sleeping. Looking in vain is CPU time lost, and worse where the server waits for the very CPU
/// that looks. So it goes on only while it finds something, and once in a while it is tried again.
#[derive(Debug)]
struct Spin {
    max: Duration,
    now: Duration,
    adapts: bool,
    /// Sleeps since it was given up.
    sleeps: u32,
}

/// Sleeps after which looking is tried again.
const SLEEPS_UNTIL_TRIED: u32 = 64;

impl From<Option<u64>> for Spin {
    fn from(micros: Option<u64>) -> Spin {
        let max = micros.map_or(SPIN_DEFAULT, Duration::from_micros);
        Spin { max, now: max, adapts: micros.is_none(), sleeps: 0 }
    }
}

impl Spin {
    /// Looks until `ready`; false: it is time to sleep.
    fn until(&mut self, ready: impl Fn() -> bool) -> bool {
        if !self.now.is_zero() {
            let began = Instant::now();
            loop {
                for _ in 0..16 {
                    if ready() {
                        self.now = self.max;
                        return true;
                    }
                    spin_loop();
                }
                if began.elapsed() >= self.now {
                    break;
                }
            }
        }
        if self.adapts {
            self.in_vain();
        }
        false
    }

    fn in_vain(&mut self) {
        if self.now > SPIN_LEAST {
            self.now /= 2;
            return;
        }
        self.now = Duration::ZERO;
        self.sleeps += 1;
        if self.sleeps == SLEEPS_UNTIL_TRIED {
            self.sleeps = 0;
            self.now = self.max;
        }
    }
}

/// What is wrong with a request size for this disk.
pub(super) fn check_size(disk: &Disk, bytes: u64) -> Result<(), Failure> {
    if bytes.is_multiple_of(u64::from(disk.sector_size)) {
        return Ok(());
    }
    Err(Failure::Usage(format!("{bytes} bytes are no whole sectors: the disk's are of {} bytes", disk.sector_size)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_is_given_up_where_it_finds_nothing_and_tried_again() {
        let mut spin = Spin::from(None);
        assert!(spin.until(|| true));
        assert!(!(0..20).any(|_| spin.until(|| false)));
        assert!(!spin.until(|| true), "it does not even look");
        assert!((0..SLEEPS_UNTIL_TRIED).any(|_| spin.until(|| true)));
        assert_eq!(spin.now, SPIN_DEFAULT);
        let mut fixed = Spin::from(Some(1));
        assert!(!(0..100).any(|_| fixed.until(|| false)));
        assert!(fixed.until(|| true));
        assert!(!Spin::from(Some(0)).until(|| true));
    }

    #[test]
    fn a_request_has_pages_for_its_data_and_for_their_description() {
        assert_eq!(pages(512), (1, 0));
        assert_eq!(pages(11 * 4096), (11, 0));
        assert_eq!(pages(11 * 4096 + 512), (12, 1));
        assert_eq!(pages(513 * 4096), (513, 2));
        let limits = |indirect_segments| Limits { indirect_segments, ..Limits::default() };
        assert_eq!(max_request(&limits(0)), 45_056);
        assert_eq!(max_request(&limits(256)), 1 << 20);
        assert_eq!(max_request(&limits(u32::MAX)), 16 << 20, "what an entry can describe");
        let options = options(super::super::args::AbiName::Native, 2, 33, 4096, None);
        assert_eq!((options.ring_page_order, options.data_pages), (1, 33));
    }
}
