//! Opens a VHD image and all that it is based on.

use std::sync::Arc;

use drivers::vhd::layout::batmap_pieces;
use drivers::vhd::{Corrupt, Disk, FOOTER_SIZE, Fixed, IN_USE, Image, Parts, Problem, Settings};
use drivers::{Layer, OddSize, Raw};
use nix::errno::Errno;
use slog::info;
use zerocopy::IntoBytes;

use super::{Chain, Error, ToOpen};
use crate::blocking::Blocking;
use crate::chain::{self, Found, Link, Rules};
use crate::config::{ChangedParent, Durability};
use crate::frontend::DiskInfo;
use crate::memory;
use crate::stack::HostLayer;
use crate::store::{self, Store};
use crate::sys::file::CHANGE;
use crate::sys::io::FileId;
use crate::vhd::file::names_outside;

/// Sectors of every VHD.
const SECTOR: u32 = 512;

/// Bytes that a file grows by if nothing is set apart ahead.
const STEP: u64 = 64 << 20;

/// Memory for bitmaps of a layer at least, bytes.
const CACHE_MIN: usize = 96 << 10;

/// Opens the image that the configuration names.
pub(super) fn open(to_open: &ToOpen) -> Result<Chain, Error> {
    let ToOpen { blocking, config, path, .. } = *to_open;
    let image = &config.image;
    // It is locked, and nobody changes it from here on.
    let mut leaf = to_open.store(path, image.read_only, Some(SECTOR))?;
    leaf.lock(blocking)?;
    let rules =
        Rules { folders: &image.parents, changed: image.changed_parent == ChangedParent::Serve, parts: Parts::All };
    let found = read_chain(to_open, leaf, &rules)?;
    let depth = found.len();
    let leaf = &found[0];
    let info = DiskInfo {
        size: leaf.link.image.as_ref().map_or(0, |image| image.size),
        sector_size: SECTOR,
        physical_sector_size: leaf.store.geometry().physical.max(SECTOR),
        read_only: image.read_only,
        name: format!("vhd:{}", path.display()),
    };
    let mut chain = Chain { info, layers: Vec::new(), stores: Vec::new() };
    // Only the leaf is written.
    let mut tickets = if image.read_only { 0 } else { 2 * config.requests as usize };
    for Found { link, store } in found {
        let (store, file): (Arc<dyn Store>, _) = (store.into(), FileId(chain.stores.len() as u16));
        chain.layers.push(layer(to_open, link, &store, file, std::mem::take(&mut tickets), depth)?);
        chain.stores.push(store);
    }
    Ok(chain)
}

/// Finds all images and reads their metadata. Others may be changing that of the leaf: they are waited for.
fn read_chain(to_open: &ToOpen, leaf: Box<dyn Store>, rules: &Rules) -> Result<Vec<Found>, Error> {
    let ToOpen { blocking, config, path, .. } = *to_open;
    let alone = !config.image.read_only && config.image.lock;
    if alone {
        leaf.lock_changes(blocking, CHANGE).map_err(|errno| match errno {
            Errno::EAGAIN => {
                let holder = "a program that changes its metadata, such as vhd-util".into();
                store::Error::Locked { path: path.to_owned(), holder }
            }
            errno => store::Error::Io { path: path.to_owned(), action: "lock its metadata", source: errno.into() },
        })?;
    }
    let found = chain::descend(blocking, leaf, rules, &|path| to_open.store(path, true, Some(SECTOR)))?;
    if alone {
        found[0].store.unlock_changes(blocking).map_err(|errno| store::Error::Io {
            path: path.to_owned(),
            action: "unlock its metadata",
            source: errno.into(),
        })?;
    }
    Ok(found)
}

/// What an image of the chain is served by; one that is written, with so many writes at a time that take metadata.
fn layer(
    to_open: &ToOpen,
    found: Link,
    store: &Arc<dyn Store>,
    file: FileId,
    tickets: usize,
    depth: usize,
) -> Result<HostLayer, Error> {
    let path = &found.path;
    for problem in &found.problems {
        info!(to_open.log, "the image has a flaw, and can be used all the same"; "image" => %path.display(),
            "flaw" => %problem.what);
    }
    let layer: Box<dyn Layer> = match &found.image {
        None => {
            let raw = Raw::new(found.file_size, SECTOR.into(), OddSize::RoundUp);
            Box::new(raw.map_err(|source| Error::Format { path: path.clone(), source })?)
        }
        Some(image) => match Fixed::new(image) {
            Some(fixed) => Box::new(fixed),
            None => Box::new(blocks(to_open, image, &found.problems, &**store, tickets, depth)?),
        },
    };
    let mut host = HostLayer::new(layer, path, file, !store.is_direct());
    if tickets > 0 {
        host.written.push(Arc::clone(store));
    }
    Ok(host)
}

