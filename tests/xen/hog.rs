//! A program that needs memory: `hog MIB` fills it, reads all of it again in random order, and checks every word.

use std::process::ExitCode;

/// 64 KiB: pieces that are read one after the other, so that swapping in takes long, but not for ever.
const PIECE: usize = 8192;

/// What a word must be: none is like another (splitmix64).
fn word(index: usize) -> u64 {
    let mut word = (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Each number below `count` once: a generator of full period, of which what is beyond is left out.
fn random_order(count: usize) -> impl Iterator<Item = usize> {
    let period = count.next_power_of_two();
    let mut at = 1;
    let numbers = std::iter::repeat_with(move || {
        at = (at * 1_664_525 + 1_013_904_223) % period;
        at
    });
    numbers.take(period).filter(move |number| *number < count)
}

fn main() -> ExitCode {
    let mib: usize = std::env::args().nth(1).and_then(|text| text.parse().ok()).expect("hog MIB");
    let pieces = mib * 16;
    let mut memory: Vec<u64> = Vec::with_capacity(pieces * PIECE);
    memory.extend((0..pieces * PIECE).map(word));
    println!("filled {mib} MiB");
    let mut checked = 0;
    for piece in random_order(pieces) {
        let first = piece * PIECE;
        for (i, found) in (first..).zip(&memory[first..first + PIECE]) {
            if *found != word(i) {
                println!("WRONG: word {i} is {found:#x}, not {:#x}", word(i));
                return ExitCode::FAILURE;
            }
        }
        checked += 1;
    }
    println!("OK {checked} pieces");
    ExitCode::SUCCESS
}
