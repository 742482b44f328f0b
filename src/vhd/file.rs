//! The files of images that no disk serves: opened with tapdisk's lock, and written in an order that a crash does no harm to.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use drivers::SECTOR_SIZE;
use drivers::vhd::layout::{self, LayoutError, NewParent, Piece, batmap_pieces};
use drivers::vhd::{Corrupt, FOOTER_SIZE, Footer, HEADER_SIZE, Header, Image, Kind, Parts, Problem, Source, Table};
use nix::errno::Errno;
use nix::fcntl::Flock;
use zerocopy::{FromBytes, IntoBytes};

use crate::blocking::Blocking;
use crate::chain;
use crate::store::{self, Lock, lock, open_to_write};
use crate::sys::file::{Backing, check_storage, direct_alignment, geometry, lock_changes, open_storage};

/// What is written to.
pub trait Medium: Source {
    /// Writes all of `bytes` from byte `at` on; a file grows as it must.
    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// What was written before is safe when this returns.
    fn sync(&self) -> io::Result<()>;

    /// The same of data, and of no more of what a file system knows than it takes to read that.
    fn sync_data(&self) -> io::Result<()> {
        self.sync()
    }

    /// Cuts the file off, or lets it grow by zeros. Of a device, whose size is what it is, nothing changes.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes zeros of a range.
    fn zero(&self, at: u64, len: u64) -> io::Result<()>;

    /// A device: its size does not change, and the footer is at its end.
    fn is_device(&self) -> bool;
}

fn explain<'a>(path: &'a Path, action: &'static str) -> impl Fn(io::Error) -> store::Error + 'a {
    move |source| store::Error::Io { path: path.to_owned(), action, source }
}

/// How long a program that was killed may have its locks, and one that changes an image in use may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// An image's file that no tapdisk writes.
pub struct ImageFile {
    /// Its path.
    pub path: PathBuf,
    /// Read and written through the page cache.
    pub file: Flock<File>,
    device: bool,
}

impl ImageFile {
    /// Opens one for writing and takes its lock, as tapdisk does.
    pub fn open(path: &Path) -> Result<ImageFile, store::Error> {
        ImageFile::of(open_to_write(&Blocking::of_thread(), path, false)?, path)
    }

    /// Takes the lock of a file that is open: shared, since storage managers coalesce, hide and relink images that a running
    /// tapdisk only reads. One that it writes, it has for itself. Of those who change one, there is one at a time.
    pub fn of(file: File, path: &Path) -> Result<ImageFile, store::Error> {
        let device = geometry(&file).map_err(explain(path, "use it"))?.block_device;
        let file = lock(&Blocking::of_thread(), file, path, true)?;
        change_alone(&file, path)?;
        Ok(ImageFile { path: path.to_owned(), file, device })
    }

    /// Its metadata, of which all is where it can be changed.
    pub fn image(&self) -> Result<Image, chain::Error> {
        let mut problems = Vec::new();
        let image = self.image_with(&mut problems)?;
        match names_outside(&problems) {
            Some(what) => Err(chain::Error::Image { path: self.path.clone(), source: what.clone().into() }),
            None => Ok(image),
        }
    }

    /// The same of one that is another's parent.
    pub fn parent_image(&self) -> Result<Image, chain::Error> {
        self.image()?;
        let read = Image::read_parent(self, &mut Vec::new());
        read.map_err(|source| chain::Error::Image { path: self.path.clone(), source })
    }

    /// Its metadata, and what is wrong with it.
    pub fn image_with(&self, problems: &mut Vec<Problem>) -> Result<Image, chain::Error> {
        Image::read(self, problems).map_err(|source| chain::Error::Image { path: self.path.clone(), source })
    }
}

/// A parent's name that is beyond the file's end: what is written to the image might come to be there.
pub fn names_outside(problems: &[Problem]) -> Option<&Corrupt> {
    let outside = |problem: &&Problem| matches!(problem.what, Corrupt::Place { what: "parent locator", .. });
    problems.iter().find(outside).map(|problem| &problem.what)
}

fn change_alone(file: &File, path: &Path) -> Result<(), store::Error> {
    lock_changes(file, PATIENCE).map_err(|errno| match errno {
        Errno::EAGAIN => {
            let holder = "a program that changes it, such as vhd-util or a coalesce".into();
            store::Error::Locked { path: path.to_owned(), holder }
        }
        errno => explain(path, "lock it")(errno.into()),
    })
}

