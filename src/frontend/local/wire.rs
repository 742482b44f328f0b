//! The messages of the handshake; see [the module](super) for their order. All fields are in native byte order.
#![warn(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::frontend::blkif::wire::Abi;

/// First bytes of both messages.
pub const MAGIC: [u8; 8] = *b"TAPRING1";

/// `Hello::abi`.
pub const ABIS: [Abi; 3] = [Abi::Native, Abi::X86_32, Abi::X86_64];

/// `Welcome::info`: the disk is read-only (VDISK_READONLY of blkif.h).
pub const INFO_READ_ONLY: u32 = 4;

/// Client to server: the rings that it wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// Layout of the entries: 0 native, 1 x86_32, 2 x86_64.
    pub abi: u32,
    /// log2 of the pages of each ring.
    pub ring_page_order: u32,
    /// Rings.
    pub queues: u32,
    /// Data pages of each queue. A grant reference is a number below this.
    pub data_pages: u32,
}

/// Server to client: what it got, or why not. With it come, if `error` is 0, a memfd and for each queue two eventfds:
/// the one that the client writes to wake the server, then the one that the server writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Welcome {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// Size of the disk in 512-byte sectors.
    pub sectors: u64,
    /// Bytes from one queue to the next in the memfd. A queue begins with its ring's pages, its data pages follow.
    pub queue_bytes: u64,
    /// 0, or an errno.
    pub error: i32,
    /// Logical sector in bytes.
    pub sector_size: u32,
    /// Physical sector in bytes.
    pub physical_sector_size: u32,
    /// [`INFO_READ_ONLY`].
    pub info: u32,
    /// The most that `Hello::ring_page_order` may be.
    pub max_ring_page_order: u32,
    /// The most that `Hello::queues` may be.
    pub max_queues: u32,
    /// The most that `Hello::data_pages` times `Hello::queues` may be.
    pub max_data_pages: u32,
    /// The most segments of an indirect request.
    pub max_indirect_segments: u32,
    /// Why not, in UTF-8, padded with zeros.
    pub message: [u8; 128],
}
