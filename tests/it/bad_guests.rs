//! Guests that break the rules, each with the answer that it must get. The process lives on, and an honest guest on
//! the same disk notices nothing. The rows are those of the XSAs and of blkif.h's demands on a backend.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::common::guest::{Guest, page};
use crate::common::live::wait_for;
use crate::common::served::{Served, folder, run};
use tapdisk::client::{self, Client, Error, Options};
use tapdisk::frontend::blkif::wire::*;
use tapdisk::frontend::local::wire::{Hello, MAGIC};
use tapdisk::sys::fdpass;
use tempfile::TempDir;
use zerocopy::IntoBytes;

const LOCAL: &str = "[frontend.local]\nsocket = '{s}/ring'\n";
const SIZE: u64 = 8 << 20;

/// A disk of 8 MiB in a file of 0x11s.
fn serve(image: &str) -> (TempDir, Served) {
    serve_with(image, LOCAL)
}

/// The same with other tables: without a frontend of theirs it is the usual one.
fn serve_with(image: &str, rest: &str) -> (TempDir, Served) {
    let rest = if rest.contains("[frontend.") { rest.to_owned() } else { format!("{LOCAL}{rest}") };
    let folder = folder();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![0x11; SIZE as usize]).unwrap();
    let served = Served::start(&format!("path = '{}'\n{image}", path.display()), &rest);
    (folder, served)
}

/// An honest guest still gets what it asks for.
fn still_serves(served: &mut Served) {
    assert!(served.alive(), "{}", served.log());
    let mut honest = Guest::connect(&served.ring());
    assert_eq!(honest.read(SIZE / 512 - 8, 4096), Ok(vec![0x11; 4096]));
}

#[test]
fn row_1_a_request_that_changes_while_it_is_parsed() {
    let (_folder, mut served) = serve("");
    let mut guest = Guest::connect_with(&served.ring(), Abi::Native, 0);
    let honest = guest.entry(OP_READ).with_sector(8).with_segments(1, &[page(0)]);
    // The first eight entries change between a good and a bad request all the while.
    let memory_at = guest.queue.ring_at() + RING_HEADER;
    let bytes = [11u8, 255];
    let deadline = std::time::Instant::now() + Duration::from_secs(1);
    let mut rounds = 0u32;
    while std::time::Instant::now() < deadline {
        for _ in 0..16 {
            guest.queue.ring.push(&honest);
        }
        guest.queue.publish().unwrap();
        for flip in 0..200 {
            for entry in 0..32 {
                // nr_segments, and the segment's first and last sector.
                let at = memory_at + entry * ENTRY_MAX;
                guest.queue.memory().write(at + 1, &bytes[flip % 2..=flip % 2]);
                guest.queue.memory().write(at + 28, &bytes[(flip + 1) % 2..=(flip + 1) % 2]);
            }
        }
        for _ in 0..16 {
            let response = guest.response();
            assert!(matches!(response.status, RSP_OKAY | RSP_ERROR));
        }
        rounds += 1;
    }
    assert!(rounds > 10);
    still_serves(&mut served);
}

#[test]
fn row_2_a_response_has_no_padding_to_leak_through() {
    let (_folder, served) = serve("");
    for abi in [Abi::X86_64, Abi::X86_32] {
        let mut guest = Guest::connect_with(&served.ring(), abi, 0);
        // The id lies, in the request, where the response has its padding.
        let entry = Entry::new(abi, OP_READ, 0xdead_beef_cafe_f00d).with_segments(0, &[]);
        assert_eq!(guest.status(&entry), RSP_ERROR);
        let mut response = [0; 16];
        guest.queue.memory().read(guest.queue.ring_at() + RING_HEADER, &mut response);
        assert_eq!(response[9], 0, "between operation and status");
        if abi == Abi::X86_64 {
            assert_eq!(response[12..], [0; 4], "behind the status");
        }
    }
}

