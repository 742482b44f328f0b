//! Bytes that are in the memory of this process, and gone with it.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use crate::blocking::Blocking;

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
