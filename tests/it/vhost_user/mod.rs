//! virtio-blk over vhost-user, with libblkio as the client.

mod client;
mod sys;

use std::fs::File;
use std::os::unix::fs::FileExt;

use self::client::{Client, DATA};
use crate::common::served::{Served, folder, run};
use blkio::ReqFlags;

const MIB: usize = 1 << 20;

fn serve(image: &str, rest: &str) -> Served {
    Served::start(image, &format!("[frontend.vhost_user]\nsocket = '{{s}}/vhost'\n{rest}"))
}

/// Bytes that tell where they were written.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64 / 8).flat_map(|word| (seed << 32 | word).to_le_bytes()).collect()
}

#[test]
fn what_is_written_is_read_and_is_in_the_image() {
    let folder = folder();
    let path = folder.path().join("disk.img");
    let served = serve(&format!("path = '{}'\ncreate = '64 MiB'", path.display()), "");
    let mut client = Client::connect(&served, 1);
    assert_eq!(client.disk.get_u64("capacity").unwrap(), 64 << 20);
    for (i, (offset, len)) in
        [(0, 512), (4096, 4096), (1 << 20, MIB), ((64 << 20) - 512, 512)].into_iter().enumerate()
    {
        let data = pattern(i as u64, len);
        client.fill(0, &data);
        assert_eq!(client.write(offset, 0, len, ReqFlags::empty()), 0);
        assert_eq!(client.read(offset, 2 * MIB, len), 0);
        assert_eq!(client.bytes(2 * MIB, len), data);
        let mut on_disk = vec![0; len];
        File::open(&path).unwrap().read_exact_at(&mut on_disk, offset).unwrap();
        assert_eq!(on_disk, data);
    }
    assert_eq!(client.done(0, |queue, _| queue.flush(0, ReqFlags::empty())), 0);
    drop(client);
    // The next one is let in.
    assert_eq!(Client::connect(&served, 1).read(4096, 0, 512), 0);
    let (code, log) = served.stop();
    assert!(code == Some(0) && !log.contains(" WARN a v"), "{log}");
}

#[test]
fn data_that_is_not_aligned_goes_to_a_direct_image_all_the_same() {
    let folder = folder();
    let served =
        serve(&format!("path = '{}'\ncreate = '64 MiB'\ndirect = 'on'", folder.path().join("d").display()), "");
    let mut client = Client::connect(&served, 1);
    let data = pattern(7, 64 << 10);
    client.fill(4097, &data);
    assert_eq!(client.write(8192, 4097, data.len(), ReqFlags::empty()), 0);
    assert_eq!(client.read(8192, MIB + 3, data.len()), 0);
    assert_eq!(client.bytes(MIB + 3, data.len()), data);
    assert_eq!((client.bytes(MIB, 3), client.bytes(MIB + 3 + data.len(), 8)), (vec![0; 3], vec![0; 8]));
    // More of them at once than there is room for.
    for i in 0..100 {
        let at = client.place_of(i * 8192 + 1);
        client.queues[0].write(i as u64 * 8192, at as *const u8, 4096, i, ReqFlags::empty());
    }
    let mut ended = client.ended(0, 100);
    ended.sort_unstable();
    assert_eq!(ended, (0..100).map(|i| (i, 0)).collect::<Vec<_>>());
    let bounced = &served.debug_queue()["frontends"][0]["clients"][0]["bounced"];
    assert_eq!(bounced, 102);
}

