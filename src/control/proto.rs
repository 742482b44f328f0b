//! blktap's control protocol: one request a connection, a struct of 544 bytes in native byte order each way.
//!
//! A message is a u16 type, a u16 cookie (the disk's minor), padding, and at byte 8 a union whose member depends on
//! the type. Types from 0x100 on are ours: blktap has none for what they do.
#![warn(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Bytes of a message.
pub const MESSAGE_SIZE: usize = 544;
/// Bytes of a path's field, its NUL included.
pub const PATH_SIZE: usize = 256;
/// `cookie` that means no disk, or all.
pub const NO_MINOR: u16 = u16::MAX;

/// Message types. An answer's is its request's plus one, or ERROR.
pub mod kind {
    #![allow(missing_docs)]
    pub const ERROR: u16 = 1;
    pub const PID: u16 = 3;
    pub const PID_RSP: u16 = 4;
    pub const ATTACH: u16 = 5;
    pub const ATTACH_RSP: u16 = 6;
    /// With [`Params`](super::Params); answered with [`Image`](super::Image).
    pub const OPEN: u16 = 7;
    pub const OPEN_RSP: u16 = 8;
    /// Answered once the disk is paused.
    pub const PAUSE: u16 = 9;
    pub const PAUSE_RSP: u16 = 10;
    /// With [`Params`](super::Params).
    pub const RESUME: u16 = 11;
    pub const RESUME_RSP: u16 = 12;
    /// Answered once the disk is drained, flushed and closed.
    pub const CLOSE: u16 = 13;
    pub const CLOSE_RSP: u16 = 14;
    pub const DETACH: u16 = 15;
    pub const DETACH_RSP: u16 = 16;
    pub const LIST_MINORS: u16 = 17;
    pub const LIST_MINORS_RSP: u16 = 18;
    pub const LIST: u16 = 19;
    pub const LIST_RSP: u16 = 20;
    pub const STATS: u16 = 21;
    pub const STATS_RSP: u16 = 22;
    /// CLOSE that gives up what has not reached the engine. Answered with CLOSE_RSP.
    pub const FORCE_SHUTDOWN: u16 = 23;
    /// With [`Blkif`](super::Blkif).
    pub const XENBLKIF_CONNECT: u16 = 24;
    pub const XENBLKIF_CONNECT_RSP: u16 = 25;
    /// With [`Blkif`](super::Blkif), of which only the domain and the device count. Answered once the guest's requests are finished.
    pub const XENBLKIF_DISCONNECT: u16 = 26;
    pub const XENBLKIF_DISCONNECT_RSP: u16 = 27;
    /// Answered with [`Image`](super::Image).
    pub const DISK_INFO: u16 = 28;
    pub const DISK_INFO_RSP: u16 = 29;
    pub const EXIT: u16 = 30;
    /// XCP-ng's: merges the image at the path of [`Params`](super::Params) into its parent.
    pub const COMMIT: u16 = 31;
    pub const COMMIT_RSP: u16 = 32;
    /// XCP-ng's: answered with [`Query`](super::Query).
    pub const QUERY_COMMIT: u16 = 33;
    pub const QUERY_COMMIT_RSP: u16 = 34;
    /// XCP-ng's: with [`Params`](super::Params), whose flags are 1 if the answer is to come when the merge has ended.
    pub const CANCEL_COMMIT: u16 = 35;
    pub const CANCEL_COMMIT_RSP: u16 = 36;
    /// Ours: answered like STATS, with the JSON of [`DebugQueue`](crate::disk::DebugQueue).
    pub const DEBUG_QUEUE: u16 = 0x100;
    pub const DEBUG_QUEUE_RSP: u16 = 0x101;
    /// Ours: sets the main loop's polling, or only asks for it.
    pub const POLL: u16 = 0x102;
    pub const POLL_RSP: u16 = 0x103;
    /// Ours: the image's file may have grown.
    pub const RESIZE: u16 = 0x104;
    pub const RESIZE_RSP: u16 = 0x105;
    /// Ours: another engine, or only asks for it. Answered like STATS, with the JSON of
    /// [`EngineReport`](crate::disk::EngineReport), once it has changed.
    pub const ENGINE: u16 = 0x106;
    pub const ENGINE_RSP: u16 = 0x107;
    /// Ours: steers the faults. Answered like STATS, with the JSON of
    /// [`FaultsReport`](crate::engine::fault::FaultsReport).
    pub const FAULT: u16 = 0x108;
    pub const FAULT_RSP: u16 = 0x109;
    /// Ours: merges an image of the chain into its parent, ends that, or only asks for it. Answered like STATS, with the JSON of
    /// [`CoalesceReport`](crate::disk::CoalesceReport), at once.
    pub const COALESCE: u16 = 0x10a;
    pub const COALESCE_RSP: u16 = 0x10b;
    /// Ours: all disks of the process, or one. Answered like STATS, with the JSON of
    /// [`ProcessMetrics`](crate::metrics::ProcessMetrics).
    pub const METRICS: u16 = 0x10c;
    pub const METRICS_RSP: u16 = 0x10d;
    /// Ours: sets a disk's limits, or only asks for them. Answered like STATS, with the JSON of
    /// [`ThrottleReport`](crate::disk::ThrottleReport).
    pub const THROTTLE: u16 = 0x10e;
    pub const THROTTLE_RSP: u16 = 0x10f;
}

