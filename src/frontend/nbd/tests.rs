//! The server with a disk that is a vector, in one thread: what a client sends, and byte for byte what it gets.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use drivers::Origin;
use mio::{Events, Poll};
use nix::errno::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::wire::{
    CHUNK_BLOCK_STATUS, CHUNK_DONE, CHUNK_ERROR, CHUNK_ERROR_OFFSET, CHUNK_OFFSET_DATA, CMD_BLOCK_STATUS, CMD_DISC,
    CMD_FLAG_FUA, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, ChunkHead, REQUEST_MAGIC, RequestHead, SimpleReply,
};
use super::*;
use crate::request::{Op, RequestId, Slots};

const SIZE: usize = 16 << 20;
const CHUNK: u32 = command::CHUNK;

struct Served {
    nbd: Nbd,
    poll: Poll,
    events: Events,
    slots: Slots,
    started: VecDeque<RequestId>,
    disk: DiskInfo,
    data: Vec<u8>,
    /// I/O to this byte fails.
    bad: Option<u64>,
    /// Requests stay with the disk.
    stuck: bool,
    done: Vec<Op>,
    folder: tempfile::TempDir,
}

impl Served {
    fn new(slots: usize, max_connections: usize) -> Served {
        let folder = tempfile::tempdir().unwrap();
        let disk = DiskInfo {
            size: SIZE as u64,
            sector_size: 512,
            physical_sector_size: 4096,
            read_only: false,
            name: "vec".into(),
        };
        let config = Config {
            socket: Some(folder.path().join("nbd")),
            old_socket: None,
            listen: None,
            export: String::new(),
            max_connections,
            lock_memory: false,
        };
        let mut nbd = Nbd::bind(&config, disk.clone(), Logger::root(slog::Discard, slog::o!())).unwrap();
        let poll = Poll::new().unwrap();
        nbd.register(poll.registry().try_clone().unwrap(), 7).unwrap();
        Served {
            nbd,
            poll,
            events: Events::with_capacity(16),
            slots: Slots::new(slots, 1, 0),
            started: VecDeque::new(),
            disk,
            data: (0..SIZE).map(|i| (i / 512 % 251) as u8).collect(),
            bad: None,
            stuck: false,
            done: Vec::new(),
            folder,
        }
    }

    /// Turns until there is nothing left to do.
    fn run(&mut self) {
        for _ in 0..10_000 {
            self.poll.poll(&mut self.events, Some(Duration::ZERO)).unwrap();
            let quiet = self.events.is_empty();
            self.events.iter().for_each(|event| self.nbd.event(event.token().0 - 7, event));
            let (slots, started) = (&mut self.slots, &mut self.started);
            let (disk, barrier) = (&self.disk, &mut None);
            let origin = Origin::Frontend(0);
            self.nbd.pull(&mut Intake { slots, started, barrier, disk, origin, kept: 0, now: 0 });
            let worked = !self.stuck && self.work();
            self.nbd.publish();
            if quiet && !worked && !(self.slots.room() > 0 && self.nbd.arm()) {
                return;
            }
        }
        panic!("the server never comes to rest");
    }

    /// Does what was handed in, the last first.
    fn work(&mut self) -> bool {
        let worked = !self.started.is_empty();
        while let Some(id) = self.started.pop_back() {
            let request = self.slots.get_mut(id);
            let range = request.offset..request.offset + request.len;
            if self.bad.is_some_and(|bad| range.contains(&bad)) {
                request.error.get_or_insert(Errno::EIO);
            }
            if request.error.is_none() && !request.payload.is_empty() {
                let image = &mut self.data[range.start as usize..range.end as usize];
                let mut at = 0;
                for (memory, offset, len) in request.payload.slice(0, request.len) {
                    match request.op {
                        Op::Read => memory.write(offset, &image[at..at + len]),
                        Op::Status => memory.write(offset, [512_u64, 1024].as_bytes()),
                        _ => memory.read(offset, &mut image[at..at + len]),
                    }
                    at += len;
                }
            }
            self.done.push(request.op);
            self.nbd.answer(request);
            self.slots.release(id);
        }
        worked
    }

