//! Images in memory for tests: small ones, with blocks of 4 KiB, on a medium that a crash can leave in each state that a real
//! one could.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;

use drivers::vhd::layout::{batmap_pieces, block_place};
use drivers::vhd::{
    Batmap, Corrupt, FOOTER_SIZE, Footer, HEADER_SIZE, Header, Image, Kind, Problem, Source, Table, Uuid, bitmap,
};
use zerocopy::IntoBytes;

use super::file::table_piece;
use super::file::{Medium, write_footers, write_pieces};

/// Bytes of a block.
const BLOCK: u32 = 4096;
/// Blocks of a disk.
const BLOCKS: u32 = 10;

/// What a crash may leave undone.
#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Length(u64),
}

/// A file or device in memory. What was written since the last sync may be lost, each write by itself.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    now: RefCell<Vec<u8>>,
    safe: RefCell<Vec<u8>>,
    pending: RefCell<Vec<Change>>,
    device: bool,
    /// Changes and syncs until it fails. None: never.
    left: Cell<Option<usize>>,
}

impl Memory {
    pub(super) fn new(bytes: Vec<u8>, device: bool) -> Memory {
        let safe = RefCell::new(bytes.clone());
        Memory { now: RefCell::new(bytes), safe, pending: RefCell::default(), device, left: Cell::new(None) }
    }

    /// The same content on a device of that size.
    pub(super) fn device_of(&self, size: u64) -> Memory {
        let mut bytes = self.now.borrow().clone();
        let footer = bytes.split_off(bytes.len() - FOOTER_SIZE);
        bytes.resize(size as usize - FOOTER_SIZE, 0x77);
        bytes.extend(footer);
        Memory::new(bytes, true)
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        self.now.borrow().clone()
    }

    /// Fails after so many changes and syncs.
    pub(super) fn failing_after(&self, left: usize) -> Memory {
        let memory = Memory::new(self.bytes(), self.device);
        memory.left.set(Some(left));
        memory
    }

    fn spend(&self) -> io::Result<()> {
        match self.left.get() {
            None => Ok(()),
            Some(0) => Err(io::Error::other("the test says so")),
            Some(left) => {
                self.left.set(Some(left - 1));
                Ok(())
            }
        }
    }

    fn change(&self, change: Change) -> io::Result<()> {
        self.spend()?;
        apply(&mut self.now.borrow_mut(), &change);
        self.pending.borrow_mut().push(change);
        Ok(())
    }

    /// What is there after a crash in which each change since the last sync was made or not, as `made` says.
    pub(super) fn crashed(&self, mut made: impl FnMut() -> bool) -> Memory {
        let mut bytes = self.safe.borrow().clone();
        for change in self.pending.borrow().iter().filter(|_| made()) {
            apply(&mut bytes, change);
        }
        Memory::new(bytes, self.device)
    }
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Length(len) => bytes.resize(*len as usize, 0),
        Change::Write(at, data) => {
            let end = *at as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*at as usize..end].copy_from_slice(data);
        }
    }
}

impl Source for Memory {
    fn size(&self) -> io::Result<u64> {
        Ok(self.now.borrow().len() as u64)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        let bytes = self.now.borrow();
        let from = bytes.get(at as usize..at as usize + to.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        to.copy_from_slice(from);
        Ok(())
    }
}

impl Medium for Memory {
    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(!self.device || at + bytes.len() as u64 <= self.now.borrow().len() as u64, "beyond the device's end");
        self.change(Change::Write(at, bytes.to_vec()))
    }

    fn sync(&self) -> io::Result<()> {
        self.spend()?;
        self.safe.replace(self.bytes());
        self.pending.borrow_mut().clear();
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.device { Ok(()) } else { self.change(Change::Length(len)) }
    }

    fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        self.write_at(at, &vec![0; len as usize])
    }

    fn is_device(&self) -> bool {
        self.device
    }
}

/// Runs `act` with a medium that fails after no change, one, two and so on, until it does not fail, and each time looks at
/// some of the states that a crash can leave then.
pub(super) fn crashes(start: &Memory, act: impl Fn(&Memory) -> io::Result<()>, look: impl Fn(&Memory)) {
    let mut random = fastrand::Rng::with_seed(7);
    let look = |after: &Memory| {
        assert_eq!(wrongly_full(after), []);
        look(after);
    };
    for left in 0.. {
        let memory = start.failing_after(left);
        let done = act(&memory).is_ok();
        look(&memory.crashed(|| true));
        look(&memory.crashed(|| false));
        for _ in 0..5 {
            look(&memory.crashed(|| random.bool()));
        }
        if done {
            assert!(left > 3, "nothing was done");
            return;
        }
    }
}

