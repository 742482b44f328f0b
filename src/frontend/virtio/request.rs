//! A chain of descriptors as a request of a disk (Virtual I/O Device 1.2, section 5.2.6): a header of 16 bytes and data, which we read; data and
//! a byte of status, which we write. Each may be cut into buffers at any byte.

use std::sync::Arc;

use super::guest::{Place, Regions};
use super::ring::{Broken, Buffer};
use crate::request::{Op, Payload, TooScattered};
use crate::sys::memory::Memory;

/// Done.
pub const OK: u8 = 0;
/// Failed.
pub const IOERR: u8 = 1;
/// Not a request that this disk knows.
pub const UNSUPP: u8 = 2;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Bytes of the header.
const HEADER: u64 = 16;
/// Bytes of a range of DISCARD and WRITE_ZEROES.
const RANGE: u64 = 16;
/// The flag of such a range: its space may be given back.
const UNMAP: u32 = 1;
/// Bytes of a disk's serial.
pub const SERIAL: usize = 20;

/// What a chain asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// An operation of the disk: its first byte, and bytes.
    Disk(Op, u64, u64),
    /// The disk's serial.
    Serial,
    /// Nothing: it gets this status at once.
    Status(u8),
}

/// What a driver has negotiated of the requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Negotiated {
    /// Every write is durable when it is answered.
    pub write_through: bool,
    /// DISCARD.
    pub discard: bool,
    /// WRITE_ZEROES.
    pub write_zeroes: bool,
}

/// The buffers of a chain, and how many bytes of each kind.
#[derive(Debug)]
pub struct Chain {
    /// Those that are read first.
    pub buffers: Vec<Buffer>,
    readable: u64,
    writable: u64,
}

impl Chain {
    /// With room for so many buffers.
    pub fn new(buffers: u16) -> Chain {
        Chain { buffers: Vec::with_capacity(buffers.into()), readable: 0, writable: 0 }
    }

    /// Its buffers are complete.
    pub fn measure(&mut self) {
        let sum = |writable| {
            let of = self.buffers.iter().filter(move |buffer| buffer.writable == writable);
            of.map(|buffer| u64::from(buffer.len)).sum()
        };
        (self.readable, self.writable) = (sum(false), sum(true));
    }

    /// Gives `each` the places of `len` bytes from byte `at` on, of those that are written or of the others.
    fn places<E: From<super::guest::Outside>>(
        &self,
        regions: &Regions,
        writable: bool,
        at: u64,
        len: u64,
        mut each: impl FnMut(&Arc<Memory>, usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut skip, mut left) = (at, len);
        for buffer in self.buffers.iter().filter(|buffer| buffer.writable == writable) {
            let full = u64::from(buffer.len);
            let from = skip.min(full);
            skip -= from;
            let count = (full - from).min(left);
            if count > 0 {
                let start = buffer.at.checked_add(from).ok_or(super::guest::Outside)?;
                regions.places(start, count, &mut each)?;
                left -= count;
            }
        }
        Ok(())
    }

