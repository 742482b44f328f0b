//! The blkif ring over shared memory: a tapdev without Xen.
//!
//! The client connects to a Unix socket of type SOCK_SEQPACKET and sends one [`Hello`](wire::Hello) message. The
//! server answers with one [`Welcome`](wire::Welcome) message; if that is no refusal, it carries the descriptors of a
//! memfd and of two eventfds for each queue. The client maps the memfd, initialises the rings' indices as a blkfront
//! does, and begins. Nothing more is said on the socket: either side hangs up to end the connection, and what the
//! client had in flight is then finished, or not begun, and not answered.
//!
//! The server makes the memfd and seals its size, so that no client can pull pages away from under it. The
//! eventfds are shared descriptions: a client can spoil its own, and for that reason the socket is open only to
//! the server's own user.
//!
//! A grant reference is the number of a data page of the same queue; a page that does not exist is a bad grant.

mod client;
pub mod wire;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use nix::sys::socket::SockType;
use slog::{Logger, info, warn};

use self::client::Client;
use super::seats::{Full, Seats};
use super::{DiskInfo, Frontend, Intake};
use crate::listen::UnixSocket;
use crate::log::Limiter;
use crate::memory::{self, Part};
use crate::request::Request;
use crate::stats::now;
use crate::sys::memory::PAGE_SIZE;

/// Limits of the local frontend.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the socket is.
    pub socket: PathBuf,
    /// The largest ring that a client may ask for, log2 of its pages.
    pub max_ring_page_order: u32,
    /// Rings of one client.
    pub max_queues: u32,
    /// Data pages of one client, all queues together.
    pub max_data_pages: u32,
    /// Segments of an indirect request.
    pub max_indirect_segments: u32,
    /// Clients at a time.
    pub max_clients: usize,
    /// Keep clients' memory resident.
    pub lock_memory: bool,
}

/// Tokens of one client: its socket, then its queues' doorbells.
const TOKENS: usize = 64;

/// How long a client may take to say hello, in ns.
const HELLO_TIMEOUT: u64 = 10_000_000_000;

/// The frontend.
pub struct Local {
    config: Config,
    disk: DiskInfo,
    log: Logger,
    listener: Option<UnixSocket>,
    /// Clients may be waiting.
    acceptable: bool,
    registry: Option<(Registry, usize)>,
    clients: Seats<Client>,
    /// The client that is asked first, in this turn: where slots are short, none must get them all.
    first: usize,
    /// Clients so far.
    connections: u64,
    turned_away: u64,
    /// For what clients do.
    limiter: Limiter,
    /// For those who are not let in: of them there must be a line, whatever the others do.
    refusals: Limiter,
}

impl Local {
    /// Listens on the configured socket.
    pub fn bind(config: Config, disk: DiskInfo, log: Logger) -> io::Result<Local> {
        let explain = |error: io::Error| {
            io::Error::new(error.kind(), format!("local ring socket {}: {error}", config.socket.display()))
        };
        assert!((config.max_queues as usize) < TOKENS, "each queue's doorbell has a token");
        let listener = UnixSocket::bind_as(&config.socket, SockType::SeqPacket, None).map_err(explain)?;
        let clients = Seats::new(config.max_clients);
        Ok(Local {
            config,
            disk,
            log,
            listener: Some(listener),
            acceptable: false,
            registry: None,
            clients,
            first: 0,
            connections: 0,
            turned_away: 0,
            limiter: Limiter::default(),
            refusals: Limiter::default(),
        })
    }

    /// Whether the next client is not refused but waits to be accepted.
    fn must_wait(&self) -> bool {
        self.clients.free() == Err(Full::Orphans)
    }

    fn accept(&mut self) {
        let Some(listener) = &mut self.listener else { return };
        let most = match self.clients.free() {
            Ok(free) => free,
            // Each is told that there are too many.
            Err(Full::Clients) => usize::MAX,
            Err(Full::Orphans) => return,
        };
        self.acceptable = false;
        for socket in listener.accept_at_most(most, &self.log) {
            if let Err(error) = self.admit(socket.into())
                && let Some(suppressed) = self.refusals.allow(now())
            {
                warn!(self.log, "cannot admit a ring client"; "error" => %error, "suppressed_before" => suppressed);
            }
        }
    }

    /// When clients may be waiting that there is room for, ns of [`now`](crate::stats::now).
    fn accept_due(&self) -> Option<u64> {
        let listener = self.listener.as_ref().filter(|_| !self.must_wait())?;
        if self.acceptable { Some(0) } else { listener.due() }
    }

    fn admit(&mut self, socket: OwnedFd) -> io::Result<()> {
        if let Err(error) = memory::room(0) {
            // It may have hung up; then there is nobody to tell.
            let _ =
                wire::Welcome::refusal(Errno::ENOMEM, "there is no memory for one more client").send(&socket, &[]);
            return Err(error);
        }
        let Some(index) = self.clients.first_free() else {
            self.turned_away += 1;
            let message = format!("there are {} clients already, the limit max_clients", self.clients.count());
            wire::Welcome::refusal(Errno::EBUSY, &message).send(&socket, &[])?;
            return Ok(());
        };
        let Some((registry, base)) = &self.registry else { return Ok(()) };
        let token = base + 1 + index * TOKENS;
        registry.register(&mut SourceFd(&socket.as_raw_fd()), Token(token), Interest::READABLE)?;
        self.connections += 1;
        let deadline = now() + HELLO_TIMEOUT;
        self.clients.seat(index, Client::new(self.connections, socket, token, deadline));
        Ok(())
    }

