//! `set` and `modify`: changes of an image's metadata.

use std::io;
use std::path::Path;

use drivers::vhd::layout::{self, LayoutError, NewParent, Piece, batmap_pieces};
use drivers::vhd::{Corrupt, FOOTER_SIZE, Header, Image, Kind, Parts, ReadError, Source, Table};
use nix::errno::Errno;
use tapdisk::{chain, store};
use zerocopy::IntoBytes;

use tapdisk::sys::errno_of;
use tapdisk::vhd::parent::new_parent;
use tapdisk::volume;

use super::create::raw;
use super::failure::{self, Failure, Result};
use super::file::{
    ImageFile, Medium, UseError, UsedFile, cut_footer, names_outside, table_piece, write_footers, write_pieces,
};
use super::{Field, Modify, Set};

/// Opens an image for writing, and says so as storage managers know it if that can't be.
pub(super) fn open(path: &Path) -> Result<(ImageFile, Image)> {
    let opened = ImageFile::open(path).map_err(Failure::from).and_then(|file| Ok((file.image()?, file)));
    let (image, file) =
        opened.map_err(|failure| failure.saying(|errno| format!("error opening {}: {errno}", path.display())))?;
    Ok((file, image))
}

/// Opens an image of which a tapdisk that writes it bears the change. None: none does.
fn open_used(path: &Path) -> Result<Option<(UsedFile, Image)>> {
    match ImageFile::open(path) {
        Err(store::Error::Locked { .. }) => {}
        // What else is wrong is told by whoever opens it.
        _ => return Ok(None),
    }
    let opened = UsedFile::open(path).map_err(Failure::from).and_then(|file| Ok((file.image()?, file)));
    let (image, file) =
        opened.map_err(|failure| failure.saying(|errno| format!("error opening {}: {errno}", path.display())))?;
    Ok(Some((file, image)))
}

/// Sets a field.
pub(super) fn set(args: &Set) -> Result<()> {
    if args.field == Field::Hidden
        && let Some((file, mut image)) = open_used(&args.name)?
    {
        image.footer.set_hidden_value(args.value);
        return Ok(file.write_footer(&image)?);
    }
    let (file, mut image) = open(&args.name)?;
    match args.field {
        Field::Hidden => {
            image.footer.set_hidden_value(args.value);
            let written = write_footers(&file, &image.footer, image.end());
            written.or_else(|error| match errno_of(&error) {
                // The copy is written by now, and a full disk is no reason not to hide what is to be deleted.
                Errno::ENOSPC if args.value != 0 && image.kind != Kind::Fixed => Ok(()),
                _ => Err(Failure::io(&file.path, "write it")(error)),
            })
        }
        Field::Marker => {
            let batmap = image.batmap.as_mut().ok_or_else(|| no_batmap(&args.name))?;
            batmap.marker = args.value;
            let header = &batmap_pieces(batmap)[1..];
            write_pieces(&file, header).and_then(|()| file.sync()).map_err(Failure::io(&file.path, "write it"))
        }
    }
}

/// Of an image that has no batmap, where there must be one.
pub(super) fn no_batmap(path: &Path) -> Failure {
    Failure::new(Errno::EINVAL, path, "it has no batmap, which is where that is kept: blktap's images have one")
}

/// Changes the parent, the footer's place, or all data.
pub(super) fn modify(args: &Modify) -> Result<()> {
    if let (Some(parent), false, None) = (&args.parent, args.zero, args.size)
        && let Some((file, image)) = open_used(&args.name)?
    {
        return set_parent_of_used(&file, &image, args, parent).map_err(parent_not_set(parent));
    }
    let (file, mut image) = open_to_modify(args)?;
    if args.zero {
        let zeroed = match image.kind {
            Kind::Fixed => Err(Failure::new(Errno::ENOSYS, &args.name, "a fixed image has no blocks to forget")),
            _ => zero(&file, &mut image).map_err(Failure::io(&file.path, "write it")),
        };
        zeroed.map_err(|failure| failure.saying(|errno| format!("failed to zero VHD: {errno}")))?;
    }
    if let Some(size) = args.size {
        move_footer(&file, &image, size)
            .map_err(|failure| failure.saying(|errno| format!("failed to set physical size to {size}: {errno}")))?;
    }
    if let Some(parent) = &args.parent {
        set_parent(&file, &mut image, parent, args.raw).map_err(parent_not_set(parent))?;
    }
    Ok(())
}

