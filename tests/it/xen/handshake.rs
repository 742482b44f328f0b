//! The handshake with a guest, through Xen's own xenstored, without Xen: the rings are only recorded.

use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::common::PATIENCE;
use crate::common::xenstored::{Client, Xenstored};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::errno::Errno;
use slog::{Discard, Logger, o};
use tapdisk::frontend::DiskInfo;
use tapdisk::frontend::blkif::wire::Abi;
use tapdisk::frontend::xen::handshake::Stage;
use tapdisk::frontend::xen::ring::RingAt;
use tapdisk::frontend::xen::vbd::Connection;
use tapdisk::frontend::xen::xenbus::{Backend, Config, End, Handshake};
use tapdisk::stats::now;
use tapdisk::xenstore::wire::{Decoder, Kind, encode};
use tapdisk::xenstore::{Store, Task};

const BACK: &str = "/local/domain/0/backend/vbd3/7/51712";
const FRONT: &str = "/local/domain/7/device/vbd/51712";

/// Records what the handshake wants of it.
struct Rings {
    served: RefCell<Option<Connection>>,
    connections: Cell<usize>,
    busy: Cell<bool>,
    disk: RefCell<DiskInfo>,
    broken: RefCell<Option<String>>,
    resized: Cell<bool>,
    stopping: Cell<bool>,
    wake_at: Cell<Option<u64>>,
    /// Times that the disk was looked at: at least one each time that both sides are.
    looks: Cell<usize>,
}

impl Backend for Rings {
    fn connect(&self, connection: &Connection) -> Result<(), String> {
        assert!(!self.busy.get(), "a new guest meets an old one's requests");
        self.connections.set(self.connections.get() + 1);
        if connection.rings.iter().any(|ring| ring.event_channel == 666) {
            return Err("cannot bind event channel 666: no such port".into());
        }
        *self.served.borrow_mut() = Some(connection.clone());
        Ok(())
    }
    fn disconnect(&self) {
        *self.served.borrow_mut() = None;
    }
    fn busy(&self) -> bool {
        self.busy.get()
    }
    fn disk(&self) -> DiskInfo {
        self.looks.set(self.looks.get() + 1);
        self.disk.borrow().clone()
    }
    fn take_broken(&self) -> Option<String> {
        self.broken.borrow_mut().take()
    }
    fn wants(&self) -> bool {
        self.stopping.get() || self.resized.get() || self.broken.borrow().is_some()
    }
    fn take_resized(&self) -> bool {
        self.resized.take()
    }
    fn stopping(&self) -> bool {
        self.stopping.get()
    }
    fn wake_at(&self, at: Option<u64>) {
        self.wake_at.set(at);
    }
}

fn config() -> Config {
    Config {
        domain: 7,
        device: 51712,
        backend: "vbd3".into(),
        exit: true,
        wait_for_hotplug: false,
        max_ring_page_order: 4,
        max_queues: 4,
        max_indirect_segments: 256,
    }
}

/// A handshake that is turned by hand, and a client that is toolstack and guest.
struct World {
    store: Rc<Store>,
    poll: Poll,
    task: Option<Task<End>>,
    end: Option<End>,
    rings: Rc<Rings>,
    other: Client,
    xenstored: Xenstored,
}

impl World {
    fn new(config: Config) -> World {
        let xenstored = Xenstored::start();
        let socket = xenstored.socket();
        Self::by(config, Stage::Start, xenstored, &socket)
    }

    /// A handshake that reaches `xenstored` by `socket`.
    fn by(config: Config, stage: Stage, xenstored: Xenstored, socket: &std::path::Path) -> World {
        let store = Rc::new(Store::connect(Some(socket)).unwrap());
        let disk = DiskInfo {
            size: 1 << 30,
            sector_size: 512,
            physical_sector_size: 4096,
            read_only: false,
            name: "test:image".into(),
        };
        let rings = Rc::new(Rings {
            served: RefCell::default(),
            connections: Cell::default(),
            busy: Cell::default(),
            disk: RefCell::new(disk),
            broken: RefCell::default(),
            resized: Cell::default(),
            stopping: Cell::default(),
            wake_at: Cell::default(),
            looks: Cell::default(),
        });
        let log = Logger::root(Discard, o!());
        let task = Handshake::new(Rc::clone(&store), Rc::clone(&rings), config, stage, log).run();
        let poll = Poll::new().unwrap();
        let fd = store.fd().as_raw_fd();
        poll.registry().register(&mut SourceFd(&fd), Token(0), Interest::READABLE | Interest::WRITABLE).unwrap();
        let other = xenstored.client();
        World { store, poll, task: Some(Task::new(task)), end: None, rings, other, xenstored }
    }

