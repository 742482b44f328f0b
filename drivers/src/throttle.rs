//! Throttle: a filter that lets no more than so many bytes and requests a second pass, with bursts.
//!
//! There are six token buckets: {read, write, all} x {bytes, requests}. Each has a rate, a burst, and credit, which refills by the time that
//! comes with what is asked, up to the burst. A request goes when all of its buckets have credit, and is charged in full then: so one that
//! is larger than a burst passes, the bucket is in debt, and the rate is exact over time. A bucket owes a part of a request at most (the
//! burst, or 1 MiB), because longer ones go in parts, but for what a [drain](Layer::drain) has let go.
//!
//! | operation | bytes | requests | |
//! |---|---|---|---|
//! | read | all | 1 | |
//! | write | all | 1 | |
//! | write-zeroes | all | 1 | storage may write them one by one |
//! | discard | none | 1 | no data moves, and one may be of a whole disk, which its bytes would stop for hours |
//! | flush | none | none | what was written is not to be at risk for longer; the writes before it were counted |
//! | locate | none | none | nothing is moved |
//!
//! What the disk or a layer does itself passes uncounted. A drain lets all pass that is held; it is charged, and paid back afterwards: a
//! pause is no way around a limit.
//!
//! # Fairness
//!
//! A bucket knows how much each frontend has had, its level. Who is ahead of another frontend leaves as much credit as it is ahead: so where
//! two always have requests, both get the same, also where one has a single request at a time and the other many. Of a frontend that is
//! slow of its own accord, only so much is left, and the rest is for the others: no rate is lost by it. Levels differ by 25 ms of the rate
//! and a request at most, and who has not asked for a while joins at the highest level of those who have: absence neither saves
//! up nor costs anything. There is no list of who waits, so none can become wrong by a request that goes away.

#![warn(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use std::num::NonZeroU64;

use crate::{Ask, Descent, Layer, Op, Origin, Plan};

/// Frontends that are told apart; those beyond share the last place.
const FRONTENDS: usize = 8;

/// For how long a frontend counts as busy after it has asked, or could have, ns.
const BUSY: u64 = 1_000_000_000;

/// A request is not cut in parts below that, bytes.
const PART_MIN: u64 = 1 << 20;

/// Credit is counted in units (bytes or requests) times this: a rate a second times nanoseconds, without remainder.
const SCALE: i128 = 1_000_000_000;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Requests, whatever their length.
    Requests,
}

impl Unit {
    /// The burst that goes with a rate if none is given: a tenth of a second, but some units at least.
    fn burst_of(self, rate: u64) -> u64 {
        (rate / 10).max(match self {
            Unit::Bytes => 64 << 10,
            Unit::Requests => 1,
        })
    }
}

/// What one bucket lets pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Units a second.
    pub rate: NonZeroU64,
    /// Units that go at once after a time without requests. None: a tenth of a second's, but one request or 64 KiB at least.
    pub burst: Option<NonZeroU64>,
}

impl Limit {
    /// The burst in force.
    pub fn burst(&self, unit: Unit) -> u64 {
        self.burst.map_or(unit.burst_of(self.rate.get()), NonZeroU64::get)
    }
}

/// The limits of some operations. None: there is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Of their bytes.
    pub bytes: Option<Limit>,
    /// Of their number.
    pub requests: Option<Limit>,
}

/// All limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of reads.
    pub read: Traffic,
    /// Of all that writes.
    pub write: Traffic,
    /// Of both together.
    pub all: Traffic,
}

impl Limits {
    fn each(&self) -> [Option<Limit>; BUCKETS.len()] {
        let Limits { read, write, all } = self;
        [read.bytes, read.requests, write.bytes, write.requests, all.bytes, all.requests]
    }
}

/// The buckets, by unit and by whether reads and whether writes count.
const BUCKETS: [(Unit, bool, bool); 6] = [
    (Unit::Bytes, true, false),
    (Unit::Requests, true, false),
    (Unit::Bytes, false, true),
    (Unit::Requests, false, true),
    (Unit::Bytes, true, true),
    (Unit::Requests, true, true),
];

/// Names of each bucket's counters: rate, burst, and what is owed.
const COUNTERS: [[&str; 3]; 6] = [
    ["read bytes/s", "read bytes burst", "read bytes owed"],
    ["read requests/s", "read requests burst", "read requests owed"],
    ["write bytes/s", "write bytes burst", "write bytes owed"],
    ["write requests/s", "write requests burst", "write requests owed"],
    ["bytes/s", "bytes burst", "bytes owed"],
    ["requests/s", "requests burst", "requests owed"],
];

