//! Bytes that are in the memory of this process, and gone with it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;

use super::{Error, Identity, Means, Store};
use crate::blocking::Blocking;
use crate::sys::file::Geometry;

/// Bytes at a time that are copied by those who are not the engine, which waits for each copy.
const COPY: usize = 64 << 10;

/// Bytes in memory. An engine moves them, and whoever opens an image reads and writes them plainly.
#[derive(Debug)]
pub struct Ram {
    size: u64,
    /// None: nothing is kept, which measures everything else.
    bytes: Option<Mutex<Vec<u8>>>,
}

impl Ram {
    /// So many zeros. Takes its time where that is much.
    pub fn zeroed(_: &Blocking, size: u64) -> io::Result<Ram> {
        let len = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        bytes.resize(len, 0);
        Ok(Ram { size, bytes: Some(Mutex::new(bytes)) })
    }

    /// What keeps nothing: a read leaves the reader's memory as it was.
    pub fn null(size: u64) -> Ram {
        Ram { size, bytes: None }
    }

    /// What it is called where the image is that and nothing else.
    pub fn name(&self) -> &'static str {
        if self.bytes.is_some() { "ram" } else { "null" }
    }

    /// Bytes that there are.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The bytes, for as long as the guard lives; none if nothing is kept.
    pub(crate) fn bytes(&self) -> Option<MutexGuard<'_, Vec<u8>>> {
        Some(self.bytes.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Fills `to` with what is at byte `at`, or as much as there is, and says how much that is.
    pub fn read_at(&self, _: &Blocking, at: u64, to: &mut [u8]) -> usize {
        let count = self.size.saturating_sub(at).min(to.len() as u64) as usize;
        for (index, part) in to[..count].chunks_mut(COPY).enumerate() {
            match self.bytes() {
                Some(bytes) => part.copy_from_slice(&bytes[at as usize + index * COPY..][..part.len()]),
                None => part.fill(0),
            }
        }
        count
    }

    /// Writes all of `from` from byte `at` on, or nothing: it does not grow.
    pub fn write_at(&self, _: &Blocking, at: u64, from: &[u8]) -> io::Result<()> {
        if at.checked_add(from.len() as u64).is_none_or(|end| end > self.size) {
            return Err(Errno::ENOSPC.into());
        }
        for (index, part) in from.chunks(COPY).enumerate() {
            if let Some(mut bytes) = self.bytes() {
                bytes[at as usize + index * COPY..][..part.len()].copy_from_slice(part);
            }
        }
        Ok(())
    }
}

/// RAM as a store, which nobody else has.
#[derive(Debug)]
pub struct MemoryStore {
    path: PathBuf,
    ram: Arc<Ram>,
    number: u64,
}

impl MemoryStore {
    /// One that messages call `path`.
    pub fn new(path: &Path, ram: Arc<Ram>) -> MemoryStore {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        MemoryStore { path: path.to_owned(), ram, number: NEXT.fetch_add(1, Relaxed) }
    }
}

impl Store for MemoryStore {
    fn path(&self) -> &Path {
        &self.path
    }

    fn identity(&self) -> Identity {
        Identity::Memory(self.number)
    }

    fn geometry(&self) -> Geometry {
        Geometry { block_device: false, size: self.ram.size, logical: 512, physical: 4096 }
    }

    fn is_direct(&self) -> bool {
        true
    }

    fn file(&self) -> Option<&File> {
        None
    }

    fn lock(&mut self, _: &Blocking) -> Result<(), Error> {
        Ok(())
    }

    fn holds_off(&self) -> &'static str {
        "all: it is this process's own"
    }

    fn lock_changes(&self, _: &Blocking, _: Duration) -> Result<(), Errno> {
        Ok(())
    }

    fn unlock_changes(&self, _: &Blocking) -> Result<(), Errno> {
        Ok(())
    }

    fn has_other_readers(&self, _: &Blocking) -> Result<bool, Errno> {
        Ok(false)
    }

    fn size_now(&self, _: &Blocking) -> io::Result<u64> {
        Ok(self.ram.size)
    }

    fn read_at(&self, blocking: &Blocking, at: u64, to: &mut [u8]) -> io::Result<usize> {
        Ok(self.ram.read_at(blocking, at, to))
    }

    fn write_at(&self, blocking: &Blocking, at: u64, from: &[u8]) -> io::Result<()> {
        self.ram.write_at(blocking, at, from)
    }

    fn set_len(&self, _: &Blocking, _: u64) -> io::Result<()> {
        Err(Errno::EOPNOTSUPP.into())
    }

    fn sync(&self, _: &Blocking, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn refresh(&self, _: &Blocking) -> io::Result<()> {
        Ok(())
    }

    fn means(&self, _: &Blocking) -> io::Result<Means> {
        Ok(Means::Memory(Arc::clone(&self.ram)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_grows() {
        let blocking = Blocking::before_main_loop();
        let ram = Ram::zeroed(&blocking, 200_000).unwrap();
        let written: Vec<u8> = (0..150_000).map(|i| (i % 251) as u8).collect();
        ram.write_at(&blocking, 40_000, &written).unwrap();
        let mut read = vec![7; 170_000];
        assert_eq!(ram.read_at(&blocking, 39_999, &mut read), 160_001, "it ends there");
        assert!(read[0] == 0 && read[1..150_001] == written && read[150_001..160_001].iter().all(|byte| *byte == 0));
        for at in [199_999, 200_000, u64::MAX] {
            assert_eq!(ram.write_at(&blocking, at, &[1, 1]).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
            assert_eq!(ram.read_at(&blocking, at, &mut read), usize::from(at == 199_999));
        }
    }
}
