//! What follows a message: after OPEN and RESUME with ADD_LOG, the path of a log of changed blocks, in a field of its own.
#![warn(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use std::path::PathBuf;

use nix::errno::Errno;

use super::peer::Peer;
use super::proto::{Message, PATH_SIZE, Params, kind, open, text};
use crate::config::ChangedBlocks;
use crate::minors::MinorError;

/// What a client asks for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The message.
    pub message: &'a Message,
    /// What follows it, [`len`] bytes; more is of no account.
    pub more: &'a [u8],
}

/// Bytes that follow a message.
pub fn len(message: &Message) -> usize {
    if has_flag(message, open::ADD_LOG) { PATH_SIZE } else { 0 }
}

/// Whether a key follows that, which is not read: images that have one are refused.
pub(super) fn has_key(message: &Message) -> bool {
    has_flag(message, open::OPEN_ENCRYPTED)
}

fn has_flag(message: &Message, flag: u32) -> bool {
    matches!(message.kind, kind::OPEN | kind::RESUME) && message.member::<Params>().flags & flag != 0
}

impl Request<'_> {
    /// The log that it names. Like an image, it is opened with the rights of who names it, and if that is a member of `control.group`, only
    /// in the folders of `control.folders`, or below.
    pub(super) fn changed_blocks(&self, peer: &Peer) -> Result<Option<ChangedBlocks>, MinorError> {
        let count = len(self.message);
        if count == 0 {
            return Ok(None);
        }
        let wrong = |errno, what: &str| Err(MinorError::new(errno, format!("the log of changed blocks: {what}")));
        // What is behind the NUL is anything.
        let Some(path) = self.more.get(..count).and_then(text) else {
            return wrong(Errno::EINVAL, "its path has no end");
        };
        if !path.starts_with('/') {
            let what =
                format!("expected a path from the root on, and not {path:?}: a tapdisk has a folder of its own");
            return wrong(Errno::EINVAL, &what);
        }
        let by = peer.member().cloned();
        if by.as_ref().is_some_and(|member| member.folders.is_empty()) {
            let what =
                "members of control.group may name it only in the folders of control.folders; none is configured";
            return wrong(Errno::EACCES, what);
        }
        Ok(Some(ChangedBlocks { path: PathBuf::from(path), by }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::proto::Params;
    use super::*;
    use zerocopy::FromZeros;

    fn message(kind: u16, flags: u32) -> Message {
        let mut params = Params::new_zeroed();
        params.flags = flags;
        Message::new(kind, 0).with(&params)
    }

    #[test]
    fn a_path_follows_open_and_resume_with_the_flag_and_nothing_else() {
        for kind in [kind::OPEN, kind::RESUME] {
            assert_eq!(len(&message(kind, open::ADD_LOG | open::RDONLY)), 256);
            assert_eq!(len(&message(kind, !open::ADD_LOG)), 0);
        }
        // XCP-ng's have the same member, with other flags.
        for kind in [kind::COMMIT, kind::CANCEL_COMMIT, kind::CLOSE, kind::PID] {
            assert_eq!(len(&message(kind, open::ADD_LOG)), 0);
        }
    }

    #[test]
    fn a_path_ends_with_a_nul_and_begins_at_the_root() {
        let with = message(kind::RESUME, open::ADD_LOG);
        let of = |path: &[u8], fill: u8| {
            let mut more = [fill; PATH_SIZE];
            more[..path.len()].copy_from_slice(path);
            let named = Request { message: &with, more: &more }.changed_blocks(&Peer::Owner);
            named.map(|named| named.unwrap().path).map_err(|error| error.errno)
        };
        assert_eq!(of(b"/a/log\0", 0xff), Ok("/a/log".into()), "and garbage behind it");
        assert_eq!(of(&[b'/'; 255], 0), Ok("/".repeat(255).into()));
        for wrong in [&[b'/'; 256][..], b"\0", b"log\0", b"./log\0", b"/\xff\0"] {
            assert_eq!(of(wrong, 0), Err(Errno::EINVAL), "{wrong:?}");
        }
        let cut = Request { message: &with, more: b"/log\0" }.changed_blocks(&Peer::Owner);
        assert_eq!(cut.unwrap_err().errno, Errno::EINVAL);
        let none = Request { message: &message(kind::RESUME, 0), more: b"/log\0" }.changed_blocks(&Peer::Owner);
        assert!(none.unwrap().is_none());
    }
}
