//! A layer and what it has on the host, and what is done when it is closed.

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use drivers::{LastStep, Layer, LayerFile};

use crate::sys::file::{CHANGE, forget_cached, lock_changes, unlock_changes};
use crate::sys::io::FileId;

/// Something that lives at least as long as this.
pub type Held = Arc<dyn Any + Send + Sync>;

/// A layer of the chain and its files.
pub struct HostLayer {
    /// What says where data is.
    pub layer: Box<dyn Layer>,
    /// The name of its first file, for messages; empty if it has none.
    pub path: PathBuf,
    /// What the engine calls its files, the first of which is [`LayerFile`] 0.
    pub files: Box<[FileId]>,
    /// The same files, through the page cache, for what is written when nothing more is under way; empty if nothing is.
    pub plain: Vec<File>,
    /// The engine reads and writes its files through the page cache.
    pub cached: bool,
    /// What is to be held until the end of the image is written, its locks; none if nothing is written.
    pub held: Option<Held>,
}

impl HostLayer {
    /// A layer with one file.
    pub fn new(layer: Box<dyn Layer>, path: &Path, file: FileId, cached: bool) -> HostLayer {
        HostLayer { layer, path: path.to_owned(), files: [file].into(), plain: Vec::new(), cached, held: None }
    }

    /// A layer without a file.
    pub fn without_file(layer: Box<dyn Layer>) -> HostLayer {
        HostLayer { layer, path: PathBuf::new(), files: [].into(), plain: Vec::new(), cached: false, held: None }
    }

    /// What the engine calls one of its files.
    pub(super) fn file(&self, file: LayerFile) -> FileId {
        self.files[usize::from(file.0)]
    }

    /// What is still to be done with its files.
    pub(super) fn close(&mut self) -> Option<Closing> {
        let files = std::mem::take(&mut self.plain);
        if files.is_empty() {
            return None;
        }
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let mut steps = Vec::new();
        self.layer.close(time, &mut |step| steps.push(step));
        Some(Closing { files, steps, _held: self.held.take() })
    }
}

impl Drop for HostLayer {
    /// One that was opened and never served, or whose process ends by an error.
    fn drop(&mut self) {
        if let Some(closing) = self.close() {
            // Opening it again mends what could not be written.
            let _ = closing.carry_out();
        }
    }
}

/// What is to be done so that others find an image whole.
pub(super) struct Closing {
    files: Vec<File>,
    steps: Vec<LastStep>,
    /// Let go of when it is done.
    _held: Option<Held>,
}

impl Closing {
    /// Does it. Blocks.
    pub(super) fn carry_out(&self) -> io::Result<()> {
        // Who has a file for longer than a moment does not change what is kept: closing goes on.
        let locked: Vec<_> = self.files.iter().filter(|file| lock_changes(file, CHANGE).is_ok()).collect();
        self.files.iter().try_for_each(forget_cached)?;
        self.steps.iter().try_for_each(|step| self.step(step))?;
        self.files.iter().try_for_each(File::sync_all)?;
        locked.into_iter().try_for_each(|file| Ok(unlock_changes(file)?))
    }

    fn step(&self, step: &LastStep) -> io::Result<()> {
        let file = |file: &LayerFile| &self.files[usize::from(file.0)];
        match step {
            LastStep::Write { file: number, at, bytes, keep } => {
                let (file, mut bytes) = (file(number), bytes.clone());
                if let Some(keep) = keep {
                    let mut now = vec![0; keep.len];
                    let read = file.read_at(&mut now, keep.at)?;
                    now.truncate(read);
                    (keep.put)(&now, &mut bytes);
                }
                file.write_all_at(&bytes, *at)
            }
            LastStep::Resize { file: number, size } => file(number).set_len(*size),
            LastStep::Flush { file: number } => file(number).sync_data(),
        }
    }
}
