//! Xen: the handshake, XenStore, tapback, hotplug scripts. What needs grants or event channels is in [`in_dom0`].

mod block_tap;
mod block_tapdisk;
mod handshake;
mod in_dom0;
mod tapback;
mod xenstore;
