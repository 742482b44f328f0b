use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use super::wire::{Decoder, Message, encode};
use super::*;

/// A connection, and its other end.
fn pair() -> (Rc<Store>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    (Rc::new(Store { channel: ours.into(), state: RefCell::default() }), theirs)
}

/// What has been sent.
fn requests(theirs: &mut UnixStream) -> Vec<Message> {
    let mut decoder = Decoder::default();
    let mut bytes = [0; 4096];
    let mut found = Vec::new();
    while let Ok(count @ 1..) = theirs.read(&mut bytes) {
        decoder.push(&bytes[..count]);
        found.extend(std::iter::from_fn(|| decoder.pull().unwrap()));
    }
    found
}

fn answer(store: &Store, theirs: &mut UnixStream, kind: Kind, id: u32, payload: &[u8]) -> io::Result<()> {
    theirs.write_all(&encode(kind, id, 0, &[], payload)).unwrap();
    store.progress()
}

fn poll<T>(reply: Reply<T>) -> Option<Result<T, Errno>> {
    reply.take()
}

#[test]
fn replies_find_their_requests_in_any_order_and_dropped_ones_are_forgotten() {
    let (store, mut theirs) = pair();
    let first = store.read(Tx::NONE, "a");
    drop(store.read(Tx::NONE, "b"));
    let third = store.read(Tx(9), "c");
    let sent = requests(&mut theirs);
    assert_eq!(
        sent.iter().map(|message| (message.kind, message.tx)).collect::<Vec<_>>(),
        [(Kind::READ, 0), (Kind::READ, 0), (Kind::READ, 9)]
    );
    answer(&store, &mut theirs, Kind::READ, sent[2].id, b"C").unwrap();
    assert_eq!(third.take(), Some(Ok(b"C".to_vec())));
    assert_eq!(first.take(), None);
    answer(&store, &mut theirs, Kind::READ, sent[1].id, b"B").unwrap();
    answer(&store, &mut theirs, Kind::ERROR, sent[0].id, b"ENOENT\0").unwrap();
    assert_eq!(first.take(), Some(Err(Errno::ENOENT)));
    assert!(store.state.borrow().is_idle());
}

#[test]
fn what_can_not_be_sent_fails_at_once_and_alone() {
    let (store, mut theirs) = pair();
    let long = vec![b'x'; wire::PAYLOAD_MAX];
    assert_eq!(poll(store.read(Tx::NONE, "a\0b")), Some(Err(Errno::EINVAL)));
    assert_eq!(poll(store.watch("a", "b\0")), Some(Err(Errno::EINVAL)));
    assert_eq!(poll(store.set_permissions(Tx::NONE, "a", &["n0", "r\0"])), Some(Err(Errno::EINVAL)));
    assert_eq!(poll(store.write(Tx::NONE, "a", &long[1..])), Some(Err(Errno::E2BIG)));
    assert!(requests(&mut theirs).is_empty());
    let fits = store.write(Tx::NONE, "a", &long[2..]);
    let sent = requests(&mut theirs);
    assert_eq!(sent[0].payload.len(), wire::PAYLOAD_MAX);
    answer(&store, &mut theirs, Kind::WRITE, sent[0].id, b"OK\0").unwrap();
    assert_eq!(fits.take(), Some(Ok(())));
}

#[test]
fn what_the_socket_has_no_room_for_goes_later_and_in_order() {
    let (store, mut theirs) = pair();
    let value = [7; 4000];
    let replies: Vec<_> = (0..500).map(|i| store.write(Tx::NONE, &format!("n/{i}"), &value)).collect();
    assert!(store.unsent());
    let (mut decoder, mut bytes, mut found) = (Decoder::default(), [0; 1000], Vec::new());
    while found.len() < replies.len() {
        decoder.push(match theirs.read(&mut bytes) {
            Ok(count) => &bytes[..count],
            Err(_) => &[],
        });
        found.extend(std::iter::from_fn(|| decoder.pull().unwrap()));
        store.progress().unwrap();
    }
    assert!(!store.unsent());
    for (i, message) in found.iter().enumerate() {
        assert_eq!(message.payload, [format!("n/{i}\0").as_bytes(), &value].concat());
    }
}

