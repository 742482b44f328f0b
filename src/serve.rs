//! From a configuration to a main loop that is ready to run.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use slog::{Logger, info, o, warn};

use crate::blocking::Blocking;
use crate::config::{self, Config, Member, OnClose};
use crate::disk::{Disk, Parts, Reopen, Watchdog};
use crate::event::MainLoop;
use crate::frontend::local::Local;
use crate::frontend::nbd::Nbd;
use crate::frontend::vhost_user::{self, VhostUser};
use crate::frontend::xen::Xen;
use crate::frontend::xen::tapback::{self, Tapback};
use crate::frontend::{DiskInfo, Frontend, local, nbd, xen};
use crate::image::{self, Image};
use crate::log::Log;
use crate::memory;
use crate::minors::marker::Marker;
use crate::queue::{Limits, Queue};
use crate::record;
use crate::request::Slots;
use crate::retry::Retry;
use crate::stack::{METAS, OWN_REQUESTS, Stack};
use crate::sys::memory::PAGE_SIZE;

/// Opens everything that the configuration names, and serves its image until the client is gone or it is told to end.
pub fn open(
    blocking: &Blocking,
    config: &Config,
    logging: Log,
    log: &Logger,
) -> Result<MainLoop, Box<dyn std::error::Error>> {
    let config = Arc::new(config.clone());
    let mut main_loop = MainLoop::new(blocking, Arc::clone(&config), logging, log.clone())?;
    let marker = take_minor(&config.control)?;
    let mut placed = (*config).clone();
    place_sockets(&mut placed, marker.minor());
    let place = record::Place::of(&placed);
    let record = place.as_ref().map(record::Place::load).transpose()?.flatten();
    if let Some(record) = &record {
        (placed.image.kind, placed.image.path) = (record.served.kind, Some(record.served.path.clone()));
        placed.image.create = None;
        let folders = &config.control.folders;
        let member = |credentials| Member { credentials, folders: folders.clone() };
        placed.image.by = record.by.clone().map(|by| Arc::new(member(by)));
        placed.image.changed_blocks.clone_from(&record.changed_blocks);
        placed.image.changed_blocks_by = record.changed_blocks_by.clone().map(|by| Arc::new(member(by)));
        let named = |path: Option<&Path>| path.unwrap_or(Path::new("")).display().to_string();
        warn!(log, "the disk goes on with the image and the log of changed blocks that it had last, and not by its configuration";
            "served" => %record.served.path.display(), "path" => named(config.image.path.as_deref()),
            "changed_blocks" => named(record.changed_blocks.as_deref()), "paused" => record.paused, "record" => %place.as_ref().map_or(Path::new(""), record::Place::path).display());
    }
    let paused = record.filter(|record| record.paused);
    let image = match &paused {
        Some(record) => image::closed(blocking, &placed, record.size, record.sector_size, log)?,
        None => image::open(blocking, &placed, None, log)?,
    };
    let log_of_disk = log.new(o!("minor" => marker.minor()));
    let frontends = frontends(&placed, &image.info, &log_of_disk)?;
    let mut disk = disk(placed.into(), image, frontends, place, &log_of_disk)?;
    if config.memory.lock {
        memory::lock(blocking, log);
    }
    if paused.is_some() {
        disk.start_paused();
    }
    main_loop.minors().add(marker, Some(disk), true)?;
    info!(log, "serving"; "control" => %main_loop.control_path().display());
    Ok(main_loop)
}

fn take_minor(control: &config::Control) -> Result<Marker, String> {
    let directory = control.directory.display();
    Marker::take(&control.directory, control.minor.map(|minor| minor as u16)).map_err(|error| match control.minor {
        Some(minor) if error.kind() == ErrorKind::WouldBlock => {
            format!("control.minor: another tapdisk has minor {minor} in {directory}; without the key it is one that is free")
        }
        _ => format!("control.directory: cannot take a minor in {directory}: {error}"),
    })
}

/// Opens nothing, and waits for clients of the control socket to attach minors and open images, with what `config` says of
/// everything else.
pub fn wait(
    blocking: &Blocking,
    config: &Config,
    logging: Log,
    log: &Logger,
) -> Result<MainLoop, Box<dyn std::error::Error>> {
    let main_loop = MainLoop::new(blocking, Arc::new(config.clone()), logging, log.clone())?;
    if config.memory.lock {
        memory::lock(blocking, log);
    }
    info!(log, "waiting for tap-ctl"; "control" => %main_loop.control_path().display());
    Ok(main_loop)
}

/// Bytes that a disk with the defaults takes, but for its clients, and more.
const OF_DISK: usize = 4 << 20;

