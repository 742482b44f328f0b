//! `ring-load run`: one thread a queue, each keeping its requests in flight.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use tapdisk::client::Disk;

use super::args::{Run, Rw};
use super::lane::{self, Done, Lane, Op};
use super::pattern::{Next, Pattern, Plan, Region};
use super::report::{Checked, Figures, Report};
use super::server::{process_cpu, thread_cpu};
use super::units::SizeRange;
use super::verify::{Expected, Mismatch};
use super::{Failure, Outcome};

/// How long a job runs if nothing is said.
const RUNTIME: Duration = Duration::from_secs(10);
/// Wrong sectors that are shown, of each queue.
const MISMATCHES_SHOWN: usize = 10;

pub(super) fn run(args: &Run) -> Result<Outcome, Failure> {
    if args.bs.max > lane::MAX_REQUEST {
        return Err(Failure::Usage(format!("a request can't have more than {} bytes", lane::MAX_REQUEST)));
    }
    let order = args.ring_page_order;
    let options = lane::options(args.connection.abi, args.queues, args.depth, args.bs.max, order);
    let entries = options.abi.entries(options.ring_page_order);
    if args.depth > entries {
        let advice = format!("a ring of order {} has {entries} entries", options.ring_page_order);
        return Err(Failure::Usage(format!("depth {} is too much: {advice}", args.depth)));
    }
    let client = lane::connect(&args.connection, &options, args.bs.max)?;
    let region = check(args, &client.disk)?;
    let clock = Instant::now();
    let mut workers = Vec::new();
    for (queue, index) in client.queues.into_iter().zip(0..) {
        let lane = Lane::new(queue, args.depth, args.bs.max, args.connection.timeout, args.spin);
        workers.push(Worker::new(args, &client.disk, region, index, lane, clock)?);
    }
    let mut report = Report::new(args.rw);
    if args.verify_only {
        workers.iter_mut().for_each(Worker::replay);
    } else {
        let server = args.server_pid.and_then(process_cpu);
        if args.server_pid.is_some() && server.is_none() {
            return Err(Failure::Usage("there is no process with the PID given as --server-pid".into()));
        }
        report.elapsed = together(&mut workers)?;
        report.server_cpu =
            server.zip(args.server_pid.and_then(process_cpu)).map(|(from, to)| to.saturating_sub(from));
        for worker in &mut workers {
            report.add(&worker.figures);
        }
    }
    if args.verify || args.verify_only {
        workers.iter_mut().for_each(Worker::read_back);
        let elapsed = together(&mut workers)?;
        let mut checked = Checked { elapsed, ..Checked::default() };
        for worker in &mut workers {
            checked.add(&worker.checked);
            report.add_errors(&worker.figures);
        }
        report.checked = Some(checked);
    }
    report.print(args.json);
    Ok(report.outcome())
}

/// Whether this job can be done on this disk, and where.
fn check(args: &Run, disk: &Disk) -> Result<Region, Failure> {
    if disk.read_only && args.rw.changes() && !args.verify_only {
        return Err(Failure::Usage("the disk is read-only".into()));
    }
    if (args.verify || args.verify_only) && (!args.rw.changes() || args.rw.discards()) {
        let advice = "only what a job writes can be checked: use one with --rw write, randwrite, rw or randrw";
        return Err(Failure::Usage(advice.into()));
    }
    for size in [args.bs.min, args.bs.max] {
        lane::check_size(disk, u64::from(size))?;
    }
    let region = Region::new(disk.bytes(), disk.sector_size, args.offset, args.range).map_err(Failure::Usage)?;
    let share = region.share(0, args.queues, disk.sector_size).len();
    if share < u64::from(args.bs.max) {
        return Err(Failure::Usage(format!("requests of {} bytes do not fit {share} bytes a queue", args.bs.max)));
    }
    Ok(region)
}

/// Runs all workers at the same time; the time from their start to the end of the last one.
fn together(workers: &mut [Worker]) -> Result<Duration, Failure> {
    let barrier = Barrier::new(workers.len());
    thread::scope(|scope| {
        let threads: Vec<_> = workers
            .iter_mut()
            .map(|worker| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    let began = Instant::now();
                    worker.run()?;
                    Ok::<_, Failure>((began, Instant::now()))
                })
            })
            .collect();
        let mut spans = Vec::new();
        for thread in threads {
            match thread.join() {
                Ok(span) => spans.push(span?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        let (began, ended) = (spans.iter().map(|span| span.0).min(), spans.iter().map(|span| span.1).max());
        Ok(began.zip(ended).map_or(Duration::ZERO, |(began, ended)| ended - began))
    })
}

/// One queue's share of the job.
#[derive(Debug)]
struct Worker {
    lane: Lane,
    pattern: Pattern,
    plan: Plan,
    /// What a step that changes the disk does.
    change: Op,
    fsync: u64,
    unflushed: u64,
    runtime: Option<Duration>,
    /// All times are in nanoseconds since then.
    clock: Instant,
    deadline: u64,
    ended: bool,
    figures: Figures,
    expected: Option<Expected>,
    reading_back: bool,
    /// Where data is made and checked.
    buffer: Vec<u8>,
    checked: Checked,
}