    fn connect(&mut self, structured: bool) -> Client {
        let stream = UnixStream::connect(self.folder.path().join("nbd")).unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut client = Client { stream };
        let option = |number: u32, data: &[u8]| {
            let length = data.len() as u32;
            [&b"IHAVEOPT"[..], &number.to_be_bytes(), &length.to_be_bytes(), data].concat()
        };
        let mut hello = 3_u32.to_be_bytes().to_vec();
        if structured {
            hello.extend(option(8, &[]));
            hello.extend(option(10, b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation"));
        }
        hello.extend(option(1, &[]));
        client.send(&hello);
        self.run();
        assert!(client.receive(self).len() > 18);
        client
    }

    fn ask(&mut self, client: &mut Client, requests: &[(u16, u16, u64, u32)]) -> Vec<u8> {
        requests.iter().for_each(|request| client.request(*request));
        client.receive(self)
    }
}

struct Client {
    stream: UnixStream,
}

impl Client {
    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Command, flags, offset, length; the length is also the cookie.
    fn request(&mut self, (command, flags, offset, length): (u16, u16, u64, u32)) {
        let head = RequestHead {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: u64::from(length).to_be_bytes(),
            offset: offset.into(),
            length: length.into(),
        };
        self.send(head.as_bytes());
    }

    /// All that the server has to say, until it says nothing more.
    fn receive(&mut self, served: &mut Served) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            served.run();
            let before = all.len();
            match self.stream.read_to_end(&mut all) {
                Err(error) if error.kind() == ErrorKind::WouldBlock && all.len() > before => {}
                _ => return all,
            }
        }
    }

    fn write(&mut self, served: &mut Served, offset: u64, data: &[u8]) {
        self.request((CMD_WRITE, 0, offset, data.len() as u32));
        for part in data.chunks(50_000) {
            self.send(part);
            served.run();
        }
    }

    /// Whether the server has hung up.
    fn is_cut_off(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0))
    }
}

fn simple(bytes: &[u8]) -> (u32, u64, &[u8]) {
    let (head, rest) = SimpleReply::read_from_prefix(bytes).unwrap();
    (head.error.get(), u64::from_be_bytes(head.cookie), rest)
}

/// Kind, whether the last, cookie and content of each chunk.
fn chunks(mut bytes: &[u8]) -> Vec<(u16, bool, u64, &[u8])> {
    let mut all = Vec::new();
    while let Ok((head, rest)) = ChunkHead::read_from_prefix(bytes) {
        let (content, rest) = rest.split_at(head.length.get() as usize);
        let done = head.flags.get() & CHUNK_DONE != 0;
        all.push((head.kind.get(), done, u64::from_be_bytes(head.cookie), content));
        bytes = rest;
    }
    assert!(bytes.is_empty());
    all
}

#[test]
fn a_long_read_without_structure_comes_in_order_and_whole() {
    let mut served = Served::new(8, 1);
    let mut client = served.connect(false);
    let length = 5 * CHUNK + 512;
    let reply = served.ask(&mut client, &[(CMD_READ, 0, 4096, length), (CMD_FLUSH, 0, 0, 0)]);
    let (error, cookie, rest) = simple(&reply);
    let (data, rest) = rest.split_at(length as usize);
    assert_eq!((error, cookie), (0, u64::from(length)));
    assert!(data == &served.data[4096..4096 + length as usize]);
    assert_eq!(simple(rest), (0, 0, &[][..]));
}

