//! `[[fault]]`: disturbances of the engine, for tests and for those who evaluate what happens then.

use std::fmt;

use nix::errno::Errno;
use serde::de::{Error, Unexpected};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Size;
use crate::sys::io::IoOp;

/// Kinds of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FaultKind {
    /// The I/O is not done, and fails.
    Error,
    /// The I/O is done, and completes later.
    Delay,
    /// Only the first part of a read or write is done.
    Short,
    /// The I/O is done, and does not complete until that is released.
    Stuck,
    /// The call that submits does not come back for a while.
    Block,
}

/// Operations that a fault can concern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultOp {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
    /// Zeroing.
    WriteZeroes,
    /// Block status.
    Status,
}

impl FaultOp {
    /// Of an I/O.
    pub fn of(op: IoOp) -> FaultOp {
        match op {
            IoOp::Read => FaultOp::Read,
            IoOp::Write { .. } => FaultOp::Write,
            IoOp::Flush => FaultOp::Flush,
            IoOp::Discard => FaultOp::Discard,
            IoOp::WriteZeroes { .. } => FaultOp::WriteZeroes,
            IoOp::Status => FaultOp::Status,
        }
    }
}

/// How delays are distributed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Distribution {
    /// All the same.
    #[default]
    Fixed,
    /// Uniformly from 0 to twice `us`.
    Uniform,
    /// Exponentially with the mean `us`.
    Exponential,
}

/// An errno by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrnoName(pub Errno);

const ERRNOS: [Errno; 16] = [
    Errno::EIO,
    Errno::EAGAIN,
    Errno::EBADF,
    Errno::EBADMSG,
    Errno::EBUSY,
    Errno::EINTR,
    Errno::EINVAL,
    Errno::EILSEQ,
    Errno::ENODEV,
    Errno::ENOMEM,
    Errno::ENOSPC,
    Errno::EDQUOT,
    Errno::EOPNOTSUPP,
    Errno::EREMOTEIO,
    Errno::EROFS,
    Errno::ETIMEDOUT,
];

impl fmt::Display for ErrnoName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        // The names of nix's variants are the errnos'.
        write!(f, "{:?}", self.0)
    }
}

impl Serialize for ErrnoName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ErrnoName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ErrnoName, D::Error> {
        let name = String::deserialize(deserializer)?;
        let known = ERRNOS.map(|errno| ErrnoName(errno).to_string());
        match known.iter().position(|errno| *errno == name) {
            Some(index) => Ok(ErrnoName(ERRNOS[index])),
            None => {
                let expected = format!("one of {}", known.join(", "));
                Err(D::Error::invalid_value(Unexpected::Str(&name), &expected.as_str()))
            }
        }
    }
}

/// One table of `[[fault]]`. Each I/O is asked of the first that concerns it whether it is hit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// What.
    #[serde(rename = "type")]
    pub kind: FaultKind,
    /// Operations that it concerns.
    #[serde(default = "all_ops")]
    pub on: Vec<FaultOp>,
    /// First byte of the file that it concerns.
    #[serde(default = "start")]
    pub from: Size,
    /// End of the bytes that it concerns; flushes have no bytes and are not held off by this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Size>,
    /// Which share of those I/Os is hit, 0.0 to 1.0.
    #[serde(default = "always", deserialize_with = "share")]
    pub rate: f64,
    /// Where the sequence of chances begins: the same one gives the same.
    #[serde(default)]
    pub seed: u32,
    /// Of an error: which.
    #[serde(default = "eio")]
    pub errno: ErrnoName,
    /// Of a delay or a blocked submission: how long, µs.
    #[serde(default)]
    pub us: u32,
    /// Of a delay: whether all are the same.
    #[serde(default)]
    pub distribution: Distribution,
    /// Of a blocked submission: it lasts as long as so many I/Os are in flight. 0: only `us`.
    #[serde(default)]
    pub in_flight: u32,
}

fn all_ops() -> Vec<FaultOp> {
    use FaultOp::{Discard, Flush, Read, Status, Write, WriteZeroes};
    vec![Read, Write, Flush, Discard, WriteZeroes, Status]
}

fn start() -> Size {
    Size(0)
}

fn always() -> f64 {
    1.0
}

fn eio() -> ErrnoName {
    ErrnoName(Errno::EIO)
}

fn share<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let rate = f64::deserialize(deserializer)?;
    if (0.0..=1.0).contains(&rate) {
        Ok(rate)
    } else {
        Err(D::Error::invalid_value(Unexpected::Float(rate), &"a share from 0.0 to 1.0"))
    }
}

impl Fault {
    /// What no single key shows.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.to.is_some_and(|to| to.0 <= self.from.0) {
            return Err("expected an end behind the beginning".into());
        }
        match self.kind {
            FaultKind::Delay if self.us == 0 => Err("a delay needs us, its length in µs".into()),
            FaultKind::Block if self.us == 0 && self.in_flight == 0 => {
                Err("a blocked submission needs us, its length in µs, or in_flight".into())
            }
            FaultKind::Short if self.on.iter().any(|op| !matches!(op, FaultOp::Read | FaultOp::Write)) => {
                Err("only reads and writes can be short: say on = [\"read\", \"write\"]".into())
            }
            _ => Ok(()),
        }
    }
}
