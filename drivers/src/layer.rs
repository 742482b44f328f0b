//! What a layer is: the seam between a disk and all that stands between its guest and its files.
//!
//! A disk is a chain of layers. Image formats and filters are the same thing here: the first layer is asked first, and what it does
//! not answer itself goes to the layer below. Every operation descends so: reads, writes, discards, zeroing and flushes.
//!
//! ```text
//!     guest -> throttle -> changed blocks -> vhd (leaf) -> vhd (parent) -> raw
//!              filters: no size, no data     written      only read
//! ```
//!
//! # Contract
//!
//! **Who calls.** The walk, which is the one caller, on one thread. A layer does no I/O, asks no clock and waits for nothing.
//!
//! **Who validates.** The walk. An extent is within the disk, a multiple of 512 bytes, and never beyond the [size](Layer::size)
//! of the layer that is asked. A layer that is not written gets neither writes nor discards, zeroing or flushes. What comes from a
//! file the layer validates itself: it may have anything in it.
//!
//! **Order of calls.** [`plan`](Layer::plan) is a question and may be put again: of a request that could not go on, or whose beginning
//! alone was answered. Therefore `plan` of a filter changes nothing but what it waits for. Where the walk went on below a layer that
//! [`descends`](Layer::descends), and the layers below have found a place, [`descend`](Layer::descend) says so, with the bytes that really go
//! on. It comes before any of these bytes moves; what has to be noted before a write is issued is noted there. So `plan` answered with
//! `Below` may stay without a `descend`; and a `descend` always follows a `plan` of the same operation, with nothing in between.
//!
//! A [`Ticket`] is a layer's wish to hear of an end. Each that it has given, by `plan` or `descend`, comes back once by
//! [`ended`](Layer::ended), and leaves once by [`settled`](Layer::settled): the request is not answered before. Tickets of one transfer end from the
//! lowest layer up: a layer hears of the end of what it gave to the one below when the one below has settled it.
//!
//! After [`ended`](Layer::ended) and [`meta_done`](Layer::meta_done) the layer is asked for what is [settled](Layer::settled). After these, after a
//! ticket or a `Wait`, and when it closes, it is asked for [metadata](Layer::next_meta) to be moved.
//!
//! **Errors.** An error of data (`ended` with false) is the request's, unless the layer settles the ticket as done: so a mirror can do without
//! one of its sides. An error of metadata (`meta_done` with `None`) is the layer's to pass on, by settling what depended on it as not done.
//! After an error of a write the file has the old bytes, the new ones, or both in parts.
//!
//! **Durability.** What is written is durable after a flush of the same file that began later. A write may become durable earlier, and in any order.
//! [`Layer::flushes_metadata`] says whether the disk owes its clients a flush of what the layer wrote as metadata.
//!
//! **The end.** [`closing`](Layer::closing): nothing is under way, no plan will be asked for, and metadata is moved until there is none. Then
//! [`close`](Layer::close), once. After `closing` the disk may go on all the same, with `plan`.

//!
//! # What carries what
//!
//! Each row is a sequence of calls, which a test of that name in `tests/it/layers` makes on a layer that is made for it.
//!
//! | feature | what it asks for | test |
//! |---|---|---|
//! | qcow2, a first write to a shared cluster | `Through` with the cluster as block, then its table as metadata | `qcow2s_first_write_to_a_shared_cluster` |
//! | qcow2, zeroing of clusters | `Zeros` with a ticket | `qcow2s_zeroing_of_a_cluster_is_metadata_alone` |
//! | qcow2, compressed clusters | `Through` of a read, `transform` unpacks | `a_compressed_cluster_is_read_and_written_over` |
//! | encrypted images | `Through` of the guest's sectors, `transform` encrypts | `an_encrypted_image_has_no_plain_byte_in_its_file` |
//! | mirror | `Both`, a ticket for each side | `a_mirror_goes_on_without_the_side_that_fails` |
//! | read cache | `Through` with `fill` | `a_read_caches_late_fill_never_lands_over_a_guests_write` |
//! | qcow2's data file, a cache's or mirror's image | a file of the layer's own, [`LayerFile`] | all of these |
//! | qcow2's closing (counts, bitmaps, then the flags) | [`Layer::closing`], then [`LastStep`]s with flushes between | `an_image_is_closed_by_metadata_and_then_by_steps_in_their_order` |
//! | throttling | `Wait` until a time; [`Layer::descend`] charges what really goes on | [`crate::throttle`] |
//! | changed blocks | `Wait` for metadata, in a file of the filter's | [`crate::changed_blocks`] |

