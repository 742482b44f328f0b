//! The header of an image that has blocks, and the parent locators in it (specification, "Dynamic Disk Header Format").

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Corrupt, Uuid, checksum};
use crate::SECTOR_SIZE;

/// Bytes of a header.
pub const HEADER_SIZE: usize = 1024;
/// Bytes of a block where nothing else is asked for.
pub const BLOCK_SIZE: u32 = 2 << 20;

const COOKIE: [u8; 8] = *b"cxsparse";
const VERSION: u32 = 0x0001_0000;
/// Blocks of an image, at most: 4 TiB of the usual size. Each takes four bytes of memory.
pub(super) const ENTRIES_MAX: u64 = 2 << 20;
/// Bytes that a block may have.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 4096..=256 << 20;
/// In which way a locator names the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Platform {
    /// A URL, `file://` and a path, in UTF-8.
    MacX,
    /// A path of Windows from its root, in UTF-16, little-endian.
    W2ku,
    /// A path of Windows relative to the image, in the same way.
    W2ru,
}

impl Platform {
    const ALL: [([u8; 4], Platform); 3] =
        [(*b"MacX", Platform::MacX), (*b"W2ku", Platform::W2ku), (*b"W2ru", Platform::W2ru)];
}

/// Where something that names the parent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Locator {
    platform: [u8; 4],
    data_space: U32,
    data_length: U32,
    reserved: U32,
    data_offset: U64,
}

impl Locator {
    /// One that names nothing.
    pub const NONE: Locator = Locator {
        platform: [0; 4],
        data_space: U32::ZERO,
        data_length: U32::ZERO,
        reserved: U32::ZERO,
        data_offset: U64::ZERO,
    };

    /// For a name of `len` bytes at byte `at`, in room of whole sectors.
    pub fn new(platform: Platform, at: u64, len: u32) -> Locator {
        Locator::with_space(platform, at, len, u64::from(len).next_multiple_of(SECTOR_SIZE))
    }

    /// For a name of `len` bytes at byte `at`, in room of `space` bytes.
    pub fn with_space(platform: Platform, at: u64, len: u32, space: u64) -> Locator {
        let code = Platform::ALL.iter().find(|(_, each)| *each == platform).map_or([0; 4], |(code, _)| *code);
        let data_space = (space as u32).into();
        Locator { platform: code, data_space, data_length: len.into(), data_offset: at.into(), ..Locator::NONE }
    }

    /// In which way it names the parent. None: it is not used, or in a way that is not known here.
    pub fn platform(&self) -> Option<Platform> {
        Platform::ALL.iter().find(|(code, _)| *code == self.platform).map(|(_, platform)| *platform)
    }

    /// What is wrong with it (specification; blktap's check).
    pub(super) fn oddities(&self) -> impl Iterator<Item = &'static str> {
        // The three above, and those of systems that are gone.
        const KNOWN: [&[u8; 4]; 6] = [b"MacX", b"W2ku", b"W2ru", b"Mac ", b"Wi2r", b"Wi2k"];
        let used = self.platform != [0; 4];
        let odd = [
            (used && !KNOWN.contains(&&self.platform), "is for a platform that is not known"),
            (!used && *self != Locator::NONE, "is not used and not zero"),
            (used && self.data_length.get() == 0, "has no bytes"),
            (used && self.data_space.get() == 0, "has no room"),
            (used && self.reserved.get() != 0, "has reserved bytes that are not zero"),
        ];
        odd.into_iter().filter(|(is, _)| *is).map(|(_, what)| what)
    }

    /// Where the name is in the file, and its bytes.
    pub fn place(&self) -> (u64, u64) {
        (self.data_offset.get(), self.data_length.get().into())
    }

    /// Bytes set apart for the name. The specification says sectors, but most programs write bytes; no name has 512 sectors.
    pub fn space(&self) -> u64 {
        let space = u64::from(self.data_space.get());
        if space < SECTOR_SIZE { space * SECTOR_SIZE } else { space }
    }
}

/// The parent's path, as it is with slashes, that a locator's bytes are. None: they are none.
pub fn decode_path(platform: Platform, bytes: &[u8]) -> Option<String> {
    let text = match platform {
        Platform::MacX => {
            let text = std::str::from_utf8(bytes).ok()?.trim_end_matches('\0');
            text.strip_prefix("file://").unwrap_or(text).to_owned()
        }
        Platform::W2ku | Platform::W2ru => {
            let units = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
            let text = char::decode_utf16(units).collect::<Result<String, _>>().ok()?;
            let text = text.trim_end_matches('\0').replace('\\', "/");
            // A drive, which nobody has here.
            match text.split_at_checked(2) {
                Some((drive, path)) if drive.ends_with(':') => path.to_owned(),
                _ => text,
            }
        }
    };
    (!text.is_empty() && !text.contains('\0')).then_some(text)
}

