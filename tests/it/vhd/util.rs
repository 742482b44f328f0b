//! `vhd-util`: images are made, changed and listed as storage managers expect it of blktap's.

use std::path::Path;
use std::process::Command;

use crate::common::served::{folder, run, tool};
use crate::common::small_fs::{Loop, SmallFs};
use crate::common::vhd::{bytes, change, disk, good, image, vhd_util, write};
use drivers::vhd::{Kind, Uuid};
use serde_json::Value;
use zerocopy::IntoBytes;

const MIB: u64 = 1 << 20;

/// What qemu-img says of an image.
fn qemu_info(path: &Path) -> Value {
    let text = run(Command::new("qemu-img").args(["info", "--output=json", "-f", "vpc"]).arg(path));
    serde_json::from_str(&text).unwrap()
}

#[test]
fn images_are_made() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    for (name, words, size, room) in [
        ("small", "-s 1", 2 * MIB, 2 * MIB),
        ("usual", "-s 10241", 10242 * MIB, 10242 * MIB),
        ("room", "-s 10240 -S 20480", 10240 * MIB, 20480 * MIB),
        ("largest", "-s 2088960 -S 2097152", 2040 << 30, 2 << 40),
        ("fixed", "-s 10 -r", 10 * MIB, 0),
    ] {
        let path = path(name);
        assert_eq!(good(&format!("create --debug -n {{}} {words}"), &[&path]), "");
        let shown = good("query -vSa -n {}", &[&path]);
        assert_eq!(shown, format!("{}\n0\n{}\n", size >> 20, room >> 20), "{name}");
        assert_eq!(good("check -n {}", &[&path]), format!("{} is valid\n", path.display()));
        assert_eq!(qemu_info(&path)["virtual-size"], size, "{name}");
    }
    assert_eq!(image(&path("fixed")).kind, Kind::Fixed);
    assert_eq!(path("fixed").metadata().unwrap().len(), 10 * MIB + 512);
    let uuids = ["small", "usual"].map(|name| image(&path(name)).footer.uuid);
    assert!(uuids[0] != uuids[1] && uuids[0].0[6] >> 4 == 4 && uuids[0].0[8] >> 6 == 2, "{uuids:?}");
}

