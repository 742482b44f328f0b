//! Clients at a throttle, by a clock that is handed in; what is held waits as the disk has it wait.

#![allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use std::collections::VecDeque;

use super::*;
use crate::Extent;

const MS: u64 = 1_000_000;
const S: u64 = 1000 * MS;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const READS: &[Op] = &[Op::Read];
const WRITES: &[Op] = &[Op::Write];
const BOTH: &[Op] = &[Op::Read, Op::Write];
const MIXED: &[u64] = &[512, MIB, 4 * KIB, 64 * KIB, 8 * KIB, 256 * KIB, 512];

/// Keeps `depth` requests at the throttle, with these operations and sizes in turn.
#[derive(Clone)]
struct Client {
    origin: Origin,
    depth: usize,
    ops: &'static [Op],
    sizes: &'static [u64],
    /// From when a request passes until the next one comes, ns.
    latency: u64,
    outstanding: usize,
    sent: usize,
    bytes: u64,
    requests: u64,
}

fn client(frontend: u16, depth: usize, ops: &'static [Op], sizes: &'static [u64]) -> Client {
    Client {
        origin: Origin::Frontend(frontend),
        depth,
        ops,
        sizes,
        latency: MS / 10,
        outstanding: 0,
        sent: 0,
        bytes: 0,
        requests: 0,
    }
}

struct Pending {
    client: usize,
    op: Op,
    at: u64,
    len: u64,
}

/// The disk around a throttle.
struct World {
    throttle: Throttle,
    now: u64,
    clients: Vec<Client>,
    waiting: VecDeque<Pending>,
    /// Requests that have passed, with the time of their end.
    flying: Vec<(u64, usize)>,
    ask_again_at: Option<u64>,
    progress: bool,
    /// Wake-ups come at multiples of one of these, in turn.
    grid: &'static [u64],
    wakes: usize,
    draining: bool,
}

impl World {
    fn new(limits: Limits, clients: &[Client]) -> World {
        World {
            throttle: Throttle::new(limits),
            now: 77 * S,
            clients: clients.to_vec(),
            waiting: VecDeque::new(),
            flying: Vec::new(),
            ask_again_at: None,
            progress: false,
            grid: &[MS],
            wakes: 0,
            draining: false,
        }
    }

    fn ask(&self, request: &Pending) -> Ask {
        Ask {
            op: request.op,
            extent: Extent { offset: request.at, len: request.len - request.at },
            origin: self.clients[request.client].origin,
            begins: request.at == 0,
            now: self.now,
        }
    }

    /// True: it has passed.
    fn start(&mut self, request: &mut Pending) -> bool {
        loop {
            let ask = self.ask(request);
            match self.throttle.plan(&ask) {
                Plan::Wait { until: Some(until) } => {
                    self.ask_again_at = self.ask_again_at.into_iter().chain([until]).min();
                    return false;
                }
                Plan::Below { count } => {
                    self.throttle.descend(&Ask { extent: Extent { len: count, ..ask.extent }, ..ask });
                    self.clients[request.client].bytes += count;
                    self.clients[request.client].requests += u64::from(ask.begins);
                    request.at += count;
                }
                other => panic!("{other:?}"),
            }
            if request.at >= request.len {
                return true;
            }
        }
    }

    /// One turn of the disk: what came to an end, new requests, and all that wait if it is time.
    fn turn(&mut self) {
        let (now, clients) = (self.now, &mut self.clients);
        self.flying.retain(|(end, client)| {
            clients[*client].outstanding -= usize::from(*end <= now);
            *end > now
        });
        let due = self.ask_again_at.take_if(|at| *at <= now).is_some();
        let mut started = if due | std::mem::take(&mut self.progress) {
            std::mem::take(&mut self.waiting)
        } else {
            VecDeque::new()
        };
        // The disk pulls nothing as it drains.
        for (index, client) in self.clients.iter_mut().enumerate().filter(|_| !self.draining) {
            while client.outstanding < client.depth {
                let (op, len) =
                    (client.ops[client.sent % client.ops.len()], client.sizes[client.sent % client.sizes.len()]);
                (client.outstanding, client.sent) = (client.outstanding + 1, client.sent + 1);
                started.push_back(Pending { client: index, op, at: 0, len });
            }
        }
        while let Some(mut request) = started.pop_front() {
            if self.start(&mut request) {
                self.flying.push((now.saturating_add(self.clients[request.client].latency), request.client));
            } else {
                self.waiting.push_back(request);
            }
        }
    }

