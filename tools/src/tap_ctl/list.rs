//! `list`, as storage managers parse it, and which disk a command means.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use nix::errno::Errno;
use serde::Serialize;
use tapdisk::control::client::{self, TIMEOUT, refused};
use tapdisk::control::proto::{self, kind, text};
use tapdisk::minors::marker;
use tapdisk::text::one_line;

use super::collect::{Answer, Collector, message};
use super::{Args, Disk, List, Which, is_terminal};

/// A disk, as LIST tells of it.
#[derive(Clone, Debug)]
struct Listed {
    minor: i32,
    state: i32,
    /// `type:path`; empty where no image is open.
    name: String,
}

/// A line: a disk, or a process that has none or does not tell.
#[derive(Debug, Serialize)]
struct Line {
    /// None: nobody has attached the minor.
    pid: Option<i32>,
    minor: Option<i32>,
    state: Option<i32>,
    name: Option<String>,
    /// Why the process does not tell.
    error: Option<String>,
}

impl Line {
    fn of_disk(pid: i32, disk: Listed) -> Line {
        let name = Some(disk.name).filter(|name| !name.is_empty());
        Line { pid: Some(pid), minor: Some(disk.minor), state: Some(disk.state), name, error: None }
    }

    fn of_process(pid: i32, error: Option<String>) -> Line {
        Line { pid: Some(pid), minor: None, state: None, name: None, error }
    }

    fn of_minor(minor: i32) -> Line {
        Line { pid: None, minor: Some(minor), state: None, name: None, error: None }
    }

    fn is_wanted(&self, wanted: &List) -> bool {
        let (kind, path) = self.name.as_deref().and_then(|name| name.split_once(':')).unzip();
        wanted.minor.is_none_or(|minor| self.minor == Some(minor))
            && wanted.kind.as_deref().is_none_or(|wanted| kind == Some(wanted))
            && wanted.file.as_deref().is_none_or(|wanted| path == Some(wanted))
    }

    /// For programs: what is not there is left out.
    fn fields(&self) -> String {
        let pid = self.pid.map(|pid| format!("pid={pid}"));
        let minor = self.minor.map(|minor| format!("minor={minor}"));
        let state = self.state.map(|state| format!("state={}", hex(state)));
        let name = self.name.as_ref().map(|name| format!("args={}", one_line(name)));
        [pid, minor, state, name].into_iter().flatten().collect::<Vec<_>>().join(" ")
    }

    /// For people.
    fn columns(&self) -> String {
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        let (minor, state) = (or_dash(self.minor.map(|minor| minor.to_string())), or_dash(self.state.map(hex)));
        let (kind, path) = self.name.as_deref().and_then(|name| name.split_once(':')).unwrap_or(("-", "-"));
        let pid = or_dash(self.pid.map(|pid| pid.to_string()));
        format!("{pid:>8} {minor:>4} {state:>4} {kind:>10} {}", one_line(path))
    }
}

/// C's %#x, which has no prefix for zero.
fn hex(state: i32) -> String {
    if state == 0 { "0".into() } else { format!("{state:#x}") }
}

/// What each process, or the one that is meant, says of its disks. Those whose process is gone are left out.
fn processes(directory: &Path, pid: Option<i32>) -> io::Result<BTreeMap<i32, Answer<Vec<Listed>>>> {
    let pids = match pid {
        Some(pid) => vec![pid],
        None => client::pids(directory)?,
    };
    Collector::new(directory, kind::LIST, disks).ask(pids, TIMEOUT)
}

/// The answer to LIST, in the order of minors.
fn disks(received: &[u8]) -> io::Result<Option<Vec<Listed>>> {
    let (mut disks, mut left) = (Vec::new(), received);
    while let Some((message, rest)) = message(left, kind::LIST_RSP)? {
        let list: proto::List = message.member();
        if list.count <= 0 {
            disks.sort_by_key(|disk: &Listed| disk.minor);
            return Ok(Some(disks));
        }
        let name = text(&list.path).ok_or_else(|| io::Error::other("a path that is no text"))?.to_owned();
        disks.push(Listed { minor: list.minor, state: list.state, name });
        left = rest;
    }
    Ok(None)
}

