//! What a message is answered.

use nix::errno::Errno;
use serde::Serialize;
use serde_json::json;
use slog::{Logger, info, warn};
use zerocopy::IntoBytes;

use super::peer::Peer;
use super::proto::{List, Message, MinorList, NO_MINOR, Poll, Resized, Stat, kind, poll, state, string};
use super::{Request, blkif, engine, life, pause};
use crate::config::ChangedBlocks;
use crate::disk::{Disk, ResizeError};
use crate::log::Limiter;
use crate::memory;
use crate::metrics::ProcessMetrics;
use crate::minors::{Minor, MinorError, Minors};
use crate::polling::Polling;
use crate::stats::now;
use crate::sys;

/// What a disk, with that minor, does not do at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Late {
    /// It changes its engine.
    Engine(u16),
    /// It is paused.
    Pause(u16),
    /// It goes on.
    Resume(u16),
    /// Its image is opened.
    Open(u16),
    /// Its image is closed.
    Close(u16),
    /// Its coalesce, asked for by COMMIT, begins.
    Commit(u16),
    /// The same, asked for by COALESCE.
    Coalesce(u16),
    /// Its coalesce ends.
    Cancel(u16),
    /// It looks at its image's size.
    Resize(u16),
    /// It has finished the requests of a guest, which was disconnected: domain and device. The minor is only what the client said.
    Disconnect(u16, u32, u32),
}

impl Late {
    /// The answer, if that is done.
    pub(super) fn answer(self, minors: &mut Minors) -> Option<Vec<u8>> {
        let minor = match self {
            Late::Open(minor) => return life::opened(minor, minors),
            Late::Close(minor) => return life::closed(minor, minors),
            Late::Disconnect(cookie, domain, device) => return blkif::disconnected(cookie, minors, domain, device),
            Late::Engine(minor)
            | Late::Pause(minor)
            | Late::Resume(minor)
            | Late::Commit(minor)
            | Late::Coalesce(minor)
            | Late::Cancel(minor)
            | Late::Resize(minor) => minor,
        };
        // Its image may have been closed meanwhile.
        let Some(disk) = minors.disk_mut(minor) else { return Some(no_disk(minor)) };
        match self {
            Late::Engine(_) => disk.switched().map(|outcome| engine::switched(minor, disk, &outcome)),
            Late::Pause(_) => disk.pause_outcome().map(|outcome| pause::paused(minor, disk, &outcome)),
            Late::Resume(_) => disk.resume_outcome().map(|outcome| pause::resumed(minor, disk, &outcome)),
            Late::Commit(_) => pause::committed(minor, disk),
            Late::Coalesce(_) => pause::coalesced(minor, disk),
            Late::Resize(_) => disk.resized().map(|outcome| resized(minor, disk, outcome)),
            _ => pause::cancelled(minor, disk),
        }
    }
}

/// Bytes that a disk's part of an answer takes at most while it is made: of all disks, and of one with its requests.
const OF_EACH: usize = 64 << 10;
const OF_ONE: usize = 4 << 20;
/// Bytes that a disk takes that is opened, or gets another engine, but for what can fail.
const OF_OPENING: usize = 4 << 20;

/// Bytes that a request takes, but for what can fail. None: it gives memory back, and is done even where there is none.
fn takes(request: &Message, minors: &Minors) -> Option<usize> {
    Some(match request.kind {
        kind::CLOSE | kind::FORCE_SHUTDOWN | kind::DETACH | kind::EXIT | kind::XENBLKIF_DISCONNECT => return None,
        kind::OPEN | kind::RESUME | kind::ENGINE | kind::COALESCE | kind::COMMIT => OF_OPENING,
        kind::DEBUG_QUEUE => OF_ONE,
        kind::STATS | kind::METRICS | kind::LIST => OF_EACH * minors.iter().len().max(1),
        _ => 0,
    })
}

