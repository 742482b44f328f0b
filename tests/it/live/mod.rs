//! Disks that change while they are used.

mod coalesce;
mod random;
mod snapshots;
