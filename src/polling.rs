//! Polling: after a request, looking at memory for a set time before sleeping. It spends a CPU on latency, and so it
//! stops where the host's CPUs have other work. blktap has the same: `poll_duration` and `poll_idle_threshold`.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use crate::stats::now;

/// The longest [`poll_us`](Settings::poll_us).
pub const POLL_US_MAX: u32 = 1_000_000;

/// How often the host's CPUs are looked at, ns.
const MEASURE: u64 = 100_000_000;

/// For how long memory is looked at before the poll is asked, ns: clients come in by it, and signals.
const SLICE: u64 = 50_000;

/// What is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// How long to go on after the last request, µs, at most [`POLL_US_MAX`]. 0: not at all.
    pub poll_us: u32,
    /// How much of the host's CPUs, all together, must be idle, per cent. What polling itself takes is not idle.
    pub poll_idle_percent: u32,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { poll_us: 0, poll_idle_percent: 50 }
    }
}

/// The state of polling, for debug-queue.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PollingReport {
    /// What is set.
    #[serde(flatten)]
    pub settings: Settings,
    /// Whether the loop looks at memory now, where it would sleep otherwise.
    pub active: bool,
    /// How much of the host's CPUs was idle when it was measured last, per cent.
    pub host_idle_percent: Option<u32>,
    /// Turns that found what polling had seen.
    pub found: u64,
    /// Those, and turns that an event began while the loop was polling.
    pub sleeps_avoided: u64,
    /// Times that it stopped, or did not begin, because the host was busy.
    pub host_busy: u64,
}

/// What to do where there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Poll,
    /// The last request is too long ago.
    Over,
    /// Others want the CPUs, or that is not known.
    Busy,
}

/// What a look at memory ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// There is something.
    Found,
    /// Nothing yet; the poll is to be asked, without waiting, before the next look.
    Again,
    /// No polling now.
    Over,
}

/// Polling of one main loop.
#[derive(Debug)]
pub struct Polling {
    settings: Settings,
    meter: Meter,
    active: bool,
    /// Memory showed something.
    seen: bool,
    found: u64,
    sleeps_avoided: u64,
    host_busy: u64,
}

impl Polling {
    /// With these settings, which are in range.
    pub fn new(settings: Settings) -> Polling {
        let meter = Meter::open();
        Polling { settings, meter, active: false, seen: false, found: 0, sleeps_avoided: 0, host_busy: 0 }
    }

    /// What is set.
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Sets what is given. A value out of range is an error that says so, and then nothing is set.
    pub fn set(&mut self, poll_us: Option<u32>, poll_idle_percent: Option<u32>) -> Result<(), String> {
        if let Some(us) = poll_us.filter(|us| *us > POLL_US_MAX) {
            return Err(format!("poll_us {us}: expected an integer from 0 to {POLL_US_MAX}"));
        }
        if let Some(percent) = poll_idle_percent.filter(|percent| *percent > 100) {
            return Err(format!("poll_idle_percent {percent}: expected an integer from 0 to 100"));
        }
        let Settings { poll_us: us, poll_idle_percent: percent } = self.settings;
        self.settings =
            Settings { poll_us: poll_us.unwrap_or(us), poll_idle_percent: poll_idle_percent.unwrap_or(percent) };
        Ok(())
    }

    /// Looks at memory for a while, unless the last request, at that time of [`now`], is too long ago or the host is
    /// busy.
    pub fn look(&mut self, last_request: Option<u64>, ready: impl Fn() -> bool) -> Look {
        if self.settings.poll_us == 0 {
            self.active = false;
            return Look::Over;
        }
        let begin = now();
        let verdict = verdict(self.settings, last_request, begin, || self.meter.idle_percent(begin));
        if verdict == Verdict::Poll {
            self.active = true;
            self.seen = watch(begin + SLICE, ready);
            return if self.seen { Look::Found } else { Look::Again };
        }
        self.active = false;
        self.host_busy += u64::from(verdict == Verdict::Busy);
        Look::Over
    }

    /// A turn did something.
    pub fn worked(&mut self) {
        if self.active {
            self.sleeps_avoided += 1;
            self.found += u64::from(self.seen);
            (self.active, self.seen) = (false, false);
        }
    }

    /// For debug-queue.
    pub fn report(&self) -> PollingReport {
        PollingReport {
            settings: self.settings,
            active: self.active,
            host_idle_percent: self.meter.percent,
            found: self.found,
            sleeps_avoided: self.sleeps_avoided,
            host_busy: self.host_busy,
        }
    }
}