/// The answer to a request for which there is no memory. None: there is.
pub(super) fn without_room(
    request: &Message,
    minors: &Minors,
    limiter: &mut Limiter,
    log: &Logger,
) -> Option<Vec<u8>> {
    let error = memory::room(takes(request, minors)?).err()?;
    if let Some(suppressed) = limiter.allow(now()) {
        warn!(log, "a control message is refused"; "type" => request.kind, "error" => %error, "suppressed_before" => suppressed);
    }
    let errno = error.raw_os_error().map_or(Errno::ENOMEM, sys::errno);
    let text = "there is no memory for that: raise the limit of the tapdisk's memory, or try again later";
    Some(refused(request.cookie, &MinorError::new(errno, text)))
}

/// The whole answer to a request; or what it waits for.
pub fn respond(
    asked: Request<'_>,
    peer: &Peer,
    minors: &mut Minors,
    polling: &mut Polling,
    log: &Logger,
) -> Result<Vec<u8>, Late> {
    let (request, cookie) = (asked.message, asked.message.cookie);
    let named = match peer.check(request).and_then(|()| asked.changed_blocks(peer)) {
        Ok(named) => named,
        Err(error) => return Ok(refused(cookie, &error)),
    };
    Ok(match request.kind {
        kind::PID => {
            let pid = std::process::id() as i32;
            Message::new(kind::PID_RSP, cookie).with(&pid).as_bytes().to_vec()
        }
        kind::ATTACH => life::attach(cookie, minors),
        kind::OPEN => life::open(request, named, minors, peer).ok_or(Late::Open(cookie))?,
        kind::CLOSE | kind::FORCE_SHUTDOWN => life::close(request, minors).ok_or(Late::Close(cookie))?,
        kind::DETACH => life::detach(cookie, minors),
        kind::XENBLKIF_CONNECT => blkif::connect(request, minors, polling, log),
        kind::XENBLKIF_DISCONNECT => blkif::disconnect(request, minors)?,
        kind::LIST_MINORS => list_minors(cookie, minors),
        kind::LIST => list(cookie, minors),
        kind::STATS if cookie == NO_MINOR => {
            let all: Vec<_> = minors.iter().filter_map(Minor::disk).map(|disk| stats(Some(disk))).collect();
            with_json(kind::STATS_RSP, cookie, &all)
        }
        kind::METRICS if cookie == NO_MINOR => metrics(cookie, minors.iter().filter_map(Minor::with_disk)),
        kind::EXIT => {
            info!(log, "told to exit by a control connection");
            minors.end();
            Message::error(cookie, 0, "").as_bytes().to_vec()
        }
        _ => match minors.disk_mut(cookie) {
            Some(disk) => of_disk(request, named, peer, disk, polling, log)?,
            None => without_image(request, named.as_ref(), minors),
        },
    })
}

/// The answer to what is asked of a minor that has no image, or that nobody has attached.
fn without_image(request: &Message, log: Option<&ChangedBlocks>, minors: &mut Minors) -> Vec<u8> {
    let cookie = request.cookie;
    match request.kind {
        // As blktap's has it.
        kind::STATS if minors.iter().any(|minor| minor.number() == cookie) => {
            with_json(kind::STATS_RSP, cookie, &stats(None))
        }
        kind::PAUSE | kind::RESUME => pause::without_image(request, log, minors).unwrap_or_else(|| no_disk(cookie)),
        kind if is_known(kind) => no_disk(cookie),
        _ => unknown(request),
    }
}

