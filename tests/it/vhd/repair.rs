//! `vhd-util check` and `repair`: what is wrong is found, and mended where that needs no data.

use std::path::{Path, PathBuf};

use crate::common::served::folder;
use crate::common::vhd::{bytes, change, disk, good, image, vhd_util, write};
use drivers::vhd::layout::batmap_pieces;
use drivers::vhd::{Footer, Header, Locator, Platform, Uuid};
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes};

const MIB: u64 = 1 << 20;

/// A child with three blocks, the second of which is full, on a base without.
fn child() -> (TempDir, PathBuf) {
    let folder = folder();
    let root = folder.path().canonicalize().unwrap();
    let (base, child) = (root.join("base.vhd"), root.join("child.vhd"));
    good("create -n {} -s 100", &[&base]);
    good("snapshot -n {} -p {} -S 120", &[&child, &base]);
    write(&child, 3 * MIB, 3 * MIB, 1);
    write(&child, 99 * MIB, 4096, 2);
    assert_eq!(good("check -b -n {}", &[&child]), format!("{} is valid\n", child.display()));
    (folder, child)
}

fn change_header(path: &Path, change_it: impl FnOnce(&mut Header)) {
    let mut header = image(path).header.unwrap();
    change_it(&mut header);
    header.seal();
    change(path, 512, header.as_bytes());
}

/// Both footers, with checksums that are right. Of the fields that have no name here, the bytes are changed.
fn change_footers(path: &Path, change_it: impl FnOnce(&mut [u8])) {
    let mut footer = bytes(path, 0, 512);
    change_it(&mut footer);
    Footer::mut_from_bytes(&mut footer).unwrap().seal();
    change(path, 0, &footer);
    change(path, path.metadata().unwrap().len() - 512, &footer);
}

/// What is planted, what check says of it with which options, and what repair does about it.
#[derive(Clone)]
struct Row {
    plant: fn(&Path),
    options: &'static str,
    found: &'static str,
    repair: Option<&'static str>,
}

const NOT_MENDED: &str = "left as it is: ";

fn row(plant: fn(&Path), options: &'static str, found: &'static str, repair: Option<&'static str>) -> Row {
    Row { plant, options, found, repair }
}

fn footers() -> Vec<Row> {
    vec![
        row(
            |path| change(path, path.metadata().unwrap().len() - 512, &[0xc7; 512]),
            "",
            "its footer does not begin as one does",
            Some("wrote the footer at the end again, from its copy"),
        ),
        row(
            |path| change(path, path.metadata().unwrap().len() - 400, b"x"),
            "",
            "the checksum of its footer is",
            Some("wrote the footer at the end again, from its copy"),
        ),
        row(|path| change(path, 100, b"x"), "", "at its beginning: ", Some("wrote the copy of the footer again")),
        row(
            |path| {
                let mut footer = image(path).footer;
                footer.set_hidden(true);
                footer.seal();
                change(path, 0, footer.as_bytes());
            },
            "",
            "its footer and the copy at the beginning differ",
            Some("made the copy of the footer what the footer is"),
        ),
        row(|path| change_footers(path, |footer| footer[8] = 1), "", "its footer has features", None),
        row(|path| change_footers(path, |footer| footer[200] = 1), "", "its footer has reserved bytes", None),
        row(|path| change_footers(path, |footer| footer[85] = 7), "", "a hidden mark other than", None),
        row(|path| change_footers(path, |footer| footer[84] = 7), "", "a saved state other than", None),
        row(|path| change_footers(path, |footer| footer[32] = 9), "", "was made by a later blktap", None),
        row(|path| change_footers(path, |footer| footer[56] = 0xff), "", "geometry that is larger", None),
        row(|path| change_footers(path, |footer| footer[68..84].fill(0)), "", "has no UUID", None),
        row(
            |path| change_footers(path, |footer| footer[24] = 0xff),
            "",
            "its footer says that it was made in the future",
            None,
        ),
    ]
}

