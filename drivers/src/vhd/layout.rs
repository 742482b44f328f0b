//! What a new image consists of, and where the parts of an image go.

use zerocopy::IntoBytes;

use super::header::ENTRIES_MAX;
use super::{
    BLOCK_SIZE, Batmap, FOOTER_SIZE, Footer, HEADER_SIZE, Header, Kind, Locator, NAME_MAX, Platform, SECTORS_MAX,
    Table, Uuid, encode_path,
};
use crate::SECTOR_SIZE;

/// What the data of a block is aligned to in the file, bytes.
pub const DATA_ALIGN: u64 = 4096;

/// The most that a table is made for, bytes of the disk: a file of whose sectors an entry can count each.
pub const ROOM_MAX: u64 = 2 << 40;

/// The most bytes of a file (off_t).
const FILE_MAX: u64 = i64::MAX as u64;

/// The platforms that a parent is named for, in the order of the locators (blktap's libvhd).
const PLATFORMS: [Platform; 3] = [Platform::MacX, Platform::W2ku, Platform::W2ru];

/// Bytes that belong to a place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where the first of them goes.
    pub at: u64,
    /// They.
    pub bytes: Vec<u8>,
}

/// Why there can be no such image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No disk is that small.
    #[error("a disk has at least one sector")]
    Empty,
    /// The table could not count the sectors of its last blocks.
    #[error(
        "a disk of {size} bytes is too large: the table of a VHD image can address one of {most} bytes ({} GiB)",
        most >> 30
    )]
    Size {
        /// As it was asked for.
        size: u64,
        /// The most.
        most: u64,
    },
    /// More room in the table than a disk can ever use.
    #[error("room for {room} bytes is too much: at most {ROOM_MAX} bytes (2 TiB) make sense")]
    Room {
        /// As it was asked for.
        room: u64,
    },
    /// The parent's name needs more bytes than there are.
    #[error("there is no room for the parent's path {path}: it needs {needed} bytes, and there are {room}")]
    Name {
        /// The path.
        path: String,
        /// Bytes that its locators take.
        needed: u64,
        /// Bytes that are there.
        room: u64,
    },
}

/// The parent of a new image.
#[derive(Clone, Debug)]
pub struct NewParent {
    /// Its path, relative to the image's folder.
    pub path: String,
    /// Its UUID; [`Uuid::NIL`] for a raw image.
    pub uuid: Uuid,
    /// When its file was changed last, in seconds of Unix.
    pub unix_seconds: u64,
}

/// What is asked for in a new image that has blocks.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// The disk's size, bytes.
    pub size: u64,
    /// The size that it can grow to without moving a block, bytes; if it is less than the size, that counts.
    pub room: u64,
    /// What children will know it by.
    pub uuid: Uuid,
    /// Now, in seconds of Unix.
    pub unix_seconds: u64,
    /// The parent of a differencing image.
    pub parent: Option<NewParent>,
}

/// The metadata of an image that has blocks but none yet.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The footer, and its copy.
    pub footer: Footer,
    /// The header, which follows the copy.
    pub header: Header,
    /// The map of full blocks.
    pub batmap: Batmap,
    /// The parent's names.
    pub names: Vec<Piece>,
    /// Where the metadata ends.
    pub end: u64,
}

impl Layout {
    /// Says what the image consists of.
    pub fn new(new: &NewImage) -> Result<Layout, LayoutError> {
        if new.size == 0 {
            return Err(LayoutError::Empty);
        }
        if new.room > ROOM_MAX {
            return Err(LayoutError::Room { room: new.room });
        }
        let block = u64::from(BLOCK_SIZE);
        // So that the error is about the size, and not about what follows from it.
        let entries = new.size.max(new.room).div_ceil(block).min(ROOM_MAX / block) as u32;
        let kind = if new.parent.is_some() { Kind::Differencing } else { Kind::Dynamic };
        let table_at = (FOOTER_SIZE + HEADER_SIZE) as u64;
        let mut header = Header::new(table_at, entries, BLOCK_SIZE);
        let batmap = Batmap::empty(table_at + Table::bytes(entries), entries);
        let mut end = batmap.bits_at + batmap.bits().len() as u64;
        let mut names = Vec::new();
        if let Some(parent) = &new.parent {
            names = name_parent(&mut header, parent, end, u64::MAX)?;
            end = names.last().map_or(end, |name| name.at + name.bytes.len() as u64);
        }
        let most = size_max(end, &header);
        if new.size > most {
            return Err(LayoutError::Size { size: new.size, most });
        }
        let footer = Footer::new(kind, new.size, new.uuid, new.unix_seconds);
        Ok(Layout { footer, header, batmap, names, end })
    }

