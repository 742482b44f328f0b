//! A disk's client by libblkio: a front end of vhost-user-blk that nobody here has written.

use std::fs::OpenOptions;
use std::mem::MaybeUninit;
use std::time::Duration;

use super::sys;
use crate::common::PATIENCE;
use crate::common::served::Served;
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use nix::fcntl::{FallocateFlags, fallocate};
use tapdisk::sys::memory::Memory;

/// Bytes of memory for data.
pub(super) const DATA: usize = 4 << 20;

pub(super) struct Client {
    pub(super) queues: Vec<Blkioq>,
    /// The same memory, mapped here again.
    pub(super) memory: Memory,
    region: MemoryRegion,
    pub(super) disk: Blkio,
}

impl Client {
    pub(super) fn connect(served: &Served, queues: i32) -> Client {
        Client::connect_to(served, queues, false)
    }

    pub(super) fn connect_to(served: &Served, queues: i32, read_only: bool) -> Client {
        let mut disk = Blkio::new("virtio-blk-vhost-user").unwrap();
        disk.set_str("path", served.sockets().join("vhost").to_str().unwrap()).unwrap();
        disk.set_bool("read-only", read_only).unwrap();
        disk.connect().unwrap();
        disk.set_i32("num-queues", queues).unwrap();
        let queues = disk.start().unwrap().queues;
        let region = disk.alloc_mem_region(DATA).unwrap();
        disk.map_mem_region(&region).unwrap();
        let path = format!("/proc/self/fd/{}", region.fd);
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let memory = Memory::shared(&file, region.fd_offset as usize + DATA).unwrap();
        Client { queues, memory, region, disk }
    }

    fn place(&self, at: usize) -> usize {
        self.region.fd_offset as usize + at
    }

    /// The address of a byte of the memory.
    pub(super) fn place_of(&self, at: usize) -> usize {
        self.region.addr + at
    }

    /// Gives all pages of it back to the host, as a balloon does.
    pub(super) fn give_back(&self) {
        let path = format!("/proc/self/fd/{}", self.region.fd);
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, flags, self.region.fd_offset, DATA as i64).unwrap();
    }

    pub(super) fn fill(&self, at: usize, bytes: &[u8]) {
        self.memory.write(self.place(at), bytes);
    }

    pub(super) fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(self.place(at), &mut bytes);
        bytes
    }

    /// Asks for something by a queue, and gives what came of it: 0, or an errno below 0.
    pub(super) fn done(&mut self, queue: usize, ask: impl FnOnce(&mut Blkioq, usize)) -> i32 {
        ask(&mut self.queues[queue], self.region.addr);
        self.ended(queue, 1)[0].1
    }

    /// Waits until so many have ended: their marks, and what came of each.
    pub(super) fn ended(&mut self, queue: usize, count: usize) -> Vec<(usize, i32)> {
        let mut completions = [const { MaybeUninit::<Completion>::uninit() }; 128];
        let mut left: Duration = PATIENCE;
        let ended = self.queues[queue].do_io(&mut completions[..count], count, Some(&mut left), None).unwrap();
        assert_eq!(ended, count);
        completions[..count].iter().map(sys::ended).collect()
    }

    pub(super) fn read(&mut self, offset: u64, at: usize, len: usize) -> i32 {
        self.done(0, |queue, base| queue.read(offset, (base + at) as *mut u8, len, 0, ReqFlags::empty()))
    }

    pub(super) fn write(&mut self, offset: u64, at: usize, len: usize, flags: ReqFlags) -> i32 {
        self.done(0, |queue, base| queue.write(offset, (base + at) as *const u8, len, 0, flags))
    }
}
