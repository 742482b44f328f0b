//! The throttle of a disk: its limits, which can be set while it is in use, and what they hold back.

use std::sync::Arc;

use drivers::throttle::{Limit, Throttle, Traffic, Unit};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use slog::info;

use super::Disk;
use crate::config::{self, Config};
use crate::request::Request;
use crate::stack::Stack;

/// Limits, as they are in force. None: there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitReport {
    /// Bytes a second.
    pub bytes_per_s: Option<u64>,
    /// Bytes that pass at once.
    pub bytes_burst: Option<u64>,
    /// Requests a second.
    pub requests_per_s: Option<u64>,
    /// Requests that pass at once.
    pub requests_burst: Option<u64>,
}

/// What is shown of a disk's throttle.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottleReport {
    /// Of reads.
    pub read: LimitReport,
    /// Of all that writes.
    pub write: LimitReport,
    /// Of both together.
    pub all: LimitReport,
    /// Requests that are held back now.
    pub held: usize,
    /// Those that were, and went on.
    pub held_before: u64,
    /// For how long, all together, µs.
    pub held_us: u64,
}

/// Why limits are not set.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ThrottleError {
    /// One makes no sense.
    #[error("{0}: {1}")]
    Value(&'static str, String),
    /// Nothing is there that could hold requests back.
    #[error("it has no throttle")]
    None,
}

impl ThrottleError {
    /// As a client is told.
    pub fn errno(&self) -> Errno {
        match self {
            ThrottleError::Value(..) => Errno::EINVAL,
            ThrottleError::None => Errno::EOPNOTSUPP,
        }
    }
}

impl From<Traffic> for LimitReport {
    fn from(traffic: Traffic) -> LimitReport {
        let rate = |limit: Option<Limit>| limit.map(|limit| limit.rate.get());
        LimitReport {
            bytes_per_s: rate(traffic.bytes),
            bytes_burst: traffic.bytes.map(|limit| limit.burst(Unit::Bytes)),
            requests_per_s: rate(traffic.requests),
            requests_burst: traffic.requests.map(|limit| limit.burst(Unit::Requests)),
        }
    }
}

impl Disk {
    /// The limits, as they are configured or were set.
    pub fn throttle(&self) -> config::Throttle {
        self.stack.get::<Throttle>().map_or_else(Default::default, |(_, throttle)| throttle.limits().into())
    }

    /// Sets the limits. They stay as long as the process serves the disk, whatever its image is.
    pub fn set_throttle(&mut self, wanted: config::Throttle) -> Result<(), ThrottleError> {
        wanted.check().map_err(|(key, text)| ThrottleError::Value(key, text))?;
        let throttle = self.stack.find::<Throttle>().ok_or(ThrottleError::None)?;
        throttle.set(wanted.limits());
        if let Some(reopen) = &mut self.reopen {
            Arc::make_mut(&mut reopen.config).throttle = wanted;
        }
        info!(self.log, "throttle set"; "limits" => ?wanted);
        Ok(())
    }

    /// What is in force, and what it holds back.
    pub fn throttle_report(&self) -> ThrottleReport {
        let Some((index, throttle)) = self.stack.get::<Throttle>() else { return ThrottleReport::default() };
        let (limits, waits) = (throttle.limits(), self.stack.waits(index));
        let held = |request: &Request| request.is_held() && request.waits_for.is_some_and(|at| at.layer == index);
        ThrottleReport {
            read: limits.read.into(),
            write: limits.write.into(),
            all: limits.all.into(),
            held: self.slots.iter().filter(|(_, request)| held(request)).count(),
            held_before: waits.requests,
            held_us: waits.ns / 1000,
        }
    }

    /// Has the next image's throttle go on from the one that there is: limits that were set, what is owed, and counters. Gives the
    /// configuration with the limits.
    pub(super) fn keep_throttle(&self, next: &mut Stack, mut config: Arc<Config>) -> Arc<Config> {
        if let (Some((before, throttle)), Some(new)) = (self.stack.get::<Throttle>(), next.find::<Throttle>()) {
            new.go_on_from(throttle);
            next.set_waits::<Throttle>(self.stack.waits(before));
            Arc::make_mut(&mut config).throttle = self.throttle();
        }
        config
    }

    /// Slots that a frontend leaves to the others. Where a throttle holds requests back, one that has many would have all slots, and the
    /// others' would not even be asked for.
    #[inline(always)] // of each turn
    pub(super) fn kept_from(&self, frontend: usize) -> usize {
        if self.stack.is_filtered() { self.kept_by_throttle(frontend) } else { 0 }
    }

    fn kept_by_throttle(&self, frontend: usize) -> usize {
        let throttled =
            || self.stack.get::<Throttle>().is_some_and(|(_, throttle)| !drivers::Layer::is_idle(throttle));
        if self.frontends.len() < 2 || !throttled() {
            return 0;
        }
        let has_clients = |index: &usize| self.frontends[*index].gather_ns().is_some();
        let others = (0..self.frontends.len()).filter(|index| *index != frontend).filter(has_clients);
        let share = self.slots.count() / (2 * (1 + others.clone().count()));
        others.map(|index| share.saturating_sub(self.used[index])).sum()
    }
}
