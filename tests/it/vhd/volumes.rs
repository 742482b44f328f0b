//! `vhd-util scan` of the logical volumes of a group.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::common::served::{folder, output};
use crate::common::small_fs::Loop;
use crate::common::vhd::vhd_util;

/// A volume group on a loop device. It goes with this.
struct Group {
    name: String,
    device: Loop,
}

/// Runs one of LVM's tools, which also work where the kernel has no device mapper.
fn lvm(words: &str) {
    let mut words = words.split_whitespace();
    let done = output(Command::new(words.next().unwrap()).args(["--driverloaded", "n"]).args(words));
    assert!(done.status.success(), "{done:?}");
}

impl Drop for Group {
    fn drop(&mut self) {
        output(Command::new("vgremove").args(["--driverloaded", "n", "-f", "-y", &self.name]));
    }
}

#[test]
fn volumes_are_scanned_though_they_are_not_active() {
    const EXTENT: usize = 4 << 20;
    let folder = folder();
    let disk = folder.path().join("disk");
    File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let Some(device) = Loop::new(&disk, 512) else { return };
    let group = Group { name: format!("VG_tapdisk_{}", std::process::id()), device };
    lvm(&format!("vgcreate {} {}", group.name, group.device.0));
    // The first has its second part behind the other. They are not active: nobody has a device for them.
    for command in ["lvcreate -L 8M -n VHD-a", "lvcreate -L 8M -n VHD-b", "lvextend -L 16M"] {
        let (program, rest) = command.split_once(' ').unwrap();
        let inactive = if program == "lvcreate" { "-an -Zn -Wn" } else { "" };
        let name = if program == "lvextend" { format!("{}/VHD-a", group.name) } else { group.name.clone() };
        lvm(&format!("{program} {inactive} {rest} {name}"));
    }
    let [a, b] = ["VHD-a", "VHD-b"].map(|name| folder.path().join(name));
    assert_eq!(vhd_util("create -n {} -s 100", &[&a]).code, 0);
    assert_eq!(vhd_util("snapshot -n {} -p {}", &[&b, &a]).code, 0);
    for (image, size) in [(&a, 4 * EXTENT), (&b, 2 * EXTENT)] {
        File::options().write(true).open(image).unwrap().set_len(size as u64).unwrap();
        assert_eq!(vhd_util(&format!("modify -n {{}} -s {size}"), &[image]).code, 0);
    }
    let to = File::options().write(true).open(&group.device.0).unwrap();
    let (a, b) = (std::fs::read(a).unwrap(), std::fs::read(b).unwrap());
    for (bytes, extent) in [(&a[..2 * EXTENT], 0), (&a[2 * EXTENT..], 4), (&b, 2)] {
        to.write_all_at(bytes, (1 << 20) + (extent * EXTENT) as u64).unwrap();
    }
    to.sync_all().unwrap();
    let line_a = "vhd=VHD-a capacity=104857600 size=16777216 hidden=0 parent=none\n";
    let line_b = "vhd=VHD-b capacity=104857600 size=8388608 hidden=0 parent=VHD-a\n";
    for how in ["scan -f -c", "scan -c"] {
        let said = vhd_util(&format!("{how} -m VHD-* -l {}", group.name), &[]);
        assert_eq!((said.code, said.out), (0, format!("{line_a}{line_b}")), "{}", said.err);
        let said = vhd_util(&format!("{how} -m VHD-b -a -l {}", group.name), &[]);
        assert_eq!((said.code, said.out), (0, format!("{line_b}{line_a}")), "{}", said.err);
    }
    let said = vhd_util("scan -f -m VHD-* -l VG_none", &[]);
    assert_eq!((said.code, said.out.as_str()), (libc::ENODEV, ""));
    assert!(said.err.contains("VG_none: lvs: ") && said.err.contains("VG_none"), "{}", said.err);
}
