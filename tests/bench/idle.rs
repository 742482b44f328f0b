//! Many disks that have nothing to do: how long they take to start, what each takes, and whether any wakes up.
//!
//! Each is started as a toolstack does it, by `tap-ctl create`, with an image of 1 GiB in a sparse file, and has a client on its
//! local ring of one page, which has read a block and is idle then.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tapdisk::client::{Client, Options};
use tapdisk::control::client as control;
use tapdisk::frontend::blkif::wire::{Entry, OP_READ, Segment};

/// How long it is watched whether something wakes up.
const QUIET: Duration = Duration::from_secs(10);

/// A process as /proc shows it.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// Its share of the memory, kB: what several have counts in parts.
    pss: u64,
    /// What it alone has, kB.
    private: u64,
    /// All that it has, kB.
    rss: u64,
    descriptors: usize,
    threads: usize,
    /// Times that one of its threads has woken up or was interrupted.
    switches: u64,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let count: usize = std::env::args().nth(1).map_or(Ok(1000), |count| count.parse())?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let folder = tempfile::tempdir()?;
    let tap_ctl = prepare(folder.path(), count)?;
    let begin = Instant::now();
    each(count, |disk| {
        let image = format!("aio:{}", image(folder.path(), disk).display());
        drop(run(tap_ctl(folder.path()).args(["create", "-a", &image])));
    });
    let started = begin.elapsed();
    let mut clients = Vec::new();
    for disk in 0..count {
        clients.push(read_a_block(&folder.path().join(format!("{disk}.ring")))?);
    }
    let pids = control::pids(folder.path())?;
    std::thread::sleep(Duration::from_secs(2));
    let before: Vec<_> = pids.iter().map(|pid| look(*pid)).collect::<Result<_, _>>()?;
    std::thread::sleep(QUIET);
    let after: Vec<_> = pids.iter().map(|pid| look(*pid)).collect::<Result<_, _>>()?;
    report(count, started, &before, &after);
    drop(clients);
    let listed = run(tap_ctl(folder.path()).arg("list"));
    // pid=… minor=… and the rest.
    let disks: Vec<Vec<_>> = listed.lines().map(|line| line.split([' ', '=']).collect()).collect();
    let begin = Instant::now();
    each(disks.len(), |index| {
        drop(run(tap_ctl(folder.path()).args(["destroy", "-p", disks[index][1], "-m", disks[index][3]])));
    });
    println!("| time to end them all | {:.1} s |", begin.elapsed().as_secs_f64());
    Ok(())
}

/// Makes the images and what the tapdisks need; gives what makes a command.
fn prepare(folder: &Path, count: usize) -> std::io::Result<impl Fn(&Path) -> Command + Sync + use<>> {
    for disk in 0..count {
        File::create(image(folder, disk))?.set_len(1 << 30)?;
    }
    let shown = folder.display();
    let text = format!(
        "[frontend.local]\nsocket = '{shown}/{{minor}}.ring'\nmax_ring_page_order = 0\n[log]\nfile = '{shown}/log'\n"
    );
    fs::write(folder.join("defaults.toml"), text)?;
    // The example is beside the programs' folder.
    let programs = std::env::current_exe()?.parent().and_then(Path::parent).map(Path::to_owned).unwrap_or_default();
    let tapdisk = folder.join("start");
    let script = format!("#!/bin/sh\nexec {}/tapdisk --defaults {shown}/defaults.toml \"$@\"\n", programs.display());
    fs::write(&tapdisk, script)?;
    fs::set_permissions(&tapdisk, fs::Permissions::from_mode(0o755))?;
    Ok(move |folder: &Path| {
        let mut command = Command::new(programs.join("tap-ctl"));
        command.arg("--directory").arg(folder).env("TAPDISK", &tapdisk);
        command
    })
}

fn image(folder: &Path, disk: usize) -> PathBuf {
    folder.join(format!("{disk}.img"))
}

fn run(command: &mut Command) -> String {
    let output = command.output().expect("tap-ctl is there");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Does it for each number, four at a time.
fn each(count: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(index) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|index| *index < count) {
                    work(index);
                }
            });
        }
    });
}

/// A client that has read a block.
fn read_a_block(ring: &Path) -> Result<Client, tapdisk::client::Error> {
    let mut client = Client::connect(ring, &Options::default())?;
    let queue = &mut client.queues[0];
    let segment = Segment { gref: 0, first_sect: 0, last_sect: 7 };
    queue.ring.push(&Entry::new(queue.abi(), OP_READ, 1).with_segments(1, &[segment]));
    queue.publish()?;
    while queue.ring.pop().is_none() {
        if !queue.ring.arm() {
            queue.wait(None)?;
        }
    }
    Ok(client)
}

fn look(pid: i32) -> std::io::Result<Seen> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let rollup = fs::read_to_string(proc.join("smaps_rollup"))?;
    let of = |text: &str, name: &str| -> u64 {
        let lines = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        lines.filter_map(|value| value.split_whitespace().next()?.parse::<u64>().ok()).sum()
    };
    let mut seen = Seen {
        pss: of(&rollup, "Pss"),
        private: of(&rollup, "Private_Clean") + of(&rollup, "Private_Dirty"),
        rss: of(&rollup, "Rss"),
        descriptors: fs::read_dir(proc.join("fd"))?.count(),
        ..Seen::default()
    };
    for task in fs::read_dir(proc.join("task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        seen.switches += of(&status, "voluntary_ctxt_switches") + of(&status, "nonvoluntary_ctxt_switches");
        seen.threads += 1;
    }
    Ok(seen)
}

fn report(count: usize, started: Duration, before: &[Seen], after: &[Seen]) {
    let disks = after.len();
    let mean = |of: fn(&Seen) -> u64| after.iter().map(of).sum::<u64>() as f64 / disks as f64;
    let most = |of: fn(&Seen) -> u64| after.iter().map(of).max().unwrap_or(0);
    let woken: u64 = before.iter().zip(after).map(|(before, after)| after.switches - before.switches).sum();
    let mib = |kib: f64| kib / 1024.0;
    println!("| {count} disks, {disks} processes | |");
    println!("|---|---|");
    println!("| time to start them all, four at a time | {:.1} s |", started.as_secs_f64());
    println!("| memory of a disk, its share (Pss), mean | {:.2} MiB |", mib(mean(|seen| seen.pss)));
    println!(
        "| of that, its alone, mean and most | {:.2}, {:.2} MiB |",
        mib(mean(|s| s.private)),
        mib(most(|s| s.private) as f64)
    );
    println!("| resident, the program included, mean | {:.2} MiB |", mib(mean(|seen| seen.rss)));
    println!("| descriptors of a disk, most | {} |", most(|seen| seen.descriptors as u64));
    println!("| threads of a disk, most | {} |", most(|seen| seen.threads as u64));
    println!("| wake-ups of all of them in {} s | {woken} |", QUIET.as_secs());
}
