//! What image files need beyond std: sizes and alignments of block devices, discard, locks.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, PosixFadviseAdvice, fallocate, fcntl, posix_fadvise};
use nix::sys::stat::{major, minor};
use nix::sys::statfs::{NFS_SUPER_MAGIC, fstatfs};

use super::io::IoOp;
use super::{known, result};

#[expect(clippy::disallowed_methods, reason = "of the macros")]
mod ioctl {
    // include/uapi/linux/fs.h
    nix::ioctl_read_bad!(blksszget, 0x1268, libc::c_int);
    nix::ioctl_read_bad!(blkpbszget, 0x127b, libc::c_uint);
    nix::ioctl_read!(blkgetsize64, 0x12, 114, usize);
    nix::ioctl_read_bad!(blkroget, 0x125e, libc::c_int);
    nix::ioctl_write_ptr_bad!(blkdiscard, 0x1277, [u64; 2]);
    nix::ioctl_write_ptr_bad!(blkzeroout, 0x127f, [u64; 2]);
}

/// What a file or block device is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// A block device rather than a regular file.
    pub block_device: bool,
    /// Bytes.
    pub size: u64,
    /// Logical sector of a block device; 512 for a file.
    pub logical: u32,
    /// Physical sector of a block device; for a file the file system's preferred unit, at most 4096.
    pub physical: u32,
}

/// Size and sectors of an open file or block device; anything else is an error.
pub fn geometry(file: &File) -> io::Result<Geometry> {
    let meta = file.metadata()?;
    if meta.file_type().is_block_device() {
        let fd = file.as_raw_fd();
        let (mut size, mut logical, mut physical) = (0usize, 0, 0);
        // SAFETY: each ioctl stores one integer of the declared type.
        unsafe {
            ioctl::blkgetsize64(fd, &raw mut size)?;
            ioctl::blksszget(fd, &raw mut logical)?;
            ioctl::blkpbszget(fd, &raw mut physical)?;
        }
        return Ok(Geometry { block_device: true, size: size as u64, logical: logical as u32, physical });
    }
    if !meta.file_type().is_file() {
        return Err(neither());
    }
    let physical = meta.blksize().clamp(512, 4096) as u32;
    Ok(Geometry { block_device: false, size: meta.len(), logical: 512, physical })
}

/// Whether an open block device is read-only: the kernel opens it for writing all the same, and fails each write.
pub fn is_read_only(device: &File) -> io::Result<bool> {
    let mut read_only = 0;
    // SAFETY: the ioctl stores one integer of the declared type.
    unsafe { ioctl::blkroget(device.as_raw_fd(), &raw mut read_only)? };
    Ok(read_only != 0)
}

/// Opens a regular file or a block device for reading, and nothing else, be it only for a moment.
pub fn open_storage(path: &Path) -> io::Result<(File, Geometry)> {
    check_storage(path)?;
    // It may have become something else meanwhile.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let geometry = geometry(&file)?;
    // Only to open it must not wait.
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok((file, geometry))
}

/// An error where it is neither, or not there: to open a FIFO waits for its other side, and some character devices do something.
pub fn check_storage(path: &Path) -> io::Result<()> {
    let kind = std::fs::metadata(path)?.file_type();
    match kind.is_file() || kind.is_block_device() {
        true => Ok(()),
        false if kind.is_dir() => Err(Errno::EISDIR.into()),
        false => Err(neither()),
    }
}

/// Forgets what the page cache has of a file, and is on the disk: what was written past it may be missing there, where somebody read meanwhile.
pub fn forget_cached(file: &File) -> Result<(), Errno> {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
}

/// Bytes that no file has, and that stand for something else: who changes an image's metadata, and who reads an image.
const CHANGES: i64 = i64::MAX - 1;
const READERS: i64 = i64::MAX - 2;

/// How long a tapdisk waits for a change of an image's metadata, as it opens the image and before it closes it.
pub const CHANGE: Duration = Duration::from_secs(5);

/// Locks what others than the program that writes an image's data may change of it, for as long as the file is open for writing or until
/// [`unlock_changes`]: another lock than that of the whole file (an open file description's, fcntl(2)). EAGAIN: another has it, and kept it
/// for so long. Blocks. On a network's file system, which takes the lock of the whole file for one of all bytes, there is none.
pub fn lock_changes(file: &File, patience: Duration) -> Result<(), Errno> {
    if !has_both_locks(file) {
        return Ok(());
    }
    let end = Instant::now() + patience;
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&byte(libc::F_WRLCK, CHANGES))) {
            Err(Errno::EAGAIN | Errno::EACCES) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Errno::EACCES) => return Err(Errno::EAGAIN),
            locked => return or_none(locked),
        }
    }
}