#[test]
fn what_cannot_be_made_leaves_nothing() {
    let folder = folder();
    let path = folder.path().join("image.vhd");
    for (words, code, out, err) in [
        ("-s 0", libc::EINVAL, "", "a disk has at least one sector"),
        ("-s 0 -r", libc::EINVAL, "", "a disk has at least one sector"),
        ("-s 2097152", libc::EFBIG, "", "is too large: the table of a VHD image can address"),
        ("-s 18446744073709551615", libc::EFBIG, "", "is too large"),
        ("-s 2 -S 2097153", libc::EFBIG, "", "at most 2199023255552 bytes (2 TiB) make sense"),
        (
            "-s 4 -S 2",
            libc::EINVAL,
            "Error: <-S size> must be greater than <-s size>\n",
            "(-S) must not be less than the size",
        ),
    ] {
        let said = vhd_util(&format!("create -n {{}} {words}"), &[&path]);
        assert_eq!((said.code, said.out.as_str()), (code, out), "{words}");
        assert!(said.err.contains(err) && said.err.contains("image.vhd: "), "{words}: {}", said.err);
        assert!(!path.exists(), "{words}");
    }
    std::fs::write(&path, "precious").unwrap();
    for words in ["create -n {} -s 2", "create -r -n {} -s 2", "snapshot -n {} -p {}", "convert --to raw {} {}"] {
        let other = folder.path().join("other.vhd");
        let _ = vhd_util("create -n {} -s 2", &[&other]);
        let paths: [&Path; 2] = if words.starts_with("convert") { [&other, &path] } else { [&path, &other] };
        let said = vhd_util(words, &paths);
        assert_eq!(said.code, libc::EEXIST, "{words}");
        assert!(said.err.contains("image.vhd: it exists, and is not overwritten"), "{}", said.err);
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    assert_eq!(vhd_util("create -n {} -s 2", &[&folder.path().join("none/image.vhd")]).code, libc::ENOENT);
}

#[test]
fn a_full_file_system_has_nothing_left_of_a_new_image() {
    let Some(small) = SmallFs::new("8m") else { return };
    let (image, source) = (small.path("image.vhd"), small.path("../source.raw"));
    std::fs::write(&source, vec![7; 16 << 20]).unwrap();
    for (words, paths) in [
        ("create -r -n {} -s 100", vec![image.as_path()]),
        ("create -n {} -s 2 -S 2097152", vec![image.as_path()]),
        ("convert --to vhd {} {}", vec![&source, &image]),
        ("convert --from raw --to raw {} {}", vec![&source, &image]),
    ] {
        if words.contains("2097152") {
            std::fs::write(small.path("filler"), vec![1; 5 << 20]).unwrap();
        }
        let said = vhd_util(words, &paths);
        assert_eq!((said.code, image.exists()), (libc::ENOSPC, false), "{words}: {}", said.err);
        assert!(said.err.contains("image.vhd: cannot write it: No space left on device"), "{}", said.err);
    }
}

#[test]
fn a_device_gets_metadata_only_and_its_footer_at_the_end() {
    let folder = folder();
    let file = folder.path().join("device");
    std::fs::write(&file, vec![0x77; 24 << 20]).unwrap();
    let Some(device) = Loop::new(&file, 512) else { return };
    let device = Path::new(&device.0);
    good("create -n {} -s 100", &[device]);
    assert_eq!(good("check -n {}", &[device]), format!("{} is valid\n", device.display()));
    assert_eq!(image(device).footer_at, (24 << 20) - 512);
    assert_eq!(bytes(device, 1 << 20, 512), [0x77; 512]);
    // What is merged into it is all that a block has.
    let child = folder.path().join("child.vhd");
    good("snapshot -e -n {} -p {}", &[&child, device]);
    write(&child, 3 * MIB, 4096, 1);
    let before = disk(&child);
    assert_eq!(good("coalesce --parents /dev -n {}", &[&child]), "Coalesced 8 sectors\n");
    assert!(disk(device) == before);
    assert_eq!(good("check -b -n {}", &[device]), format!("{} is valid\n", device.display()));
    // It grows where it is, and says so when it cannot.
    let journal = folder.path().join("journal");
    good("resize -s 520 -n {} -j {}", &[device, &journal]);
    assert_eq!(good("check -b -n {}", &[device]), format!("{} is valid\n", device.display()));
    assert!(disk(device)[..before.len()] == before && !journal.exists());
    good("set -n {} -f hidden -v 1", &[device]);
    assert_eq!(good("query -f -n {}", &[device]), "hidden: 1\n");
    assert_eq!(vhd_util(&format!("modify -s {} -n {{}}", 25 << 20), &[device]).code, libc::ENOSPC);
    let raw = folder.path().join("raw");
    std::fs::write(&raw, vec![9; 3 << 20]).unwrap();
    good("convert --to vhd {} {}", &[&raw, device]);
    assert!(disk(device)[..3 << 20] == vec![9; 3 << 20]);
    assert_eq!(vhd_util("create -n {} -s 100 -r", &[device]).code, libc::ENOSPC);
    good("create -n {} -s 10 -r", &[device]);
    assert!(disk(device) == vec![0; 10 << 20]);
    // As a raw disk, it is what the image is, zeros and all.
    let vhd = folder.path().join("small.vhd");
    good("create -n {} -s 20", &[&vhd]);
    write(&vhd, 5 * MIB, 5 * MIB, 3);
    change(device, 15 * MIB, &[0x77; 4096]);
    good("convert --to raw {} {}", &[&vhd, device]);
    assert!(bytes(device, 0, 20 << 20) == disk(&vhd));
}

#[test]
fn a_journal_can_be_on_a_device() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("device"), vec![0x77; 8 << 20]).unwrap();
    let Some(device) = Loop::new(&path("device"), 512) else { return };
    let (journal, image) = (Path::new(&device.0), path("image.vhd"));
    good("create -n {} -s 40", &[&image]);
    write(&image, 5 * MIB, 4096, 1);
    let before = std::fs::read(&image).unwrap();
    let mut limited = Command::new("prlimit");
    // In the middle of the block that moves behind a table of four.
    let limit = 5 * MIB;
    limited.args([format!("--fsize={limit}"), "--core=0".into()]).arg(tool("vhd-util").get_program());
    let status = limited.args(["resize", "-s", "2088960", "-n"]).arg(&image).arg("-j").arg(journal).status().unwrap();
    assert!(!status.success() && std::fs::read(&image).unwrap() != before);
    let again = "resize -s 2088960 -n {} -j {}";
    assert_eq!(vhd_util(again, &[&image, journal]).code, libc::EINVAL);
    good("create -n {} -s 40", &[&path("other.vhd")]);
    good("revert -n {} -j {}", &[&image, journal]);
    assert!(std::fs::read(&image).unwrap() == before && journal.exists());
    good(again, &[&image, journal]);
    assert_eq!(good("check -b -n {}", &[&image]), format!("{} is valid\n", image.display()));
    // There is nothing to undo any more.
    good("revert -n {} -j {}", &[&image, journal]);
    assert_eq!(good("query -v -n {}", &[&image]), "2088960\n");
}

