//! Image formats, *sans-I/O*.
//!
//! A [`Format`] says where the bytes of an extent of the virtual disk are. It never moves one: the caller
//! (`tapdisk`'s stack) plans an extent, moves the data between the guest's memory and the file itself, and so
//! every format runs on every engine, and every test of a format is deterministic.
//!
//! All offsets and lengths are in bytes unless a name says `sectors`; a sector is 512 bytes, as on the ring.

#![forbid(unsafe_code)]

mod raw;
pub mod vhd;

pub use raw::{OddSize, Raw};

/// Bytes in a sector, the unit of every offset on the ring and in XenStore, whatever the logical sector size.
pub const SECTOR_SIZE: u64 = 512;

/// What is to be done with an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Data goes from the image to the guest.
    Read,
    /// Data goes from the guest to the image.
    Write,
    /// The extent's content is no longer needed; afterwards it may read as anything old or as zeros.
    Discard,
    /// The extent reads as zeros afterwards.
    WriteZeroes,
}

/// A run of bytes of the virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes, never 0.
    pub len: u64,
}

/// Where the beginning of an extent is. `count` is in bytes, from 1 to the extent's length; what is beyond it is
/// planned again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// In the layer's file at byte `at`. A read that meets the end of the file there is completed with zeros
    /// only from [`Format::zeros_from`] on.
    Data {
        /// Byte offset in the file.
        at: u64,
        /// Bytes.
        count: u64,
    },
    /// Nowhere: it reads as zeros, and discarding or zeroing it is already done.
    Zero {
        /// Bytes.
        count: u64,
    },
}

/// One image format, for one open image.
pub trait Format: Send {
    /// The format's name as in an image's `type:path`.
    fn name(&self) -> &'static str;

    /// Size of the virtual disk in bytes, a multiple of the logical sector.
    fn size(&self) -> u64;

    /// Where the beginning of `extent` is. The extent is within [`size`](Self::size): the caller has checked it.
    fn plan(&mut self, op: Op, extent: Extent) -> Plan;

    /// The file's byte offset from which a read that meets the end of the file is completed with zeros. A file
    /// that ends before has lost data, and the read is an error.
    fn zeros_from(&self) -> u64;

    /// The layer's file has `file_size` bytes now. Gives the size of the virtual disk, which is never less than before;
    /// on an error all is as before. A format that has its size in its metadata does not change by this.
    fn file_grown(&mut self, file_size: u64) -> Result<u64, OpenError> {
        let _ = file_size;
        Ok(self.size())
    }
}

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
}
