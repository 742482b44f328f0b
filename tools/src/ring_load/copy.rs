//! `ring-load copy-in` and `copy-out`: a file into or out of the disk, with a few large requests in flight.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use tapdisk::client::{self, Disk};

use super::args::{Connection, CopyIn, CopyOut, Copying};
use super::lane::{self, Done, Lane, Op};
use super::{Failure, Outcome};

/// What a hole is made of.
const HOLE: usize = 4096;

/// Copies a file into the disk, and flushes.
pub(super) fn copy_in(args: &CopyIn) -> Result<Outcome, Failure> {
    let failed = |source| Failure::File { path: args.file.clone(), source };
    let mut file = File::open(&args.file).map_err(failed)?;
    let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let (disk, mut copier) = Copier::new(&args.connection, &args.copying)?;
    let sector = u64::from(disk.sector_size);
    if disk.read_only {
        return Err(Failure::Usage("the disk is read-only".into()));
    }
    if !len.is_multiple_of(sector) && !args.pad {
        let text = format!("{}: {len} bytes are no whole sectors of {sector} bytes", args.file.display());
        return Err(Failure::Usage(format!("{text}; --pad fills the last one with zeros")));
    }
    let padded = len.next_multiple_of(sector);
    fits(&disk, args.copying.offset, padded, &args.file)?;
    let began = Instant::now();
    let bar = progress(len);
    copier.all(
        padded,
        |copier, at, size| {
            let have = (len - at).min(u64::from(size)) as usize;
            let (data, padding) = copier.buffer[..size as usize].split_at_mut(have);
            file.read_exact_at(data, at).map_err(failed)?;
            padding.fill(0);
            copier.send(at, size);
            Ok(())
        },
        |_, done| {
            bar.inc(u64::from(done.len));
            Ok(())
        },
    )?;
    copier.flush()?;
    bar.finish_and_clear();
    summary(len, began);
    Ok(Outcome::Good)
}

/// Copies the disk, or a part of it, into a file.
pub(super) fn copy_out(args: &CopyOut) -> Result<Outcome, Failure> {
    let failed = |source| Failure::File { path: args.file.clone(), source };
    let (disk, mut copier) = Copier::new(&args.connection, &args.copying)?;
    let offset = args.copying.offset;
    let len = args.size.unwrap_or_else(|| disk.bytes().saturating_sub(offset));
    let sectors = len.next_multiple_of(u64::from(disk.sector_size));
    fits(&disk, offset, sectors, &args.file)?;
    let file = File::create(&args.file).map_err(failed)?;
    let regular = file.metadata().map_err(failed)?.is_file();
    if args.sparse && !regular {
        let kind =
            if is_block(&file) { "a device keeps what it has in place of a hole" } else { "it can't have holes" };
        return Err(Failure::Usage(format!("{}: --sparse is for regular files: {kind}", args.file.display())));
    }
    let began = Instant::now();
    let bar = progress(len);
    copier.all(
        sectors,
        |copier, at, size| {
            copier.receive(at, size);
            Ok(())
        },
        |copier, done| {
            let at = done.offset - offset;
            let size = (len - at).min(u64::from(done.len)) as usize;
            let data = &mut copier.buffer[..size];
            copier.lane.memory().read(copier.lane.data_at(done.slot), data);
            if args.sparse { write_sparse(&file, data, at) } else { file.write_all_at(data, at) }.map_err(failed)?;
            bar.inc(size as u64);
            Ok(())
        },
    )?;
    if regular {
        file.set_len(len).map_err(failed)?;
    }
    bar.finish_and_clear();
    summary(len, began);
    Ok(Outcome::Good)
}

fn is_block(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device())
}

fn fits(disk: &Disk, offset: u64, len: u64, file: &Path) -> Result<(), Failure> {
    lane::check_size(disk, offset)?;
    if offset.checked_add(len).is_none_or(|end| end > disk.bytes()) {
        let text = format!("{}: {len} bytes at {offset} do not fit", file.display());
        return Err(Failure::Usage(format!("{text} the disk's {} bytes", disk.bytes())));
    }
    Ok(())
}

/// Writes what is not zero.
fn write_sparse(file: &File, data: &[u8], at: u64) -> io::Result<()> {
    let zero = |piece: &[u8]| piece.iter().all(|byte| *byte == 0);
    let mut from = 0;
    while from < data.len() {
        let rest = &data[from..];
        let pieces =
            |wanted: bool| rest.chunks(HOLE).take_while(|piece| zero(piece) == wanted).map(<[u8]>::len).sum();
        let hole: usize = pieces(true);
        if hole > 0 {
            from += hole;
            continue;
        }
        let run: usize = pieces(false);
        file.write_all_at(&rest[..run], at + from as u64)?;
        from += run;
    }
    Ok(())
}