use std::any::Any;

use crate::{OpenError, Origin};

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
    /// What was written before is durable afterwards. The extent is empty.
    Flush,
    /// A read of which nothing is moved: only where the data is, is of interest. No ticket is given for it.
    Locate,
}

impl Op {
    /// Whether it changes what the disk reads as.
    pub fn writes(self) -> bool {
        matches!(self, Op::Write | Op::Discard | Op::WriteZeroes)
    }
}

/// A run of bytes of the virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes; 0 only of a flush.
    pub len: u64,
}

/// What a layer is asked.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// The operation.
    pub op: Op,
    /// On which part of the disk.
    pub extent: Extent,
    /// Whose request it is.
    pub origin: Origin,
    /// It is the beginning of the request, and not what was left when that was cut.
    pub begins: bool,
    /// The time, ns since some moment before the start of the process. It never goes back.
    pub now: u64,
}

impl Ask {
    /// For what is only about `op` on `len` bytes from byte `offset` on, at no time that matters and for the disk itself.
    pub fn of(op: Op, offset: u64, len: u64) -> Ask {
        Ask { op, extent: Extent { offset, len }, origin: Origin::Disk, begins: true, now: 0 }
    }
}

/// One of a layer's own files, from 0 on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerFile(pub u8);

/// Where the beginning of an extent is. `count` is in bytes, from 1 to the extent's length (0 of a flush); what is beyond it is
/// planned again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// In one of the layer's files at byte `at`. A read that meets the end of the file there is completed with zeros
    /// only from [`Layer::zeros_from`] on.
    Data {
        /// Which file.
        file: LayerFile,
        /// Byte offset in the file.
        at: u64,
        /// Bytes.
        count: u64,
        /// Of what takes more than its data: it is done only when this is [settled](Layer::settled).
        ticket: Option<Ticket>,
    },
    /// A read gets zeros, whatever is below. Anything else moves no data: it is done at once, or when the ticket is settled.
    Zeros {
        /// Bytes.
        count: u64,
        /// Of a change that is one of metadata alone. It has [ended](Layer::ended) right away.
        ticket: Option<Ticket>,
    },
    /// The layer below is asked. Below the last one a read gets zeros, and anything else fails.
    Below {
        /// Bytes.
        count: u64,
    },
    /// Here and below, at the same time; each has its own end ([`Descent`]). Not for reads.
    Both {
        /// Which file.
        file: LayerFile,
        /// Byte offset in the file.
        at: u64,
        /// Bytes.
        count: u64,
    },
    /// Through memory of the chain's, a block at a time ([`Through`]).
    Through(Through),
    /// Ask again when some [`Meta`] or some ticket is done, or at that time (ns, as [`Ask::now`]).
    Wait {
        /// At the latest then; none: when something is done.
        until: Option<u64>,
    },
    /// Nowhere, and it can't be put anywhere.
    Fail(Fail),
}

