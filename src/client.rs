//! The client of the [local ring](crate::frontend::local): what a guest's blkfront does, in a process of its own.
//!
//! For the load tool and for tests. It keeps none of the protocol's promises by itself: entries are pushed as they
//! are given, indices can be forged, and who wants to behave badly can.
//!
//! ```no_run
//! use tapdisk::client::{Client, Options};
//! use tapdisk::frontend::blkif::wire::{OP_FLUSH_DISKCACHE, Entry};
//!
//! let mut client = Client::connect("/run/tapdisk/ring".as_ref(), &Options::default())?;
//! let mut queue = client.queues.remove(0);
//! queue.ring.push(&Entry::new(queue.abi(), OP_FLUSH_DISKCACHE, 1));
//! queue.publish()?;
//! while !queue.ring.arm() {
//!     queue.wait(None)?;
//! }
//! assert_eq!(queue.ring.pop().unwrap().id, 1);
//! # Ok::<(), tapdisk::client::Error>(())
//! ```

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt::ReceiveTimeout,
};
use nix::sys::time::TimeVal;
use nix::unistd::write;
use zerocopy::{FromZeros, IntoBytes};

use crate::frontend::blkif::ring::{FrontRing, Shared};
use crate::frontend::blkif::wire::{Abi, GrantRef};
use crate::frontend::local::wire::{ABIS, Hello, INFO_READ_ONLY, MAGIC, Welcome};
use crate::sys;
use crate::sys::fdpass;
use crate::sys::memory::{Memory, PAGE_SIZE};

/// How long the server has to answer the handshake, in seconds.
const HANDSHAKE_TIMEOUT: i64 = 10;

/// The rings that a client asks for.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Layout of the entries.
    pub abi: Abi,
    /// log2 of the pages of each ring.
    pub ring_page_order: u32,
    /// Rings.
    pub queues: u32,
    /// Pages for data of each queue.
    pub data_pages: u32,
}

impl Default for Options {
    /// One ring of one page, and a page of data for each of its entries.
    fn default() -> Options {
        Options { abi: Abi::Native, ring_page_order: 0, queues: 1, data_pages: 32 }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket can't be reached.
    #[error("{path}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: Errno,
    },
    /// The server wants no such client.
    #[error("the server refuses: {message} ({errno})")]
    Refused {
        /// What it says in a number.
        errno: Errno,
        /// What it says in words.
        message: String,
        /// What it would have allowed; zeros where it did not say.
        limits: Limits,
    },
    /// What came is no handshake.
    #[error("handshake: {0}")]
    Handshake(&'static str),
    /// The server is gone.
    #[error("the server has hung up")]
    HungUp,
    /// The system refuses something.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Error {
        Error::Io(errno.into())
    }
}

/// The most that the server takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Limits {
    /// log2 of the pages of a ring.
    pub ring_page_order: u32,
    /// Rings.
    pub queues: u32,
    /// Data pages of all queues together.
    pub data_pages: u32,
    /// Segments of an indirect request; 0 where it takes none.
    pub indirect_segments: u32,
}

/// What the server says of its disk and itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Disk {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Logical sector in bytes.
    pub sector_size: u32,
    /// Physical sector in bytes.
    pub physical_sector_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// What it allows.
    pub limits: Limits,
}

impl Disk {
    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.sectors * 512
    }
}

/// A connection. It ends when it and all its queues are dropped.
#[derive(Debug)]
pub struct Client {
    /// What the server says.
    pub disk: Disk,
    /// The queues; take them out to give each to a thread.
    pub queues: Vec<Queue>,
    /// The socket that stands for the connection, for those who want to misuse it.
    pub socket: Arc<OwnedFd>,
}

