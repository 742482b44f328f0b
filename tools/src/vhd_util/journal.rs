//! What a resize changes, as it was: with it `revert` makes the image what it was before.
//!
//! ```text
//! 0     magic                                8 bytes: "tapvhdrj"
//! 8     state                                8 bytes: 0 not complete, 1 complete, 2 of no use any more
//! 16    the image's UUID                    16 bytes
//! 32    bytes of the image's file            8 bytes
//! 40    checksum of what is saved            8 bytes: CRC-32C
//! 48    ranges that are saved                8 bytes: how many; then for each where it is, and its bytes, 8 bytes each
//! 512   what is saved
//! ```
//!
//! All numbers are big-endian. It is ours: blktap's are known, and not read.
//!
//! From the journal's completion to the end of the resize, or of its undoing, the image's footers say that it is disabled: nobody uses
//! it, and so nothing that a guest has written is undone.

use std::io;

use drivers::vhd::{FOOTER_SIZE, Footer, Source, Uuid};
use nix::errno::Errno;
use zerocopy::IntoBytes;

use super::file::Medium;

const MAGIC: &[u8; 8] = b"tapvhdrj";
/// What a journal of blktap's begins with (libvhd-journal.h).
const BLKTAP: &[u8; 8] = b"vjournal";
const HEADER: u64 = 512;
/// Ranges that a header has room for.
const RANGES_MAX: u64 = (HEADER - 56) / 16;
/// Bytes that are saved, at most; all the metadata of the largest image are less.
const SAVED_MAX: u64 = 64 << 20;

const INCOMPLETE: u64 = 0;
const COMPLETE: u64 = 1;
const DONE: u64 = 2;

/// What is saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Journal {
    /// The image's.
    pub(super) uuid: Uuid,
    /// Bytes of the image's file.
    pub(super) len: u64,
    /// Where bytes are, and they.
    pub(super) saved: Vec<(u64, Vec<u8>)>,
}

/// What a file says that may be a journal.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It is something else.
    Foreign,
    /// It is blktap's.
    Blktap,
    /// There is nothing to undo: nothing was done, or all.
    Idle,
    /// There is something to undo.
    Complete(Journal),
}

impl Journal {
    /// Takes what is at some places.
    pub(super) fn take(of: &dyn Source, uuid: Uuid, ranges: &[(u64, u64)]) -> io::Result<Journal> {
        let mut saved = Vec::new();
        // Where its metadata ends, an image says.
        if ranges.iter().fold(0, |sum: u64, (_, len)| sum.saturating_add(*len)) > SAVED_MAX {
            return Err(Errno::EFBIG.into());
        }
        for (at, len) in ranges {
            let mut bytes = vec![0; *len as usize];
            of.read_at(*at, &mut bytes)?;
            saved.push((*at, bytes));
        }
        Ok(Journal { uuid, len: of.size()?, saved })
    }

    /// Writes it. When this returns, it can be reverted to.
    pub(super) fn write(&self, to: &dyn Medium) -> io::Result<()> {
        to.write_at(0, &self.header(INCOMPLETE))?;
        to.sync()?;
        let mut at = HEADER;
        for (_, bytes) in &self.saved {
            to.write_at(at, bytes)?;
            at += bytes.len() as u64;
        }
        to.sync()?;
        to.write_at(0, &self.header(COMPLETE))?;
        to.sync()
    }

    /// Says that there is nothing to undo any more.
    pub(super) fn done(&self, to: &dyn Medium) -> io::Result<()> {
        to.write_at(0, &self.header(DONE))?;
        to.sync()
    }

    /// Makes the image what it was. If it is interrupted, it can be done again: the footers come last, and until then say that it is
    /// disabled.
    pub(super) fn restore(&self, image: &dyn Medium) -> io::Result<()> {
        let mut footers = Vec::new();
        for (at, bytes) in &self.saved {
            let mut bytes = bytes.clone();
            for place in self.footers(*at, bytes.len()) {
                let sector = &mut bytes[place..place + FOOTER_SIZE];
                let mut footer = [0; FOOTER_SIZE];
                footer.copy_from_slice(sector);
                if let Ok((mut disabled, _)) = Footer::parse_disabled(&footer) {
                    disabled.disable();
                    disabled.seal();
                    sector.copy_from_slice(disabled.as_bytes());
                }
                footers.push((*at + place as u64, footer));
            }
            image.write_at(*at, &bytes)?;
        }
        image.set_len(self.len)?;
        image.sync()?;
        for (at, footer) in footers {
            image.write_at(at, &footer)?;
            image.sync()?;
        }
        Ok(())
    }

    /// Where footers are in what is saved of `len` bytes at byte `at`: at the image's beginning, and at its end.
    fn footers(&self, at: u64, len: usize) -> impl Iterator<Item = usize> {
        let last = self.len.saturating_sub(FOOTER_SIZE as u64);
        [0, last].into_iter().filter_map(move |place| {
            let within = usize::try_from(place.checked_sub(at)?).ok()?;
            (within + FOOTER_SIZE <= len).then_some(within)
        })
    }

