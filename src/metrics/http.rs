//! A Unix socket that answers `GET /metrics` by HTTP/1.1, on the main loop, for a scraper or a proxy in front of one.
//!
//! A connection is for one request. It never waits for the disk, so that it answers while the disk is stuck in I/O.

use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use httparse::Status;
use mio::net::UnixStream;
use mio::{Interest, Registry, Token};
use slog::{Logger, info, warn};

use super::text::CONTENT_TYPE;
use crate::listen::UnixSocket;
use crate::log::Limiter;
use crate::memory;
use crate::stats::now;

/// Connections at a time.
const CONNECTIONS_MAX: usize = 8;
/// How long a client may take, in ns.
const TIMEOUT: u64 = 5_000_000_000;
/// Bytes of a request, at most.
const REQUEST_MAX: usize = 8192;
/// Fields of its head, at most.
const HEADERS_MAX: usize = 64;

struct Connection {
    socket: UnixStream,
    request: Vec<u8>,
    response: Vec<u8>,
    sent: usize,
    until: u64,
}

/// The server.
pub struct Server {
    socket: UnixSocket,
    registry: Registry,
    base: usize,
    connections: Vec<Option<Connection>>,
    /// For those who are refused.
    limiter: Limiter,
    log: Logger,
}

impl Server {
    /// Listens. `{pid}` in the path becomes the id of this process. Tokens are `base` and up.
    pub fn bind(path: &Path, registry: Registry, base: usize, log: Logger) -> io::Result<Server> {
        let path = PathBuf::from(path.to_string_lossy().replace("{pid}", &std::process::id().to_string()));
        let explain = |error: io::Error| {
            let path = path.display();
            io::Error::new(error.kind(), format!("metrics socket {path}: {error}; metrics.socket says where it is"))
        };
        let mut socket = UnixSocket::bind(&path).map_err(explain)?;
        registry.register(socket.source(), Token(base), Interest::READABLE)?;
        info!(log, "metrics"; "socket" => %path.display());
        let connections = std::iter::repeat_with(|| None).take(CONNECTIONS_MAX).collect();
        Ok(Server { socket, registry, base, connections, limiter: Limiter::default(), log })
    }

    /// An event for token `base + index`. `text` makes what is asked for.
    pub fn event(&mut self, index: usize, text: impl Fn() -> io::Result<String>) {
        match index.checked_sub(1) {
            None => self.accept(text),
            Some(index) => self.advance(index, &text),
        }
    }

    fn accept(&mut self, text: impl Fn() -> io::Result<String>) {
        for mut socket in self.socket.accept_some(&self.log) {
            // One too many is closed at once: it can try again.
            let Some(index) = self.connections.iter().position(Option::is_none) else { continue };
            let token = Token(self.base + 1 + index);
            let interest = Interest::READABLE | Interest::WRITABLE;
            if let Err(error) = memory::admit(|| self.registry.register(&mut socket, token, interest)) {
                if let Some(suppressed) = self.limiter.allow(now()) {
                    warn!(self.log, "a client of metrics is refused"; "error" => %error, "suppressed_before" => suppressed);
                }
                continue;
            }
            let (request, response, until) = (Vec::new(), Vec::new(), now() + TIMEOUT);
            self.connections[index] = Some(Connection { socket, request, response, sent: 0, until });
            self.advance(index, &text);
        }
    }

    fn advance(&mut self, index: usize, text: &impl Fn() -> io::Result<String>) {
        let Some(Some(connection)) = self.connections.get_mut(index) else { return };
        match connection.advance(text) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            // It is over, or a client hung up early, which is its own affair.
            Ok(()) | Err(_) => self.connections[index] = None,
        }
    }

    /// When somebody's time is over, or somebody may want in.
    pub fn deadline(&self) -> Option<u64> {
        self.connections.iter().flatten().map(|connection| connection.until).chain(self.socket.due()).min()
    }

    /// Lets in those who wait for that, and lets go of those whose time is over.
    pub fn pass_time(&mut self, text: impl Fn() -> io::Result<String>) {
        let now = now();
        if self.socket.due().is_some_and(|due| due <= now) {
            self.accept(text);
        }
        for connection in &mut self.connections {
            connection.take_if(|connection| connection.until <= now);
        }
    }
}

