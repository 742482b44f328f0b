//! Reading any bytes of a file that is open with O_DIRECT, which takes whole pages in both places.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::{FromBytes, IntoBytes};

/// What O_DIRECT asks for at most, of a file that is opened so.
const ALIGN: usize = 4096;

/// Pages at a time.
const PAGES: usize = 64;

#[derive(Clone, FromBytes, IntoBytes)]
#[repr(C, align(4096))]
struct Page([u8; ALIGN]);

/// Reads what is at byte `at`, as much as there is, and says how much that is.
pub(super) fn read_at(file: &File, at: u64, to: &mut [u8]) -> io::Result<usize> {
    let mut pages = vec![Page([0; ALIGN]); (to.len() / ALIGN + 2).min(PAGES)];
    let buffer = pages.as_mut_slice().as_mut_bytes();
    let mut done = 0;
    while done < to.len() {
        let now = at + done as u64;
        let within = (now % ALIGN as u64) as usize;
        let wanted = (within + to.len() - done).next_multiple_of(ALIGN).min(buffer.len());
        let read = match file.read_at(&mut buffer[..wanted], now - within as u64) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        let count = read.saturating_sub(within).min(to.len() - done);
        if count == 0 {
            break;
        }
        to[done..][..count].copy_from_slice(&buffer[within..][..count]);
        done += count;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_are_read_up_to_the_end() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..700_001u32).map(|i| (i % 251) as u8).collect();
        file.write_all_at(&bytes, 0).unwrap();
        for (at, len) in
            [(0, 512), (511, 2), (4095, 4098), (1, 699_999), (699_999, 100), (700_001, 5), (9_000_000, 1)]
        {
            let mut to = vec![0xee; len];
            let count = read_at(&file, at as u64, &mut to).unwrap();
            let expected = bytes.get(at..).unwrap_or_default();
            let expected = &expected[..len.min(expected.len())];
            assert!(to[..count] == *expected, "{at} {len}: {count} of {}", expected.len());
        }
    }
}
