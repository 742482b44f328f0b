//! VHD images that qemu-img has made, and what becomes of them when something in them is changed.

use std::cell::Cell;
use std::process::Command;

use drivers::vhd::{
    Batmap, Corrupt, FOOTER_SIZE, Footer, HEADER_SIZE, Header, Image, Kind, Locator, Parts, Platform, Source, Table,
    Uuid,
};
use zerocopy::IntoBytes;

/// A file in memory.
struct Bytes(Vec<u8>);

impl Source for Bytes {
    fn size(&self) -> std::io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> std::io::Result<()> {
        let at = at as usize;
        to.copy_from_slice(&self.0[at..at + to.len()]);
        Ok(())
    }
}

/// An image of 64 MiB that qemu-img makes, with data in its fourth block.
fn image(subformat: &str) -> Bytes {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.vhd");
    let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
    let options = format!("subformat={subformat},force_size=on");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "vpc", "-o", &options]).arg(&path).arg("64M"));
    run(Command::new("qemu-io").args(["-f", "vpc", "-c", "write -q -P 0x5a 7M 64k"]).arg(&path));
    Bytes(std::fs::read(path).unwrap())
}

/// What is wrong with an image: that it can't be used with, and what else.
fn check(image: &Bytes) -> (Option<Corrupt>, Vec<Corrupt>) {
    let problems = Image::check(image, u64::MAX).unwrap();
    let fatal = problems.iter().find(|problem| problem.fatal).map(|problem| problem.what.clone());
    (fatal, problems.into_iter().filter(|problem| !problem.fatal).map(|problem| problem.what).collect())
}

fn read(image: &Bytes) -> Image {
    let mut problems = Vec::new();
    let read = Image::read(image, &mut problems).unwrap();
    assert_eq!(problems, []);
    read
}

/// A file that has another content after some reads.
struct Changing {
    before: Vec<u8>,
    after: Vec<u8>,
    reads: Cell<usize>,
}

impl Changing {
    fn now(&self) -> &[u8] {
        if self.reads.get() > 0 { &self.before } else { &self.after }
    }
}

