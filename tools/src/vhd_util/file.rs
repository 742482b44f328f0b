//! New images, and what was on a device before.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use drivers::vhd::FOOTER_SIZE;
pub(super) use tapdisk::vhd::file::*;

use super::failure::{Failure, Result};

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
            let file = ImageFile::open(path)?;
            return Ok(NewFile { file: Some(file), made: false });
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
            Err(error) => {
                let _ = std::fs::remove_file(path);
                Err(error.into())
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
        file.sync().map_err(Failure::io(&file.path, "write it"))?;
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
    to.zero(footer_place(to, 0)?, FOOTER_SIZE as u64)?;
    to.sync()
}
