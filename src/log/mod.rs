//! The log: slog records, formatted where they arise and written by a thread of their own.
//!
//! The main loop never waits for whoever reads the log: where the thread can't keep up, records are dropped and
//! counted, and the count is logged when there is room again. So are those that can't be written, on a full disk.

mod sink;

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::syslog::{Facility, LogFlags, openlog};
use serde::{Deserialize, Serialize};
use slog::{Drain, Level, Logger, OwnedKVList, Record, o};

use self::sink::Open;
use crate::blocking::{Blocking, spawn};
use crate::submit::STACK_SIZE;
use crate::text::{one_line, plain_json};

/// Records that wait to be written.
const BACKLOG: usize = 1024;

/// How a record is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// For people: one line, in colours where the output is a terminal.
    #[default]
    Terminal,
    /// One JSON object a line.
    Json,
}

/// Where it goes.
#[derive(Clone, Debug)]
pub enum Sink {
    /// Standard error.
    Stderr,
    /// A file, which is appended to.
    File(PathBuf),
    /// The system's log, syslog(3), as `daemon`.
    Syslog,
}

/// Keeps the log open. Dropping it writes what still waits.
pub struct Log {
    queue: Option<SyncSender<Vec<u8>>>,
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    dropped: AtomicU64,
    reopen: AtomicBool,
}

impl Log {
    /// Opens the log.
    pub fn open(blocking: &Blocking, format: Format, level: Level, sink: Sink) -> io::Result<(Log, Logger)> {
        let sink = match sink {
            Sink::Stderr => Open::stderr()?,
            Sink::File(path) => Open::file(path)?,
            Sink::Syslog => {
                openlog(Some(c"tapdisk"), LogFlags::LOG_PID, Facility::LOG_DAEMON)?;
                Open::Syslog
            }
        };
        let shared = Arc::new(Shared::default());
        let (sender, receiver) = sync_channel(BACKLOG);
        let mine = Arc::clone(&shared);
        let formatter = || Formatter { format, level, queue: sender.clone(), shared: Arc::clone(&shared) };
        let (formatting, values) = (formatter(), OwnedKVList::from(o!("pid" => std::process::id())));
        let note = move |lost| formatting.count("log records were lost: the log could not be written", lost, &values);
        let thread = spawn(blocking, "log", STACK_SIZE, move |_| write_all(&receiver, sink, &mine, note))?;
        let logger = Logger::root(formatter().fuse(), o!("pid" => std::process::id()));
        Ok((Log { queue: Some(sender), shared, thread: Some(thread) }, logger))
    }

    /// Opens the file anew, after it was rotated away.
    pub fn reopen(&self) {
        self.shared.reopen.store(true, Ordering::Release);
        // An empty record wakes the thread; if the queue is full it is awake.
        if let Some(queue) = &self.queue {
            let _ = queue.try_send(Vec::new());
        }
    }

    /// Records that were dropped and not yet reported.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        // The loggers that are still about keep the channel open, so its end is a message.
        if let Some(queue) = self.queue.take() {
            let _ = queue.send(END.to_vec());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// No record has this text: each ends with a newline.
const END: &[u8] = b"end";

/// How soon it is tried again to say how much was lost.
const AGAIN: Duration = Duration::from_secs(1);

/// The thread: a log that can't be written is no reason to stop serving the disk. What it loses is whole records, and when there is room again it
/// says how many; `note` makes that record.
fn write_all(queue: &Receiver<Vec<u8>>, mut sink: Open, shared: &Shared, note: impl Fn(u64) -> Vec<u8>) {
    let mut lost = 0;
    loop {
        let record = match lost {
            0 => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            _ => queue.recv_timeout(AGAIN),
        };
        if shared.reopen.swap(false, Ordering::AcqRel) {
            sink.reopen();
        }
        // In their order, or the count would come after what was logged later.
        if lost > 0 && sink.write(&note(lost)).is_ok() {
            lost = 0;
        }
        match record {
            Ok(record) if record == END => return,
            Ok(record) if record.is_empty() => {}
            Ok(record) if lost > 0 || sink.write(&record).is_err() => lost += 1,
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

struct Formatter {
    format: Format,
    level: Level,
    queue: SyncSender<Vec<u8>>,
    shared: Arc<Shared>,
}

/// A buffer that slog's own formatters write to.
#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Formatter {
    fn bytes(&self, record: &Record, values: &OwnedKVList) -> io::Result<Vec<u8>> {
        let buffer = Buffer::default();
        match self.format {
            Format::Json => slog_json::Json::default(buffer.clone()).log(record, values)?,
            Format::Terminal => {
                let decorator = slog_term::PlainSyncDecorator::new(buffer.clone());
                let drain = slog_term::FullFormat::new(decorator).use_utc_timestamp().use_original_order().build();
                drain.log(record, values)?;
            }
        }
        let bytes = std::mem::take(&mut *buffer.0.lock().unwrap());
        let text = String::from_utf8_lossy(&bytes);
        let line = text.trim_end_matches('\n');
        // A record is one line, whatever images, paths and clients are called.
        let line = if self.format == Format::Json { plain_json(line) } else { one_line(line) };
        Ok(format!("{line}\n").into_bytes())
    }

    /// A record of ours, that says how many others are not there.
    fn count(&self, text: &str, count: u64, values: &OwnedKVList) -> Vec<u8> {
        let args = format_args!("{text}");
        let count = slog::b!("count" => count);
        // Memory is all that it is written to.
        self.bytes(&slog::record!(Level::Warning, "", &args, count), values).unwrap_or_default()
    }

    fn send(&self, bytes: Vec<u8>) -> bool {
        match self.queue.try_send(bytes) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.shared.dropped.fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }
}

impl Drain for Formatter {
    type Ok = ();
    type Err = io::Error;

    fn log(&self, record: &Record, values: &OwnedKVList) -> Result<(), io::Error> {
        if !record.level().is_at_least(self.level) {
            return Ok(());
        }
        let lost = self.shared.dropped.swap(0, Ordering::Relaxed);
        if lost > 0 && !self.send(self.count("log records were dropped", lost, values)) {
            self.shared.dropped.fetch_add(lost - 1, Ordering::Relaxed);
        }
        self.send(self.bytes(record, values)?);
        Ok(())
    }
}

/// Lets a few messages a second through, and counts the others.
#[derive(Debug, Default)]
pub struct Limiter {
    window: u64,
    allowed: u32,
    suppressed: u64,
}

impl Limiter {
    /// Messages in a second.
    const BURST: u32 = 10;

    /// Whether a message may be logged now (ns of [`crate::stats::now`]), and how many were suppressed before it.
    pub fn allow(&mut self, now: u64) -> Option<u64> {
        let window = now / 1_000_000_000 + 1;
        if self.window != window {
            (self.window, self.allowed) = (window, 0);
        }
        if self.allowed == Self::BURST {
            self.suppressed += 1;
            return None;
        }
        self.allowed += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}