/// Flags of OPEN and RESUME, in [`Params`].
pub mod open {
    /// Read-only, and others may have the image too. Implied by [`RDONLY`] here.
    pub const SHARED: u32 = 1;
    /// Writes are refused.
    pub const RDONLY: u32 = 2;
    /// A cache of blocks in memory.
    pub const ADD_CACHE: u32 = 4;
    /// An index beside the VHD.
    pub const VHD_INDEX: u32 = 8;
    /// A log of changed blocks, whose path follows the message in 256 bytes.
    pub const ADD_LOG: u32 = 0x10;
    /// A cache of the parent on local storage.
    pub const ADD_LCACHE: u32 = 0x20;
    /// The parent is the image of another minor of this process, `prt_devnum`.
    pub const REUSE_PRT: u32 = 0x40;
    /// A second image, `secondary`.
    pub const SECONDARY: u32 = 0x80;
    /// The second image takes over where the first has no space.
    pub const STANDBY: u32 = 0x100;
    /// Through the page cache.
    pub const NO_O_DIRECT: u32 = 0x200;
    /// A key follows the message: a byte that says its length, and then that many.
    pub const OPEN_ENCRYPTED: u32 = 0x400;
}

/// State bits of LIST.
pub mod state {
    /// It was open, and is closed.
    pub const CLOSED: i32 = 2;
    /// It is being drained.
    pub const QUIESCE_REQUESTED: i32 = 4;
    /// It will be paused when nothing is under way.
    pub const PAUSE_REQUESTED: i32 = 0x10;
    /// It is paused: closed, quiesced and paused, in blktap's words.
    pub const PAUSED: i32 = 0x2a;
}

/// A message.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Message {
    /// One of [`kind`].
    pub kind: u16,
    /// The disk's minor, or [`NO_MINOR`].
    pub cookie: u16,
    padding: u32,
    body: [u8; MESSAGE_SIZE - 8],
}

/// Union member `list`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct List {
    /// Messages that are still to come, this one included; 0: this is the end, and no disk.
    pub count: i32,
    /// The disk; -1 at the end.
    pub minor: i32,
    /// [`state`] bits.
    pub state: i32,
    /// `type:path`, ended by NUL.
    pub path: [u8; 256],
}

