//! Asks all tapdisks of a host at once for their metrics. One that does not answer holds up no other.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use tapdisk::control::client;
use tapdisk::control::proto::{MESSAGE_SIZE, Message, NO_MINOR, Response, Stat, kind, text};
use tapdisk::metrics::ProcessMetrics;
use zerocopy::{FromBytes, IntoBytes};

/// More than any answer has, in bytes.
const ANSWER_MAX: u64 = 64 << 20;

/// What came of asking a tapdisk.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    /// Its metrics.
    Metrics(ProcessMetrics),
    /// It has not answered for so long.
    Hangs(Duration),
    /// It has no metrics to give, and says why.
    Refused(String),
}

/// A question that is not answered.
struct Query {
    stream: UnixStream,
    received: Vec<u8>,
}

/// Asks again and again.
pub(super) struct Collector {
    directory: PathBuf,
    /// Kept from one round to the next, so that a process that hangs does not get ever more connections.
    queries: BTreeMap<i32, Query>,
    /// Since when each process owes an answer.
    since: BTreeMap<i32, Instant>,
}

impl Collector {
    /// Asks those that have a control socket in `directory`.
    pub(super) fn new(directory: &Path) -> Collector {
        // A thousand tapdisks are as many connections. Where that is not allowed, some are told of as not answering.
        if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
        }
        Collector { directory: directory.to_owned(), queries: BTreeMap::new(), since: BTreeMap::new() }
    }

    /// Asks all, and waits for their answers, but not longer than `patience`, and not at all for those that have let the last
    /// round wait in vain. In the order of their ids.
    pub(super) fn round(&mut self, patience: Duration) -> io::Result<BTreeMap<i32, Answer>> {
        let pids = match client::pids(&self.directory) {
            // No tapdisk has made it yet.
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            pids => pids?,
        };
        self.queries.retain(|pid, _| pids.contains(pid));
        self.since.retain(|pid, _| pids.contains(pid));
        let (begin, mut answers) = (Instant::now(), BTreeMap::new());
        for pid in pids.into_iter().filter(|pid| !self.queries.contains_key(pid)).collect::<Vec<_>>() {
            match ask(&client::path(&self.directory, pid)) {
                Ok(stream) => drop(self.queries.insert(pid, Query { stream, received: Vec::new() })),
                // It has just gone, or left its socket behind.
                Err(Errno::ECONNREFUSED | Errno::ENOENT) => {
                    self.since.remove(&pid);
                    continue;
                }
                // As many as it lets wait are waiting.
                Err(Errno::EAGAIN) => {}
                Err(errno) => drop(answers.insert(pid, Answer::Refused(errno.desc().to_owned()))),
            }
            self.since.entry(pid).or_insert(begin);
        }
        loop {
            let fresh = self.queries.keys().any(|pid| self.since[pid] == begin);
            let left = (begin + patience).saturating_duration_since(Instant::now());
            if self.wait(if fresh { left } else { Duration::ZERO }, &mut answers)? == 0 {
                break;
            }
        }
        for pid in answers.keys() {
            self.since.remove(pid);
        }
        let hang = self.since.iter().map(|(pid, since)| (*pid, Answer::Hangs(since.elapsed())));
        answers.extend(hang);
        Ok(answers)
    }

    /// Waits until some of the questions go on, and takes what is answered. Gives how many went on.
    fn wait(&mut self, left: Duration, answers: &mut BTreeMap<i32, Answer>) -> io::Result<usize> {
        let mut fds: Vec<_> =
            self.queries.values().map(|query| PollFd::new(query.stream.as_fd(), PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::try_from(left.as_millis().min(60_000) as i32).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => return Ok(1),
            count => count?,
        };
        let ready = |fd: &PollFd| fd.any().unwrap_or(false);
        let pids: Vec<_> = self.queries.keys().zip(&fds).filter(|(_, fd)| ready(fd)).map(|(pid, _)| *pid).collect();
        for pid in &pids {
            let Some(query) = self.queries.get_mut(pid) else { continue };
            let answer = match query.advance() {
                Ok(None) => continue,
                Ok(Some(answer)) => answer,
                // It ends, or has too many connections; next time it may answer.
                Err(_) => Answer::Refused("it has closed the connection".to_owned()),
            };
            self.queries.remove(pid);
            answers.insert(*pid, answer);
        }
        Ok(pids.len())
    }
}

/// Sends the question. EAGAIN: there is no room for one more that waits for an answer.
fn ask(path: &Path) -> nix::Result<UnixStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let mut stream = UnixStream::from(socket);
    // A new connection has room for all of it.
    let sent = stream.write_all(Message::new(kind::METRICS, NO_MINOR).as_bytes());
    sent.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32)))?;
    Ok(stream)
}

impl Query {
    /// Takes what has come. None: there is more to come.
    fn advance(&mut self) -> io::Result<Option<Answer>> {
        let mut bytes = [0; 65536];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.received.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
            if let Some(answer) = self.answer() {
                return Ok(Some(answer));
            }
        }
    }

    fn answer(&self) -> Option<Answer> {
        let (head, rest) = self.received.split_at_checked(MESSAGE_SIZE)?;
        let message = Message::read_from_bytes(head).ok()?;
        if message.kind != kind::METRICS_RSP {
            let response: Response = message.member();
            let why = text(&response.message).filter(|why| !why.is_empty()).unwrap_or("it has no metrics");
            return Some(Answer::Refused(why.to_owned()));
        }
        let stat: Stat = message.member();
        if stat.length > ANSWER_MAX {
            return Some(Answer::Refused(format!("an answer of {} bytes is too long", stat.length)));
        }
        let json = rest.get(..stat.length as usize)?;
        Some(serde_json::from_slice(json).map_or_else(|error| Answer::Refused(error.to_string()), Answer::Metrics))
    }
}
