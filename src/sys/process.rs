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
