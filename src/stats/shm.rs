//! The statistics of a Xen guest's disk in shared memory, where xentop and the toolstacks' monitoring read them.
//!
//! As long as a guest is connected there are two files, each a page, with the names and layouts that blktap gives them:
//! `td3-<pid>/vbd-<domain>-<device>`, which xentop reads, and `vbd3-<domain>-<device>/statistics`. They are written with
//! atomic stores, so that a reader sees each number whole. What a process that was killed has left goes when the next guest of
//! any tapdisk connects, or when tap-ctl destroys its disk.
//!
//! Folders are ours alone, and files are made anew: nothing that somebody else left there is followed or written. Everybody may make names in
//! /dev/shm, also those that are ours: what others have made is put out of the way, as far as we may.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2, posix_fallocate, renameat};
use nix::sys::signal::kill;
use nix::sys::stat::{Mode, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{Pid, UnlinkatFlags, geteuid, unlinkat};
use slog::{Logger, warn};
use zerocopy::{Immutable, IntoBytes};

use super::now;
use crate::request::{Op, Request};
use crate::sys;
use crate::sys::memory::{Memory, PAGE_SIZE};

/// Of one direction in `td3-<pid>/vbd-<domain>-<device>`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Td3Direction {
    submitted: u64,
    completed: u64,
    /// Of 512 bytes.
    sectors: u64,
    /// Sum of latencies, µs.
    ticks: u64,
}

/// `td3-<pid>/vbd-<domain>-<device>`: `vbd3_stats` of Xen's libxenstat.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Td3 {
    version: u32,
    pad: u32,
    /// Times that a request had to wait because there was no memory for it.
    oo: u64,
    read: Td3Direction,
    write: Td3Direction,
    io_errors: u64,
    flags: u64,
}

/// Of one direction in `vbd3-<domain>-<device>/statistics`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Vbd3Direction {
    submitted: u64,
    completed: u64,
    /// Of 512 bytes.
    sectors: u64,
    sum_us: u64,
    max_us: u64,
}

/// `vbd3-<domain>-<device>/statistics`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Vbd3 {
    /// Discards.
    ds: u64,
    /// Flushes.
    f: u64,
    /// As in [`Td3`].
    oo: u64,
    read: Vbd3Direction,
    write: Vbd3Direction,
    flags: u64,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<Td3>() == 96 && offset_of!(Td3, oo) == 8 && offset_of!(Td3, read) == 16);
    assert!(offset_of!(Td3, write) == 48 && offset_of!(Td3, io_errors) == 80 && offset_of!(Td3, flags) == 88);
    assert!(size_of::<Td3Direction>() == 32 && offset_of!(Td3Direction, completed) == 8);
    assert!(offset_of!(Td3Direction, sectors) == 16 && offset_of!(Td3Direction, ticks) == 24);
    assert!(size_of::<Vbd3>() == 14 * 8 && offset_of!(Vbd3, f) == 8 && offset_of!(Vbd3, oo) == 16);
    assert!(offset_of!(Vbd3, read) == 24 && offset_of!(Vbd3, write) == 64 && offset_of!(Vbd3, flags) == 104);
    assert!(offset_of!(Vbd3Direction, completed) == 8 && offset_of!(Vbd3Direction, sectors) == 16);
    assert!(offset_of!(Vbd3Direction, sum_us) == 24 && offset_of!(Vbd3Direction, max_us) == 32);
};

/// Reads or writes of a guest.
#[derive(Clone, Copy, Debug, Default)]
struct Direction {
    submitted: u64,
    completed: u64,
    sectors: u64,
    sum_ns: u64,
    max_ns: u64,
    /// Answered since the files were written: how many, the sum of the times at which they were pulled, and the first of these.
    /// So all of them take one look at the clock.
    answered: u64,
    born_sum: u128,
    born_first: u64,
}

impl Direction {
    fn answered(&mut self, request: &Request) {
        self.completed += 1;
        if request.error.is_none() {
            self.sectors += request.len / drivers::SECTOR_SIZE;
        }
        self.born_first = if self.answered == 0 { request.born } else { self.born_first.min(request.born) };
        self.answered += 1;
        self.born_sum += u128::from(request.born);
    }

