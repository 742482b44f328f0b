//! `vhd-util`: disks grow, are merged and converted, and keep their content.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::common::PATIENCE;
use crate::common::live::BOTH;
use crate::common::served::{Served, folder, run, tool};
use crate::common::vhd::{disk, good, image, vhd_util, write};
use drivers::vhd::Kind;
use fastrand::Rng;

const MIB: u64 = 1 << 20;

fn valid(path: &Path) -> String {
    format!("{} is valid\n", path.display())
}

/// Writes random runs of sectors to an image and to what the disk is to be.
fn scribble(random: &mut Rng, path: &Path, model: &mut [u8], count: u32) {
    for _ in 0..count {
        let sectors = model.len() as u64 / 512;
        let at = random.u64(0..sectors) * 512;
        let len = (random.u64(1..6000) * 512).min(model.len() as u64 - at);
        let byte = random.u8(..);
        write(path, at, len, byte);
        model[at as usize..(at + len) as usize].fill(byte);
    }
}

fn qemu_compare(vhd: &Path, raw: &Path) {
    run(Command::new("qemu-img").args(["compare", "-q", "-f", "vpc", "-F", "raw"]).arg(vhd).arg(raw));
}

#[test]
fn raw_disks_become_vhd_and_back() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let mut random = Rng::with_seed(3);
    // Whole blocks, sectors more, and a size that is no sectors.
    for (i, size) in [64 << 20, (30 << 20) + 1536, (3 << 20) + 100].into_iter().enumerate() {
        let [raw, vhd, back] = ["raw", "vhd", "back"].map(|kind| path(&format!("{i}.{kind}")));
        let mut model = vec![0; size];
        for _ in 0..5 {
            let at = random.usize(0..size - 70_000);
            model[at..at + random.usize(1..70_000)].fill_with(|| random.u8(..));
        }
        std::fs::write(&raw, &model).unwrap();
        assert_eq!(good("convert --to vhd {} {}", &[&raw, &vhd]), "");
        assert_eq!(good("check -b -n {}", &[&vhd]), valid(&vhd));
        assert!(vhd.metadata().unwrap().len() < 30 * MIB);
        good("convert --to raw {} {}", &[&vhd, &back]);
        model.resize(size.next_multiple_of(512), 0);
        assert!(std::fs::read(&back).unwrap() == model, "{size}");
        if size.is_multiple_of(512) {
            qemu_compare(&vhd, &raw);
        }
    }
    use std::os::unix::fs::MetadataExt;
    assert!(path("0.back").metadata().unwrap().blocks() * 512 < 2 * MIB, "zeros were written");
}

#[test]
fn images_of_qemu_are_converted() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    for (name, options) in [("dynamic", "force_size=on"), ("fixed", "force_size=on,subformat=fixed"), ("vpc", "")] {
        let [vhd, raw, again] = ["vhd", "raw", "again"].map(|kind| path(&format!("{name}.{kind}")));
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "vpc"]);
        if !options.is_empty() {
            create.args(["-o", options]);
        }
        run(create.arg(&vhd).arg("64M"));
        run(Command::new("qemu-io").args(["-f", "vpc", "-c", "write -q -P 9 3M 5M"]).arg(&vhd));
        good("convert --to raw {} {}", &[&vhd, &raw]);
        qemu_compare(&vhd, &raw);
        good("convert --from vhd --to vhd {} {}", &[&vhd, &again]);
        qemu_compare(&again, &raw);
    }
}