#[test]
fn a_long_read_that_fails_is_an_error_while_nothing_is_sent_and_else_the_end() {
    let mut served = Served::new(2, 1);
    let mut client = served.connect(false);
    served.bad = Some(0);
    let reply = served.ask(&mut client, &[(CMD_READ, 0, 0, 32 * CHUNK), (CMD_READ, 0, 512, 512)]);
    let (error, cookie, rest) = simple(&reply);
    assert_eq!((error, cookie), (5, u64::from(32 * CHUNK)));
    assert_eq!((simple(rest).0, simple(rest).2), (0, &served.data[512..1024]));
    served.bad = Some(u64::from(9 * CHUNK));
    let reply = served.ask(&mut client, &[(CMD_READ, 0, 0, 32 * CHUNK)]);
    assert!(reply.len() < 10 * CHUNK as usize && client.is_cut_off());
    assert_eq!(served.nbd.connections().count(), 0);
}

#[test]
fn of_a_structured_read_only_the_bad_part_is_missing() {
    let mut served = Served::new(8, 1);
    let mut client = served.connect(true);
    served.bad = Some(u64::from(CHUNK));
    let reply = served.ask(&mut client, &[(CMD_READ, 0, 0, 3 * CHUNK), (CMD_READ, 0, 1, 512)]);
    let (chunks, refused): (Vec<_>, Vec<_>) = chunks(&reply).into_iter().partition(|chunk| chunk.2 != 512);
    assert!(refused == [(CHUNK_ERROR, true, 512, &b"\0\0\0\x16\0\0"[..])]);
    assert_eq!(chunks.iter().map(|chunk| chunk.1).collect::<Vec<_>>(), [false, false, true]);
    for (kind, _, _, content) in chunks {
        let at = content.len() - if kind == CHUNK_OFFSET_DATA { CHUNK as usize + 8 } else { 8 };
        let offset = u64::from_be_bytes(content[at..at + 8].try_into().unwrap()) as usize;
        if offset == CHUNK as usize {
            assert_eq!((kind, &content[..6]), (CHUNK_ERROR_OFFSET, &b"\0\0\0\x05\0\0"[..]));
        } else {
            assert!(content[8..] == served.data[offset..offset + CHUNK as usize]);
        }
    }
}

#[test]
fn a_write_arrives_whole_or_with_one_error_and_the_stream_goes_on() {
    let mut served = Served::new(2, 1);
    let mut client = served.connect(true);
    let data: Vec<u8> = (0..6 * CHUNK + 512).map(|i| (i % 253) as u8).collect();
    client.write(&mut served, 512, &data);
    assert_eq!(simple(&client.receive(&mut served)), (0, data.len() as u64, &[][..]));
    assert!(served.data[512..512 + data.len()] == data);
    for (bad, offset, error) in [(Some(512), 512, 5), (None, SIZE as u64 - 512, 28), (None, 1, 22)] {
        served.bad = bad;
        client.write(&mut served, offset, &data);
        client.request((CMD_FLUSH, 0, 0, 0));
        let reply = client.receive(&mut served);
        let (first, cookie, rest) = simple(&reply);
        assert_eq!((first, cookie, simple(rest)), (error, data.len() as u64, (0, 0, &[][..])));
    }
}

#[test]
fn fua_on_a_trim_is_a_flush_behind_it() {
    let mut served = Served::new(1, 1);
    let mut client = served.connect(false);
    let reply = served.ask(&mut client, &[(CMD_TRIM, CMD_FLAG_FUA, 0, 4096), (CMD_TRIM, 0, 0, 512)]);
    assert_eq!(reply.len(), 2 * size_of::<SimpleReply>());
    served.done.sort_by_key(|op| op.kind());
    assert_eq!(served.done, [Op::Flush, Op::Discard, Op::Discard]);
}

