//! Plays blktap's tapback: `tapback` shakes hands with the guests of backend `vbd3`, and tells the tapdisk that a backend's
//! nodes `pid` and `minor` name which ring to serve. It writes what blktap's does, and no more. It ends when it is killed.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::rc::Rc;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::errno::Errno;
use tapdisk::control::client;
use tapdisk::control::proto::{Blkif, blkif};
use tapdisk::xenstore::{Store, Task, Tx};
use zerocopy::FromZeros;

/// Where libxl and blktap's toolstacks make the devices.
const BACKEND: &str = "backend/vbd3";
/// Where tapdisks have their control sockets.
const CONTROL: &str = "/run/blktap-control";

/// A device that was seen.
#[derive(Default)]
struct Device {
    /// The frontend's state is watched, and has been there.
    watched: bool,
    /// The tapdisk that serves its ring: process and minor.
    served: Option<(i32, u16)>,
}

struct Tapback {
    store: Rc<Store>,
    devices: BTreeMap<(u32, u32), Device>,
}

impl Tapback {
    async fn run(mut self) -> Result<(), Errno> {
        self.store.watch(BACKEND, "devices").await?;
        loop {
            for domain in self.list(BACKEND).await? {
                for device in self.list(&format!("{BACKEND}/{domain}")).await? {
                    self.devices.entry((domain, device)).or_default();
                }
            }
            for key in self.devices.keys().copied().collect::<Vec<_>>() {
                if !self.step(key).await? {
                    self.devices.remove(&key);
                }
            }
            self.store.wait_fired().await?;
            self.store.fired();
        }
    }

    async fn list(&self, path: &str) -> Result<Vec<u32>, Errno> {
        match self.store.directory(Tx::NONE, path).await {
            Err(Errno::ENOENT) => Ok(Vec::new()),
            other => Ok(other?.iter().filter_map(|name| name.parse().ok()).collect()),
        }
    }

    async fn read(&self, node: &str) -> Result<Option<String>, Errno> {
        match self.store.read(Tx::NONE, node).await {
            Err(Errno::ENOENT) => Ok(None),
            other => Ok(Some(String::from_utf8_lossy(&other?).into_owned())),
        }
    }

    async fn number<T: std::str::FromStr>(&self, node: &str) -> Result<Option<T>, Errno> {
        Ok(self.read(node).await?.and_then(|text| text.parse().ok()))
    }

    /// Does what one device's nodes ask for. False: it is gone.
    async fn step(&mut self, key: (u32, u32)) -> Result<bool, Errno> {
        let back = format!("{BACKEND}/{}/{}", key.0, key.1);
        let Some(front) = self.read(&format!("{back}/frontend")).await? else {
            self.disconnect(key);
            return Ok(false);
        };
        let front_node = format!("{front}/state");
        let device = self.devices.entry(key).or_default();
        if !std::mem::replace(&mut device.watched, true) {
            self.store.watch(&front_node, "frontend").await?;
            self.write(&back, &[("max-ring-page-order", "3".into())]).await?;
        }
        let state: Option<u32> = self.number(&format!("{back}/state")).await?;
        let plugged = self.read(&format!("{back}/hotplug-status")).await?.as_deref() == Some("connected");
        let served = self.devices[&key].served.is_some();
        let frontend: Option<u32> = self.number(&front_node).await?;
        let wanted = match frontend {
            // The two directories may be made one after the other.
            None if state == Some(1) => return Ok(true),
            None => {
                self.disconnect(key);
                self.store.remove(Tx::NONE, &back).await?;
                return Ok(false);
            }
            Some(1) => {
                self.disconnect(key);
                2
            }
            Some(3 | 4) if plugged && !served && state != Some(5) => match self.connect(key, &back, &front).await? {
                Ok(()) => 4,
                Err(why) => {
                    eprintln!("{back}: {why}");
                    5
                }
            },
            Some(5) => 5,
            Some(6) => {
                self.disconnect(key);
                6
            }
            _ => return Ok(true),
        };
        if state != Some(wanted) {
            println!("{back}: frontend {}, {wanted}", frontend.unwrap_or(0));
            self.write(&back, &[("state", wanted.to_string())]).await?;
        }
        Ok(true)
    }

