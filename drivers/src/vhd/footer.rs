//! The footer: the last 512 bytes of every image, with a copy at the beginning of those that are not fixed
//! (specification, "Hard Disk Footer Format").

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Corrupt, Uuid, checksum};
use crate::{Keep, LastStep, LayerFile};

/// Bytes of a footer.
pub const FOOTER_SIZE: usize = 512;
/// Virtual PC before 2004 left out the last byte, which is reserved (specification, ibid.).
pub const OLD_FOOTER_SIZE: usize = 511;

/// What an image in use has in the place of its last footer on a device, as blktap has it.
pub const IN_USE: [u8; FOOTER_SIZE] = [0xc7; FOOTER_SIZE];

const COOKIE: [u8; 8] = *b"conectix";
/// blktap's, while an image must not be used by anybody.
const POISON: [u8; 8] = *b"v_poison";
/// Reserved, and always set.
const FEATURES: u32 = 2;
/// The image is to be deleted soon.
const TEMPORARY: u32 = 1;
const VERSION: u32 = 0x0001_0000;
/// Where a header would be, in an image that has none.
const NO_HEADER: u64 = u64::MAX;
/// Seconds of Unix at 2000-01-01 00:00:00 UTC, which the format counts from.
const EPOCH: u64 = 946_684_800;

/// blktap's name in images, and the version of its that they are made by.
const CREATOR: ([u8; 4], u32) = (*b"tap\0", 0x0001_0003);

/// Keeps the hidden mark of a footer in another one of the same image.
fn keep_hidden(now: &[u8], bytes: &mut [u8]) {
    let (Ok(now), Ok(mut footer)) = (Footer::parse(now), Footer::parse(bytes)) else { return };
    if now.uuid == footer.uuid {
        footer.hidden = now.hidden;
        footer.seal();
        bytes.copy_from_slice(footer.as_bytes());
    }
}

/// A time as images have it, in seconds since 2000-01-01 UTC.
pub fn timestamp(unix_seconds: u64) -> u32 {
    unix_seconds.saturating_sub(EPOCH) as u32
}

/// Such a time in seconds of Unix.
pub fn unix_seconds(timestamp: u32) -> u64 {
    EPOCH + u64::from(timestamp)
}

/// How the disk's bytes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All of them, one after the other.
    Fixed,
    /// In blocks; those that nobody has written are not there, and read as zeros.
    Dynamic,
    /// In blocks; sectors that nobody has written are the parent's.
    Differencing,
}

impl Kind {
    const ALL: [(u32, Kind); 3] = [(2, Kind::Fixed), (3, Kind::Dynamic), (4, Kind::Differencing)];
}

/// A disk's cylinders, heads and sectors of a track.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Geometry {
    cylinders: U16,
    heads: u8,
    sectors: u8,
}

impl Geometry {
    /// The largest that can be expressed. It is that of all larger disks, too.
    const MAX_SECTORS: u64 = 65535 * 16 * 255;

    /// For a disk of `size` bytes (specification, "Appendix: CHS Calculation"). Rounded down: it may be a few sectors less.
    pub fn of(size: u64) -> Geometry {
        let total = (size / 512).min(Self::MAX_SECTORS);
        let tracks = |sectors: u64| total / sectors;
        let (sectors, heads) = if total >= 65535 * 16 * 63 {
            (255, 16)
        } else {
            let heads = tracks(17).div_ceil(1024).max(4);
            if heads <= 16 && tracks(17) < heads * 1024 {
                (17, heads)
            } else if tracks(31) < 16 * 1024 {
                (31, 16)
            } else {
                (63, 16)
            }
        };
        let cylinders = U16::new((tracks(sectors) / heads) as u16);
        Geometry { cylinders, heads: heads as u8, sectors: sectors as u8 }
    }

    /// Sectors that it has.
    pub fn total(self) -> u64 {
        u64::from(self.cylinders.get()) * u64::from(self.heads) * u64::from(self.sectors)
    }
}

