//! Guests that tapback connects, with real grants and event channels.

use std::io::Read;
use std::time::Duration;

use crate::common::PATIENCE;
use crate::common::live::{pause, unpause};
use crate::common::served::{Served, run};
use crate::common::xen_guest::{Nodes, XenGuest};
use crate::xen::tapback::{answer, ask, disk, nobody, refused, send};
use nix::libc;
use tapdisk::control::proto::{Blkif, Message, Response, blkif, kind, text};
use tapdisk::frontend::blkif::wire::{Abi, OP_READ, OP_WRITE, RSP_OKAY};
use tapdisk::frontend::xen::tapback::GUESTS_MAX;
use tapdisk::sys::gntalloc::Granted;
use zerocopy::FromZeros;

/// A frontend that has published its ring, and what tapback reads of it.
fn frontend(device: u32, abi: Abi, order: u32) -> (XenGuest, Blkif) {
    let nodes = Nodes::make(device, "w");
    nodes.set_back("state", "2");
    let guest = XenGuest::publish(nodes, abi, order);
    let mut said = Blkif { domid: 0, devid: device, order, port: guest.port, ..Blkif::new_zeroed() };
    said.gref[..guest.ring_pages.grefs.len()].copy_from_slice(&guest.ring_pages.grefs);
    said.proto = if abi == Abi::X86_32 { blkif::X86_32 } else { blkif::X86_64 };
    said.pool[..4].copy_from_slice(b"pool");
    (guest, said)
}

/// Asks for what must be done.
fn done(served: &Served, kind: u16, guest: &Blkif) {
    let answer = ask(served, kind, guest);
    let response: Response = answer.member();
    assert_eq!((answer.kind, response.error), (kind + 1, 0), "{:?}", text(&response.message));
}

fn guests(served: &Served) -> Vec<serde_json::Value> {
    let frontends = served.debug_queue()["frontends"].as_array().unwrap().clone();
    let tapback = frontends.iter().find(|frontend| frontend["type"] == "tapback").unwrap();
    tapback["guests"].as_array().unwrap().clone()
}

/// Whether a guest's ring is mapped.
fn is_mapped(served: &Served) -> bool {
    std::fs::read_to_string(format!("/proc/{}/maps", served.pid())).unwrap().contains("gntdev")
}

