//! VHD images served to real clients: dynamic, fixed and differencing, made by qemu-img and read by it afterwards.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::guest::Guest;
use crate::common::served::{Served, folder, output, run, tool};
use crate::common::small_fs::{Loop, SmallFs};
use crate::common::vhd_made::{self as vhd, KINDS, Parent, content, stop, table};
use drivers::vhd::{FOOTER_SIZE, Uuid};
use nix::sys::signal::Signal;

const BOTH: &str = "[frontend.local]\nsocket = '{s}/ring'\n[frontend.nbd]\nsocket = '{s}/nbd'\n";
const MIB: u64 = 1 << 20;
/// Sectors of a block.
const BLOCK: u64 = 4096;

fn start(path: &Path) -> Served {
    Served::start(&table(path), BOTH)
}

/// nbdsh is Debian's, and so must be the Python that it finds.
fn nbdsh(served: &Served, script: &str) {
    run(Command::new("nbdsh").env("PATH", "/usr/bin:/bin").args(["-u", &served.nbd(), "-c", script]));
}

/// Bytes that look like nothing, some of them zeros.
fn bytes(seed: u64, len: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; len as usize];
    for run in bytes.chunks_mut(96 << 10) {
        if random.bool() {
            run.fill_with(|| random.u8(..));
        }
    }
    bytes
}

/// qemu-img finds these bytes in the image.
fn qemu_agrees(image: &Path, expected: &[u8]) {
    let raw = image.with_extension("raw");
    std::fs::write(&raw, expected).unwrap();
    run(Command::new("qemu-img").args(["compare", "-f", "vpc", "-F", "raw"]).arg(image).arg(&raw));
    let copy = image.with_extension("copy");
    run(Command::new("qemu-img").args(["convert", "-f", "vpc", "-O", "raw"]).arg(image).arg(&copy));
    assert!(std::fs::read(&copy).unwrap() == expected, "{} by qemu-img convert", image.display());
}

#[test]
fn what_fio_writes_is_what_qemu_img_reads() {
    for kind in ["dynamic", "fixed"] {
        for durability in ["flush", "order"] {
            let folder = folder();
            let path = vhd::make(folder.path(), kind);
            let served = Served::start(&format!("{}\ndurability = '{durability}'", table(&path)), BOTH);
            run(Command::new("fio")
                .args(["--name=v", "--rw=randwrite", "--bsrange=512-256k", "--blockalign=512", "--do_verify=1"])
                .args(["--ioengine=nbd", "--iodepth=32", "--size=64m", "--io_size=32m", "--fsync=64"])
                .args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"])
                .arg(format!("--uri={}", served.nbd())));
            let expected = content(&served, folder.path());
            assert_eq!(expected.len() as u64, 64 * MIB);
            stop(served, &path);
            qemu_agrees(&path, &expected);
        }
    }
}

#[test]
fn what_qemu_wrote_is_read_and_written_again() {
    for kind in ["dynamic", "fixed"] {
        let folder = folder();
        let (path, raw) = (folder.path().join("disk.vhd"), folder.path().join("source.raw"));
        let first = bytes(1, 24 * MIB);
        std::fs::write(&raw, &first).unwrap();
        let options = format!("force_size=on,subformat={kind}");
        run(Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "vpc", "-o", &options])
            .arg(&raw)
            .arg(&path));
        run(Command::new("qemu-io").args(["-f", "vpc", "-c", "write -q -P 0x5a 3M 70k"]).arg(&path));
        let served = start(&path);
        let mut expected = first;
        expected[3 << 20..][..70 << 10].fill(0x5a);
        assert!(content(&served, folder.path()) == expected, "{kind}");
        let second = bytes(2, 24 * MIB);
        std::fs::write(&raw, &second).unwrap();
        run(Command::new("nbdcopy").args(["--flush"]).arg(&raw).arg(served.nbd()));
        assert!(content(&served, folder.path()) == second, "{kind}, written again");
        stop(served, &path);
        qemu_agrees(&path, &second);
        let served = start(&path);
        assert!(content(&served, folder.path()) == second, "{kind}, opened again");
    }
}

