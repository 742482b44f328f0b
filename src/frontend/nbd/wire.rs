//! Messages as bytes: section "Values" and the message layouts of the
//! [NBD protocol](https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md). All numbers are big-endian.
#![warn(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use nix::errno::Errno;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of the server's greeting.
pub const MAGIC: [u8; 8] = *b"NBDMAGIC";
/// Second half of the greeting, and the first bytes of every option.
pub const OPTION_MAGIC: [u8; 8] = *b"IHAVEOPT";
/// Where nothing is negotiated (oldstyle).
pub const OLD_MAGIC: [u8; 8] = [0, 0, 0x42, 0x02, 0x81, 0x86, 0x12, 0x53];
/// First bytes of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First bytes of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First bytes of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// NBD_FLAG_FIXED_NEWSTYLE and NBD_FLAG_C_FIXED_NEWSTYLE.
pub const HANDSHAKE_FIXED_NEWSTYLE: u16 = 1 << 0;
/// NBD_FLAG_NO_ZEROES and NBD_FLAG_C_NO_ZEROES.
pub const HANDSHAKE_NO_ZEROES: u16 = 1 << 1;

/// NBD_FLAG_HAS_FLAGS.
pub const FLAG_HAS_FLAGS: u16 = 1 << 0;
/// NBD_FLAG_READ_ONLY.
pub const FLAG_READ_ONLY: u16 = 1 << 1;
/// NBD_FLAG_SEND_FLUSH.
pub const FLAG_SEND_FLUSH: u16 = 1 << 2;
/// NBD_FLAG_SEND_FUA.
pub const FLAG_SEND_FUA: u16 = 1 << 3;
/// NBD_FLAG_SEND_TRIM.
pub const FLAG_SEND_TRIM: u16 = 1 << 5;
/// NBD_FLAG_SEND_WRITE_ZEROES.
pub const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// NBD_FLAG_SEND_DF.
pub const FLAG_SEND_DF: u16 = 1 << 7;
/// NBD_FLAG_CAN_MULTI_CONN.
pub const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

/// NBD_OPT_EXPORT_NAME.
pub const OPT_EXPORT_NAME: u32 = 1;
/// NBD_OPT_ABORT.
pub const OPT_ABORT: u32 = 2;
/// NBD_OPT_LIST.
pub const OPT_LIST: u32 = 3;
/// NBD_OPT_STARTTLS.
pub const OPT_STARTTLS: u32 = 5;
/// NBD_OPT_INFO.
pub const OPT_INFO: u32 = 6;
/// NBD_OPT_GO.
pub const OPT_GO: u32 = 7;
/// NBD_OPT_STRUCTURED_REPLY.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// NBD_OPT_LIST_META_CONTEXT.
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// NBD_OPT_SET_META_CONTEXT.
pub const OPT_SET_META_CONTEXT: u32 = 10;

/// NBD_REP_ACK.
pub const REP_ACK: u32 = 1;
/// NBD_REP_SERVER.
pub const REP_SERVER: u32 = 2;
/// NBD_REP_INFO.
pub const REP_INFO: u32 = 3;
/// NBD_REP_META_CONTEXT.
pub const REP_META_CONTEXT: u32 = 4;
/// NBD_REP_ERR_UNSUP.
pub const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
/// NBD_REP_ERR_INVALID.
pub const REP_ERR_INVALID: u32 = (1 << 31) + 3;
/// NBD_REP_ERR_UNKNOWN.
pub const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
/// NBD_REP_ERR_TOO_BIG.
pub const REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;

/// NBD_INFO_EXPORT.
pub const INFO_EXPORT: u16 = 0;
/// NBD_INFO_NAME.
pub const INFO_NAME: u16 = 1;
/// NBD_INFO_DESCRIPTION.
pub const INFO_DESCRIPTION: u16 = 2;
/// NBD_INFO_BLOCK_SIZE.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// NBD_CMD_READ.
pub const CMD_READ: u16 = 0;
/// NBD_CMD_WRITE.
pub const CMD_WRITE: u16 = 1;
/// NBD_CMD_DISC.
pub const CMD_DISC: u16 = 2;
/// NBD_CMD_FLUSH.
pub const CMD_FLUSH: u16 = 3;
/// NBD_CMD_TRIM.
pub const CMD_TRIM: u16 = 4;
/// NBD_CMD_WRITE_ZEROES.
pub const CMD_WRITE_ZEROES: u16 = 6;
/// NBD_CMD_BLOCK_STATUS.
pub const CMD_BLOCK_STATUS: u16 = 7;

/// NBD_CMD_FLAG_FUA.
pub const CMD_FLAG_FUA: u16 = 1 << 0;
/// NBD_CMD_FLAG_NO_HOLE.
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// NBD_CMD_FLAG_DF.
pub const CMD_FLAG_DF: u16 = 1 << 2;
/// NBD_CMD_FLAG_REQ_ONE.
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;

