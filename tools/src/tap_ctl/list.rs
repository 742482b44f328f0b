//! `list`, as storage managers parse it, and which disk a command means.

use std::io::{self, ErrorKind, Write};
use std::path::Path;

use nix::errno::Errno;
use serde::Serialize;
use tapdisk::control::client::{self, Listed, refused};

use super::{Args, Disk, List, Which, is_terminal};

/// A line: a disk, or a process that has none or does not tell.
#[derive(Debug, Serialize)]
struct Line {
    pid: i32,
    minor: Option<i32>,
    state: Option<i32>,
    name: Option<String>,
}

impl Line {
    fn of_disk(disk: Listed) -> Line {
        let name = Some(disk.name).filter(|name| !name.is_empty());
        Line { pid: disk.pid, minor: Some(disk.minor), state: Some(disk.state), name }
    }

    fn of_process(pid: i32) -> Line {
        Line { pid, minor: None, state: None, name: None }
    }

    fn is_wanted(&self, wanted: &List) -> bool {
        let (kind, path) = self.name.as_deref().and_then(|name| name.split_once(':')).unzip();
        wanted.minor.is_none_or(|minor| self.minor == Some(minor))
            && wanted.kind.as_deref().is_none_or(|wanted| kind == Some(wanted))
            && wanted.file.as_deref().is_none_or(|wanted| path == Some(wanted))
    }

    /// For programs: what is not there is left out.
    fn fields(&self) -> String {
        let minor = self.minor.map(|minor| format!(" minor={minor}"));
        let state = self.state.map(|state| format!(" state={}", hex(state)));
        let name = self.name.as_ref().map(|name| format!(" args={name}"));
        let rest: String = [minor, state, name].into_iter().flatten().collect();
        format!("pid={}{rest}", self.pid)
    }

    /// For people.
    fn columns(&self) -> String {
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        let (minor, state) = (or_dash(self.minor.map(|minor| minor.to_string())), or_dash(self.state.map(hex)));
        let (kind, path) = self.name.as_deref().and_then(|name| name.split_once(':')).unwrap_or(("-", "-"));
        format!("{:>8} {minor:>4} {state:>4} {kind:>10} {path}", self.pid)
    }
}

/// C's %#x, which has no prefix for zero.
fn hex(state: i32) -> String {
    if state == 0 { "0".into() } else { format!("{state:#x}") }
}

/// What each process, or the one that is meant, says of its disks; in the order of process ids. Those whose process is gone are left
/// out.
fn processes(directory: &Path, pid: Option<i32>) -> io::Result<Vec<(i32, io::Result<Vec<Listed>>)>> {
    let mut all = match pid {
        Some(pid) => vec![(pid, client::list(directory, pid))],
        None => client::list_all(directory)?,
    };
    all.retain(|(_, listed)| !listed.as_ref().is_err_and(client::is_gone));
    for (_, listed) in &mut all {
        if let Ok(disks) = listed {
            disks.sort_by_key(|disk| disk.minor);
        }
    }
    Ok(all)
}

/// `list`.
pub(super) fn list(out: &mut impl Write, args: &Args, wanted: &List) -> io::Result<()> {
    let processes = match processes(&args.directory, wanted.pid) {
        // Nobody has ever been there.
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        other => other.map_err(|error| in_directory(args, &error))?,
    };
    let of_process = |(pid, listed): (i32, io::Result<Vec<Listed>>)| match listed {
        Ok(disks) if !disks.is_empty() => disks.into_iter().map(Line::of_disk).collect(),
        _ => vec![Line::of_process(pid)],
    };
    let lines: Vec<Line> = processes.into_iter().flat_map(of_process).filter(|line| line.is_wanted(wanted)).collect();
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

/// The disk that is meant.
pub(super) fn find(args: &Args, which: &Which) -> io::Result<Disk> {
    if let (Some(pid), Some(minor)) = (which.pid, which.minor) {
        return Ok(Disk { pid, minor });
    }
    let processes = processes(&args.directory, which.pid).map_err(|error| in_directory(args, &error))?;
    let wanted = |disk: &Listed| which.minor.is_none_or(|minor| disk.minor == i32::from(minor));
    let disks = processes.into_iter().flat_map(|(_, listed)| listed.unwrap_or_default());
    let found: Vec<_> = disks.filter(wanted).collect();
    match found.as_slice() {
        [disk] => Ok(Disk { pid: disk.pid, minor: disk.minor as u16 }),
        [] => {
            let text = "no such tapdisk, or it has no such disk";
            Err(in_directory(args, &refused(Errno::ENOENT, text.into())))
        }
        many => {
            let names: Vec<_> = many.iter().map(|disk| format!("-p {} -m {}", disk.pid, disk.minor)).collect();
            Err(refused(Errno::EINVAL, format!("there are several disks: say which ({})", names.join(", "))))
        }
    }
}