/// An image's file that a tapdisk may be writing, of which no more is changed than the tapdisk bears: see [`vhd`](super). It is read and
/// written as the tapdisk does it: past the page cache where that can be, in which the sectors beside ours may be old ones.
pub struct UsedFile {
    path: PathBuf,
    file: File,
    direct: bool,
}

/// Memory that O_DIRECT takes.
#[derive(Clone, FromBytes, IntoBytes)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

impl UsedFile {
    /// Opens one, without the lock that the tapdisk has.
    pub fn open(path: &Path) -> Result<UsedFile, store::Error> {
        check_storage(path).map_err(explain(path, "open it"))?;
        let open = |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        let fits = |file: &File| direct_alignment(file).is_none_or(|(_, at)| u64::from(at) <= SECTOR_SIZE);
        let direct = open(libc::O_DIRECT)
            .ok()
            .filter(fits)
            .filter(|file| geometry(file).is_ok_and(|geometry| u64::from(geometry.logical) <= SECTOR_SIZE));
        let is_direct = direct.is_some();
        let file = match direct {
            Some(file) => file,
            None => open(0).map_err(explain(path, "open it"))?,
        };
        change_alone(&file, path)?;
        Ok(UsedFile { path: path.to_owned(), file, direct: is_direct })
    }

    /// Its metadata.
    pub fn image(&self) -> Result<Image, chain::Error> {
        let mut problems = Vec::new();
        // One in use has no footer at its end, but for a fixed one, which has no other: a guest may have written what looks like a copy.
        let fixed = Image::read_parts(self, Parts::Heads, &mut problems).is_ok_and(|image| image.kind == Kind::Fixed);
        let read = match fixed {
            true => Image::read(self, &mut problems),
            false => Image::read_by_copy(self, Parts::All, &mut problems),
        };
        read.map_err(|source| chain::Error::Image { path: self.path.clone(), source })
    }

    /// The whole sectors that a range is in: where they begin, their bytes, and memory for them.
    fn sectors(&self, at: u64, len: usize) -> (u64, usize, Vec<Page>) {
        let begin = at / SECTOR_SIZE * SECTOR_SIZE;
        let end = (at + len as u64).next_multiple_of(SECTOR_SIZE);
        let count = (end - begin) as usize;
        (begin, count, vec![Page([0; 4096]); count.div_ceil(4096)])
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        if !self.direct {
            return self.file.write_all_at(bytes, at);
        }
        let (begin, count, mut pages) = self.sectors(at, bytes.len());
        let sectors = &mut pages.as_mut_slice().as_mut_bytes()[..count];
        if count != bytes.len() {
            self.read_at(begin, sectors)?;
        }
        sectors[(at - begin) as usize..][..bytes.len()].copy_from_slice(bytes);
        self.file.write_all_at(sectors, begin)
    }

    /// Gives it another parent. Where there is room between the metadata and the first block, as relinking an image that nobody has open does it
    /// ([`relink`](drivers::vhd::relink)): with new names and a header beside the old ones, so that it has one parent or the other at each
    /// moment. Otherwise in the place of the old names; cut short there, it has none until that is done again.
    pub fn name_parent(&self, image: &Image, parent: &NewParent) -> Result<(), UseError> {
        let (Some(mut header), Some(at)) = (image.header, image.footer.header_at()) else { return Ok(()) };
        let header_len = HEADER_SIZE as u64;
        let beside = free_places(image, &header, at).into_iter().find_map(|(place, room)| {
            let mut header = header.without_names();
            let names = layout::name_parent(&mut header, parent, place, room.checked_sub(header_len)?).ok()?;
            Some((header, names))
        });
        let write = |names: &[Piece]| names.iter().try_for_each(|name| self.write_at(name.at, &name.bytes));
        let written = if let Some((header, names)) = beside {
            let other_at = names.last().map_or(at, |name| name.at + name.bytes.len() as u64);
            let point_to = |header_at| {
                let mut footer = image.footer;
                footer.set_header_at(header_at);
                footer.seal();
                self.write_at(0, footer.as_bytes()).and_then(|()| self.file.sync_data())
            };
            write(&names)
                .and_then(|()| self.write_at(other_at, header.as_bytes()))
                .and_then(|()| self.file.sync_data())
                .and_then(|()| point_to(other_at))
                .and_then(|()| self.write_at(at, header.as_bytes()))
                .and_then(|()| self.file.sync_data())
                .and_then(|()| point_to(at))
        } else {
            let names = layout::name_parent(&mut header, parent, 0, 0)?;
            write(&names)
                .and_then(|()| self.file.sync_data())
                .and_then(|()| self.write_at(at, header.as_bytes()))
                .and_then(|()| self.file.sync_data())
        };
        Ok(written.map_err(explain(&self.path, "write it"))?)
    }