    /// Another handshake with the same nodes.
    fn again(mut self, config: Config) -> World {
        let xenstored = std::mem::replace(&mut self.xenstored, Xenstored::start());
        let socket = xenstored.socket();
        Self::by(config, Stage::Start, xenstored, &socket)
    }

    /// One turn of a main loop.
    fn turn(&mut self) {
        let mut events = Events::with_capacity(4);
        // What is lost shows in the task.
        let _ = self.store.progress();
        if let Some(end) = self.task.as_mut().and_then(Task::poll) {
            (self.task, self.end) = (None, Some(end));
        }
        let due = self.rings.wake_at.get().map_or(5_000_000, |at| at.saturating_sub(now()).min(5_000_000));
        self.poll.poll(&mut events, Some(Duration::from_nanos(due))).unwrap();
    }

    fn until(&mut self, what: &str, done: impl Fn(&World) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < end, "no {what}; state {:?}", self.back("state"));
            self.turn();
        }
    }

    /// Turns until nothing has happened for a while.
    fn settle(&mut self) {
        let (mut looks, mut since) = (usize::MAX, Instant::now());
        // In time, not in turns: each node that is written is one.
        while since.elapsed() < Duration::from_millis(150) {
            if self.rings.looks.get() != looks {
                (looks, since) = (self.rings.looks.get(), Instant::now());
            }
            self.turn();
        }
    }

    fn until_state(&mut self, state: u8) {
        self.until(&format!("state {state}"), |world| world.back("state") == Some(state.to_string()));
    }

    fn back(&self, node: &str) -> Option<String> {
        self.other.read(&format!("{BACK}/{node}")).ok()
    }

    fn set_back(&self, node: &str, value: &str) {
        self.other.write(&format!("{BACK}/{node}"), value).unwrap();
    }

    fn set_front(&self, node: &str, value: &str) {
        self.other.write(&format!("{FRONT}/{node}"), value).unwrap();
    }

    /// What a toolstack makes.
    fn make(&self) {
        for (node, value) in
            [("frontend", FRONT), ("frontend-id", "7"), ("mode", "w"), ("online", "1"), ("state", "1")]
        {
            self.set_back(node, value);
        }
        self.set_front("backend", BACK);
        self.set_front("state", "1");
    }

    /// What a blkfront with one page publishes.
    fn publish(&self) {
        for (node, value) in [("ring-ref", "8"), ("event-channel", "9"), ("protocol", "x86_64-abi"), ("state", "3")] {
            self.set_front(node, value);
        }
    }

    fn connected(config: Config) -> World {
        let mut world = World::new(config);
        world.make();
        world.until_state(2);
        world.publish();
        world.until_state(4);
        world.set_front("state", "4");
        world.settle();
        world
    }

    fn served(&self) -> Option<Connection> {
        self.rings.served.borrow().clone()
    }
}

fn one_page(gref: u32, event_channel: u32) -> Vec<RingAt> {
    vec![RingAt { grefs: vec![gref], event_channel }]
}

