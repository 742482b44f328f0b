//! The configuration: a TOML file, every key of which has a default but the image's.
//!
//! A key that is unknown, of the wrong type or out of range is an error that names file, line and key, and what was
//! expected. [`Config::to_toml`] prints all of it with the defaults filled in.

mod changed_blocks;
mod engine;
mod fault;
mod member;
mod statistics;
mod throttle;
mod units;
mod xen;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use self::changed_blocks::ChangedBlocks;
pub use self::engine::{Engine, EngineName, NoSpace, Retry, THREADS_MAX, Watchdog};
pub use self::fault::{Distribution, ErrnoName, Fault, FaultKind, FaultOp};
pub use self::member::Member;
pub use self::statistics::{Metrics, Statistics};
pub use self::throttle::{Throttle, Traffic};
pub use self::units::Size;
use self::units::{in_range, log_level, minor, sector_size};
pub use self::xen::{Device, OnClose, Xen};
use crate::log;
pub use crate::queue::SubmitMode;

/// All of a configuration file.
///
/// [`Config::default`] is for disks whose images are named later.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The file that it is from, without links; none: another one, or defaults.
    #[serde(skip)]
    pub file: Option<PathBuf>,
    /// Requests that are taken from clients and not answered, all clients together.
    #[serde(default = "defaults::requests", deserialize_with = "in_range::<1, 32768, _, _>")]
    pub requests: u32,
    /// The disk's content.
    #[serde(default)]
    pub image: Image,
    /// What moves the data.
    #[serde(default)]
    pub engine: Engine,
    /// What is done about errors.
    #[serde(default)]
    pub retry: Retry,
    /// How much of it passes a second.
    #[serde(default, skip_serializing_if = "Throttle::is_none")]
    pub throttle: Throttle,
    /// What is done about I/O that takes very long.
    #[serde(default)]
    pub watchdog: Watchdog,
    /// The main loop.
    #[serde(default)]
    pub main_loop: MainLoop,
    /// How clients reach the disk.
    #[serde(default)]
    pub frontend: Frontends,
    /// The control socket.
    #[serde(default)]
    pub control: Control,
    /// The log.
    #[serde(default)]
    pub log: Log,
    /// Memory.
    #[serde(default)]
    pub memory: Memory,
    /// What is shown in shared memory of Xen guests' disks.
    #[serde(default)]
    pub statistics: Statistics,
    /// OpenMetrics.
    #[serde(default)]
    pub metrics: Metrics,
    /// Disturbances, in the order in which they are asked.
    #[serde(default, rename = "fault", skip_serializing_if = "Vec::is_empty")]
    pub faults: Vec<Fault>,
}

/// Kinds of image, by blktap's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageType {
    /// Raw, in a file or on a block device.
    #[default]
    Aio,
    /// VHD, and all that it is based on, each in a file or on a block device.
    Vhd,
    /// In memory; gone when the process ends.
    Ram,
    /// Nothing: writes vanish, reads give what was in the client's memory. For measuring.
    Null,
}

/// Whether the host's page cache is passed by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direct {
    /// Where the file system can.
    #[default]
    Auto,
    /// Yes, or do not start.
    On,
    /// No.
    Off,
}

/// What to do with a size that is no multiple of the sector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OddSize {
    /// Do not start.
    #[default]
    Refuse,
    /// Serve the last, partial sector; what the file lacks of it reads as zeros.
    RoundUp,
    /// Do not serve the last, partial sector.
    RoundDown,
}

/// What to do with a parent that was written after its child was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChangedParent {
    /// Do not start.
    #[default]
    Refuse,
    /// Serve what there is.
    Serve,
}

/// What is between data and the metadata that points to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// A flush.
    #[default]
    Flush,
    /// Completion.
    Order,
}

