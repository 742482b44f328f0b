//! Disks in use: load on both frontends that checks what it reads, and the commands that a storage manager gives meanwhile.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{MsgFlags, recv};
use serde_json::Value;
use tapdisk::control::client;
use tapdisk::control::proto::{MESSAGE_SIZE, Message, Params, Response, kind, string};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::PATIENCE;
use super::served::{Served, output, run, tool};
use super::vhd::{Said, good};

/// Both frontends that need no Xen.
pub const BOTH: &str = "[frontend.local]\nsocket = '{s}/ring'\n[frontend.nbd]\nsocket = '{s}/nbd'\n";

/// Writers that check what they read, again and again, over the ring and NBD, in the first 32 MiB of a disk.
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u32>>,
}

impl Load {
    pub fn start(served: &Served) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let again = |mut once: Box<dyn FnMut(u32) + Send>| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                // One at the least, however soon the end comes.
                let mut rounds = 0;
                loop {
                    once(rounds);
                    rounds += 1;
                    if stop.load(SeqCst) {
                        return rounds;
                    }
                }
            })
        };
        let (socket, uri) = (served.ring(), served.nbd());
        let ring = again(Box::new(move |round| {
            let mut command = tool("ring-load");
            command.args([
                "run",
                "--rw",
                "randwrite",
                "--bs",
                "512-64k",
                "--verify",
                "--range",
                "8M",
                "--fsync",
                "32",
            ]);
            run(command.arg("--seed").arg(round.to_string()).arg("--socket").arg(&socket));
        }));
        let nbd = again(Box::new(move |round| {
            run(fio(&uri, 16 + round % 2 * 8, 8, round).args(["--rw=randwrite", "--do_verify=1"]));
        }));
        Load { stop, threads: vec![ring, nbd] }
    }

    /// Each ends its round. What it read was what it had written, and there was no error.
    pub fn finish(self) {
        self.stop.store(true, SeqCst);
        for thread in self.threads {
            assert!(thread.join().unwrap() > 0);
        }
    }
}

/// fio on a part of a disk, in MiB, with a checksum in each block; how is to be said.
fn fio(uri: &str, offset: u32, size: u32, seed: u32) -> Command {
    let mut command = Command::new("fio");
    command.args(["--name=v", "--ioengine=nbd", "--bsrange=512-64k", "--blockalign=512", "--iodepth=16"]);
    command.args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--fsync=64"]);
    command.arg(format!("--randseed={seed}")).arg(format!("--offset={offset}m")).arg(format!("--size={size}m"));
    command.arg(format!("--uri={uri}"));
    command
}

/// Writes what [`kept`] looks for: 8 MiB beyond the load's part.
pub fn keep(served: &Served) {
    run(fio(&served.nbd(), 40, 8, 7).args(["--rw=randwrite", "--do_verify=0"]));
}

/// It is all there.
pub fn kept(served: &Served) {
    run(fio(&served.nbd(), 40, 8, 7).args(["--rw=randwrite", "--verify_only"]));
}

/// Runs `tap-ctl`, whatever comes of it.
pub fn ctl(served: &Served, words: &[&str]) -> Said {
    let output = output(served.tap_ctl().args(words));
    Said {
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
        code: output.status.code().unwrap(),
    }
}

/// The same where it is refused: with that errno, and a text that has these words.
pub fn refused(served: &Served, words: &[&str], errno: i32, text: &str) {
    let said = ctl(served, &[words, &["--debug"]].concat());
    assert!(said.code == errno && said.err.contains(text), "{words:?}: {}, {}", said.code, said.err);
}

/// A request that the tapdisk has, before all that happens to it from now on, and may answer later.
pub struct Asked(UnixStream);

/// Asks for something, by the type of the message. A program that did so might come to it late.
pub fn ask(served: &Served, kind: u16) -> Asked {
    send(served, &Message::new(kind, 0))
}

/// The same, to go on with another image.
pub fn ask_resume(served: &Served, kind_and_path: &str) -> Asked {
    let mut params = Params::new_zeroed();
    params.path = string(kind_and_path);
    send(served, &Message::new(kind::RESUME, 0).with(&params))
}

