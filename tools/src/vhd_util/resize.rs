//! `resize` and `revert`: a larger disk. Where the table has no room for its blocks, it grows, and what is behind it moves:
//! the batmap, the parent's names, and the blocks that are in the way. A journal has all that is overwritten.

use std::io;
use std::path::Path;

use drivers::vhd::layout::{self, Piece, batmap_pieces};
use drivers::vhd::{
    Batmap, Corrupt, FOOTER_SIZE, Footer, Header, Image, Kind, Locator, NAME_MAX, ReadError, SECTORS_MAX, Source,
    Table,
};
use nix::errno::Errno;
use tapdisk::chain;
use tapdisk::sys::errno_of;
use tapdisk::text::one_line;
use zerocopy::IntoBytes;

use super::create::{mebibytes, whole_blocks};
use super::failure::{Failure, Result};
use super::file::table_piece;
use super::file::{ImageFile, Medium, NewFile, write_footers, write_pieces};
use super::journal::{Journal, State};
use super::set::open;
use super::{Resize, Revert};

/// Bytes that are moved at a time: a block can have 256 MiB.
const PIECE: usize = 1 << 20;

/// Makes the disk larger.
pub(super) fn resize(args: &Resize) -> Result<()> {
    let path = &args.name;
    let (file, image) = open(path)?;
    let (old, size) = (image.size, whole_blocks(mebibytes(args.size)));
    let fail = |errno, text: String| Err(Failure::new(errno, path, text));
    if image.footer.creator != *b"tap\0" {
        let line = format!("{} not created by xen; resize not supported", path.display());
        let text = "it was made by another program, which may go by the geometry rather than by the size: convert it";
        return Err(Failure::new(Errno::EINVAL, path, text).saying(|_| line));
    }
    if size == old {
        return Ok(());
    }
    if size < old {
        let (errno, line) = match args.fast {
            true => (Errno::EINVAL, format!("{}: size ({size}) < curr size ({old})", path.display())),
            false => (Errno::ENOSYS, "resize failed: -38".to_owned()),
        };
        let text = format!("it has {old} bytes, and cannot be made smaller: data would be lost");
        return Err(Failure::new(errno, path, text).saying(|_| line));
    }
    let plan = Plan::new(&file, path, &image, size)?;
    if !plan.moves() {
        return grow_in_place(&file, &image, size).map_err(Failure::io(&file.path, "write it"));
    }
    let Some(journal_path) = &args.journal else {
        let block_size = image.header.as_ref().map(|header| u64::from(header.block_size()));
        let room = block_size.map_or(old, |block_size| u64::from(image.table_room) * block_size);
        return fail(Errno::EINVAL, format!("there is room for {room} bytes only: resize it with a journal (-j)"));
    };
    let journal_file = new_journal(journal_path, &image)?;
    let journal = journal_file.get();
    let taken = Journal::take(&file, image.footer.uuid, &plan.overwritten).map_err(Failure::io(path, "read it"))?;
    taken.write(journal).map_err(Failure::io(&journal.path, "write it"))?;
    // From here on it stays, unless the image is as it was or as it is to be.
    let journal = journal_file.leave()?;
    let grown = disable(&file, &image).and_then(|()| plan.carry_out(&file));
    if let Err(error) = grown {
        let undone = taken.restore(&file).and_then(|()| taken.done(&journal));
        let state = match undone {
            Ok(()) => {
                remove(&journal)?;
                "it is as it was"
            }
            Err(_) => "vhd-util revert makes it what it was",
        };
        let failure = Failure::io(&file.path, "write it")(error);
        let text = format!("{}; {state}", failure.text);
        return Err(Failure { text, ..failure }.saying(|errno| format!("resize failed: {errno}")));
    }
    taken.done(&journal).map_err(Failure::io(&journal.path, "write it"))?;
    remove(&journal)
}