/// NBD_REPLY_FLAG_DONE.
pub const CHUNK_DONE: u16 = 1 << 0;
/// NBD_REPLY_TYPE_OFFSET_DATA.
pub const CHUNK_OFFSET_DATA: u16 = 1;
/// NBD_REPLY_TYPE_BLOCK_STATUS.
pub const CHUNK_BLOCK_STATUS: u16 = 5;
/// NBD_REPLY_TYPE_ERROR.
pub const CHUNK_ERROR: u16 = (1 << 15) + 1;
/// NBD_REPLY_TYPE_ERROR_OFFSET.
pub const CHUNK_ERROR_OFFSET: u16 = (1 << 15) + 2;

/// The metadata context that tells data from holes.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The number that we give it.
pub const BASE_ALLOCATION_ID: u32 = 1;
/// NBD_STATE_HOLE and NBD_STATE_ZERO: what a hole is in `base:allocation`.
pub const STATE_HOLE_ZERO: u32 = 3;

/// The most bytes of a name or other string.
pub const MAX_STRING: u32 = 4096;

/// The head of an option, before its data.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionHead {
    /// [`OPTION_MAGIC`].
    pub magic: [u8; 8],
    /// Which option.
    pub option: U32,
    /// Bytes of data that follow.
    pub length: U32,
}

/// The head of a reply to an option.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionReplyHead {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option that it answers.
    pub option: U32,
    /// What it says.
    pub kind: U32,
    /// Bytes of data that follow.
    pub length: U32,
}

/// A request in the transmission phase, before the data of a write.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RequestHead {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// Command flags.
    pub flags: U16,
    /// Command.
    pub command: U16,
    /// The client's mark, which the reply repeats.
    pub cookie: [u8; 8],
    /// First byte of the disk.
    pub offset: U64,
    /// Bytes.
    pub length: U32,
}

/// A simple reply, before the data of a read.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SimpleReply {
    /// [`SIMPLE_REPLY_MAGIC`].
    pub magic: U32,
    /// 0, or what [`error`] gives.
    pub error: U32,
    /// That of the request.
    pub cookie: [u8; 8],
}

/// The head of a chunk of a structured reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkHead {
    /// [`CHUNK_MAGIC`].
    pub magic: U32,
    /// [`CHUNK_DONE`] or nothing.
    pub flags: U16,
    /// What it has.
    pub kind: U16,
    /// That of the request.
    pub cookie: [u8; 8],
    /// Bytes that follow.
    pub length: U32,
}

/// Bytes that begin a [`CHUNK_OFFSET_DATA`]: where its data is from.
pub type OffsetData = U64;

/// What follows the head of a [`CHUNK_ERROR`]; its message is empty.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkError {
    /// What [`error`] gives.
    pub error: U32,
    /// 0.
    pub message_length: U16,
}

/// What follows the head of a [`CHUNK_ERROR_OFFSET`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkErrorOffset {
    /// The error.
    pub error: ChunkError,
    /// Byte of the disk where it arose.
    pub offset: U64,
}

/// A descriptor of a [`CHUNK_BLOCK_STATUS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Descriptor {
    /// Bytes of the disk.
    pub length: U32,
    /// 0 or [`STATE_HOLE_ZERO`].
    pub status: U32,
}

/// The protocol's number of an error (section "Error values").
pub fn error(errno: Errno) -> u32 {
    match errno {
        Errno::EPERM | Errno::EROFS | Errno::EACCES => 1,
        Errno::ENOMEM => 12,
        Errno::EINVAL => 22,
        Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG => 28,
        Errno::EOVERFLOW => 75,
        Errno::EOPNOTSUPP => 95,
        Errno::ESHUTDOWN => 108,
        _ => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_sizes_of_the_protocol() {
        assert_eq!(size_of::<OptionHead>(), 16);
        assert_eq!(size_of::<OptionReplyHead>(), 20);
        assert_eq!(size_of::<RequestHead>(), 28);
        assert_eq!(size_of::<SimpleReply>(), 16);
        assert_eq!(size_of::<ChunkHead>(), 20);
        assert_eq!(size_of::<ChunkErrorOffset>(), 14);
    }

    #[test]
    fn errors_are_those_that_the_protocol_knows() {
        let known = [
            (Errno::EPERM, 1),
            (Errno::EROFS, 1),
            (Errno::EIO, 5),
            (Errno::ENOMEM, 12),
            (Errno::EINVAL, 22),
            (Errno::ENOSPC, 28),
            (Errno::EOVERFLOW, 75),
            (Errno::EOPNOTSUPP, 95),
            (Errno::ESHUTDOWN, 108),
            (Errno::ENODEV, 5),
            (Errno::ETIMEDOUT, 5),
        ];
        for (errno, number) in known {
            assert_eq!(error(errno), number, "{errno}");
        }
    }
}
