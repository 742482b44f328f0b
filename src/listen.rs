//! Unix sockets that clients connect to: open to our own user alone, or to a group too, and gone with their server.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use mio::net::{UnixListener, UnixStream};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use nix::unistd::{Gid, chown, setfsgid};
use slog::{Logger, warn};

use crate::stats::now;

/// Clients that are let in at a time: those who connect again and again must not hold up the main loop.
const AT_A_TIME: usize = 16;
/// How soon it is tried again where there is no descriptor for a client, ns.
const AGAIN: u64 = 100_000_000;

/// A socket that is bound and listens.
#[derive(Debug)]
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    /// The file's device and inode, so that only our own is removed.
    id: (u64, u64),
    /// Clients may be waiting that the event loop tells of no more: when to look for them, ns of [`now`].
    due: Option<u64>,
}

impl UnixSocket {
    /// Listens at `path`. What a server that is gone has left there is replaced; one that listens, or a file that is no socket,
    /// is an error.
    pub fn bind(path: &Path) -> io::Result<UnixSocket> {
        UnixSocket::bind_for(path, None)
    }

    /// The same, and members of a group may connect too.
    pub fn bind_for(path: &Path, group: Option<Gid>) -> io::Result<UnixSocket> {
        UnixSocket::bind_as(path, SockType::Stream, group)
    }

    /// The same with another type of socket.
    pub fn bind_as(path: &Path, kind: SockType, group: Option<Gid>) -> io::Result<UnixSocket> {
        remove_stale(path, kind)?;
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, kind, flags, None)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        // Nobody can connect before we listen, so nobody does with the mode that the umask left.
        if let Some(gid) = group {
            // Who is in a group may give it a file. To be in it, of this thread, takes CAP_SETGID alone.
            let before = setfsgid(gid);
            let given = chown(path, None, group);
            setfsgid(before);
            given?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(if group.is_some() { 0o660 } else { 0o600 }))?;
        let file = fs::symlink_metadata(path)?;
        listen(&fd, Backlog::new(128)?)?;
        Ok(UnixSocket {
            listener: UnixListener::from_std(fd.into()),
            path: path.to_owned(),
            id: (file.dev(), file.ino()),
            due: None,
        })
    }

    /// For the event loop.
    pub fn source(&mut self) -> &mut UnixListener {
        &mut self.listener
    }

    /// The next client.
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().map(|(stream, _)| stream)
    }

    /// Some of the clients that have connected. When to ask for the others, [`due`](Self::due) says.
    pub fn accept_some(&mut self, log: &Logger) -> Vec<UnixStream> {
        self.accept_at_most(AT_A_TIME, log)
    }

    /// The same, and no more than there is room for.
    pub fn accept_at_most(&mut self, most: usize, log: &Logger) -> Vec<UnixStream> {
        let mut clients = Vec::new();
        self.due = Some(0);
        for _ in 0..most.min(AT_A_TIME) {
            match self.accept() {
                Ok(client) => clients.push(client),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        self.due = None;
                        break;
                    }
                    // This client is gone already.
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => {
                        warn!(log, "clients can't be accepted for now"; "socket" => %self.path.display(), "error" => %error);
                        self.due = Some(now() + AGAIN);
                        break;
                    }
                },
            }
        }
        clients
    }

    /// When clients may be waiting, ns of [`now`].
    pub fn due(&self) -> Option<u64> {
        self.due
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.id) {
            // What can't be removed is replaced by the next server.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes the socket of a server that is gone.
fn remove_stale(path: &Path, kind: SockType) -> io::Result<()> {
    let file = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    if !file.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
    }
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let client = socket(AddressFamily::Unix, kind, flags, None)?;
    match connect(client.as_raw_fd(), &UnixAddr::new(path)?) {
        Err(Errno::ECONNREFUSED) => fs::remove_file(path),
        // Also one that is asked by too many, or for another type.
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => {
            Err(io::Error::new(io::ErrorKind::AddrInUse, "another server listens on it"))
        }
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_one_in_use_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let socket = UnixSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let error = UnixSocket::bind(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains("another server"), "{error}");
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn clients_are_let_in_a_few_at_a_time_and_none_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let log = Logger::root(slog::Discard, slog::o!());
        let mut socket = UnixSocket::bind(&path).unwrap();
        let connect = || std::os::unix::net::UnixStream::connect(&path).unwrap();
        let clients: Vec<_> = std::iter::repeat_with(connect).take(2 * AT_A_TIME + 1).collect();
        let mut counts = Vec::new();
        loop {
            counts.push(socket.accept_some(&log).len());
            if socket.due().is_none() {
                break;
            }
        }
        assert_eq!(counts, [AT_A_TIME, AT_A_TIME, 1]);
        drop(clients);
    }

    #[test]
    fn only_sockets_are_replaced_and_only_our_own_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        fs::write(&path, "precious").unwrap();
        assert_eq!(UnixSocket::bind(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        fs::remove_file(&path).unwrap();
        let socket = UnixSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "someone else's").unwrap();
        drop(socket);
        assert!(path.exists());
    }
}
