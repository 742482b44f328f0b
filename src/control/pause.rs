//! PAUSE, RESUME and COALESCE, and XCP-ng's names for the latter.

use nix::errno::Errno;
use zerocopy::IntoBytes;

use std::path::Path;

use super::answer::{refused as refuse, with_json};
use super::life::check_flags;
use super::peer::Peer;
use super::proto::{Coalesce, Message, Params, Query, coalesce as flag, kind, open, string, text};
use crate::config::ChangedBlocks;
use crate::disk::{CoalesceError, Disk, PauseError, Resume, Stage, parse_name};
use crate::minors::{MinorError, Minors};

/// The answer to PAUSE. None: it comes when the disk is paused, by [`paused`].
pub(super) fn pause(cookie: u16, disk: &mut Disk) -> Option<Vec<u8>> {
    match disk.pause_for_client() {
        Ok(()) => disk.pause_outcome().map(|outcome| paused(cookie, disk, &outcome)),
        Err(error) => Some(refused(cookie, disk, &error)),
    }
}

/// The answer to PAUSE and RESUME of a minor without an image. None: nobody has attached it.
pub(super) fn without_image(request: &Message, log: Option<&ChangedBlocks>, minors: &mut Minors) -> Option<Vec<u8>> {
    let cookie = request.cookie;
    let named = || log.is_some() || text(&request.member::<Params>().path).is_none_or(|name| !name.is_empty());
    let (done, answer) = match request.kind {
        kind::PAUSE => (minors.pause_empty(cookie, true)?, kind::PAUSE_RSP),
        _ if named() && minors.iter().any(|minor| minor.number() == cookie && minor.is_paused_empty()) => {
            let text = format!("minor {cookie}: it was paused without an image: tap-ctl open opens one");
            (Err(MinorError::new(Errno::EINVAL, text)), kind::RESUME_RSP)
        }
        _ => (minors.pause_empty(cookie, false)?, kind::RESUME_RSP),
    };
    Some(match done {
        Ok(()) => Message::new(answer, cookie).as_bytes().to_vec(),
        Err(error) => refuse(cookie, &error),
    })
}

/// The late answer to PAUSE.
pub(super) fn paused(cookie: u16, disk: &Disk, outcome: &Result<(), PauseError>) -> Vec<u8> {
    match outcome {
        Ok(()) => Message::new(kind::PAUSE_RSP, cookie).as_bytes().to_vec(),
        Err(error) => refused(cookie, disk, error),
    }
}

/// The answer to RESUME, if it is refused at once. None: it comes when the disk goes on, by [`resumed`].
pub(super) fn resume(request: &Message, log: Option<ChangedBlocks>, disk: &mut Disk, peer: &Peer) -> Option<Vec<u8>> {
    let cookie = request.cookie;
    let params: Params = request.member();
    let broken = |what| MinorError::new(Errno::EINVAL, format!("{what} has no end"));
    let (Some(name), Some(_)) = (text(&params.path), text(&params.secondary)) else {
        return Some(refuse(cookie, &broken("an image's name")));
    };
    if let Err(error) = check_flags(params.flags, open::ADD_LOG) {
        return Some(refuse(cookie, &error));
    }
    let image = if name.is_empty() { Ok(None) } else { parse_name(name).map(Some) };
    match image.and_then(|image| disk.resume(Resume { image, by: peer.member(), changed_blocks: log })) {
        Ok(()) => disk.resume_outcome().map(|outcome| resumed(cookie, disk, &outcome)),
        Err(error) => Some(refused(cookie, disk, &error)),
    }
}

/// The late answer to RESUME.
pub(super) fn resumed(cookie: u16, disk: &Disk, outcome: &Result<(), PauseError>) -> Vec<u8> {
    match outcome {
        Ok(()) => Message::new(kind::RESUME_RSP, cookie).as_bytes().to_vec(),
        Err(error) => refused(cookie, disk, error),
    }
}

/// The answer to COMMIT, if it is refused at once: the image of that path is merged into its parent. None: it comes when the merge has
/// begun, by [`committed`].
pub(super) fn commit(request: &Message, disk: &mut Disk, peer: &Peer) -> Option<Vec<u8>> {
    let cookie = request.cookie;
    let params: Params = request.member();
    let Some(name) = text(&params.path) else {
        return Some(refuse(cookie, &MinorError::new(Errno::EINVAL, "the image's name has no end")));
    };
    let path = parse_name(name).map_or_else(|_| name.into(), |(_, path)| path);
    let begun = disk.coalesce((!name.is_empty()).then_some(path.as_path()), 0, peer.member());
    begun.err().map(|error| not_coalesced(cookie, disk, &error))
}

