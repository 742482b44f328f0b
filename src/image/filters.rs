//! Filters: what stands between a guest and its image. Where one is configured, a line in [`add`] opens it.

use std::path::Path;
use std::sync::Arc;

use drivers::Throttle;
use drivers::changed_blocks::{ChangedBlocks, HEADER_SIZE, Header, map_len};
use drivers::vhd::Source;

use super::{Chain, Error, ToOpen, rights_of};
use crate::blocking::Blocking;
use crate::config::{Config, Direct};
use crate::memory;
use crate::stack::HostLayer;
use crate::store::{self, How, Store};
use crate::sys::io::FileId;

/// Puts the filters that the configuration names before the images of a chain.
pub(super) fn add(to_open: &ToOpen, chain: &mut Chain) -> Result<(), Error> {
    let image = &to_open.config.image;
    // Of an image that is not written, there is nothing to mark.
    if let Some(path) = image.changed_blocks.as_deref().filter(|_| !image.read_only) {
        changed_blocks(to_open, path, chain)?;
    }
    throttle(to_open.config, &mut chain.layers);
    Ok(())
}

/// The throttle is there without limits, too, so that some can be set. It is asked first: what it holds back nobody else has seen.
pub(super) fn throttle(config: &Config, layers: &mut Vec<HostLayer>) {
    layers.insert(0, HostLayer::without_file(Box::new(Throttle::new(config.throttle.limits()))));
}

/// Opens a log of changed blocks: through the page cache, with the rights of who has named it, and for this disk alone.
fn changed_blocks(to_open: &ToOpen, path: &Path, chain: &mut Chain) -> Result<(), Error> {
    let (blocking, image) = (to_open.blocking, &to_open.config.image);
    let by = image.changed_blocks_by.as_deref();
    let _rights = rights_of(by, path)?;
    let (direct, sector_size) = (Direct::Off, None);
    let how = How { read_only: false, metadata: true, direct, sector_size, lock: image.lock, log: true, by };
    let mut store = (to_open.open)(blocking, path, &how, to_open.log)?;
    store.lock(blocking)?;
    let layer = read(blocking, &*store, chain.info.size)?;
    let mut host = HostLayer::new(Box::new(layer), path, FileId(chain.stores.len() as u16), true);
    let store: Arc<dyn Store> = store.into();
    host.written.push(Arc::clone(&store));
    chain.layers.insert(0, host);
    chain.stores.push(store);
    Ok(())
}

/// The log in a store, of a disk with so many bytes.
fn read(blocking: &Blocking, store: &dyn Store, disk: u64) -> Result<ChangedBlocks, Error> {
    let io = |action| move |source| store::Error::Io { path: store.path().to_owned(), action, source };
    let unfit = |source| Error::ChangedBlocks { path: store.path().to_owned(), source };
    let reader = store.reading(blocking);
    let len = reader.size().map_err(io("read it"))?;
    let mut first = [0; HEADER_SIZE];
    let there = len.min(HEADER_SIZE as u64) as usize;
    reader.read_at(0, &mut first[..there]).map_err(io("read it"))?;
    let header = Header::parse(&first[..there], len).map_err(unfit)?;
    header.check(len, disk).map_err(unfit)?;
    let bytes = map_len(header.size()) as usize;
    let room = memory::room(bytes).and_then(|()| {
        let mut map = Vec::new();
        map.try_reserve_exact(bytes).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
        map.resize(bytes, 0);
        Ok(map)
    });
    let mut map = room.map_err(io("have memory for its map"))?;
    reader.read_at(HEADER_SIZE as u64, &mut map).map_err(io("read its map"))?;
    ChangedBlocks::new(header, map, len, disk).map_err(unfit)
}