fn headers() -> Vec<Row> {
    vec![
        row(
            |path| change_header(path, |header| header.parent_timestamp = 0xff00_0000.into()),
            "",
            "its parent says that it was made in the future",
            None,
        ),
        row(
            |path| change_header(path, |header| header.as_mut_bytes()[8] = 0),
            "",
            "its header says where another header is",
            None,
        ),
        row(
            |path| change_header(path, |header| header.as_mut_bytes()[1000] = 1),
            "",
            "its header has reserved bytes",
            None,
        ),
        row(
            |path| change_header(path, |header| header.set_parent_name("other.vhd")),
            "",
            "names the parent \"base.vhd\", and its header names it \"other.vhd\"",
            None,
        ),
        row(
            |path| change_header(path, |header| header.parent_uuid = Uuid([3; 16])),
            "",
            "its parent has the UUID 03030303-0303-0303-0303-030303030303, and ",
            None,
        ),
        row(
            |path| change_header(path, |header| header.locators[3] = header.locators[0]),
            "",
            "its parent locator is the second for its platform",
            None,
        ),
        row(
            |path| change_header(path, |header| header.locators[3].as_mut_bytes()[8] = 1),
            "",
            "its parent locator is not used and not zero",
            None,
        ),
        row(
            |path| {
                change_header(path, |header| {
                    let (at, space) = (header.locators[0].place().0, header.locators[0].space());
                    header.locators[0] = Locator::with_space(Platform::MacX, at, 0, space);
                });
            },
            "",
            "its parent locator has no bytes",
            None,
        ),
    ]
}

fn blocks() -> Vec<Row> {
    vec![
        row(
            |path| change(path, image(path).header.unwrap().table_at() + 4 * 55, &[0, 0, 1, 0]),
            "",
            "its table has a place, byte 131072, for block 55, which is beyond the disk's end",
            None,
        ),
        row(
            |path| change(path, image(path).batmap.unwrap().bits_at, &[1]),
            "",
            "the checksum of its batmap is",
            Some("made the batmap again, from the blocks' bitmaps"),
        ),
        row(
            |path| change(path, image(path).batmap.unwrap().at, b"x"),
            "",
            "its batmap is not there",
            Some("made the batmap again, from the blocks' bitmaps"),
        ),
        row(
            |path| full(path, 30),
            "",
            "its batmap says that block 30 is full, which is not there",
            Some("made the batmap again, from the blocks' bitmaps"),
        ),
        row(
            |path| full(path, 58),
            "",
            "its batmap says that block 58 is full, which is not there",
            Some("made the batmap again, from the blocks' bitmaps"),
        ),
        row(
            |path| full(path, 49),
            "-b",
            "its batmap says that block 49 is full, which its bitmap denies",
            Some("made the batmap again, from the blocks' bitmaps"),
        ),
        row(
            |path| change(path, image(path).table.get(49).unwrap() + 512 + 700, b"x"),
            "-b",
            "sector 1 of block 49 has data, and the block's bitmap says that it has none",
            None,
        ),
    ]
}

/// Says in the batmap that a block is full.
fn full(path: &Path, block: u32) {
    let mut batmap = image(path).batmap.unwrap();
    batmap.set(block, true);
    for piece in batmap_pieces(&batmap) {
        change(path, piece.at, &piece.bytes);
    }
}

#[test]
fn what_is_wrong_is_found_and_mended_where_it_can_be() {
    let rows = [footers(), headers(), blocks()].concat();
    for (i, Row { plant, options, found, repair }) in rows.into_iter().enumerate() {
        let (_folder, path) = child();
        let before = disk(&path);
        plant(&path);
        let check = format!("check {options} -n {{}}");
        let said = vhd_util(&check, &[&path]);
        assert_eq!(said.code, libc::EINVAL, "row {i}: {found}: {}", said.out);
        let lines: Vec<_> = said.out.lines().collect();
        let first = lines.iter().find(|line| line.contains(found));
        assert!(first.is_some_and(|line| line.starts_with(&*path.to_string_lossy())), "row {i}: {}", said.out);
        let planted = std::fs::read(&path).unwrap();
        let bitmaps = if options == "-b" { "--bitmaps" } else { "" };
        let said = vhd_util(&format!("repair {bitmaps} -n {{}}"), &[&path]);
        assert_eq!(said.code, 0, "row {i}: {}", said.err);
        match repair {
            Some(mended) => {
                assert_eq!(said.out, format!("{}: {mended}\n", path.display()), "row {i}");
                assert_eq!(good("check -b -n {}", &[&path]), format!("{} is valid\n", path.display()), "row {i}");
                assert!(disk(&path) == before, "row {i}");
            }
            // What is wrong with the parent is not the image's.
            None if found.contains("parent has the UUID") => {
                assert!(said.out.ends_with("there is nothing to repair\n"), "row {i}: {}", said.out);
            }
            None => {
                assert!(said.out.contains(NOT_MENDED), "row {i}: {}", said.out);
                assert!(std::fs::read(&path).unwrap() == planted, "row {i} was changed");
            }
        }
    }
}

