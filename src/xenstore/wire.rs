//! The XenStore's messages, without I/O. Source: Xen's public header `io/xs_wire.h` and `docs/misc/xenstore.txt`.
#![warn(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use nix::errno::Errno;
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The most bytes that may follow a header (`XENSTORE_PAYLOAD_MAX`).
pub const PAYLOAD_MAX: usize = 4096;

/// Bytes of a header.
pub const HEADER_LEN: usize = size_of::<Header>();

/// What a message is (`enum xsd_sockmsg_type`). A reply has its request's kind, or [`Kind::ERROR`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind(pub u32);

#[allow(missing_docs)] // the header's names
impl Kind {
    pub const DIRECTORY: Kind = Kind(1);
    pub const READ: Kind = Kind(2);
    pub const GET_PERMS: Kind = Kind(3);
    pub const WATCH: Kind = Kind(4);
    pub const UNWATCH: Kind = Kind(5);
    pub const TRANSACTION_START: Kind = Kind(6);
    pub const TRANSACTION_END: Kind = Kind(7);
    pub const WRITE: Kind = Kind(11);
    pub const MKDIR: Kind = Kind(12);
    pub const RM: Kind = Kind(13);
    pub const SET_PERMS: Kind = Kind(14);
    pub const WATCH_EVENT: Kind = Kind(15);
    pub const ERROR: Kind = Kind(16);
}

/// `struct xsd_sockmsg`, in native byte order.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes)]
#[repr(C)]
struct Header {
    kind: u32,
    id: u32,
    tx: u32,
    len: u32,
}

/// A message that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// What it is.
    pub kind: Kind,
    /// Of a reply: the request's.
    pub id: u32,
    /// The transaction, 0 for none.
    pub tx: u32,
    /// At most [`PAYLOAD_MAX`] bytes, of any value.
    pub payload: Vec<u8>,
}

/// A header with more bytes to follow than there may be. Where the next message begins can't be known.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("a message of {0} bytes came from the XenStore; the most is {PAYLOAD_MAX}")]
pub struct TooLong(pub u32);

/// A message with the payload `texts`, each with a NUL behind it, and then `rest`. The caller keeps its length within
/// [`PAYLOAD_MAX`].
pub fn encode(kind: Kind, id: u32, tx: u32, texts: &[&str], rest: &[u8]) -> Vec<u8> {
    let len = payload_len(texts, rest);
    let mut bytes = Vec::with_capacity(HEADER_LEN.saturating_add(len));
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    bytes.extend_from_slice(Header { kind: kind.0, id, tx, len }.as_bytes());
    for text in texts {
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(0);
    }
    bytes.extend_from_slice(rest);
    bytes
}

/// The bytes of such a payload.
pub fn payload_len(texts: &[&str], rest: &[u8]) -> usize {
    texts.iter().fold(rest.len(), |sum, text| sum.saturating_add(text.len()).saturating_add(1))
}

/// Makes messages of a stream of bytes. Keeps no more than one incomplete message beside what was just pushed.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// Where the next message begins.
    at: usize,
}

impl Decoder {
    /// More bytes came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.at);
        self.at = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, if there is one. After an error there is none.
    pub fn pull(&mut self) -> Result<Option<Message>, TooLong> {
        let Ok((header, rest)) = Header::read_from_prefix(&self.bytes[self.at..]) else { return Ok(None) };
        let len = header.len as usize;
        if len > PAYLOAD_MAX {
            return Err(TooLong(header.len));
        }
        let Some(payload) = rest.get(..len) else { return Ok(None) };
        // Of the bytes that there are.
        self.at = self.at.saturating_add(HEADER_LEN).saturating_add(len);
        Ok(Some(Message { kind: Kind(header.kind), id: header.id, tx: header.tx, payload: payload.to_vec() }))
    }
}

/// The texts of a payload, each up to a NUL. Bytes behind the last NUL are a text, too.
pub fn texts(payload: &[u8]) -> impl Iterator<Item = &[u8]> {
    let payload = payload.strip_suffix(b"\0").unwrap_or(payload);
    // An empty payload has no text; that of a single NUL has none that anyone needs.
    payload.split(|byte| *byte == 0).filter(move |_| !payload.is_empty())
}

