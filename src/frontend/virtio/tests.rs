//! A driver that writes descriptors as it likes, and a disk that is a vector, in one thread.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use drivers::Origin;
use nix::errno::Errno;

use super::guest::{Place, Region, Regions};
use super::queue::{Bounces, Client, Queue};
use super::request::{IOERR, Negotiated, OK, UNSUPP};
use super::ring::{Broken, Layout};
use super::{config, feature, features};
use crate::frontend::{DiskInfo, Intake};
use crate::request::{Op, Request, RequestId, Slots};
use crate::sys::memory::Memory;

/// Of the guest's addresses, the first that is memory.
const BASE: u64 = 0x1_0000;
const MEMORY: usize = 1 << 20;
const SIZE: u16 = 8;
/// Offsets in it: the ring's parts, tables of descriptors, and a request's header, status and data.
const TABLE: usize = 0;
const AVAILABLE: usize = 0x1000;
const USED: usize = 0x2000;
const TABLES: usize = 0x3000;
const DATA: usize = 0x8000;
const STATUS: usize = DATA + 0x100;
const BUFFER: usize = DATA + 0x1000;
const DISK: usize = 1 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// As a descriptor has it: address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

fn at(offset: usize) -> u64 {
    BASE + offset as u64
}

struct Bed {
    memory: Arc<Memory>,
    regions: Regions,
    queue: Queue,
    bounces: Bounces,
    slots: Slots,
    started: VecDeque<RequestId>,
    disk: DiskInfo,
    data: Vec<u8>,
    done: Vec<(Op, u64, u64)>,
    negotiated: Negotiated,
    available: u16,
}

impl Bed {
    fn new() -> Bed {
        Bed::with(true, 64)
    }

    fn with(event_idx: bool, slots: usize) -> Bed {
        let memory = Arc::new(Memory::anonymous(MEMORY).unwrap());
        let place = |offset| Place { memory: Arc::clone(&memory), offset };
        let mut regions = Regions::default();
        regions.add(Region { guest: BASE, len: MEMORY as u64, user: 0, place: place(0) }).unwrap();
        let (table, available, used) = (place(TABLE), place(AVAILABLE), place(USED));
        let layout = Layout { size: SIZE, table, available, used, event_idx, tables: true };
        let name = "vec".into();
        Bed {
            regions,
            queue: Queue::new(layout, 0),
            bounces: Bounces::new(64).unwrap(),
            slots: Slots::new(slots, 64, 0),
            started: VecDeque::new(),
            disk: DiskInfo { size: DISK as u64, sector_size: 512, physical_sector_size: 512, read_only: false, name },
            data: (0..DISK).map(|i| (i / 512 % 251) as u8).collect(),
            done: Vec::new(),
            negotiated: Negotiated { write_through: false, discard: true, write_zeroes: true },
            available: 0,
            memory,
        }
    }

