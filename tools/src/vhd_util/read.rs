//! `read`: parts of an image, as text or as they are in the file.

use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use drivers::SECTOR_SIZE;
use drivers::vhd::{
    Footer, Header, Image, Kind, Locator, NAME_MAX, Parts, Platform, bitmap, decode_path, unix_seconds,
};
use nix::errno::Errno;
use tapdisk::chain;
use tapdisk::text::one_line;
use zerocopy::IntoBytes;

use super::Read;
use super::disk::{self, Disk};
use super::failure::{Failure, Result};

/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;

/// Prints what is asked for.
pub(super) fn read(args: &Read, parents: &[PathBuf], out: &mut dyn Write) -> Result<()> {
    let path = &args.name;
    let layer = chain::parts(path, Parts::Unchecked, false).map_err(Failure::from);
    let layer =
        layer.map_err(|failure| failure.saying(|errno| format!("Failed to open {}: {errno}", path.display())))?;
    let Some(image) = &layer.image else { return Ok(()) };
    let file = std::fs::File::open(path).map_err(Failure::io(path, "open it"))?;
    let mut reader = Reader { args, parents, image, file, out };
    if args.print {
        reader.headers()?;
    }
    if let Some(block) = args.block {
        reader.places(block)?;
    }
    if args.blocks {
        reader.blocks()?;
    }
    if let Some(block) = args.bitmap {
        reader.bitmaps(block)?;
    }
    if let Some(sector) = args.sector {
        reader.sector_places(sector)?;
    }
    if let Some(sector) = args.bit {
        reader.bits(sector)?;
    }
    if let Some(sector) = args.extents {
        reader.extents(sector)?;
    }
    if let Some(block) = args.full {
        reader.full(block)?;
    }
    if let Some(block) = args.data {
        reader.data(block)?;
    }
    if let Some(sector) = args.sectors {
        let sectors = reader.sector_range(sector)?;
        reader.bytes(sectors.start * SECTOR_SIZE..sectors.end * SECTOR_SIZE)?;
    }
    if let Some(byte) = args.bytes {
        let bytes = reader.part_of_disk("byte", byte, image.size)?;
        reader.bytes(bytes)?;
    }
    if args.batmap {
        let batmap = image.batmap.as_ref().ok_or_else(|| super::set::no_batmap(path))?;
        reader.out.write_all(batmap.bits()).map_err(Failure::output)?;
    }
    Ok(())
}

struct Reader<'a> {
    args: &'a Read,
    parents: &'a [PathBuf],
    image: &'a Image,
    file: std::fs::File,
    out: &'a mut dyn Write,
}

