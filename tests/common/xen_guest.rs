//! A blkfront that does what a test wants, right or wrong, in the host's own domain: it grants its pages to it.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tapdisk::frontend::blkif::ring::{FrontRing, Shared};
use tapdisk::frontend::blkif::wire::{Abi, Entry, MAX_SEGMENTS, OP_READ, OP_WRITE, Response, Segment};
use tapdisk::sys::evtchn::Evtchn;
use tapdisk::sys::gntalloc::Granted;
use tapdisk::sys::memory::PAGE_SIZE;

use super::PATIENCE;
use super::xenstored::Client;

/// A device's nodes in XenStore.
pub struct Nodes {
    pub store: Client,
    pub back: String,
    pub front: String,
}

impl Nodes {
    /// Makes them, as a toolstack does.
    pub fn make(device: u32, mode: &str) -> Nodes {
        let store = Client::connect(Path::new("/run/xenstored/socket"));
        let back = format!("/local/domain/0/backend/vbd3/0/{device}");
        let front = format!("/local/domain/0/device/vbd-test/{device}");
        let nodes = Nodes { store, back, front };
        let front = nodes.front.clone();
        for (name, value) in [("frontend", front.as_str()), ("frontend-id", "0"), ("mode", mode), ("online", "1")] {
            nodes.set_back(name, value);
        }
        nodes.set_back("state", "1");
        nodes.set_front("state", "1");
        nodes
    }

    pub fn set_back(&self, name: &str, value: &str) {
        self.store.write(&format!("{}/{name}", self.back), value).unwrap();
    }

    pub fn set_front(&self, name: &str, value: &str) {
        self.store.write(&format!("{}/{name}", self.front), value).unwrap();
    }

    pub fn back(&self, name: &str) -> Option<String> {
        self.store.read(&format!("{}/{name}", self.back)).ok()
    }

    /// Waits for a state of the backend's.
    pub fn until(&self, state: u8) {
        let end = Instant::now() + PATIENCE;
        while self.back("state") != Some(state.to_string()) {
            let error = self.back("error");
            assert!(Instant::now() < end, "no state {state} but {:?}, error {error:?}", self.back("state"));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn remove(&self) {
        // One of them may be gone.
        let _ = self.store.remove(&self.front);
        let _ = self.store.remove(&self.back);
    }
}

/// A frontend that is connected.
pub struct XenGuest {
    pub nodes: Nodes,
    pub ring: FrontRing,
    pub ring_pages: Granted,
    pub data: Granted,
    pub abi: Abi,
    evtchn: Evtchn,
    pub port: u32,
    next_id: u64,
}

/// Data pages of a guest.
pub const PAGES: usize = 64;

impl XenGuest {
    /// Shakes hands up to Connected.
    pub fn connect(nodes: Nodes, abi: Abi, order: u32) -> XenGuest {
        let guest = Self::publish(nodes, abi, order);
        guest.nodes.until(4);
        guest.nodes.set_front("state", "4");
        guest
    }

    /// Shakes hands up to Initialised.
    pub fn publish(nodes: Nodes, abi: Abi, order: u32) -> XenGuest {
        nodes.until(2);
        let ring_pages = Granted::new(0, 1 << order, true).unwrap();
        let data = Granted::new(0, PAGES, true).unwrap();
        let ring = FrontRing::init(Shared::new(Arc::clone(ring_pages.memory()), 0, abi, order));
        let evtchn = Evtchn::open().unwrap();
        let port = evtchn.bind_unbound_port(0).unwrap();
        nodes.set_front("event-channel", &port.to_string());
        let protocol = match abi {
            Abi::X86_32 => "x86_32-abi",
            _ => "x86_64-abi",
        };
        nodes.set_front("protocol", protocol);
        if order == 0 {
            nodes.set_front("ring-ref", &ring_pages.grefs[0].to_string());
        } else {
            nodes.set_front("ring-page-order", &order.to_string());
            for (i, gref) in ring_pages.grefs.iter().enumerate() {
                nodes.set_front(&format!("ring-ref{i}"), &gref.to_string());
            }
        }
        nodes.set_front("state", "3");
        XenGuest { nodes, ring, ring_pages, data, abi, evtchn, port, next_id: 1 }
    }

    /// The whole of data page `index`.
    pub fn page(&self, index: usize) -> Segment {
        Segment { gref: self.data.grefs[index], first_sect: 0, last_sect: 7 }
    }

    pub fn entry(&mut self, operation: u8) -> Entry {
        self.next_id += 1;
        Entry::new(self.abi, operation, self.next_id)
    }

    /// A port beside the ring's.
    pub fn another_port(&self) -> u32 {
        self.evtchn.bind_unbound_port(0).unwrap()
    }

    pub fn kick(&self) {
        self.evtchn.notify(self.port).unwrap();
    }

    pub fn send(&mut self) {
        if self.ring.publish() {
            self.kick();
        }
    }

    /// Sends one entry and gives its response.
    pub fn ask(&mut self, entry: &Entry) -> Response {
        self.ring.push(entry);
        self.send();
        let response = self.response();
        assert_eq!(response.id, entry.id());
        response
    }

    pub fn status(&mut self, entry: &Entry) -> i16 {
        self.ask(entry).status
    }

    /// Waits for a response by the event channel.
    pub fn response(&mut self) -> Response {
        let end = Instant::now() + PATIENCE;
        while !self.ring.arm() {
            assert!(Instant::now() < end, "no response");
            let timeout = PollTimeout::from(1000u16);
            poll(&mut [PollFd::new(self.evtchn.as_fd(), PollFlags::POLLIN)], timeout).unwrap();
            let mut ports = [0; 4];
            let count = self.evtchn.pending(&mut ports).unwrap();
            self.evtchn.unmask(&ports[..count]).unwrap();
        }
        self.ring.pop().unwrap()
    }

    fn transfer(&mut self, operation: u8, sector: u64, bytes: usize) -> i16 {
        let count = bytes.div_ceil(PAGE_SIZE);
        assert!(count <= MAX_SEGMENTS);
        let mut segments: Vec<_> = (0..count).map(|i| self.page(i)).collect();
        segments[count - 1].last_sect = ((bytes - (count - 1) * PAGE_SIZE) / 512 - 1) as u8;
        let entry = self.entry(operation).with_sector(sector).with_segments(count as u8, &segments);
        self.status(&entry)
    }

    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> i16 {
        self.data.memory().write(0, bytes);
        self.transfer(OP_WRITE, sector, bytes.len())
    }

    pub fn read(&mut self, sector: u64, bytes: usize) -> Result<Vec<u8>, i16> {
        let status = self.transfer(OP_READ, sector, bytes);
        let mut data = vec![0; bytes];
        self.data.memory().read(0, &mut data);
        if status == 0 { Ok(data) } else { Err(status) }
    }

    /// Goes in order.
    pub fn close(self) {
        self.nodes.set_front("state", "5");
        self.nodes.until(5);
        self.nodes.set_front("state", "6");
        self.nodes.until(6);
        self.nodes.remove();
    }
}
