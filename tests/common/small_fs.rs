//! A small ext4 file system on a loop device, for what only a full or frozen file system shows.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::PATIENCE;
use super::needs::skipped;
use super::served::{folder, run};

/// A loop device over a file, gone when this is dropped. None where the machine does not let us have one.
pub struct Loop(pub String);

impl Loop {
    #[track_caller]
    pub fn new(file: &Path, sector: u32) -> Option<Loop> {
        let mut command = Command::new("losetup");
        let output = command.args(["--find", "--show", "--sector-size"]).arg(sector.to_string()).arg(file).output();
        let output = output.expect("losetup is installed");
        let name = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        if !output.status.success() {
            skipped(&format!("no loop device: {}", String::from_utf8_lossy(&output.stderr)));
        }
        output.status.success().then_some(Loop(name))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // Nothing can be done if the device is still in use.
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// A mounted file system.
pub struct SmallFs {
    mount: PathBuf,
    device: Loop,
    _folder: TempDir,
}

impl SmallFs {
    /// Of that size, such as "8m". None where the machine has no loop devices for us.
    #[track_caller]
    pub fn new(size: &str) -> Option<SmallFs> {
        let folder = folder();
        let file = folder.path().join("fs.ext4");
        run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-O", "^has_journal"]).arg(&file).arg(size));
        let device = Loop::new(&file, 512)?;
        let mount = folder.path().join("mnt");
        std::fs::create_dir(&mount).unwrap();
        run(Command::new("mount").arg(&device.0).arg(&mount));
        Some(SmallFs { mount, device, _folder: folder })
    }

    /// The device that it is on.
    pub fn device(&self) -> &Path {
        Path::new(&self.device.0)
    }

    /// A file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.mount.join(name)
    }

    /// Fills it with a file of that name, until nothing is left when all is on the disk: what was reserved for metadata, and is not needed, is
    /// free again then.
    pub fn fill(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        let mut file = File::options().create(true).append(true).open(&path).unwrap();
        let mut full = 0;
        while full < 2 {
            match file.write_all(&[0; 1 << 16]).or_else(|_| file.write_all(&[0; 512])) {
                Ok(()) => full = 0,
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
                    full += 1;
                    nix::unistd::syncfs(&file).unwrap();
                }
            }
        }
        path
    }

    /// Unmounts it, which nothing may be in the way of, and mounts it again.
    pub fn remount(&self) {
        run(Command::new("umount").arg(&self.mount));
        run(Command::new("mount").arg(&self.device.0).arg(&self.mount));
    }

    /// Holds every write up, as a hung array does, until what this gives is dropped.
    pub fn freeze(&self) -> Frozen<'_> {
        run(Command::new("fsfreeze").arg("--freeze").arg(&self.mount));
        Frozen(self)
    }
}

/// A file system that is frozen. A test that fails must not leave it so: processes that write could not be killed.
#[must_use]
pub struct Frozen<'a>(&'a SmallFs);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        run(Command::new("fsfreeze").arg("--unfreeze").arg(&self.0.mount));
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        // A killed process's io_uring keeps its files for a moment.
        let umount = || Command::new("umount").arg(&self.mount).output().is_ok_and(|output| output.status.success());
        let end = Instant::now() + PATIENCE;
        while !umount() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
