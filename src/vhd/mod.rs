//! VHD images that are changed without being served: by vhd-util, or by a tapdisk while nobody uses them.

pub mod file;
pub mod merge;
pub mod parent;