impl Client {
    /// Connects to the socket at `path` and shakes hands.
    pub fn connect(path: &Path, options: &Options) -> Result<Client, Error> {
        let socket = open_socket(path)?;
        let abi = ABIS.iter().position(|abi| *abi == options.abi).ok_or(Error::Handshake("no such layout"))? as u32;
        let Options { ring_page_order, queues, data_pages, .. } = *options;
        let hello = Hello { magic: MAGIC, abi, ring_page_order, queues, data_pages };
        let (welcome, fds) = shake_hands(&socket, &hello)?;
        let limits = Limits {
            ring_page_order: welcome.max_ring_page_order,
            queues: welcome.max_queues,
            data_pages: welcome.max_data_pages,
            indirect_segments: welcome.max_indirect_segments,
        };
        if welcome.error != 0 {
            let text = welcome.message.split(|byte| *byte == 0).next().unwrap_or_default();
            let message = String::from_utf8_lossy(text).into_owned();
            return Err(Error::Refused { errno: sys::errno(welcome.error), message, limits });
        }
        if welcome.sectors > u64::MAX / 512 {
            return Err(Error::Handshake("a disk larger than there are bytes"));
        }
        let socket = Arc::new(socket);
        let disk = Disk {
            sectors: welcome.sectors,
            sector_size: welcome.sector_size,
            physical_sector_size: welcome.physical_sector_size,
            read_only: welcome.info & INFO_READ_ONLY != 0,
            limits,
        };
        Ok(Client { disk, queues: open_queues(options, &welcome, fds, &socket)?, socket })
    }
}

/// Connects to the socket at `path`, and says nothing.
pub fn open_socket(path: &Path) -> Result<OwnedFd, Error> {
    let open = || {
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(socket)
    };
    open().map_err(|source| Error::Connect { path: path.into(), source })
}

/// Sends `hello` as it is, wrong or not, and receives what comes.
pub fn shake_hands(socket: &OwnedFd, hello: &Hello) -> Result<(Welcome, Vec<OwnedFd>), Error> {
    setsockopt(socket, ReceiveTimeout, &TimeVal::new(HANDSHAKE_TIMEOUT, 0))?;
    fdpass::send(socket.as_fd(), hello.as_bytes(), &[])?;
    let mut welcome = Welcome::new_zeroed();
    let (len, fds) = fdpass::receive(socket.as_fd(), welcome.as_mut_bytes(), MsgFlags::empty())?;
    match len {
        0 => Err(Error::HungUp),
        _ if len != size_of::<Welcome>() || welcome.magic != MAGIC => Err(Error::Handshake("no server of this kind")),
        _ => Ok((welcome, fds)),
    }
}

fn open_queues(
    options: &Options,
    welcome: &Welcome,
    fds: Vec<OwnedFd>,
    socket: &Arc<OwnedFd>,
) -> Result<Vec<Queue>, Error> {
    let queues = options.queues as usize;
    if fds.len() != 1 + 2 * queues {
        return Err(Error::Handshake("not the descriptors that belong to these queues"));
    }
    let stride = usize::try_from(welcome.queue_bytes).map_err(|_| Error::Handshake("queues too large"))?;
    let ring_pages = 1_usize.checked_shl(options.ring_page_order).ok_or(Error::Handshake("a ring too large"))?;
    let ring_bytes = ring_pages.checked_mul(PAGE_SIZE).ok_or(Error::Handshake("a ring too large"))?;
    let used = ring_bytes.saturating_add(options.data_pages as usize * PAGE_SIZE);
    let len = stride.checked_mul(queues).ok_or(Error::Handshake("queues too large"))?;
    if stride < used || !stride.is_multiple_of(PAGE_SIZE) {
        return Err(Error::Handshake("queues smaller than what was asked for"));
    }
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or(Error::Handshake("too few descriptors"));
    let memory = Arc::new(Memory::shared(next()?, len)?);
    (0..queues)
        .map(|index| {
            let base = index * stride;
            let (kick, call) = (next()?, next()?);
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            // Edge-triggered: each write to the eventfd is an event of its own, and nobody has to read it empty.
            epoll.add(&call, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, CALL))?;
            epoll.add(&**socket, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, SOCKET))?;
            let shared = Shared::new(memory.clone(), base, options.abi, options.ring_page_order);
            Ok(Queue {
                entries: shared.entries(),
                ring: FrontRing::init(shared),
                memory: memory.clone(),
                abi: options.abi,
                ring_at: base,
                data_at: base + ring_bytes,
                data_pages: options.data_pages,
                kick,
                epoll,
                _call: call,
                _socket: socket.clone(),
            })
        })
        .collect()
}

/// `epoll_event.data` of the eventfd that the server writes.
const CALL: u64 = 0;
/// `epoll_event.data` of the connection.
const SOCKET: u64 = 1;

