//! The XenStore's client, with Xen's own xenstored, over its socket; over the kernel's device in [`super::in_dom0`].

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::rc::Rc;

use crate::common::xenstored::{Client, Xenstored};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use tapdisk::xenstore::wire::{Kind, encode};
use tapdisk::xenstore::{Store, Tx};

/// What works over the socket and over the device alike. Both clients are of one xenstored; `root` is a node.
pub(super) mod alike {
    use super::*;

    pub(in crate::xen) fn all(first: &Client, second: &Client, root: &str) {
        nodes(first, root);
        errors(first, root);
        pipeline(first, root);
        transactions(first, second, root);
        watches(first, second, root);
    }

    fn nodes(client: &Client, root: &str) {
        let at = |name: &str| format!("{root}/nodes/{name}");
        client.write(&at("a/b"), "value").unwrap();
        assert_eq!(client.read(&at("a/b")).unwrap(), "value");
        assert_eq!(client.read(&at("a")).unwrap(), "");
        client.mkdir(&at("c")).unwrap();
        client.mkdir(&at("a")).unwrap();
        let mut names = client.directory(&at("")[..at("").len() - 1]).unwrap();
        names.sort();
        assert_eq!(names, ["a", "c"]);
        assert!(client.directory(&at("c")).unwrap().is_empty());
        let bytes: Vec<u8> = (0..=255).collect();
        client.wait(client.store.write(Tx::NONE, &at("c"), &bytes)).unwrap();
        assert_eq!(client.wait(client.store.read(Tx::NONE, &at("c"))).unwrap(), bytes);
        client.set_permissions(&at("a"), &["n0", "r5", "b7"]).unwrap();
        assert_eq!(client.permissions(&at("a")).unwrap(), ["n0", "r5", "b7"]);
        client.remove(&at("a")).unwrap();
        assert_eq!(client.read(&at("a/b")), Err(Errno::ENOENT));
        // Gone already, but its parent is there.
        client.remove(&at("a")).unwrap();
    }

    fn errors(client: &Client, root: &str) {
        let at = |name: &str| format!("{root}/errors/{name}");
        client.write(&at("there"), "").unwrap();
        assert_eq!(client.read(&at("missing")), Err(Errno::ENOENT));
        assert_eq!(client.directory(&at("missing")), Err(Errno::ENOENT));
        assert_eq!(client.permissions(&at("missing")), Err(Errno::ENOENT));
        assert_eq!(client.set_permissions(&at("missing"), &["n0"]), Err(Errno::ENOENT));
        assert_eq!(client.remove(&at("missing/below")), Err(Errno::ENOENT));
        assert_eq!(client.remove("/"), Err(Errno::EINVAL));
        let long = "x".repeat(3100);
        for path in ["/a b", "/a//b", "/a/", "/\u{e9}", &format!("/{long}")] {
            assert_eq!(client.write(path, ""), Err(Errno::EINVAL), "{path}");
        }
        for permission in ["x0", "n", "nobody", ""] {
            assert_eq!(client.set_permissions(&at("there"), &[permission]), Err(Errno::EINVAL), "{permission}");
        }
        assert_eq!(client.write(&at("there"), &"v".repeat(4096)), Err(Errno::E2BIG));
        // It has no quota for us, but a reply has an end.
        for name in 0..60 {
            client.mkdir(&at(&format!("many/{name}-{}", &long[..100]))).unwrap();
        }
        assert_eq!(client.directory(&at("many")), Err(Errno::E2BIG));
    }

    fn pipeline(client: &Client, root: &str) {
        let path = |i: usize| format!("{root}/pipeline/{i}");
        let store = &client.store;
        let writes: Vec<_> = (0..200).map(|i| store.write(Tx::NONE, &path(i), path(i).as_bytes())).collect();
        let reads: Vec<_> = (0..200).map(|i| store.read(Tx::NONE, &path(i))).collect();
        // The last ones first: each reply waits for whoever wants it.
        for (i, reply) in reads.into_iter().enumerate().rev() {
            assert_eq!(client.wait(reply).unwrap(), path(i).as_bytes());
        }
        for reply in writes {
            client.wait(reply).unwrap();
        }
    }

