//! Chains of up to three images with some bytes changed, and vhd-util's commands on them, one after the other: each succeeds or says
//! why not, in one line and a bounded time and memory, and writes nothing outside of the images' folder.
#![no_main]

use std::cell::OnceCell;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use drivers::vhd::{
    Batmap, FOOTER_SIZE, Footer, HEADER_SIZE, Header, Kind, Locator, Platform, Table, Uuid, encode_path,
};
use libfuzzer_sys::fuzz_target;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use tapdisk_fuzz::Input;
use tools::vhd_util::*;
use zerocopy::{FromBytes, IntoBytes};

const TABLE: usize = FOOTER_SIZE + HEADER_SIZE;
/// The largest file: what is larger fails, instead of filling the host's memory.
const FILE_MAX: u64 = 8 << 20;
/// The most that a command may print before standard output ends.
const OUTPUT_MAX: usize = 1 << 20;
/// Names of parents: others of the folder, its own, and what no image may name.
const PARENTS: [&str; 8] =
    ["./0.vhd", "./1.vhd", "./2.vhd", "./raw", "../outside.vhd", "./link.vhd", "sub/../../outside.vhd", "/dev/zero"];

/// The folder of the images, in another one with what must not be written.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        // It would end the process.
        SigSet::from_iter([Signal::SIGXFSZ]).thread_block().unwrap();
        setrlimit(Resource::RLIMIT_FSIZE, FILE_MAX, FILE_MAX).unwrap();
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let folder = Folder(tempfile::tempdir_in(parent).unwrap());
        fs::write(folder.outside(), outside()).unwrap();
        folder
    }

    fn outside(&self) -> PathBuf {
        self.0.path().join("outside.vhd")
    }

    fn images(&self) -> PathBuf {
        self.0.path().join("images")
    }

    fn image(&self, number: u8) -> PathBuf {
        self.images().join(format!("{}.vhd", number % 5))
    }

    /// Without what the last input left.
    fn clear(&self) {
        let _ = fs::remove_dir_all(self.images());
        fs::create_dir_all(self.images().join("sub")).unwrap();
        fs::write(self.images().join("raw"), [7; 5000]).unwrap();
        std::os::unix::fs::symlink("../outside.vhd", self.images().join("link.vhd")).unwrap();
    }

    fn check(&self) {
        assert_eq!(fs::read(self.outside()).unwrap(), outside(), "it wrote outside of the folder");
        assert_eq!(fs::read_dir(self.0.path()).unwrap().count(), 2, "it made something outside of the folder");
    }
}

thread_local! {
    static FOLDER: OnceCell<Folder> = const { OnceCell::new() };
}

fn uuid(number: u8) -> Uuid {
    Uuid([0x70 + number; 16])
}

/// An image that could be everybody's parent.
fn outside() -> Vec<u8> {
    let footer = Footer::new(Kind::Dynamic, 16 << 10, uuid(9), 1_000_000_000);
    let header = Header::new(TABLE as u64, 4, 4096);
    [footer.as_bytes(), header.as_bytes(), &[0xff; 512], footer.as_bytes()].concat()
}

