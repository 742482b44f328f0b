//! The minor of another process whose image is to be the parent: `tap-ctl open -e`.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::marker;
use crate::control::client;
use crate::control::proto::state;
use crate::image::{Error, Image};
use crate::store;
use crate::sys::file::{lock_holder, lock_holders, same_file};

/// Whether the image right below is one that the process of that minor has open, whatever its name is by now. It waits for that process.
pub(super) fn check(image: &Image, directory: &Path, minor: u16) -> Result<(), Error> {
    let path = || PathBuf::from(&image.info.name);
    let unfit = |text: String| Error::from(store::Error::Unfit { path: path(), message: text });
    let (pid, name, state) = image_of(directory, minor).map_err(|source| Error::NoMinor {
        path: path(),
        minor,
        source: io::Error::from(client::errno(&source)),
    })?;
    if state == state::PAUSED {
        return Err(unfit(format!("its parent is to be the image of minor {minor}, and that is paused")));
    }
    match image.parent().and_then(|store| store.file()) {
        Some(below) if has_open(pid, below) => Ok(()),
        _ => Err(unfit(format!("its parent is not the image of minor {minor}, which is {name}"))),
    }
}

fn has_open(pid: i32, wanted: &File) -> bool {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let mut opened = descriptors.filter_map(|descriptor| descriptor.path().metadata().ok());
    // What one has open that has a capability more than this process, nobody shows (ptrace(2)). Its lock is everybody's to see.
    opened.any(|opened| same_file(&opened, wanted)) || lock_holders(wanted).contains(&pid)
}

/// The process of a minor, and the name and the state of its image. ENODEV: no tapdisk of this host has it, or there is no image.
fn image_of(directory: &Path, minor: u16) -> io::Result<(i32, String, i32)> {
    let none = || io::Error::from(Errno::ENODEV);
    let marker = File::open(marker::path(directory, minor)).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => none(),
        _ => error,
    })?;
    let pid = lock_holder(&marker).filter(|pid| *pid > 0).ok_or_else(none)?;
    let (name, state) = client::image_of(directory, pid, minor)?.ok_or_else(none)?;
    Ok((pid, name, state))
}