/// A disk with an image that is open, and its frontends. Its memory is not locked.
pub fn disk(
    config: Arc<Config>,
    image: Image,
    frontends: Vec<Box<dyn Frontend>>,
    record: Option<record::Place>,
    log: &Logger,
) -> Result<Disk, io::Error> {
    memory::room(OF_DISK)?;
    let requests = config.requests as usize;
    // A raw image makes one transfer of each request; others, which may take its place, cut it where their blocks end, and
    // have some of their own.
    let (own, tiocbs) =
        if config.image.path.is_some() { (OWN_REQUESTS, 2 * requests + METAS) } else { (0, requests) };
    let limits = Limits {
        tiocbs,
        iovecs: config.engine.merge_iovecs as usize,
        merge_bytes: config.engine.merge_bytes.0,
        retry: Retry { limit: u64::from(config.retry.limit_s) * 1_000_000_000, no_space: config.retry.no_space },
    };
    let queue = Queue::new(image.submission, config.engine.submit, limits);
    // Each segment of an indirect request may be apart from the others.
    let local = config.frontend.local.as_ref().map_or(1, |local| local.max_indirect_segments.max(11)) as usize;
    let segments = if config.frontend.vhost_user.is_some() { local.max(vhost_user::SEGMENTS) } else { local };
    let slots = Slots::new(requests, segments, own);
    let lease = Some(Duration::from_secs(config.control.pause_lease_s.into())).filter(|lease| !lease.is_zero());
    let watchdog = Watchdog::new(config.watchdog.stuck_s);
    let disk = Disk::new(Parts {
        info: image.info,
        frontends,
        slots,
        stack: Stack::new(image.layers, requests)?,
        queue,
        stores: image.stores,
        opener: image.opener,
        reopen: Some(Reopen { config, lease, record }),
        watchdog,
        log: log.clone(),
    });
    disk.budget().log(log);
    Ok(disk)
}

/// Puts the process id and the minor into the sockets' names.
pub fn place_sockets(config: &mut Config, minor: u16) {
    let pid = std::process::id();
    let place = |path: &mut PathBuf| {
        let named = path.to_string_lossy().replace("{pid}", &pid.to_string()).replace("{minor}", &minor.to_string());
        *path = named.into();
    };
    let frontend = &mut config.frontend;
    let local = frontend.local.as_mut().map(|local| &mut local.socket);
    let nbd = frontend.nbd.iter_mut().flat_map(|nbd| [&mut nbd.socket, &mut nbd.old_socket]);
    let vhost_user = frontend.vhost_user.as_mut().map(|vhost_user| &mut vhost_user.socket);
    local.into_iter().chain(vhost_user).chain(nbd.flatten()).for_each(place);
}

/// What a disk's clients come by.
pub fn frontends(
    config: &Config,
    disk: &DiskInfo,
    log: &Logger,
) -> Result<Vec<Box<dyn Frontend>>, Box<dyn std::error::Error>> {
    let mut frontends: Vec<Box<dyn Frontend>> = Vec::new();
    if let Some(xen) = &config.frontend.xen {
        frontends.push(Box::new(Xen::open(xen_config(config, xen), disk.clone(), log.clone())?));
    }
    if let Some(local) = &config.frontend.local {
        let config = local::Config {
            socket: local.socket.clone(),
            max_ring_page_order: local.max_ring_page_order,
            max_queues: local.max_queues,
            max_data_pages: (local.max_data.0 / PAGE_SIZE as u64) as u32,
            max_indirect_segments: local.max_indirect_segments,
            max_clients: local.max_clients as usize,
            lock_memory: config.memory.lock,
        };
        frontends.push(Box::new(Local::bind(config, disk.clone(), log.clone())?));
    }
    if let Some(table) = &config.frontend.vhost_user {
        let config = vhost_user::Config {
            socket: table.socket.clone(),
            queues: table.max_queues as u16,
            serial: vhost_user::serial(table.serial.as_deref(), &disk.name),
        };
        frontends.push(Box::new(VhostUser::bind(config, disk.clone(), log.clone())?));
    }
    if let Some(nbd) = &config.frontend.nbd {
        let config = nbd::Config {
            socket: nbd.socket.clone(),
            old_socket: nbd.old_socket.clone(),
            listen: nbd.listen,
            export: nbd.export.clone(),
            max_connections: nbd.max_connections as usize,
            lock_memory: config.memory.lock,
        };
        frontends.push(Box::new(Nbd::bind(&config, disk.clone(), log.clone())?));
    }
    if frontends.is_empty() {
        info!(log, "no frontend is configured: the disk waits for tapback to connect a guest");
    }
    if config.frontend.xen.is_none() {
        let settings = tapback::Settings {
            requests: config.requests as usize,
            lock_memory: config.memory.lock,
            statistics: config.statistics.directory.clone(),
        };
        frontends.push(Box::new(Tapback::new(settings, log.clone())));
    }
    Ok(frontends)
}

fn xen_config(config: &Config, table: &config::Xen) -> xen::Config {
    xen::Config {
        device: xen::xenbus::Config {
            domain: table.domain as u16,
            device: table.device.0,
            backend: table.backend.clone(),
            exit: table.on_close == OnClose::Exit,
            wait_for_hotplug: table.wait_for_hotplug,
            max_ring_page_order: table.max_ring_page_order,
            max_queues: table.max_queues,
            max_indirect_segments: table.max_indirect_segments,
        },
        limits: xen::vbd::Limits {
            indirect_segments: table.max_indirect_segments as usize,
            buffers: table.buffers.0 as usize,
            requests: config.requests as usize,
            gather_ns: u64::from(table.gather_us) * 1000,
        },
        store: table.store.clone(),
        statistics: config.statistics.directory.clone(),
        lock_memory: config.memory.lock,
    }
}