/// An ext4 file system with some files.
fn file_system(folder: &Path) -> PathBuf {
    let tree = folder.join("tree");
    std::fs::create_dir(&tree).unwrap();
    for file in 0..40u64 {
        std::fs::write(tree.join(format!("f{file}")), bytes(file, file * file * 500)).unwrap();
    }
    let image = folder.join("fs.img");
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg("64m"));
    image
}

#[test]
fn a_file_system_is_put_in_changed_and_clean() {
    let folder = folder();
    let fs = file_system(folder.path());
    let script = folder.path().join("script");
    let new = folder.path().join("new");
    std::fs::write(&new, bytes(99, 700_000)).unwrap();
    std::fs::write(&script, format!("write {} new\nrm f7\nmkdir dir\n", new.display())).unwrap();
    for kind in KINDS {
        let path = vhd::make(folder.path(), kind);
        let served = start(&path);
        if kind == "fixed" {
            run(Command::new("nbdcopy").args(["--flush"]).arg(&fs).arg(served.nbd()));
        } else {
            run(Command::new("qemu-img")
                .args(["convert", "-n", "-f", "raw", "-O", "raw"])
                .arg(&fs)
                .arg(served.nbd()));
        }
        let copy = folder.path().join("copy");
        std::fs::write(&copy, content(&served, folder.path())).unwrap();
        assert!(std::fs::read(&copy).unwrap() == std::fs::read(&fs).unwrap(), "{kind}");
        run(Command::new("debugfs").args(["-w", "-f"]).arg(&script).arg(&copy));
        run(Command::new("nbdcopy").args(["--flush"]).arg(&copy).arg(served.nbd()));
        stop(served, &path);
        let served = start(&path);
        std::fs::write(&copy, content(&served, folder.path())).unwrap();
        let check = output(Command::new("e2fsck").args(["-f", "-n"]).arg(&copy));
        assert!(check.status.success(), "{kind}: {}", String::from_utf8_lossy(&check.stdout));
        let out = folder.path().join("out");
        run(Command::new("debugfs").arg("-R").arg(format!("dump new {}", out.display())).arg(&copy));
        assert!(std::fs::read(&out).unwrap() == std::fs::read(&new).unwrap(), "{kind}");
        stop(served, &path);
    }
}

#[test]
fn a_chain_of_thirty_shows_the_newest_of_each_sector() {
    let folder = folder();
    let mut path = folder.path().join("0.vhd");
    vhd::create(&path, "dynamic", 16);
    let mut random = fastrand::Rng::with_seed(30);
    let mut model = vec![0; 16 << 20];
    for layer in 0..30u8 {
        if layer > 0 {
            let next = folder.path().join(format!("{layer}.vhd"));
            vhd::snapshot(&next, layer, &path);
            path = next;
        }
        let served = start(&path);
        let mut guest = Guest::connect(&served.ring());
        for _ in 0..40 {
            let sectors = random.u64(1..80);
            let sector = random.u64(..16 * 2048 - sectors);
            let data = vec![random.u8(1..); sectors as usize * 512];
            assert_eq!(guest.write(sector, &data), 0);
            model[sector as usize * 512..][..data.len()].copy_from_slice(&data);
        }
        if layer % 10 == 9 {
            assert!(content(&served, folder.path()) == model, "layer {layer}");
        }
        drop(guest);
        stop(served, &path);
    }
    // Random reads go through all of it, too, with room for few bitmaps.
    let served = Served::start(&format!("{}\nread_only = true\nbitmap_cache = '64 KiB'", table(&path)), BOTH);
    let mut guest = Guest::connect(&served.ring());
    for _ in 0..500 {
        let sectors = random.u64(1..80);
        let sector = random.u64(..16 * 2048 - sectors);
        let expected = &model[sector as usize * 512..][..sectors as usize * 512];
        assert!(guest.read(sector, expected.len()).as_deref() == Ok(expected), "sector {sector}, {sectors} of them");
    }
    let (text, code) = vhd::check(&path, &["-p"]);
    assert_eq!((text.lines().count(), code), (30, 0), "{text}");
}

/// Length in KiB and type (0: data, 3: a hole that reads as zeros) of each part that nbdinfo sees.
fn map(served: &Served) -> Vec<(u64, u64)> {
    let json = run(Command::new("nbdinfo").args(["--map", "--json", &served.nbd()]));
    let map: serde_json::Value = serde_json::from_str(&json).unwrap();
    let number = |part: &serde_json::Value, key: &str| part[key].as_u64().unwrap();
    map.as_array().unwrap().iter().map(|part| (number(part, "length") >> 10, number(part, "type"))).collect()
}