#[test]
fn zeroes_and_discards_reach_the_image() {
    let folder = folder();
    let path = folder.path().join("disk.img");
    let served = serve(&format!("path = '{}'\ncreate = '64 MiB'", path.display()), "");
    let mut client = Client::connect(&served, 1);
    client.fill(0, &pattern(1, DATA));
    assert_eq!(client.write(0, 0, DATA, ReqFlags::empty()), 0);
    assert_eq!(client.done(0, |queue, _| queue.write_zeroes(MIB as u64, MIB as u64, 0, ReqFlags::empty())), 0);
    assert_eq!(client.done(0, |queue, _| queue.write_zeroes(0, 4096, 0, ReqFlags::NO_UNMAP)), 0);
    assert_eq!(client.done(0, |queue, _| queue.discard(2 * MIB as u64, MIB as u64, 0, ReqFlags::empty())), 0);
    assert_eq!(client.read(0, 0, 3 * MIB), 0);
    assert!(client.bytes(0, 4096) == [0; 4096] && client.bytes(4096, 4096) == pattern(1, DATA)[4096..8192]);
    assert!(client.bytes(MIB, 2 * MIB).iter().all(|byte| *byte == 0));
    let counts = served.debug_queue();
    let completed = |op: &str| {
        let operations = counts["operations"].as_array().unwrap();
        operations
            .iter()
            .find(|operation| operation["op"] == op)
            .map(|operation| operation["completed"].clone())
            .unwrap()
    };
    assert_eq!((completed("write_zeroes"), completed("discard")), (2.into(), 1.into()));
}

#[test]
fn what_the_disk_refuses_is_an_error_and_nothing_else_is() {
    let folder = folder();
    let path = folder.path().join("disk.img");
    File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let served = serve(&format!("path = '{}'\nread_only = true\nsector_size = 4096", path.display()), "");
    let mut client = Client::connect_to(&served, 1, true);
    assert!(client.disk.get_bool("read-only").unwrap());
    assert_eq!(client.read(0, 0, 4096), 0);
    for (offset, len) in [(8 << 20, 4096), ((8 << 20) - 4096, 8192), (512, 4096), (0, 512)] {
        assert_eq!(client.read(offset, 0, len), -libc::EIO, "{offset} {len}");
    }
    assert_eq!(client.read(4096, 0, 4096), 0);
}

#[test]
fn several_queues_have_much_in_flight_each() {
    let served = serve("type = 'ram'\nsize = '64 MiB'", "max_queues = 4\n");
    let mut client = Client::connect(&served, 4);
    for round in 0..20 {
        for queue in 0..4 {
            for i in 0..64 {
                let (number, at) = (queue * 64 + i, client.place_of((queue * 64 + i) * 4096));
                client.fill(number * 4096, &pattern((round * 1000 + number) as u64, 4096));
                client.queues[queue].write(number as u64 * 4096, at as *const u8, 4096, i, ReqFlags::empty());
            }
        }
        for queue in 0..4 {
            assert!(client.ended(queue, 64).iter().all(|(_, result)| *result == 0));
        }
        assert_eq!(client.read(0, MIB, MIB), 0);
        for number in 0..256 {
            assert_eq!(client.bytes(MIB + number * 4096, 4096), pattern((round * 1000 + number) as u64, 4096));
        }
    }
    let queues = served.debug_queue()["frontends"][0]["clients"][0]["queues"].clone();
    for queue in queues.as_array().unwrap() {
        assert!(queue["counters"]["requests"].as_u64().unwrap() >= 1280, "{queues}");
        assert!(queue["in_flight"] == 0 && queue["broken"].is_null(), "{queues}");
    }
}

#[test]
fn a_vhd_under_it_is_paused_snapshotted_and_resized_live() {
    let folder = folder();
    let path = folder.path().join("disk.vhd");
    crate::common::vhd::good("create -n {} -s 64", &[&path]);
    let served = serve(&format!("type = 'vhd'\npath = '{}'", path.display()), "");
    let mut client = Client::connect(&served, 1);
    client.fill(0, &pattern(3, MIB));
    assert_eq!(client.write(0, 0, MIB, ReqFlags::empty()), 0);
    let disk = ["-p", &served.pid().to_string(), "-m", "0"].map(str::to_owned);
    let tap_ctl = |words: &[&str]| run(served.tap_ctl().args(words).args(&disk));
    tap_ctl(&["pause"]);
    let snapshot = folder.path().join("snapshot.vhd");
    crate::common::vhd::good("snapshot -n {} -p {}", &[&snapshot, &path]);
    let at = client.place_of(4096);
    client.queues[0].write(4096, at as *const u8, 4096, 5, ReqFlags::empty());
    client.ended(0, 0);
    tap_ctl(&["unpause", "-a", &format!("vhd:{}", snapshot.display())]);
    assert_eq!(client.ended(0, 1), [(5, 0)], "it has waited in the ring");
    assert_eq!(client.read(0, 2 * MIB, MIB), 0);
    assert_eq!(client.bytes(2 * MIB, MIB), pattern(3, MIB));
    tap_ctl(&["engine", "--name", "threads"]);
    assert_eq!(client.read(0, 2 * MIB, MIB), 0);
}

