//! VHD images as others make and read them: chains by libvhdi, old footers and batmaps, other creators; and what space they take.

use std::fs::OpenOptions;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::guest::Guest;
use crate::common::served::{Served, folder, run};
use crate::common::vhd::{bytes, change, disk, good, write};
use crate::common::vhd_made::{self as vhd, check, content, image, stop, table};
use drivers::vhd::{FOOTER_SIZE, Footer, bitmap};
use zerocopy::{FromBytes, IntoBytes};

const BOTH: &str = "[frontend.local]\nsocket = '{s}/ring'\n[frontend.nbd]\nsocket = '{s}/nbd'\n";
const MIB: u64 = 1 << 20;

fn start(path: &Path) -> Served {
    Served::start(&table(path), BOTH)
}

/// Debian's Python, which has nbd and pyvhdi.
fn debian(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", "/usr/bin:/bin");
    command
}

fn nbdsh(served: &Served, script: &str) {
    run(debian("nbdsh").args(["-u", &served.nbd(), "-c", script]));
}

/// The disk of a chain of images, the base first, by way of libvhdi.
fn by_libvhdi(chain: &[PathBuf]) -> Vec<u8> {
    const SCRIPT: &str = "
import pyvhdi, sys
chain = []
for path in sys.argv[2:]:
    image = pyvhdi.file()
    image.open(path)
    if chain:
        assert image.get_parent_identifier() == chain[-1].get_identifier(), path
        image.set_parent(chain[-1])
    # An image does not keep its parent alive.
    chain.append(image)
with open(sys.argv[1], 'wb') as raw:
    size = image.get_media_size()
    for at in range(0, size, 1 << 20):
        raw.write(image.read_buffer_at_offset(min(1 << 20, size - at), at))
";
    let raw = chain[0].with_extension("raw");
    run(debian("python3").args(["-c", SCRIPT]).arg(&raw).args(chain));
    std::fs::read(raw).unwrap()
}

/// As long and the same, or where the first difference is.
fn same(found: &[u8], expected: &[u8], what: &str) {
    let first = found.iter().zip(expected).position(|(one, other)| one != other);
    assert_eq!((found.len(), first), (expected.len(), None), "{what}");
}

#[test]
fn libvhdi_reads_a_chain_as_we_do() {
    let folder = folder();
    let chain = [0, 1, 2].map(|number| folder.path().join(format!("{number}.vhd")));
    let mut random = fastrand::Rng::with_seed(21);
    let mut model = vec![0; 34 << 20];
    for (number, path) in chain.iter().enumerate() {
        match number {
            0 => good("create -n {} -s 34", &[path]),
            _ => good("snapshot -n {} -p {}", &[path, &chain[number - 1]]),
        };
        let served = start(path);
        let mut guest = Guest::connect(&served.ring());
        for _ in 0..60 {
            let sectors = random.u64(1..80);
            // libvhdi 20210425 takes what follows on a run, up to the next eighth sector, for part of the run.
            let sector = random.u64(80..=34 * 2048).next_multiple_of(8) - sectors;
            let data: Vec<_> = std::iter::repeat_with(|| random.u8(..)).take(sectors as usize * 512).collect();
            assert_eq!(guest.write(sector, &data), 0);
            model[sector as usize * 512..][..data.len()].copy_from_slice(&data);
        }
        drop(guest);
        stop(served, path);
        // A whole block, and zeros that hide what is below.
        let served = start(path);
        nbdsh(
            &served,
            &format!(
                "h.pwrite(b'{number}' * (2 << 20), {number} * (4 << 20))\nh.zero(8192, (20 << 20) + {number} * 4096)"
            ),
        );
        model[number * (4 << 20)..][..2 << 20].fill(b'0' + number as u8);
        model[(20 << 20) + number * 4096..][..8192].fill(0);
        stop(served, path);
        same(&disk(path), &model, &format!("{number} by vhd-util convert"));
        same(&by_libvhdi(&chain[..=number]), &model, &format!("{number} by libvhdi"));
    }
}

