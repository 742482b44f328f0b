//! PAUSE, RESUME and COALESCE.

use nix::errno::Errno;
use zerocopy::IntoBytes;

use super::proto::{Coalesce, Message, Params, coalesce as flag, kind, text};
use super::with_json;
use crate::disk::{Disk, PauseError, parse_name};

/// The answer to PAUSE. None: it comes when the disk is paused, by [`paused`].
pub(super) fn pause(cookie: u16, disk: &mut Disk) -> Option<Vec<u8>> {
    match disk.pause_for_client() {
        Ok(()) => disk.pause_outcome().map(|outcome| paused(cookie, disk, &outcome)),
        Err(error) => Some(refused(cookie, disk, &error)),
    }
}

/// The late answer to PAUSE.
pub(super) fn paused(cookie: u16, disk: &Disk, outcome: &Result<(), PauseError>) -> Vec<u8> {
    match outcome {
        Ok(()) => Message::new(kind::PAUSE_RSP, cookie).as_bytes().to_vec(),
        Err(error) => refused(cookie, disk, error),
    }
}

/// The answer to RESUME.
pub(super) fn resume(request: &Message, disk: &mut Disk) -> Vec<u8> {
    let cookie = request.cookie;
    let params: Params = request.member();
    let wrong = |errno: Errno, text: &str| Message::error(cookie, errno as i32, text).as_bytes().to_vec();
    if params.flags != 0 {
        let text = format!("flags {:#x} are not known here", params.flags);
        return wrong(Errno::EOPNOTSUPP, &text);
    }
    let Some(name) = text(&params.path) else { return wrong(Errno::EINVAL, "the image's name has no end") };
    let image = if name.is_empty() { Ok(None) } else { parse_name(name).map(Some) };
    match image.and_then(|image| disk.resume(image)) {
        Ok(()) => Message::new(kind::RESUME_RSP, cookie).as_bytes().to_vec(),
        Err(error) => refused(cookie, disk, &error),
    }
}

/// The answer to COALESCE.
pub(super) fn coalesce(request: &Message, disk: &mut Disk) -> Vec<u8> {
    let (cookie, wanted): (u16, Coalesce) = (request.cookie, request.member());
    let wrong = |errno: Errno, text: &str| {
        let text = format!("{}: {text}", disk.info().name);
        Message::error(cookie, errno as i32, &text).as_bytes().to_vec()
    };
    let Some(image) = text(&wanted.path) else { return wrong(Errno::EINVAL, "the image's name has no end") };
    if wanted.flags & !flag::ALL != 0 {
        return wrong(Errno::EINVAL, "a flag that is not known here");
    }
    if wanted.flags & flag::CANCEL != 0 {
        disk.cancel_coalesce();
    }
    if wanted.flags & flag::START != 0 {
        let image = (!image.is_empty()).then(|| std::path::Path::new(image));
        if let Err(error) = disk.coalesce(image, wanted.rate) {
            let text = format!("{}: {error}", disk.info().name);
            return Message::error(cookie, error.errno() as i32, &text).as_bytes().to_vec();
        }
    }
    with_json(kind::COALESCE_RSP, cookie, &disk.coalesce_report())
}

fn refused(cookie: u16, disk: &Disk, error: &PauseError) -> Vec<u8> {
    let text = format!("{}: {error}", disk.info().name);
    Message::error(cookie, error.errno() as i32, &text).as_bytes().to_vec()
}