    /// Lets time pass, as the main loop sleeps: to the end of a request, or to when something is to be asked again, and later.
    fn run(&mut self, time: u64) {
        let end = self.now.saturating_add(time);
        loop {
            self.turn();
            let ended = self.flying.iter().map(|(end, _)| *end).min();
            let wakes = self.wakes;
            let grid = self.grid[wakes % self.grid.len()];
            let again = self.ask_again_at.map(|at| at.max(self.now + 1).div_ceil(grid) * grid);
            self.wakes += usize::from(again.is_some_and(|again| ended.is_none_or(|ended| again <= ended)));
            match ended.into_iter().chain(again).min() {
                Some(next) if next < end => self.now = next,
                _ => break,
            }
        }
        self.now = end;
    }

    /// What each client has moved since this was asked last.
    fn moved(&mut self) -> Vec<(u64, u64)> {
        let take = |client: &mut Client| (std::mem::take(&mut client.bytes), std::mem::take(&mut client.requests));
        self.clients.iter_mut().map(take).collect()
    }

    /// What each moves in that time, after a second in which it has come to its pace.
    fn moved_at_pace(&mut self, time: u64) -> Vec<(u64, u64)> {
        self.run(S);
        self.moved();
        self.run(time);
        self.moved()
    }

    /// What all have moved.
    fn all_moved(&mut self) -> (u64, u64) {
        self.moved().into_iter().fold((0, 0), |(bytes, requests), (b, r)| (bytes + b, requests + r))
    }

    /// A client goes, with what it has waiting.
    fn leave(&mut self, index: usize) {
        self.clients[index].depth = 0;
        self.waiting.retain(|request| request.client != index);
        self.clients[index].outstanding = self.flying.iter().filter(|(_, client)| *client == index).count();
    }
}

fn limit(rate: u64, burst: u64) -> Option<Limit> {
    Some(Limit { rate: NonZeroU64::new(rate).unwrap(), burst: NonZeroU64::new(burst) })
}

fn bytes(rate: u64, burst: u64) -> Traffic {
    Traffic { bytes: limit(rate, burst), requests: None }
}

fn requests(rate: u64, burst: u64) -> Traffic {
    Traffic { bytes: None, requests: limit(rate, burst) }
}

fn all(all: Traffic) -> Limits {
    Limits { all, ..Limits::default() }
}

#[track_caller]
fn within(value: u64, expected: u64, percent: u64) {
    let off = value.abs_diff(expected) * 100;
    assert!(off <= expected * percent, "{value} is not {expected} within {percent} %");
}

#[test]
fn rates_are_kept_over_ten_seconds_by_bytes_and_by_requests_at_any_depth() {
    for traffic in [bytes(50 * MIB, 0), bytes(3 * MIB, 0), requests(800, 0), requests(5, 0)] {
        let kinds = [
            (Limits { read: traffic, ..Limits::default() }, READS),
            (Limits { write: traffic, ..Limits::default() }, WRITES),
            (all(traffic), BOTH),
        ];
        for (limits, ops) in kinds {
            for (depth, grid) in [(1, &[MS][..]), (32, &[MS]), (32, &[MS, 3 * MS, 10 * MS, 7 * MS])] {
                let mut world = World { grid, ..World::new(limits, &[client(0, depth, ops, MIXED)]) };
                // The burst is gone then.
                world.run(S);
                world.moved();
                world.run(10 * S);
                let (bytes, requests) = world.all_moved();
                let (moved, rate) = match (traffic.bytes, traffic.requests) {
                    (Some(limit), _) => (bytes, limit.rate.get()),
                    (_, limit) => (requests, limit.unwrap().rate.get()),
                };
                within(moved, rate * 10, 5);
            }
        }
    }
}

