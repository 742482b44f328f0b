//! What the commands print.

use std::io::{self, Write};

use serde::de::DeserializeOwned;
use serde_json::Value;
use tapdisk::disk::{DebugQueue, RequestReport, Stage};
use tapdisk::polling::Settings;
use tapdisk::text::one_line;

use super::{coalesce, engine};

/// Prints what a tapdisk says; with --json only if it is JSON, because that is what our output is then, on a line.
pub(super) fn verbatim(out: &mut impl Write, text: &str, json: bool) -> io::Result<()> {
    if json {
        return writeln!(out, "{}", serde_json::from_str::<Value>(text)?);
    }
    writeln!(out, "{text}")
}

/// What a tapdisk says in JSON, for people: none of its texts makes two lines.
pub(super) fn parse<T: DeserializeOwned>(text: &str) -> io::Result<T> {
    fn plain(value: &mut Value) {
        match value {
            Value::String(text) => *text = one_line(text).into_owned(),
            Value::Array(values) => values.iter_mut().for_each(plain),
            Value::Object(values) => {
                *values = std::mem::take(values)
                    .into_iter()
                    .map(|(name, value)| (one_line(&name).into_owned(), value))
                    .collect();
                values.values_mut().for_each(plain);
            }
            _ => {}
        }
    }
    let mut value = serde_json::from_str(text)?;
    plain(&mut value);
    Ok(serde_json::from_value(value)?)
}

/// `debug-queue`.
pub(super) fn debug_queue(out: &mut impl Write, text: &str, json: bool) -> io::Result<()> {
    if json {
        return verbatim(out, text, json);
    }
    let disk: &DebugQueue = &parse(text)?;
    let writable = if disk.read_only { "read-only" } else { "writable" };
    writeln!(
        out,
        "{}: {}, {} bytes, {}-byte sectors, {writable}",
        one_line(&disk.name),
        disk.state,
        disk.size,
        disk.sector_size
    )?;
    if let Some(log) = &disk.changed_blocks {
        writeln!(out, "changed blocks: {}", one_line(&log.display().to_string()))?;
    }
    let q = &disk.queue;
    writeln!(
        out,
        "queue: size {}, depth {}; waiting {}, pending {} in {} I/Os; slots {} of {}",
        q.size, q.depth, q.waiting, q.pending, q.in_flight, disk.slots_used, disk.slots
    )?;
    let batch = if q.batches == 0 { 0.0 } else { q.submitted as f64 / q.batches as f64 };
    writeln!(
        out,
        "tiocbs: {} queued, {} merged into others; I/Os: {} submitted in {} batches (mean {batch:.1}, largest {}), {} by \
         the main loop, {} would have blocked",
        q.queued, q.merged, q.submitted, q.batches, q.largest_batch, q.inline, q.would_block
    )?;
    writeln!(
        out,
        "trouble: {} busy (EAGAIN), {} refused, {} short and resubmitted, {} split, {} retries, {} tiocbs wait for a retry, \
         {} of them for space",
        q.busy, q.refused, q.resubmitted, q.split, q.retried, q.parked, q.without_space
    )?;
    if let Some(us) = q.submitting_us {
        writeln!(out, "a submission has been running for {us} us")?;
    }
    engine::line(out, &disk.engine)?;
    if let Some(faults) = &disk.faults {
        engine::faults(out, faults)?;
    }
    let (filters, images): (Vec<_>, Vec<_>) = disk.layers.iter().partition(|layer| layer.path.is_empty());
    for filter in filters {
        let counters: Vec<_> = filter.counters.iter().map(|(name, value)| format!("{value} {name}")).collect();
        writeln!(out, "filter: {}; {}", filter.format, counters.join(", "))?;
    }
    for (depth, layer) in images.into_iter().enumerate() {
        let counters: Vec<_> = layer.counters.iter().map(|(name, value)| format!("{value} {name}")).collect();
        let counters = if counters.is_empty() { String::new() } else { format!("; {}", counters.join(", ")) };
        writeln!(out, "layer {depth}: {}, {}, {} bytes{counters}", one_line(&layer.path), layer.format, layer.size)?;
    }
    if disk.coalesce.stage != Stage::None {
        write!(out, "coalesce: ")?;
        coalesce::show(out, &disk.coalesce)?;
    }
    polling(out, disk)?;
    operations(out, disk)?;
    writeln!(out, "requests: {}, {} of them stuck", disk.requests.len(), disk.stuck)?;
    for request in &disk.requests {
        show_request(out, request)?;
    }
    for frontend in &disk.frontends {
        writeln!(out, "frontend: {}", serde_json::to_string_pretty(frontend)?)?;
    }
    Ok(())
}

/// `poll`.
pub(super) fn poll(out: &mut impl Write, settings: Settings, json: bool) -> io::Result<()> {
    if json {
        return writeln!(out, "{}", serde_json::to_string(&settings)?);
    }
    let Settings { poll_us, poll_idle_percent } = settings;
    writeln!(out, "poll_us={poll_us} poll_idle_percent={poll_idle_percent}")
}

fn polling(out: &mut impl Write, disk: &DebugQueue) -> io::Result<()> {
    let p = &disk.polling;
    let Settings { poll_us, poll_idle_percent } = p.settings;
    let host = p.host_idle_percent.map_or("not measured".to_owned(), |idle| format!("{idle} % idle"));
    writeln!(
        out,
        "polling: {poll_us} us while the host is {poll_idle_percent} % idle ({host}){}; {} turns found by it, {} sleeps \
         avoided, {} times the host was busy",
        if p.active { ", now" } else { "" },
        p.found,
        p.sleeps_avoided,
        p.host_busy
    )
}

fn operations(out: &mut impl Write, disk: &DebugQueue) -> io::Result<()> {
    writeln!(
        out,
        "{:>12} {:>12} {:>14} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "operation", "completed", "sectors", "errors", "mean us", "p50 us", "p99 us", "p99.9 us", "max us"
    )?;
    for op in &disk.operations {
        writeln!(
            out,
            "{:>12} {:>12} {:>14} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9}",
            op.op, op.completed, op.sectors, op.errors, op.mean_us, op.p50_us, op.p99_us, op.p999_us, op.max_us
        )?;
    }
    Ok(())
}

fn show_request(out: &mut impl Write, request: &RequestReport) -> io::Result<()> {
    let RequestReport { slot, op, offset, len, age_us, stuck, held_by, tiocbs } = request;
    let stuck = if *stuck { ", STUCK" } else { "" };
    writeln!(out, "  slot {slot}: {op} {offset}+{len}, age {age_us} us{stuck}, held by {held_by}")?;
    for tiocb in tiocbs {
        let io = tiocb.io.map_or(String::new(), |io| format!(", I/O {io}"));
        let merged = tiocb.merged_into.map_or(String::new(), |head| format!(", merged into tiocb {head}"));
        let (number, offset, len, held_by) = (tiocb.tiocb, tiocb.offset, tiocb.len, &tiocb.held_by);
        let (layer, path) = (tiocb.layer, one_line(&tiocb.path));
        writeln!(out, "    tiocb {number}: layer {layer}, {path}, {offset}+{len}, {held_by}{io}{merged}")?;
    }
    Ok(())
}