/// The answer to what is asked of one disk.
fn of_disk(
    request: &Message,
    named: Option<ChangedBlocks>,
    peer: &Peer,
    disk: &mut Disk,
    polling: &mut Polling,
    log: &Logger,
) -> Result<Vec<u8>, Late> {
    let cookie = request.cookie;
    Ok(match request.kind {
        kind::ENGINE => engine::change(request, disk).ok_or(Late::Engine(cookie))?,
        kind::PAUSE => pause::pause(cookie, disk).ok_or(Late::Pause(cookie))?,
        kind::RESUME => pause::resume(request, named, disk, peer).ok_or(Late::Resume(cookie))?,
        kind::COMMIT => pause::commit(request, disk, peer).ok_or(Late::Commit(cookie))?,
        kind::QUERY_COMMIT => pause::query(cookie, disk),
        kind::CANCEL_COMMIT => pause::cancel(request, disk).ok_or(Late::Cancel(cookie))?,
        kind::STATS => with_text(kind::STATS_RSP, cookie, &stats(Some(disk)).to_string()),
        kind::METRICS => metrics(cookie, [(cookie, &*disk)]),
        kind::DISK_INFO => life::image(kind::DISK_INFO_RSP, cookie, disk.info()),
        kind::DEBUG_QUEUE => with_json(kind::DEBUG_QUEUE_RSP, cookie, &disk.inspect(polling)),
        kind::COALESCE => pause::coalesce(request, disk, peer).ok_or(Late::Coalesce(cookie))?,
        kind::POLL => set_polling(request, polling, log).as_bytes().to_vec(),
        kind::RESIZE => resize(cookie, disk).ok_or(Late::Resize(cookie))?,
        kind::FAULT => engine::faults(request, disk, log),
        kind::THROTTLE => engine::throttle(request, disk),
        _ => unknown(request),
    })
}

/// Whether there is an answer to it where there is a disk.
fn is_known(kind: u16) -> bool {
    matches!(
        kind,
        kind::PAUSE
            | kind::RESUME
            | kind::STATS
            | kind::DISK_INFO
            | kind::COMMIT
            | kind::QUERY_COMMIT
            | kind::CANCEL_COMMIT
            | kind::DEBUG_QUEUE
            | kind::POLL
            | kind::RESIZE
            | kind::ENGINE
            | kind::FAULT
            | kind::THROTTLE
            | kind::COALESCE
            | kind::METRICS
    )
}

fn unknown(request: &Message) -> Vec<u8> {
    let text = format!("message type {} is not known here", request.kind);
    Message::error(request.cookie, Errno::EINVAL as i32, &text).as_bytes().to_vec()
}

pub(super) fn no_disk(minor: u16) -> Vec<u8> {
    refused(minor, &MinorError::new(Errno::ENODEV, format!("this tapdisk has no disk with minor {minor}")))
}

/// An error as an answer.
pub(super) fn refused(cookie: u16, error: &MinorError) -> Vec<u8> {
    Message::error(cookie, error.errno as i32, &error.text).as_bytes().to_vec()
}

fn list_minors(cookie: u16, minors: &Minors) -> Vec<u8> {
    let mut shown = MinorList { count: minors.iter().len() as i32, list: [0; 63] };
    for (to, minor) in shown.list.iter_mut().zip(minors.iter()) {
        *to = minor.number().into();
    }
    Message::new(kind::LIST_MINORS_RSP, cookie).with(&shown).as_bytes().to_vec()
}

fn list(cookie: u16, minors: &Minors) -> Vec<u8> {
    let wanted: Vec<_> = minors.iter().filter(|minor| cookie == NO_MINOR || cookie == minor.number()).collect();
    let shown = wanted.iter().zip((1..=wanted.len() as i32).rev()).map(|(minor, count)| List {
        count,
        minor: minor.number().into(),
        state: state_of(minor),
        path: string(minor.disk().map_or("", |disk| &disk.info().name)),
    });
    let end = List { count: 0, minor: -1, state: 0, path: [0; 256] };
    shown.chain([end]).flat_map(|list| Message::new(kind::LIST_RSP, cookie).with(&list).as_bytes().to_vec()).collect()
}

fn state_of(minor: &Minor) -> i32 {
    match minor.disk() {
        None if minor.is_paused_empty() => state::PAUSED,
        None if minor.is_closed() => state::CLOSED,
        None => 0,
        Some(disk) if disk.is_paused() => state::PAUSED,
        Some(disk) if disk.is_pausing() => state::PAUSE_REQUESTED,
        Some(disk) if disk.is_draining() => state::QUIESCE_REQUESTED,
        Some(_) => 0,
    }
}

