//! What a tapdisk says that means harm.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;

use nix::errno::Errno;
use tapdisk::control::proto::{MESSAGE_SIZE, Message, Query, Stat, kind, string};
use zerocopy::{FromZeros, IntoBytes};

use super::{Args, Command, Which, client, run_to};

/// What a command prints, or its exit code and what it says, where the tapdisk answers that.
fn told(json: bool, command: fn(Which) -> Command, answer: Vec<u8>) -> Result<String, (i32, String)> {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(client::path(folder.path(), 1)).unwrap();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; MESSAGE_SIZE]).unwrap();
        let _ = stream.write_all(&answer);
    });
    let command = command(Which { pid: Some(1), minor: Some(0) });
    let args = Args { directory: Path::new(folder.path()).to_owned(), debug: false, json, command };
    let mut out = Vec::new();
    let done = run_to(&args, &mut out);
    server.join().unwrap();
    done.map(|()| String::from_utf8(out).unwrap())
}

fn text(kind: u16, announced: usize, text: &str) -> Vec<u8> {
    [Message::new(kind, 0).with(&Stat::new(kind, 0, announced)).as_bytes(), text.as_bytes()].concat()
}

#[test]
fn nothing_of_it_steers_the_terminal() {
    let mut query = Query::new_zeroed();
    query.status = string("a\x1b[2J\nb\u{9b}");
    let message = Message::new(kind::QUERY_COMMIT_RSP, 0).with(&query).as_bytes().to_vec();
    let shown = told(false, |disk| Command::Query { disk }, message).unwrap();
    assert_eq!(shown, "Commit status 'a\\u{1b}[2J\\nb\\u{9b}' (0/0)\n");
    let stats = "{ \"a\": 1,\r\n\t\"b\u{9b}\": 2 }";
    let shown = told(false, |disk| Command::Stats { disk }, text(kind::STATS_RSP, stats.len(), stats)).unwrap();
    assert_eq!(shown, "{ \"a\": 1,\\u000d\n\\u0009\"b\\u009b\": 2 }\n");
    // That is for programs, and stays JSON.
    let shown = told(true, |disk| Command::Stats { disk }, text(kind::STATS_RSP, stats.len(), stats)).unwrap();
    assert_eq!(shown, "{\"a\":1,\"b\\u009b\":2}\n");
    let no_json = "<html>";
    let said = told(true, |disk| Command::Stats { disk }, text(kind::STATS_RSP, no_json.len(), no_json)).unwrap_err();
    assert!(said.1.contains("expected value"), "{said:?}");
}

#[test]
fn what_is_announced_and_does_not_come_takes_no_memory() {
    let announced = client::TEXT_MAX as usize;
    let said = told(false, |disk| Command::Stats { disk }, text(kind::STATS_RSP, announced, "{}")).unwrap_err();
    assert_eq!(said.0, Errno::EIO as i32, "{said:?}");
    let said = told(false, |disk| Command::Stats { disk }, text(kind::STATS_RSP, announced + 1, "{}")).unwrap_err();
    assert_eq!(said.0, Errno::EPROTO as i32, "{said:?}");
}