    /// Writes the footer that the tapdisk takes the hidden mark from when it closes the image.
    pub fn write_footer(&self, image: &Image) -> Result<(), store::Error> {
        let mut footer = image.footer;
        footer.seal();
        let write = || {
            if image.kind != Kind::Fixed {
                self.write_at(0, footer.as_bytes())?;
            }
            // It is there only if the image is fixed, or its tapdisk does not write it.
            let last_at = self.size()?.saturating_sub(FOOTER_SIZE as u64);
            let mut last = [0; FOOTER_SIZE];
            self.read_at(last_at, &mut last)?;
            if Footer::parse(&last).is_ok_and(|last| last.uuid == footer.uuid) {
                self.write_at(last_at, footer.as_bytes())?;
            }
            self.file.sync_data()
        };
        write().map_err(explain(&self.path, "write it"))
    }
}

/// Where names can go that are beside the old ones, and before the first block, which a tapdisk never writes: places, and their bytes.
fn free_places(image: &Image, header: &Header, header_at: u64) -> Vec<(u64, u64)> {
    // Without a block, the first one that is written goes there.
    let Some(first) = image.table.allocated().map(|(_, at)| at).min() else { return Vec::new() };
    let names = header.locators.iter().filter(|locator| locator.platform().is_some());
    let names: Vec<_> =
        names.map(|locator| (locator.place().0, locator.place().0.saturating_add(locator.space()))).collect();
    let table_end = header.table_at() + Table::bytes(header.entries());
    let batmap_end = image.batmap.as_ref().map_or(0, |batmap| batmap.bits_at + batmap.bits().len() as u64);
    let least = table_end.max(batmap_end).max(header_at + HEADER_SIZE as u64).max(FOOTER_SIZE as u64);
    let places = [least, image.metadata_end].map(|place| place.next_multiple_of(SECTOR_SIZE)).into_iter();
    let free = places.filter(|place| !names.iter().any(|(begin, end)| begin <= place && place < end));
    let end = |place: u64| {
        names.iter().map(|(begin, _)| *begin).filter(|begin| *begin > place).min().unwrap_or(first).min(first)
    };
    free.map(|place| (place, end(place).saturating_sub(place))).collect()
}

/// Why an image in use does not get another parent.
#[derive(Debug, thiserror::Error)]
pub enum UseError {
    /// There is no room for the names without moving what the tapdisk writes.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The system says no.
    #[error(transparent)]
    Image(#[from] store::Error),
}

impl Source for UsedFile {
    fn size(&self) -> io::Result<u64> {
        Ok(geometry(&self.file)?.size)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        if !self.direct {
            return self.file.read_exact_at(to, at);
        }
        let (begin, count, mut pages) = self.sectors(at, to.len());
        let sectors = &mut pages.as_mut_slice().as_mut_bytes()[..count];
        let within = (at - begin) as usize;
        let mut done = 0;
        // The file may end within a sector.
        while done < within + to.len() {
            match self.file.read_at(&mut sectors[done..], begin + done as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => done += read,
            }
        }
        to.copy_from_slice(&sectors[within..][..to.len()]);
        Ok(())
    }
}

impl Source for ImageFile {
    fn size(&self) -> io::Result<u64> {
        Ok(geometry(&self.file)?.size)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(to, at)
    }
}

impl Medium for ImageFile {
    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.device { Ok(()) } else { self.file.set_len(len) }
    }

    fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        let file = self.file.try_clone()?;
        let sector = u64::from(geometry(&file)?.logical);
        let backing = Backing { file, direct: false, block_device: self.device };
        let (begin, end) = (at.next_multiple_of(sector), (at + len) / sector * sector);
        if begin >= end {
            return self.write_at(at, &vec![0; len as usize]);
        }
        // A device zeroes whole sectors; of others, parts are written through the page cache.
        self.write_at(at, &vec![0; (begin - at) as usize])?;
        backing.write_zeroes(begin, end - begin, false)?;
        self.write_at(end, &vec![0; (at + len - end) as usize])
    }

    fn is_device(&self) -> bool {
        self.device
    }
}

/// An image's file that nobody writes.
pub struct ReadFile {
    /// Read through the page cache.
    pub file: Lock,
}

impl ReadFile {
    /// Opens one for reading and takes its lock, as tapdisk does for what it only reads.
    pub fn open(path: &Path) -> Result<ReadFile, store::Error> {
        let (file, _) = open_storage(path).map_err(explain(path, "open it"))?;
        Ok(ReadFile { file: Lock::take(&Blocking::of_thread(), file, path, true)? })
    }
}