#[test]
fn an_image_without_a_parent_is_copied() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    for (name, options) in [("dynamic", ""), ("fixed", " -r")] {
        let [original, copy] = ["vhd", "copy"].map(|kind| path(&format!("{name}.{kind}")));
        good(&format!("create -n {{}} -s 64{options}"), &[&original]);
        run(Command::new("qemu-io").args(["-f", "vpc", "-c", "write -q -P 9 3M 5M"]).arg(&original));
        good("copy -n {} -N {}", &[&original, &copy]);
        let compared = ["compare", "-q", "-f", "vpc", "-F", "vpc"];
        run(Command::new("qemu-img").args(compared).arg(&original).arg(&copy));
        assert_eq!(good("check -b -n {}", &[&copy]), valid(&copy));
        let kind = |path: &Path| image(path).kind;
        assert_eq!((kind(&copy), disk(&copy).len()), (kind(&original), 64 << 20));
        assert_ne!(image(&copy).footer.uuid, image(&original).footer.uuid);
        assert_eq!(vhd_util("copy -n {} -N {}", &[&original, &copy]).code, libc::EEXIST);
    }
    let [child, copy] = ["child", "copy"].map(path);
    good("snapshot -n {} -p {}", &[&child, &path("dynamic.vhd")]);
    for (options, errno, words) in [
        ("", libc::EINVAL, "convert --from vhd --to vhd copies the whole disk"),
        (" -k /etc/hostname", libc::EOPNOTSUPP, "no encrypted image is written"),
        (" -E", libc::EOPNOTSUPP, "no encrypted image is written"),
    ] {
        let said = vhd_util(&format!("copy -n {{}} -N {{}}{options}"), &[&child, &copy]);
        assert!(said.code == errno && said.err.contains(words) && !copy.exists(), "{options}: {}", said.err);
    }
}

#[test]
fn a_filled_image_holds_all_of_its_disk() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let mut random = Rng::with_seed(12);
    let mut model = vec![0; 40 << 20];
    let [base, leaf, empty] = ["base.vhd", "leaf.vhd", "empty.vhd"].map(path);
    good("create -n {} -s 40", &[&base]);
    scribble(&mut random, &base, &mut model, 8);
    good("snapshot -n {} -p {}", &[&leaf, &base]);
    scribble(&mut random, &leaf, &mut model, 8);
    let said = vhd_util("fill -b -n {}", &[&leaf]);
    assert!(said.code == libc::EINVAL && said.err.contains("has a parent"), "{}", said.err);
    // A signal at some moment leaves a good image, and what it holds; a kill, too.
    for (signal, code) in [("INT", Some(libc::EINTR)), ("KILL", None)] {
        let mut command = Command::new("timeout");
        command.args(["-s", signal, "0.02"]).arg(tool("vhd-util").get_program()).args(["fill", "-n"]).arg(&leaf);
        let ended = command.output().unwrap().status.code();
        assert!([code, Some(0), Some(124), Some(137)].contains(&ended), "{ended:?}");
        assert!(disk(&leaf) == model, "{signal}");
    }
    good("fill -n {}", &[&leaf]);
    assert!(disk(&leaf) == model);
    assert_eq!(good("check -b -p -n {}", &[&leaf]), valid(&leaf) + &valid(&base));
    assert_eq!(good("read -e 0 -c 81920 -n {}", &[&leaf]), "0 81920\n");
    let before = std::fs::read(&leaf).unwrap();
    good("fill -n {}", &[&leaf]);
    assert!(std::fs::read(&leaf).unwrap() == before, "it was full");
    // Blocks alone: some of them, and the rest.
    good("create -n {} -s 40", &[&empty]);
    good("fill -b -f 4096 -t 8192 -n {}", &[&empty]);
    assert_eq!(good("read -e 0 -c 81920 -n {}", &[&empty]), "4096 8192\n");
    good("fill -b -n {}", &[&empty]);
    assert_eq!(good("read -e 0 -c 81920 -n {}", &[&empty]), "0 81920\n");
    assert_eq!(good("check -b -n {}", &[&empty]), valid(&empty));
    assert!(disk(&empty).iter().all(|byte| *byte == 0));
    for (wrong, code) in [("-b -f 8192 -t 4096", libc::EINVAL), ("-b -t 81920", libc::ERANGE), ("-f 1", libc::EINVAL)]
    {
        assert_eq!(vhd_util(&format!("fill {wrong} -n {{}}"), &[&empty]).code, code, "{wrong}");
    }
}

