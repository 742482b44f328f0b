//! A member of `control.group`, who has named an image.

use std::path::PathBuf;

use crate::sys::credentials::Credentials;

/// One, with what the configuration allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Whose rights to files count.
    pub credentials: Credentials,
    /// `control.folders`: images have to be in these, or below, too.
    pub folders: Vec<PathBuf>,
}
