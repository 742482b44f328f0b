//! Where a layer's bytes are.

mod memory;

use std::sync::Arc;

pub use self::memory::Ram;
use crate::sys::file::Backing;

/// What an engine needs of the bytes that it moves, by the kind of engine.
#[derive(Debug)]
pub enum Means {
    /// An open file or block device, for the engines of the kernel and of threads.
    File(Backing),
    /// Memory.
    Memory(Arc<Ram>),
}
