//! A VHD image with some bytes changed and its checksums made right again: it is refused or read, what is read is within the
//! file, and what check and repair say is within it, too.
#![no_main]

use drivers::vhd::{
    FOOTER_SIZE, Footer, HEADER_SIZE, Header, Image, Kind, Locator, Platform, Repair, Source, Uuid, encode_path,
};
use libfuzzer_sys::fuzz_target;
use zerocopy::{FromBytes, IntoBytes};

const BLOCK: usize = 4096;
const TABLE: usize = FOOTER_SIZE + HEADER_SIZE;
const NAME: usize = TABLE + 512;
const BLOCKS: usize = NAME + 512;

struct Bytes(Vec<u8>);

impl Source for Bytes {
    fn size(&self) -> std::io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> std::io::Result<()> {
        to.copy_from_slice(&self.0[at as usize..][..to.len()]);
        Ok(())
    }
}

/// A differencing image with two of eight blocks.
fn image() -> Vec<u8> {
    let footer = Footer::new(Kind::Differencing, 8 * BLOCK as u64, Uuid([7; 16]), 1_000_000_000);
    let name = encode_path(Platform::MacX, "./parent.vhd");
    let mut header = Header::new(TABLE as u64, 8, BLOCK as u32);
    header.parent_uuid = Uuid([8; 16]);
    header.locators[0] = Locator::new(Platform::MacX, NAME as u64, name.len() as u32);
    header.seal();
    let mut file = [footer.as_bytes(), header.as_bytes(), &[0xff; 512], &name].concat();
    file.resize(BLOCKS + 2 * (512 + BLOCK), 0);
    for (block, at) in [(2, BLOCKS), (5, BLOCKS + 512 + BLOCK)] {
        file[TABLE + 4 * block..][..4].copy_from_slice(&((at / 512) as u32).to_be_bytes());
    }
    file.extend(footer.as_bytes());
    file
}

fuzz_target!(|data: &[u8]| {
    let mut file = image();
    // Five bytes each: where, and what.
    for change in data.chunks_exact(5) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % (file.len() - 3);
        file[at..at + 3].copy_from_slice(&change[2..]);
    }
    if data.len() % 5 == 0 {
        let last = file.len() - FOOTER_SIZE;
        for at in [0, last] {
            Footer::mut_from_bytes(&mut file[at..at + FOOTER_SIZE]).unwrap().seal();
        }
        Header::mut_from_bytes(&mut file[FOOTER_SIZE..TABLE]).unwrap().seal();
    } else if data.len() % 5 == 1 {
        file.truncate(file.len() - 16 * usize::from(data[0]));
    }
    let file = Bytes(file);
    let fatal = Image::check(&file, 0).unwrap().iter().any(|problem| problem.fatal);
    if let Ok(repair) = Repair::plan(&file, 0, true) {
        assert!(!fatal);
        for piece in repair.pieces {
            let end = piece.at + piece.bytes.len() as u64;
            let first = repair.image.table.allocated().map(|(_, at)| at).min();
            assert!(piece.at >= FOOTER_SIZE as u64 && first.is_none_or(|first| end <= first));
        }
    }
    let mut problems = Vec::new();
    let Ok(image) = Image::read(&file, &mut problems) else { return };
    let size = image.footer.size();
    assert!(size > 0 && size % 512 == 0);
    match image.header {
        None => assert!(size <= image.footer_at),
        Some(header) => {
            assert!(size <= header.size_max());
            for (_, at) in image.table.allocated() {
                assert!(at >= FOOTER_SIZE as u64 && at + header.block_len() <= image.footer_at);
            }
        }
    }
});
