//! Where clients connect.

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use mio::event::Source;
use mio::net::TcpListener;

use super::connection::Socket;
use crate::listen::UnixSocket;

/// How a client learns of the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// It negotiates (newstyle).
    New,
    /// It is told (oldstyle), as blktap's first clients are.
    Old,
}

/// A bound socket.
#[derive(Debug)]
pub(super) enum Listener {
    Unix(UnixSocket),
    Tcp(TcpListener),
}

impl Listener {
    /// A Unix socket that only our own user may connect to.
    pub(super) fn unix(path: &Path) -> io::Result<Listener> {
        let at = |error: io::Error| io::Error::new(error.kind(), format!("NBD socket {}: {error}", path.display()));
        UnixSocket::bind(path).map(Listener::Unix).map_err(at)
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
            Listener::Unix(socket) => socket.source(),
            Listener::Tcp(listener) => listener,
        }
    }

    /// The next client.
    pub(super) fn accept(&self) -> io::Result<Socket> {
        match self {
            Listener::Unix(socket) => socket.accept().map(Socket::Unix),
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
            Listener::Unix(socket) => socket.path().display().to_string(),
            Listener::Tcp(listener) => listener.local_addr().map_or_else(|e| e.to_string(), |a| a.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tcp_is_for_this_host_only() {
        for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
            assert_eq!(Listener::tcp(address.parse().unwrap()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        assert!(Listener::tcp("127.0.0.1:0".parse().unwrap()).is_ok());
    }
}
