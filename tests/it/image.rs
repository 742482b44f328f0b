//! Images: sizes, sectors, locks, read-only, O_DIRECT, and what happens when the file below goes wrong.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::common::guest::Guest;
use crate::common::live::{BOTH, locked, wait_for};
use crate::common::served::{Served, folder, output, run, tool};
use crate::common::small_fs::{Loop, SmallFs};
use crate::common::vhd::good;
use nix::libc;
use nix::sys::signal::Signal;
use slog::Logger;
use tapdisk::blocking::Blocking;
use tapdisk::config::Config;
use tapdisk::job::start_maker;
use tapdisk::sys::file::{lock_changes, unlock_changes};
use tempfile::TempDir;

const LOCAL: &str = "[frontend.local]\nsocket = '{s}/ring'\n";

fn image(size: usize) -> (TempDir, PathBuf) {
    let folder = folder();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![0x5a; size]).unwrap();
    (folder, path)
}

fn path(path: &std::path::Path) -> String {
    format!("path = '{}'", path.display())
}

#[test]
fn two_writers_are_refused_and_the_holder_is_named() {
    let (_folder, file) = image(1 << 20);
    let first = Served::start(&path(&file), LOCAL);
    let (code, text) = Served::refused(&path(&file), LOCAL);
    assert_eq!(code, 1);
    assert!(text.contains(&format!("in use by process {} (tapdisk)", first.pid())), "{text}");
    let (_, text) = Served::refused(&format!("{}\nread_only = true", path(&file)), LOCAL);
    assert!(text.contains("in use by"), "a reader beside a writer: {text}");
    assert_eq!(first.stop().0, Some(0));
    let reader = Served::start(&format!("{}\nread_only = true", path(&file)), LOCAL);
    let second = Served::start(&format!("{}\nread_only = true", path(&file)), LOCAL);
    drop((reader, second));
    Served::start(&path(&file), LOCAL);
}

#[test]
fn an_odd_size_is_refused_or_rounded() {
    let (_folder, file) = image(4096 + 700);
    let (code, text) = Served::refused(&path(&file), LOCAL);
    assert!(code == 1 && text.contains("4796 bytes") && text.contains("round-up"), "{text}");
    let served = Served::start(&format!("{}\nodd_size = 'round-up'", path(&file)), LOCAL);
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.disk.sectors, 10);
    let mut expected = vec![0x5a; 700];
    expected.resize(1024, 0);
    assert_eq!(guest.read(8, 1024), Ok(expected), "what the file lacks reads as zeros");
    assert_eq!(guest.write(9, &[0x66; 512]), 0);
    assert_eq!(guest.read(9, 512), Ok(vec![0x66; 512]));
    drop(served);
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 5120);
    let (_folder, file) = image(4096 + 700);
    let served = Served::start(&format!("{}\nodd_size = 'round-down'", path(&file)), LOCAL);
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.disk.sectors, 9);
    assert_eq!(guest.read(9, 512), Err(-1));
}

#[test]
fn missing_empty_and_unfit_images_are_refused_with_their_name() {
    let (folder, file) = image(0);
    let (code, text) = Served::refused(&path(&file), LOCAL);
    assert!(code == 1 && text.contains("disk.img") && text.contains("no whole 512-byte sector"), "{text}");
    let (_, text) = Served::refused(&path(&folder.path().join("none")), LOCAL);
    assert!(text.contains("none: cannot open it: No such file"), "{text}");
    let (_, text) = Served::refused(&path(folder.path()), LOCAL);
    assert!(text.contains("Is a directory"), "{text}");
    let (_, text) = Served::refused("path = '/dev/null'", LOCAL);
    assert!(text.contains("neither a regular file nor a block device"), "{text}");
    let (code, text) = Served::refused(&format!("{}\nreadonly = true", path(&file)), LOCAL);
    assert!(code == 2 && text.contains("disk.toml:4: ") && text.contains("`read_only`"), "{text}");
}