/// `[image]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// The member of the control socket's group who has named it, and with whose rights it is opened; none: who runs the tapdisk.
    #[serde(skip)]
    pub by: Option<Arc<Member>>,
    /// Its kind.
    #[serde(default, rename = "type")]
    pub kind: ImageType,
    /// File or block device, for type "aio".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Size, for types "ram" and "null".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// If the file is missing, make it, sparse, with this size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create: Option<Size>,
    /// The log of changed blocks, in which all that is written is marked. Of an image that is not written, it is of no account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_blocks: Option<PathBuf>,
    /// The member who has named that, and with whose rights it is opened, in the folders that the member may name; none: who runs the tapdisk.
    #[serde(skip)]
    pub changed_blocks_by: Option<Arc<Member>>,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// Take the lock of each file, so that no other tapdisk or vhd-util of this host writes it.
    #[serde(default = "defaults::yes")]
    pub lock: bool,
    /// Pass the page cache by.
    #[serde(default)]
    pub direct: Direct,
    /// Logical sector in bytes, 512 or 4096. If it is not set: a block device's own, otherwise 512.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "sector_size")]
    pub sector_size: Option<u32>,
    /// What to do with a size that is no multiple of the sector.
    #[serde(default)]
    pub odd_size: OddSize,
    /// Of type "vhd": how far a crash of the host may reach.
    #[serde(default)]
    pub durability: Durability,
    /// Of type "vhd" in a file: space that is set apart ahead of what is written.
    #[serde(default = "defaults::nothing")]
    pub preallocate: Size,
    /// Of type "vhd": memory for bitmaps, all images of the chain together.
    #[serde(default = "defaults::bitmap_cache")]
    pub bitmap_cache: Size,
    /// Of type "vhd": the folders that parents may be in, besides the image's own.
    #[serde(default)]
    pub parents: Vec<PathBuf>,
    /// Of type "vhd": what to do with a parent that was written after its child was made.
    #[serde(default)]
    pub changed_parent: ChangedParent,
}

impl Default for Image {
    fn default() -> Image {
        Image {
            by: None,
            kind: ImageType::default(),
            path: None,
            size: None,
            create: None,
            changed_blocks: None,
            changed_blocks_by: None,
            read_only: false,
            lock: true,
            direct: Direct::default(),
            sector_size: None,
            odd_size: OddSize::default(),
            durability: Durability::default(),
            preallocate: defaults::nothing(),
            bitmap_cache: defaults::bitmap_cache(),
            parents: Vec::new(),
            changed_parent: ChangedParent::default(),
        }
    }
}

/// `[main_loop]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MainLoop {
    /// The longest that the loop looks at rings and completions, under load, before it sleeps; µs. 0: never.
    #[serde(deserialize_with = "in_range::<0, 1000, _, _>")]
    pub spin_us: u32,
    /// How long the loop looks at rings and completions after the last request of a ring; µs. 0: see `spin_us`.
    #[serde(deserialize_with = "in_range::<0, 1_000_000, _, _>")]
    pub poll_us: u32,
    /// How much of the host's CPUs must be idle for that, per cent.
    #[serde(deserialize_with = "in_range::<0, 100, _, _>")]
    pub poll_idle_percent: u32,
}

/// `[frontend]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Frontends {
    /// A Xen guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xen: Option<Xen>,
    /// The blkif ring over shared memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<Local>,
    /// virtio-blk, for a guest of QEMU or Cloud Hypervisor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_user: Option<VhostUser>,
    /// NBD.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd: Option<Nbd>,
}

/// `[frontend.local]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Local {
    /// Unix socket.
    pub socket: PathBuf,
    /// log2 of the pages of a ring.
    #[serde(default = "defaults::ring_page_order", deserialize_with = "in_range::<0, 4, _, _>")]
    pub max_ring_page_order: u32,
    /// Rings of one client.
    #[serde(default = "defaults::queues", deserialize_with = "in_range::<1, 16, _, _>")]
    pub max_queues: u32,
    /// Memory of one client's data pages.
    #[serde(default = "defaults::data")]
    pub max_data: Size,
    /// Segments of an indirect request.
    #[serde(default = "defaults::indirect_segments", deserialize_with = "in_range::<1, 256, _, _>")]
    pub max_indirect_segments: u32,
    /// Clients at a time.
    #[serde(default = "defaults::clients", deserialize_with = "in_range::<1, 1024, _, _>")]
    pub max_clients: u32,
}

