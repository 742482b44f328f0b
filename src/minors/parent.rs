//! The minor of another process whose image is to be the parent: `tap-ctl open -e`.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::marker;
use crate::control::client;
use crate::control::proto::state;
use crate::disk::parse_name;
use crate::image::{Error, Image};
use crate::sys::file::{lock_holder, open_storage, same_file};

/// Whether the image right below is the one that a minor of another process has open. It waits for that process.
pub(super) fn check(image: &Image, directory: &Path, minor: u16) -> Result<(), Error> {
    let path = || PathBuf::from(&image.info.name);
    let unfit = |text: String| Error::Unfit { path: path(), message: text };
    let (kind_and_path, state) = image_of(directory, minor).map_err(|source| Error::Io {
        path: path(),
        action: "find the minor that is to have its parent open",
        source: io::Error::from(client::errno(&source)),
    })?;
    if state == state::PAUSED {
        return Err(unfit(format!("minor {minor}, which is to have its parent open, is paused")));
    }
    let of_minor = parse_name(&kind_and_path).ok().and_then(|(_, path)| Some(open_storage(&path).ok()?.0));
    match (image.locks.get(1), of_minor) {
        (Some(below), Some(of_minor)) if same_file(below, &of_minor) => Ok(()),
        _ => Err(unfit(format!("its parent is not the image of minor {minor}, which is {kind_and_path}"))),
    }
}

/// The name and the state of a minor's image. ENODEV: no tapdisk of this host has it, or there is no image.
fn image_of(directory: &Path, minor: u16) -> io::Result<(String, i32)> {
    let none = || io::Error::from(Errno::ENODEV);
    let marker = File::open(marker::path(directory, minor)).map_err(|_| none())?;
    let pid = lock_holder(&marker).filter(|pid| *pid > 0).ok_or_else(none)?;
    client::image_of(directory, pid, minor)?.ok_or_else(none)
}