#[test]
fn row_3_more_requests_than_the_ring_has() {
    let (_folder, mut served) = serve("");
    for forged in [33, 1000, u32::MAX, 1 << 31] {
        let mut honest = Guest::connect(&served.ring());
        let mut guest = Guest::connect(&served.ring());
        guest.queue.ring.forge_req_prod(forged);
        guest.queue.kick().unwrap();
        assert!(guest.is_hung_up(), "{forged}");
        assert_eq!(honest.write(0, &[0x22; 512]), RSP_OKAY);
    }
    served.wait_log("is beyond the ring");
    still_serves(&mut served);
}

#[test]
fn row_3_fewer_requests_than_there_were() {
    let (_folder, mut served) = serve_with("", "[[fault]]\ntype = 'stuck'\non = ['write']\n");
    let mut guest = Guest::connect(&served.ring());
    let entry = guest.entry(OP_WRITE).with_segments(1, &[page(0)]);
    for _ in 0..3 {
        guest.queue.ring.push(&entry);
    }
    guest.queue.publish().unwrap();
    wait_for(|| (served.debug_queue()["faults"]["stuck"] == 3).then_some(()));
    guest.queue.ring.forge_req_prod(2);
    guest.queue.kick().unwrap();
    assert!(guest.is_hung_up());
    served.wait_log("req_prod 2 is beyond the ring, req_cons is 3");
    let taken = served.debug_queue()["queue"]["submitted"].as_u64();
    assert!(taken < Some(10), "{taken:?}");
    still_serves(&mut served);
}

#[test]
fn a_place_is_free_when_the_last_request_of_who_left_has_ended() {
    let rest = "[frontend.local]\nsocket = '{s}/ring'\nmax_clients = 1\n[[fault]]\ntype = 'stuck'\non = ['write']\n";
    let (_folder, mut served) = serve_with("", rest);
    let mut guest = Guest::connect(&served.ring());
    let entry = guest.entry(OP_WRITE).with_sector(64).with_segments(1, &[page(0)]);
    guest.queue.ring.push(&entry);
    guest.queue.publish().unwrap();
    wait_for(|| (served.debug_queue()["faults"]["stuck"] == 1).then_some(()));
    drop(guest);
    let frontend = |served: &Served, name: &str| served.debug_queue()["frontends"][0][name].as_u64();
    wait_for(|| (frontend(&served, "orphans") == Some(1)).then_some(()));
    // The next client waits, and is not refused.
    let path = served.ring();
    let next = std::thread::spawn(move || Guest::connect(&path).read(0, 512));
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!((frontend(&served, "connections"), frontend(&served, "turned_away")), (Some(1), Some(0)));
    run(served.tap_ctl().args(["fault", "--release"]));
    assert_eq!(next.join().unwrap(), Ok(vec![0x11; 512]));
    assert_eq!((frontend(&served, "connections"), frontend(&served, "orphans")), (Some(2), Some(0)));
    still_serves(&mut served);
}

#[test]
fn descriptors_that_nobody_asked_for_are_not_kept() {
    let (_folder, mut served) = serve("");
    let mut honest = Guest::connect(&served.ring());
    let before = served.descriptors();
    let null = std::fs::File::open("/dev/null").unwrap();
    for count in [1, 129, 130, 253] {
        let socket = client::open_socket(&served.ring()).unwrap();
        let hello = Hello { magic: MAGIC, abi: 0, ring_page_order: 0, queues: 1, data_pages: 1 };
        fdpass::send(socket.as_fd(), hello.as_bytes(), &vec![null.as_fd(); count]).unwrap();
        drop(socket);
    }
    served.wait_descriptors(before);
    assert_eq!(honest.write(0, &[0x33; 4096]), RSP_OKAY);
    drop(honest);
    still_serves(&mut served);
}

#[test]
fn row_4_too_few_and_too_many_segments() {
    let (_folder, mut served) = serve("");
    let mut guest = Guest::connect(&served.ring());
    for operation in [OP_READ, OP_WRITE] {
        for count in [0, 12, 255] {
            let entry = guest.entry(operation).with_segments(count, &[page(0); 11]);
            assert_eq!(guest.status(&entry), RSP_ERROR, "operation {operation}, {count} segments");
        }
        let entry = guest.entry(operation).with_segments(11, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10].map(page));
        assert_eq!(guest.status(&entry), RSP_OKAY);
    }
    still_serves(&mut served);
}