/// As it is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Footer {
    cookie: [u8; 8],
    features: U32,
    version: U32,
    data_offset: U64,
    /// When the image was made or written last, in seconds since 2000-01-01 UTC. Children know their parent's.
    pub timestamp: U32,
    /// The program that made it.
    pub creator: [u8; 4],
    /// Its version.
    pub creator_version: U32,
    creator_host: [u8; 4],
    original_size: U64,
    current_size: U64,
    geometry: Geometry,
    kind: U32,
    checksum: U32,
    /// What children know it by.
    pub uuid: Uuid,
    saved_state: u8,
    hidden: u8,
    reserved: [u8; 426],
}

const _: () = assert!(size_of::<Footer>() == FOOTER_SIZE);

impl Footer {
    /// For a new image of `size` bytes. Of an image that is not fixed the header follows the footer's copy.
    pub fn new(kind: Kind, size: u64, uuid: Uuid, unix_seconds: u64) -> Footer {
        let number = Kind::ALL.iter().find(|(_, each)| *each == kind).map_or(0, |(number, _)| *number);
        let mut footer = Footer {
            cookie: COOKIE,
            features: FEATURES.into(),
            version: VERSION.into(),
            data_offset: if kind == Kind::Fixed { NO_HEADER } else { FOOTER_SIZE as u64 }.into(),
            timestamp: timestamp(unix_seconds).into(),
            creator: CREATOR.0,
            creator_version: CREATOR.1.into(),
            creator_host: [0; 4],
            original_size: size.into(),
            current_size: size.into(),
            geometry: Geometry::of(size),
            kind: number.into(),
            checksum: 0.into(),
            uuid,
            saved_state: 0,
            hidden: 0,
            reserved: [0; 426],
        };
        footer.seal();
        footer
    }

    /// Notes when the image was written last; [`seal`](Self::seal) follows.
    pub fn set_time(&mut self, unix_seconds: u64) {
        self.timestamp = timestamp(unix_seconds).into();
    }

    /// Reads one from 512 bytes, or from 511.
    pub fn parse(bytes: &[u8]) -> Result<Footer, Corrupt> {
        let mut whole = [0; FOOTER_SIZE];
        let len = bytes.len().min(FOOTER_SIZE);
        if len < OLD_FOOTER_SIZE {
            return Err(Corrupt::Short { what: "footer", len: len as u64 });
        }
        whole[..len].copy_from_slice(&bytes[..len]);
        let footer: Footer = zerocopy::transmute!(whole);
        match footer.cookie {
            COOKIE => footer.checked(),
            POISON => Err(Corrupt::Disabled),
            _ => Err(Corrupt::Cookie { what: "footer" }),
        }
    }

    /// Reads one of an image that may be disabled, from 512 bytes, and says whether it is.
    pub fn parse_disabled(bytes: &[u8; FOOTER_SIZE]) -> Result<(Footer, bool), Corrupt> {
        let footer: Footer = zerocopy::transmute!(*bytes);
        match footer.cookie {
            POISON => Ok((footer.checked()?, true)),
            _ => Ok((Footer::parse(bytes)?, false)),
        }
    }

    /// Marks the image as not to be used by anybody, as blktap does as long as a journal is needed to make it whole;
    /// [`seal`](Self::seal) follows.
    pub fn disable(&mut self) {
        self.cookie = POISON;
    }

    /// Whatever its cookie is: the rest of it is good.
    fn checked(self) -> Result<Footer, Corrupt> {
        let footer = self;
        let computed = footer.sum();
        if footer.checksum.get() != computed && !footer.was_hidden_carelessly() {
            return Err(Corrupt::Checksum { what: "footer", found: footer.checksum.get(), computed });
        }
        if footer.version.get() >> 16 != VERSION >> 16 {
            return Err(Corrupt::Version { what: "footer", version: footer.version.get() });
        }
        footer.kind()?;
        Ok(footer)
    }