#[test]
fn what_is_converted_is_never_guessed() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    // A guest's disk that looks like an image.
    good("create -n {} -s 2", &[&path("guest.raw")]);
    good("convert --to vhd {} {}", &[&path("guest.raw"), &path("guest.vhd")]);
    let read = disk(&path("guest.vhd"));
    assert!(read.starts_with(&std::fs::read(path("guest.raw")).unwrap()));
    std::fs::write(path("no.vhd"), vec![0; 4096]).unwrap();
    let said = vhd_util("convert --to raw {} {}", &[&path("no.vhd"), &path("no.raw")]);
    assert_eq!((said.code, path("no.raw").exists()), (libc::EINVAL, false), "{}", said.err);
    assert_eq!(vhd_util("convert --to vhd {} {}", &[&path("none"), &path("no.raw")]).code, libc::ENOENT);
}

#[test]
fn a_convert_that_is_interrupted_leaves_nothing_or_all() {
    let folder = folder();
    let [raw, target] = ["raw", "target"].map(|name| folder.path().join(name));
    std::fs::write(&raw, vec![0x5a; 200 << 20]).unwrap();
    let mut child = tool("vhd-util").args(["convert", "--to", "vhd"]).arg(&raw).arg(&target).spawn().unwrap();
    let end = Instant::now() + PATIENCE;
    while !target.exists() && Instant::now() < end {
        std::thread::yield_now();
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::Signal::SIGINT).unwrap();
    match child.wait().unwrap().code() {
        Some(0) => assert_eq!(good("check -n {}", &[&target]), valid(&target)),
        code => assert_eq!((code, target.exists()), (Some(libc::EINTR), false)),
    }
}

#[test]
fn chains_are_converted_and_merged() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let mut random = Rng::with_seed(11);
    let mut model = vec![0; 40 << 20];
    let images = ["base.vhd", "middle.vhd", "leaf.vhd"].map(path);
    good("create -n {} -s 40", &[&images[0]]);
    scribble(&mut random, &images[0], &mut model, 8);
    for i in 1..3 {
        good("snapshot -n {} -p {}", &[&images[i], &images[i - 1]]);
        scribble(&mut random, &images[i], &mut model, 8);
        assert!(disk(&images[i]) == model, "{i}");
    }
    assert_eq!(good("check -b -n {}", &[&images[2]]), valid(&images[2]));
    let shown = good("check -s -p -n {}", &[&images[2]]);
    assert!(shown.starts_with("leaf.vhd: secs allocated: 0x") && shown.contains("secs not in ancestors"), "{shown}");
    // The middle into the base, and then the leaf into that: the leaf's disk stays what it is.
    for merged in [1, 2] {
        let held = held(&images[merged]);
        let said = good("coalesce --debug -n {}", &[&images[merged]]);
        assert_eq!(said, format!("Coalesced {held} sectors\n"));
        assert!(disk(&images[2]) == model);
        assert_eq!(good("check -b -n {}", &[&images[merged - 1]]), valid(&images[merged - 1]));
        if merged == 1 {
            good("modify -p {} -n {}", &[&images[0], &images[2]]);
            // From now on it is the leaf's parent.
            std::fs::rename(&images[0], &images[1]).unwrap();
            good("modify -p {} -n {}", &[&images[1], &images[2]]);
        }
    }
    assert!(disk(&images[1]) == model);
    // Again, as after an interruption.
    let again = good("coalesce -p -n {}", &[&images[2]]);
    assert!(again.contains("100.00%\nCoalesced "), "{again}");
    assert!(disk(&images[1]) == model);
}

/// Sectors that an image itself holds.
fn held(path: &Path) -> u64 {
    let image = image(path);
    let header = image.header.unwrap();
    let count = image.table.allocated().map(|(_, at)| {
        let bits = crate::common::vhd::bytes(path, at, header.bitmap_size() as usize);
        bits.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>()
    });
    count.sum()
}