/// Disables an image, so that nobody uses it as long as only its journal makes it whole: first by the footer's copy, then by that at the
/// end, which is the one that counts.
fn disable(file: &dyn Medium, image: &Image) -> io::Result<()> {
    let mut footer = image.footer;
    footer.disable();
    footer.seal();
    if image.kind != Kind::Fixed {
        file.write_at(0, footer.as_bytes())?;
        file.sync()?;
    }
    // One that was in use when the host stopped has none there, and its file may end with a block.
    let last = file.size()?.saturating_sub(FOOTER_SIZE as u64);
    let at = if file.is_device() { last } else { last.max(image.end()) };
    file.write_at(at, footer.as_bytes())?;
    file.sync()
}

/// The file or device of a new journal. One that is needed to undo another resize is left alone.
fn new_journal(path: &Path, image: &Image) -> Result<NewFile> {
    let failed = |failure: Failure| failure.saying(|errno| format!("creating journal failed: {errno}"));
    let there = || {
        let text = "there is a journal already: if it is of a resize of this image that was interrupted, run vhd-util \
                    revert first";
        failed(Failure::new(Errno::EEXIST, path, text))
    };
    let new = NewFile::create(path).map_err(|failure| match failure.errno {
        Errno::EEXIST => there(),
        _ => failed(failure),
    })?;
    // A device is there, and has what was written to it last.
    match new.get().is_device().then(|| Journal::read(new.get())) {
        Some(Ok(State::Complete(journal))) if journal.uuid == image.footer.uuid => Err(there()),
        _ => Ok(new),
    }
}

/// Removes a journal; a device stays, and says that there is nothing to undo.
fn remove(journal: &ImageFile) -> Result<()> {
    if journal.is_device() {
        return Ok(());
    }
    std::fs::remove_file(&journal.path).map_err(Failure::io(&journal.path, "remove it"))
}

/// Only the footers say how large a disk is that there is room for.
fn grow_in_place(file: &dyn Medium, image: &Image, size: u64) -> io::Result<()> {
    if let Some(header) = &image.header {
        // Others left in the entries what they liked as long as the disk did not have them.
        let blocks = size.div_ceil(header.block_size().into()) as u32;
        let unused = Table::empty(blocks - image.table.blocks());
        let mut bytes = vec![0; 4 * unused.blocks() as usize];
        unused.write(0, &mut bytes);
        file.write_at(header.table_at() + 4 * u64::from(image.table.blocks()), &bytes)?;
        if let Some(batmap) = with_open_end(image) {
            write_pieces(file, &batmap_pieces(&batmap))?;
        }
        file.sync()?;
    }
    let mut footer = image.footer;
    footer.set_size(size);
    write_footers(file, &footer, image.end())
}

/// The batmap, if the file's has to change: a block that the disk ends in is not full any more when the disk has more of it, and of
/// blocks that are to come it says nothing.
fn with_open_end(image: &Image) -> Option<Batmap> {
    let (header, mut batmap) = (image.header.as_ref()?, image.batmap.clone()?);
    let block_size = u64::from(header.block_size());
    let last = (image.size / block_size) as u32;
    let open = !image.size.is_multiple_of(block_size) && batmap.is_full(last);
    batmap.set(last, false);
    (open || image.batmap_is_stale).then_some(batmap)
}

