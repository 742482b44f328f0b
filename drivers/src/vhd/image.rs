//! An image's metadata, read and checked when it is opened.

use std::io;

use super::layout::parent_time;
use super::{
    Batmap, Corrupt, FOOTER_SIZE, Footer, HEADER_SIZE, Header, Kind, OLD_FOOTER_SIZE, Platform, Table, decode_path,
};
use crate::SECTOR_SIZE;

/// Bytes of a parent's name in a locator, at most.
pub const NAME_MAX: u64 = 16 << 10;

/// Bytes of a batmap, at most: a bit for each of the most blocks that a table can have.
const BATMAP_MAX: u64 = 256 << 10;

/// What metadata is read from, while the image is not served.
pub trait Source {
    /// Bytes of the file, or the device, now: a program may be writing it.
    fn size(&self) -> io::Result<u64>;

    /// Fills `to` with what is at byte `at`. Nothing beyond the end is asked for.
    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()>;
}

/// Bytes of the file that something has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    pub(super) at: u64,
    pub(super) len: u64,
}

impl Region {
    fn end(self) -> u64 {
        self.at.saturating_add(self.len)
    }

    pub(super) fn meets(self, other: Region) -> bool {
        self.at < other.end() && other.at < self.end()
    }
}

/// Why an image's metadata could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The system says no.
    #[error("cannot read {len} bytes at byte {at}: {source}")]
    Io {
        /// Where.
        at: u64,
        /// Bytes.
        len: usize,
        /// Why.
        source: io::Error,
    },
    /// The system does not say how long it is.
    #[error("cannot see its size: {0}")]
    Size(#[source] io::Error),
    /// It is no image that can be used.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
}

impl ReadError {
    /// There is no memory for `len` bytes of metadata.
    pub(super) fn memory(at: u64, len: usize) -> ReadError {
        // ENOMEM.
        ReadError::Io { at, len, source: io::Error::from_raw_os_error(12) }
    }
}

/// Reads `len` bytes at byte `at`. How many there are, an image says: where there is no memory for them, nobody else may suffer for it.
pub(super) fn read(source: &dyn Source, at: u64, len: u64) -> Result<Vec<u8>, ReadError> {
    let (mut bytes, len) = (Vec::new(), len as usize);
    bytes.try_reserve_exact(len).map_err(|_| ReadError::memory(at, len))?;
    bytes.resize(len, 0);
    source.read_at(at, &mut bytes).map_err(|source| ReadError::Io { at, len, source })?;
    Ok(bytes)
}

/// Bytes that there are.
pub(super) fn size(source: &dyn Source) -> Result<u64, ReadError> {
    source.size().map_err(ReadError::Size)
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What.
    pub what: Corrupt,
    /// The image can't be used with it. Otherwise what is wrong can be had from elsewhere, or is not needed.
    pub fatal: bool,
}

/// The metadata of an image.
#[derive(Clone, Debug)]
pub struct Image {
    /// The one at the end, or, if that is no good, its copy.
    pub footer: Footer,
    /// Which kind the footer says.
    pub kind: Kind,
    /// Bytes of the disk.
    pub size: u64,
    /// Where the footer at the end is, or is to be.
    pub footer_at: u64,
    /// Where the metadata at the beginning ends.
    pub metadata_end: u64,
    /// Of an image that is not fixed.
    pub header: Option<Header>,
    /// Where the disk's blocks are.
    pub table: Table,
    /// Entries that the table has room for where it is, whatever the header claims.
    pub table_room: u32,
    /// Which of them are full, if the image has that. One that is not right knows of none, and none knows of a block that the table
    /// does not have.
    pub batmap: Option<Batmap>,
    /// The file's says something of blocks that the table does not have. It is written again before the table gets one of them.
    pub batmap_is_stale: bool,
    /// Where the parent is, as the locators name it.
    pub parents: Vec<(Platform, String)>,
    /// The time of the parent's footer when the parent was named. None: that is not known, and the header has the time of its file.
    pub parent_time: Option<u32>,
}

impl Image {
    /// Reads an image's metadata. Problems that it can be used with in spite go to `problems`.
    pub fn read(source: &dyn Source, problems: &mut Vec<Problem>) -> Result<Image, ReadError> {
        Image::read_parts(source, Parts::All, problems)
    }