/// `[frontend.vhost_user]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhostUser {
    /// Unix socket.
    pub socket: PathBuf,
    /// Rings.
    #[serde(default = "defaults::queues", deserialize_with = "in_range::<1, 16, _, _>")]
    pub max_queues: u32,
    /// What the guest is told as the disk's serial. If it is not set: made of the image's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
}

/// `[frontend.nbd]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nbd {
    /// Unix socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Unix socket for clients that do not negotiate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_socket: Option<PathBuf>,
    /// Loopback address and port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// The export's name. A client that names none gets it too.
    #[serde(default)]
    pub export: String,
    /// Connections at a time.
    #[serde(default = "defaults::clients", deserialize_with = "in_range::<1, 1024, _, _>")]
    pub max_connections: u32,
}

/// `[control]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Control {
    /// Where `ctl<pid>` is made.
    pub directory: PathBuf,
    /// The disk's number among all of the host. If it is not set: the lowest that is free.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "minor")]
    pub minor: Option<u32>,
    /// The group whose members may use the socket, besides root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Folders that the images are in, or below, which the group's members may name; and only those that they could open themselves.
    pub folders: Vec<PathBuf>,
    /// A pause that nobody ends is over after so many seconds. 0: never.
    #[serde(deserialize_with = "in_range::<0, 86400, _, _>")]
    pub pause_lease_s: u32,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Least severe level that is logged: "critical", "error", "warning", "info", "debug" or "trace".
    #[serde(deserialize_with = "log_level")]
    pub level: String,
    /// How.
    pub format: log::Format,
    /// Where; standard error if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// `[memory]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Memory {
    /// Keep all memory resident.
    pub lock: bool,
    /// What the kernel allocates on behalf of this process never waits for I/O (PR_SET_IO_FLUSHER).
    pub io_flusher: bool,
    /// How soon the kernel kills this process when memory runs out: from -1000, never, to 1000.
    #[serde(deserialize_with = "in_range::<-1000, 1000, _, _>")]
    pub oom_score_adj: i32,
}

mod defaults {
    use super::Size;

    pub(super) fn yes() -> bool {
        true
    }
    pub(super) fn nothing() -> Size {
        Size(0)
    }
    pub(super) fn bitmap_cache() -> Size {
        Size(6 << 20)
    }
    pub(super) fn requests() -> u32 {
        256
    }
    pub(super) fn ring_page_order() -> u32 {
        4
    }
    pub(super) fn queues() -> u32 {
        4
    }
    pub(super) fn data() -> Size {
        Size(64 << 20)
    }
    pub(super) fn indirect_segments() -> u32 {
        super::Xen::INDIRECT_SEGMENTS
    }
    pub(super) fn clients() -> u32 {
        16
    }
    pub(super) fn backend() -> String {
        "vbd3".into()
    }
    pub(super) fn gather_us() -> u32 {
        super::Xen::GATHER_US
    }
    pub(super) fn buffers() -> Size {
        Size(16 << 20)
    }
}

impl Default for Config {
    fn default() -> Config {
        toml::from_str("").expect("no key has to be there")
    }
}

impl Default for Nbd {
    fn default() -> Nbd {
        Nbd {
            socket: None,
            old_socket: None,
            listen: None,
            export: String::new(),
            max_connections: defaults::clients(),
        }
    }
}

impl Default for MainLoop {
    fn default() -> MainLoop {
        MainLoop { spin_us: 50, poll_us: 0, poll_idle_percent: 50 }
    }
}

impl Default for Control {
    fn default() -> Control {
        Control {
            directory: PathBuf::from("/run/blktap-control"),
            minor: None,
            group: None,
            folders: Vec::new(),
            pause_lease_s: 0,
        }
    }
}

impl Default for Log {
    fn default() -> Log {
        Log { level: "info".into(), format: log::Format::Terminal, file: None }
    }
}

