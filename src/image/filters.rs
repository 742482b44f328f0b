//! Filters: what stands between a guest and its image. Where one is configured, a line in [`add`] opens it.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use drivers::changed_blocks::{ChangedBlocks, HEADER_SIZE, Header, map_len};

use super::file::{Lock, check_place, open_to_write};
use super::{Chain, Error, rights_of};
use crate::config::Image;
use crate::memory;
use crate::stack::HostLayer;
use crate::sys::file::{Backing, geometry};
use crate::sys::io::FileId;

/// Puts the filters that the configuration names before the images of a chain.
pub(super) fn add(image: &Image, chain: &mut Chain) -> Result<(), Error> {
    // Of an image that is not written, there is nothing to mark.
    if let Some(path) = image.changed_blocks.as_deref().filter(|_| !image.read_only) {
        changed_blocks(image, path, chain)?;
    }
    Ok(())
}

/// Opens a log of changed blocks: as an image that is written, through the page cache, and with the rights of who has named it.
fn changed_blocks(image: &Image, path: &Path, chain: &mut Chain) -> Result<(), Error> {
    let io = |action| move |source| Error::Io { path: path.to_owned(), action, source };
    let unfit = |source| Error::ChangedBlocks { path: path.to_owned(), source };
    let _rights = rights_of(image.changed_blocks_by.as_deref(), path)?;
    let file = open_to_write(path, false)?;
    check_place(&file, path, image.changed_blocks_by.as_deref())?;
    let held = file.try_clone().map_err(io("lock it"))?;
    let lock = if image.lock { Lock::take(held, path, false)? } else { Lock::Without(held) };
    let geometry = geometry(&file).map_err(io("read it"))?;
    let mut first = [0; HEADER_SIZE];
    let there = geometry.size.min(HEADER_SIZE as u64) as usize;
    file.read_exact_at(&mut first[..there], 0).map_err(io("read it"))?;
    let header = Header::parse(&first[..there], geometry.size).map_err(unfit)?;
    header.check(geometry.size, chain.info.size).map_err(unfit)?;
    let map = read_map(&file, map_len(header.size()) as usize).map_err(io("read its map"))?;
    let layer = ChangedBlocks::new(header, map, geometry.size, chain.info.size).map_err(unfit)?;
    let mut host = HostLayer::new(Box::new(layer), path, FileId(chain.files.len() as u16), true);
    host.plain.push(file.try_clone().map_err(io("open it"))?);
    host.held = Some(Arc::new(lock));
    chain.layers.insert(0, host);
    chain.files.push(Backing { file, direct: false, block_device: geometry.block_device });
    Ok(())
}

fn read_map(file: &std::fs::File, len: usize) -> io::Result<Vec<u8>> {
    memory::room(len)?;
    let mut map = Vec::new();
    map.try_reserve_exact(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
    map.resize(len, 0);
    file.read_exact_at(&mut map, HEADER_SIZE as u64)?;
    Ok(map)
}
