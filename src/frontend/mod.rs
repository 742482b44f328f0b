//! Frontends: where requests come from and answers go to.

use std::any::Any;
use std::collections::VecDeque;

use drivers::Origin;
use mio::Registry;
use mio::event::Event;
use nix::errno::Errno;

use crate::memory::Part;
use crate::request::{Op, Request, RequestId, Slots};

pub mod blkif;
pub mod local;
pub mod nbd;
mod seats;
pub mod vhost_user;
pub mod virtio;
pub mod xen;

/// What clients are told of a disk.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// Bytes, a multiple of `sector_size`.
    pub size: u64,
    /// Logical sector, 512 or 4096 bytes: requests are aligned to it.
    pub sector_size: u32,
    /// Physical sector in bytes, at least the logical one.
    pub physical_sector_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// For messages and listings, as `type:path`.
    pub name: String,
}

impl DiskInfo {
    /// Size in 512-byte sectors.
    pub fn sectors(&self) -> u64 {
        self.size / drivers::SECTOR_SIZE
    }

    /// Whether a request may be done, before anything has been done of it.
    pub fn check(&self, op: Op, offset: u64, len: u64) -> Result<(), Errno> {
        if op.writes() && self.read_only {
            return Err(Errno::EROFS);
        }
        if op == Op::Flush || (op == Op::Barrier && len == 0) {
            return Ok(());
        }
        // The sector is a power of two, and a division is slow.
        let within_sector = u64::from(self.sector_size) - 1;
        if len == 0 || (offset | len) & within_sector != 0 {
            return Err(Errno::EINVAL);
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ if op.writes() => Err(Errno::ENOSPC),
            _ => Err(Errno::EINVAL),
        }
    }
}

/// With so many requests in flight, how many are worth being taken, or answered, together: one in `share`. With few in
/// flight nothing waits for anything.
pub fn gathered(in_flight: usize, share: usize) -> usize {
    if in_flight < 6 { 1 } else { (in_flight / share).clamp(1, 8) }
}

/// Where a frontend puts what it pulls.
pub struct Intake<'a> {
    pub(crate) slots: &'a mut Slots,
    pub(crate) started: &'a mut VecDeque<RequestId>,
    /// Set by a barrier; nothing is pulled behind it until it is answered.
    pub(crate) barrier: &'a mut Option<RequestId>,
    pub(crate) disk: &'a DiskInfo,
    pub(crate) origin: Origin,
    /// Slots that are left to other frontends.
    pub(crate) kept: usize,
    pub(crate) now: u64,
}

impl Intake<'_> {
    /// Requests that can be put in now.
    pub fn room(&self) -> usize {
        if self.barrier.is_some() { 0 } else { self.slots.room().saturating_sub(self.kept) }
    }

    /// The next request, with an empty payload, to be filled in: operation, offset, length, payload and tag.
    pub fn vacant(&mut self) -> Option<&mut Request> {
        if self.room() == 0 { None } else { self.slots.vacant() }
    }

    /// Puts nothing in after all: what [`vacant`](Self::vacant) gave names no memory any more.
    pub fn give_up(&mut self) {
        self.slots.give_up();
    }

    /// Puts in what [`vacant`](Self::vacant) gave. A request that the disk refuses is answered like any other.
    pub fn accept(&mut self) {
        let (origin, now, disk) = (self.origin, self.now, self.disk);
        let Some(request) = self.slots.filled() else { return };
        (request.origin, request.born, request.planning) = (origin, now, true);
        request.error = disk.check(request.op, request.offset, request.len).err();
        let barrier = request.op == Op::Barrier && request.error.is_none();
        if let Some(id) = self.slots.take() {
            self.started.push_back(id);
            if barrier {
                *self.barrier = Some(id);
            }
        }
    }
}

/// One way for clients to reach the disk. All is called on the main loop, and nothing may block. What is special to one kind is its
/// own, and reached by `kind` and `kind_mut`.
pub trait Frontend: Any {
    /// Registers what it listens on. Its tokens are `base` and up.
    fn register(&mut self, registry: Registry, base: usize) -> std::io::Result<()>;

