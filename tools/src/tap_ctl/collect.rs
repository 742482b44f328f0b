//! Asks all tapdisks of a host at once. One that does not answer holds up no other.

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
use tapdisk::control::proto::{MESSAGE_SIZE, Message, NO_MINOR, Stat, kind};
use tapdisk::metrics::ProcessMetrics;
use tapdisk::text::one_line;
use zerocopy::IntoBytes;

/// More than any answer has, in bytes.
const ANSWER_MAX: usize = client::TEXT_MAX as usize;
/// How often it is tried to ask one whose queue of connections is full.
const RETRY_EACH: Duration = Duration::from_millis(20);

/// Of one that has too many connections, or ends.
const CLOSED: &str = "it has closed the connection";

/// What came of asking a tapdisk.
#[derive(Clone, Debug)]
pub(super) enum Answer<T> {
    /// What it was asked for.
    Told(T),
    /// It has not answered for so long.
    Hangs(Duration),
    /// It does not tell, and why.
    Refused(String),
}

/// Takes what has come of an answer apart. None: there is more to come.
type Parse<T> = fn(&[u8]) -> io::Result<Option<T>>;

/// A question that is not answered.
struct Query {
    stream: UnixStream,
    received: Vec<u8>,
}

/// Asks again and again.
pub(super) struct Collector<T> {
    directory: PathBuf,
    /// The message's type.
    question: u16,
    parse: Parse<T>,
    /// Kept from one round to the next, so that a process that hangs does not get ever more connections.
    queries: BTreeMap<i32, Query>,
    /// Since when each process owes an answer.
    since: BTreeMap<i32, Instant>,
}

impl Collector<ProcessMetrics> {
    /// Asks for metrics those that have a control socket in `directory`.
    pub(super) fn of_metrics(directory: &Path) -> Collector<ProcessMetrics> {
        Collector::new(directory, kind::METRICS, metrics)
    }
}

impl<T> Collector<T> {
    /// Asks those that have a control socket in `directory`.
    pub(super) fn new(directory: &Path, question: u16, parse: Parse<T>) -> Collector<T> {
        // A thousand tapdisks are as many connections. Where that is not allowed, some are told of as not answering.
        if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
        }
        let (queries, since) = (BTreeMap::new(), BTreeMap::new());
        Collector { directory: directory.to_owned(), question, parse, queries, since }
    }

    /// Asks all, as [`ask`](Self::ask) does.
    pub(super) fn round(&mut self, patience: Duration) -> io::Result<BTreeMap<i32, Answer<T>>> {
        match client::pids(&self.directory) {
            // No tapdisk has made it yet.
            Err(error) if error.kind() == ErrorKind::NotFound => self.ask(Vec::new(), patience),
            pids => self.ask(pids?, patience),
        }
    }

    /// Asks these, and waits for their answers, but not longer than `patience`, and not at all for those that have let the last
    /// round wait in vain. In the order of their ids; those that are gone are left out.
    pub(super) fn ask(&mut self, pids: Vec<i32>, patience: Duration) -> io::Result<BTreeMap<i32, Answer<T>>> {
        self.queries.retain(|pid, _| pids.contains(pid));
        self.since.retain(|pid, _| pids.contains(pid));
        let (begin, mut answers) = (Instant::now(), BTreeMap::new());
        let mut unasked: Vec<_> = pids.into_iter().filter(|pid| !self.queries.contains_key(pid)).collect();
        for pid in &unasked {
            self.since.entry(*pid).or_insert(begin);
        }
        loop {
            unasked.retain(|pid| self.begin(*pid, &mut answers));
            let fresh = self.since.values().any(|since| *since == begin);
            let left =
                if fresh { (begin + patience).saturating_duration_since(Instant::now()) } else { Duration::ZERO };
            let sleep = if unasked.is_empty() { left } else { left.min(RETRY_EACH) };
            self.wait(sleep, &mut answers)?;
            // Also where there is more to come: who sends a byte now and then would hold up the others.
            if left.is_zero() {
                break;
            }
        }
        let hang = self.since.iter().map(|(pid, since)| (*pid, Answer::Hangs(since.elapsed())));
        answers.extend(hang);
        Ok(answers)
    }

    /// Asks one. True: it is to be tried again, since as many as it lets wait are waiting.
    fn begin(&mut self, pid: i32, answers: &mut BTreeMap<i32, Answer<T>>) -> bool {
        match send(&client::path(&self.directory, pid), self.question) {
            Ok(stream) => drop(self.queries.insert(pid, Query { stream, received: Vec::new() })),
            Err(Errno::EAGAIN) => return true,
            // It has just gone, or left its socket behind.
            Err(Errno::ECONNREFUSED | Errno::ENOENT) => drop(self.since.remove(&pid)),
            Err(errno) => {
                self.since.remove(&pid);
                let why = if errno == Errno::EPIPE { CLOSED } else { errno.desc() };
                answers.insert(pid, Answer::Refused(why.to_owned()));
            }
        }
        false
    }

    /// Waits until some of the questions go on, and takes what is answered.
    fn wait(&mut self, left: Duration, answers: &mut BTreeMap<i32, Answer<T>>) -> io::Result<()> {
        let mut fds: Vec<_> =
            self.queries.values().map(|query| PollFd::new(query.stream.as_fd(), PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::try_from(left.as_millis().min(60_000) as i32).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => return Ok(()),
            count => count?,
        };
        let ready = |fd: &PollFd| fd.any().unwrap_or(false);
        let pids: Vec<_> = self.queries.keys().zip(&fds).filter(|(_, fd)| ready(fd)).map(|(pid, _)| *pid).collect();
        for pid in &pids {
            let Some(query) = self.queries.get_mut(pid) else { continue };
            let answer = match query.advance(self.parse) {
                Ok(None) => continue,
                Ok(Some(answer)) => Answer::Told(answer),
                Err(error) => Answer::Refused(one_line(&error.to_string()).into_owned()),
            };
            self.queries.remove(pid);
            self.since.remove(pid);
            answers.insert(*pid, answer);
        }
        Ok(())
    }
}

