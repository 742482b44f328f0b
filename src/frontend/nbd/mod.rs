//! NBD server: the disk for clients of the
//! [NBD protocol](https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md), over a Unix socket or TCP on
//! this host.
//!
//! `negotiate` is the handshake. Then `connection` takes a client's bytes apart into commands, hands these in as
//! requests whose data is in the client's `arena`, and `transmit` sends the replies of a turn together.

mod command;
mod connection;
mod listen;
pub mod negotiate;
mod status;
mod transmit;
pub mod wire;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use mio::event::Event;
use mio::{Interest, Registry, Token};
use slog::{Logger, debug, info, warn};

use self::connection::{Connection, Socket};
use self::listen::{Listener, Style};
use self::negotiate::Export;
use super::seats::{Full, Seats};
use super::{DiskInfo, Frontend, Intake};
use crate::log::Limiter;
use crate::memory::{self, Part};
use crate::request::Request;
use crate::stats::now;

/// How long a client may take for the handshake, ns.
const HANDSHAKE: u64 = 10_000_000_000;
/// How long to leave clients waiting when there are no descriptors or memory for them, ns.
const ACCEPT_AGAIN: u64 = 100_000_000;
/// Clients accepted in one turn.
const ACCEPTS_A_TURN: usize = 16;
/// Tokens below those of the clients: one for each listener.
const LISTENERS: usize = 3;

/// What is served where.
#[derive(Clone, Debug)]
pub struct Config {
    /// Unix socket to listen on.
    pub socket: Option<PathBuf>,
    /// Unix socket for clients that do not negotiate.
    pub old_socket: Option<PathBuf>,
    /// TCP address to listen on, which must be a loopback one.
    pub listen: Option<SocketAddr>,
    /// Name of the export, at most 4096 bytes.
    pub export: String,
    /// Clients at the same time.
    pub max_connections: usize,
    /// Keep a client's memory resident.
    pub lock_memory: bool,
}

/// The server.
pub struct Nbd {
    log: Logger,
    export: Arc<Export>,
    listeners: Vec<(Listener, Style)>,
    lock_memory: bool,
    /// A listener has clients waiting.
    acceptable: bool,
    /// Not before this time, ns.
    accept_at: u64,
    seats: Seats<Box<Connection>>,
    /// The seat that is pulled first: the one after that which had the last request taken.
    first: usize,
    registry: Option<(Registry, usize)>,
    accepted: u64,
    refused: u64,
    /// For what clients do.
    limiter: Limiter,
    /// For those who are not let in: of them there must be a line, whatever the others do.
    refusals: Limiter,
}

/// A request's mark: the seat of its client, and the part.
fn tag(seat: usize, part: u16) -> u64 {
    (seat as u64) << 16 | u64::from(part)
}

fn untag(tag: u64) -> (usize, u16) {
    ((tag >> 16) as usize, tag as u16)
}