/// A frontend, as a bucket sees it.
#[derive(Clone, Copy, Debug, Default)]
struct Share {
    /// What it has had, compared with the others; times [`SCALE`].
    level: i128,
    /// Until when it is expected to ask again.
    busy_until: Option<u64>,
}

impl Share {
    fn is_busy(&self, now: u64) -> bool {
        self.busy_until.is_some_and(|until| until >= now)
    }
}

#[derive(Clone, Debug)]
struct Bucket {
    rate: u64,
    burst: u64,
    /// What can go, times [`SCALE`]; less than 0: debt.
    credit: i128,
    /// When that was so. None: nobody has asked yet.
    at: Option<u64>,
    shares: [Share; FRONTENDS],
}

impl Bucket {
    fn new(limit: Limit, unit: Unit) -> Bucket {
        let (rate, burst) = (limit.rate.get(), limit.burst(unit));
        Bucket { rate, burst, credit: scaled(burst), at: None, shares: [Share::default(); FRONTENDS] }
    }

    /// The same with another limit: what is owed is owed, and what is more than the new burst is gone.
    fn set(&mut self, limit: Limit, unit: Unit) {
        (self.rate, self.burst) = (limit.rate.get(), limit.burst(unit));
        self.credit = self.credit.min(scaled(self.burst));
    }

    fn refill(&mut self, now: u64) {
        let at = self.at.unwrap_or(now);
        self.at = Some(at.max(now));
        // Of 64 bits each: the product has 128.
        let gained = u128::from(self.rate).saturating_mul(now.saturating_sub(at).into());
        let credit = self.credit.saturating_add(i128::try_from(gained).unwrap_or(i128::MAX));
        self.credit = credit.min(scaled(self.burst));
    }

    /// The other frontends that are busy.
    fn others(&self, index: usize, now: u64) -> impl Iterator<Item = &Share> {
        let others = self.shares.iter().enumerate().filter(move |(other, _)| *other != index);
        others.map(|(_, share)| share).filter(move |share| share.is_busy(now))
    }

    /// How much is left for each of so many others, at most. All of it is less than half of the burst, and of what comes in a twentieth of a
    /// second.
    fn left_most(&self, others: usize) -> i128 {
        let shares = i128::try_from(others).unwrap_or(i128::MAX).saturating_add(1).saturating_mul(2);
        let tenth = i128::from(self.rate).saturating_mul(SCALE / 10);
        scaled(self.burst).min(tenth).checked_div(shares).unwrap_or(0)
    }

    /// A frontend asks. If it was not busy, it joins those who are.
    fn join(&mut self, index: usize, now: u64) {
        let share = self.shares[index];
        if !share.is_busy(now) {
            let highest = self.others(index, now).map(|other| other.level).max();
            self.shares[index].level = highest.map_or(share.level, |highest| highest.max(share.level));
        }
    }

    /// Until when a frontend's request waits. None: it can go.
    fn wait(&self, index: usize, now: u64) -> Option<u64> {
        let most = self.left_most(self.others(index, now).count());
        let own = self.shares[index].level;
        let leads = self.others(index, now).map(|other| own.saturating_sub(other.level).clamp(0, most));
        let left = leads.fold(0, i128::saturating_add);
        // There has to be more than that.
        let short = left.saturating_sub(self.credit);
        let ns = short.checked_div(self.rate.into()).unwrap_or(i128::MAX).saturating_add(1);
        (short >= 0).then(|| now.saturating_add(u64::try_from(ns).unwrap_or(u64::MAX)))
    }

    fn charge(&mut self, index: usize, units: u64, now: u64) {
        self.credit = self.credit.saturating_sub(scaled(units));
        let most = self.left_most(self.others(index, now).count());
        // Who did not want what was left does not get it later; of what goes now, everybody has a share.
        let lowest = self.shares[index].level.saturating_sub(most);
        self.shares.iter_mut().for_each(|share| share.level = share.level.max(lowest));
        self.shares[index].level = self.shares[index].level.saturating_add(scaled(units));
    }

    /// Bytes of a request that go in one part. Where it is cut, it keeps the alignment of its beginning.
    fn part(&self) -> u64 {
        (self.burst & !(PART_MIN.saturating_sub(1))).max(PART_MIN)
    }
}

fn scaled(units: u64) -> i128 {
    i128::from(units).saturating_mul(SCALE)
}

