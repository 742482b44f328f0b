//! Guests that tapback shakes hands with, by the messages that it sends: what is refused, and how. Rings with real grants
//! and event channels are in [`super::in_dom0`].

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use crate::common::PATIENCE;
use crate::common::guest::{Guest, page};
use crate::common::served::{Served, folder, run};
use nix::libc;
use tapdisk::control::client;
use tapdisk::control::proto::{Blkif, MESSAGE_SIZE, Message, Response, blkif, kind, text};
use tapdisk::frontend::blkif::wire::OP_WRITE;
use tapdisk::sys::gntdev;
use tempfile::TempDir;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const SIZE: u64 = 8 << 20;
const BOTH: &str = "[frontend.local]\nsocket = '{s}/ring'\n[frontend.nbd]\nsocket = '{s}/nbd'\n";

/// A disk of 8 MiB in a file of 0x11s.
pub(super) fn disk(image: &str, rest: &str) -> (Served, TempDir) {
    let folder = folder();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![0x11; SIZE as usize]).unwrap();
    (Served::start(&format!("path = '{}'\n{image}", path.display()), rest), folder)
}

/// Sends a message, and does not wait for the answer.
pub(super) fn send(served: &Served, request: &Message) -> UnixStream {
    let mut socket = UnixStream::connect(client::path(served.sockets(), served.pid())).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.write_all(request.as_bytes()).unwrap();
    socket
}

pub(super) fn answer(mut socket: UnixStream) -> Message {
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), MESSAGE_SIZE);
    Message::read_from_bytes(&bytes).unwrap()
}

pub(super) fn ask(served: &Served, kind: u16, guest: &Blkif) -> Message {
    answer(send(served, &Message::new(kind, 0).with(guest)))
}

/// The errno of a refusal, whose text must have `words`.
pub(super) fn refused(answer: &Message, words: &str) -> i32 {
    let response: Response = answer.member();
    let said = text(&response.message).unwrap();
    assert!(answer.kind == kind::ERROR && said.contains(words), "type {}: {said:?}, not {words:?}", answer.kind);
    response.error
}

/// What tapback says of a guest that does not exist.
pub(super) fn nobody() -> Blkif {
    Blkif { domid: 1, devid: 51712, gref: [8; 8], proto: blkif::X86_64, port: 5, ..Blkif::new_zeroed() }
}

#[test]
fn what_no_guest_can_have_is_refused_and_the_disk_lives_on() {
    let (mut served, _folder) = disk("", BOTH);
    let wrong = [
        (Blkif { order: 4, ..nobody() }, "disk.img: a ring of page order 4 has no room in the message; at most 3"),
        (Blkif { order: u32::MAX, ..nobody() }, "a ring of page order 4294967295 has no room"),
        (Blkif { proto: 0, ..nobody() }, "protocol 0 is not known; expected 1 (native), 2 (x86_32) or 3 (x86_64)"),
        (Blkif { proto: 4, ..nobody() }, "protocol 4 is not known"),
        (Blkif { pool: [b'p'; 256], ..nobody() }, "the pool's name has no end"),
        (Blkif { domid: 0x7ff0, ..nobody() }, "32752 is no domain's number; expected one below 32752"),
        (Blkif { domid: 1 << 16 | 1, ..nobody() }, "65537 is no domain's number"),
    ];
    for (guest, words) in wrong {
        assert_eq!(refused(&ask(&served, kind::XENBLKIF_CONNECT, &guest), words), libc::EINVAL, "{words}");
    }
    if !Path::new(gntdev::PATH).exists() {
        let words = "disk.img: /dev/xen/gntdev: No such file or directory (os error 2); is this a Xen domain with \
                     backends, and is xen-gntdev loaded?";
        assert_eq!(refused(&ask(&served, kind::XENBLKIF_CONNECT, &nobody()), words), libc::ENOENT);
    }
    // Nothing of a guest that was refused is left.
    let words = "device 51712 of domain 1 is not connected";
    assert_eq!(refused(&ask(&served, kind::XENBLKIF_DISCONNECT, &nobody()), words), libc::ENODEV);
    let other = answer(send(&served, &Message::new(kind::XENBLKIF_CONNECT, 1).with(&nobody())));
    assert_eq!(refused(&other, "this tapdisk has no disk with minor"), libc::ENODEV);
    let stats: serde_json::Value = serde_json::from_str(&run(served.tap_ctl().arg("stats"))).unwrap();
    assert!(stats.get("xenbus").is_none(), "{stats}");
    assert!(!stats.to_string().contains("Xen guest"), "a disk without guest has memory for one: {stats}");
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "read -P 0x11 0 4096", &served.nbd()]));
    assert_eq!(Guest::connect(&served.ring()).read(0, 4096), Ok(vec![0x11; 4096]));
    assert!(served.alive());
}

#[test]
fn disk_info_says_size_sector_and_whether_writes_are_refused() {
    for (image, sector_size, info) in [("", 512, 0), ("read_only = true", 512, 4), ("sector_size = 4096", 4096, 0)] {
        let control = format!("{BOTH}[control]\ndirectory = '{{s}}'\nminor = 258\n");
        let (served, _folder) = disk(image, &control);
        let answer = answer(send(&served, &Message::new(kind::DISK_INFO, 258)));
        let mut expected = vec![29, 0, 2, 1, 0, 0, 0, 0];
        expected.extend((SIZE / 512).to_ne_bytes());
        expected.extend(u32::to_ne_bytes(sector_size));
        expected.extend(u32::to_ne_bytes(info));
        expected.resize(MESSAGE_SIZE, 0);
        assert_eq!(answer.as_bytes(), expected, "{image}");
    }
    let (served, _folder) = disk("", BOTH);
    let other = answer(send(&served, &Message::new(kind::DISK_INFO, 7)));
    assert_eq!(refused(&other, "this tapdisk has no disk with minor"), libc::ENODEV);
}

#[test]
fn a_disk_that_is_being_closed_takes_no_guest() {
    let (served, _folder) = disk("", &format!("{BOTH}[[fault]]\ntype = 'stuck'\non = ['write']\n"));
    let mut local = Guest::connect(&served.ring());
    let entry = local.entry(OP_WRITE).with_sector(0).with_segments(1, &[page(0)]);
    local.queue.ring.push(&entry);
    local.queue.publish().unwrap();
    while served.debug_queue()["faults"]["stuck"] != 1 {}
    run(served.tap_ctl().arg("exit"));
    let connect = ask(&served, kind::XENBLKIF_CONNECT, &nobody());
    assert_eq!(refused(&connect, "disk.img: it is being closed"), libc::EBUSY);
    run(served.tap_ctl().args(["fault", "--release", "--off"]));
    assert_eq!(served.stop().0, Some(0));
}