/// Undoes a resize that was interrupted.
pub(super) fn revert(args: &Revert) -> Result<()> {
    let opening = |failure: Failure| failure.saying(|errno| format!("opening journal failed: {errno}"));
    let file = ImageFile::open(&args.name).map_err(|error| opening(error.into()))?;
    let journal = ImageFile::open(&args.journal).map_err(|error| opening(error.into()))?;
    let found = Journal::read(&journal).map_err(Failure::io(&args.journal, "read it"))?;
    match found {
        State::Foreign => {
            let text = "it is no journal of a resize, or it was damaged: nothing was changed";
            return Err(opening(Failure::new(Errno::EINVAL, &args.journal, text)));
        }
        State::Blktap => {
            let text = "it is a journal of blktap's vhd-util, which has to revert it: nothing was changed";
            return Err(opening(Failure::new(Errno::EINVAL, &args.journal, text)));
        }
        State::Idle
            if matches!(
                file.image(),
                Err(chain::Error::Image { source: ReadError::Corrupt(Corrupt::Disabled), .. })
            ) =>
        {
            let text = "there is nothing in it to make the image whole, which is disabled: it is another's, or of another resize";
            return Err(opening(Failure::new(Errno::EINVAL, &args.journal, text)));
        }
        State::Idle => {}
        State::Complete(saved) => {
            let uuids = uuids(&file);
            if !uuids.is_empty() && !uuids.contains(&saved.uuid) {
                let text = format!("it is the journal of another image, {}: nothing was changed", saved.uuid);
                return Err(opening(Failure::new(Errno::EINVAL, &args.journal, text)));
            }
            if let Ok(image) = file.image() {
                // It may have been written since.
                let text =
                    "it is whole: the resize of this journal had not begun, or was complete; it stays as it is";
                let size = image.size;
                let said = format!("{}: {text}, with {size} bytes, and the journal is removed", args.name.display());
                eprintln!("{}", one_line(&said));
                saved.done(&journal).map_err(Failure::io(&journal.path, "write it"))?;
                return remove(&journal);
            }
            let restored = saved.restore(&file).map_err(Failure::io(&file.path, "write it"));
            restored.map_err(|failure| failure.saying(|errno| format!("reverting journal failed: {errno}")))?;
            saved.done(&journal).map_err(Failure::io(&journal.path, "write it"))?;
        }
    }
    remove(&journal)
}

fn size_of(file: &dyn Medium) -> std::result::Result<u64, (Errno, String)> {
    file.size().map_err(|error| (errno_of(&error), format!("cannot see its size: {error}")))
}

/// The UUIDs of the image's footers, as far as these are good.
fn uuids(file: &dyn Source) -> Vec<drivers::vhd::Uuid> {
    let last = file.size().ok().map(|size| size.saturating_sub(FOOTER_SIZE as u64));
    let footers = std::iter::once(0).chain(last).filter_map(|at| {
        let mut bytes = [0; FOOTER_SIZE];
        file.read_at(at, &mut bytes).ok()?;
        Footer::parse_disabled(&bytes).ok()
    });
    footers.map(|(footer, _)| footer.uuid).collect()
}

/// What a resize does.
struct Plan {
    /// As the image is to be.
    image: Image,
    /// Where a block is, and where it goes.
    moved: Vec<(u32, u64, u64)>,
    /// What is written that is neither block nor footer.
    pieces: Vec<Piece>,
    /// A fixed image's new bytes: from where on, and how many.
    zeros: Option<(u64, u64)>,
    /// What is overwritten: where, and how many bytes.
    overwritten: Vec<(u64, u64)>,
    /// Where the data ends.
    end: u64,
}

impl Plan {
    fn new(file: &dyn Medium, path: &Path, image: &Image, size: u64) -> Result<Plan> {
        Plan::make(file, image, size).map_err(|(errno, text)| Failure::new(errno, path, text))
    }

    fn make(file: &dyn Medium, image: &Image, size: u64) -> std::result::Result<Plan, (Errno, String)> {
        let mut image = image.clone();
        if let Some(batmap) = with_open_end(&image) {
            image.batmap = Some(batmap);
        }
        let old_end = image.end();
        let old_size = image.size;
        image.footer.set_size(size);
        image.size = size;
        let mut plan =
            Plan { image, moved: Vec::new(), pieces: Vec::new(), zeros: None, overwritten: Vec::new(), end: old_end };
        if let Some(header) = plan.image.header {
            plan.blocks(file, &header, size)?;
        } else {
            plan.zeros = Some((old_size, size - old_size));
            plan.end = size;
        }
        let there = size_of(file)?;
        // In a file, its data may grow over it.
        let footer = there.saturating_sub(FOOTER_SIZE as u64);
        if file.is_device() && plan.end > footer {
            let needed = plan.end + FOOTER_SIZE as u64;
            return Err((Errno::ENOSPC, format!("the device has {there} bytes, and {needed} are needed")));
        }
        let metadata = plan.overwritten.last().map_or(0, |(at, len)| at + len);
        plan.overwritten.push((footer.max(metadata), there.saturating_sub(footer.max(metadata))));
        Ok(plan)
    }