#[test]
fn a_write_is_not_a_read_and_each_has_what_is_its_own() {
    let limits = Limits { read: bytes(10 * MIB, 0), write: bytes(40 * MIB, 0), all: requests(100_000, 0) };
    let mut world = World::new(limits, &[client(0, 32, READS, &[64 * KIB]), client(0, 32, WRITES, &[64 * KIB])]);
    let moved = world.moved_at_pace(10 * S);
    within(moved[0].0, 100 * MIB, 5);
    within(moved[1].0, 400 * MIB, 5);
    // Both together, with the smaller limit in force.
    let mut world = World::new(
        Limits { all: bytes(20 * MIB, 0), ..limits },
        &[client(0, 32, READS, &[64 * KIB]), client(1, 32, WRITES, &[64 * KIB])],
    );
    let moved = world.moved_at_pace(10 * S);
    within(moved[0].0, 100 * MIB, 5);
    within(moved[1].0, 100 * MIB, 5);
}

#[test]
fn after_a_time_without_requests_exactly_the_burst_goes_at_once_and_then_the_rate() {
    for idle in [0, 2 * S, 86_400 * S] {
        let mut world = World::new(all(bytes(MIB, 8 * MIB)), &[client(0, 0, READS, &[64 * KIB])]);
        world.run(idle);
        world.clients[0].depth = 1000;
        world.turn();
        assert_eq!(world.all_moved(), (8 * MIB, 128));
        world.run(10 * S);
        within(world.all_moved().0, 10 * MIB, 5);
        // The burst comes back as time passes, and only as far as it does.
        world.leave(0);
        world.run(3 * S);
        world.clients[0].depth = 1000;
        world.turn();
        within(world.all_moved().0, 3 * MIB, 5);
    }
    for (traffic, burst) in [(requests(50, 20), 20), (requests(50, 0), 5), (requests(3, 0), 1)] {
        let mut world = World::new(all(traffic), &[client(0, 100, WRITES, MIXED)]);
        world.turn();
        assert_eq!(world.all_moved().1, burst);
    }
    let mut world = World::new(all(bytes(10, 0)), &[client(0, 100, WRITES, &[4096])]);
    world.turn();
    assert_eq!(world.all_moved().0, 64 * KIB, "the least burst of bytes");
}

#[test]
fn late_wake_ups_lose_nothing() {
    for traffic in [requests(2000, 0), requests(2000, 40), requests(10, 0), requests(1, 0)] {
        let grid = &[MS, 10 * MS, 4 * MS, 9 * MS, 2 * MS];
        let mut world = World { grid, ..World::new(all(traffic), &[client(0, 64, READS, &[4 * KIB])]) };
        world.run(S);
        world.moved();
        world.run(100 * S);
        within(world.all_moved().1, traffic.requests.unwrap().rate.get() * 100, 1);
    }
}

/// Shares within 10 %, of clients that have at all times something to ask for.
fn fair(limits: Limits, clients: &[Client], grid: &'static [u64], by_bytes: bool) {
    let mut world = World { grid, ..World::new(limits, clients) };
    // Bursts are gone then.
    world.run(5 * S);
    world.moved();
    world.run(10 * S);
    let moved = world.moved();
    let share = |moved: &(u64, u64)| if by_bytes { moved.0 } else { moved.1 };
    let sum: u64 = moved.iter().map(share).sum();
    for each in &moved {
        within(share(each), sum / moved.len() as u64, 10);
    }
    let limit = if by_bytes { limits.all.bytes } else { limits.all.requests };
    within(sum, limit.unwrap().rate.get() * 10, 5);
}

