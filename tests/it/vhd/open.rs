//! Which VHD images and parents are served, which are refused and what is said then, and that a reader changes nothing.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::guest::Guest;
use crate::common::served::{Served, folder, run};
use crate::common::small_fs::Loop;
use crate::common::vhd::{good, vhd_util, write};
use crate::common::vhd_made::{self as vhd, Parent, stop, table};
use drivers::vhd::{FOOTER_SIZE, Footer, HEADER_SIZE, Header, Uuid};
use nix::sys::signal::Signal;
use zerocopy::FromBytes;

const LOCAL: &str = "[frontend.local]\nsocket = '{s}/ring'\n[frontend.nbd]\nsocket = '{s}/nbd'\n";
const SIZE: u64 = 64 << 20;

fn start(path: &Path, keys: &str) -> Served {
    Served::start(&format!("{}\n{keys}", table(path)), LOCAL)
}

/// What is said of an image that is not served, beyond its path.
fn refused(path: &Path, keys: &str) -> String {
    let (code, text) = Served::refused(&format!("{}\n{keys}", table(path)), LOCAL);
    assert_eq!(code, 1, "{text}");
    let said = text.strip_prefix(&format!("tapdisk: {}: ", path.display()));
    said.unwrap_or_else(|| panic!("{} is not named: {text}", path.display())).trim_end().to_owned()
}

/// An image of qemu-img's with blocks 3 and 5.
fn base(path: &Path) {
    vhd::create(path, "dynamic", SIZE >> 20);
    run(Command::new("qemu-io").args(["-f", "vpc", "-c", "write -q 7M 64k", "-c", "write -q 11M 64k"]).arg(path));
}

/// Base and leaf in a folder, by their names in it. Gives their paths.
fn two(folder: &Path, base_name: &str, leaf_name: &str, locator: &str) -> (PathBuf, PathBuf) {
    let folder = folder.canonicalize().unwrap();
    let (below, leaf) = (folder.join(base_name), folder.join(leaf_name));
    std::fs::create_dir_all(below.parent().unwrap()).unwrap();
    base(&below);
    let footer = vhd::image(&below).footer;
    vhd::child(&leaf, SIZE, 2, Parent { path: locator, uuid: footer.uuid, time: footer.timestamp.get() });
    (below, leaf)
}

#[test]
fn a_reader_changes_not_one_byte() {
    let folder = folder();
    let (below, leaf) = two(folder.path(), "base.vhd", "leaf.vhd", "./base.vhd");
    let fixed = vhd::make(folder.path(), "fixed");
    // Also not of one that was in use when the host stopped, and that a writer would mend.
    let killed = folder.path().join("killed.vhd");
    base(&killed);
    let served = start(&killed, "");
    assert_eq!(Guest::connect(&served.ring()).write(0, &[5; 512]), 0);
    served.signal(Signal::SIGKILL);
    drop(served);
    for path in [&below, &leaf, &fixed, &killed] {
        let before = std::fs::read(path).unwrap();
        let parent = std::fs::read(&below).unwrap();
        let served = start(path, "read_only = true");
        let mut guest = Guest::connect(&served.ring());
        assert!(guest.read(7 * 2048, 4096).is_ok() && guest.read(0, 512).is_ok());
        assert_ne!(guest.write(0, &[1; 512]), 0);
        run(Command::new("nbdcopy").args([&served.nbd(), "null:"]));
        drop(guest);
        let (code, log) = served.stop();
        assert_eq!(code, Some(0), "{log}");
        assert!(std::fs::read(path).unwrap() == before, "{}", path.display());
        assert!(std::fs::read(&below).unwrap() == parent, "its parent");
    }
    // Nor does a writer change the parent.
    let parent = std::fs::read(&below).unwrap();
    let served = start(&leaf, "");
    assert_eq!(Guest::connect(&served.ring()).write(7 * 2048, &[1; 512]), 0);
    stop(served, &leaf);
    assert!(std::fs::read(&below).unwrap() == parent);
}