#[test]
fn a_guest_connects_and_shuts_down() {
    let mut world = World::new(config());
    world.settle();
    assert_eq!((world.back("state"), world.end), (None, None), "it waits for the toolstack");
    world.make();
    world.until_state(2);
    for (node, value) in [
        ("max-ring-page-order", "4"),
        ("multi-queue-max-queues", "4"),
        ("feature-max-indirect-segments", "256"),
        ("feature-persistent", "0"),
    ] {
        assert_eq!(world.back(node).as_deref(), Some(value), "{node}");
    }
    world.publish();
    world.until_state(4);
    let (abi, rings) = (Abi::X86_64, one_page(8, 9));
    assert_eq!(world.served(), Some(Connection { domain: 7, abi, rings, read_only: false, live: false }));
    for (node, value) in [
        ("sectors", "2097152"),
        ("sector-size", "512"),
        ("physical-sector-size", "4096"),
        ("info", "0"),
        ("feature-flush-cache", "1"),
        ("feature-barrier", "1"),
        ("feature-discard", "1"),
        ("discard-secure", "0"),
    ] {
        assert_eq!(world.back(node).as_deref(), Some(value), "{node}");
    }
    world.set_front("state", "4");
    world.settle();
    world.set_front("state", "5");
    world.until_state(5);
    assert!(world.served().is_some(), "what is in flight may still be answered");
    // The disk is not done yet: Closed would let the toolstack give the image to somebody else.
    world.rings.busy.set(true);
    world.set_front("state", "6");
    world.until("end of service", |world| world.served().is_none());
    world.settle();
    assert_eq!(world.back("state").as_deref(), Some("5"));
    world.rings.busy.set(false);
    world.until_state(6);
    world.other.remove(FRONT).unwrap();
    world.other.remove(BACK).unwrap();
    world.until("end", |world| world.end == Some(End::Gone));
    assert_eq!(world.rings.connections.get(), 1);
    assert_eq!(world.back("state"), None, "nothing is brought back to life");
}

#[test]
fn every_layout_of_rings_is_understood() {
    let queue = |queue: u32| RingAt { grefs: vec![10 * queue, 10 * queue + 1], event_channel: 100 + queue };
    type Case<'a> = (&'a [(&'a str, &'a str)], Abi, Vec<RingAt>);
    let cases: [Case; 6] = [
        (&[("ring-ref", "8"), ("event-channel", "9")], Abi::Native, one_page(8, 9)),
        (&[("ring-page-order", "0"), ("ring-ref0", "8"), ("event-channel", "9")], Abi::Native, one_page(8, 9)),
        (&[("ring-page-order", "0"), ("ring-ref", "8"), ("event-channel", "9")], Abi::Native, one_page(8, 9)),
        (
            &[("protocol", "x86_32-abi"), ("multi-queue-num-queues", "1"), ("ring-ref", "1"), ("event-channel", "2")],
            Abi::X86_32,
            one_page(1, 2),
        ),
        (
            &[("multi-queue-num-queues", "1"), ("queue-0/ring-ref", "1"), ("queue-0/event-channel", "2")],
            Abi::Native,
            one_page(1, 2),
        ),
        (
            &[
                ("ring-page-order", "1"),
                ("multi-queue-num-queues", "2"),
                ("protocol", "x86_64-abi"),
                ("queue-0/ring-ref0", "0"),
                ("queue-0/ring-ref1", "1"),
                ("queue-0/event-channel", "100"),
                ("queue-1/ring-ref0", "10"),
                ("queue-1/ring-ref1", "11"),
                ("queue-1/event-channel", "101"),
            ],
            Abi::X86_64,
            vec![queue(0), queue(1)],
        ),
    ];
    let mut world = World::new(Config { exit: false, ..config() });
    for (nodes, abi, rings) in cases {
        world.make();
        world.until_state(2);
        nodes.iter().for_each(|(node, value)| world.set_front(node, value));
        world.set_front("state", "3");
        world.until_state(4);
        let served = world.served().unwrap();
        assert_eq!((served.abi, served.rings), (abi, rings), "{nodes:?}");
        world.other.remove(FRONT).unwrap();
        world.other.remove(BACK).unwrap();
        world.until("end of service", |world| world.served().is_none());
    }
}

