//! Which requests a job makes. A pattern is a function of its seed: the same one gives the same requests again, so a
//! check of an earlier run needs no record of it.

use super::units::SizeRange;

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    /// First byte.
    pub(super) start: u64,
    /// First byte behind it.
    pub(super) end: u64,
}

impl Region {
    /// The part that begins at `offset` and is `len` long, or reaches to the disk's end; in whole sectors.
    pub(super) fn new(disk: u64, sector: u32, offset: u64, len: Option<u64>) -> Result<Region, String> {
        let rest = disk.checked_sub(offset).filter(|rest| *rest > 0);
        let rest = rest.ok_or_else(|| format!("offset {offset} is at or beyond the disk's end at {disk}"))?;
        let len = len.unwrap_or(rest);
        if len > rest {
            return Err(format!("{len} bytes at {offset} end beyond the disk's {disk} bytes"));
        }
        let whole = |value: u64| value.is_multiple_of(u64::from(sector));
        if !whole(offset) || !whole(len) || len == 0 {
            return Err(format!("offset {offset} and length {len} must be whole sectors of {sector} bytes"));
        }
        Ok(Region { start: offset, end: offset + len })
    }

    /// Bytes.
    pub(super) fn len(self) -> u64 {
        self.end - self.start
    }

    /// Share `index` of `count`; all begin at a multiple of `unit` bytes from the region's start, and the last one has
    /// what is left over.
    pub(super) fn share(self, index: u32, count: u32, unit: u32) -> Region {
        let unit = u64::from(unit);
        let each = self.len() / u64::from(count) / unit * unit;
        let start = self.start + each * u64::from(index);
        Region { start, end: if index + 1 == count { self.end } else { start + each } }
    }
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// It writes; else it reads.
    pub(super) write: bool,
    /// First byte of the disk.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) len: u32,
    /// How many times the pattern has been over its region before.
    pub(super) pass: u32,
}

/// What there is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// This.
    Step(Step),
    /// Nothing until all that was given before is done.
    Drain,
    /// Nothing any more.
    End,
}

/// What a pattern is made from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) region: Region,
    /// Bytes of a logical sector.
    pub(super) sector: u32,
    pub(super) sizes: SizeRange,
    pub(super) random: bool,
    /// Of 100 requests, how many read.
    pub(super) reads: u8,
    /// No byte is touched twice in a pass, and passes do not overlap.
    pub(super) once: bool,
    pub(super) seed: u64,
    /// End when this many bytes have been asked for.
    pub(super) bytes: Option<u64>,
    /// End after so many passes.
    pub(super) passes: Option<u32>,
}

/// A pattern, and how far it has come.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    plan: Plan,
    rng: fastrand::Rng,
    /// In order: bytes from the region's start. Once at random: cells visited.
    position: u64,
    pass: u32,
    issued: u64,
    /// Places where a request of the smallest size can begin.
    places: u64,
    order: Shuffle,
}

impl Pattern {
    /// The region must hold the largest request.
    pub(super) fn new(plan: Plan) -> Pattern {
        let Plan { region, sizes, seed, .. } = plan;
        assert!(region.len() >= u64::from(sizes.max));
        Pattern {
            plan,
            rng: fastrand::Rng::with_seed(seed),
            position: 0,
            pass: 0,
            issued: 0,
            places: (region.len() - u64::from(sizes.min)) / u64::from(sizes.min) + 1,
            order: Shuffle::new(region.len() / u64::from(sizes.max), seed),
        }
    }

    /// What is next. `idle`: all that was given before is done.
    #[inline]
    pub(super) fn next(&mut self, idle: bool) -> Next {
        if self.plan.bytes.is_some_and(|bytes| self.issued >= bytes) {
            return Next::End;
        }
        if self.pass_is_over() {
            if self.plan.passes.is_some_and(|passes| self.pass + 1 >= passes) {
                return Next::End;
            }
            if self.plan.once && !idle {
                return Next::Drain;
            }
            self.position = 0;
            self.pass += 1;
            self.order.again();
        }
        let len = self.draw_len();
        let (offset, len) = match (self.plan.random, self.plan.once) {
            (false, _) => self.in_order(len),
            (true, false) => self.anywhere(len),
            (true, true) => self.cell(len),
        };
        let write = match self.plan.reads {
            0 => true,
            100 => false,
            reads => self.rng.u8(..100) >= reads,
        };
        self.issued += u64::from(len);
        Next::Step(Step { write, offset: self.plan.region.start + offset, len, pass: self.pass })
    }

