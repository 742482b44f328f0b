//! A layer and what it has on the host, and what is done when it is closed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use drivers::{LastStep, Layer, LayerFile};

use crate::blocking::Blocking;
use crate::store::Store;
use crate::sys::file::CHANGE;
use crate::sys::io::FileId;

/// A layer of the chain and its files.
pub struct HostLayer {
    /// What says where data is.
    pub layer: Box<dyn Layer>,
    /// The name of its first file, for messages; empty if it has none.
    pub path: PathBuf,
    /// What the engine calls its files, the first of which is [`LayerFile`] 0.
    pub files: Box<[FileId]>,
    /// Where those files are, for what is written when nothing more is under way; empty if nothing is.
    pub written: Vec<Arc<dyn Store>>,
    /// The engine reads and writes its files through the page cache.
    pub cached: bool,
}

impl HostLayer {
    /// A layer with one file.
    pub fn new(layer: Box<dyn Layer>, path: &Path, file: FileId, cached: bool) -> HostLayer {
        HostLayer { layer, path: path.to_owned(), files: [file].into(), written: Vec::new(), cached }
    }

    /// A layer without a file.
    pub fn without_file(layer: Box<dyn Layer>) -> HostLayer {
        HostLayer { layer, path: PathBuf::new(), files: [].into(), written: Vec::new(), cached: false }
    }

    /// What the engine calls one of its files.
    pub(super) fn file(&self, file: LayerFile) -> FileId {
        self.files[usize::from(file.0)]
    }

    /// What is still to be done with its files.
    pub(super) fn close(&mut self) -> Option<Closing> {
        let stores = std::mem::take(&mut self.written);
        if stores.is_empty() {
            return None;
        }
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let mut steps = Vec::new();
        self.layer.close(time, &mut |step| steps.push(step));
        Some(Closing { path: self.path.clone(), stores, steps })
    }
}

impl Drop for HostLayer {
    /// One that was opened and never served, or whose process ends by an error.
    fn drop(&mut self) {
        if let Some(closing) = self.close() {
            // Layers are kept apart, and so this is a thread that may wait. Opening it again mends what could not be written.
            let _ = closing.carry_out(&Blocking::of_thread());
        }
    }
}

/// What could not be done when an image was closed, and with which file.
#[derive(Debug, Default)]
pub struct Closed {
    /// Of its images: they are not whole.
    pub images: Vec<(PathBuf, io::Error)>,
    /// Of filters' files.
    pub filters: Vec<(PathBuf, io::Error)>,
}

/// What is to be done so that others find an image whole. The stores' locks are held until it is.
pub(super) struct Closing {
    path: PathBuf,
    stores: Vec<Arc<dyn Store>>,
    steps: Vec<LastStep>,
}

impl Closing {
    /// Does all of them, and gives what could not be done.
    pub(super) fn all(closings: Vec<Closing>, blocking: &Blocking) -> Vec<(PathBuf, io::Error)> {
        let failed = |closing: Closing| Some((closing.path.clone(), closing.carry_out(blocking).err()?));
        closings.into_iter().filter_map(failed).collect()
    }

    /// Does it.
    pub(super) fn carry_out(&self, blocking: &Blocking) -> io::Result<()> {
        // Who has a file for longer than a moment does not change what is kept: closing goes on.
        let lock = |store: &&Arc<dyn Store>| store.lock_changes(blocking, CHANGE).is_ok();
        let locked: Vec<_> = self.stores.iter().filter(lock).collect();
        self.stores.iter().try_for_each(|store| store.refresh(blocking))?;
        self.steps.iter().try_for_each(|step| self.step(blocking, step))?;
        self.stores.iter().try_for_each(|store| store.sync(blocking, true))?;
        locked.into_iter().try_for_each(|store| Ok(store.unlock_changes(blocking)?))
    }

    fn step(&self, blocking: &Blocking, step: &LastStep) -> io::Result<()> {
        let store = |file: &LayerFile| &self.stores[usize::from(file.0)];
        match step {
            LastStep::Write { file, at, bytes, keep } => {
                let (store, mut bytes) = (store(file), bytes.clone());
                if let Some(keep) = keep {
                    let mut now = vec![0; keep.len];
                    let read = store.read_at(blocking, keep.at, &mut now)?;
                    now.truncate(read);
                    (keep.put)(&now, &mut bytes);
                }
                store.write_at(blocking, *at, &bytes)
            }
            LastStep::Resize { file, size } => store(file).set_len(blocking, *size),
            LastStep::Flush { file } => store(file).sync(blocking, false),
        }
    }
}
