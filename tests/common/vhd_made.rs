//! VHD images to be served: by qemu-img, and children of them.

use std::path::{Path, PathBuf};
use std::process::Command;

use drivers::vhd::{BLOCK_SIZE, Image};
use drivers::vhd::{FOOTER_SIZE, Footer, HEADER_SIZE, Header, Kind, Locator, Platform, Table, Uuid, encode_path};
use tapdisk::chain;
use zerocopy::IntoBytes;

use super::served::{Served, output, run, tool};

/// Where the table of a child is.
pub const TABLE: u64 = (FOOTER_SIZE + HEADER_SIZE) as u64;

/// What an image says of its parent.
#[derive(Clone, Copy, Debug)]
pub struct Parent<'a> {
    /// Relative to the child's folder.
    pub path: &'a str,
    pub uuid: Uuid,
    /// Of its footer; 0: not known.
    pub time: u32,
}

/// A differencing image of `size` bytes without data. Gives its UUID.
pub fn child(path: &Path, size: u64, uuid: u8, parent: Parent) -> Uuid {
    child_of_blocks(BLOCK_SIZE, path, size, uuid, parent)
}

/// The same, with blocks of that many bytes.
pub fn child_of_blocks(block_size: u32, path: &Path, size: u64, uuid: u8, parent: Parent) -> Uuid {
    let uuid = Uuid([uuid; 16]);
    let blocks = size.div_ceil(block_size.into()) as u32;
    let mut footer = Footer::new(Kind::Differencing, size, uuid, 1_000_000_000);
    // Such as Windows makes: without a batmap.
    footer.creator = *b"win ";
    footer.seal();
    let name = encode_path(Platform::W2ru, parent.path);
    let name_at = TABLE + Table::bytes(blocks);
    let mut header = Header::new(TABLE, blocks, block_size);
    header.parent_uuid = parent.uuid;
    header.parent_timestamp = parent.time.into();
    header.set_parent_name(parent.path.rsplit('/').next().unwrap());
    header.locators[0] = Locator::new(Platform::W2ru, name_at, name.len() as u32);
    header.seal();
    let mut table = vec![0; Table::bytes(blocks) as usize];
    Table::empty(blocks).write(0, &mut table);
    let mut file = [footer.as_bytes(), header.as_bytes(), &table, &name].concat();
    file.resize(name_at as usize + 512, 0);
    file.extend(footer.as_bytes());
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, file).unwrap();
    uuid
}

/// A snapshot: a child of an image that is there, beside it, which refuses a parent that was changed.
pub fn snapshot(path: &Path, uuid: u8, parent: &Path) {
    let Image { footer, .. } = image(parent);
    let name = format!("./{}", parent.file_name().unwrap().to_str().unwrap());
    let known = Parent { path: &name, uuid: footer.uuid, time: footer.timestamp.get() };
    child(path, footer.size(), uuid, known);
}

/// The metadata of an image.
pub fn image(path: &Path) -> Image {
    chain::layer(path).unwrap().image.unwrap()
}

/// An empty image of qemu-img's. `kind` is its "dynamic" or "fixed".
pub fn create(path: &Path, kind: &str, mib: u64) {
    let options = format!("force_size=on,subformat={kind}");
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "vpc", "-o", &options])
        .arg(path)
        .arg(format!("{mib}M")));
}

/// An empty image of 64 MiB of one of the [`KINDS`], in a folder. That of a differencing one is a child of `parent.vhd`.
pub fn make(folder: &Path, kind: &str) -> PathBuf {
    let path = folder.join(format!("{kind}.vhd"));
    if kind == "differencing" {
        let parent = folder.join("parent.vhd");
        if !parent.exists() {
            create(&parent, "dynamic", 64);
        }
        snapshot(&path, 2, &parent);
    } else {
        create(&path, kind, 64);
    }
    path
}

/// Kinds of images.
pub const KINDS: [&str; 3] = ["dynamic", "fixed", "differencing"];

/// The `[image]` table of an image.
pub fn table(path: &Path) -> String {
    format!("type = 'vhd'\npath = '{}'", path.display())
}

/// What `vhd-util check` prints, and its exit code.
pub fn check(path: &Path, more: &[&str]) -> (String, i32) {
    let output = output(tool("vhd-util").arg("check").arg("-n").arg(path).args(more));
    (String::from_utf8(output.stdout).unwrap(), output.status.code().unwrap())
}

/// Ends a tapdisk, after which its image is whole.
pub fn stop(served: Served, path: &Path) {
    let (code, log) = served.stop();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(check(path, &[]), (format!("{} is valid\n", path.display()), 0), "{log}");
}

/// All that a client reads.
pub fn content(served: &Served, folder: &Path) -> Vec<u8> {
    let copy = folder.join("content");
    run(Command::new("nbdcopy").arg(served.nbd()).arg(&copy));
    std::fs::read(&copy).unwrap()
}
