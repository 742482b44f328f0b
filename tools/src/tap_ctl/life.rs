//! The life of a disk: its minor, its process, its image.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use serde_json::json;
use tapdisk::config::Statistics;
use tapdisk::control::client::{self, Opening, errno, is_gone, refused};
use tapdisk::control::proto::{Image, open as flag};
use tapdisk::minors::marker;
use tapdisk::stats::shm;

use super::failure::exact;
use super::spawn::start;
use super::{Answer, Disk, Limit, Opened, absolute_name, absolute_path, is_terminal};

/// The sizes that a key may have, bytes.
const KEY_SIZES: [usize; 2] = [32, 64];
/// How long a process that ends may take to be gone.
const DYING_MAX: Duration = Duration::from_secs(5);
/// How often it is looked at.
const DYING_EACH: Duration = Duration::from_millis(10);

impl Limit {
    /// None: it waits as long as it takes.
    pub(super) fn duration(self) -> Option<Duration> {
        (self.seconds > 0).then(|| Duration::from_secs(self.seconds.into()))
    }
}

impl Opened {
    /// The image's name and the log's path, which begin at the root.
    fn names(&self) -> io::Result<(String, Option<String>)> {
        Ok((absolute_name(&self.image)?, self.log.as_deref().map(absolute_path).transpose()?))
    }

    /// What the tapdisk is asked for, with [`names`](Self::names).
    fn opening<'a>(&'a self, names: &'a (String, Option<String>), key: &'a [u8]) -> Opening<'a> {
        let given = |flag, is: bool| if is { flag } else { 0 };
        Opening {
            image: &names.0,
            flags: given(flag::RDONLY, self.read_only)
                | given(flag::NO_O_DIRECT, self.no_o_direct)
                | given(flag::ADD_LCACHE, self.local_cache)
                | given(flag::STANDBY, self.standby),
            parent: self.parent,
            secondary: self.secondary.as_deref(),
            log: names.1.as_deref(),
            timeout_s: self.timeout_s,
            key,
        }
    }
}

/// `allocate`.
pub(super) fn allocate(directory: &Path) -> io::Result<Answer> {
    let (minor, path) = take_minor(directory)?;
    Ok(Answer::new(path.display(), json!({ "minor": minor, "path": path })))
}

fn take_minor(directory: &Path) -> io::Result<(u16, PathBuf)> {
    marker::allocate(directory).map_err(|error| {
        let text = format!("{}: cannot take a minor: {error}", directory.display());
        refused(errno(&error), text)
    })
}

/// `free`.
pub(super) fn free(directory: &Path, minor: u16) -> io::Result<Answer> {
    give_back(directory, minor).map(|()| Answer::new("", json!({ "minor": minor })))
}

fn give_back(directory: &Path, minor: u16) -> io::Result<()> {
    marker::free(directory, minor).map_err(|error| {
        let why = match errno(&error) {
            Errno::ENOENT => "nobody has taken it".to_owned(),
            Errno::EAGAIN => "a tapdisk has it: tap-ctl list says which".to_owned(),
            _ => error.to_string(),
        };
        refused(errno(&error), format!("minor {minor} in {}: {why}", directory.display()))
    })
}

/// The same for that of a process that ends: it has its files until the last of it is gone.
fn give_back_late(directory: &Path, minor: u16) -> io::Result<()> {
    let end = Instant::now() + DYING_MAX;
    loop {
        match give_back(directory, minor) {
            Err(error) if errno(&error) == Errno::EAGAIN && Instant::now() < end => std::thread::sleep(DYING_EACH),
            other => return other,
        }
    }
}

/// `spawn`.
pub(super) fn spawn(directory: &Path, slice: Option<&str>) -> io::Result<Answer> {
    let pid = start(directory, slice)?;
    let text = if is_terminal() { format!("tapdisk spawned with pid {pid}") } else { pid.to_string() };
    Ok(Answer::new(text, json!({ "pid": pid })))
}

/// `attach`.
pub(super) fn attach(directory: &Path, disk: Disk) -> io::Result<Answer> {
    client::attach(directory, disk.pid, disk.minor).map(|()| Answer::done(disk))
}

/// `detach`.
pub(super) fn detach(directory: &Path, disk: Disk) -> io::Result<Answer> {
    client::detach(directory, disk.pid, disk.minor).map(|()| Answer::done(disk))
}

/// `open`, with a key from standard input if one is to be there.
pub(super) fn open(directory: &Path, disk: Disk, image: &Opened, encrypted: bool) -> io::Result<Answer> {
    let mut key = Vec::new();
    if encrypted {
        // A byte more than it may have.
        io::stdin().take(KEY_SIZES[1] as u64 + 1).read_to_end(&mut key)?;
        if !KEY_SIZES.contains(&key.len()) {
            return Err(exact("Unsupported keysize, use either 256 bit or 512 bit key"));
        }
    }
    let Disk { pid, minor } = disk;
    let names = image.names()?;
    let Image { sectors, sector_size, info } = client::open(directory, pid, minor, &image.opening(&names, &key))?;
    let value = json!({ "pid": pid, "minor": minor, "sectors": sectors, "sector_size": sector_size, "info": info });
    Ok(Answer::new("", value))
}

