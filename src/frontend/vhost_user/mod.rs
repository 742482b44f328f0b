//! virtio-blk for a guest of QEMU or Cloud Hypervisor, or a client with libblkio: vhost-user-blk, over a Unix socket.
//!
//! The front end, which has the guest, connects, hands over the guest's memory and the rings' eventfds, and says where in that memory the rings
//! are; from then on requests go by the rings alone. One front end at a time: a disk has one guest. Those who come meanwhile are turned away, and
//! one that comes while requests of its predecessor are in flight waits until they have ended.
//!
//! - `wire.rs`: messages.
//! - `files.rs`: what comes as descriptors: memory, eventfds.
//! - `connection.rs`: what each message does. Begin reading here.
//! - `vring.rs`: one ring, from what is said of it to the queue that serves it ([`virtio`](super::virtio)).
//!
//! GET_VRING_BASE and RESET_DEVICE are answered when nothing of the ring is in flight; until then nothing more is heard of that front end. A
//! message that makes no sense is refused, if its front end wants to hear of it, and otherwise the end of the connection. Not offered: the log of
//! what is written, so that a guest can't be migrated while it runs; the region that survives this process (INFLIGHT_SHMFD); packed rings.

mod connection;
mod files;
mod vring;
mod wire;

use std::io;
use std::path::PathBuf;

use mio::event::Event;
use mio::{Interest, Registry, Token};
use nix::sys::socket::SockType;
use sha2::Digest;
use slog::{Logger, info, warn};

use self::connection::{Connection, Shared, Tag};
use super::seats::Seats;
use super::virtio::SEG_MAX;
use super::virtio::queue::BOUNCE_BYTES;
use super::virtio::request::SERIAL;
use super::{DiskInfo, Frontend, Intake};
use crate::listen::UnixSocket;
use crate::log::Limiter;
use crate::memory::{self, Part};
use crate::request::Request;
use crate::stats::now;

/// Segments that a request's data has at most: its buffers, and each can reach from one memory region into the next.
pub const SEGMENTS: usize = 2 * SEG_MAX as usize;

/// Bytes that a client takes: memory to bounce in, and tables.
const BYTES: usize = BOUNCE_BYTES + (64 << 10);

/// How it listens.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the socket is.
    pub socket: PathBuf,
    /// Rings, at most.
    pub queues: u16,
    /// What the guest is told as the disk's serial.
    pub serial: [u8; SERIAL],
}

/// The serial that a guest is told: the one that is wanted, or else one made of the disk's name, the same each time.
pub fn serial(wanted: Option<&str>, name: &str) -> [u8; SERIAL] {
    let text = match wanted {
        Some(text) => text.to_owned(),
        None => sha2::Sha256::digest(name).iter().take(SERIAL / 2).map(|byte| format!("{byte:02x}")).collect(),
    };
    let mut serial = [0; SERIAL];
    serial.iter_mut().zip(text.bytes()).for_each(|(to, byte)| *to = byte);
    serial
}

/// The frontend.
pub struct VhostUser {
    config: Config,
    disk: DiskInfo,
    log: Logger,
    listener: Option<UnixSocket>,
    /// Clients may be waiting.
    acceptable: bool,
    registry: Option<(Registry, usize)>,
    clients: Seats<Connection>,
    connections: u64,
    turned_away: u64,
    limiter: Limiter,
}

impl VhostUser {
    /// Listens on the configured socket.
    pub fn bind(config: Config, disk: DiskInfo, log: Logger) -> io::Result<VhostUser> {
        let explain = |error: io::Error| {
            io::Error::new(error.kind(), format!("vhost-user socket {}: {error}", config.socket.display()))
        };
        let listener = UnixSocket::bind_as(&config.socket, SockType::Stream, None).map_err(explain)?;
        Ok(VhostUser {
            config,
            disk,
            log,
            listener: Some(listener),
            acceptable: false,
            registry: None,
            clients: Seats::new(1),
            connections: 0,
            turned_away: 0,
            limiter: Limiter::default(),
        })
    }

    fn accept(&mut self) {
        let Some(listener) = &mut self.listener else { return };
        if self.clients.orphans() > 0 {
            return;
        }
        self.acceptable = false;
        for socket in listener.accept_some(&self.log) {
            // One that has hung up makes room for the next: that is not to depend on whose event comes first.
            if let Some(client) = self.clients.get_mut(0) {
                client.readable();
                self.hear();
            }
            if self.clients.first_free().is_none() {
                self.turned_away += 1;
                if let Some(suppressed) = self.limiter.allow(now()) {
                    warn!(self.log, "a vhost-user front end is turned away: the disk has one already";
                        "suppressed_before" => suppressed);
                }
            } else if let Err(error) = self.admit(socket.into())
                && let Some(suppressed) = self.limiter.allow(now())
            {
                warn!(self.log, "cannot admit a vhost-user front end"; "error" => %error, "suppressed_before" => suppressed);
            }
        }
    }

    fn accept_due(&self) -> Option<u64> {
        let listener = self.listener.as_ref().filter(|_| self.clients.orphans() == 0)?;
        if self.acceptable { Some(0) } else { listener.due() }
    }

