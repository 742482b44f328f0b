//! `fill`: gives an image all of its blocks.

use std::io;
use std::ops::Range;

use drivers::SECTOR_SIZE;
use drivers::vhd::{Header, Image, Kind, Source, bitmap};
use nix::errno::Errno;
use tapdisk::vhd::merge::{Held, Target};

use super::Fill;
use super::disk::{self, Disk};
use super::failure::{Failure, Result};
use super::progress::{Stop, bar};

/// Bytes of the disk after which the blocks that were added are the image's, whatever happens next.
const STRIDE: u64 = 1 << 30;

/// Gives an image the blocks and sectors that it has not.
pub(super) fn fill(args: &Fill) -> Result<()> {
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
    if to < from || to >= sectors {
        return wrong(Errno::ERANGE, format!("sectors {from} to {to}: it has the sectors 0 to {}", sectors - 1));
    }
    let in_block = block_size / SECTOR_SIZE;
    let blocks = (from / in_block) as u32..(to / in_block) as u32 + 1;
    let stop = Stop::new(&args.name)?;
    let disk = Disk::open(&args.name, true)?;
    let failed = |error: io::Error| match error.raw_os_error() {
        Some(errno) if errno == Errno::EINTR as i32 => {
            Failure::new(Errno::EINTR, &args.name, "interrupted; it has some of its blocks, and is good")
        }
        _ => Failure::io(&args.name, "write it")(error),
    };
    let bar = bar(image.size);
    let mut target = Target::image(&file, image.clone());
    for begin in blocks.clone().step_by((STRIDE / block_size).max(1) as usize) {
        let some = begin..blocks.end.min(begin + (STRIDE / block_size).max(1) as u32);
        bar.set_position(u64::from(begin) * block_size);
        let done = if args.blocks {
            stop.look().and_then(|()| target.add_zeros(&absent(&image, some)))
        } else {
            let missing = Missing { source: &file, disk: &disk, image: &image, header: &header, blocks: some };
            target.merge(&missing, &mut |_| stop.look()).map(drop)
        };
        done.map_err(failed)?;
    }
    bar.finish_and_clear();
    Ok(())
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
                Target::image(to, image).add_zeros(&blocks)
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
}