/// What a locator's bytes are for the parent's path, relative to the image.
pub fn encode_path(platform: Platform, path: &str) -> Vec<u8> {
    match platform {
        Platform::MacX => format!("file://{path}").into_bytes(),
        Platform::W2ku | Platform::W2ru => {
            path.replace('/', "\\").encode_utf16().flat_map(u16::to_le_bytes).collect()
        }
    }
}

/// As it is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    cookie: [u8; 8],
    data_offset: U64,
    table_offset: U64,
    version: U32,
    max_table_entries: U32,
    block_size: U32,
    checksum: U32,
    /// The parent's. All zeros: the parent is a raw image, which has none.
    pub parent_uuid: Uuid,
    /// The parent's footer's at the time, or when the file was changed last.
    pub parent_timestamp: U32,
    reserved: U32,
    /// UTF-16, big-endian, unlike the locators.
    parent_name: [U16; 256],
    /// Where the parent is.
    pub locators: [Locator; 8],
    reserved_too: [u8; 256],
}

const _: () = assert!(size_of::<Header>() == HEADER_SIZE);

impl Header {
    /// For an image of `entries` blocks with that many bytes each, whose table is at byte `table_at`, without a parent.
    pub fn new(table_at: u64, entries: u32, block_size: u32) -> Header {
        let mut header = Header {
            cookie: COOKIE,
            data_offset: u64::MAX.into(),
            table_offset: table_at.into(),
            version: VERSION.into(),
            max_table_entries: entries.into(),
            block_size: block_size.into(),
            checksum: 0.into(),
            parent_uuid: Uuid::NIL,
            parent_timestamp: 0.into(),
            reserved: 0.into(),
            parent_name: [U16::ZERO; 256],
            locators: [Locator::NONE; 8],
            reserved_too: [0; 256],
        };
        header.seal();
        header
    }

    /// Reads one from [`HEADER_SIZE`] bytes.
    pub fn parse(bytes: &[u8]) -> Result<Header, Corrupt> {
        let what = "header";
        let header = Header::read_from_bytes(bytes).map_err(|_| Corrupt::Short { what, len: bytes.len() as u64 })?;
        if header.cookie != COOKIE {
            return Err(Corrupt::Cookie { what });
        }
        let computed = header.sum();
        if header.checksum.get() != computed {
            return Err(Corrupt::Checksum { what, found: header.checksum.get(), computed });
        }
        if header.version.get() != VERSION {
            return Err(Corrupt::Version { what, version: header.version.get() });
        }
        let block_size = header.block_size.get();
        if !BLOCK_SIZES.contains(&block_size) || !block_size.is_power_of_two() {
            return Err(Corrupt::BlockSize { size: block_size });
        }
        let entries = u64::from(header.max_table_entries.get());
        if entries > ENTRIES_MAX {
            return Err(Corrupt::Entries { entries, most: ENTRIES_MAX });
        }
        Ok(header)
    }

    /// The checksum that its bytes should have.
    fn sum(&self) -> u32 {
        let unsealed = Header { checksum: 0.into(), ..*self };
        checksum(unsealed.as_bytes())
    }

    /// Makes the checksum right, after a change.
    pub fn seal(&mut self) {
        self.checksum = self.sum().into();
    }