    fn put(&self, place: usize, index: u16, (addr, len, flags, next): Descriptor) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write(place + 16 * usize::from(index), &bytes);
    }

    fn word(&self, offset: usize) -> u16 {
        self.memory.atomic_u16(offset).load(Ordering::Relaxed)
    }

    fn set_word(&self, offset: usize, value: u16) {
        self.memory.atomic_u16(offset).store(value, Ordering::Relaxed);
    }

    fn header(&self, kind: u32, sector: u64) {
        let header = [kind.to_le_bytes(), [0; 4]].concat();
        self.memory.write(DATA, &[header, sector.to_le_bytes().to_vec()].concat());
        self.memory.write(STATUS, &[0xff]);
    }

    /// Makes a chain of the table available.
    fn offer(&mut self, head: u16) {
        self.set_word(AVAILABLE + 4 + 2 * usize::from(self.available % SIZE), head);
        self.available = self.available.wrapping_add(1);
        self.set_word(AVAILABLE + 2, self.available);
    }

    fn pull(&mut self) -> Result<u32, Broken> {
        let mut barrier = None;
        let mut intake = Intake {
            slots: &mut self.slots,
            started: &mut self.started,
            barrier: &mut barrier,
            disk: &self.disk,
            origin: Origin::Frontend(0),
            kept: 0,
            now: 1,
        };
        let mut client = Client {
            regions: &self.regions,
            bounces: &mut self.bounces,
            negotiated: self.negotiated,
            serial: b"a serial of 20 bytes",
        };
        self.queue.pull(&mut intake, &mut client, 0)
    }

    /// Does what the disk was asked for, and answers it.
    fn finish(&mut self) {
        while let Some(id) = self.started.pop_front() {
            let request = self.slots.get_mut(id);
            let (op, offset, len) = (request.op, request.offset as usize, request.len as usize);
            match (request.error, op) {
                (Some(_), _) => {}
                (None, Op::Read) => request.payload.put(0, &self.data[offset..offset + len]),
                (None, Op::Write { .. }) => request.payload.get(0, &mut self.data[offset..offset + len]),
                _ => {}
            }
            self.done.push((op, request.offset, request.len));
            let request: &Request = self.slots.get(id);
            self.queue.answer(request.tag as u16, request, &mut self.bounces);
            self.slots.release(id);
        }
        self.queue.publish();
    }

    /// One chain that is the whole table, from its first descriptor on; then the status, and what the used ring says was written.
    fn ask(&mut self, chain: &[Descriptor]) -> Result<(u8, u32), Broken> {
        chain.iter().zip(0..).for_each(|(descriptor, index)| self.put(TABLE, index, *descriptor));
        let used = self.word(USED + 2);
        self.offer(0);
        assert_eq!(self.pull()?, 1);
        self.finish();
        assert_eq!(self.word(USED + 2), used.wrapping_add(1), "answered");
        let entry: [u8; 8] = self.memory.read_once(USED + 4 + 8 * usize::from(used % SIZE));
        assert_eq!(entry[..4], [0; 4], "its first descriptor");
        let mut status = [0];
        self.memory.read(STATUS, &mut status);
        Ok((status[0], u32::from_le_bytes(entry[4..].try_into().unwrap())))
    }

    fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(offset, &mut bytes);
        bytes
    }
}

const HEADER: Descriptor = (BASE + DATA as u64, 16, NEXT, 1);
const LAST: Descriptor = (BASE + STATUS as u64, 1, WRITE, 0);

#[test]
fn a_request_may_be_cut_at_any_byte() {
    for cuts in [vec![1024], vec![512, 512], vec![1, 510, 513], vec![1023, 1]] {
        let mut bed = Bed::new();
        bed.header(0, 8);
        // The header in two, the data as it comes, and the status behind the last of it.
        let mut chain = vec![(at(DATA), 7, NEXT, 1), (at(DATA + 7), 9, NEXT, 2)];
        let mut place = BUFFER;
        for cut in &cuts {
            chain.push((at(place), *cut, NEXT | WRITE, chain.len() as u16 + 1));
            place += *cut as usize;
        }
        chain.push(LAST);
        assert_eq!(bed.ask(&chain), Ok((OK, 1025)), "{cuts:?}");
        assert_eq!(bed.bytes(BUFFER, 1024), bed.data[4096..5120], "{cuts:?}");
        assert_eq!(bed.bytes(BUFFER + 1024, 1), [0]);
    }
    // The status in the same buffer as the data.
    let mut bed = Bed::new();
    bed.header(0, 8);
    assert_eq!(bed.ask(&[HEADER, (at(BUFFER), 513, WRITE, 0)]), Ok((0xff, 513)), "not where it is looked for here");
    assert_eq!(bed.bytes(BUFFER, 513), [&bed.data[4096..4608], &[OK]].concat());
}

#[test]
fn a_table_of_descriptors_is_a_chain() {
    let mut bed = Bed::new();
    bed.header(1, 2);
    bed.memory.write(BUFFER, &[7; 1024]);
    bed.put(TABLES, 0, (at(DATA), 16, NEXT, 2));
    bed.put(TABLES, 2, (at(BUFFER), 1024, NEXT, 1));
    bed.put(TABLES, 1, LAST);
    assert_eq!(bed.ask(&[(at(TABLES), 48, INDIRECT, 0)]), Ok((OK, 1)));
    assert_eq!(bed.done, [(Op::Write { fua: false }, 1024, 1024)]);
    assert!(bed.data[1024..2048] == [7; 1024] && bed.data[2048] != 7);
}

#[test]
fn a_table_may_be_longer_than_its_ring() {
    let mut bed = Bed::new();
    bed.header(0, 8);
    // The header, as many buffers as a request may have, and the status.
    let count = super::SEG_MAX as u16;
    bed.put(TABLES, 0, HEADER);
    for i in 0..count {
        bed.put(TABLES, i + 1, (at(BUFFER + usize::from(i) * 512), 512, NEXT | WRITE, i + 2));
    }
    bed.put(TABLES, count + 1, LAST);
    let bytes = u32::from(count) * 512;
    assert_eq!(bed.ask(&[(at(TABLES), u32::from(count + 2) * 16, INDIRECT, 0)]), Ok((OK, bytes + 1)));
    assert_eq!(bed.bytes(BUFFER, bytes as usize), bed.data[4096..4096 + bytes as usize]);
}

