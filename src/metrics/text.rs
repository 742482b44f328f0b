//! Metrics as OpenMetrics text, version 1.0 (<https://prometheus.io/docs/specs/om/open_metrics_spec/>): families one after the
//! other, each with the samples of all disks of all processes.

use std::fmt::{Display, Formatter, Result};

use super::{DiskMetrics, LayerMetrics, ProcessMetrics, STATES};
use crate::disk::LimitReport;
use crate::stats::OpTraffic;
use crate::stats::latency::{BUCKETS, Latency};
use crate::text::one_line;

/// What HTTP says of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Prints what these processes have told.
#[derive(Clone, Copy, Debug)]
pub struct Exposition<'a>(pub &'a [ProcessMetrics]);

/// A family of samples with one value: name without `_total`, unit, help, value.
type Family<T> = (&'static str, &'static str, &'static str, fn(&T) -> u64);

const PROCESS_GAUGES: [Family<ProcessMetrics>; 2] = [
    ("tapdisk_process_resident_memory_bytes", "bytes", "Resident memory of the process.", |process| process.resident),
    ("tapdisk_process_locked_memory_bytes", "bytes", "Locked memory of the process.", |process| process.locked),
];

const DISK_GAUGES: [Family<DiskMetrics>; 10] = [
    ("tapdisk_disk_size_bytes", "bytes", "Size of the disk.", |disk| disk.size),
    ("tapdisk_disk_memory_bytes", "bytes", "Memory that the disk has from its start.", |disk| disk.memory),
    ("tapdisk_requests_outstanding", "", "Requests that are taken and not answered.", |disk| disk.outstanding as u64),
    ("tapdisk_requests_stuck", "", "Requests older than the watchdog allows.", |disk| disk.stuck as u64),
    ("tapdisk_requests_held", "", "Requests that a limit holds back.", |disk| disk.throttle.held as u64),
    ("tapdisk_queue_depth", "", "I/Os that the engine can have in flight.", |disk| disk.queue.depth as u64),
    ("tapdisk_queue_in_flight", "", "I/Os that the engine has.", |disk| disk.queue.in_flight as u64),
    ("tapdisk_queue_waiting", "", "Transfers that wait for the engine.", |disk| disk.queue.waiting as u64),
    ("tapdisk_queue_parked", "", "Transfers that wait to be tried again.", |disk| disk.queue.parked as u64),
    ("tapdisk_queue_without_space", "", "Transfers that lack space, held or just being tried again.", |disk| {
        disk.queue.without_space as u64
    }),
];

const DISK_COUNTERS: [Family<DiskMetrics>; 9] = [
    ("tapdisk_requests_held_before", "", "Requests that a limit held back, and that went on.", |disk| {
        disk.throttle.held_before
    }),
    ("tapdisk_queue_transfers", "", "Transfers between memory and a file.", |disk| disk.queue.queued),
    ("tapdisk_queue_merged", "", "Transfers that were merged into the I/O of another.", |disk| disk.queue.merged),
    ("tapdisk_queue_split", "", "Merged I/Os that failed and were split.", |disk| disk.queue.split),
    ("tapdisk_queue_resubmitted", "", "I/Os that came back short and went on.", |disk| disk.queue.resubmitted),
    ("tapdisk_queue_retries", "", "Times that a failed transfer was to be tried again.", |disk| disk.queue.retried),
    ("tapdisk_queue_submitted", "", "I/Os that the engine took.", |disk| disk.queue.submitted),
    ("tapdisk_queue_batches", "", "Batches in which it took them.", |disk| disk.queue.batches),
    ("tapdisk_queue_busy", "", "Times that the engine had no room.", |disk| disk.queue.busy),
];

const LIMITS: [Family<LimitReport>; 4] = [
    ("tapdisk_limit_bytes", "bytes", "Bytes a second that pass; no sample: there is no limit.", |limit| {
        limit.bytes_per_s.unwrap_or(0)
    }),
    ("tapdisk_limit_burst_bytes", "bytes", "Bytes that pass at once.", |limit| limit.bytes_burst.unwrap_or(0)),
    ("tapdisk_limit_requests", "", "Requests a second that pass; no sample: there is no limit.", |limit| {
        limit.requests_per_s.unwrap_or(0)
    }),
    ("tapdisk_limit_burst_requests", "", "Requests that pass at once.", |limit| limit.requests_burst.unwrap_or(0)),
];

const REQUEST_COUNTERS: [Family<OpTraffic>; 3] = [
    ("tapdisk_requests", "", "Requests that were answered.", |op| op.latency.count()),
    ("tapdisk_request_bytes", "bytes", "Bytes of requests without error.", |op| op.bytes),
    ("tapdisk_request_errors", "", "Requests that were answered with an error.", |op| op.errors),
];

const LAYER_COUNTERS: [Family<OpTraffic>; 2] = [
    ("tapdisk_layer_bytes", "bytes", "Bytes of a layer's transfers without error.", |op| op.bytes),
    ("tapdisk_layer_errors", "", "Transfers of a layer that failed.", |op| op.errors),
];

impl Display for Exposition<'_> {
    fn fmt(&self, out: &mut Formatter) -> Result {
        self.processes(out)?;
        self.disks(out)?;
        self.limits(out)?;
        for (name, unit, help, value) in REQUEST_COUNTERS {
            family(out, name, "counter", unit, help)?;
            self.each_op(|labels, op| sample(out, name, "_total", labels, value(op)))?;
        }
        let name = "tapdisk_request_duration_seconds";
        family(out, name, "histogram", "seconds", "From when a request was pulled until it was answered.")?;
        self.each_op(|labels, op| histogram(out, name, labels, &op.latency))?;
        self.layers(out)?;
        out.write_str("# EOF\n")
    }
}