    /// All but the footers, which make an image of it and are written when these are safe.
    pub fn pieces(&self) -> Vec<Piece> {
        let mut table = vec![0; Table::bytes(self.header.entries()) as usize];
        Table::empty(self.header.entries()).write(0, &mut table);
        let mut pieces = vec![
            Piece { at: FOOTER_SIZE as u64, bytes: self.header.as_bytes().to_vec() },
            Piece { at: self.header.table_at(), bytes: table },
        ];
        pieces.extend(batmap_pieces(&self.batmap));
        pieces.extend(self.names.iter().cloned());
        pieces
    }
}

/// The batmap as it is in the file: the bits, then the header with their checksum.
pub fn batmap_pieces(batmap: &Batmap) -> [Piece; 2] {
    [
        Piece { at: batmap.bits_at, bytes: batmap.bits().to_vec() },
        Piece { at: batmap.at, bytes: batmap.header().to_vec() },
    ]
}

/// Where the bitmap of a block goes that is put after byte `end`, so that its data is aligned.
pub fn block_place(end: u64, header: &Header) -> u64 {
    aligned(end, header.bitmap_size())
}

/// The same for a bitmap of that many bytes.
pub(super) fn aligned(end: u64, bitmap: u64) -> u64 {
    (end + bitmap).next_multiple_of(DATA_ALIGN) - bitmap
}

/// The largest disk, in bytes, all of whose blocks the table of an image can address whose metadata ends at byte `end`.
pub fn size_max(end: u64, header: &Header) -> u64 {
    let first = block_place(end, header) / SECTOR_SIZE;
    let stride = header.block_len().next_multiple_of(DATA_ALIGN) / SECTOR_SIZE;
    let blocks = (SECTORS_MAX - 1).saturating_sub(first) / stride + 1;
    blocks.min(ENTRIES_MAX) * u64::from(header.block_size())
}

/// Names the parent in the header, and gives the names as they go to the file. They take the places of those that were there; where one of
/// them is too small, all go to byte `at`, where there is room for `room` bytes; without that, those that fit take the places there are,
/// as other programs make images with one name.
///
/// # Errors
///
/// There is not enough room; the header is as it was.
pub fn name_parent(header: &mut Header, parent: &NewParent, at: u64, room: u64) -> Result<Vec<Piece>, LayoutError> {
    let path = relative(&parent.path);
    let mut changed = *header;
    changed.parent_uuid = parent.uuid;
    changed.parent_timestamp = super::timestamp(parent.unix_seconds).into();
    changed.set_parent_name(path.rsplit('/').next().unwrap_or(&path));
    let time = changed.parent_timestamp.get();
    // Windows has no such names: what is a part of the name here would be a folder there.
    let platforms = if path.contains('\\') { &PLATFORMS[..1] } else { &PLATFORMS[..] };
    let names: Vec<_> = platforms.iter().map(|platform| (*platform, encode_path(*platform, &path))).collect();
    // What a locator says of its place and room is the image's word.
    let room_of = |locator: &Locator| {
        let ((at, _), space) = (locator.place(), locator.space().min(NAME_MAX));
        at.checked_add(space).filter(|end| *end <= FILE_MAX).map(|_| (at, space))
    };
    let place = |platform, name: &[u8]| {
        let own = header.locators.iter().filter(|locator| locator.platform() == Some(platform));
        own.filter_map(room_of).find(|(_, space)| *space >= name.len() as u64)
    };
    let places: Vec<_> = names.iter().map(|(platform, name)| place(*platform, name)).collect();
    let needed = names.iter().map(|(_, name)| space(name)).sum();
    let mut at = at;
    let places: Vec<_> = match () {
        () if places.iter().all(Option::is_some) => places,
        () if needed <= room => {
            let next = |(_, name): &(Platform, Vec<u8>)| {
                at += space(name);
                Some((at - space(name), space(name)))
            };
            names.iter().map(next).collect()
        }
        () if places.iter().any(Option::is_some) => places,
        () => return Err(LayoutError::Name { path, needed, room }),
    };
    changed.locators = [Locator::NONE; 8];
    let named = names.iter().zip(places).filter_map(|((platform, name), place)| Some((*platform, name, place?)));
    let mut pieces = Vec::new();
    for (locator, (platform, name, (at, space))) in changed.locators.iter_mut().zip(named) {
        *locator = Locator::with_space(platform, at, name.len() as u32, space);
        pieces.push(piece(at, name, space, time));
    }
    changed.seal();
    *header = changed;
    Ok(pieces)
}

