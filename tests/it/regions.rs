//! A client whose memory is in regions that come and go under requests in flight, as a guest's RAM does with vhost-user (SET_MEM_TABLE,
//! ADD_MEM_REG, REM_MEM_REG): the sequence of calls that carries it, from a frontend's table of regions to the answer.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, Weak};

use crate::common::double::{Double, Seen};
use crate::common::world;
use nix::errno::Errno;
use tapdisk::disk::{Disk, Turn};
use tapdisk::engine::Inline;
use tapdisk::frontend::{Frontend, Intake};
use tapdisk::request::{Op, Payload, Request, TooScattered};
use tapdisk::sys::io::{IoOp, MAX_MEMORIES};
use tapdisk::sys::memory::Memory;

const PAGE: u64 = 4096;

/// What the client asks for: a read from the beginning of the disk, to these of its own addresses, each with its length.
type Asked = Vec<(u64, u32)>;

#[derive(Default)]
struct Client {
    /// First address of the client's, and the memory there.
    regions: Vec<(u64, Arc<Memory>)>,
    asked: VecDeque<Asked>,
    answered: Vec<Result<(), Errno>>,
}

impl Client {
    /// Maps `bytes` of `file` at `address`. Gives a hand on the mapping that does not keep it.
    fn add(&mut self, address: u64, file: &File, bytes: u64) -> Weak<Memory> {
        file.set_len(bytes).unwrap();
        let memory = Arc::new(Memory::shared(file, bytes as usize).unwrap());
        let weak = Arc::downgrade(&memory);
        self.regions.push((address, memory));
        weak
    }

    fn remove(&mut self, address: u64) {
        self.regions.retain(|(first, _)| *first != address);
    }

    /// The regions, as they are now, that the data lies in.
    fn place(&self, payload: &mut Payload, asked: &Asked) -> Result<(), Errno> {
        for &(mut address, mut len) in asked {
            while len > 0 {
                let is_here =
                    |(first, memory): &&(u64, Arc<Memory>)| (*first..*first + memory.len() as u64).contains(&address);
                let (first, memory) = self.regions.iter().find(is_here).ok_or(Errno::EFAULT)?;
                let offset = (address - first) as usize;
                let now = len.min((memory.len() - offset) as u32);
                payload.push(memory, offset, now).map_err(|TooScattered| Errno::EIO)?;
                (address, len) = (address + u64::from(now), len - now);
            }
        }
        Ok(())
    }
}

struct Regions(Arc<Mutex<Client>>);

