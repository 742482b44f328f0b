//! CPU time of another process and of this thread.

use std::fs;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

/// CPU time that the threads of `pid` have used. Those that have ended are not in it.
pub(super) fn process_cpu(pid: u32) -> Option<Duration> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let mut sum = Duration::ZERO;
    for task in tasks.flatten() {
        // The first number is the nanoseconds on a CPU.
        let Ok(schedstat) = fs::read_to_string(task.path().join("schedstat")) else { continue };
        sum += Duration::from_nanos(schedstat.split_whitespace().next()?.parse().ok()?);
    }
    Some(sum)
}

/// CPU time that this thread has used.
pub(super) fn thread_cpu() -> Duration {
    let time =
        |time: TimeVal| Duration::new(time.tv_sec().unsigned_abs(), time.tv_usec().unsigned_abs() as u32 * 1000);
    getrusage(UsageWho::RUSAGE_THREAD)
        .map_or(Duration::ZERO, |usage| time(usage.user_time()) + time(usage.system_time()))
}
