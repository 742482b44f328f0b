//! Where clients connect.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use mio::event::Source;
use mio::net::{TcpListener, UnixListener};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

use super::connection::Socket;

/// A bound socket.
#[derive(Debug)]
pub(super) enum Listener {
    /// With the file and its device and inode, so that only our own is removed.
    Unix(UnixListener, PathBuf, (u64, u64)),
    Tcp(TcpListener),
}

impl Listener {
    /// A Unix socket that only our own user may connect to.
    pub(super) fn unix(path: &Path) -> io::Result<Listener> {
        let at = |error: io::Error| io::Error::new(error.kind(), format!("NBD socket {}: {error}", path.display()));
        Self::unix_at(path).map_err(at)
    }

    fn unix_at(path: &Path) -> io::Result<Listener> {
        remove_stale(path)?;
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        // Nobody can connect before we listen, so nobody does with the mode that the umask left.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        let file = fs::symlink_metadata(path)?;
        listen(&fd, Backlog::new(128)?)?;
        let listener = UnixListener::from_std(fd.into());
        Ok(Listener::Unix(listener, path.to_owned(), (file.dev(), file.ino())))
    }

    /// A TCP socket on this host. The protocol has no authentication of its own.
    pub(super) fn tcp(address: SocketAddr) -> io::Result<Listener> {
        if !address.ip().is_loopback() {
            let why =
                format!("NBD is served without authentication, so only on a loopback address, not on {address}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let listener = TcpListener::bind(address)
            .map_err(|error| io::Error::new(error.kind(), format!("NBD address {address}: {error}")))?;
        Ok(Listener::Tcp(listener))
    }

    /// For the event loop.
    pub(super) fn source(&mut self) -> &mut dyn Source {
        match self {
            Listener::Unix(listener, ..) => listener,
            Listener::Tcp(listener) => listener,
        }
    }

    /// The next client.
    pub(super) fn accept(&self) -> io::Result<Socket> {
        match self {
            Listener::Unix(listener, ..) => listener.accept().map(|(stream, _)| Socket::Unix(stream)),
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Ok(Socket::Tcp(stream))
            }
        }
    }

    /// Its address, as a client would name it.
    pub(super) fn address(&self) -> String {
        match self {
            Listener::Unix(_, path, _) => path.display().to_string(),
            Listener::Tcp(listener) => listener.local_addr().map_or_else(|e| e.to_string(), |a| a.to_string()),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Listener::Unix(_, path, id) = self else { return };
        if fs::symlink_metadata(&*path).is_ok_and(|file| (file.dev(), file.ino()) == *id) {
            // What can't be removed is replaced by the next server.
            let _ = fs::remove_file(path);
        }
    }
}

/// Removes the socket of a server that is gone.
fn remove_stale(path: &Path) -> io::Result<()> {
    let file = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    if !file.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another server listens on it")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_one_in_use_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let listener = Listener::unix(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let error = Listener::unix(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains("another server"), "{error}");
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn only_sockets_are_replaced_and_only_our_own_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd");
        fs::write(&path, "precious").unwrap();
        assert_eq!(Listener::unix(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        fs::remove_file(&path).unwrap();
        let listener = Listener::unix(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "someone else's").unwrap();
        drop(listener);
        assert!(path.exists());
    }

    #[test]
    fn tcp_is_for_this_host_only() {
        for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
            assert_eq!(Listener::tcp(address.parse().unwrap()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        assert!(Listener::tcp("127.0.0.1:0".parse().unwrap()).is_ok());
    }
}
