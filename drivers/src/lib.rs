//! Image formats and filters, *sans-I/O*.
//!
//! A [`Layer`] says where the bytes of an extent of the virtual disk are. It never moves one: the caller
//! (`tapdisk`'s stack) plans an extent, moves the data between the guest's memory and the files itself, and so
//! every layer runs on every engine, and every test of a layer is deterministic.
//!
//! All offsets and lengths are in bytes unless a name says `sectors`; a sector is 512 bytes, as on the ring.

#![forbid(unsafe_code)]

pub mod changed_blocks;
pub mod layer;
mod origin;
mod raw;
pub mod throttle;
pub mod vhd;

pub use layer::{
    Ask, Descent, Durability, Extent, Fail, Keep, LastStep, Layer, LayerFile, Meta, MetaId, MetaOp, Op, Plan,
    Settled, Through, Ticket,
};
pub use origin::Origin;
pub use raw::{OddSize, Raw};
pub use throttle::Throttle;

/// Bytes in a sector, the unit of every offset on the ring and in XenStore, whatever the logical sector size.
pub const SECTOR_SIZE: u64 = 512;

/// Why an image can't be opened, or not at its new size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OpenError {
    /// The file's size is no multiple of the logical sector, and the configuration does not say what to do.
    #[error(
        "its size, {size} bytes, is no multiple of the {sector_size}-byte sector; set odd_size to \"round-up\" (the \
         missing {} bytes read as zeros) or \"round-down\" (the last {} bytes are not served)",
        sector_size - size % sector_size,
        size % sector_size
    )]
    OddSize {
        /// Bytes in the file.
        size: u64,
        /// Bytes in a logical sector.
        sector_size: u64,
    },
    /// There is not a single sector.
    #[error("it has no whole {sector_size}-byte sector (size {size} bytes)")]
    Empty {
        /// Bytes in the file.
        size: u64,
        /// Bytes in a logical sector.
        sector_size: u64,
    },
    /// It had more when it was looked at before.
    #[error("its size, {size} bytes, is less than the {before} bytes that it had; a disk in use cannot shrink")]
    Shrunk {
        /// Bytes in the file.
        size: u64,
        /// Bytes that it had.
        before: u64,
    },
    /// Larger than any file can be addressed.
    #[error("its size, {size} bytes, is beyond what a file offset can express")]
    TooLarge {
        /// Bytes in the file.
        size: u64,
    },
    /// The log of changed blocks is too small for it.
    #[error("its log of changed blocks does not fit: {0}")]
    ChangedBlocks(#[from] changed_blocks::Unfit),
}
