//! The disk that a chain of images, or a raw file, is: where its bytes are.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use drivers::SECTOR_SIZE;
use drivers::vhd::{Header, Image, Kind, Parts, Source, bitmap};
use nix::errno::Errno;
use tapdisk::chain::{self, Link, Rules};

use super::create::raw;
use super::failure::{Failure, Result};
use super::file::ReadFile;
use super::key::key_hash;

/// Bytes of the disk that follow each other in one file.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    /// The first of them on the disk.
    pub(super) at: u64,
    /// How many.
    pub(super) len: u64,
    /// The file, and where they are in it. None: they are zeros.
    pub(super) from: Option<(&'a File, u64)>,
}

/// An open disk.
pub(super) struct Disk {
    layers: Vec<Open>,
    /// Bytes.
    pub(super) size: u64,
}

/// One of its images, the leaf first.
struct Open {
    layer: Link,
    file: ReadFile,
    /// The block whose bitmap was looked at last, and that.
    bitmap: RefCell<(u64, Vec<u8>)>,
}

impl Disk {
    /// Opens a VHD image with all its parents, or a raw image.
    pub(super) fn open(path: &Path, vhd: bool, parents: &[PathBuf]) -> Result<Disk> {
        let rules = Rules::tool(parents, Parts::All);
        let layers =
            || -> Result<Vec<Link>> { if vhd { Ok(chain::chain(path, &rules)?) } else { Ok(vec![raw(path)?]) } };
        let paths = |layers: &[Link]| layers.iter().map(|layer| layer.path.clone()).collect::<Vec<_>>();
        // Only from its lock on, nobody writes a file: what was read before may be old.
        let mut before = layers()?;
        let (files, layers) = loop {
            let files: Vec<_> =
                before.iter().map(|layer| ReadFile::open(&layer.path)).collect::<std::result::Result<_, _>>()?;
            let now = layers()?;
            if paths(&now) == paths(&before) {
                now.iter().zip(&files).try_for_each(|(layer, file)| layer.is(&file.file))?;
                break (files, now);
            }
            before = now;
        };
        if let Some(layer) = layers.iter().find(|layer| key_hash(layer.image.as_ref()).is_some()) {
            let text = "it is encrypted, and what is written would be, too, without saying so: read it through a tapdisk \
                        that has the key";
            return Err(Failure::new(Errno::EOPNOTSUPP, &layer.path, text));
        }
        let size = layers[0].image.as_ref().map_or(layers[0].file_size, |image| image.size);
        let open = |(layer, file)| Open { layer, file, bitmap: RefCell::new((u64::MAX, Vec::new())) };
        Ok(Disk { layers: layers.into_iter().zip(files).map(open).collect(), size })
    }

    /// Which kind its image is. None: it is raw.
    pub(super) fn kind(&self) -> Option<Kind> {
        self.layers[0].layer.image.as_ref().map(|image| image.kind)
    }

    /// Where a range of the disk is, run by run.
    pub(super) fn runs<'a>(&'a self, at: u64, len: u64, each: &mut dyn FnMut(Run<'a>) -> Result<()>) -> Result<()> {
        self.below(0, at, len, each)
    }

    /// The same as it is from one of the images on.
    fn below<'a>(
        &'a self,
        depth: usize,
        at: u64,
        len: u64,
        each: &mut dyn FnMut(Run<'a>) -> Result<()>,
    ) -> Result<()> {
        let zeros = |at, len| Run { at, len, from: None };
        let Some(open) = self.layers.get(depth) else { return each(zeros(at, len)) };
        let file = &*open.file.file;
        let size = open.layer.image.as_ref().map_or(open.layer.file_size, |image| image.size);
        let own = len.min(size.saturating_sub(at));
        match open.layer.image.as_ref().and_then(|image| Some((image, image.header.as_ref()?))) {
            _ if own == 0 => {}
            None => each(Run { at, len: own, from: Some((file, at)) })?,
            Some((image, header)) => {
                let block_size = u64::from(header.block_size());
                let mut now = at;
                while now < at + own {
                    let within = now % block_size;
                    let len = (block_size - within).min(at + own - now);
                    let mut part = |held: Option<u64>, now, len| match held {
                        Some(place) => each(Run { at: now, len, from: Some((file, place)) }),
                        None if image.kind == Kind::Differencing => self.below(depth + 1, now, len, each),
                        None => each(zeros(now, len)),
                    };
                    open.block(image, header, now, len, &mut part)?;
                    now += len;
                }
            }
        }
        // What is beyond a smaller parent's end reads as zeros.
        if own < len { each(zeros(at + own, len - own)) } else { Ok(()) }
    }
}

impl Open {
    /// A range of a block in runs: where each is in the file, if the image holds it.
    fn block(
        &self,
        image: &Image,
        header: &Header,
        at: u64,
        len: u64,
        part: &mut dyn FnMut(Option<u64>, u64, u64) -> Result<()>,
    ) -> Result<()> {
        let block_size = u64::from(header.block_size());
        let (block, within) = (at / block_size, at % block_size);
        let Some(place) = image.table.get(block as u32) else { return part(None, at, len) };
        let data = place + header.bitmap_size();
        if image.batmap.as_ref().is_some_and(|batmap| batmap.is_full(block as u32)) {
            return part(Some(data + within), at, len);
        }
        let runs: Vec<_> = {
            let mut last = self.bitmap.borrow_mut();
            if last.0 != block {
                last.1.resize(header.bitmap_size() as usize, 0);
                self.file.read_at(place, &mut last.1).map_err(self.failed())?;
                last.0 = block;
            }
            let sectors = (within / SECTOR_SIZE) as u32..(within + len).div_ceil(SECTOR_SIZE) as u32;
            bitmap::runs(&last.1, sectors).collect()
        };
        for (held, sectors) in runs {
            // A range may begin and end within a sector.
            let start = (u64::from(sectors.start) * SECTOR_SIZE).max(within);
            let end = (u64::from(sectors.end) * SECTOR_SIZE).min(within + len);
            part(held.then_some(data + start), block * block_size + start, end - start)?;
        }
        Ok(())
    }

    fn failed(&self) -> impl Fn(io::Error) -> Failure + '_ {
        Failure::io(&self.layer.path, "read it")
    }
}

/// Reads a run's bytes; a raw file whose size is no whole sectors reads as zeros beyond its end.
pub(super) fn read(file: &File, at: u64, to: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < to.len() {
        match file.read_at(&mut to[done..], at + done as u64) {
            Ok(0) => {
                to[done..].fill(0);
                break;
            }
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
