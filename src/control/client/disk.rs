//! blktap's messages to one disk, and XCP-ng's.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use zerocopy::FromZeros;

use super::super::proto::{Blkif, Image, List, Message, PATH_SIZE, Params, Query, kind, open as flag, string, text};
use super::{Connection, TIMEOUT, ask, errno, path, refused, tell};

/// How long CLOSE is tried again while the disk is busy, as in blktap.
const BUSY_MAX: Duration = Duration::from_secs(30);
/// How often.
const BUSY_EACH: Duration = Duration::from_secs(1);

/// What OPEN opens, and RESUME goes on with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Opening<'a> {
    /// `type:path`. Empty, for RESUME: as it was.
    pub image: &'a str,
    /// [`open`](super::super::proto::open) bits; those that say that something of the following is given are added.
    pub flags: u32,
    /// The minor whose image is the parent.
    pub parent: Option<u16>,
    /// Another image.
    pub secondary: Option<&'a str>,
    /// A log of changed blocks.
    pub log: Option<&'a str>,
    /// How long I/O that fails is tried again, seconds; 0: as the tapdisk's configuration says.
    pub timeout_s: u16,
    /// A key, 32 or 64 bytes; empty: none.
    pub key: &'a [u8],
}

impl Opening<'_> {
    /// The message, and what follows it. ENAMETOOLONG: a path has 256 bytes or more.
    fn message(&self, kind: u16, minor: u16) -> io::Result<(Message, Vec<u8>)> {
        let given = |flag, is: bool| if is { flag } else { 0 };
        let mut params = Params::new_zeroed();
        params.path = field("image", self.image)?;
        params.secondary = field("secondary image", self.secondary.unwrap_or_default())?;
        // blktap's tapdisk takes every other number for a parent that is meant.
        params.prt_devnum = self.parent.map_or(u32::MAX, u32::from);
        params.req_timeout = self.timeout_s;
        params.flags = self.flags
            | given(flag::REUSE_PRT, self.parent.is_some())
            | given(flag::SECONDARY, self.secondary.is_some())
            | given(flag::ADD_LOG, self.log.is_some())
            | given(flag::OPEN_ENCRYPTED, !self.key.is_empty());
        let mut more = Vec::new();
        if let Some(log) = self.log {
            more.extend(field::<PATH_SIZE>("log", log)?);
        }
        if !self.key.is_empty() {
            more.push(u8::try_from(self.key.len()).map_err(|_| Errno::EINVAL)?);
            more.extend(self.key);
        }
        Ok((Message::new(kind, minor).with(&params), more))
    }
}

/// A path in a field.
fn field<const N: usize>(what: &str, path: &str) -> io::Result<[u8; N]> {
    if path.contains('\0') {
        return Err(refused(Errno::EINVAL, format!("the {what}'s path has a NUL")));
    }
    if path.len() >= N {
        let text = format!("the {what}'s path has {} bytes, and may have {}", path.len(), N - 1);
        return Err(refused(Errno::ENAMETOOLONG, text));
    }
    Ok(string(path))
}

/// Asks a disk, within [`TIMEOUT`].
fn ask_disk(directory: &Path, pid: i32, kind: u16, minor: u16) -> io::Result<Message> {
    ask(directory, pid, &Message::new(kind, minor), Some(TIMEOUT)).map(|(_, answer)| answer)
}

/// Gives a process a minor to serve. EEXIST: it has it.
pub fn attach(directory: &Path, pid: i32, minor: u16) -> io::Result<()> {
    tell(directory, pid, &Message::new(kind::ATTACH, minor), Some(TIMEOUT))
}

/// Takes a minor from its process, which ends after its last. EBUSY: its image is open.
pub fn detach(directory: &Path, pid: i32, minor: u16) -> io::Result<()> {
    tell(directory, pid, &Message::new(kind::DETACH, minor), Some(TIMEOUT))
}

/// Opens an image, and serves it. It waits as long as that takes, since files can be slow to open.
pub fn open(directory: &Path, pid: i32, minor: u16, opening: &Opening<'_>) -> io::Result<Image> {
    let (request, more) = opening.message(kind::OPEN, minor)?;
    let mut connection = Connection::send(path(directory, pid), &request, &more, None)?;
    connection.expect(kind::OPEN_RSP).map(|answer| answer.member())
}

/// How long another tapdisk may take to say what it serves.
const OTHER: Duration = Duration::from_secs(2);