#[test]
fn bad_details_are_refused_with_a_reason_and_the_guest_may_begin_anew() {
    let mut world = World::new(config());
    world.make();
    for (node, value, reason) in [
        ("ring-page-order", "5", "ring-page-order \"5\" is not from 0 to 4"),
        ("ring-page-order", "-1", "ring-page-order"),
        ("ring-page-order", "4294967296", "ring-page-order"),
        ("ring-page-order", "zero", "ring-page-order"),
        ("multi-queue-num-queues", "0", "multi-queue-num-queues"),
        ("multi-queue-num-queues", "5", "multi-queue-num-queues"),
        ("multi-queue-num-queues", "1000000000", "multi-queue-num-queues"),
        ("ring-ref", "-1", "ring-ref"),
        ("ring-ref", "", "ring-ref"),
        ("ring-ref", &"9".repeat(2000), "ring-ref"),
        ("event-channel", "666", "cannot bind event channel 666"),
        ("event-channel", "99999999999", "event-channel"),
        ("protocol", "vax-abi", "protocol \"vax-abi\" is not known"),
    ] {
        world.until_state(2);
        for key in ["ring-page-order", "multi-queue-num-queues"] {
            world.other.remove(&format!("{FRONT}/{key}")).unwrap();
        }
        for (key, good) in [("ring-ref", "8"), ("event-channel", "9"), ("protocol", "x86_64-abi")] {
            world.set_front(key, good);
        }
        world.set_front(node, value);
        world.set_front("state", "3");
        world.until_state(5);
        let error = world.back("error").unwrap();
        assert!(error.contains(reason), "{node} = {value}: {error}");
        assert_eq!(world.served(), None);
        world.settle();
        let tried = world.rings.connections.get();
        world.set_front("state", "3");
        world.settle();
        assert_eq!(world.rings.connections.get(), tried, "the same details are not tried again");
        world.set_front("state", "1");
    }
    // Missing altogether.
    world.until_state(2);
    world.set_front("protocol", "x86_64-abi");
    world.other.remove(&format!("{FRONT}/event-channel")).unwrap();
    world.set_front("state", "3");
    world.until_state(5);
    assert!(world.back("error").unwrap().contains("event-channel is missing"));
    world.set_front("state", "1");
    world.until_state(2);
    world.publish();
    world.until_state(4);
    assert!(world.served().is_some());
}

#[test]
fn a_guest_that_is_destroyed_is_closed_at_once_and_what_nobody_removes_is_removed() {
    let mut world = World::connected(config());
    // As xl does it: the frontend goes in the same transaction.
    world.other.remove("/local/domain/7").unwrap();
    world.set_back("online", "0");
    world.set_back("state", "5");
    let begin = Instant::now();
    world.until_state(6);
    assert_eq!((world.served(), world.end), (None, None));
    // The toolstack has a second to remove the directory.
    world.until("end", |world| world.end == Some(End::Gone));
    assert!(begin.elapsed() > Duration::from_millis(900));
    assert_eq!(world.other.read("/local/domain/0/backend/vbd3/7"), Err(Errno::ENOENT), "its parent is empty, too");
}

#[test]
fn a_device_that_is_taken_away_waits_for_a_guest_that_uses_it() {
    let mut world = World::connected(config());
    world.set_back("online", "0");
    world.set_back("state", "5");
    world.settle();
    assert!(world.served().is_some());
    world.set_front("state", "5");
    world.settle();
    world.set_front("state", "6");
    world.until_state(6);
    world.other.remove(BACK).unwrap();
    world.until("end", |world| world.end == Some(End::Gone));
    // A paused guest, which can't answer, is not waited for.
    let mut world = World::new(config());
    world.make();
    world.until_state(2);
    world.set_back("online", "0");
    world.set_back("state", "5");
    world.until_state(6);
}

#[test]
fn another_guest_comes_on_the_same_disk() {
    let mut world = World::connected(Config { exit: false, ..config() });
    for generation in 1..5 {
        // All at once: the new nodes are there before the old ones were seen to go.
        world.other.remove(FRONT).unwrap();
        world.other.remove(BACK).unwrap();
        world.make();
        world.until_state(2);
        assert_eq!(world.served(), None);
        world.publish();
        world.set_front("ring-ref", &generation.to_string());
        world.until_state(4);
        assert_eq!(world.served().unwrap().rings, one_page(generation, 9));
    }
    // Another kernel in the same guest.
    world.set_front("state", "1");
    world.until_state(2);
    world.publish();
    world.until_state(4);
    // One that says nothing in between.
    world.set_front("state", "4");
    world.settle();
    world.set_front("ring-ref", "77");
    world.set_front("state", "3");
    world.until("other rings", |world| world.served().is_some_and(|served| served.rings == one_page(77, 9)));
}