#[test]
fn a_fixed_parent_is_merged_into_and_a_small_one_refused() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    good("create -r -n {} -s 10", &[&path("fixed.vhd")]);
    good("snapshot -n {} -p {}", &[&path("child.vhd"), &path("fixed.vhd")]);
    write(&path("child.vhd"), 9 * MIB, MIB, 3);
    let before = disk(&path("child.vhd"));
    assert_eq!(good("coalesce -n {}", &[&path("child.vhd")]), "Coalesced 2048 sectors\n");
    assert!(disk(&path("fixed.vhd")) == before);
    assert_eq!(good("check -n {}", &[&path("fixed.vhd")]), valid(&path("fixed.vhd")));
    let journal = path("journal");
    good("resize -s 20 -n {} -j {}", &[&path("child.vhd"), &journal]);
    good("coalesce -n {}", &[&path("child.vhd")]);
    write(&path("child.vhd"), 12 * MIB, MIB, 3);
    let said = vhd_util("coalesce -n {}", &[&path("child.vhd")]);
    assert_eq!((said.code, said.out.as_str()), (libc::ERANGE, "error coalescing: -34\n"));
    assert!(said.err.contains("its child has data up to byte 13631488: resize it first"), "{}", said.err);
    good("resize -s 20 -n {} -j {}", &[&path("fixed.vhd"), &journal]);
    good("coalesce -n {}", &[&path("child.vhd")]);
    assert!(disk(&path("fixed.vhd")) == disk(&path("child.vhd")) && !journal.exists());
    let said = vhd_util("coalesce -n {}", &[&path("fixed.vhd")]);
    assert_eq!((said.code, said.out.as_str()), (libc::EINVAL, "error coalescing: -22\n"));
    assert_eq!(image(&path("fixed.vhd")).kind, Kind::Fixed);
}

#[test]
fn disks_grow_and_keep_their_content() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let mut random = Rng::with_seed(5);
    let (base, child, journal) = (path("base.vhd"), path("child.vhd"), path("journal"));
    let mut model = vec![0; 40 << 20];
    good("create -n {} -s 40", &[&base]);
    scribble(&mut random, &base, &mut model, 5);
    good("snapshot -n {} -p {} -S 100", &[&child, &base]);
    scribble(&mut random, &child, &mut model, 5);
    // Where there is room, and where blocks have to go: the table alone takes two of them.
    for (words, paths, size) in [
        ("resize --debug -f -n {} -s 99", vec![child.as_path()], 100),
        ("resize --debug -n {} -j {} -s 2088960", vec![&child, &journal], 2_088_960),
    ] {
        good(words, &paths);
        let shown = good("query -vp -n {}", &[&child]);
        assert_eq!(shown, format!("{size}\n{}\n", base.canonicalize().unwrap().display()));
        assert_eq!(good("check -b -n {}", &[&child]), valid(&child));
        assert!(!journal.exists());
        let qemu = run(Command::new("qemu-img").args(["info", "-f", "vpc"]).arg(&base));
        assert!(qemu.contains("virtual size: 40 MiB"), "{qemu}");
    }
    let raw = path("raw");
    good("convert --to raw {} {}", &[&child, &raw]);
    assert_eq!(raw.metadata().unwrap().len(), 2_088_960 << 20);
    assert!(crate::common::vhd::bytes(&raw, 0, model.len()) == model);
    for (words, code, out) in [
        ("resize -f -n {} -s 50", libc::EINVAL, format!("{}: size (52428800) < curr size (", child.display())),
        ("resize -n {} -j {} -s 50", libc::ENOSYS, "resize failed: -38\n".to_owned()),
        ("resize -f -n {} -s 2088962", libc::EINVAL, String::new()),
        ("resize -n {} -j {} -s 2097152", libc::EFBIG, String::new()),
    ] {
        let said = vhd_util(words, &[&child, &journal]);
        assert_eq!(said.code, code, "{words}: {}{}", said.out, said.err);
        assert!(said.out.starts_with(&out) && !journal.exists(), "{words}: {}", said.out);
    }
    let qemu = path("qemu.vhd");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "vpc"]).arg(&qemu).arg("64M"));
    let said = vhd_util("resize -f -n {} -s 100", &[&qemu]);
    let line = format!("{} not created by xen; resize not supported\n", qemu.display());
    assert_eq!((said.code, said.out), (libc::EINVAL, line));
}