    /// What was answered became visible at `now`.
    fn settle(&mut self, now: u64) {
        if self.answered > 0 {
            self.sum_ns += (u128::from(now) * u128::from(self.answered)).saturating_sub(self.born_sum) as u64;
            self.max_ns = self.max_ns.max(now.saturating_sub(self.born_first));
            (self.answered, self.born_sum) = (0, 0);
        }
    }

    fn td3(&self) -> Td3Direction {
        let Direction { submitted, completed, sectors, sum_ns, .. } = *self;
        Td3Direction { submitted, completed, sectors, ticks: sum_ns / 1000 }
    }

    fn vbd3(&self) -> Vbd3Direction {
        let Direction { submitted, completed, sectors, sum_ns, max_ns, .. } = *self;
        Vbd3Direction { submitted, completed, sectors, sum_us: sum_ns / 1000, max_us: max_ns / 1000 }
    }
}

/// What is counted of one guest.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    read: Direction,
    write: Direction,
    flushes: u64,
    discards: u64,
    out_of_memory: u64,
    errors: u64,
}

/// Where the files go, and for which disk.
#[derive(Clone, Debug)]
pub struct Place {
    /// The folder that has the folders: /dev/shm.
    pub directory: PathBuf,
    /// The device's number in the guest, as in XenStore.
    pub device: u32,
}

/// The statistics of the guest that is connected.
#[derive(Default)]
pub struct GuestStatistics {
    place: Option<Place>,
    files: Option<Files>,
    counts: Counts,
    changed: bool,
}

impl GuestStatistics {
    /// From the next guest on, there are files in that place; without one there are none.
    pub fn set_place(&mut self, place: Place) {
        self.place = Some(place);
    }

    /// A guest is connected. That there can be no files is a warning.
    pub fn connect(&mut self, domain: u16, log: &Logger) {
        self.disconnect();
        let Some(place) = &self.place else { return };
        match Files::create(&place.directory, domain, place.device) {
            Ok(files) => self.files = Some(files),
            Err(error) => {
                warn!(log, "no statistics in shared memory: xentop does not see what this disk does"; "error" => %error,
                    "remedy" => "statistics.directory says where they go");
            }
        }
        self.changed = true;
        self.publish();
    }

    /// The guest has gone, and its files go.
    pub fn disconnect(&mut self) {
        (self.files, self.counts, self.changed) = (None, Counts::default(), false);
    }

    /// A request goes to the disk.
    pub fn submitted(&mut self, op: Op, len: u64) {
        match op {
            Op::Read => self.counts.read.submitted += 1,
            Op::Barrier if len == 0 => self.counts.flushes += 1,
            Op::Write { .. } | Op::Barrier | Op::WriteZeroes { .. } => self.counts.write.submitted += 1,
            Op::Flush => self.counts.flushes += 1,
            Op::Discard => self.counts.discards += 1,
            Op::Status => {}
        }
        self.changed = true;
    }

    /// The disk has answered a request.
    pub fn answered(&mut self, request: &Request) {
        match request.op {
            Op::Read => self.counts.read.answered(request),
            Op::Barrier if request.len == 0 => {}
            Op::Write { .. } | Op::Barrier | Op::WriteZeroes { .. } => self.counts.write.answered(request),
            Op::Flush | Op::Discard | Op::Status => {}
        }
        self.changed = true;
    }

    /// A request got an error.
    pub fn failed(&mut self) {
        self.counts.errors += 1;
        self.changed = true;
    }

    /// A request waits for memory.
    pub fn out_of_memory(&mut self) {
        self.counts.out_of_memory += 1;
        self.changed = true;
    }

