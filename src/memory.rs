//! The promise about memory: what the data path needs exists before the disk is connected, and stays resident.

use nix::sys::mman::{MlockAllFlags, mlockall};
use slog::{Logger, warn};

/// Keeps all that is there now resident. What clients bring later locks itself.
pub fn lock(log: &Logger) {
    if let Err(errno) = mlockall(MlockAllFlags::MCL_CURRENT) {
        warn!(log, "cannot lock memory: under memory pressure the disk can be slow or stop";
            "error" => %errno, "remedy" => "raise RLIMIT_MEMLOCK (systemd: LimitMEMLOCK=infinity) or give CAP_IPC_LOCK");
    }
}
