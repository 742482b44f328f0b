//! Which minors of a host are taken: an empty file `tapdisk-<minor>` each, in the folder `tapdisk` of the control directory, as
//! with blktap.
//!
//! Who makes or removes one holds the folder's lock (flock(2)); a tapdisk holds the file's as long as it has the minor.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// The greatest minor.
pub const MINOR_MAX: u16 = 16383;

/// What the file has in it if its tapdisk has taken the minor by itself: then the file goes with the process, and one whose process
/// was killed is taken over.
const BY_ITSELF: &[u8] = b"by itself\n";

/// The file of a minor.
pub fn path(directory: &Path, minor: u16) -> PathBuf {
    folder(directory).join(format!("tapdisk-{minor}"))
}

fn folder(directory: &Path) -> PathBuf {
    directory.join("tapdisk")
}

/// Minors that are taken, in their order: attached or not. Those of a tapdisk that took them by itself are not among them.
pub fn taken(directory: &Path) -> io::Result<Vec<u16>> {
    let entries = match std::fs::read_dir(folder(directory)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut minors = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("tapdisk-")?.parse::<u16>().ok());
        let empty = entry.metadata().is_ok_and(|meta| meta.is_file() && meta.len() == 0);
        minors.extend(number.filter(|_| empty));
    }
    minors.sort_unstable();
    Ok(minors)
}

