//! virtio-blk: what a guest's driver and a disk say to each other (Virtual I/O Device 1.2, sections 2.7 and 5.2). How the driver's memory and
//! its notifications get here is the transport's business: `vhost_user`.
//!
//! - `guest.rs`: the guest's memory, in regions.
//! - `ring.rs`: a split ring: descriptors, available and used ring, suppression of notifications.
//! - `request.rs`: a chain of descriptors as a request of a disk.
//! - `queue.rs`: a ring being served: what is taken and not answered. Begin reading here.
//!
//! All in the guest's memory is hostile: it is copied out once, then checked. A chain that makes no sense [breaks](ring::Broken) its ring, which
//! is not served until it is set up anew; what was taken before is answered.
//!
//! Packed rings are not offered: QEMU has them off by default, and what they save are cache misses of devices made of hardware. A ring in memory
//! that both sides have in their caches gains nothing worth a second layout.

pub mod guest;
pub mod queue;
pub mod request;
pub mod ring;
#[cfg(test)]
mod tests;

use super::DiskInfo;

/// Feature bits (5.2.3, 6).
pub mod feature {
    /// At most `seg_max` data buffers a request.
    pub const SEG_MAX: u64 = 1 << 2;
    /// Read-only.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` is set.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// Flush requests.
    pub const FLUSH: u64 = 1 << 9;
    /// Alignment and sizes of I/O are told.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The driver can switch the write cache.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// Several queues.
    pub const MQ: u64 = 1 << 12;
    /// Discard requests.
    pub const DISCARD: u64 = 1 << 13;
    /// Write-zeroes requests.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// Tables of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are asked for by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Not the legacy interface.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Data buffers of a request, at most.
pub const SEG_MAX: u32 = 126;

/// 512-byte sectors of a discard or of a write of zeroes, at most: what a request's length can say in bytes, and then some alignment.
const SECTORS_MAX: u32 = 1 << 22;

/// Bytes of the configuration space that has all of the features above.
pub const CONFIG_BYTES: usize = 60;

/// Byte of the configuration space that switches the write cache.
pub const CONFIG_WRITEBACK: usize = 32;

/// What a disk offers. `queues` more than one: MQ.
pub fn features(disk: &DiskInfo, queues: u16) -> u64 {
    use feature::*;
    let mut offered = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | CONFIG_WCE | INDIRECT_DESC | EVENT_IDX | VERSION_1;
    offered |= if disk.read_only { RO } else { DISCARD | WRITE_ZEROES };
    if queues > 1 { offered | MQ } else { offered }
}

/// The configuration space (5.2.4), little-endian.
pub fn config(disk: &DiskInfo, queues: u16, writeback: bool) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &disk.sectors().to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &disk.sector_size.to_le_bytes());
    // log2 of physical sectors in logical ones, then no offset of the first; the smallest and best I/O is a physical sector.
    let physical = disk.physical_sector_size / disk.sector_size;
    put(24, &[physical.trailing_zeros() as u8, 0]);
    put(26, &(physical as u16).to_le_bytes());
    put(CONFIG_WRITEBACK, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes());
    for (at, value) in [(36, SECTORS_MAX), (40, 1), (44, disk.sector_size / 512), (48, SECTORS_MAX), (52, 1)] {
        put(at, &value.to_le_bytes());
    }
    put(56, &[1]);
    space
}