fn parent_not_set(parent: &Path) -> impl Fn(Failure) -> Failure + '_ {
    |failure| failure.saying(|errno| format!("failed to set parent to '{}': {errno}", parent.display()))
}

/// Opens an image that may be mended by the change: whose last footer is another's that is to be written over, or whose names are nowhere.
fn open_to_modify(args: &Modify) -> Result<(ImageFile, Image)> {
    let path = &args.name;
    let opened = || {
        let file = ImageFile::open(path)?;
        let mut problems = Vec::new();
        let mut image = match file.image_with(&mut problems) {
            Err(chain::Error::Image { source: ReadError::Corrupt(Corrupt::TwoImages { .. }), .. })
                if args.size.is_some() =>
            {
                Image::read_by_copy(&file, Parts::All, &mut problems).map_err(failure::read(path))?
            }
            image => image?,
        };
        if names_outside(&problems).is_some() {
            if args.parent.is_none() {
                file.image()?;
            }
            image.header = image.header.map(Header::without_names);
        }
        Ok((file, image))
    };
    opened().map_err(|failure: Failure| failure.saying(|errno| format!("error opening {}: {errno}", path.display())))
}

/// Changes the parent of an image that a tapdisk writes.
fn set_parent_of_used(file: &UsedFile, image: &Image, args: &Modify, path: &Path) -> Result<()> {
    let named = named(&args.name, image, path, args.raw)?;
    file.name_parent(image, &named).map_err(|error| match error {
        UseError::Image(error) => error.into(),
        UseError::Layout(error) => {
            let failure = failure::layout(&args.name)(error);
            Failure { text: format!("{}; it is in use: pause it first", failure.text), ..failure }
        }
    })
}

/// Forgets all blocks: first that they are full, which must not be said of a block that is not there, then where they are. Nothing is lost
/// if the host stops in between and has the second without the first: nobody believes it.
fn zero(to: &dyn Medium, image: &mut Image) -> io::Result<()> {
    let Some(header) = &image.header else { return Ok(()) };
    image.table = Table::empty(image.table.blocks());
    if let Some(batmap) = &mut image.batmap {
        (0..8 * batmap.bits().len() as u32).for_each(|block| batmap.set(block, false));
        write_pieces(to, &batmap_pieces(batmap))?;
    }
    write_pieces(to, &[table_piece(header.table_at(), &image.table)])?;
    to.sync()?;
    write_footers(to, &image.footer, image.end())
}

/// Puts the footer where it belongs in a file of so many bytes; making the file so large is for others to do.
fn move_footer(file: &ImageFile, image: &Image, size: u64) -> Result<()> {
    let least = image.physical_size();
    if size < least {
        let text = format!("it takes {least} bytes, and would lose data with {size}");
        return Err(Failure::new(Errno::EINVAL, &file.path, text));
    }
    let there = file.size().map_err(Failure::io(&file.path, "see its size"))?;
    if file.is_device() && size > there {
        let text = format!("the device has {there} bytes: enlarge it first");
        return Err(Failure::new(Errno::ENOSPC, &file.path, text));
    }
    let mut footer = image.footer;
    footer.seal();
    let written = file.write_at(size - FOOTER_SIZE as u64, footer.as_bytes()).and_then(|()| file.sync());
    written.map_err(Failure::io(&file.path, "write it"))
}

/// Changes the parent.
fn set_parent(file: &ImageFile, image: &mut Image, path: &Path, parent_raw: bool) -> Result<()> {
    let named = named(&file.path, image, path, parent_raw)?;
    let size = file.size().map_err(Failure::io(&file.path, "see its size"))?;
    let names = name_parent(file.is_device().then_some(size), image, &named).map_err(failure::layout(&file.path))?;
    write_parent(file, image, &names).map_err(Failure::io(&file.path, "write it"))
}