    /// Reads some of it. What is not read is empty.
    pub fn read_parts(source: &dyn Source, parts: Parts, problems: &mut Vec<Problem>) -> Result<Image, ReadError> {
        let reader = Reader { source, problems, parts, stored_size: false };
        reader.settled(Reader::by_footer)
    }

    /// That of an image that is another's parent: its disk is as large as the footer's field says, whatever the geometry does.
    pub fn read_parent(source: &dyn Source, problems: &mut Vec<Problem>) -> Result<Image, ReadError> {
        let reader = Reader { source, problems, parts: Parts::All, stored_size: true };
        reader.settled(Reader::by_footer)
    }

    /// The same by the footer's copy at the beginning, whatever is at the end: of an image that is in use, and may grow meanwhile.
    pub fn read_by_copy(source: &dyn Source, parts: Parts, problems: &mut Vec<Problem>) -> Result<Image, ReadError> {
        let reader = Reader { source, problems, parts, stored_size: false };
        reader.settled(|reader| {
            let copy = reader.bytes("footer's copy", 0, FOOTER_SIZE as u64)?;
            reader.image(&reader.parse(&copy)?, None)
        })
    }

    /// Where the image's last byte ends in the file, without the footer that is to be there.
    pub fn end(&self) -> u64 {
        match &self.header {
            Some(header) => {
                let last = self.table.allocated().map(|(_, at)| at + header.block_len()).max();
                last.unwrap_or(0).max(self.metadata_end)
            }
            None => self.size,
        }
    }

    /// Bytes of the file up to the image's end, with the footer that is to be there.
    pub fn physical_size(&self) -> u64 {
        self.end() + FOOTER_SIZE as u64
    }
}

/// The parent's names, and the time of its footer.
type Named = (Vec<(Platform, String)>, Option<u32>);

/// How much of an image's metadata is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parts {
    /// Footer, header and the parent's names: what stays as it is while a program writes the image's data. Also of a disabled image.
    Heads,
    /// Those, the table and the batmap as they are: a block may be where it can't be.
    Unchecked,
    /// All of it, and the table is checked.
    All,
}

struct Reader<'a> {
    source: &'a dyn Source,
    problems: &'a mut Vec<Problem>,
    parts: Parts,
    /// The disk's size is that of the footer's field.
    stored_size: bool,
}

/// How often an image is read that grows or shrinks meanwhile.
const TRIES: usize = 100;

