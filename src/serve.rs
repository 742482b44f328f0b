//! From a configuration to a main loop that is ready to run.

use std::sync::Arc;
use std::time::Duration;

use slog::{Logger, info, warn};

use crate::config::{self, Config, OnClose};
use crate::disk::{Disk, Parts, Reopen, Watchdog};
use crate::event::MainLoop;
use crate::frontend::local::Local;
use crate::frontend::nbd::Nbd;
use crate::frontend::xen::Xen;
use crate::frontend::{DiskInfo, Frontend, local, nbd, xen};
use crate::image;
use crate::log::Log;
use crate::memory;
use crate::queue::{Limits, Queue};
use crate::request::Slots;
use crate::retry::Retry;
use crate::stack::{METAS, Stack};
use crate::sys::memory::PAGE_SIZE;

/// Opens everything that the configuration names.
pub fn open(config: &Config, logging: Log, log: &Logger) -> Result<MainLoop, Box<dyn std::error::Error>> {
    let image = image::open(config, None, log)?;
    let requests = config.requests as usize;
    // A raw image makes one transfer of each request; others, which may take its place, cut it where their blocks end, and
    // have some of their own.
    let (own, tiocbs) = if image.opener.is_some() { (METAS, 2 * requests + METAS) } else { (0, requests) };
    let limits = Limits {
        tiocbs,
        iovecs: config.engine.merge_iovecs as usize,
        merge_bytes: config.engine.merge_bytes.0,
        retry: Retry { limit: u64::from(config.retry.limit_s) * 1_000_000_000, no_space: config.retry.no_space },
    };
    let queue = Queue::new(image.engine, config.engine.submit, limits)?;
    let frontends = frontends(config, &image.info, log)?;
    // Each segment of an indirect request may be apart from the others.
    let segments = config.frontend.local.as_ref().map_or(1, |local| local.max_indirect_segments.max(11)) as usize;
    let slots = Slots::new(requests, segments, own);
    let disk = Disk::new(Parts {
        info: image.info,
        frontends,
        slots,
        stack: Stack::new(image.layers, requests, image.tickets)?,
        queue,
        locks: image.locks,
        opener: image.opener,
        reopen: Some(Reopen {
            config: Arc::new(config.clone()),
            lease: Some(Duration::from_secs(config.control.pause_lease_s.into())).filter(|lease| !lease.is_zero()),
        }),
        watchdog: Watchdog::new(config.watchdog.stuck_s),
        log: log.clone(),
    });
    let control = (config.control.directory.as_path(), config.control.minor as u16);
    let main_loop = MainLoop::new(disk, control, &config.main_loop, logging, log.clone())?;
    if config.memory.lock {
        memory::lock(log);
    }
    main_loop.disk().budget().log(log);
    info!(log, "serving"; "control" => %main_loop.control_path().display());
    Ok(main_loop)
}

fn frontends(
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
    if let Some(nbd) = &config.frontend.nbd {
        let config = nbd::Config {
            socket: nbd.socket.clone(),
            listen: nbd.listen,
            export: nbd.export.clone(),
            max_connections: nbd.max_connections as usize,
            lock_memory: config.memory.lock,
        };
        frontends.push(Box::new(Nbd::bind(&config, disk.clone(), log.clone())?));
    }
    if frontends.is_empty() {
        warn!(log, "no frontend is configured: nobody can reach the disk");
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
        lock_memory: config.memory.lock,
    }
}
