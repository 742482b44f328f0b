//! Guests that break the rules under a real Xen: frontends in dom0 with real grants, event channels and XenStore nodes.
//! Each gets the answer that it must get, the process lives, and an honest guest on another disk notices nothing.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::common::PATIENCE;
use crate::common::served::{Served, folder, run};
use crate::common::xen_guest::{Nodes, PAGES, XenGuest};
use tapdisk::frontend::blkif::wire::*;
use tapdisk::sys::evtchn::Evtchn;
use tapdisk::sys::gntalloc::Granted;
use tempfile::TempDir;

const SIZE: u64 = 8 << 20;

/// A disk of 8 MiB in a file of 0x11s, for device `device`, and its nodes.
struct Disk {
    served: Served,
    folder: TempDir,
    device: u32,
}

impl Disk {
    fn new(device: u32, image: &str) -> Disk {
        let folder = folder();
        let path = folder.path().join("disk.img");
        std::fs::write(&path, vec![0x11; SIZE as usize]).unwrap();
        let image = format!("path = '{}'\n{image}", path.display());
        let xen = format!("[frontend.xen]\ndomain = 0\ndevice = {device}\non_close = 'wait'\n");
        let served = Served::start(&image, &xen);
        Disk { served, folder, device }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    fn nodes(&self) -> Nodes {
        Nodes::make(self.device, "w")
    }

    fn guest(&self) -> XenGuest {
        XenGuest::connect(self.nodes(), Abi::X86_64, 0)
    }

    fn vbd(&self) -> serde_json::Value {
        self.served.debug_queue()["frontends"][0].clone()
    }

    fn until_unserved(&self) {
        let end = Instant::now() + PATIENCE;
        while self.vbd()["connected"] == true {
            assert!(Instant::now() < end, "the guest is still served");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A bad guest's disk, and an honest guest on another one.
struct World {
    disk: Disk,
    other: Disk,
    honest: XenGuest,
}

impl World {
    fn new(image: &str) -> World {
        let disk = Disk::new(51712, image);
        let other = Disk::new(51728, "");
        let honest = other.guest();
        World { disk, other, honest }
    }

    /// The process lives and serves, and so does the other one.
    fn still_serves(&mut self) {
        assert!(self.disk.served.alive() && self.other.served.alive(), "{}", self.disk.served.log());
        assert_eq!(self.honest.write(8, &[0x22; 4096]), RSP_OKAY);
        assert_eq!(self.honest.read(SIZE / 512 - 8, 4096), Ok(vec![0x11; 4096]));
    }

    /// The same disk serves an honest guest after the bad one.
    fn serves_anew(&mut self, bad: XenGuest) {
        bad.nodes.remove();
        drop(bad);
        let mut next = self.disk.guest();
        assert_eq!(next.read(SIZE / 512 - 8, 4096), Ok(vec![0x11; 4096]));
        next.close();
        self.still_serves();
    }
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn honest_guests_of_every_kind_are_served() {
    for (abi, order) in [(Abi::X86_64, 0), (Abi::X86_64, 4), (Abi::X86_32, 0), (Abi::X86_32, 2)] {
        let disk = Disk::new(51712, "");
        let mut guest = XenGuest::connect(disk.nodes(), abi, order);
        let data: Vec<u8> = (0..11 * 4096u32).map(|i| (i / 3) as u8).collect();
        assert_eq!(guest.write(24, &data), RSP_OKAY);
        assert_eq!(guest.write(1, &[0x33; 512]), RSP_OKAY);
        guest.data.memory().zero(0, PAGES * 4096);
        assert_eq!(guest.read(24, data.len()), Ok(data.clone()), "{abi:?}, order {order}");
        assert_eq!(guest.read(0, 1536), Ok([[0x11; 512], [0x33; 512], [0x11; 512]].concat()));
        let image = std::fs::read(disk.path()).unwrap();
        assert_eq!(image[24 * 512..24 * 512 + data.len()], data);
        // Indirect: 40 segments of two sectors each, whose pages are in reverse order.
        let segments: Vec<_> =
            (0..40).map(|i| Segment { first_sect: 2, last_sect: 3, ..guest.page(40 - i) }).collect();
        let bytes: Vec<u8> = segments.iter().flat_map(|segment| segment.to_bytes()).collect();
        guest.data.memory().write(50 * 4096, &bytes);
        let descriptors = guest.data.grefs[50];
        let entry = guest.entry(OP_INDIRECT).with_sector(24).with_indirect(OP_READ, 40, &[descriptors]);
        let response = guest.ask(&entry);
        assert_eq!((response.status, response.operation), (RSP_OKAY, OP_READ));
        for i in 0..40 {
            let mut got = [0; 1024];
            guest.data.memory().read((40 - i) * 4096 + 1024, &mut got);
            assert_eq!(got, data[i * 1024..(i + 1) * 1024], "segment {i}");
        }
        let stats = serde_json::from_str::<serde_json::Value>(&run(disk.served.tap_ctl().arg("stats"))).unwrap();
        let xenbus = &stats["xenbus"];
        assert_eq!((&xenbus["domid"], &xenbus["devid"]), (&0.into(), &51712.into()));
        assert_eq!((&xenbus["reqs"][0], &xenbus["errors"]["img"]), (&xenbus["reqs"][1], &0.into()));
        let vbd = disk.vbd();
        assert_eq!(vbd["queues"][0]["entries"], 32 << order);
        assert_eq!((&vbd["in_flight"], &vbd["payload_bytes"]), (&0.into(), &0.into()));
        guest.close();
        disk.until_unserved();
    }
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn row_1_a_request_that_changes_while_it_is_parsed() {
    let mut world = World::new("");
    let mut guest = world.disk.guest();
    let page = guest.page(0);
    let entry = guest.entry(OP_READ).with_sector(8).with_segments(1, &[page]);
    let end = Instant::now() + Duration::from_secs(3);
    let bytes = [11u8, 255];
    while Instant::now() < end {
        (0..16).for_each(|_| guest.ring.push(&entry));
        guest.send();
        for flip in 0..100 {
            for at in (0..32).map(|i| RING_HEADER + i * ENTRY_MAX) {
                guest.ring_pages.memory().write(at + 1, &bytes[flip % 2..=flip % 2]);
                guest.ring_pages.memory().write(at + 28, &bytes[(flip + 1) % 2..=(flip + 1) % 2]);
            }
        }
        for _ in 0..16 {
            assert!(matches!(guest.response().status, RSP_OKAY | RSP_ERROR));
        }
    }
    world.serves_anew(guest);
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn row_2_a_response_has_no_padding_to_leak_through() {
    for abi in [Abi::X86_64, Abi::X86_32] {
        let disk = Disk::new(51712, "");
        let mut guest = XenGuest::connect(disk.nodes(), abi, 0);
        let entry = Entry::new(abi, OP_READ, 0xdead_beef_cafe_f00d).with_segments(0, &[]);
        assert_eq!(guest.status(&entry), RSP_ERROR);
        let mut response = [0; 16];
        guest.ring_pages.memory().read(RING_HEADER, &mut response);
        assert_eq!(response[9], 0);
        assert!(abi == Abi::X86_32 || response[12..] == [0; 4]);
        guest.close();
    }
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn row_3_more_requests_than_the_ring_has() {
    let mut world = World::new("");
    for forged in [33, 1000, u32::MAX, 1 << 31] {
        let mut guest = world.disk.guest();
        guest.ring.forge_req_prod(forged);
        guest.kick();
        guest.nodes.until(5);
        assert!(guest.nodes.back("error").unwrap().contains("is beyond the ring"), "{forged}");
        world.disk.until_unserved();
        world.serves_anew(guest);
    }
    assert_eq!(world.disk.vbd()["counters"]["broken"], 4);
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn rows_4_5_6_8_17_what_no_request_may_say() {
    let mut world = World::new("");
    let mut guest = world.disk.guest();
    let page = guest.page(0);
    for count in [0, 12, 255] {
        let entry = guest.entry(OP_WRITE).with_segments(count, &[page; 11]);
        assert_eq!(guest.status(&entry), RSP_ERROR, "{count} segments");
    }
    for (first_sect, last_sect) in [(1, 0), (0, 8), (8, 8), (7, 255), (255, 255)] {
        let entry = guest.entry(OP_READ).with_segments(1, &[Segment { first_sect, last_sect, ..page }]);
        assert_eq!(guest.status(&entry), RSP_ERROR, "{first_sect} to {last_sect}");
    }
    for sector in [SIZE / 512, SIZE / 512 - 7, u64::MAX, u64::MAX / 512, 1 << 55] {
        for operation in [OP_READ, OP_WRITE, OP_WRITE_BARRIER] {
            let entry = guest.entry(operation).with_sector(sector).with_segments(1, &[page]);
            assert_eq!(guest.status(&entry), RSP_ERROR, "operation {operation} at {sector}");
        }
    }
    for operation in [4, 7, 255] {
        let entry = guest.entry(operation).with_segments(1, &[page]);
        let response = guest.ask(&entry);
        assert_eq!((response.status, response.operation), (RSP_EOPNOTSUPP, operation));
    }
    for inner in [OP_INDIRECT, OP_DISCARD, OP_FLUSH_DISKCACHE, 200] {
        let entry = guest.entry(OP_INDIRECT).with_indirect(inner, 1, &[page.gref]);
        assert_eq!(guest.ask(&entry).status, RSP_ERROR, "{inner}");
    }
    let entry = guest.entry(OP_READ).with_segments(1, &[page]);
    (0..32).for_each(|_| guest.ring.push(&entry));
    guest.send();
    for _ in 0..32 {
        let response = guest.response();
        assert_eq!((response.id, response.status), (entry.id(), RSP_OKAY));
    }
    assert_eq!(std::fs::metadata(world.disk.path()).unwrap().len(), SIZE, "it has not grown");
    world.serves_anew(guest);
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn row_7_a_read_only_disk_is_not_written() {
    let disk = Disk::new(51712, "");
    // The toolstack says so; the image could be written.
    let mut guest = XenGuest::connect(Nodes::make(51712, "r"), Abi::X86_64, 0);
    assert_eq!(guest.nodes.back("info").as_deref(), Some("4"));
    let page = guest.page(0);
    guest.data.memory().write(4096, &page.to_bytes());
    let descriptors = guest.data.grefs[1];
    let entries = [
        guest.entry(OP_WRITE).with_segments(1, &[page]),
        guest.entry(OP_WRITE_BARRIER).with_segments(1, &[page]),
        guest.entry(OP_DISCARD).with_discard(0, 8),
        guest.entry(OP_INDIRECT).with_indirect(OP_WRITE, 1, &[descriptors]),
    ];
    for entry in entries {
        assert_eq!(guest.status(&entry), RSP_ERROR, "{}", entry.operation());
    }
    assert_eq!(guest.read(0, 4096), Ok(vec![0x11; 4096]));
    guest.close();
    assert!(std::fs::read(disk.path()).unwrap().iter().all(|byte| *byte == 0x11));
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn rows_9_and_10_pages_that_are_not_the_guests_to_name() {
    let mut world = World::new("");
    let mut guest = world.disk.guest();
    let page = guest.page(0);
    let descriptors = guest.data.grefs[60];
    for count in [0, 257, 512, 65535] {
        let entry = guest.entry(OP_INDIRECT).with_indirect(OP_READ, count, &[descriptors; 8]);
        assert_eq!(guest.status(&entry), RSP_ERROR, "{count} segments");
    }
    // One that never was, one that another domain may use, one that is revoked, one that may only be read.
    let foreign = Granted::new(77, 1, true).unwrap();
    let readable = Granted::new(0, 1, false).unwrap();
    // The last one, or its number is used again.
    let revoked = Granted::new(0, 1, true).unwrap().grefs[0];
    let bad = [4_000_000, u32::MAX, foreign.grefs[0], revoked];
    for gref in bad {
        let wrong = Segment { gref, ..page };
        for operation in [OP_READ, OP_WRITE] {
            let entry = guest.entry(operation).with_sector(64).with_segments(2, &[page, wrong]);
            assert_eq!(guest.status(&entry), RSP_ERROR, "operation {operation}, grant {gref}");
        }
        let entry = guest.entry(OP_INDIRECT).with_indirect(OP_READ, 1, &[gref]);
        assert_eq!(guest.status(&entry), RSP_ERROR, "descriptors in grant {gref}");
        guest.data.memory().write(60 * 4096, &wrong.to_bytes());
        let entry = guest.entry(OP_INDIRECT).with_indirect(OP_WRITE, 1, &[descriptors]);
        assert_eq!(guest.status(&entry), RSP_ERROR, "grant {gref} in the descriptors");
        // One bad request among good ones of the same turn fails alone.
        let good = guest.entry(OP_READ).with_segments(1, &[page]);
        let wrong = guest.entry(OP_READ).with_segments(1, &[wrong]);
        [&good, &wrong, &good].into_iter().for_each(|entry| guest.ring.push(entry));
        guest.send();
        for _ in 0..3 {
            let response = guest.response();
            let expected = if response.id == wrong.id() { RSP_ERROR } else { RSP_OKAY };
            assert_eq!(response.status, expected);
        }
    }
    let only_readable = Segment { gref: readable.grefs[0], ..page };
    let entry = guest.entry(OP_READ).with_segments(1, &[only_readable]);
    assert_eq!(guest.status(&entry), RSP_ERROR, "data must not go where the guest did not allow it");
    let entry = guest.entry(OP_WRITE).with_sector(64).with_segments(1, &[only_readable]);
    assert_eq!(guest.status(&entry), RSP_OKAY);
    assert!(world.disk.vbd()["counters"]["copy_errors"].as_u64().unwrap() >= 20);
    world.serves_anew(guest);
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn row_9_descriptors_that_change_all_the_while() {
    let mut world = World::new("");
    let mut guest = world.disk.guest();
    let descriptors = guest.data.grefs[60];
    let good: Vec<u8> = (0..32).flat_map(|i| guest.page(i).to_bytes()).collect();
    let entry = guest.entry(OP_INDIRECT).with_indirect(OP_READ, 32, &[descriptors]);
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        guest.data.memory().write(60 * 4096, &good);
        (0..8).for_each(|_| guest.ring.push(&entry));
        guest.send();
        for _ in 0..200 {
            // Sectors, and grants of pages that the guest does not have.
            guest.data.memory().write(60 * 4096 + 4, &[255, 255, 0, 0, 255, 255, 255, 255]);
            guest.data.memory().write(60 * 4096, &good[..16]);
        }
        for _ in 0..8 {
            assert!(matches!(guest.response().status, RSP_OKAY | RSP_ERROR));
        }
    }
    world.serves_anew(guest);
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn row_11_many_different_grants_leave_nothing_mapped() {
    let mut world = World::new("");
    let mut guest = world.disk.guest();
    let mapped = || {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", world.disk.served.pid())).unwrap();
        maps.lines().filter(|line| line.contains("gntdev")).count()
    };
    let (before, fds) = (mapped(), world.disk.served.descriptors());
    assert_eq!(before, 1, "the ring");
    for _ in 0..60 {
        let pages = Granted::new(0, 100, true).unwrap();
        for grefs in pages.grefs.chunks(10) {
            let segments: Vec<_> =
                grefs.iter().map(|gref| Segment { gref: *gref, first_sect: 0, last_sect: 7 }).collect();
            let entry = guest.entry(OP_READ).with_segments(10, &segments);
            assert_eq!(guest.status(&entry), RSP_OKAY);
        }
    }
    world.disk.served.wait_descriptors(fds);
    assert_eq!(mapped(), before);
    world.serves_anew(guest);
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn row_12_rings_that_are_not_there() {
    let mut world = World::new("");
    let foreign = Granted::new(77, 1, true).unwrap();
    for (node, value, reason) in [
        ("ring-ref", "4000000".to_owned(), "cannot map the ring"),
        ("ring-ref", foreign.grefs[0].to_string(), "cannot map the ring"),
        ("event-channel", "3999".to_owned(), "cannot bind event channel 3999"),
        ("ring-page-order", "30".to_owned(), "ring-page-order"),
    ] {
        let nodes = world.disk.nodes();
        nodes.until(2);
        let page = Granted::new(0, 1, true).unwrap();
        let port = Evtchn::open().unwrap();
        let number = port.bind_unbound_port(0).unwrap();
        nodes.set_front("ring-ref", &page.grefs[0].to_string());
        nodes.set_front("event-channel", &number.to_string());
        nodes.set_front(node, &value);
        nodes.set_front("state", "3");
        nodes.until(5);
        let error = nodes.back("error").unwrap();
        assert!(error.contains(reason), "{node} = {value}: {error}");
        nodes.remove();
    }
    let guest = world.disk.guest();
    world.serves_anew(guest);
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn row_13_fast_connects_and_disconnects() {
    let mut world = World::new("");
    world.disk.guest().close();
    let fds = world.disk.served.descriptors();
    for round in 0..40 {
        let mut guest = match round % 4 {
            // Gone before it was connected.
            0 => XenGuest::publish(world.disk.nodes(), Abi::X86_64, 0),
            _ => world.disk.guest(),
        };
        let page = guest.page(0);
        for _ in 0..round % 33 {
            let entry = guest.entry(OP_WRITE).with_sector(64).with_segments(1, &[page]);
            guest.ring.push(&entry);
        }
        guest.send();
        guest.nodes.remove();
        // Its pages go with its requests in flight.
    }
    let guest = world.disk.guest();
    guest.close();
    world.disk.until_unserved();
    world.disk.served.wait_descriptors(fds);
    let vbd = world.disk.vbd();
    assert_eq!((&vbd["in_flight"], &vbd["payload_bytes"]), (&0.into(), &0.into()));
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", world.disk.served.pid())).unwrap();
    assert!(!maps.contains("gntdev"), "{maps}");
    world.still_serves();
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn rows_14_and_15_storms_of_events_and_of_writes_to_xenstore() {
    let mut world = World::new("");
    let mut guest = world.disk.guest();
    for i in 0..30_000 {
        guest.kick();
        if i % 10 == 0 {
            guest.nodes.set_front("state", "4");
        }
        if i % 3000 == 0 {
            world.still_serves();
        }
    }
    // It is heard all the same.
    assert_eq!(guest.read(SIZE / 512 - 1, 512), Ok(vec![0x11; 512]));
    let idle = world.disk.vbd()["queues"][0]["counters"]["kicks_idle"].as_u64().unwrap();
    assert!((1..=30_000).contains(&idle), "{idle} events without a request");
    world.serves_anew(guest);
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn row_16_barriers_and_flushes_without_data_and_storms_of_them() {
    let mut world = World::new("");
    let mut guest = world.disk.guest();
    let page = guest.page(0);
    for round in 0..8 {
        let mut sent = 0;
        while guest.ring.room() > 0 {
            let operation = [OP_FLUSH_DISKCACHE, OP_WRITE_BARRIER, OP_WRITE][(sent + round) % 3];
            let segments = u8::from(operation == OP_WRITE || sent % 5 == 0);
            let entry = guest.entry(operation).with_sector(8).with_segments(segments, &[page]);
            guest.ring.push(&entry);
            sent += 1;
        }
        guest.send();
        for _ in 0..sent {
            assert_eq!(guest.response().status, RSP_OKAY);
        }
    }
    world.serves_anew(guest);
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn row_18_discards_of_nothing_of_everything_and_secure_ones() {
    let mut world = World::new("sector_size = 4096");
    let mut guest = world.disk.guest();
    for (sector, sectors) in
        [(0, 0), (0, u64::MAX), (u64::MAX, 8), (0, SIZE / 512 + 8), (4, 8), (8, 4), (1 << 55, 1 << 55)]
    {
        let entry = guest.entry(OP_DISCARD).with_sector(sector).with_discard(0, sectors);
        assert_eq!(guest.status(&entry), RSP_ERROR, "{sectors} at {sector}");
    }
    let entry = guest.entry(OP_DISCARD).with_discard(DISCARD_SECURE, 8);
    assert_eq!(guest.status(&entry), RSP_EOPNOTSUPP);
    let entry = guest.entry(OP_DISCARD).with_discard(0, 1024);
    assert_eq!(guest.status(&entry), RSP_OKAY);
    assert_eq!(guest.read(0, 4096), Ok(vec![0; 4096]));
    world.serves_anew(guest);
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn row_19_a_failed_read_shows_nothing() {
    let mut world = World::new("");
    let mut guest = world.disk.guest();
    // Payload memory has seen other data before.
    assert_eq!(guest.write(0, &[0x99; 8192]), RSP_OKAY);
    let file = std::fs::OpenOptions::new().write(true).open(world.disk.path()).unwrap();
    file.set_len(4096).unwrap();
    guest.data.memory().write(0, &[0x77; 8192]);
    assert_eq!(guest.read(0, 8192), Err(RSP_ERROR), "the image lost its second half");
    let mut got = [0; 8192];
    guest.data.memory().read(0, &mut got);
    assert!(got.iter().all(|byte| *byte == 0x77), "nothing of a failed read reaches the guest");
    file.set_len(SIZE).unwrap();
    file.write_all_at(&[0x11; 4096], SIZE - 4096).unwrap();
    world.serves_anew(guest);
}
