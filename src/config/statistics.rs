//! `[statistics]` and `[metrics]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `[statistics]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Statistics {
    /// The folder with the files that xentop reads.
    pub directory: PathBuf,
}

/// `[metrics]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Unix socket that answers GET /metrics; `{pid}` becomes the process id. None if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

impl Default for Statistics {
    fn default() -> Statistics {
        Statistics { directory: "/dev/shm".into() }
    }
}