impl Reader<'_> {
    fn line(&mut self, text: &str) -> Result<()> {
        writeln!(self.out, "{text}").map_err(Failure::output)
    }

    /// A name and what it stands for.
    fn field(&mut self, name: &str, value: impl std::fmt::Display) -> Result<()> {
        self.line(&format!("{name:<20}: {}", one_line(&value.to_string())))
    }

    fn number(&self, number: impl Into<u64>) -> String {
        let number = number.into();
        if self.args.hex { format!("{number:#x}") } else { number.to_string() }
    }

    fn header(&self) -> Result<&Header> {
        self.image.header.as_ref().ok_or_else(|| {
            Failure::new(Errno::EINVAL, &self.args.name, "it is a fixed image, which has neither table nor blocks")
        })
    }

    /// The places of some blocks.
    fn places(&mut self, first: u32) -> Result<()> {
        self.header()?;
        for block in self.range(first)? {
            let place = match self.image.table.get(block) {
                Some(at) => self.number(at),
                None => "not allocated".to_owned(),
            };
            self.line(&format!("block: {}: offset: {place}", self.number(block)))?;
        }
        Ok(())
    }

    /// Blocks from one on, as many as are asked for.
    fn range(&self, first: u32) -> Result<Range<u32>> {
        match first.checked_add(self.args.count) {
            Some(end) if end <= self.image.table.blocks() => Ok(first..end),
            _ => {
                let text = format!("block {first} and what follows: it has {} blocks", self.image.table.blocks());
                Err(Failure::new(Errno::ERANGE, &self.args.name, text))
            }
        }
    }

    /// A bit for each block.
    fn blocks(&mut self) -> Result<()> {
        let header = self.header()?;
        // As blktap has it: what is less than a whole block at the end is not counted.
        let whole = (self.image.size / u64::from(header.block_size())) as usize;
        let mut bits = vec![0u8; whole.div_ceil(8)];
        for (block, _) in self.image.table.allocated().filter(|(block, _)| (*block as usize) < whole) {
            bits[block as usize / 8] |= 0x80 >> (block % 8);
        }
        self.out.write_all(&bits).map_err(Failure::output)
    }

    /// The bitmaps of some blocks.
    fn bitmaps(&mut self, first: u32) -> Result<()> {
        let mut bits = vec![0; self.header()?.bitmap_size() as usize];
        for block in self.range(first)? {
            match self.image.table.get(block) {
                None => self.line(&format!("block {} not allocated", self.number(block)))?,
                Some(at) => {
                    let done = self.file.read_exact_at(&mut bits, at);
                    done.map_err(Failure::io(&self.args.name, "read it"))?;
                    self.out.write_all(&bits).map_err(Failure::output)?;
                }
            }
        }
        Ok(())
    }

    /// Sectors of the disk from one on, as many as are asked for.
    fn sector_range(&self, first: u64) -> Result<Range<u64>> {
        self.part_of_disk("sector", first, self.image.size / SECTOR_SIZE)
    }

    /// Units of the disk, of which there are `all`, from one on, as many as are asked for.
    fn part_of_disk(&self, unit: &str, first: u64, all: u64) -> Result<Range<u64>> {
        match first.checked_add(self.args.count.into()) {
            Some(end) if end <= all => Ok(first..end),
            _ => {
                let text = format!("{unit} {first} and what follows: it has {all} {unit}s");
                Err(Failure::new(Errno::ERANGE, &self.args.name, text))
            }
        }
    }

    /// A sector's block, and its number in that.
    fn block_of(&self, sector: u64) -> Result<(u32, u64)> {
        let in_block = u64::from(self.header()?.block_size()) / SECTOR_SIZE;
        Ok(((sector / in_block) as u32, sector % in_block))
    }

    /// The places of some sectors.
    fn sector_places(&mut self, first: u64) -> Result<()> {
        let bitmap = self.header()?.bitmap_size();
        for sector in self.sector_range(first)? {
            let (block, within) = self.block_of(sector)?;
            let place = self.image.table.get(block).map(|at| at + bitmap + within * SECTOR_SIZE);
            let place = place.map_or_else(|| "not allocated".to_owned(), |at| self.number(at));
            let [sector, block, within] = [sector, block.into(), within].map(|number| self.number(number));
            self.line(&format!(
                "logical sector {sector}: block number: {block}, sector offset: {within}, file offset: {place}"
            ))?;
        }
        Ok(())
    }

    /// The runs of some sectors that the image holds or does not hold, as the bitmaps of their blocks say. None is in two blocks.
    fn runs(&mut self, first: u64, mut each: impl FnMut(&mut Self, Range<u64>, bool) -> Result<()>) -> Result<()> {
        let mut bits = vec![0; self.header()?.bitmap_size() as usize];
        let in_block = u64::from(self.header()?.block_size()) / SECTOR_SIZE;
        let Range { start: mut sector, end } = self.sector_range(first)?;
        while sector < end {
            let (block, within) = self.block_of(sector)?;
            let begin = sector - within;
            let upto = end.min(begin + in_block);
            match self.image.table.get(block) {
                None => each(self, sector..upto, false)?,
                Some(at) => {
                    let done = self.file.read_exact_at(&mut bits, at);
                    done.map_err(Failure::io(&self.args.name, "read it"))?;
                    for (held, run) in bitmap::runs(&bits, within as u32..(upto - begin) as u32) {
                        each(self, begin + u64::from(run.start)..begin + u64::from(run.end), held)?;
                    }
                }
            }
            sector = upto;
        }
        Ok(())
    }

    /// The bits of some sectors.
    fn bits(&mut self, first: u64) -> Result<()> {
        self.runs(first, |reader, sectors, held| {
            for sector in sectors {
                let (block, within) = reader.block_of(sector)?;
                let [block, within] = [block.into(), within].map(|number: u64| reader.number(number));
                reader.line(&format!("block {block}: sec: {within}: {}", u8::from(held)))?;
            }
            Ok(())
        })
    }

    /// The sectors that the image holds: of each run of them the first, and how many.
    fn extents(&mut self, first: u64) -> Result<()> {
        let mut last: Option<Range<u64>> = None;
        let print = |reader: &mut Self, run: Option<Range<u64>>| match run {
            Some(run) => reader.line(&format!("{} {}", reader.number(run.start), reader.number(run.end - run.start))),
            None => Ok(()),
        };
        self.runs(first, |reader, sectors, held| {
            match &mut last {
                Some(run) if held && run.end == sectors.start => run.end = sectors.end,
                _ if held => print(reader, last.replace(sectors))?,
                _ => {}
            }
            Ok(())
        })?;
        print(self, last)
    }

    /// What the batmap says of some blocks.
    fn full(&mut self, first: u32) -> Result<()> {
        let batmap = self.image.batmap.as_ref().ok_or_else(|| super::set::no_batmap(&self.args.name))?;
        for block in self.range(first)? {
            eprintln!("batmap for block {}: {}", self.number(block), u8::from(batmap.is_full(block)));
        }
        Ok(())
    }

    /// The data of some blocks.
    fn data(&mut self, first: u32) -> Result<()> {
        let (bitmap, len) = (self.header()?.bitmap_size(), self.header()?.block_size());
        let mut buffer = vec![0; PIECE];
        for block in self.range(first)? {
            let Some(at) = self.image.table.get(block) else {
                self.line(&format!("block {} not allocated", self.number(block)))?;
                continue;
            };
            for done in (0..u64::from(len)).step_by(PIECE) {
                let piece = &mut buffer[..(u64::from(len) - done).min(PIECE as u64) as usize];
                let read = self.file.read_exact_at(piece, at + bitmap + done);
                read.map_err(Failure::io(&self.args.name, "read it"))?;
                self.out.write_all(piece).map_err(Failure::output)?;
            }
        }
        Ok(())
    }

    /// Some bytes of the disk.
    fn bytes(&mut self, range: Range<u64>) -> Result<()> {
        let disk = Disk::open(&self.args.name, true, self.parents)?;
        let mut buffer = vec![0; PIECE];
        disk.runs(range.start, range.end - range.start, &mut |run| {
            let mut done = 0;
            while done < run.len {
                let piece = &mut buffer[..(run.len - done).min(PIECE as u64) as usize];
                match run.from {
                    Some((file, at)) => {
                        disk::read(file, at + done, piece).map_err(Failure::io(&self.args.name, "read it"))?;
                    }
                    None => piece.fill(0),
                }
                self.out.write_all(piece).map_err(Failure::output)?;
                done += piece.len() as u64;
            }
            Ok(())
        })
    }

    /// All headers as text.
    fn headers(&mut self) -> Result<()> {
        let image = self.image;
        self.footer(&image.footer)?;
        let Some(header) = &image.header else { return Ok(()) };
        self.dynamic(header)?;
        if image.kind == Kind::Differencing {
            self.line("VHD Parent Locators:\n--------------------")?;
            for (i, locator) in header.locators.iter().enumerate().filter(|(_, locator)| **locator != Locator::NONE) {
                self.locator(i, locator)?;
            }
        }
        self.batmap()
    }

    fn footer(&mut self, footer: &Footer) -> Result<()> {
        let bytes = footer.as_bytes();
        let (features, creator_version) = (word(bytes, 8), footer.creator_version.get());
        let creator = String::from_utf8_lossy(&footer.creator).trim_end_matches('\0').to_owned();
        let sizes = [48, 40].map(|at| long(bytes, at));
        let (cylinders, heads, sectors) = (word(bytes, 56) >> 16, u32::from(bytes[58]), u32::from(bytes[59]));
        let chs = u64::from(cylinders) * u64::from(heads) * u64::from(sectors);
        self.line("VHD Footer Summary:\n-------------------")?;
        self.field("Cookie", String::from_utf8_lossy(&bytes[..8]))?;
        let known = [(1, "<TEMP>"), (2, "<RESV>")];
        let names: String = known.iter().filter(|(bit, _)| features & bit != 0).map(|(_, name)| *name).collect();
        self.field("Features", format!("({features:#010x}) {names}"))?;
        let version = word(bytes, 12);
        self.field("File format version", format!("Major: {}, Minor: {}", version >> 16, version & 0xffff))?;
        self.field("Data offset", self.number(long(bytes, 16)))?;
        self.field("Timestamp", time(footer.timestamp.get()))?;
        self.field("Creator Application", format!("'{creator}'"))?;
        let (major, minor) = (creator_version >> 16, creator_version & 0xffff);
        self.field("Creator version", format!("Major: {major}, Minor: {minor}"))?;
        let system = match &bytes[36..40] {
            b"Wi2k" => "Windows",
            b"Mac " => "Macintosh",
            _ => "Unknown!",
        };
        self.field("Creator OS", system)?;
        let size = |size: u64| format!("{} MB ({} Bytes)", self.number(size >> 20), self.number(size));
        let [current, original] = sizes.map(size);
        self.field("Original disk size", original)?;
        self.field("Current disk size", current)?;
        let geometry = [cylinders, heads, sectors].map(|number| self.number(number));
        self.field("Geometry", format!("Cyl: {}, Hds: {}, Sctrs: {}", geometry[0], geometry[1], geometry[2]))?;
        self.field("", format!("= {} MB ({} Bytes)", self.number(chs >> 11), self.number(chs << 9)))?;
        let kind = match self.image.kind {
            Kind::Fixed => "Fixed hard disk",
            Kind::Dynamic => "Dynamic hard disk",
            Kind::Differencing => "Differencing hard disk",
        };
        self.field("Disk type", kind)?;
        let mut sealed = *footer;
        sealed.seal();
        self.checksum(word(bytes, 64), word(sealed.as_bytes(), 64))?;
        self.field("UUID", footer.uuid)?;
        self.field("Saved state", if bytes[84] == 0 { "No" } else { "Yes" })?;
        self.field("Hidden", bytes[85])?;
        self.line("")
    }

    fn dynamic(&mut self, header: &Header) -> Result<()> {
        let bytes = header.as_bytes();
        self.line("VHD Header Summary:\n-------------------")?;
        self.field("Cookie", String::from_utf8_lossy(&bytes[..8]))?;
        self.field("Data offset (unusd)", self.number(long(bytes, 8)))?;
        self.field("Table offset", self.number(header.table_at()))?;
        self.field("Header version", format!("{:#010x}", word(bytes, 24)))?;
        self.field("Max BAT size", self.number(header.entries()))?;
        let block = header.block_size();
        self.field("Block size", format!("{} ({} MB)", self.number(block), self.number(block >> 20)))?;
        self.field("Parent name", header.parent_name().unwrap_or_default())?;
        self.field("Parent UUID", header.parent_uuid)?;
        self.field("Parent timestamp", time(header.parent_timestamp.get()))?;
        let mut sealed = *header;
        sealed.seal();
        self.checksum(word(bytes, 36), word(sealed.as_bytes(), 36))?;
        self.line("")
    }

    fn checksum(&mut self, found: u32, computed: u32) -> Result<()> {
        let good = if found == computed { "Good!" } else { "Bad!" };
        self.field("Checksum", format!("{found:#x}|{computed:#x} ({good})"))
    }

    fn locator(&mut self, i: usize, locator: &Locator) -> Result<()> {
        let bytes = locator.as_bytes();
        let code = match &bytes[..4] {
            b"MacX" => "PLAT_CODE_MACX",
            b"Mac " => "PLAT_CODE_MAC",
            b"W2ku" => "PLAT_CODE_W2KU",
            b"W2ru" => "PLAT_CODE_W2RU",
            b"Wi2k" => "PLAT_CODE_WI2K",
            b"Wi2r" => "PLAT_CODE_WI2R",
            _ => "UNKOWN",
        };
        self.line(&format!("locator:            : {i}"))?;
        for (name, value) in [
            ("code", code.to_owned()),
            ("data_space", self.number(word(bytes, 4))),
            ("data_length", self.number(word(bytes, 8))),
            ("data_offset", self.number(locator.place().0)),
        ] {
            self.line(&format!("       {name:<13}: {value}"))?;
        }
        match self.name(locator) {
            Some(name) => self.line(&format!("       decoded name : {}\n", one_line(&name))),
            None => self.line("failed to read parent name\n"),
        }
    }

    /// The parent's path that a locator says.
    fn name(&self, locator: &Locator) -> Option<String> {
        let platform: Platform = locator.platform()?;
        let (at, len) = locator.place();
        let mut bytes =
            vec![0; usize::try_from(len.min(locator.space())).ok().filter(|len| *len as u64 <= NAME_MAX)?];
        self.file.read_exact_at(&mut bytes, at).ok()?;
        decode_path(platform, &bytes)
    }

    fn batmap(&mut self) -> Result<()> {
        let Some(batmap) = &self.image.batmap else { return Ok(()) };
        let bytes = batmap.header();
        self.line("VHD Batmap Summary:\n-------------------")?;
        self.field("Batmap offset", self.number(batmap.bits_at))?;
        self.field("Batmap size (secs)", self.number(batmap.bits().len() as u64 / 512))?;
        self.field("Batmap version", format!("{:#010x}", word(&bytes, 20)))?;
        if let Some(key) = &batmap.key_hash {
            self.line(&format!("Batmap keyhash nonce: {}", super::key::hex(&key.nonce)))?;
            self.line(&format!("Batmap keyhash hash : {}", super::key::hex(&key.hash)))?;
        }
        let mut found = [0; 4];
        let done = self.file.read_exact_at(&mut found, batmap.at + 24);
        done.map_err(Failure::io(&self.args.name, "read it"))?;
        self.checksum(u32::from_be_bytes(found), word(&bytes, 24))?;
        self.line("")
    }
}

/// A big-endian number of 32 bits.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// A big-endian number of 64 bits.
fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) << 32 | u64::from(word(bytes, at + 4))
}

/// A time of the format as ctime(3) prints it, in UTC.
fn time(timestamp: u32) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let seconds = unix_seconds(timestamp);
    let (mut day, of_day) = (seconds / 86400, seconds % 86400);
    let weekday = DAYS[(day % 7) as usize];
    let mut year = 1970;
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 0;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{weekday} {} {:>2} {hour:02}:{minute:02}:{second:02} {year}", MONTHS[month], day + 1)
}

#[cfg(test)]
mod tests {
    use super::time;

    #[test]
    fn times_are_those_of_ctime() {
        assert_eq!(time(0), "Sat Jan  1 00:00:00 2000");
        assert_eq!(time(5_183_999), "Tue Feb 29 23:59:59 2000");
        assert_eq!(time(5_184_000), "Wed Mar  1 00:00:00 2000");
        assert_eq!(time(835_488_000), "Tue Jun 23 00:00:00 2026");
        assert_eq!(time(u32::MAX), "Tue Feb  7 06:28:15 2136");
    }
}
