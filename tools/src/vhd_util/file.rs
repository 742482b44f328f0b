//! The files of images: opened for writing, with tapdisk's lock, and written in an order that a crash does no harm to.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use drivers::vhd::layout::Piece;
use drivers::vhd::{FOOTER_SIZE, Footer, Image, Kind, Problem, Source};
use nix::fcntl::Flock;
use tapdisk::sys::file::{Backing, geometry};
use zerocopy::IntoBytes;

use super::failure::{self, Failure, Result};

/// What is written to.
pub(super) trait Medium: Source {
    /// Writes all of `bytes` from byte `at` on; a file grows as it must.
    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// What was written before is safe when this returns.
    fn sync(&self) -> io::Result<()>;

    /// Cuts the file off, or lets it grow by zeros. Of a device, whose size is what it is, nothing changes.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes zeros of a range.
    fn zero(&self, at: u64, len: u64) -> io::Result<()>;

    /// A device: its size does not change, and the footer is at its end.
    fn is_device(&self) -> bool;
}

/// An image's file that no tapdisk writes.
pub(super) struct ImageFile {
    pub(super) path: PathBuf,
    pub(super) file: Flock<File>,
    device: bool,
}

impl ImageFile {
    /// Opens one for writing and takes its lock, as tapdisk does.
    pub(super) fn open(path: &Path) -> Result<ImageFile> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(Failure::io(path, "open it"))?;
        ImageFile::of(file, path)
    }

    /// Takes the lock of a file that is open: shared, since storage managers coalesce, hide and relink images that a running
    /// tapdisk only reads. One that it writes, it has for itself.
    fn of(file: File, path: &Path) -> Result<ImageFile> {
        let device = geometry(&file).map_err(Failure::io(path, "use it"))?.block_device;
        let file = tapdisk::image::lock(file, path, true)?;
        Ok(ImageFile { path: path.to_owned(), file, device })
    }

    /// Its metadata.
    pub(super) fn image(&self) -> Result<Image> {
        self.image_with(&mut Vec::new())
    }

    /// Its metadata, and what is wrong with it.
    pub(super) fn image_with(&self, problems: &mut Vec<Problem>) -> Result<Image> {
        Image::read(self, problems).map_err(failure::read(&self.path))
    }

    /// What failed while it was written.
    pub(super) fn failed(&self) -> impl Fn(io::Error) -> Failure + '_ {
        Failure::io(&self.path, "write it")
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

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.device { Ok(()) } else { self.file.set_len(len) }
    }

    fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        let file = self.file.try_clone()?;
        Ok(Backing { file, direct: false, block_device: self.device }.write_zeroes(at, len, false)?)
    }

    fn is_device(&self) -> bool {
        self.device
    }
}

/// An image's file that nobody writes.
pub(super) struct ReadFile {
    pub(super) file: Flock<File>,
    size: u64,
}

impl ReadFile {
    /// Opens one for reading and takes its lock, as tapdisk does for what it only reads.
    pub(super) fn open(path: &Path) -> Result<ReadFile> {
        let file = File::open(path).map_err(Failure::io(path, "open it"))?;
        let size = geometry(&file).map_err(Failure::io(path, "use it"))?.size;
        Ok(ReadFile { file: tapdisk::image::lock(file, path, true)?, size })
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

/// A new image's file, which goes away again if it is not kept.
pub(super) struct NewFile {
    file: Option<ImageFile>,
    made: bool,
}

impl NewFile {
    /// Makes a file, which must not be there; a device must be.
    pub(super) fn create(path: &Path) -> Result<NewFile> {
        let device = std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device());
        if device {
            return Ok(NewFile { file: Some(ImageFile::open(path)?), made: false });
        }
        let made = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let file = made.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                let text = "it exists, and is not overwritten: remove it first, or choose another name";
                Failure::new(nix::errno::Errno::EEXIST, path, text)
            }
            _ => Failure::io(path, "create it")(error),
        })?;
        match ImageFile::of(file, path) {
            Ok(file) => Ok(NewFile { file: Some(file), made: true }),
            Err(failure) => {
                let _ = std::fs::remove_file(path);
                Err(failure)
            }
        }
    }

    /// The file.
    pub(super) fn get(&self) -> &ImageFile {
        self.file.as_ref().expect("it is there until it is kept or dropped")
    }

    /// Keeps it, when all is safe: its content, and its name in the folder.
    pub(super) fn keep(self) -> Result<()> {
        self.leave().map(drop)
    }

    /// The same, and it is still open.
    pub(super) fn leave(mut self) -> Result<ImageFile> {
        let file = self.get();
        file.sync().map_err(file.failed())?;
        if self.made {
            let folder = file.path.parent().filter(|folder| !folder.as_os_str().is_empty());
            let folder = folder.unwrap_or(Path::new("."));
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(Failure::io(folder, "sync it"))?;
        }
        Ok(self.file.take().expect("it is there until it is kept or dropped"))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(file) = self.file.take()
            && self.made
        {
            // There is nothing to be done about it, and the reason for all this is told of.
            let _ = std::fs::remove_file(&file.path);
        }
    }
}

/// What was an image on a device before is none any more, and nobody takes what is half made for it.
pub(super) fn forget_image(to: &dyn Medium) -> io::Result<()> {
    if !to.is_device() {
        return Ok(());
    }
    to.zero(0, FOOTER_SIZE as u64)?;
    to.zero(footer_place(to, 0), FOOTER_SIZE as u64)?;
    to.sync()
}

/// Writes parts of an image.
pub(super) fn write_pieces(to: &dyn Medium, pieces: &[Piece]) -> io::Result<()> {
    pieces.iter().try_for_each(|piece| to.write_at(piece.at, &piece.bytes))
}

/// Writes both footers, one after the other: at each moment one of them is good. The one at the end is where `end` says that
/// the image's last byte before it is, or at the device's end.
pub(super) fn write_footers(to: &dyn Medium, footer: &Footer, end: u64) -> io::Result<()> {
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
/// written again, and so it must be good.
pub(super) fn cut_footer(of: &dyn Medium, footer: &Footer, end: u64) -> io::Result<()> {
    let mut footer = *footer;
    footer.seal();
    of.write_at(0, footer.as_bytes())?;
    of.sync()?;
    of.set_len(end)
}

/// Where the footer at the end goes.
pub(super) fn footer_place(of: &dyn Medium, end: u64) -> u64 {
    if of.is_device() { of.size() - FOOTER_SIZE as u64 } else { end }
}

/// Where an image's data ends.
pub(super) fn end_of_data(image: &Image) -> u64 {
    (image.physical_size() - FOOTER_SIZE as u64).max(image.metadata_end)
}
