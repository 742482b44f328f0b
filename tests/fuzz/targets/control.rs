//! Any bytes as a control message: always an answer, of whole messages; at once, as this disk has no other engine, but for a pause
//! and a close, and where its chain is looked at first.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mio::Poll;
use slog::{Discard, Logger, o};
use tapdisk::config::Config;
use tapdisk::control::proto::{MESSAGE_SIZE, Message, kind, text};
use tapdisk::control::{Late, Peer, Request, following, respond};
use tapdisk::minors::Minors;
use tapdisk::minors::marker::Marker;
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
    // Files of that machine are none of its business.
    if matches!(message.kind, kind::OPEN | kind::RESUME) && bytes[20] != 0 {
        return;
    }
    let world = ram(Abi::Native, 512, false);
    let mut polling = Polling::new(Settings::default());
    let log = Logger::root(Discard, o!());
    let directory = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.control.directory = directory.path().to_owned();
    let marker = Marker::take(directory.path(), Some(0)).unwrap();
    let poll = Poll::new().unwrap();
    let mut minors = Minors::new(config.into(), poll.registry().try_clone().unwrap(), 1, log.clone()).unwrap();
    minors.add(marker, Some(world.disk), false).unwrap();
    // What follows a message is whole when it is answered.
    let mut more = data.get(MESSAGE_SIZE..).unwrap_or_default().to_vec();
    more.resize(following::len(&message), 0);
    match respond(Request { message: &message, more: &more }, &Peer::Owner, &mut minors, &mut polling, &log) {
        Ok(answer) => assert!(answer.len() >= MESSAGE_SIZE),
        Err(late) => {
            let looks_first = matches!(late, Late::Commit(0) | Late::Coalesce(0));
            assert!(looks_first || matches!(late, Late::Pause(0) | Late::Close(0)), "{late:?}");
        }
    }
    let Settings { poll_us, poll_idle_percent } = polling.settings();
    assert!(poll_us <= POLL_US_MAX && poll_idle_percent <= 100);
});
