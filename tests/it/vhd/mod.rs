//! VHD images, served and as `vhd-util` changes them.

mod chain;
mod change;
mod claims;
mod in_memory;
mod interop;
mod open;
mod repair;
mod safe;
mod served;
mod util;
mod volumes;