/// `close`.
pub(super) fn close(directory: &Path, disk: Disk, force: bool, limit: Limit) -> io::Result<Answer> {
    client::close(directory, disk.pid, disk.minor, force, limit.duration()).map(|()| Answer::done(disk))
}

/// `pause`.
pub(super) fn pause(directory: &Path, disk: Disk, limit: Limit) -> io::Result<Answer> {
    client::pause(directory, disk.pid, disk.minor, limit.duration()).map(|()| Answer::done(disk))
}

/// `unpause`.
pub(super) fn unpause(directory: &Path, disk: Disk, opening: &Opening<'_>) -> io::Result<Answer> {
    client::resume(directory, disk.pid, disk.minor, opening).map(|()| Answer::done(disk))
}

/// `exit`.
pub(super) fn exit(directory: &Path, pid: i32) -> io::Result<Answer> {
    client::exit(directory, pid).map(|()| Answer::new("", json!({ "pid": pid })))
}

/// `create`. Nothing is left of it if it fails.
pub(super) fn create(directory: &Path, slice: Option<&str>, image: &Opened) -> io::Result<Answer> {
    let names = image.names()?;
    let (minor, path) = take_minor(directory)?;
    let made = start(directory, slice).and_then(|pid| {
        let attached = client::attach(directory, pid, minor);
        let opened = attached.and_then(|()| client::open(directory, pid, minor, &image.opening(&names, &[])));
        opened.map(|_| pid).inspect_err(|_| end(directory, pid, minor))
    });
    // It is the first error that counts.
    let pid = made.inspect_err(|_| drop(give_back_late(directory, minor)))?;
    Ok(Answer::new(path.display(), json!({ "pid": pid, "minor": minor, "path": path })))
}

/// Ends a process that we have started, and that has no image open.
fn end(directory: &Path, pid: i32, minor: u16) {
    let detached = client::detach(directory, pid, minor);
    // One that had no minor does not end by itself.
    let ended = detached.or_else(|_| client::exit(directory, pid));
    if ended.is_err_and(|error| !is_gone(&error)) {
        // It does not listen. Nothing can be done where it has ended meanwhile.
        let _ = client::signal(directory, pid, Signal::SIGKILL);
        sweep(directory, &Statistics::default().directory, pid, minor);
    }
}

/// Removes the sockets that a killed process has left, and the statistics of all such; there may be none.
fn sweep(directory: &Path, statistics: &Path, pid: i32, minor: u16) {
    // Where they are somewhere else, the next guest's tapdisk sweeps them.
    let _ = shm::sweep_dead(statistics);
    for name in [format!("ctl{pid}"), format!("nbd{pid}.{minor}"), format!("nbd-old{pid}.{minor}")] {
        let _ = std::fs::remove_file(directory.join(name));
    }
}

/// `destroy`, whatever there is of a disk.
pub(super) fn destroy(directory: &Path, disk: Disk, limit: Limit) -> io::Result<Answer> {
    let Disk { pid, minor } = disk;
    let closed = step("close", || client::close(directory, pid, minor, false, limit.duration()));
    let detached = match (step("detach", || client::detach(directory, pid, minor)), &closed) {
        // What was not closed can't be detached.
        (Err(_), Err(_)) => return closed.map(|_| Answer::done(disk)),
        (detached, _) => detached?,
    };
    let given = give_back_late(directory, minor);
    if detached == Step::Nobody {
        // By now the process is no more.
        sweep(directory, &Statistics::default().directory, pid, minor);
    }
    match given {
        Err(error) if errno(&error) != Errno::ENOENT => Err(error),
        // What was written last may be lost, and nothing but this tells it.
        _ => closed.map(|_| Answer::done(disk)),
    }
}

/// How a step of the end went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// It is done, now or before.
    Done,
    /// There is no such process.
    Nobody,
}

/// Takes a step of the end. One that is done already, or whose process is gone, is no failure.
fn step(name: &str, mut ask: impl FnMut() -> io::Result<()>) -> io::Result<Step> {
    let asked = match ask() {
        // The process may have ended meanwhile; then another try finds nobody.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => ask(),
        other => other,
    };
    match asked {
        Err(error) if is_gone(&error) => Ok(Step::Nobody),
        Err(error) if errno(&error) == Errno::ENODEV => Ok(Step::Done),
        other => other.map(|()| Step::Done).map_err(|error| refused(errno(&error), format!("{name}: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_sockets_and_the_statistics_of_a_killed_process_are_removed() {
        let (directory, statistics) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        // There is no such process: its id is the largest number that one could have.
        let (gone, alive) = (i32::MAX, std::process::id());
        let make = |folder: &Path, path: &str| {
            let path = folder.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            path
        };
        let socket = make(directory.path(), &format!("ctl{gone}"));
        let dead = [format!("td3-{gone}/vbd-3-51712"), "vbd3-3-51712/statistics".to_owned()];
        let stays = [format!("td3-{alive}/vbd-4-51712"), "vbd3-4-51712/statistics".to_owned()];
        let dead = dead.map(|path| make(statistics.path(), &path));
        let stays = stays.map(|path| make(statistics.path(), &path));
        sweep(directory.path(), statistics.path(), gone, 0);
        assert!(!socket.exists());
        for path in dead {
            assert!(!path.parent().unwrap().exists(), "{}", path.display());
        }
        for path in stays {
            assert!(path.exists(), "{}", path.display());
        }
    }
}