impl Nbd {
    /// Listens where `config` says.
    pub fn bind(config: &Config, disk: DiskInfo, log: Logger) -> io::Result<Nbd> {
        if config.export.len() > wire::MAX_STRING as usize || config.max_connections > usize::from(u16::MAX) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "export name too long or too many connections"));
        }
        let mut listeners = Vec::new();
        if let Some(path) = &config.socket {
            listeners.push((Listener::unix(path)?, Style::New));
        }
        if let Some(path) = &config.old_socket {
            listeners.push((Listener::unix(path)?, Style::Old));
        }
        if let Some(address) = config.listen {
            listeners.push((Listener::tcp(address)?, Style::New));
        }
        for (listener, _) in &listeners {
            info!(log, "NBD server listens"; "address" => listener.address(), "export" => &config.export);
        }
        Ok(Nbd {
            log,
            export: Arc::new(Export { name: config.export.clone(), disk }),
            listeners,
            lock_memory: config.lock_memory,
            acceptable: true,
            accept_at: 0,
            seats: Seats::new(config.max_connections),
            first: 0,
            registry: None,
            accepted: 0,
            refused: 0,
            limiter: Limiter::default(),
            refusals: Limiter::default(),
        })
    }

    /// The most tokens that it uses.
    pub fn tokens(&self) -> usize {
        LISTENERS + self.seats.count()
    }

    fn accept(&mut self) {
        if !self.acceptable || self.must_wait() || now() < self.accept_at {
            return;
        }
        (self.acceptable, self.accept_at) = (false, 0);
        for index in 0..self.listeners.len() {
            self.acceptable |= self.accept_from(index);
        }
    }

    /// Whether the next client is not refused but waits to be accepted.
    fn must_wait(&self) -> bool {
        self.seats.free() == Err(Full::Orphans)
    }

    /// Accepts from one listener. True: there may be more.
    fn accept_from(&mut self, index: usize) -> bool {
        for _ in 0..ACCEPTS_A_TURN {
            if self.must_wait() {
                return true;
            }
            let (listener, style) = &self.listeners[index];
            match listener.accept() {
                Ok(socket) => self.seat(socket, *style),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return false,
                    // This client is gone already.
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => {
                        if let Some(suppressed) = self.refusals.allow(now()) {
                            warn!(self.log, "NBD clients can't be accepted for now"; "error" => %error,
                                "suppressed_before" => suppressed);
                        }
                        self.accept_at = now() + ACCEPT_AGAIN;
                        return true;
                    }
                },
            }
        }
        true
    }

    /// Gives a client a place, or hangs up.
    fn seat(&mut self, socket: Socket, style: Style) {
        let Some((registry, base)) = &self.registry else { return };
        let Some(index) = self.seats.first_free() else {
            self.refused += 1;
            if let Some(suppressed) = self.refusals.allow(now()) {
                warn!(self.log, "an NBD client is refused, there are too many"; "refused" => self.refused,
                    "suppressed_before" => suppressed);
            }
            return;
        };
        let token = Token(base + LISTENERS + index);
        let connection = memory::admit(|| {
            let mut connection = Box::new(Connection::new(socket, style, token, tag(index, 0), &self.export)?);
            connection.register(registry)?;
            Ok(connection)
        });
        match connection {
            Ok(connection) => {
                if self.lock_memory {
                    memory::lock_of_client(connection.memory());
                }
                self.seats.seat(index, connection);
                self.accepted += 1;
                debug!(self.log, "an NBD client connects"; "client" => index);
            }
            Err(error) => {
                self.refused += 1;
                if let Some(suppressed) = self.refusals.allow(now()) {
                    warn!(self.log, "an NBD client is refused"; "error" => %error, "suppressed_before" => suppressed);
                }
            }
        }
    }

    /// Frees the places of those with whom it is over.
    fn clear(&mut self) {
        let Some((registry, _)) = &self.registry else { return };
        for index in 0..self.seats.count() {
            if !self.seats.get_mut(index).is_some_and(|connection| connection.is_over()) {
                continue;
            }
            let Some(mut connection) = self.seats.leave(index, |connection| connection.in_flight()) else { continue };
            connection.deregister(registry);
            match connection.failure() {
                Some(why) => {
                    if let Some(suppressed) = self.limiter.allow(now()) {
                        info!(self.log, "an NBD client is disconnected"; "client" => index, "reason" => why,
                            "suppressed_before" => suppressed);
                    }
                }
                None => debug!(self.log, "an NBD client leaves"; "client" => index),
            }
        }
    }

    fn connections(&self) -> impl Iterator<Item = &Connection> {
        self.seats.iter().map(|(_, connection)| &**connection)
    }

    fn connections_mut(&mut self) -> impl Iterator<Item = &mut Connection> {
        self.seats.iter_mut().map(|(_, connection)| &mut **connection)
    }

    /// Hangs up on those who do not come to the point.
    fn expire(&mut self) {
        if self.connections().any(Connection::is_negotiating) {
            let now = now();
            let late = |c: &&mut Connection| c.is_negotiating() && now >= c.born + HANDSHAKE;
            self.connections_mut().filter(late).for_each(|c| c.kill("its handshake takes too long"));
        }
    }
}

