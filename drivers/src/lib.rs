//! Image formats, *sans-I/O*.
//!
//! A [`Format`] says where the bytes of an extent of the virtual disk are. It never moves one: the caller
//! (`tapdisk`'s stack) plans an extent, moves the data between the guest's memory and the file itself, and so
//! every format runs on every engine, and every test of a format is deterministic.
//!
//! All offsets and lengths are in bytes unless a name says `sectors`; a sector is 512 bytes, as on the ring.

#![forbid(unsafe_code)]

mod origin;
mod raw;
pub mod vhd;

pub use origin::Origin;
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
        /// Of a write that takes more than its data: it is done only when this is [settled](Format::settled).
        ticket: Option<Ticket>,
    },
    /// Not in this layer. A read is answered by the layer below, or with zeros if there is none; a discard is already done, and
    /// so is zeroing, since a layer that has others below it does not answer that with this.
    Below {
        /// Bytes.
        count: u64,
    },
    /// That is known only when some [`Meta`] or some write is done: ask again when one is.
    Wait,
    /// Nowhere, and it can't be put anywhere.
    Fail(Fail),
}

/// Why an extent can be neither read nor written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fail {
    /// There is no room for it, in the file or in the format.
    NoSpace,
    /// Metadata could not be read, or not be made durable.
    Io,
}

/// A write of which the format has to write metadata when its data is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u32);

/// What became of a ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    /// Which, and it may be another write's from now on.
    pub ticket: Ticket,
    /// The write is in the image. Otherwise its metadata could not be written, and the extent has what it had before, or
    /// what was to be written.
    pub done: bool,
}

/// An I/O of a format's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    /// The format's mark.
    pub id: MetaId,
    /// What is to be done.
    pub op: MetaOp,
    /// First byte of the file.
    pub at: u64,
    /// Bytes, at most [`Format::meta_len`] for a read or write.
    pub len: u64,
}

/// A format's mark for an I/O of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetaId(pub u64);

/// What a format wants done with its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetaOp {
    /// What is read goes to [`Format::meta_done`].
    Read,
    /// What [`Format::fill`] gives is written.
    Write,
    /// The range reads as zeros and is within the file, which grows for it.
    Extend,
    /// What was written before is made durable.
    Flush,
}

/// Something that is written when an image is closed.
#[derive(Clone, Debug)]
pub struct LastWrite {
    /// First byte of the file.
    pub at: u64,
    /// What goes there.
    pub bytes: Vec<u8>,
    /// What of it others may have changed in the file meanwhile.
    pub keep: Option<Keep>,
}

/// Something of the file that is read right before a write, and kept.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// First byte of the file.
    pub at: u64,
    /// Bytes.
    pub len: usize,
    /// Puts it, which is given first, as much of it as the file has, into the bytes that are to be written.
    pub put: fn(&[u8], &mut [u8]),
}

/// How far a crash of the host may reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// Metadata is written when data is down, and no flush is between them: enough where what was written is durable, and
    /// where only the process can die.
    Order,
    /// There is a flush between data and the metadata that points to it.
    #[default]
    Flush,
}

/// One image format, for one open image.
pub trait Format: Send {
    /// The format's name as in an image's `type:path`.
    fn name(&self) -> &'static str;

    /// Size of the virtual disk in bytes, a multiple of the logical sector.
    fn size(&self) -> u64;

    /// Where the beginning of `extent` is. The extent is within [`size`](Self::size): the caller has checked it. Each ticket that
    /// it gives comes back by [`written`](Self::written).
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

    /// The data of a write with a ticket is down, or could not be written.
    fn written(&mut self, ticket: Ticket, done: bool) {
        let _ = (ticket, done);
    }

    /// A ticket that is settled. Asked after each [`written`](Self::written) and [`meta_done`](Self::meta_done).
    fn settled(&mut self) -> Option<Settled> {
        None
    }

    /// An I/O of its own that it wants done next. Asked when something was planned, written or done.
    fn next_meta(&mut self) -> Option<Meta> {
        None
    }

    /// Gives the bytes of a write, right after [`next_meta`](Self::next_meta) gave that.
    fn fill(&mut self, id: MetaId, to: &mut [u8]) {
        let _ = (id, to);
    }

    /// An I/O of its own is done: with the bytes of a read, otherwise with none; or it could not be done.
    fn meta_done(&mut self, id: MetaId, result: Option<&[u8]>) {
        let _ = (id, result);
    }

    /// Bytes of the longest read or write of its own. 0: it has none.
    fn meta_len(&self) -> usize {
        0
    }

    /// Nothing is under way, and nothing more will be planned: hands over what is to be written, in this order, so that others find the
    /// image whole. Gives the bytes that the file is to have; none: as it is.
    fn close(&mut self, unix_seconds: u64, write: &mut dyn FnMut(LastWrite)) -> Option<u64> {
        let _ = (unix_seconds, write);
        None
    }

    /// Counters, by name, to be shown.
    fn inspect(&self, show: &mut dyn FnMut(&'static str, u64)) {
        let _ = show;
    }

    /// Bytes of memory that it takes.
    fn bytes(&self) -> usize {
        0
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
