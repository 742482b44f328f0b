//! `convert`: a disk, with all its parents, into a new file of another format. `copy`: one image into a new one. Zeros are left out.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use drivers::vhd::layout::{self, Layout, NewImage, Piece};
use drivers::vhd::{BLOCK_SIZE, FOOTER_SIZE, Footer, Kind, Source, Table, bitmap};
use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use nix::unistd::{Whence, lseek};

use super::create::{fits, new_uuid, now, reserve};
use super::disk::{self, Disk, Run};
use super::failure::{self, Failure, Result};
use super::file::table_piece;
use super::file::{ImageFile, Medium, NewFile, forget_image, write_footers, write_pieces};
use super::progress::Work;
use super::{Convert, Copy, Format};

/// What is left out if it is all zeros, bytes.
const CHUNK: u64 = 64 << 10;
/// What most data differs from zeros in, bytes: where it does, the rest of a chunk need not be read.
const PROBE: u64 = 4096;
/// Bytes that the kernel copies at once; between that, a signal is looked for.
const COPY_MAX: u64 = 16 << 20;
/// Bytes of a disk that are looked at together.
const STRIDE: u64 = 64 << 20;
/// Bytes of a copy by hand.
const BUFFER: usize = 1 << 20;

/// Writes the disk into a new file.
pub(super) fn convert(args: &Convert, parents: &[PathBuf]) -> Result<()> {
    // Not by what the file begins or ends with: that can be a guest's, and name files of the host.
    let from = args.from.unwrap_or(match args.to {
        Format::Raw => Format::Vhd,
        Format::Vhd => Format::Raw,
    });
    let disk = Disk::open(&args.source, from == Format::Vhd, parents)?;
    let work = Work::new(&args.target, disk.size)?;
    let target = NewFile::create(&args.target)?;
    let mut copier = Copier { target: target.get(), work, buffer: Vec::new() };
    match args.to {
        Format::Raw => copier.raw(&disk)?,
        Format::Vhd => copier.vhd(&disk)?,
    }
    drop(copier);
    target.keep()
}

/// Copies one image, which has no parent, into a new file.
pub(super) fn copy(args: &Copy) -> Result<()> {
    if args.key.is_some() || args.key_from_stdin {
        let text = "no encrypted image is written: copy it without a key (-k, -E)";
        return Err(Failure::new(Errno::EOPNOTSUPP, &args.new_name, text));
    }
    let disk = Disk::open(&args.name, true, &[])?;
    let kind = disk.kind();
    if kind == Some(Kind::Differencing) {
        let text = "it has a parent, which is not copied: vhd-util convert --from vhd --to vhd copies the whole disk";
        return Err(Failure::new(Errno::EINVAL, &args.name, text));
    }
    let work = Work::new(&args.new_name, disk.size)?;
    let target = NewFile::create(&args.new_name)?;
    let mut copier = Copier { target: target.get(), work, buffer: Vec::new() };
    match kind {
        Some(Kind::Fixed) => copier.fixed(&disk)?,
        _ => copier.vhd(&disk)?,
    }
    drop(copier);
    target.keep()
}

struct Copier<'a> {
    target: &'a ImageFile,
    work: Work,
    buffer: Vec<u8>,
}