#[test]
fn a_snapshot_names_its_parent() {
    let folder = folder();
    let root = folder.path().canonicalize().unwrap();
    let path = |name: &str| root.join(name);
    std::fs::create_dir_all(path("sub/größe")).unwrap();
    good("create -n {} -s 100", &[&path("base.vhd")]);
    write(&path("base.vhd"), 0, 512, 1);
    let child = path("sub/größe/child.vhd");
    good("snapshot -n {} -p {} -S 200", &[&child, &path("base.vhd")]);
    let made = image(&child);
    let names: Vec<_> = made.parents.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["../../base.vhd"; 3]);
    let header = made.header.unwrap();
    assert_eq!(header.parent_uuid, image(&path("base.vhd")).footer.uuid);
    assert_eq!(header.parent_name().as_deref(), Some("base.vhd"));
    assert_eq!((made.footer.size(), header.size_max()), (100 * MIB, 200 * MIB));
    let shown = good("query -pd --parents {} -n {}", &[&root, &child]);
    assert_eq!(shown, format!("{}\nchain depth: 2\n", path("base.vhd").display()));
    assert_eq!(good("query -pu -n {}", &[&child]), "../../base.vhd\n");
    // A child without data is passed over, unless that is asked for; its size and key count.
    let third = path("third.vhd");
    good("snapshot -n {} -p {} --parents {}", &[&third, &child, &root]);
    assert_eq!(good("query -p -n {}", &[&third]), format!("{}\n", path("base.vhd").display()));
    std::fs::remove_file(&third).unwrap();
    // Where its parent may not be read, it is not passed over.
    good("snapshot -n {} -p {}", &[&third, &child]);
    assert_eq!(good("query -p -n {}", &[&third]), format!("{}\n", child.display()));
    let fourth = path("fourth.vhd");
    good("snapshot -e -n {} -p {}", &[&fourth, &child]);
    assert_eq!(good("query -p -n {}", &[&fourth]), format!("{}\n", child.display()));
    let valid = format!("{} is valid\n{} is valid\n", fourth.display(), child.display());
    assert!(good("check -p -n {} --parents {}", &[&fourth, &root]).starts_with(&valid));
    let said = vhd_util("snapshot -e -l 3 -n {} -p {} --parents {}", &[&path("fifth.vhd"), &fourth, &root]);
    assert_eq!(
        (said.code, said.out.as_str()),
        (libc::ENOSPC, "snapshot depth exceeded: current depth: 3, limit: 3\n")
    );
    assert!(!path("fifth.vhd").exists());
    good("snapshot -e -l 4 -n {} -p {} --parents {}", &[&path("fifth.vhd"), &fourth, &root]);
    let said = vhd_util("snapshot -S 50 -n {} -p {}", &[&path("sixth.vhd"), &fourth]);
    assert_eq!(said.code, libc::EINVAL, "{}", said.err);
    assert_eq!(vhd_util("snapshot -n {} -p {}", &[&path("sixth.vhd"), &path("none")]).code, libc::ENOENT);
}