#[test]
fn readers_share_a_parent_and_nobody_writes_it_meanwhile() {
    let folder = folder();
    let (below, leaf) = two(folder.path(), "base.vhd", "leaf.vhd", "./base.vhd");
    let other = folder.path().join("other.vhd");
    vhd::snapshot(&other, 3, &below);
    let (first, second) = (start(&leaf, ""), start(&other, ""));
    assert!(refused(&below, "").starts_with("in use by process "));
    let reader = start(&below, "read_only = true");
    drop((first, second, reader));
    let writer = start(&below, "");
    let (code, text) = Served::refused(&table(&leaf), LOCAL);
    let holder = format!("{}: in use by process {} (tapdisk)", below.display(), writer.pid());
    assert!(code == 1 && text.contains(&holder), "{text}");
}

#[test]
fn parents_are_in_the_folder_of_the_image_or_in_those_that_are_named() {
    let folder = folder();
    let (below, leaf) = two(folder.path(), "a/base.vhd", "b/leaf.vhd", "../a/base.vhd");
    let text = format!(
        "its parent, {}, is in another folder, or a link to one, which an image made elsewhere must not name; if it is to be there, \
         allow its folder: image.parents in the configuration, --parents of vhd-util",
        below.display()
    );
    let allow = |folder: &Path| format!("parents = ['{}']", folder.display());
    assert_eq!(refused(&leaf, ""), text);
    assert_eq!(refused(&leaf, &allow(leaf.parent().unwrap())), text);
    assert_eq!(refused(&leaf, &allow(Path::new("/none"))), text);
    let folder = folder.path().canonicalize().unwrap();
    for allowed in [below.parent().unwrap(), &folder, &folder.join("b/../a")] {
        start(&leaf, &allow(allowed));
    }
    // A link that leads out of the folder.
    let (link, outside) = (folder.join("b/link"), folder.join("a"));
    std::os::unix::fs::symlink(&outside, &link).unwrap();
    let footer = vhd::image(&below).footer;
    vhd::child(&leaf, SIZE, 2, Parent { path: "./link/base.vhd", uuid: footer.uuid, time: 0 });
    assert_eq!(refused(&leaf, ""), text, "by a link");
    // A link to a file there, and a folder below: the image's own is that and no other.
    let name = |path: &str| vhd::child(&leaf, SIZE, 2, Parent { path, uuid: footer.uuid, time: 0 });
    std::os::unix::fs::symlink(&below, folder.join("b/parent")).unwrap();
    name("./parent");
    assert!(refused(&leaf, "").contains("b/parent, is in another folder, or a link to one"));
    start(&leaf, &allow(&outside));
    std::fs::create_dir(folder.join("b/sub")).unwrap();
    std::fs::copy(&below, folder.join("b/sub/base.vhd")).unwrap();
    name("./sub/base.vhd");
    assert!(refused(&leaf, "").contains("sub/base.vhd, is in another folder"));
    // A link to a block device is how volumes are named.
    let Some(device) = Loop::new(&below, 512) else { return };
    std::os::unix::fs::symlink(&device.0, folder.join("b/device")).unwrap();
    name("./device");
    start(&leaf, "");
}

#[test]
fn no_tool_writes_or_reads_what_a_strangers_image_names() {
    let folder = folder();
    let [own, host] = ["strangers", "etc"].map(|name| folder.path().join(name));
    std::fs::create_dir(&own).unwrap();
    std::fs::create_dir(&host).unwrap();
    let secret = host.join("shadow");
    std::fs::write(&secret, vec![b's'; 4 << 20]).unwrap();
    let leaf = own.join("leaf.vhd");
    std::os::unix::fs::symlink(&secret, own.join("link.raw")).unwrap();
    for named in ["../etc/shadow", secret.to_str().unwrap(), "./link.raw"] {
        vhd::child(&leaf, SIZE, 2, Parent { path: named, uuid: Uuid::NIL, time: 0 });
        write(&leaf, 0, 4096, b'e');
        for words in
            ["coalesce -n {}", "convert --to raw {} /dev/shm/none", "read -r 8 -c 8 -n {}", "fill -n {}", "info {}"]
        {
            let said = vhd_util(words, &[&leaf]);
            assert_eq!(said.code, libc::EINVAL, "{words} {named}: {}", said.err);
            assert!(said.err.contains("is in another folder") && !said.out.contains("ssss"), "{words}: {}", said.err);
        }
        assert!(std::fs::read(&secret).unwrap().iter().all(|byte| *byte == b's'), "{named}");
    }
    // Whoever allows the folder has what it asks for.
    let said = vhd_util("--parents {} coalesce -n {}", &[&host, &leaf]);
    assert_eq!((said.code, std::fs::read(&secret).unwrap()[0]), (0, b'e'), "{}", said.err);
}