    /// Writes the files, if something has changed. Makes no system call.
    pub fn publish(&mut self) {
        if !std::mem::take(&mut self.changed) {
            return;
        }
        let Some(files) = &self.files else { return };
        let counts = &mut self.counts;
        if counts.read.answered + counts.write.answered > 0 {
            let now = now();
            counts.read.settle(now);
            counts.write.settle(now);
        }
        files.td3.write(&Td3 {
            version: 1,
            pad: 0,
            oo: counts.out_of_memory,
            read: counts.read.td3(),
            write: counts.write.td3(),
            io_errors: counts.errors,
            flags: 0,
        });
        files.vbd3.write(&Vbd3 {
            ds: counts.discards,
            f: counts.flushes,
            oo: counts.out_of_memory,
            read: counts.read.vbd3(),
            write: counts.write.vbd3(),
            flags: 0,
        });
    }
}

/// Both files of a guest.
struct Files {
    td3: Page,
    vbd3: Page,
}

impl Files {
    fn create(directory: &Path, domain: u16, device: u32) -> io::Result<Files> {
        /// What a process that had our id has left goes before our first file is made.
        static FIRST: AtomicBool = AtomicBool::new(true);
        let at = |path: &Path, errno: Errno| {
            io::Error::new(io::Error::from(errno).kind(), format!("{}: {errno}", path.display()))
        };
        let root = open_root(directory).map_err(|errno| at(directory, errno))?;
        let own = process_folder(std::process::id());
        // What cannot be swept stays, and harms nobody but who reads it.
        let _ = sweep(root.as_fd(), FIRST.swap(false, Ordering::Relaxed).then_some(own.as_str()));
        let page = |folder: &str, name: &str| {
            Page::create(root.as_fd(), folder, name).map_err(|errno| at(&directory.join(folder).join(name), errno))
        };
        let td3 = page(&own, &format!("vbd-{domain}-{device}"))?;
        Ok(Files { td3, vbd3: page(&format!("vbd3-{domain}-{device}"), STATISTICS)? })
    }
}

/// The file in `vbd3-<domain>-<device>`.
const STATISTICS: &str = "statistics";

fn process_folder(pid: u32) -> String {
    format!("td3-{pid}")
}

/// A page of a file that is ours, and goes with this; with it its folder, if that is empty then.
struct Page {
    root: OwnedFd,
    folder: OwnedFd,
    /// The folder's name and the file's.
    names: (String, String),
    memory: Memory,
}

impl Page {
    fn create(root: BorrowedFd, folder_name: &str, name: &str) -> nix::Result<Page> {
        let folder = own_folder(root, folder_name)?;
        match unlinkat(&folder, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(Errno::EISDIR) => put_away(folder.as_fd(), name)?,
            Err(errno) => return Err(errno),
        }
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(&folder, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let of = |error: io::Error| sys::errno_of(&error);
        // A page that the file system has no room for would be a signal when it is written.
        let memory = posix_fallocate(&file, 0, PAGE_SIZE as i64)
            .and_then(|()| Memory::shared(&file, PAGE_SIZE).map_err(of))
            .inspect_err(|_| remove(root, &folder, folder_name, name))?;
        let root = root.try_clone_to_owned().map_err(of)?;
        Ok(Page { root, folder, names: (folder_name.to_owned(), name.to_owned()), memory })
    }

    /// Writes `statistics`, each of its words whole.
    fn write(&self, statistics: &(impl IntoBytes + Immutable)) {
        for (word, bytes) in statistics.as_bytes().chunks_exact(8).enumerate() {
            let value = u64::from_ne_bytes(bytes.try_into().expect("it has 8 bytes"));
            self.memory.atomic_u64(word * 8).store(value, Ordering::Relaxed);
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        remove(self.root.as_fd(), &self.folder, &self.names.0, &self.names.1);
    }
}

/// Removes a file, and its folder if that is empty then. What stays is swept later.
fn remove(root: BorrowedFd, folder: impl AsFd, folder_name: &str, name: &str) {
    let _ = unlinkat(folder, name, UnlinkatFlags::NoRemoveDir);
    let _ = unlinkat(root, folder_name, UnlinkatFlags::RemoveDir);
}

/// Opens a folder that only our user can write, and makes it if need be.
fn own_folder(root: BorrowedFd, name: &str) -> nix::Result<OwnedFd> {
    // What is there, and is none of ours, is removed a few times; who puts it there again and again wins.
    for _ in 0..8 {
        match mkdirat(root, name, Mode::S_IRWXU) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
        match open_own(root, name) {
            Err(Errno::ENOTDIR | Errno::ELOOP) => unlinkat(root, name, UnlinkatFlags::NoRemoveDir)?,
            Err(Errno::EPERM) => put_away(root, name)?,
            other => return other,
        }
    }
    Err(Errno::EEXIST)
}

/// Gives another one's folder another name, and removes it if it is empty: what is in it is not ours to remove.
fn put_away(root: BorrowedFd, name: &str) -> nix::Result<()> {
    let away = format!("{name}.of-another-{}", now());
    renameat(root, name, root, away.as_str())?;
    let _ = unlinkat(root, away.as_str(), UnlinkatFlags::RemoveDir);
    Ok(())
}

/// Opens a folder of our user's. EPERM: it is another's.
fn open_own(root: BorrowedFd, name: &str) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    // Nor what somebody has mounted there, which may hang.
    let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV);
    let folder = match openat2(root, name, how) {
        // Before Linux 5.6, or by a seccomp filter.
        Err(Errno::ENOSYS | Errno::EPERM) => openat(root, name, flags, Mode::empty())?,
        opened => opened?,
    };
    if fstat(&folder)?.st_uid != geteuid().as_raw() {
        return Err(Errno::EPERM);
    }
    fchmod(&folder, Mode::S_IRWXU)?;
    Ok(folder)
}

