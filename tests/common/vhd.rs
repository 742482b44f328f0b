//! VHD images under test, and what `vhd-util` says of them.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use drivers::vhd::layout::{batmap_pieces, block_place};
use drivers::vhd::{FOOTER_SIZE, Image, Table, bitmap};
use tapdisk::chain;
use zerocopy::IntoBytes;

use super::served::{output, tool};

/// What a command printed, and its exit code.
pub struct Said {
    pub out: String,
    pub err: String,
    pub code: i32,
}

/// Runs `vhd-util` with words, `{}` in which is the next of `paths`.
pub fn vhd_util(words: &str, paths: &[&Path]) -> Said {
    let mut paths = paths.iter();
    let words = words.split_whitespace();
    let words = words.map(|word| if word == "{}" { paths.next().unwrap().as_os_str() } else { OsStr::new(word) });
    let output = output(tool("vhd-util").args(words));
    Said {
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
        code: output.status.code().unwrap(),
    }
}

/// The same where it must succeed.
pub fn good(words: &str, paths: &[&Path]) -> String {
    let said = vhd_util(words, paths);
    assert_eq!((said.code, said.err.as_str()), (0, ""), "{words} {paths:?}: {}", said.out);
    said.out
}

/// An image's metadata.
pub fn image(path: &Path) -> Image {
    chain::layer(path).unwrap().image.unwrap()
}

/// Writes sectors of a dynamic or differencing image, as a tapdisk would.
pub fn write(path: &Path, at: u64, len: u64, byte: u8) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut image = image(path);
    let header = image.header.unwrap();
    let block_size = u64::from(header.block_size());
    let (mut now, end) = (at, at + len);
    while now < end {
        let (block, within) = ((now / block_size) as u32, now % block_size);
        let len = (block_size - within).min(end - now);
        let place = image.table.get(block).unwrap_or_else(|| {
            let place = block_place(image.end(), &header);
            file.set_len(place).unwrap();
            file.set_len(place + header.block_len()).unwrap();
            image.table.set(block, place);
            place
        });
        let mut bits = vec![0; header.bitmap_size() as usize];
        file.read_exact_at(&mut bits, place).unwrap();
        bitmap::set(&mut bits, (within / 512) as u32..((within + len) / 512) as u32);
        file.write_all_at(&bits, place).unwrap();
        file.write_all_at(&vec![byte; len as usize], place + header.bitmap_size() + within).unwrap();
        let full = bitmap::is_full(&bits, header.block_size() / 512);
        if let Some(batmap) = image.batmap.as_mut().filter(|_| full) {
            batmap.set(block, true);
        }
        now += len;
    }
    let mut table = vec![0; Table::bytes(image.table.blocks()) as usize];
    image.table.write(0, &mut table);
    file.write_all_at(&table, header.table_at()).unwrap();
    for piece in image.batmap.iter().flat_map(batmap_pieces) {
        file.write_all_at(&piece.bytes, piece.at).unwrap();
    }
    let end = image.physical_size() - FOOTER_SIZE as u64;
    file.write_all_at(image.footer.as_bytes(), end).unwrap();
}

/// The disk that a chain of images is, by way of `vhd-util convert`.
pub fn disk(path: &Path) -> Vec<u8> {
    let folder = super::served::folder();
    let raw = folder.path().join("disk.raw");
    good("convert --parents / --to raw {} {}", &[path, &raw]);
    std::fs::read(raw).unwrap()
}

/// Changes bytes of a file.
pub fn change(path: &Path, at: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

/// Bytes of a file.
pub fn bytes(path: &Path, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes
}