#[test]
fn a_footer_may_lack_its_last_byte() {
    for kind in ["fixed", "dynamic"] {
        let folder = folder();
        let path = vhd::make(folder.path(), kind);
        let served = start(&path);
        nbdsh(&served, "h.pwrite(b'a' * (3 << 20), 1 << 20)");
        let mut model = content(&served, folder.path());
        stop(served, &path);
        let len = path.metadata().unwrap().len();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(len - 1).unwrap();
        assert_eq!(check(&path, &[]), (format!("{} is valid\n", path.display()), 0), "{kind}");
        assert!(disk(&path) == model, "{kind}");
        let served = start(&path);
        assert!(content(&served, folder.path()) == model, "{kind}");
        // What is there, and a new block where the footer is, of those that have some.
        nbdsh(
            &served,
            "h.pwrite(b'b' * 4096, 2 << 20)\nh.pwrite(b'c' * 4096, 40 << 20)\nh.pwrite(b'd' * 512, (64 << 20) - 512)",
        );
        model[2 << 20..][..4096].fill(b'b');
        model[40 << 20..][..4096].fill(b'c');
        model[(64 << 20) - 512..].fill(b'd');
        assert!(content(&served, folder.path()) == model, "{kind}, written");
        stop(served, &path);
        assert!(disk(&path) == model, "{kind}, closed");
        assert!(content(&start(&path), folder.path()) == model, "{kind}, opened again");
    }
}

/// Where version and checksum are in a batmap's header.
const BATMAP_VERSION: u64 = 20;

#[test]
fn an_early_batmap_is_used_if_its_checksum_is_right() {
    for right in [true, false] {
        let folder = folder();
        let path = folder.path().join("disk.vhd");
        good("create -n {} -s 64", &[&path]);
        // Bits from 0x80 on, which early versions of blktap took for negative numbers.
        write(&path, 0, 18 * MIB, 5);
        write(&path, 30 * MIB, 2 * MIB, 6);
        let mut model = vec![0; 64 << 20];
        model[..18 << 20].fill(5);
        model[30 << 20..][..2 << 20].fill(6);
        let batmap = image(&path).batmap.unwrap();
        assert_eq!(batmap.bits()[..3], [0xff, 0x81, 0]);
        let signed = !batmap.bits().iter().fold(0, |sum: u32, byte| sum.wrapping_add_signed((*byte as i8).into()));
        let unsigned = !batmap.bits().iter().map(|byte| u32::from(*byte)).sum::<u32>();
        assert_ne!(signed, unsigned);
        let sum = if right { signed } else { unsigned };
        change(&path, batmap.at + BATMAP_VERSION, &[0x0001_0001_u32.to_be_bytes(), sum.to_be_bytes()].concat());
        let found = image(&path).batmap.unwrap();
        assert_eq!([0, 8, 9, 15].map(|block| found.is_full(block)), [right, right, false, right]);
        let (said, code) = check(&path, &[]);
        assert_eq!(code == 0, right, "{said}");
        assert!(right || said.contains("batmap") && said.contains("checksum"), "{said}");
        assert!(disk(&path) == model, "{right}");
        let served = start(&path);
        assert!(content(&served, folder.path()) == model, "{right}");
        // A block becomes full, and one that was not.
        nbdsh(&served, "h.pwrite(b'x' * (2 << 20), 18 << 20)\nh.pwrite(b'y' * 512, 40 << 20)");
        model[18 << 20..][..2 << 20].fill(b'x');
        model[40 << 20..][..512].fill(b'y');
        stop(served, &path);
        let after = image(&path);
        assert_eq!(bytes(&path, batmap.at + BATMAP_VERSION, 4), 0x0001_0002_u32.to_be_bytes());
        let batmap = after.batmap.unwrap();
        assert!(batmap.is_full(9));
        // None that is not full may be said to be.
        let header = after.header.unwrap();
        for (block, at) in after.table.allocated() {
            let bits = bytes(&path, at, header.bitmap_size() as usize);
            assert!(!batmap.is_full(block) || bitmap::is_full(&bits, header.block_size() / 512), "block {block}");
        }
        assert!(disk(&path) == model && content(&start(&path), folder.path()) == model, "{right}, written");
    }
}

/// Says in both footers, or the one, who has made an image, and which geometry it has.
fn made_by(path: &Path, creator: &[u8; 4], cylinders: u16, heads: u8, sectors: u8) {
    let file = std::fs::read(path).unwrap();
    let last = file.len() - FOOTER_SIZE;
    for at in [0, last] {
        if let Ok(footer) = Footer::parse(&file[at..at + FOOTER_SIZE]) {
            let mut bytes = footer.as_bytes().to_vec();
            bytes[28..32].copy_from_slice(creator);
            bytes[56..58].copy_from_slice(&cylinders.to_be_bytes());
            bytes[58..60].copy_from_slice(&[heads, sectors]);
            Footer::mut_from_bytes(&mut bytes).unwrap().seal();
            change(path, at as u64, &bytes);
        }
    }
}

