//! What a hostile tapdisk may answer, to tap-ctl's commands: each ends, nothing that it prints steers a terminal, and with --json it
//! prints JSON.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{LazyLock, Mutex};
use std::thread;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use tapdisk::control::proto::{MESSAGE_SIZE, Message, Stat, kind};
use tapdisk::frontend::blkif::wire::Abi;
use tapdisk::metrics::ProcessMetrics;
use tapdisk::polling::{Polling, Settings};
use tapdisk_fuzz::Input;
use tapdisk_fuzz::world::ram;
use tools::tap_ctl::*;
use zerocopy::{FromBytes, IntoBytes};

/// No process has this id: the kernel's are smaller.
const PID: i32 = i32::MAX;
/// Connections of one command: LIST, to find the disk, then the command's own, and those of what it does next.
const ANSWERS: usize = 4;

/// The other side: gives each connection the next answer, and hangs up.
struct Tapdisk {
    folder: tempfile::TempDir,
    answers: SyncSender<Vec<Vec<u8>>>,
    /// What a well-behaved one says: the text of METRICS, DEBUG_QUEUE, ENGINE, COALESCE, FAULT.
    texts: [Value; 5],
}

static TAPDISK: LazyLock<Mutex<Tapdisk>> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join(format!("ctl{PID}"))).unwrap();
    let (answers, questions) = sync_channel(0);
    thread::spawn(move || serve(&listener, &questions));
    let disk = ram(Abi::Native, 512, false).disk;
    let seen = serde_json::to_value(disk.inspect(&Polling::new(Settings::default()))).unwrap();
    let (engine, coalesce) = (seen["engine"].clone(), seen["coalesce"].clone());
    let metrics = serde_json::to_value(ProcessMetrics::here([(0, &disk)])).unwrap();
    let faults = serde_json::json!({ "enabled": true, "stuck": 0, "delayed": 0, "faults": [] });
    Mutex::new(Tapdisk { folder, answers, texts: [metrics, seen, engine, coalesce, faults] })
});

/// A connection gets the next of the answers that were given last.
fn serve(listener: &UnixListener, answers: &Receiver<Vec<Vec<u8>>>) {
    let mut left = Vec::new().into_iter();
    listener.set_nonblocking(true).unwrap();
    loop {
        if let Ok(new) = answers.try_recv() {
            left = new.into_iter();
        }
        let Ok((mut stream, _)) = listener.accept() else {
            // A new command's answers are there before it connects.
            thread::sleep(Duration::from_micros(20));
            continue;
        };
        stream.set_nonblocking(false).unwrap();
        let mut question = [0; MESSAGE_SIZE];
        if stream.read_exact(&mut question).is_err() {
            continue;
        }
        let mut answer: Vec<u8> = left.next().unwrap_or_default();
        // Of the type that is expected, unless it is to be wrong.
        if answer.len() >= 2 && answer[..2] == [0, 0] {
            let kind = u16::from_ne_bytes([question[0], question[1]]) + 1;
            answer[..2].copy_from_slice(&kind.to_ne_bytes());
        }
        // Who asks may have hung up.
        let _ = stream.write_all(&answer);
    }
}

/// One of a value's parts, the `number`th of all.
fn part<'a>(value: &'a mut Value, number: &mut usize) -> Option<&'a mut Value> {
    if *number == 0 {
        return Some(value);
    }
    *number -= 1;
    match value {
        Value::Array(values) => values.iter_mut().find_map(|value| part(value, number)),
        Value::Object(values) => values.values_mut().find_map(|value| part(value, number)),
        _ => None,
    }
}

fn any_value(input: &mut Input) -> Value {
    let length = usize::from(input.byte());
    let text = || String::from_utf8_lossy(input.0.split_at(length.min(input.0.len())).0).into_owned();
    match length {
        0 => Value::Null,
        1 => u64::MAX.into(),
        2 => i64::MIN.into(),
        3 => f64::MAX.into(),
        4 => u64::from(u32::MAX).into(),
        5 => vec![Value::from(u64::MAX); 28].into(),
        6 => (0..120).fold(Value::Null, |inner, _| vec![inner].into()),
        7 => serde_json::json!({ "a\n\u{1b}[2J": ["\u{9b}2J", "\n"] }),
        8..16 => Value::from(1u64 << (length * 4)),
        16..20 => true.into(),
        _ => {
            let text = text();
            input.bytes(length);
            text.into()
        }
    }
}