impl Default for Memory {
    fn default() -> Memory {
        Memory { lock: true, io_flusher: true, oom_score_adj: -1000 }
    }
}

/// Why a configuration is not used. The text says where and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file can't be read.
    #[error("{}: cannot read the configuration: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A key is wrong.
    #[error("{}:{line}: {key}: {message}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The key, with its tables.
        key: String,
        /// What is wrong and what was expected.
        message: String,
    },
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Config, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        let config = Config::parse(&text, path)?;
        Ok(Config { file: path.canonicalize().ok(), ..config })
    }

    /// Reads and checks a file for disks whose images are named later.
    pub fn load_defaults(path: &Path) -> Result<Config, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Config::parse_with(&text, path, Config::check_defaults)
    }

    /// Checks a text; `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<Config, Error> {
        Config::parse_with(text, path, Config::check)
    }

    fn parse_with(
        text: &str,
        path: &Path,
        check: impl Fn(&Config) -> Result<(), (&'static str, String)>,
    ) -> Result<Config, Error> {
        let error = |offset: usize, key: String, message: String| Error::Key {
            path: path.to_owned(),
            line: text[..offset.min(text.len())].matches('\n').count() + 1,
            key,
            message,
        };
        let toml_error = |key: String, toml: &toml::de::Error| {
            let message = toml.message().split('\n').collect::<Vec<_>>().join("; ");
            error(toml.span().map_or(0, |span| span.start), key, message)
        };
        let parsed = toml::Deserializer::parse(text).map_err(|e| toml_error("syntax".into(), &e))?;
        let config: Config = serde_path_to_error::deserialize(parsed).map_err(|e| {
            let key = e.path().to_string();
            toml_error(if key == "." { "top level".into() } else { key }, e.inner())
        })?;
        check(&config).map_err(|(key, message)| error(find(text, key), key.into(), message))?;
        Ok(config)
    }

    /// What no single key shows, of disks whose images are named later. Gives the key and what is wrong.
    fn check_defaults(&self) -> Result<(), (&'static str, String)> {
        let (kind, path, changed_blocks) = (ImageType::Aio, None, None);
        let named = Image { kind, path, size: None, create: None, changed_blocks, ..self.image.clone() };
        if named != self.image {
            return Err(("image", "type, path, size, create and changed_blocks are for tap-ctl open to say".into()));
        }
        if self.frontend.xen.is_some() {
            return Err(("frontend.xen", "the guest is for tapback to say".into()));
        }
        self.throttle.check()?;
        self.check_engine()
    }

    /// What no single key shows. Gives the key and what is wrong.
    fn check(&self) -> Result<(), (&'static str, String)> {
        self.check_image()?;
        self.check_engine()?;
        self.throttle.check()?;
        self.check_frontends()
    }

    fn check_image(&self) -> Result<(), (&'static str, String)> {
        let image = &self.image;
        let wrong = |key, message: &str| Err((key, message.to_owned()));
        match (image.kind, &image.path, image.size) {
            (ImageType::Aio | ImageType::Vhd, None, _) => {
                return wrong("image.path", "missing: types \"aio\" and \"vhd\" need a file or block device");
            }
            (ImageType::Aio, _, Some(_)) => {
                return wrong("image.size", "type \"aio\" has the size of its file; to make a new file, set create");
            }
            (ImageType::Vhd, _, Some(_)) => {
                return wrong("image.size", "type \"vhd\" has its size in its file; vhd-util create makes a new one");
            }
            (ImageType::Ram | ImageType::Null, _, None) => {
                return wrong("image.size", "missing: types \"ram\" and \"null\" need a size, such as \"64 MiB\"");
            }
            (ImageType::Ram | ImageType::Null, Some(_), _) => {
                return wrong("image.path", "types \"ram\" and \"null\" have no file");
            }
            _ => {}
        }
        if let Some(log) = &image.changed_blocks {
            if matches!(image.kind, ImageType::Ram | ImageType::Null) {
                return wrong(
                    "image.changed_blocks",
                    "types \"ram\" and \"null\" have no log: nothing of them lasts",
                );
            }
            if log.as_os_str().is_empty() {
                return wrong("image.changed_blocks", "expected the path of a log, which cbt-util create makes");
            }
        }
        if image.create.is_some() && (image.read_only || image.kind != ImageType::Aio) {
            return wrong("image.create", "only a writable image of type \"aio\" can be made");
        }
        if image.kind == ImageType::Vhd && image.sector_size.is_some_and(|size| size != 512) {
            return wrong("image.sector_size", "images of type \"vhd\" have sectors of 512 bytes");
        }
        let sector = u64::from(image.sector_size.unwrap_or(512));
        for (key, size) in [("image.create", image.create), ("image.size", image.size)] {
            if size.is_some_and(|size| size.0 == 0 || !size.0.is_multiple_of(sector)) {
                return Err((key, format!("expected a multiple of the {sector}-byte sector, not 0")));
            }
        }
        Ok(())
    }

    fn check_engine(&self) -> Result<(), (&'static str, String)> {
        let wrong = |key, message: &str| Err((key, message.to_owned()));
        if self.engine.threads_max < self.engine.threads_min {
            return wrong("engine.threads_max", "expected at least threads_min");
        }
        if self.faults.len() > 100 {
            return wrong("fault", "expected at most 100");
        }
        if let Some(message) = self.faults.iter().find_map(|fault| fault.check().err()) {
            return Err(("fault", message));
        }
        if self.engine.merge_bytes.0 > 1 << 30 {
            return wrong("engine.merge_bytes", "expected at most 1 GiB");
        }
        Ok(())
    }

    fn check_frontends(&self) -> Result<(), (&'static str, String)> {
        let wrong = |key, message: &str| Err((key, message.to_owned()));
        if let Some(nbd) = &self.frontend.nbd {
            if nbd.socket.is_none() && nbd.old_socket.is_none() && nbd.listen.is_none() {
                return wrong("frontend.nbd", "expected a socket, or an address to listen on, or both");
            }
            if nbd.listen.is_some_and(|address| !address.ip().is_loopback()) {
                return wrong(
                    "frontend.nbd.listen",
                    "expected a loopback address: NBD here has no encryption and no passwords",
                );
            }
        }
        if self.frontend.local.as_ref().is_some_and(|local| !(4096..=1 << 30).contains(&local.max_data.0)) {
            return wrong("frontend.local.max_data", "expected from 4 KiB to 1 GiB");
        }
        let serial = self.frontend.vhost_user.as_ref().and_then(|vhost_user| vhost_user.serial.as_ref());
        if serial
            .is_some_and(|serial| !(1..=20).contains(&serial.len()) || !serial.bytes().all(|c| c.is_ascii_graphic()))
        {
            return wrong("frontend.vhost_user.serial", "expected 1 to 20 ASCII characters, none of them a space");
        }
        if let Some(xen) = &self.frontend.xen
            && !(u64::from(xen.max_indirect_segments.max(11)) * 4096..=1 << 30).contains(&xen.buffers.0)
        {
            return wrong(
                "frontend.xen.buffers",
                "expected at most 1 GiB, and at least 44 KiB and 4 KiB for each of max_indirect_segments",
            );
        }
        Ok(())
    }

    /// All keys, also those that were not set, as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("every value has a place in TOML")
    }
}

/// Byte of the line that sets `key`, or of its table's, or 0.
fn find(text: &str, key: &str) -> usize {
    let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
    let mut at = 0;
    let mut current = String::new();
    let mut table_at = 0;
    for line in text.split_inclusive('\n') {
        let trimmed = line.trim();
        if let Some(header) = trimmed.strip_prefix('[') {
            current = header.trim_start_matches('[').split(']').next().unwrap_or("").trim().to_owned();
            if current == table || current == key {
                table_at = at;
            }
        } else if current == table && trimmed.split('=').next().is_some_and(|k| k.trim() == name) {
            return at;
        }
        at += line.len();
    }
    table_at
}

#[cfg(test)]
mod tests;