#[test]
fn a_parent_that_was_written_since_is_refused_unless_one_knows_better() {
    let folder = folder();
    let (below, leaf) = two(folder.path(), "base.vhd", "leaf.vhd", "./base.vhd");
    // As vhd-util makes it, and as another program does: that has the time of the parent's file, by another clock.
    let others = leaf.with_file_name("others.vhd");
    std::fs::copy(&leaf, &others).unwrap();
    good("modify -n {} -p {}", &[&leaf, &below]);
    stop(start(&leaf, ""), &leaf);
    let expected = vhd::image(&below).footer.timestamp.get();
    // Opened and not written, it is as it was.
    stop(start(&below, ""), &below);
    stop(start(&leaf, ""), &leaf);
    // A second later at the least.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let served = start(&below, "");
    assert_eq!(Guest::connect(&served.ring()).write(0, &[9; 512]), 0);
    stop(served, &below);
    let found = vhd::image(&below).footer.timestamp.get();
    assert_ne!(found, expected);
    let text = format!(
        "its parent, {}, has changed since: it was written at {found}, and the child knows it as of {expected} (seconds since \
         2000); what the disk shows would be neither; set image.changed_parent to \"serve\" if you know better",
        below.display()
    );
    assert_eq!(refused(&leaf, ""), text);
    stop(start(&others, ""), &others);
    let footer = vhd::image(&below).footer;
    for (behind, served) in [(1800, true), (1801, false)] {
        let time = found - behind;
        vhd::child(&others, SIZE, 2, Parent { path: "./base.vhd", uuid: footer.uuid, time });
        if served {
            stop(start(&others, ""), &others);
        } else {
            assert!(refused(&others, "").contains("has changed since"));
        }
    }
    let served = start(&leaf, "changed_parent = 'serve'");
    assert_eq!(Guest::connect(&served.ring()).read(0, 512), Ok(vec![9; 512]));
    stop(served, &leaf);
    // Another image in its place is refused in any case.
    base(&below);
    let found = vhd::image(&below).footer.uuid;
    let was = vhd::image(&leaf).header.unwrap().parent_uuid;
    let text = format!("its parent has the UUID {was}, and {} has {found}", below.display());
    assert_eq!(refused(&leaf, "changed_parent = 'serve'"), text);
}

#[test]
fn what_is_missing_or_no_image_is_named() {
    let folder = folder();
    let (below, leaf) = two(folder.path(), "base.vhd", "leaf.vhd", "./base.vhd");
    let raw = leaf.with_file_name("raw.img");
    std::fs::write(&raw, vec![3; 1 << 20]).unwrap();
    assert_eq!(refused(&raw, ""), "its footer does not begin as one does");
    assert_eq!(refused(&leaf.with_file_name("none"), ""), "cannot open it: No such file or directory (os error 2)");
    std::fs::remove_file(&below).unwrap();
    let tried = leaf.parent().unwrap().join("./base.vhd");
    let beside = leaf.with_file_name("base.vhd");
    let text = refused(&leaf, "");
    assert!(
        text.starts_with("its parent is not there; tried ")
            && (text.contains(tried.to_str().unwrap()) || text.contains(beside.to_str().unwrap())),
        "{text}"
    );
    for (keys, said) in [
        ("type = 'vhd'", "image.path: missing: types \"aio\" and \"vhd\" need a file or block device"),
        (
            "type = 'vhd'\npath = 'a'\nsize = '1 MiB'",
            "image.size: type \"vhd\" has its size in its file; vhd-util create makes a new one",
        ),
        (
            "type = 'vhd'\npath = 'a'\ncreate = '1 MiB'",
            "image.create: only a writable image of type \"aio\" can be made",
        ),
        (
            "type = 'vhd'\npath = 'a'\nsector_size = 4096",
            "image.sector_size: images of type \"vhd\" have sectors of 512 bytes",
        ),
    ] {
        let (code, text) = Served::refused(keys, LOCAL);
        assert!(code == 2 && text.contains("disk.toml:") && text.contains(said), "{keys}: {text}");
    }
}