    /// Whether more than footers is written.
    fn moves(&self) -> bool {
        !self.pieces.is_empty() || self.zeros.is_some()
    }

    /// Says where everything goes if the table has to grow.
    fn blocks(&mut self, file: &dyn Medium, old: &Header, size: u64) -> std::result::Result<(), (Errno, String)> {
        let entries = size.div_ceil(old.block_size().into());
        if entries <= self.image.table_room.into() {
            return Ok(());
        }
        let mut header = *old;
        let most = layout::size_max(self.image.metadata_end, &header).min(layout::ROOM_MAX);
        if size > most {
            return Err((Errno::EFBIG, layout::LayoutError::Size { size, most }.to_string()));
        }
        let entries = entries as u32;
        header.set_entries(entries);
        let mut at = header.table_at() + Table::bytes(entries);
        let batmap = self.image.batmap.as_ref().map(|batmap| batmap.moved(at, entries));
        at = batmap.as_ref().map_or(at, |batmap| batmap.bits_at + batmap.bits().len() as u64);
        for locator in header.locators.iter_mut().filter(|locator| locator.platform().is_some()) {
            let (from, len) = locator.place();
            // What it says of its room is the image's word.
            let space = locator.space().min(NAME_MAX);
            if len > space {
                return Err((Errno::EINVAL, format!("its parent's name has {len} bytes, and may have {NAME_MAX}")));
            }
            let mut name = vec![0; space as usize];
            file.read_at(from, &mut name).map_err(|error| (Errno::EIO, format!("cannot read it: {error}")))?;
            if let Some(platform) = locator.platform() {
                *locator = Locator::with_space(platform, at, len as u32, space);
            }
            self.pieces.push(Piece { at, bytes: name });
            at += space;
        }
        header.seal();
        let header_at = self.image.footer.header_at().unwrap_or(FOOTER_SIZE as u64);
        if header_at > header.table_at() {
            return Err((
                Errno::EINVAL,
                "its header is behind its table, which blktap's never is: convert it".into(),
            ));
        }
        self.image.metadata_end = at;
        self.image.table.grow(entries);
        self.make_room(&header)?;
        self.pieces.push(table_piece(header.table_at(), &self.image.table));
        self.pieces.extend(batmap.iter().flat_map(batmap_pieces));
        self.pieces.push(Piece { at: header_at, bytes: header.as_bytes().to_vec() });
        self.image.header = Some(header);
        self.image.batmap = batmap;
        self.overwritten.push((0, at.min(size_of(file)?)));
        Ok(())
    }

    /// Says where the blocks go that are where the metadata is to be.
    fn make_room(&mut self, header: &Header) -> std::result::Result<(), (Errno, String)> {
        let metadata_end = self.image.metadata_end;
        let in_the_way: Vec<_> = self.image.table.allocated().filter(|(_, at)| *at < metadata_end).collect();
        self.end = self.end.max(metadata_end);
        for (block, from) in in_the_way {
            let to = layout::block_place(self.end, header);
            if to / 512 >= SECTORS_MAX {
                return Err((Errno::EFBIG, "its table cannot address where a block would have to go".into()));
            }
            self.image.table.set(block, to);
            self.moved.push((block, from, to));
            self.end = to + header.block_len();
        }
        if self.image.table.allocated().next().is_none() {
            self.end = metadata_end;
        }
        Ok(())
    }