#[test]
fn a_disk_is_as_large_as_its_creator_meant() {
    const FIELD: u64 = 64 * 2048;
    const GEOMETRY: u64 = 500 * 8 * 17;
    for kind in ["fixed", "dynamic"] {
        let folder = folder();
        let path = vhd::make(folder.path(), kind);
        for (creator, expected) in [
            (b"vbox", FIELD),
            (b"win ", FIELD),
            (b"d2v ", FIELD),
            (b"CTXS", FIELD),
            (b"qem2", FIELD),
            (b"vpc ", GEOMETRY),
            (b"qemu", GEOMETRY),
        ] {
            let name = String::from_utf8_lossy(creator);
            made_by(&path, creator, 500, 8, 17);
            let served = start(&path);
            let mut guest = Guest::connect(&served.ring());
            assert_eq!(guest.disk.sectors, expected, "{kind}, {name}");
            assert_eq!(guest.write(expected - 8, &[7; 4096]), 0);
            assert_eq!(guest.write(expected - 7, &[7; 4096]), -1);
            drop(guest);
            stop(served, &path);
            assert_eq!(good("query -v -n {}", &[&path]).trim(), (expected / 2048).to_string(), "{kind}, {name}");
            let disk = disk(&path);
            assert_eq!(disk.len() as u64, expected * 512, "{kind}, {name}");
            assert_eq!(disk[disk.len() - 4096..], [7; 4096], "{kind}, {name}");
            // QEMU goes by the same rules.
            let shown = run(Command::new("qemu-img").args(["info", "-f", "vpc", "--output=json"]).arg(&path));
            let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
            let by_qemu = shown["virtual-size"].as_u64().unwrap();
            assert!(by_qemu == expected * 512 || !matches!(creator, b"vpc " | b"qemu" | b"qem2" | b"win "), "{name}");
            // None there, or the largest there is: only the field is left.
            for (cylinders, heads, sectors) in [(0, 8, 17), (65535, 16, 255)] {
                made_by(&path, creator, cylinders, heads, sectors);
                let served = start(&path);
                assert_eq!(Guest::connect(&served.ring()).disk.sectors, FIELD, "{kind}, {name}, {cylinders}");
            }
        }
    }
}

/// Bytes that a file takes of its file system.
fn space(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

#[test]
fn the_space_of_discarded_blocks_is_given_back() {
    for kind in ["dynamic", "fixed"] {
        let folder = folder();
        let path = vhd::make(folder.path(), kind);
        let served = start(&path);
        nbdsh(&served, "h.pwrite(b'a' * (16 << 20), 0)\nh.flush()");
        let before = space(&path);
        assert!(before >= 16 * MIB, "{before}");
        nbdsh(&served, "h.trim(8 << 20, 4 << 20)\nh.flush()");
        let after = space(&path);
        assert!(after <= before - 8 * MIB + 256 * 1024, "{kind}: {before}, {after}");
        let mut model = vec![0; 64 << 20];
        model[..4 << 20].fill(b'a');
        model[12 << 20..16 << 20].fill(b'a');
        assert!(content(&served, folder.path()) == model, "{kind}");
        stop(served, &path);
        let closed = space(&path);
        assert!(closed <= before - 8 * MIB + 256 * 1024, "{kind}: {before}, {closed}");
        assert!(content(&start(&path), folder.path()) == model, "{kind}, opened again");
    }
}

#[test]
fn space_is_set_apart_ahead_and_given_back_at_the_end() {
    let folder = folder();
    let path = folder.path().join("disk.vhd");
    for (preallocate, least, most) in [(0, 0, 4 * MIB), (32, 32 * MIB, 40 * MIB)] {
        let _ = std::fs::remove_file(&path);
        vhd::create(&path, "dynamic", 256);
        let served = Served::start(&format!("{}\npreallocate = '{preallocate} MiB'", table(&path)), BOTH);
        nbdsh(&served, "h.pwrite(b'a' * 4096, 8 << 20)\nh.flush()");
        let taken = space(&path);
        assert!((least..=most).contains(&taken), "{preallocate}: {taken}");
        // What was set apart is used up to the half of it before there is more.
        nbdsh(&served, "for i in range(5): h.pwrite(b'b' * 4096, (10 + 2 * i) << 20)\nh.flush()");
        assert!(preallocate == 0 || space(&path) < taken + MIB, "{taken}, {}", space(&path));
        stop(served, &path);
        assert!(space(&path) <= 24 * MIB, "{}", space(&path));
        let expected = image(&path).physical_size();
        assert_eq!(path.metadata().unwrap().len(), expected, "{preallocate}");
    }
}
