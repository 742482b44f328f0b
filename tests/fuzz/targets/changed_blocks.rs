//! Any bytes as a log of changed blocks, and any extents of its disk: a log that fits its disk has a bit for each block, within the file,
//! and no block has another's.
#![no_main]

use drivers::Extent;
use drivers::changed_blocks::{BLOCK_SIZE, HEADER_SIZE, Header, add, bits, blocks, blocks_of, map_len};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((numbers, file)) = data.split_first_chunk::<24>() else { return };
    let number = |at: usize| u64::from_le_bytes(numbers[at..at + 8].try_into().unwrap());
    let (disk, offset, len) = (number(0), number(8), number(16));
    let file_len = file.len() as u64;
    let Ok(header) = Header::parse(file, file_len) else {
        assert!(file.len() < HEADER_SIZE);
        return;
    };
    if let Err(unfit) = header.check(file_len, disk) {
        assert!(header.file_len() > file_len || blocks(disk) > blocks(header.size()), "{unfit}");
        return;
    }
    let map = &file[HEADER_SIZE..][..map_len(header.size()) as usize];
    if offset >= disk || len == 0 {
        return;
    }
    let extent = Extent { offset, len: len.min(disk - offset) };
    let mut marked = map.to_vec();
    let mut count = 0;
    for (byte, mask) in bits(blocks_of(extent)) {
        // It is within the map, or this panics.
        marked[byte as usize] |= mask;
        count += u64::from(mask.count_ones());
    }
    let (first, last) = (extent.offset / BLOCK_SIZE, (extent.offset + extent.len - 1) / BLOCK_SIZE);
    assert_eq!(count, last - first + 1);
    for block in [first, last] {
        assert!(marked[(block / 8) as usize] & 1 << (block % 8) != 0);
    }
    let mut merged = map.to_vec();
    let more = add(&mut merged, &marked);
    assert!(merged == marked && more == (marked != map) && !add(&mut merged, map));
});
