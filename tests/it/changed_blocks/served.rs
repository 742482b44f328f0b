//! A log in use: what marks, and that it does so before anything is written; logs that can't be written, or become shorter; what becomes of it
//! in live operations.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{BLOCK, create, header, marked};
use crate::common::guest::{Guest, page};
use crate::common::live::*;
use crate::common::served::{Served, folder, output, run, tool};
use crate::common::small_fs::{Loop, SmallFs};
use crate::common::vhd::{bytes, good};
use crate::common::vhd_made::table;
use nix::libc;
use serde_json::Value;
use tapdisk::frontend::blkif::wire::{OP_DISCARD, OP_FLUSH_DISKCACHE, OP_WRITE, OP_WRITE_BARRIER};
use tempfile::TempDir;

const SIZE: u64 = 64 << 20;
const SECTORS: u64 = BLOCK / 512;

/// A raw disk with a log, each of them where it is wanted.
struct Disk {
    served: Served,
    log: PathBuf,
    _folder: TempDir,
}

impl Disk {
    fn new(rest: &str) -> Disk {
        let folder = folder();
        let log = folder.path().join("log");
        create(&log, SIZE);
        Disk::with_log(folder, log, rest)
    }

    fn with_log(folder: TempDir, log: PathBuf, rest: &str) -> Disk {
        let image = format!("path = '{}'\ncreate = '64 MiB'", folder.path().join("disk").display());
        let served =
            Served::start(&format!("{image}\nchanged_blocks = '{}'", log.display()), &format!("{BOTH}{rest}"));
        Disk { served, log, _folder: folder }
    }

    fn guest(&self) -> Guest {
        Guest::connect(&self.served.ring())
    }

    /// What the image's file has at the beginning of a block.
    fn byte(&self, block: u64) -> u8 {
        bytes(&self._folder.path().join("disk"), block * BLOCK, 1)[0]
    }

    fn fault(&self, words: &[&str]) -> Value {
        serde_json::from_str(&run(self.served.tap_ctl().args(["fault", "--json"]).args(words))).unwrap()
    }
}

/// Runs qemu-io, and says whether it saw no error.
fn qemu_io(served: &Served, command: &str) -> bool {
    let said = output(Command::new("qemu-io").args(["-f", "raw", "-c", command, &served.nbd()]));
    said.status.success() && !String::from_utf8_lossy(&said.stderr).contains("failed")
}

/// The status of a write of a sector at the beginning of a block.
fn write(guest: &mut Guest, block: u64) -> i16 {
    guest.write(block * SECTORS, &[(block % 255) as u8 + 1; 512])
}

#[test]
fn what_writes_marks_and_nothing_else_does() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    good("create -n {} -s 64", &[&path("base.vhd")]);
    good("snapshot -n {} -p {} -e", &[&path("leaf.vhd"), &path("base.vhd")]);
    let raw = format!("path = '{}'\ncreate = '64 MiB'", path("disk").display());
    for image in [raw, table(&path("leaf.vhd"))] {
        create(&path("log"), SIZE);
        let before = header(&path("log"));
        let served = Served::start(&format!("{image}\nchanged_blocks = '{}'", path("log").display()), BOTH);
        for command in ["read 0 1M", "flush", "read 30M 64k", "map"] {
            assert!(qemu_io(&served, command), "{command}");
        }
        assert_eq!(marked(&path("log")), [] as [usize; 0]);
        let mut expected = Vec::new();
        for (command, blocks) in [
            ("write 64k 64k", 1..2),
            ("write -f 300k 1k", 4..5),
            ("write -z 639k 2k", 9..11),
            ("write -z -u 1M 128k", 16..18),
            ("discard 2M 192k", 32..35),
            ("write 67108352 512", 1023..1024),
            ("write 64k 4k", 1..1),
        ] {
            assert!(qemu_io(&served, command), "{command}");
            expected.extend(blocks);
            assert_eq!(marked(&path("log")), expected, "{command}");
        }
        let mut guest = Guest::connect(&served.ring());
        assert!(guest.read(100 * SECTORS, 4096).is_ok());
        let entries = [
            guest.entry(OP_FLUSH_DISKCACHE),
            guest.entry(OP_WRITE).with_sector(101 * SECTORS - 1).with_segments(1, &[page(0)]),
            guest.entry(OP_DISCARD).with_sector(103 * SECTORS).with_discard(0, 1),
            guest.entry(OP_WRITE_BARRIER).with_sector(105 * SECTORS).with_segments(1, &[page(0)]),
        ];
        assert!(entries.iter().all(|entry| guest.status(entry) == 0));
        expected.splice(expected.len() - 1..expected.len() - 1, [100, 101, 103, 105]);
        assert_eq!(marked(&path("log")), expected);
        drop(guest);
        assert_eq!(served.stop().0, Some(0));
        assert_eq!((marked(&path("log")), header(&path("log"))), (expected, before), "the header is as it was");
    }
}