fn answer(texts: &[Value; 5], input: &mut Input) -> Vec<u8> {
    let how = input.byte();
    if how == 255 {
        let count = usize::from(input.byte());
        return input.bytes(count).to_vec();
    }
    let mut bytes = [0; MESSAGE_SIZE];
    let body = input.bytes(usize::from(how & 63));
    bytes[8..8 + body.len()].copy_from_slice(body);
    let mut message = Message::read_from_bytes(&bytes).unwrap();
    if how & 0xc0 == 0xc0 {
        message.kind = if how & 1 == 0 { kind::ERROR } else { u16::from(input.byte()) };
    }
    if how & 0xc0 != 0x80 {
        let mut all = message.as_bytes().to_vec();
        // LIST has several.
        for _ in 0..input.byte() & 3 {
            let body = input.bytes(20);
            let mut bytes = [0; MESSAGE_SIZE];
            bytes[..2].copy_from_slice(&kind::LIST_RSP.to_ne_bytes());
            bytes[8..8 + body.len()].copy_from_slice(body);
            all.extend(bytes);
        }
        return all;
    }
    let which = input.byte();
    let mut text = texts[usize::from(which & 15) % texts.len()].clone();
    for _ in 0..which >> 6 {
        let mut number = usize::from(input.byte());
        let value = any_value(input);
        if let Some(part) = part(&mut text, &mut number) {
            *part = value;
        }
    }
    let mut text = text.to_string().into_bytes();
    if which & 32 != 0 {
        text = input.bytes(100).to_vec();
    }
    let announced = if which & 16 == 0 { text.len() as u64 } else { u64::from(input.number()) << (which & 15) };
    let stat = Stat::new(0, 0, announced as usize);
    let mut all = message.with(&stat).as_bytes().to_vec();
    all.extend(text);
    all
}

fn command(input: &mut Input) -> Command {
    let (what, options) = (input.byte(), input.byte());
    let pid = (options & 1 != 0).then_some(PID);
    let minor = (options & 2 != 0).then_some(u16::from(options >> 4));
    let which = Which { pid, minor };
    let disk = Disk { pid: PID, minor: 0 };
    let limit = Limit { seconds: 1 };
    match what % 18 {
        0 | 1 => Command::List(List {
            pid: None,
            minor: minor.map(i32::from),
            kind: None,
            file: (options & 4 != 0).then(|| "/a".into()),
        }),
        2 | 3 => Command::Metrics,
        4 | 5 => Command::Top(Top { interval: Duration::ZERO, count: Some(1) }),
        6 | 7 => Command::DebugQueue { disk: which },
        8 => Command::Stats { disk: which },
        9 => Command::Query { disk: which },
        10 => Command::Poll { disk: which, us: None, idle_percent: None },
        11 => Command::Engine { disk: which, name: None, submit: None, threads_min: None, threads_max: None },
        12 => Command::Fault { disk: which, release: false, on: false, off: false },
        13 => Command::Coalesce(Coalesce {
            disk: which,
            image: None,
            rate: None,
            wait: false,
            show: true,
            cancel: false,
        }),
        14 => Command::Resize { disk: which, size: (options & 4 != 0).then_some(tapdisk::config::Size(1 << 20)) },
        15 => Command::Pause { disk: which, limit },
        16 => Command::Commit { disk: which, image: "vhd:/a".into() },
        _ => match options & 3 {
            0 => Command::Attach { disk },
            1 => Command::Detach { disk },
            2 => Command::Exit { disk: which },
            _ => Command::Unpause { disk: which, image: None, secondary: None, log: None },
        },
    }
}

fuzz_target!(|data: &[u8]| {
    let tapdisk = TAPDISK.lock().unwrap();
    let mut input = Input(data);
    let json = input.byte() & 1 != 0;
    let command = command(&mut input);
    let answers = (0..ANSWERS).map(|_| answer(&tapdisk.texts, &mut input)).collect();
    tapdisk.answers.send(answers).unwrap();
    let mut out = Vec::new();
    let args = Args { directory: tapdisk.folder.path().to_owned(), debug: false, json, command };
    let done = run_to(&args, &mut out);
    let text = String::from_utf8(out).expect("it is text");
    let said = done.as_ref().err().map_or("", |(_, text)| text);
    for shown in [text.as_str(), said] {
        assert!(!shown.chars().any(|c| c.is_control() && c != '\n'), "{shown:?}");
    }
    if json && done.is_ok() && !matches!(args.command, Command::Top(_)) {
        serde_json::from_str::<Value>(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    }
});