#[test]
fn row_5_sectors_that_are_no_part_of_a_page_or_not_aligned() {
    let (_folder, mut served) = serve("");
    let mut guest = Guest::connect(&served.ring());
    let sectors = |guest: &mut Guest, first_sect, last_sect| {
        let entry = guest.entry(OP_READ).with_segments(1, &[Segment { gref: 0, first_sect, last_sect }]);
        guest.status(&entry)
    };
    for (first, last) in [(1, 0), (0, 8), (8, 8), (7, 255), (255, 255)] {
        assert_eq!(sectors(&mut guest, first, last), RSP_ERROR, "{first} to {last}");
    }
    assert_eq!(sectors(&mut guest, 3, 3), RSP_OKAY);
    still_serves(&mut served);
    let (_folder, served) = serve("sector_size = 4096");
    let mut guest = Guest::connect(&served.ring());
    for (first, last) in [(0, 0), (1, 7), (0, 6), (3, 3)] {
        assert_eq!(sectors(&mut guest, first, last), RSP_ERROR, "{first} to {last} with 4096-byte sectors");
    }
    assert_eq!(sectors(&mut guest, 0, 7), RSP_OKAY);
    // The place on the disk is in 512-byte sectors all the same, and aligned to the logical one.
    let entry = guest.entry(OP_READ).with_sector(8).with_segments(1, &[page(0)]);
    assert_eq!(guest.status(&entry), RSP_OKAY);
    let entry = guest.entry(OP_READ).with_sector(4).with_segments(1, &[page(0)]);
    assert_eq!(guest.status(&entry), RSP_ERROR);
}

#[test]
fn row_6_places_beyond_the_disk() {
    let (folder, mut served) = serve("");
    let mut guest = Guest::connect(&served.ring());
    let end = SIZE / 512;
    for sector in [end, end - 7, u64::MAX, u64::MAX - 7, u64::MAX / 512, 1 << 55, (1 << 55) - 8] {
        for operation in [OP_READ, OP_WRITE, OP_WRITE_BARRIER] {
            let entry = guest.entry(operation).with_sector(sector).with_segments(1, &[page(0)]);
            assert_eq!(guest.status(&entry), RSP_ERROR, "operation {operation} at {sector}");
        }
    }
    let entry = guest.entry(OP_READ).with_sector(end - 8).with_segments(1, &[page(0)]);
    assert_eq!(guest.status(&entry), RSP_OKAY);
    assert_eq!(std::fs::metadata(folder.path().join("disk.img")).unwrap().len(), SIZE, "it has not grown");
    still_serves(&mut served);
}

#[test]
fn row_7_a_read_only_disk_is_not_written() {
    let (folder, mut served) = serve("read_only = true");
    let mut guest = Guest::connect(&served.ring());
    assert!(guest.disk.read_only);
    for operation in [OP_WRITE, OP_WRITE_BARRIER] {
        let entry = guest.entry(operation).with_segments(1, &[page(0)]);
        assert_eq!(guest.status(&entry), RSP_ERROR);
    }
    let entry = guest.entry(OP_DISCARD).with_discard(0, 8);
    assert_eq!(guest.status(&entry), RSP_ERROR);
    let entry = guest.entry(OP_INDIRECT).with_indirect(OP_WRITE, 1, &[1]);
    guest.queue.memory().write(guest.queue.page_at(1), &page(0).to_bytes());
    assert_eq!(guest.status(&entry), RSP_ERROR);
    still_serves(&mut served);
    let image = std::fs::read(folder.path().join("disk.img")).unwrap();
    assert!(image.iter().all(|byte| *byte == 0x11));
}

#[test]
fn row_8_operations_that_there_are_not() {
    let (_folder, mut served) = serve("");
    let mut guest = Guest::connect(&served.ring());
    for operation in [4, 7, 8, 100, 255] {
        let entry = guest.entry(operation).with_segments(1, &[page(0)]);
        let response = guest.ask(&entry);
        assert_eq!((response.status, response.operation), (RSP_EOPNOTSUPP, operation));
    }
    for inner in [OP_INDIRECT, OP_DISCARD, OP_FLUSH_DISKCACHE, OP_WRITE_BARRIER, 200] {
        let entry = guest.entry(OP_INDIRECT).with_indirect(inner, 1, &[0]);
        let response = guest.ask(&entry);
        assert_eq!((response.status, response.operation), (RSP_ERROR, inner));
    }
    still_serves(&mut served);
}