    fn transactions(first: &Client, second: &Client, root: &str) {
        let path = format!("{root}/transactions/n");
        first.write(&path, "0").unwrap();
        // Someone writes in the middle of the first try.
        let tries = first.run({
            let (path, other) = (path.clone(), Rc::clone(&second.store));
            async move |store: Rc<Store>| {
                let tries = std::cell::Cell::new(0);
                let body = async |tx| {
                    tries.set(tries.get() + 1);
                    let value = store.read(tx, &path).await?;
                    if tries.get() == 1 {
                        let reply = other.write(Tx::NONE, &path, b"7");
                        while other.unsent() {
                            other.progress().unwrap();
                        }
                        drop(reply);
                        // Another connection's request: that it was served shows here.
                        while store.read(Tx::NONE, &path).await? != b"7" {}
                    }
                    store.write(tx, &path, &[&value[..], b"+1"].concat()).await?;
                    Ok(Some(()))
                };
                store.transaction(body).await.unwrap();
                tries.get()
            }
        });
        assert_eq!((tries, &first.read(&path).unwrap()[..]), (2, "7+1"));
        for result in [Ok(None), Err(Errno::EPROTO)] {
            let ended = first.run({
                let path = path.clone();
                async move |store: Rc<Store>| {
                    let body = async |tx| {
                        store.write(tx, &path, b"never").await?;
                        store.write(tx, &format!("{path}/below"), b"never").await?;
                        assert_eq!(store.read(tx, &path).await?, b"never");
                        result
                    };
                    store.transaction::<()>(body).await
                }
            });
            assert_eq!(ended, result);
            assert_eq!(second.read(&path).unwrap(), "7+1");
            assert!(second.directory(&path).unwrap().is_empty());
        }
    }

    fn watches(first: &Client, second: &Client, root: &str) {
        let path = format!("{root}/watches/missing");
        assert_eq!(first.read(&path), Err(Errno::ENOENT));
        first.watch(&path, "missing").unwrap();
        assert_eq!(first.wait_fired(), ["missing"]);
        assert!(first.store.fired().is_empty());
        assert_eq!(first.watch("/a b", "bad"), Err(Errno::EINVAL));
        second.write(&format!("{path}/below"), "v").unwrap();
        assert_eq!(first.wait_fired(), ["missing"]);
        settle(first);
        second.remove(&path).unwrap();
        assert_eq!(first.wait_fired(), ["missing"]);
        first.unwatch(&path, "missing").unwrap();
        second.write(&path, "v").unwrap();
        settle(first);
        assert!(first.store.fired().is_empty());
    }
}

/// Waits until what xenstored had for the client is there, and forgets the events.
fn settle(client: &Client) {
    client.directory("/").unwrap();
    client.store.fired();
}

#[test]
fn over_the_socket() {
    let xenstored = Xenstored::start();
    let (first, second) = (xenstored.client(), xenstored.client());
    alike::all(&first, &second, "/test");
    // The device lets these two pass.
    assert_eq!(first.unwatch("/test", "none"), Err(Errno::ENOENT));
    first.watch("/test", "twice").unwrap();
    assert_eq!(first.watch("/test", "twice"), Err(Errno::EEXIST));
    let last = 4096 - "/test/max\0".len();
    first.write("/test/max", &"v".repeat(last)).unwrap();
    assert_eq!(first.read("/test/max").unwrap().len(), last);
}