/// Removes from the folder with all folders what processes that are no more have left.
pub fn sweep_dead(directory: &Path) -> io::Result<()> {
    Ok(sweep(open_root(directory)?.as_fd(), None)?)
}

fn open_root(directory: &Path) -> nix::Result<OwnedFd> {
    open(directory, OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
}

/// Removes what processes that are no more have left, and what is in `stale`.
fn sweep(root: BorrowedFd, stale: Option<&str>) -> nix::Result<()> {
    let (mut dead, mut alive) = (Vec::new(), Vec::new());
    for name in names(root)? {
        let pid = name.strip_prefix("td3-").and_then(|pid| pid.parse::<u32>().ok()).filter(|pid| *pid > 0);
        let Some(pid) = pid.and_then(|pid| i32::try_from(pid).ok()) else { continue };
        let gone = stale == Some(&name) || kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH);
        if gone { dead.push(name) } else { alive.push(name) }
    }
    for folder_name in dead {
        let Ok(folder) = open_own(root, &folder_name) else { continue };
        for name in names(folder.as_fd())?.iter().filter(|name| name.starts_with("vbd-")) {
            let _ = unlinkat(&folder, name.as_str(), UnlinkatFlags::NoRemoveDir);
            // The other file of the same disk goes too, unless another process has taken the disk on.
            let taken_on = |other: &String| {
                let folder = open_own(root, other);
                folder.is_ok_and(|folder| fstatat(&folder, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW).is_ok())
            };
            let other_name = name.replacen("vbd-", "vbd3-", 1);
            if !alive.iter().any(taken_on)
                && let Ok(other) = open_own(root, &other_name)
            {
                remove(root, other, &other_name, STATISTICS);
            }
        }
        let _ = unlinkat(root, folder_name.as_str(), UnlinkatFlags::RemoveDir);
    }
    Ok(())
}

/// Names of a folder that are looked at. Others may make as many as they like, and the main loop is not to be held up by them.
const NAMES_MAX: usize = 1 << 16;

