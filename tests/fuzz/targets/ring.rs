//! Any bytes as ring entries and as data pages: each request gets exactly one response, and no read-only disk changes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tapdisk::disk::Turn;
use tapdisk::frontend::blkif::wire::{Abi, ENTRY_MAX, Entry};
use tapdisk_fuzz::world::{PAGES, ram};

fuzz_target!(|data: &[u8]| {
    let [setup, forged, data @ ..] = data else { return };
    let abi = [Abi::Native, Abi::X86_32, Abi::X86_64][usize::from(setup & 3) % 3];
    let sector_size = if setup & 4 == 0 { 512 } else { 4096 };
    let mut world = ram(abi, sector_size, setup & 8 != 0);
    let (entries, pages) = data.split_at(data.len() * usize::from(setup >> 4) / 15);
    let room = PAGES as usize * 4096;
    world.memory.write(4096, &pages[..pages.len().min(room)]);
    let mut sent = 0;
    for bytes in entries.chunks(ENTRY_MAX) {
        if world.front.room() == 0 {
            break;
        }
        let mut entry = [0; ENTRY_MAX];
        entry[..bytes.len()].copy_from_slice(bytes);
        world.front.push(&Entry::from_bytes(abi, entry));
        sent += 1;
    }
    world.front.publish();
    for _ in 0..200 {
        if world.disk.turn() == Turn::Nothing {
            break;
        }
    }
    let mut answered = 0;
    while world.front.pop().is_some() {
        answered += 1;
    }
    assert_eq!((answered, world.disk.outstanding(), world.queue.lock().unwrap().in_flight()), (sent, 0, 0));
    world.front.forge_req_prod(u32::from(*forged) << 25);
    world.disk.turn();
});