impl Exposition<'_> {
    fn processes(&self, out: &mut Formatter) -> Result {
        family(out, "tapdisk_process_up", "gauge", "", "Whether the process answers.")?;
        for process in self.0 {
            sample(out, "tapdisk_process_up", "", &pid(process), u64::from(process.up))?;
        }
        for (name, unit, help, value) in PROCESS_GAUGES {
            family(out, name, "gauge", unit, help)?;
            for process in self.0.iter().filter(|process| process.up) {
                sample(out, name, "", &pid(process), value(process))?;
            }
        }
        Ok(())
    }

    fn disks(&self, out: &mut Formatter) -> Result {
        family(out, "tapdisk_disk", "info", "", "The disk and its engine.")?;
        self.each_disk(|labels, disk| {
            let labels = format!(
                "{labels},engine=\"{}\",submit=\"{}\",read_only=\"{}\"",
                Escaped(&disk.engine),
                disk.submit.name(),
                disk.read_only
            );
            sample(out, "tapdisk_disk", "_info", &labels, 1)
        })?;
        family(out, "tapdisk_disk_state", "stateset", "", "The state of the disk.")?;
        self.each_disk(|labels, disk| {
            STATES.iter().try_for_each(|state| {
                let labels = format!("{labels},tapdisk_disk_state=\"{state}\"");
                sample(out, "tapdisk_disk_state", "", &labels, u64::from(disk.state == *state))
            })
        })?;
        for (kind, suffix, families) in
            [("gauge", "", DISK_GAUGES.as_slice()), ("counter", "_total", DISK_COUNTERS.as_slice())]
        {
            for (name, unit, help, value) in families {
                family(out, name, kind, unit, help)?;
                self.each_disk(|labels, disk| sample(out, name, suffix, labels, value(disk)))?;
            }
        }
        let name = "tapdisk_oldest_request_age_seconds";
        family(out, name, "gauge", "seconds", "Age of the oldest request that is not answered; 0: there is none.")?;
        self.each_disk(|labels, disk| {
            sample(out, name, "", labels, Seconds { ns: disk.oldest_us.saturating_mul(1000) })
        })
    }

    fn limits(&self, out: &mut Formatter) -> Result {
        for (name, unit, help, value) in LIMITS {
            family(out, name, "gauge", unit, help)?;
            self.each_disk(|labels, disk| {
                let limits =
                    [("read", &disk.throttle.read), ("write", &disk.throttle.write), ("all", &disk.throttle.all)];
                let set = limits.into_iter().map(|(of, limit)| (of, value(limit))).filter(|(_, value)| *value > 0);
                set.into_iter()
                    .try_for_each(|(of, value)| sample(out, name, "", &format!("{labels},of=\"{of}\""), value))
            })?;
        }
        let name = "tapdisk_requests_held_seconds";
        family(
            out,
            name,
            "counter",
            "seconds",
            "For how long limits held back requests that went on, all together.",
        )?;
        self.each_disk(|labels, disk| {
            sample(out, name, "_total", labels, Seconds { ns: disk.throttle.held_us.saturating_mul(1000) })
        })
    }

    fn layers(&self, out: &mut Formatter) -> Result {
        family(out, "tapdisk_layer", "info", "", "An image of the chain; depth 0 is the one that is written.")?;
        self.each_disk(|labels, disk| {
            (0..).zip(&disk.layers).try_for_each(|(depth, layer): (usize, _)| {
                let labels = format!("{},format=\"{}\",depth=\"{depth}\"", in_layer(labels, layer), layer.format);
                sample(out, "tapdisk_layer", "_info", &labels, 1)
            })
        })?;
        for (name, unit, help, value) in LAYER_COUNTERS {
            family(out, name, "counter", unit, help)?;
            self.each_layer_op(|labels, op| sample(out, name, "_total", labels, value(op)))?;
        }
        let name = "tapdisk_layer_transfer_duration_seconds";
        family(out, name, "histogram", "seconds", "From when a transfer of a layer was queued until it ended.")?;
        self.each_layer_op(|labels, op| histogram(out, name, labels, &op.latency))
    }

    fn each_disk(&self, mut each: impl FnMut(&str, &DiskMetrics) -> Result) -> Result {
        for process in self.0 {
            for disk in &process.disks {
                each(&format!("{},minor=\"{}\",image=\"{}\"", pid(process), disk.minor, Escaped(&disk.image)), disk)?;
            }
        }
        Ok(())
    }

    fn each_op(&self, mut each: impl FnMut(&str, &OpTraffic) -> Result) -> Result {
        self.each_disk(|labels, disk| disk.operations.iter().try_for_each(|op| each(&with_op(labels, op), op)))
    }

    fn each_layer_op(&self, mut each: impl FnMut(&str, &OpTraffic) -> Result) -> Result {
        self.each_disk(|labels, disk| {
            disk.layers.iter().try_for_each(|layer| {
                let labels = in_layer(labels, layer);
                layer.operations.iter().try_for_each(|op| each(&with_op(&labels, op), op))
            })
        })
    }
}