#[test]
fn a_block_that_the_disk_ended_in_is_not_full_any_more() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let (raw, journal) = (path("raw"), path("journal"));
    std::fs::write(&raw, vec![7; 3 << 20]).unwrap();
    for (name, words, size) in [("fast", "resize -f -s 4 -n {}", 4), ("far", "resize -s 520 -n {} -j {}", 520)] {
        let vhd = path(name);
        good("convert --to vhd {} {}", &[&raw, &vhd]);
        good(words, &[&vhd, &journal]);
        assert_eq!(good("check -b -n {}", &[&vhd]), valid(&vhd));
        assert_eq!(good("query -v -n {}", &[&vhd]), format!("{size}\n"));
        // A child of it reads what it did not write from there.
        let child = path(&format!("{name}.child"));
        good("snapshot -n {} -p {}", &[&child, &vhd]);
        write(&child, 3 * MIB - 512, 1024, 8);
        let mut expected = vec![7; 3 << 20];
        expected.resize(size << 20, 0);
        expected[(3 << 20) - 512..][..1024].fill(8);
        assert!(disk(&child) == expected);
    }
}

#[test]
fn a_resize_that_is_killed_is_reverted() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let (disk_path, journal) = (path("disk.vhd"), path("journal"));
    let mut model = vec![0; 40 << 20];
    good("create -n {} -s 40", &[&disk_path]);
    scribble(&mut Rng::with_seed(6), &disk_path, &mut model, 5);
    let before = std::fs::read(&disk_path).unwrap();
    // The kernel kills it when the file gets larger than this: in the middle of the first block that moves.
    let limit = before.len() as u64 + MIB;
    let mut limited = Command::new("prlimit");
    limited.args([format!("--fsize={limit}"), "--core=0".into()]).arg(tool("vhd-util").get_program());
    let status = limited.args(["resize", "-s", "1000000", "-n"]).arg(&disk_path).arg("-j").arg(&journal).status();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status.unwrap()), Some(libc::SIGXFSZ));
    assert!(journal.exists() && std::fs::read(&disk_path).unwrap() != before);
    // Nobody uses the image, and the journal must not be used for another one, nor be written over.
    for command in
        ["resize -s 1000000 -n {} -j {}", "check -n {}", "modify -z -n {}", "coalesce -n {}", "repair -n {}"]
    {
        let paths: [&Path; 2] = [&disk_path, &journal];
        let said = vhd_util(command, &paths[..command.matches("{}").count()]);
        let text = said.out + &said.err;
        assert!(said.code == libc::EINVAL && text.contains("vhd-util revert"), "{command}: {} {text}", said.code);
    }
    let (_, text) = Served::refused(&format!("path = '{}'\ntype = 'vhd'", disk_path.display()), BOTH);
    assert!(text.contains("vhd-util revert"), "{text}");
    assert_eq!(good("query -v -n {}", &[&disk_path]), "40\n", "who has to revert it asks what it is");
    good("create -n {} -s 40", &[&path("other.vhd")]);
    let said = vhd_util("resize -s 1000000 -n {} -j {}", &[&path("other.vhd"), &journal]);
    assert_eq!((said.code, said.out.as_str()), (libc::EEXIST, "creating journal failed: -17\n"));
    assert!(said.err.contains("run vhd-util revert first"), "{}", said.err);
    let said = vhd_util("revert -n {} -j {}", &[&path("other.vhd"), &journal]);
    assert_eq!((said.code, said.out.as_str()), (libc::EINVAL, "opening journal failed: -22\n"));
    assert_eq!(good("revert --debug -n {} -j {}", &[&disk_path, &journal]), "");
    assert!(std::fs::read(&disk_path).unwrap() == before && !journal.exists());
    // A file that is no journal is left alone.
    std::fs::write(&journal, vec![1; 4096]).unwrap();
    assert_eq!(vhd_util("revert -n {} -j {}", &[&disk_path, &journal]).code, libc::EINVAL);
    assert!(std::fs::read(&disk_path).unwrap() == before && journal.exists());
    assert!(disk(&disk_path) == model);
}