    fn header(&self, state: u64) -> [u8; HEADER as usize] {
        let sum = self.saved.iter().fold(0, |sum, (_, bytes)| crc32c::crc32c_append(sum, bytes));
        let ranges = self.saved.iter().flat_map(|(at, bytes)| [*at, bytes.len() as u64]);
        let numbers = [self.len, sum.into(), self.saved.len() as u64].into_iter().chain(ranges);
        let mut header = [0; HEADER as usize];
        header[..8].copy_from_slice(MAGIC);
        header[8..16].copy_from_slice(&state.to_be_bytes());
        header[16..32].copy_from_slice(&self.uuid.0);
        for (place, number) in header[32..].chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_be_bytes());
        }
        header
    }

    /// Reads what may be one.
    pub(super) fn read(from: &dyn Source) -> io::Result<State> {
        let size = from.size()?;
        if size == 0 {
            return Ok(State::Idle);
        }
        let mut header = [0; HEADER as usize];
        if size < HEADER {
            return Ok(State::Foreign);
        }
        from.read_at(0, &mut header)?;
        if header[..8] == *BLKTAP {
            return Ok(State::Blktap);
        }
        if header == [0; HEADER as usize] {
            // A new volume, which nothing was written to.
            return Ok(State::Idle);
        }
        if header[..8] != *MAGIC {
            return Ok(State::Foreign);
        }
        let mut uuid = Uuid::NIL;
        uuid.0.copy_from_slice(&header[16..32]);
        let mut numbers = header[8..].chunks_exact(8).map(|number| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(number);
            u64::from_be_bytes(bytes)
        });
        let mut next = || numbers.next().unwrap_or(0);
        let (state, _, _, len, sum, count) = (next(), next(), next(), next(), next(), next());
        if state != COMPLETE {
            return Ok(if state == INCOMPLETE || state == DONE { State::Idle } else { State::Foreign });
        }
        let mut at = HEADER;
        let mut saved = Vec::new();
        for _ in 0..count.min(RANGES_MAX) {
            let (place, len) = (next(), next());
            let end = at.checked_add(len).filter(|end| *end - HEADER <= SAVED_MAX && *end <= size);
            if end.is_none() {
                return Ok(State::Foreign);
            }
            let mut bytes = vec![0; len as usize];
            from.read_at(at, &mut bytes)?;
            at += len;
            saved.push((place, bytes));
        }
        let found = saved.iter().fold(0, |sum, (_, bytes)| crc32c::crc32c_append(sum, bytes));
        let whole = count <= RANGES_MAX && sum == u64::from(found);
        Ok(if whole { State::Complete(Journal { uuid, len, saved }) } else { State::Foreign })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Memory, crashes};
    use super::*;

    #[test]
    fn a_journal_is_complete_or_of_no_use() {
        let image = Memory::new(vec![3; 4096], false);
        let journal = Journal::take(&image, Uuid([9; 16]), &[(0, 2000), (3584, 512)]).unwrap();
        // On a device, with one of another image.
        let other = Journal::take(&image, Uuid([8; 16]), &[(0, 3000)]).unwrap();
        let device = Memory::new(vec![0x77; 8192], true);
        other.write(&device).unwrap();
        for start in [Memory::new(Vec::new(), false), device] {
            crashes(
                &start,
                |to| journal.write(to),
                |after| match Journal::read(after).unwrap() {
                    State::Complete(found) => assert!(found == journal || found == other),
                    State::Idle | State::Foreign | State::Blktap => {}
                },
            );
            journal.write(&start).unwrap();
            assert_eq!(Journal::read(&start.crashed(|| false)).unwrap(), State::Complete(journal.clone()));
        }
    }

    #[test]
    fn a_journal_is_written_and_read() {
        let image = Memory::new((0..4096).map(|i| i as u8).collect(), false);
        let journal = Journal::take(&image, Uuid([9; 16]), &[(0, 1000), (3584, 512)]).unwrap();
        let file = Memory::new(Vec::new(), false);
        assert_eq!(Journal::read(&file).unwrap(), State::Idle);
        journal.write(&file).unwrap();
        assert_eq!(Journal::read(&file).unwrap(), State::Complete(journal.clone()));
        let mut bad = file.bytes();
        bad[700] ^= 1;
        assert_eq!(Journal::read(&Memory::new(bad, false)).unwrap(), State::Foreign);
        assert_eq!(Journal::read(&Memory::new(vec![0; 4096], false)).unwrap(), State::Idle, "a new volume");
        let before = image.bytes();
        image.write_at(500, &[1; 100]).unwrap();
        image.write_at(3600, &[2; 5000]).unwrap();
        journal.restore(&image).unwrap();
        assert_eq!(image.bytes(), before);
        journal.done(&file).unwrap();
        assert_eq!(Journal::read(&file).unwrap(), State::Idle);
    }
}