/// Looks at memory until that time of [`now`]. True: there is something.
pub fn watch(until: u64, ready: impl Fn() -> bool) -> bool {
    loop {
        for _ in 0..16 {
            if ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        if now() >= until {
            return false;
        }
    }
}

/// The host's CPUs are asked for only where all else is in favour.
fn verdict(
    settings: Settings,
    last_request: Option<u64>,
    now: u64,
    idle_percent: impl FnOnce() -> Option<u32>,
) -> Verdict {
    let for_ns = u64::from(settings.poll_us) * 1000;
    if last_request.is_none_or(|last| now.saturating_sub(last) >= for_ns) {
        return Verdict::Over;
    }
    let wanted = settings.poll_idle_percent;
    if wanted == 0 || idle_percent().is_some_and(|idle| idle >= wanted) { Verdict::Poll } else { Verdict::Busy }
}

/// What the host's CPUs did since it started, all together, in the kernel's ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CpuTimes {
    /// Idle, or with nothing but I/O to wait for.
    idle: u64,
    total: u64,
}

impl CpuTimes {
    /// From the beginning of /proc/stat (proc(5)): `cpu`, then user, nice, system, idle, iowait, irq, softirq, steal.
    /// What follows is counted in user and nice already. None: that is not what it says.
    fn parse(text: &[u8]) -> Option<CpuTimes> {
        let end = text.iter().position(|byte| *byte == b'\n')?;
        let mut fields = std::str::from_utf8(&text[..end]).ok()?.split_ascii_whitespace();
        if fields.next() != Some("cpu") {
            return None;
        }
        let mut times = CpuTimes { idle: 0, total: 0 };
        let mut count = 0;
        for field in fields.take(8) {
            let ticks: u64 = field.parse().ok()?;
            times.total = times.total.checked_add(ticks)?;
            // No more than the total, which has not overflowed.
            times.idle += if matches!(count, 3 | 4) { ticks } else { 0 };
            count += 1;
        }
        (count >= 4).then_some(times)
    }

    /// How much was idle since `before`, per cent. None: no time has passed.
    fn idle_since(self, before: CpuTimes) -> Option<u32> {
        let total = self.total.checked_sub(before.total).filter(|total| *total > 0)?;
        // iowait can go backwards.
        let idle = self.idle.saturating_sub(before.idle).min(total);
        Some((u128::from(idle) * 100 / u128::from(total)) as u32)
    }
}

/// Measures how idle the host is.
#[derive(Debug)]
struct Meter {
    /// /proc/stat. The kernel has a buffer for it as long as it is open: a look needs no memory, which a host may not
    /// have to give before our disk does its I/O.
    file: Option<File>,
    /// Of the last look, ns.
    at: u64,
    times: Option<CpuTimes>,
    percent: Option<u32>,
}

impl Meter {
    fn open() -> Meter {
        let mut meter = Meter { file: File::open("/proc/stat").ok(), at: now(), times: None, percent: None };
        meter.times = meter.read();
        meter
    }

    fn read(&self) -> Option<CpuTimes> {
        // Room for the ten largest numbers.
        let mut line = [0; 256];
        let count = self.file.as_ref()?.read_at(&mut line, 0).ok()?;
        CpuTimes::parse(&line[..count])
    }

    /// The last measurement, or a new one if that is long ago.
    fn idle_percent(&mut self, now: u64) -> Option<u32> {
        if now >= self.at + MEASURE {
            let times = self.read();
            self.measured(now, times);
        }
        self.percent
    }