#[test]
fn a_bitmap_ends_where_the_disk_does() {
    let folder = folder();
    let (raw, path) = (folder.path().join("raw"), folder.path().join("image.vhd"));
    std::fs::write(&raw, vec![1; 3 << 20]).unwrap();
    good("convert --to vhd {} {}", &[&raw, &path]);
    assert_eq!(good("check -b -n {}", &[&path]), format!("{} is valid\n", path.display()));
    change(&path, image(&path).table.get(1).unwrap() + 256, &[0x80]);
    let said = vhd_util("check -b -n {}", &[&path]);
    let text = "the bitmap of block 1 has bits for sectors that are not there (it can be used all the same)";
    assert_eq!((said.code, said.out), (libc::EINVAL, format!("{}: {text}\n", path.display())));
}

#[test]
fn a_good_image_is_left_as_it_is() {
    let (_folder, path) = child();
    let before = std::fs::read(&path).unwrap();
    let said = good("repair -n {}", &[&path]);
    assert_eq!(said, format!("{}: there is nothing to repair\n", path.display()));
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn what_cannot_be_mended_says_so() {
    let (_folder, path) = child();
    let table = image(&path).header.unwrap().table_at();
    let entry = bytes(&path, table + 4, 4);
    change(&path, table + 4 * 7, &entry);
    let before = std::fs::read(&path).unwrap();
    let said = vhd_util("repair -n {}", &[&path]);
    assert_eq!((said.code, said.out), (libc::EINVAL, format!("error opening {}: -22\n", path.display())));
    assert!(said.err.contains("blocks 1 and 7 overlap") && said.err.contains("restore the image from a backup"));
    change(&path, 512, &[0; 1024]);
    let said = vhd_util("repair -n {}", &[&path]);
    assert!(said.code == libc::EINVAL && said.err.contains("its header does not begin as one does"), "{}", said.err);
    change(&path, 512, &before[512..1536]);
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn what_is_not_minded_is_not_told_of() {
    for (plant, option) in [
        ((|path: &Path| change(path, path.metadata().unwrap().len() - 512, &[0xc7; 512])) as fn(&Path), "-i"),
        (|path| change_header(path, |header| header.parent_uuid = Uuid([3; 16])), "-I"),
        (|path| change_footers(path, |footer| footer[24] = 0xff), "-t"),
        (
            |path| {
                let table = image(path).header.unwrap().table_at();
                change(path, table + 4 * 7, &bytes(path, table + 4, 4));
            },
            "-B",
        ),
    ] {
        let (_folder, path) = child();
        plant(&path);
        assert_eq!(vhd_util("check -n {}", &[&path]).code, libc::EINVAL, "{option}");
        let said = good(&format!("check {option} -n {{}}"), &[&path]);
        assert_eq!(said, format!("{} is valid\n", path.display()), "{option}");
    }
    let (_folder, path) = child();
    assert_eq!(vhd_util("check -B -b -n {}", &[&path]).code, libc::EINVAL);
}

#[test]
fn a_parent_that_is_gone_is_told_of() {
    let (folder, path) = child();
    std::fs::remove_file(folder.path().join("base.vhd")).unwrap();
    let said = vhd_util("check -n {}", &[&path]);
    assert!(said.code == libc::EINVAL && said.out.contains("its parent is not there; tried "), "{}", said.out);
    let said = vhd_util("check -p -n {}", &[&path]);
    let line = format!("error opening {}: -2\n", path.display());
    assert_eq!((said.code, said.out), (libc::ENOENT, line));
    let fixed = folder.path().join("fixed.vhd");
    good("create -r -n {} -s 2", &[&fixed]);
    change(&fixed, 2 * MIB + 300, &[1]);
    let said = vhd_util("check -n {}", &[&fixed]);
    assert!(said.code == libc::EINVAL && said.out.contains("the checksum of its footer"), "{}", said.out);
    assert_eq!(vhd_util("repair -n {}", &[&fixed]).code, libc::EINVAL);
}
