//! Clients of the local ring, in any order of events: they connect, say anything, forge indices, hang up and come again, while the
//! engine completes, fails and refuses. Each request is answered at most once, to the client that sent it; every turn ends; and what
//! clients leave behind is finished.
#![no_main]

use std::cell::RefCell;
use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use mio::{Events, Poll};
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use slog::{Discard, Logger, o};
use tapdisk::client::open_socket;
use tapdisk::disk::{Disk, Resume};
use tapdisk::engine::Inline;
use tapdisk::frontend::blkif::ring::{FrontRing, Shared};
use tapdisk::frontend::blkif::wire::{Abi, ENTRY_MAX, Entry, OP_INDIRECT, Segment};
use tapdisk::frontend::local::wire::{ABIS, Hello, MAGIC, Welcome};
use tapdisk::frontend::local::{Config, Local};
use tapdisk::polling::{Polling, Settings};
use tapdisk::stats::now;
use tapdisk::sys::fdpass;
use tapdisk::sys::memory::{Memory, PAGE_SIZE};
use tapdisk_fuzz::double::Double;
use tapdisk_fuzz::world::{disk, info};
use tapdisk_fuzz::{Input, complete, settle};
use zerocopy::{FromZeros, IntoBytes};

/// Clients that the disk takes, and one more that it turns away.
const CLIENTS: usize = 3;
/// More turns than there can be without an event: each takes a request, or completes one.
const TURNS: usize = 400;

/// Rounds in which nothing happens, after which nothing will.
const IDLE: usize = 1 + CONNECTIONS as usize / 16;

/// The most connections of one input.
const CONNECTIONS: u64 = 100;

/// The most refusals of the engine: it is asked again after a while, and what is left at the end must come to its end in some turns.
const REFUSALS: usize = 100;

/// A connection that was let in.
struct Rings {
    memory: Arc<Memory>,
    rings: Vec<FrontRing>,
    bells: Vec<OwnedFd>,
    abi: Abi,
    queue_bytes: usize,
    /// Where a queue's data pages begin.
    data_at: usize,
    /// Requests without an answer, by queue and id.
    open: HashSet<(usize, u64)>,
    /// It has written what it must not: of what is in its rings, nothing can be said.
    forged: bool,
}

struct Client {
    number: u64,
    socket: OwnedFd,
    hello: Option<Hello>,
    rings: Option<Rings>,
    sent: u64,
}

struct World {
    poll: Poll,
    events: Events,
    disk: Disk,
    double: Double,
    socket: PathBuf,
    clients: [Option<Client>; CLIENTS],
    connections: u64,
    refusals: usize,
}

thread_local! {
    static FOLDER: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
}

fn world(setup: u8) -> World {
    let socket = FOLDER
        .with_borrow_mut(|folder| folder.get_or_insert_with(|| tempfile::tempdir().unwrap()).path().join("ring"));
    let info = info(if setup & 1 == 0 { 512 } else { 4096 }, setup & 2 != 0);
    let config = Config {
        socket: socket.clone(),
        max_ring_page_order: 1,
        max_queues: 2,
        max_data_pages: 8,
        max_indirect_segments: 32,
        max_clients: CLIENTS - 1,
        lock_memory: false,
    };
    let local = Local::bind(config, info.clone(), Logger::root(Discard, o!())).unwrap();
    let (double, engine) = Double::engine(1 + usize::from(setup >> 4), Inline::Always);
    let mut disk = disk(Box::new(local), info, engine);
    let poll = Poll::new().unwrap();
    disk.register(poll.registry(), |_| 0).unwrap();
    World {
        poll,
        events: Events::with_capacity(64),
        disk,
        double,
        socket,
        clients: [const { None }; CLIENTS],
        connections: 0,
        refusals: 0,
    }
}

impl World {
    /// True: there was something to do.
    fn settle(&mut self) -> bool {
        settle(&mut self.poll, &mut self.events, &mut self.disk, TURNS)
    }

    fn connect(&mut self, place: usize) {
        // Those who must wait to be let in may not fill the kernel's queue of them: the next would wait in connect().
        if self.connections == CONNECTIONS {
            return;
        }
        self.connections += 1;
        let socket = open_socket(&self.socket).unwrap();
        self.clients[place] = Some(Client { number: self.connections, socket, hello: None, rings: None, sent: 0 });
    }