#[test]
fn row_9_and_10_indirect_segments_and_pages_that_there_are_not() {
    let (_folder, mut served) = serve("");
    let mut guest = Guest::connect(&served.ring());
    let descriptors: Vec<u8> = (0..256).flat_map(|gref| page(gref).to_bytes()).collect();
    guest.queue.memory().write(guest.queue.page_at(500), &descriptors);
    let pages = [500, 500, 500, 500, 500, 500, 500, 500];
    for count in [0, 257, 512, 65535] {
        let entry = guest.entry(OP_INDIRECT).with_indirect(OP_READ, count, &pages);
        assert_eq!(guest.status(&entry), RSP_ERROR, "{count} segments");
    }
    let entry = guest.entry(OP_INDIRECT).with_indirect(OP_READ, 256, &pages);
    let response = guest.ask(&entry);
    assert_eq!((response.status, response.operation), (RSP_OKAY, OP_READ));
    let mut last = [0; 4096];
    guest.queue.memory().read(guest.queue.page_at(255), &mut last);
    assert_eq!(last, [0x11; 4096]);
    for gref in [512, 513, u32::MAX] {
        let entry = guest.entry(OP_INDIRECT).with_indirect(OP_READ, 1, &[gref]);
        assert_eq!(guest.status(&entry), RSP_ERROR, "indirect page {gref}");
        let entry = guest.entry(OP_READ).with_segments(2, &[page(0), page(gref)]);
        assert_eq!(guest.status(&entry), RSP_ERROR, "page {gref}");
        guest.queue.memory().write(guest.queue.page_at(499), &page(gref).to_bytes());
        let entry = guest.entry(OP_INDIRECT).with_indirect(OP_WRITE, 1, &[499]);
        assert_eq!(guest.status(&entry), RSP_ERROR, "page {gref} in an indirect page");
    }
    still_serves(&mut served);
}

#[test]
fn row_13_fast_connects_disconnects_and_wrong_hellos() {
    let (_folder, mut served) = serve("");
    let mut honest = Guest::connect(&served.ring());
    let before = served.descriptors();
    for round in 0..300 {
        let mut guest = Guest::connect(&served.ring());
        for _ in 0..round % 33 {
            let entry = guest.entry(OP_WRITE).with_sector(64).with_segments(1, &[page(0)]);
            guest.queue.ring.push(&entry);
        }
        guest.queue.publish().unwrap();
        // Gone with its requests in flight.
    }
    let refused = |options: &Options| match Client::connect(&served.ring(), options) {
        Err(Error::Refused { message, .. }) => message,
        other => panic!("{other:?}"),
    };
    let options = Options { abi: Abi::Native, ring_page_order: 0, queues: 1, data_pages: 16 };
    assert!(refused(&Options { ring_page_order: 5, ..options }).contains("limit 4"));
    assert!(refused(&Options { ring_page_order: u32::MAX, ..options }).contains("limit 4"));
    assert!(refused(&Options { queues: 0, ..options }).contains("from 1 to 4"));
    assert!(refused(&Options { queues: u32::MAX, ..options }).contains("from 1 to 4"));
    assert!(refused(&Options { data_pages: 0, ..options }).contains("from 1 to"));
    assert!(refused(&Options { data_pages: u32::MAX, queues: 4, ..options }).contains("from 1 to"));
    assert_eq!(honest.write(0, &[0x33; 4096]), RSP_OKAY);
    drop(honest);
    served.wait_descriptors(before - 3);
    let queue = served.debug_queue();
    assert_eq!((&queue["slots_used"], &queue["requests"]), (&0.into(), &serde_json::json!([])));
    still_serves(&mut served);
}

