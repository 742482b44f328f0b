//! Opens a VHD image and all that it is based on.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use drivers::vhd::layout::batmap_pieces;
use drivers::vhd::{Corrupt, Disk, FOOTER_SIZE, Fixed, IN_USE, Image, Parts, Problem, Settings};
use drivers::{Layer, OddSize, Raw};
use nix::errno::Errno;
use slog::{Logger, info};
use zerocopy::IntoBytes;

use super::file::{self, Opened};
use super::{Chain, Error};
use crate::chain::{self, Rules};
use crate::config::{ChangedParent, Config, Durability};
use crate::frontend::DiskInfo;
use crate::memory;
use crate::stack::HostLayer;
use crate::sys::file::{Backing, CHANGE, forget_cached, geometry, lock_changes, same_file, unlock_changes};
use crate::sys::io::FileId;
use crate::vhd::file::names_outside;

/// Sectors of every VHD.
const SECTOR: u32 = 512;

/// Bytes that a file grows by if nothing is set apart ahead.
const STEP: u64 = 64 << 20;

/// Memory for bitmaps of a layer at least, bytes.
const CACHE_MIN: usize = 96 << 10;

/// Opens an image whose leaf is in the file `path`.
pub(super) fn open(config: &Config, path: &Path, log: &Logger) -> Result<Chain, Error> {
    let image = &config.image;
    let open = |path: &Path, read_only| file::open(image, path, read_only, Some(SECTOR), log);
    // It is locked, and nobody changes it from here on.
    let leaf = open(path, image.read_only)?;
    let rules =
        Rules { folders: &image.parents, changed: image.changed_parent == ChangedParent::Serve, parts: Parts::All };
    let layers = read_chain(path, &leaf, image.read_only || !image.lock, &rules)?;
    let depth = layers.len();
    let tickets = if image.read_only { 0 } else { 2 * config.requests as usize };
    let info = DiskInfo {
        size: layers[0].image.as_ref().map_or(0, |image| image.size),
        sector_size: SECTOR,
        physical_sector_size: leaf.geometry.physical.max(SECTOR),
        read_only: image.read_only,
        name: format!("vhd:{}", path.display()),
    };
    let mut chain = Chain { info, layers: Vec::new(), files: Vec::new(), locks: Vec::new() };
    let mut leaf = Some(leaf);
    for found in layers {
        // Only the leaf is written.
        let (opened, tickets) = match leaf.take() {
            Some(leaf) => (leaf, tickets),
            None => (open(&found.path, true)?, 0),
        };
        found.is(&opened.file)?;
        let file = FileId(chain.files.len() as u16);
        chain.layers.push(layer(config, found, &opened, file, tickets, depth, log)?);
        let Opened { file, direct, geometry, lock, .. } = opened;
        chain.files.push(Backing { file, direct, block_device: geometry.block_device });
        chain.locks.push(lock);
    }
    Ok(chain)
}

/// Reads the metadata of all images. Others may be changing that of the leaf: they are waited for.
fn read_chain(path: &Path, leaf: &Opened, unlocked: bool, rules: &Rules) -> Result<Vec<chain::Link>, Error> {
    if unlocked {
        return Ok(chain::chain(path, rules)?);
    }
    lock_changes(&leaf.file, CHANGE).map_err(|errno| match errno {
        Errno::EAGAIN => {
            let holder = "a program that changes its metadata, such as vhd-util".into();
            Error::Locked { path: path.to_owned(), holder }
        }
        errno => Error::Io { path: path.to_owned(), action: "lock its metadata", source: errno.into() },
    })?;
    let layers = chain::chain(path, rules);
    unlock_changes(&leaf.file).map_err(|errno| Error::Io {
        path: path.to_owned(),
        action: "unlock its metadata",
        source: errno.into(),
    })?;
    Ok(layers?)
}

/// What an image of the chain is served by.
fn layer(
    config: &Config,
    found: chain::Link,
    opened: &Opened,
    file: FileId,
    tickets: usize,
    depth: usize,
    log: &Logger,
) -> Result<HostLayer, Error> {
    let path = found.path;
    for problem in &found.problems {
        info!(log, "the image has a flaw, and can be used all the same"; "image" => %path.display(),
            "flaw" => %problem.what);
    }
    let mut plain = None;
    let layer: Box<dyn Layer> = match &found.image {
        None => {
            let raw = Raw::new(found.file_size, SECTOR.into(), OddSize::RoundUp);
            Box::new(raw.map_err(|source| Error::Format { path: path.clone(), source })?)
        }
        Some(image) => match Fixed::new(image) {
            Some(fixed) => {
                plain = (tickets > 0).then(|| plain_file(opened, &path)).transpose()?;
                Box::new(fixed)
            }
            None => {
                let disk;
                (disk, plain) = blocks(config, &path, image, &found.problems, opened, tickets, depth)?;
                Box::new(disk)
            }
        },
    };
    let mut host = HostLayer::new(layer, &path, file, !opened.direct);
    host.plain.extend(plain);
    Ok(host)
}