impl Copier<'_> {
    fn failed(&self) -> impl Fn(io::Error) -> Failure + '_ {
        |error| match error.raw_os_error() {
            Some(errno) if errno == Errno::EINTR as i32 => {
                Failure::new(Errno::EINTR, &self.target.path, "interrupted; a new file is removed")
            }
            _ => Failure::io(&self.target.path, "write it")(error),
        }
    }

    /// Writes the disk's bytes, one after the other.
    fn raw(&mut self, disk: &Disk) -> Result<()> {
        let target = self.target;
        let size = target.size().map_err(Failure::io(&target.path, "see its size"))?;
        if target.is_device() && size < disk.size {
            let text = format!("the device has {size} bytes, and the disk {}", disk.size);
            return Err(Failure::new(Errno::ENOSPC, &target.path, text));
        }
        target.set_len(disk.size).map_err(Failure::io(&target.path, "write it"))?;
        self.bytes(disk)
    }

    /// Writes a fixed image, all of whose bytes are reserved.
    fn fixed(&mut self, disk: &Disk) -> Result<()> {
        let target = self.target;
        fits(target, disk.size)?;
        reserve(target, disk.size).map_err(Failure::io(&target.path, "write it"))?;
        self.bytes(disk)?;
        let footer = Footer::new(Kind::Fixed, disk.size, new_uuid()?, now());
        write_footers(target, &footer, disk.size).map_err(Failure::io(&target.path, "write it"))
    }

    /// Writes what is not zero of the disk's bytes.
    fn bytes(&mut self, disk: &Disk) -> Result<()> {
        let mut at = 0;
        while at < disk.size {
            let len = STRIDE.min(disk.size - at);
            disk.runs(at, len, &mut |run| self.run(&run, run.at).map_err(self.failed()))?;
            at += len;
            self.work.at(at);
        }
        Ok(())
    }

    /// Copies what is not zero of a run to byte `to`. Of a device, the rest is made zeros.
    fn run(&mut self, run: &Run, to: u64) -> io::Result<()> {
        self.work.look()?;
        let data = self.data(run)?;
        let Some((file, from)) = run.from else { return self.zero(to, run.len) };
        let mut done = 0;
        for Range { start, end } in data {
            self.zero(to + done, start - done)?;
            self.copy(file, from + start, to + start, end - start)?;
            done = end;
        }
        self.zero(to + done, run.len - done)
    }

    /// A new file is all zeros.
    fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        if self.target.is_device() && len > 0 { self.target.zero(at, len) } else { Ok(()) }
    }

    /// The parts of a run, counted from its beginning, that are not zeros.
    fn data(&mut self, run: &Run) -> io::Result<Vec<Range<u64>>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        let Some((file, from)) = run.from else { return Ok(found) };
        let mut at = 0;
        while at < run.len {
            let (begin, end) = segment(file, from + at, from + run.len);
            at = begin - from;
            while at < end - from {
                let len = CHUNK.min(end - from - at);
                if self.has_data(file, from + at, len)? {
                    match found.last_mut().filter(|last| last.end == at) {
                        Some(last) => last.end += len,
                        None => found.push(at..at + len),
                    }
                }
                at += len;
            }
        }
        Ok(found)
    }

    fn has_data(&mut self, file: &File, at: u64, len: u64) -> io::Result<bool> {
        self.buffer.resize(BUFFER, 0);
        let probe = PROBE.min(len);
        for (at, len) in [(at, probe), (at + probe, len - probe)] {
            let part = &mut self.buffer[..len as usize];
            disk::read(file, at, part)?;
            if part.iter().any(|byte| *byte != 0) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Copies bytes: the kernel does, sharing them if the file system can, or it is done by hand.
    fn copy(&mut self, file: &File, from: u64, to: u64, len: u64) -> io::Result<()> {
        let (mut from, mut to, mut left) = (from, to, len);
        while left > 0 {
            self.work.look()?;
            let (mut source_at, mut target_at) = (from as i64, to as i64);
            let now = left.min(COPY_MAX) as usize;
            let target = self.target.file.as_fd();
            let done = match copy_file_range(file, Some(&mut source_at), target, Some(&mut target_at), now) {
                Ok(done) if done > 0 => done,
                // Not between these files, or not at all.
                Ok(_) | Err(Errno::EXDEV | Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EBADF) => {
                    self.buffer.resize(BUFFER, 0);
                    let part = &mut self.buffer[..now.min(BUFFER)];
                    disk::read(file, from, part)?;
                    self.target.file.write_all_at(part, to)?;
                    part.len()
                }
                Err(Errno::EINTR) => 0,
                Err(errno) => return Err(errno.into()),
            };
            from += done as u64;
            to += done as u64;
            left -= done as u64;
        }
        Ok(())
    }

    /// Writes a dynamic image: the metadata, the blocks that are not all zeros, the table, the footers.
    fn vhd(&mut self, disk: &Disk) -> Result<()> {
        let size = disk.size.next_multiple_of(512);
        let new = NewImage { size, room: 0, uuid: new_uuid()?, unix_seconds: now(), parent: None };
        let layout = Layout::new(&new).map_err(failure::layout(&self.target.path))?;
        let target = self.target;
        let failed = Failure::io(&target.path, "write it");
        fits(target, layout.end)?;
        forget_image(target).map_err(&failed)?;
        write_pieces(target, &layout.pieces()).map_err(&failed)?;
        let (mut table, mut batmap) = (Table::empty(layout.header.entries()), layout.batmap.clone());
        let (mut end, block_size) = (layout.end, u64::from(BLOCK_SIZE));
        for block in 0..size.div_ceil(block_size) as u32 {
            let begin = u64::from(block) * block_size;
            let len = block_size.min(size - begin);
            let at = layout::block_place(end, &layout.header);
            if self.block(disk, begin, len.min(disk.size - begin), at, &layout)? {
                let mut bits = vec![0; layout.header.bitmap_size() as usize];
                bitmap::set(&mut bits, 0..(len / 512) as u32);
                write_pieces(target, &[Piece { at, bytes: bits }]).map_err(&failed)?;
                table.set(block, at);
                batmap.set(block, true);
                end = at + layout.header.block_len();
                target.set_len(end).map_err(&failed)?;
            }
            self.work.at(begin);
        }
        let finish = || {
            target.sync()?;
            write_pieces(target, &[table_piece(layout.header.table_at(), &table)])?;
            write_pieces(target, &layout::batmap_pieces(&batmap))?;
            target.sync()?;
            write_footers(target, &layout.footer, end)
        };
        finish().map_err(&failed)
    }

    /// Writes a block's data, and says whether there is any that is not zero.
    fn block(&mut self, disk: &Disk, begin: u64, len: u64, at: u64, layout: &Layout) -> Result<bool> {
        let target = self.target;
        let data_at = at + layout.header.bitmap_size();
        let mut runs = Vec::new();
        disk.runs(begin, len, &mut |run| {
            runs.push((self.data(&run).map_err(Failure::io(&target.path, "write it"))?, run));
            Ok(())
        })?;
        if runs.iter().all(|(data, _)| data.is_empty()) {
            return Ok(false);
        }
        if target.is_device() {
            let size = target.size().map_err(Failure::io(&target.path, "see its size"))?;
            if at + layout.header.block_len() + FOOTER_SIZE as u64 > size {
                return Err(Failure::io(&target.path, "write it")(Errno::ENOSPC.into()));
            }
            target.zero(at, layout.header.block_len()).map_err(Failure::io(&target.path, "write it"))?;
        }
        for (data, run) in runs {
            let Some((file, from)) = run.from else { continue };
            for Range { start, end } in data {
                let to = data_at + run.at - begin + start;
                self.copy(file, from + start, to, end - start).map_err(self.failed())?;
            }
        }
        Ok(true)
    }
}

/// The next part of a range of a file that the file system does not know to be zeros.
fn segment(file: &File, at: u64, end: u64) -> (u64, u64) {
    let begin = match lseek(file, at as i64, Whence::SeekData) {
        Ok(begin) => (begin as u64).min(end),
        Err(Errno::ENXIO) => end,
        // It does not know.
        Err(_) => return (at, end),
    };
    let next = lseek(file, begin as i64, Whence::SeekHole).map_or(end, |next| next as u64);
    (begin, if begin < end { next.clamp(begin + 1, end) } else { end })
}