impl Reader<'_> {
    fn size(&self) -> Result<u64, ReadError> {
        size(self.source)
    }

    /// Reads an image that a program may be writing: where something is not as it should be, and the file has got another size meanwhile, it is
    /// read again, since parts of it are from before that, and others from after it.
    fn settled(mut self, read: impl Fn(&mut Self) -> Result<Image, ReadError>) -> Result<Image, ReadError> {
        let known = self.problems.len();
        for _ in 1..TRIES {
            let size = self.size()?;
            let image = read(&mut self);
            if image.is_ok() && self.problems.len() == known || self.size()? == size {
                return image;
            }
            self.problems.truncate(known);
        }
        read(&mut self)
    }

    fn by_footer(&mut self) -> Result<Image, ReadError> {
        let (footer, footer_at) = self.footer()?;
        self.image(&footer, Some(footer_at))
    }

    /// What follows from the footer.
    fn image(&mut self, footer: &Footer, footer_at: Option<u64>) -> Result<Image, ReadError> {
        let kind = footer.kind()?;
        let size = if self.stored_size { footer.stored_size() } else { footer.size() };
        let wrong = |why| Err(Corrupt::Size { size, why }.into());
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return wrong("is not one or more sectors of 512 bytes");
        }
        let mut image = Image {
            footer: *footer,
            kind,
            size,
            footer_at: footer_at.map_or_else(|| self.size(), Ok)?,
            metadata_end: 0,
            header: None,
            table: Table::default(),
            table_room: 0,
            batmap: None,
            batmap_is_stale: false,
            parents: Vec::new(),
            parent_time: None,
        };
        if kind == Kind::Fixed {
            return if size > image.footer_at { wrong("is more than the file has") } else { Ok(image) };
        }
        let at = footer.header_at().ok_or(Corrupt::NoHeader)?;
        let header = Header::parse(&self.bytes("header", at, HEADER_SIZE as u64)?)?;
        let blocks = size.div_ceil(header.block_size().into());
        if blocks > header.entries().into() {
            return wrong("is more than its table has blocks for");
        }
        image.header = Some(header);
        let mut taken = vec![Region { at: 0, len: FOOTER_SIZE as u64 }, Region { at, len: HEADER_SIZE as u64 }];
        if self.parts == Parts::Heads {
            (image.parents, image.parent_time) = self.locators(&header, &mut taken)?;
        } else {
            self.blocks(&mut image, &header, blocks, taken, footer_at)?;
        }
        Ok(image)
    }

    /// The table and what is behind it.
    fn blocks(
        &mut self,
        image: &mut Image,
        header: &Header,
        blocks: u64,
        mut taken: Vec<Region>,
        footer_at: Option<u64>,
    ) -> Result<(), ReadError> {
        // A table may have more entries than the disk has blocks, and the file need not have those.
        let bytes = self.bytes("table", header.table_at(), 4 * blocks)?;
        let memory = |_| ReadError::memory(header.table_at(), bytes.len());
        let table = Table::parse(&bytes, blocks as u32).map_err(memory)?;
        // It is written sector by sector.
        let own = Region { at: header.table_at(), len: Table::bytes(blocks as u32) };
        if !own.at.is_multiple_of(SECTOR_SIZE) || taken.iter().any(|region| region.meets(own)) {
            let (at, len, file) = (own.at, 4 * blocks, self.size()?);
            return Err(Corrupt::Place { what: "table", at, len, file }.into());
        }
        taken.push(own);
        (image.parents, image.parent_time) = self.locators(header, &mut taken)?;
        let (block_len, table_end) = (header.block_len(), header.table_at() + Table::bytes(header.entries()));
        image.batmap = self.batmap(table_end, &table, block_len, &mut taken)?;
        if let Some((block, blocks)) = image.batmap.as_mut().and_then(|batmap| batmap.forget_absent(&table)) {
            image.batmap_is_stale = true;
            self.minor(Corrupt::AbsentFull { block, blocks });
        }
        // A file that is in use has grown by what the table had when it was read.
        image.footer_at = footer_at.map_or_else(|| self.size(), Ok)?;
        if self.parts == Parts::All {
            table.check(block_len, &taken, image.footer_at)?;
        }
        let behind = taken.iter().map(|region| region.at).chain(table.allocated().map(|(_, at)| at));
        let behind = behind.filter(|at| *at > own.at).min().unwrap_or(image.footer_at);
        image.table_room = ((behind.saturating_sub(own.at) / 4) as u32).min(header.entries());
        image.metadata_end = taken.iter().map(|region| region.end()).fold(table_end, u64::max);
        image.table = table;
        Ok(())
    }

    /// `len` bytes at byte `at`, which `what` is to be in.
    fn bytes(&self, what: &'static str, at: u64, len: u64) -> Result<Vec<u8>, ReadError> {
        let file = self.size()?;
        if at.checked_add(len).is_none_or(|end| end > file) {
            return Err(Corrupt::Place { what, at, len, file }.into());
        }
        read(self.source, at, len)
    }

    fn minor(&mut self, what: Corrupt) {
        self.problems.push(Problem { what, fatal: false });
    }

    /// A footer. That of a disabled image is good enough to be looked at: whoever has to revert it asks what it is.
    fn parse(&self, bytes: &[u8]) -> Result<Footer, Corrupt> {
        match <&[u8; FOOTER_SIZE]>::try_from(bytes) {
            Ok(whole) if self.parts != Parts::All => Footer::parse_disabled(whole).map(|(footer, _)| footer),
            _ => Footer::parse(bytes),
        }
    }

    /// The footer, and where it is, or is to be.
    fn footer(&mut self) -> Result<(Footer, u64), ReadError> {
        let size = self.size()?;
        if size < OLD_FOOTER_SIZE as u64 {
            return Err(Corrupt::Short { what: "footer", len: size }.into());
        }
        let tail = self.bytes("footer", size - size.min(FOOTER_SIZE as u64), size.min(FOOTER_SIZE as u64))?;
        let old = || self.parse(&tail[tail.len() - OLD_FOOTER_SIZE..]).map(|footer| (footer, OLD_FOOTER_SIZE));
        let last = match self.parse(&tail) {
            Ok(footer) => Ok((footer, FOOTER_SIZE)),
            Err(Corrupt::Disabled) => return Err(Corrupt::Disabled.into()),
            Err(error) => old().map_err(|_| error),
        };
        if let Ok((footer, len)) = &last
            && footer.kind() == Ok(Kind::Fixed)
        {
            return Ok((*footer, size - *len as u64));
        }
        let copy = self.parse(&self.bytes("footer's copy", 0, size.min(FOOTER_SIZE as u64))?);
        match (last, copy) {
            (Ok((footer, len)), copy) => {
                match copy {
                    Ok(copy) if copy == footer => {}
                    Ok(copy) if copy.kind() != Ok(Kind::Fixed) && copy.uuid != footer.uuid => {
                        return Err(Corrupt::TwoImages {
                            copy: copy.uuid,
                            copy_size: copy.size(),
                            last: footer.uuid,
                            last_size: footer.size(),
                        }
                        .into());
                    }
                    Ok(_) => self.minor(Corrupt::CopyDiffers),
                    Err(error) => self.minor(Corrupt::Copy(Box::new(error))),
                }
                Ok((footer, size - len as u64))
            }
            (Err(error), Ok(copy)) if copy.kind() != Ok(Kind::Fixed) => {
                self.minor(error);
                Ok((copy, size))
            }
            (Err(_), Err(Corrupt::Disabled)) => Err(Corrupt::Disabled.into()),
            (Err(error), _) => Err(error.into()),
        }
    }

    /// What the locators name.
    fn locators(&mut self, header: &Header, taken: &mut Vec<Region>) -> Result<Named, ReadError> {
        let (mut parents, mut time) = (Vec::new(), None);
        for locator in &header.locators {
            let Some(platform) = locator.platform() else { continue };
            let (at, len) = locator.place();
            let what = "parent locator";
            if len > NAME_MAX || len > locator.space() {
                self.minor(Corrupt::Place { what, at, len, file: self.size()? });
                continue;
            }
            // Others may say that there is more room for the name than the file has.
            let space = locator.space().min(NAME_MAX).min(self.size()?.saturating_sub(at)).max(len);
            match self.bytes(what, at, space) {
                Ok(bytes) => {
                    taken.push(Region { at, len: locator.space() });
                    time = time.or(parent_time(&bytes, len as usize));
                    match decode_path(platform, &bytes[..len as usize]) {
                        Some(path) => parents.push((platform, path)),
                        None => self.minor(Corrupt::Name { at }),
                    }
                }
                Err(ReadError::Corrupt(what)) => self.minor(what),
                Err(error) => return Err(error),
            }
        }
        Ok((parents, time))
    }

    /// The batmap, if there is one after the table.
    fn batmap(
        &mut self,
        at: u64,
        table: &Table,
        block_len: u64,
        taken: &mut Vec<Region>,
    ) -> Result<Option<Batmap>, ReadError> {
        // Where a block is, what looks like a batmap may be the guest's.
        let others = taken.clone();
        let free = |at, len| {
            let region = Region { at, len };
            let mut blocks = table.allocated().map(|(_, at)| Region { at, len: block_len });
            !blocks.any(|block| region.meets(block)) && !others.iter().any(|other| region.meets(*other))
        };
        if at + SECTOR_SIZE > self.size()? || !free(at, SECTOR_SIZE) {
            return Ok(None);
        }
        let found = self.bytes("batmap", at, SECTOR_SIZE).and_then(|bytes| {
            let Some(place) = Batmap::parse_header(&bytes)? else { return Ok(None) };
            let (bits_at, len) = (place.bits_at, place.len);
            if len > BATMAP_MAX || !free(bits_at, len) {
                let file = self.size()?;
                return Err(Corrupt::Place { what: "batmap", at: bits_at, len, file }.into());
            }
            let bits = self.bytes("batmap", bits_at, len)?;
            taken.extend([Region { at, len: SECTOR_SIZE }, Region { at: bits_at, len }]);
            Ok(Some(Batmap::parse(&place, at, bits).unwrap_or_else(|what| {
                self.minor(what);
                Batmap::unknown(&place, at)
            })))
        });
        match found {
            Err(ReadError::Corrupt(what)) => {
                self.minor(what);
                Ok(None)
            }
            other => other,
        }
    }
}