    fn admit(&mut self, socket: std::os::fd::OwnedFd) -> io::Result<()> {
        let Some((registry, base)) = &self.registry else { return Ok(()) };
        let (number, queues) = (self.connections + 1, usize::from(self.config.queues));
        let serial = self.config.serial;
        let client = memory::admit(|| Connection::new(number, socket, base + 1, queues, serial))?;
        client.register(registry)?;
        self.connections = number;
        self.clients.seat(0, client);
        if let Some(suppressed) = self.limiter.allow(now()) {
            info!(self.log, "vhost-user front end connected"; "client" => number, "suppressed_before" => suppressed);
        }
        Ok(())
    }

    /// Hears what a front end has said.
    fn hear(&mut self) {
        let Some((registry, _)) = &self.registry else { return };
        let Some(client) = self.clients.get_mut(0) else { return };
        let shared = Shared { disk: &self.disk, registry, log: &self.log };
        if let Err(error) = client.hear(&shared) {
            self.drop_client(&error.to_string());
        }
    }

    fn drop_client(&mut self, why: &str) {
        let Some(client) = self.clients.leave(0, Connection::in_flight) else { return };
        if let Some(suppressed) = self.limiter.allow(now()) {
            info!(self.log, "vhost-user front end gone"; "client" => client.number, "why" => why,
                "in_flight" => client.in_flight(), "suppressed_before" => suppressed);
        }
        if let Some((registry, _)) = &self.registry {
            client.leave(registry);
        }
    }
}

impl Frontend for VhostUser {
    fn register(&mut self, registry: Registry, base: usize) -> io::Result<()> {
        if let Some(listener) = &mut self.listener {
            registry.register(listener.source(), Token(base), Interest::READABLE)?;
        }
        self.registry = Some((registry, base));
        Ok(())
    }

    fn event(&mut self, index: usize, event: &Event) {
        match index {
            0 => {
                self.acceptable = true;
                // At once: also a disk that is paused has clients.
                self.accept();
            }
            1 => {
                let Some(client) = self.clients.get_mut(0) else { return };
                if client.is_deaf() && event.is_read_closed() {
                    return self.drop_client("hung up");
                }
                client.readable();
                self.hear();
            }
            _ => {
                if let Some(client) = self.clients.get_mut(0) {
                    client.kicked(index - 2);
                }
            }
        }
    }

    fn pull(&mut self, intake: &mut Intake) {
        if self.accept_due().is_some_and(|due| due <= intake.now) {
            self.accept();
        }
        let (Some(client), Some((registry, _))) = (self.clients.get_mut(0), &self.registry) else { return };
        let shared = Shared { disk: &self.disk, registry, log: &self.log };
        client.pull(intake, 0, &shared);
    }

    fn answer(&mut self, request: &Request) {
        let tag = Tag::unpack(request.tag);
        if let Some(client) = self.clients.ended(tag.client) {
            client.answer(&tag, request);
        }
    }

    fn publish(&mut self) {
        let Some(client) = self.clients.get_mut(0) else { return };
        client.publish();
        if client.has_more() || client.has_stopped() {
            self.hear();
        }
    }

    fn in_memory(&self) -> bool {
        true
    }

    fn ready(&self) -> bool {
        self.accept_due() == Some(0) || self.clients.iter().any(|(_, client)| client.ready())
    }

    fn arm(&mut self) -> bool {
        let accept = self.accept_due() == Some(0);
        self.clients.iter_mut().fold(accept, |ready, (_, client)| client.arm() | ready)
    }

    fn deadline(&self) -> Option<u64> {
        self.clients.iter().any(|(_, client)| client.has_more() || client.has_stopped()).then_some(0)
    }

    fn pull_deadline(&self) -> Option<u64> {
        self.clients.iter().filter_map(|(_, client)| client.deadline()).chain(self.accept_due()).min()
    }

    fn has_orphans(&self) -> bool {
        self.clients.orphans() > 0
    }

    fn is_orphan(&self, tag: u64) -> bool {
        self.clients.has_left(Tag::unpack(tag).client)
    }

    fn resized(&mut self, disk: &DiskInfo) {
        self.disk = disk.clone();
        let told = self.clients.iter().try_for_each(|(_, client)| client.resized());
        if let Err(error) = told {
            warn!(self.log, "the guest is not told the disk's new size"; "error" => %error);
        }
    }

    fn gather_ns(&self) -> Option<u64> {
        self.clients.iter().next().map(|_| 0)
    }

    fn close(&mut self) {
        if let (Some(mut listener), Some((registry, _))) = (self.listener.take(), &self.registry) {
            // Closing it does the same; this only comes first.
            let _ = registry.deregister(listener.source());
        }
        self.drop_client("the disk is closed");
    }

    fn memory(&self) -> Vec<Part> {
        vec![Part::each("vhost-user front end", BYTES, 1)]
    }

    fn inspect(&self) -> serde_json::Value {
        let clients: Vec<_> = self.clients.iter().map(|(_, client)| client.inspect()).collect();
        serde_json::json!({
            "type": "vhost-user",
            "socket": self.config.socket,
            "connections": self.connections,
            "turned_away": self.turned_away,
            "orphans": self.clients.orphans(),
            "clients": clients,
        })
    }
}

impl Drop for VhostUser {
    fn drop(&mut self) {
        self.close();
    }
}