    /// What is wrong with it that the checksum does not tell, as far as it does no harm (specification; blktap's check).
    pub(super) fn oddities(&self, parent: bool) -> impl Iterator<Item = &'static str> {
        let none = !parent;
        let odd = [
            (self.data_offset.get() != u64::MAX, "says where another header is, which there is none"),
            (!self.table_offset.get().is_multiple_of(SECTOR_SIZE), "puts the table at a byte that begins no sector"),
            (self.reserved.get() != 0 || self.reserved_too != [0; 256], "has reserved bytes that are not zero"),
            (none && self.parent_name != [U16::ZERO; 256], "names a parent, which the image does not have"),
            (none && self.locators != [Locator::NONE; 8], "has locators of a parent, which the image does not have"),
            (none && self.parent_uuid != Uuid::NIL, "has the UUID of a parent, which the image does not have"),
            (none && self.parent_timestamp.get() != 0, "has the time of a parent, which the image does not have"),
            (parent && self.parent_name().is_none(), "has no parent's name that is text"),
        ];
        odd.into_iter().filter(|(is, _)| *is).map(|(_, what)| what)
    }

    /// Where the block allocation table is in the file.
    pub fn table_at(&self) -> u64 {
        self.table_offset.get()
    }

    /// Sets how many blocks the table has room for; [`seal`](Self::seal) follows.
    pub fn set_entries(&mut self, entries: u32) {
        self.max_table_entries = entries.into();
    }

    /// Blocks that the table has room for.
    pub fn entries(&self) -> u32 {
        self.max_table_entries.get()
    }

    /// Bytes of a block's data.
    pub fn block_size(&self) -> u32 {
        self.block_size.get()
    }

    /// Bytes of a block's bitmap: a bit for each sector of its data, in whole sectors.
    pub fn bitmap_size(&self) -> u64 {
        (u64::from(self.block_size()) / SECTOR_SIZE).div_ceil(8).next_multiple_of(SECTOR_SIZE)
    }

    /// Bytes of a block in the file: its bitmap and its data.
    pub fn block_len(&self) -> u64 {
        self.bitmap_size() + u64::from(self.block_size())
    }

    /// The largest disk, in bytes, that the table has room for.
    pub fn size_max(&self) -> u64 {
        u64::from(self.entries()) * u64::from(self.block_size())
    }

    /// The parent's file name. None: there is none, or it is no text.
    pub fn parent_name(&self) -> Option<String> {
        let units = self.parent_name.iter().map(|unit| unit.get()).take_while(|unit| *unit != 0);
        let name = char::decode_utf16(units).collect::<Result<String, _>>().ok()?;
        (!name.is_empty()).then_some(name)
    }

    /// The same without anything that names the parent.
    pub fn without_names(self) -> Header {
        Header { locators: [Locator::NONE; 8], ..self }
    }

    /// Sets the parent's file name, as much of it as there is room for; [`seal`](Self::seal) follows.
    pub fn set_parent_name(&mut self, name: &str) {
        self.parent_name = [U16::ZERO; 256];
        for (place, unit) in self.parent_name.iter_mut().zip(name.encode_utf16()) {
            *place = unit.into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_is_read() {
        let mut header = Header::new(1536, 1024, BLOCK_SIZE);
        header.set_parent_name("größe.vhd");
        header.seal();
        let read = Header::parse(header.as_bytes()).unwrap();
        assert_eq!(read, header);
        assert_eq!((read.table_at(), read.entries(), read.block_size()), (1536, 1024, 2 << 20));
        assert_eq!((read.bitmap_size(), read.parent_name().as_deref()), (512, Some("größe.vhd")));
        assert_eq!(Header::new(1536, 1, 16 << 20).bitmap_size(), 4096);
    }

    #[test]
    fn every_changed_byte_is_seen() {
        let header = Header::new(1536, 1024, BLOCK_SIZE);
        for at in 0..HEADER_SIZE {
            let mut bytes: [u8; HEADER_SIZE] = zerocopy::transmute!(header);
            bytes[at] ^= 1;
            assert!(Header::parse(&bytes).is_err(), "byte {at}");
        }
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let parse =
            |entries, block_size| Header::parse(Header::new(1536, entries, block_size).as_bytes()).unwrap_err();
        assert_eq!(parse(1, 3 << 20), Corrupt::BlockSize { size: 3 << 20 });
        assert_eq!(parse(1, 512), Corrupt::BlockSize { size: 512 });
        assert_eq!(parse(1, 0), Corrupt::BlockSize { size: 0 });
        assert_eq!(parse(u32::MAX, 2 << 20), Corrupt::Entries { entries: u32::MAX.into(), most: ENTRIES_MAX });
    }

    #[test]
    fn paths_are_written_and_read_on_each_platform() {
        for (platform, bytes) in [
            (Platform::MacX, &b"file://./a b/parent.vhd"[..]),
            (Platform::W2ru, b".\0\\\0a\0 \0b\0\\\0p\0a\0r\0e\0n\0t\0.\0v\0h\0d\0"),
        ] {
            assert_eq!(encode_path(platform, "./a b/parent.vhd"), bytes);
            assert_eq!(decode_path(platform, bytes).as_deref(), Some("./a b/parent.vhd"));
        }
        let windows = encode_path(Platform::W2ku, "C:/vm/parent.vhd");
        assert_eq!(decode_path(Platform::W2ku, &windows).as_deref(), Some("/vm/parent.vhd"));
        assert_eq!(decode_path(Platform::MacX, b"\xff\xfe"), None);
        assert_eq!(decode_path(Platform::W2ru, &[0, 0xd8, 0, 0]), None);
        assert_eq!(decode_path(Platform::W2ru, &[]), None);
    }

    #[test]
    fn the_room_of_a_locator_is_in_bytes_or_sectors() {
        let locator = |space: u32| Locator { data_space: space.into(), ..Locator::new(Platform::MacX, 2048, 20) };
        assert_eq!((locator(1).space(), locator(512).space(), locator(4096).space()), (512, 512, 4096));
        assert_eq!(Locator::NONE.platform(), None);
    }
}