    /// Copies bytes out of those that we read.
    fn read(&self, regions: &Regions, at: u64, to: &mut [u8]) -> Result<(), Broken> {
        let len = to.len() as u64;
        let mut rest = to;
        self.places(regions, false, at, len, |memory, offset, count| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(count);
            memory.read(offset, now);
            rest = later;
            Ok(())
        })
    }

    /// Where the byte of the status is: the very last that is written.
    pub fn status(&self, regions: &Regions) -> Result<Place, Broken> {
        let at = self.writable.checked_sub(1).ok_or(Broken::NoStatus)?;
        let mut place = Err(Broken::Outside);
        self.places(regions, true, at, 1, |memory, offset, _| {
            place = Ok(Place { memory: Arc::clone(memory), offset });
            Ok::<_, Broken>(())
        })?;
        place
    }

    /// What it asks for. The header, and ranges, are copied out once, here.
    pub fn command(&self, regions: &Regions, negotiated: Negotiated) -> Result<Command, Broken> {
        if self.readable < HEADER {
            return Ok(Command::Status(IOERR));
        }
        let mut header = [0; HEADER as usize];
        self.read(regions, 0, &mut header)?;
        let [kind, _, low, high] = words(header);
        let sector = u64::from(low) | u64::from(high) << 32;
        let at = |sector: u64| sector.checked_mul(drivers::SECTOR_SIZE);
        let (out, room) = (self.readable - HEADER, self.writable - 1);
        Ok(match (kind, at(sector)) {
            (IN, Some(at)) => Command::Disk(Op::Read, at, room),
            (OUT, Some(at)) => Command::Disk(Op::Write { fua: negotiated.write_through }, at, out),
            (IN | OUT, None) => Command::Status(IOERR),
            (FLUSH, _) => Command::Disk(Op::Flush, 0, 0),
            (GET_ID, _) => Command::Serial,
            (DISCARD, _) if negotiated.discard => self.range(regions, false)?,
            (WRITE_ZEROES, _) if negotiated.write_zeroes => self.range(regions, true)?,
            // SCSI commands of old among them.
            _ => Command::Status(UNSUPP),
        })
    }

    /// The one range of a DISCARD or WRITE_ZEROES: the configuration space says that there is no more than one.
    fn range(&self, regions: &Regions, zeroes: bool) -> Result<Command, Broken> {
        if self.readable != HEADER + RANGE {
            return Ok(Command::Status(IOERR));
        }
        let mut range = [0; RANGE as usize];
        self.read(regions, HEADER, &mut range)?;
        let [low, high, sectors, flags] = words(range);
        let unmap = flags & UNMAP != 0;
        if flags & !UNMAP != 0 || (unmap && !zeroes) {
            return Ok(Command::Status(UNSUPP));
        }
        let op = if zeroes { Op::WriteZeroes { unmap } } else { Op::Discard };
        let at = (u64::from(low) | u64::from(high) << 32).checked_mul(drivers::SECTOR_SIZE);
        let len = u64::from(sectors) * drivers::SECTOR_SIZE;
        // A range that is empty or not on the disk is the disk's to refuse.
        Ok(at.map_or(Command::Status(IOERR), |at| Command::Disk(op, at, len)))
    }

    /// Adds the places of an operation's data to a payload; too many of them are `Ok(Err)`.
    pub fn data(&self, regions: &Regions, op: Op, payload: &mut Payload) -> Result<Result<(), TooScattered>, Broken> {
        let (writable, at, len) = match op {
            Op::Read => (true, 0, self.writable - 1),
            Op::Write { .. } => (false, HEADER, self.readable - HEADER),
            _ => return Ok(Ok(())),
        };
        let pushed = self.places(regions, writable, at, len, |memory, offset, count| {
            payload.push(memory, offset, count as u32).map_err(|TooScattered| Unfit::Scattered)
        });
        match pushed {
            Ok(()) => Ok(Ok(())),
            Err(Unfit::Scattered) => Ok(Err(TooScattered)),
            Err(Unfit::Outside) => Err(Broken::Outside),
        }
    }

    /// Writes the serial, without a NUL if it is that long, and gives how many bytes were written.
    pub fn put_serial(&self, regions: &Regions, serial: &[u8; SERIAL]) -> Result<u32, Broken> {
        let len = (self.writable - 1).min(SERIAL as u64);
        let mut rest = &serial[..len as usize];
        self.places(regions, true, 0, len, |memory, offset, count| {
            let (now, later) = rest.split_at(count);
            memory.write(offset, now);
            rest = later;
            Ok::<_, Broken>(())
        })?;
        Ok(len as u32)
    }
}

enum Unfit {
    Outside,
    Scattered,
}

impl From<super::guest::Outside> for Unfit {
    fn from(_: super::guest::Outside) -> Unfit {
        Unfit::Outside
    }
}

fn words(bytes: [u8; 16]) -> [u32; 4] {
    let (words, _) = bytes.as_chunks::<4>();
    [0, 1, 2, 3].map(|i| u32::from_le_bytes(words[i]))
}