/// An image with blocks. One that is written, with so many writes at a time that take metadata, is marked as in use.
fn blocks(
    to_open: &ToOpen,
    image: &Image,
    problems: &[Problem],
    store: &dyn Store,
    tickets: usize,
    depth: usize,
) -> Result<Disk, Error> {
    let ToOpen { blocking, config, .. } = *to_open;
    let (path, opened) = (store.path(), store.geometry());
    let unfit = |message: &str| store::Error::Unfit { path: path.to_owned(), message: message.to_owned() };
    if image.batmap.as_ref().is_some_and(|batmap| batmap.key_hash.is_some()) {
        return Err(unfit(
            "it is encrypted, which is not supported: its data would be shown as it is, and not as it is meant",
        )
        .into());
    }
    let (device, writable) = (opened.block_device, tickets > 0);
    let explain = |action| move |source| store::Error::Io { path: path.to_owned(), action, source };
    if writable && let Some(what) = names_outside(problems) {
        return Err(unfit(&format!(
            "{what}; it can be served with read_only = true, or be given its parent anew by vhd-util modify -p"
        ))
        .into());
    }
    // Its table, once more: the image says how large it is.
    memory::room(size_of::<u32>() * image.table.blocks() as usize).map_err(explain("have memory for its table"))?;
    // One that was in use when the host stopped has none, and on a device its place is the end all the same.
    let footer_at = image.footer_at.min(opened.size.saturating_sub(FOOTER_SIZE as u64));
    if device && writable && image.end() > footer_at {
        return Err(
            unfit("it takes all of the device, and its last footer has no place; make the device larger").into()
        );
    }
    let mut settings = Settings {
        durability: match config.image.durability {
            Durability::Flush => drivers::Durability::Flush,
            Durability::Order => drivers::Durability::Order,
        },
        zeros: !device,
        usable: if device { footer_at } else { 0 },
        limit: if device { footer_at } else { i64::MAX as u64 },
        step: if config.image.preallocate.0 > 0 { config.image.preallocate.0 } else { STEP },
        preallocate: config.image.preallocate.0 > 0,
        bitmap_cache: (config.image.bitmap_cache.0 as usize / depth).max(CACHE_MIN),
        tickets,
        footer_at: device.then_some(footer_at),
    };
    if writable {
        store.refresh(blocking).map_err(explain("read it anew"))?;
        mark_in_use(blocking, store, image, problems, device.then_some(footer_at))
            .map_err(explain("mark it as in use"))?;
        if !device {
            settings.usable = store.size_now(blocking).map_err(explain("serve it"))?;
        }
    }
    let mut disk = Disk::new(image, &settings).ok_or_else(|| unfit("it has no header"))?;
    if writable && image.footer_at == opened.size {
        disk.was_in_use();
    }
    Ok(disk)
}

/// From here on the copy of the footer counts, as long as the image is in use and if the host stops. What is behind the image in
/// a file is cut off: a new block begins with zeros. On a device the last footer is at byte `footer_at`.
fn mark_in_use(
    blocking: &Blocking,
    store: &dyn Store,
    image: &Image,
    problems: &[Problem],
    footer_at: Option<u64>,
) -> std::io::Result<()> {
    let copy_is_bad = |problem: &Problem| matches!(problem.what, Corrupt::Copy(_) | Corrupt::CopyDiffers);
    if problems.iter().any(copy_is_bad) {
        store.write_at(blocking, 0, image.footer.as_bytes())?;
        store.sync(blocking, false)?;
    }
    if image.batmap_is_stale
        && let Some(batmap) = &image.batmap
    {
        for piece in batmap_pieces(batmap) {
            store.write_at(blocking, piece.at, &piece.bytes)?;
        }
        store.sync(blocking, false)?;
    }
    match footer_at {
        Some(at) => store.write_at(blocking, at, &IN_USE)?,
        None => clear_end(blocking, store, image.end().next_multiple_of(u64::from(SECTOR)))?,
    }
    store.sync(blocking, true)
}

/// Makes a file end at byte `end`, and with a sector of zeros, where its footer is or was: what a guest writes is never there.
fn clear_end(blocking: &Blocking, store: &dyn Store, end: u64) -> std::io::Result<()> {
    let mut there = [0; FOOTER_SIZE];
    let read = store.read_at(blocking, end, &mut there)?;
    // Where there is no room, zeros that are there already need none.
    if there[..read].iter().any(|byte| *byte != 0) {
        store.write_at(blocking, end, &[0; FOOTER_SIZE])?;
    }
    store.set_len(blocking, end + FOOTER_SIZE as u64)
}