#[test]
fn a_write_waits_until_its_bits_are_in_the_file_and_others_go_on() {
    for engine in ["aio", "io_uring", "threads"] {
        // The first bytes of a file are the log's: the disk is written behind them.
        let stuck = format!("[[fault]]\ntype = 'stuck'\non = ['write']\nto = 4096\n[engine]\nname = '{engine}'\n");
        let disk = Disk::new(&stuck);
        let mut guest = disk.guest();
        disk.fault(&["--off"]);
        assert_eq!(write(&mut guest, 16), 0);
        disk.fault(&["--on"]);
        guest.queue.memory().write(guest.queue.page_at(9), &[0x42; 4096]);
        let held = guest.entry(OP_WRITE).with_sector(32 * SECTORS).with_segments(1, &[page(9)]);
        guest.queue.ring.push(&held);
        guest.queue.publish().unwrap();
        wait_for(|| (disk.fault(&[])["stuck"] == 1).then_some(()));
        // Where there is a bit, and where nothing is written, nobody waits.
        for _ in 0..20 {
            assert_eq!(write(&mut guest, 16), 0, "{engine}");
            assert!(guest.read(32 * SECTORS, 4096).unwrap() == [0; 4096], "{engine}");
        }
        assert_eq!((disk.byte(32), marked(&disk.log)), (0, vec![16, 32]), "{engine}: the mark comes first");
        let first = &disk.served.debug_queue()["requests"][0];
        assert_eq!(first["op"], "write", "{first}");
        disk.fault(&["--release", "--off"]);
        assert_eq!(guest.response().id, held.id());
        assert_eq!(disk.byte(32), 0x42, "{engine}");
    }
}

#[test]
fn a_log_that_can_not_be_written_fails_the_writes_that_need_a_bit_and_no_others() {
    let disk = Disk::new("[[fault]]\ntype = 'error'\non = ['write']\nto = 4096\nerrno = 'EIO'\n");
    let mut guest = disk.guest();
    disk.fault(&["--off"]);
    assert_eq!(write(&mut guest, 16), 0);
    disk.fault(&["--on"]);
    for _ in 0..3 {
        assert_eq!((write(&mut guest, 32), write(&mut guest, 16)), (-1, 0));
        assert!(guest.read(32 * SECTORS, 512).is_ok());
    }
    assert_eq!((disk.byte(32), marked(&disk.log)), (0, vec![16]));
    disk.served.wait_log(disk.log.to_str().unwrap());
    disk.fault(&["--off"]);
    assert_eq!(write(&mut guest, 32), 0, "it is tried again");
    assert_eq!((disk.byte(32), marked(&disk.log)), (33, vec![16, 32]));
}