/// Nothing of a guest is there any more. `before` are the descriptors that there were without one.
fn nothing_left(served: &Served, before: usize) {
    assert_eq!((guests(served), is_mapped(served)), (Vec::new(), false));
    served.wait_descriptors(before);
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn guests_come_and_go_and_leave_nothing() {
    let (served, _folder) = disk("", "");
    let before = served.descriptors();
    for (abi, order) in [(Abi::X86_64, 0), (Abi::X86_32, 0), (Abi::X86_64, 3)] {
        let (mut guest, said) = frontend(51712, abi, order);
        done(&served, kind::XENBLKIF_CONNECT, &said);
        let again = ask(&served, kind::XENBLKIF_CONNECT, &said);
        assert_eq!(refused(&again, "device 51712 of domain 0 is connected already"), libc::EALREADY);
        let data: Vec<u8> = (0..11 * 4096u32).map(|i| (i / 3) as u8).collect();
        assert_eq!(guest.write(24, &data), RSP_OKAY);
        assert_eq!(guest.read(24, data.len()), Ok(data), "{abi:?}, order {order}");
        let stats: serde_json::Value = serde_json::from_str(&run(served.tap_ctl().arg("stats"))).unwrap();
        let xenbus = &stats["xenbus"];
        let expected = [0.into(), 51712.into(), "pool".into(), serde_json::json!([2, 2])];
        assert_eq!(["domid", "devid", "pool", "reqs"].map(|key| xenbus[key].clone()), expected, "{xenbus}");
        let parts = stats["memory"]["parts"].as_array().unwrap();
        let buffers = parts.iter().find(|part| part["what"] == "buffers of a Xen guest").unwrap();
        assert!(order > 0 || buffers["bytes"].as_u64().unwrap() < 4 << 20, "{buffers}");
        assert_eq!(guests(&served)[0]["queues"][0]["entries"], 32 << order);
        done(&served, kind::XENBLKIF_DISCONNECT, &said);
        let again = ask(&served, kind::XENBLKIF_DISCONNECT, &said);
        assert_eq!(refused(&again, "device 51712 of domain 0 is not connected"), libc::ENODEV);
        nothing_left(&served, before);
        guest.nodes.remove();
    }
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn several_guests_have_the_same_disk() {
    let (served, _folder) = disk("", "");
    let (mut one, one_said) = frontend(51712, Abi::X86_64, 0);
    let (mut two, two_said) = frontend(51728, Abi::X86_32, 1);
    done(&served, kind::XENBLKIF_CONNECT, &one_said);
    done(&served, kind::XENBLKIF_CONNECT, &two_said);
    for i in 0..200 {
        assert_eq!(one.write(i, &[i as u8; 512]), RSP_OKAY);
        assert_eq!(two.read(i, 512), Ok(vec![i as u8; 512]));
    }
    done(&served, kind::XENBLKIF_DISCONNECT, &one_said);
    assert_eq!(two.read(199, 512), Ok(vec![199; 512]));
    // As many as there is room for, on one ring.
    let many = |device| Blkif { devid: device, ..one_said };
    for device in 1..GUESTS_MAX as u32 {
        let port = one.another_port();
        done(&served, kind::XENBLKIF_CONNECT, &Blkif { port, ..many(device) });
    }
    let one_more = Blkif { port: one.another_port(), ..many(99) };
    let answer = ask(&served, kind::XENBLKIF_CONNECT, &one_more);
    assert_eq!(refused(&answer, "it has 16 guests, and can't have more"), libc::ENOSPC);
    assert_eq!(guests(&served).len(), GUESTS_MAX);
    (1..GUESTS_MAX as u32).for_each(|device| done(&served, kind::XENBLKIF_DISCONNECT, &many(device)));
    assert_eq!(two.read(198, 512), Ok(vec![198; 512]));
    one.nodes.remove();
    two.nodes.remove();
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn a_ring_that_is_not_there_is_refused_and_leaves_nothing() {
    let (served, _folder) = disk("", "");
    let (mut guest, said) = frontend(51712, Abi::X86_64, 0);
    let before = served.descriptors();
    let foreign = Granted::new(77, 1, true).unwrap();
    for gref in [4_000_000, u32::MAX, foreign.grefs[0]] {
        let wrong = Blkif { gref: [gref; 8], ..said };
        let errno = refused(&ask(&served, kind::XENBLKIF_CONNECT, &wrong), "cannot map the ring, grant references [");
        assert!(errno > 0 && errno != libc::EALREADY);
    }
    // The second page of two.
    let wrong = Blkif { gref: [said.gref[0], 4_000_000, 0, 0, 0, 0, 0, 0], order: 1, ..said };
    refused(&ask(&served, kind::XENBLKIF_CONNECT, &wrong), "cannot map the ring");
    let wrong = Blkif { port: 3999, ..said };
    refused(&ask(&served, kind::XENBLKIF_CONNECT, &wrong), "cannot bind event channel 3999");
    nothing_left(&served, before);
    done(&served, kind::XENBLKIF_CONNECT, &said);
    assert_eq!(guest.read(0, 512), Ok(vec![0x11; 512]));
    guest.nodes.remove();
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn disconnect_is_answered_when_the_last_request_is_finished_and_holds_nobody_up() {
    let (served, _folder) = disk("", "[[fault]]\ntype = 'stuck'\non = ['write']\n");
    let (mut guest, said) = frontend(51712, Abi::X86_64, 0);
    done(&served, kind::XENBLKIF_CONNECT, &said);
    let page = guest.page(0);
    let write = guest.entry(OP_WRITE).with_sector(8).with_segments(1, &[page]);
    guest.ring.push(&write);
    guest.send();
    while served.debug_queue()["faults"]["stuck"] != 1 {}
    let mut first = send(&served, &Message::new(kind::XENBLKIF_DISCONNECT, 0).with(&said));
    let second = send(&served, &Message::new(kind::XENBLKIF_DISCONNECT, 0).with(&said));
    while guests(&served)[0]["leaving"] == false {}
    // What comes now is not taken any more, and the ring's page is the guest's again.
    let read = guest.entry(OP_READ).with_sector(8).with_segments(1, &[page]);
    guest.ring.push(&read);
    guest.send();
    first.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    assert!(first.read(&mut [0]).is_err(), "it is answered too early");
    first.set_read_timeout(Some(PATIENCE)).unwrap();
    let queue = served.debug_queue();
    assert_eq!((&queue["slots_used"], guests(&served)[0]["leaving"].as_bool()), (&1.into(), Some(true)), "{queue}");
    assert!(!is_mapped(&served), "the ring is mapped");
    let connect = ask(&served, kind::XENBLKIF_CONNECT, &said);
    let words = "device 51712 of domain 0 was disconnected, and its requests are not finished";
    assert_eq!(refused(&connect, words), libc::EBUSY);
    run(served.tap_ctl().args(["fault", "--release", "--off"]));
    for socket in [first, second] {
        assert_eq!(answer(socket).kind, kind::XENBLKIF_DISCONNECT_RSP);
    }
    assert_eq!(guests(&served), Vec::<serde_json::Value>::new());
    // Both are asked for again by a ring that was not told of them.
    done(&served, kind::XENBLKIF_CONNECT, &said);
    let mut answered = [guest.response().id, guest.response().id];
    answered.sort_unstable();
    assert_eq!(answered, [write.id(), read.id()]);
    guest.nodes.remove();
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn a_guest_waits_while_the_disk_is_paused_and_is_let_go_when_it_closes() {
    let (mut served, _folder) = disk("", "");
    let (mut guest, said) = frontend(51712, Abi::X86_64, 0);
    pause(&served);
    // It may come while the disk is paused.
    done(&served, kind::XENBLKIF_CONNECT, &said);
    for _ in 0..3 {
        let page = guest.page(0);
        let read = guest.entry(OP_READ).with_sector(0).with_segments(1, &[page]);
        guest.ring.push(&read);
        guest.send();
        std::thread::sleep(Duration::from_millis(200));
        assert!(!guest.ring.ready(), "a paused disk answers");
        unpause(&served);
        assert_eq!((guest.response().id, guest.read(8, 512)), (read.id(), Ok(vec![0x11; 512])));
        pause(&served);
    }
    unpause(&served);
    run(served.tap_ctl().arg("exit"));
    assert_eq!(served.code(), Some(0));
    assert!(served.log().contains("guest disconnected"), "{}", served.log());
    guest.nodes.remove();
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn a_guest_that_breaks_the_rules_is_served_no_more_until_it_comes_anew() {
    let (served, _folder) = disk("", "");
    let (mut guest, said) = frontend(51712, Abi::X86_64, 0);
    done(&served, kind::XENBLKIF_CONNECT, &said);
    assert_eq!(guest.read(0, 512), Ok(vec![0x11; 512]));
    guest.ring.forge_req_prod(1000);
    guest.kick();
    served.wait_log("is beyond the ring");
    assert!(guests(&served)[0]["broken"].as_str().unwrap().contains("req_prod 1000"));
    assert!(!is_mapped(&served), "its ring is mapped");
    let again = ask(&served, kind::XENBLKIF_CONNECT, &said);
    assert_eq!(refused(&again, "connected already"), libc::EALREADY, "tapback has to disconnect it first");
    done(&served, kind::XENBLKIF_DISCONNECT, &said);
    guest.nodes.remove();
    let (mut guest, said) = frontend(51712, Abi::X86_64, 0);
    done(&served, kind::XENBLKIF_CONNECT, &said);
    assert_eq!(guest.read(0, 512), Ok(vec![0x11; 512]));
    guest.nodes.remove();
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn a_disk_with_a_guest_of_its_own_takes_no_other() {
    let rest = "[frontend.xen]\ndomain = 0\ndevice = 51712\non_close = 'wait'\n";
    let (served, _folder) = disk("", rest);
    let connect = ask(&served, kind::XENBLKIF_CONNECT, &nobody());
    assert_eq!(refused(&connect, "disk.img: its guest is that of [frontend.xen], and nobody else's"), libc::EBUSY);
    let disconnect = ask(&served, kind::XENBLKIF_DISCONNECT, &nobody());
    assert_eq!(refused(&disconnect, "device 51712 of domain 1 is not connected"), libc::ENODEV);
}

#[test]
#[ignore = "in a dom0: tests/xen/run in_dom0"]
fn polling_is_as_the_guest_is_to_have_it() {
    let (served, _folder) = disk("", "");
    let polling = || run(served.tap_ctl().arg("poll"));
    let (guest, said) = frontend(51712, Abi::X86_64, 0);
    let connect = |poll_duration, poll_idle_threshold| {
        done(&served, kind::XENBLKIF_CONNECT, &Blkif { poll_duration, poll_idle_threshold, ..said });
        done(&served, kind::XENBLKIF_DISCONNECT, &said);
        polling()
    };
    assert_eq!(connect(0, 0), "poll_us=0 poll_idle_percent=50\n", "0 is: as it was");
    assert_eq!(connect(1000, 30), "poll_us=1000 poll_idle_percent=30\n");
    assert_eq!(connect(0, 60), "poll_us=1000 poll_idle_percent=60\n");
    assert_eq!(connect(u32::MAX, 101), "poll_us=1000000 poll_idle_percent=100\n", "the most that there is");
    guest.nodes.remove();
}