fn pid(process: &ProcessMetrics) -> String {
    format!("pid=\"{}\"", process.pid)
}

fn in_layer(labels: &str, layer: &LayerMetrics) -> String {
    format!("{labels},path=\"{}\"", Escaped(&layer.path))
}

fn with_op(labels: &str, op: &OpTraffic) -> String {
    format!("{labels},op=\"{}\"", Escaped(&op.op))
}

fn family(out: &mut Formatter, name: &str, kind: &str, unit: &str, help: &str) -> Result {
    writeln!(out, "# TYPE {name} {kind}")?;
    if !unit.is_empty() {
        writeln!(out, "# UNIT {name} {unit}")?;
    }
    writeln!(out, "# HELP {name} {help}")
}

fn sample(out: &mut Formatter, name: &str, suffix: &str, labels: &str, value: impl Display) -> Result {
    writeln!(out, "{name}{suffix}{{{labels}}} {value}")
}

fn histogram(out: &mut Formatter, name: &str, labels: &str, latency: &Latency) -> Result {
    let mut count = 0_u64;
    for bucket in 0..BUCKETS {
        count = count.saturating_add(latency.buckets()[bucket]);
        match Latency::bound_us(bucket) {
            Some(us) => writeln!(out, "{name}_bucket{{{labels},le=\"{}\"}} {count}", us as f64 / 1e6)?,
            None => writeln!(out, "{name}_bucket{{{labels},le=\"+Inf\"}} {count}")?,
        }
    }
    sample(out, name, "_count", labels, count)?;
    sample(out, name, "_sum", labels, Seconds { ns: latency.sum_ns() })
}

/// Seconds, with all digits of their nanoseconds.
struct Seconds {
    ns: u64,
}

impl Display for Seconds {
    fn fmt(&self, out: &mut Formatter) -> Result {
        write!(out, "{}.{:09}", self.ns / 1_000_000_000, self.ns % 1_000_000_000)
    }
}

/// A label's value: what would end it or its line is escaped.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, out: &mut Formatter) -> Result {
        for part in self.0.split_inclusive(['\\', '"', '\n']) {
            let (text, last) = part.split_at(part.len() - usize::from(part.ends_with(['\\', '"', '\n'])));
            // Of others OpenMetrics has no escapes: they are shown as such.
            out.write_str(&one_line(text).replace('\\', "\\\\"))?;
            match last {
                "\n" => out.write_str("\\n")?,
                "" => {}
                quoted => write!(out, "\\{quoted}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(Escaped("a\\b\"c\nd\u{e9}\\").to_string(), "a\\\\b\\\"c\\nd\u{e9}\\\\");
        assert_eq!(Escaped("a\r\u{1b}\u{9b}").to_string(), "a\\\\r\\\\u{1b}\\\\u{9b}");
        assert_eq!(Escaped("").to_string(), "");
    }

    #[test]
    fn a_histogram_is_cumulative_and_its_bounds_are_seconds() {
        let mut latency = Latency::default();
        [1000, 3000, 70_000_000_000].into_iter().for_each(|ns| latency.record(ns));
        let op = OpTraffic { op: "read".into(), latency, ..OpTraffic::default() };
        let disk = DiskMetrics { image: "aio:/x".into(), operations: vec![op], ..DiskMetrics::default() };
        let process = ProcessMetrics { pid: 7, up: true, disks: vec![disk], ..ProcessMetrics::default() };
        let text = Exposition(&[process]).to_string();
        let labels = "pid=\"7\",minor=\"0\",image=\"aio:/x\",op=\"read\"";
        for (le, count) in [("0.000001", 1), ("0.000002", 1), ("0.000004", 2), ("67.108864", 2), ("+Inf", 3)] {
            let line = format!("tapdisk_request_duration_seconds_bucket{{{labels},le=\"{le}\"}} {count}\n");
            assert!(text.contains(&line), "{line} in {text}");
        }
        assert!(text.contains(&format!("tapdisk_request_duration_seconds_sum{{{labels}}} 70.000004000\n")));
        assert!(text.ends_with("\n# EOF\n") && text.matches("# EOF").count() == 1);
    }
}
