//! The handshake with a guest, through XenStore: reads both sides' nodes, does what [`decide`] says, writes ours.
//!
//! It is one asynchronous function that the main loop polls when a reply or a watch event has come. Every node of ours
//! is written in a transaction that first finds the backend's directory to be the one that we looked at: a directory
//! that the toolstack has removed is not brought back to life by a late write.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use nix::errno::Errno;
use slog::{Logger, info, warn};

use super::handshake::{Act, Back, Seen, Stage, XenbusState, decide};
use super::ring::RingAt;
use super::vbd::Connection;
use crate::frontend::DiskInfo;
use crate::frontend::blkif::wire::Abi;
use crate::stats::now;
use crate::sys::gntdev::domid_t;
use crate::xenstore::{Store, Tx};

/// After an error of XenStore, and before a directory that nobody wants is removed; ns.
const PAUSE: u64 = 1_000_000_000;

/// `VDISK_CDROM`, `VDISK_REMOVABLE` and `VDISK_READONLY` of the node `info`.
const VDISK_CDROM: u32 = 1;
const VDISK_REMOVABLE: u32 = 2;
pub(crate) const VDISK_READONLY: u32 = 4;

/// A node of ours: a tapdisk that was told to end has answered all that it took from the rings, and another one may go
/// on with them.
const DRAINED: &str = "tapdisk-drained";

/// What is served, and to whom.
#[derive(Clone, Debug)]
pub struct Config {
    /// The guest.
    pub domain: domid_t,
    /// The device's number in the guest, such as 51712 for xvda.
    pub device: u32,
    /// The backend's kind, a directory's name: "vbd3", or "vbd".
    pub backend: String,
    /// The process ends with the device.
    pub exit: bool,
    /// Nothing is offered before `hotplug-status` says "connected".
    pub wait_for_hotplug: bool,
    /// log2 of the most pages of a ring.
    pub max_ring_page_order: u32,
    /// The most rings.
    pub max_queues: u32,
    /// The most segments of an indirect request.
    pub max_indirect_segments: u32,
}

/// What the handshake steers: the vbd, and what the main loop wants of the handshake.
pub trait Backend {
    /// Serves a guest's rings. The text of an error is for the guest's administrator.
    fn connect(&self, connection: &Connection) -> Result<(), String>;
    /// Serves them no more.
    fn disconnect(&self);
    /// Requests of a guest that was let go are not finished.
    fn busy(&self) -> bool;
    /// The disk as it is now.
    fn disk(&self) -> DiskInfo;
    /// Why a guest had to be let go, once.
    fn take_broken(&self) -> Option<String>;
    /// Whether [`take_broken`](Self::take_broken) has something, the disk's size has changed, or it is to stop.
    fn wants(&self) -> bool;
    /// The disk's size has changed since this was asked.
    fn take_resized(&self) -> bool;
    /// The process is about to end.
    fn stopping(&self) -> bool;
    /// The handshake wants to go on at that time, ns of [`now`], though nothing happens.
    fn wake_at(&self, at: Option<u64>);
}

/// How a handshake has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The device is gone, and the process is to end with it.
    Gone,
    /// As it was told to.
    Stopped,
    /// The connection to XenStore is lost. Another handshake can go on from here.
    Lost(Stage),
}

/// What was looked at, beside what [`decide`] has to know.
struct Look {
    seen: Seen,
    read_only: bool,
    info: u32,
    drained: bool,
}

/// A number as XenStore has it: decimal digits.
pub fn number(value: &[u8]) -> Option<u32> {
    let digits = (1..=10).contains(&value.len()) && value.iter().all(u8::is_ascii_digit);
    digits.then(|| std::str::from_utf8(value).ok()?.parse().ok())?
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(&value[..value.len().min(64)]).escape_debug().to_string()
}

/// A node that may be missing.
fn optional(read: Result<Vec<u8>, Errno>) -> Result<Option<Vec<u8>>, Errno> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// The handshake for one device.
pub struct Handshake<B: Backend> {
    store: Rc<Store>,
    backend: Rc<B>,
    config: Config,
    /// The backend's directory. Relative: that of the domain that this runs in.
    directory: String,
    /// The frontend's directory, as the backend's names it, and watched.
    front: Option<String>,
    stage: Stage,
    /// What the frontend published when it was connected, or refused.
    rings: Option<Result<(Abi, Vec<RingAt>), String>>,
    /// The device has been there.
    began: bool,
    /// Since when nobody has wanted the device, ns.
    unwanted_since: Option<u64>,
    log: Logger,
}