/// Union member `params`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Params {
    /// What of the others is meant, and how.
    pub flags: u32,
    /// Not used.
    pub devnum: u32,
    /// Not used.
    pub domid: u32,
    /// `type:path`, ended by NUL; empty: as it was.
    pub path: [u8; 256],
    /// The minor whose image is used again.
    pub prt_devnum: u32,
    /// Seconds.
    pub req_timeout: u16,
    /// The path of another image.
    pub secondary: [u8; 256],
    padding: [u8; 2],
}

/// Union member `image`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Image {
    /// 512-byte sectors.
    pub sectors: u64,
    /// Logical sector in bytes.
    pub sector_size: u32,
    /// As a backend writes it to XenStore's `info`: 4 if writes are refused, otherwise 0.
    pub info: u32,
}

/// Union member `minors`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MinorList {
    /// Those that there are.
    pub count: i32,
    /// The first 63 of them.
    pub list: [i32; 63],
}

/// Union member `blkif`: a guest's ring, as tapback reads it from XenStore.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Blkif {
    /// The guest.
    pub domid: u32,
    /// Its device.
    pub devid: u32,
    /// Grant references of the ring's pages; the first `1 << order` count.
    pub gref: [u32; 8],
    /// log2 of the ring's pages.
    pub order: u32,
    /// The layout of its entries: [`blkif`].
    pub proto: u32,
    /// A pool of pages, ended by NUL. Every disk has its own here.
    pub pool: [u8; 256],
    /// The guest's event channel.
    pub port: u32,
    /// How long to look at the ring after the last request, µs; 0: not at all.
    pub poll_duration: u32,
    /// How much of the host's CPUs must be idle for that, per cent.
    pub poll_idle_threshold: u32,
}

/// Layouts of a ring's entries.
pub mod blkif {
    /// That of the host.
    pub const NATIVE: u32 = 1;
    /// That of a 32-bit x86 guest.
    pub const X86_32: u32 = 2;
    /// That of a 64-bit x86 guest.
    pub const X86_64: u32 = 3;
}

/// Union member `query` of XCP-ng.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Query {
    /// How far it is, of `total_progress`.
    pub current_progress: u64,
    /// 100.
    pub total_progress: u64,
    /// In a word, ended by NUL.
    pub status: [u8; 256],
}

/// Union member `stat`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Stat {
    /// As the message's type.
    pub kind: u16,
    /// As the message's cookie.
    pub cookie: u16,
    padding: u32,
    /// Bytes that follow the message.
    pub length: u64,
}

/// Union member `response`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Response {
    /// A positive errno.
    pub error: i32,
    /// What went wrong, ended by NUL.
    pub message: [u8; 256],
}

/// Union member of POLL, and of its answer: the settings in force.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Poll {
    /// How long to look at memory after the last request, µs.
    pub poll_us: u32,
    /// How much of the host's CPUs must be idle for that, per cent.
    pub poll_idle_percent: u32,
    /// [`poll`] bits; 0 in the answer.
    pub flags: u32,
}

/// Union member of the answer to RESIZE.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Resized {
    /// Bytes of the disk before.
    pub old: u64,
    /// Bytes of the disk now.
    pub new: u64,
}

/// Union member of ENGINE.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct EngineChange {
    /// [`engine`] bits: which of the others are meant.
    pub flags: u32,
    /// Index into [`engine::NAMES`].
    pub name: u32,
    /// Index into [`engine::SUBMIT_MODES`].
    pub submit: u32,
    /// Threads that the pool always has.
    pub threads_min: u32,
    /// The most threads of the pool.
    pub threads_max: u32,
}

/// Of ENGINE.
pub mod engine {
    use crate::config::{EngineName, SubmitMode};

    /// Set `name`.
    pub const SET_NAME: u32 = 1;
    /// Set `submit`.
    pub const SET_SUBMIT: u32 = 2;
    /// Set `threads_min`.
    pub const SET_THREADS_MIN: u32 = 4;
    /// Set `threads_max`.
    pub const SET_THREADS_MAX: u32 = 8;
    /// Of these flags.
    pub const ALL: u32 = 15;
    /// Engines by number.
    pub const NAMES: [EngineName; 4] = [EngineName::Auto, EngineName::Aio, EngineName::Threads, EngineName::IoUring];
    /// Ways to submit by number.
    pub const SUBMIT_MODES: [SubmitMode; 3] = [SubmitMode::Auto, SubmitMode::Thread, SubmitMode::Inline];
}