fn progress(len: u64) -> ProgressBar {
    // It hides itself where standard error is no terminal.
    let bar = ProgressBar::new(len);
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn summary(len: u64, began: Instant) {
    let seconds = began.elapsed().as_secs_f64();
    let rate = len as f64 / f64::from(1 << 20) / seconds.max(1e-9);
    super::say(format_args!("{len} bytes in {seconds:.2} s, {rate:.1} MiB/s"));
}

/// A lane, and where in the disk the file is.
struct Copier {
    lane: Lane,
    offset: u64,
    request: u32,
    buffer: Vec<u8>,
}

impl Copier {
    fn new(connection: &Connection, copying: &Copying) -> Result<(Disk, Copier), Failure> {
        let probe = lane::options(connection.abi, 1, 1, 4096, None);
        // Large requests are wished for, not needed: what the server takes is asked first.
        let disk = lane::connect(connection, &probe, 4096)?.disk;
        let most = copying.bs.min(u64::from(lane::max_request(&disk.limits))) as u32;
        let request = most / disk.sector_size * disk.sector_size;
        if request == 0 {
            return Err(Failure::Usage(format!("--bs must be at least a sector of {} bytes", disk.sector_size)));
        }
        let each = lane::options(connection.abi, 1, 1, request, None).data_pages;
        let depth = copying.depth.min(disk.limits.data_pages / each).max(1);
        let order = (0..=disk.limits.ring_page_order).find(|order| probe.abi.entries(*order) >= depth);
        let order = order.unwrap_or(disk.limits.ring_page_order);
        let depth = depth.min(probe.abi.entries(order));
        let options = lane::options(connection.abi, 1, depth, request, Some(order));
        let mut client = lane::connect(connection, &options, request)?;
        let queue = client.queues.pop().ok_or(client::Error::Handshake("no queue"))?;
        let lane = Lane::new(queue, depth, request, connection.timeout, None);
        let buffer = vec![0; request as usize];
        Ok((client.disk, Copier { lane, offset: copying.offset, request, buffer }))
    }

    /// Starts a write of what is in the buffer.
    fn send(&mut self, at: u64, size: u32) {
        self.lane.memory().write(self.lane.data_at(self.lane.next_slot()), &self.buffer[..size as usize]);
        self.lane.start(Op::Write, self.offset + at, size, 0);
    }

    fn receive(&mut self, at: u64, size: u32) {
        self.lane.start(Op::Read, self.offset + at, size, 0);
    }

    /// Has `start` called for each piece of `len` bytes, and `finish` for each that is done, in any order.
    fn all(
        &mut self,
        len: u64,
        mut start: impl FnMut(&mut Copier, u64, u32) -> Result<(), Failure>,
        mut finish: impl FnMut(&mut Copier, &Done) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut at = 0;
        while at < len || self.lane.outstanding() > 0 {
            while let Some(done) = self.lane.reap()? {
                if !done.ok() {
                    return Err(done.failure());
                }
                finish(self, &done)?;
            }
            while at < len && self.lane.room() {
                let size = (len - at).min(u64::from(self.request)) as u32;
                start(self, at, size)?;
                at += u64::from(size);
                // The server works on this one while the next is read.
                self.lane.publish()?;
            }
            if self.lane.outstanding() > 0 {
                self.lane.wait()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Failure> {
        self.lane.start(Op::Flush, 0, 0, 0);
        self.lane.publish()?;
        loop {
            self.lane.wait()?;
            if let Some(done) = self.lane.reap()? {
                return if done.ok() { Ok(()) } else { Err(done.failure()) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_sparse_file_has_its_data_and_no_more() {
        let mut file = tempfile::tempfile().unwrap();
        let mut data = vec![0; 64 * HOLE + 100];
        data[5] = 1;
        data[40 * HOLE..41 * HOLE].fill(2);
        data[64 * HOLE + 99] = 3;
        write_sparse(&file, &data, 0).unwrap();
        file.set_len(data.len() as u64).unwrap();
        let mut read = Vec::new();
        file.read_to_end(&mut read).unwrap();
        assert_eq!(read, data);
        assert!(file.metadata().unwrap().blocks() * 512 <= 4 * HOLE as u64, "holes where there are zeros");
    }
}