#[test]
fn changes_in_any_order_are_survived() {
    let mut world = World::new(Config { exit: false, ..config() });
    let mut random = 12345u32;
    let mut next = |below: u32| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 16) % below
    };
    for step in 0..1500 {
        match next(20) {
            0 => world.other.remove(BACK).unwrap(),
            1 => drop(world.other.remove(FRONT)),
            2 | 3 => world.make(),
            4 => world.set_back("online", if next(2) == 0 { "0" } else { "1" }),
            5 => world.set_back("state", &next(9).to_string()),
            6 => world.publish(),
            7 => world.set_front("event-channel", &next(4).to_string()),
            8 => world.set_front("state", ["", "-1", "four", "\u{7f}"][next(4) as usize]),
            _ => world.set_front("state", &next(9).to_string()),
        }
        for _ in 0..next(3) {
            world.turn();
        }
        assert_eq!(world.end, None, "step {step}");
    }
    // A sane toolstack and guest are served after all that.
    for path in [BACK, FRONT] {
        let _ = world.other.remove(path);
    }
    world.settle();
    world.make();
    world.until_state(2);
    world.publish();
    world.until_state(4);
    assert!(world.served().is_some());
}

#[test]
fn a_storm_of_watch_events_is_looked_at_far_less_often_than_it_blows() {
    const STORM: usize = 10_000;
    let mut world = World::connected(config());
    let before = world.rings.looks.get();
    let socket = world.xenstored.socket();
    let guest = std::thread::spawn(move || {
        let guest = Client::connect(&socket);
        for i in 0..STORM {
            // Other nodes of the guest's are not watched at all.
            let node = if i % 2 == 0 { "state" } else { "junk" };
            guest.write(&format!("{FRONT}/{node}"), "4").unwrap();
        }
    });
    while !guest.is_finished() {
        world.turn();
    }
    guest.join().unwrap();
    world.settle();
    let looks = world.rings.looks.get() - before;
    assert!((1..=STORM / 2).contains(&looks), "{looks} looks");
    assert!(world.served().is_some() && world.rings.connections.get() == 1);
    world.set_front("state", "5");
    world.until_state(5);
}

#[test]
fn a_ring_that_breaks_closes_the_guest_with_a_reason() {
    let mut world = World::connected(config());
    *world.rings.broken.borrow_mut() = Some("queue 0: req_prod 99 is beyond the ring, req_cons is 1".into());
    world.until_state(5);
    assert!(world.back("error").unwrap().contains("req_prod 99"));
    assert_eq!(world.served(), None);
    world.set_front("state", "6");
    world.until_state(6);
}

#[test]
fn the_hotplug_script_is_waited_for_if_so_configured() {
    let mut world = World::new(Config { wait_for_hotplug: true, ..config() });
    world.make();
    world.settle();
    assert_eq!(world.back("state").as_deref(), Some("1"));
    world.set_back("hotplug-status", "connected");
    world.until_state(2);
}

#[test]
fn read_only_and_cdrom_are_told_and_enforced() {
    for (node, value, info, read_only) in [
        ("mode", "r", "4", true),
        ("device-type", "cdrom", "7", true),
        ("removable", "1", "2", false),
        ("mode", "w", "0", false),
    ] {
        let mut world = World::new(config());
        world.make();
        world.set_back(node, value);
        world.until_state(2);
        world.publish();
        world.until_state(4);
        assert_eq!(world.back("info").as_deref(), Some(info), "{node} = {value}");
        assert_eq!(world.served().unwrap().read_only, read_only);
        assert_eq!(world.back("feature-discard").as_deref(), Some(if read_only { "0" } else { "1" }));
    }
}