/// Makes the checksums of an image right.
fn seal(file: &mut [u8]) {
    let last = file.len() - FOOTER_SIZE;
    for at in [0, last] {
        Footer::mut_from_bytes(&mut file[at..at + FOOTER_SIZE]).unwrap().seal();
    }
    Header::mut_from_bytes(&mut file[FOOTER_SIZE..FOOTER_SIZE + HEADER_SIZE]).unwrap().seal();
}

/// Puts a number at byte `at` of both footers.
fn in_footers(file: &mut [u8], at: usize, bytes: &[u8]) {
    let last = file.len() - FOOTER_SIZE;
    for begin in [0, last] {
        file[begin + at..][..bytes.len()].copy_from_slice(bytes);
    }
}

/// Fields of the header, by their place in the file.
const TABLE_AT: usize = FOOTER_SIZE + 16;
const ENTRIES: usize = FOOTER_SIZE + 28;
const BLOCK_SIZE: usize = FOOTER_SIZE + 32;

#[test]
fn images_that_make_no_sense_are_refused() {
    type Change = fn(&mut Vec<u8>, usize);
    let folder = folder();
    let path = folder.path().join("image.vhd");
    base(&path);
    let whole = std::fs::read(&path).unwrap();
    let table_at = vhd::image(&path).header.unwrap().table_at() as usize;
    let cases: [(Change, &str); 15] = [
        (|file, table| file.copy_within(table + 12..table + 16, table + 20), "blocks 3 and 5 overlap at byte"),
        (|file, table| file[table + 12..][..4].fill(0), "block 3 has 2097664 bytes at byte 0, which are not its own"),
        (|file, table| file[table + 12..][..4].fill(0x7f), "block 3 has 2097664 bytes at byte 1095199817216"),
        (
            |file, _| file[TABLE_AT..][..8].copy_from_slice(&(1_u64 << 40).to_be_bytes()),
            "its table is at byte 1099511627776",
        ),
        (|file, _| file[TABLE_AT..][..8].fill(0xff), "its table is at byte 18446744073709551615"),
        (|file, _| file[ENTRIES..][..4].fill(0xff), "its table has 4294967295 entries; at most"),
        (
            |file, _| file[ENTRIES..][..4].copy_from_slice(&3_u32.to_be_bytes()),
            "is more than its table has blocks for",
        ),
        (|file, _| file[BLOCK_SIZE..][..4].fill(0xff), "its blocks have 4294967295 bytes, which is no power of two"),
        (|file, _| file[BLOCK_SIZE..][..4].fill(0), "its blocks have 0 bytes"),
        (
            |file, _| in_footers(file, 48, &(1_u64 << 62).to_be_bytes()),
            "its size, 4611686018427387904 bytes, is more than",
        ),
        (|file, _| in_footers(file, 48, &[0; 8]), "its size, 0 bytes, is not one or more sectors"),
        (|file, _| in_footers(file, 48, &1000_u64.to_be_bytes()), "its size, 1000 bytes, is not one or more sectors"),
        (|file, _| in_footers(file, 16, &[0xff; 8]), "its footer does not say where its header is"),
        (|file, _| in_footers(file, 16, &(1_u64 << 40).to_be_bytes()), "its header is at byte 1099511627776"),
        (|file, _| in_footers(file, 60, &[0, 0, 0, 7]), "it is an image of type 7"),
    ];
    for (change, expected) in cases {
        let mut file = whole.clone();
        change(&mut file, table_at);
        seal(&mut file);
        std::fs::write(&path, &file).unwrap();
        for keys in ["", "read_only = true"] {
            let text = refused(&path, keys);
            assert!(text.contains(expected), "{expected}: {text}");
        }
        assert!(std::fs::read(&path).unwrap() == file, "{expected}: it is as it was");
    }
    for (len, expected) in [
        (whole.len() - 1_000_000, "block 5 has 2097664 bytes at byte"),
        (table_at + 20, "its table is at byte"),
        (700, "its header is at byte 512, with 1024 bytes"),
        (400, "its footer has only 400 bytes"),
        (0, "its footer has only 0 bytes"),
    ] {
        std::fs::write(&path, &whole[..len]).unwrap();
        let text = refused(&path, "");
        assert!(text.contains(expected), "{len} bytes: {text}");
    }
}