#[test]
fn a_block_status_has_the_context_and_its_runs() {
    let mut served = Served::new(1, 1);
    let mut client = served.connect(true);
    let reply = served.ask(&mut client, &[(CMD_BLOCK_STATUS, 0, 0, 1 << 20)]);
    let expected = [&1_u32.to_be_bytes()[..], b"\0\0\x02\0\0\0\0\0", b"\0\0\x04\0\0\0\0\x03"].concat();
    assert_eq!(chunks(&reply), [(CHUNK_BLOCK_STATUS, true, 1 << 20, &expected[..])]);
    served.bad = Some(0);
    let reply = served.ask(&mut client, &[(CMD_BLOCK_STATUS, 0, 0, 1 << 20)]);
    assert_eq!(chunks(&reply), [(CHUNK_ERROR, true, 1 << 20, &b"\0\0\0\x05\0\0"[..])]);
}

#[test]
fn who_does_not_read_waits_without_a_busy_loop_and_without_harm_to_others() {
    let mut served = Served::new(4, 2);
    let (mut lazy, mut other) = (served.connect(true), served.connect(false));
    (0..100).for_each(|_| lazy.request((CMD_READ, 0, 0, CHUNK)));
    served.run();
    assert_eq!(served.ask(&mut other, &[(CMD_READ, 0, 0, 4096)]).len(), 16 + 4096);
    let reply = lazy.receive(&mut served);
    assert_eq!(reply.len(), 100 * (20 + 8 + CHUNK as usize));
}

#[test]
fn who_waits_for_a_slot_gets_the_next_that_is_free_and_no_clock_ticks_meanwhile() {
    let mut served = Served::new(1, 4);
    let mut clients = [served.connect(true), served.connect(true)];
    served.stuck = true;
    for client in &mut clients {
        (0..8).for_each(|_| client.request((CMD_READ, 0, 0, 4096)));
    }
    served.run();
    let mut whose = Vec::new();
    for _ in 0..16 {
        assert_eq!((served.slots.used(), served.nbd.pull_deadline()), (1, None));
        whose.push(untag(served.slots.iter().next().unwrap().1.tag).0);
        assert!(served.work() && served.slots.room() == 1);
        served.run();
    }
    assert_eq!(served.slots.used(), 0);
    assert!(whose.windows(2).all(|two| two[0] != two[1]), "each in turn: {whose:?}");
    // A slot that another frontend had.
    served.slots.vacant().unwrap();
    let id = served.slots.take().unwrap();
    clients[0].request((CMD_READ, 0, 0, 4096));
    served.run();
    assert_eq!((served.nbd.pull_deadline(), served.started.len()), (None, 0));
    served.slots.release(id);
    assert!(served.nbd.ready() && served.nbd.arm());
    served.run();
    assert_eq!((served.slots.used(), served.started.len()), (1, 1));
}

#[test]
fn who_sends_half_a_write_holds_no_request() {
    let mut served = Served::new(1, 2);
    let (mut slow, mut other) = (served.connect(true), served.connect(false));
    slow.request((CMD_WRITE, 0, 0, 4096));
    slow.send(&[1; 4095]);
    served.run();
    assert_eq!(served.slots.used(), 0);
    assert_eq!(served.ask(&mut other, &[(CMD_READ, 0, 0, 4096)]).len(), 16 + 4096);
    slow.send(&[1]);
    assert_eq!(slow.receive(&mut served).len(), 16);
}

#[test]
fn a_place_is_free_when_the_last_request_of_who_left_has_ended() {
    let mut served = Served::new(4, 1);
    let mut client = served.connect(true);
    served.stuck = true;
    client.request((CMD_READ, 0, 0, 4096));
    client.request((CMD_READ, 0, 0, 512));
    served.run();
    served.nbd.connections_mut().for_each(|connection| connection.kill("test"));
    served.run();
    assert_eq!((served.nbd.seats.orphans(), served.slots.used()), (2, 2));
    let mut next = UnixStream::connect(served.folder.path().join("nbd")).unwrap();
    next.set_nonblocking(true).unwrap();
    served.run();
    assert_eq!(next.read(&mut [0; 18]).unwrap_err().kind(), ErrorKind::WouldBlock);
    served.stuck = false;
    served.run();
    assert_eq!((served.nbd.seats.orphans(), served.slots.used()), (0, 0));
    assert_eq!(next.read(&mut [0; 18]).unwrap(), 18);
}

