//! The tests of tapdisk and its tools from outside, by subject. `tests/run NAME` runs those whose path has the name.

#[path = "../common/mod.rs"]
mod common;

mod bad_guests;
mod changed_blocks;
mod conf;
mod control;
mod disk;
mod engine;
mod image;
mod killed;
mod layers;
mod live;
mod log;
mod members;
mod metrics;
mod nbd;
mod privileges;
mod process;
mod queue;
mod real_input;
mod regions;
mod store;
mod style;
mod tap_ctl;
mod throttle;
mod vhd;
mod vhost_user;
mod xen;