    /// An event for token `base + index`.
    fn event(&mut self, index: usize, event: &Event);

    /// Puts in requests as long as there are some and there is room.
    fn pull(&mut self, intake: &mut Intake);

    /// The request with that tag is done. Its client may be gone.
    fn answer(&mut self, request: &Request);

    /// Makes the answers of this turn visible: one notification a client.
    fn publish(&mut self);

    /// Whether memory shows its requests, so that looking at it can be quicker than waiting for an event.
    fn in_memory(&self) -> bool;

    /// Whether memory shows something to pull. Only asked where there is room for it, as [`arm`](Self::arm) is.
    fn ready(&self) -> bool;

    /// The loop is about to sleep: asks every client to wake it. True: something came in before that took effect.
    fn arm(&mut self) -> bool;

    /// When it wants to [`publish`](Self::publish) although nothing happens, ns of [`crate::stats::now`].
    fn deadline(&self) -> Option<u64> {
        None
    }

    /// The same for [`pull`](Self::pull), which is not called while the disk is paused.
    fn pull_deadline(&self) -> Option<u64> {
        None
    }

    /// Whether there are requests in flight whose client is gone.
    fn has_orphans(&self) -> bool {
        false
    }

    /// Whether the client of the request with that tag, which is in flight, is gone: nobody hears of its end.
    fn is_orphan(&self, _tag: u64) -> bool {
        false
    }

    /// The disk has grown; requests beyond its old end are taken already.
    fn resized(&mut self, _disk: &DiskInfo) {}

    /// How long answers may wait for more of them, ns. 0: not at all; none: it has no client that could wait.
    fn gather_ns(&self) -> Option<u64> {
        Some(0)
    }

    /// Lets nobody in any more and says goodbye to those who are.
    fn close(&mut self);

    /// Whether the goodbye is over.
    fn is_closed(&self) -> bool {
        true
    }

    /// Whether what it serves is gone for good, and the disk with it.
    fn is_gone(&self) -> bool {
        false
    }

    /// What its memory is, and what its clients' will be.
    fn memory(&self) -> Vec<Part> {
        Vec::new()
    }

    /// For debug-queue and LIST.
    fn inspect(&self) -> serde_json::Value;
}

impl dyn Frontend {
    /// Itself, if it is of that kind.
    pub fn kind<T: Frontend>(&self) -> Option<&T> {
        (self as &dyn Any).downcast_ref()
    }

    /// The same, to be changed.
    pub fn kind_mut<T: Frontend>(&mut self) -> Option<&mut T> {
        (self as &mut dyn Any).downcast_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_beyond_the_disk_and_nothing_unaligned() {
        let disk = DiskInfo {
            size: 1 << 20,
            sector_size: 4096,
            physical_sector_size: 4096,
            read_only: false,
            name: "aio:x".into(),
        };
        assert_eq!(disk.check(Op::Read, 0, 1 << 20), Ok(()));
        assert_eq!(disk.check(Op::Read, 4096, 1 << 20), Err(Errno::EINVAL));
        assert_eq!(disk.check(Op::Write { fua: false }, 1 << 20, 4096), Err(Errno::ENOSPC));
        assert_eq!(disk.check(Op::Discard, u64::MAX - 4095, 4096), Err(Errno::ENOSPC));
        assert_eq!(disk.check(Op::Read, 512, 4096), Err(Errno::EINVAL));
        assert_eq!(disk.check(Op::Read, 0, 512), Err(Errno::EINVAL));
        assert_eq!(disk.check(Op::Read, 0, 0), Err(Errno::EINVAL));
        assert_eq!(disk.check(Op::Barrier, 7, 0), Ok(()));
        let disk = DiskInfo { read_only: true, ..disk };
        for op in [Op::Write { fua: true }, Op::Barrier, Op::Discard, Op::WriteZeroes { unmap: true }] {
            assert_eq!(disk.check(op, 0, 4096), Err(Errno::EROFS));
        }
        assert_eq!(disk.check(Op::Flush, 0, 0), Ok(()));
    }
}