/// Union member of THROTTLE.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ThrottleChange {
    /// Which of the values are meant, the first by bit 0, and [`throttle`] bits.
    pub flags: u32,
    padding: u32,
    /// What is set, in the order of [`Throttle::KEYS`](crate::config::Throttle::KEYS). 0: as if the key were left out.
    pub values: [u64; 12],
}

impl ThrottleChange {
    /// With all but the padding.
    pub fn new(flags: u32, values: [u64; 12]) -> ThrottleChange {
        ThrottleChange { flags, padding: 0, values }
    }
}

/// Of THROTTLE.
pub mod throttle {
    /// All limits are taken off, before others are set.
    pub const OFF: u32 = 1 << 31;
    /// Of these flags.
    pub const ALL: u32 = OFF | 0xfff;
}

/// Union member of FAULT.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FaultChange {
    /// [`fault`] bits.
    pub flags: u32,
}

/// Of FAULT.
pub mod fault {
    /// Let what is stuck complete.
    pub const RELEASE: u32 = 1;
    /// I/Os are hit from now on.
    pub const ENABLE: u32 = 2;
    /// They are not.
    pub const DISABLE: u32 = 4;
    /// Of these flags.
    pub const ALL: u32 = 7;
}

/// Union member of COALESCE.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Coalesce {
    /// Bytes a second; 0: as fast as can be.
    pub rate: u64,
    /// [`coalesce`] bits.
    pub flags: u32,
    padding: u32,
    /// The image's path, ended by NUL; empty: that below the leaf.
    pub path: [u8; 256],
}

impl Coalesce {
    /// With all but the padding. None: the path is too long.
    pub fn new(flags: u32, rate: u64, path: &str) -> Option<Coalesce> {
        let fits = path.len() < 256 && !path.contains('\0');
        fits.then(|| Coalesce { rate, flags, padding: 0, path: string(path) })
    }
}

/// Of COALESCE.
pub mod coalesce {
    /// Begin.
    pub const START: u32 = 1;
    /// End what is under way.
    pub const CANCEL: u32 = 2;
    /// Of these flags.
    pub const ALL: u32 = 3;
}

/// Flags of POLL.
pub mod poll {
    /// Set `poll_us`.
    pub const SET_US: u32 = 1;
    /// Set `poll_idle_percent`.
    pub const SET_IDLE_PERCENT: u32 = 2;
}

