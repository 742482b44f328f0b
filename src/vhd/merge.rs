//! Merges a differencing image into its parent.
//!
//! The child is not changed, beyond what it says of a raw parent's time, and hides what is changed in its parent. So a merge that
//! was interrupted is done again, and until then the disk is what it was. The parent is a good image at each moment: data is written first, then the bitmaps
//! that say that it is there, then the table that says where new blocks are, and each is safe before the next begins. Where
//! new blocks are put the footer was; its copy at the beginning is used until it is written again. All this is done for a part of the disk,
//! and then for the next one: what is done stays done.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use drivers::vhd::layout::{self, batmap_pieces};
use drivers::vhd::{FOOTER_SIZE, Header, Image, KeyHash, Kind, Parts, SECTORS_MAX, Source, Uuid, bitmap};
use nix::errno::Errno;
use zerocopy::IntoBytes;

use super::file::{
    ImageFile, Medium, ReadFile, cut_footer, footer_place, table_part, write_batmap, write_footers, write_pieces,
};
use crate::chain::{self, Link, Rules};
use crate::store;

const SECTOR: u64 = 512;
/// Bytes that are written before they are made safe: what the page cache holds is written back all at once, beside what guests do.
const SYNC_EACH: u64 = 32 << 20;
/// How much of a part is done where only bitmaps are left.
const DATA_SHARE: f64 = 0.99;
/// Bytes that are copied at a time.
const PIECE: usize = 1 << 20;
/// Bytes of the disk that a part has.
const PART: u64 = 256 << 20;

/// Why an image is not merged into its parent. Both are as they were, or as an interrupted merge leaves them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One of them is no good.
    #[error(transparent)]
    Chain(#[from] chain::Error),
    /// One of them can't be opened.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// They can't be merged.
    #[error("{}: {text}", path.display())]
    Unfit {
        /// The image.
        path: PathBuf,
        /// As a client is told.
        errno: Errno,
        /// Why not.
        text: &'static str,
    },
    /// The parent is smaller than what is to be merged into it.
    #[error("{}: it has {size} bytes, and its child has data up to byte {end}: resize it first", path.display())]
    Small {
        /// The parent.
        path: PathBuf,
        /// Bytes of its disk.
        size: u64,
        /// Where the child's data ends.
        end: u64,
    },
    /// The system says no.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
}

impl Error {
    /// The errno that it stands for.
    pub fn errno(&self) -> Errno {
        match self {
            Error::Chain(error) => error.errno(),
            Error::Store(error) => error.errno(),
            Error::Unfit { errno, .. } => *errno,
            Error::Small { .. } => Errno::ERANGE,
            Error::Io { source, .. } => crate::sys::errno_of(source),
        }
    }
}

/// The hash of the key that an image is encrypted with.
fn key_hash(image: Option<&Image>) -> Option<KeyHash> {
    image?.batmap.as_ref()?.key_hash
}

/// A raw parent's time, which is its file's, tells that it has changed. It is about to, so its child does not go by that any more:
/// a merge may be interrupted, and the child is to be opened again. Time and checksum are in one sector, which is written at once.
fn forget_time(path: &Path, child: &Image) -> Result<(), Error> {
    let Some((mut header, at)) = child.header.zip(child.footer.header_at()) else { return Ok(()) };
    if header.parent_timestamp.get() == 0 {
        return Ok(());
    }
    header.parent_timestamp = 0.into();
    header.seal();
    let file = ImageFile::open(path)?;
    let sector = &header.as_bytes()[..SECTOR as usize];
    file.write_at(at, sector).and_then(|()| file.sync()).map_err(|source| Error::Io {
        path: path.to_owned(),
        action: "write its header",
        source,
    })
}

/// How far a merge is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// From 0 to 1.
    pub done: f64,
    /// Bytes that were merged since it was told last.
    pub data: u64,
    /// Bytes of bitmaps that were looked at since then, to say that the data is there.
    pub bitmaps: u64,
}

/// Who is told how far a merge is.
struct Told<'a> {
    progress: &'a mut dyn FnMut(Progress) -> io::Result<()>,
    data: u64,
    bitmaps: u64,
}

impl Told<'_> {
    fn tell(&mut self, done: f64) -> io::Result<()> {
        let (data, bitmaps) = (std::mem::take(&mut self.data), std::mem::take(&mut self.bitmaps));
        (self.progress)(Progress { done, data, bitmaps })
    }
}

