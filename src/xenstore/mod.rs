//! A client of the XenStore, for the main loop: it never waits. Through xenstored's Unix socket, or through the kernel's
//! device where xenstored runs in another domain.
//!
//! A request gives a [`Reply`], a future. It is sent when its function is called, so several can be on their way; only the
//! device takes the next one when the one before is answered. Nothing wakes a future of this module: whoever owns a
//! [`Task`] polls it after each [`Store::progress`].
//!
//! ```no_run
//! use std::rc::Rc;
//! use tapdisk::xenstore::{Store, Task, Tx};
//!
//! let store = Rc::new(Store::connect(None)?);
//! let mut task = Task::new({
//!     let store = Rc::clone(&store);
//!     async move { store.read(Tx::NONE, "/local/domain/0/name").await }
//! });
//! let name = loop {
//!     if let Some(name) = task.poll() {
//!         break name;
//!     }
//!     // Here the loop sleeps until store.fd() has an event.
//!     store.progress()?;
//! };
//! # std::io::Result::Ok(())
//! ```

mod channel;
mod state;
mod task;
pub mod wire;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::task::Poll;

use nix::errno::Errno;

use channel::Channel;
use state::State;
use task::Slot;
pub use task::{Reply, Task};
use wire::Kind;

/// How often a transaction is tried.
const TRIES: u32 = 100;

/// The transaction that a request is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tx(u32);

impl Tx {
    /// None: the request takes effect by itself.
    pub const NONE: Tx = Tx(0);
}

/// A connection to the XenStore.
///
/// Paths are absolute, or relative to `/local/domain/ID` of this domain. Requests fail with the errors of
/// `docs/misc/xenstore.txt`. Without being sent, they fail with `EINVAL` for a text with a NUL in it, with `E2BIG` for
/// what is longer than a message, and with `ECONNRESET` once the connection is lost.
pub struct Store {
    channel: Channel,
    state: RefCell<State>,
}

impl Store {
    /// Connects to the socket or device `path`; if there is none, to that of the environment's `XENSTORED_PATH`; if there
    /// is none either, to `/run/xenstored/socket`, or else `/dev/xen/xenbus`. The error names what was tried.
    pub fn connect(path: Option<&Path>) -> io::Result<Store> {
        let environment = || std::env::var_os("XENSTORED_PATH").filter(|path| !path.is_empty()).map(PathBuf::from);
        let channel = Channel::open(path.map(Path::to_owned).or_else(environment))?;
        Ok(Store { channel, state: RefCell::default() })
    }

    /// To be polled for reading and writing, level- or edge-triggered. The kernel's device never polls writable, and need
    /// not.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }

    /// Whether something waits to be sent: whoever polls level-triggered asks for writability only then.
    pub fn unsent(&self) -> bool {
        !self.state.borrow().outgoing.is_empty()
    }

    /// Receives all that is there, and sends what could not be sent before. To be called after each event of the
    /// descriptor. An error is the loss of the connection: then all requests fail with `ECONNRESET`, and each further
    /// call gives the same error.
    pub fn progress(&self) -> io::Result<()> {
        let state = &mut *self.state.borrow_mut();
        if state.lost.is_none()
            && let Err(error) = self.receive(state).and_then(|()| self.flush(state))
        {
            state.lose(error);
        }
        match &state.lost {
            None => Ok(()),
            Some(error) => Err(io::Error::new(error.kind(), error.to_string())),
        }
    }