fn space(name: &[u8]) -> u64 {
    (name.len() as u64).next_multiple_of(SECTOR_SIZE)
}

/// A name, and behind it, where there is room, the time of the parent's footer.
fn piece(at: u64, name: &[u8], space: u64, timestamp: u32) -> Piece {
    let mut bytes = name.to_vec();
    bytes.resize(space as usize, 0);
    if let Some(place) = bytes.get_mut(time_place(name.len())..).and_then(|rest| rest.first_chunk_mut::<12>()) {
        place[..8].copy_from_slice(&TIME_MARK);
        place[8..].copy_from_slice(&timestamp.to_be_bytes());
    }
    Piece { at, bytes }
}

/// What begins the time of the parent's footer, which we write behind a parent's name. The header has a field for it, but others write the
/// time there of the parent's file, by another clock; they write zeros behind a name.
const TIME_MARK: [u8; 8] = *b"tapdtime";

/// Where that time is behind a name of `len` bytes: zeros that end the name are between them.
fn time_place(len: usize) -> usize {
    (len + 4).next_multiple_of(4)
}

/// The time of the parent's footer, from what is behind a parent's name of `len` bytes. None: whoever named the parent did not say.
pub(super) fn parent_time(space: &[u8], len: usize) -> Option<u32> {
    let found = space.get(time_place(len)..)?.first_chunk::<12>()?;
    let (mark, time) = found.split_first_chunk::<8>()?;
    (*mark == TIME_MARK).then_some(u32::from_be_bytes(*time.first_chunk()?))
}