#[test]
fn frontends_get_the_same_whatever_their_depths() {
    for depths in [&[32, 1][..], &[1, 32], &[32, 32], &[1, 1], &[32, 1, 1], &[1, 32, 4]] {
        let with = |sizes| {
            let each = (0..).zip(depths).map(|(number, depth)| client(number, *depth, BOTH, sizes));
            each.collect::<Vec<_>>()
        };
        for grid in [&[MS][..], &[MS, 5 * MS, 2 * MS]] {
            for rate in [20, 2000] {
                fair(all(requests(rate, 0)), &with(&[4 * KIB]), grid, false);
                fair(all(requests(rate, rate * 2)), &with(MIXED), grid, false);
            }
            for rate in [MIB, 100 * MIB] {
                fair(all(bytes(rate, 0)), &with(&[64 * KIB]), grid, true);
                fair(all(bytes(rate, rate)), &with(&[64 * KIB]), grid, true);
            }
        }
    }
    // One at a time, of so many.
    fair(all(requests(9000, 0)), &[client(0, 32, READS, MIXED), client(1, 1, READS, MIXED)], &[MS], false);
}

#[test]
fn a_small_request_at_a_time_gets_its_share_beside_many_large_ones() {
    // At a share of 4 MiB/s the next one comes soon enough.
    for (rate, burst) in [(MIB, 0), (8 * MIB, 0), (8 * MIB, 16 * MIB)] {
        let clients = [client(0, 32, WRITES, &[MIB]), client(1, 1, READS, &[4 * KIB])];
        fair(all(bytes(rate, burst)), &clients, &[MS / 20], true);
    }
}

#[test]
fn what_one_does_not_want_the_others_get() {
    // It asks ten times a second, and could have five hundred.
    let slow = Client { latency: 100 * MS, ..client(1, 1, READS, &[4 * KIB]) };
    let mut world = World::new(all(requests(1000, 0)), &[client(0, 32, READS, &[4 * KIB]), slow]);
    let moved = world.moved_at_pace(10 * S);
    within(moved[0].1 + moved[1].1, 10_000, 2);
    within(moved[1].1, 100, 3);
    // One that is held by a limit of its own does not hold the other.
    let limits = Limits { write: bytes(MIB, 0), ..all(bytes(100 * MIB, 0)) };
    let mut world = World::new(limits, &[client(0, 32, READS, &[64 * KIB]), client(1, 32, WRITES, &[64 * KIB])]);
    let moved = world.moved_at_pace(10 * S);
    within(moved[1].0, 10 * MIB, 5);
    within(moved[0].0, 990 * MIB, 5);
}

#[test]
fn who_goes_leaves_no_hole_and_who_comes_back_is_neither_punished_nor_favoured() {
    for (first, second) in [(32, 1), (1, 32), (32, 32)] {
        for limits in [all(requests(1000, 0)), all(requests(1000, 5000)), all(requests(40, 0))] {
            let rate = limits.all.requests.unwrap().rate.get();
            let clients = [client(0, first, READS, &[4 * KIB]), client(1, second, READS, &[4 * KIB])];
            let mut world = World::new(limits, &clients);
            world.run(10 * S);
            for away in [S / 2, 5 * S, 20 * S] {
                world.leave(1);
                world.moved();
                world.run(away);
                let expected = u64::try_from(u128::from(rate) * u128::from(away) / u128::from(S)).unwrap();
                within(world.all_moved().1, expected, 7);
                world.clients[1].depth = second;
                world.run(S);
                let moved = world.moved();
                within(moved[0].1, rate / 2, 10);
                within(moved[1].1, rate / 2, 10);
                world.run(9 * S);
                let moved = world.moved();
                within(moved[0].1, rate * 9 / 2, 5);
                within(moved[1].1, rate * 9 / 2, 5);
            }
        }
    }
}

