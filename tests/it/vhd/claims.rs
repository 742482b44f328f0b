//! What an image says of its sizes decides no allocation: each command of `vhd-util` ends in 256 MiB of addresses, with an error or a
//! right result.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::common::served::{folder, output, tool};
use drivers::vhd::{
    Batmap, FOOTER_SIZE, Footer, HEADER_SIZE, Header, Kind, Locator, Platform, Table, Uuid, encode_path,
};
use zerocopy::IntoBytes;

/// A sparse image: of the file's terabytes only the metadata are written.
struct Claims {
    block_size: u32,
    blocks: u32,
    /// More than the disk has.
    entries: u32,
    table_at: u64,
    /// All of its blocks are there, and without a bit, though the batmap says that they are full.
    allocated: bool,
    /// The first block's bitmap says that all of it is there.
    held: bool,
    parent: Option<&'static str>,
    /// What the first locator says that the parent's name has, bytes.
    name: Option<u32>,
}

impl Default for Claims {
    fn default() -> Claims {
        Claims {
            block_size: 2 << 20,
            blocks: 4,
            entries: 4,
            table_at: (FOOTER_SIZE + HEADER_SIZE) as u64,
            allocated: true,
            held: false,
            parent: None,
            name: None,
        }
    }
}

impl Claims {
    fn write(&self, path: &Path, uuid: u8) {
        let kind = if self.parent.is_some() { Kind::Differencing } else { Kind::Dynamic };
        let size = u64::from(self.block_size) * u64::from(self.blocks);
        let footer = Footer::new(kind, size, Uuid([uuid; 16]), 1_000_000_000);
        let mut header = Header::new(self.table_at, self.entries, self.block_size);
        let table_end = self.table_at + Table::bytes(self.entries);
        let mut full = Batmap::empty(table_end, self.entries);
        (0..self.blocks).for_each(|block| full.set(block, self.allocated && !self.held));
        let name_at = (full.bits_at + full.bits().len() as u64).next_multiple_of(512);
        let data_at = (name_at + 4096).next_multiple_of(4096) - header.bitmap_size() % 4096;
        let data_at = data_at.next_multiple_of(512);
        let mut table = Table::empty(self.entries);
        let count = if self.allocated { self.blocks } else { 0 };
        (0..count).for_each(|block| table.set(block, data_at + u64::from(block) * header.block_len()));
        let file = File::create(path).unwrap();
        if let Some(parent) = self.parent {
            let name = encode_path(Platform::MacX, parent);
            file.write_all_at(&name, name_at).unwrap();
            header.parent_uuid = Uuid([1; 16]);
            header.set_parent_name(parent);
            let len = self.name.unwrap_or(name.len() as u32);
            header.locators[0] = Locator::with_space(Platform::MacX, name_at, len, u64::from(len).max(512));
        }
        header.seal();
        let mut bytes = vec![0; Table::bytes(self.entries) as usize];
        table.write(0, &mut bytes);
        file.write_all_at(&bytes, self.table_at).unwrap();
        file.write_all_at(&full.header(), table_end).unwrap();
        file.write_all_at(full.bits(), full.bits_at).unwrap();
        if self.held {
            file.write_all_at(&vec![0xff; header.bitmap_size() as usize], data_at).unwrap();
        }
        let end = data_at + u64::from(count) * header.block_len();
        for at in [0, end] {
            file.write_all_at(footer.as_bytes(), at).unwrap();
        }
        file.write_all_at(header.as_bytes(), FOOTER_SIZE as u64).unwrap();
    }
}

/// Runs a command in little memory.
fn limited(words: &str, paths: &[&Path]) -> Output {
    let mut command = Command::new("prlimit");
    command.arg("--as=268435456").arg("--core=0").args(["timeout", "120"]).arg(tool("vhd-util").get_program());
    let mut paths = paths.iter();
    for word in words.split_whitespace() {
        if word == "{}" {
            command.arg(paths.next().unwrap())
        } else {
            command.arg(word)
        };
    }
    output(&mut command)
}

