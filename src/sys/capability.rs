//! Capabilities (capabilities(7)) of a thread.

use std::io;

use super::result;

/// CAP_IPC_LOCK, as a bit: memory is locked beyond RLIMIT_MEMLOCK.
pub const IPC_LOCK: u64 = 1 << 14;

/// `_LINUX_CAPABILITY_VERSION_3` of `linux/capability.h`: 64 bits of each set, in two halves.
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    /// 0: the thread that calls.
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The sets of a thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities([Half; 2]);

impl Capabilities {
    /// Those of this thread.
    pub fn of_thread() -> io::Result<Capabilities> {
        let mut header = Header { version: VERSION_3, pid: 0 };
        let mut sets = [Half::default(); 2];
        // SAFETY: the kernel reads and writes the header, and stores the two halves that its version stands for.
        let done = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
        result(done)?;
        Ok(Capabilities(sets))
    }

    /// Makes them those of this thread.
    pub fn set(&self) -> io::Result<()> {
        let mut header = Header { version: VERSION_3, pid: 0 };
        // SAFETY: the kernel reads the header and the two halves that its version stands for, and changes nothing but the calling
        // thread's credentials.
        let done = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, self.0.as_ptr()) };
        result(done).map(drop).map_err(Into::into)
    }

    /// The effective set, a bit for each.
    pub fn effective(&self) -> u64 {
        u64::from(self.0[0].effective) | u64::from(self.0[1].effective) << 32
    }

    /// The same sets, of which none is in effect but those of these bits.
    #[must_use]
    pub fn with_effective(&self, kept: u64) -> Capabilities {
        let [low, high] = self.0;
        let keep = |half: Half, kept: u32| Half { effective: half.effective & kept, ..half };
        Capabilities([keep(low, kept as u32), keep(high, (kept >> 32) as u32)])
    }

    /// Without all but those of these bits, in each of the sets; and none is for programs that are run.
    #[must_use]
    pub fn only(&self, kept: u64) -> Capabilities {
        let Capabilities(halves) = self.with_effective(kept);
        let bits = [kept as u32, (kept >> 32) as u32];
        let keep =
            |half: usize| Half { permitted: halves[half].permitted & bits[half], inheritable: 0, ..halves[half] };
        Capabilities([keep(0), keep(1)])
    }
}
