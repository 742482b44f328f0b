//! A client of the local ring that sends what a test wants, right or wrong.

use std::path::Path;
use std::time::{Duration, Instant};

use tapdisk::client::{Client, Disk, Options, Queue};
use tapdisk::frontend::blkif::wire::{Abi, Entry, MAX_SEGMENTS, OP_READ, OP_WRITE, Response, Segment};

use super::PATIENCE;

pub struct Guest {
    pub disk: Disk,
    pub queue: Queue,
    next_id: u64,
}

/// Sectors of a page, whole.
pub fn page(gref: u32) -> Segment {
    Segment { gref, first_sect: 0, last_sect: 7 }
}

impl Guest {
    pub fn connect(socket: &Path) -> Guest {
        Self::connect_with(socket, Abi::Native, 0)
    }

    pub fn connect_with(socket: &Path, abi: Abi, order: u32) -> Guest {
        let options = Options { abi, ring_page_order: order, queues: 1, data_pages: 512 };
        let mut client = Client::connect(socket, &options).unwrap();
        Guest { disk: client.disk, queue: client.queues.remove(0), next_id: 1 }
    }

    pub fn entry(&mut self, operation: u8) -> Entry {
        self.next_id += 1;
        Entry::new(self.queue.abi(), operation, self.next_id)
    }

    /// Sends one entry and gives its response.
    pub fn ask(&mut self, entry: &Entry) -> Response {
        self.queue.ring.push(entry);
        self.queue.publish().unwrap();
        let response = self.response();
        assert_eq!(response.id, entry.id());
        response
    }

    /// The status of one entry.
    pub fn status(&mut self, entry: &Entry) -> i16 {
        self.ask(entry).status
    }

    pub fn response(&mut self) -> Response {
        self.try_response(PATIENCE).expect("no response")
    }

    pub fn try_response(&mut self, timeout: Duration) -> Option<Response> {
        let end = Instant::now() + timeout;
        while !self.queue.ring.arm() {
            let left = end.checked_duration_since(Instant::now())?;
            if self.queue.wait(Some(left)).unwrap() == tapdisk::client::Wake::HungUp && !self.queue.ring.ready() {
                return None;
            }
        }
        self.queue.ring.pop()
    }

    /// Whether the server has hung up, at the latest after some time.
    pub fn is_hung_up(&mut self) -> bool {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if self.queue.wait(Some(Duration::from_millis(50))).unwrap() == tapdisk::client::Wake::HungUp {
                return true;
            }
        }
        false
    }

    fn transfer(&mut self, operation: u8, sector: u64, bytes: usize) -> Response {
        let segments: Vec<_> = (0..bytes.div_ceil(4096) as u32)
            .map(|gref| {
                let sectors = (bytes - gref as usize * 4096).min(4096) / 512;
                Segment { last_sect: sectors as u8 - 1, ..page(gref) }
            })
            .collect();
        assert!(segments.len() <= MAX_SEGMENTS);
        let entry = self.entry(operation).with_sector(sector).with_segments(segments.len() as u8, &segments);
        self.ask(&entry)
    }

    /// Writes at a 512-byte sector, through the first pages.
    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> i16 {
        self.queue.memory().write(self.queue.page_at(0), bytes);
        self.transfer(OP_WRITE, sector, bytes.len()).status
    }

    /// Reads at a 512-byte sector, through the first pages.
    pub fn read(&mut self, sector: u64, bytes: usize) -> Result<Vec<u8>, i16> {
        let response = self.transfer(OP_READ, sector, bytes);
        let mut data = vec![0; bytes];
        self.queue.memory().read(self.queue.page_at(0), &mut data);
        if response.status == 0 { Ok(data) } else { Err(response.status) }
    }
}