    /// All leave, all completes, and nothing is left.
    fn end(&mut self) {
        self.clients = [const { None }; CLIENTS];
        // Who is let in by a turn is looked at when the poll is asked next.
        let mut idle = 0;
        for _ in 0..TURNS {
            idle = if self.settle() || self.double.held() > 0 { 0 } else { idle + 1 };
            if idle > IDLE {
                // What the engine refused is given to it again after a while.
                let Some(due) = self.disk.deadline().filter(|_| self.disk.outstanding() > 0) else { break };
                std::thread::sleep(Duration::from_nanos(due.saturating_sub(now())));
            }
            complete(&self.double, usize::MAX, 4);
        }
        let seen = self.disk.inspect(&Polling::new(Settings::default()));
        let left = (self.disk.outstanding(), self.double.held());
        assert_eq!(left, (0, 0), "requests are left: {}", serde_json::to_string(&seen).unwrap());
        assert_eq!(seen.frontends[0]["orphans"], 0, "requests are nobody's for ever");
        let clients = seen.frontends[0]["clients"].as_array().unwrap();
        assert!(clients.is_empty(), "who has left is still there: {clients:?}; the disk is {}", seen.state);
    }
}

impl Client {
    /// A hello, with any mistake.
    fn greet(&mut self, input: &mut Input) {
        let how = input.byte();
        let shape = input.byte();
        let mut hello = Hello {
            magic: MAGIC,
            abi: u32::from(shape & 3),
            ring_page_order: u32::from(shape >> 2 & 3),
            queues: u32::from(shape >> 4 & 3),
            data_pages: u32::from(shape >> 6 & 3) * 2,
        };
        let mut bytes = hello.as_bytes().to_vec();
        match how & 7 {
            0..4 => {}
            4 => bytes.truncate(usize::from(input.byte()) % 24),
            5 => bytes.extend(input.bytes(usize::from(how >> 3))),
            6 => hello.as_mut_bytes()[usize::from(input.byte()) % 24] = input.byte(),
            _ => {
                let fds: Vec<BorrowedFd> = vec![self.socket.as_fd(); usize::from(how >> 3) * 8];
                let _ = fdpass::send(self.socket.as_fd(), hello.as_bytes(), &fds);
                self.hello.get_or_insert(hello);
                return;
            }
        }
        if how & 7 == 6 {
            bytes = hello.as_bytes().to_vec();
        }
        // It may have hung up.
        let _ = fdpass::send(self.socket.as_fd(), &bytes, &[]);
        self.hello.get_or_insert(hello);
    }

    /// Takes what the server says, if it says something.
    fn listen(&mut self) {
        let mut welcome = Welcome::new_zeroed();
        let Ok((len, fds)) = fdpass::receive(self.socket.as_fd(), welcome.as_mut_bytes(), MsgFlags::MSG_DONTWAIT)
        else {
            return;
        };
        if len == 0 {
            return;
        }
        assert_eq!((len, welcome.magic), (size_of::<Welcome>(), MAGIC));
        let Some(hello) = self.hello.filter(|_| welcome.error == 0) else { return assert!(fds.is_empty()) };
        assert!(self.rings.is_none(), "welcome twice");
        let queues = hello.queues as usize;
        assert_eq!(fds.len(), 1 + 2 * queues);
        let queue_bytes = welcome.queue_bytes as usize;
        let mut fds = fds.into_iter();
        let memory = Arc::new(Memory::shared(fds.next().unwrap(), queue_bytes * queues).unwrap());
        let abi = ABIS[hello.abi as usize];
        let ring = |queue| Shared::new(Arc::clone(&memory), queue * queue_bytes, abi, hello.ring_page_order);
        self.rings = Some(Rings {
            rings: (0..queues).map(|queue| FrontRing::init(ring(queue))).collect(),
            memory: Arc::clone(&memory),
            bells: fds.collect(),
            abi,
            queue_bytes,
            data_at: PAGE_SIZE << hello.ring_page_order,
            open: HashSet::new(),
            forged: false,
        });
    }

