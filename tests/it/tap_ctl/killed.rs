//! `tap-ctl` and tapdisks are killed at any moment: the next command works, or says what is wrong. `TAPDISK_TEST_SEED` repeats one
//! seed.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::common::host::Host;
use crate::common::killed::seed;
use crate::common::live::{name, wait_for};
use crate::common::served::folder;
use crate::common::vhd::{Said, good};
use fastrand::Rng;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

struct Killer {
    host: Host,
    random: Rng,
    killed: usize,
}

impl Killer {
    fn new() -> Killer {
        let seed = seed().unwrap_or_else(|| fastrand::u64(..1 << 32));
        println!("TAPDISK_TEST_SEED={seed}");
        Killer { host: Host::new(), random: Rng::with_seed(seed), killed: 0 }
    }

    /// Runs `tap-ctl`, and kills it, or the tapdisk `pid`, after a moment.
    fn interrupted(&mut self, words: &[&str], pid: Option<&str>) -> Said {
        let command = self
            .host
            .tap_ctl()
            .args(words)
            .arg("--debug")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(self.random.u64(..8000)));
        let victim = pid.map_or(command.id() as i32, |pid| pid.parse().unwrap());
        // It may have ended; as ours is not waited for yet, it is no other.
        let hit = kill(Pid::from_raw(victim), Signal::SIGKILL).is_ok();
        let output = command.wait_with_output().unwrap();
        self.killed += usize::from(hit && (pid.is_some() || output.status.code().is_none()));
        Said {
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
            code: output.status.code().unwrap_or(-1),
        }
    }

    /// Ends all that there is, by what `list` says.
    fn clean(&self) {
        let host = &self.host;
        wait_for(|| {
            for line in host.good(&["list"]).lines() {
                let field = |name| line.split(' ').find_map(|field| field.strip_prefix(name));
                match (field("pid="), field("minor=")) {
                    (Some(pid), Some(minor)) => host.done(&["destroy", "-p", pid, "-m", minor]),
                    // It may be gone already.
                    (Some(pid), None) => drop(host.ctl(&["exit", "-p", pid])),
                    // Nobody has attached it.
                    (None, Some(minor)) => drop(host.ctl(&["free", "-m", minor])),
                    _ => panic!("{line}"),
                }
            }
            for minor in
                host.files().iter().filter_map(|path| path.to_str()?.rsplit_once("/tapdisk-")?.1.parse().ok())
            {
                let minor: u32 = minor;
                // Its tapdisk may not be gone yet.
                host.ctl(&["free", "-m", &minor.to_string()]);
            }
            (host.files().is_empty() && host.pids().is_empty()).then_some(())
        });
    }
}

fn image() -> (TempDir, String) {
    let folder = folder();
    let path = folder.path().join("disk.vhd");
    good("create -n {} -s 64", &[&path]);
    let image = name("vhd", &path);
    (folder, image)
}

fn whole(image: &str) {
    good("check -i -n {}", &[Path::new(image.strip_prefix("vhd:").unwrap())]);
}

#[test]
fn a_tap_ctl_that_is_killed_leaves_what_the_next_one_can_use() {
    let (mut killer, (_folder, image)) = (Killer::new(), image());
    for _ in 0..100 {
        if killer.killed >= 60 {
            break;
        }
        killer.interrupted(&["create", "-a", &image], None);
        killer.clean();
        let (pid, minor) = killer.host.begun();
        let disk = ["-p", pid.as_str(), "-m", minor.as_str()];
        let with = |command: &'static str, more: &[&'static str]| [&[command][..], &disk, more].concat();
        killer.host.done(&with("attach", &[]));
        let open = [&["open", "-a", image.as_str()][..], &disk].concat();
        killer.interrupted(&open, None);
        wait_for(|| match killer.host.ctl(&open).code {
            0 | libc::EALREADY => Some(()),
            libc::EBUSY => None,
            code => panic!("{code}"),
        });
        killer.interrupted(&with("pause", &[]), None);
        killer.host.done(&with("pause", &[]));
        killer.interrupted(&[&["unpause", "-a", image.as_str()][..], &disk].concat(), None);
        wait_for(|| {
            let again = killer.host.ctl(&with("unpause", &["--debug"]));
            match again.code {
                0 => Some(()),
                libc::EINVAL if again.err.contains("it is not paused") => Some(()),
                libc::EBUSY if again.err.contains("it is being resumed already") => None,
                code => panic!("{code}: {}", again.err),
            }
        });
        wait_for(|| killer.host.good(&["list"]).contains("state=0 ").then_some(()));
        killer.interrupted(&with("destroy", &[]), None);
        killer.host.done(&with("destroy", &[]));
        killer.host.wait_empty();
        whole(&image);
    }
    assert!(killer.killed >= 60, "{} were killed", killer.killed);
}

#[test]
fn what_a_killed_tapdisk_leaves_is_destroyed_and_its_image_opened_again() {
    let (mut killer, (_folder, image)) = (Killer::new(), image());
    for round in 0..200 {
        if killer.killed >= 60 {
            break;
        }
        let (pid, minor) = killer.host.opened(&image);
        let disk = ["-p", pid.as_str(), "-m", minor.as_str()];
        let with = |command: &'static str| [&[command][..], &disk].concat();
        let commands: [(&str, &[&str]); 8] = [
            ("stats", &[]),
            ("pause", &[]),
            ("unpause", &["pause"]),
            ("close", &[]),
            ("open", &["close"]),
            ("detach", &["close"]),
            ("list", &[]),
            ("destroy", &[]),
        ];
        let (command, before) = commands[round % commands.len()];
        before.iter().for_each(|command| killer.host.done(&[&[*command][..], &disk].concat()));
        let words = match command {
            "open" => [&["open", "-a", image.as_str()][..], &disk].concat(),
            "list" => vec!["list"],
            _ => [&[command][..], &disk].concat(),
        };
        let said = killer.interrupted(&words, Some(&pid));
        let clear = said.code == 0 || command != "list" && said.err.lines().count() == 2;
        assert!(clear, "{words:?}: {} {}", said.code, said.err);
        killer.host.done(&with("destroy"));
        wait_for(|| killer.host.pids().is_empty().then_some(()));
        killer.host.done(&with("destroy"));
        assert_eq!(killer.host.files(), Vec::<std::path::PathBuf>::new(), "{words:?}");
    }
    assert!(killer.killed >= 60, "{} were killed", killer.killed);
    let (pid, minor) = killer.host.opened(&image);
    killer.host.done(&["destroy", "-p", &pid, "-m", &minor]);
    whole(&image);
}