    /// Early versions of blktap hid an image and left the checksum as it was.
    fn was_hidden_carelessly(&self) -> bool {
        let shown = Footer { hidden: 0, ..*self };
        let early = matches!(self.creator_version.get(), 0x0000_0001 | 0x0001_0001);
        self.is_hidden() && self.creator == CREATOR.0 && early && self.checksum.get() == shown.sum()
    }

    /// The checksum that its bytes should have.
    fn sum(&self) -> u32 {
        let unsealed = Footer { checksum: 0.into(), ..*self };
        checksum(unsealed.as_bytes())
    }

    /// Makes the checksum right, after a change.
    pub fn seal(&mut self) {
        self.checksum = self.sum().into();
    }

    /// How it's written when an image is closed: with the hidden mark that the footer at byte `now_at` has then.
    pub(super) fn last_write(&self, at: u64, now_at: u64) -> LastStep {
        let keep = Keep { at: now_at, len: FOOTER_SIZE, put: keep_hidden };
        LastStep::Write { file: LayerFile(0), at, bytes: self.as_bytes().to_vec(), keep: Some(keep) }
    }

    /// Which kind of image it is.
    pub fn kind(&self) -> Result<Kind, Corrupt> {
        let number = self.kind.get();
        let kind = Kind::ALL.iter().find(|(each, _)| *each == number);
        kind.map(|(_, kind)| *kind).ok_or(Corrupt::Kind { number })
    }