    fn pass_is_over(&self) -> bool {
        match (self.plan.random, self.plan.once) {
            (false, _) => self.position == self.plan.region.len(),
            (true, true) => self.position == self.order.len,
            // Places that are drawn at random make no passes.
            (true, false) => false,
        }
    }

    fn draw_len(&mut self) -> u32 {
        let Plan { sizes, sector, .. } = self.plan;
        if sizes.min == sizes.max {
            return sizes.min;
        }
        sizes.min + self.rng.u32(0..=(sizes.max - sizes.min) / sector) * sector
    }

    fn in_order(&mut self, len: u32) -> (u64, u32) {
        let offset = self.position;
        let len = (self.plan.region.len() - offset).min(u64::from(len)) as u32;
        self.position += u64::from(len);
        (offset, len)
    }

    fn anywhere(&mut self, len: u32) -> (u64, u32) {
        let min = self.plan.sizes.min;
        let places =
            if len == min { self.places } else { (self.plan.region.len() - u64::from(len)) / u64::from(min) + 1 };
        (self.rng.u64(..places) * u64::from(min), len)
    }

    /// Cells of the largest size are visited in random order; a smaller request is somewhere in its cell.
    fn cell(&mut self, len: u32) -> (u64, u32) {
        let Plan { sizes, sector, .. } = self.plan;
        let cell = self.order.get(self.position);
        self.position += 1;
        let slack = self.rng.u32(0..=(sizes.max - len) / sector) * sector;
        (cell * u64::from(sizes.max) + u64::from(slack), len)
    }
}

/// The numbers below `len` in an order that looks random, without a table of them.
#[derive(Clone, Debug)]
struct Shuffle {
    len: u64,
    mask: u64,
    shift: u32,
    key: u64,
}

impl Shuffle {
    fn new(len: u64, key: u64) -> Shuffle {
        let bits = (u64::BITS - len.saturating_sub(1).leading_zeros()).max(2);
        Shuffle { len, mask: u64::MAX >> (u64::BITS - bits), shift: bits.div_ceil(2), key }
    }

    /// Another order.
    fn again(&mut self) {
        self.key = self.key.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
    }