#[test]
fn a_storm_of_events_leaves_each_token_once_and_only_ours() {
    let (store, mut theirs) = pair();
    drop([store.watch("a", "A"), store.watch("b", "B")]);
    for round in 0..1000 {
        let event = |texts: &[&str]| encode(Kind::WATCH_EVENT, round, 0, texts, b"");
        let foreign = format!("foreign-{round}");
        let events = [["b/x", "B"], ["a", "A"], ["c", &foreign], ["b", "B"]].map(|texts| event(&texts)).concat();
        theirs.write_all(&events).unwrap();
        store.progress().unwrap();
        assert_eq!(store.state.borrow().fired, ["B", "A"]);
    }
    assert_eq!(
        Task::new({
            let store = Rc::clone(&store);
            async move { store.wait_fired().await }
        })
        .poll(),
        Some(Ok(()))
    );
    assert_eq!(store.fired(), ["B", "A"]);
    assert!(store.fired().is_empty());
}

#[test]
fn after_unwatch_a_token_is_silent_but_for_another_watch_with_it() {
    let (store, mut theirs) = pair();
    let last_id = |theirs: &mut UnixStream| requests(theirs).last().unwrap().id;
    let fire = |theirs: &mut UnixStream| answer(&store, theirs, Kind::WATCH_EVENT, 0, b"p\0T\0").unwrap();
    drop([store.watch("a", "T"), store.watch("b", "T")]);
    let refused = store.watch("a", "T");
    let id = last_id(&mut theirs);
    answer(&store, &mut theirs, Kind::ERROR, id, b"EEXIST\0").unwrap();
    assert_eq!(refused.take(), Some(Err(Errno::EEXIST)));
    for (path, expected) in [("a", 1), ("b", 0)] {
        fire(&mut theirs);
        drop(store.unwatch(path, "T"));
        let id = last_id(&mut theirs);
        answer(&store, &mut theirs, Kind::UNWATCH, id, b"OK\0").unwrap();
        assert_eq!(store.fired().len(), expected);
        fire(&mut theirs);
        assert_eq!(store.fired().len(), expected);
    }
}

#[test]
fn replies_to_watches_may_have_no_id_as_the_device_s_have() {
    let (store, mut theirs) = pair();
    let read = store.read(Tx::NONE, "a");
    let watches = [store.watch("a", "A"), store.watch("b", "B"), store.unwatch("a", "A")];
    answer(&store, &mut theirs, Kind::WATCH, 0, b"OK").unwrap();
    answer(&store, &mut theirs, Kind::UNWATCH, 0, b"OK").unwrap();
    assert_eq!(watches.map(|reply| reply.take().is_some()), [true, false, true]);
    assert_eq!(read.take(), None);
}

#[test]
fn lies_end_the_connection_and_all_that_waits_for_it() {
    let event = |payload: &[u8]| encode(Kind::WATCH_EVENT, 0, 0, &[], payload);
    let mut too_long = encode(Kind::READ, 1, 0, &[], b"");
    too_long[12..].copy_from_slice(&5000u32.to_ne_bytes());
    for lie in [
        encode(Kind::READ, 2, 0, &[], b"another id"),
        encode(Kind::READ, 0, 0, &[], b"no id"),
        encode(Kind::WATCH, 0, 0, &[], b"no watch"),
        encode(Kind::WRITE, 1, 0, &[], b"another type"),
        encode(Kind(99), 1, 0, &[], b"no type"),
        event(b""),
        event(b"path\0"),
        too_long,
    ] {
        let (store, mut theirs) = pair();
        let reply = store.read(Tx::NONE, "a");
        theirs.write_all(&lie).unwrap();
        for _ in 0..2 {
            assert_eq!(store.progress().unwrap_err().kind(), io::ErrorKind::InvalidData, "{lie:?}");
        }
        assert_eq!(reply.take(), Some(Err(Errno::ECONNRESET)));
        assert_eq!(poll(store.read(Tx::NONE, "a")), Some(Err(Errno::ECONNRESET)));
        let mut wait = Task::new(async move { store.wait_fired().await });
        assert_eq!(wait.poll(), Some(Err(Errno::ECONNRESET)));
    }
}