#[test]
fn a_raw_image_can_be_a_parent() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let mut model: Vec<u8> = (0..5_000_000_u32).map(|i| (i / 700) as u8).collect();
    model.truncate(4_999_680);
    std::fs::write(path("disk.raw"), &model).unwrap();
    good("snapshot -m -n {} -p {}", &[&path("child.vhd"), &path("disk.raw")]);
    assert_eq!(image(&path("child.vhd")).header.unwrap().parent_uuid, Uuid::NIL);
    assert!(disk(&path("child.vhd")) == model);
    // One on a child without data is on the raw image itself.
    good("snapshot -n {} -p {}", &[&path("second.vhd"), &path("child.vhd")]);
    assert_eq!(image(&path("second.vhd")).header.unwrap().parent_uuid, Uuid::NIL);
    write(&path("second.vhd"), 2_000_384, 4096, 0xee);
    model[2_000_384..][..4096].fill(0xee);
    assert!(disk(&path("second.vhd")) == model);
    assert_eq!(good("coalesce -n {}", &[&path("second.vhd")]), "Coalesced 8 sectors\n");
    assert!(std::fs::read(path("disk.raw")).unwrap() == model);
}

#[test]
fn fields_are_set() {
    let folder = folder();
    let path = folder.path().join("image.vhd");
    good("create -n {} -s 100", &[&path]);
    good("set --debug -n {} -f hidden -v 1", &[&path]);
    good("set -n {} -f marker -v 77", &[&path]);
    assert_eq!(good("query -fm -n {}", &[&path]), "hidden: 1\nmarker: 77\n");
    assert_eq!(good("query -bf -n {}", &[&path]), "hidden: 1\n");
    good("set -n {} -f hidden -v 0", &[&path]);
    assert_eq!(good("query -fm -n {}", &[&path]), "hidden: 0\nmarker: 77\n");
    assert_eq!(good("check -n {}", &[&path]), format!("{} is valid\n", path.display()));
    let none = vhd_util("set -n /none -f hidden -v 1", &[]);
    assert_eq!((none.code, none.out.as_str()), (libc::ENOENT, "error opening /none: -2\n"));
    assert_eq!(vhd_util("set -n {} -f colour -v 1", &[&path]).code, libc::EINVAL);
}