/// Lets go of it.
pub fn unlock_changes(file: &File) -> Result<(), Errno> {
    if !has_both_locks(file) {
        return Ok(());
    }
    or_none(fcntl(file, FcntlArg::F_OFD_SETLK(&byte(libc::F_UNLCK, CHANGES))))
}

/// Says, as long as the file is open, that an image is read.
pub fn lock_as_reader(file: &File) -> Result<(), Errno> {
    if !has_both_locks(file) {
        return Ok(());
    }
    or_none(fcntl(file, FcntlArg::F_OFD_SETLK(&byte(libc::F_RDLCK, READERS))))
}

/// Whether others than this open file may read the image. On a network's file system nobody knows.
pub fn has_other_readers(file: &File) -> Result<bool, Errno> {
    if !has_both_locks(file) {
        return Ok(true);
    }
    let mut found = byte(libc::F_WRLCK, READERS);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
    Ok(i32::from(found.l_type) != libc::F_UNLCK)
}

/// Without an error where a file system has no such locks.
fn or_none(locked: Result<i32, Errno>) -> Result<(), Errno> {
    match locked {
        Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => Ok(()),
        other => other.map(drop),
    }
}

fn byte(kind: libc::c_int, at: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: at, l_len: 1, l_pid: 0 }
}

/// Whether the lock of the whole file (flock(2)) and those of bytes are two things: not with NFS and SMB.
fn has_both_locks(file: &File) -> bool {
    const CIFS: i64 = 0xff53_4d42;
    const SMB2: i64 = 0xfe53_4d42;
    let kind = fstatfs(file).map(|stat| stat.filesystem_type().0 & 0xffff_ffff);
    !kind.is_ok_and(|kind| [NFS_SUPER_MAGIC.0, CIFS, SMB2].contains(&kind))
}

fn neither() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "is neither a regular file nor a block device")
}

/// The process that holds the file's lock (flock(2)), from /proc/locks (proc(5)). 0 and -1 are those that this one cannot see. None: nobody does.
pub fn lock_holder(file: &File) -> Option<i32> {
    lock_holders(file).first().copied()
}

/// All processes that hold it, or wait for it.
pub fn lock_holders(file: &File) -> Vec<i32> {
    let Ok(meta) = file.metadata() else { return Vec::new() };
    let wanted = format!("{:02x}:{:02x}:{}", major(meta.dev()), minor(meta.dev()), meta.ino());
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let holder = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().filter(|field| *field != "->").collect();
        let of_file = fields.get(1) == Some(&"FLOCK") && fields.get(5) == Some(&wanted.as_str());
        fields.get(4).filter(|_| of_file)?.parse().ok()
    };
    locks.lines().filter_map(holder).collect()
}

/// What tells a file from all others, whatever its name is: device and inode; of a block device, which may have several inodes, its number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileIdentity(u64, u64);

/// That of a file.
pub fn file_id(meta: &Metadata) -> FileIdentity {
    if meta.file_type().is_block_device() {
        FileIdentity(0, meta.rdev())
    } else {
        FileIdentity(meta.dev(), meta.ino())
    }
}

/// Whether a file, of which that is known, is an open one, or the same block device.
pub fn same_file(one: &Metadata, other: &File) -> bool {
    other.metadata().is_ok_and(|other| file_id(one) == file_id(&other))
}

/// What O_DIRECT demands of (memory, offset and length), in bytes, where the kernel says so (statx, since 6.1).
pub fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    const STATX_DIOALIGN: u32 = 0x2000;
    // SAFETY: the struct holds only integers.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor itself; `stat` is where the result goes.
    let done =
        unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, STATX_DIOALIGN, &raw mut stat) };
    (done == 0 && stat.stx_mask & STATX_DIOALIGN != 0 && stat.stx_dio_offset_align != 0)
        .then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

/// One of an engine's files, and how it was opened.
#[derive(Debug)]
pub struct Backing {
    /// The file.
    pub file: File,
    /// With O_DIRECT.
    pub direct: bool,
    /// It is a block device rather than a regular file.
    pub block_device: bool,
}