#[test]
fn a_guest_is_told_that_the_disk_has_grown() {
    let mut world = World::connected(config());
    world.other.watch(&format!("{BACK}/state"), "state").unwrap();
    world.other.wait_fired();
    world.rings.disk.borrow_mut().size = 2 << 30;
    world.rings.resized.set(true);
    world.until("new size", |world| world.back("sectors").as_deref() == Some("4194304"));
    assert_eq!(world.other.wait_fired(), ["state"], "writing the state again is what the guest notices");
    assert_eq!(world.back("state").as_deref(), Some("4"));
    assert_eq!(world.rings.connections.get(), 1);
}

#[test]
fn a_tapdisk_that_ends_in_order_leaves_its_guest_to_the_next_one() {
    let mut world = World::connected(config());
    world.rings.stopping.set(true);
    world.until("end", |world| world.end == Some(End::Stopped));
    assert_eq!((world.back("state").as_deref(), world.served()), (Some("4"), None));
    let mut world = world.again(config());
    world.until("service", |world| world.served().is_some());
    assert!(!world.served().unwrap().live, "nothing was left half done");
    world.until("no mark", |world| world.back("tapdisk-drained").is_none());
    world.settle();
    // One that was killed says nothing of what it had taken.
    let mut world = world.again(config());
    world.until("service", |world| world.served().is_some());
    assert!(world.served().unwrap().live);
}

#[test]
fn xenstored_that_goes_is_noticed_and_the_guest_is_served_on() {
    let mut world = World::connected(config());
    world.xenstored.kill();
    world.until("loss", |world| world.end.is_some());
    assert_eq!(world.end, Some(End::Lost(Stage::Connected)));
    assert!(world.served().is_some());
}

#[test]
fn transactions_that_conflict_are_tried_again() {
    let mut world = World::new(config());
    let socket = world.xenstored.socket();
    world.make();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = std::sync::Arc::clone(&stop);
    // Somebody writes all the time what the transactions read.
    let toolstack = std::thread::spawn(move || {
        let toolstack = Client::connect(&socket);
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            toolstack.write(&format!("{BACK}/frontend"), FRONT).unwrap();
            std::thread::sleep(Duration::from_micros(300));
        }
    });
    world.until_state(2);
    world.publish();
    world.until_state(4);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    toolstack.join().unwrap();
    assert!(world.served().is_some());
}

/// Passes messages to xenstored and back, but answers the first `count` writes with `error`.
fn refusing(listener: &UnixListener, socket: &std::path::Path, count: usize, error: &'static str) {
    let (mut client, _) = listener.accept().unwrap();
    let mut daemon = UnixStream::connect(socket).unwrap();
    let (mut answers, mut to_client) = (daemon.try_clone().unwrap(), client.try_clone().unwrap());
    std::thread::spawn(move || {
        // Ends with either of them.
        let _ = std::io::copy(&mut answers, &mut to_client);
    });
    let (mut decoder, mut bytes, mut left) = (Decoder::default(), [0; 4096], count);
    while let Ok(n @ 1..) = client.read(&mut bytes) {
        decoder.push(&bytes[..n]);
        while let Some(message) = decoder.pull().unwrap() {
            if message.kind == Kind::WRITE && left > 0 {
                left -= 1;
                client.write_all(&encode(Kind::ERROR, message.id, message.tx, &[error], b"")).unwrap();
            } else {
                daemon.write_all(&encode(message.kind, message.id, message.tx, &[], &message.payload)).unwrap();
            }
        }
    }
}

#[test]
fn what_xenstored_forbids_is_tried_again_and_half_of_it_is_never_seen() {
    for error in ["EACCES", "ENOSPC"] {
        let xenstored = Xenstored::start();
        let (socket, folder) = (xenstored.socket(), tempfile::tempdir().unwrap());
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        // One write of the several that make an offer.
        std::thread::spawn(move || refusing(&listener, &socket, 1, error));
        let mut world = World::by(config(), Stage::Start, xenstored, &path);
        world.make();
        world.until("pause after the error", |world| world.rings.wake_at.get().is_some());
        assert_eq!((world.back("state").as_deref(), world.back("multi-queue-max-queues")), (Some("1"), None));
        world.until_state(2);
        assert_eq!(world.back("multi-queue-max-queues").as_deref(), Some("4"));
    }
}