#[test]
fn a_block_device_with_4096_byte_sectors_is_served_as_it_is() {
    let (_folder, file) = image(1 << 20);
    let Some(device) = Loop::new(&file, 4096) else { return };
    let served = Served::start(&format!("path = '{}'", device.0), LOCAL);
    let mut guest = Guest::connect(&served.ring());
    assert_eq!((guest.disk.sectors, guest.disk.sector_size), (2048, 4096), "sectors count 512 bytes");
    served.wait_log("direct: true");
    // In both directions: the 512-byte sector number 16 is byte 8192.
    assert_eq!(guest.write(16, &[0x77; 8192]), 0);
    assert_eq!(guest.read(16, 4096), Ok(vec![0x77; 4096]));
    assert_eq!(guest.read(17, 512), Err(-1));
    assert_eq!(guest.write(1, &[0; 4096]), -1);
    assert_eq!(guest.read(2040, 4096), Ok(vec![0x5a; 4096]));
    assert_eq!(served.stop().0, Some(0));
    run(Command::new("blockdev").args(["--flushbufs", &device.0]));
    let mut bytes = [0; 8192];
    File::open(&file).unwrap().read_exact_at(&mut bytes, 8192).unwrap();
    assert_eq!(bytes, [0x77; 8192]);
    // 512-byte sectors on it need the page cache.
    let (_, text) = Served::refused(&format!("path = '{}'\nsector_size = 512\ndirect = 'on'", device.0), LOCAL);
    assert!(text.contains("512") && text.contains("4096") && text.contains("direct"), "{text}");
    let served = Served::start(&format!("path = '{}'\nsector_size = 512\ndirect = 'off'", device.0), LOCAL);
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.write(3, &[0x12; 512]), 0);
    assert_eq!(guest.read(2, 1024).map(|bytes| (bytes[0], bytes[512])), Ok((0x5a, 0x12)));
}

/// `tap-ctl resize`: what it prints, or its exit code and why it refuses.
fn resize(served: &Served, arguments: &[&str]) -> Result<String, (i32, String)> {
    let output = output(served.tap_ctl().arg("resize").args(arguments));
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if output.status.success() {
        return Ok(text(output.stdout));
    }
    Err((output.status.code().unwrap(), text(output.stderr)))
}

fn resized(old: u64, new: u64) -> Result<String, (i32, String)> {
    Ok(format!("old_size={old} new_size={new}\n"))
}

#[test]
fn a_file_grows_under_clients_that_are_connected_and_never_shrinks() {
    const M: u64 = 1 << 20;
    let (_folder, file) = image(M as usize);
    let length = || std::fs::metadata(&file).unwrap().len();
    let set_length = |size| std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(size).unwrap();
    let served = Served::start(&path(&file), &format!("{LOCAL}[frontend.nbd]\nsocket = '{{s}}/nbd'\n"));
    let nbd_size = || run(Command::new("nbdinfo").args(["--size", &served.nbd()])).trim().parse::<u64>().unwrap();
    let mut guest = Guest::connect(&served.ring());
    assert_eq!((guest.disk.sectors, guest.write(2048, &[7; 4096]), nbd_size()), (2048, -1, M));
    assert_eq!(resize(&served, &[]), resized(M, M), "nothing has happened");
    assert_eq!(resize(&served, &["--size", "2 MiB"]), resized(M, 2 * M));
    assert_eq!((length(), nbd_size(), Guest::connect(&served.ring()).disk.sectors), (2 * M, 2 * M, 4096));
    // The client that was there before.
    assert_eq!((guest.write(2047, &[7; 4096]), guest.write(4088, &[8; 4096])), (0, 0));
    assert_eq!(guest.read(2040, 8192).map(|bytes| (bytes[0], bytes[3584], bytes[7680])), Ok((0x5a, 7, 0)));
    assert_eq!((guest.read(4088, 4096), guest.read(4089, 4096)), (Ok(vec![8; 4096]), Err(-1)));
    // Grown by other means.
    set_length(3 * M);
    assert_eq!(resize(&served, &[]), resized(2 * M, 3 * M));
    assert_eq!(resize(&served, &["--size", "3 MiB"]), resized(3 * M, 3 * M));
    let refused = |arguments: &[&str], why: &str| {
        let (code, text) = resize(&served, arguments).unwrap_err();
        assert!(code == 22 && text.contains("disk") && text.contains(why), "{code}: {text}");
        assert_eq!((&served.debug_queue()["size"], nbd_size()), (&(3 * M).into(), 3 * M));
    };
    refused(&["--size", "2 MiB"], "cannot shrink");
    refused(&["--size", "3145800"], "no whole sectors");
    assert_eq!(length(), 3 * M);
    set_length(2 * M);
    refused(&[], "cannot shrink");
    set_length(3 * M + 100);
    refused(&[], "round-up");
    // Another file has its name.
    std::fs::rename(&file, file.with_extension("old")).unwrap();
    std::fs::write(&file, [0; 512]).unwrap();
    refused(&["--size", "4 MiB"], "no longer, the file");
    assert_eq!((length(), guest.write(4096, &[9; 512])), (512, 0), "it is served all the same");
}