/// Merges all that an image holds into its parent, and says how many sectors that are. `progress` is told before each block; an error
/// of its ends the merge.
pub fn merge(
    path: &Path,
    parents: &[PathBuf],
    progress: &mut dyn FnMut(Progress) -> io::Result<()>,
) -> Result<u64, Error> {
    let io = |path: &Path, action| {
        let path = path.to_owned();
        move |source| Error::Io { path, action, source }
    };
    let unfit = |path: &Path, text| Error::Unfit { path: path.to_owned(), errno: Errno::EINVAL, text };
    let child_file = ReadFile::open(path)?;
    let Link { image, .. } = chain::parent_layer(path)?;
    let child = image
        .filter(|image| image.kind == Kind::Differencing)
        .ok_or_else(|| unfit(path, "it is no differencing image: there is no parent to merge it into"))?;
    // That it is the right one is part of it.
    let chain = chain::chain(path, &Rules::tool(parents, Parts::All))?;
    chain[0].is(&child_file.file)?;
    let parent_path = &chain[1].path;
    let parent = ImageFile::open(parent_path)?;
    chain[1].is(&parent.file)?;
    let nil = child.header.as_ref().is_some_and(|header| header.parent_uuid == Uuid::NIL);
    let mut target = if nil {
        Target::raw(&parent).map_err(io(parent_path, "see its size"))?
    } else {
        Target::image(&parent, parent.parent_image()?)
    };
    if key_hash(Some(&child)) != key_hash(target.image.as_ref()) {
        let text = "it and its child are not encrypted with the same key: what is merged could not be read";
        return Err(unfit(parent_path, text));
    }
    let from = Child { source: &child_file, image: &child };
    let end = from.end_of_data().map_err(io(path, "read it"))?;
    if end > target.size {
        return Err(Error::Small { path: parent_path.clone(), size: target.size, end });
    }
    if nil && !parent.is_device() {
        forget_time(path, &child)?;
    }
    target.merge(&from, progress).map_err(io(parent_path, "merge into it"))
}

/// What is merged into an image: sectors of the disk, block by block. It may be changed meanwhile: what is merged is what each block is asked
/// for once.
pub trait Held {
    /// The blocks that may have some, in order.
    fn blocks(&self) -> Vec<u32>;

    /// Bytes of a block.
    fn block_size(&self) -> u64;

    /// Each run of such sectors of a block: where it is on the disk, and its bytes.
    fn each(&self, block: u32, run: &mut dyn FnMut(u64, u64) -> io::Result<()>) -> io::Result<()>;

    /// Reads the disk from byte `at` on, within a run.
    fn read(&self, at: u64, to: &mut [u8]) -> io::Result<()>;
}

/// All that a differencing image holds.
pub struct Child<'a> {
    /// Its file.
    pub source: &'a dyn Source,
    /// Its metadata.
    pub image: &'a Image,
}

impl Child<'_> {
    /// The sectors of a block that it holds.
    fn held(&self, block: u32, at: u64, header: &Header, sectors: u32) -> io::Result<Vec<Range<u32>>> {
        if self.image.batmap.as_ref().is_some_and(|batmap| batmap.is_full(block)) {
            return Ok(std::iter::once(0..sectors).collect());
        }
        let mut bits = vec![0; header.bitmap_size() as usize];
        self.source.read_at(at, &mut bits)?;
        Ok(bitmap::runs(&bits, 0..sectors).filter(|(set, _)| *set).map(|(_, run)| run).collect())
    }

    /// Where the last byte of the disk is that it holds.
    fn end_of_data(&self) -> io::Result<u64> {
        let mut last = 0;
        for block in self.blocks().into_iter().rev() {
            self.each(block, &mut |disk, len| {
                last = disk + len;
                Ok(())
            })?;
            // A block can be there without a sector that is held.
            if last > 0 {
                break;
            }
        }
        Ok(last)
    }
}

impl Held for Child<'_> {
    fn blocks(&self) -> Vec<u32> {
        self.image.table.allocated().map(|(block, _)| block).collect()
    }

    fn block_size(&self) -> u64 {
        self.image.header.as_ref().map_or(PART, |header| header.block_size().into())
    }

    fn each(&self, block: u32, run: &mut dyn FnMut(u64, u64) -> io::Result<()>) -> io::Result<()> {
        let (Some(header), Some(at)) = (&self.image.header, self.image.table.get(block)) else { return Ok(()) };
        let block_size = u64::from(header.block_size());
        let begin = u64::from(block) * block_size;
        let sectors = bitmap::own_sectors(self.image.size, block_size, block);
        for Range { start, end } in self.held(block, at, header, sectors)? {
            run(begin + u64::from(start) * SECTOR, u64::from(end - start) * SECTOR)?;
        }
        Ok(())
    }

    fn read(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        let header = self.image.header.as_ref().ok_or(Errno::EINVAL)?;
        let block_size = u64::from(header.block_size());
        let place = self.image.table.get((at / block_size) as u32).ok_or(Errno::EINVAL)?;
        self.source.read_at(place + header.bitmap_size() + at % block_size, to)
    }
}