/// A transfer between a file and the guest that goes through a block of the chain's memory, where the layer, by [`Layer::transform`], can change
/// its bytes: unpack, decrypt, encrypt. The extent is within the block.
///
/// | request | steps |
/// |---|---|
/// | read | `stored` bytes at `at` are read; `transform` makes the block of them; the guest gets its part |
/// | read with `fill` | the block is read as the layers below have it; the guest gets its part; `transform`; the block is written at `at` |
/// | write | the rest of the block is read as this layer and those below have it; the guest's part is put over it; `transform`; the block is written at `at` |
///
/// The ticket has ended after the last step. A read with `fill` is answered only then, too; an error of its write ends the ticket as not done, and
/// the layer settles it as done, because the guest has its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Through {
    /// Which file.
    pub file: LayerFile,
    /// Byte offset in the file.
    pub at: u64,
    /// Bytes in the file, at most [`Layer::block_len`].
    pub stored: u64,
    /// The part of the disk that the block is, at most [`Layer::block_len`] bytes. Its rest must not change as long as the ticket is not settled: the
    /// layer lets other writes to it wait.
    pub block: Extent,
    /// Bytes of the request that are done with it.
    pub count: u64,
    /// A read stores what it has read from below.
    pub fill: bool,
    /// The layer's own, for [`Layer::transform`]: what the block was when it was planned may have changed since.
    pub mark: u64,
    /// Of every write, and of a read that fills.
    pub ticket: Option<Ticket>,
}

/// Why an extent can be neither read nor written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fail {
    /// There is no room for it, in the file or in the format.
    NoSpace,
    /// Metadata could not be read, or not be made durable.
    Io,
}

/// Something of whose end a layer hears. Its number is below [`Layer::tickets`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u32);

/// What became of a ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    /// Which, and it may be another one's from now on.
    pub ticket: Ticket,
    /// It is as it should be. Otherwise the request fails, and the extent has what it had before, or what was to be written.
    pub done: bool,
}

/// Of whose ends a layer wants to hear that was passed by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descent {
    /// Of what the layers below do.
    pub below: Option<Ticket>,
    /// Of what is done here, of [`Plan::Both`].
    pub here: Option<Ticket>,
}

/// An I/O of a layer's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    /// The layer's mark.
    pub id: MetaId,
    /// What is to be done.
    pub op: MetaOp,
    /// With which of its files.
    pub file: LayerFile,
    /// First byte of the file.
    pub at: u64,
    /// Bytes, at most [`Layer::meta_len`] for a read or write.
    pub len: u64,
}

/// A layer's mark for an I/O of its own, below 2^63.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetaId(pub u64);

/// What a layer wants done with one of its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetaOp {
    /// What is read goes to [`Layer::meta_done`].
    Read,
    /// What [`Layer::meta_bytes`] gives is written.
    Write,
    /// The range reads as zeros and is within the file, which grows for it.
    Extend,
    /// The range is not needed any more, and its space may be given back.
    Discard,
    /// What was written before is made durable.
    Flush,
}

/// A step of what is done when an image is closed. Steps are done one after the other.
#[derive(Clone, Debug)]
pub enum LastStep {
    /// Bytes are written.
    Write {
        /// Which file.
        file: LayerFile,
        /// First byte of the file.
        at: u64,
        /// What goes there.
        bytes: Vec<u8>,
        /// What of it others may have changed in the file meanwhile.
        keep: Option<Keep>,
    },
    /// The file has so many bytes from then on.
    Resize {
        /// Which file.
        file: LayerFile,
        /// Bytes.
        size: u64,
    },
    /// What the steps before have written is durable before the next one. (After the last one there is a flush in any case.)
    Flush {
        /// Which file.
        file: LayerFile,
    },
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

/// One layer of an open disk: an image format, or a filter. The [module](self) has its contract.
pub trait Layer: Any + Send {
    /// Its name; that of a format is as in an image's `type:path`.
    fn name(&self) -> &'static str;

    /// Size of the virtual disk in bytes, a multiple of the logical sector. None: a filter, which has the size of the layer below.
    fn size(&self) -> Option<u64>;

    /// Where the beginning of the extent is.
    fn plan(&mut self, ask: &Ask) -> Plan;

