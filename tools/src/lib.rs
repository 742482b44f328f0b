//! The tools of tapdisk, as a library: what each does and the definition of its command line, of which man pages and
//! shell completions are made.

pub mod cbt_util;
pub mod ring_load;
pub mod tap_ctl;
pub mod vhd_util;
