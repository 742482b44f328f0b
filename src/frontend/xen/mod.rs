//! A Xen guest: blkfront's rings over granted pages, event channels, and the handshake through XenStore.
//!
//! [`vbd`] moves requests and data, [`xenbus`] shakes hands by what [`handshake`] decides; here both meet the main
//! loop. One guest device at a time; when it goes, the process ends or waits for the next one, as configured.
//! Where another process shakes hands, [`tapback`] takes the place of this frontend.

pub mod handshake;
pub mod ring;
pub mod tapback;
pub mod vbd;
pub mod xenbus;

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::rc::Rc;

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use slog::{Logger, error, info, warn};

use self::handshake::Stage;
use self::tapback::Tapback;
use self::vbd::{Connection, Limits, Vbd};
use self::xenbus::{Backend, End, Handshake};
use super::{DiskInfo, Frontend, Intake};
use crate::memory::{self, Part};
use crate::request::Request;
use crate::stats::now;
use crate::stats::shm::Place;
use crate::xenstore::{Store, Task};

/// Tokens.
const EVTCHN: usize = 0;
const STORE: usize = 1;

/// Between tries to reach XenStore, ns.
const RETRY: u64 = 1_000_000_000;

/// How long the goodbye to XenStore may take, ns.
const GOODBYE: u64 = 3_000_000_000;

/// What is served, and to whom.
#[derive(Clone, Debug)]
pub struct Config {
    /// The guest and its device.
    pub device: xenbus::Config,
    /// Sizes.
    pub limits: Limits,
    /// XenStore's socket or device; none: where it usually is.
    pub store: Option<PathBuf>,
    /// Where the statistics are in shared memory.
    pub statistics: PathBuf,
    /// Keep payload memory resident.
    pub lock_memory: bool,
}

/// What the main loop and the handshake share.
struct Shared {
    vbd: RefCell<Vbd>,
    disk: RefCell<DiskInfo>,
    resized: Cell<bool>,
    stopping: Cell<bool>,
    /// The handshake waits for the requests of a guest that was let go.
    letting_go: Cell<bool>,
    wake_at: Cell<Option<u64>>,
}

impl Backend for Shared {
    fn connect(&self, connection: &Connection) -> Result<(), String> {
        self.vbd.borrow_mut().connect(connection).map_err(|error| error.to_string())
    }
    fn disconnect(&self) {
        self.vbd.borrow_mut().disconnect();
    }
    fn busy(&self) -> bool {
        self.letting_go.set(self.vbd.borrow().in_flight() > 0);
        self.letting_go.get()
    }
    fn disk(&self) -> DiskInfo {
        self.disk.borrow().clone()
    }
    fn take_broken(&self) -> Option<String> {
        self.vbd.borrow_mut().take_broken()
    }
    fn wants(&self) -> bool {
        self.stopping.get() || self.resized.get() || self.vbd.borrow().is_broken()
    }
    fn take_resized(&self) -> bool {
        self.resized.take()
    }
    fn stopping(&self) -> bool {
        self.stopping.get()
    }
    fn wake_at(&self, at: Option<u64>) {
        self.wake_at.set(at);
    }
}

/// The handshake, or what is left of it.
enum Talk {
    On {
        store: Rc<Store>,
        task: Task<End>,
    },
    /// No connection to XenStore; it is tried again at that time. The guest is served on.
    Off {
        stage: Stage,
        retry_at: u64,
    },
    Over,
}

/// The frontend.
pub struct Xen {
    config: Config,
    shared: Rc<Shared>,
    talk: Talk,
    registry: Option<(Registry, usize)>,
    /// The device is gone, and the process is to end.
    gone: bool,
    /// Until when the goodbye may take.
    goodbye_until: Option<u64>,
    log: Logger,
}

impl Xen {
    /// Opens Xen's devices and XenStore, and makes all memory.
    pub fn open(config: Config, disk: DiskInfo, log: Logger) -> io::Result<Xen> {
        let mut vbd = Vbd::new(config.limits, disk.sector_size, log.clone()).map_err(io::Error::other)?;
        vbd.show_statistics(Place { directory: config.statistics.clone(), device: config.device.device });
        if config.lock_memory {
            memory::lock_of_client(vbd.memory());
        }
        let shared = Rc::new(Shared {
            vbd: RefCell::new(vbd),
            disk: RefCell::new(disk),
            resized: Cell::new(false),
            stopping: Cell::new(false),
            letting_go: Cell::new(false),
            wake_at: Cell::new(None),
        });
        let talk = Talk::Off { stage: Stage::Start, retry_at: 0 };
        let mut xen = Xen { config, shared, talk, registry: None, gone: false, goodbye_until: None, log };
        xen.talk = xen.reach(Stage::Start)?;
        Ok(xen)
    }

    /// Connects to XenStore, and begins a handshake or goes on with one.
    fn reach(&self, stage: Stage) -> io::Result<Talk> {
        let store = Rc::new(Store::connect(self.config.store.as_deref())?);
        if let Some((registry, base)) = &self.registry {
            watch_store(&store, registry, *base)?;
        }
        let (device, log) = (self.config.device.clone(), self.log.clone());
        let handshake = Handshake::new(Rc::clone(&store), Rc::clone(&self.shared), device, stage, log);
        Ok(Talk::On { store, task: Task::new(handshake.run()) })
    }