#[test]
fn clients_are_told_what_is_data_in_the_whole_chain() {
    let folder = folder();
    let (base, leaf) = (folder.path().join("base.vhd"), folder.path().join("leaf.vhd"));
    vhd::create(&base, "dynamic", 64);
    let served = start(&base);
    assert_eq!(map(&served), [(64 << 10, 3)]);
    nbdsh(&served, "h.pwrite(b'a' * 4096, 4 << 20)");
    assert_eq!(map(&served), [(4 << 10, 3), (2 << 10, 0), (58 << 10, 3)], "a block is there as a whole");
    stop(served, &base);
    vhd::snapshot(&leaf, 2, &base);
    let served = start(&leaf);
    nbdsh(&served, "h.pwrite(b'b' * 65536, 5 << 20)\nh.pwrite(b'b' * 8192, 20 << 20)");
    let expected = [(4 << 10, 3), (2 << 10, 0), (14 << 10, 3), (8, 0), ((44 << 10) - 8, 3)];
    assert_eq!(map(&served), expected, "the parent's data, and the leaf's");
    stop(served, &leaf);
    let fixed = vhd::make(folder.path(), "fixed");
    let served = start(&fixed);
    nbdsh(&served, "h.pwrite(b'c' * 65536, 1 << 20)");
    assert!(map(&served).iter().map(|(len, _)| len).sum::<u64>() == 64 << 10, "{:?}", map(&served));
}

#[test]
fn zeros_are_zeros_and_what_is_discarded_is_gone() {
    let folder = folder();
    for kind in KINDS {
        let path = vhd::make(folder.path(), kind);
        if kind == "differencing" {
            let parent = folder.path().join("parent.vhd");
            let served = start(&parent);
            nbdsh(&served, "h.pwrite(b'P' * (8 << 20), 0)\nh.flush()");
            stop(served, &parent);
            vhd::snapshot(&path, 2, &parent);
        }
        let below = if kind == "differencing" { 'P' } else { '\0' };
        let served = start(&path);
        nbdsh(
            &served,
            &format!(
                "below = b'\\x{:02x}'
M = 1 << 20
assert h.pread(8 * M, 0) == below * (8 * M)
h.pwrite(b'A' * (3 * M), M)
h.zero(65536, 2 * M)
h.zero(4096, 3 * M, nbd.CMD_FLAG_NO_HOLE)
h.zero(2 * M + 512, 5 * M + 512)
h.zero(512, 40 * M)
h.trim(65536, M)
h.trim(M, 50 * M)
h.flush()
d = h.pread(8 * M, 0)
assert d[:M] == below * M
assert d[M:M + 65536] in (b'A' * 65536, bytes(65536))
assert d[M + 65536:2 * M] == b'A' * (M - 65536)
assert d[2 * M:2 * M + 65536] == bytes(65536) and d[2 * M + 65536:3 * M] == b'A' * (M - 65536)
assert d[3 * M:3 * M + 4096] == bytes(4096) and d[3 * M + 4096:4 * M] == b'A' * (M - 4096)
assert d[4 * M:5 * M + 512] == below * (M + 512)
assert d[5 * M + 512:7 * M + 1024] == bytes(2 * M + 512)
assert d[7 * M + 1024:] == below * (M - 1024)
assert h.pread(M, 40 * M) == bytes(M) and h.pread(M, 50 * M) == bytes(M)
h.pwrite(b'B' * 4096, 3 * M)
assert h.pread(4096, 3 * M) == b'B' * 4096",
                below as u32
            ),
        );
        let before = content(&served, folder.path());
        stop(served, &path);
        assert!(content(&start(&path), folder.path()) == before, "{kind}, opened again");
    }
}

