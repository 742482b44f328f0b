//! Why a store can't be had.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::sys;

/// Why a store can't be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system says no.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The store.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Another process serves or uses it.
    #[error("{}: in use by {holder}; two writers would destroy the image", path.display())]
    Locked {
        /// The store.
        path: PathBuf,
        /// The process, as far as it can be known.
        holder: String,
    },
    /// A member of `control.group` has named it, and may not.
    #[error(
        "{}: members of control.group may name images only in the folders of control.folders, or below, and not by a link out of those{}",
        path.display(), if *none { "; none is configured" } else { "" }
    )]
    Outside {
        /// The store.
        path: PathBuf,
        /// There are no such folders.
        none: bool,
    },
    /// A log of changed blocks has been named by a link to something else than a block device.
    #[error("{}: it is a link, and leads to no block device: name the log itself", path.display())]
    Link {
        /// The log.
        path: PathBuf,
    },
    /// It is a device that can't be written.
    #[error("{}: the device is read-only: open it so (image.read_only, tap-ctl open -R), or make it writable (blockdev --setrw)", path.display())]
    ReadOnly {
        /// The store.
        path: PathBuf,
    },
    /// Another file has taken its place while it was opened.
    #[error("{}: another file has taken its place meanwhile: try again", path.display())]
    Replaced {
        /// The store.
        path: PathBuf,
    },
    /// The configuration asks for what it can't do.
    #[error("{}: {message}", path.display())]
    Unfit {
        /// The store.
        path: PathBuf,
        /// What, and what to do.
        message: String,
    },
}

impl Error {
    /// As a client is told.
    pub fn errno(&self) -> Errno {
        match self {
            Error::Io { source, .. } => sys::errno_of(source),
            Error::Locked { .. } => Errno::EBUSY,
            Error::ReadOnly { .. } => Errno::EROFS,
            Error::Link { .. } => Errno::ELOOP,
            Error::Outside { .. } => Errno::EACCES,
            Error::Replaced { .. } => Errno::EAGAIN,
            Error::Unfit { .. } => Errno::EINVAL,
        }
    }
}