#[test]
fn who_waits_for_memory_to_bounce_in_is_not_ready_before_there_is_some() {
    let mut bed = Bed::with(true, 64);
    bed.header(0, 0);
    // Two of them are all that there is.
    for head in [0, 3] {
        bed.put(TABLE, head, (at(DATA), 16, NEXT, head + 1));
        bed.put(TABLE, head + 1, (at(BUFFER + 1), 512, NEXT | WRITE, head + 2));
        bed.put(TABLE, head + 2, LAST);
    }
    bed.bounces = Bounces::with_lists(64, 1).unwrap();
    bed.offer(0);
    bed.offer(3);
    assert_eq!(bed.pull(), Ok(1));
    assert!(!bed.queue.ready(bed.bounces.is_short()) && !bed.queue.arm(bed.bounces.is_short()));
    bed.finish();
    assert!(bed.queue.ready(bed.bounces.is_short()) && bed.queue.arm(bed.bounces.is_short()));
    assert_eq!(bed.pull(), Ok(1));
    bed.finish();
    assert_eq!((bed.word(USED + 2), bed.slots.used(), bed.bounces.count()), (2, 0, 2));
}

#[test]
fn what_is_answered_at_once_is_only_so_much_in_a_turn() {
    let size = 1024;
    let mut bed = Bed::new();
    let place = |offset| Place { memory: Arc::clone(&bed.memory), offset };
    let layout = Layout {
        size,
        table: place(0x80000),
        available: place(0xa0000),
        used: place(0xb0000),
        event_idx: true,
        tables: true,
    };
    bed.queue = Queue::new(layout, 0);
    // Each is a table of 128 buffers without a byte, and what nobody knows.
    bed.header(77, 0);
    bed.put(TABLES, 0, HEADER);
    (1..127).for_each(|i| bed.put(TABLES, i, (at(BUFFER), 0, NEXT, i + 1)));
    bed.put(TABLES, 127, LAST);
    for head in 0..size {
        bed.put(0x80000, head, (at(TABLES), 128 * 16, INDIRECT, 0));
        bed.set_word(0xa0004 + 2 * usize::from(head), head);
    }
    bed.set_word(0xa0002, size);
    let mut turns = 0;
    while bed.queue.ready(false) {
        assert!(bed.pull().unwrap() <= 32);
        turns += 1;
    }
    assert_eq!((turns, bed.queue.counters.requests), (32, 1024));
}

#[test]
fn each_kind_of_request_has_its_answer() {
    let data = (at(BUFFER), 1024, NEXT, 2);
    let room = (at(BUFFER), 1024, NEXT | WRITE, 2);
    let range = (at(BUFFER), 16, NEXT, 2);
    for (kind, sector, chain, wanted) in [
        (4, 0, vec![HEADER, LAST], (OK, 1)),
        (8, 0, vec![HEADER, (at(BUFFER), 20, NEXT | WRITE, 2), LAST], (OK, 21)),
        (8, 0, vec![HEADER, (at(BUFFER), 4, NEXT | WRITE, 2), LAST], (OK, 5)),
        // SCSI, and what nobody knows.
        (2, 0, vec![HEADER, LAST], (UNSUPP, 1)),
        (77, 0, vec![HEADER, LAST], (UNSUPP, 1)),
        // Beyond the end; beyond all numbers; no whole sectors; nothing.
        (0, 2048, vec![HEADER, room, LAST], (IOERR, 1)),
        (1, 2047, vec![HEADER, data, LAST], (IOERR, 1)),
        (0, u64::MAX, vec![HEADER, room, LAST], (IOERR, 1)),
        (1, 0, vec![HEADER, (at(BUFFER), 1000, NEXT, 2), LAST], (IOERR, 1)),
        (0, 0, vec![HEADER, LAST], (IOERR, 1)),
        // A header that is too short.
        (0, 0, vec![(at(DATA), 15, NEXT, 1), LAST], (IOERR, 1)),
        (0, 0, vec![LAST], (IOERR, 1)),
        // A range: none, half of one, two.
        (11, 0, vec![HEADER, LAST], (IOERR, 1)),
        (13, 0, vec![HEADER, (at(BUFFER), 8, NEXT, 2), LAST], (IOERR, 1)),
        (13, 0, vec![HEADER, (at(BUFFER), 32, NEXT, 2), LAST], (IOERR, 1)),
        (11, 0, vec![HEADER, range, LAST], (IOERR, 1)),
    ] {
        let mut bed = Bed::new();
        bed.header(kind, sector);
        assert_eq!(bed.ask(&chain), Ok(wanted), "{kind} {sector} {chain:?}");
        if kind == 8 {
            assert!(b"a serial of 20 bytes".starts_with(&bed.bytes(BUFFER, wanted.1 as usize - 1)));
        }
    }
}