#[test]
fn a_disk_without_a_file_does_not_grow() {
    let served = Served::start("type = 'ram'\nsize = '1 MiB'", LOCAL);
    for arguments in [&[][..], &["--size", "2 MiB"]] {
        let text = "ram:1 MiB: it has no file that could grow\n".to_owned();
        assert_eq!(resize(&served, arguments), Err((95, text)), "EOPNOTSUPP");
    }
}

#[test]
fn a_block_device_that_grew_is_served_whole() {
    let (_folder, file) = image(1 << 20);
    let Some(device) = Loop::new(&file, 512) else { return };
    let served = Served::start(&format!("path = '{}'", device.0), LOCAL);
    let mut guest = Guest::connect(&served.ring());
    let (code, text) = resize(&served, &["--size", "2 MiB"]).unwrap_err();
    assert!(code == 22 && text.contains("is a block device"), "{text}");
    std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(2 << 20).unwrap();
    assert_eq!(resize(&served, &[]), resized(1 << 20, 1 << 20), "the device does not know yet");
    run(Command::new("losetup").args(["--set-capacity", &device.0]));
    assert_eq!(resize(&served, &[]), resized(1 << 20, 2 << 20));
    assert_eq!((guest.write(4088, &[8; 4096]), guest.read(4088, 4096)), (0, Ok(vec![8; 4096])));
    drop(guest);
    assert_eq!(served.stop().0, Some(0));
}

#[test]
fn a_file_can_have_4096_byte_sectors() {
    let (_folder, file) = image(1 << 20);
    let served = Served::start(&format!("{}\nsector_size = 4096", path(&file)), LOCAL);
    let mut guest = Guest::connect(&served.ring());
    assert_eq!((guest.disk.sectors, guest.disk.sector_size), (2048, 4096));
    assert_eq!(guest.write(8, &[1; 4096]), 0);
    assert_eq!(guest.read(0, 12288).map(|bytes| (bytes[4095], bytes[4096], bytes[8192])), Ok((0x5a, 1, 0x5a)));
}

/// Another node of a block device, which has a lock of its own.
fn other_node(folder: &TempDir, device: &str) -> PathBuf {
    let number = std::fs::metadata(device).unwrap().rdev();
    let node = folder.path().join("node");
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    run(Command::new("mknod").arg(&node).args(["b", &major.to_string(), &minor.to_string()]));
    node
}

#[test]
fn a_device_has_one_writer_whatever_its_name() {
    let folder = folder();
    let file = folder.path().join("device");
    std::fs::write(&file, vec![1; 8 << 20]).unwrap();
    let Some(device) = Loop::new(&file, 512) else { return };
    let node = other_node(&folder, &device.0);
    let served = Served::start(&format!("path = '{}'", device.0), BOTH);
    let (_, text) = Served::refused(&path(&node), LOCAL);
    let refusal = format!("{}: in use by something that has the device for itself", node.display());
    assert!(text.contains(&refusal), "{text}");
    let (_, text) = Served::refused(&format!("path = '{}'", device.0), LOCAL);
    assert!(text.contains("in use by process") && text.contains("(tapdisk)"), "{text}");
    let made = output(tool("vhd-util").args(["create", "-s", "4", "-n"]).arg(&node));
    assert_eq!(made.status.code(), Some(libc::EBUSY));
    // A reader is no writer, and what is held like this can be zeroed by who holds it.
    assert_eq!(Served::start(&format!("{}\nread_only = true", path(&node)), LOCAL).stop().0, Some(0));
    run(Command::new("nbdsh").env("PATH", "/usr/bin:/bin").args([
        "-u",
        &served.nbd(),
        "-c",
        "h.zero(65536, 0); h.trim(65536, 1 << 20); h.flush()",
    ]));
    assert_eq!(Guest::connect(&served.ring()).read(0, 512), Ok(vec![0; 512]));
    assert_eq!(served.stop().0, Some(0));
    assert_eq!(Served::start(&path(&node), LOCAL).stop().0, Some(0));
}