    /// An answer is one to a request of this client, the first to it.
    fn take_answers(&mut self) {
        let Some(rings) = &mut self.rings else { return };
        for (queue, ring) in rings.rings.iter_mut().enumerate() {
            if rings.forged {
                continue;
            }
            while let Some(response) = ring.pop() {
                assert!(rings.open.remove(&(queue, response.id)), "nobody asked for {response:?}");
                assert_eq!(response.id >> 32, self.number, "another client's answer");
            }
        }
    }

    fn act(&mut self, action: u8, input: &mut Input) {
        let Some(rings) = &mut self.rings else { return };
        let queue = usize::from(input.byte()) % rings.rings.len();
        let ring = &mut rings.rings[queue];
        match action {
            0 => {
                let count = 1 + input.byte() % 8;
                for _ in 0..count {
                    if ring.room() == 0 {
                        break;
                    }
                    self.sent += 1;
                    let id = self.number << 32 | self.sent;
                    ring.push(&entry(rings.abi, id, input));
                    rings.open.insert((queue, id));
                }
                if ring.publish() {
                    let _ = nix::unistd::write(&rings.bells[2 * queue], &1u64.to_ne_bytes());
                }
            }
            1 => {
                ring.forge_req_prod(input.number());
                rings.forged = true;
                let _ = nix::unistd::write(&rings.bells[2 * queue], &1u64.to_ne_bytes());
            }
            2 => {
                let _ = nix::unistd::write(&rings.bells[2 * queue], &1u64.to_ne_bytes());
            }
            3 => {
                // The other side's doorbell, full.
                let _ = nix::unistd::write(&rings.bells[2 * queue + 1], &(u64::MAX - 1).to_ne_bytes());
            }
            _ => {
                let bytes = input.bytes(64);
                let at = queue * rings.queue_bytes + rings.data_at + usize::from(input.byte()) * 8;
                rings.memory.write(at, bytes);
            }
        }
    }
}

/// A request: most are good.
fn entry(abi: Abi, id: u64, input: &mut Input) -> Entry {
    let (operation, sector, shape) = (input.byte(), u64::from(input.byte()), input.byte());
    let segment =
        |page: u8| Segment { gref: u32::from(page & 7), first_sect: shape >> 5, last_sect: 7 - (page >> 6) };
    let entry = Entry::new(abi, operation % 8, id).with_sector(sector);
    match operation {
        224.. => {
            let (mut bytes, any) = ([0; ENTRY_MAX], input.bytes(24));
            bytes[..any.len()].copy_from_slice(any);
            let at = if abi == Abi::X86_32 { 4 } else { 8 };
            bytes[at..at + 8].copy_from_slice(&id.to_ne_bytes());
            Entry::from_bytes(abi, bytes)
        }
        _ if operation % 8 == OP_INDIRECT => {
            entry.with_indirect(operation >> 3 & 1, u16::from(shape), &[u32::from(shape & 3)])
        }
        _ if operation % 8 == 5 => entry.with_discard(shape & 1, u64::from(shape)),
        _ => {
            let count = shape & 15;
            let segments: Vec<Segment> = (0..count.min(11)).map(|_| segment(input.byte())).collect();
            entry.with_segments(count, &segments)
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut world = world(input.byte());
    while !input.is_empty() {
        let action = input.byte();
        let place = usize::from(action >> 6) % CLIENTS;
        match action & 15 {
            0 => world.connect(place),
            1 => world.clients[place] = None,
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
            action @ 6..=8 => {
                if world.clients[place].is_none() {
                    world.connect(place);
                }
                let Some(client) = &mut world.clients[place] else { continue };
                if action < 8 || client.hello.is_none() {
                    client.greet(&mut input);
                }
            }
            action => {
                if let Some(client) = &mut world.clients[place] {
                    client.act(action - 9, &mut input);
                }
            }
        }
        if action & 32 == 0 {
            world.settle();
            for client in world.clients.iter_mut().flatten() {
                client.listen();
                client.take_answers();
            }
        }
    }
    drop(world.disk.resume(Resume::default()));
    world.end();
});