impl Frontend for Regions {
    fn register(&mut self, _: mio::Registry, _: usize) -> std::io::Result<()> {
        Ok(())
    }
    fn event(&mut self, _: usize, _: &mio::event::Event) {}
    fn pull(&mut self, intake: &mut Intake) {
        let mut client = self.0.lock().unwrap();
        while let Some(asked) = client.asked.pop_front() {
            let Some(request) = intake.vacant() else { return client.asked.push_front(asked) };
            (request.op, request.offset, request.len) =
                (Op::Read, 0, asked.iter().map(|(_, len)| u64::from(*len)).sum());
            match client.place(&mut request.payload, &asked) {
                Ok(()) => intake.accept(),
                Err(errno) => {
                    intake.give_up();
                    client.answered.push(Err(errno));
                }
            }
        }
    }
    fn answer(&mut self, request: &Request) {
        self.0.lock().unwrap().answered.push(request.result());
    }
    fn publish(&mut self) {}
    fn in_memory(&self) -> bool {
        true
    }
    fn ready(&self) -> bool {
        !self.0.lock().unwrap().asked.is_empty()
    }
    fn arm(&mut self) -> bool {
        self.ready()
    }
    fn close(&mut self) {}
    fn inspect(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

struct Bench {
    client: Arc<Mutex<Client>>,
    double: Double,
    disk: Disk,
}

impl Bench {
    fn new() -> Bench {
        let (double, engine) = Double::engine(16, Inline::Always);
        let client = Arc::<Mutex<Client>>::default();
        let disk = world::disk(Box::new(Regions(Arc::clone(&client))), world::info(512, false), engine);
        Bench { client, double, disk }
    }

    fn add(&self, address: u64, file: &File, bytes: u64) -> Weak<Memory> {
        self.client.lock().unwrap().add(address, file, bytes)
    }

    fn remove(&self, address: u64) {
        self.client.lock().unwrap().remove(address);
    }

    fn ask(&mut self, asked: &[(u64, u32)]) {
        self.client.lock().unwrap().asked.push_back(asked.to_vec());
        self.turns();
    }

    fn turns(&mut self) {
        while self.disk.turn() != Turn::Nothing {}
    }

    /// The engine does the oldest I/O. Gives what the client is answered.
    fn done(&mut self) -> Vec<Result<(), Errno>> {
        self.double.complete(None);
        self.turns();
        self.answered()
    }

    fn answered(&self) -> Vec<Result<(), Errno>> {
        std::mem::take(&mut self.client.lock().unwrap().answered)
    }
}

/// What the client sees at a page of its memory: the same bytes throughout.
fn page(file: &File, page: u64) -> u8 {
    let mut bytes = [0; PAGE as usize];
    file.read_exact_at(&mut bytes, page * PAGE).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

/// A region is removed, and another one comes to its address, while the disk reads into both it and its neighbour: the data arrives in
/// the region that was there when the request came, which is mapped until the answer and no longer.
#[test]
fn regions_that_come_and_go_under_requests_in_flight() {
    const DATA: u8 = 0xab;
    let mut bench = Bench::new();
    let [low, high, next] = [(); 3].map(|()| tempfile::tempfile().unwrap());
    let (at, border) = (16 * PAGE, 18 * PAGE);
    let low_mapping = bench.add(at, &low, 2 * PAGE);
    let high_mapping = bench.add(border, &high, 2 * PAGE);
    let across = [(border - PAGE, 2 * PAGE as u32)];
    bench.ask(&across);
    assert_eq!(bench.double.wait_seen(1), [Seen { op: IoOp::Read, offset: 0, len: 2 * PAGE }], "one I/O into both");

    bench.remove(at);
    let next_mapping = bench.add(at, &next, 2 * PAGE);
    bench.ask(&across);
    assert_eq!(bench.double.held(), 2);
    assert!(low_mapping.strong_count() > 0, "a request is in flight that reads into it");

    assert_eq!(bench.done(), [Ok(())]);
    assert_eq!((page(&low, 0), page(&low, 1), page(&high, 0), page(&high, 1)), (0, DATA, DATA, 0));
    assert_eq!(page(&next, 1), 0, "it was not there when the request came");
    assert_eq!(low_mapping.strong_count(), 0, "it is unmapped with the answer");

    bench.remove(border);
    assert!(high_mapping.strong_count() > 0, "the other request reads into it");
    assert_eq!(bench.done(), [Ok(())]);
    assert_eq!((page(&next, 0), page(&next, 1)), (0, DATA));
    assert_eq!((high_mapping.strong_count(), next_mapping.strong_count()), (0, 1));
}

#[test]
fn regions_of_many_gib_are_read_into_at_their_end() {
    let mut bench = Bench::new();
    let file = tempfile::tempfile().unwrap();
    let (at, bytes) = (1 << 40, 6 << 30);
    bench.add(at, &file, bytes);
    bench.ask(&[(at + bytes - PAGE, PAGE as u32)]);
    assert_eq!(bench.done(), [Ok(())]);
    assert_eq!(page(&file, bytes / PAGE - 1), 0xab);
    assert_eq!(page(&file, (bytes - PAGE) % (1 << 32) / PAGE), 0, "the place has more than 32 bits");
}

#[test]
fn a_request_in_more_regions_than_an_io_holds_is_refused_and_keeps_none_of_them() {
    let mut bench = Bench::new();
    let files: Vec<_> = (0..=MAX_MEMORIES).map(|_| tempfile::tempfile().unwrap()).collect();
    let mappings: Vec<_> = (0..).zip(&files).map(|(i, file)| bench.add(i * PAGE, file, PAGE)).collect();
    let parts: Vec<_> = (0..files.len() as u64).map(|i| (i * PAGE, 512)).collect();
    bench.ask(&parts);
    assert_eq!((bench.answered(), bench.double.held()), (vec![Err(Errno::EIO)], 0));
    bench.remove(0);
    assert_eq!(mappings[0].strong_count(), 0);

    bench.ask(&parts[1..]);
    assert_eq!(bench.double.wait_seen(1), [Seen { op: IoOp::Read, offset: 0, len: 512 * MAX_MEMORIES as u64 }]);
    (1..).take(MAX_MEMORIES).for_each(|i| bench.remove(i * PAGE));
    assert!(mappings[1..].iter().all(|mapping| mapping.strong_count() > 0));
    assert_eq!(bench.done(), [Ok(())]);
    assert!(mappings.iter().all(|mapping| mapping.strong_count() == 0));
    for file in &files[1..] {
        let mut bytes = [0; PAGE as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[..512] == [0xab; 512] && bytes[512..].iter().all(|byte| *byte == 0));
    }
}