#[test]
fn ranges_are_checked_before_anything_is_done() {
    for (kind, sector, sectors, flags, wanted) in [
        (11, 8_u64, 16_u32, 0_u32, Ok((Op::Discard, 4096, 8192))),
        (13, 8, 16, 0, Ok((Op::WriteZeroes { unmap: false }, 4096, 8192))),
        (13, 8, 16, 1, Ok((Op::WriteZeroes { unmap: true }, 4096, 8192))),
        (11, 8, 16, 1, Err(UNSUPP)),
        (13, 8, 16, 2, Err(UNSUPP)),
        (13, 2040, 16, 0, Err(IOERR)),
        (13, 0, 0, 0, Err(IOERR)),
        (13, u64::MAX, 16, 0, Err(IOERR)),
        (11, 0, u32::MAX, 0, Err(IOERR)),
    ] {
        let mut bed = Bed::new();
        bed.header(kind, 0);
        let range = [sector.to_le_bytes().to_vec(), sectors.to_le_bytes().to_vec(), flags.to_le_bytes().to_vec()];
        bed.memory.write(BUFFER, &range.concat());
        let (status, _) = bed.ask(&[HEADER, (at(BUFFER), 16, NEXT, 2), LAST]).unwrap();
        assert_eq!(status, wanted.err().unwrap_or(OK), "{kind} {sector} {sectors} {flags}");
        if let Ok(done) = wanted {
            assert_eq!(bed.done, [done]);
        }
        // Not offered, not known.
        let mut bed = Bed::new();
        bed.negotiated = Negotiated::default();
        bed.header(kind, 0);
        assert_eq!(bed.ask(&[HEADER, (at(BUFFER), 16, NEXT, 2), LAST]), Ok((UNSUPP, 1)));
    }
}

#[test]
fn writes_are_durable_at_once_where_there_is_no_write_cache() {
    let mut bed = Bed::new();
    bed.negotiated.write_through = true;
    bed.header(1, 0);
    assert_eq!(bed.ask(&[HEADER, (at(BUFFER), 512, NEXT, 2), LAST]), Ok((OK, 1)));
    assert_eq!(bed.done, [(Op::Write { fua: true }, 0, 512)]);
}

