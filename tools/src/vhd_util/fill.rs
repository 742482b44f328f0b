//! `fill`: gives an image all of its blocks.

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use drivers::SECTOR_SIZE;
use drivers::vhd::{Header, Image, Kind, Source, bitmap};
use nix::errno::Errno;
use tapdisk::vhd::merge::{Held, Progress, Target};

use super::Fill;
use super::disk::{self, Disk};
use super::failure::{Failure, Result};
use super::progress::Work;

/// Gives an image the blocks and sectors that it has not.
pub(super) fn fill(args: &Fill, parents: &[PathBuf]) -> Result<()> {
    let (file, image) = super::set::open(&args.name)?;
    // A fixed image has all of it.
    let Some(header) = image.header else { return Ok(()) };
    let wrong = |errno, text: String| Err(Failure::new(errno, &args.name, text));
    if args.blocks && image.kind == Kind::Differencing {
        return wrong(
            Errno::EINVAL,
            "it has a parent, whose data empty blocks would hide: fill it without -b".into(),
        );
    }
    let block_size = u64::from(header.block_size());
    let sectors = image.size / SECTOR_SIZE;
    let (from, to) = (args.from.unwrap_or(0), args.to.unwrap_or(sectors - 1));
    if to < from {
        return wrong(Errno::EINVAL, format!("sectors {from} to {to}: the last one is before the first"));
    }
    if to >= sectors {
        return wrong(Errno::ERANGE, format!("sectors {from} to {to}: it has the sectors 0 to {}", sectors - 1));
    }
    let in_block = block_size / SECTOR_SIZE;
    let blocks = (from / in_block) as u32..(to / in_block) as u32 + 1;
    let work = Work::new(&args.name, image.size)?;
    let disk = Disk::open(&args.name, true, parents)?;
    let mut target = Target::image(&file, image.clone());
    let done = if args.blocks {
        target.add_zeros(&absent(&image, blocks), &mut || work.look())
    } else {
        let missing = Missing { source: &file, disk: &disk, image: &image, header: &header, blocks };
        let mut progress = |progress: Progress| {
            work.at((progress.done * image.size as f64) as u64);
            work.look()
        };
        target.merge(&missing, &mut progress).map(drop)
    };
    done.map_err(|error: io::Error| match error.raw_os_error() {
        Some(errno) if errno == Errno::EINTR as i32 => {
            Failure::new(Errno::EINTR, &args.name, "interrupted; the image is good: fill it again to go on")
        }
        _ => Failure::io(&args.name, "write it")(error),
    })
}

/// Those of some blocks that an image has not.
fn absent(image: &Image, blocks: Range<u32>) -> Vec<u32> {
    blocks.filter(|block| image.table.get(*block).is_none()).collect()
}

/// What an image does not hold itself.
struct Missing<'a> {
    source: &'a dyn Source,
    /// The image with its parents.
    disk: &'a Disk,
    /// What it was before.
    image: &'a Image,
    header: &'a Header,
    blocks: Range<u32>,
}

impl Held for Missing<'_> {
    fn blocks(&self) -> Vec<u32> {
        self.blocks.clone().collect()
    }

    fn block_size(&self) -> u64 {
        self.header.block_size().into()
    }

    fn each(&self, block: u32, run: &mut dyn FnMut(u64, u64) -> io::Result<()>) -> io::Result<()> {
        let begin = u64::from(block) * u64::from(self.header.block_size());
        let sectors = bitmap::own_sectors(self.image.size, self.header.block_size().into(), block);
        let mut bits = vec![0; self.header.bitmap_size() as usize];
        if let Some(at) = self.image.table.get(block) {
            if self.image.batmap.as_ref().is_some_and(|batmap| batmap.is_full(block)) {
                return Ok(());
            }
            self.source.read_at(at, &mut bits)?;
        }
        for (held, Range { start, end }) in bitmap::runs(&bits, 0..sectors) {
            if !held {
                run(begin + u64::from(start) * SECTOR_SIZE, u64::from(end - start) * SECTOR_SIZE)?;
            }
        }
        Ok(())
    }

    fn read(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        let mut done = Ok(());
        let len = to.len() as u64;
        let runs = self.disk.runs(at, len, &mut |part| {
            let place = (part.at - at) as usize;
            let bytes = &mut to[place..place + part.len as usize];
            match part.from {
                Some((file, from)) if done.is_ok() => done = disk::read(file, from, bytes),
                Some(_) => {}
                None => bytes.fill(0),
            }
            Ok(())
        });
        runs.map_err(|failure| io::Error::from(failure.errno)).and(done)
    }
}

#[cfg(test)]
mod tests {
    use drivers::vhd::Kind;

    use super::super::testing::{self, crashes};
    use super::*;

    #[test]
    fn empty_blocks_are_added_one_by_one_or_all() {
        for device in [false, true] {
            let image = testing::image(Kind::Dynamic, device, &[(1, 0..3), (2, 0..8)], 1);
            let image = if device { image.device_of(1 << 20) } else { image };
            let before = testing::content(&[&image]);
            let add = |to: &testing::Memory| {
                let image = testing::image_of(to).unwrap();
                let blocks = absent(&image, 0..image.table.blocks());
                Target::image(to, image).add_zeros(&blocks, &mut || Ok(()))
            };
            crashes(&image, add, |after| {
                assert_eq!(testing::fatal(after), None);
                assert_eq!(testing::content(&[after]), before);
                add(after).unwrap();
                assert_eq!(testing::content(&[after]), before);
                assert_eq!(testing::problems(after), []);
            });
            add(&image).unwrap();
            let read = testing::image_of(&image).unwrap();
            assert_eq!(read.table.allocated().count() as u32, read.table.blocks());
        }
    }

    #[test]
    fn a_full_device_keeps_a_good_image() {
        let image = testing::image(Kind::Dynamic, false, &[(1, 0..3)], 1);
        let before = testing::content(&[&image]);
        // Room for one more block, and not for two.
        let full = image.device_of(image.size().unwrap() + 2 * 4096 + 1024);
        let read = testing::image_of(&full).unwrap();
        let blocks = absent(&read, 0..read.table.blocks());
        let error = Target::image(&full, read).add_zeros(&blocks, &mut || Ok(())).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::ENOSPC as i32));
        assert_eq!((testing::problems(&full), testing::content(&[&full])), (Vec::new(), before));
    }
}