const _: () = {
    assert!(size_of::<Message>() == MESSAGE_SIZE && std::mem::offset_of!(Message, body) == 8);
    assert!(size_of::<List>() == 268 && std::mem::offset_of!(List, path) == 12);
    assert!(size_of::<Params>() == 532 && std::mem::offset_of!(Params, secondary) == 274);
    assert!(std::mem::offset_of!(Params, path) == 12 && std::mem::offset_of!(Params, req_timeout) == 272);
    assert!(std::mem::offset_of!(Params, prt_devnum) == 268 && std::mem::offset_of!(Params, domid) == 8);
    assert!(size_of::<Image>() == 16 && std::mem::offset_of!(Image, sector_size) == 8);
    assert!(std::mem::offset_of!(Image, info) == 12);
    assert!(size_of::<MinorList>() == 256 && std::mem::offset_of!(MinorList, list) == 4);
    assert!(size_of::<Blkif>() == 316 && std::mem::offset_of!(Blkif, gref) == 8);
    assert!(std::mem::offset_of!(Blkif, order) == 40 && std::mem::offset_of!(Blkif, proto) == 44);
    assert!(std::mem::offset_of!(Blkif, pool) == 48 && std::mem::offset_of!(Blkif, port) == 304);
    assert!(std::mem::offset_of!(Blkif, poll_duration) == 308);
    assert!(std::mem::offset_of!(Blkif, poll_idle_threshold) == 312);
    assert!(size_of::<Query>() == 272 && std::mem::offset_of!(Query, status) == 16);
    assert!(std::mem::offset_of!(Message, kind) == 0 && std::mem::offset_of!(Message, cookie) == 2);
    assert!(std::mem::offset_of!(List, minor) == 4 && std::mem::offset_of!(List, state) == 8);
    assert!(std::mem::offset_of!(Stat, cookie) == 2);
    assert!(size_of::<Stat>() == 16 && std::mem::offset_of!(Stat, length) == 8);
    assert!(size_of::<Resized>() == 16 && std::mem::offset_of!(Resized, new) == 8);
    assert!(size_of::<EngineChange>() == 20 && std::mem::offset_of!(EngineChange, threads_max) == 16);
    assert!(size_of::<FaultChange>() == 4);
    assert!(size_of::<ThrottleChange>() == 104 && std::mem::offset_of!(ThrottleChange, values) == 8);
    assert!(size_of::<Coalesce>() == 272 && std::mem::offset_of!(Coalesce, path) == 16);
    assert!(size_of::<Poll>() == 12 && std::mem::offset_of!(Poll, flags) == 8);
    assert!(size_of::<Response>() == 260 && std::mem::offset_of!(Response, message) == 4);
};

impl Message {
    /// A message with an empty union.
    pub fn new(kind: u16, cookie: u16) -> Message {
        Message { kind, cookie, ..Message::new_zeroed() }
    }

    /// The same with a union member.
    pub fn with(mut self, member: &(impl IntoBytes + Immutable)) -> Message {
        let bytes = member.as_bytes();
        self.body[..bytes.len()].copy_from_slice(bytes);
        self
    }

    /// The union read as `T`.
    pub fn member<T: FromBytes>(&self) -> T {
        T::read_from_prefix(&self.body).map(|(member, _)| member).unwrap_or_else(|_| T::new_zeroed())
    }

    /// An ERROR response.
    pub fn error(cookie: u16, errno: i32, text: &str) -> Message {
        Message::new(kind::ERROR, cookie).with(&Response { error: errno, message: string(text) })
    }
}

impl Stat {
    /// Announces `length` bytes.
    pub fn new(kind: u16, cookie: u16, length: usize) -> Stat {
        Stat { kind, cookie, padding: 0, length: length as u64 }
    }
}

/// Text in a fixed field, cut to leave a NUL.
pub fn string<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    let mut end = text.len().min(N.saturating_sub(1));
    while !text.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    field[..end].copy_from_slice(&text.as_bytes()[..end]);
    field
}

/// The text of a fixed field. None: it has no NUL, or is no UTF-8.
pub fn text(field: &[u8]) -> Option<&str> {
    std::ffi::CStr::from_bytes_until_nul(field).ok()?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_blktap_has_them() {
        let list = List { count: 1, minor: 7, state: 0x2a, path: string("aio:/x") };
        let message = Message::new(kind::LIST_RSP, 7).with(&list);
        let bytes = message.as_bytes();
        assert_eq!((bytes.len(), &bytes[..4]), (544, &[20, 0, 7, 0][..]));
        assert_eq!((bytes[8], bytes[12], bytes[16], &bytes[20..27]), (1, 7, 0x2a, &b"aio:/x\0"[..]));
        let back: List = Message::read_from_bytes(bytes).unwrap().member();
        assert_eq!((back.minor, text(&back.path)), (7, Some("aio:/x")));
    }

    #[test]
    fn a_string_is_cut_at_a_character_and_one_without_nul_is_none() {
        let field: [u8; 4] = string("ab\u{e9}");
        assert_eq!(field, *b"ab\0\0");
        assert_eq!(text(b"abcd"), None);
    }
}