type Endless = Task<Result<Option<()>, Errno>>;

/// A task that is in a transaction for ever, its store, and the other end.
fn in_transaction() -> (Endless, Rc<Store>, UnixStream) {
    let (store, theirs) = pair();
    let mut task = Task::new({
        let store = Rc::clone(&store);
        async move { store.transaction(async |_| std::future::pending().await).await }
    });
    assert!(task.poll().is_none());
    (task, store, theirs)
}

#[test]
fn a_dropped_transaction_is_ended_whenever_it_is_dropped() {
    let ended = |theirs: &mut UnixStream| {
        let sent = requests(theirs);
        assert_eq!(sent.len(), 1);
        assert_eq!((sent[0].kind, sent[0].tx, &sent[0].payload[..]), (Kind::TRANSACTION_END, 42, &b"F\0"[..]));
    };
    for polls in [0, 1] {
        let (mut task, store, mut theirs) = in_transaction();
        let id = requests(&mut theirs)[0].id;
        answer(&store, &mut theirs, Kind::TRANSACTION_START, id, b"42\0").unwrap();
        for _ in 0..polls {
            assert!(task.poll().is_none());
        }
        drop(task);
        ended(&mut theirs);
    }
    let (task, store, mut theirs) = in_transaction();
    let id = requests(&mut theirs)[0].id;
    drop(task);
    assert!(requests(&mut theirs).is_empty());
    answer(&store, &mut theirs, Kind::TRANSACTION_START, id, b"42\0").unwrap();
    ended(&mut theirs);
}

#[test]
fn a_transaction_is_tried_a_hundred_times() {
    let (store, mut theirs) = pair();
    let mut task = Task::new({
        let store = Rc::clone(&store);
        async move { store.transaction(async |tx| Ok(Some(tx))).await }
    });
    let mut starts = 0;
    let result = loop {
        if let Some(result) = task.poll() {
            break result;
        }
        for request in requests(&mut theirs) {
            let (kind, payload) = match request.kind {
                Kind::TRANSACTION_START => (request.kind, &b"5\0"[..]),
                _ => (Kind::ERROR, &b"EAGAIN\0"[..]),
            };
            starts += u32::from(request.kind == Kind::TRANSACTION_START);
            answer(&store, &mut theirs, kind, request.id, payload).unwrap();
        }
    };
    assert_eq!((result, starts), (Err(Errno::EAGAIN), TRIES));
    assert!(requests(&mut theirs).is_empty());
}

#[test]
fn transactions_without_a_number_are_refused() {
    for payload in [&b""[..], b"\0", b"0\0", b"x\0", b"-1\0", b"4294967296\0", b"\xff\0"] {
        let (mut task, store, mut theirs) = in_transaction();
        let id = requests(&mut theirs)[0].id;
        answer(&store, &mut theirs, Kind::TRANSACTION_START, id, payload).unwrap();
        assert_eq!(task.poll(), Some(Err(Errno::EIO)));
    }
}

#[test]
fn a_task_gives_its_result_once() {
    let mut task = Task::new(async { 7 });
    assert_eq!((task.poll(), task.poll()), (Some(7), None));
}

#[test]
fn the_error_of_connecting_names_what_was_tried_and_the_remedy() {
    let error = Store::connect(Some("/nonexistent/socket".as_ref())).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    let text = error.to_string();
    assert!(text.contains("/nonexistent/socket") && text.contains("XENSTORED_PATH"), "{text}");
}