impl<B: Backend> Handshake<B> {
    /// A handshake at `stage`: that of an earlier one whose connection was lost, or the start.
    pub fn new(store: Rc<Store>, backend: Rc<B>, config: Config, stage: Stage, log: Logger) -> Handshake<B> {
        let directory = format!("backend/{}/{}/{}", config.backend, config.domain, config.device);
        let began = stage != Stage::Start;
        let (front, rings, unwanted_since) = (None, None, None);
        Handshake { store, backend, config, directory, front, stage, rings, began, unwanted_since, log }
    }

    /// Handshakes until the device is gone, or it is told to stop.
    pub async fn run(mut self) -> End {
        // Its first event comes at once.
        let mut watched = self.store.watch(&self.directory, "backend").await;
        loop {
            if self.backend.stopping() {
                self.leave().await;
                return End::Stopped;
            }
            let done = match watched {
                Ok(()) => self.step().await,
                Err(errno) => Err(errno),
            };
            match done {
                Ok(true) => {}
                Ok(false) if self.config.exit && self.began => return End::Gone,
                Ok(false) => self.wait(None).await,
                Err(Errno::ECONNRESET) => return End::Lost(self.stage),
                Err(errno) => {
                    warn!(self.log, "XenStore refuses"; "node" => &self.directory, "errno" => %errno,
                        "remedy" => "tapdisk needs the rights of the backend's domain; it tries again each second");
                    self.pause().await;
                    if watched.is_err() {
                        watched = self.store.watch(&self.directory, "backend").await;
                    }
                }
            }
        }
    }

    /// Looks, and does one thing. False: there is no device.
    async fn step(&mut self) -> Result<bool, Errno> {
        if let Some(why) = self.backend.take_broken() {
            self.fail(&why).await?;
        }
        let look = self.look().await?;
        let act = decide(self.stage, &look.seen);
        if act != Act::Wait {
            self.unwanted_since = None;
        }
        match act {
            Act::Wait => return self.rest(&look).await,
            Act::Forget => {
                self.let_go().await;
                (self.stage, self.rings) = (Stage::Start, None);
                return Ok(look.seen.back.is_some());
            }
            Act::Offer => {
                self.let_go().await;
                self.began = true;
                self.rings = None;
                self.say(XenbusState::InitWait, &self.offers()).await?;
                self.stage = Stage::Waiting;
            }
            Act::Connect { live } => self.connect(&look, live).await?,
            Act::Closing => {
                self.say(XenbusState::Closing, &[]).await?;
                (self.stage, self.began) = (Stage::Closing, true);
            }
            Act::Close => {
                self.let_go().await;
                self.say(XenbusState::Closed, &[]).await?;
                (self.stage, self.began) = (Stage::Closed, true);
            }
        }
        info!(self.log, "handshake"; "did" => ?act, "stage" => ?self.stage);
        Ok(true)
    }

    /// Nothing is to be done until something changes. False: the device is no more.
    async fn rest(&mut self, look: &Look) -> Result<bool, Errno> {
        let Some(back) = look.seen.back else { return Ok(false) };
        if self.backend.take_resized() && self.stage == Stage::Connected {
            // The convention: the frontend looks at the size when the state is written again.
            let sectors = self.backend.disk().sectors();
            info!(self.log, "telling the guest the disk's new size"; "sectors" => sectors);
            self.say(XenbusState::Connected, &[("sectors", sectors.to_string())]).await?;
            return Ok(true);
        }
        let unwanted = self.stage == Stage::Closed && (look.seen.front.is_none() || !back.online);
        if !unwanted {
            self.wait(None).await;
            return Ok(true);
        }
        // The toolstack has seen our Closed by now, and removes the directory if it lives.
        let until = *self.unwanted_since.get_or_insert_with(now) + PAUSE;
        if now() < until {
            self.wait(Some(until)).await;
            return Ok(true);
        }
        if look.seen.front.is_none() {
            info!(self.log, "removing the backend's directory: the guest is gone"; "node" => &self.directory);
            self.remove().await?;
        }
        if !self.config.exit {
            self.wait(None).await;
        }
        Ok(!self.config.exit)
    }