#[test]
fn a_second_front_end_is_turned_away() {
    let served = serve("type = 'ram'\nsize = '1 MiB'", "");
    let mut client = Client::connect(&served, 1);
    let mut second = blkio::Blkio::new("virtio-blk-vhost-user").unwrap();
    second.set_str("path", served.sockets().join("vhost").to_str().unwrap()).unwrap();
    assert!(second.connect().is_err());
    assert_eq!(client.read(0, 0, 512), 0);
    served.wait_log("turned away: the disk has one already");
}

/// What a front end says that QEMU would not: raw messages.
#[test]
fn messages_that_make_no_sense_are_refused_and_the_next_front_end_is_let_in() {
    use std::io::{Read, Write};
    let served = serve("type = 'ram'\nsize = '1 MiB'", "");
    let say = |messages: &[(u32, u32, &[u64])]| {
        let mut socket = std::os::unix::net::UnixStream::connect(served.sockets().join("vhost")).unwrap();
        for (request, flags, words) in messages {
            let header = [*request, *flags, words.len() as u32 * 8].map(u32::to_le_bytes).concat();
            let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            // It may have hung up at the one before.
            let _ = socket.write_all(&[header, body].concat());
        }
        let mut said = Vec::new();
        // Its end, or a reset where it has not read all.
        let _ = socket.read_to_end(&mut said);
        said
    };
    let with_replies = (16, 1, &[1 << 3][..]);
    let bad: [&[(u32, u32, &[u64])]; 12] = [
        &[(99, 1, &[])],
        &[(1, 0, &[])],
        &[(2, 1, &[1 << 34])],
        &[(16, 1, &[1 << 12])],
        &[(2, 1, &[])],
        &[(8, 1, &[3])],
        &[(8, 1, &[9 | 16 << 32])],
        &[(37, 1, &[0, 0, 4096, 0, 0])],
        &[(5, 1, &[2, 0, 4096, 0, 0])],
        &[(12, 1, &[0])],
        &[(38, 1, &[0, 0, 4096, 0, 0])],
        &[with_replies, (8, 1 | 8, &[3]), (99, 1, &[])],
    ];
    for (i, messages) in bad.into_iter().enumerate() {
        let said = say(messages);
        // Who wants to hear of it is told, and goes on until the next mistake.
        assert_eq!(said.len(), if i == 11 { 20 } else { 0 }, "{messages:?}");
        assert!(i != 11 || said[12..] == 1_u64.to_le_bytes());
    }
    // Half of one, and gone.
    let mut half = std::os::unix::net::UnixStream::connect(served.sockets().join("vhost")).unwrap();
    half.write_all(&[1, 0, 0, 0, 1]).unwrap();
    drop(half);
    served.wait_log("front end gone");
    assert_eq!(Client::connect(&served, 1).read(0, 0, 512), 0);
}

/// A balloon gives pages of the guest's memory back to the host; others come in their place when they are used again.
#[test]
fn pages_that_were_given_back_are_not_written_in_place_of_those_that_are_there_now() {
    for engine in ["aio", "io_uring", "threads"] {
        let folder = folder();
        let path = folder.path().join("disk.img");
        let rest = format!("[engine]\nname = '{engine}'\n");
        let served = serve(&format!("path = '{}'\ncreate = '8 MiB'", path.display()), &rest);
        let mut client = Client::connect(&served, 1);
        for round in 0..3 {
            let data = pattern(round, MIB);
            client.fill(0, &data);
            assert_eq!(client.write(0, 0, MIB, ReqFlags::empty()), 0);
            client.give_back();
            assert_eq!(client.bytes(0, MIB), vec![0; MIB]);
            assert_eq!(client.read(0, 0, MIB), 0);
            assert!(client.bytes(0, MIB) == data, "{engine}, {round}");
        }
    }
}