/// Sends the question. EAGAIN: there is no room for one more that waits for an answer.
fn send(path: &Path, question: u16) -> nix::Result<UnixStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let mut stream = UnixStream::from(socket);
    // A new connection has room for all of it.
    let sent = stream.write_all(Message::new(question, NO_MINOR).as_bytes());
    sent.map_err(|error| client::errno(&error))?;
    Ok(stream)
}

impl Query {
    /// Takes what has come. None: there is more to come.
    fn advance<T>(&mut self, parse: Parse<T>) -> io::Result<Option<T>> {
        let mut bytes = [0; 65536];
        let ended = loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => break true,
                Ok(count) => self.received.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break false,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break true,
                Err(error) => return Err(error),
            }
            if self.received.len() > ANSWER_MAX {
                return Err(io::Error::other(format!("an answer of more than {ANSWER_MAX} bytes")));
            }
        };
        match parse(&self.received)? {
            // It ends, or has too many connections; next time it may answer.
            None if ended => Err(io::Error::other(CLOSED)),
            answer => Ok(answer),
        }
    }
}

/// The first message of what has come, which must be of that type, and what follows it.
pub(super) fn message(received: &[u8], wanted: u16) -> io::Result<Option<(Message, &[u8])>> {
    let Some((head, rest)) = received.split_first_chunk::<MESSAGE_SIZE>() else { return Ok(None) };
    Ok(Some((client::message(head, wanted)?, rest)))
}

/// The answer to METRICS.
fn metrics(received: &[u8]) -> io::Result<Option<ProcessMetrics>> {
    let Some((message, rest)) = message(received, kind::METRICS_RSP)? else { return Ok(None) };
    let stat: Stat = message.member();
    let json = usize::try_from(stat.length).ok().and_then(|length| rest.get(..length));
    Ok(json.map(serde_json::from_slice).transpose()?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    #[test]
    fn one_that_sends_a_byte_now_and_then_holds_up_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(client::path(folder.path(), 1)).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            while stream.write_all(&[0]).is_ok() {
                thread::sleep(Duration::from_millis(1));
            }
        });
        let begin = Instant::now();
        let mut collector = Collector::<()>::new(folder.path(), kind::LIST, |_| Ok(None));
        let answers = collector.ask(vec![1], Duration::from_millis(200)).unwrap();
        assert!(matches!(answers[&1], Answer::Hangs(_)), "{answers:?}");
        assert!(begin.elapsed() < Duration::from_secs(5));
        drop(collector);
        server.join().unwrap();
    }
}
