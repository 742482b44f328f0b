//! The log of changed blocks, as it is named while a tapdisk runs.

use std::path::PathBuf;
use std::sync::Arc;

use super::{Image, Member};

/// One, and who has named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangedBlocks {
    /// Its path, from the root on.
    pub path: PathBuf,
    /// The member of the control socket's group who names it; none: root.
    pub by: Option<Arc<Member>>,
}

impl Image {
    /// What is written is marked in that log from now on; none: in no log.
    pub fn keep_log(&mut self, named: Option<&ChangedBlocks>) {
        self.changed_blocks = named.map(|log| log.path.clone());
        self.changed_blocks_by = named.and_then(|log| log.by.clone());
    }
}