#[test]
fn a_read_only_device_is_not_served_as_a_writable_one() {
    let folder = folder();
    let file = folder.path().join("device");
    std::fs::write(&file, vec![1; 8 << 20]).unwrap();
    let Some(device) = Loop::new(&file, 512) else { return };
    let set = |word: &str| run(Command::new("blockdev").args([word, &device.0]));
    set("--setro");
    let image = format!("path = '{}'", device.0);
    let (_, text) = Served::refused(&image, LOCAL);
    assert!(text.contains(&format!("{}: the device is read-only: open it so", device.0)), "{text}");
    let made = output(tool("vhd-util").args(["create", "-s", "4", "-n", &device.0]));
    assert_eq!(made.status.code(), Some(libc::EROFS));
    let served = Served::start(&format!("{image}\nread_only = true"), LOCAL);
    assert_eq!(Guest::connect(&served.ring()).read(0, 512), Ok(vec![1; 512]));
    assert_eq!(served.stop().0, Some(0));
    set("--setrw");
    assert_eq!(Served::start(&image, LOCAL).stop().0, Some(0));
}

#[test]
fn a_limit_of_file_sizes_is_the_requests_error() {
    for engine in ["aio", "threads", "io_uring"] {
        for kind in ["aio", "vhd"] {
            let folder = folder();
            let image = folder.path().join("image");
            match kind {
                "vhd" => drop(run(tool("vhd-util").args(["create", "-s", "64", "-n"]).arg(&image))),
                _ => File::create(&image).unwrap().set_len(64 << 20).unwrap(),
            }
            let mut command = Command::new("prlimit");
            command.args(["--fsize=10485760", "--"]).arg(tool("tapdisk").get_program());
            let image = format!("type = '{kind}'\n{}", path(&image));
            let served = Served::start_by(command, "", &image, &format!("{LOCAL}[engine]\nname = '{engine}'\n"));
            let mut guest = Guest::connect(&served.ring());
            // Of the VHD a step of 64 MiB does not fit, and some of its blocks do.
            let statuses: Vec<_> = (0..16).map(|i| guest.write(i * 8192, &[i as u8 + 1; 4096])).collect();
            let good = statuses.iter().take_while(|status| **status == 0).count();
            assert!((2..14).contains(&good), "{engine} {kind}: {statuses:?}");
            assert!(statuses[good..].iter().all(|status| *status != 0), "{engine} {kind}: {statuses:?}");
            for i in 0..good as u64 {
                assert_eq!(guest.read(i * 8192, 4096), Ok(vec![i as u8 + 1; 4096]), "{engine} {kind}");
            }
            drop(guest);
            assert!(served.stop().0.is_some(), "{engine} {kind}: it ends as it is told to");
        }
    }
}

#[test]
fn a_mounted_device_is_not_written() {
    let Some(fs) = SmallFs::new("8m") else { return };
    let device = format!("path = '{}'", fs.device().display());
    let (_, text) = Served::refused(&device, LOCAL);
    assert!(text.contains("in use by something that has the device for itself: a mount,"), "{text}");
    assert_eq!(Served::start(&format!("{device}\nread_only = true"), LOCAL).stop().0, Some(0));
}

#[test]
fn an_image_is_served_without_its_lock_if_that_is_asked_for() {
    let folder = folder();
    let file = folder.path().join("disk.img");
    std::fs::write(&file, vec![1; 1 << 20]).unwrap();
    let served = Served::start(&path(&file), LOCAL);
    let other = Served::start(&format!("{}\nlock = false", path(&file)), LOCAL);
    assert_eq!(other.stop().0, Some(0));
    drop(served);
}

