//! Any bytes as a control message: always an answer, of whole messages; at once, as this disk has no other engine, but for a pause.
#![no_main]

use libfuzzer_sys::fuzz_target;
use slog::{Discard, Logger, o};
use tapdisk::control::proto::{MESSAGE_SIZE, Message, text};
use tapdisk::control::{Late, respond};
use tapdisk::frontend::blkif::wire::Abi;
use tapdisk::polling::{POLL_US_MAX, Polling, Settings};
use tapdisk_fuzz::world::ram;
use zerocopy::FromBytes;

fuzz_target!(|data: &[u8]| {
    let mut bytes = [0; MESSAGE_SIZE];
    let len = data.len().min(MESSAGE_SIZE);
    bytes[..len].copy_from_slice(&data[..len]);
    let message = Message::read_from_bytes(&bytes).unwrap();
    let _ = text(&bytes[8..]);
    let mut world = ram(Abi::Native, 512, false);
    let mut polling = Polling::new(Settings::default());
    let answer = respond(&message, 0, &mut world.disk, &mut polling, &Logger::root(Discard, o!()));
    match answer {
        Ok(answer) => assert!(answer.len() >= MESSAGE_SIZE),
        Err(late) => assert_eq!(late, Late::Pause),
    }
    let Settings { poll_us, poll_idle_percent } = polling.settings();
    assert!(poll_us <= POLL_US_MAX && poll_idle_percent <= 100);
});
