//! Chains of VHD images, and what `vhd-util` says of them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::served::{Served, folder, output, run, tool};
use crate::common::vhd_made as vhd;
use drivers::vhd::{FOOTER_SIZE, Kind, Parts, Uuid};
use serde_json::Value;
use tapdisk::chain::{self, Error, Link, Rules};

const SIZE: u64 = 64 << 20;
const NAME: u64 = vhd::TABLE + 512;

/// A differencing image without data, whose parent has that UUID and, as a locator, that path.
fn child(path: &Path, uuid: u8, parent: &str, parent_uuid: Uuid) -> Uuid {
    vhd::child(path, SIZE, uuid, vhd::Parent { path: parent, uuid: parent_uuid, time: 0 })
}

/// An image of qemu-img's.
fn base(path: &Path) -> Uuid {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    vhd::create(path, "dynamic", 64);
    run(Command::new("qemu-io").args(["-f", "vpc", "-c", "write -q 7M 64k"]).arg(path));
    uuid(path)
}

fn uuid(path: &Path) -> Uuid {
    vhd::image(path).footer.uuid
}

/// An image's chain, whose parents are below a folder.
fn below(folder: &Path, leaf: &Path) -> Result<Vec<Link>, Error> {
    chain::chain(leaf, &Rules::tool(&[folder.to_owned()], Parts::All))
}

/// What `vhd-util` prints, and its exit code.
fn vhd_util(arguments: &[&str], path: &Path) -> (String, i32) {
    let output = output(tool("vhd-util").args(arguments).arg(path));
    (String::from_utf8(output.stdout).unwrap(), output.status.code().unwrap())
}

/// Three images in three folders.
fn three(folder: &Path) -> [PathBuf; 3] {
    let paths = ["c/leaf.vhd", "b/größe 2.vhd", "a/base.vhd"].map(|name| folder.join(name));
    let below = base(&paths[2]);
    let below = child(&paths[1], 2, "../a/base.vhd", below);
    child(&paths[0], 3, "../b/größe 2.vhd", below);
    paths
}

#[test]
fn a_chain_is_followed_by_paths_that_are_relative_to_each_image() {
    let folder = folder();
    let paths = three(&folder.path().canonicalize().unwrap());
    let allowed = folder.path().to_str().unwrap();
    let layers = below(folder.path(), &paths[0]).unwrap();
    assert_eq!(layers.iter().map(|layer| &layer.path).collect::<Vec<_>>(), paths.iter().collect::<Vec<_>>());
    let kinds: Vec<_> = layers.iter().map(|layer| layer.image.as_ref().unwrap().kind).collect();
    assert_eq!(kinds, [Kind::Differencing, Kind::Differencing, Kind::Dynamic]);
    let (shown, code) = vhd_util(&["--parents", allowed, "query", "-vspfdSa", "-n"], &paths[0]);
    let expected = format!("64\n{}\n{}\nhidden: 0\nchain depth: 3\n0\n64\n", NAME + 512 + 512, paths[1].display());
    assert_eq!((shown, code), (expected, 0));
    let (shown, code) = vhd_util(&["query", "-pda", "-n"], &paths[2]);
    assert_eq!((shown, code), (format!("{} has no parent\nchain depth: 1\n1\n", paths[2].display()), 0));
    let shown: Value =
        serde_json::from_str(&vhd_util(&["info", "--json", "--parents", allowed], &paths[0]).0).unwrap();
    assert_eq!(shown[2]["creator"], "qem2");
    assert_eq!((&shown[1]["kind"], &shown[1]["size"]), (&"differencing".into(), &SIZE.into()));
    let (shown, code) = vhd_util(&["check", "-p", "--parents", allowed, "-n"], &paths[0]);
    let valid: String = paths.iter().map(|path| format!("{} is valid\n", path.display())).collect();
    assert_eq!((shown, code), (valid, 0));
    // Only where that is said: an image can name any file of the host.
    for words in [&["query", "-d", "-n"][..], &["info"], &["check", "-p", "-n"], &["coalesce", "-n"], &["fill", "-n"]]
    {
        let output = output(tool("vhd-util").args(words).arg(&paths[0]));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(libc::EINVAL), "{words:?}: {text}");
        assert!(text.contains("is in another folder") && text.contains("--parents of vhd-util"), "{words:?}: {text}");
    }
}

#[test]
fn a_parent_without_a_uuid_is_raw() {
    let folder = folder();
    let (leaf, raw) = (folder.path().join("leaf.vhd"), folder.path().join("disk.raw"));
    child(&leaf, 1, "./disk.raw", Uuid::NIL);
    std::fs::write(&raw, vec![0; 4096]).unwrap();
    let layers = below(folder.path(), &leaf).unwrap();
    assert!(layers.len() == 2 && layers[1].image.is_none() && layers[1].file_size == 4096, "{layers:?}");
}