#[test]
fn clients_that_come_and_go_do_not_fill_the_log() {
    let (_folder, served) = serve("");
    let begin = std::time::Instant::now();
    for _ in 0..500 {
        drop(client::open_socket(&served.ring()).unwrap());
    }
    let came = |queue: &serde_json::Value, how: &str| queue["frontends"][0][how].as_u64();
    wait_for(|| {
        let queue = served.debug_queue();
        (came(&queue, "connections")? + came(&queue, "turned_away")? == 500).then_some(())
    });
    // Ten in each second that has begun.
    let most = 10 * (begin.elapsed().as_secs() as usize + 2);
    let lines = served.log().matches("ring client").count();
    assert!((1..=most).contains(&lines), "{lines} lines, and {most} at most");
}

#[test]
fn row_14_and_15_a_storm_of_doorbells_without_work() {
    let (_folder, mut served) = serve("");
    let mut honest = Guest::connect(&served.ring());
    let storm = Guest::connect(&served.ring());
    let idle = || {
        let clients = served.debug_queue()["frontends"][0]["clients"].clone();
        (clients[1]["queues"][0]["counters"]["kicks_idle"].as_u64().unwrap(), clients)
    };
    let (begin, over) = (std::time::Instant::now(), std::sync::atomic::AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                storm.queue.kick().unwrap();
            }
        });
        let mut done = 0;
        // A second, and on a busy machine, which hears fewer, longer.
        while begin.elapsed() < Duration::from_secs(1)
            || (idle().0 < 1000 && begin.elapsed() < Duration::from_secs(60))
        {
            assert_eq!(honest.write(done % 100 * 8, &[0x44; 512]), RSP_OKAY);
            done += 1;
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(done > 0, "the honest guest got nothing through");
    });
    let (idle, clients) = idle();
    assert!((1000..500_000).contains(&idle), "{clients}");
    // It is heard again.
    let mut storm = storm;
    assert_eq!(storm.read(SIZE / 512 - 1, 512), Ok(vec![0x11; 512]));
    still_serves(&mut served);
}

#[test]
fn row_16_barriers_and_flushes_without_data_and_storms_of_them() {
    let (_folder, mut served) = serve("");
    let mut guest = Guest::connect(&served.ring());
    for round in 0..20 {
        let mut sent = 0;
        while guest.queue.ring.room() > 0 {
            let operation = [OP_FLUSH_DISKCACHE, OP_WRITE_BARRIER, OP_WRITE][(sent + round) % 3];
            let segments = if operation == OP_WRITE || sent % 5 == 0 { 1 } else { 0 };
            let entry = guest.entry(operation).with_sector(8).with_segments(segments, &[page(0)]);
            guest.queue.ring.push(&entry);
            sent += 1;
        }
        guest.queue.publish().unwrap();
        for _ in 0..sent {
            assert_eq!(guest.response().status, RSP_OKAY);
        }
    }
    still_serves(&mut served);
}

#[test]
fn row_17_the_same_id_twice() {
    let (_folder, served) = serve("");
    let mut guest = Guest::connect(&served.ring());
    let entry = guest.entry(OP_READ).with_segments(1, &[page(0)]);
    for _ in 0..32 {
        guest.queue.ring.push(&entry);
    }
    guest.queue.publish().unwrap();
    for _ in 0..32 {
        let response = guest.response();
        assert_eq!((response.id, response.status), (entry.id(), RSP_OKAY));
    }
}

#[test]
fn row_18_discards_of_nothing_of_everything_and_secure_ones() {
    let (folder, mut served) = serve("sector_size = 4096");
    let mut guest = Guest::connect(&served.ring());
    let discard = |guest: &mut Guest, sector, flag, sectors| {
        let entry = guest.entry(OP_DISCARD).with_sector(sector).with_discard(flag, sectors);
        guest.status(&entry)
    };
    for (sector, sectors) in
        [(0, 0), (0, u64::MAX), (8, u64::MAX), (u64::MAX, 8), (0, SIZE / 512 + 8), (4, 8), (8, 4), (1 << 55, 1 << 55)]
    {
        assert_eq!(discard(&mut guest, sector, 0, sectors), RSP_ERROR, "{sectors} at {sector}");
    }
    assert_eq!(discard(&mut guest, 0, DISCARD_SECURE, 8), RSP_EOPNOTSUPP);
    let space =
        || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(folder.path().join("disk.img")).unwrap());
    let before = space();
    assert_eq!(discard(&mut guest, 0, 0, (4 << 20) / 512), RSP_OKAY);
    assert!(space() < before, "space was given back");
    assert_eq!(guest.read(0, 4096), Ok(vec![0; 4096]));
    still_serves(&mut served);
}

