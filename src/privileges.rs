//! What a tapdisk may do once it is started: what it opens later takes, and no more.
//!
//! Linux has a set of capabilities for each thread, which those inherit that it starts. So they go before the first thread is started.

use std::io;

use nix::sys::prctl::set_no_new_privs;

use crate::config::Config;
use crate::sys::capability::{Capabilities, IPC_LOCK};

/// CAP_DAC_OVERRIDE: images of other users, as root opens them.
const DAC_OVERRIDE: u64 = 1 << 1;
/// CAP_SETGID and CAP_SETUID: images with the rights of a member of `control.group`.
const SETGID: u64 = 1 << 6;
const SETUID: u64 = 1 << 7;
/// CAP_NET_BIND_SERVICE: ports below [`FREE_PORTS`].
const NET_BIND_SERVICE: u64 = 1 << 10;
const FREE_PORTS: u16 = 1024;
/// CAP_SYS_NICE: `engine.sqpoll`, with kernels before 5.13.
const SYS_NICE: u64 = 1 << 23;

/// The capabilities that are kept, if they are there.
fn kept(config: &Config) -> u64 {
    let port = config.frontend.nbd.as_ref().and_then(|nbd| nbd.listen).map(|listen| listen.port());
    let given = |is: bool, capability| if is { capability } else { 0 };
    DAC_OVERRIDE
        | IPC_LOCK
        | SETGID
        | SETUID
        | given(port.is_some_and(|port| port < FREE_PORTS), NET_BIND_SERVICE)
        | given(config.engine.sqpoll, SYS_NICE)
}

/// Gives up all others, for good, of this thread and those that it starts; and whatever program should be run, it gets none
/// (PR_SET_NO_NEW_PRIVS, prctl(2)).
pub fn give_up(config: &Config) -> io::Result<()> {
    let given_up = set_no_new_privs().map_err(io::Error::from);
    given_up.and_then(|()| Capabilities::of_thread()?.only(kept(config)).set()).map_err(|error| {
        let text =
            format!("cannot give up capabilities: {error}; does a seccomp filter forbid capset(2) or prctl(2)?");
        io::Error::new(error.kind(), text)
    })
}
