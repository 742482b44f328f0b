//! On whose behalf files are opened: a thread takes on a client's identity, and the kernel decides what it may have.
//!
//! The other way would be to open as root and then look at owner and mode of what is open, by a path that openat2(2) lets through no link. That
//! knows nothing of access lists, security modules, the folders on the way, what a file server makes of a user, or devices' nodes; it forbids
//! links that do no harm; and every open that is added later has to repeat it. With the identity all that the thread does is the user's own,
//! each link and each file of a chain.

use std::io;
use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::sys::prctl::{get_dumpable, set_dumpable};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Gid, Uid, getgroups, setfsgid, setfsuid};
use serde::{Deserialize, Serialize};

use super::capability::{Capabilities, IPC_LOCK};
use super::result;
use super::socket::peer_groups;

/// A user, with all groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The other groups.
    pub groups: Vec<u32>,
}

impl Credentials {
    /// Those that the other end of a Unix socket had when it connected (SO_PEERCRED, SO_PEERGROUPS: unix(7)). A group can also be what keeps
    /// somebody out of a file: without all of them there are none.
    pub fn of_peer(socket: impl AsFd) -> io::Result<Credentials> {
        let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
        Ok(Credentials { uid: peer.uid(), gid: peer.gid(), groups: peer_groups(socket.as_fd())? })
    }

    /// Whether that group is one of them.
    pub fn is_in(&self, group: u32) -> bool {
        self.gid == group || self.groups.contains(&group)
    }

    /// This thread opens files as that user, and without a capability that concerns files, until the guard is dropped. EPERM: this process may not.
    pub fn take_on(&self) -> io::Result<Guard> {
        let (user, group) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        DUMPABLE.get_or_init(|| get_dumpable().unwrap_or(false));
        let guard = Guard {
            groups: getgroups()?.into_iter().map(Gid::as_raw).collect(),
            group: setfsgid(NOBODY_GROUP),
            user: setfsuid(NOBODY),
            capabilities: Capabilities::of_thread()?,
            this_thread: PhantomData,
        };
        // From here on the guard's end mends what is half done.
        set_groups(&self.groups)?;
        setfsgid(group);
        setfsuid(user);
        // What the kernel takes from a thread depends on who it was. Where all memory is locked, this thread's has to be, too.
        guard.capabilities.with_effective(IPC_LOCK).set()?;
        // Neither says whether it did.
        if setfsuid(NOBODY) != user || setfsgid(NOBODY_GROUP) != group {
            return Err(Errno::EPERM.into());
        }
        Ok(guard)
    }
}

/// No user and no group (setfsuid(2)): to set it fails, and gives those that there are.
const NOBODY: Uid = Uid::from_raw(u32::MAX);
const NOBODY_GROUP: Gid = Gid::from_raw(u32::MAX);

/// Whether this process leaves a core: for that it has to be said again, after any of its threads was somebody else (PR_SET_DUMPABLE, prctl(2)).
static DUMPABLE: OnceLock<bool> = OnceLock::new();

/// Ends the identity of another when it is dropped, in the thread that took it on.
#[derive(Debug)]
#[must_use]
pub struct Guard {
    user: Uid,
    group: Gid,
    groups: Vec<u32>,
    capabilities: Capabilities,
    /// A thread can't give it to another one.
    this_thread: PhantomData<*const ()>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let set = || -> io::Result<()> {
            // It takes one to set groups.
            self.capabilities.set()?;
            let mut now: Vec<_> = getgroups()?.into_iter().map(Gid::as_raw).collect();
            now.sort_unstable();
            let mut before = self.groups.clone();
            before.sort_unstable();
            if now != before {
                set_groups(&self.groups)?;
            }
            setfsgid(self.group);
            setfsuid(self.user);
            // Where the user was root, the kernel gave and took some meanwhile.
            self.capabilities.set()?;
            Ok(set_dumpable(DUMPABLE.get().copied().unwrap_or(false))?)
        };
        if set().is_err() || setfsuid(NOBODY) != self.user || setfsgid(NOBODY_GROUP) != self.group {
            // What would go on is neither one nor the other.
            std::process::abort();
        }
    }
}

/// The groups of this thread alone: glibc's function sets those of all threads.
fn set_groups(groups: &[u32]) -> io::Result<()> {
    #[cfg(any(target_arch = "x86", target_arch = "arm", target_arch = "m68k", target_arch = "sparc"))]
    const SETGROUPS: libc::c_long = libc::SYS_setgroups32;
    #[cfg(not(any(target_arch = "x86", target_arch = "arm", target_arch = "m68k", target_arch = "sparc")))]
    const SETGROUPS: libc::c_long = libc::SYS_setgroups;
    // SAFETY: the kernel reads that many group ids from the slice, and changes nothing but the calling thread's credentials.
    let done = unsafe { libc::syscall(SETGROUPS, groups.len(), groups.as_ptr()) };
    result(done).map(drop).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{OpenOptionsExt, chown};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn nobody() -> Credentials {
        Credentials { uid: 65534, gid: 65534, groups: vec![60, 65534] }
    }

    #[test]
    fn a_thread_has_the_rights_of_another_for_as_long_as_the_guard_lives_and_other_threads_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let secret = folder.path().join("secret");
        drop(File::options().create_new(true).write(true).mode(0o600).open(&secret).unwrap());
        let other = secret.clone();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let others = std::thread::spawn(move || {
            wait.recv().unwrap();
            File::open(other).map(drop)
        });
        let before = (getgroups().unwrap(), Capabilities::of_thread().unwrap());
        let guard = match nobody().take_on() {
            Err(error) if !nix::unistd::geteuid().is_root() => {
                assert_eq!(error.raw_os_error(), Some(libc::EPERM));
                return;
            }
            guard => guard.unwrap(),
        };
        assert_eq!(File::open(&secret).unwrap_err().raw_os_error(), Some(libc::EACCES));
        assert_eq!(Capabilities::of_thread().unwrap().effective() & !IPC_LOCK, 0);
        go.send(()).unwrap();
        others.join().unwrap().unwrap();
        drop(guard);
        File::open(&secret).unwrap();
        assert_eq!((getgroups().unwrap(), Capabilities::of_thread().unwrap()), before);
        assert!(get_dumpable().unwrap());
        // A group that it has lets it in.
        chown(&secret, None, Some(60)).unwrap();
        std::fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let _guard = nobody().take_on().unwrap();
        File::open(&secret).unwrap();
        assert_eq!(File::options().write(true).open(&secret).unwrap_err().raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn a_socket_says_who_is_at_its_other_end() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = Credentials::of_peer(&one).unwrap();
        assert_eq!((peer.uid, peer.gid), (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()));
        assert!(peer.is_in(peer.gid) && !peer.is_in(12345));
    }
}
