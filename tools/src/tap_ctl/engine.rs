//! `engine` and `fault`.

use std::io::{self, Write};

use tapdisk::control::proto::{EngineChange, engine};
use tapdisk::disk::EngineReport;
use tapdisk::engine::fault::FaultsReport;

use super::show::{parse, verbatim};

/// An engine's number.
pub(super) fn name(text: &str) -> Result<u32, String> {
    number(text, &engine::NAMES.map(|name| name.name()))
}

/// The number of a way to submit.
pub(super) fn submit_mode(text: &str) -> Result<u32, String> {
    number(text, &engine::SUBMIT_MODES.map(|mode| mode.name()))
}

fn number(text: &str, known: &[&str]) -> Result<u32, String> {
    let index = known.iter().position(|name| *name == text);
    index.map(|index| index as u32).ok_or_else(|| format!("expected one of {}", known.join(", ")))
}

/// What is given is to be changed.
pub(super) fn change(
    name: Option<u32>,
    submit: Option<u32>,
    threads_min: Option<u32>,
    threads_max: Option<u32>,
) -> EngineChange {
    let flag = |flag, value: Option<u32>| if value.is_some() { flag } else { 0 };
    EngineChange {
        flags: flag(engine::SET_NAME, name)
            | flag(engine::SET_SUBMIT, submit)
            | flag(engine::SET_THREADS_MIN, threads_min)
            | flag(engine::SET_THREADS_MAX, threads_max),
        name: name.unwrap_or(0),
        submit: submit.unwrap_or(0),
        threads_min: threads_min.unwrap_or(0),
        threads_max: threads_max.unwrap_or(0),
    }
}

/// The engine in force.
pub(super) fn show(out: &mut impl Write, text: &str, json: bool) -> io::Result<()> {
    if json {
        return verbatim(out, text, json);
    }
    line(out, &parse(text)?)
}

/// The same, as a line.
pub(super) fn line(out: &mut impl Write, report: &EngineReport) -> io::Result<()> {
    write!(out, "engine={} submit={} depth={}", report.name, report.submit.name(), report.depth)?;
    if let Some(pool) = &report.pool {
        write!(
            out,
            " threads={} ({} to {}) idle={} queued={} running={}",
            pool.threads, pool.min, pool.max, pool.idle, pool.queued, pool.running
        )?;
    }
    writeln!(out)
}

/// The faults and what they have hit.
pub(super) fn show_faults(out: &mut impl Write, text: &str, json: bool) -> io::Result<()> {
    if json {
        return verbatim(out, text, json);
    }
    faults(out, &parse(text)?)
}

/// The same, for debug-queue too.
pub(super) fn faults(out: &mut impl Write, report: &FaultsReport) -> io::Result<()> {
    let state = if report.enabled { "on" } else { "off" };
    writeln!(out, "faults: {state}, {} stuck, {} delayed", report.stuck, report.delayed)?;
    for fault in &report.faults {
        writeln!(out, "  {}", serde_json::to_string(fault)?)?;
    }
    Ok(())
}