fn set_polling(request: &Message, polling: &mut Polling, log: &Logger) -> Message {
    let wanted: Poll = request.member();
    let given = |flag, value| (wanted.flags & flag != 0).then_some(value);
    let (us, percent) =
        (given(poll::SET_US, wanted.poll_us), given(poll::SET_IDLE_PERCENT, wanted.poll_idle_percent));
    let set = match wanted.flags & !(poll::SET_US | poll::SET_IDLE_PERCENT) {
        0 => polling.set(us, percent),
        unknown => Err(format!("flags {unknown:#x} are not known here")),
    };
    if let Err(text) = set {
        return Message::error(request.cookie, Errno::EINVAL as i32, &text);
    }
    let settings = polling.settings();
    if us.is_some() || percent.is_some() {
        info!(log, "polling set"; "poll_us" => settings.poll_us, "poll_idle_percent" => settings.poll_idle_percent);
    }
    let answer = Poll { poll_us: settings.poll_us, poll_idle_percent: settings.poll_idle_percent, flags: 0 };
    Message::new(kind::POLL_RSP, request.cookie).with(&answer)
}

/// The answer to RESIZE, if it is refused at once. None: it comes when the file's size is known, by [`resized`].
fn resize(cookie: u16, disk: &mut Disk) -> Option<Vec<u8>> {
    disk.resize().err().map(|error| resized(cookie, disk, Err(error)))
}

/// The late answer to RESIZE.
fn resized(cookie: u16, disk: &Disk, outcome: Result<(u64, u64), ResizeError>) -> Vec<u8> {
    let answer = match outcome {
        Ok((old, new)) => Message::new(kind::RESIZE_RSP, cookie).with(&Resized { old, new }),
        Err(error) => {
            let text = format!("{}: {error}", disk.info().name);
            Message::error(cookie, error.errno() as i32, &text)
        }
    };
    answer.as_bytes().to_vec()
}

fn metrics<'a>(cookie: u16, disks: impl IntoIterator<Item = (u16, &'a Disk)>) -> Vec<u8> {
    with_json(kind::METRICS_RSP, cookie, &ProcessMetrics::here(disks))
}

fn with_text(kind: u16, cookie: u16, text: &str) -> Vec<u8> {
    let mut bytes = Message::new(kind, cookie).with(&Stat::new(kind, cookie, text.len())).as_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

pub(super) fn with_json(kind: u16, cookie: u16, shown: &impl Serialize) -> Vec<u8> {
    match serde_json::to_string(shown) {
        Ok(text) => with_text(kind, cookie, &text),
        Err(error) => Message::error(cookie, Errno::EIO as i32, &error.to_string()).as_bytes().to_vec(),
    }
}

/// `DISK_TYPE_AIO` and `DISK_TYPE_VHD` of blktap's `tapdisk-disktype.h`.
const DRIVER_AIO: u32 = 0;
const DRIVER_VHD: u32 = 4;

/// STATS, in blktap's words and order; what is ours comes last. A minor without an image has no disk.
fn stats(disk: Option<&Disk>) -> serde_json::Value {
    let images = disk.into_iter().flat_map(Disk::hits).map(|(layer, hits)| {
        let driver = layer.layer.name();
        let number = if driver == "vhd" { DRIVER_VHD } else { DRIVER_AIO };
        json!({
            "name": layer.path,
            "hits": hits.all,
            "fail": hits.failed,
            "driver": { "type": number, "name": driver, "status": null },
        })
    });
    let mut stats = json!({
        "name": disk.map(|disk| &disk.info().name),
        "secs": disk.map_or_else(Default::default, |disk| disk.stats().sectors()),
        "images": images.collect::<Vec<_>>(),
    });
    if let Some(xenbus) = disk.and_then(Disk::xenbus) {
        stats["xenbus"] = xenbus;
    }
    stats["FIXME_enospc_redirect_count"] = json!(0);
    stats["nbd_mirror_failed"] = json!(0);
    stats["reqs_outstanding"] = json!(disk.map_or(0, Disk::outstanding));
    stats["read_caching"] = json!(if disk.is_some_and(Disk::is_buffered) { "true" } else { "false" });
    if let Some(disk) = disk {
        stats["memory"] = json!(disk.budget());
        stats["throttle"] = json!(disk.throttle_report());
    }
    stats
}