#[test]
fn a_parent_is_changed() {
    let folder = folder();
    let root = folder.path().canonicalize().unwrap();
    let path = |name: &str| root.join(name);
    for base in ["one.vhd", "two.vhd"] {
        good("create -n {} -s 100", &[&path(base)]);
    }
    let child = path("child.vhd");
    good("snapshot -n {} -p {}", &[&child, &path("one.vhd")]);
    write(&child, 0, 4096, 5);
    good("modify --debug -p {} -n {}", &[&path("two.vhd"), &child]);
    assert_eq!(good("query -p -n {}", &[&child]), format!("{}\n", path("two.vhd").display()));
    assert_eq!(good("check -n {}", &[&child]), format!("{} is valid\n", child.display()));
    // A name that its place is too small for, and nothing else is free.
    let deep = path(&["x", "y", "z", "w"].map(|letter| letter.repeat(220)).join("/"));
    std::fs::create_dir_all(&deep).unwrap();
    let raw = deep.join("disk.raw");
    std::fs::write(&raw, vec![0; 4096]).unwrap();
    let said = vhd_util("modify -m -p {} -n {}", &[&raw, &child]);
    let line = format!("failed to set parent to '{}': -{}\n", raw.display(), libc::ENAMETOOLONG);
    assert_eq!((said.code, said.out), (libc::ENAMETOOLONG, line));
    assert_eq!(good("check -n {}", &[&child]), format!("{} is valid\n", child.display()));
    // Without blocks, there is room.
    let empty = path("empty.vhd");
    good("snapshot -n {} -p {}", &[&empty, &path("one.vhd")]);
    good("modify -m -p {} -n {}", &[&raw, &empty]);
    assert_eq!(good("query -p -n {}", &[&empty]), format!("{}\n", raw.display()));
    assert_eq!(good("check -n {}", &[&empty]), format!("{} is valid\n", empty.display()));
    let said = vhd_util("modify -p {} -n {}", &[&child, &path("one.vhd")]);
    assert_eq!(said.code, libc::EINVAL);
    assert!(said.err.contains("one.vhd: it is no differencing image"), "{}", said.err);
    assert_eq!(vhd_util("modify -n {}", &[&child]).code, libc::EINVAL);
}

#[test]
fn a_footer_moves_and_data_is_forgotten() {
    let folder = folder();
    let path = folder.path().join("image.vhd");
    good("create -n {} -s 100", &[&path]);
    write(&path, 5 * MIB, 4 * MIB, 1);
    let physical: u64 = good("query -s -n {}", &[&path]).trim().parse().unwrap();
    assert_eq!(physical, path.metadata().unwrap().len());
    let said = vhd_util(&format!("modify -s {} -n {{}}", physical - 512), &[&path]);
    assert_eq!(said.code, libc::EINVAL, "{}", said.out);
    good(&format!("modify -s {} -n {{}}", physical + 65536), &[&path]);
    assert_eq!(path.metadata().unwrap().len(), physical + 65536);
    assert_eq!(good("query -sa -n {}", &[&path]), format!("{physical}\n3\n"));
    assert_eq!(good("check -n {}", &[&path]), format!("{} is valid\n", path.display()));
    good("modify -z -n {}", &[&path]);
    assert_eq!(good("query -a -n {}", &[&path]), "0\n");
    assert_eq!(good("check -b -n {}", &[&path]), format!("{} is valid\n", path.display()));
    assert!(path.metadata().unwrap().len() < 4096 && disk(&path).iter().all(|byte| *byte == 0));
}

#[test]
fn what_an_image_names_makes_no_lines() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let forged = "p.vhd\nvhd=victim.vhd capacity=4194304 size=4194304 hidden=1 parent=none\u{1b}[2J";
    good("create -n {} -s 4", &[&path("base.vhd")]);
    good("snapshot -n {} -p {}", &[&path("a.vhd"), &path("base.vhd")]);
    let forge = image(&path("a.vhd"));
    let mut header = forge.header.unwrap().without_names();
    header.set_parent_name(forged);
    header.seal();
    change(&path("a.vhd"), forge.footer.header_at().unwrap(), header.as_bytes());
    let pattern = path("*.vhd");
    for how in ["", "-f ", "-v ", "-p ", "-a "] {
        let said = vhd_util(&format!("scan {how}-c -m {{}}"), &[&pattern]);
        assert!(
            said.out.contains("vhd=") && !said.out.lines().any(|line| line.starts_with("vhd=victim")),
            "{how}: {}",
            said.out
        );
        assert!(said.out.lines().count() <= 3 && !(said.out + &said.err).contains('\u{1b}'), "{how}");
    }
    for words in
        ["query -p -n {}", "query -p -u -n {}", "read -p -n {}", "info {}", "check -p -n {}", "coalesce -n {}"]
    {
        let said = vhd_util(words, &[&path("a.vhd")]);
        let all = said.out + &said.err;
        assert!(!all.lines().any(|line| line.starts_with("vhd=victim")) && !all.contains('\u{1b}'), "{words}: {all}");
    }
}

