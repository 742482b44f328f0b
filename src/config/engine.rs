//! `[engine]`, `[retry]` and `[watchdog]`.

use serde::{Deserialize, Serialize};

use super::units::in_range;
use super::{Size, SubmitMode};
pub use crate::retry::NoSpace;

/// Engines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineName {
    /// The best there is for the image.
    #[default]
    Auto,
    /// Linux AIO.
    Aio,
    /// The thread pool.
    Threads,
    /// io_uring.
    #[serde(rename = "io_uring")]
    IoUring,
}

impl EngineName {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            EngineName::Auto => "auto",
            EngineName::Aio => "aio",
            EngineName::Threads => "threads",
            EngineName::IoUring => "io_uring",
        }
    }
}

/// The most threads of a pool.
pub const THREADS_MAX: i64 = 1024;

/// `[engine]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Engine {
    /// Which.
    pub name: EngineName,
    /// I/Os in flight.
    #[serde(deserialize_with = "in_range::<1, 65536, _, _>")]
    pub depth: u32,
    /// The most I/Os in one system call.
    #[serde(deserialize_with = "in_range::<1, 256, _, _>")]
    pub batch: u32,
    /// Who submits.
    pub submit: SubmitMode,
    /// The most bytes that requests are merged to.
    pub merge_bytes: Size,
    /// The most pieces of memory in one I/O.
    #[serde(deserialize_with = "in_range::<256, 1024, _, _>")]
    pub merge_iovecs: u32,
    /// Threads that the pool always has.
    #[serde(deserialize_with = "in_range::<1, THREADS_MAX, _, _>")]
    pub threads_min: u32,
    /// The most threads of the pool.
    #[serde(deserialize_with = "in_range::<1, THREADS_MAX, _, _>")]
    pub threads_max: u32,
    /// After so many seconds without work a thread beyond the minimum ends.
    #[serde(deserialize_with = "in_range::<1, 3600, _, _>")]
    pub threads_idle_s: u32,
    /// io_uring: a thread of the kernel submits.
    pub sqpoll: bool,
    /// After so many milliseconds without work that thread sleeps.
    #[serde(deserialize_with = "in_range::<1, 60_000, _, _>")]
    pub sqpoll_idle_ms: u32,
}

impl Default for Engine {
    fn default() -> Engine {
        Engine {
            name: EngineName::Auto,
            depth: 128,
            batch: 64,
            submit: SubmitMode::Auto,
            merge_bytes: Size(1 << 20),
            merge_iovecs: 256,
            threads_min: 1,
            threads_max: 64,
            threads_idle_s: 10,
            sqpoll: false,
            sqpoll_idle_ms: 10,
        }
    }
}

/// `[retry]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Retry {
    /// For how many seconds an I/O whose error may pass by itself is tried again.
    #[serde(deserialize_with = "in_range::<0, 3600, _, _>")]
    pub limit_s: u32,
    /// Where the image has no space for a write.
    pub no_space: NoSpace,
}

impl Default for Retry {
    fn default() -> Retry {
        Retry { limit_s: 60, no_space: NoSpace::Report }
    }
}

/// `[watchdog]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Watchdog {
    /// A request that is not answered after so many seconds is stuck, and logged. 0: none is.
    #[serde(deserialize_with = "in_range::<0, 86400, _, _>")]
    pub stuck_s: u32,
}

impl Default for Watchdog {
    fn default() -> Watchdog {
        Watchdog { stuck_s: 30 }
    }
}