#[test]
fn a_chain_that_makes_no_sense_is_refused() {
    let folder = folder();
    let folder = folder.path().canonicalize().unwrap();
    let [one, two] = ["one.vhd", "two.vhd"].map(|name| folder.join(name));
    let parent = |path, uuid| Parent { path, uuid: Uuid([uuid; 16]), time: 0 };
    vhd::child(&one, SIZE, 1, parent("./two.vhd", 2));
    vhd::child(&two, SIZE, 2, parent("./one.vhd", 1));
    let (code, text) = Served::refused(&table(&one), LOCAL);
    let expected = format!("tapdisk: {}: {} is its parent and its child\n", two.display(), one.display());
    assert_eq!((code, text), (1, expected));
    vhd::child(&one, SIZE, 1, parent("./one.vhd", 1));
    assert_eq!(refused(&one, ""), format!("{} is its parent and its child", one.display()));
    // A parent that is no good.
    vhd::child(&one, SIZE, 1, parent("./two.vhd", 2));
    std::fs::write(&two, vec![0; 4096]).unwrap();
    let (code, text) = Served::refused(&table(&one), LOCAL);
    assert_eq!((code, text), (1, format!("tapdisk: {}: its footer does not begin as one does\n", two.display())));
}

#[test]
fn a_parent_may_be_raw_smaller_and_on_a_device() {
    let folder = folder();
    let (leaf, raw) = (folder.path().join("leaf.vhd"), folder.path().join("disk.raw"));
    std::fs::write(&raw, vec![0x77; (1 << 20) + 512]).unwrap();
    let check = |name: &str| {
        vhd::child(&leaf, SIZE, 1, Parent { path: name, uuid: Uuid::NIL, time: 0 });
        let served = start(&leaf, "");
        let mut guest = Guest::connect(&served.ring());
        let expected = [[0x77; 2048].as_slice(), &[0; 2048]].concat();
        assert_eq!(guest.read(2045, 4096), Ok(expected), "beyond the parent's end there are zeros");
        assert_eq!(guest.write(2046, &[1; 512]), 0);
        assert_eq!(guest.read(2045, 1536), Ok([[0x77; 512], [1; 512], [0x77; 512]].concat()));
        drop(guest);
        stop(served, &leaf);
    };
    check("./disk.raw");
    let Some(device) = Loop::new(&raw, 512) else { return };
    std::os::unix::fs::symlink(&device.0, folder.path().join("device")).unwrap();
    check("./device");
}

#[test]
fn an_image_that_takes_all_of_a_device_is_only_read() {
    let folder = folder();
    let (path, file) = (folder.path().join("image.vhd"), folder.path().join("device"));
    base(&path);
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&file, &whole[..whole.len() - FOOTER_SIZE]).unwrap();
    let Some(device) = Loop::new(&file, 512) else { return };
    let text = refused(Path::new(&device.0), "");
    assert_eq!(text, "it takes all of the device, and its last footer has no place; make the device larger");
    start(Path::new(&device.0), "read_only = true");
    assert!(std::fs::read(&file).unwrap() == whole[..whole.len() - FOOTER_SIZE]);
}