/// `list`.
pub(super) fn list(out: &mut impl Write, args: &Args, wanted: &List) -> io::Result<()> {
    let processes = match processes(&args.directory, wanted.pid) {
        // Nobody has ever been there.
        Err(error) if error.kind() == ErrorKind::NotFound => BTreeMap::new(),
        other => other.map_err(|error| in_directory(args, &error))?,
    };
    let of_process = |(pid, answer): (i32, Answer<Vec<Listed>>)| match answer {
        Answer::Told(disks) if !disks.is_empty() => disks.into_iter().map(|disk| Line::of_disk(pid, disk)).collect(),
        Answer::Told(_) => vec![Line::of_process(pid, None)],
        Answer::Hangs(_) => vec![Line::of_process(pid, Some(format!("no answer in {} seconds", TIMEOUT.as_secs())))],
        Answer::Refused(why) => vec![Line::of_process(pid, Some(why))],
    };
    let mut lines: Vec<Line> = processes.into_iter().flat_map(of_process).collect();
    if wanted.pid.is_none() {
        let taken =
            marker::taken(&args.directory).map_err(|error| in_directory(args, &error))?.into_iter().map(i32::from);
        let known: Vec<_> = lines.iter().filter_map(|line| line.minor).collect();
        lines.extend(taken.filter(|minor| !known.contains(minor)).map(Line::of_minor));
    }
    if args.debug {
        let silent = lines.iter().filter_map(|line| Some((line.pid, line.error.as_ref()?)));
        silent.for_each(|(pid, why)| eprintln!("process {}: {}", pid.unwrap_or_default(), one_line(why)));
    }
    lines.retain(|line| line.is_wanted(wanted));
    if args.json {
        return writeln!(out, "{}", serde_json::to_string(&lines)?);
    }
    if is_terminal() {
        writeln!(out, "{:>8} {:>4} {:>4} {:>10} ARGS", "PID", "MIN", "STAT", "TYPE")?;
    }
    for line in &lines {
        writeln!(out, "{}", if is_terminal() { line.columns() } else { line.fields() })?;
    }
    Ok(())
}

fn in_directory(args: &Args, error: &io::Error) -> io::Error {
    let directory = args.directory.display();
    let text = format!("{directory}: {error}; --directory says where the control sockets are");
    refused(client::errno(error), text)
}

/// Disks that an error names.
const NAMED: usize = 20;

/// The disk that is meant.
pub(super) fn find(args: &Args, which: &Which) -> io::Result<Disk> {
    if let (Some(pid), Some(minor)) = (which.pid, which.minor) {
        return Ok(Disk { pid, minor });
    }
    let processes = processes(&args.directory, which.pid).map_err(|error| in_directory(args, &error))?;
    let disks = processes.into_iter().flat_map(|(pid, answer)| {
        let disks = if let Answer::Told(disks) = answer { disks } else { Vec::new() };
        disks.into_iter().filter_map(move |disk| Some(Disk { pid, minor: disk.minor.try_into().ok()? }))
    });
    let found: Vec<_> = disks.filter(|disk| which.minor.is_none_or(|minor| disk.minor == minor)).collect();
    match found.as_slice() {
        [disk] => Ok(*disk),
        [] => {
            let text = "no such tapdisk, or it has no such disk";
            Err(in_directory(args, &refused(Errno::ENOENT, text.into())))
        }
        many => {
            let names = many.iter().take(NAMED).map(|disk| format!("-p {} -m {}", disk.pid, disk.minor));
            let more = many.len().saturating_sub(NAMED);
            let more = (more > 0).then(|| format!("and {more} more"));
            let names = names.chain(more).collect::<Vec<_>>().join(", ");
            Err(refused(Errno::EINVAL, format!("there are several disks: say which ({names})")))
        }
    }
}