#[test]
fn parts_are_read() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    good("create -n {} -s 100", &[&path("base.vhd")]);
    let child = path("child.vhd");
    good("snapshot -n {} -p {}", &[&child, &path("base.vhd")]);
    write(&child, 5 * MIB, 4 * MIB, 1);
    let text = good("read --debug -p -n {}", &[&child]);
    for line in [
        "Cookie              : conectix",
        "Creator Application : 'tap'",
        "Creator version     : Major: 1, Minor: 3",
        "Current disk size   : 100 MB (104857600 Bytes)",
        "Disk type           : Differencing hard disk",
        "Hidden              : 0",
        "Table offset        : 1536",
        "Max BAT size        : 50",
        "Block size          : 2097152 (2 MB)",
        "Parent name         : base.vhd",
        "       code         : PLAT_CODE_W2RU",
        "       decoded name : ./base.vhd",
        "Batmap version      : 0x00010002",
    ] {
        assert!(text.lines().any(|found| found == line), "{line:?} in\n{text}");
    }
    assert_eq!(text.matches("(Good!)").count(), 3, "{text}");
    // Blocks 2, 3 and 4 of 50.
    let mut command = tool("vhd-util");
    let read = command.args(["read", "-B", "-n"]).arg(&child).output().unwrap();
    assert_eq!(read.stdout, [0b0011_1000, 0, 0, 0, 0, 0, 0]);
    let place = image(&child).table.get(2).unwrap();
    let shown = good("read -b 1 -c 2 -n {}", &[&child]);
    assert_eq!(shown, format!("block: 1: offset: not allocated\nblock: 2: offset: {place}\n"));
    assert_eq!(good("read -x -b 2 -n {}", &[&child]), format!("block: 0x2: offset: {place:#x}\n"));
    assert_eq!(vhd_util("read -b 50 -n {}", &[&child]).code, libc::ERANGE);
    // Runs of sectors, within blocks and over their ends.
    write(&child, 20 * MIB - 512, 1024, 2);
    assert_eq!(good("read -e 0 -c 204800 -n {}", &[&child]), "10240 8192\n40959 2\n");
    assert_eq!(good("read -C -x -e 18431 -c 22529 -n {}", &[&child]), "0x47ff 0x1\n0x9fff 0x1\n");
    assert_eq!(vhd_util("read -e 204800 -n {}", &[&child]).code, libc::ERANGE);
    // Bytes, from within a sector of one block to within one of the next.
    let from = 20 * MIB - 514;
    let read = tool("vhd-util").args(["read", "-c", "1028", "-R", &from.to_string(), "-n"]).arg(&child).output();
    assert_eq!(read.unwrap().stdout, [&[0; 2][..], &[2; 1024], &[0; 2]].concat());
    assert_eq!(good("read -c 3 -R 5242880 -n {}", &[&child]), "\x01\x01\x01");
    assert_eq!(vhd_util("read -c 2 -R 104857599 -n {}", &[&child]).code, libc::ERANGE);
    let said = vhd_util("read -p -n /none", &[]);
    assert_eq!((said.code, said.out.as_str()), (libc::ENOENT, "Failed to open /none: -2\n"));
}