/// The same file once more, for what is written through the page cache.
fn plain_file(opened: &Opened, path: &Path) -> Result<File, Error> {
    let explain = |source| Error::Io { path: path.to_owned(), action: "open it", source };
    let file = file::options(false, false).open(path).map_err(explain)?;
    match file.metadata() {
        Ok(meta) if same_file(&meta, &opened.file) => Ok(file),
        _ => Err(chain::Error::Replaced { path: path.to_owned() }.into()),
    }
}

/// An image with blocks. One that is written, with so many writes at a time that take metadata, is marked as in use.
fn blocks(
    config: &Config,
    path: &Path,
    image: &Image,
    problems: &[Problem],
    opened: &Opened,
    tickets: usize,
    depth: usize,
) -> Result<(Disk, Option<File>), Error> {
    if image.batmap.as_ref().is_some_and(|batmap| batmap.key_hash.is_some()) {
        let message =
            "it is encrypted, which is not supported: its data would be shown as it is, and not as it is meant";
        return Err(Error::Unfit { path: path.to_owned(), message: message.into() });
    }
    let (device, writable) = (opened.geometry.block_device, tickets > 0);
    let explain = |action| move |source| Error::Io { path: path.to_owned(), action, source };
    let unfit = |message: &str| Error::Unfit { path: path.to_owned(), message: message.to_owned() };
    if writable && let Some(what) = names_outside(problems) {
        return Err(unfit(&format!(
            "{what}; it can be served with read_only = true, or be given its parent anew by vhd-util modify -p"
        )));
    }
    // Its table, once more: the image says how large it is.
    memory::room(size_of::<u32>() * image.table.blocks() as usize).map_err(explain("have memory for its table"))?;
    // One that was in use when the host stopped has none, and on a device its place is the end all the same.
    let footer_at = image.footer_at.min(opened.geometry.size.saturating_sub(FOOTER_SIZE as u64));
    if device && writable && image.end() > footer_at {
        return Err(unfit("it takes all of the device, and its last footer has no place; make the device larger"));
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
    let mut plain = None;
    if writable {
        let file = plain_file(opened, path)?;
        forget_cached(&file).map_err(|errno| explain("read it anew")(errno.into()))?;
        mark_in_use(&file, image, problems, device.then_some(footer_at)).map_err(explain("mark it as in use"))?;
        if !device {
            settings.usable = geometry(&file).map_err(explain("serve it"))?.size;
        }
        plain = Some(file);
    }
    let mut disk = Disk::new(image, &settings).ok_or_else(|| unfit("it has no header"))?;
    if writable && image.footer_at == opened.geometry.size {
        disk.was_in_use();
    }
    Ok((disk, plain))
}

/// From here on the copy of the footer counts, as long as the image is in use and if the host stops. What is behind the image in
/// a file is cut off: a new block begins with zeros. On a device the last footer is at byte `footer_at`.
fn mark_in_use(file: &File, image: &Image, problems: &[Problem], footer_at: Option<u64>) -> std::io::Result<()> {
    let copy_is_bad = |problem: &Problem| matches!(problem.what, Corrupt::Copy(_) | Corrupt::CopyDiffers);
    if problems.iter().any(copy_is_bad) {
        file.write_all_at(image.footer.as_bytes(), 0)?;
        file.sync_data()?;
    }
    if image.batmap_is_stale
        && let Some(batmap) = &image.batmap
    {
        for piece in batmap_pieces(batmap) {
            file.write_all_at(&piece.bytes, piece.at)?;
        }
        file.sync_data()?;
    }
    match footer_at {
        Some(at) => file.write_all_at(&IN_USE, at)?,
        None => clear_end(file, image.end().next_multiple_of(u64::from(SECTOR)))?,
    }
    file.sync_all()
}

/// Makes a file end at byte `end`, and with a sector of zeros, where its footer is or was: what a guest writes is never there.
fn clear_end(file: &File, end: u64) -> std::io::Result<()> {
    let mut there = [0; FOOTER_SIZE];
    let read = file.read_at(&mut there, end)?;
    // Where there is no room, zeros that are there already need none.
    if there[..read].iter().any(|byte| *byte != 0) {
        file.write_all_at(&[0; FOOTER_SIZE], end)?;
    }
    file.set_len(end + FOOTER_SIZE as u64)
}