/// Relative paths begin with a dot: Windows and blktap expect it.
fn relative(path: &str) -> String {
    if path.starts_with('/') || path.starts_with("./") || path.starts_with("../") {
        path.to_owned()
    } else {
        format!("./{path}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(size: u64, room: u64, parent: Option<&str>) -> Result<Layout, LayoutError> {
        let uuid = Uuid([1; 16]);
        let parent = parent.map(|path| NewParent { path: path.to_owned(), uuid, unix_seconds: 946_684_805 });
        Layout::new(&NewImage { size, room, uuid, unix_seconds: 0, parent })
    }

    #[test]
    fn parts_follow_each_other() {
        let layout = new(1 << 30, 0, Some("base.vhd")).unwrap();
        let mut pieces = layout.pieces();
        pieces.sort_by_key(|piece| piece.at);
        let mut at = FOOTER_SIZE as u64;
        for piece in &pieces {
            assert_eq!(piece.at, at);
            at += piece.bytes.len() as u64;
        }
        assert_eq!((at, layout.end), (512 + 1024 + 2048 + 1024 + 3 * 512, at));
        assert_eq!(layout.header.parent_name().as_deref(), Some("base.vhd"));
        assert_eq!(layout.header.parent_timestamp.get(), 5);
    }

    #[test]
    fn what_a_locator_says_of_its_place_and_room_is_the_images_word() {
        let parent = NewParent { path: "base.vhd".into(), uuid: Uuid([1; 16]), unix_seconds: 946_684_805 };
        let named = |at, space| {
            let mut header = Header::new(1536, 10, BLOCK_SIZE);
            for (locator, platform) in header.locators.iter_mut().zip(PLATFORMS) {
                *locator = Locator::with_space(platform, at, 8, space);
            }
            name_parent(&mut header, &parent, 0, 0)
        };
        // No more is written than a name may have.
        assert!(named(4096, 0xffff_fe00).unwrap().iter().all(|piece| piece.bytes.len() as u64 == NAME_MAX));
        for at in [u64::MAX, u64::MAX - 511, FILE_MAX, FILE_MAX - 511] {
            assert!(matches!(named(at, 512), Err(LayoutError::Name { .. })), "{at}");
        }
    }

    #[test]
    fn data_is_aligned() {
        let header = Header::new(1536, 10, BLOCK_SIZE);
        for end in [1536, 3584, 3585, 4096, 10_000] {
            let at = block_place(end, &header);
            assert!(at >= end && at < end + DATA_ALIGN && (at + 512).is_multiple_of(DATA_ALIGN), "{end}");
        }
    }

    #[test]
    fn the_largest_disk_can_be_filled() {
        let layout = new(2040 << 30, ROOM_MAX, None).unwrap();
        let most = size_max(layout.end, &layout.header);
        assert!(new(most, ROOM_MAX, None).is_ok());
        assert!(matches!(new(most + 1, ROOM_MAX, None), Err(LayoutError::Size { .. })));
        assert!(matches!(new(1 << 60, 0, None), Err(LayoutError::Size { .. })));
        assert_eq!(new(1 << 30, ROOM_MAX + 1, None).unwrap_err(), LayoutError::Room { room: ROOM_MAX + 1 });
        assert_eq!(new(0, 0, None).unwrap_err(), LayoutError::Empty);
        // The last block's entry is one that the table can have, and one more is not.
        let stride = (u64::from(BLOCK_SIZE) + DATA_ALIGN) / 512;
        let blocks = most / u64::from(BLOCK_SIZE);
        let first = block_place(layout.end, &layout.header) / 512;
        assert!(first + (blocks - 1) * stride < SECTORS_MAX && first + blocks * stride >= SECTORS_MAX);
    }

    #[test]
    fn a_new_name_takes_the_old_ones_place_if_it_can() {
        let layout = new(1 << 30, 0, Some("base.vhd")).unwrap();
        let other = |path: String| NewParent { path, uuid: Uuid([2; 16]), unix_seconds: 946_684_800 };
        let mut header = layout.header;
        let pieces = name_parent(&mut header, &other("../b/c.vhd".into()), 1 << 20, 0).unwrap();
        assert_eq!(pieces.iter().map(|piece| piece.at).collect::<Vec<_>>(), [4608, 5120, 5632]);
        assert!(pieces[0].bytes.starts_with(b"file://../b/c.vhd\0") && pieces[0].bytes.len() == 512);
        assert_eq!(parent_time(&pieces[1].bytes, encode_path(Platform::W2ku, "../b/c.vhd").len()), Some(0));
        let longer = other(format!("/{}/c.vhd", "x".repeat(600)));
        let before = header;
        let wrong = name_parent(&mut header, &longer, 1 << 20, 2047).unwrap_err();
        assert!(matches!(wrong, LayoutError::Name { needed: 4096, room: 2047, .. }), "{wrong}");
        assert_eq!(header, before);
        let long = other(format!("/{}/c.vhd", "x".repeat(300)));
        let pieces = name_parent(&mut header, &long, 1 << 20, 2047).unwrap();
        assert_eq!(pieces.iter().map(|piece| piece.at).collect::<Vec<_>>(), [4608], "the one name that fits");
        assert_eq!(header.locators.iter().filter(|locator| **locator != Locator::NONE).count(), 1);
        let mut header = before;
        let pieces = name_parent(&mut header, &long, 1 << 20, 2560).unwrap();
        assert_eq!((pieces[0].at, pieces[2].at), (1 << 20, (1 << 20) + 1536));
        assert_eq!(Header::parse(header.as_bytes()), Ok(header));
    }

    #[test]
    fn a_backslash_is_a_part_of_a_name_only_where_it_is_no_separator() {
        let layout = new(1 << 30, 0, Some("a\\b.vhd")).unwrap();
        assert_eq!(layout.names.len(), 1);
        assert_eq!(layout.header.locators[0].platform(), Some(Platform::MacX));
        assert_eq!(layout.header.locators[1], Locator::NONE);
        assert!(layout.names[0].bytes.starts_with(b"file://./a\\b.vhd"));
    }

    #[test]
    fn what_others_write_behind_a_name_is_no_time() {
        for (space, len) in
            [(vec![0; 512], 20), (b"./a.vhd\0\0\0\0tapdtim".to_vec(), 7), (vec![1; 8], 8), (vec![], 0)]
        {
            assert_eq!(parent_time(&space, len), None);
        }
        let time = piece(0, b"./a.vhd", 512, 7);
        assert_eq!(parent_time(&time.bytes, 7), Some(7));
        let full = piece(0, &[b'x'; 500], 512, 7);
        assert_eq!((full.bytes.len(), parent_time(&full.bytes, 500)), (512, None));
    }
}
