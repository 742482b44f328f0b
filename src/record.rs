//! What a disk serves now, on record for whoever starts it again. A configuration names the image that a disk begins with; after a snapshot it
//! serves another one, whose parent that is, and a start that went by the configuration alone would write the parent, and show the guest
//! what it was.
//!
//! The same of its log of changed blocks: one that did not go on would lack what is written.
//!
//! The record is a file in the folder of the minors, which goes with this boot as a rule. It is there as long as the disk is paused, or serves
//! another image, or has another log, than its configuration says. It is of no account when the configuration was changed, or the image that it names is another
//! one now. All of this blocks.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use drivers::vhd::Parts;
use serde::{Deserialize, Serialize};

use crate::chain;
use crate::config::{Config, Image, ImageType};
use crate::frontend::DiskInfo;
use crate::sys::credentials::Credentials;

/// An image, and what tells it from another one in its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// Its type.
    #[serde(rename = "type")]
    pub kind: ImageType,
    /// Its path.
    pub path: PathBuf,
    /// A VHD image's UUID, a raw file's device and inode; of a raw device there is nothing but its name.
    id: String,
}

impl Known {
    fn of(kind: ImageType, path: &Path) -> io::Result<Known> {
        let id = match kind {
            ImageType::Vhd => {
                let layer = chain::parts(path, Parts::Heads, false)
                    .or_else(|_| chain::parts(path, Parts::Heads, true))
                    .map_err(|error| io::Error::from(error.errno()))?;
                layer.image.map_or_else(String::new, |image| image.footer.uuid.to_string())
            }
            _ => {
                let meta = path.metadata()?;
                if meta.is_file() { format!("{}:{}", meta.dev(), meta.ino()) } else { String::new() }
            }
        };
        Ok(Known { kind, path: path.to_owned(), id })
    }

    /// Whether it is still what is there. None: nothing is.
    fn is_there(&self) -> io::Result<Option<bool>> {
        match Known::of(self.kind, &self.path) {
            Ok(now) => Ok(Some(now == *self)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The configuration's file.
    configuration: PathBuf,
    /// The boot of the host (random/boot_id in proc(5)).
    boot: String,
    /// Nobody has ended the pause.
    pub paused: bool,
    /// The disk, bytes.
    pub size: u64,
    /// Its sectors, bytes.
    pub sector_size: u32,
    /// The log of changed blocks that the configuration names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    configured_log: Option<PathBuf>,
    /// The one in which it marks what is written, or goes on to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_blocks: Option<PathBuf>,
    /// The image that the configuration names.
    configured: Known,
    /// The image that the disk serves, or goes on with.
    pub served: Known,
    /// The member of the control socket's group who has named that; none: root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<Credentials>,
    /// The member who has named the log of changed blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_blocks_by: Option<Credentials>,
}

/// Why a disk is not started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What it served last is not there.
    #[error(
        "{}: the disk served this image last, and now {why}; image.path has an older one, {}, without what was written since: to serve that, \
         remove {}",
        served.display(), configured.display(), record.display()
    )]
    Gone {
        /// The image.
        served: PathBuf,
        /// That of the configuration.
        configured: PathBuf,
        /// What is wrong with the first.
        why: &'static str,
        /// The record.
        record: PathBuf,
    },
    /// The record can't be read.
    #[error("{}: cannot read what the disk served last: {source}; if that is image.path, remove this file", path.display())]
    Read {
        /// The record.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Where the record of a configuration's disk is kept.
#[derive(Clone, Debug)]
pub struct Place {
    file: PathBuf,
    configuration: PathBuf,
    configured: (ImageType, PathBuf),
    configured_log: Option<PathBuf>,
}

impl Place {
    /// That of a disk with a configuration from a file and an image in one. None: it has neither.
    pub fn of(config: &Config) -> Option<Place> {
        let (configuration, image) = (config.file.clone()?, config.image.path.clone()?);
        let name = fnv1a(configuration.as_os_str().as_bytes());
        let file = config.control.directory.join("tapdisk").join(format!("served-{name:016x}"));
        let configured_log = config.image.changed_blocks.clone();
        Some(Place { file, configuration, configured: (config.image.kind, image), configured_log })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.file
    }

    /// What a disk that is started goes on with, if the record says something else than the configuration.
    pub fn load(&self) -> Result<Option<Record>, Error> {
        let failed = |source| Error::Read { path: self.file.clone(), source };
        let text = match std::fs::read_to_string(&self.file) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text.map_err(failed)?,
        };
        let mut record: Record = toml::from_str(&text).map_err(|error| failed(io::Error::other(error)))?;
        if record.configured_log != self.configured_log {
            // Somebody has named another one in the configuration since, and means that.
            (record.changed_blocks, record.changed_blocks_by) = (self.configured_log.clone(), None);
        }
        let same_name = record.configuration == self.configuration
            && (record.configured.kind, &record.configured.path) == (self.configured.0, &self.configured.1);
        let paused = record.paused && record.boot == boot_id();
        if same_name && paused {
            // Whoever paused it may have put another image in its place: which, they say when they end that.
            return Ok(Some(record));
        }
        if !same_name || record.configured.is_there().map_err(failed)? == Some(false) {
            self.remove().map_err(failed)?;
            return Ok(None);
        }
        if record.served == record.configured {
            let same_log = record.changed_blocks == self.configured_log;
            return Ok((!same_log).then_some(Record { paused: false, ..record }));
        }
        let why = match record.served.is_there().map_err(failed)? {
            Some(true) => return Ok(Some(Record { paused: false, ..record })),
            Some(false) => "another one is in its place",
            None => "it is not there",
        };
        let (served, configured) = (record.served.path, record.configured.path);
        Err(Error::Gone { served, configured, why, record: self.file.clone() })
    }

    /// Records what the disk serves, or goes on with when a pause ends.
    pub fn save(&self, image: &Image, info: &DiskInfo, paused: bool) -> io::Result<()> {
        let served = Known::of(image.kind, image.path.as_deref().unwrap_or(Path::new("")))?;
        let by = image.by.as_ref().map(|by| by.credentials.clone());
        let (kind, path) = &self.configured;
        let configured = match Known::of(*kind, path) {
            // It was merged into another one: that it is not there is all that can be said of it.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Known { kind: *kind, path: path.clone(), id: String::new() }
            }
            known => known?,
        };
        if !paused && served == configured && image.changed_blocks == self.configured_log {
            return self.remove();
        }
        let (configuration, boot) = (self.configuration.clone(), boot_id());
        let (size, sector_size) = (info.size, info.sector_size);
        let (configured_log, changed_blocks) = (self.configured_log.clone(), image.changed_blocks.clone());
        let changed_blocks_by = image.changed_blocks_by.as_ref().map(|by| by.credentials.clone());
        let record = Record {
            configuration,
            boot,
            paused,
            size,
            sector_size,
            configured_log,
            changed_blocks,
            configured,
            served,
            by,
            changed_blocks_by,
        };
        let text = toml::to_string(&record).map_err(io::Error::other)?;
        // One or the other at each moment.
        let mut new = self.file.clone().into_os_string();
        new.push(".new");
        let mut file = File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, &self.file)
    }

    fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.file) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// A file's name has not room for every path (FNV-1a, 64 bits; the record has the path).
fn fnv1a(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| String::new(), |id| id.trim().to_owned())
}
