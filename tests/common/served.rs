//! A tapdisk process under test, with its files in a folder that goes with it.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::PATIENCE;

/// A program of the workspace, where it was built or, in another machine, where TAPDISK_TEST_BIN says.
pub fn tool(name: &str) -> Command {
    let path = match std::env::var_os("TAPDISK_TEST_BIN") {
        Some(folder) => Path::new(&folder).join(name),
        None => Path::new(env!("CARGO_BIN_EXE_tapdisk")).with_file_name(name),
    };
    assert!(path.exists(), "{} is missing: run tests/run, or cargo build --workspace", path.display());
    Command::new(path)
}

/// Runs a command to its end and gives what it printed; panics if it fails or takes very long.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}\n{errors}", output.status);
    text
}

/// Runs a command to its end, whatever that is. `timeout` ends it after ten minutes.
pub fn output(command: &mut Command) -> Output {
    let mut limited = Command::new("timeout");
    limited.arg("600").arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        limited.env(key, value.unwrap_or_default());
    }
    limited.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// A folder for images, on a file system with O_DIRECT.
pub fn folder() -> TempDir {
    let parent = std::env::var_os("TAPDISK_TEST_FOLDER").unwrap_or(env!("CARGO_TARGET_TMPDIR").into());
    tempfile::tempdir_in(parent).unwrap()
}

/// A running tapdisk. It is killed when this is dropped.
pub struct Served {
    child: Child,
    /// For sockets: short paths.
    sockets: TempDir,
    log: PathBuf,
}

impl Served {
    /// Serves with the `[image]` table `image` and `rest` of a configuration. `{s}` is the folder of sockets.
    pub fn start(image: &str, rest: &str) -> Served {
        Self::start_with("", image, rest)
    }

    /// The same with keys that are in no table.
    pub fn start_with(top: &str, image: &str, rest: &str) -> Served {
        Self::start_by(tool("tapdisk"), top, image, rest)
    }

    /// The same, started by a command, which gets the configuration as its last argument and becomes the tapdisk.
    pub fn start_by(command: Command, top: &str, image: &str, rest: &str) -> Served {
        let sockets = tempfile::tempdir().unwrap();
        let child = Self::spawn(command, top, image, rest, sockets.path());
        let log = sockets.path().join("log");
        let mut served = Served { child, sockets, log };
        if let Err(errors) = served.wait() {
            panic!("it did not start: {}{errors}", served.log());
        }
        served
    }

    /// Waits until it serves, or says why it does not.
    fn wait(&mut self) -> Result<(), String> {
        let mut line = String::new();
        BufReader::new(self.child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        if line.contains("/ctl") {
            return Ok(());
        }
        let mut errors = String::new();
        let _ = self.child.stderr.as_mut().unwrap().read_to_string(&mut errors);
        Err(errors)
    }

    /// Ends it with a signal and starts it again with the same configuration. What it says if it does not serve any more.
    pub fn start_again(&mut self, signal: Signal) -> Result<(), String> {
        self.signal(signal);
        self.child.wait().unwrap();
        self.child = Self::spawn_configured(tool("tapdisk"), &self.configuration());
        self.wait()
    }

    /// Its configuration's file.
    pub fn configuration(&self) -> PathBuf {
        self.sockets().join("disk.toml")
    }

    /// What it says when it can't serve, and its exit code.
    pub fn refused(image: &str, rest: &str) -> (i32, String) {
        let sockets = tempfile::tempdir().unwrap();
        let mut child = Self::spawn(tool("tapdisk"), "", image, rest, sockets.path());
        let mut text = String::new();
        // One that serves says where.
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut text).unwrap();
        if !text.is_empty() {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{image} is served");
        }
        child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        (child.wait().unwrap().code().unwrap(), text)
    }

    fn spawn(command: Command, top: &str, image: &str, rest: &str, sockets: &Path) -> Child {
        let text = format!("{top}\n[image]\n{image}\n{rest}\n");
        let text = if text.contains("[control]") { text } else { format!("{text}[control]\ndirectory = '{{s}}'\n") };
        let text =
            if text.contains("[log]") { text } else { format!("{text}[log]\nfile = '{{s}}/log'\nlevel='debug'\n") };
        let config = sockets.join("disk.toml");
        std::fs::write(&config, text.replace("{s}", sockets.to_str().unwrap())).unwrap();
        Self::spawn_configured(command, &config)
    }

    fn spawn_configured(mut command: Command, config: &Path) -> Child {
        command.arg(config).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    /// The folder of sockets.
    pub fn sockets(&self) -> &Path {
        self.sockets.path()
    }

    /// The local ring's socket, by convention.
    pub fn ring(&self) -> PathBuf {
        self.sockets().join("ring")
    }

    /// The NBD server's URI.
    pub fn nbd(&self) -> String {
        format!("nbd+unix:///?socket={}/nbd", self.sockets().display())
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// What it has logged. While it runs, a thread of its own writes the log: [`wait_log`](Self::wait_log) waits for a text.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until the log has `text`.
    pub fn wait_log(&self, text: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            assert!(Instant::now() < end, "no {text:?} in the log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A command that speaks to its control socket.
    pub fn tap_ctl(&self) -> Command {
        let mut command = tool("tap-ctl");
        command.arg("--directory").arg(self.sockets());
        command
    }

    /// debug-queue.
    pub fn debug_queue(&self) -> serde_json::Value {
        serde_json::from_str(&run(self.tap_ctl().args(["debug-queue", "--json"]))).unwrap()
    }

    /// Open descriptors. A connection that its client has closed may still be among them.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Waits until it has no more than so many.
    pub fn wait_descriptors(&self, most: usize) {
        let end = Instant::now() + PATIENCE;
        while self.descriptors() > most {
            assert!(Instant::now() < end, "{} descriptors, {most} expected", self.descriptors());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// strace of all its threads, with these options, which writes to `trace`.
    pub fn strace(&self, options: &[&str], trace: &Path) -> Child {
        let mut command = Command::new("strace");
        command.arg("-f").args(options).arg("-o").arg(trace).args(["-p", &self.pid().to_string()]);
        let strace = command.stderr(Stdio::null()).spawn().unwrap();
        let end = Instant::now() + PATIENCE;
        let status = || std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        while !status().contains(&format!("TracerPid:\t{}", strace.id())) {
            assert!(Instant::now() < end, "strace does not attach");
            std::thread::sleep(Duration::from_millis(10));
        }
        strace
    }

    /// Whether it runs.
    pub fn alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// How the process has ended, if it has, and what it said on standard error, where the words of an abort are. Asked once.
    pub fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().unwrap()?;
        let mut errors = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut errors);
        }
        Some(format!("{status}: {errors}"))
    }

    /// The exit code of a process that has ended.
    pub fn code(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Ends it in order, and gives its exit code and log.
    pub fn stop(mut self) -> (Option<i32>, String) {
        self.signal(Signal::SIGTERM);
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status.code(), self.log());
            }
            assert!(Instant::now() < end, "it does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // What a failed test waits for does not come from a process that has ended: its last words say why.
        if std::thread::panicking()
            && let Some(ended) = self.ended()
        {
            eprintln!("{}: {ended}", self.configuration().display());
        }
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