    /// Does it, in an order that does not matter as long as the journal is there; the footers come last.
    fn carry_out(&self, file: &dyn Medium) -> io::Result<()> {
        if !file.is_device() {
            // The last sector is no block's meanwhile, in which a guest may have put a footer of its own.
            file.write_at(self.end, &[0; FOOTER_SIZE])?;
            file.set_len(self.end + FOOTER_SIZE as u64)?;
            file.sync()?;
        }
        if let Some((at, len)) = self.zeros {
            file.zero(at, len)?;
        }
        if let Some(header) = &self.image.header {
            let mut buffer = vec![0; PIECE];
            for (_, from, to) in &self.moved {
                for at in (0..header.block_len()).step_by(PIECE) {
                    let piece = &mut buffer[..(header.block_len() - at).min(PIECE as u64) as usize];
                    file.read_at(from + at, piece)?;
                    file.write_at(to + at, piece)?;
                }
            }
        }
        write_pieces(file, &self.pieces)?;
        file.sync()?;
        write_footers(file, &self.image.footer, self.end)
    }
}

#[cfg(test)]
mod tests {
    use drivers::vhd::{Corrupt, Platform, ReadError};

    use super::super::testing::{self, Memory, crashes};
    use super::*;

    /// What a resize does to the image, with a journal that is safe.
    fn grow(memory: &Memory, size: u64) -> io::Result<()> {
        let image = Image::read(memory, &mut Vec::new()).unwrap();
        Plan::make(memory, &image, size).map_err(|(errno, _)| io::Error::from(errno))?.carry_out(memory)
    }

    #[test]
    fn an_image_without_a_last_footer_keeps_its_last_block() {
        // As blktap leaves one that was in use when the host stopped: it ends with a block.
        let image = testing::image(Kind::Dynamic, false, &[(1, 0..8)], 3);
        let before = testing::content(&[&image]);
        let mut bytes = image.bytes();
        bytes.truncate(bytes.len() - FOOTER_SIZE);
        let image = Memory::new(bytes, false);
        let read = Image::read(&image, &mut Vec::new()).unwrap();
        let plan = Plan::make(&image, &read, 4096 * 5000).unwrap();
        let journal = Journal::take(&image, read.footer.uuid, &plan.overwritten).unwrap();
        disable(&image, &read).unwrap();
        assert!(disabled(&image));
        journal.restore(&image).unwrap();
        assert_eq!(testing::content(&[&image]), before);
        disable(&image, &read).and_then(|()| plan.carry_out(&image)).unwrap();
        assert!(testing::content(&[&image]).starts_with(&before));
    }

    #[test]
    fn the_room_that_locators_claim_is_not_taken_with_them() {
        let image = testing::image(Kind::Differencing, false, &[(1, 0..8)], 3);
        let mut read = testing::image_of(&image).unwrap();
        let at = image.size().unwrap();
        let mut bytes = image.bytes();
        bytes.resize(at as usize + (1 << 20), 0);
        bytes[at as usize..][..12].copy_from_slice(b"file://p.vhd");
        let image = Memory::new(bytes, false);
        let mut header = read.header.unwrap();
        header.locators = [Locator::with_space(Platform::MacX, at, 12, 1 << 20); 8];
        read.header = Some(header);
        let plan = Plan::make(&image, &read, 4096 * 5000).unwrap();
        assert!(plan.pieces.iter().map(|piece| piece.bytes.len() as u64).sum::<u64>() < 10 * NAME_MAX);
        header.locators = [Locator::with_space(Platform::MacX, at, NAME_MAX as u32 + 1, 1 << 20); 8];
        read.header = Some(header);
        assert_eq!(Plan::make(&image, &read, 4096 * 5000).err().map(|(errno, _)| errno), Some(Errno::EINVAL));
    }