#[test]
fn a_full_disk_fails_the_writes_that_met_it_and_nothing_else() {
    let Some(fs) = SmallFs::new("8m") else { return };
    let served = Served::start(&format!("{}\ncreate = '32 MiB'", path(&fs.path("disk.img"))), LOCAL);
    let mut guest = Guest::connect(&served.ring());
    let statuses: Vec<_> = (0..800).map(|i| guest.write(i * 64, &[i as u8; 32768])).collect();
    let failed = statuses.iter().filter(|status| **status != 0).count();
    assert!(failed > 100 && statuses[..100].iter().all(|status| *status == 0), "{failed} failed");
    for (i, status) in statuses.iter().enumerate().filter(|(_, status)| **status == 0) {
        assert_eq!(guest.read(i as u64 * 64, 32768), Ok(vec![i as u8; 32768]), "write {i} had status {status}");
    }
    served.wait_log("I/O error");
    let log = served.log();
    assert!(log.contains("I/O error") && log.contains("ENOSPC") && log.contains("offset: "), "{log}");
    assert!(log.matches("I/O error").count() < failed, "repeated errors are limited:\n{log}");
    // What is there can be written still.
    assert_eq!(guest.write(0, &[0xee; 512]), 0);
}

/// A frozen file system holds every write up, as a hung array does.
#[test]
fn a_stuck_disk_can_be_looked_at_and_goes_on_afterwards() {
    let Some(fs) = SmallFs::new("32m") else { return };
    let served = Served::start(&format!("{}\ncreate = '16 MiB'", path(&fs.path("disk.img"))), LOCAL);
    let mut guest = Guest::connect(&served.ring());
    assert_eq!(guest.write(0, &[1; 4096]), 0);
    let frozen = fs.freeze();
    let entry = guest.entry(1).with_sector(64).with_segments(1, &[crate::common::guest::page(0)]);
    for _ in 0..8 {
        guest.queue.ring.push(&entry);
    }
    guest.queue.publish().unwrap();
    assert!(guest.try_response(Duration::from_millis(1200)).is_none(), "the file system is not frozen");
    let queue = served.debug_queue();
    served.signal(Signal::SIGUSR1);
    served.wait_log("debug-queue");
    drop(frozen);
    let requests = queue["requests"].as_array().unwrap();
    assert_eq!(requests.len(), 8, "{queue}");
    for request in requests {
        assert!(request["age_us"].as_u64().unwrap() > 1_000_000, "{request}");
        assert_eq!(
            (&request["op"], &request["offset"], &request["len"]),
            (&"write".into(), &32768.into(), &4096.into())
        );
    }
    assert!(queue["queue"]["submitting_us"].as_u64().unwrap() > 1_000_000, "{queue}");
    for _ in 0..8 {
        assert_eq!(guest.response().status, 0);
    }
    drop(guest);
    assert_eq!(served.stop().0, Some(0));
}

/// What was opened and is not wanted is dropped in parts, by several threads.
#[test]
fn an_image_that_is_not_wanted_keeps_its_lock_until_its_end_is_written() {
    let blocking = Blocking::before_main_loop();
    start_maker(&blocking).unwrap();
    let folder = folder();
    let path = folder.path().join("image.vhd");
    good("create -n {} -s 16", &[&path]);
    let text = format!("[image]\ntype = 'vhd'\npath = '{}'\n{LOCAL}", path.display());
    let config = Config::parse(&text, &folder.path().join("disk.toml")).unwrap();
    let log = Logger::root(slog::Discard, slog::o!());
    let image = tapdisk::image::open(&blocking, &config, None, &log).unwrap();
    // Somebody changes its metadata meanwhile: the end waits for that.
    let other = File::options().read(true).write(true).open(&path).unwrap();
    lock_changes(&other, Duration::ZERO).unwrap();
    drop(image);
    std::thread::sleep(Duration::from_millis(500));
    assert!(locked(&path), "another program writes it, and then its footer comes");
    unlock_changes(&other).unwrap();
    wait_for(|| (!locked(&path)).then_some(()));
    good("check -n {}", &[&path]);
}
