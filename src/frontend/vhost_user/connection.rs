//! One front end: what it says, and what becomes of its rings.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use mio::unix::SourceFd;
use mio::{Registry, Token};
use serde_json::json;
use slog::{Logger, info, warn};
use zerocopy::IntoBytes;

use super::vring::Vring;
use super::wire::{
    self, ConfigRange, Input, MemoryRegion, Message, NO_FD, RingAddresses, RingState, protocol, request,
};
use super::{SEGMENTS, files};
use crate::frontend::virtio::guest::Regions;
use crate::frontend::virtio::queue::{Bounces, Client};
use crate::frontend::virtio::request::{Negotiated, SERIAL};
use crate::frontend::virtio::{self, CONFIG_WRITEBACK, feature};
use crate::frontend::{DiskInfo, Intake};
use crate::job::Apart;
use crate::log::Limiter;
use crate::request::Request;
use crate::stats::now;

/// Memory regions at a time. One message has as many at most.
const REGIONS_MAX: usize = 32;
/// Messages that are answered at a time: one who talks without end must not hold up the main loop.
const MESSAGES_AT_A_TIME: usize = 64;

/// What is the same for all connections.
pub(super) struct Shared<'a> {
    pub(super) disk: &'a DiskInfo,
    pub(super) registry: &'a Registry,
    pub(super) log: &'a Logger,
}

/// What a request's tag says.
pub(super) struct Tag {
    pub(super) client: usize,
    ring: usize,
    head: u16,
}

impl Tag {
    pub(super) fn unpack(tag: u64) -> Tag {
        Tag { client: (tag >> 32) as usize, ring: usize::from((tag >> 16) as u16), head: tag as u16 }
    }
}

/// What a message makes of the next one's turn.
enum Reply {
    /// What comes next.
    None,
    Bytes(Vec<u8>),
    /// Nothing more is heard until a ring, or each, is stopped.
    When(Stops),
}

/// What waits for rings to be stopped.
#[derive(Clone, Copy)]
enum Stops {
    /// GET_VRING_BASE.
    One(usize),
    /// RESET_DEVICE; whether its front end wants to hear of it.
    All { need_reply: bool },
}

/// A front end.
pub(super) struct Connection {
    pub(super) number: u64,
    socket: OwnedFd,
    /// Its socket's, and behind it its rings' kicks.
    token: usize,
    input: Input,
    /// There may be more to read.
    readable: bool,
    stops: Option<Stops>,
    regions: Regions,
    bounces: Bounces,
    rings: Box<[Vring]>,
    acked: u64,
    protocol: u64,
    status: u8,
    writeback: bool,
    /// For our messages: one, or none.
    back_channel: Vec<OwnedFd>,
    serial: [u8; SERIAL],
    /// The ring that is asked first, in this turn: where slots are short, none must get them all.
    first: usize,
    limiter: Limiter,
}

impl Connection {
    pub(super) fn new(
        number: u64,
        socket: OwnedFd,
        token: usize,
        rings: usize,
        serial: [u8; SERIAL],
    ) -> io::Result<Connection> {
        Ok(Connection {
            number,
            socket,
            token,
            input: Input::default(),
            readable: false,
            stops: None,
            regions: Regions::default(),
            bounces: Bounces::new(SEGMENTS)?,
            rings: (0..rings).map(|_| Vring::default()).collect(),
            acked: 0,
            protocol: 0,
            status: 0,
            writeback: true,
            back_channel: Vec::new(),
            serial,
            first: 0,
            limiter: Limiter::default(),
        })
    }

    /// The socket has something.
    pub(super) fn readable(&mut self) {
        self.readable = true;
    }

    /// Whether something that was said may still have to be heard.
    pub(super) fn has_more(&self) -> bool {
        self.readable && self.stops.is_none()
    }