/// The filter. It costs nothing as long as there is no limit.
#[derive(Clone, Debug, Default)]
pub struct Throttle {
    limits: Limits,
    /// As [`BUCKETS`].
    buckets: [Option<Bucket>; BUCKETS.len()],
    draining: bool,
}

impl Throttle {
    /// One with these limits.
    pub fn new(limits: Limits) -> Throttle {
        let mut throttle = Throttle::default();
        throttle.set(limits);
        throttle
    }

    /// The limits in force.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Sets the limits. A bucket that was there keeps its debt. What waits is to be asked again.
    pub fn set(&mut self, limits: Limits) {
        self.limits = limits;
        for ((bucket, limit), (unit, ..)) in self.buckets.iter_mut().zip(limits.each()).zip(BUCKETS) {
            match (&mut *bucket, limit) {
                (Some(bucket), Some(limit)) => bucket.set(limit, unit),
                (_, limit) => *bucket = limit.map(|limit| Bucket::new(limit, unit)),
            }
        }
    }

    /// Takes the place of another one, of the same disk, with its limits and debts.
    pub fn go_on_from(&mut self, before: &Throttle) {
        *self = Throttle { draining: self.draining, ..before.clone() };
    }

    /// The buckets that count an operation, brought to the time of the ask, each with the units that it counts.
    fn buckets(&mut self, ask: &Ask) -> impl Iterator<Item = (&mut Bucket, Unit, u64)> {
        let (bytes, requests) = (ask.extent.len, u64::from(ask.begins));
        let (op, now) = (ask.op, ask.now);
        self.buckets.iter_mut().zip(BUCKETS).filter_map(move |(bucket, (unit, reads, writes))| {
            let units = match (op, unit) {
                (Op::Read, _) if !reads => return None,
                (Op::Write | Op::WriteZeroes | Op::Discard, _) if !writes => return None,
                (Op::Flush | Op::Locate, _) | (Op::Discard, Unit::Bytes) => return None,
                (_, Unit::Bytes) => bytes,
                (_, Unit::Requests) => requests,
            };
            let bucket = bucket.as_mut().filter(|_| units > 0)?;
            bucket.refill(now);
            Some((bucket, unit, units))
        })
    }
}

/// The place of a frontend. None: nobody who is held back.
fn place(origin: Origin) -> Option<usize> {
    match origin {
        Origin::Frontend(number) => Some(usize::from(number).min(FRONTENDS.saturating_sub(1))),
        Origin::Disk | Origin::Layer(_) => None,
    }
}

impl Layer for Throttle {
    fn name(&self) -> &'static str {
        "throttle"
    }

    fn size(&self) -> Option<u64> {
        None
    }

    fn is_idle(&self) -> bool {
        self.buckets.iter().all(Option::is_none)
    }

    fn descends(&self) -> bool {
        true
    }

    fn plan(&mut self, ask: &Ask) -> Plan {
        let Some(index) = place(ask.origin).filter(|_| !self.draining) else {
            return Plan::Below { count: ask.extent.len };
        };
        let (mut until, mut count) = (None, ask.extent.len);
        for (bucket, unit, _) in self.buckets(ask) {
            bucket.join(index, ask.now);
            until = until.max(bucket.wait(index, ask.now));
            if unit == Unit::Bytes {
                count = count.min(bucket.part());
            }
        }
        // It may be asked again only then.
        let busy_until = until.unwrap_or(ask.now).saturating_add(BUSY);
        self.buckets(ask).for_each(|(bucket, ..)| bucket.shares[index].busy_until = Some(busy_until));
        match until {
            Some(_) => Plan::Wait { until },
            None => Plan::Below { count },
        }
    }

    fn descend(&mut self, ask: &Ask) -> Descent {
        if let Some(index) = place(ask.origin) {
            self.buckets(ask).for_each(|(bucket, _, units)| bucket.charge(index, units, ask.now));
        }
        Descent::default()
    }

    fn drain(&mut self, on: bool) {
        self.draining = on;
    }

    fn inspect(&self, show: &mut dyn FnMut(&'static str, u64)) {
        for (bucket, [rate, burst, owed]) in self.buckets.iter().zip(COUNTERS) {
            let Some(bucket) = bucket else { continue };
            show(rate, bucket.rate);
            show(burst, bucket.burst);
            let debt = bucket.credit.saturating_neg().max(0).checked_div(SCALE).unwrap_or(0);
            show(owed, u64::try_from(debt).unwrap_or(u64::MAX));
        }
    }

    fn bytes(&self) -> usize {
        size_of::<Throttle>()
    }
}

#[cfg(test)]
mod tests;