#[test]
fn a_killed_one_opens_again_with_what_was_answered() {
    let folder = folder();
    for kind in KINDS {
        let path = vhd::make(folder.path(), kind);
        for round in 1..=3u8 {
            let served = start(&path);
            let mut guest = Guest::connect(&served.ring());
            for block in 0..16 {
                if round > 1 {
                    assert_eq!(guest.read(block * BLOCK + 8, 4096), Ok(vec![round - 1; 4096]), "{kind}");
                }
                assert_eq!(guest.write(block * BLOCK + 8, &[round; 4096]), 0);
            }
            served.signal(Signal::SIGKILL);
            drop(served);
            assert_eq!(vhd::check(&path, &["-i"]), (format!("{} is valid\n", path.display()), 0));
            let text = "its footer does not begin as one does (it can be used all the same)\n";
            let whole = kind == "fixed";
            assert!(whole || vhd::check(&path, &[]).0.ends_with(text), "{}", vhd::check(&path, &[]).0);
        }
        let served = start(&path);
        stop(served, &path);
        let file = std::fs::read(&path).unwrap();
        assert_eq!(&file[file.len() - FOOTER_SIZE..][..8], b"conectix");
    }
}

/// A file like a device that others had before: all bytes set, then the image `from`, its footer at the device's end.
fn like_a_device(path: &Path, from: &Path, size: u64) {
    let image = std::fs::read(from).unwrap();
    let (image, footer) = image.split_at(image.len() - FOOTER_SIZE);
    std::fs::write(path, vec![0xee; size as usize]).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(image, 0).unwrap();
    file.write_all_at(footer, size - FOOTER_SIZE as u64).unwrap();
}

#[test]
fn on_a_device_nothing_old_is_shown_and_a_full_one_says_so() {
    for (kind, sector) in [("dynamic", 512), ("differencing", 512), ("differencing", 4096)] {
        let folder = folder();
        let empty = vhd::make(folder.path(), kind);
        let file = folder.path().join("device");
        // Room for nine blocks and a half.
        like_a_device(&file, &empty, 19 * MIB + 4096);
        let Some(device) = Loop::new(&file, sector) else { return };
        // Its parent is where the image is.
        let path = folder.path().join("device.vhd");
        std::os::unix::fs::symlink(&device.0, &path).unwrap();
        let served = start(&path);
        let mut guest = Guest::connect(&served.ring());
        let mut model = vec![0; 64 << 20];
        let statuses: Vec<_> = (0..12).map(|block| guest.write(block * BLOCK + 9, &[7; 512])).collect();
        assert_eq!(statuses, [[0; 9].as_slice(), &[-1; 3]].concat(), "{kind}: {}", served.log());
        (0..9).for_each(|block| model[(block * BLOCK + 9) as usize * 512..][..512].fill(7));
        let full = "import errno\ntry: h.pwrite(b'x' * 512, 60 << 20)\nexcept nbd.Error as x: assert x.errnum == errno.ENOSPC\n\
                    else: assert False";
        nbdsh(&served, full);
        served.wait_log("the image has no room for a write");
        let log = served.log();
        assert!(log.contains("the image has no room for a write") && log.contains("ENOSPC"), "{log}");
        // What is there can be written still.
        assert_eq!(guest.write(8 * BLOCK, &[8; 4096]), 0);
        model[8 * 4096 * 512..][..4096].fill(8);
        assert!(content(&served, folder.path()) == model, "{kind}: nothing of 0xee");
        drop(guest);
        stop(served, &path);
        let served = start(&path);
        assert!(content(&served, folder.path()) == model, "{kind}, opened again");
        served.signal(Signal::SIGKILL);
        drop(served);
        let served = start(&path);
        assert!(content(&served, folder.path()) == model, "{kind}, killed");
        stop(served, &path);
    }
}

