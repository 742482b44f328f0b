//! What a guest must not be able to do to its VHD image, and which of its writes are durable when.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::common::guest::Guest;
use crate::common::live::BOTH;
use crate::common::served::{Served, folder, output, run};
use crate::common::vhd::good;
use crate::common::vhd_made::{self as vhd, stop, table};
use drivers::vhd::{Footer, Kind, Uuid};
use nix::sys::signal::Signal;
use tapdisk::control::client;
use tapdisk::control::proto::kind;
use tapdisk::frontend::blkif::wire::OP_FLUSH_DISKCACHE;
use tapdisk::metrics::ProcessMetrics;
use tempfile::TempDir;
use zerocopy::IntoBytes;

/// An image of some MiB, and its folder.
fn image(options: &str, mib: u64) -> (PathBuf, TempDir) {
    let folder = folder();
    let path = folder.path().join("disk.vhd");
    good(&format!("create -n {{}} -s {mib}{options}"), &[&path]);
    (path, folder)
}

fn flush(guest: &mut Guest) -> i16 {
    let entry = guest.entry(OP_FLUSH_DISKCACHE);
    guest.status(&entry)
}

/// Footers that say that the file is another image, as a guest may write them to all of its disk.
fn forged() -> [Footer; 2] {
    [Kind::Fixed, Kind::Differencing].map(|kind| {
        let mut footer = Footer::new(kind, 1 << 20, Uuid([0xee; 16]), 1_000_000_000);
        footer.seal();
        footer
    })
}

#[test]
fn a_footer_that_a_guest_writes_is_never_the_images() {
    for footer in forged() {
        let (path, _folder) = image("", 8);
        let sectors = 8 << 11;
        let whole = |served: &Served| {
            let mut guest = Guest::connect(&served.ring());
            assert_eq!(guest.disk.sectors, sectors);
            for sector in [0, 1, 4095, 4096, sectors - 1] {
                assert_eq!(guest.read(sector, 512), Ok(footer.as_bytes().to_vec()), "sector {sector}");
            }
        };
        let query = || assert_eq!(good("query -n {} -v", &[&path]), "8\n");
        let mut guest;
        let mut served = Served::start(&table(&path), BOTH);
        for block in 0..4 {
            guest = Guest::connect(&served.ring());
            for sector in (block * 4096..(block + 1) * 4096).step_by(64) {
                assert_eq!(guest.write(sector, &footer.as_bytes().repeat(64)), 0);
            }
            assert_eq!(flush(&mut guest), 0);
            query();
            // A kill leaves room behind the last block; what it leaves after an orderly end, that block is the last of.
            for orderly in [false, true, false] {
                if orderly {
                    stop(served, &path);
                } else {
                    served.signal(Signal::SIGKILL);
                    drop(served);
                }
                query();
                served = Served::start(&table(&path), BOTH);
                query();
                assert_eq!(Guest::connect(&served.ring()).disk.sectors, sectors);
            }
        }
        whole(&served);
        stop(served, &path);
    }
}

/// Flushes of the image's file so far.
fn flushes(served: &Served) -> u64 {
    let text = client::text_of(served.sockets(), served.pid(), 0, kind::METRICS).unwrap();
    let metrics: ProcessMetrics = serde_json::from_str(&text).unwrap();
    let of_file = metrics.disks[0].layers[0].operations.iter().find(|op| op.op == "flush");
    of_file.map_or(0, |op| op.latency.count())
}

#[test]
fn a_write_with_fua_makes_what_says_where_it_is_durable_too() {
    for durability in ["flush", "order"] {
        let (path, _folder) = image("", 64);
        let served = Served::start(&format!("{}\ndurability = '{durability}'", table(&path)), BOTH);
        let write = |offset: u64, flags: &str| {
            let script = format!("h.pwrite(b'x' * 4096, {offset}, {flags})");
            run(Command::new("nbdsh").env("PATH", "/usr/bin:/bin").args(["-u", &served.nbd(), "-c", &script]));
            flushes(&served)
        };
        // The block's place in the table is written with this, and not flushed.
        let before = write(0, "0");
        let with = write(8192, "nbd.CMD_FLAG_FUA");
        assert!(with > before, "{durability}: {before} {with}");
        // From here on it is.
        assert_eq!(write(8192, "nbd.CMD_FLAG_FUA"), with, "{durability}");
        assert_eq!(write(16384, "0"), with, "{durability}");
        stop(served, &path);
    }
}

#[test]
fn a_flush_of_the_images_own_that_fails_fails_the_guests_next_one() {
    let (path, _folder) = image("", 64);
    let served = Served::start(&table(&path), &format!("{BOTH}[[fault]]\ntype = 'error'\non = ['flush']\n"));
    let mut guest = Guest::connect(&served.ring());
    assert_ne!(guest.write(0, &[1; 512]), 0, "its block's flush has failed");
    run(served.tap_ctl().args(["fault", "--off"]));
    assert_ne!(flush(&mut guest), 0);
    assert_eq!(
        (flush(&mut guest), guest.write(0, &[2; 512]), flush(&mut guest)),
        (-1, -1, -1),
        "what is lost stays lost"
    );
    assert!(served.debug_queue()["failed_flush"].as_str().unwrap().contains("EIO"));
    served.wait_log("no flush succeeds any more until the image is opened anew");
    assert_ne!(tap_ctl(&served, "pause"), 0);
    assert_eq!(tap_ctl(&served, "unpause"), 0);
    // The engine is a new one, too, with the faults that are configured.
    run(served.tap_ctl().args(["fault", "--off"]));
    assert_eq!((flush(&mut guest), flush(&mut guest)), (-1, 0), "told once more, to whoever has not heard it");
    assert_eq!((guest.write(0, &[2; 512]), flush(&mut guest)), (0, 0));
    drop(guest);
    stop(served, &path);
}

/// Its exit code.
fn tap_ctl(served: &Served, command: &str) -> i32 {
    output(served.tap_ctl().arg(command)).status.code().unwrap()
}

/// Whether the child's parent is refused as one that was changed.
fn refused(child: &Path) -> bool {
    let (_, text) = Served::refused(&table(child), BOTH);
    text.contains("has changed since")
}

#[test]
fn a_parent_that_was_written_before_it_was_killed_or_that_is_fixed_has_changed() {
    for (options, killed) in [("", true), ("", false), (" -r", false)] {
        let (path, folder) = image(options, 8);
        let child = folder.path().join("child.vhd");
        vhd::snapshot(&child, 3, &path);
        good("modify -n {} -p {}", &[&child, &path]);
        stop(Served::start(&table(&child), BOTH), &child);
        // Times are in seconds.
        std::thread::sleep(Duration::from_millis(1100));
        let served = Served::start(&table(&path), BOTH);
        assert_eq!(Guest::connect(&served.ring()).write(0, &[9; 512]), 0);
        if killed {
            served.signal(Signal::SIGKILL);
            drop(served);
        } else {
            stop(served, &path);
        }
        // Nobody writes now.
        stop(Served::start(&table(&path), BOTH), &path);
        assert!(refused(&child), "{options} {killed}");
    }
}
