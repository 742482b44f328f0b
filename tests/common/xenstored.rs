//! A real xenstored without Xen, and a client that waits.

use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tapdisk::xenstore::{Store, Task, Tx};
use tempfile::TempDir;

use super::PATIENCE;

/// A program of the rig, which is built if it is not; that takes half a minute, and says so.
pub fn rig(program: &str) -> Command {
    let rig = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/xen/rig");
    let built = Command::new(rig.join("build")).stdout(Stdio::null()).status().unwrap();
    assert!(built.success(), "tests/xen/rig/build failed: see above");
    Command::new(rig.join(program))
}

/// xenstored, in a folder that goes with it. It is killed when this is dropped.
pub struct Xenstored {
    child: Child,
    folder: TempDir,
}

impl Xenstored {
    pub fn start() -> Xenstored {
        let folder = tempfile::Builder::new().prefix("xs").tempdir_in("/tmp").unwrap();
        let child = rig("xenstored-local").arg(folder.path()).stdin(Stdio::null()).spawn().unwrap();
        let mut xenstored = Xenstored { child, folder };
        let end = Instant::now() + PATIENCE;
        while Store::connect(Some(&xenstored.socket())).is_err() {
            assert!(xenstored.child.try_wait().unwrap().is_none(), "xenstored ended");
            assert!(Instant::now() < end, "xenstored has no socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        xenstored
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// Scripts `xenstore-read`, `xenstore-write` and so on in a folder: Xen's real programs, connected to it.
    pub fn programs(&self, folder: &Path) {
        let made = rig("xenstored-local").arg("--clients").args([self.folder.path(), folder]).status().unwrap();
        assert!(made.success());
    }

    /// A new connection.
    pub fn client(&self) -> Client {
        Client::connect(&self.socket())
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Kills it and waits until it is gone.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Xenstored {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A connection whose functions wait, by the same kind of poll as the main loop's. Panics where nothing comes.
pub struct Client {
    pub store: Rc<Store>,
    poll: RefCell<Poll>,
}

impl Client {
    /// To a socket or a device.
    pub fn connect(path: &Path) -> Client {
        let store = Store::connect(Some(path)).unwrap();
        let poll = Poll::new().unwrap();
        let fd = store.fd().as_raw_fd();
        poll.registry().register(&mut SourceFd(&fd), Token(0), Interest::READABLE | Interest::WRITABLE).unwrap();
        Client { store: Rc::new(store), poll: RefCell::new(poll) }
    }

    /// Waits for a future that has what it needs: a reply.
    pub fn wait<T>(&self, future: impl Future<Output = T> + 'static) -> T {
        let mut task = Task::new(future);
        let mut events = Events::with_capacity(1);
        let end = Instant::now() + PATIENCE;
        loop {
            // Its loss shows in the result.
            let lost = self.store.progress().is_err();
            if let Some(result) = task.poll() {
                return result;
            }
            assert!(!lost, "the connection is lost, and the future does not know");
            assert!(Instant::now() < end, "nothing came");
            let _ = self.poll.borrow_mut().poll(&mut events, Some(Duration::from_secs(1)));
        }
    }

    /// Waits for a future that uses the store.
    pub fn run<T, F: Future<Output = T> + 'static>(&self, make: impl FnOnce(Rc<Store>) -> F) -> T {
        self.wait(make(Rc::clone(&self.store)))
    }

    /// A value as text.
    pub fn read(&self, path: &str) -> Result<String, Errno> {
        let value = self.wait(self.store.read(Tx::NONE, path))?;
        Ok(String::from_utf8_lossy(&value).into_owned())
    }

    pub fn write(&self, path: &str, value: &str) -> Result<(), Errno> {
        self.wait(self.store.write(Tx::NONE, path, value.as_bytes()))
    }

    pub fn mkdir(&self, path: &str) -> Result<(), Errno> {
        self.wait(self.store.mkdir(Tx::NONE, path))
    }

    pub fn remove(&self, path: &str) -> Result<(), Errno> {
        self.wait(self.store.remove(Tx::NONE, path))
    }

    pub fn directory(&self, path: &str) -> Result<Vec<String>, Errno> {
        self.wait(self.store.directory(Tx::NONE, path))
    }

    pub fn permissions(&self, path: &str) -> Result<Vec<String>, Errno> {
        self.wait(self.store.permissions(Tx::NONE, path))
    }

    pub fn set_permissions(&self, path: &str, permissions: &[&str]) -> Result<(), Errno> {
        self.wait(self.store.set_permissions(Tx::NONE, path, permissions))
    }

    pub fn watch(&self, path: &str, token: &str) -> Result<(), Errno> {
        self.wait(self.store.watch(path, token))
    }

    pub fn unwatch(&self, path: &str, token: &str) -> Result<(), Errno> {
        self.wait(self.store.unwatch(path, token))
    }

    /// Waits for some watch, and gives the tokens of all that fired.
    pub fn wait_fired(&self) -> Vec<String> {
        self.run(|store| async move { store.wait_fired().await }).unwrap();
        self.store.fired()
    }
}
