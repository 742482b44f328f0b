//! What a process says of itself.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::ForkResult;

use super::result;

/// This thread, and all that it starts, write memory back: the kernel's allocations on its behalf do not wait for I/O
/// (`PR_SET_IO_FLUSHER`, prctl(2), since Linux 5.6). Needs CAP_SYS_RESOURCE.
pub fn set_io_flusher() -> io::Result<()> {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: takes integers only; the unused ones must be 0.
    match unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What this process makes is not to be written by everybody, or a group, unless it says so: whatever the umask was, it has these two bits.
pub fn keep_from_others() {
    let writers = Mode::S_IWGRP | Mode::S_IWOTH;
    let old = umask(writers);
    umask(old | writers);
}

/// All threads allocate from one arena. glibc gives each thread that allocates one of its own, which is locked in memory with
/// all that it has; and none of ours allocates often.
pub fn share_one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes integers only. It fails for values that it does not know, and then all stays as it was.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// No program that this process starts gets a descriptor of its, but for the standard ones (close_range(2), since Linux 5.11; before that
/// one by one).
pub fn keep_from_children() -> io::Result<()> {
    // SAFETY: takes integers only, and changes a flag of descriptors, whoever has them.
    if unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) } == 0 {
        return Ok(());
    }
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let Some(fd) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if fd > 2 {
            // SAFETY: as above. One that is closed by now is an error, and nothing else.
            unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
    Ok(())
}

/// A process, which stays that one whoever gets its id later (pidfd_open(2), since Linux 5.3).
#[derive(Debug)]
pub struct Process(OwnedFd);

impl Process {
    /// The one that has this id now.
    pub fn open(pid: i32) -> io::Result<Process> {
        // SAFETY: takes integers only, and gives a new descriptor or an error.
        let fd = result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        // SAFETY: the kernel has just made it, and nobody else has it.
        Ok(Process(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }))
    }

    /// Sends it a signal. ESRCH: it has ended.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let nothing = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is open, and no more is said of the signal than its number.
        let done = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), signal as libc::c_int, nothing, 0)
        };
        result(done).map(drop).map_err(Into::into)
    }
}

/// Goes on in a new process; gives None in it, and its id in this one. Where other threads run in this process, that is an error: only
/// the one that calls would go on, and what the others have locked, the allocator for one, would stay locked.
pub fn fork() -> io::Result<Option<i32>> {
    let threads = std::fs::read_dir("/proc/self/task")
        .map_err(|error| io::Error::new(error.kind(), format!("/proc/self/task: {error}; /proc has to be mounted")))?
        .count();
    if threads != 1 {
        return Err(io::Error::other(format!(
            "the process has {threads} threads: it goes to the background before it makes any"
        )));
    }
    // SAFETY: this thread is the only one, as just seen, and nobody else makes any in this process. So no lock is held by one that
    // is not there in the new process.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child.as_raw())),
        ForkResult::Child => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no /proc")]
    fn where_threads_run_there_is_no_fork() {
        let (stay, until) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || until.recv());
        let error = match fork() {
            Err(error) => error.to_string(),
            // It is not there to test.
            Ok(None) => std::process::abort(),
            Ok(Some(id)) => panic!("process {id} has one thread of several"),
        };
        drop(stay);
        let _ = other.join();
        assert!(error.contains(" threads: it goes to the background before it makes any"), "{error}");
    }
}
