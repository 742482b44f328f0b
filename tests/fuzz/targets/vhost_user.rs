//! A vhost-user front end and its guest, in any order of events: messages that are good, half, torn or wrong, with any descriptors; rings whose
//! descriptors and indices are anything; memory that comes and goes; while the engine completes, fails and refuses. Every turn ends, what is in
//! flight is finished, and who hangs up leaves nothing.
#![no_main]

use std::cell::RefCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use mio::{Events, Poll};
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::MsgFlags;
use slog::{Discard, Logger, o};
use std::os::unix::net::UnixStream;
use tapdisk::disk::{Disk, Resume};
use tapdisk::engine::Inline;
use tapdisk::frontend::vhost_user::{Config, VhostUser};
use tapdisk::polling::{Polling, Settings};
use tapdisk::stats::now;
use tapdisk::sys::fdpass;
use tapdisk::sys::memory::Memory;
use tapdisk_fuzz::double::Double;
use tapdisk_fuzz::world::{disk, info};
use tapdisk_fuzz::{Input, complete, settle};

/// More turns than there can be without an event.
const TURNS: usize = 2000;
/// The most refusals of the engine.
const REFUSALS: usize = 100;
/// Bytes of the guest's memory; its addresses begin at `GUEST`, and its front end has them at `USER`.
const MEMORY: usize = 64 << 10;
const GUEST: u64 = 1 << 20;
const USER: u64 = 1 << 30;
/// Where the parts of a ring are, each ring's a page further on.
const PARTS: [u64; 3] = [0, 0x200, 0x400];

struct World {
    poll: Poll,
    events: Events,
    disk: Disk,
    double: Double,
    socket: PathBuf,
    client: Option<UnixStream>,
    file: OwnedFd,
    guest: Memory,
    kick: EventFd,
    connections: usize,
    refusals: usize,
}

thread_local! {
    static FOLDER: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
}

fn world(setup: u8) -> World {
    let socket = FOLDER
        .with_borrow_mut(|folder| folder.get_or_insert_with(|| tempfile::tempdir().unwrap()).path().join("vhost"));
    let info = info(if setup & 1 == 0 { 512 } else { 4096 }, setup & 2 != 0);
    let config = Config { socket: socket.clone(), queues: 2, serial: *b"01234567890123456789" };
    let frontend = VhostUser::bind(config, info.clone(), Logger::root(Discard, o!())).unwrap();
    let (double, engine) = Double::engine(1 + usize::from(setup >> 4), Inline::Always);
    let mut disk = disk(Box::new(frontend), info, engine);
    let poll = Poll::new().unwrap();
    disk.register(poll.registry(), |_| 0).unwrap();
    let file = memfd_create(c"guest", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&file, MEMORY as i64).unwrap();
    World {
        poll,
        events: Events::with_capacity(64),
        disk,
        double,
        socket,
        client: None,
        guest: Memory::shared(&file, MEMORY).unwrap(),
        file,
        kick: EventFd::new().unwrap(),
        connections: 0,
        refusals: 0,
    }
}

impl World {
    /// True: there was something to do.
    fn settle(&mut self) -> bool {
        settle(&mut self.poll, &mut self.events, &mut self.disk, TURNS)
    }

    fn connect(&mut self) {
        if self.connections < 100 {
            self.connections += 1;
            self.client = Some(UnixStream::connect(&self.socket).unwrap());
        }
    }

