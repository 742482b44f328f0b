//! What a front end hands over as descriptors: its guest's memory, and eventfds.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::stat::fstat;

use super::wire::MemoryRegion;
use crate::frontend::virtio::guest::{Place, Region};
use crate::sys::memory::Memory;

/// A region that is mapped, and whether the front end could still make its file shorter: then an access beyond the end would be the end of
/// this process (SIGBUS).
pub(super) struct Mapped {
    pub(super) region: Region,
    pub(super) may_shrink: bool,
}

/// Maps a region. Its file has to be one of memory (memfd, tmpfs, hugetlbfs), which are the ones that have seals: of others a call could hang.
pub(super) fn map(wanted: &MemoryRegion, fd: &OwnedFd) -> Result<Mapped, String> {
    let MemoryRegion { guest, len, user, offset } = *wanted;
    let end = offset.checked_add(len).filter(|end| len > 0 && *end < 1 << 47);
    let (Some(end), Some(_), Some(_)) = (end, guest.checked_add(len), user.checked_add(len)) else {
        return Err(format!("a memory region of {len:#x} bytes at {guest:#x}, at {offset:#x} of its file"));
    };
    let seals = match fcntl(fd, FcntlArg::F_GET_SEALS) {
        Ok(seals) => SealFlag::from_bits_truncate(seals),
        Err(Errno::EINVAL) => {
            return Err(
                "the guest's memory is in a file on a disk: give it memory of a memfd, of tmpfs or of hugetlbfs \
                        (QEMU: -object memory-backend-memfd,share=on)"
                    .into(),
            );
        }
        Err(error) => return Err(format!("the seals of the guest's memory: {error}")),
    };
    let stat = fstat(fd).map_err(|error| format!("the size of the guest's memory: {error}"))?;
    let size = stat.st_size as u64;
    if size < end {
        return Err(format!("a memory region ends at {end:#x} of a file of {size:#x} bytes"));
    }
    // Whole pages, which may be huge ones.
    let mapped = end.next_multiple_of(stat.st_blksize.max(4096) as u64);
    let memory = Memory::shared_as_it_is(fd, mapped as usize).map_err(|error| {
        format!("cannot map {end:#x} bytes of the guest's memory: {error} (where all memory is locked, RLIMIT_MEMLOCK counts it)")
    })?;
    let place = Place { memory: Arc::new(memory), offset: offset as usize };
    let may_shrink = !seals.contains(SealFlag::F_SEAL_SHRINK);
    Ok(Mapped { region: Region { guest, len, user, place }, may_shrink })
}

/// Has an eventfd of the front end's be written without waiting. Another kind of file, whose write could wait, is refused.
pub(super) fn check_eventfd(fd: &OwnedFd) -> Result<(), String> {
    // Where there is no /proc, nobody knows.
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok();
    if link.is_some_and(|link| link.as_os_str() != "anon_inode:[eventfd]") {
        return Err("a descriptor for notifications is no eventfd".into());
    }
    let flags = fcntl(fd.as_fd(), FcntlArg::F_GETFL).map_err(|error| error.to_string())?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags)).map_err(|error| error.to_string())?;
    Ok(())
}

/// Notifies.
pub(super) fn ring(fd: &OwnedFd) {
    // Full only if its owner made it so, and then it is awake.
    let _ = nix::unistd::write(fd, &1_u64.to_ne_bytes());
}
