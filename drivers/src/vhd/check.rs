//! All that is wrong with an image, beyond what it can't be used with.

use std::collections::BTreeSet;

use super::image::{Image, Problem, ReadError, Source, read, size};
use super::{Corrupt, Header, Kind, Table, bitmap, unix_seconds};
use crate::SECTOR_SIZE;

/// How far a time may be in the future, seconds: clocks of hosts that share a file system differ (blktap's check).
const CLOCK_SLACK: u64 = 1800;

/// How the creator tap names itself.
const TAP: [u8; 4] = *b"tap\0";
/// Its version from which on all images have a batmap.
const BATMAP_SINCE: u32 = 0x0001_0002;

/// Problems of a kind that are told of: an image can have millions of blocks, each with its own.
const TOLD_MAX: usize = 1000;

/// Sectors of data that are looked at together: a block can have half a million.
const LOOKED_AT: u32 = 2048;

impl Image {
    /// All that is wrong with an image, at a time in seconds of Unix. Of its blocks only the places are looked at.
    pub fn check(source: &dyn Source, now: u64) -> Result<Vec<Problem>, ReadError> {
        let mut problems = Vec::new();
        let image = match Image::read(source, &mut problems) {
            Ok(image) => image,
            Err(ReadError::Corrupt(what)) => {
                problems.push(Problem { what, fatal: true });
                return Ok(problems);
            }
            Err(error) => return Err(error),
        };
        let mut found: Vec<_> = image.footer.oddities().map(|why| Corrupt::Odd { what: "footer", why }).collect();
        found.extend(future("footer", image.footer.timestamp.get(), now));
        if let Some(header) = &image.header {
            found.extend(check_header(&image, header, now));
            found.extend(check_batmap(&image, header));
            found.extend(check_unused(source, &image, header)?);
        }
        problems.extend(found.into_iter().map(|what| Problem { what, fatal: false }));
        Ok(problems)
    }

    /// All that is wrong with the bitmaps of an image's blocks. Of the data it reads what the bitmaps say is not there.
    pub fn check_bitmaps(source: &dyn Source) -> Result<Vec<Problem>, ReadError> {
        let image = Image::read(source, &mut Vec::new())?;
        let mut found = Vec::new();
        let Some(header) = &image.header else { return Ok(Vec::new()) };
        let sectors = (u64::from(header.block_size()) / SECTOR_SIZE) as u32;
        for (block, at) in image.table.allocated() {
            if found.len() >= TOLD_MAX {
                found.push(Corrupt::More { what: "bitmaps" });
                break;
            }
            let bits = read(source, at, header.bitmap_size())?;
            let own = bitmap::own_sectors(image.size, header.block_size().into(), block);
            if image.batmap.as_ref().is_some_and(|batmap| batmap.is_full(block)) && !bitmap::is_full(&bits, own) {
                found.push(Corrupt::NotFull { block });
            }
            // Others set all bits of a disk's last block, whatever of it the disk has.
            let end = if image.footer.creator == TAP { own } else { sectors };
            if bitmap::runs(&bits, end..8 * bits.len() as u32).any(|(set, _)| set) {
                found.push(Corrupt::BitmapBeyond { block });
            }
            if let Some(sector) = hidden_data(source, at + header.bitmap_size(), &bits, own)? {
                found.push(Corrupt::HiddenData { block, sector });
            }
        }
        Ok(found.into_iter().map(|what| Problem { what, fatal: false }).collect())
    }
}

fn future(what: &'static str, timestamp: u32, now: u64) -> Option<Corrupt> {
    let seconds = unix_seconds(timestamp).saturating_sub(now);
    (seconds > CLOCK_SLACK).then_some(Corrupt::Future { what, seconds })
}

/// The header and what it says of the parent.
fn check_header(image: &Image, header: &Header, now: u64) -> Vec<Corrupt> {
    let parent = image.kind == Kind::Differencing;
    let mut found: Vec<_> = header.oddities(parent).map(|why| Corrupt::Odd { what: "header", why }).collect();
    if !parent {
        return found;
    }
    found.extend(future("parent", header.parent_timestamp.get(), now));
    let mut seen = BTreeSet::new();
    for locator in &header.locators {
        found.extend(locator.oddities().map(|why| Corrupt::Odd { what: "parent locator", why }));
        if let Some(platform) = locator.platform()
            && !seen.insert(platform as u8)
        {
            found.push(Corrupt::Odd { what: "parent locator", why: "is the second for its platform" });
        }
    }
    let expected = header.parent_name().unwrap_or_default();
    for (_, path) in &image.parents {
        let name = path.rsplit('/').next().unwrap_or(path);
        // A header has room for less of a long name.
        if name != expected && !(expected.encode_utf16().count() == 256 && name.starts_with(&expected)) {
            found.push(Corrupt::LocatorName { found: name.to_owned(), expected: expected.clone() });
        }
    }
    found
}

/// The batmap against the table. None is an oddity only where blktap would have made one.
fn check_batmap(image: &Image, header: &Header) -> Vec<Corrupt> {
    let Some(batmap) = &image.batmap else {
        let expected = image.footer.creator == TAP && image.footer.creator_version.get() >= BATMAP_SINCE;
        let why = "is not there, and blktap does not use its images without it";
        return if expected { vec![Corrupt::Odd { what: "batmap", why }] } else { Vec::new() };
    };
    let mut found = Vec::new();
    if (8 * batmap.bits().len() as u64) < u64::from(header.entries()) {
        found.push(Corrupt::Odd { what: "batmap", why: "has fewer bits than the table has entries" });
    }
    if !batmap.bits_at.is_multiple_of(SECTOR_SIZE) {
        found.push(Corrupt::Odd { what: "batmap", why: "has its bits at a byte that begins no sector" });
    }
    found
}

/// Entries of the table beyond the disk's blocks, as far as the file has them.
fn check_unused(source: &dyn Source, image: &Image, header: &Header) -> Result<Vec<Corrupt>, ReadError> {
    let (blocks, entries) = (image.table.blocks(), header.entries());
    let (at, len) = (header.table_at() + 4 * u64::from(blocks), 4 * u64::from(entries - blocks));
    if at + len > size(source)? {
        return Ok(Vec::new());
    }
    let rest = Table::parse(&read(source, at, len)?, entries - blocks);
    let rest = rest.map_err(|_| ReadError::memory(at, len as usize))?;
    // Zeros are what a shrunk disk leaves; nothing can be there.
    let mut used = rest.allocated().filter(|(_, at)| *at != 0);
    let told = used.by_ref().take(TOLD_MAX).map(|(block, at)| Corrupt::BlockBeyond { block: blocks + block, at });
    let mut told: Vec<_> = told.collect();
    told.extend(used.next().map(|_| Corrupt::More { what: "places of blocks beyond the disk's end" }));
    Ok(told)
}

/// The first sector of a block that is not zero although its bit is not set.
fn hidden_data(source: &dyn Source, at: u64, bits: &[u8], sectors: u32) -> Result<Option<u32>, ReadError> {
    for (_, run) in bitmap::runs(bits, 0..sectors).filter(|(set, _)| !set) {
        for start in run.clone().step_by(LOOKED_AT as usize) {
            let len = u64::from(LOOKED_AT.min(run.end - start)) * SECTOR_SIZE;
            let data = read(source, at + u64::from(start) * SECTOR_SIZE, len)?;
            if let Some(byte) = data.iter().position(|byte| *byte != 0) {
                return Ok(Some(start + (byte as u64 / SECTOR_SIZE) as u32));
            }
        }
    }
    Ok(None)
}
