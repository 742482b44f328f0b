//! Names of volumes: block devices that a volume manager makes. A device's node, such as /dev/dm-3, is another volume's after the next
//! boot; what lasts is the name that udev gives it:
//!
//! ```text
//! /dev/VG/LV, /dev/mapper/VG-LV        a logical volume; in the second, dashes within VG and LV are doubled (dmsetup(8), lvm(8))
//! /dev/drbd/by-res/RESOURCE/VOLUME     a volume of DRBD, which LINSTOR makes (drbd(8))
//! ```
//!
//! blktap's vhd-util has /dev/mapper/VG-LV for both names of a logical volume, and names an image's parent relative to that folder, whatever
//! name the image was opened by.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

const MAPPER: &str = "/dev/mapper";
const DRBD: &str = "/dev/drbd/by-res";
/// Links that lead from one to the next, at most (the kernel's own limit).
const LINKS_MAX: usize = 40;

/// A path from the root that leads through no link but, it may be, the last part.
fn absolute(path: &Path) -> io::Result<PathBuf> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match path.file_name() {
        Some(name) => Ok(folder.canonicalize()?.join(name)),
        None => path.canonicalize(),
    }
}

/// The name by which a file or a volume is found after the next boot, from the root: a file's without links, a volume's as udev has it. That
/// of a device which udev has no such name for is its node.
pub fn lasting_name(path: &Path) -> io::Result<PathBuf> {
    let device = path.metadata()?;
    if !device.file_type().is_block_device() {
        return path.canonicalize();
    }
    let mut name = absolute(path)?;
    for _ in 0..LINKS_MAX {
        let link = name.symlink_metadata()?.file_type().is_symlink();
        if link && !name.starts_with("/dev") {
            // A link that somebody made, to a name or to a node.
            name = absolute(&name.parent().unwrap_or(Path::new("/")).join(name.read_link()?))?;
            continue;
        }
        if name.starts_with(MAPPER) || name.starts_with(DRBD) {
            return Ok(name);
        }
        let found = in_folder(Path::new(MAPPER), &device).or_else(|| in_resources(&device));
        return Ok(found.unwrap_or(name));
    }
    path.canonicalize()
}

/// Whether a name is a device's node, which is another's after the next boot.
pub fn is_passing(path: &Path) -> bool {
    let name = path.strip_prefix("/dev").ok().and_then(Path::to_str).unwrap_or_default();
    ["dm-", "drbd", "loop", "nbd", "zd"].iter().any(|kind| {
        name.strip_prefix(kind)
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit()))
    })
}

/// The name in a folder that is that device's.
fn in_folder(folder: &Path, device: &Metadata) -> Option<PathBuf> {
    let same = |path: &PathBuf| {
        path.metadata().is_ok_and(|found| found.file_type().is_block_device() && found.rdev() == device.rdev())
    };
    let mut names: Vec<_> = std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    names.sort();
    names.into_iter().find(same)
}

/// The device mapper's name of a block device. None: it is none of its.
pub fn mapper_name(device: &Metadata) -> Option<PathBuf> {
    device.file_type().is_block_device().then(|| in_folder(Path::new(MAPPER), device)).flatten()
}

/// The same among the volumes of DRBD's resources.
fn in_resources(device: &Metadata) -> Option<PathBuf> {
    std::fs::read_dir(DRBD).ok()?.filter_map(|entry| in_folder(&entry.ok()?.path(), device)).next()
}

/// A volume's group and its name there, of one of the names above. None: it is no such name.
pub fn group_and_name(path: &Path) -> Option<(String, String)> {
    let parts: Vec<_> = path.strip_prefix("/dev").ok()?.to_str()?.split('/').collect();
    match parts[..] {
        ["mapper", name] => mapper_parts(name),
        ["drbd", "by-res", resource, volume] => Some(("drbd".to_owned(), format!("{resource}/{volume}"))),
        // Folders of others that udev makes in /dev.
        ["disk" | "block" | "char" | "input" | "cpu" | "shm" | "pts", _] => None,
        [group, name] => Some((group.to_owned(), name.to_owned())),
        _ => None,
    }
}

/// Group and volume of a name as the device mapper has it: a single dash is between them, and those within are doubled.
pub fn mapper_parts(name: &str) -> Option<(String, String)> {
    let bytes = name.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], bytes.get(at + 1)) {
            (b'-', Some(b'-')) => at += 2,
            (b'-', Some(_)) if at > 0 => {
                let single = |part: &str| part.replace("--", "-");
                return Some((single(&name[..at]), single(&name[at + 1..])));
            }
            _ => at += 1,
        }
    }
    None
}

/// Where a file may be that an image names relative to itself: the folder of its lasting name, as blktap has it, and then the one that it
/// was opened in.
pub fn folders(image: &Path) -> Vec<PathBuf> {
    let folder = |path: &Path| path.parent().map(Path::to_owned);
    let own = folder(image).unwrap_or_default();
    let mut folders: Vec<_> = lasting_name(image).ok().as_deref().and_then(folder).into_iter().collect();
    if own.canonicalize().ok().as_ref() != folders.first() {
        folders.push(own);
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_device_mapper_have_two_parts() {
        let parts = |group: &str, name: &str| Some((group.to_owned(), name.to_owned()));
        for (name, expected) in [
            ("vg-lv", parts("vg", "lv")),
            ("VG_XenStorage--1234--ab-VHD--77--cd", parts("VG_XenStorage-1234-ab", "VHD-77-cd")),
            ("a--b-c", parts("a-b", "c")),
            ("a-b--c--d", parts("a", "b-c-d")),
            ("control", None),
            ("luks--x", None),
            ("-x", None),
            ("x-", None),
        ] {
            assert_eq!(mapper_parts(name), expected, "{name}");
            let path = Path::new(MAPPER).join(name);
            assert_eq!(group_and_name(&path), expected, "{name}");
        }
        let lvm = group_and_name(Path::new("/dev/vg-a/VHD-1"));
        assert_eq!(lvm, parts("vg-a", "VHD-1"));
        let drbd = group_and_name(Path::new("/dev/drbd/by-res/xcp-volume-1/0"));
        assert_eq!(drbd, parts("drbd", "xcp-volume-1/0"));
        for none in ["/dev/sda", "/dev/dm-3", "/dev/disk/by-id", "/srv/vm/a.vhd", "/dev/mapper/x/y"] {
            assert_eq!(group_and_name(Path::new(none)), None, "{none}");
        }
    }

    #[test]
    fn nodes_have_passing_names() {
        for (path, passing) in [
            ("/dev/dm-3", true),
            ("/dev/drbd1000", true),
            ("/dev/loop0", true),
            ("/dev/drbd", false),
            ("/dev/loop-control", false),
            ("/dev/mapper/dm-3", false),
            ("/dev/sda", false),
        ] {
            assert_eq!(is_passing(Path::new(path)), passing, "{path}");
        }
    }

    #[test]
    fn a_file_is_found_beside_what_a_link_leads_to_first() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("there")).unwrap();
        std::fs::write(root.join("there/leaf"), b"").unwrap();
        std::os::unix::fs::symlink("there/leaf", root.join("leaf")).unwrap();
        assert_eq!(lasting_name(&root.join("leaf")).unwrap(), root.join("there/leaf"));
        assert_eq!(folders(&root.join("leaf")), [root.join("there"), root.clone()]);
        assert_eq!(folders(&root.join("there/leaf")), [root.join("there")]);
    }
}