    /// Hears what was said, and does it. An error is the connection's end.
    pub(super) fn hear(&mut self, shared: &Shared) -> io::Result<()> {
        self.stop(shared)?;
        for _ in 0..MESSAGES_AT_A_TIME {
            if !self.has_more() {
                return Ok(());
            }
            let Some(message) = self.input.next(&self.socket)? else {
                self.readable = false;
                return Ok(());
            };
            self.take(message, shared)?;
            self.stop(shared)?;
        }
        Ok(())
    }

    fn take(&mut self, mut message: Message, shared: &Shared) -> io::Result<()> {
        message.need_reply &= self.protocol & protocol::REPLY_ACK != 0;
        let (number, need_reply) = (message.request, message.need_reply);
        let done = self.done(&mut message, shared);
        if !message.fds.is_empty() {
            // Nobody's, and of files whose close(2) may wait.
            drop(Apart::from(message.fds));
        }
        match done {
            Ok(Reply::Bytes(bytes)) => wire::reply(&self.socket, number, &bytes),
            Ok(Reply::When(stops)) => {
                self.stops = Some(stops);
                Ok(())
            }
            Ok(Reply::None) if need_reply => wire::reply(&self.socket, number, 0_u64.as_bytes()),
            Ok(Reply::None) => Ok(()),
            // Who asks can be told, and goes on or not.
            Err(why) if need_reply => {
                if let Some(suppressed) = self.limiter.allow(now()) {
                    warn!(shared.log, "a message of a vhost-user front end is refused"; "client" => self.number, "why" => why,
                        "suppressed_before" => suppressed);
                }
                wire::reply(&self.socket, number, 1_u64.as_bytes())
            }
            Err(why) => Err(io::Error::other(why)),
        }
    }

    fn done(&mut self, message: &mut Message, shared: &Shared) -> Result<Reply, String> {
        use request::*;
        let with_fds = [
            SET_MEM_TABLE,
            ADD_MEM_REG,
            REM_MEM_REG,
            SET_VRING_KICK,
            SET_VRING_CALL,
            SET_VRING_ERR,
            SET_BACKEND_REQ_FD,
        ];
        if !message.fds.is_empty() && !with_fds.contains(&message.request) {
            return Err(format!("message {} comes with descriptors", message.request));
        }
        let word = |value: u64| Ok(Reply::Bytes(value.as_bytes().to_vec()));
        let rings = self.rings.len() as u16;
        match message.request {
            GET_FEATURES => return word(virtio::features(shared.disk, rings) | wire::PROTOCOL_FEATURES),
            SET_FEATURES => self.set_features(message.body()?, shared)?,
            GET_PROTOCOL_FEATURES => return word(protocol::ALL),
            SET_PROTOCOL_FEATURES => {
                let wanted: u64 = message.body()?;
                if wanted & !protocol::ALL != 0 {
                    return Err(format!("protocol features {wanted:#x}, which are not offered"));
                }
                self.protocol = wanted;
            }
            GET_QUEUE_NUM => return word(rings.into()),
            SET_OWNER => {}
            // Obsolete, and of no effect.
            RESET_OWNER => {}
            SET_MEM_TABLE => self.set_memory(message, shared)?,
            GET_MAX_MEM_SLOTS => return word(REGIONS_MAX as u64),
            ADD_MEM_REG => {
                self.add_region(&region_of(&message.body)?, message.fd()?, shared)?;
                message.fds.clear();
            }
            REM_MEM_REG => self.remove_region(&region_of(&message.body)?)?,
            SET_VRING_NUM | SET_VRING_BASE | SET_VRING_ENABLE | SET_VRING_ADDR => self.set_ring(message)?,
            GET_VRING_BASE => {
                let RingState { ring, .. } = message.body()?;
                self.ring(ring)?.begin_stopping();
                return Ok(Reply::When(Stops::One(ring as usize)));
            }
            SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => self.set_notification(message, shared.registry)?,
            SET_BACKEND_REQ_FD => {
                message.fd()?;
                // What it replaces goes the way of what is nobody's.
                std::mem::swap(&mut self.back_channel, &mut message.fds);
            }
            GET_CONFIG => return self.config(&message.body, shared.disk),
            SET_CONFIG => self.set_config(&message.body)?,
            RESET_DEVICE => {
                self.rings.iter_mut().for_each(Vring::begin_stopping);
                return Ok(Reply::When(Stops::All { need_reply: message.need_reply }));
            }
            SET_STATUS => {
                let status: u64 = message.body()?;
                self.status = status as u8;
            }
            GET_STATUS => return word(self.status.into()),
            unknown => return Err(format!("message {unknown} is not known here")),
        }
        self.start_rings()?;
        Ok(Reply::None)
    }