#[test]
fn row_19_a_failed_read_shows_nothing() {
    let (folder, mut served) = serve("");
    let path = folder.path().join("disk.img");
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let mut guest = Guest::connect(&served.ring());
    guest.queue.memory().write(guest.queue.page_at(0), &[0x77; 8192]);
    assert_eq!(guest.read(0, 8192), Err(RSP_ERROR), "the image lost its second half");
    let mut got = [0; 8192];
    guest.queue.memory().read(guest.queue.page_at(0), &mut got);
    let foreign = got[4096..].iter().find(|byte| !matches!(byte, 0 | 0x77));
    assert_eq!(foreign, None, "what was not read is zeros, or what the guest had there");
    served.wait_log("I/O error");
    // Everything else goes on.
    assert_eq!(guest.read(0, 4096), Ok(vec![0x11; 4096]));
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&[0x11; 4096], SIZE - 4096).unwrap();
    still_serves(&mut served);
}

#[test]
fn a_message_after_the_hello_and_half_a_hello_end_the_connection() {
    let (_folder, mut served) = serve("");
    let options = Options { abi: Abi::Native, ring_page_order: 0, queues: 1, data_pages: 16 };
    let client = Client::connect(&served.ring(), &options).unwrap();
    fdpass::send(AsFd::as_fd(&*client.socket), b"more", &[]).unwrap();
    served.wait_log("spoke after its hello");
    use nix::sys::socket::*;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
    let address = UnixAddr::new(&served.ring()).unwrap();
    connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &address).unwrap();
    std::fs::File::from(socket).write_all(b"TAPRING1half").unwrap();
    served.wait_log("a hello has 24 bytes");
    still_serves(&mut served);
}

#[test]
fn a_guest_that_always_has_more_does_not_take_every_slot() {
    let folder = folder();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![0x11; SIZE as usize]).unwrap();
    // Keys without a table come first.
    let served = Served::start_with("requests = 2", &format!("path = '{}'", path.display()), LOCAL);
    let mut greedy = Guest::connect_with(&served.ring(), Abi::Native, 4);
    let mut honest = Guest::connect(&served.ring());
    let entry = greedy.entry(OP_READ).with_sector(8).with_segments(1, &[page(0)]);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                while greedy.queue.ring.room() > 0 {
                    greedy.queue.ring.push(&entry);
                }
                greedy.queue.publish().unwrap();
                while greedy.queue.ring.pop().is_some() {}
            }
        });
        let answers: Vec<_> = (0..100).map(|_| honest.read(0, 512)).collect();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(answers.iter().all(|answer| *answer == Ok(vec![0x11; 512])));
    });
    let greed = &served.debug_queue()["frontends"][0]["clients"][0]["queues"][0]["counters"]["requests"];
    assert!(greed.as_u64().unwrap() < 100 * 500, "{greed} requests of the greedy guest for 100 of the honest one");
}

#[test]
fn a_client_that_sends_its_own_end_does_not_keep_its_place() {
    let (_folder, mut served) = serve("");
    let socket = client::open_socket(&served.ring()).unwrap();
    let hello = Hello { magic: MAGIC, abi: 0, ring_page_order: 0, queues: 1, data_pages: 1 };
    // As long as the second is not received, the end that is in it is open, whoever has closed it.
    for _ in 0..2 {
        fdpass::send(socket.as_fd(), hello.as_bytes(), &[socket.as_fd()]).unwrap();
    }
    drop(socket);
    wait_for(|| {
        let seen = &served.debug_queue()["frontends"][0];
        (seen["connections"] == 1 && seen["clients"].as_array().unwrap().is_empty()).then_some(())
    });
    still_serves(&mut served);
}
