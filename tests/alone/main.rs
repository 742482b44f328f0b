//! Tests that measure, and that count what the whole process does: nothing else runs meanwhile. Cargo runs one program after the
//! other; in this one, each test takes [`alone`].

#[path = "../common/mod.rs"]
#[allow(dead_code)] // it uses a part
mod common;

mod memory_limit;
mod no_alloc;
mod panics;
mod pool_threads;

use std::sync::{Mutex, MutexGuard, PoisonError};

static ALONE: Mutex<()> = Mutex::new(());

/// Waits until no other test of this program runs.
fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}