impl Worker {
    fn new(
        args: &Run,
        disk: &Disk,
        region: Region,
        index: u32,
        lane: Lane,
        clock: Instant,
    ) -> Result<Worker, Failure> {
        let checks = args.verify || args.verify_only;
        let shared = args.rw.random() && !checks;
        let region = if shared { region } else { region.share(index, args.queues, disk.sector_size) };
        let each = |bytes: u64| {
            let queues = u64::from(args.queues);
            bytes / queues + u64::from(u64::from(index) < bytes % queues)
        };
        let plan = Plan {
            region,
            sector: disk.sector_size,
            sizes: args.bs,
            random: args.rw.random(),
            reads: match args.rw {
                Rw::Read | Rw::Randread => 100,
                Rw::Rw | Rw::Randrw => args.mix,
                Rw::Write | Rw::Randwrite | Rw::Discard | Rw::Randdiscard => 0,
            },
            once: checks,
            // Queues must not do the same in step.
            seed: args.seed.wrapping_add(u64::from(index) << 32),
            bytes: args.size.map(each),
            passes: (checks && args.size.is_none() && args.runtime.is_none()).then_some(1),
        };
        let expected = checks.then(|| Expected::new(region, disk.sector_size, args.seed)).transpose();
        let unlimited = args.size.is_none() && !checks;
        let mut worker = Worker {
            lane,
            pattern: Pattern::new(plan),
            plan,
            change: if args.rw.discards() { Op::Discard } else { Op::Write },
            fsync: args.fsync,
            unflushed: 0,
            runtime: args.runtime.or(unlimited.then_some(RUNTIME)),
            clock,
            deadline: u64::MAX,
            ended: false,
            figures: Figures::new(),
            expected: expected.map_err(Failure::Usage)?,
            reading_back: false,
            buffer: vec![0; args.bs.max as usize],
            checked: Checked::default(),
        };
        worker.fill_pages(args.depth);
        Ok(worker)
    }

    /// Data that is not checked is made once; it must not be zeros, which a disk may leave out.
    fn fill_pages(&mut self, depth: u32) {
        let mut rng = fastrand::Rng::with_seed(self.plan.seed);
        for slot in 0..depth {
            rng.fill(&mut self.buffer);
            self.lane.memory().write(self.lane.data_at(slot), &self.buffer);
        }
    }

    /// Makes the worker know what an earlier run has written.
    fn replay(&mut self) {
        let Some(expected) = &mut self.expected else { return };
        loop {
            match self.pattern.next(true) {
                Next::Step(step) if step.write => expected.set(step.offset, step.len, step.pass + 1),
                Next::Step(_) | Next::Drain => {}
                Next::End => return,
            }
        }
    }

    /// Makes the next run read all back.
    fn read_back(&mut self) {
        let sizes = SizeRange { min: self.plan.sizes.max, ..self.plan.sizes };
        self.plan = Plan { sizes, random: false, reads: 100, bytes: None, passes: Some(1), ..self.plan };
        self.pattern = Pattern::new(self.plan);
        self.figures = Figures::new();
        self.runtime = None;
        self.ended = false;
        self.reading_back = true;
    }

    fn now(&self) -> u64 {
        self.clock.elapsed().as_nanos() as u64
    }

    fn run(&mut self) -> Result<(), Failure> {
        let cpu = thread_cpu();
        self.deadline = self.runtime.map_or(u64::MAX, |runtime| self.now() + runtime.as_nanos() as u64);
        loop {
            let now = self.now();
            while let Some(done) = self.lane.reap()? {
                self.finish(&done, now);
            }
            self.refill();
            self.lane.publish()?;
            if self.lane.outstanding() > 0 {
                self.lane.wait()?;
            } else if self.ended {
                break;
            }
        }
        self.figures.cpu = thread_cpu().saturating_sub(cpu);
        Ok(())
    }

    /// Starts what there is room for.
    fn refill(&mut self) {
        let now = self.now();
        self.ended |= now >= self.deadline;
        while self.lane.room() && !self.ended {
            if self.fsync > 0 && self.unflushed == self.fsync {
                self.unflushed = 0;
                self.lane.start(Op::Flush, 0, 0, now);
                continue;
            }
            let step = match self.pattern.next(self.lane.outstanding() == 0) {
                Next::Step(step) => step,
                Next::Drain => return,
                Next::End => {
                    self.ended = true;
                    return;
                }
            };
            if !step.write {
                let unknown = |expected: &Expected| !expected.knows(step.offset, step.len);
                if !(self.reading_back && self.expected.as_ref().is_some_and(unknown)) {
                    self.lane.start(Op::Read, step.offset, step.len, now);
                }
                continue;
            }
            let mut started = now;
            if let Some(expected) = &mut self.expected {
                // In this pass nothing else touches these sectors, so they may be known before they are written.
                expected.set(step.offset, step.len, step.pass + 1);
                let data = &mut self.buffer[..step.len as usize];
                expected.stamp(step.offset, step.pass + 1, data);
                self.lane.memory().write(self.lane.data_at(self.lane.next_slot()), data);
                started = self.now();
            }
            self.unflushed += 1;
            self.lane.start(self.change, step.offset, step.len, started);
        }
    }

    #[inline]
    fn finish(&mut self, done: &Done, now: u64) {
        // A batch that is checked takes its time.
        let now = if self.expected.is_some() { self.now() } else { now };
        self.figures.side(done.op).record(now.saturating_sub(done.issued), done.len, done.ok());
        if !done.ok() && self.figures.first_failure.is_none() {
            self.figures.first_failure = Some(done.failure().to_string());
        }
        let Some(expected) = &mut self.expected else { return };
        match done.op {
            Op::Write if !done.ok() => expected.set(done.offset, done.len, 0),
            Op::Read if done.ok() => {
                let data = &mut self.buffer[..done.len as usize];
                self.lane.memory().read(self.lane.data_at(done.slot), data);
                let checked = &mut self.checked;
                let wrong = |mismatch: Mismatch| {
                    checked.wrong += 1;
                    if checked.shown.len() < MISMATCHES_SHOWN {
                        checked.shown.push(mismatch.to_string());
                    }
                };
                let sectors = expected.check(done.offset, data, wrong);
                checked.bytes += sectors * u64::from(self.plan.sector);
            }
            _ => {}
        }
    }
}