#[test]
fn a_drain_lets_all_go_at_once_and_it_is_paid_back() {
    let mut world = World::new(all(bytes(MIB, MIB)), &[client(0, 32, WRITES, &[512 * KIB])]);
    world.turn();
    assert_eq!((world.all_moved().0, world.waiting.len()), (MIB, 30));
    world.throttle.drain(true);
    (world.progress, world.draining) = (true, true);
    world.turn();
    assert_eq!((world.all_moved().0, world.waiting.len()), (15 * MIB, 0));
    world.throttle.drain(false);
    world.draining = false;
    // Not even by another throttle, as that of the image that the disk goes on with.
    let mut next = Throttle::default();
    next.go_on_from(&world.throttle);
    assert_eq!(next.limits(), world.throttle.limits());
    world.throttle = next;
    world.run(15 * S);
    assert_eq!(world.all_moved().0, 0);
    world.run(10 * S);
    within(world.all_moved().0, 10 * MIB, 6);
}

#[test]
fn limits_are_set_while_requests_wait() {
    let mut world = World::new(all(bytes(1000, 0)), &[client(0, 32, READS, &[MIB])]);
    world.turn();
    assert_eq!((world.all_moved().1, world.waiting.len()), (1, 31));
    assert!(world.ask_again_at.unwrap() > world.now + 900 * S);
    // What was had is owed at the new rate, too.
    world.throttle.set(all(bytes(MIB, 0)));
    world.progress = true;
    world.run(S);
    assert!(world.all_moved().1 <= 1);
    world.run(10 * S);
    within(world.all_moved().1, 10, 10);
    world.throttle.set(Limits { read: requests(100, 1), ..all(bytes(1000 * MIB, 0)) });
    world.progress = true;
    world.run(S);
    world.moved();
    world.run(10 * S);
    within(world.all_moved().1, 1000, 5);
    world.throttle.set(Limits::default());
    assert!(world.throttle.is_idle());
    world.progress = true;
    world.turn();
    assert_eq!(world.waiting.len(), 0);
    // A burst that has become smaller is not there any more.
    let mut throttle = Throttle::new(all(requests(10, 1000)));
    throttle.set(all(requests(10, 5)));
    let mut world = World { throttle, ..World::new(Limits::default(), &[client(0, 32, READS, &[4 * KIB])]) };
    world.turn();
    assert_eq!(world.all_moved().1, 5);
}

#[test]
fn neither_a_clock_that_jumps_nor_absurd_rates_do_harm() {
    let year = 365 * 86_400 * S;
    for now in [year, u64::MAX - S, u64::MAX] {
        for traffic in [bytes(u64::MAX, u64::MAX), requests(u64::MAX, 0), requests(1, u64::MAX), requests(100, 10)] {
            let mut world = World::new(all(traffic), &[client(0, 64, READS, MIXED), client(9, 64, WRITES, MIXED)]);
            world.turn();
            world.moved();
            (world.now, world.progress) = (now, true);
            world.turn();
            assert!(world.all_moved().1 <= 128);
        }
    }
    // No more than the burst is there after it, and nothing is lost before.
    let mut world = World::new(all(requests(100, 10)), &[client(0, 64, READS, MIXED)]);
    world.turn();
    world.moved();
    world.now += year;
    world.turn();
    assert_eq!(world.all_moved().1, 10);
    // One that stands still, or goes back, gives nothing.
    world.now -= year / 2;
    world.progress = true;
    world.turn();
    assert_eq!(world.all_moved().1, 0);
    // The end of a wait that no clock reaches.
    let mut throttle = Throttle::new(all(bytes(1, 1)));
    let ask = |now| Ask { now, origin: Origin::Frontend(0), ..Ask::of(Op::WriteZeroes, 0, u64::MAX) };
    for _ in 0..100 {
        throttle.descend(&ask(5));
    }
    assert_eq!(throttle.plan(&ask(5)), Plan::Wait { until: Some(u64::MAX) });
}

