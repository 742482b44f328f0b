//! An ext4 file system made of a folder of files, served, read and changed by clients that others wrote.

use std::path::Path;
use std::process::Command;

use crate::common::served::{Served, folder, output, run, tool};

const BOTH: &str = "[frontend.local]\nsocket = '{s}/ring'\n[frontend.nbd]\nsocket = '{s}/nbd'\n";

/// A folder of files of many sizes, and an ext4 image of 64 MiB made of it.
fn file_system(folder: &Path) -> std::path::PathBuf {
    let tree = folder.join("tree");
    for directory in 0..10 {
        let directory = tree.join(format!("d{directory}"));
        std::fs::create_dir_all(&directory).unwrap();
        for file in 0..20usize {
            let bytes: Vec<u8> = (0..file * file * 321).map(|i| (i * 31 + file) as u8).collect();
            std::fs::write(directory.join(format!("f{file}")), bytes).unwrap();
        }
    }
    let image = folder.join("fs.img");
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg("64m"));
    image
}

fn start(image: &Path, more: &str) -> Served {
    Served::start(&format!("path = '{}'", image.display()), &format!("{BOTH}{more}"))
}

#[test]
fn the_whole_image_is_the_same_through_the_ring_and_through_nbd() {
    let folder = folder();
    let image = file_system(folder.path());
    let expected = std::fs::read(&image).unwrap();
    let served = start(&image, "");
    let copy = folder.path().join("ring.img");
    run(tool("ring-load").args(["copy-out", "--socket"]).arg(served.ring()).arg(&copy));
    assert!(std::fs::read(&copy).unwrap() == expected, "through the ring");
    let copy = folder.path().join("nbdcopy.img");
    run(Command::new("nbdcopy").arg(served.nbd()).arg(&copy));
    assert!(std::fs::read(&copy).unwrap() == expected, "by nbdcopy");
    let copy = folder.path().join("qemu.img");
    run(Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(served.nbd()).arg(&copy));
    assert!(std::fs::read(&copy).unwrap() == expected, "by qemu-img convert");
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(served.nbd()).arg(&copy));
    assert_eq!(served.stop().0, Some(0));
}

#[test]
fn files_are_changed_by_a_client_and_the_file_system_is_clean() {
    let folder = folder();
    let image = file_system(folder.path());
    for way in ["ring", "nbd"] {
        let served = start(&image, "");
        // debugfs changes a copy; the client brings it back.
        let copy = folder.path().join("changed.img");
        run(Command::new("nbdcopy").arg(served.nbd()).arg(&copy));
        let new = folder.path().join("new");
        std::fs::write(&new, vec![0xc3; 300_000]).unwrap();
        let script = format!("write {} {way}-new\nrm d3/f7\nmkdir {way}-dir\n", new.display());
        let commands = folder.path().join("commands");
        std::fs::write(&commands, script).unwrap();
        run(Command::new("debugfs").arg("-w").arg("-f").arg(&commands).arg(&copy));
        if way == "ring" {
            run(tool("ring-load").args(["copy-in", "--socket"]).arg(served.ring()).arg(&copy));
        } else {
            run(Command::new("nbdcopy").args(["--flush"]).arg(&copy).arg(served.nbd()));
        }
        let (code, log) = served.stop();
        assert_eq!(code, Some(0), "{log}");
        let check = output(Command::new("e2fsck").args(["-f", "-n"]).arg(&image));
        assert!(check.status.success(), "{way}: {}", String::from_utf8_lossy(&check.stdout));
        let out = folder.path().join("out");
        run(Command::new("debugfs").arg("-R").arg(format!("dump {way}-new {}", out.display())).arg(&image));
        assert_eq!(std::fs::read(&out).unwrap(), vec![0xc3; 300_000]);
    }
}

#[test]
fn ring_load_verifies_with_each_layout_order_and_number_of_queues() {
    let folder = folder();
    let image = folder.path().join("disk.img");
    let served = Served::start(&format!("path = '{}'\ncreate = '64 MiB'", image.display()), BOTH);
    for (abi, order, queues) in
        [("native", "0", "1"), ("x86_32", "1", "2"), ("x86_64", "2", "3"), ("native", "3", "4"), ("native", "4", "1")]
    {
        let common = ["--abi", abi, "--ring-page-order", order, "--queues", queues, "--seed", order];
        let load = |more: &[&str]| {
            run(tool("ring-load").args(["run", "--socket"]).arg(served.ring()).args(common).args(more));
        };
        load(&[
            "--rw",
            "randwrite",
            "--bs",
            "512-64k",
            "--depth",
            "32",
            "--size",
            "48M",
            "--verify",
            "--fsync",
            "50",
        ]);
        load(&["--rw", "write", "--bs", "512k", "--depth", "4", "--verify"]);
    }
    let queue = served.debug_queue();
    let errors: u64 = queue["operations"].as_array().unwrap().iter().map(|op| op["errors"].as_u64().unwrap()).sum();
    assert_eq!(errors, 0);
    assert!(queue["queue"]["merged"].as_u64().unwrap() > 0, "sequential writes merge: {}", queue["queue"]);
}

#[test]
fn a_corrupt_block_is_found_by_the_verifier() {
    let folder = folder();
    let image = folder.path().join("disk.img");
    let served = Served::start(&format!("path = '{}'\ncreate = '4 MiB'", image.display()), BOTH);
    let job = ["--rw", "write", "--bs", "4k", "--seed", "5"];
    run(tool("ring-load").args(["run", "--verify", "--socket"]).arg(served.ring()).args(job));
    let file = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"?", 1_000_000).unwrap();
    let check = output(tool("ring-load").args(["run", "--verify-only", "--socket"]).arg(served.ring()).args(job));
    assert_eq!(check.status.code(), Some(3), "{}", String::from_utf8_lossy(&check.stderr));
}

#[test]
fn fio_verifies_mixed_sizes_through_nbd() {
    let folder = folder();
    let image = folder.path().join("disk.img");
    let served = Served::start(&format!("path = '{}'\ncreate = '128 MiB'", image.display()), BOTH);
    let common = [
        "--ioengine=nbd",
        "--iodepth=32",
        "--size=128m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
    ];
    run(Command::new("fio")
        .args(["--name=verify", "--rw=randwrite", "--bsrange=512-256k", "--blockalign=512", "--do_verify=1"])
        .args(common)
        .arg(format!("--uri={}", served.nbd())));
    run(Command::new("fio")
        .args(["--name=mixed", "--rw=randrw", "--bs=4k", "--fsync=32", "--do_verify=1"])
        .args(common)
        .arg(format!("--uri={}", served.nbd())));
    let queue = served.debug_queue();
    assert_eq!(
        queue["operations"].as_array().unwrap().iter().map(|op| op["errors"].as_u64().unwrap()).sum::<u64>(),
        0
    );
    assert_eq!(served.stop().0, Some(0));
}
