//! `create` and `snapshot`: new images.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use drivers::vhd::layout::{self, Layout, NewImage};
use drivers::vhd::{BLOCK_SIZE, FOOTER_SIZE, Footer, Kind, Parts, Source, Uuid};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use tapdisk::chain::{self, Link, Rules};

use tapdisk::vhd::parent::new_parent;
use tapdisk::volume;

use super::failure::{self, Failure, Result};
use super::file::{ImageFile, Medium, NewFile, forget_image, write_footers, write_pieces};
use super::key::key_hash;
use super::{Create, Snapshot};

/// Bytes of so many MiB.
pub(super) fn mebibytes(count: u64) -> u64 {
    count.saturating_mul(1 << 20)
}

/// Sizes are rounded up to whole blocks, as blktap's are.
pub(super) fn whole_blocks(size: u64) -> u64 {
    size.checked_next_multiple_of(BLOCK_SIZE.into()).unwrap_or(u64::MAX)
}

/// Now, in seconds of Unix.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A new UUID, a random one (RFC 9562, version 4).
pub(super) fn new_uuid() -> Result<Uuid> {
    let path = Path::new("/dev/urandom");
    let mut bytes = [0; 16];
    let mut file = std::fs::File::open(path).map_err(Failure::io(path, "open it"))?;
    file.read_exact(&mut bytes).map_err(Failure::io(path, "read it"))?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(Uuid(bytes))
}

/// Makes an image without a parent.
pub(super) fn create(args: &Create) -> Result<()> {
    let (size, room) = (whole_blocks(mebibytes(args.size)), whole_blocks(mebibytes(args.room.unwrap_or(0))));
    if args.room.is_some() && room < size {
        let text = "the room for growing (-S) must not be less than the size (-s)";
        let line = "Error: <-S size> must be greater than <-s size>".to_owned();
        return Err(Failure::new(Errno::EINVAL, &args.name, text).saying(|_| line));
    }
    if args.reserve {
        return fixed(&args.name, size);
    }
    let new = NewImage { size, room, uuid: new_uuid()?, unix_seconds: now(), parent: None };
    write(&args.name, &Layout::new(&new).map_err(failure::layout(&args.name))?)
}

/// Writes a new image.
fn write(path: &Path, layout: &Layout) -> Result<()> {
    let new = NewFile::create(path)?;
    let file = new.get();
    fits(file, layout.end)?;
    put(file, layout).map_err(Failure::io(&file.path, "write it"))?;
    new.keep()
}

/// Whether a device is large enough for so many bytes and a footer. A file may be, or grows until there is no space left.
pub(super) fn fits(file: &ImageFile, bytes: u64) -> Result<()> {
    let needed = bytes.saturating_add(FOOTER_SIZE as u64);
    let size = file.size().map_err(Failure::io(&file.path, "see its size"))?;
    if file.is_device() && size < needed {
        let text = format!("the device has {size} bytes, and at least {needed} are needed");
        return Err(Failure::new(Errno::ENOSPC, &file.path, text));
    }
    Ok(())
}

/// Writes a new image's metadata. Until the footers are there, it is none, and they come when all the rest is safe.
fn put(to: &dyn Medium, layout: &Layout) -> io::Result<()> {
    forget_image(to)?;
    write_pieces(to, &layout.pieces())?;
    to.sync()?;
    write_footers(to, &layout.footer, layout.end)
}

/// Makes an image all of whose bytes are reserved.
fn fixed(path: &Path, size: u64) -> Result<()> {
    if size == 0 {
        return Err(failure::layout(path)(layout::LayoutError::Empty));
    }
    let footer = Footer::new(Kind::Fixed, size, new_uuid()?, now());
    let new = NewFile::create(path)?;
    let file = new.get();
    fits(file, size)?;
    reserve(file, size).map_err(Failure::io(&file.path, "write it"))?;
    write_footers(file, &footer, size).map_err(Failure::io(&file.path, "write it"))?;
    new.keep()
}

/// Reserves a fixed image's bytes, which read as zeros.
pub(super) fn reserve(file: &ImageFile, size: u64) -> io::Result<()> {
    if file.is_device() {
        forget_image(file)?;
        return file.zero(0, size);
    }
    let len = i64::try_from(size.saturating_add(FOOTER_SIZE as u64)).map_err(|_| Errno::EFBIG)?;
    match fallocate(&*file.file, FallocateFlags::empty(), 0, len) {
        Err(Errno::EOPNOTSUPP) => file.zero(0, size),
        done => Ok(done?),
    }
}