/// Why a wait is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The server has notified (or a signal came): look at the ring.
    Called,
    /// Nothing happened in that time.
    TimedOut,
    /// The server is gone. What it answered before is in the ring still.
    HungUp,
}

/// One ring, its doorbells and its data pages.
#[derive(Debug)]
pub struct Queue {
    /// The ring.
    pub ring: FrontRing,
    memory: Arc<Memory>,
    abi: Abi,
    entries: u32,
    ring_at: usize,
    data_at: usize,
    data_pages: u32,
    kick: OwnedFd,
    epoll: Epoll,
    _call: OwnedFd,
    _socket: Arc<OwnedFd>,
}

impl Queue {
    /// The layout of its entries.
    pub fn abi(&self) -> Abi {
        self.abi
    }

    /// Entries of the ring.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Data pages; a grant reference is a number below this.
    pub fn data_pages(&self) -> u32 {
        self.data_pages
    }

    /// The memory of all queues.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Where in [`memory`](Self::memory) the ring's pages begin, in bytes.
    pub fn ring_at(&self) -> usize {
        self.ring_at
    }

    /// Where in [`memory`](Self::memory) a data page begins, in bytes.
    pub fn page_at(&self, page: GrantRef) -> usize {
        self.data_at + page as usize * PAGE_SIZE
    }

    /// Makes the pushed requests visible, and notifies the server if it wants that. True: it has been notified.
    pub fn publish(&mut self) -> Result<bool, Error> {
        let wanted = self.ring.publish();
        if wanted {
            self.kick()?;
        }
        Ok(wanted)
    }