    /// What is wrong with it that the checksum does not tell, as far as it does no harm (specification; blktap's check).
    pub(super) fn oddities(&self) -> impl Iterator<Item = &'static str> {
        let tap = self.creator == CREATOR.0;
        let fixed = self.kind() == Ok(Kind::Fixed);
        let (own, largest) = (self.geometry, Geometry::of(self.current_size.get()));
        let larger = (own.cylinders.get(), own.heads, own.sectors);
        let odd = [
            (self.features.get() & FEATURES == 0, "lacks the feature bit that is always set"),
            (self.features.get() & !(FEATURES | TEMPORARY) != 0, "has features that are not known"),
            (self.version.get() != VERSION, "has a version other than 1.0"),
            (
                fixed && self.data_offset.get() != NO_HEADER,
                "says where a header is, which a fixed image does not have",
            ),
            (tap && self.creator_version.get() > CREATOR.1, "was made by a later blktap"),
            (
                tap && larger > (largest.cylinders.get(), largest.heads, largest.sectors),
                "has a geometry that is larger than the disk",
            ),
            (self.saved_state > 1, "has a saved state other than 0 and 1"),
            (self.hidden > 1, "has a hidden mark other than 0 and 1"),
            (self.reserved != [0; 426], "has reserved bytes that are not zero"),
            (self.uuid == Uuid::NIL, "has no UUID"),
        ];
        odd.into_iter().filter(|(is, _)| *is).map(|(_, what)| what)
    }

    /// Where the header is in the file. None: there is none.
    pub fn header_at(&self) -> Option<u64> {
        Some(self.data_offset.get()).filter(|at| *at != NO_HEADER)
    }

    /// Says where the header is in the file; [`seal`](Self::seal) follows.
    pub fn set_header_at(&mut self, at: u64) {
        self.data_offset = at.into();
    }

    /// The disk's size as the field has it, bytes. blktap goes by it whoever made the image, and so what it wrote into a child of such an
    /// image has the parent's data up to there.
    pub fn stored_size(&self) -> u64 {
        self.current_size.get()
    }

    /// The disk's size, bytes.
    ///
    /// Virtual PC goes by the geometry, and so does QEMU, unless it was told to keep to the size (creator "qem2"); all others
    /// go by the field. An image with the largest geometry is likely to be larger than that: there the field counts, too.
    pub fn size(&self) -> u64 {
        let total = self.geometry.total();
        let by_geometry = matches!(&self.creator, b"vpc " | b"qemu") && (1..Geometry::MAX_SECTORS).contains(&total);
        if by_geometry { total * 512 } else { self.current_size.get() }
    }

    /// Sets the disk's size, bytes; [`seal`](Self::seal) follows.
    pub fn set_size(&mut self, size: u64) {
        self.current_size = size.into();
        self.geometry = Geometry::of(size);
    }

    /// blktap's mark of an image that users do not see, because it is only the parent of others.
    pub fn is_hidden(&self) -> bool {
        self.hidden != 0
    }

    /// The number that the mark is.
    pub fn hidden_value(&self) -> u8 {
        self.hidden
    }

    /// Sets that mark; [`seal`](Self::seal) follows.
    pub fn set_hidden(&mut self, hidden: bool) {
        self.set_hidden_value(hidden.into());
    }

    /// Sets that mark to a number, as blktap lets storage managers do; [`seal`](Self::seal) follows.
    pub fn set_hidden_value(&mut self, hidden: u8) {
        self.hidden = hidden;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: Uuid = Uuid(*b"0123456789abcdef");

    #[test]
    fn what_is_made_is_read() {
        let mut footer = Footer::new(Kind::Dynamic, 3 << 30, UUID, EPOCH + 17);
        footer.set_hidden(true);
        footer.seal();
        let read = Footer::parse(footer.as_bytes()).unwrap();
        assert_eq!(read, footer);
        assert_eq!((read.kind(), read.size(), read.header_at()), (Ok(Kind::Dynamic), 3 << 30, Some(512)));
        assert_eq!((read.timestamp.get(), read.uuid, read.is_hidden()), (17, UUID, true));
        assert_eq!(Footer::new(Kind::Fixed, 512, UUID, 0).header_at(), None);
    }

    #[test]
    fn an_old_one_lacks_a_byte() {
        let footer = Footer::new(Kind::Fixed, 1 << 20, UUID, EPOCH);
        assert_eq!(Footer::parse(&footer.as_bytes()[..511]), Ok(footer));
        assert_eq!(Footer::parse(&footer.as_bytes()[..510]), Err(Corrupt::Short { what: "footer", len: 510 }));
    }

    #[test]
    fn every_changed_byte_is_seen() {
        let footer = Footer::new(Kind::Differencing, 1 << 30, UUID, EPOCH);
        for at in 0..FOOTER_SIZE {
            let mut bytes: [u8; FOOTER_SIZE] = zerocopy::transmute!(footer);
            bytes[at] ^= 0x40;
            assert!(Footer::parse(&bytes).is_err(), "byte {at}");
        }
    }

    #[test]
    fn an_image_that_was_hidden_carelessly_is_good() {
        let mut footer =
            Footer { creator_version: 0x0001_0001.into(), ..Footer::new(Kind::Dynamic, 512, UUID, EPOCH) };
        footer.seal();
        footer.set_hidden(true);
        assert_eq!(Footer::parse(footer.as_bytes()), Ok(footer));
        footer.creator_version = 0x0001_0003.into();
        assert!(Footer::parse(footer.as_bytes()).is_err());
    }

    #[test]
    fn what_must_not_be_used_says_so() {
        let footer = Footer { cookie: POISON, ..Footer::new(Kind::Dynamic, 1 << 30, UUID, EPOCH) };
        assert_eq!(Footer::parse(footer.as_bytes()), Err(Corrupt::Disabled));
    }

    #[test]
    fn geometries_are_those_that_others_make() {
        // As qemu-img 7.2 made them: bytes; cylinders, heads, sectors.
        for (bytes, cylinders, heads, sectors) in [
            (1_079_296, 31, 4, 17),
            (10_514_432, 302, 4, 17),
            (104_865_792, 1004, 12, 17),
            (1_073_995_776, 2081, 16, 63),
            (34_361_303_040, 16449, 16, 255),
            (137_438_953_472, 65535, 16, 255),
        ] {
            let expected = Geometry { cylinders: U16::new(cylinders), heads, sectors };
            assert_eq!(Geometry::of(bytes), expected, "{bytes} bytes");
        }
        assert_eq!(Geometry::of(u64::MAX).total(), Geometry::MAX_SECTORS);
    }
}