/// Makes a differencing image.
pub(super) fn snapshot(args: &Snapshot, parents: &[PathBuf]) -> Result<()> {
    let given = volume::lasting_name(&args.parent).map_err(Failure::io(&args.parent, "find it"))?;
    let given = if args.raw { raw(&given)? } else { chain::layer(&given)? };
    let size = disk_size(&given);
    let parent = if args.raw || args.even_empty { given } else { not_empty(given, parents)? };
    if let (Some(limit), Some(_)) = (args.limit, &parent.image) {
        let depth = depth(&parent.path, parents)?;
        if depth + 1 > limit {
            let text = format!("its chain would have {} images, more than the limit of {limit}", depth + 1);
            let line = format!("snapshot depth exceeded: current depth: {depth}, limit: {limit}");
            return Err(Failure::new(Errno::ENOSPC, &args.name, text).saying(|_| line));
        }
    }
    let room = whole_blocks(mebibytes(args.room.unwrap_or(0)));
    if args.room.is_some() && room < size {
        let text = format!("the room for growing (-S) is less than the size, which is {size} bytes");
        return Err(Failure::new(Errno::EINVAL, &args.name, text));
    }
    let new_parent = new_parent(&args.name, &parent)?;
    let new = NewImage { size, room, uuid: new_uuid()?, unix_seconds: now(), parent: Some(new_parent) };
    let mut layout = Layout::new(&new).map_err(failure::layout(&args.name))?;
    // The encryption goes on in the child.
    layout.batmap.key_hash = key_hash(parent.image.as_ref());
    write(&args.name, &layout)
}

/// A raw image.
pub(super) fn raw(path: &Path) -> Result<Link> {
    Ok(Link::raw(path)?)
}

/// The size of an image's disk; of a raw one whole sectors.
fn disk_size(layer: &Link) -> u64 {
    layer.image.as_ref().map_or(layer.file_size.next_multiple_of(512), |image| image.size)
}

/// The first of a chain that has a block: an image without one is no use as a parent.
fn not_empty(layer: Link, parents: &[PathBuf]) -> Result<Link> {
    let is_empty = |layer: &Link| {
        let image = layer.image.as_ref().filter(|image| image.kind == Kind::Differencing);
        image.is_some_and(|image| image.table.allocated().next().is_none())
    };
    if !is_empty(&layer) {
        return Ok(layer);
    }
    match chain::chain(&layer.path, &Rules::tool(parents, Parts::All)) {
        Ok(chain) => Ok(chain.into_iter().find(|layer| !is_empty(layer)).unwrap_or(layer)),
        // It is no worse as a parent for being empty.
        Err(chain::Error::Folder { .. }) => Ok(layer),
        Err(error) => Err(error.into()),
    }
}

/// Images of a chain, as `query -d` counts them.
fn depth(path: &Path, parents: &[PathBuf]) -> Result<u32> {
    let layers = chain::chain(path, &Rules::tool(parents, Parts::Heads)).map_err(Failure::from);
    let layers =
        layers.map_err(|failure| failure.saying(|errno| format!("error checking snapshot depth: {errno}")))?;
    Ok(layers.len() as u32)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{self, Memory, crashes};
    use super::*;

    #[test]
    fn a_new_image_is_whole_or_none() {
        let old = testing::image(Kind::Dynamic, true, &[(1, 0..3), (2, 0..8)], 1);
        let uuid = Uuid([9; 16]);
        let new = NewImage { size: 10 << 20, room: 0, uuid, unix_seconds: 1_000_000_000, parent: None };
        let layout = Layout::new(&new).unwrap();
        for start in [Memory::new(Vec::new(), false), old] {
            let before = testing::image_of(&start);
            crashes(
                &start,
                |to| put(to, &layout),
                |after| match testing::image_of(after) {
                    Some(image) if image.footer.uuid == uuid => {
                        assert_eq!((image.size, image.table.allocated().count()), (10 << 20, 0));
                        assert_eq!(testing::fatal(after), None);
                    }
                    // On a device, what was there may still be, but not with other blocks.
                    Some(image) => assert_eq!(Some(image.table), before.as_ref().map(|image| image.table.clone())),
                    None => {}
                },
            );
            put(&start, &layout).unwrap();
            assert_eq!(testing::problems(&start), []);
        }
    }
}
