//! What a job has measured, for people and for programs.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::Outcome;
use super::args::Rw;
use super::lane::Op;

/// The longest latency that is told apart, in nanoseconds.
const LONGEST: u64 = 600_000_000_000;

/// Requests of one kind.
#[derive(Clone, Debug)]
pub(super) struct Side {
    /// In nanoseconds.
    latency: Histogram<u64>,
    bytes: u64,
    errors: u64,
}

impl Side {
    fn new() -> Side {
        #[allow(clippy::expect_used)] // The bounds are constants.
        let latency = Histogram::new_with_bounds(1, LONGEST, 3).expect("bounds of a histogram");
        Side { latency, bytes: 0, errors: 0 }
    }

    /// A request that took `nanos`.
    #[inline]
    pub(super) fn record(&mut self, nanos: u64, len: u32, ok: bool) {
        self.latency.saturating_record(nanos);
        if ok {
            self.bytes += u64::from(len);
        } else {
            self.errors += 1;
        }
    }

    fn add(&mut self, other: &Side) {
        // Both have the same bounds, so nothing can be refused.
        let _ = self.latency.add(&other.latency);
        self.bytes += other.bytes;
        self.errors += other.errors;
    }

    fn latencies(&self) -> [(&'static str, f64); 6] {
        let micros = |nanos: u64| nanos as f64 / 1e3;
        let at = |quantile| micros(self.latency.value_at_quantile(quantile));
        [
            ("min", micros(self.latency.min())),
            ("mean", self.latency.mean() / 1e3),
            ("p50", at(0.5)),
            ("p99", at(0.99)),
            ("p99.9", at(0.999)),
            ("max", micros(self.latency.max())),
        ]
    }
}

/// What one queue has measured.
#[derive(Clone, Debug)]
pub(super) struct Figures {
    read: Side,
    write: Side,
    flush: Side,
    /// CPU time of the queue's thread.
    pub(super) cpu: Duration,
    /// The first request that failed.
    pub(super) first_failure: Option<String>,
}

impl Figures {
    pub(super) fn new() -> Figures {
        Figures {
            read: Side::new(),
            write: Side::new(),
            flush: Side::new(),
            cpu: Duration::ZERO,
            first_failure: None,
        }
    }

    /// Where requests of this kind are counted. A job that discards does not write.
    #[inline]
    pub(super) fn side(&mut self, op: Op) -> &mut Side {
        match op {
            Op::Read => &mut self.read,
            Op::Write | Op::Discard => &mut self.write,
            Op::Flush => &mut self.flush,
        }
    }

    fn errors(&self) -> u64 {
        self.read.errors + self.write.errors + self.flush.errors
    }
}

/// What was read and checked.
#[derive(Clone, Debug, Default)]
pub(super) struct Checked {
    /// Of the reading back.
    pub(super) elapsed: Duration,
    /// Bytes of which it was known what they must be.
    pub(super) bytes: u64,
    /// Wrong sectors.
    pub(super) wrong: u64,
    /// The first of them.
    pub(super) shown: Vec<String>,
}

impl Checked {
    /// Adds another queue's.
    pub(super) fn add(&mut self, other: &Checked) {
        self.bytes += other.bytes;
        self.wrong += other.wrong;
        self.shown.extend_from_slice(&other.shown);
    }
}

/// The whole job.
#[derive(Debug)]
pub(super) struct Report {
    rw: Rw,
    /// From the first request to the last answer.
    pub(super) elapsed: Duration,
    figures: Figures,
    /// CPU time of the server in that time.
    pub(super) server_cpu: Option<Duration>,
    /// Of a job that checks.
    pub(super) checked: Option<Checked>,
}

impl Report {
    pub(super) fn new(rw: Rw) -> Report {
        Report { rw, elapsed: Duration::ZERO, figures: Figures::new(), server_cpu: None, checked: None }
    }

    /// Adds a queue's figures.
    pub(super) fn add(&mut self, other: &Figures) {
        self.figures.read.add(&other.read);
        self.figures.write.add(&other.write);
        self.figures.flush.add(&other.flush);
        self.figures.cpu += other.cpu;
        if self.figures.first_failure.is_none() {
            self.figures.first_failure.clone_from(&other.first_failure);
        }
    }