    async fn write(&self, directory: &str, nodes: &[(&str, String)]) -> Result<(), Errno> {
        let written = self.store.transaction(async |tx| {
            for (name, value) in nodes {
                self.store.write(tx, &format!("{directory}/{name}"), value.as_bytes()).await?;
            }
            Ok(Some(()))
        });
        written.await.map(drop)
    }

    /// The inner error is the guest's or the tapdisk's.
    async fn connect(&mut self, key: (u32, u32), back: &str, front: &str) -> Result<Result<(), String>, Errno> {
        let (pid, minor) = (self.number(&format!("{back}/pid")).await?, self.number(&format!("{back}/minor")).await?);
        let (Some(pid), Some(minor)) = (pid, minor) else { return Ok(Err("no pid or no minor".into())) };
        let mut wanted = Blkif { domid: key.0, devid: key.1, ..Blkif::new_zeroed() };
        wanted.order = self.number(&format!("{front}/ring-page-order")).await?.unwrap_or(0);
        for page in 0..1 << wanted.order.min(3) {
            let name = if wanted.order == 0 { "ring-ref".to_owned() } else { format!("ring-ref{page}") };
            let Some(gref) = self.number(&format!("{front}/{name}")).await? else {
                return Ok(Err(name + " is missing"));
            };
            wanted.gref[page] = gref;
        }
        let Some(port) = self.number(&format!("{front}/event-channel")).await? else {
            return Ok(Err("event-channel is missing".into()));
        };
        wanted.port = port;
        wanted.proto = match self.read(&format!("{front}/protocol")).await?.as_deref() {
            Some("x86_64-abi") => blkif::X86_64,
            // blktap's tapback takes that for the default.
            None | Some("x86_32-abi") => blkif::X86_32,
            Some(other) => return Ok(Err(format!("protocol {other} is not known"))),
        };
        let directory = Path::new(CONTROL);
        let connected = client::disk_info(directory, pid, minor)
            .and_then(|image| client::xenblkif_connect(directory, pid, minor, &wanted).map(|()| image));
        let image = match connected {
            Ok(image) => image,
            Err(error) => return Ok(Err(format!("tapdisk {pid}: {error}"))),
        };
        self.devices.entry(key).or_default().served = Some((pid, minor));
        let nodes = [
            ("feature-barrier", 1),
            ("sector-size", image.sector_size.into()),
            ("sectors", image.sectors),
            ("info", image.info.into()),
        ];
        self.write(back, &nodes.map(|(name, value)| (name, value.to_string()))).await?;
        Ok(Ok(()))
    }

    fn disconnect(&mut self, key: (u32, u32)) {
        let Some((pid, _)) = self.devices.get_mut(&key).and_then(|device| device.served.take()) else { return };
        let guest = Blkif { domid: key.0, devid: key.1, ..Blkif::new_zeroed() };
        // As blktap's does, without the minor.
        match client::xenblkif_disconnect(Path::new(CONTROL), pid, 0, &guest) {
            Ok(()) => println!("{BACKEND}/{}/{}: disconnected", key.0, key.1),
            Err(why) => eprintln!("{BACKEND}/{}/{}: {why}", key.0, key.1),
        }
    }
}

fn main() -> io::Result<()> {
    let store = Rc::new(Store::connect(None)?);
    let mut poll = Poll::new()?;
    let fd = store.fd().as_raw_fd();
    poll.registry().register(&mut SourceFd(&fd), Token(0), Interest::READABLE | Interest::WRITABLE)?;
    let mut task = Task::new(Tapback { store: Rc::clone(&store), devices: BTreeMap::new() }.run());
    let mut events = Events::with_capacity(1);
    loop {
        if let Some(end) = task.poll() {
            return Ok(end?);
        }
        poll.poll(&mut events, None)?;
        store.progress()?;
    }
}
