//! The files of images that no disk serves: opened with tapdisk's lock, and written in an order that a crash does no harm to.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drivers::vhd::layout::{self, LayoutError, NewParent, Piece, batmap_pieces};
use drivers::vhd::{Corrupt, FOOTER_SIZE, Footer, Image, Kind, Parts, Problem, ReadError, Source, Table};
use nix::errno::Errno;
use nix::fcntl::Flock;
use zerocopy::IntoBytes;

use crate::chain;
use crate::image::{self, Lock, lock, open_to_write};
use crate::sys::file::{Backing, check_storage, geometry, lock_changes, open_storage};

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

fn explain<'a>(path: &'a Path, action: &'static str) -> impl Fn(io::Error) -> image::Error + 'a {
    move |source| image::Error::Io { path: path.to_owned(), action, source }
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
    pub fn open(path: &Path) -> Result<ImageFile, image::Error> {
        ImageFile::of(open_to_write(path, false)?, path)
    }

    /// Takes the lock of a file that is open: shared, since storage managers coalesce, hide and relink images that a running
    /// tapdisk only reads. One that it writes, it has for itself. Of those who change one, there is one at a time.
    pub fn of(file: File, path: &Path) -> Result<ImageFile, image::Error> {
        let device = geometry(&file).map_err(explain(path, "use it"))?.block_device;
        let file = lock(file, path, true)?;
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

fn change_alone(file: &File, path: &Path) -> Result<(), image::Error> {
    lock_changes(file, PATIENCE).map_err(|errno| match errno {
        Errno::EAGAIN => {
            let holder = "a program that changes it, such as vhd-util or a coalesce".into();
            image::Error::Locked { path: path.to_owned(), holder }
        }
        errno => explain(path, "lock it")(errno.into()),
    })
}

/// An image's file that a tapdisk may be writing, of which no more is changed than the tapdisk bears: see [`vhd`](super).
pub struct UsedFile {
    path: PathBuf,
    file: File,
}

impl UsedFile {
    /// Opens one, without the lock that the tapdisk has.
    pub fn open(path: &Path) -> Result<UsedFile, image::Error> {
        check_storage(path).map_err(explain(path, "open it"))?;
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(explain(path, "open it"))?;
        change_alone(&file, path)?;
        Ok(UsedFile { path: path.to_owned(), file })
    }

    /// Its metadata.
    pub fn image(&self) -> Result<Image, chain::Error> {
        let mut problems = Vec::new();
        // One in use has no footer at its end, but for a fixed one, which has no other.
        let read = match Image::read_by_copy(self, Parts::All, &mut problems) {
            Err(ReadError::Corrupt(_)) => Image::read(self, &mut problems),
            read => read,
        };
        read.map_err(|source| chain::Error::Image { path: self.path.clone(), source })
    }

    /// Gives it another parent: first the names, then the header, which says whose they are. The names go where the tapdisk writes nothing.
    pub fn name_parent(&self, image: &Image, parent: &NewParent) -> Result<(), UseError> {
        let (Some(mut header), Some(at)) = (image.header, image.footer.header_at()) else { return Ok(()) };
        // Where there is no block, the first one that is written goes there.
        let first = image.table.allocated().map(|(_, at)| at).min().unwrap_or(0);
        let room = first.saturating_sub(image.metadata_end);
        let names = layout::name_parent(&mut header, parent, image.metadata_end, room)?;
        let write = || {
            names.iter().try_for_each(|name| self.file.write_all_at(&name.bytes, name.at))?;
            self.file.sync_data()?;
            self.file.write_all_at(header.as_bytes(), at)?;
            self.file.sync_data()
        };
        Ok(write().map_err(explain(&self.path, "write it"))?)
    }

    /// Writes the footer that the tapdisk takes the hidden mark from when it closes the image.
    pub fn write_footer(&self, image: &Image) -> Result<(), image::Error> {
        let mut footer = image.footer;
        footer.seal();
        let write = || {
            if image.kind != Kind::Fixed {
                self.file.write_all_at(footer.as_bytes(), 0)?;
            }
            // It is there only if the image is fixed, or its tapdisk does not write it.
            let last_at = self.size().saturating_sub(FOOTER_SIZE as u64);
            let mut last = [0; FOOTER_SIZE];
            self.file.read_exact_at(&mut last, last_at)?;
            if Footer::parse(&last).is_ok_and(|last| last.uuid == footer.uuid) {
                self.file.write_all_at(footer.as_bytes(), last_at)?;
            }
            self.file.sync_data()
        };
        write().map_err(explain(&self.path, "write it"))
    }
}

/// Why an image in use does not get another parent.
#[derive(Debug, thiserror::Error)]
pub enum UseError {
    /// There is no room for the names without moving what the tapdisk writes.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The system says no.
    #[error(transparent)]
    Image(#[from] image::Error),
}

impl Source for UsedFile {
    fn size(&self) -> u64 {
        geometry(&self.file).map_or(0, |geometry| geometry.size)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(to, at)
    }
}

impl Source for ImageFile {
    fn size(&self) -> u64 {
        geometry(&self.file).map_or(0, |geometry| geometry.size)
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
    size: u64,
}

impl ReadFile {
    /// Opens one for reading and takes its lock, as tapdisk does for what it only reads.
    pub fn open(path: &Path) -> Result<ReadFile, image::Error> {
        let (file, geometry) = open_storage(path).map_err(explain(path, "open it"))?;
        Ok(ReadFile { file: Lock::take(file, path, true)?, size: geometry.size })
    }
}

impl Source for ReadFile {
    fn size(&self) -> u64 {
        self.size
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
    let at = footer_place(to, end);
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
pub fn footer_place(of: &dyn Medium, end: u64) -> u64 {
    if of.is_device() { of.size() - FOOTER_SIZE as u64 } else { end }
}

/// A table as it is in the file.
pub fn table_piece(at: u64, table: &Table) -> Piece {
    let mut bytes = vec![0; Table::bytes(table.blocks()) as usize];
    // The entries that share the last sector with the disk's are unused.
    table.write(0, &mut bytes);
    Piece { at, bytes }
}
