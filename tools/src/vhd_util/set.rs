//! `set` and `modify`: changes of an image's metadata.

use std::path::Path;

use drivers::vhd::layout::{self, Piece, batmap_pieces};
use drivers::vhd::{FOOTER_SIZE, Image, Kind, Source, Table};
use nix::errno::Errno;
use tapdisk::chain;
use zerocopy::IntoBytes;

use super::create::{new_parent, raw};
use super::failure::{self, Failure, Result, errno_of};
use super::file::{ImageFile, Medium, cut_footer, end_of_data, footer_place, write_footers, write_pieces};
use super::{Field, Modify, Set};

/// Opens an image for writing, and says so as storage managers know it if that can't be.
pub(super) fn open(path: &Path) -> Result<(ImageFile, Image)> {
    let opened = ImageFile::open(path).and_then(|file| Ok((file.image()?, file)));
    let (image, file) =
        opened.map_err(|failure| failure.saying(|errno| format!("error opening {}: {errno}", path.display())))?;
    Ok((file, image))
}

/// Sets a field.
pub(super) fn set(args: &Set) -> Result<()> {
    let (file, mut image) = open(&args.name)?;
    match args.field {
        Field::Hidden => {
            image.footer.set_hidden_value(args.value);
            let written = write_footers(&file, &image.footer, end_of_data(&image));
            written.or_else(|error| match errno_of(&error) {
                // The copy is written by now, and a full disk is no reason not to hide what is to be deleted.
                Errno::ENOSPC if args.value != 0 && image.kind != Kind::Fixed => Ok(()),
                _ => Err(file.failed()(error)),
            })
        }
        Field::Marker => {
            let batmap = image.batmap.as_mut().ok_or_else(|| no_batmap(&args.name))?;
            batmap.marker = args.value;
            let header = &batmap_pieces(batmap)[1..];
            write_pieces(&file, header).and_then(|()| file.sync()).map_err(file.failed())
        }
    }
}

/// Of an image that has no batmap, where there must be one.
pub(super) fn no_batmap(path: &Path) -> Failure {
    Failure::new(Errno::EINVAL, path, "it has no batmap, which is where that is kept: blktap's images have one")
}

/// Changes the parent, the footer's place, or all data.
pub(super) fn modify(args: &Modify) -> Result<()> {
    let (file, mut image) = open(&args.name)?;
    if args.zero {
        zero(&file, &mut image).map_err(|failure| failure.saying(|errno| format!("failed to zero VHD: {errno}")))?;
    }
    if let Some(size) = args.size {
        move_footer(&file, &image, size)
            .map_err(|failure| failure.saying(|errno| format!("failed to set physical size to {size}: {errno}")))?;
    }
    if let Some(parent) = &args.parent {
        set_parent(&file, &mut image, parent, args.raw).map_err(|failure| {
            failure.saying(|errno| format!("failed to set parent to '{}': {errno}", parent.display()))
        })?;
    }
    Ok(())
}

/// Forgets all blocks: first the table, without which nothing else counts.
fn zero(file: &ImageFile, image: &mut Image) -> Result<()> {
    let Some(header) = &image.header else {
        return Err(Failure::new(Errno::ENOSYS, &file.path, "a fixed image has no blocks that could be forgotten"));
    };
    image.table = Table::empty(image.table.blocks());
    let table = table_piece(header.table_at(), &image.table);
    write_pieces(file, &[table]).and_then(|()| file.sync()).map_err(file.failed())?;
    if let Some(batmap) = &mut image.batmap {
        (0..image.table.blocks()).for_each(|block| batmap.set(block, false));
        write_pieces(file, &batmap_pieces(batmap)).map_err(file.failed())?;
    }
    write_footers(file, &image.footer, end_of_data(image)).map_err(file.failed())
}

/// A table as it is in the file.
pub(super) fn table_piece(at: u64, table: &Table) -> Piece {
    let mut bytes = vec![0; Table::bytes(table.blocks()) as usize];
    // The entries that share the last sector with the disk's are unused.
    table.write(0, &mut bytes);
    Piece { at, bytes }
}

/// Puts the footer where it belongs in a file of so many bytes; making the file so large is for others to do.
fn move_footer(file: &ImageFile, image: &Image, size: u64) -> Result<()> {
    let least = image.physical_size();
    if size < least {
        let text = format!("it takes {least} bytes, and would lose data with {size}");
        return Err(Failure::new(Errno::EINVAL, &file.path, text));
    }
    if file.is_device() && size > file.size() {
        let text = format!("the device has {} bytes: enlarge it first", file.size());
        return Err(Failure::new(Errno::ENOSPC, &file.path, text));
    }
    let mut footer = image.footer;
    footer.seal();
    let written = file.write_at(size - FOOTER_SIZE as u64, footer.as_bytes()).and_then(|()| file.sync());
    written.map_err(file.failed())
}

/// Changes the parent: first its names, then the header that says whose they are.
fn set_parent(file: &ImageFile, image: &mut Image, path: &Path, parent_raw: bool) -> Result<()> {
    if image.kind != Kind::Differencing {
        return Err(Failure::new(Errno::EINVAL, &file.path, "it is no differencing image: it has no parent"));
    }
    let path = path.canonicalize().map_err(Failure::io(path, "find it"))?;
    let parent = if parent_raw { raw(&path)? } else { chain::layer(&path)? };
    let named = new_parent(&file.path, &parent)?;
    let (Some(header_at), Some(header)) = (image.footer.header_at(), &mut image.header) else { return Ok(()) };
    // New names can go where the file has nothing, but not beyond a footer that is where it is to be.
    let first = image.table.allocated().map(|(_, at)| at).min();
    let end =
        first.unwrap_or_else(|| if file.is_device() { footer_place(file, image.metadata_end) } else { u64::MAX });
    let room = end.saturating_sub(image.metadata_end);
    let names = layout::name_parent(header, &named, image.metadata_end, room).map_err(failure::layout(&file.path))?;
    let last = names.last().map_or(0, |name| name.at + name.bytes.len() as u64);
    if last > image.metadata_end && first.is_none() {
        cut_footer(file, &image.footer, image.metadata_end).map_err(file.failed())?;
    }
    write_pieces(file, &names).and_then(|()| file.sync()).map_err(file.failed())?;
    let header = Piece { at: header_at, bytes: header.as_bytes().to_vec() };
    write_pieces(file, &[header]).and_then(|()| file.sync()).map_err(file.failed())?;
    if last > image.metadata_end {
        image.metadata_end = last;
        write_footers(file, &image.footer, end_of_data(image)).map_err(file.failed())?;
    }
    Ok(())
}