/// The error that an [`ERROR`](Kind::ERROR)'s payload names (`xsd_errors`); `EIO` for a name that is not known.
pub fn errno(payload: &[u8]) -> Errno {
    match payload.strip_suffix(b"\0").unwrap_or(payload) {
        b"EINVAL" => Errno::EINVAL,
        b"EACCES" => Errno::EACCES,
        b"EEXIST" => Errno::EEXIST,
        b"EISDIR" => Errno::EISDIR,
        b"ENOENT" => Errno::ENOENT,
        b"ENOMEM" => Errno::ENOMEM,
        b"ENOSPC" => Errno::ENOSPC,
        b"ENOTEMPTY" => Errno::ENOTEMPTY,
        b"ENOSYS" => Errno::ENOSYS,
        b"EROFS" => Errno::EROFS,
        b"EBUSY" => Errno::EBUSY,
        b"EAGAIN" => Errno::EAGAIN,
        b"EISCONN" => Errno::EISCONN,
        b"E2BIG" => Errno::E2BIG,
        b"EPERM" => Errno::EPERM,
        _ => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(decoder: &mut Decoder) -> Vec<Message> {
        std::iter::from_fn(|| decoder.pull().unwrap()).collect()
    }

    #[test]
    fn a_request_has_the_layout_of_the_header() {
        let bytes = encode(Kind::WRITE, 7, 9, &["/a"], b"v\0w");
        let words = [11u32, 7, 9, 6];
        assert_eq!(bytes[..16], words.map(u32::to_ne_bytes).concat());
        assert_eq!(&bytes[16..], b"/a\0v\0w");
        assert_eq!(encode(Kind::WATCH, 1, 0, &["p", "t"], b"")[16..], *b"p\0t\0");
    }

    #[test]
    fn messages_come_out_whole_wherever_the_stream_is_split() {
        let sent = [
            (Kind::READ, 1, 0, b"value".to_vec()),
            (Kind::WATCH_EVENT, 0, 0, b"/p\0token\0".to_vec()),
            (Kind::DIRECTORY, 2, 5, Vec::new()),
            (Kind(77), u32::MAX, 1, vec![0xff; 40]),
        ];
        let expected: Vec<_> =
            sent.map(|(kind, id, tx, payload)| Message { kind, id, tx, payload }).into_iter().collect();
        let stream: Vec<u8> = expected
            .iter()
            .flat_map(|message| encode(message.kind, message.id, message.tx, &[], &message.payload))
            .collect();
        for first in 0..=stream.len() {
            for second in first..=stream.len() {
                let mut decoder = Decoder::default();
                let mut found = Vec::new();
                for part in [&stream[..first], &stream[first..second], &stream[second..]] {
                    decoder.push(part);
                    found.extend(all(&mut decoder));
                }
                assert_eq!(found, expected, "split at {first} and {second}");
            }
        }
    }

    #[test]
    fn a_stream_of_single_bytes_is_not_kept() {
        let mut decoder = Decoder::default();
        let message = encode(Kind::READ, 3, 0, &[], &[1; 100]);
        let mut count = 0;
        for byte in message.iter().cycle().take(message.len() * 1000) {
            decoder.push(&[*byte]);
            count += all(&mut decoder).len();
            assert!(decoder.bytes.len() <= message.len());
        }
        assert_eq!(count, 1000);
    }

    #[test]
    fn the_longest_payload_passes_and_one_byte_more_does_not() {
        let mut decoder = Decoder::default();
        decoder.push(&encode(Kind::READ, 1, 0, &[], &[b'x'; PAYLOAD_MAX]));
        assert_eq!(all(&mut decoder)[0].payload.len(), PAYLOAD_MAX);
        for len in [4097, u32::MAX] {
            let mut decoder = Decoder::default();
            decoder.push(Header { kind: 2, id: 1, tx: 0, len }.as_bytes());
            assert_eq!(decoder.pull(), Err(TooLong(len)));
        }
    }

    #[test]
    fn texts_of_a_payload() {
        let split = |payload: &'static [u8]| texts(payload).collect::<Vec<_>>();
        assert_eq!(split(b"a\0bc\0"), [&b"a"[..], b"bc"]);
        assert_eq!(split(b"a\0bc"), [&b"a"[..], b"bc"]);
        assert_eq!(split(b"a\0\0"), [&b"a"[..], b""]);
        assert_eq!(split(b"").len(), 0);
    }

    #[test]
    fn names_of_errors() {
        for name in [
            "EINVAL",
            "EACCES",
            "EEXIST",
            "EISDIR",
            "ENOENT",
            "ENOMEM",
            "ENOSPC",
            "EIO",
            "ENOTEMPTY",
            "ENOSYS",
            "EROFS",
            "EBUSY",
            "EAGAIN",
            "EISCONN",
            "E2BIG",
            "EPERM",
        ] {
            assert_eq!(format!("{:?}", errno(format!("{name}\0").as_bytes())), name);
        }
        assert_eq!(errno(b"ENOENT"), Errno::ENOENT);
        for unknown in [&b"EWHAT\0"[..], b"", b"\0", b"\xff", b"ENOENT\0\0"] {
            assert_eq!(errno(unknown), Errno::EIO);
        }
    }
}