    fn drop_client(&mut self, index: usize, why: &str) {
        let Some(client) = self.clients.leave(index, Client::in_flight) else { return };
        if let Some((registry, _)) = &self.registry {
            client.deregister(registry);
        }
        let limiter = if client.is_connected() { &mut self.limiter } else { &mut self.refusals };
        if let Some(suppressed) = limiter.allow(now()) {
            info!(self.log, "ring client gone"; "client" => client.number, "why" => why,
                "in_flight" => client.in_flight(), "suppressed_before" => suppressed);
        }
    }
}

impl Frontend for Local {
    fn register(&mut self, registry: Registry, base: usize) -> io::Result<()> {
        if let Some(listener) = &mut self.listener {
            registry.register(listener.source(), Token(base), Interest::READABLE)?;
        }
        self.registry = Some((registry, base));
        Ok(())
    }

    fn event(&mut self, index: usize, _event: &Event) {
        let Some(index) = index.checked_sub(1) else {
            self.acceptable = true;
            // At once: also a disk that is paused has clients.
            return self.accept();
        };
        let (index, doorbell) = (index / TOKENS, index % TOKENS);
        let (Some(client), Some((registry, _))) = (self.clients.get_mut(index), &self.registry) else { return };
        if doorbell > 0 {
            return client.kicked(doorbell - 1);
        }
        // Until nothing is left: of that there is no other event. What is behind its hello may hold the client's own end, which would not be
        // closed then when it leaves.
        loop {
            match client.receive(&self.config, &self.disk, registry) {
                Ok(None) => return,
                Ok(Some(hello)) => {
                    if let Some(suppressed) = self.limiter.allow(now()) {
                        info!(self.log, "ring client connected"; "client" => client.number, "queues" => hello.queues,
                            "ring_page_order" => hello.ring_page_order, "abi" => hello.abi,
                            "data_pages" => hello.data_pages, "suppressed_before" => suppressed);
                    }
                }
                Err(error) => return self.drop_client(index, &error.to_string()),
            }
        }
    }

    fn pull(&mut self, intake: &mut Intake) {
        if self.accept_due().is_some_and(|due| due <= intake.now) {
            self.accept();
        }
        self.first = (self.first + 1) % self.clients.count();
        let (head, tail) = (0..self.first, self.first..self.clients.count());
        for index in tail.chain(head) {
            let (Some(client), Some((registry, _))) = (self.clients.get_mut(index), &self.registry) else { continue };
            if let Err(why) = client.pull(intake, index as u64, registry) {
                self.drop_client(index, &why);
            }
        }
    }

    fn answer(&mut self, request: &Request) {
        let tag = client::Tag::unpack(request.tag);
        if let Some(client) = self.clients.ended(tag.client) {
            client.answer(&tag, request);
        }
    }

    fn publish(&mut self) {
        self.clients.iter_mut().for_each(|(_, client)| client.publish());
    }

    fn in_memory(&self) -> bool {
        true
    }

    fn ready(&self) -> bool {
        self.accept_due() == Some(0) || self.clients.iter().any(|(_, client)| client.ready())
    }

    fn arm(&mut self) -> bool {
        // Every ring has to be armed, so no short cut at the first that has something.
        let accept = self.accept_due() == Some(0);
        self.clients.iter_mut().fold(accept, |ready, (_, client)| client.arm() | ready)
    }

    fn pull_deadline(&self) -> Option<u64> {
        self.clients.iter().filter_map(|(_, client)| client.deadline()).chain(self.accept_due()).min()
    }

    fn has_orphans(&self) -> bool {
        self.clients.orphans() > 0
    }

    fn is_orphan(&self, tag: u64) -> bool {
        self.clients.has_left(client::Tag::unpack(tag).client)
    }

    fn resized(&mut self, disk: &DiskInfo) {
        self.disk = disk.clone();
    }

    fn gather_ns(&self) -> Option<u64> {
        self.clients.iter().next().map(|_| 0)
    }

    fn close(&mut self) {
        if let (Some(mut listener), Some((registry, _))) = (self.listener.take(), &self.registry) {
            // Closing it does the same; this only comes first.
            let _ = registry.deregister(listener.source());
        }
        (0..self.clients.count()).for_each(|index| self.drop_client(index, "the disk is closed"));
    }

    fn memory(&self) -> Vec<Part> {
        let config = &self.config;
        let rings = config.max_queues as usize * (PAGE_SIZE << config.max_ring_page_order);
        let data = config.max_data_pages as usize * PAGE_SIZE;
        vec![Part::each("client of the local ring", rings + data, config.max_clients)]
    }

    fn inspect(&self) -> serde_json::Value {
        let clients: Vec<_> = self.clients.iter().map(|(_, client)| client.inspect()).collect();
        serde_json::json!({
            "type": "local",
            "socket": self.config.socket,
            "connections": self.connections,
            "turned_away": self.turned_away,
            "orphans": self.clients.orphans(),
            "clients": clients,
        })
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.close();
    }
}

impl wire::Welcome {
    fn send(&self, socket: &OwnedFd, fds: &[std::os::fd::BorrowedFd]) -> io::Result<()> {
        crate::sys::fdpass::send(socket.as_fd(), zerocopy::IntoBytes::as_bytes(self), fds).map(drop)
    }
}
