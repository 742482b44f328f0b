//! `resize`: lets the image's file grow, and tells its tapdisk.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use serde_json::json;
use tapdisk::control::client::{self, Opening, refused};
use tapdisk::control::proto::kind;
use tapdisk::disk::DebugQueue;
use tapdisk::sys;

use super::{Answer, Disk};
use crate::{cbt_util, vhd_util};

/// With a size in bytes, the file grows to it first.
pub(super) fn resize(directory: &Path, disk: Disk, size: Option<u64>) -> io::Result<Answer> {
    let Disk { pid, minor } = disk;
    let grown = |old, new| {
        Ok(Answer::new(format!("old_size={old} new_size={new}"), json!({ "old_size": old, "new_size": new })))
    };
    if let Some(size) = size {
        // LIST would do, but cuts long paths off.
        let disk: DebugQueue = serde_json::from_str(&client::text_of(directory, pid, minor, kind::DEBUG_QUEUE)?)?;
        if !size.is_multiple_of(disk.sector_size.into()) {
            let text = format!("{size} bytes are no whole sectors: the disk's are of {} bytes", disk.sector_size);
            return Err(refused(Errno::EINVAL, text));
        }
        let log = disk.changed_blocks.as_deref().map(|log| absolute(pid, log)).transpose()?;
        if let Some(log) = &log {
            let whole = if disk.name.starts_with("vhd:") { WHOLE_BLOCKS } else { 1 };
            check_log(Path::new(log), size.next_multiple_of(whole))?;
        }
        match disk.name.split_once(':') {
            Some(("aio", path)) => grow(pid, Path::new(path), size)?,
            Some(("vhd", path)) => {
                return grown(disk.size, grow_vhd(directory, (pid, minor), Path::new(path), log.as_deref(), size)?);
            }
            _ => return Err(refused(Errno::EOPNOTSUPP, format!("{}: it has no file that could grow", disk.name))),
        }
    }
    let (old, new) = client::resize(directory, pid, minor)?;
    grown(old, new)
}

/// What a VHD image's size is rounded up to.
const WHOLE_BLOCKS: u64 = 2 << 20;

/// A path of a tapdisk's, which may count from the folder where that is.
fn absolute(pid: i32, path: &Path) -> io::Result<String> {
    let folder = || fs::read_link(Path::new("/proc").join(pid.to_string()).join("cwd"));
    let path = if path.is_absolute() { path.to_owned() } else { folder()?.join(path) };
    path.into_os_string().into_string().map_err(|_| Errno::EINVAL.into())
}

/// Whether a log has bits for a disk of so many bytes: without them the disk would not go on. Storage managers give it some first.
fn check_log(log: &Path, size: u64) -> io::Result<()> {
    let now = cbt_util::disk_size(log).map_err(|(errno, text)| refused(errno, text))?;
    if now < size {
        let log = log.display();
        let text = format!(
            "its log of changed blocks, {log}, is for a disk of {now} bytes: first tap-ctl pause, cbt-util set -n {log} -s {size}, and \
             tap-ctl unpause -c {log}"
        );
        return Err(refused(Errno::EINVAL, text));
    }
    Ok(())
}

/// Lets a VHD image grow while its disk is paused, and gives the disk's size then. Its blocks stay where they are, which takes room in
/// its table. The disk goes on with its log of changed blocks.
fn grow_vhd(
    directory: &Path,
    (pid, minor): (i32, u16),
    path: &Path,
    log: Option<&str>,
    size: u64,
) -> io::Result<u64> {
    let opening = Opening { log, ..Opening::default() };
    let place = Path::new("/proc").join(pid.to_string()).join("cwd").join(path);
    if let Err(error) = client::pause(directory, pid, minor, None) {
        // It may be paused all the same, as where its last flush failed; and nobody else would resume it. One that is not refuses.
        let now = match client::resume(directory, pid, minor, &opening) {
            Ok(()) => "it was resumed, and is as large as before".to_owned(),
            Err(error) => format!("it was not resumed: {error}"),
        };
        return Err(refused(client::errno(&error), format!("{error}; {now}")));
    }
    let grown = vhd_util::grow(&place, size);
    let grown = grown.map_err(|(errno, text)| refused(errno, text));
    // Whatever came of it.
    client::resume(directory, pid, minor, &opening)?;
    grown?;
    let disk: DebugQueue = serde_json::from_str(&client::text_of(directory, pid, minor, kind::DEBUG_QUEUE)?)?;
    Ok(disk.size)
}

fn grow(pid: i32, path: &Path, size: u64) -> io::Result<()> {
    let explain = |error: io::Error| {
        let text = format!("{}: {error}", path.display());
        refused(sys::errno_of(&error), text)
    };
    // A relative path counts from where the tapdisk is.
    let place = Path::new("/proc").join(pid.to_string()).join("cwd").join(path);
    let meta = fs::metadata(&place).map_err(explain)?;
    let path = path.display();
    if meta.file_type().is_block_device() {
        let text = format!("{path} is a block device: let it grow by its own tools, and then resize without --size");
        return Err(refused(Errno::EINVAL, text));
    }
    if !meta.is_file() || !is_open(pid, &meta) {
        let text = format!("{path} is not, or no longer, the file that process {pid} has open");
        return Err(refused(Errno::EINVAL, text));
    }
    if size < meta.len() {
        let text = format!("{path} has {} bytes, and a disk in use cannot shrink to {size}", meta.len());
        return Err(refused(Errno::EINVAL, text));
    }
    OpenOptions::new().write(true).open(&place).and_then(|file| file.set_len(size)).map_err(explain)
}

/// Whether a process has the file open: it may have been replaced by another of its name.
fn is_open(pid: i32, wanted: &fs::Metadata) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors
        .flatten()
        .filter_map(|entry| fs::metadata(entry.path()).ok())
        .any(|meta| (meta.dev(), meta.ino()) == (wanted.dev(), wanted.ino()))
}