#[test]
fn images_are_listed() {
    let folder = folder();
    let root = folder.path().canonicalize().unwrap();
    let path = |name: &str| root.join(name);
    good("create -n {} -s 100", &[&path("b.vhd")]);
    good("set -n {} -f hidden -v 1", &[&path("b.vhd")]);
    good("snapshot -n {} -p {}", &[&path("a.vhd"), &path("b.vhd")]);
    std::fs::create_dir(path("sub")).unwrap();
    good("create -r -n {} -s 2", &[&path("sub/c.vhd")]);
    let size = |name: &str| path(name).metadata().unwrap().len();
    let a = format!("vhd=a.vhd capacity=104857600 size={} hidden=0 parent=b.vhd\n", size("a.vhd"));
    let b = format!("vhd=b.vhd capacity=104857600 size={} hidden=1 parent=none\n", size("b.vhd"));
    let c = "vhd=c.vhd capacity=2097152 size=2097664 hidden=0 parent=none\n";
    for words in ["scan -f -m {}", "scan -m {}", "scan --debug -f -c -m {}"] {
        assert_eq!(good(words, &[&path("*.vhd")]), format!("{a}{b}"), "{words}");
    }
    assert_eq!(good("scan -f -m {}", &[&path("{sub/c,b}.vhd")]), format!("{c}{b}"));
    assert_eq!(good("scan -f -a {}", &[&path("a.vhd")]), format!("{a}{b}"));
    assert_eq!(good("scan -p -m {}", &[&path("*.vhd")]), format!("{b}   {a}"));
    let alone = a.replace("b.vhd", "b.vhd (not found in scan)");
    assert_eq!(good("scan -p {}", &[&path("a.vhd")]), alone);
    let verbose = format!("vhd={} capacity", path("sub/c.vhd").display());
    assert!(good("scan -v {}", &[&path("sub/c.vhd")]).starts_with(&verbose));
    assert!(good("scan -M {}", &[&path("b.vhd")]).contains(" hidden=1 marker=0 keyhash= parent=none"));
    assert_eq!(good("scan -f -m {}", &[&path("*.iso")]), "");
    // Something else among them.
    std::fs::write(path("aa.vhd"), "no image").unwrap();
    let bad = format!("vhd={} scan-error=-22 error-message='opening file'\n", path("aa.vhd").display());
    let said = vhd_util("scan -f -m {}", &[&path("*.vhd")]);
    assert_eq!((said.code, said.out), (libc::EINVAL, format!("{a}{bad}")));
    let said = vhd_util("scan -f -c -m {}", &[&path("*.vhd")]);
    assert_eq!((said.code, said.out), (0, format!("{a}{bad}{b}")));
    let said = vhd_util("scan -f -m {}", &[&path("none/*.vhd")]);
    let line =
        format!("vhd={} scan-error=-2 error-message='failure scanning target'\n", path("none/*.vhd").display());
    assert_eq!((said.code, said.out), (libc::ENOENT, line));
}