impl Backing {
    /// Gives a range's space back. Blocks.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        if self.block_device {
            // SAFETY: the ioctl reads two integers.
            unsafe { ioctl::blkdiscard(self.file.as_raw_fd(), &[offset, len]) }.map(drop)
        } else {
            let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(self.file.as_fd(), how, offset as i64, len as i64)
        }
    }

    /// Zeroes a range, with `unmap` by giving its space back if that is possible. Blocks.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), Errno> {
        if self.block_device {
            // SAFETY: the ioctl reads two integers.
            return unsafe { ioctl::blkzeroout(self.file.as_raw_fd(), &[offset, len]) }.map(drop);
        }
        if unmap && self.discard(offset, len).is_ok() {
            return Ok(());
        }
        let range = fallocate(self.file.as_fd(), FallocateFlags::FALLOC_FL_ZERO_RANGE, offset as i64, len as i64);
        match range {
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => self.write_zeroes_by_hand(offset, len),
            other => other,
        }
    }

    /// For file systems without FALLOC_FL_ZERO_RANGE, tmpfs among them.
    fn write_zeroes_by_hand(&self, mut offset: u64, mut len: u64) -> Result<(), Errno> {
        #[repr(align(4096))]
        struct Zeroes([u8; 65536]);
        static ZEROES: Zeroes = Zeroes([0; 65536]);
        while len > 0 {
            let now = len.min(ZEROES.0.len() as u64) as usize;
            let done = nix::sys::uio::pwrite(self.file.as_fd(), &ZEROES.0[..now], offset as i64)? as u64;
            if done == 0 {
                return Err(Errno::EIO);
            }
            offset += done;
            len -= done;
        }
        Ok(())
    }

    /// Answers an [`IoOp::Status`] by `lseek(2)`, which may read the file system's metadata. A
    /// block device, and what a file has beyond its end, is all data: nothing promises that it reads as zeros cheaply.
    pub fn status(&self, io: &super::io::Io) -> Result<u64, Errno> {
        use nix::unistd::{Whence, lseek};
        const RUNS: usize = 64;
        let mut runs = [0u64; RUNS];
        let count = RUNS.min(io.memory_len() / 8);
        let (mut at, end) = (io.offset, io.offset + io.len);
        for (i, run) in runs[..count].iter_mut().enumerate() {
            let data = i % 2 == 0;
            let whence = if data { Whence::SeekHole } else { Whence::SeekData };
            let next = loop {
                match lseek(&self.file, at as i64, whence) {
                    _ if self.block_device => break end,
                    Ok(next) => break (next as u64).min(end),
                    // There is no more data; from the file's end on, no more file.
                    Err(Errno::ENXIO) => break end,
                    Err(Errno::EINTR) => {}
                    // Whoever takes what is not known for a hole loses it.
                    Err(errno) => return Err(errno),
                }
            };
            *run = next - at;
            at = next;
            if at == end {
                break;
            }
        }
        let bytes: &[u8] = zerocopy::IntoBytes::as_bytes(&runs[..count]);
        io.put(bytes);
        Ok(io.len)
    }

    /// Carries an I/O out, with the system calls that wait for it. Gives its bytes, fewer than asked only where the system
    /// gave fewer.
    pub fn carry_out(&self, io: &super::io::Io) -> Result<u64, Errno> {
        let done = match io.op {
            IoOp::Read | IoOp::Write { .. } => transfer(&self.file, io),
            IoOp::Flush => nix::unistd::fdatasync(&self.file).map(|()| 0),
            IoOp::Discard => self.discard(io.offset, io.len).map(|()| io.len),
            IoOp::WriteZeroes { unmap } => self.write_zeroes(io.offset, io.len, unmap).map(|()| io.len),
            IoOp::Status => self.status(io),
        };
        done.map_err(known)
    }
}

/// `preadv2(2)` or `pwritev2(2)`.
fn transfer(file: &File, io: &super::io::Io) -> Result<u64, Errno> {
    let nowait = if io.nowait { libc::RWF_NOWAIT } else { 0 };
    let (fd, iovecs, offset) = (file.as_raw_fd(), io.iovecs(), io.offset as i64);
    let count = iovecs.len() as libc::c_int;
    loop {
        // SAFETY: the iovecs are within memories that `io` keeps.
        let done = unsafe {
            match io.op {
                IoOp::Write { fua } => {
                    let dsync = if fua { libc::RWF_DSYNC } else { 0 };
                    libc::pwritev2(fd, iovecs.as_ptr(), count, offset, nowait | dsync)
                }
                _ => libc::preadv2(fd, iovecs.as_ptr(), count, offset, nowait),
            }
        };
        match result(done as i64) {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}
