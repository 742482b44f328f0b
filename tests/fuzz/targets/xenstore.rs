//! Any bytes as messages from XenStore, in pieces of any size, and as values that a guest writes: no panic, no message longer
//! than the protocol allows, and the same messages however they are cut.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tapdisk::frontend::xen::handshake::XenbusState;
use tapdisk::frontend::xen::xenbus::number;
use tapdisk::xenstore::wire::{Decoder, PAYLOAD_MAX, errno, texts};

fn messages(data: &[u8], piece: usize) -> Vec<(u32, u32, u32, Vec<u8>)> {
    let (mut decoder, mut found) = (Decoder::default(), Vec::new());
    for bytes in data.chunks(piece) {
        decoder.push(bytes);
        loop {
            match decoder.pull() {
                Ok(Some(message)) => found.push((message.kind.0, message.id, message.tx, message.payload)),
                Ok(None) => break,
                Err(_) => return found,
            }
        }
    }
    found
}

fuzz_target!(|data: &[u8]| {
    let [piece, data @ ..] = data else { return };
    let whole = messages(data, data.len().max(1));
    assert_eq!(whole, messages(data, usize::from(*piece) + 1));
    for (_, _, _, payload) in whole {
        assert!(payload.len() <= PAYLOAD_MAX);
        errno(&payload);
        texts(&payload).for_each(|text| assert!(text.len() <= payload.len()));
    }
    if let Some(number) = number(data) {
        assert_eq!(std::str::from_utf8(data).unwrap().trim_start_matches('0').parse::<u32>().unwrap_or(0), number);
    }
    XenbusState::parse(data);
});