#[test]
fn a_chain_that_makes_no_sense_breaks_its_ring() {
    let room = (at(BUFFER), 512, NEXT | WRITE, 2);
    let table = |bed: &Bed, descriptors: &[Descriptor]| {
        descriptors.iter().zip(0..).for_each(|(descriptor, index)| bed.put(TABLES, index, *descriptor));
    };
    let end = at(MEMORY);
    type Case = (Vec<Descriptor>, Vec<Descriptor>, Broken);
    let cases: Vec<Case> = vec![
        (vec![(at(DATA), 16, NEXT, 8)], vec![], Broken::Index(8)),
        (vec![(at(DATA), 16, NEXT, u16::MAX)], vec![], Broken::Index(u16::MAX)),
        (vec![(at(DATA), 16, NEXT, 0)], vec![], Broken::Loop),
        (vec![HEADER, (at(BUFFER), 512, NEXT, 0)], vec![], Broken::Loop),
        (vec![HEADER, room, (at(BUFFER), 512, NEXT, 3), LAST], vec![], Broken::Order),
        (vec![HEADER, (at(BUFFER), 512, 0, 0)], vec![], Broken::NoStatus),
        (vec![HEADER, (at(STATUS), 0, WRITE, 0)], vec![], Broken::NoStatus),
        (vec![HEADER, (end, 512, NEXT | WRITE, 2), LAST], vec![], Broken::Outside),
        (vec![HEADER, (end - 511, 512, NEXT | WRITE, 2), LAST], vec![], Broken::Outside),
        (vec![HEADER, (u64::MAX, 512, NEXT | WRITE, 2), LAST], vec![], Broken::Outside),
        (vec![(0, 16, NEXT, 1), LAST], vec![], Broken::Outside),
        (vec![HEADER, (end, 1, WRITE, 0)], vec![], Broken::Outside),
        (vec![HEADER, (at(BUFFER), u32::MAX, NEXT | WRITE, 2), LAST], vec![], Broken::Length),
        (vec![(at(TABLES), 0, INDIRECT, 0)], vec![], Broken::TableLength(0)),
        (vec![(at(TABLES), 24, INDIRECT, 0)], vec![], Broken::TableLength(24)),
        (vec![(at(TABLES), 32, INDIRECT | NEXT, 1)], vec![HEADER, LAST], Broken::TableHasNext),
        (vec![(at(TABLES), 32, INDIRECT, 0)], vec![(at(TABLES), 32, INDIRECT, 0)], Broken::TableInTable),
        (vec![(at(TABLES), 16, INDIRECT, 0)], vec![HEADER], Broken::Index(1)),
        (vec![(at(TABLES), 32, INDIRECT, 0)], vec![HEADER, (at(BUFFER), 1, NEXT, 0)], Broken::Loop),
        (vec![(end, 32, INDIRECT, 0)], vec![], Broken::Outside),
        (vec![(u64::MAX - 7, 32, INDIRECT, 0)], vec![], Broken::Outside),
    ];
    for (chain, of_table, wanted) in cases {
        let mut bed = Bed::new();
        bed.header(0, 0);
        table(&bed, &of_table);
        // One before it is taken and answered all the same.
        bed.put(TABLE, 5, (at(DATA), 16, NEXT, 6));
        bed.put(TABLE, 6, (at(BUFFER), 512, NEXT | WRITE, 7));
        bed.put(TABLE, 7, LAST);
        bed.offer(5);
        assert_eq!(bed.pull(), Ok(1));
        assert_eq!(bed.ask(&chain), Err(wanted), "{chain:?}");
        assert_eq!((bed.queue.broken(), bed.pull()), (Some(wanted), Ok(0)), "told once");
        assert!(!bed.queue.ready(bed.bounces.is_short()) && !bed.queue.arm(bed.bounces.is_short()));
        bed.finish();
        assert_eq!((bed.word(USED + 2), bed.queue.in_flight(), bed.slots.used()), (1, 0, 0), "{wanted}");
    }
}

#[test]
fn an_index_too_far_on_a_head_that_does_not_exist_and_one_in_use_break_it_too() {
    let mut bed = Bed::new();
    bed.set_word(AVAILABLE + 2, SIZE + 1);
    assert_eq!(bed.pull(), Err(Broken::Available(SIZE + 1)));
    let mut bed = Bed::new();
    bed.offer(SIZE);
    assert_eq!(bed.pull(), Err(Broken::Index(SIZE)));
    let mut bed = Bed::new();
    bed.header(0, 0);
    [HEADER, (at(BUFFER), 512, NEXT | WRITE, 2), LAST].into_iter().zip(0..).for_each(|(d, i)| bed.put(TABLE, i, d));
    bed.offer(0);
    bed.offer(0);
    assert_eq!(bed.pull(), Err(Broken::InUse(0)));
    bed.finish();
    assert_eq!((bed.word(USED + 2), bed.queue.in_flight()), (1, 0));
}

#[test]
fn what_there_is_no_slot_for_stays_in_the_ring() {
    let mut bed = Bed::with(true, 1);
    bed.header(4, 0);
    for head in [0, 2] {
        bed.put(TABLE, head, (at(DATA), 16, NEXT, head + 1));
        bed.put(TABLE, head + 1, LAST);
        bed.offer(head);
    }
    assert_eq!((bed.pull(), bed.pull()), (Ok(1), Ok(0)));
    assert!(bed.queue.ready(bed.bounces.is_short()));
    bed.finish();
    assert_eq!(bed.pull(), Ok(1));
    bed.finish();
    assert_eq!((bed.word(USED + 2), bed.queue.ring().base()), (2, 2));
}