/// What is in a folder.
fn names(folder: BorrowedFd) -> nix::Result<Vec<String>> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let entries = Dir::openat(folder, ".", flags, Mode::empty())?;
    let names = entries
        .into_iter()
        .take(NAMES_MAX)
        .filter_map(|entry| Some(entry.ok()?.file_name().to_str().ok()?.to_owned()));
    Ok(names.collect())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, lchown, symlink};

    use slog::{Discard, o};

    use super::*;
    use crate::request::Slots;

    fn log() -> Logger {
        Logger::root(Discard, o!())
    }

    fn words(path: &Path) -> Vec<u64> {
        let bytes = fs::read(path).unwrap();
        assert_eq!(bytes.len(), PAGE_SIZE);
        bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect()
    }

    fn connected(root: &Path) -> GuestStatistics {
        let mut statistics = GuestStatistics::default();
        statistics.set_place(Place { directory: root.to_owned(), device: 51712 });
        statistics.connect(7, &log());
        statistics
    }

    fn paths(root: &Path) -> (PathBuf, PathBuf) {
        (root.join(format!("td3-{}/vbd-7-51712", std::process::id())), root.join("vbd3-7-51712/statistics"))
    }

    /// Has a request done, and answered if `us` is given, so long after it was pulled.
    fn request(statistics: &mut GuestStatistics, op: Op, len: u64, us: Option<u64>) {
        let mut slots = Slots::new(1, 1, 0);
        let request = slots.vacant().unwrap();
        (request.op, request.len) = (op, len);
        statistics.submitted(op, len);
        if let Some(us) = us {
            request.born = now().saturating_sub(us * 1000);
            statistics.answered(request);
        }
    }

    #[test]
    fn each_number_is_where_its_readers_look() {
        let root = tempfile::tempdir().unwrap();
        // Requests are as old as they say only if the clock has run so long.
        while now() < 20_000_000 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let mut statistics = connected(root.path());
        let (td3, vbd3) = paths(root.path());
        assert_eq!(words(&td3)[..12], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        request(&mut statistics, Op::Read, 4096, Some(10_000));
        request(&mut statistics, Op::Read, 4096, None);
        request(&mut statistics, Op::Write { fua: false }, 512, Some(0));
        request(&mut statistics, Op::Write { fua: false }, 512, None);
        request(&mut statistics, Op::Barrier, 1024, None);
        request(&mut statistics, Op::Barrier, 0, Some(0));
        request(&mut statistics, Op::Flush, 0, Some(0));
        request(&mut statistics, Op::Discard, 1 << 20, Some(0));
        statistics.failed();
        statistics.out_of_memory();
        statistics.publish();
        let (td3, vbd3) = (words(&td3), words(&vbd3));
        // u32s in native order: version 1, pad 0.
        assert_eq!(td3[..5], [u64::from(u32::from_ne_bytes(1_u32.to_ne_bytes())), 1, 2, 1, 8]);
        assert_eq!(td3[6..9], [3, 1, 1]);
        assert_eq!(td3[10..13], [1, 0, 0]);
        assert_eq!(vbd3[..6], [1, 2, 1, 2, 1, 8]);
        assert_eq!(vbd3[8..11], [3, 1, 1]);
        assert_eq!(vbd3[13..15], [0, 0]);
        assert!(td3[5] >= 10_000 && td3[5] == vbd3[6] && vbd3[6] == vbd3[7], "{td3:?} {vbd3:?}");
    }

    #[test]
    fn files_are_ours_alone_and_go_with_the_guest() {
        let root = tempfile::tempdir().unwrap();
        let mut statistics = connected(root.path());
        let (td3, vbd3) = paths(root.path());
        for path in [&td3, &vbd3] {
            assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o600);
            assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
        }
        statistics.disconnect();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        statistics.connect(7, &log());
        assert!(td3.exists());
        drop(statistics);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn no_link_leads_out_of_the_folder() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let precious = elsewhere.path().join("vbd-7-51712");
        fs::write(&precious, "precious").unwrap();
        let (td3, vbd3) = paths(root.path());
        symlink(elsewhere.path(), td3.parent().unwrap()).unwrap();
        fs::create_dir(vbd3.parent().unwrap()).unwrap();
        symlink(&precious, &vbd3).unwrap();
        // Of a process that is gone: its id is beyond the largest that there can be.
        symlink(elsewhere.path(), root.path().join("td3-2147483647")).unwrap();
        let mut statistics = connected(root.path());
        request(&mut statistics, Op::Read, 512, None);
        statistics.publish();
        assert_eq!((words(&td3)[2], words(&vbd3)[3]), (1, 1));
        drop(statistics);
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
        assert!(!td3.exists() && !vbd3.exists());
    }

    #[test]
    fn what_others_have_made_in_the_place_of_ours_is_put_away_and_stops_nothing() {
        const OTHER: u32 = 65534;
        let root = tempfile::tempdir().unwrap();
        let (td3, vbd3) = paths(root.path());
        let precious = root.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        let folder = |path: &Path| fs::create_dir(path).unwrap();
        let full = |path: &Path| {
            fs::create_dir(path).unwrap();
            fs::write(path.join("vbd-7-51712"), "theirs").unwrap();
        };
        let file = |path: &Path| fs::write(path, "theirs").unwrap();
        let fifo = |path: &Path| nix::unistd::mkfifo(path, Mode::S_IRWXU).unwrap();
        let hard = |path: &Path| fs::hard_link(&precious, path).unwrap();
        let dangling = |path: &Path| symlink("nowhere", path).unwrap();
        let kinds: [&dyn Fn(&Path); 6] = [&folder, &full, &file, &fifo, &hard, &dangling];
        for make in kinds {
            for path in [&td3, &vbd3] {
                make(path.parent().unwrap());
                if !geteuid().is_root() {
                    continue;
                }
                lchown(path.parent().unwrap(), Some(OTHER), None).unwrap();
            }
            let mut statistics = connected(root.path());
            request(&mut statistics, Op::Read, 512, None);
            statistics.publish();
            assert_eq!((words(&td3)[2], words(&vbd3)[3]), (1, 1));
            for path in [&td3, &vbd3] {
                assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().uid(), geteuid().as_raw());
            }
        }
        // In a folder of ours that once was open to others.
        for path in [&td3, &vbd3] {
            full(path.parent().unwrap());
            let _ = fs::remove_file(path);
            full(path);
        }
        let mut statistics = connected(root.path());
        request(&mut statistics, Op::Read, 512, None);
        statistics.publish();
        assert_eq!((words(&td3)[2], words(&vbd3)[3]), (1, 1));
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
    }

    #[test]
    fn no_link_of_others_says_that_a_dead_processs_disk_is_in_use() {
        let root = tempfile::tempdir().unwrap();
        for path in ["td3-2147483647/vbd-3-51712", "vbd3-3-51712/statistics", "elsewhere/vbd-3-51712"] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "old").unwrap();
        }
        symlink("elsewhere", root.path().join("td3-1")).unwrap();
        sweep_dead(root.path()).unwrap();
        assert!(!root.path().join("vbd3-3-51712").exists() && root.path().join("elsewhere/vbd-3-51712").exists());
    }

    #[test]
    fn what_a_killed_process_left_is_swept_and_what_others_have_taken_on_is_not() {
        let root = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "old").unwrap();
        };
        let left = ["td3-2147483647/vbd-3-51712", "td3-2147483647/vbd-4-51712", "vbd3-3-51712/statistics"];
        let stays = ["td3-1/vbd-4-51712", "vbd3-4-51712/statistics", "vbd3-5-51712/statistics", "td3-x/vbd-1-1"];
        left.iter().chain(&stays).for_each(|path| make(path));
        // Our own disk's is taken over.
        make("vbd3-7-51712/statistics");
        let _statistics = connected(root.path());
        for path in left {
            assert!(!root.path().join(path).exists(), "{path}");
        }
        assert!(!root.path().join("td3-2147483647").exists() && !root.path().join("vbd3-3-51712").exists());
        for path in stays {
            assert_eq!(fs::read(root.path().join(path)).unwrap(), b"old", "{path}");
        }
        assert_eq!(words(&paths(root.path()).1)[..14], [0; 14]);
    }

    #[test]
    fn a_folder_that_cannot_be_had_is_no_end() {
        let mut statistics = GuestStatistics::default();
        statistics.set_place(Place { directory: "/proc".into(), device: 51712 });
        statistics.connect(7, &log());
        request(&mut statistics, Op::Read, 512, Some(0));
        statistics.publish();
        assert!(statistics.files.is_none());
    }
}