impl Source for ReadFile {
    fn size(&self) -> io::Result<u64> {
        Ok(geometry(&self.file)?.size)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(to, at)
    }
}

/// Writes the batmap again, without what the file's says of blocks that are not there: from here on the table can have them.
pub fn write_batmap(to: &dyn Medium, image: &Image) -> io::Result<()> {
    let Some(batmap) = &image.batmap else { return Ok(()) };
    write_pieces(to, &batmap_pieces(batmap))?;
    to.sync()
}

/// Writes parts of an image.
pub fn write_pieces(to: &dyn Medium, pieces: &[Piece]) -> io::Result<()> {
    pieces.iter().try_for_each(|piece| to.write_at(piece.at, &piece.bytes))
}

/// Writes both footers, one after the other: at each moment one of them is good. The one at the end is where `end` says that
/// the image's last byte before it is, or at the device's end.
pub fn write_footers(to: &dyn Medium, footer: &Footer, end: u64) -> io::Result<()> {
    let mut footer = *footer;
    footer.seal();
    if footer.kind() != Ok(Kind::Fixed) {
        to.write_at(0, footer.as_bytes())?;
        to.sync()?;
    }
    let at = footer_place(to, end)?;
    to.write_at(at, footer.as_bytes())?;
    to.set_len(at + FOOTER_SIZE as u64)?;
    to.sync()
}

/// Cuts off a file's footer, and what is beyond it, so that something else can go there. The copy is used until the footer is
/// written again, and so it must be good. The file's last sector is zeros from here on, in the place of a footer: as long as it is no
/// block's, no guest can have written a footer of its own there.
pub fn cut_footer(of: &dyn Medium, footer: &Footer, end: u64) -> io::Result<()> {
    let mut footer = *footer;
    footer.seal();
    of.write_at(0, footer.as_bytes())?;
    of.sync()?;
    of.write_at(end, &[0; FOOTER_SIZE])?;
    of.set_len(end + FOOTER_SIZE as u64)
}

/// Where the footer at the end goes.
pub fn footer_place(of: &dyn Medium, end: u64) -> io::Result<u64> {
    if of.is_device() { Ok(of.size()?.saturating_sub(FOOTER_SIZE as u64)) } else { Ok(end) }
}

/// The sectors of a table that have the entries of some blocks, from the first to the last.
pub fn table_part(at: u64, table: &Table, first: u32, last: u32) -> Piece {
    const ENTRIES: u32 = SECTOR_SIZE as u32 / 4;
    let (begin, end) = (first / ENTRIES * ENTRIES, (last + 1).next_multiple_of(ENTRIES));
    let mut bytes = vec![0; 4 * (end - begin) as usize];
    table.write(begin, &mut bytes);
    Piece { at: at + 4 * u64::from(begin), bytes }
}

/// A table as it is in the file.
pub fn table_piece(at: u64, table: &Table) -> Piece {
    let mut bytes = vec![0; Table::bytes(table.blocks()) as usize];
    // The entries that share the last sector with the disk's are unused.
    table.write(0, &mut bytes);
    Piece { at, bytes }
}

#[cfg(test)]
mod tests {
    use drivers::vhd::layout::{Layout, NewImage};
    use drivers::vhd::{Locator, Platform, Uuid};

    use super::*;

    #[test]
    fn a_locator_at_the_end_of_all_bytes_is_as_any_other() {
        let parent = NewParent { path: "base.vhd".into(), uuid: Uuid([1; 16]), unix_seconds: 0 };
        let new = NewImage { size: 4 << 20, room: 0, uuid: Uuid([2; 16]), unix_seconds: 0, parent: Some(parent) };
        let Layout { footer, mut header, batmap, end, .. } = Layout::new(&new).unwrap();
        header.locators[0] = Locator::with_space(Platform::MacX, u64::MAX - 100, 8, 512);
        let mut table = Table::parse(&[0xff; 8], 2).unwrap();
        table.set(0, 1 << 20);
        let image = Image {
            footer,
            kind: Kind::Differencing,
            size: 4 << 20,
            footer_at: 8 << 20,
            metadata_end: end,
            header: Some(header),
            table,
            table_room: 2,
            batmap: Some(batmap),
            batmap_is_stale: false,
            parents: Vec::new(),
            parent_time: None,
        };
        let places = free_places(&image, &header, FOOTER_SIZE as u64);
        assert!(!places.is_empty());
        assert!(places.iter().all(|(at, room)| at + room <= 1 << 20), "{places:?}");
    }
}