/// Blocks that the batmap says are full, and are not: a reader takes what is not held for data.
fn wrongly_full(memory: &Memory) -> Vec<Problem> {
    let mut problems = Image::check_bitmaps(memory).unwrap_or_default();
    problems.retain(|problem| matches!(problem.what, Corrupt::NotFull { .. }));
    problems
}

/// Lets an image's batmap say that a block is full which is not there, as programs do that know no batmaps.
pub(super) fn say_full(memory: &Memory, block: u32) {
    let mut batmap = image_of(memory).unwrap().batmap.unwrap();
    batmap.set(block, true);
    write_pieces(memory, &batmap_pieces(&batmap)).unwrap();
    memory.sync().unwrap();
}

/// An image that holds some sectors of some blocks, with a content that `seed` says.
pub(super) fn image(kind: Kind, device: bool, held: &[(u32, Range<u32>)], seed: u8) -> Memory {
    let size = u64::from(BLOCK * BLOCKS);
    let table_at = (FOOTER_SIZE + HEADER_SIZE) as u64;
    let mut header = Header::new(table_at, BLOCKS, BLOCK);
    if kind == Kind::Differencing {
        header.parent_uuid = Uuid([seed - 1; 16]);
        header.set_parent_name("parent.vhd");
        header.seal();
    }
    let mut batmap = Batmap::empty(table_at + Table::bytes(BLOCKS), BLOCKS);
    let mut table = Table::empty(BLOCKS);
    let memory = Memory::new(Vec::new(), false);
    let mut end = batmap.bits_at + batmap.bits().len() as u64;
    for (block, sectors) in held {
        let at = block_place(end, &header);
        end = at + header.block_len();
        table.set(*block, at);
        let mut bits = vec![0; header.bitmap_size() as usize];
        bitmap::set(&mut bits, sectors.clone());
        batmap.set(*block, *sectors == (0..BLOCK / 512));
        let data = |sector: u32| [seed ^ (17 * *block as u8) ^ (sector as u8) << 3; 512];
        memory.set_len(end).unwrap();
        memory.write_at(at, &bits).unwrap();
        for sector in sectors.clone() {
            memory.write_at(at + 512 + 512 * u64::from(sector), &data(sector)).unwrap();
        }
    }
    memory.write_at(FOOTER_SIZE as u64, header.as_bytes()).unwrap();
    write_pieces(&memory, &[table_piece(table_at, &table)]).unwrap();
    write_pieces(&memory, &batmap_pieces(&batmap)).unwrap();
    let footer = Footer::new(kind, size, Uuid([seed; 16]), 1_000_000_000);
    write_footers(&memory, &footer, end).unwrap();
    if device { memory.device_of(end + 200_000) } else { memory }
}

/// The disk of a chain of images, the leaf first; what the last one does not have is zeros.
pub(super) fn content(chain: &[&Memory]) -> Vec<u8> {
    let size = Image::read(chain[0], &mut Vec::new()).unwrap().footer.size() as usize;
    let mut content = vec![0; size];
    for memory in chain.iter().rev() {
        let image = Image::read(*memory, &mut Vec::new()).unwrap();
        let header = image.header.unwrap();
        for (block, at) in image.table.allocated() {
            let mut bits = vec![0; header.bitmap_size() as usize];
            memory.read_at(at, &mut bits).unwrap();
            for sector in (0..header.block_size() / 512).filter(|sector| bitmap::is_set(&bits, *sector)) {
                let begin = (block * header.block_size() + 512 * sector) as usize;
                let from = at + header.bitmap_size() + 512 * u64::from(sector);
                memory.read_at(from, &mut content[begin..begin + 512]).unwrap();
            }
        }
    }
    content
}

/// Its metadata, if it is an image.
pub(super) fn image_of(memory: &Memory) -> Option<Image> {
    Image::read(memory, &mut Vec::new()).ok()
}

/// What it can't be used with.
pub(super) fn fatal(memory: &Memory) -> Option<Problem> {
    Image::check(memory, u64::MAX).unwrap().into_iter().find(|problem| problem.fatal)
}

/// All that is wrong with it; that a device has old data where none is held, and a small image's locators, do not count.
pub(super) fn problems(memory: &Memory) -> Vec<Problem> {
    let mut problems = Image::check(memory, u64::MAX).unwrap();
    problems.extend(Image::check_bitmaps(memory).unwrap());
    problems.retain(|problem| !matches!(problem.what, Corrupt::HiddenData { .. }));
    problems
}
