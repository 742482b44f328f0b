//! Who asks, and what they may ask for: root and who runs the tapdisk everything, members of `control.group` what the table in
//! docs/security.md says.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Gid, geteuid};

use super::proto::{EngineChange, FaultChange, Message, Poll, ThrottleChange, kind};
use crate::config::Member;
use crate::minors::MinorError;
use crate::sys::credentials::Credentials;

/// The other end of a control connection.
#[derive(Clone, Debug)]
pub enum Peer {
    /// Root, or who runs the tapdisk.
    Owner,
    /// Another member of the group.
    Member(Arc<Member>),
}

impl Peer {
    /// Who is at the other end. None: nobody who may say something.
    pub(super) fn of(socket: impl AsFd, group: Option<Gid>, folders: &[PathBuf]) -> Option<Peer> {
        let uid = getsockopt(&socket, sockopt::PeerCredentials).ok()?.uid();
        if uid == 0 || uid == geteuid().as_raw() {
            return Some(Peer::Owner);
        }
        let group = group?;
        let credentials = Credentials::of_peer(socket).ok()?;
        let member =
            || Peer::Member(Arc::new(Member { credentials: credentials.clone(), folders: folders.to_vec() }));
        credentials.is_in(group.as_raw()).then(member)
    }

    /// The member, with whose rights images are opened and changed. None: with those of the tapdisk.
    pub(super) fn member(&self) -> Option<&Arc<Member>> {
        match self {
            Peer::Owner => None,
            Peer::Member(member) => Some(member),
        }
    }

    /// Refuses a member what reaches further than images that the member could open.
    pub(super) fn check(&self, request: &Message) -> Result<(), MinorError> {
        let (Peer::Member(_), Some(what)) = (self, reserved(request)) else { return Ok(()) };
        let text = format!("{what} is for root alone, and not for the members of control.group");
        Err(MinorError::new(Errno::EPERM, text))
    }
}

/// What only root may ask for: it concerns all disks of the process, a guest's memory, or what root grants a disk of the host. To ask how something is set is everybody's.
fn reserved(request: &Message) -> Option<&'static str> {
    match request.kind {
        kind::EXIT => Some("to end the process"),
        kind::XENBLKIF_CONNECT | kind::XENBLKIF_DISCONNECT => Some("to connect and disconnect guests"),
        kind::POLL if request.member::<Poll>().flags != 0 => Some("to set polling"),
        kind::ENGINE if request.member::<EngineChange>().flags != 0 => Some("to change the engine"),
        kind::THROTTLE if request.member::<ThrottleChange>().flags != 0 => Some("to set limits"),
        kind::FAULT if request.member::<FaultChange>().flags != 0 => Some("to steer faults"),
        _ => None,
    }
}
