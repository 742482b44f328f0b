//! What the targets share.

use std::time::Duration;

use mio::{Events, Poll};
use nix::errno::Errno;
use tapdisk::disk::{Disk, Turn};

#[path = "../common/double.rs"]
pub mod double;
#[path = "../common/world.rs"]
pub mod world;

/// How long a double waits for what must come.
const PATIENCE: Duration = Duration::from_secs(5);

/// A target's input, taken from its front. What is not there is 0.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// The next four, least significant first.
    pub fn number(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// The next `count`, or what there is.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (first, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        first
    }
}

/// Completes the engine's oldest I/Os, up to `count`, in one of five ways: what `how` says, from 4 on as they are.
pub fn complete(double: &double::Double, count: usize, how: u8) {
    for _ in 0..count.min(double.held()) {
        double.complete(match how {
            0 => Some(Err(Errno::EIO)),
            1 => Some(Ok(0)),
            2 => Some(Ok(512)),
            3 => Some(Err(Errno::ENOSPC)),
            _ => None,
        });
    }
}

/// What the main loop does for a disk with one frontend, until there is nothing more to do: at most `most` turns. True: there were some, or events.
pub fn settle(poll: &mut Poll, events: &mut Events, disk: &mut Disk, most: usize) -> bool {
    poll.poll(events, Some(Duration::ZERO)).unwrap();
    for event in &*events {
        disk.event(0, event.token().0, event);
    }
    let turns = (0..most).take_while(|_| disk.turn() != Turn::Nothing).count();
    assert!(turns < most, "there is always something to do");
    disk.arm();
    turns > 0 || !events.is_empty()
}