#[test]
fn a_full_file_system_fails_writes_and_they_go_on_when_there_is_room() {
    for kind in ["dynamic", "differencing"] {
        let Some(fs) = SmallFs::new("24m") else { return };
        let path = vhd::make(&fs.path(""), kind);
        let filler = fs.path("filler");
        std::fs::write(&filler, vec![1; 10 << 20]).unwrap();
        let served = start(&path);
        let mut guest = Guest::connect(&served.ring());
        let mut model = vec![0; 64 << 20];
        let mut write = |guest: &mut Guest, at: u64, byte: u8| {
            let status = guest.write(at * 64, &[byte; 32768]);
            if status == 0 {
                model[at as usize * 32768..][..32768].fill(byte);
            }
            // What failed is old or new.
            status == 0
        };
        let done = (0..512).filter(|at| write(&mut guest, at * 3, 1)).count();
        assert!(done > 50 && done < 500, "{kind}: {done} of 512");
        served.wait_log("ENOSPC");
        // Those that were there before are written still.
        assert!(write(&mut guest, 0, 2));
        std::fs::remove_file(&filler).unwrap();
        let last = (100..400).filter(|at| write(&mut guest, at * 3 + 1, 3)).count();
        assert!(last > 50, "{kind}: {last} of 300 after there was room: {}", served.log());
        for (at, expected) in (0..).zip(model.chunks(32768)) {
            if expected[0] != 0 {
                assert!(guest.read(at * 64, 32768).as_deref() == Ok(expected), "{kind}: {at}");
            }
        }
        drop(guest);
        std::fs::write(&filler, b"").unwrap();
        stop(served, &path);
        let served = start(&path);
        let mut guest = Guest::connect(&served.ring());
        for (at, expected) in (0..).zip(model.chunks(32768)).filter(|(_, expected)| expected[0] != 0) {
            assert!(guest.read(at * 64, 32768).as_deref() == Ok(expected), "{kind}, opened again: {at}");
        }
    }
}

#[test]
fn blocks_may_be_of_other_sizes() {
    for block_size in [4096, 512 << 10, 256 << 20] {
        let folder = folder();
        let (base, path) = (folder.path().join("base.raw"), folder.path().join("leaf.vhd"));
        let mut expected = bytes(7, 16 * MIB);
        std::fs::write(&base, &expected).unwrap();
        let parent = Parent { path: "./base.raw", uuid: Uuid::NIL, time: 0 };
        vhd::child_of_blocks(block_size, &path, 16 * MIB + 512, 1, parent);
        expected.extend([0; 512]);
        let served = start(&path);
        let mut guest = Guest::connect(&served.ring());
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..300 {
            let sectors = random.usize(1..80);
            let sector = random.usize(..expected.len() / 512 + 1 - sectors);
            let data = vec![random.u8(..); sectors * 512];
            assert_eq!(guest.write(sector as u64, &data), 0);
            expected[sector * 512..][..data.len()].copy_from_slice(&data);
        }
        drop(guest);
        assert!(content(&served, folder.path()) == expected, "{block_size}");
        stop(served, &path);
        assert!(content(&start(&path), folder.path()) == expected, "{block_size}, opened again");
    }
}

#[test]
fn every_engine_and_the_least_of_everything_write_what_is_verified() {
    let least = "[engine]\ndepth = 1\nbatch = 1\n";
    let engines = ["aio", "threads", "io_uring"].map(|name| ("", format!("[engine]\nname = '{name}'\n")));
    for (top, rest) in engines.into_iter().chain([("requests = 1", least.to_owned())]) {
        for kind in KINDS {
            for keys in
                ["durability = 'flush'\npreallocate = '8 MiB'", "durability = 'order'\nbitmap_cache = '1 KiB'"]
            {
                let folder = folder();
                let path = vhd::make(folder.path(), kind);
                let image = format!("{}\n{keys}", table(&path));
                let served = Served::start_with(top, &image, &format!("{BOTH}{rest}"));
                let mut load = tool("ring-load");
                load.args([
                    "run",
                    "--rw",
                    "randwrite",
                    "--bs",
                    "512-64k",
                    "--depth",
                    "32",
                    "--size",
                    "12M",
                    "--verify",
                ]);
                run(load.args(["--fsync", "20", "--queues", "2", "--socket"]).arg(served.ring()));
                let expected = content(&served, folder.path());
                stop(served, &path);
                assert!(content(&start(&path), folder.path()) == expected, "{kind}, {keys}, {rest}, opened again");
            }
        }
    }
}

