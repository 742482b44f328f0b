//! The log: slog records, formatted where they arise and written by a thread of their own.
//!
//! The main loop never waits for whoever reads the log: where the thread can't keep up, records are dropped and
//! counted, and the count is logged when there is room again.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};

use nix::syslog::{Facility, LogFlags, Severity, openlog, syslog};
use serde::{Deserialize, Serialize};
use slog::{Drain, Level, Logger, OwnedKVList, Record, o};

use crate::blocking::{Blocking, spawn};
use crate::submit::STACK_SIZE;

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
            Sink::Stderr => Open::Stderr,
            Sink::File(path) => {
                let file = append(&path)?;
                Open::File(path, file)
            }
            Sink::Syslog => {
                openlog(Some(c"tapdisk"), LogFlags::LOG_PID, Facility::LOG_DAEMON)?;
                Open::Syslog
            }
        };
        let shared = Arc::new(Shared::default());
        let (sender, receiver) = sync_channel(BACKLOG);
        let mine = Arc::clone(&shared);
        let thread = spawn(blocking, "log", STACK_SIZE, move |_| write_all(&receiver, sink, &mine))?;
        let drain = Formatter { format, level, queue: sender.clone(), shared: Arc::clone(&shared) };
        let logger = Logger::root(drain.fuse(), o!("pid" => std::process::id()));
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

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(|error| io::Error::new(error.kind(), format!("log file {}: {error}", path.display())))
}

/// A sink that is open.
enum Open {
    Stderr,
    File(PathBuf, File),
    Syslog,
}

fn write_all(queue: &Receiver<Vec<u8>>, mut sink: Open, shared: &Shared) {
    while let Ok(record) = queue.recv() {
        if shared.reopen.swap(false, Ordering::AcqRel)
            && let Open::File(path, file) = &mut sink
        {
            // If it can't be opened, the old file is better than none.
            match append(path) {
                Ok(new) => *file = new,
                Err(error) => drop(writeln!(file, "cannot reopen: {error}")),
            }
        }
        if record == END {
            return;
        }
        // A log that can't be written is no reason to stop serving the disk.
        let _ = match &mut sink {
            Open::File(_, file) => file.write_all(&record),
            Open::Stderr => io::stderr().write_all(&record),
            Open::Syslog => {
                syslog(severity(&record), String::from_utf8_lossy(&record).trim_end()).map_err(Into::into)
            }
        };
    }
}

/// How severe a record is, by the level that it names.
fn severity(record: &[u8]) -> Severity {
    let levels = [
        (Level::Critical, Severity::LOG_CRIT),
        (Level::Error, Severity::LOG_ERR),
        (Level::Warning, Severity::LOG_WARNING),
        (Level::Debug, Severity::LOG_DEBUG),
        (Level::Trace, Severity::LOG_DEBUG),
    ];
    // What a record says comes behind it.
    let head = String::from_utf8_lossy(&record[..record.len().min(100)]);
    let named = levels.into_iter().filter_map(|(level, severity)| {
        let at = head.find(&format!(" {} ", level.as_short_str()))?;
        Some((at, severity))
    });
    named.min_by_key(|(at, _)| *at).map_or(Severity::LOG_INFO, |(_, severity)| severity)
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
        Ok(bytes)
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
        if lost > 0 {
            let args = format_args!("log records were dropped");
            let count = slog::b!("count" => lost);
            let note = self.bytes(&slog::record!(Level::Warning, "", &args, count), values)?;
            if !self.send(note) {
                self.shared.dropped.fetch_add(lost - 1, Ordering::Relaxed);
            }
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
