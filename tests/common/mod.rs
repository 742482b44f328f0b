//! What several tests share.
#![allow(dead_code, missing_docs, unreachable_pub)] // each test uses its part

pub mod double;
pub mod guest;
pub mod host;
pub mod killed;
pub mod live;
pub mod model;
pub mod served;
pub mod small_fs;
pub mod vhd;
pub mod vhd_made;
pub mod world;
pub mod xen_guest;
pub mod xenstored;