    fn send(&self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd]) {
        let Some(client) = &self.client else { return };
        let header = [request, 1 | flags, body.len() as u32].map(u32::to_le_bytes).concat();
        // It may have been hung up on.
        let _ = fdpass::send(client.as_fd(), &[&header, body].concat(), fds);
        // What it says is not listened to, but taken.
        let mut said = [0; 4096];
        let _ = fdpass::receive(client.as_fd(), &mut said, MsgFlags::MSG_DONTWAIT);
    }

    /// All that it takes for a ring to be served, with mistakes in some.
    fn set_up(&self, input: &mut Input) {
        let (how, odd) = (input.byte(), u64::from(input.byte()));
        let wrong = |bit: u8| if how >> bit & 1 != 0 { odd } else { 0 };
        let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let features = 1 << 30 | 1 << 32 | 1 << 28 | 1 << 13 | 1 << 14 | wrong(0) << 26;
        self.send(16, 0, &words(&[1 | 1 << 3 | 1 << 9 | 1 << 15]), &[]);
        self.send(2, 8, &words(&[features]), &[]);
        let region = [0, GUEST + wrong(1), MEMORY as u64 - wrong(2), USER, wrong(3)];
        self.send(37, 8, &words(&region), &[self.file.as_fd()]);
        for ring in 0..2_u64 {
            let state = |value: u64| words(&[ring | value << 32]);
            self.send(8, 8, &state(16 + wrong(4)), &[]);
            self.send(10, 8, &state(wrong(5)), &[]);
            let [table, available, used] = PARTS.map(|part| USER + ring * 4096 + part + wrong(6));
            self.send(9, 8, &words(&[ring, table, used, available, 0]), &[]);
            self.send(12, 8, &words(&[ring]), &[self.kick.as_fd()]);
            self.send(18, 8, &state(1), &[]);
        }
    }

    /// A chain of requests' shape, most of them good, made available.
    fn offer(&self, input: &mut Input) {
        let (ring, kind, shape) = (usize::from(input.byte() & 1) * 4096, input.byte(), input.byte());
        let head = u16::from(shape & 3) * 4;
        let data = 0x4000 + usize::from(shape >> 2) * 64;
        self.guest.write(data, &[u32::from(kind & 15).to_le_bytes(), [0; 4]].concat());
        self.guest.write(data + 8, &u64::from(input.byte() & 127).to_le_bytes());
        let len = u32::from(input.byte()) * 512 + u32::from(kind >> 6);
        let writable = if kind & 15 == 0 || kind & 15 == 8 { 2 } else { 0 };
        let chain = [(0, 16, 1, 1), (0x100 + u64::from(kind >> 4), len, 1 | writable, 2), (0x3f, 1, 2, 0)];
        for (i, (at, len, flags, next)) in chain.into_iter().enumerate() {
            let at = GUEST + data as u64 + at;
            let [flags, next] = [flags, head + next].map(|word: u16| word.to_le_bytes());
            let bytes = [&at.to_le_bytes()[..], &len.to_le_bytes()[..], &flags, &next].concat();
            self.guest.write(ring + 16 * (usize::from(head) + i), &bytes);
        }
        let mut index = [0; 2];
        self.guest.read(ring + 0x202, &mut index);
        let index = u16::from_le_bytes(index);
        self.guest.write(ring + 0x204 + 2 * usize::from(index % 16), &head.to_le_bytes());
        self.guest.write(ring + 0x202, &index.wrapping_add(1).to_le_bytes());
        let _ = self.kick.write(1);
    }

    /// It leaves, all completes, and nothing is left.
    fn end(&mut self) {
        self.client = None;
        let mut idle = 0;
        for _ in 0..TURNS {
            idle = if self.settle() || self.double.held() > 0 { 0 } else { idle + 1 };
            if idle > 8 {
                let Some(due) = self.disk.deadline().filter(|_| self.disk.outstanding() > 0) else { break };
                std::thread::sleep(Duration::from_nanos(due.saturating_sub(now())));
            }
            complete(&self.double, usize::MAX, 4);
        }
        let seen = self.disk.inspect(&Polling::new(Settings::default()));
        assert_eq!((self.disk.outstanding(), self.double.held()), (0, 0), "requests are left");
        assert_eq!(seen.frontends[0]["orphans"], 0, "requests are nobody's for ever");
        let clients = seen.frontends[0]["clients"].as_array().unwrap();
        assert!(clients.is_empty(), "who has left is still there: {clients:?}; the disk is {}", seen.state);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut world = world(input.byte());
    while !input.is_empty() {
        let action = input.byte();
        match action & 15 {
            0 => world.connect(),
            1 => world.client = None,
            2 => {
                let how = input.byte();
                complete(&world.double, usize::from(how & 31), how >> 5);
            }
            3 if world.refusals < REFUSALS => {
                world.refusals += 1;
                world.double.refuse(if action & 16 == 0 { Errno::EAGAIN } else { Errno::EIO });
            }
            3 => {}
            4 => world.double.accept(usize::from(input.byte() & 7).max(1)),
            5 if action & 16 == 0 => drop(world.disk.pause_for_client()),
            5 => drop(world.disk.resume(Resume::default())),
            6 => {
                if world.client.is_none() {
                    world.connect();
                }
                world.set_up(&mut input);
            }
            7..=9 => world.offer(&mut input),
            10 => {
                let at = usize::from(input.byte()) * 32;
                world.guest.write(at, input.bytes(16));
                let _ = world.kick.write(1);
            }
            11 => {
                let (request, len) = (u32::from(input.byte() % 48), usize::from(input.byte() % 48));
                let fds = vec![world.kick.as_fd(); usize::from(action >> 6)];
                world.send(request, u32::from(action >> 1 & 8), input.bytes(len), &fds);
            }
            12 => {
                if let Some(client) = &world.client {
                    let _ = fdpass::send(client.as_fd(), input.bytes(usize::from(action >> 4)), &[]);
                }
            }
            13 => world.send(11, 0, &[action >> 4 & 1, 0, 0, 0, 0, 0, 0, 0], &[]),
            14 => world.send(34, 0, &[], &[]),
            _ => {
                let region = [0, GUEST, MEMORY as u64, USER, 0].map(u64::to_le_bytes).concat();
                world.send(38, 8, &region, &[]);
            }
        }
        if action & 32 == 0 {
            world.settle();
        }
    }
    drop(world.disk.resume(Resume::default()));
    world.end();
});
