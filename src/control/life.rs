//! ATTACH, OPEN, CLOSE and DETACH.

use nix::errno::Errno;
use zerocopy::IntoBytes;

use super::answer::refused;
use super::peer::Peer;
use super::proto::{Image, Message, Params, kind, open as flag, text};
use crate::config::ChangedBlocks;
use crate::disk::parse_name;
use crate::frontend::DiskInfo;
use crate::frontend::xen::xenbus::VDISK_READONLY;
use crate::minors::{MinorError, Minors, Wanted};

/// Options of OPEN and RESUME that are known, and not here.
const MISSING: [(u32, &str); 6] = [
    (flag::SECONDARY, "a second image (-2)"),
    (flag::STANDBY, "a second image that takes over where there is no space (-s)"),
    (flag::OPEN_ENCRYPTED, "an encryption key (-E)"),
    (flag::ADD_LCACHE, "a local cache of the parent (-r)"),
    (flag::ADD_CACHE, "a cache of blocks"),
    (flag::VHD_INDEX, "an index beside the VHD"),
];

fn plain(kind: u16, cookie: u16) -> Vec<u8> {
    Message::new(kind, cookie).as_bytes().to_vec()
}

/// What says how large a disk is.
pub(super) fn image(kind: u16, cookie: u16, disk: &DiskInfo) -> Vec<u8> {
    let info = if disk.read_only { VDISK_READONLY } else { 0 };
    let image = Image { sectors: disk.sectors(), sector_size: disk.sector_size, info };
    Message::new(kind, cookie).with(&image).as_bytes().to_vec()
}

/// The answer to ATTACH.
pub(super) fn attach(cookie: u16, minors: &mut Minors) -> Vec<u8> {
    match minors.attach(cookie) {
        Ok(()) => plain(kind::ATTACH_RSP, cookie),
        Err(error) => refused(cookie, &error),
    }
}

/// Refuses flags that are not for here, `allowed` are.
pub(super) fn check_flags(flags: u32, allowed: u32) -> Result<(), MinorError> {
    let unfit = flags & !allowed;
    if unfit == 0 {
        return Ok(());
    }
    let what = MISSING.iter().find(|(flag, _)| unfit & flag != 0);
    let what = what.map_or_else(|| format!("flags {unfit:#x}"), |(_, what)| (*what).to_owned());
    Err(MinorError::new(Errno::EOPNOTSUPP, format!("{what}: not supported; open the image without")))
}

fn wanted(params: &Params, changed_blocks: Option<ChangedBlocks>, peer: &Peer) -> Result<Wanted, MinorError> {
    let broken = |what| MinorError::new(Errno::EINVAL, format!("{what} has no end"));
    let name = text(&params.path).ok_or_else(|| broken("the image's name"))?;
    text(&params.secondary).ok_or_else(|| broken("the second image's name"))?;
    check_flags(params.flags, flag::SHARED | flag::RDONLY | flag::REUSE_PRT | flag::NO_O_DIRECT | flag::ADD_LOG)?;
    let has = |flag| params.flags & flag != 0;
    if has(flag::SHARED) && !has(flag::RDONLY) {
        return Err(MinorError::new(Errno::EINVAL, "an image that is written can't be shared"));
    }
    let image = parse_name(name).map_err(|error| MinorError::new(error.errno(), error.to_string()))?;
    let parent = u16::try_from(params.prt_devnum);
    let parent = parent.map_err(|_| MinorError::new(Errno::ENODEV, format!("no minor is {}", params.prt_devnum)));
    Ok(Wanted {
        image,
        by: peer.member().cloned(),
        changed_blocks,
        read_only: has(flag::RDONLY),
        buffered: has(flag::NO_O_DIRECT),
        timeout_s: (params.req_timeout > 0).then_some(params.req_timeout),
        parent: if has(flag::REUSE_PRT) { Some(parent?) } else { None },
    })
}

/// The answer to OPEN, if it is refused at once. None: it comes when the image is open, by [`opened`].
pub(super) fn open(
    request: &Message,
    log: Option<ChangedBlocks>,
    minors: &mut Minors,
    peer: &Peer,
) -> Option<Vec<u8>> {
    let outcome = wanted(&request.member(), log, peer).and_then(|wanted| minors.open(request.cookie, wanted));
    outcome.err().map(|error| refused(request.cookie, &error))
}

/// The answer to OPEN, if the image is open or can't be opened.
pub(super) fn opened(minor: u16, minors: &Minors) -> Option<Vec<u8>> {
    Some(match minors.open_outcome(minor)? {
        Ok(disk) => image(kind::OPEN_RSP, minor, disk),
        Err(error) => refused(minor, &error),
    })
}

/// The answer to CLOSE and FORCE_SHUTDOWN. None: it comes when the image is closed, by [`closed`].
pub(super) fn close(request: &Message, minors: &mut Minors) -> Option<Vec<u8>> {
    let force = request.kind == kind::FORCE_SHUTDOWN;
    match minors.close(request.cookie, force) {
        Ok(()) => closed(request.cookie, minors),
        Err(error) => Some(refused(request.cookie, &error)),
    }
}

/// The answer to CLOSE, if the image is closed.
pub(super) fn closed(minor: u16, minors: &Minors) -> Option<Vec<u8>> {
    Some(match minors.close_outcome(minor)? {
        Ok(()) => plain(kind::CLOSE_RSP, minor),
        Err(errno) => {
            let text = "it is closed, but what was written last may not be on the disk";
            refused(minor, &MinorError::new(errno, text))
        }
    })
}

/// The answer to DETACH.
pub(super) fn detach(cookie: u16, minors: &mut Minors) -> Vec<u8> {
    match minors.detach(cookie) {
        Ok(()) => plain(kind::DETACH_RSP, cookie),
        Err(error) => refused(cookie, &error),
    }
}