    /// Adds a queue's errors, but nothing that was measured.
    pub(super) fn add_errors(&mut self, other: &Figures) {
        self.figures.read.errors += other.errors();
        if self.figures.first_failure.is_none() {
            self.figures.first_failure.clone_from(&other.first_failure);
        }
    }

    /// How it went.
    pub(super) fn outcome(&self) -> Outcome {
        match &self.checked {
            Some(checked) if checked.wrong > 0 => Outcome::Mismatch,
            _ if self.figures.errors() > 0 => Outcome::Errors,
            _ => Outcome::Good,
        }
    }

    /// To standard output; what is wrong also to standard error.
    pub(super) fn print(&self, as_json: bool) {
        for wrong in self.checked.iter().flat_map(|checked| &checked.shown) {
            eprintln!("ring-load: {wrong}");
        }
        if let Some(failure) = &self.figures.first_failure {
            eprintln!("ring-load: {} requests failed, first: {failure}", self.figures.errors());
        }
        if as_json {
            super::say(format_args!("{:#}", self.json()));
        } else {
            self.text();
        }
    }

    fn sides(&self) -> impl Iterator<Item = (&'static str, &Side)> {
        let change = if self.rw.discards() { "discard" } else { "write" };
        [("read", &self.figures.read), (change, &self.figures.write), ("flush", &self.figures.flush)]
            .into_iter()
            .filter(|(_, side)| !side.latency.is_empty() || side.errors > 0)
    }

    fn requests(&self) -> u64 {
        self.sides().map(|(_, side)| side.latency.len()).sum()
    }

    fn per_second(&self, count: u64) -> f64 {
        count as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    fn micros_each(&self, cpu: Duration) -> f64 {
        cpu.as_secs_f64() * 1e6 / self.requests().max(1) as f64
    }

    fn cores(&self, cpu: Duration) -> f64 {
        cpu.as_secs_f64() / self.elapsed.as_secs_f64().max(1e-9)
    }

    fn text(&self) {
        for (name, side) in self.sides() {
            let (iops, rate) = (self.per_second(side.latency.len()), self.per_second(side.bytes));
            let mib = rate / f64::from(1 << 20);
            let (count, errors) = (side.latency.len(), side.errors);
            super::say(format_args!("{name:<7} {iops:.0} IOPS, {mib:.1} MiB/s, {count} requests, {errors} errors"));
            let latencies = side.latencies().map(|(name, micros)| format!("{name} {micros:.1}"));
            super::say(format_args!("        latency in µs: {}", latencies.join(", ")));
        }
        let cpu = |name: &str, cpu: Duration| {
            let percent = self.cores(cpu) * 100.0;
            super::say(format_args!(
                "{name:<7} {:.3} µs of CPU time a request, {percent:.0} % of a core",
                self.micros_each(cpu)
            ));
        };
        if self.requests() > 0 {
            cpu("client", self.figures.cpu);
            if let Some(server) = self.server_cpu {
                cpu("server", server);
            }
        }
        if let Some(Checked { elapsed, bytes, wrong, .. }) = &self.checked {
            super::say(format_args!(
                "checked {bytes} bytes in {:.2} s, {wrong} wrong sectors",
                elapsed.as_secs_f64()
            ));
        }
    }

    fn json(&self) -> Value {
        let mut value = json!({
            "seconds": self.elapsed.as_secs_f64(),
            "requests": self.requests(),
            "errors": self.figures.errors(),
        });
        for (name, side) in self.sides() {
            let latency: serde_json::Map<String, Value> =
                side.latencies().into_iter().map(|(name, micros)| (name.into(), json!(micros))).collect();
            value[name] = json!({
                "requests": side.latency.len(),
                "errors": side.errors,
                "bytes": side.bytes,
                "iops": self.per_second(side.latency.len()),
                "bytes_per_second": self.per_second(side.bytes),
                "latency_us": latency,
            });
        }
        for (name, cpu) in [("client", Some(self.figures.cpu)), ("server", self.server_cpu)] {
            if let Some(cpu) = cpu.filter(|_| self.requests() > 0) {
                value[name] = json!({ "cpu_us_per_request": self.micros_each(cpu), "cores": self.cores(cpu) });
            }
        }
        if let Some(checked) = &self.checked {
            value["checked"] = json!({
                "seconds": checked.elapsed.as_secs_f64(),
                "bytes": checked.bytes,
                "wrong_sectors": checked.wrong,
                "first_wrong": checked.shown,
            });
        }
        value
    }
}