#[test]
fn a_parent_that_is_not_there_or_another_is_refused() {
    let folder = folder();
    let paths = three(folder.path());
    child(&paths[1], 9, "../a/base.vhd", uuid(&paths[2]));
    let error = below(folder.path(), &paths[0]).unwrap_err();
    assert!(matches!(&error, Error::OtherParent { expected, .. } if *expected == Uuid([2; 16])), "{error}");
    let allowed = folder.path().to_str().unwrap();
    let (shown, code) = vhd_util(&["query", "-d", "--parents", allowed, "-n"], &paths[0]);
    assert_eq!((shown.as_str(), code), ("error checking chain depth: -22\n", libc::EINVAL));
    std::fs::remove_file(&paths[1]).unwrap();
    let error = below(folder.path(), &paths[0]).unwrap_err().to_string();
    assert!(error.contains("c/../b/größe 2.vhd") && error.contains("c/größe 2.vhd"), "{error}");
    assert_eq!(vhd_util(&["query", "-p", "-n"], &paths[0]), ("query failed\n".to_owned(), libc::ENOENT));
}

#[test]
fn a_parent_that_is_no_storage_is_refused_and_not_waited_for() {
    type Make = fn(&Path);
    let folder = folder();
    let [leaf, odd] = ["leaf.vhd", "odd"].map(|name| folder.path().join(name));
    let neither = "cannot open it: is neither a regular file nor a block device";
    let make: [(Make, &str); 4] = [
        (|path| run(Command::new("mkfifo").arg(path)).clear(), neither),
        (|path| std::fs::create_dir(path).unwrap(), "cannot open it: Is a directory"),
        (|path| drop(std::os::unix::net::UnixListener::bind(path).unwrap()), neither),
        (|path| std::os::unix::fs::symlink("/dev/tty", path).unwrap(), neither),
    ];
    for (make, text) in make {
        make(&odd);
        let text = format!("odd: {text}");
        for parent in [Uuid([9; 16]), Uuid::NIL] {
            child(&leaf, 1, "./odd", parent);
            let mut check = Command::new("timeout");
            check.arg("10").arg(tool("vhd-util").get_program()).args(["check", "-p", "-n"]).arg(&leaf);
            let output = output(&mut check);
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            assert!(output.status.code() != Some(124) && said.contains(&text), "{said}");
            let (code, said) = Served::refused(&vhd::table(&leaf), "[frontend.local]\nsocket = '{s}/ring'\n");
            assert!(code == 1 && said.contains(&text), "{said}");
        }
        // Those that are named themselves, too.
        for words in [&["check", "-n"][..], &["query", "-v", "-n"], &["scan"], &["coalesce", "-n"]] {
            let mut command = Command::new("timeout");
            let status = output(command.arg("10").arg(tool("vhd-util").get_program()).args(words).arg(&odd)).status;
            assert_ne!(status.code(), Some(124), "{words:?}");
        }
        std::fs::remove_file(&odd).or_else(|_| std::fs::remove_dir(&odd)).unwrap();
    }
}

#[test]
fn a_chain_without_an_end_is_refused() {
    let folder = folder();
    let [one, two] = ["one.vhd", "two.vhd"].map(|name| folder.path().join(name));
    child(&one, 1, "./two.vhd", Uuid([2; 16]));
    child(&two, 2, "./one.vhd", Uuid([1; 16]));
    let error = below(folder.path(), &one).unwrap_err();
    assert!(matches!(error, Error::Endless { .. }), "{error}");
    child(&one, 1, "./one.vhd", Uuid([1; 16]));
    assert!(matches!(below(folder.path(), &one).unwrap_err(), Error::Endless { .. }));
}

#[test]
fn what_is_wrong_with_an_image_is_said() {
    let folder = folder();
    let path = folder.path().join("image.vhd");
    base(&path);
    let whole = std::fs::read(&path).unwrap();
    let shown = path.display();
    // As blktap leaves an image that was in use when the host stopped.
    let mut bytes = whole.clone();
    let end = bytes.len() - FOOTER_SIZE;
    bytes[end..].fill(0xc7);
    std::fs::write(&path, &bytes).unwrap();
    let text = "its footer does not begin as one does (it can be used all the same)";
    assert_eq!(vhd_util(&["check", "-n"], &path), (format!("{shown}: {text}\n"), libc::EINVAL));
    assert_eq!(vhd_util(&["check", "-i", "-n"], &path), (format!("{shown} is valid\n"), 0));
    // Two blocks in one place.
    let mut bytes = whole;
    let table = chain::layer(&path).unwrap().image.unwrap().header.unwrap().table_at() as usize;
    bytes.copy_within(table + 12..table + 16, table + 20);
    std::fs::write(&path, &bytes).unwrap();
    let (text, code) = vhd_util(&["check", "-n"], &path);
    assert!(text.contains("blocks 3 and 5 overlap") && code == libc::EINVAL, "{text}");
    assert_eq!(vhd_util(&["check", "-B", "-n"], &path).1, 0);
    // Who asks for something else than the blocks need not hear of it.
    for (option, said) in [("-v", "64"), ("-f", "hidden: 0"), ("-d", "chain depth: 1"), ("-S", "64")] {
        assert_eq!(vhd_util(&["query", option, "-n"], &path), (format!("{said}\n"), 0));
    }
    assert_eq!(vhd_util(&["query", "-s", "-a", "-n"], &path).1, 0);
    assert_eq!(vhd_util(&["read", "-p", "-n"], &path).1, 0);
    assert_eq!(
        vhd_util(&["query", "-v", "-n"], Path::new("/none")),
        ("error opening /none: -2\n".to_owned(), libc::ENOENT)
    );
}