    /// Answers who waits for rings to be stopped, if they are.
    fn stop(&mut self, shared: &Shared) -> io::Result<()> {
        if !self.has_stopped() {
            return Ok(());
        }
        match self.stops.take() {
            None => Ok(()),
            Some(Stops::One(ring)) => {
                let base = self.rings[ring].stop(shared.registry);
                let state = RingState { ring: ring as u32, value: base.into() };
                wire::reply(&self.socket, request::GET_VRING_BASE, state.as_bytes())
            }
            Some(Stops::All { need_reply }) => {
                for ring in &mut self.rings {
                    ring.stop(shared.registry);
                    ring.enabled = false;
                }
                (self.status, self.writeback) = (0, true);
                if need_reply { wire::reply(&self.socket, request::RESET_DEVICE, 0_u64.as_bytes()) } else { Ok(()) }
            }
        }
    }

    fn set_features(&mut self, wanted: u64, shared: &Shared) -> Result<(), String> {
        let offered = virtio::features(shared.disk, self.rings.len() as u16) | wire::PROTOCOL_FEATURES;
        if wanted & !offered != 0 {
            return Err(format!("features {wanted:#x}, of which {:#x} are not offered", wanted & !offered));
        }
        self.acked = wanted;
        // Without the protocol's features there is no message that enables a ring.
        if wanted & wire::PROTOCOL_FEATURES == 0 {
            self.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
        Ok(())
    }

    fn ring(&mut self, index: u32) -> Result<&mut Vring, String> {
        let count = self.rings.len();
        self.rings.get_mut(index as usize).ok_or_else(|| format!("ring {index} of {count}"))
    }

    fn set_ring(&mut self, message: &Message) -> Result<(), String> {
        if message.request == request::SET_VRING_ADDR {
            let addresses: RingAddresses = message.body()?;
            self.ring(addresses.ring)?.set_addresses(addresses);
            return Ok(());
        }
        let RingState { ring, value } = message.body()?;
        let ring = self.ring(ring)?;
        match message.request {
            request::SET_VRING_NUM => ring.set_size(value),
            request::SET_VRING_BASE => ring.set_base(value),
            _ => {
                ring.enabled = value != 0;
                Ok(())
            }
        }
    }

    fn set_notification(&mut self, message: &mut Message, registry: &Registry) -> Result<(), String> {
        let value: u64 = message.body()?;
        if value & NO_FD == 0 {
            files::check_eventfd(message.fd()?)?;
        } else if !message.fds.is_empty() {
            return Err(format!("message {} comes with descriptors that it says it has not", message.request));
        }
        let fd = message.fds.pop();
        let index = (value & 0xff) as u32;
        let token = self.token + 1 + index as usize;
        let ring = self.ring(index)?;
        match message.request {
            request::SET_VRING_KICK => ring.set_kick(fd, token, registry),
            request::SET_VRING_CALL => {
                ring.set_call(fd);
                Ok(())
            }
            _ => {
                ring.set_error(fd);
                Ok(())
            }
        }
    }

    fn start_rings(&mut self) -> Result<(), String> {
        self.rings.iter_mut().try_for_each(|ring| ring.start(&self.regions, self.acked))
    }

    fn set_memory(&mut self, message: &mut Message, shared: &Shared) -> Result<(), String> {
        let (Some(count), table) =
            (message.body.first_chunk().map(|count| u32::from_le_bytes(*count)), message.body.get(8..))
        else {
            return Err("a memory table without a length".into());
        };
        let fds = &message.fds;
        let table: Vec<_> = table.unwrap_or_default().chunks(size_of::<MemoryRegion>()).collect();
        if fds.len() != count as usize || table.len() != fds.len() || fds.len() > REGIONS_MAX {
            let (regions, fds) = (table.len(), fds.len());
            return Err(format!("a memory table of {count} regions has {regions}, and {fds} descriptors"));
        }
        self.forget_memory();
        for (region, fd) in table.into_iter().zip(fds) {
            self.add_region(&region_of(region)?, fd, shared)?;
        }
        message.fds.clear();
        Ok(())
    }

    fn add_region(&mut self, wanted: &MemoryRegion, fd: &OwnedFd, shared: &Shared) -> Result<(), String> {
        if self.regions.count() == REGIONS_MAX {
            return Err(format!("more than {REGIONS_MAX} memory regions"));
        }
        let mapped = files::map(wanted, fd)?;
        if mapped.may_shrink
            && let Some(suppressed) = self.limiter.allow(now())
        {
            info!(shared.log, "the guest's memory is not sealed: should its owner make it shorter, this process dies";
                "client" => self.number, "remedy" => "memory-backend-memfd, which QEMU seals", "suppressed_before" => suppressed);
        }
        let added = self.regions.add(mapped.region);
        added.map_err(|_| format!("a memory region at {:#x} overlaps another one", wanted.guest))
    }

    fn remove_region(&mut self, wanted: &MemoryRegion) -> Result<(), String> {
        let removed = self.regions.remove(wanted.guest, wanted.len, wanted.user);
        let removed =
            removed.ok_or_else(|| format!("no memory region at {:#x} of {:#x} bytes", wanted.guest, wanted.len))?;
        // What is large takes long to unmap: not here.
        drop(Apart::from(removed));
        Ok(())
    }

    /// As with one region.
    fn forget_memory(&mut self) {
        drop(Apart::from(std::mem::take(&mut self.regions)));
    }

    fn config(&self, body: &[u8], disk: &DiskInfo) -> Result<Reply, String> {
        let space = virtio::config(disk, self.rings.len() as u16, self.writeback);
        let (range, rest) = config_range(body)?;
        let (offset, len) = (range.offset as usize, range.len as usize);
        // Beyond the end there are zeros: QEMU asks for all that it knows of.
        if len > 256 || offset > 256 || rest.len() > 256 {
            return Err(format!("{len} bytes at {offset} of the configuration space"));
        }
        let bytes = (offset..offset + len).map(|at| space.get(at).copied().unwrap_or(0));
        Ok(Reply::Bytes(range.as_bytes().iter().copied().chain(bytes).collect()))
    }

    fn set_config(&mut self, body: &[u8]) -> Result<(), String> {
        let (range, bytes) = config_range(body)?;
        match (range.offset as usize, bytes) {
            (CONFIG_WRITEBACK, [value]) => self.writeback = *value != 0,
            (offset, _) => {
                return Err(format!(
                    "{} bytes at {offset} of the configuration space are not for writing",
                    bytes.len()
                ));
            }
        }
        Ok(())
    }

    /// Takes what is in the rings.
    pub(super) fn pull(&mut self, intake: &mut Intake, index: u64, shared: &Shared) {
        let has = |feature: u64| self.acked & feature != 0;
        let negotiated = Negotiated {
            // Without FLUSH a driver has no way to say what must be durable.
            write_through: !has(feature::FLUSH) || !self.writeback,
            discard: has(feature::DISCARD),
            write_zeroes: has(feature::WRITE_ZEROES),
        };
        let count = self.rings.len();
        self.first = (self.first + 1) % count;
        for number in (self.first..count).chain(0..self.first) {
            let ring = &mut self.rings[number];
            let mut client =
                Client { regions: &self.regions, bounces: &mut self.bounces, negotiated, serial: &self.serial };
            let tag = index << 32 | (number as u64) << 16;
            let source = (self.token + 1 + number, shared.registry);
            if let Err(why) = ring.pull(intake, &mut client, tag, source) {
                warn!(shared.log, "a virtio ring is broken, and not served until it is set up anew";
                    "client" => self.number, "ring" => number, "why" => why);
            }
        }
    }

    pub(super) fn answer(&mut self, tag: &Tag, request: &Request) {
        if let Some(queue) = self.rings.get_mut(tag.ring).and_then(Vring::queue) {
            queue.answer(tag.head, request, &mut self.bounces);
        }
    }

    pub(super) fn publish(&mut self) {
        self.rings.iter_mut().for_each(Vring::publish);
    }

    /// Whether rings are stopped by now that somebody waits for.
    pub(super) fn has_stopped(&self) -> bool {
        match self.stops {
            None => false,
            Some(Stops::One(ring)) => self.rings[ring].in_flight() == 0,
            Some(Stops::All { .. }) => self.in_flight() == 0,
        }
    }

    pub(super) fn kicked(&mut self, ring: usize) {
        if let Some(ring) = self.rings.get_mut(ring) {
            ring.kicked();
        }
    }

    pub(super) fn ready(&self) -> bool {
        self.rings.iter().any(|ring| ring.ready(self.bounces.is_short()))
    }

    pub(super) fn arm(&mut self) -> bool {
        let short = self.bounces.is_short();
        self.rings.iter_mut().fold(false, |ready, ring| ring.arm(short) | ready)
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        self.rings.iter().filter_map(Vring::deadline).min()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.rings.iter().map(Vring::in_flight).sum()
    }

    /// The disk has another size.
    pub(super) fn resized(&self) -> io::Result<()> {
        self.back_channel.iter().try_for_each(wire::tell_config_changed)
    }

    /// It leaves: its memory and its descriptors are let go by a thread that may wait.
    pub(super) fn leave(self, registry: &Registry) {
        self.rings.iter().for_each(|ring| ring.deregister(registry));
        let _ = registry.deregister(&mut SourceFd(&self.socket.as_raw_fd()));
        drop(Apart::from(self));
    }

    /// Whether nothing is heard of it before a ring has stopped.
    pub(super) fn is_deaf(&self) -> bool {
        self.stops.is_some()
    }

    pub(super) fn register(&self, registry: &Registry) -> io::Result<()> {
        registry.register(&mut SourceFd(&self.socket.as_raw_fd()), Token(self.token), mio::Interest::READABLE)
    }

    pub(super) fn inspect(&self) -> serde_json::Value {
        let regions: Vec<_> =
            self.regions.iter().map(|region| json!({ "guest": region.guest, "bytes": region.len })).collect();
        json!({
            "client": self.number,
            "features": format!("{:#x}", self.acked),
            "protocol_features": format!("{:#x}", self.protocol),
            "status": self.status,
            "write_cache": self.writeback,
            "regions": regions,
            "stopping": self.stops.is_some(),
            "bounced": self.bounces.count(),
            "queues": self.rings.iter().map(Vring::inspect).collect::<Vec<_>>(),
        })
    }
}

/// A region as ADD_MEM_REG has it: behind eight bytes of padding. A table's are bare.
fn region_of(bytes: &[u8]) -> Result<MemoryRegion, String> {
    let bare = bytes.get(8..).filter(|rest| rest.len() == size_of::<MemoryRegion>()).unwrap_or(bytes);
    zerocopy::FromBytes::read_from_bytes(bare).map_err(|_| format!("a memory region of {} bytes", bytes.len()))
}

fn config_range(body: &[u8]) -> Result<(ConfigRange, &[u8]), String> {
    let (range, rest) = <ConfigRange as zerocopy::FromBytes>::read_from_prefix(body)
        .map_err(|_| format!("a range of the configuration space in {} bytes", body.len()))?;
    if rest.len() != range.len as usize {
        return Err(format!("{} bytes for {} of the configuration space", rest.len(), range.len));
    }
    Ok((range, rest))
}