    /// Each step is a bijection of the numbers up to the mask; what falls beyond `len` goes through it again, which
    /// leaves a bijection of those below `len`.
    fn get(&self, index: u64) -> u64 {
        let mut x = index;
        loop {
            for round in 0..3u32 {
                x = x.wrapping_add(self.key.rotate_left(round * 21)) & self.mask;
                x = x.wrapping_mul(0x9e37_79b9_7f4a_7c15) & self.mask;
                x ^= x >> self.shift;
            }
            if x < self.len {
                return x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Region = Region { start: 8192, end: 8192 + 1_003_520 };

    fn plan() -> Plan {
        Plan {
            region: DISK,
            sector: 512,
            sizes: SizeRange { min: 512, max: 65536 },
            random: true,
            reads: 50,
            once: false,
            seed: 3,
            bytes: None,
            passes: None,
        }
    }

    fn steps(plan: Plan) -> Vec<Step> {
        let mut pattern = Pattern::new(plan);
        let mut steps = Vec::new();
        loop {
            match pattern.next(true) {
                Next::Step(step) => steps.push(step),
                Next::Drain => panic!("it was idle"),
                Next::End => return steps,
            }
        }
    }

    #[test]
    fn a_region_ends_with_the_disk_and_not_behind_it() {
        assert_eq!(Region::new(10_240, 512, 512, None), Ok(Region { start: 512, end: 10_240 }));
        assert_eq!(Region::new(10_240, 512, 9728, Some(512)), Ok(Region { start: 9728, end: 10_240 }));
        assert!(Region::new(10_240, 512, 9728, Some(1024)).is_err());
        assert!(Region::new(10_240, 512, 10_240, None).is_err());
        assert!(Region::new(10_240, 512, 512, Some(u64::MAX)).is_err(), "the sum wraps");
        assert!(Region::new(10_240, 512, 100, None).is_err());
        assert!(Region::new(10_240, 4096, 0, Some(512)).is_err());
        assert!(Region::new(10_240, 512, 0, Some(0)).is_err());
    }

    #[test]
    fn shares_are_all_of_the_region_and_do_not_overlap() {
        let shares: Vec<Region> = (0..3).map(|i| DISK.share(i, 3, 4096)).collect();
        assert_eq!((shares[0].start, shares[2].end), (DISK.start, DISK.end));
        for pair in shares.windows(2) {
            assert_eq!(pair[0].end, pair[1].start);
            assert!((pair[1].start - DISK.start).is_multiple_of(4096));
        }
    }

    #[test]
    fn random_requests_are_aligned_and_within_their_region() {
        for step in steps(Plan { bytes: Some(1 << 28), ..plan() }) {
            assert!(step.offset >= DISK.start && step.offset + u64::from(step.len) <= DISK.end, "{step:?}");
            assert!(step.offset.is_multiple_of(512) && step.len.is_multiple_of(512));
        }
        let sizes = SizeRange { min: 4096, max: 4096 };
        let steps = steps(Plan { sizes, bytes: Some(1 << 24), ..plan() });
        assert!(steps.iter().all(|step| step.offset.is_multiple_of(4096) && step.len == 4096));
        let last = steps.iter().map(|step| step.offset + 4096).max().unwrap();
        assert_eq!(last, DISK.end, "the last place is used");
        let reads = steps.iter().filter(|step| !step.write).count();
        assert!((steps.len() * 45 / 100..steps.len() * 55 / 100).contains(&reads), "{reads} of {}", steps.len());
    }

    #[test]
    fn a_pass_in_order_touches_each_byte_once() {
        let mut at = DISK.start;
        for step in steps(Plan { random: false, passes: Some(1), ..plan() }) {
            assert_eq!((step.offset, step.pass), (at, 0));
            at += u64::from(step.len);
        }
        assert_eq!(at, DISK.end);
    }

    #[test]
    fn a_random_pass_touches_no_byte_twice_and_each_cell() {
        for sizes in [SizeRange { min: 512, max: 65536 }, SizeRange { min: 4096, max: 4096 }] {
            let all = steps(Plan { once: true, passes: Some(2), sizes, ..plan() });
            let (first, second) = all.split_at(all.len() / 2);
            assert!(first.iter().all(|step| step.pass == 0) && second.iter().all(|step| step.pass == 1));
            for pass in [first, second] {
                let mut cells: Vec<u64> =
                    pass.iter().map(|step| (step.offset - DISK.start) / u64::from(sizes.max)).collect();
                assert!(!cells.is_sorted(), "random");
                cells.sort_unstable();
                assert!(cells.iter().copied().eq(0..DISK.len() / u64::from(sizes.max)));
                for step in pass {
                    let within = (step.offset - DISK.start) % u64::from(sizes.max) + u64::from(step.len);
                    assert!(within <= u64::from(sizes.max), "{step:?} leaves its cell");
                }
            }
            assert!(first.iter().zip(second).any(|(a, b)| a.offset != b.offset), "another order");
        }
    }

    #[test]
    fn a_pass_that_may_not_overlap_waits_for_the_one_before() {
        let sizes = SizeRange { min: 65536, max: 65536 };
        let mut pattern = Pattern::new(Plan { once: true, sizes, ..plan() });
        for _ in 0..DISK.len() / 65536 {
            assert!(matches!(pattern.next(false), Next::Step(_)));
        }
        assert_eq!((pattern.next(false), pattern.next(false)), (Next::Drain, Next::Drain));
        assert!(matches!(pattern.next(true), Next::Step(Step { pass: 1, .. })));
    }

    #[test]
    fn the_same_seed_gives_the_same_requests() {
        let plan = Plan { bytes: Some(1 << 22), ..plan() };
        assert_eq!(steps(plan), steps(plan));
        assert_ne!(steps(plan), steps(Plan { seed: 4, ..plan }));
    }

    #[test]
    fn a_shuffle_is_a_permutation() {
        for len in [1, 2, 3, 5, 64, 1000, 1025] {
            let shuffle = Shuffle::new(len, 99);
            let mut all: Vec<u64> = (0..len).map(|i| shuffle.get(i)).collect();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..len), "{len}");
        }
    }
}
