//! The files of images that no disk serves: opened with tapdisk's lock, and written in an order that a crash does no harm to.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use drivers::vhd::layout::{Piece, batmap_pieces};
use drivers::vhd::{FOOTER_SIZE, Footer, Image, Kind, Problem, Source, Table};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, fcntl};
use nix::libc;
use zerocopy::IntoBytes;

use crate::chain;
use crate::image::{self, lock};
use crate::sys::file::{Backing, geometry, open_storage};

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

/// How long a program that was killed may have its locks.
const DYING: Duration = Duration::from_secs(1);

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
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(explain(path, "open it"))?;
        ImageFile::of(file, path)
    }

    /// Takes the lock of a file that is open: shared, since storage managers coalesce, hide and relink images that a running
    /// tapdisk only reads. One that it writes, it has for itself. Of those who change one, there is one at a time.
    pub fn of(file: File, path: &Path) -> Result<ImageFile, image::Error> {
        let device = geometry(&file).map_err(explain(path, "use it"))?.block_device;
        let file = lock(file, path, true)?;
        change_alone(&file, path)?;
        Ok(ImageFile { path: path.to_owned(), file, device })
    }

    /// Its metadata.
    pub fn image(&self) -> Result<Image, chain::Error> {
        self.image_with(&mut Vec::new())
    }

    /// Its metadata, and what is wrong with it.
    pub fn image_with(&self, problems: &mut Vec<Problem>) -> Result<Image, chain::Error> {
        Image::read(self, problems).map_err(|source| chain::Error::Image { path: self.path.clone(), source })
    }
}

/// Locks a byte that no image has, for as long as the file is open: another lock than that which readers share.
fn change_alone(file: &File, path: &Path) -> Result<(), image::Error> {
    let (l_type, l_whence) = (libc::F_WRLCK as i16, libc::SEEK_SET as i16);
    let byte = libc::flock { l_type, l_whence, l_start: i64::MAX - 1, l_len: 1, l_pid: 0 };
    let end = Instant::now() + DYING;
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&byte)) {
            Ok(_) => return Ok(()),
            // Whoever has it may be about to go.
            Err(Errno::EAGAIN | Errno::EACCES) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Errno::EAGAIN | Errno::EACCES) => {
                let holder = "a program that changes it, such as vhd-util or a coalesce".into();
                return Err(image::Error::Locked { path: path.to_owned(), holder });
            }
            Err(errno) => return Err(explain(path, "lock it")(errno.into())),
        }
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
        Ok(Backing { file, direct: false, block_device: self.device }.write_zeroes(at, len, false)?)
    }

    fn is_device(&self) -> bool {
        self.device
    }
}

/// An image's file that nobody writes.
pub struct ReadFile {
    /// Read through the page cache.
    pub file: Flock<File>,
    size: u64,
}

impl ReadFile {
    /// Opens one for reading and takes its lock, as tapdisk does for what it only reads.
    pub fn open(path: &Path) -> Result<ReadFile, image::Error> {
        let (file, geometry) = open_storage(path).map_err(explain(path, "open it"))?;
        Ok(ReadFile { file: lock(file, path, true)?, size: geometry.size })
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