    fn measured(&mut self, now: u64, times: Option<CpuTimes>) {
        self.at = now;
        self.percent = times.zip(self.times).and_then(|(times, before)| times.idle_since(before));
        self.times = times;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SET: Settings = Settings { poll_us: 100, poll_idle_percent: 50 };

    #[test]
    fn the_first_line_of_proc_stat_is_idle_and_total() {
        let text =
            b"cpu  559016 7 203997 1710225 10495 3 10161 1011 99 98\ncpu0 257384 0 83574 906765 2611 0 726 498 0 0\n";
        let total = 559016 + 7 + 203997 + 1710225 + 10495 + 3 + 10161 + 1011;
        assert_eq!(CpuTimes::parse(text), Some(CpuTimes { idle: 1710225 + 10495, total }));
        // Old kernels have four.
        assert_eq!(CpuTimes::parse(b"cpu 1 2 3 4\n"), Some(CpuTimes { idle: 4, total: 10 }));
        assert!(Meter::open().times.is_some(), "this machine's own");
    }

    #[test]
    fn what_is_no_proc_stat_is_nothing() {
        let malformed: [&[u8]; 11] = [
            b"",
            b"\n",
            b"cpu\n",
            b"cpu 1 2 3\n",
            b"cpu 1 2 3 4",
            b"cpu0 1 2 3 4\n",
            b"1 2 3 4\n",
            b"cpu 1 2 -3 4\n",
            b"cpu 1 2 x 4\n",
            b"cpu 1 2 3 18446744073709551615\n",
            b"cpu 1 2 3 \xff\n",
        ];
        for text in malformed {
            assert_eq!(CpuTimes::parse(text), None, "{}", String::from_utf8_lossy(text));
        }
    }

    #[test]
    fn the_idle_share_is_of_the_last_interval() {
        let at = |idle, total| CpuTimes { idle, total };
        assert_eq!(at(150, 300).idle_since(at(100, 200)), Some(50));
        assert_eq!(at(199, 200).idle_since(at(0, 0)), Some(99));
        assert_eq!(at(99, 300).idle_since(at(100, 200)), Some(0), "iowait went backwards");
        assert_eq!(at(100, 200).idle_since(at(100, 200)), None);
        assert_eq!(at(0, 1).idle_since(at(100, 200)), None);
        assert_eq!(at(u64::MAX, u64::MAX).idle_since(at(0, 0)), Some(100));
        let mut meter = Meter { file: None, at: 0, times: Some(at(0, 0)), percent: None };
        meter.measured(1, Some(at(30, 100)));
        assert_eq!((meter.at, meter.percent), (1, Some(30)));
        assert_eq!(meter.idle_percent(MEASURE), Some(30), "not again before its time");
        assert_eq!(meter.idle_percent(MEASURE + 1), None, "and what can't be read is not known");
    }

    #[test]
    fn polling_goes_on_for_its_time_while_the_host_is_idle() {
        let cases = [
            (SET, None, Some(100), Verdict::Over),
            (SET, Some(1_000_000), Some(50), Verdict::Poll),
            (SET, Some(900_001), Some(50), Verdict::Poll),
            (SET, Some(900_000), Some(50), Verdict::Over),
            (SET, Some(1_000_000), Some(49), Verdict::Busy),
            (SET, Some(1_000_000), None, Verdict::Busy),
            (SET, Some(0), Some(0), Verdict::Over),
            (Settings { poll_idle_percent: 0, ..SET }, Some(1_000_000), None, Verdict::Poll),
            (Settings { poll_idle_percent: 100, ..SET }, Some(1_000_000), Some(99), Verdict::Busy),
            (Settings { poll_us: 0, ..SET }, Some(1_000_000), Some(100), Verdict::Over),
        ];
        for (settings, last, idle, expected) in cases {
            assert_eq!(verdict(settings, last, 1_000_000, || idle), expected, "{settings:?} {last:?} {idle:?}");
        }
        let unasked = || panic!("nobody needs to know");
        assert_eq!(verdict(SET, Some(0), 1_000_000, unasked), Verdict::Over);
        assert_eq!(verdict(Settings { poll_idle_percent: 0, ..SET }, Some(1), 1, unasked), Verdict::Poll);
    }

    #[test]
    fn what_polling_found_is_told_from_what_an_event_brought() {
        let mut polling = Polling::new(Settings { poll_us: POLL_US_MAX, poll_idle_percent: 0 });
        let counts = |polling: &Polling| {
            let report = polling.report();
            (report.active, report.found, report.sleeps_avoided, report.host_busy)
        };
        polling.worked();
        assert_eq!((polling.look(None, || true), counts(&polling)), (Look::Over, (false, 0, 0, 0)));
        // In the future, lest the test be too slow.
        let last = Some(u64::MAX);
        assert_eq!((polling.look(last, || true), counts(&polling)), (Look::Found, (true, 0, 0, 0)));
        polling.worked();
        assert_eq!(counts(&polling), (false, 1, 1, 0));
        assert_eq!((polling.look(last, || false), counts(&polling)), (Look::Again, (true, 1, 1, 0)));
        polling.worked();
        assert_eq!(counts(&polling), (false, 1, 2, 0));
        polling.set(None, Some(100)).unwrap();
        polling.meter = Meter { file: None, at: now(), times: None, percent: None };
        assert_eq!((polling.look(last, || true), counts(&polling)), (Look::Over, (false, 1, 2, 1)));
        polling.set(Some(0), None).unwrap();
        assert_eq!((polling.look(last, || true), counts(&polling)), (Look::Over, (false, 1, 2, 1)));
    }

    #[test]
    fn a_setting_out_of_range_sets_nothing() {
        let mut polling = Polling::new(SET);
        for (us, percent) in [(Some(POLL_US_MAX + 1), None), (Some(1), Some(101)), (Some(u32::MAX), Some(1))] {
            assert!(polling.set(us, percent).unwrap_err().contains("expected an integer from 0 to"));
            assert_eq!(polling.settings(), SET);
        }
        polling.set(Some(POLL_US_MAX), Some(100)).unwrap();
        polling.set(None, None).unwrap();
        assert_eq!(polling.settings(), Settings { poll_us: POLL_US_MAX, poll_idle_percent: 100 });
    }
}
