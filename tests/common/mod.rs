//! What several tests share.

#![allow(unreachable_pub)] // of whichever program has it

pub mod double;
pub mod guest;
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
