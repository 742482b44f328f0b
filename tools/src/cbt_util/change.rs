//! What changes a log. What is cut short at any moment leaves one that is right, or none.

use drivers::changed_blocks::{HEADER_SIZE, Header, add, blocks, map_len};
use nix::errno::Errno;

use super::file::{LogFile, NewLog, pieces};
use super::{Coalesce, Create, Failure, Result, Set};

const MAP_AT: u64 = HEADER_SIZE as u64;

pub(super) fn create(args: &Create) -> Result<()> {
    NewLog::begin(&args.name)?.finish(&Header::new(args.size))
}

pub(super) fn set(args: &Set) -> Result<()> {
    // What a tapdisk writes of a log is its map.
    let log = if args.size.is_some() { LogFile::open_map(&args.name)? } else { LogFile::open(&args.name, true)? };
    let mut header = log.header()?;
    // As blktap's: what is no UUID changes nothing.
    let uuid = |text: &Option<String>| text.as_ref().and_then(|text| text.parse().ok());
    header.parent = uuid(&args.parent).unwrap_or(header.parent);
    header.child = uuid(&args.child).unwrap_or(header.child);
    if let Some(flag) = args.flag {
        header.set_consistent(flag);
    }
    if let Some(size) = args.size {
        let before = header.size();
        if size < before {
            let text = format!("it is for a disk of {before} bytes, and no disk becomes smaller, to {size}");
            return Err(Failure::new(Errno::EINVAL, &args.name, text));
        }
        log.check_map(&header)?;
        enlarge(&log, before, size)?;
        header.set_size(size);
    }
    log.write_header(&header, args.size.is_some())
}

/// Has the map of a disk of `before` bytes be one of `size` bytes. Until the header says so, it is the old one.
fn enlarge(log: &LogFile, before: u64, size: u64) -> Result<()> {
    let (old_end, new_end) = (MAP_AT + map_len(before), MAP_AT + map_len(size));
    log.zero(old_end, new_end)?;
    let used = blocks(before) % 8;
    if used != 0 && blocks(size) > blocks(before) {
        let last = log.read(old_end - 1, 1)?[0];
        log.write(old_end - 1, &[last & ((1 << used) - 1)])?;
    }
    Ok(())
}

pub(super) fn coalesce(args: &Coalesce) -> Result<()> {
    let parent = LogFile::open(&args.parent, false)?;
    let older = parent.header()?;
    let child = LogFile::open_map(&args.child)?;
    let newer = child.header()?;
    let len = map_len(older.size());
    if len > map_len(newer.size()) {
        let (parent, older, newer) = (args.parent.display(), older.size(), newer.size());
        let text = format!(
            "it is for a disk of {newer} bytes, and {parent} for one of {older}: cbt-util set -s {older} makes room"
        );
        return Err(Failure::new(Errno::EINVAL, &args.child, text));
    }
    parent.check_map(&older)?;
    child.check_map(&newer)?;
    // Bits are added and none is taken away, so that this can be cut short, and done again.
    for (at, len) in pieces(len) {
        let more = parent.read(MAP_AT + at, len)?;
        let mut map = child.read(MAP_AT + at, len)?;
        if add(&mut map, &more) {
            child.write(MAP_AT + at, &map)?;
        }
    }
    child.sync()
}
