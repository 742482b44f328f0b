//! A host's control directory under test, and `tap-ctl` in it.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::PATIENCE;
use super::served::{output, tool};
use super::vhd::Said;

/// A directory for sockets and minors. Tapdisks that are left in it are killed when this is dropped.
pub struct Host {
    folder: TempDir,
}

impl Host {
    pub fn new() -> Host {
        Host { folder: tempfile::tempdir().unwrap() }
    }

    pub fn directory(&self) -> &Path {
        self.folder.path()
    }

    pub fn tap_ctl(&self) -> Command {
        let mut command = tool("tap-ctl");
        command.arg("--directory").arg(self.directory());
        command
    }

    /// Runs `tap-ctl` with words, whatever comes of it.
    pub fn ctl(&self, words: &[&str]) -> Said {
        said(self.tap_ctl().args(words))
    }

    /// The same where it must succeed; what it printed, without the end of the line.
    pub fn good(&self, words: &[&str]) -> String {
        let said = self.ctl(words);
        assert_eq!((said.code, said.err.as_str()), (0, ""), "{words:?}: {}", said.out);
        said.out.strip_suffix('\n').unwrap_or_default().to_owned()
    }

    /// The same where it must print nothing.
    pub fn done(&self, words: &[&str]) {
        assert_eq!(self.good(words), "", "{words:?}");
    }

    /// The same where it must fail: nothing but the errno's text, and what --debug and --json tell beside.
    pub fn bad(&self, words: &[&str], errno: i32, text: &str) {
        let known = strerror(errno);
        let told = |said: &Said| (said.code, said.out.clone(), said.err.clone());
        assert_eq!(told(&self.ctl(words)), (errno, String::new(), format!("{known}\n")), "{words:?}");
        let more = self.ctl(&[words, &["--debug"]].concat());
        let lines: Vec<_> = more.err.lines().collect();
        assert!(more.code == errno && lines[0] == known, "{words:?}: {}", more.err);
        assert!(lines.len() > 1 && more.err.contains(text), "{words:?}: {}", more.err);
        let json = self.ctl(&[words, &["--json"]].concat());
        let value: serde_json::Value =
            serde_json::from_str(&json.out).unwrap_or_else(|_| panic!("{words:?}: {}", json.out));
        assert_eq!((json.code, &value["error"]["errno"]), (errno, &errno.into()), "{words:?}: {value}");
        assert!(value["error"]["text"].as_str().unwrap().contains(text), "{words:?}: {value}");
    }

    /// A minor, and a process that has none.
    pub fn begun(&self) -> (String, String) {
        let path = self.good(&["allocate"]);
        let minor = path.rsplit_once('-').unwrap().1.to_owned();
        (self.good(&["spawn"]), minor)
    }

    /// A disk with an image, its process and its minor.
    pub fn opened(&self, image: &str) -> (String, String) {
        let (pid, minor) = self.begun();
        self.done(&["attach", "-p", &pid, "-m", &minor]);
        self.done(&["open", "-p", &pid, "-m", &minor, "-a", image]);
        (pid, minor)
    }

    /// The URI of a disk's NBD server.
    pub fn nbd(&self, pid: &str, minor: &str) -> String {
        format!("nbd+unix:///?socket={}/nbd{pid}.{minor}", self.directory().display())
    }

    /// Files in the directory and in the folder of minors.
    pub fn files(&self) -> Vec<PathBuf> {
        let entries = |folder: PathBuf| std::fs::read_dir(folder).into_iter().flatten().flatten();
        let all = entries(self.directory().into()).chain(entries(self.directory().join("tapdisk")));
        all.map(|entry| entry.path()).filter(|path| !path.is_dir()).collect()
    }

    /// Waits until nothing is left: no process, no socket, no minor.
    pub fn wait_empty(&self) {
        let end = Instant::now() + PATIENCE;
        while !(self.files().is_empty() && self.pids().is_empty()) {
            assert!(Instant::now() < end, "{:?} {:?}", self.files(), self.pids());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Processes that were started with this directory.
    pub fn pids(&self) -> Vec<i32> {
        let directory = self.directory().to_str().unwrap();
        let is_ours = |pid: &i32| {
            let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut arguments = arguments.split(|byte| *byte == 0);
            arguments.next().is_some_and(|name| name.ends_with(b"tapdisk"))
                && arguments.any(|argument| argument == directory.as_bytes())
        };
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_ours).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for pid in self.pids() {
            // It may have ended.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// What a command says, and its exit code.
pub fn said(command: &mut Command) -> Said {
    let output = output(command);
    Said {
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
        code: output.status.code().unwrap(),
    }
}

/// The same, with something on its standard input.
pub fn said_with_input(command: &mut Command, input: &[u8]) -> Said {
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(input).unwrap();
    drop(writer);
    let output = command.stdin(Stdio::from(OwnedFd::from(reader))).output().unwrap();
    Said {
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
        code: output.status.code().unwrap(),
    }
}

/// What the C library says of an errno.
pub fn strerror(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    text.rsplit_once(" (os error").unwrap().0.to_owned()
}