    /// Until there is nothing more, as an edge-triggered poll wants it. That comes soon even in a storm of events: to make
    /// one takes xenstored longer than it takes us to read it.
    fn receive(&self, state: &mut State) -> io::Result<()> {
        let mut bytes = [0; 16 << 10];
        loop {
            let count = match self.channel.receive(&mut bytes) {
                Err(Errno::EAGAIN) => return Ok(()),
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "xenstored closed the connection")),
                other => other?,
            };
            state.decoder.push(&bytes[..count]);
            while let Some(message) =
                state.decoder.pull().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?
            {
                state.take(message)?;
            }
        }
    }

    fn flush(&self, state: &mut State) -> io::Result<()> {
        while let Some((_, message)) = state.outgoing.front() {
            if self.channel.single() && state.awaits() {
                return Ok(());
            }
            match self.channel.send(&message[state.sent..]) {
                Ok(count) => {
                    state.sent += count;
                    if state.sent == message.len() {
                        state.sent(Ok(()));
                    }
                }
                Err(Errno::EAGAIN) => return Ok(()),
                Err(errno) if self.channel.single() => state.sent(Err(errno)),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn request<T>(
        &self,
        kind: Kind,
        tx: Tx,
        (texts, rest): (&[&str], &[u8]),
        parse: fn(Vec<u8>) -> Result<T, Errno>,
    ) -> Reply<T> {
        let state = &mut *self.state.borrow_mut();
        let slot = Slot::default();
        if texts.iter().any(|text| text.contains('\0')) {
            slot.set(Some(Err(Errno::EINVAL)));
        } else if wire::payload_len(texts, rest) > self.channel.payload_max() {
            slot.set(Some(Err(Errno::E2BIG)));
        } else if state.lost.is_some() {
            slot.set(Some(Err(Errno::ECONNRESET)));
        } else {
            state.request(kind, tx.0, texts, rest, Slot::clone(&slot));
            if let Err(error) = self.flush(state) {
                state.lose(error);
            }
        }
        Reply::new(slot, parse)
    }

    /// The value of a node: bytes that its writer chose.
    pub fn read(&self, tx: Tx, path: &str) -> Reply<Vec<u8>> {
        self.request(Kind::READ, tx, (&[path], b""), Ok)
    }

    /// Sets the value of a node, which is made, with its parents, if it is not there.
    pub fn write(&self, tx: Tx, path: &str, value: &[u8]) -> Reply<()> {
        self.request(Kind::WRITE, tx, (&[path], value), done)
    }

    /// Makes a node, with its parents; nothing happens to one that is there.
    pub fn mkdir(&self, tx: Tx, path: &str) -> Reply<()> {
        self.request(Kind::MKDIR, tx, (&[path], b""), done)
    }

    /// Removes a node and all below it. No error if only the node itself is not there; `ENOENT` if its parent is not.
    pub fn remove(&self, tx: Tx, path: &str) -> Reply<()> {
        self.request(Kind::RM, tx, (&[path], b""), done)
    }

    /// The names of a node's children. `E2BIG` if they are more than a message holds.
    pub fn directory(&self, tx: Tx, path: &str) -> Reply<Vec<String>> {
        self.request(Kind::DIRECTORY, tx, (&[path], b""), strings)
    }

    /// Who may do what with a node: `n`, `r`, `w` or `b` (none, read, write, both) and a domain, as in `r5`. The first is
    /// the owner, who may do all, and what the domains that are not listed may do.
    pub fn permissions(&self, tx: Tx, path: &str) -> Reply<Vec<String>> {
        self.request(Kind::GET_PERMS, tx, (&[path], b""), strings)
    }

    /// Sets them.
    pub fn set_permissions(&self, tx: Tx, path: &str, permissions: &[&str]) -> Reply<()> {
        let texts: Vec<&str> = std::iter::once(path).chain(permissions.iter().copied()).collect();
        self.request(Kind::SET_PERMS, tx, (&texts, b""), done)
    }

    /// Watches a node, which need not be there, and all below it. The watch fires once by itself when it is set. Over the
    /// socket, `EEXIST` if there is one with this path and this token.
    pub fn watch(&self, path: &str, token: &str) -> Reply<()> {
        self.request(Kind::WATCH, Tx::NONE, (&[path, token], b""), done)
    }

    /// Ends a watch. When the reply is in, and no other watch has this token, [`fired`](Store::fired) does not give it any
    /// more.
    pub fn unwatch(&self, path: &str, token: &str) -> Reply<()> {
        self.request(Kind::UNWATCH, Tx::NONE, (&[path, token], b""), done)
    }

    /// The tokens of watches that fired since the last call: each once, however often it did, in the order of their first
    /// events.
    pub fn fired(&self) -> Vec<String> {
        std::mem::take(&mut self.state.borrow_mut().fired)
    }

    /// Until [`fired`](Store::fired) has something to give.
    pub async fn wait_fired(&self) -> Result<(), Errno> {
        poll_fn(|_| match &*self.state.borrow() {
            state if !state.fired.is_empty() => Poll::Ready(Ok(())),
            state if state.lost.is_some() => Poll::Ready(Err(Errno::ECONNRESET)),
            _ => Poll::Pending,
        })
        .await
    }

    /// Runs `body` in a transaction, whose changes are all seen at once or, after an error or `Ok(None)`, never. It is run
    /// again when someone else has changed what it used; `EAGAIN` after a hundred times. Dropped before its end, it leaves
    /// no transaction open.
    pub async fn transaction<T>(
        &self,
        body: impl AsyncFn(Tx) -> Result<Option<T>, Errno>,
    ) -> Result<Option<T>, Errno> {
        for _ in 0..TRIES {
            let result = match self.attempt(&body).await {
                Err(Errno::EAGAIN) => continue,
                other => other,
            };
            return result;
        }
        Err(Errno::EAGAIN)
    }

    async fn attempt<T>(&self, body: &impl AsyncFn(Tx) -> Result<Option<T>, Errno>) -> Result<Option<T>, Errno> {
        let mut open = Open::new(self);
        let tx = open.started().await?;
        let result = body(tx).await?;
        if result.is_some() {
            open.end(true).await?;
        }
        Ok(result)
    }
}

/// A transaction that ends with this, without effect unless it was ended before.
struct Open<'a> {
    store: &'a Store,
    start: Reply<Tx>,
    tx: Option<Tx>,
}

impl Open<'_> {
    fn new(store: &Store) -> Open<'_> {
        let start = store.request(Kind::TRANSACTION_START, Tx::NONE, (&[""], b""), transaction);
        Open { store, start, tx: None }
    }

    async fn started(&mut self) -> Result<Tx, Errno> {
        let tx = (&mut self.start).await?;
        self.tx = Some(tx);
        Ok(tx)
    }

    fn end(&mut self, commit: bool) -> Reply<()> {
        let tx = self.tx.take().unwrap_or(Tx::NONE);
        self.store.request(Kind::TRANSACTION_END, tx, (&[if commit { "T" } else { "F" }], b""), done)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        // The reply may be in, but not seen yet. If it is not in, the transaction ends when it comes.
        self.tx = self.tx.or_else(|| self.start.take()?.ok());
        if self.tx.is_some() {
            // If that fails, there is no transaction.
            drop(self.end(false));
        }
    }
}

fn done(_: Vec<u8>) -> Result<(), Errno> {
    Ok(())
}

fn strings(payload: Vec<u8>) -> Result<Vec<String>, Errno> {
    // Names have no other characters than `A-Za-z0-9-/_@`, permissions none of those that are not ASCII.
    wire::texts(&payload).map(|text| String::from_utf8(text.to_vec()).map_err(|_| Errno::EIO)).collect()
}

fn transaction(payload: Vec<u8>) -> Result<Tx, Errno> {
    state::number(&payload).filter(|tx| *tx != 0).map(Tx).ok_or(Errno::EIO)
}