/// The name and the state of the image that a process has open for a minor. None: none.
pub fn image_of(directory: &Path, pid: i32, minor: u16) -> io::Result<Option<(String, i32)>> {
    let mut connection = Connection::send(path(directory, pid), &Message::new(kind::LIST, minor), &[], Some(OTHER))?;
    let listed: List = connection.expect(kind::LIST_RSP)?.member();
    let name = text(&listed.path).ok_or(Errno::EPROTO)?;
    Ok((listed.count > 0 && !name.is_empty()).then(|| (name.to_owned(), listed.state)))
}

/// Finishes what is under way, flushes, and closes a disk's image; `force` gives up what has not reached the engine. `limit` is for
/// all of it; None: as long as it takes. While the disk is busy (EBUSY) it is tried again, as long as that or for 30 seconds: ETIMEDOUT then.
pub fn close(directory: &Path, pid: i32, minor: u16, force: bool, limit: Option<Duration>) -> io::Result<()> {
    let kind = if force { kind::FORCE_SHUTDOWN } else { kind::CLOSE };
    let end = Instant::now() + limit.unwrap_or(BUSY_MAX);
    loop {
        // All tries together take no longer than that.
        let left = limit.map(|_| end.saturating_duration_since(Instant::now()).max(BUSY_EACH));
        let mut connection = Connection::send(path(directory, pid), &Message::new(kind, minor), &[], left)?;
        match connection.done(kind::CLOSE_RSP) {
            Err(error) if errno(&error) == Errno::EBUSY => {
                if Instant::now() >= end {
                    return Err(refused(Errno::ETIMEDOUT, error.to_string()));
                }
                std::thread::sleep(BUSY_EACH.min(end.saturating_duration_since(Instant::now())));
            }
            other => return other,
        }
    }
}

/// Pauses a disk, and waits until it is: nothing is under way, and its image is closed. `limit` as for [`close`].
pub fn pause(directory: &Path, pid: i32, minor: u16, limit: Option<Duration>) -> io::Result<()> {
    tell(directory, pid, &Message::new(kind::PAUSE, minor), limit)
}

/// Lets a paused disk go on, with another image if one is named. It waits as long as that takes.
pub fn resume(directory: &Path, pid: i32, minor: u16, opening: &Opening<'_>) -> io::Result<()> {
    let (request, more) = opening.message(kind::RESUME, minor)?;
    Connection::send(path(directory, pid), &request, &more, None)?.done(kind::RESUME_RSP)
}

/// The size and the sectors of a disk.
pub fn disk_info(directory: &Path, pid: i32, minor: u16) -> io::Result<Image> {
    ask_disk(directory, pid, kind::DISK_INFO, minor).map(|answer| answer.member())
}

/// Connects a guest's ring, as tapback does. EALREADY: it is connected.
pub fn xenblkif_connect(directory: &Path, pid: i32, minor: u16, blkif: &Blkif) -> io::Result<()> {
    tell(directory, pid, &Message::new(kind::XENBLKIF_CONNECT, minor).with(blkif), Some(TIMEOUT))
}

/// Disconnects a guest's ring, and waits until its requests are finished. The minor does not count. ENODEV: it is not connected.
pub fn xenblkif_disconnect(directory: &Path, pid: i32, minor: u16, blkif: &Blkif) -> io::Result<()> {
    ask(directory, pid, &Message::new(kind::XENBLKIF_DISCONNECT, minor).with(blkif), None).map(drop)
}

/// XCP-ng's: begins to merge an image of a disk's chain, `type:path`, into its parent.
pub fn commit(directory: &Path, pid: i32, minor: u16, name: &str) -> io::Result<()> {
    let (request, _) = Opening { image: name, ..Opening::default() }.message(kind::COMMIT, minor)?;
    tell(directory, pid, &request, Some(TIMEOUT))
}

/// How far a merge is.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Committing {
    /// In a word.
    pub status: String,
    /// How much is merged, of `total`.
    pub current: u64,
    /// How much there is.
    pub total: u64,
}

/// XCP-ng's: how far a merge is.
pub fn query(directory: &Path, pid: i32, minor: u16) -> io::Result<Committing> {
    let query: Query = ask_disk(directory, pid, kind::QUERY_COMMIT, minor)?.member();
    let status = text(&query.status).ok_or(Errno::EPROTO)?.to_owned();
    Ok(Committing { status, current: query.current_progress, total: query.total_progress })
}

/// XCP-ng's: ends a merge. With `wait` it returns when that has ended.
pub fn cancel(directory: &Path, pid: i32, minor: u16, wait: bool) -> io::Result<()> {
    let (request, _) = Opening { flags: wait.into(), ..Opening::default() }.message(kind::CANCEL_COMMIT, minor)?;
    tell(directory, pid, &request, (!wait).then_some(TIMEOUT))
}
