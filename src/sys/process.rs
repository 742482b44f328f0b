//! What a process says of itself.

use std::io;

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

/// All threads allocate from one arena. glibc gives each thread that allocates one of its own, which is locked in memory with
/// all that it has; and none of ours allocates often.
pub fn share_one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes integers only. It fails for values that it does not know, and then all stays as it was.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