#[test]
fn a_request_that_is_larger_than_the_burst_passes_in_parts_and_the_debt_has_a_bound() {
    let credit = |throttle: &Throttle| throttle.buckets[4].as_ref().unwrap().credit;
    for (burst, part) in [(64 * KIB, MIB), (5 * MIB + 512, 5 * MIB)] {
        let clients = [client(0, 1, &[Op::WriteZeroes], &[4096 * MIB]), client(1, 1, READS, &[4 * KIB])];
        let mut world = World::new(all(bytes(2 * MIB, burst)), &clients);
        for _ in 0..1000 {
            world.run(7 * MS);
            assert!(credit(&world.throttle) > -scaled(part), "{}", credit(&world.throttle));
        }
        let moved = world.moved();
        // It counts as one, and the other one has not stopped for it.
        assert_eq!(moved[0].1, 1);
        within(moved[0].0 + moved[1].0, 14 * MIB + burst, 10);
        assert!(moved[1].0 > 2 * MIB, "{moved:?}");
    }
}

#[test]
fn what_counts_as_what() {
    let now = 5 * S;
    let ask = |op, origin, begins| Ask {
        op,
        extent: Extent { offset: 0, len: if op == Op::Flush { 0 } else { 4096 } },
        origin,
        begins,
        now,
    };
    let one = Traffic { bytes: limit(1000, 10_000), requests: limit(1, 10) };
    let counted = |op, origin, begins| {
        let mut throttle = Throttle::new(Limits { read: one, write: one, all: one });
        let before = throttle.buckets.clone().map(|bucket| bucket.unwrap().credit);
        throttle.descend(&ask(op, origin, begins));
        let mut counted = throttle.buckets.map(|bucket| bucket.unwrap().credit);
        counted.iter_mut().zip(before).for_each(|(after, before)| *after = (before - *after) / SCALE);
        counted
    };
    let client = Origin::Frontend(3);
    assert_eq!(counted(Op::Read, client, true), [4096, 1, 0, 0, 4096, 1]);
    assert_eq!(counted(Op::Read, client, false), [4096, 0, 0, 0, 4096, 0], "a request counts once");
    for op in [Op::Write, Op::WriteZeroes] {
        assert_eq!(counted(op, client, true), [0, 0, 4096, 1, 4096, 1]);
    }
    assert_eq!(counted(Op::Discard, client, true), [0, 0, 0, 1, 0, 1]);
    for op in [Op::Flush, Op::Locate] {
        assert_eq!(counted(op, client, true), [0; 6]);
    }
    for origin in [Origin::Disk, Origin::Layer(1)] {
        assert_eq!(counted(Op::Write, origin, true), [0; 6]);
    }
    // In debt: who is held.
    let mut throttle = Throttle::new(all(one));
    for _ in 0..20 {
        throttle.descend(&ask(Op::Write, client, true));
    }
    let mut waits = |op, origin, begins| matches!(throttle.plan(&ask(op, origin, begins)), Plan::Wait { .. });
    for op in [Op::Read, Op::Write, Op::WriteZeroes] {
        assert!(waits(op, client, true) && waits(op, client, false));
        assert!(!waits(op, Origin::Disk, true) && !waits(op, Origin::Layer(1), true));
    }
    assert!(waits(Op::Discard, client, true) && !waits(Op::Discard, client, false));
    assert!(!waits(Op::Flush, client, true) && !waits(Op::Locate, client, true));
}

#[test]
fn it_is_idle_without_limits_and_shows_those_that_there_are() {
    assert!(Throttle::default().is_idle());
    let mut throttle = Throttle::new(Limits { read: bytes(1000, 0), ..all(requests(10, 3)) });
    assert!(!throttle.is_idle() && throttle.size().is_none());
    let ask = Ask { origin: Origin::Frontend(0), ..Ask::of(Op::Read, 0, MIB) };
    throttle.descend(&ask);
    let mut shown = Vec::new();
    throttle.inspect(&mut |name, value| shown.push((name, value)));
    let expected = [
        ("read bytes/s", 1000),
        ("read bytes burst", 65536),
        ("read bytes owed", MIB - 65536),
        ("requests/s", 10),
        ("requests burst", 3),
        ("requests owed", 0),
    ];
    assert_eq!(shown, expected);
}