/// What it is merged into.
pub struct Target<'a> {
    to: &'a dyn Medium,
    /// None: raw.
    image: Option<Image>,
    /// The disk's bytes.
    size: u64,
    /// Where the next block goes.
    end: u64,
    /// The first and the last block that the file's table does not have yet.
    added: Option<(u32, u32)>,
    /// Bytes that were written since the last sync.
    unsynced: u64,
}

impl<'a> Target<'a> {
    fn raw(to: &'a dyn Medium) -> io::Result<Target<'a>> {
        Ok(Target { to, image: None, size: to.size()?, end: 0, added: None, unsynced: 0 })
    }

    /// An image in a file.
    pub fn image(to: &'a dyn Medium, image: Image) -> Target<'a> {
        let (size, end) = (image.size, image.end());
        Target { to, image: Some(image), size, end, added: None, unsynced: 0 }
    }

    /// Merges all of that, and says how many sectors that are. `progress` is told before each block of a part, and before each block's bitmap; an
    /// error of its ends the merge.
    pub fn merge(
        &mut self,
        from: &dyn Held,
        progress: &mut dyn FnMut(Progress) -> io::Result<()>,
    ) -> io::Result<u64> {
        let (blocks, mut sectors) = (from.blocks(), 0);
        let mut told = Told { progress, data: 0, bitmaps: 0 };
        let mut before = 0;
        for part in blocks.chunks((PART / from.block_size()).max(1) as usize) {
            let of_all = |done: f64| (before as f64 + part.len() as f64 * done) / blocks.len() as f64;
            let merged = self.part(from, part, &mut told, &of_all);
            sectors += self.restored(merged)?;
            before += part.len();
        }
        self.close()?;
        told.tell(1.0)?;
        Ok(sectors)
    }

    /// Adds blocks of zeros that are not there, where no parent can show through: their bitmaps say that all of them is there. `go_on` is asked
    /// before each part.
    pub fn add_zeros(&mut self, blocks: &[u32], go_on: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        let Some(block_size) = self.block_size() else { return Ok(()) };
        for part in blocks.chunks((PART / block_size).max(1) as usize) {
            go_on()?;
            let added = self.add_part(part, block_size);
            self.restored(added)?;
        }
        self.close()
    }

    /// Makes all of it safe. What a program that was killed has left is mended also where nothing was merged: batmap and footers.
    fn close(&mut self) -> io::Result<()> {
        self.to.sync()?;
        self.finish()
    }

    fn add_part(&mut self, blocks: &[u32], block_size: u64) -> io::Result<()> {
        for block in blocks {
            self.place(*block)?;
        }
        self.to.sync()?;
        for block in blocks {
            let begin = u64::from(*block) * block_size;
            self.mark(begin, block_size.min(self.size - begin))?;
        }
        self.to.sync()?;
        self.finish()
    }

    /// After a part that has failed, blocks that the table does not have are lost, and there is room again for the footer. If it can't be
    /// written, its copy is used.
    fn restored<T>(&mut self, done: io::Result<T>) -> io::Result<T> {
        if done.is_err()
            && self.added.take().is_some()
            && let Ok(image) = Image::read(self.to, &mut Vec::new())
        {
            let _ = write_footers(self.to, &image.footer, image.end());
        }
        done
    }

    /// Merges some blocks.
    fn part(
        &mut self,
        from: &dyn Held,
        blocks: &[u32],
        told: &mut Told,
        of_all: &dyn Fn(f64) -> f64,
    ) -> io::Result<u64> {
        let marks = self.image.as_ref().is_some_and(|image| image.kind != Kind::Fixed);
        let share = if marks { DATA_SHARE } else { 1.0 };
        let (mut sectors, mut buffer) = (0, vec![0; PIECE]);
        // What was merged, by block.
        let mut merged: Vec<Vec<(u64, u64)>> = Vec::with_capacity(blocks.len());
        for (i, block) in blocks.iter().enumerate() {
            told.tell(of_all(share * i as f64 / blocks.len() as f64))?;
            let mut runs = Vec::new();
            from.each(*block, &mut |disk, len| {
                // A block can have 256 MiB.
                for at in (0..len).step_by(PIECE) {
                    let piece = &mut buffer[..(len - at).min(PIECE as u64) as usize];
                    from.read(disk + at, piece)?;
                    self.write(disk + at, piece)?;
                }
                runs.push((disk, len));
                sectors += len / SECTOR;
                told.data += len;
                self.written(len)
            })?;
            merged.push(runs);
        }
        if !marks || sectors == 0 {
            return Ok(sectors);
        }
        self.to.sync()?;
        for (i, runs) in merged.iter().enumerate() {
            told.tell(of_all(share + (1.0 - share) * i as f64 / blocks.len() as f64))?;
            for (disk, len) in runs {
                let bytes = self.mark(*disk, *len)?;
                told.bitmaps += bytes;
                self.written(bytes)?;
            }
        }
        self.to.sync()?;
        self.finish()?;
        Ok(sectors)
    }

    /// So many bytes more were written: what is not safe yet must not become much.
    fn written(&mut self, bytes: u64) -> io::Result<()> {
        self.unsynced += bytes;
        if self.unsynced >= SYNC_EACH {
            self.to.sync_data()?;
            self.unsynced = 0;
        }
        Ok(())
    }

    /// Writes data, whatever is said of it.
    fn write(&mut self, disk: u64, bytes: &[u8]) -> io::Result<()> {
        let Some(block_size) = self.block_size() else { return self.to.write_at(disk, bytes) };
        let (mut disk, mut bytes) = (disk, bytes);
        while !bytes.is_empty() {
            let (block, within) = (disk / block_size, disk % block_size);
            let (now, rest) = bytes.split_at(bytes.len().min((block_size - within) as usize));
            let (at, bitmap) = self.place(block as u32)?;
            self.to.write_at(at + bitmap + within, now)?;
            disk += now.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Bytes of a block's data. None: there are no blocks.
    fn block_size(&self) -> Option<u64> {
        Some(self.image.as_ref()?.header.as_ref()?.block_size().into())
    }

    /// Where a block is, and the bytes of its bitmap. One that is not there is put at the end, and is all zeros.
    fn place(&mut self, block: u32) -> io::Result<(u64, u64)> {
        let Some((image, header)) = self.image.as_mut().and_then(|image| image.header.map(|header| (image, header)))
        else {
            return Err(Errno::EINVAL.into());
        };
        if let Some(at) = image.table.get(block) {
            return Ok((at, header.bitmap_size()));
        }
        if std::mem::take(&mut image.batmap_is_stale) {
            write_batmap(self.to, image)?;
        }
        let at = layout::block_place(self.end, &header);
        let end = at + header.block_len();
        if at / SECTOR >= SECTORS_MAX || self.to.is_device() && end > footer_place(self.to, 0)? {
            return Err(Errno::ENOSPC.into());
        }
        if self.to.is_device() {
            self.to.zero(at, header.block_len())?;
        } else {
            if self.added.is_none() {
                cut_footer(self.to, &image.footer, self.end)?;
            }
            self.to.set_len(end + FOOTER_SIZE as u64)?;
        }
        let (first, last) = self.added.unwrap_or((block, block));
        self.added = Some((first.min(block), last.max(block)));
        image.table.set(block, at);
        self.end = end;
        Ok((at, header.bitmap_size()))
    }

    /// Says in the blocks' bitmaps that sectors are there, and gives those bitmaps' bytes.
    fn mark(&mut self, disk: u64, len: u64) -> io::Result<u64> {
        let Some((image, header)) = self.image.as_mut().and_then(|image| image.header.map(|header| (image, header)))
        else {
            return Ok(0);
        };
        let block_size = u64::from(header.block_size());
        let (mut disk, end, mut bytes) = (disk, disk + len, 0);
        while disk < end {
            let (block, within) = ((disk / block_size) as u32, disk % block_size);
            let now = (end - disk).min(block_size - within);
            let Some(at) = image.table.get(block) else { return Err(Errno::EINVAL.into()) };
            let mut bits = vec![0; header.bitmap_size() as usize];
            self.to.read_at(at, &mut bits)?;
            if bitmap::set(&mut bits, (within / SECTOR) as u32..((within + now) / SECTOR) as u32) {
                self.to.write_at(at, &bits)?;
            }
            let own = bitmap::own_sectors(image.size, block_size, block);
            if let Some(batmap) = &mut image.batmap
                && bitmap::is_full(&bits, own)
            {
                batmap.set(block, true);
            }
            bytes += header.bitmap_size();
            disk += now;
        }
        Ok(bytes)
    }

    /// Writes what says where blocks are, and which are full.
    fn finish(&mut self) -> io::Result<()> {
        let Some((image, header)) = self.image.as_ref().and_then(|image| Some((image, image.header?))) else {
            return Ok(());
        };
        if let Some((first, last)) = self.added {
            write_pieces(self.to, &[table_part(header.table_at(), &image.table, first, last)])?;
            self.to.sync()?;
        }
        if let Some(batmap) = &image.batmap {
            write_pieces(self.to, &batmap_pieces(batmap))?;
        }
        write_footers(self.to, &image.footer, self.end)?;
        self.added = None;
        Ok(())
    }
}
