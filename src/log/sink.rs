//! Where records go: each whole, or not at all.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::syslog::{Severity, syslog};
use slog::Level;

use crate::text::one_line;

/// A sink that is open.
pub(super) enum Open {
    /// Standard error, or a file with its path.
    Lines(Lines, Option<PathBuf>),
    Syslog,
}

impl Open {
    pub(super) fn stderr() -> io::Result<Open> {
        Ok(Open::Lines(Lines::new(io::stderr().as_fd().try_clone_to_owned()?.into()), None))
    }

    pub(super) fn file(path: PathBuf) -> io::Result<Open> {
        Ok(Open::Lines(Lines::new(append(&path)?), Some(path)))
    }

    /// Opens a file anew, after it was rotated away.
    pub(super) fn reopen(&mut self) {
        let Open::Lines(lines, Some(path)) = self else { return };
        // If it can't be opened, the old file is better than none.
        match append(path) {
            Ok(new) => *lines = Lines::new(new),
            Err(error) => {
                let line = format!("cannot reopen: {}\n", one_line(&error.to_string()));
                drop(lines.write(line.as_bytes()));
            }
        }
    }

    /// Writes a record. If that fails, nothing of it is there.
    pub(super) fn write(&mut self, record: &[u8]) -> io::Result<()> {
        match self {
            Open::Lines(lines, _) => lines.write(record),
            Open::Syslog => syslog(severity(record), String::from_utf8_lossy(record).trim_end()).map_err(Into::into),
        }
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(|error| io::Error::new(error.kind(), format!("log file {}: {error}", path.display())))
}

/// A file, a pipe or a terminal.
pub(super) struct Lines {
    file: File,
    /// It ends with a part of a line, which could not be taken back.
    broken: bool,
}

impl Lines {
    fn new(file: File) -> Lines {
        Lines { file, broken: false }
    }

    fn write(&mut self, record: &[u8]) -> io::Result<()> {
        let with_end;
        let bytes = if self.broken {
            with_end = [b"\n", record].concat();
            &with_end
        } else {
            record
        };
        let mut done = 0;
        while done < bytes.len() {
            // A disk that is almost full, and a limit of file sizes, take a part.
            match self.file.write(&bytes[done..]) {
                Ok(0) => return Err(self.take_back(done, ErrorKind::WriteZero.into())),
                Ok(count) => done += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.take_back(done, error)),
            }
        }
        self.broken = false;
        Ok(())
    }

    /// Cuts off what was written last, unless others have written behind it, or it went where there is no way back.
    fn take_back(&mut self, count: usize, why: io::Error) -> io::Error {
        let file = &mut self.file;
        let mut cut = || {
            let end = file.stream_position()?;
            if file.metadata()?.len() != end {
                return Err(ErrorKind::Other.into());
            }
            file.set_len(end - count as u64)?;
            file.seek(SeekFrom::Start(end - count as u64))
        };
        if count > 0 && cut().is_err() {
            self.broken = true;
        }
        why
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

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_part_of_a_record_is_taken_back_where_nothing_follows_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut lines = Lines::new(append(&path).unwrap());
        lines.write(b"one\n").unwrap();
        lines.file.write_all(b"tw").unwrap();
        lines.take_back(2, ErrorKind::StorageFull.into());
        lines.write(b"three\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\nthree\n");
        lines.file.write_all(b"fo").unwrap();
        // Another process logs to the same file.
        append(&path).unwrap().write_all(b"other\n").unwrap();
        lines.take_back(2, ErrorKind::StorageFull.into());
        lines.write(b"five\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\nthree\nfoother\n\nfive\n");
    }

    #[test]
    fn what_a_pipe_has_taken_ends_before_the_next_record() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut lines = Lines::new(OwnedFd::from(ours).into());
        let long = [b"x".repeat(1 << 22).as_slice(), b"\n"].concat();
        assert_eq!(lines.write(&long).unwrap_err().kind(), ErrorKind::WouldBlock);
        let mut taken = vec![0; 1 << 22];
        theirs.set_nonblocking(true).unwrap();
        while theirs.read(&mut taken).is_ok() {}
        lines.write(b"next\n").unwrap();
        let count = theirs.read(&mut taken).unwrap();
        assert_eq!(&taken[..count], b"\nnext\n");
    }
}