fn send(served: &Served, message: &Message) -> Asked {
    let mut stream = UnixStream::connect(client::path(served.sockets(), served.pid())).unwrap();
    stream.write_all(message.as_bytes()).unwrap();
    Asked(stream)
}

impl Asked {
    /// There is no answer.
    pub fn waits(&self) -> bool {
        let peeked = recv(self.0.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
        peeked == Err(Errno::EAGAIN)
    }

    /// The errno of the answer; 0: it is done.
    pub fn errno(mut self) -> i32 {
        let mut bytes = [0; MESSAGE_SIZE];
        self.0.read_exact(&mut bytes).unwrap();
        let message = Message::read_from_bytes(&bytes).unwrap();
        if message.kind == kind::ERROR { message.member::<Response>().error } else { 0 }
    }
}

/// The disk's state, as `tap-ctl list` prints it.
pub fn state(served: &Served) -> String {
    let line = run(served.tap_ctl().arg("list"));
    let state = line.split_whitespace().find_map(|word| word.strip_prefix("state="));
    state.unwrap_or_else(|| panic!("{line}")).to_owned()
}

pub fn pause(served: &Served) {
    run(served.tap_ctl().arg("pause"));
    assert_eq!(state(served), "0x2a");
}

pub fn unpause(served: &Served) {
    run(served.tap_ctl().arg("unpause"));
    // It may pause for itself, and goes on then.
    wait_for(|| (state(served) == "0").then_some(()));
}

/// `vhd:path`, or another type.
pub fn name(kind: &str, path: &Path) -> String {
    format!("{kind}:{}", path.display())
}

pub fn unpause_with(served: &Served, image: &Path) {
    run(served.tap_ctl().args(["unpause", "-a", &name("vhd", image)]));
    let line = format!("state=0 args={}\n", name("vhd", image));
    wait_for(|| run(served.tap_ctl().arg("list")).contains(&line).then_some(()));
}

/// Puts a new image on top of the one that is served, whether that holds anything yet or not.
pub fn snapshot(served: &Served, new: &Path, top: &Path) {
    pause(served);
    good("snapshot -e -n {} -p {}", &[new, top]);
    unpause_with(served, new);
}

/// What a coalesce has come to.
pub fn coalesce_report(served: &Served) -> Value {
    serde_json::from_str(&run(served.tap_ctl().args(["coalesce", "--show", "--json"]))).unwrap()
}

/// Merges an image of the chain to the end.
pub fn coalesce(served: &Served, image: &Path) {
    let text = run(served.tap_ctl().args(["coalesce", "--wait", "--json", "--image"]).arg(image));
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&report["stage"], &report["percent"]), (&"done".into(), &100.into()), "{report}");
    assert_eq!(report["image"], image.to_str().unwrap(), "{report}");
}

/// Waits until a coalesce has come to a stage.
pub fn wait_stage(served: &Served, stage: &str) -> Value {
    wait_for(|| Some(coalesce_report(served)).filter(|report| report["stage"] == stage))
}

/// Waits until there is something.
pub fn wait_for<T>(mut what: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = what() {
            return found;
        }
        assert!(Instant::now() < end, "it does not come");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Files below a folder that a tapdisk has open.
pub fn open_files(served: &Served, folder: &Path) -> Vec<PathBuf> {
    let folder = folder.canonicalize().unwrap();
    let links = std::fs::read_dir(format!("/proc/{}/fd", served.pid())).unwrap();
    // One may have been closed just now.
    let files = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
    files.filter(|file| file.starts_with(&folder)).collect()
}

/// Whether anybody has a lock on a file.
pub fn locked(path: &Path) -> bool {
    let file = std::fs::File::open(path).unwrap();
    Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err()
}

/// The images of the chain that is served, the leaf first.
pub fn chain(served: &Served) -> Vec<String> {
    let queue = served.debug_queue();
    let layers = queue["layers"].as_array().unwrap_or_else(|| panic!("{queue}"));
    layers.iter().map(|layer| layer["path"].as_str().unwrap().to_owned()).collect()
}