/// Takes the lowest minor that is free, and gives it and its file. ENOSPC: there is none.
pub fn allocate(directory: &Path) -> io::Result<(u16, PathBuf)> {
    let _lock = lock_folder(directory)?;
    for minor in 0..=MINOR_MAX {
        match make(directory, minor) {
            Ok(_) => return Ok((minor, path(directory, minor))),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(Errno::ENOSPC.into())
}

/// Gives a minor back. ENOENT: nobody has taken it. EAGAIN: a tapdisk has it.
pub fn free(directory: &Path, minor: u16) -> io::Result<()> {
    // Nothing is made for what is not there.
    let _lock = wait_for(File::open(folder(directory))?)?;
    let held = Marker::hold(directory, minor)?;
    std::fs::remove_file(&held.path)
}

/// Holds a minor, and lets it go when it is dropped.
#[derive(Debug)]
pub struct Marker {
    file: Flock<File>,
    path: PathBuf,
    minor: u16,
    by_itself: bool,
}

impl Marker {
    /// Holds a minor that somebody has allocated. ENOENT: nobody has. EAGAIN: another tapdisk has it.
    pub fn hold(directory: &Path, minor: u16) -> io::Result<Marker> {
        let path = path(directory, minor);
        loop {
            if let Some(file) = lock(File::open(&path)?, &path)? {
                return Ok(Marker { file, path, minor, by_itself: false });
            }
        }
    }

    /// Takes this minor, or the lowest that is free, for as long as this lives. EAGAIN: another tapdisk has it.
    pub fn take(directory: &Path, minor: Option<u16>) -> io::Result<Marker> {
        let _lock = lock_folder(directory)?;
        while let Some(minor) = minor {
            if let Some(marker) = Marker::take_free(directory, minor)? {
                return Ok(marker);
            }
            match Marker::hold(directory, minor) {
                // It went with its tapdisk meanwhile, and is free.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                held => return held,
            }
        }
        for minor in 0..=MINOR_MAX {
            if let Some(marker) = Marker::take_free(directory, minor)? {
                return Ok(marker);
            }
        }
        Err(Errno::ENOSPC.into())
    }

    /// Takes it if it is free, or was that of a process that was killed.
    fn take_free(directory: &Path, minor: u16) -> io::Result<Option<Marker>> {
        let path = path(directory, minor);
        loop {
            let file = match make(directory, minor) {
                Ok(mut file) => {
                    file.write_all(BY_ITSELF)?;
                    file
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    let mut file = match File::open(&path) {
                        // It went with its tapdisk meanwhile, which waits for nobody.
                        Err(error) if error.kind() == ErrorKind::NotFound => continue,
                        file => file?,
                    };
                    let mut text = Vec::new();
                    (&mut file).take(BY_ITSELF.len() as u64 + 1).read_to_end(&mut text)?;
                    if text != BY_ITSELF {
                        return Ok(None);
                    }
                    file
                }
                Err(error) => return Err(error),
            };
            match lock(file, &path) {
                Ok(Some(file)) => return Ok(Some(Marker { file, path, minor, by_itself: true })),
                Ok(None) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// The minor.
    pub fn minor(&self) -> u16 {
        self.minor
    }
}

impl Drop for Marker {
    fn drop(&mut self) {
        // As long as we have its lock nobody else removes it. Nothing can be done where it is gone.
        if self.by_itself && self.file.metadata().is_ok_and(|meta| meta.nlink() > 0) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Makes the file of a minor. AlreadyExists: it is taken.
fn make(directory: &Path, minor: u16) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path(directory, minor))
}

/// Makes the folder, and waits for its lock.
fn lock_folder(directory: &Path) -> io::Result<Flock<File>> {
    let folder = folder(directory);
    DirBuilder::new().recursive(true).mode(0o755).create(&folder)?;
    wait_for(File::open(folder)?)
}

fn wait_for(folder: File) -> io::Result<Flock<File>> {
    Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

/// Locks the file of a minor. None: it was removed before that, and there may be another one by now. EAGAIN: somebody has it.
fn lock(file: File, path: &Path) -> io::Result<Option<Flock<File>>> {
    let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| io::Error::from(errno))?;
    let there = match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        there => there?,
    };
    let ours = file.metadata()?;
    Ok(((ours.dev(), ours.ino()) == (there.dev(), there.ino())).then_some(file))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::atomic::Ordering::SeqCst;

    use super::*;

    #[test]
    fn a_minor_is_taken_once_and_what_a_tapdisk_has_is_not_given_back() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        assert_eq!(free(directory, 0).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        assert_eq!(allocate(directory).unwrap(), (0, directory.join("tapdisk/tapdisk-0")));
        assert_eq!(allocate(directory).unwrap().0, 1);
        let marker = Marker::hold(directory, 0).unwrap();
        assert_eq!(Marker::hold(directory, 0).unwrap_err().raw_os_error(), Some(libc::EAGAIN));
        assert_eq!(free(directory, 0).unwrap_err().raw_os_error(), Some(libc::EAGAIN));
        drop(marker);
        free(directory, 0).unwrap();
        assert_eq!(Marker::hold(directory, 0).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        assert_eq!(allocate(directory).unwrap().0, 0, "it is free again");
    }

    #[test]
    fn what_a_tapdisk_took_by_itself_goes_with_it_or_is_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let first = Marker::take(directory, None).unwrap();
        let second = Marker::take(directory, None).unwrap();
        assert_eq!((first.minor(), second.minor(), allocate(directory).unwrap().0), (0, 1, 2));
        assert_eq!(Marker::take(directory, Some(1)).unwrap_err().raw_os_error(), Some(libc::EAGAIN));
        drop(first);
        assert!(!path(directory, 0).exists());
        // As a killed process leaves it.
        std::fs::write(path(directory, 0), BY_ITSELF).unwrap();
        assert_eq!(Marker::take(directory, None).unwrap().minor(), 0);
        // One that was allocated is held, and stays.
        drop(Marker::take(directory, Some(2)).unwrap());
        assert!(path(directory, 2).exists());
    }

    /// What many do with the same few minors at once; whoever holds one is alone, and the file is there that says so.
    struct Race<'a> {
        directory: &'a Path,
        held: [AtomicBool; MINORS],
    }

    /// A few to fight for, and one for each thread.
    const MINORS: usize = 8;

    impl Race<'_> {
        fn holds(&self, marker: Marker) {
            let minor = usize::from(marker.minor);
            assert!(!self.held[minor].swap(true, SeqCst), "minor {minor} is held twice");
            let there = std::fs::metadata(&marker.path).map(|there| there.ino()).map_err(|error| error.kind());
            assert_eq!(there, Ok(marker.file.metadata().unwrap().ino()), "minor {minor}: who holds it has its file");
            self.held[minor].store(false, SeqCst);
        }

        fn go(&self, turn: usize) {
            let errno = |error: io::Error| crate::sys::errno_of(&error);
            let minor = (turn / 4 % 2) as u16;
            match turn % 4 {
                0 => match allocate(self.directory).unwrap().0 {
                    0 | 1 => {}
                    more => free(self.directory, more).unwrap(),
                },
                1 => match Marker::hold(self.directory, minor).map_err(errno) {
                    Ok(marker) => self.holds(marker),
                    Err(errno) => assert!(matches!(errno, Errno::ENOENT | Errno::EAGAIN), "{errno}"),
                },
                2 => match free(self.directory, minor).map_err(errno) {
                    Ok(()) | Err(Errno::ENOENT | Errno::EAGAIN) => {}
                    Err(errno) => panic!("{errno}"),
                },
                _ if turn % 8 == 3 => self.holds(Marker::take(self.directory, None).unwrap()),
                _ => match Marker::take(self.directory, Some(minor)).map_err(errno) {
                    Ok(marker) => self.holds(marker),
                    Err(errno) => assert_eq!(errno, Errno::EAGAIN),
                },
            }
        }
    }

    #[test]
    fn many_who_race_for_minors_never_hold_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let race = Race { directory: directory.path(), held: [const { AtomicBool::new(false) }; MINORS] };
        std::thread::scope(|scope| {
            for seed in 0..6 {
                let race = &race;
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(seed);
                    (0..10_000).for_each(|_| race.go(random.usize(..)));
                });
            }
        });
    }

    #[test]
    fn nothing_is_made_for_what_is_given_back() {
        let directory = tempfile::tempdir().unwrap();
        let nowhere = directory.path().join("nowhere");
        assert_eq!(free(&nowhere, 0).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        assert!(!nowhere.exists());
    }
}