#[test]
fn where_a_logs_file_system_is_full_writes_that_need_a_bit_fail_until_there_is_room() {
    let Some(fs) = SmallFs::new("8m") else { return };
    let log = fs.path("log");
    create(&log, SIZE);
    // One that is a hole behind its header, as another program may make it.
    let head = header(&log);
    std::fs::write(&log, head).unwrap();
    let file = std::fs::File::options().write(true).open(&log).unwrap();
    file.set_len(8 << 20).unwrap();
    // The disk is so large that its last bits are in another block of the file system.
    let size = (1_u64 << 20) * 8 * BLOCK;
    file.write_all_at(&size.to_le_bytes(), 40).unwrap();
    file.sync_all().unwrap();
    let folder = folder();
    let path = folder.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    let image = format!("path = '{}'\nchanged_blocks = '{}'", path.display(), log.display());
    let served = Served::start(&image, BOTH);
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.write(0, &[1; 512]), 0);
    let filler = fs.fill("filler");
    let last = size / 512 - 1;
    for _ in 0..2 {
        assert_eq!((guest.write(last, &[2; 512]), guest.write(1, &[2; 512])), (-1, 0));
        assert!(guest.read(last, 512).unwrap() == [0; 512]);
    }
    std::fs::remove_file(filler).unwrap();
    assert_eq!(guest.write(last, &[2; 512]), 0);
    drop(guest);
    assert_eq!(served.stop().0, Some(0));
    assert_eq!(marked(&log), [0, (size / BLOCK - 1) as usize]);
}

#[test]
fn a_limit_of_file_sizes_fails_the_writes_whose_bits_are_beyond_it() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    std::fs::File::create(path("disk")).unwrap().set_len(SIZE).unwrap();
    let Some(device) = Loop::new(&path("disk"), 512) else { return };
    create(&path("log"), SIZE);
    let mut command = Command::new("prlimit");
    // The bits of the first half are within it.
    command.args(["--fsize=112", "--"]).arg(tool("tapdisk").get_program());
    let image = format!("path = '{}'\nchanged_blocks = '{}'", device.0, path("log").display());
    let rest = format!("{BOTH}[log]\nfile = '/dev/null'\n[control]\ndirectory = '{{s}}'\n");
    let served = Served::start_by(command, "", &image, &rest);
    for _ in 0..2 {
        assert!(qemu_io(&served, "write 32704k 64k") && !qemu_io(&served, "write 32M 64k"));
        assert!(qemu_io(&served, "read -P 0 32M 64k"));
    }
    assert_eq!(marked(&path("log")), [511]);
}

#[test]
fn a_write_that_fails_is_never_there_without_its_bit() {
    let disk = Disk::new("[[fault]]\ntype = 'error'\non = ['write', 'write-zeroes']\nfrom = '2 MiB'\nto = '3 MiB'\n");
    let mut guest = disk.guest();
    assert_eq!((write(&mut guest, 32), write(&mut guest, 48)), (-1, 0));
    assert!(!qemu_io(&disk.served, "write -z 2176k 64k"));
    let marked = marked(&disk.log);
    assert!(marked.contains(&48) && marked.iter().all(|block| [32, 34, 48].contains(block)), "{marked:?}");
    // On a full file system: some of a write may be there.
    let Some(fs) = SmallFs::new("8m") else { return };
    let (path, folder) = (fs.path("disk"), folder());
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    let log = folder.path().join("log");
    create(&log, SIZE);
    let image = format!("path = '{}'\nchanged_blocks = '{}'", path.display(), log.display());
    let served = Served::start(&image, BOTH);
    let failed = (0..16).filter(|mib| !qemu_io(&served, &format!("write -P 7 {mib}M 1M"))).count();
    assert!(failed > 0, "there was room for all of it");
    let content = std::fs::read(&path).unwrap();
    let bits = super::bits(&log);
    for (block, data) in content.chunks(BLOCK as usize).enumerate() {
        assert!(bits[block] || data.iter().all(|byte| *byte == 0), "{block}");
    }
    assert!(bits[256..].iter().all(|bit| !bit));
}

#[test]
fn a_log_that_somebody_makes_shorter_ends_no_process() {
    for (len, engine) in [(0, "aio"), (48, "io_uring"), (100, "threads")] {
        let mut disk = Disk::new(&format!("[engine]\nname = '{engine}'\n"));
        let mut guest = disk.guest();
        assert_eq!(write(&mut guest, 1), 0);
        std::fs::File::options().write(true).open(&disk.log).unwrap().set_len(len).unwrap();
        for block in [1, 2, 300, 900, 2, 1023] {
            let status = write(&mut guest, block);
            assert!(status == 0 || status == -1, "{engine}: {status}");
            assert!(guest.read(block * SECTORS, 512).is_ok(), "{engine}");
        }
        drop(guest);
        // What is left of it tells too little, and is not taken for a whole one.
        pause(&disk.served);
        let again = ctl(&disk.served, &["unpause", "-c", disk.log.to_str().unwrap(), "--debug"]);
        assert!(len >= 48 || again.code == libc::EINVAL, "{}", again.err);
        assert!(disk.served.alive());
    }
}