impl Frontend for Nbd {
    fn register(&mut self, registry: Registry, base: usize) -> io::Result<()> {
        for (index, (listener, _)) in self.listeners.iter_mut().enumerate() {
            registry.register(listener.source(), Token(base + index), Interest::READABLE)?;
        }
        self.registry = Some((registry, base));
        Ok(())
    }

    fn event(&mut self, index: usize, event: &Event) {
        match index.checked_sub(LISTENERS) {
            None => self.acceptable = true,
            Some(seat) => {
                if let Some(connection) = self.seats.get_mut(seat) {
                    connection.event(event);
                }
            }
        }
    }

    fn pull(&mut self, intake: &mut Intake) {
        self.accept();
        self.expire();
        let seats = self.seats.count();
        for index in (self.first..seats).chain(0..self.first) {
            let Some(connection) = self.seats.get_mut(index) else { continue };
            let room = intake.room();
            connection.pull(intake);
            if intake.room() < room {
                self.first = (index + 1) % seats;
            }
        }
    }

    fn answer(&mut self, request: &Request) {
        let (seat, part) = untag(request.tag);
        if let Some(connection) = self.seats.ended(seat) {
            connection.answer(part, request.result());
        }
    }

    fn publish(&mut self) {
        if let Some((registry, _)) = &self.registry {
            for (_, connection) in self.seats.iter_mut() {
                connection.publish(registry);
            }
        }
        self.clear();
    }

    fn in_memory(&self) -> bool {
        false
    }

    fn ready(&self) -> bool {
        (self.acceptable && !self.listeners.is_empty() && self.accept_at == 0 && !self.must_wait())
            || self.connections().any(Connection::is_ready)
    }

    fn arm(&mut self) -> bool {
        self.ready()
    }

    fn pull_deadline(&self) -> Option<u64> {
        let handshake = self.connections().filter(|c| c.is_negotiating()).map(|c| c.born + HANDSHAKE).min();
        let accept = (self.acceptable && self.accept_at > 0).then_some(self.accept_at);
        [handshake, accept].into_iter().flatten().min()
    }

    fn has_orphans(&self) -> bool {
        self.seats.orphans() > 0
    }

    fn is_orphan(&self, tag: u64) -> bool {
        self.seats.has_left(untag(tag).0)
    }

    fn resized(&mut self, disk: &DiskInfo) {
        // Clients that are connected keep what they were told: the protocol has no way to say more.
        self.export = Arc::new(Export { name: self.export.name.clone(), disk: disk.clone() });
    }

    fn gather_ns(&self) -> Option<u64> {
        self.connections().next().map(|_| 0)
    }

    fn close(&mut self) {
        if let Some((registry, _)) = &self.registry {
            for mut listener in self.listeners.drain(..) {
                // Closing it does the same; this only comes first.
                let _ = registry.deregister(listener.0.source());
            }
        }
        self.listeners.clear();
        self.connections_mut().for_each(Connection::leave);
        self.publish();
    }

    fn memory(&self) -> Vec<Part> {
        vec![Part::each("NBD client", connection::BYTES, self.seats.count())]
    }

    fn inspect(&self) -> serde_json::Value {
        let clients = self.seats.iter().map(|(index, connection)| {
            let mut client = connection.inspect();
            client["client"] = index.into();
            client
        });
        let clients: Vec<_> = clients.collect();
        serde_json::json!({
            "type": "nbd",
            "export": self.export.name,
            "listen": self.listeners.iter().map(|(listener, _)| listener.address()).collect::<Vec<_>>(),
            "accepted": self.accepted,
            "refused": self.refused,
            "orphans": self.seats.orphans(),
            "clients": clients,
        })
    }
}

#[cfg(test)]
mod tests;