#[test]
fn two_connections_count_together() {
    const EACH: usize = 200;
    let xenstored = Xenstored::start();
    xenstored.client().write("/n", "0").unwrap();
    let count = || {
        let client = xenstored.client();
        for _ in 0..EACH {
            client.run(async |store: Rc<Store>| {
                let body = async |tx| {
                    let value = String::from_utf8(store.read(tx, "/n").await?).unwrap();
                    let next = value.parse::<usize>().unwrap() + 1;
                    store.write(tx, "/n", next.to_string().as_bytes()).await?;
                    Ok(Some(()))
                };
                assert_eq!(store.transaction(body).await, Ok(Some(())));
            });
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(count);
        scope.spawn(count);
    });
    assert_eq!(xenstored.client().read("/n").unwrap(), (2 * EACH).to_string());
}

#[test]
fn a_storm_of_events_is_one_token_and_the_last_value_is_seen() {
    const WRITES: usize = 10_000;
    let xenstored = Xenstored::start();
    let (watcher, writer) = (xenstored.client(), xenstored.client());
    watcher.watch("/storm", "storm").unwrap();
    watcher.watch("/calm", "calm").unwrap();
    settle(&watcher);
    for round in 0..10 {
        let replies: Vec<_> = (0..WRITES / 10)
            .map(|i| writer.store.write(Tx::NONE, "/storm", (round * WRITES / 10 + i).to_string().as_bytes()))
            .collect();
        for reply in replies {
            writer.wait(reply).unwrap();
        }
        // It looks at some of them in between, but takes no tokens.
        watcher.store.progress().unwrap();
    }
    assert_eq!(watcher.read("/storm").unwrap(), (WRITES - 1).to_string());
    // The events came before the reply.
    assert_eq!(watcher.store.fired(), ["storm"]);
    watcher.directory("/").unwrap();
    assert!(watcher.store.fired().is_empty());
}

#[test]
fn when_xenstored_dies_all_that_waits_gets_connection_reset() {
    let mut xenstored = Xenstored::start();
    let client = xenstored.client();
    client.write("/a", "v").unwrap();
    xenstored.signal(Signal::SIGSTOP);
    let store = &client.store;
    let reads: Vec<_> = (0..50).map(|_| store.read(Tx::NONE, "/a")).collect();
    xenstored.kill();
    for reply in reads {
        assert_eq!(client.wait(reply), Err(Errno::ECONNRESET));
    }
    let body = async |store: Rc<Store>| store.transaction(async |_| Ok(Some(()))).await;
    assert_eq!(client.run(body), Err(Errno::ECONNRESET));
    assert_eq!(client.run(async |store: Rc<Store>| store.wait_fired().await), Err(Errno::ECONNRESET));
    assert!(store.progress().is_err());
}

#[test]
fn a_server_that_talks_nonsense_is_an_error() {
    let mut too_long = encode(Kind::READ, 1, 0, &[], b"");
    too_long[12..].copy_from_slice(&5000u32.to_ne_bytes());
    let unknown = encode(Kind::READ, 12345, 0, &[], b"value");
    for (nonsense, kind) in [
        (too_long, ErrorKind::InvalidData),
        (unknown, ErrorKind::InvalidData),
        (vec![0xff; 100], ErrorKind::InvalidData),
        (vec![2, 0, 0, 0, 1, 0, 0, 0], ErrorKind::UnexpectedEof),
        (Vec::new(), ErrorKind::UnexpectedEof),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn({
            let nonsense = nonsense.clone();
            move || {
                let (mut stream, _) = listener.accept().unwrap();
                // Closing with bytes unread would be a reset.
                stream.read_exact(&mut [0; 16 + 3]).unwrap();
                stream.write_all(&nonsense).unwrap();
            }
        });
        let client = Client::connect(&socket);
        assert_eq!(client.read("/a"), Err(Errno::ECONNRESET));
        let error = client.store.progress().unwrap_err();
        assert_eq!(error.kind(), kind, "{nonsense:?}: {error}");
        server.join().unwrap();
    }
}

#[test]
fn a_path_that_is_no_socket_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    for path in [file.as_path(), &folder.path().join("missing"), Path::new("/")] {
        let error = Store::connect(Some(path)).err().unwrap().to_string();
        assert!(error.contains(path.to_str().unwrap()) && error.contains("start xenstored"), "{error}");
    }
}