impl Connection {
    /// Does what can be done without waiting. Ok: it is over.
    fn advance(&mut self, text: &impl Fn() -> io::Result<String>) -> io::Result<()> {
        while self.response.is_empty() {
            let mut bytes = [0; 1024];
            match self.socket.read(&mut bytes) {
                Ok(0) => return Ok(()),
                Ok(count) => self.request.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            if let Some(response) = respond(&self.request, text) {
                self.response = response;
            }
        }
        while self.sent < self.response.len() {
            match self.socket.write(&self.response[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The answer to a request, as soon as all of its head is there.
fn respond(request: &[u8], text: impl Fn() -> io::Result<String>) -> Option<Vec<u8>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut headers);
    let status = parsed.parse(request);
    let (method, target) = (parsed.method.unwrap_or_default(), parsed.path.unwrap_or_default());
    let path = target.split('?').next().unwrap_or_default();
    Some(match (status, method, path) {
        (Err(httparse::Error::TooManyHeaders), ..) => plain("431 Request Header Fields Too Large", ""),
        (Ok(Status::Partial), ..) if request.len() >= REQUEST_MAX => plain("431 Request Header Fields Too Large", ""),
        (Ok(Status::Partial), ..) => return None,
        (Err(_), ..) => plain("400 Bad Request", ""),
        (Ok(_), "GET", "/metrics") => match text() {
            Ok(text) => response("200 OK", "", CONTENT_TYPE, &text),
            Err(_) => plain("503 Service Unavailable", ""),
        },
        (Ok(_), _, "/metrics") => plain("405 Method Not Allowed", "Allow: GET\r\n"),
        (Ok(_), ..) => plain("404 Not Found", ""),
    })
}

/// A response that has its status as its text.
fn plain(status: &str, more: &str) -> Vec<u8> {
    response(status, more, "text/plain", &format!("{status}\n"))
}

fn response(status: &str, more: &str, content_type: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\n{more}Content-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The status and the body of an answer; none as long as there is none.
    fn answer(request: &[u8]) -> Option<(u16, String)> {
        let response = String::from_utf8(respond(request, || Ok("text".to_owned()))?).unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert!(
            head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())) && head.ends_with("Connection: close")
        );
        Some((head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned()))
    }

    #[test]
    fn what_is_no_request_for_metrics_is_told_so() {
        let status = |request: &[u8]| answer(request).map(|(status, _)| status);
        assert_eq!(answer(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), Some((200, "text".to_owned())));
        assert_eq!(answer(b"GET /metrics?name=x HTTP/1.0\r\n\r\n"), Some((200, "text".to_owned())));
        assert_eq!(status(b"POST /metrics HTTP/1.1\r\n\r\n"), Some(405));
        assert_eq!(status(b"GET / HTTP/1.1\r\n\r\n"), Some(404));
        assert_eq!(status(b"GET /metricsx HTTP/1.1\r\n\r\n"), Some(404));
        for wrong in [&b"\0\0\0\0"[..], b"GET /metrics\r\n\r\n", b"GET /metrics HTTP/9.9\r\n\r\n", b"\xff\xfe GET"] {
            assert_eq!(status(wrong), Some(400), "{wrong:?}");
        }
        assert_eq!(status(b"GET /metrics HTTP/1.1\r\nHost: x\r\n"), None, "it is not all there");
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS_MAX + 1));
        assert_eq!(status(many.as_bytes()), Some(431));
        let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(REQUEST_MAX));
        assert_eq!(status(long.as_bytes()), Some(431));
    }
}
