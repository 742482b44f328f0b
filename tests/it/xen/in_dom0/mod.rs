//! Tests that run in dom0 of a real Xen, one after the other: `tests/xen/run in_dom0` takes this program there.

mod bad_guests;
mod tapback;
mod xenstore;