impl Source for Changing {
    fn size(&self) -> std::io::Result<u64> {
        Ok(self.now().len() as u64)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> std::io::Result<()> {
        let bytes = self.now().get(at as usize..).and_then(|rest| rest.get(..to.len()));
        let bytes = bytes.ok_or(std::io::ErrorKind::UnexpectedEof);
        self.reads.set(self.reads.get().saturating_sub(1));
        to.copy_from_slice(bytes?);
        Ok(())
    }
}

#[test]
fn an_image_that_is_closed_or_gets_blocks_while_it_is_read_is_good() {
    let closed = image("dynamic").0;
    let whole = read(&Bytes(closed.clone()));
    let header = whole.header.unwrap();
    // As it is in use: with a new block where the footer was, and space ahead.
    let mut used = closed.clone();
    used.truncate(whole.footer_at as usize);
    used.resize(used.len() + 3 * header.block_len() as usize, 0);
    let entry = header.table_at() as usize + 4 * 20;
    used[entry..entry + 4].copy_from_slice(&Table::entry(whole.footer_at));
    for (before, after) in [(&closed, &used), (&used, &closed)] {
        // After none of what is read, after a part of it, and after all.
        let mut changed = 0;
        for count in 0..20 {
            let changing = Changing { before: before.clone(), after: after.clone(), reads: Cell::new(count) };
            let image = Image::read(&changing, &mut Vec::new()).unwrap_or_else(|error| panic!("{count}: {error}"));
            assert!([1, 2].contains(&image.table.allocated().count()));
            changed += usize::from(changing.reads.get() == 0);
        }
        assert!((5..20).contains(&changed), "{changed}");
    }
}

#[test]
fn a_fixed_image_is_its_data_and_a_footer() {
    let bytes = image("fixed");
    let image = read(&bytes);
    assert_eq!((image.kind, image.footer.size(), image.footer_at), (Kind::Fixed, 64 << 20, 64 << 20));
    assert!(image.header.is_none() && bytes.0[7 << 20..][..65536].iter().all(|byte| *byte == 0x5a));
}

#[test]
fn a_dynamic_image_has_the_block_that_was_written() {
    let bytes = image("dynamic");
    let image = read(&bytes);
    assert_eq!((image.kind, image.footer.size()), (Kind::Dynamic, 64 << 20));
    let header = image.header.unwrap();
    assert_eq!((header.block_size(), header.bitmap_size(), image.table.blocks()), (2 << 20, 512, 32));
    let allocated: Vec<_> = image.table.allocated().collect();
    let [(3, at)] = allocated[..] else { panic!("{allocated:?}") };
    // The block's second half; its bitmap says that it is there.
    let data = (at + header.bitmap_size() + (1 << 20)) as usize;
    assert!(bytes.0[data..][..65536].iter().all(|byte| *byte == 0x5a));
    assert!(bytes.0[at as usize + 256..][..16].iter().all(|byte| *byte == 0xff));
}

#[test]
fn a_bad_footer_is_told_of_and_its_copy_taken() {
    let whole = image("dynamic");
    let end = whole.0.len() - FOOTER_SIZE;
    // blktap's mark of an image that is in use, and a crash in the middle of the last write.
    for bad in [[0xc7; FOOTER_SIZE].to_vec(), vec![0; 100]] {
        let bytes = Bytes([&whole.0[..end], &bad].concat());
        let (fatal, minor) = check(&bytes);
        assert!(fatal.is_none() && minor == [Corrupt::Cookie { what: "footer" }], "{fatal:?} {minor:?}");
        let image = Image::read(&bytes, &mut Vec::new()).unwrap();
        assert_eq!((image.footer.size(), image.footer_at), (64 << 20, bytes.size().unwrap()));
    }
    let mut copy = Bytes(whole.0.clone());
    copy.0[20] ^= 1;
    assert!(matches!(&check(&copy), (None, minor) if matches!(minor[..], [Corrupt::Copy(_)])));
    copy.0[end + 20] ^= 1;
    assert!(matches!(check(&copy).0, Some(Corrupt::Checksum { what: "footer", .. })));
    let short = Bytes(whole.0[end..].to_vec());
    assert!(matches!(check(&short).0, Some(Corrupt::Place { what: "header", .. })), "{:?}", check(&short));
}

const HEADER: std::ops::Range<usize> = FOOTER_SIZE..FOOTER_SIZE + HEADER_SIZE;

/// What makes the image unusable when its table, as bytes, or its header is changed so.
fn changed(image: &Bytes, change: impl FnOnce(&mut Header, &mut [u8])) -> Corrupt {
    let mut bytes = Bytes(image.0.clone());
    let mut header = Header::parse(&bytes.0[HEADER]).unwrap();
    let table = header.table_at() as usize;
    change(&mut header, &mut bytes.0[table..]);
    header.seal();
    bytes.0[HEADER].copy_from_slice(header.as_bytes());
    check(&bytes).0.unwrap()
}

#[test]
fn blocks_that_are_not_their_own_are_refused() {
    let image = image("dynamic");
    let entry = |block: usize| 4 * block..4 * block + 4;
    let end = image.size().unwrap() - FOOTER_SIZE as u64;
    let (_, own) = read(&image).table.allocated().next().unwrap();
    let own_sector = (own / 512) as u32;
    // Beyond the end, over the footer at the end, and in the table itself.
    for sector in [0xffff_fffe, own_sector + 1, 3] {
        let what = changed(&image, |_, table| table[entry(5)].copy_from_slice(&sector.to_be_bytes()));
        let at = u64::from(sector) * 512;
        assert_eq!(what, Corrupt::BlockPlace { block: 5, at, len: 512 + (2 << 20), end });
    }
    let what = changed(&image, |_, table| table[entry(5)].copy_from_slice(&own_sector.to_be_bytes()));
    assert_eq!(what, Corrupt::BlocksOverlap { one: 3, other: 5, at: own });
}

#[test]
fn metadata_that_is_nowhere_is_refused() {
    let image = image("dynamic");
    let file = image.size().unwrap();
    // Beyond the end, not in whole sectors, in the header, over the footer's copy.
    for at in [file - 100, u64::MAX - 50, 1537, 1024, 0] {
        let what = changed(&image, |header, _| *header = Header::new(at, header.entries(), header.block_size()));
        assert_eq!(what, Corrupt::Place { what: "table", at, len: 128, file });
    }
    let what = changed(&image, |header, _| *header = Header::new(header.table_at(), 31, header.block_size()));
    assert!(matches!(what, Corrupt::Size { size, .. } if size == 64 << 20), "{what}");
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let fixed = image("fixed");
    for size in [0, 100, (64 << 20) + 512, u64::MAX - 511] {
        let mut bytes = Bytes(fixed.0.clone());
        let mut footer = Footer::parse(&bytes.0[64 << 20..]).unwrap();
        footer.set_size(size);
        footer.seal();
        bytes.0[64 << 20..].copy_from_slice(footer.as_bytes());
        assert!(matches!(check(&bytes).0, Some(Corrupt::Size { size: found, .. }) if found == size), "{size}");
    }
    for len in [0, 1, 510] {
        assert_eq!(check(&Bytes(vec![0; len])).0, Some(Corrupt::Short { what: "footer", len: len as u64 }));
    }
    for len in [511, 512, 4096] {
        assert_eq!(check(&Bytes(vec![0; len])).0, Some(Corrupt::Cookie { what: "footer" }), "{len}");
    }
}

#[test]
fn a_name_of_the_parent_that_is_nowhere_is_told_of() {
    let image = image("dynamic");
    let file = image.size().unwrap();
    let mut bytes = Bytes(image.0.clone());
    let mut header = Header::parse(&bytes.0[HEADER]).unwrap();
    header.locators[0] = Locator::new(Platform::MacX, file - 3, 20);
    header.locators[1] = Locator::new(Platform::W2ru, 0, 1 << 20);
    header.seal();
    bytes.0[HEADER].copy_from_slice(header.as_bytes());
    let what = "parent locator";
    let expected = [
        Corrupt::Place { what, at: file - 3, len: 20, file },
        Corrupt::Place { what, at: 0, len: 1 << 20, file },
        Corrupt::Odd { what: "header", why: "has locators of a parent, which the image does not have" },
    ];
    assert_eq!(check(&bytes), (None, expected.to_vec()));
}

#[test]
fn a_batmap_among_other_metadata_is_not_used() {
    let mut bytes = image("dynamic");
    let table_end = HEADER.end as u64 + Table::bytes(32);
    // qemu-img has its first block there: an image without blocks has room.
    bytes.0.truncate(table_end as usize);
    bytes.0[HEADER.end..].fill(0xff);
    for (bits_at, used) in [(table_end + 512, true), (0, false), (512, false), (1536, false)] {
        let mut batmap = Batmap::empty(table_end, 32);
        batmap.bits_at = bits_at;
        bytes.0.truncate(table_end as usize);
        bytes.0.extend(batmap.header());
        bytes.0.extend(batmap.bits());
        bytes.0.extend_from_within(..FOOTER_SIZE);
        let mut problems = Vec::new();
        let image = Image::read(&bytes, &mut problems).unwrap();
        assert_eq!(
            (image.batmap.is_some(), problems.is_empty()),
            (used, used),
            "its bits at byte {bits_at}: {problems:?}"
        );
    }
}

#[test]
fn footers_of_two_images_are_refused_and_the_header_says_which_is_the_images() {
    let mut bytes = image("dynamic");
    let own = read(&bytes).footer;
    let other = Footer::new(Kind::Dynamic, 32 << 20, Uuid([7; 16]), 1_000_000_000);
    // A volume that has grown over what a deleted image has left.
    bytes.0.resize(bytes.0.len() + (1 << 20), 0);
    bytes.0.extend(other.as_bytes());
    let two = Corrupt::TwoImages { copy: own.uuid, copy_size: 64 << 20, last: other.uuid, last_size: 32 << 20 };
    assert_eq!(check(&bytes).0, Some(two));
    let by_copy = Image::read_by_copy(&bytes, Parts::All, &mut Vec::new()).unwrap();
    assert_eq!((by_copy.footer, by_copy.size), (own, 64 << 20));
    // The image's own, of an earlier size, is no other image's.
    let end = bytes.0.len() - FOOTER_SIZE;
    let mut smaller = own;
    smaller.set_size(62 << 20);
    smaller.seal();
    bytes.0[end..].copy_from_slice(smaller.as_bytes());
    assert_eq!(check(&bytes), (None, vec![Corrupt::CopyDiffers]));
}

#[test]
fn a_parent_is_as_large_as_its_field_says() {
    let mut bytes = image("dynamic");
    let end = bytes.0.len() - FOOTER_SIZE;
    // As Virtual PC makes it: its geometry has a little less than the disk.
    let mut footer = read(&bytes).footer;
    footer.creator = *b"vpc ";
    footer.set_size((64 << 20) - 512);
    let by_geometry = footer.size();
    footer.seal();
    assert!(by_geometry < footer.stored_size(), "{by_geometry}");
    for at in [0, end] {
        bytes.0[at..at + FOOTER_SIZE].copy_from_slice(footer.as_bytes());
    }
    assert_eq!(read(&bytes).size, by_geometry);
    assert_eq!(Image::read_parent(&bytes, &mut Vec::new()).unwrap().size, (64 << 20) - 512);
}

#[test]
fn a_table_has_room_up_to_what_follows_it_whatever_its_header_claims() {
    let mut bytes = image("dynamic");
    let image = read(&bytes);
    let (_, first) = image.table.allocated().next().unwrap();
    let table_at = image.header.unwrap().table_at();
    assert_eq!(image.table_room, 32, "no more than the header says");
    let mut header = Header::new(table_at, 1 << 20, 2 << 20);
    header.seal();
    bytes.0[HEADER].copy_from_slice(header.as_bytes());
    assert_eq!(u64::from(read(&bytes).table_room), (first - table_at) / 4);
}

#[test]
fn a_disabled_image_is_looked_at_and_not_used() {
    let mut bytes = image("dynamic");
    let end = bytes.0.len() - FOOTER_SIZE;
    let mut footer = read(&bytes).footer;
    footer.disable();
    footer.seal();
    // The copy alone counts where there is no other; beside a good one it does not.
    bytes.0[..FOOTER_SIZE].copy_from_slice(footer.as_bytes());
    assert!(check(&bytes).0.is_none());
    for last in [footer.as_bytes(), &[0; FOOTER_SIZE]] {
        bytes.0[end..].copy_from_slice(last);
        assert_eq!(check(&bytes).0, Some(Corrupt::Disabled));
        for parts in [Parts::Heads, Parts::Unchecked] {
            assert_eq!(Image::read_parts(&bytes, parts, &mut Vec::new()).unwrap().size, 64 << 20, "{parts:?}");
        }
    }
}

#[test]
fn who_does_not_ask_for_the_blocks_does_not_hear_of_them() {
    let mut bytes = image("dynamic");
    let table = read(&bytes).header.unwrap().table_at() as usize;
    bytes.0[table + 20..table + 24].copy_from_slice(&0xffff_fffe_u32.to_be_bytes());
    assert!(matches!(check(&bytes).0, Some(Corrupt::BlockPlace { block: 5, .. })));
    let heads = Image::read_parts(&bytes, Parts::Heads, &mut Vec::new()).unwrap();
    assert_eq!((heads.size, heads.table.blocks()), (64 << 20, 0));
    let unchecked = Image::read_parts(&bytes, Parts::Unchecked, &mut Vec::new()).unwrap();
    assert_eq!(unchecked.table.allocated().count(), 2);
}

/// What nobody can see the size of, since it is on a disk that has gone, say.
struct Gone;

impl Source for Gone {
    fn size(&self) -> std::io::Result<u64> {
        Err(std::io::Error::from_raw_os_error(5))
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_size_that_cannot_be_seen_is_that_error_and_no_empty_file() {
    for parts in [Parts::Heads, Parts::Unchecked, Parts::All] {
        for read in [Image::read_parts, Image::read_by_copy] {
            let error = read(&Gone, parts, &mut Vec::new()).unwrap_err();
            assert!(error.to_string().starts_with("cannot see its size: "), "{error}");
        }
    }
    assert!(Image::check(&Gone, 0).is_err());
}
