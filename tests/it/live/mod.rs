//! Disks that change while they are used.

mod coalesce;
mod hanging;
mod random;
mod restart;
mod snapshots;
mod storage_manager;
mod throttle;
