//! VHD images that are changed without being served: by vhd-util, or by a tapdisk while nobody uses them.
//!
//! # An image in use
//!
//! A tapdisk that writes an image has the image's lock for itself (flock(2), exclusive). It reads header, parent's names and table when it
//! opens the image, and never again. It writes:
//!
//! - when it opens it: the footer's copy, if that is no good; the batmap, if that is stale; the file's last sector;
//! - while it serves it: data, bitmaps and table entries, from the first block on;
//! - when it closes it: the batmap and both footers, with the hidden mark that the copy (of a fixed image, the footer) has then.
//!
//! It never writes header and names. So others may change those, and the hidden mark, of an image in use, as storage managers do when they
//! coalesce below a running disk: `vhd-util modify -p` ([`file::UsedFile`]) and `set -f hidden`. The tapdisk goes by the new parent when the disk is
//! paused and resumed. Blocks, table and size of an image in use are changed by nobody: EBUSY.
//!
//! Who changes an image, in use or not, has a second lock ([`lock_changes`](crate::sys::file::lock_changes)); a tapdisk has it while it reads the
//! metadata of the image that it is about to write, and while it closes it. Reading (`query`, `read`, `check`, `scan`) takes no lock.
//!
//! On a network's file system (NFS, SMB), which takes a lock of some bytes and one of the whole file for the same, there is no second lock:
//! storage managers change an image there one after the other.
//!
//! Those locks hold off programs of this host that take them: tapdisk and vhd-util. An image on a block device is also held open exclusively
//! (O_EXCL) by its tapdisk, which holds off all that do the same by any node of the device: mounts, the device mapper, and another tapdisk. Other
//! hosts, and programs that take no lock, are held off by nobody.

pub mod file;
pub mod merge;
pub mod parent;