/// The late answer to COMMIT.
pub(super) fn committed(cookie: u16, disk: &Disk) -> Option<Vec<u8>> {
    Some(match disk.coalesce_begun()? {
        Ok(()) => Message::new(kind::COMMIT_RSP, cookie).as_bytes().to_vec(),
        Err(error) => not_coalesced(cookie, disk, &error),
    })
}

fn not_coalesced(cookie: u16, disk: &Disk, error: &CoalesceError) -> Vec<u8> {
    refuse(cookie, &MinorError::new(error.errno(), format!("{}: {error}", disk.info().name)))
}

/// The answer to QUERY_COMMIT, in the words of QEMU's block jobs (JobStatus, qapi/job.json), as XCP-ng shows them.
pub(super) fn query(cookie: u16, disk: &Disk) -> Vec<u8> {
    let report = disk.coalesce_report();
    let status = match report.stage {
        Stage::Merging | Stage::Relinking => "running",
        Stage::Done => "concluded",
        // In QEMU's words a job that failed ends as one that did not, and its image is deleted; one that there is not, too.
        Stage::None => return refuse(cookie, &MinorError::new(Errno::ENOENT, "nothing was committed")),
        Stage::Failed => {
            let text = report.error.unwrap_or_else(|| "the merge failed".into());
            return refuse(cookie, &MinorError::new(Errno::EIO, text));
        }
    };
    let query = Query { current_progress: report.percent, total_progress: 100, status: string(status) };
    Message::new(kind::QUERY_COMMIT_RSP, cookie).with(&query).as_bytes().to_vec()
}

/// The answer to CANCEL_COMMIT. None: it comes when the merge has ended, by [`cancelled`].
pub(super) fn cancel(request: &Message, disk: &mut Disk) -> Option<Vec<u8>> {
    let params: Params = request.member();
    disk.cancel_coalesce();
    if params.flags & 1 != 0 { cancelled(request.cookie, disk) } else { Some(cancel_response(request.cookie)) }
}

/// The late answer to CANCEL_COMMIT.
pub(super) fn cancelled(cookie: u16, disk: &Disk) -> Option<Vec<u8>> {
    let over = !matches!(disk.coalesce_report().stage, Stage::Merging | Stage::Relinking);
    over.then(|| cancel_response(cookie))
}

fn cancel_response(cookie: u16) -> Vec<u8> {
    Message::new(kind::CANCEL_COMMIT_RSP, cookie).as_bytes().to_vec()
}

/// The answer to COALESCE. None: it comes when the merge has begun, by [`coalesced`].
pub(super) fn coalesce(request: &Message, disk: &mut Disk, peer: &Peer) -> Option<Vec<u8>> {
    let (cookie, wanted): (u16, Coalesce) = (request.cookie, request.member());
    let name = disk.info().name.clone();
    let wrong = |text: &str| Some(refuse(cookie, &MinorError::new(Errno::EINVAL, format!("{name}: {text}"))));
    let Some(image) = text(&wanted.path) else { return wrong("the image's name has no end") };
    if wanted.flags & !flag::ALL != 0 {
        return wrong("a flag that is not known here");
    }
    if wanted.flags & flag::CANCEL != 0 {
        disk.cancel_coalesce();
    }
    if wanted.flags & flag::START == 0 {
        return Some(shown(cookie, disk));
    }
    let begun = disk.coalesce((!image.is_empty()).then(|| Path::new(image)), wanted.rate, peer.member());
    begun.err().map(|error| not_coalesced(cookie, disk, &error))
}

/// The late answer to COALESCE.
pub(super) fn coalesced(cookie: u16, disk: &Disk) -> Option<Vec<u8>> {
    Some(match disk.coalesce_begun()? {
        Ok(()) => shown(cookie, disk),
        Err(error) => not_coalesced(cookie, disk, &error),
    })
}

fn shown(cookie: u16, disk: &Disk) -> Vec<u8> {
    with_json(kind::COALESCE_RSP, cookie, &disk.coalesce_report())
}

fn refused(cookie: u16, disk: &Disk, error: &PauseError) -> Vec<u8> {
    refuse(cookie, &MinorError::new(error.errno(), format!("{}: {error}", disk.info().name)))
}