#[test]
fn keys_are_known_by_their_hash() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let (image, key) = (path("disk.vhd"), path("disk,aes-xts-plain,256.key"));
    good("create -n {} -s 100", &[&image]);
    assert_eq!(good("key -p -n {}", &[&image]), "none\n");
    std::fs::write(&key, [0x5a; 32]).unwrap();
    let nonce = "01".repeat(32);
    let hash = good(&format!("key -C -k {{}} -N {nonce}"), &[&key]);
    std::fs::write(path("both"), [[1; 32], [0x5a; 32]].concat()).unwrap();
    let sum = run(Command::new("sha256sum").arg(path("both")));
    assert_eq!(sum.split(' ').next(), Some(hash.trim()));
    good(&format!("key -s -n {{}} -k {{}} -N {nonce}"), &[&image, &key]);
    assert_eq!(good("key -p -n {}", &[&image]), format!("{nonce} {hash}"));
    good("key -c -n {} -k {}", &[&image, &key]);
    std::fs::write(&key, [0x5b; 32]).unwrap();
    assert_eq!(vhd_util("key -c -n {} -k {}", &[&image, &key]).code, libc::EINVAL);
    std::fs::write(&key, [0x5b; 31]).unwrap();
    assert!(vhd_util("key -s -n {} -k {}", &[&image, &key]).err.contains("it has 31 bytes"));
    // As the storage manager sets one; children have it, too.
    let set = format!("key -s -n {{}} -H {}", "Ab".repeat(32));
    good(&set, &[&image]);
    assert_eq!(good("key -p -n {}", &[&image]), format!("{} {}\n", "00".repeat(32), "ab".repeat(32)));
    good("set -n {} -f hidden -v 1", &[&image]);
    good("snapshot -n {} -p {}", &[&path("child.vhd"), &image]);
    assert!(good("key -p -n {}", &[&path("child.vhd")]).ends_with(&format!("{}\n", "ab".repeat(32))));
    assert_eq!(vhd_util("key -s -n {} -H 12", &[&image]).code, libc::EINVAL);
    let said = vhd_util("convert --to raw {} {}", &[&image, &path("disk.raw")]);
    assert!(said.code == libc::EOPNOTSUPP && said.err.contains("disk.vhd: it is encrypted"), "{}", said.err);
    good("snapshot -e -n {} -p {}", &[&path("other.vhd"), &image]);
    good(&format!("key -s -n {{}} -H {}", "cd".repeat(32)), &[&path("other.vhd")]);
    let said = vhd_util("coalesce -n {}", &[&path("other.vhd")]);
    assert!(said.code == libc::EINVAL && said.err.contains("not encrypted with the same key"), "{}", said.err);
    write(&image, 0, 512, 1);
    assert!(vhd_util(&set, &[&image]).err.contains("it has data already"));
}

#[test]
fn an_image_in_use_is_left_alone() {
    let folder = folder();
    let (path, child) = (folder.path().join("image.vhd"), folder.path().join("child.vhd"));
    good("create -n {} -s 100", &[&path]);
    good("snapshot -n {} -p {}", &[&child, &path]);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let lock = tapdisk::store::lock(&tapdisk::blocking::Blocking::before_main_loop(), file, &path, false).unwrap();
    let before = std::fs::read(&path).unwrap();
    for words in [
        "modify -z -n {}",
        "modify -s 1000000000 -n {}",
        "set -n {} -f marker -v 1",
        "resize -f -s 100 -n {}",
        "repair -n {}",
        "key -s -n {} -H 00",
        "coalesce -n {}",
        "convert --to raw {} /none/none",
    ] {
        let words = if words.starts_with("key") { words.replace("00", &"00".repeat(32)) } else { words.to_owned() };
        let said = vhd_util(&words, &[if words.starts_with("coalesce") { &child } else { &path }]);
        assert_eq!(said.code, libc::EBUSY, "{words}: {} {}", said.out, said.err);
        assert!(said.err.contains("image.vhd: in use by process"), "{words}: {}", said.err);
    }
    assert_eq!(std::fs::read(&path).unwrap(), before);
    // To look at it is possible, and what its tapdisk bears: see tapdisk::vhd.
    good("check -n {}", &[&path]);
    good("set -n {} -f hidden -v 1", &[&path]);
    assert_eq!(good("query -f -n {}", &[&path]), "hidden: 1\n");
    drop(lock);
    good("set -n {} -f hidden -v 0", &[&path]);
    good("check -n {}", &[&path]);
}

#[test]
fn a_copy_of_the_footer_is_enough_to_change_an_image() {
    let folder = folder();
    let path = folder.path().join("image.vhd");
    good("create -n {} -s 100", &[&path]);
    write(&path, 5 * MIB, 4096, 1);
    let before = disk(&path);
    // As blktap leaves an image that was in use when the host stopped.
    let end = path.metadata().unwrap().len() - 512;
    change(&path, end, &[0xc7; 512]);
    assert_eq!(good("query -bf -n {}", &[&path]), "hidden: 0\n");
    good("set -n {} -f hidden -v 1", &[&path]);
    assert_eq!(good("check -b -n {}", &[&path]), format!("{} is valid\n", path.display()));
    assert!(disk(&path) == before);
}
