//! A file on a medium that can lose power, and an image in it that is written at random.

pub(crate) mod guest;
pub(crate) mod medium;

use drivers::vhd::{BLOCK_SIZE, Footer, HEADER_SIZE, Header, Kind, Table, Uuid};
use zerocopy::IntoBytes;

/// What lies beyond the end of an image in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    /// A regular file: zeros.
    File,
    /// A block device: what was there before.
    Device,
}

/// The bytes of an empty image of `blocks` blocks of `block_size` bytes, up to where its blocks begin, without the last footer.
pub(crate) fn empty(kind: Kind, blocks: u32, block_size: u32) -> Vec<u8> {
    assert!(block_size <= BLOCK_SIZE);
    let table_at = (512 + HEADER_SIZE) as u64;
    let footer = Footer::new(kind, u64::from(blocks) * u64::from(block_size), Uuid([7; 16]), 1_000_000_000);
    let header = Header::new(table_at, blocks, block_size);
    let mut table = vec![0; Table::bytes(blocks) as usize];
    Table::empty(blocks).write(0, &mut table);
    [footer.as_bytes(), header.as_bytes(), &table].concat()
}