    /// Whether it has nothing to say for now: it is not asked, and not told of anything. Only of filters, and only before all that are not idle.
    fn is_idle(&self) -> bool {
        false
    }

    /// Whether it is told where the walk goes on below it. Only of filters, and always the same.
    fn descends(&self) -> bool {
        false
    }

    /// What was planned as [`Plan::Below`] or [`Plan::Both`] is handed on now: the extent has the bytes that really are. Not for
    /// [`Op::Locate`].
    fn descend(&mut self, ask: &Ask) -> Descent {
        let _ = ask;
        Descent::default()
    }

    /// Tickets that it can have given at a time. Always the same.
    fn tickets(&self) -> usize {
        0
    }

    /// What a ticket is about has ended, or failed.
    fn ended(&mut self, ticket: Ticket, done: bool) {
        let _ = (ticket, done);
    }

    /// A ticket that is settled.
    fn settled(&mut self) -> Option<Settled> {
        None
    }

    /// The file's byte offset from which a read that meets the end of the file is completed with zeros. A file
    /// that ends before has lost data, and the read is an error.
    fn zeros_from(&self, file: LayerFile) -> u64 {
        let _ = file;
        u64::MAX
    }

    /// A file of the layer has `size` bytes now. Gives the size of the virtual disk, which is never less than before;
    /// on an error all is as before. A format that has its size in its metadata does not change by this.
    fn file_grown(&mut self, file: LayerFile, size: u64) -> Result<u64, OpenError> {
        let _ = (file, size);
        Ok(self.size().unwrap_or(0))
    }

    /// Whether it bears a disk of so many bytes, which is to grow to that. Where it does not, the disk keeps its size, though its image's file has
    /// grown.
    fn check_size(&self, size: u64) -> Result<(), OpenError> {
        let _ = size;
        Ok(())
    }

    /// From now on, or no longer, the disk only finishes what it has: for a pause, a resize, its end. Whoever holds requests back for reasons of
    /// its own lets them go.
    fn drain(&mut self, on: bool) {
        let _ = on;
    }

    /// An I/O of its own that it wants done next.
    fn next_meta(&mut self) -> Option<Meta> {
        None
    }

    /// Gives the bytes of a write, right after [`next_meta`](Self::next_meta) gave that.
    fn meta_bytes(&mut self, id: MetaId, to: &mut [u8]) {
        let _ = (id, to);
    }

    /// An I/O of its own is done: with the bytes of a read, otherwise with none; or it could not be done.
    fn meta_done(&mut self, id: MetaId, result: Option<&[u8]>) {
        let _ = (id, result);
    }

    /// Bytes of the longest read or write of its own. 0: it has none. Always the same.
    fn meta_len(&self) -> usize {
        0
    }

    /// Whether its metadata has to be durable where a client's write or flush is to be: its data can't be found without.
    fn flushes_metadata(&self) -> bool {
        true
    }

    /// Bytes of the longest block of a [`Through`]. 0: it has none. Always the same.
    fn block_len(&self) -> usize {
        0
    }

    /// Changes the bytes of a block on its way. Of a read, `stored` has what was read and `content` gets what the guest sees; of a write or fill,
    /// `content` has what the guest sees and `stored` gets what is written. False: what is stored makes no sense.
    fn transform(&mut self, op: Op, through: &Through, stored: &mut [u8], content: &mut [u8]) -> bool {
        let _ = through;
        let (from, to) = if op == Op::Read { (&*stored, content) } else { (&*content, stored) };
        to.copy_from_slice(from);
        true
    }

    /// No plan will be asked for, and nothing is under way: what is still to be written as metadata can be. May be called again.
    fn closing(&mut self) {}

    /// Nothing is under way, and nothing more will come: hands over what is to be done, in this order, so that others find the
    /// image whole.
    fn close(&mut self, unix_seconds: u64, step: &mut dyn FnMut(LastStep)) {
        let _ = (unix_seconds, step);
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
