//! ENGINE, THROTTLE and FAULT: another engine or other limits while the disk is in use, and the hand on the faults that are configured.

use nix::errno::Errno;
use slog::{Logger, info};
use zerocopy::IntoBytes;

use super::answer::with_json;
use super::proto::{EngineChange, FaultChange, Message, ThrottleChange, engine, fault, kind, throttle as flag};
use crate::config::Throttle;
use crate::disk::{Disk, SwitchError, Wanted};
use crate::engine::fault::Faults;

/// The answer to ENGINE. None: it comes when the disk has changed, by [`switched`].
pub(super) fn change(request: &Message, disk: &mut Disk) -> Option<Vec<u8>> {
    let change: EngineChange = request.member();
    let cookie = request.cookie;
    let given = |flag, value: u32| (change.flags & flag != 0).then_some(value);
    let index = |flag, value| given(flag, value).map(|value| value as usize);
    let (name, submit) = (index(engine::SET_NAME, change.name), index(engine::SET_SUBMIT, change.submit));
    let wanted = Wanted {
        name: name.and_then(|index| engine::NAMES.get(index).copied()),
        submit: submit.and_then(|index| engine::SUBMIT_MODES.get(index).copied()),
    };
    let threads =
        (given(engine::SET_THREADS_MIN, change.threads_min), given(engine::SET_THREADS_MAX, change.threads_max));
    if change.flags & !engine::ALL != 0
        || name.is_some() != wanted.name.is_some()
        || submit.is_some() != wanted.submit.is_some()
    {
        let text = "an engine, a way to submit or a flag that is not known here";
        return Some(Message::error(cookie, Errno::EINVAL as i32, text).as_bytes().to_vec());
    }
    if threads != (None, None)
        && let Err(error) = disk.set_threads(threads.0, threads.1)
    {
        return Some(refused(cookie, disk, &error));
    }
    if wanted == Wanted::default() {
        return Some(with_json(kind::ENGINE_RSP, cookie, &disk.engine_report()));
    }
    disk.switch(wanted).err().map(|error| refused(cookie, disk, &error))
}

/// The late answer to ENGINE.
pub(super) fn switched(cookie: u16, disk: &Disk, outcome: &Result<(), SwitchError>) -> Vec<u8> {
    match outcome {
        Ok(()) => with_json(kind::ENGINE_RSP, cookie, &disk.engine_report()),
        Err(error) => refused(cookie, disk, error),
    }
}

/// The answer to THROTTLE.
pub(super) fn throttle(request: &Message, disk: &mut Disk) -> Vec<u8> {
    let ThrottleChange { flags, values, .. } = request.member();
    let error = |errno: Errno, text: String| Message::error(request.cookie, errno as i32, &text).as_bytes().to_vec();
    if flags & !flag::ALL != 0 {
        return error(Errno::EINVAL, format!("flags {flags:#x} are not known here"));
    }
    if flags != 0 {
        let mut wanted = if flags & flag::OFF != 0 { Throttle::default() } else { disk.throttle() };
        for (key, value) in values.into_iter().enumerate().filter(|(key, _)| flags & (1 << key) != 0) {
            wanted.set(key, (value != 0).then_some(value));
        }
        if let Err(why) = disk.set_throttle(wanted) {
            return error(why.errno(), format!("{}: {why}", disk.info().name));
        }
    }
    with_json(kind::THROTTLE_RSP, request.cookie, &disk.throttle_report())
}

/// The answer to FAULT.
pub(super) fn faults(request: &Message, disk: &Disk, log: &Logger) -> Vec<u8> {
    let FaultChange { flags } = request.member();
    let Some(faults) = disk.engine().submit.capability::<Faults>() else {
        let text = "no faults are configured: [[fault]] in its configuration";
        return Message::error(request.cookie, Errno::EOPNOTSUPP as i32, text).as_bytes().to_vec();
    };
    if flags & !fault::ALL != 0 {
        let text = format!("flags {flags:#x} are not known here");
        return Message::error(request.cookie, Errno::EINVAL as i32, &text).as_bytes().to_vec();
    }
    if flags & (fault::ENABLE | fault::DISABLE) != 0 {
        faults.enable(flags & fault::ENABLE != 0);
        info!(log, "faults"; "enabled" => flags & fault::ENABLE != 0);
    }
    if flags & fault::RELEASE != 0 {
        info!(log, "stuck I/Os are released"; "count" => faults.release());
    }
    with_json(kind::FAULT_RSP, request.cookie, &faults.report())
}

fn refused(cookie: u16, disk: &Disk, error: &SwitchError) -> Vec<u8> {
    let text = format!("{}: {error}", disk.info().name);
    Message::error(cookie, error.errno() as i32, &text).as_bytes().to_vec()
}