    /// Lets the handshake go on as far as it can.
    fn talk(&mut self) {
        let Talk::On { store, task } = &mut self.talk else { return };
        let Some(end) = task.poll() else { return };
        if let Some((registry, _)) = &self.registry {
            // It goes with its descriptor anyway.
            let _ = registry.deregister(&mut SourceFd(&store.fd().as_raw_fd()));
        }
        match end {
            End::Gone => {
                info!(self.log, "the guest's device is gone"; "domain" => self.config.device.domain,
                    "device" => self.config.device.device);
                (self.gone, self.talk) = (true, Talk::Over);
            }
            End::Stopped => self.talk = Talk::Over,
            End::Lost(stage) => {
                error!(self.log, "lost XenStore; the guest is served on, and XenStore tried again each second");
                self.talk = Talk::Off { stage, retry_at: now() + RETRY };
            }
        }
    }

    /// Does what is due.
    fn attend(&mut self) {
        if let Talk::Off { stage, retry_at } = self.talk
            && now() >= retry_at
        {
            self.talk = if self.shared.stopping() {
                Talk::Over
            } else {
                self.reach(stage).unwrap_or(Talk::Off { stage, retry_at: now() + RETRY })
            };
            self.talk();
        }
        let shared = &self.shared;
        let due = shared.wake_at.get().is_some_and(|at| now() >= at);
        if due || shared.wants() || (shared.letting_go.get() && !shared.busy()) {
            self.talk();
        }
    }
}

fn watch_store(store: &Store, registry: &Registry, base: usize) -> io::Result<()> {
    let fd = store.fd().as_raw_fd();
    registry.register(&mut SourceFd(&fd), Token(base + STORE), Interest::READABLE | Interest::WRITABLE)
}

/// What STATS shows as `xenbus`, in blktap's words, of a frontend for Xen guests.
pub fn xenbus_stats(frontend: &dyn Frontend) -> Option<serde_json::Value> {
    let xen = frontend.kind().map(|xen: &Xen| {
        let device = &xen.config.device;
        xen.shared.vbd.borrow().xenbus("", device.domain, device.device)
    });
    xen.or_else(|| frontend.kind::<Tapback>()?.xenbus())
}

impl Frontend for Xen {
    fn register(&mut self, registry: Registry, base: usize) -> io::Result<()> {
        let fd = self.shared.vbd.borrow().evtchn().as_fd().as_raw_fd();
        registry.register(&mut SourceFd(&fd), Token(base + EVTCHN), Interest::READABLE)?;
        if let Talk::On { store, .. } = &self.talk {
            watch_store(store, &registry, base)?;
        }
        self.registry = Some((registry, base));
        self.talk();
        Ok(())
    }

    fn event(&mut self, index: usize, _event: &Event) {
        match (index, &self.talk) {
            (EVTCHN, _) => self.shared.vbd.borrow_mut().events(),
            (STORE, Talk::On { store, .. }) => {
                if let Err(error) = store.progress() {
                    warn!(self.log, "XenStore"; "error" => %error);
                }
                self.talk();
            }
            _ => {}
        }
    }

    fn pull(&mut self, intake: &mut Intake) {
        self.shared.vbd.borrow_mut().pull(intake, 0);
    }

    fn answer(&mut self, request: &Request) {
        self.shared.vbd.borrow_mut().answer(request);
    }

    fn publish(&mut self) {
        self.shared.vbd.borrow_mut().publish();
        self.attend();
    }

    fn in_memory(&self) -> bool {
        true
    }

    fn ready(&self) -> bool {
        self.shared.vbd.borrow().ready()
    }

    fn arm(&mut self) -> bool {
        self.shared.vbd.borrow_mut().arm()
    }

    fn deadline(&self) -> Option<u64> {
        let retry = match self.talk {
            Talk::Off { retry_at, .. } => Some(retry_at),
            _ => None,
        };
        self.shared.wake_at.get().into_iter().chain(retry).chain(self.goodbye_until).min()
    }

    fn pull_deadline(&self) -> Option<u64> {
        self.shared.vbd.borrow().deadline()
    }

    fn has_orphans(&self) -> bool {
        self.shared.vbd.borrow().has_orphans()
    }

    fn is_orphan(&self, tag: u64) -> bool {
        self.shared.vbd.borrow().is_orphan(tag)
    }

    fn gather_ns(&self) -> Option<u64> {
        Some(self.config.limits.gather_ns)
    }

    fn close(&mut self) {
        self.shared.stopping.set(true);
        self.goodbye_until = Some(now() + GOODBYE);
        self.attend();
    }

    fn is_closed(&self) -> bool {
        matches!(self.talk, Talk::Over) || self.goodbye_until.is_some_and(|until| now() >= until)
    }

    fn is_gone(&self) -> bool {
        self.gone
    }

    fn resized(&mut self, disk: &DiskInfo) {
        *self.shared.disk.borrow_mut() = disk.clone();
        self.shared.resized.set(true);
    }

    fn memory(&self) -> Vec<Part> {
        vec![Part::fixed("buffers of the Xen guest", self.config.limits.bytes())]
    }

    fn inspect(&self) -> serde_json::Value {
        let device = &self.config.device;
        let mut value = self.shared.vbd.borrow().inspect();
        value["type"] = "xen".into();
        value["device"] = serde_json::json!({
            "domain": device.domain, "device": device.device, "backend": device.backend,
        });
        value["xenstore"] = matches!(self.talk, Talk::On { .. }).into();
        value
    }
}