#[test]
fn a_disk_marks_on_when_its_engine_changes_and_its_chain_becomes_shorter() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    good("create -n {} -s 64", &[&path("base.vhd")]);
    good("snapshot -n {} -p {}", &[&path("mid.vhd"), &path("base.vhd")]);
    good("snapshot -n {} -p {} -e", &[&path("leaf.vhd"), &path("mid.vhd")]);
    create(&path("log"), SIZE);
    let image = format!("{}\nchanged_blocks = '{}'", table(&path("leaf.vhd")), path("log").display());
    let served = Served::start(&image, BOTH);
    let mut guest = Guest::connect(&served.ring());
    let mut expected = Vec::new();
    let mut marks = |served: &Served, block: u64| {
        assert_eq!(write(&mut guest, block), 0);
        expected.push(block as usize);
        assert_eq!(marked(&path("log")), expected);
        assert_eq!(served.debug_queue()["changed_blocks"], path("log").to_str().unwrap());
        assert!(locked(&path("log")));
    };
    marks(&served, 0);
    for (block, engine) in (1..).zip(["threads", "aio", "io_uring", "threads"]) {
        run(served.tap_ctl().args(["engine", "--name", engine]));
        marks(&served, block);
    }
    coalesce(&served, &path("mid.vhd"));
    // The log is before the images.
    assert_eq!(chain(&served).len(), 3, "{:?}", chain(&served));
    marks(&served, 10);
    run(served.tap_ctl().arg("resize"));
    marks(&served, 11);
    pause(&served);
    unpause(&served);
    assert_eq!((write(&mut guest, 12), marked(&path("log")), locked(&path("log"))), (0, expected, false));
}

#[test]
#[ignore = "slow"]
fn loads_that_check_what_they_read_have_all_their_blocks_marked() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    good("create -n {} -s 64", &[&path("disk.vhd")]);
    good("create -n {} -s 64", &[&path("0.vhd")]);
    for number in 1..5 {
        good("snapshot -n {} -p {}", &[&path(&format!("{number}.vhd")), &path(&format!("{}.vhd", number - 1))]);
    }
    let raw = format!("path = '{}'\ncreate = '64 MiB'", path("disk").display());
    // With both filters, each image on each engine.
    let images = [raw, table(&path("disk.vhd")), table(&path("4.vhd"))];
    for (image, engine) in
        images.iter().flat_map(|image| ["aio", "io_uring", "threads"].map(|engine| (image, engine)))
    {
        create(&path("log"), SIZE);
        let more = format!(
            "{BOTH}[engine]\nname = '{engine}'\n[throttle.all]\nrequests_per_s = 5000\nrequests_burst = 100\n"
        );
        let served = Served::start(&format!("{image}\nchanged_blocks = '{}'", path("log").display()), &more);
        keep(&served);
        let of = |mib: std::ops::Range<usize>| mib.start * 16..mib.end * 16;
        assert_eq!(marked(&path("log")), of(40..48).collect::<Vec<_>>());
        let load = Load::start(&served);
        snapshots_of_the_log(&served, &path("log"));
        load.finish();
        kept(&served);
        assert!(marked(&path("log")).iter().all(|block| *block < 32 * 16), "since the last pause");
        assert_eq!(served.stop().0, Some(0));
    }
}

/// Twice a new log, under load.
fn snapshots_of_the_log(served: &Served, log: &Path) {
    for _ in 0..2 {
        std::thread::sleep(std::time::Duration::from_millis(50));
        pause(served);
        create(log, SIZE);
        run(served.tap_ctl().arg("unpause").arg("-c").arg(log));
    }
}