/// The command ends by itself: with success, or with words.
#[track_caller]
fn ends(name: &str, words: &str, paths: &[&Path]) -> Output {
    let done = limited(words, paths);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    let told = done.status.success() || !said.trim().is_empty() || !done.stdout.is_empty();
    let code = done.status.code().unwrap_or(128 + done.status.signal().unwrap_or(0));
    assert!(code != 124 && code < 128 && told, "{name}, {words}: {}, {said}", done.status);
    assert!(!said.contains("panicked") && !said.contains("allocation"), "{name}, {words}: {said}");
    done
}

/// All that only look at an image.
const LOOKS: [&str; 14] = [
    "check -n {} -b",
    "check -n {} -s",
    "check -n {} -p -s",
    "check -n {} -p -b -B",
    "query -n {} -vspfmdaS",
    "info {}",
    "read -n {} -p",
    "read -n {} -B",
    "read -n {} -b 0 -c 4",
    "read -n {} -m 0 -c 4",
    "read -n {} -a",
    "read -n {} -e 0 -c 1000",
    "read -n {} -r 0 -c 100",
    "scan {} -a -p -v",
];

/// Those that change it, or write another.
const CHANGES: [&str; 10] = [
    "resize -n {} -s 3000000 -f",
    "resize -n {} -s 2000000 -j {}",
    "resize -n {} -s 9000 -j {}",
    "repair -n {} --bitmaps",
    "snapshot -n {2} -p {}",
    "modify -n {} -z",
    "copy -n {} -N {2}",
    "convert --to raw {} {2}",
    "convert --to vhd --from vhd {} {2}",
    "fill -n {} -b -t 100",
];

fn all(name: &str, claims: &Claims) {
    let folder = folder();
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let image = path("image.vhd");
    let parent = Claims { block_size: claims.block_size, blocks: 4, allocated: false, ..Claims::default() };
    for words in LOOKS.iter().chain(&CHANGES) {
        parent.write(&path("parent.vhd"), 1);
        claims.write(&image, 2);
        let (journal, new) = (path("journal"), path("new.vhd"));
        let _ = std::fs::remove_file(&journal);
        let _ = std::fs::remove_file(&new);
        let paths = [&*image, &*journal];
        match words.replace("{2}", new.to_str().unwrap()) {
            words if words.contains("{}") => ends(name, &words, &paths),
            words => panic!("{words}"),
        };
    }
}

#[test]
#[ignore = "slow"]
fn of_two_million_blocks() {
    all("blocks", &Claims { block_size: 4096, blocks: 2 << 20, entries: 2 << 20, ..Claims::default() });
}

#[test]
#[ignore = "slow"]
fn of_a_terabyte() {
    all("terabyte", &Claims { blocks: 500_000, entries: 500_000, ..Claims::default() });
}

#[test]
fn of_blocks_of_256_mib() {
    let large = Claims { block_size: 256 << 20, ..Claims::default() };
    all("large blocks", &large);
    let folder = folder();
    let path = folder.path().join("image.vhd");
    large.write(&path, 2);
    let data = ends("large blocks", "read -n {} -d 0", &[&path]);
    assert_eq!(data.stdout.len(), 256 << 20);
}

#[test]
fn of_a_block_of_256_mib_that_is_merged() {
    let folder = folder();
    let [parent, child] = ["parent.vhd", "child.vhd"].map(|name| folder.path().join(name));
    let empty = Claims { block_size: 256 << 20, blocks: 1, entries: 1, allocated: false, ..Claims::default() };
    empty.write(&parent, 1);
    let parent_name = Some("./parent.vhd");
    Claims { allocated: true, held: true, parent: parent_name, ..empty }.write(&child, 2);
    let done = ends("merge", "coalesce -n {}", &[&child]);
    assert!(done.status.success(), "{done:?}");
    let done = ends("check", "check -n {} -b", &[&parent]);
    assert!(done.status.success(), "{done:?}");
}

#[test]
fn of_a_table_far_away_and_of_names_of_4_gib() {
    all("far", &Claims { table_at: 100 << 30, ..Claims::default() });
    let parent = Some("./parent.vhd");
    all("name", &Claims { parent, name: Some(u32::MAX), ..Claims::default() });
    all("entries", &Claims { entries: 2 << 20, parent, ..Claims::default() });
}
