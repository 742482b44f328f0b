//! What can be mended of an image without touching its data.

use super::image::{Image, Problem, ReadError, Source};
use super::layout::{Piece, batmap_pieces};
use super::{Batmap, Corrupt, Table, bitmap};

/// How an image is mended.
#[derive(Clone, Debug)]
pub struct Repair {
    /// The image, as it is when that is done.
    pub image: Image,
    /// What is written, in this order; safe before the footers are.
    pub pieces: Vec<Piece>,
    /// Both footers are written again.
    pub footers: bool,
    /// What is done, for people: nothing if nothing is wrong.
    pub mended: Vec<&'static str>,
    /// What is not as it should be, and is left so.
    pub left: Vec<Problem>,
}

impl Repair {
    /// Says what is to be done with an image, at a time in seconds of Unix. `bitmaps`: all of its blocks' bitmaps are looked
    /// at, even if the batmap seems to be good.
    ///
    /// # Errors
    ///
    /// The image can't be used, and not be mended.
    pub fn plan(source: &dyn Source, now: u64, bitmaps: bool) -> Result<Repair, ReadError> {
        let image = Image::read(source, &mut Vec::new())?;
        let mut repair = Repair { image, pieces: Vec::new(), footers: false, mended: Vec::new(), left: Vec::new() };
        let mut problems = Image::check(source, now)?;
        if bitmaps {
            problems.extend(Image::check_bitmaps(source)?);
        }
        let mut batmap = false;
        for problem in problems {
            match &problem.what {
                Corrupt::CopyDiffers => repair.footer("made the copy of the footer what the footer is"),
                Corrupt::Copy(_) => repair.footer("wrote the copy of the footer again"),
                Corrupt::Cookie { what: "footer" }
                | Corrupt::Checksum { what: "footer", .. }
                | Corrupt::Version { what: "footer", .. }
                | Corrupt::Kind { .. } => {
                    repair.footer("wrote the footer at the end again, from its copy");
                }
                Corrupt::Checksum { what: "batmap", .. }
                | Corrupt::Place { what: "batmap", .. }
                | Corrupt::Odd { what: "batmap", .. }
                | Corrupt::NotFull { .. }
                | Corrupt::AbsentFull { .. } => batmap = true,
                // What is not told may be of the batmap.
                Corrupt::More { what: "bitmaps" } => {
                    batmap = true;
                    repair.left.push(problem);
                }
                _ => repair.left.push(problem),
            }
        }
        if batmap {
            repair.rebuild(source)?;
        }
        Ok(repair)
    }

    fn footer(&mut self, mended: &'static str) {
        self.footers = true;
        self.mended.push(mended);
    }

    /// Makes the batmap of what the blocks' bitmaps say.
    fn rebuild(&mut self, source: &dyn Source) -> Result<(), ReadError> {
        let Some(header) = &self.image.header else { return Ok(()) };
        let at = header.table_at() + Table::bytes(header.entries());
        let old = self.image.batmap.as_ref();
        let mut batmap = Batmap::empty(at, header.entries());
        let end = batmap.bits_at + batmap.bits().len() as u64;
        let first = self.image.table.allocated().map(|(_, at)| at).min().unwrap_or(u64::MAX);
        let names = header.locators.iter().filter(|locator| locator.platform().is_some());
        let fits = end <= first && names.map(|locator| locator.place().0).all(|name| name >= end || name < at);
        match old {
            Some(old) if old.bits().len() >= batmap.bits().len() => {
                (batmap.marker, batmap.key_hash, batmap.bits_at) = (old.marker, old.key_hash, old.bits_at);
            }
            _ if fits => {}
            _ => {
                let why = "has no room to be made again between the table and what follows it";
                self.left.push(Problem { what: Corrupt::Odd { what: "batmap", why }, fatal: false });
                return Ok(());
            }
        }
        for (block, at) in self.image.table.allocated() {
            let mut bits = vec![0; header.bitmap_size() as usize];
            let read = source.read_at(at, &mut bits);
            read.map_err(|source| ReadError::Io { at, len: bits.len(), source })?;
            let own = bitmap::own_sectors(self.image.size, header.block_size().into(), block);
            batmap.set(block, bitmap::is_full(&bits, own));
        }
        self.pieces.extend(batmap_pieces(&batmap));
        self.mended.push("made the batmap again, from the blocks' bitmaps");
        self.image.metadata_end = self.image.metadata_end.max(end);
        self.image.batmap = Some(batmap);
        // What is after the table of a file without blocks is the footer.
        self.footers = true;
        Ok(())
    }
}