    /// Whether nobody uses it; all else must be whole.
    fn disabled(memory: &Memory) -> bool {
        match Image::read(memory, &mut Vec::new()) {
            Err(ReadError::Corrupt(Corrupt::Disabled)) => true,
            read => read.map(|_| false).unwrap(),
        }
    }

    #[test]
    fn a_resize_that_is_interrupted_is_undone() {
        for (device, kind) in [(false, Kind::Dynamic), (true, Kind::Differencing)] {
            let held = [(3, 0..3), (1, 0..8), (9, 1..2)];
            let image = testing::image(kind, device, &held, 3);
            let before = testing::content(&[&image]);
            // A table of more than a sector, and of so many that all blocks have to go.
            for size in [4096 * 300, 4096 * 5000] {
                let read = Image::read(&image, &mut Vec::new()).unwrap();
                let plan = Plan::make(&image, &read, size).unwrap();
                assert!(plan.moves() && !plan.moved.is_empty());
                let journal = Journal::take(&image, read.footer.uuid, &plan.overwritten).unwrap();
                let grown = |after: &Memory| {
                    let content = testing::content(&[after]);
                    assert_eq!((content.len() as u64, &content[..before.len()]), (size, &before[..]));
                    assert!(content[before.len()..].iter().all(|byte| *byte == 0));
                };
                let undo = |image: &Memory| if disabled(image) { journal.restore(image) } else { Ok(()) };
                crashes(
                    &image,
                    |image| disable(image, &read).and_then(|()| plan.carry_out(image)),
                    |after| {
                        if !disabled(after) && testing::image_of(after).unwrap().size == size {
                            return grown(after);
                        }
                        undo(after).unwrap();
                        assert_eq!(testing::fatal(after), None);
                        assert_eq!(testing::content(&[after]), before);
                        assert_eq!(after.size().unwrap(), image.size().unwrap());
                        grow(after, size).unwrap();
                        assert_eq!(testing::problems(after), []);
                        grown(after);
                    },
                );
                let half = Memory::new(image.bytes(), device);
                disable(&half, &read).unwrap();
                let half = half.failing_after(5);
                plan.carry_out(&half).unwrap_err();
                crashes(&half.crashed(|| true), undo, |after| {
                    undo(after).unwrap();
                    assert_eq!(testing::fatal(after), None);
                    assert_eq!(testing::content(&[after]), before);
                });
            }
        }
    }

    #[test]
    fn a_disk_grows_in_place_or_not_at_all() {
        let image = testing::image(Kind::Dynamic, false, &[(3, 0..3), (5, 0..8)], 3);
        // The table's sector has room for 128 entries.
        let mut header = Image::read(&image, &mut Vec::new()).unwrap().header.unwrap();
        header.set_entries(128);
        header.seal();
        image.write_at(FOOTER_SIZE as u64, header.as_bytes()).unwrap();
        image.write_at(header.table_at() + 4 * 20, &[0; 12]).unwrap();
        image.sync().unwrap();
        let before = testing::content(&[&image]);
        let grow = |image: &Memory| {
            let read = Image::read(image, &mut Vec::new()).unwrap();
            if read.footer.size() == 4096 * 100 { Ok(()) } else { grow_in_place(image, &read, 4096 * 100) }
        };
        crashes(&image, grow, |after| {
            assert_eq!(testing::fatal(after), None);
            assert!(testing::content(&[after]).starts_with(&before));
            grow(after).unwrap();
            let content = testing::content(&[after]);
            assert!(content.len() == 4096 * 100 && content.starts_with(&before));
        });
    }

    #[test]
    fn a_device_that_is_too_small_is_refused() {
        let image = testing::image(Kind::Dynamic, false, &[(3, 0..3)], 3);
        let full = image.device_of(image.size().unwrap() + 100);
        assert_eq!(grow(&full, 4096 * 5000).unwrap_err().raw_os_error(), Some(Errno::ENOSPC as i32));
        assert_eq!(testing::problems(&full), []);
    }
}