/// An image of up to 300 blocks.
fn image(number: u8, input: &mut Input) -> Vec<u8> {
    let (shape, there, parent) = (input.byte(), input.byte(), input.byte());
    let blocks = 1 + (u32::from(input.byte()) | u32::from(shape & 1) << 8) % 300;
    let kind = match shape >> 1 & 3 {
        0 => Kind::Fixed,
        1 => Kind::Dynamic,
        _ => Kind::Differencing,
    };
    let block_size = 4096_u32 << (shape >> 3 & 3);
    let size = u64::from(blocks) * u64::from(block_size);
    let footer = Footer::new(kind, size, uuid(number), 1_000_000_000);
    if kind == Kind::Fixed {
        let mut bytes = vec![there; size as usize / 16];
        bytes.extend(footer.as_bytes());
        return bytes;
    }
    let name = PARENTS[usize::from(parent & 7)];
    let platform = [Platform::MacX, Platform::W2ru, Platform::W2ku][usize::from(parent >> 3) % 3];
    let name_bytes = encode_path(platform, name);
    let table_end = TABLE + Table::bytes(blocks) as usize;
    let mut header = Header::new(TABLE as u64, blocks, block_size);
    if kind == Kind::Differencing {
        header.parent_uuid = match parent & 7 {
            3 | 7 => Uuid::NIL,
            parent @ 0..3 => uuid(parent),
            _ => uuid(9),
        };
        header.set_parent_name(name);
        header.locators[usize::from(parent >> 5)] = Locator::new(platform, table_end as u64, name_bytes.len() as u32);
    }
    header.seal();
    let mut bytes = [footer.as_bytes(), header.as_bytes()].concat();
    bytes.resize(table_end, 0);
    bytes.extend(name_bytes);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    if shape & 0x20 == 0 {
        let mut full = Batmap::empty(bytes.len() as u64, blocks);
        full.set(0, there & 1 != 0);
        bytes.extend([full.header().as_slice(), full.bits()].concat());
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    let mut table = Table::empty(blocks);
    for block in (0..blocks.min(8)).filter(|block| there & 1 << block != 0) {
        table.set(block, bytes.len() as u64);
        bytes.extend([there; 512]);
        bytes.resize(bytes.len() + block_size as usize, there);
    }
    table.write(0, &mut bytes[TABLE..table_end]);
    bytes.extend(footer.as_bytes());
    bytes
}

/// Changes some of an image's bytes, most of them in its metadata, and makes its checksums right again.
fn change(bytes: &mut Vec<u8>, input: &mut Input) {
    let how = input.byte();
    let last = bytes.len() - FOOTER_SIZE;
    for _ in 0..how & 7 {
        let at = usize::from(input.byte()) | usize::from(input.byte()) << 8;
        let value = input.bytes(1 + usize::from(how >> 6));
        let at = at % bytes.len().saturating_sub(4).clamp(1, TABLE + 4096);
        if let Some(place) = bytes.get_mut(at..at + value.len()) {
            place.copy_from_slice(value);
        }
    }
    if how & 8 == 0 && last > TABLE {
        if how & 16 == 0 {
            bytes.copy_within(..FOOTER_SIZE, last);
        }
        for at in [0, last] {
            Footer::mut_from_bytes(&mut bytes[at..at + FOOTER_SIZE]).unwrap().seal();
        }
        Header::mut_from_bytes(&mut bytes[FOOTER_SIZE..TABLE]).unwrap().seal();
    }
    if how & 32 != 0 {
        bytes.truncate(bytes.len() - usize::from(input.byte()) * 16 % bytes.len());
    }
}

/// Standard output of which somebody has enough.
struct Output(Vec<u8>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_MAX {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.0.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Of which the output is text.
fn is_text(command: &Command) -> bool {
    !matches!(command, Command::Read(read) if [read.data, read.bitmap].iter().any(Option::is_some)
        || read.batmap || read.blocks || read.sectors.is_some() || read.bytes.is_some())
}

/// The journal of an image, as `tools/src/vhd_util/journal.rs` has it, that saves any two ranges.
fn journal(number: u8, input: &mut Input) -> Vec<u8> {
    let ranges =
        [0, 1].map(|_| (u64::from(input.number() % 100_000), u64::from(input.byte()) << (input.byte() % 24)));
    let count = usize::from(input.byte());
    let saved = input.bytes(count);
    let len = u64::from(input.number()) << (input.byte() % 64);
    let crc = u64::from(crc32c::crc32c(saved));
    let mut bytes = b"tapvhdrj".to_vec();
    bytes.extend(1u64.to_be_bytes());
    bytes.extend(uuid(number).0);
    let numbers = [len, crc, u64::from(input.byte() % 40), ranges[0].0, ranges[0].1, ranges[1].0, ranges[1].1];
    bytes.extend(numbers.iter().flat_map(|number| number.to_be_bytes()));
    bytes.resize(512, 0);
    bytes.extend(saved);
    bytes
}

/// One of those that only look, or one that changes something.
fn command(folder: &Folder, input: &mut Input) -> Command {
    let (what, options) = (input.byte(), input.byte());
    let (name, other) = (folder.image(what >> 5), folder.image(options & 7));
    match what & 31 {
        11..=19 | 22..=26 | 28 => change_command(folder, what, options, (name, other), input),
        _ => look_command(folder, what, options, (name, other), input),
    }
}

fn look_command(
    folder: &Folder,
    what: u8,
    options: u8,
    (name, other): (PathBuf, PathBuf),
    input: &mut Input,
) -> Command {
    let is = |bit: u8| options & bit != 0;
    match what & 31 {
        0..=3 => Command::Check(Check {
            name,
            ignore_footer: is(1),
            ignore_uuid: is(2),
            ignore_times: is(4),
            ignore_overlaps: is(8),
            parents: is(16),
            bitmaps: is(32),
            stats: is(64),
        }),
        4..=7 => read_command(name, options, input),
        8..=10 => Command::Query(Query {
            name,
            size: is(1),
            physical: is(2),
            parent: is(4),
            fields: is(8),
            marker: is(16),
            depth: is(32),
            allocated: is(64),
            largest: is(128),
            unresolved: what & 1 != 0,
            backup: what & 2 != 0,
        }),
        20 | 21 => Command::Scan(Scan {
            images: vec![name, other],
            pattern: is(8).then(|| format!("{}/*.vhd", folder.images().display())),
            fast: is(16),
            go_on: false,
            group: None,
            pretty: is(32),
            parents: is(64),
            verbose: is(128),
            markers: what & 1 != 0,
        }),
        27 => Command::Key(Key {
            name: Some(name),
            set: is(1),
            check: false,
            calculate: false,
            print: !is(1),
            key: None,
            hash: is(1).then(|| "5a".repeat(32)),
            nonce: None,
        }),
        _ => Command::Info { image: name, json: is(1) },
    }
}

fn read_command(name: PathBuf, options: u8, input: &mut Input) -> Command {
    let is = |bit: u8| options & bit != 0;
    let (first, which) = (input.number(), input.byte());
    let number = |mine: u8| (which & 7 == mine).then_some(first);
    let large = |mine: u8| (which & 15 == mine).then_some(u64::from(first) << (which >> 4));
    Command::Read(Read {
        name,
        print: is(1),
        block: number(0),
        blocks: is(2),
        bitmap: number(1),
        batmap: is(4),
        sector: large(2),
        bit: large(3),
        extents: large(4),
        full: None,
        data: number(5),
        sectors: large(6),
        bytes: large(7),
        cached: false,
        count: if is(8) { input.number() } else { u32::from(input.byte()) },
        hex: is(16),
    })
}

fn change_command(
    folder: &Folder,
    what: u8,
    options: u8,
    (name, other): (PathBuf, PathBuf),
    input: &mut Input,
) -> Command {
    let is = |bit: u8| options & bit != 0;
    match what & 31 {
        11..=13 => Command::Coalesce(Coalesce { name, sparse: is(8), progress: is(16) }),
        14 => Command::Convert(Convert {
            to: if is(32) { Format::Raw } else { Format::Vhd },
            from: is(64).then_some(if is(128) { Format::Raw } else { Format::Vhd }),
            source: name,
            target: other,
        }),
        15..=17 => Command::Resize(Resize {
            name,
            size: u64::from(input.byte()) << (options >> 4),
            journal: is(8).then(|| folder.images().join("journal")),
            fast: !is(8),
        }),
        18 => {
            // Otherwise what a resize has left.
            if is(8) {
                fs::write(folder.images().join("journal"), journal(what >> 5, input)).unwrap();
            }
            Command::Revert(Revert { name, journal: folder.images().join("journal") })
        }
        19 => Command::Repair(Repair { name, bitmaps: is(1) }),
        22 => Command::Set(Set { name, field: if is(1) { Field::Hidden } else { Field::Marker }, value: options }),
        23 => Command::Modify(Modify {
            name,
            parent: is(16).then_some(other),
            raw: is(32),
            size: is(64).then(|| u64::from(input.number() % (FILE_MAX as u32))),
            zero: is(128),
        }),
        24 => Command::Fill(Fill { name, blocks: is(1), from: None, to: None }),
        25 => Command::Copy(Copy { name, new_name: other, key: None, key_from_stdin: false }),
        26 => Command::Snapshot(Snapshot {
            name: other,
            parent: name,
            limit: is(16).then_some(2),
            raw: is(32),
            room: is(64).then(|| input.number().into()),
            even_empty: is(128),
        }),
        _ => Command::Create(Create { name: other, size: u64::from(input.byte()), reserve: false, room: None }),
    }
}

fuzz_target!(|data: &[u8]| {
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(Folder::new);
        folder.clear();
        let mut input = Input(data);
        let images = 1 + input.byte() % 3;
        for number in 0..images {
            let mut bytes = image(number, &mut input);
            change(&mut bytes, &mut input);
            fs::write(folder.image(number), bytes).unwrap();
        }
        for _ in 0..4 {
            if input.is_empty() {
                break;
            }
            let command = command(folder, &mut input);
            let text = is_text(&command);
            let lines =
                if matches!(&command, Command::Coalesce(coalesce) if coalesce.progress) { "\r\n" } else { "\n" };
            let mut out = Output(Vec::new());
            let done = run_to(&Args { debug: false, folders: Vec::new(), command }, &mut out);
            let said = done.err().map_or(String::new(), |(_, text)| text);
            let printed = String::from_utf8_lossy(&out.0);
            for shown in [said.as_str(), if text { &printed } else { "" }] {
                assert!(!shown.chars().any(|c| c.is_control() && !lines.contains(c)), "{shown:?}");
            }
        }
        folder.check();
    });
});