    /// Waits for a change, or something that the main loop wants, or a time.
    async fn wait(&self, until: Option<u64>) {
        self.backend.wake_at(until);
        let mut fired = pin!(self.store.wait_fired());
        poll_fn(|context| {
            let woken = self.backend.wants() || until.is_some_and(|until| now() >= until);
            if woken || fired.as_mut().poll(context).is_ready() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        self.store.fired();
        self.backend.wake_at(None);
    }

    /// Waits for a time, whatever changes.
    async fn pause(&self) {
        let until = now() + PAUSE;
        self.backend.wake_at(Some(until));
        poll_fn(|_| if self.backend.stopping() || now() >= until { Poll::Ready(()) } else { Poll::Pending }).await;
        self.backend.wake_at(None);
    }

    /// Unmaps a guest's rings, and waits until its last request is finished: what comes next must not meet its writes.
    async fn let_go(&self) {
        self.backend.disconnect();
        poll_fn(|_| {
            let wait = self.backend.busy() && !self.backend.stopping();
            if wait { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
    }

    /// Removes the backend's directory, and the guest's, if it was the last one in it.
    async fn remove(&self) -> Result<(), Errno> {
        let (guest, _) = self.directory.rsplit_once('/').unwrap_or_default();
        let removed = self.store.transaction(async |tx| {
            optional(self.store.remove(tx, &self.directory).await.map(|()| Vec::new()))?;
            if self.store.directory(tx, guest).await.is_ok_and(|others| others.is_empty()) {
                self.store.remove(tx, guest).await?;
            }
            Ok(Some(()))
        });
        removed.await.map(drop)
    }

    fn node(&self, name: &str) -> String {
        format!("{}/{name}", self.directory)
    }

    /// Reads both sides.
    async fn look(&mut self) -> Result<Look, Errno> {
        let read = |name| self.store.read(Tx::NONE, &self.node(name));
        let (state, online, front) = (read("state"), read("online"), read("frontend"));
        let (hotplug, mode, kind) = (read("hotplug-status"), read("mode"), read("device-type"));
        let (removable, drained) = (read("removable"), read(DRAINED));
        let (state, online, front) = (optional(state.await)?, optional(online.await)?, optional(front.await)?);
        let (hotplug, mode, kind) = (optional(hotplug.await)?, optional(mode.await)?, optional(kind.await)?);
        let (removable, drained) = (optional(removable.await)?, optional(drained.await)?);
        let front = front.and_then(|path| String::from_utf8(path).ok());
        self.follow(front.clone()).await?;
        let front_state = match &front {
            None => None,
            Some(front) => optional(self.store.read(Tx::NONE, &format!("{front}/state")).await)?,
        };
        let front_state = front_state.map(|state| XenbusState::parse(&state));
        let is = |value: &Option<Vec<u8>>, text: &[u8]| value.as_deref() == Some(text);
        let back = front.is_some().then(|| Back {
            state: state.map_or(XenbusState::Unknown, |state| XenbusState::parse(&state)),
            online: is(&online, b"1"),
            hotplugged: !self.config.wait_for_hotplug || is(&hotplug, b"connected"),
        });
        let cdrom = is(&kind, b"cdrom");
        let read_only = cdrom || self.backend.disk().read_only || mode.is_some_and(|mode| !mode.starts_with(b"w"));
        let info = if cdrom { VDISK_CDROM } else { 0 }
            | if cdrom || is(&removable, b"1") { VDISK_REMOVABLE } else { 0 }
            | if read_only { VDISK_READONLY } else { 0 };
        let mut seen = Seen { back, front: front_state, new_rings: false };
        if self.rings.is_some() && front_state == Some(XenbusState::Initialised) {
            seen.new_rings = Some(self.read_rings().await?) != self.rings;
        }
        Ok(Look { seen, read_only, info, drained: is(&drained, b"1") })
    }

    /// Watches the frontend that the backend's directory names.
    async fn follow(&mut self, front: Option<String>) -> Result<(), Errno> {
        if front == self.front {
            return Ok(());
        }
        if let Some(old) = self.front.take() {
            // It may be gone.
            let _ = self.store.unwatch(&format!("{old}/state"), "frontend").await;
        }
        if let Some(front) = &front {
            self.store.watch(&format!("{front}/state"), "frontend").await?;
        }
        self.front = front;
        Ok(())
    }

    /// Writes nodes and the state, if the directory is still the one that was looked at.
    async fn say(&self, state: XenbusState, nodes: &[(&str, String)]) -> Result<(), Errno> {
        let (frontend, state) = (self.node("frontend"), (state as u8).to_string());
        let nodes = nodes.iter().map(|(name, value)| (*name, value)).chain([("state", &state)]);
        let nodes: Vec<_> = nodes.map(|(name, value)| (self.node(name), value)).collect();
        let drained = self.node(DRAINED);
        let said = self.store.transaction(async |tx| {
            let there = optional(self.store.read(tx, &frontend).await)?;
            if there.as_deref() != self.front.as_deref().map(str::as_bytes) || there.is_none() {
                return Ok(None);
            }
            let removed = self.store.remove(tx, &drained);
            let written: Vec<_> =
                nodes.iter().map(|(node, value)| self.store.write(tx, node, value.as_bytes())).collect();
            optional(removed.await.map(|()| Vec::new()))?;
            for written in written {
                written.await?;
            }
            Ok(Some(()))
        });
        // If it was not, another look shows what is there now.
        said.await.map(drop)
    }

    /// What a frontend may choose from.
    fn offers(&self) -> Vec<(&'static str, String)> {
        let config = &self.config;
        vec![
            ("max-ring-page-order", config.max_ring_page_order.to_string()),
            ("multi-queue-max-queues", config.max_queues.to_string()),
            ("feature-max-indirect-segments", config.max_indirect_segments.to_string()),
            // What they could save is little for small requests: measured, see the README's comparison.
            ("feature-persistent", "0".into()),
        ]
    }

    /// What a frontend is told of the disk.
    fn details(&self, look: &Look) -> Vec<(&'static str, String)> {
        let disk = self.backend.disk();
        let mut details = vec![
            ("sectors", disk.sectors().to_string()),
            ("sector-size", disk.sector_size.to_string()),
            ("physical-sector-size", disk.physical_sector_size.to_string()),
            ("info", look.info.to_string()),
            // By it xentop finds the statistics in shared memory.
            ("kthread-pid", std::process::id().to_string()),
            ("feature-flush-cache", "1".into()),
            ("feature-barrier", "1".into()),
            ("feature-discard", u8::from(!look.read_only).to_string()),
        ];
        if !look.read_only {
            details.push(("discard-granularity", disk.physical_sector_size.to_string()));
            details.push(("discard-alignment", "0".into()));
            details.push(("discard-secure", "0".into()));
        }
        details
    }

    async fn connect(&mut self, look: &Look, live: bool) -> Result<(), Errno> {
        self.let_go().await;
        let rings = self.read_rings().await?;
        self.rings = Some(rings.clone());
        // A size that changed before now is told now.
        self.backend.take_resized();
        let connected = rings.and_then(|(abi, rings)| {
            info!(self.log, "guest connects"; "domain" => self.config.domain, "device" => self.config.device,
                "queues" => rings.len(), "ring_pages" => rings.first().map_or(0, |ring| ring.grefs.len()),
                "abi" => ?abi, "read_only" => look.read_only, "live" => live);
            let (domain, read_only) = (self.config.domain, look.read_only);
            self.backend.connect(&Connection { domain, abi, rings, read_only, live: live && !look.drained })
        });
        if let Err(why) = connected {
            return self.fail(&why).await;
        }
        self.say(XenbusState::Connected, &self.details(look)).await?;
        (self.stage, self.began) = (Stage::Connected, true);
        Ok(())
    }

    /// The guest can't be served: says why, and Closing.
    async fn fail(&mut self, why: &str) -> Result<(), Errno> {
        warn!(self.log, "guest is not served"; "domain" => self.config.domain, "device" => self.config.device,
            "why" => why);
        self.backend.disconnect();
        (self.stage, self.began) = (Stage::Failed, true);
        self.say(XenbusState::Closing, &[("error", why.to_owned())]).await
    }

    /// Ends with the guest's rings as they are, all that was taken from them answered.
    async fn leave(&self) {
        let connected = matches!(self.stage, Stage::Connected | Stage::Closing);
        self.backend.disconnect();
        if connected && !self.backend.busy() {
            info!(self.log, "leaving the guest's rings to the next tapdisk"; "domain" => self.config.domain);
            let drained = self.node(DRAINED);
            let frontend = self.node("frontend");
            let said = self.store.transaction(async |tx| {
                optional(self.store.read(tx, &frontend).await)?.ok_or(Errno::ENOENT)?;
                self.store.write(tx, &drained, b"1").await.map(Some)
            });
            if let Err(errno) = said.await {
                warn!(self.log, "cannot mark the guest's rings as drained"; "node" => drained, "errno" => %errno);
            }
        }
    }

    /// What the frontend has published. The inner error is its own fault.
    async fn read_rings(&self) -> Result<Result<(Abi, Vec<RingAt>), String>, Errno> {
        let Some(front) = &self.front else { return Ok(Err("there is no frontend".into())) };
        let read = |name: &str| self.store.read(Tx::NONE, &format!("{front}/{name}"));
        let (order, queues, protocol) = (read("ring-page-order"), read("multi-queue-num-queues"), read("protocol"));
        let (order, queues) = (optional(order.await)?, optional(queues.await)?);
        let protocol = optional(protocol.await)?;
        let shape = self.shape(order.as_deref(), queues.as_deref(), protocol.as_deref());
        let (abi, order, queues) = match shape {
            Ok(shape) => shape,
            Err(why) => return Ok(Err(why)),
        };
        let mut rings = Vec::new();
        for queue in 0..queues {
            // With one queue the keys are flat; some frontends have it the other way.
            let numbered = format!("queue-{queue}/");
            let there = optional(read(&format!("{numbered}event-channel")).await)?.is_some();
            let folder = if queues > 1 || there { numbered.as_str() } else { "" };
            let channel = read(&format!("{folder}event-channel"));
            let single = read(&format!("{folder}ring-ref"));
            let pages: Vec<_> = (0..1 << order).map(|page| read(&format!("{folder}ring-ref{page}"))).collect();
            let (channel, single) = (optional(channel.await)?, optional(single.await)?);
            let mut grefs = Vec::new();
            for page in pages {
                grefs.push(optional(page.await)?);
            }
            if order == 0 && single.is_some() {
                grefs = vec![single];
            }
            match ring_at(folder, channel.as_deref(), &grefs) {
                Ok(ring) => rings.push(ring),
                Err(why) => return Ok(Err(why)),
            }
        }
        Ok(Ok((abi, rings)))
    }

    /// Layout, page order and number of the rings.
    fn shape(
        &self,
        order: Option<&[u8]>,
        queues: Option<&[u8]>,
        protocol: Option<&[u8]>,
    ) -> Result<(Abi, u32, u32), String> {
        let Config { max_ring_page_order, max_queues, .. } = self.config;
        let abi = match protocol {
            // blkif.h's default.
            None => Abi::Native,
            Some(b"x86_32-abi") => Abi::X86_32,
            Some(b"x86_64-abi") => Abi::X86_64,
            Some(b"arm-abi") => Abi::Native,
            Some(other) => return Err(format!("protocol \"{}\" is not known", text(other))),
        };
        let in_range = |key, value: Option<&[u8]>, default, min, max| match value {
            None => Ok(default),
            Some(value) => number(value)
                .filter(|number| (min..=max).contains(number))
                .ok_or_else(|| format!("{key} \"{}\" is not from {min} to {max}", text(value))),
        };
        let order = in_range("ring-page-order", order, 0, 0, max_ring_page_order)?;
        let queues = in_range("multi-queue-num-queues", queues, 1, 1, max_queues)?;
        Ok((abi, order, queues))
    }
}

/// One ring, from the values of its nodes.
fn ring_at(folder: &str, channel: Option<&[u8]>, pages: &[Option<Vec<u8>>]) -> Result<RingAt, String> {
    let value = |key: &str, value: Option<&[u8]>| match value {
        None => Err(format!("{folder}{key} is missing")),
        Some(value) => number(value).ok_or_else(|| format!("{folder}{key} \"{}\" is not a number", text(value))),
    };
    let event_channel = value("event-channel", channel)?;
    let grefs = pages.iter().map(|page| value("ring-ref", page.as_deref())).collect::<Result<Vec<_>, _>>()?;
    Ok(RingAt { grefs, event_channel })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_decimal_digits_and_nothing_else() {
        assert_eq!((number(b"0"), number(b"4294967295")), (Some(0), Some(u32::MAX)));
        for wrong in [&b""[..], b"-1", b"+1", b" 1", b"1\n", b"0x1", b"4294967296", b"99999999999", b"\xff"] {
            assert_eq!(number(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_ring_needs_all_its_nodes() {
        let pages = [Some(b"8".to_vec()), Some(b"9".to_vec())];
        let ring = RingAt { grefs: vec![8, 9], event_channel: 7 };
        assert_eq!(ring_at("", Some(b"7"), &pages), Ok(ring));
        assert_eq!(ring_at("queue-1/", None, &pages).unwrap_err(), "queue-1/event-channel is missing");
        assert_eq!(ring_at("", Some(b"x\n"), &pages).unwrap_err(), "event-channel \"x\\n\" is not a number");
        assert_eq!(ring_at("", Some(b"7"), &[None]).unwrap_err(), "ring-ref is missing");
    }
}
