//! What blktap has no messages for.

use std::io;
use std::path::Path;

use nix::errno::Errno;

use super::super::proto::{Coalesce, EngineChange, FaultChange, Message, Poll, Resized, ThrottleChange, kind, poll};
use super::{TIMEOUT, ask, ask_for_text};
use crate::polling::Settings;

/// Changes a disk's engine, or only asks for it: the JSON of [`EngineReport`](crate::disk::EngineReport).
pub fn engine(directory: &Path, pid: i32, minor: u16, change: &EngineChange) -> io::Result<String> {
    ask_for_text(directory, pid, &Message::new(kind::ENGINE, minor).with(change))
}

/// Steers a disk's faults, [`fault`](super::super::proto::fault) bits: the JSON of
/// [`FaultsReport`](crate::engine::fault::FaultsReport).
pub fn faults(directory: &Path, pid: i32, minor: u16, flags: u32) -> io::Result<String> {
    ask_for_text(directory, pid, &Message::new(kind::FAULT, minor).with(&FaultChange { flags }))
}

/// Sets a disk's limits, or only asks for them: the JSON of [`ThrottleReport`](crate::disk::ThrottleReport).
pub fn throttle(directory: &Path, pid: i32, minor: u16, change: &ThrottleChange) -> io::Result<String> {
    ask_for_text(directory, pid, &Message::new(kind::THROTTLE, minor).with(change))
}

/// Sets what is given of a main loop's polling, and gives what is in force then.
pub fn poll(
    directory: &Path,
    pid: i32,
    minor: u16,
    poll_us: Option<u32>,
    poll_idle_percent: Option<u32>,
) -> io::Result<Settings> {
    let flag = |flag, value: Option<u32>| if value.is_some() { flag } else { 0 };
    let wanted = Poll {
        poll_us: poll_us.unwrap_or(0),
        poll_idle_percent: poll_idle_percent.unwrap_or(0),
        flags: flag(poll::SET_US, poll_us) | flag(poll::SET_IDLE_PERCENT, poll_idle_percent),
    };
    let (_, answer) = ask(directory, pid, &Message::new(kind::POLL, minor).with(&wanted), Some(TIMEOUT))?;
    let Poll { poll_us, poll_idle_percent, .. } = answer.member();
    Ok(Settings { poll_us, poll_idle_percent })
}

/// Has a disk look whether its file has grown, and gives its size in bytes before and now.
pub fn resize(directory: &Path, pid: i32, minor: u16) -> io::Result<(u64, u64)> {
    let (_, answer) = ask(directory, pid, &Message::new(kind::RESIZE, minor), Some(TIMEOUT))?;
    let Resized { old, new } = answer.member();
    Ok((old, new))
}

/// Merges an image of a disk's chain into its parent, [`coalesce`](super::super::proto::coalesce) bits, at most `rate` bytes a
/// second; an empty path means the image below the leaf. Gives the JSON of [`CoalesceReport`](crate::disk::CoalesceReport).
pub fn coalesce(directory: &Path, pid: i32, minor: u16, flags: u32, rate: u64, image: &str) -> io::Result<String> {
    let wanted = Coalesce::new(flags, rate, image).ok_or(Errno::ENAMETOOLONG)?;
    ask_for_text(directory, pid, &Message::new(kind::COALESCE, minor).with(&wanted))
}
