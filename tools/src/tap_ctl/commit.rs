//! XCP-ng's names for a merge: `commit`, `query` and `cancel`.

use std::io;
use std::path::Path;

use serde_json::json;
use tapdisk::control::client::{self, Committing};
use tapdisk::text::one_line;

use super::{Answer, Disk};

/// Begins a merge.
pub(super) fn commit(directory: &Path, disk: Disk, image: &str) -> io::Result<Answer> {
    client::commit(directory, disk.pid, disk.minor, image)?;
    Ok(Answer::done(disk))
}

/// How far it is.
pub(super) fn query(directory: &Path, disk: Disk) -> io::Result<Answer> {
    let committing = client::query(directory, disk.pid, disk.minor)?;
    let Committing { status, current, total } = &committing;
    Ok(Answer::new(format!("Commit status '{}' ({current}/{total})", one_line(status)), json!(committing)))
}

/// Ends it.
pub(super) fn cancel(directory: &Path, disk: Disk, wait: bool) -> io::Result<Answer> {
    client::cancel(directory, disk.pid, disk.minor, wait)?;
    Ok(Answer::done(disk))
}
