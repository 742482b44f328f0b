//! What several tests share.

#![allow(unreachable_pub)] // of whichever program has it

pub mod double;
pub mod guest;
pub mod hanging_fs;
pub mod host;
pub mod killed;
pub mod live;
pub mod model;
pub mod needs;
pub mod served;
pub mod small_fs;
pub mod vhd;
pub mod vhd_made;
pub mod world;
pub mod xen_guest;
pub mod xenstored;

use std::time::Duration;

/// How long something may take that takes a moment: so long that only a hang is longer, on a machine that is busy with other
/// things as well.
pub const PATIENCE: Duration = Duration::from_secs(100);