#[test]
fn a_place_is_free_also_after_a_long_read_that_was_partly_answered() {
    let mut served = Served::new(8, 1);
    let mut client = served.connect(false);
    served.stuck = true;
    client.request((CMD_READ, 0, 0, 8 * CHUNK));
    served.run();
    assert!(served.started.len() > 3);
    // The last part is answered, and waits for those before it; the first one is sent to a client that has gone.
    let mut all = std::mem::take(&mut served.started);
    served.started.push_back(all.pop_back().unwrap());
    served.work();
    drop(client);
    served.started.push_back(all.pop_front().unwrap());
    served.work();
    served.run();
    assert_eq!(served.nbd.seats.orphans(), all.len(), "what is with the disk");
    served.started = all;
    served.stuck = false;
    served.run();
    assert_eq!((served.nbd.seats.orphans(), served.nbd.seats.free()), (0, Ok(1)));
}

#[test]
fn who_is_gone_leaves_though_its_requests_stay_with_the_disk() {
    for (slots, count) in [(4, 2), (4, 40)] {
        let mut served = Served::new(slots, 1);
        let mut client = served.connect(true);
        served.stuck = true;
        (0..count).for_each(|_| client.request((CMD_READ, 0, 0, 4096)));
        served.run();
        let held = served.slots.used();
        assert_eq!((held, served.nbd.has_orphans()), (slots.min(count), false));
        // With one side only it still wants its replies.
        client.stream.shutdown(Shutdown::Write).unwrap();
        served.run();
        assert_eq!((served.nbd.connections().count(), served.nbd.has_orphans()), (1, false));
        drop(client);
        served.run();
        assert_eq!((served.nbd.connections().count(), served.nbd.seats.orphans()), (0, held));
        assert!(served.slots.iter().all(|(_, request)| served.nbd.is_orphan(request.tag)));
        served.stuck = false;
        served.run();
        assert_eq!((served.nbd.seats.free(), served.slots.used()), (Ok(1), 0));
    }
}

#[test]
fn one_too_many_is_hung_up_on() {
    let mut served = Served::new(1, 1);
    let _client = served.connect(false);
    let mut second = UnixStream::connect(served.folder.path().join("nbd")).unwrap();
    served.run();
    assert_eq!((second.read(&mut [0]).unwrap(), served.nbd.refused), (0, 1));
}

#[test]
fn goodbye_answers_what_was_asked_before() {
    let mut served = Served::new(4, 1);
    let mut client = served.connect(false);
    let reply = served.ask(&mut client, &[(CMD_READ, 0, 0, 3 * CHUNK), (CMD_DISC, 0, 0, 0), (CMD_FLUSH, 0, 0, 0)]);
    assert_eq!(reply.len(), 16 + 3 * CHUNK as usize);
    assert!(client.is_cut_off());
    let mut client = served.connect(false);
    client.request((CMD_READ, 0, 0, 512));
    served.stuck = true;
    served.run();
    served.nbd.close();
    served.stuck = false;
    assert_eq!(client.receive(&mut served).len(), 16 + 512);
    assert!(client.is_cut_off() && !served.folder.path().join("nbd").exists());
}

#[test]
fn the_handshake_has_a_deadline_and_other_talk_is_cut_off() {
    let mut served = Served::new(1, 2);
    let mut client = served.connect(false);
    assert_eq!(served.nbd.pull_deadline(), None);
    let _silent = UnixStream::connect(served.folder.path().join("nbd")).unwrap();
    served.run();
    let deadline = served.nbd.pull_deadline().unwrap();
    assert!((now()..=now() + HANDSHAKE).contains(&deadline));
    client.send(&[0; 28]);
    served.run();
    assert!(client.is_cut_off());
}
