//! What is done about an I/O that failed: it is reported, or tried again.
//!
//! What may pass by itself is tried again for a limited time. A lack of space is reported, or, if so configured, the write
//! is held until there is space: a guest whose write waits goes on later, and one whose write failed makes its file system
//! read-only. A flush is never tried again: the kernel forgets what it could not write once it has said so, and a second
//! `fdatasync` would succeed over data that is lost.

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::sys::io::IoOp;

/// First pause before an I/O is tried again, ns; it doubles each time.
const PAUSE_FIRST: u64 = 1_000_000;
/// Longest pause, ns.
const PAUSE_MAX: u64 = 1_000_000_000;

/// What to do where an image's file system or device has no space for a write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NoSpace {
    /// The write fails.
    #[default]
    Report,
    /// The write waits until there is space.
    Hold,
}

/// The policy.
#[derive(Clone, Copy, Debug, Default)]
pub struct Retry {
    /// For how long since its first failure an I/O is tried again, ns. 0: not at all.
    pub limit: u64,
    /// Where there is no space.
    pub no_space: NoSpace,
}

/// The failures of one I/O.
#[derive(Clone, Copy, Debug, Default)]
pub struct Failures {
    /// How many.
    pub count: u32,
    /// When the first was, ns of [`crate::stats::now`].
    pub since: u64,
}

/// Whether an error says that there is no space, to what needs some.
pub fn is_no_space(op: IoOp, errno: Errno) -> bool {
    !matches!(op, IoOp::Read | IoOp::Status | IoOp::Flush) && matches!(errno, Errno::ENOSPC | Errno::EDQUOT)
}

/// Whether an error may pass by itself.
pub fn is_transient(errno: Errno) -> bool {
    matches!(errno, Errno::EAGAIN | Errno::EINTR | Errno::EBUSY | Errno::ENOMEM | Errno::ENOBUFS)
}

impl Retry {
    /// An I/O has failed, at `now` (ns). Gives when to try it again; none: its error is final.
    pub fn judge(&self, op: IoOp, errno: Errno, failures: &mut Failures, now: u64) -> Option<u64> {
        if failures.count == 0 {
            failures.since = now;
        }
        failures.count += 1;
        let again = match errno {
            _ if op == IoOp::Flush => false,
            errno if is_no_space(op, errno) => self.no_space == NoSpace::Hold,
            errno => is_transient(errno) && now - failures.since < self.limit,
        };
        let pause = PAUSE_FIRST.checked_shl(failures.count - 1).unwrap_or(PAUSE_MAX).min(PAUSE_MAX);
        again.then_some(now + pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: IoOp = IoOp::Write { fua: false };

    #[test]
    fn a_transient_error_is_tried_again_less_and_less_often_until_the_limit() {
        let retry = Retry { limit: 10_000_000_000, no_space: NoSpace::Report };
        let (mut failures, mut now, mut pauses) = (Failures::default(), 5, Vec::new());
        while let Some(at) = retry.judge(IoOp::Read, Errno::EBUSY, &mut failures, now) {
            pauses.push((at - now) / 1_000_000);
            now = at;
        }
        assert_eq!(pauses[..4], [1, 2, 4, 8]);
        assert!(pauses.iter().all(|ms| *ms <= 1000) && now >= 10_000_000_005, "{pauses:?}");
        assert_eq!(retry.judge(WRITE, Errno::EIO, &mut Failures::default(), 0), None);
        assert_eq!(retry.judge(IoOp::Flush, Errno::EAGAIN, &mut Failures::default(), 0), None);
    }

    #[test]
    fn a_write_without_space_is_held_for_ever_if_so_configured() {
        let mut failures = Failures { count: 1000, since: 0 };
        let report = Retry { limit: u64::MAX, no_space: NoSpace::Report };
        assert_eq!(report.judge(WRITE, Errno::ENOSPC, &mut failures, 1 << 60), None);
        let hold = Retry { limit: 0, no_space: NoSpace::Hold };
        assert_eq!(hold.judge(WRITE, Errno::EDQUOT, &mut failures, 1 << 60), Some((1 << 60) + PAUSE_MAX));
        assert_eq!(hold.judge(IoOp::Flush, Errno::ENOSPC, &mut failures, 0), None);
        assert_eq!(hold.judge(IoOp::Read, Errno::ENOSPC, &mut failures, 0), None);
    }
}