    /// Notifies the server, asked for or not.
    pub fn kick(&self) -> Result<(), Error> {
        match write(&self.kick, &1u64.to_ne_bytes()) {
            // A full counter is a doorbell that rings.
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Sleeps until the server notifies. Without [`FrontRing::arm`] before it, it may not. A `timeout` is rounded up
    /// to milliseconds; `None` waits for ever.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Wake, Error> {
        let millis = |time: Duration| i32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX);
        let timeout = match timeout {
            None => EpollTimeout::NONE,
            Some(time) => EpollTimeout::try_from(millis(time)).unwrap_or(EpollTimeout::MAX),
        };
        let mut events = [EpollEvent::empty(); 2];
        match self.epoll.wait(&mut events, timeout) {
            Ok(0) => Ok(Wake::TimedOut),
            Ok(count) if events[..count].iter().any(|event| event.data() == SOCKET) => Ok(Wake::HungUp),
            Ok(_) | Err(Errno::EINTR) => Ok(Wake::Called),
            Err(errno) => Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use nix::sys::eventfd::{EfdFlags, EventFd};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::socket::{Backlog, bind, listen};
    use nix::unistd::ftruncate;

    use super::*;
    use crate::frontend::blkif::ring::BackRing;
    use crate::frontend::blkif::wire::{Entry, OP_FLUSH_DISKCACHE, RSP_OKAY, Response};

    fn welcome(hello: &Hello) -> Welcome {
        Welcome {
            magic: MAGIC,
            sectors: 2048,
            queue_bytes: ((1u64 << hello.ring_page_order) + u64::from(hello.data_pages)) * 4096,
            sector_size: 512,
            physical_sector_size: 4096,
            info: INFO_READ_ONLY,
            max_data_pages: 64,
            ..Welcome::new_zeroed()
        }
    }

    /// A server for one client: it sends what `answer` makes of the greeting, and hangs up once it has answered all
    /// that comes with the first kick.
    fn serve(listener: &UnixListener, answer: impl Fn(&Hello) -> Welcome) {
        let socket = OwnedFd::from(listener.accept().unwrap().0);
        let mut hello = Hello::default();
        fdpass::receive(socket.as_fd(), hello.as_mut_bytes(), MsgFlags::empty()).unwrap();
        let welcome = answer(&hello);
        if welcome.error != 0 {
            fdpass::send(socket.as_fd(), welcome.as_bytes(), &[]).unwrap();
            return;
        }
        let memfd = memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap();
        let len = welcome.queue_bytes * u64::from(hello.queues);
        ftruncate(&memfd, len as i64).unwrap();
        let bells: Vec<EventFd> =
            (0..2 * hello.queues).map(|_| EventFd::from_value_and_flags(0, EfdFlags::empty()).unwrap()).collect();
        let fds: Vec<BorrowedFd> = [memfd.as_fd()].into_iter().chain(bells.iter().map(AsFd::as_fd)).collect();
        let memory = Arc::new(Memory::shared(&memfd, len as usize).unwrap());
        let last = hello.queues as usize - 1;
        let base = last * welcome.queue_bytes as usize;
        let abi = ABIS[hello.abi as usize];
        let mut ring = BackRing::attach(Shared::new(memory, base, abi, hello.ring_page_order));
        fdpass::send(socket.as_fd(), welcome.as_bytes(), &fds).unwrap();
        bells[2 * last].read().unwrap();
        while ring.pending() != Ok(0) {
            let entry = ring.pop();
            ring.push(Response { id: entry.id(), operation: entry.operation(), status: RSP_OKAY });
        }
        if ring.publish() {
            bells[2 * last + 1].write(1).unwrap();
        }
    }

    fn with_server(
        answer: impl Fn(&Hello) -> Welcome + Send + 'static,
        options: &Options,
    ) -> (Result<Client, Error>, thread::JoinHandle<()>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ring");
        let listener =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(1).unwrap()).unwrap();
        let listener = UnixListener::from(listener);
        let server = thread::spawn(move || serve(&listener, answer));
        (Client::connect(&path, options), server)
    }

    #[test]
    fn requests_of_any_queue_are_answered_and_a_hang_up_is_noticed() {
        let options = Options { abi: Abi::X86_32, ring_page_order: 1, queues: 2, data_pages: 4 };
        let (client, server) = with_server(welcome, &options);
        let mut client = client.unwrap();
        assert_eq!((client.disk.bytes(), client.disk.read_only), (1 << 20, true));
        let mut queue = client.queues.pop().unwrap();
        assert_eq!((queue.entries(), queue.page_at(1) - queue.page_at(0)), (64, PAGE_SIZE));
        assert_eq!(queue.page_at(0), 4096 * (6 + 2));
        assert_eq!(queue.wait(Some(Duration::ZERO)).unwrap(), Wake::TimedOut);
        for id in 0..2 {
            queue.ring.push(&Entry::new(queue.abi(), OP_FLUSH_DISKCACHE, id));
        }
        assert!(!queue.ring.arm_at(2));
        assert!(queue.publish().unwrap());
        server.join().unwrap();
        assert_eq!([queue.ring.pop(), queue.ring.pop()].map(|response| response.unwrap().id), [0, 1]);
        assert_eq!(queue.ring.pop(), None);
        assert_eq!(queue.wait(None).unwrap(), Wake::HungUp);
    }

    #[test]
    fn a_refusal_says_why_and_what_would_do() {
        let refuse = |hello: &Hello| {
            let mut welcome = Welcome { error: Errno::E2BIG as i32, ..welcome(hello) };
            welcome.message[..8].copy_from_slice(b"too much");
            welcome
        };
        let (client, server) = with_server(refuse, &Options::default());
        server.join().unwrap();
        match client {
            Err(Error::Refused { errno: Errno::E2BIG, message, limits }) => {
                assert_eq!((message.as_str(), limits.data_pages), ("too much", 64));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_server_whose_disk_has_more_bytes_than_there_are_is_not_believed() {
        let huge = |hello: &Hello| Welcome { sectors: u64::MAX / 512 + 1, ..welcome(hello) };
        let (client, server) = with_server(huge, &Options::default());
        assert!(matches!(client, Err(Error::Handshake(_))), "{client:?}");
        // It waits for a kick that does not come, and its client is gone.
        drop(server);
    }

    #[test]
    fn a_server_that_gives_less_than_was_asked_is_not_believed() {
        let mean = |hello: &Hello| Welcome { error: 0, queue_bytes: 4096, ..welcome(hello) };
        let (client, server) = with_server(mean, &Options::default());
        assert!(matches!(client, Err(Error::Handshake(_))), "{client:?}");
        // The server waits for a kick, which can't come any more: let it be.
        drop(server);
    }
}