#[test]
fn notifications_go_out_and_are_asked_for_as_the_driver_wants() {
    for event_idx in [false, true] {
        let mut bed = Bed::with(event_idx, 64);
        bed.header(4, 0);
        bed.put(TABLE, 0, HEADER);
        bed.put(TABLE, 1, LAST);
        let asked = |bed: &mut Bed| {
            bed.offer(0);
            bed.pull().unwrap();
            let before = bed.queue.counters.kicks_out;
            bed.finish();
            bed.queue.counters.kicks_out > before
        };
        let quiet = |bed: &Bed, quiet: bool| {
            bed.set_word(AVAILABLE, u16::from(quiet));
            // The index behind the available ring: the entry whose use is to be told.
            let next = bed.word(USED + 2);
            bed.set_word(AVAILABLE + 4 + 2 * usize::from(SIZE), if quiet { next.wrapping_add(3) } else { next });
        };
        quiet(&bed, true);
        assert!(asked(&mut bed), "the first one always");
        quiet(&bed, true);
        assert!(!asked(&mut bed), "{event_idx}");
        quiet(&bed, false);
        assert!(asked(&mut bed), "{event_idx}");
        // Before it sleeps it asks for the next one, and sees what came in before that.
        assert!(!bed.queue.arm(bed.bounces.is_short()));
        let event = bed.word(USED + 4 + 8 * usize::from(SIZE));
        assert_eq!(if event_idx { event } else { bed.word(USED) }, if event_idx { 3 } else { 0 });
        bed.offer(0);
        assert!(bed.queue.arm(bed.bounces.is_short()) && bed.queue.ready(bed.bounces.is_short()));
        bed.queue.disarm();
        assert_eq!(bed.word(USED), u16::from(!event_idx));
    }
}

#[test]
fn indices_wrap() {
    let mut bed = Bed::new();
    bed.header(4, 0);
    for _ in 0..70_000 {
        assert_eq!(bed.ask(&[HEADER, LAST]), Ok((OK, 1)));
    }
}

#[test]
fn memory_that_goes_away_is_kept_by_what_is_in_flight() {
    let mut bed = Bed::new();
    bed.header(0, 0);
    [HEADER, (at(BUFFER), 512, NEXT | WRITE, 2), LAST].into_iter().zip(0..).for_each(|(d, i)| bed.put(TABLE, i, d));
    bed.offer(0);
    assert_eq!(bed.pull(), Ok(1));
    assert!(bed.regions.remove(BASE, MEMORY as u64, 0).is_some());
    bed.finish();
    assert_eq!((bed.bytes(BUFFER, 512), bed.bytes(STATUS, 1)), (bed.data[..512].to_vec(), vec![OK]));
    bed.offer(0);
    assert_eq!(bed.pull(), Err(Broken::Outside));
}

#[test]
fn a_request_that_fails_is_answered_so_and_its_buffer_left_alone() {
    let mut bed = Bed::new();
    bed.header(0, 0);
    [HEADER, (at(BUFFER + 1), 512, NEXT | WRITE, 2), LAST]
        .into_iter()
        .zip(0..)
        .for_each(|(d, i)| bed.put(TABLE, i, d));
    bed.offer(0);
    assert_eq!(bed.pull(), Ok(1));
    let id = bed.started[0];
    bed.slots.get_mut(id).error = Some(Errno::EIO);
    bed.finish();
    assert_eq!((bed.bytes(STATUS, 1), bed.bytes(BUFFER + 1, 512)), (vec![IOERR], vec![0; 512]));
    assert_eq!(bed.bounces.count(), 1);
}

fn disk(read_only: bool) -> DiskInfo {
    let name = "aio:x".into();
    DiskInfo { size: 8 << 20, sector_size: 512, physical_sector_size: 4096, read_only, name }
}

#[test]
fn a_disk_that_is_only_read_offers_nothing_that_writes() {
    let (offered, read) = (features(&disk(false), 1), features(&disk(true), 2));
    assert_eq!(offered & (feature::RO | feature::MQ | feature::DISCARD | feature::WRITE_ZEROES), 3 << 13);
    assert_eq!(read & (feature::RO | feature::MQ | feature::DISCARD | feature::WRITE_ZEROES), 1 << 5 | 1 << 12);
}

#[test]
fn the_configuration_space_is_laid_out_as_the_specification_says() {
    let space = config(&disk(false), 3, true);
    let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4), word(8), word(12), word(16), word(20)), (16384, 0, 0, 126, 0, 512));
    assert_eq!((space[24], space[25], word(26) as u16, word(28), space[32], space[34]), (3, 0, 8, 0, 1, 3));
    assert_eq!((word(40), word(44), word(52), space[56]), (1, 1, 1, 1));
}