/// What the image at `child` is to say of its new parent.
fn named(child: &Path, image: &Image, path: &Path, parent_raw: bool) -> Result<NewParent> {
    if image.kind != Kind::Differencing {
        return Err(Failure::new(Errno::EINVAL, child, "it is no differencing image: it has no parent"));
    }
    let path = volume::lasting_name(path).map_err(Failure::io(path, "find it"))?;
    let parent = if parent_raw { raw(&path)? } else { chain::layer(&path)? };
    Ok(new_parent(child, &parent)?)
}

/// Names the parent in the header, and says where the names go. A file's size does not matter, a device's does.
fn name_parent(
    device_size: Option<u64>,
    image: &mut Image,
    parent: &NewParent,
) -> std::result::Result<Vec<Piece>, LayoutError> {
    let Some(header) = &mut image.header else { return Ok(Vec::new()) };
    // New names can go where the file has nothing: before the first block, or, without one, at the end.
    let at = image.metadata_end;
    let first = image.table.allocated().map(|(_, at)| at).min();
    let end = first.unwrap_or_else(|| device_size.map_or(u64::MAX, |size| size.saturating_sub(FOOTER_SIZE as u64)));
    layout::name_parent(header, parent, at, end.saturating_sub(at))
}

/// Writes the parent's names, and then the header that says whose they are.
fn write_parent(to: &dyn Medium, image: &mut Image, names: &[Piece]) -> io::Result<()> {
    let (Some(at), Some(header)) = (image.footer.header_at(), &image.header) else { return Ok(()) };
    let header = Piece { at, bytes: header.as_bytes().to_vec() };
    let end = names.last().map_or(0, |name| name.at + name.bytes.len() as u64);
    let grows = end > image.metadata_end;
    if grows && !to.is_device() && image.table.allocated().next().is_none() {
        cut_footer(to, &image.footer, image.metadata_end)?;
    }
    write_pieces(to, names)?;
    to.sync()?;
    write_pieces(to, &[header])?;
    to.sync()?;
    image.metadata_end = image.metadata_end.max(end);
    // Also after an interruption, when there was no footer any more.
    write_footers(to, &image.footer, image.end())
}

#[cfg(test)]
mod tests {
    use drivers::vhd::Uuid;

    use super::super::testing::{self, Memory, crashes};
    use super::*;

    #[test]
    fn blocks_are_forgotten_one_by_one_or_all() {
        let image = testing::image(Kind::Dynamic, false, &[(1, 0..3), (2, 0..8)], 1);
        let forget = |image: &Memory| zero(image, &mut testing::image_of(image).unwrap());
        crashes(&image, forget, |after| {
            assert_eq!(testing::fatal(after), None);
            forget(after).unwrap();
            assert_eq!(testing::problems(after), []);
            assert!(testing::content(&[after]).iter().all(|byte| *byte == 0));
        });
    }

    fn reparent(image: &Memory, path: &str, uuid: Uuid) -> io::Result<()> {
        let parent = NewParent { path: path.into(), uuid, unix_seconds: 0 };
        let mut read = testing::image_of(image).unwrap();
        let names = name_parent(None, &mut read, &parent).unwrap();
        write_parent(image, &mut read, &names)
    }

    #[test]
    fn a_change_of_the_parent_that_was_interrupted_is_made_again() {
        // Without names there, which go to the end; and in their place.
        let image = testing::image(Kind::Differencing, false, &[], 2);
        let (path, uuid) = ("../else/where.vhd", Uuid([7; 16]));
        for _ in 0..2 {
            crashes(
                &image,
                |image| reparent(image, path, uuid),
                |after| {
                    assert_eq!(testing::fatal(after), None);
                    reparent(after, path, uuid).unwrap();
                    let read = testing::image_of(after).unwrap();
                    assert_eq!(read.header.unwrap().parent_uuid, uuid);
                    assert!(read.parents.len() == 3 && read.parents.iter().all(|(_, found)| found == path));
                    assert_eq!(testing::problems(after), []);
                },
            );
            reparent(&image, "./another.vhd", Uuid([6; 16])).unwrap();
        }
    }
}