#[test]
fn errors_reach_the_client_and_leave_old_or_new() {
    for kind in ["dynamic", "differencing"] {
        let folder = folder();
        let path = vhd::make(folder.path(), kind);
        let faults = "[[fault]]\ntype = 'error'\non = ['read', 'write', 'flush', 'write-zeroes']\nrate = 0.05\n";
        let served = Served::start(&table(&path), &format!("{BOTH}{faults}"));
        let mut guest = Guest::connect(&served.ring());
        let mut random = fastrand::Rng::with_seed(5);
        // Of each 4096 bytes: what they may have.
        let mut known = vec![vec![0]; 16384];
        let mut failed = 0;
        for _ in 0..3000 {
            let (at, byte) = (random.usize(..known.len()), random.u8(1..));
            if guest.write(at as u64 * 8, &[byte; 4096]) == 0 {
                known[at] = vec![byte];
            } else {
                known[at].push(byte);
                failed += 1;
            }
        }
        assert!(failed > 100, "{failed} failed");
        drop(guest);
        // The last flush may be one that fails.
        let (_, log) = served.stop();
        assert_eq!(vhd::check(&path, &["-i"]).1, 0, "{kind}: {log}");
        let served = start(&path);
        for (number, (known, found)) in known.iter().zip(content(&served, folder.path()).chunks(4096)).enumerate() {
            let one = |byte: &u8| known.contains(byte);
            assert!(
                found.chunks(512).all(|sector| one(&sector[0]) && sector.iter().all(|byte| *byte == sector[0])),
                "{number}"
            );
        }
        stop(served, &path);
    }
}

#[test]
fn writes_without_space_are_held_if_so_configured() {
    for kind in ["dynamic", "differencing"] {
        let Some(fs) = SmallFs::new("24m") else { return };
        let path = vhd::make(&fs.path(""), kind);
        let filler = fs.path("filler");
        std::fs::write(&filler, vec![1; 12 << 20]).unwrap();
        let served = Served::start(&table(&path), &format!("{BOTH}[retry]\nno_space = 'hold'\n"));
        let ring = served.ring();
        let writer = std::thread::spawn(move || {
            let mut guest = Guest::connect(&ring);
            (0..480).map(|at| guest.write(at * 64, &[at as u8; 32768])).filter(|status| *status != 0).count()
        });
        served.wait_log("ENOSPC");
        assert!(!writer.is_finished(), "{}", served.log());
        std::fs::remove_file(&filler).unwrap();
        assert_eq!(writer.join().unwrap(), 0, "{kind}: {}", served.log());
        let mut guest = Guest::connect(&served.ring());
        for at in 0..480 {
            assert!(guest.read(at * 64, 32768) == Ok(vec![at as u8; 32768]), "{kind}: {at}");
        }
        drop(guest);
        stop(served, &path);
    }
}

#[test]
fn held_writes_are_given_up_at_the_second_signal_and_the_image_is_whole() {
    for kind in ["dynamic", "differencing"] {
        let Some(fs) = SmallFs::new("24m") else { return };
        let path = vhd::make(&fs.path(""), kind);
        std::fs::write(fs.path("filler"), vec![1; 16 << 20]).unwrap();
        let served = Served::start(&table(&path), &format!("{BOTH}[retry]\nno_space = 'hold'\n"));
        let mut load = tool("ring-load");
        load.args(["run", "--rw", "randwrite", "--bs", "64k", "--depth", "16", "--runtime", "60s", "--socket"]);
        let mut load = load.arg(served.ring()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        served.wait_log("ENOSPC");
        served.signal(Signal::SIGTERM);
        std::thread::sleep(std::time::Duration::from_millis(300));
        // There may be no room for the last footer either, and then its exit code says so.
        let (_, log) = served.stop();
        assert_eq!(vhd::check(&path, &["-i"]).1, 0, "{kind}: {log}");
        load.kill().unwrap();
        load.wait().unwrap();
        std::fs::remove_file(fs.path("filler")).unwrap();
        let served = start(&path);
        let before = content(&served, folder().path());
        stop(served, &path);
        assert!(content(&start(&path), folder().path()) == before, "{kind}");
    }
}

#[test]
fn the_engine_is_changed_while_blocks_are_added() {
    for kind in ["dynamic", "differencing"] {
        let folder = folder();
        let path = vhd::make(folder.path(), kind);
        let served = start(&path);
        let mut load = tool("ring-load");
        load.args(["run", "--rw", "randwrite", "--bs", "512-64k", "--verify", "--runtime", "3s", "--fsync", "50"]);
        let mut load = load.arg("--socket").arg(served.ring()).stdout(Stdio::null()).spawn().unwrap();
        let mut changes = 0;
        while load.try_wait().unwrap().is_none() {
            run(served.tap_ctl().args(["engine", "--name", ["aio", "threads", "io_uring"][changes % 3]]));
            changes += 1;
        }
        assert!(load.wait().unwrap().success() && changes >= 6, "{changes} changes");
        stop(served, &path);
    }
}
