//! One client of the local ring.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{MsgFlags, recv};
use nix::unistd::ftruncate;
use zerocopy::{FromBytes, FromZeros};

use super::Config;
use super::wire::{ABIS, Hello, INFO_READ_ONLY, MAGIC, Welcome};
use crate::frontend::blkif::queue::{Doorbell, Limits, MUTE, Pages, RingQueue};
use crate::frontend::blkif::ring::{BackRing, Shared};
use crate::frontend::{DiskInfo, Intake};
use crate::memory;
use crate::request::Request;
use crate::sys;
use crate::sys::memory::{Memory, PAGE_SIZE};

/// What a request's tag says.
pub(super) struct Tag {
    pub(super) client: usize,
    queue: u16,
    place: u16,
}

impl Tag {
    /// Of the queue's place 0.
    fn pack(client: u64, queue: usize) -> u64 {
        client << 32 | (queue as u64) << 16
    }

    pub(super) fn unpack(tag: u64) -> Tag {
        let part = |shift: u32| (tag >> shift) as u16;
        Tag { client: (tag >> 32) as usize, queue: part(16), place: part(0) }
    }
}

/// The data pages of a queue.
struct DataPages {
    memory: Arc<Memory>,
    base: usize,
    count: u32,
}

impl Pages for DataPages {
    fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    fn offset(&self, gref: u32) -> Option<usize> {
        (gref < self.count).then(|| self.base + gref as usize * PAGE_SIZE)
    }
}

struct Queue {
    ring: RingQueue,
    pages: DataPages,
    /// The client writes it. It is never read: each write is an event of its own for an edge-triggered poll.
    kick: EventFd,
    /// We write it.
    call: EventFd,
    doorbell: Doorbell,
    muted_until: Option<u64>,
}

/// A client, at first one that has not said hello.
pub(super) struct Client {
    pub(super) number: u64,
    socket: OwnedFd,
    token: usize,
    /// Until when it must have said hello; none once it has.
    hello_until: Option<u64>,
    queues: Vec<Queue>,
    connected: bool,
}

impl Client {
    pub(super) fn new(number: u64, socket: OwnedFd, token: usize, hello_until: u64) -> Client {
        Client { number, socket, token, hello_until: Some(hello_until), queues: Vec::new(), connected: false }
    }

    /// Whether it has its rings.
    pub(super) fn is_connected(&self) -> bool {
        self.connected
    }

    /// The socket has something. An error is the connection's end.
    pub(super) fn receive(
        &mut self,
        config: &Config,
        disk: &DiskInfo,
        registry: &Registry,
    ) -> io::Result<Option<Hello>> {
        // One byte more than the message, to see one that is too long.
        let mut bytes = [0; size_of::<Hello>() + 1];
        // Descriptors that nobody asked for are not received.
        let count = match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => return Ok(None),
            other => other?,
        };
        if count == 0 {
            return Err(io::Error::other("hung up"));
        }
        if self.hello_until.take().is_none() {
            return Err(io::Error::other("spoke after its hello"));
        }
        let hello =
            Hello::read_from_bytes(&bytes[..count]).map_err(|_| (Errno::EPROTO, "a hello has 24 bytes".into()));
        let result = hello.and_then(|hello| self.connect(&hello, config, disk, registry).map(|()| hello));
        result.map(Some).map_err(|(errno, message)| {
            // It may have hung up meanwhile; then there is nobody to tell.
            let _ = Welcome::refusal(errno, &message).send(&self.socket, &[]);
            io::Error::other(message)
        })
    }

    fn connect(
        &mut self,
        hello: &Hello,
        config: &Config,
        disk: &DiskInfo,
        registry: &Registry,
    ) -> Result<(), (Errno, String)> {
        let refuse = |message: String| Err((Errno::EINVAL, message));
        let Some(&abi) = ABIS.get(hello.abi as usize) else {
            return refuse(format!("abi {} is none of 0 (native), 1 (x86_32), 2 (x86_64)", hello.abi));
        };
        let Hello { magic, ring_page_order, queues, data_pages, .. } = *hello;
        if magic != MAGIC {
            return refuse("the hello's magic is wrong".into());
        }
        if ring_page_order > config.max_ring_page_order {
            let most = config.max_ring_page_order;
            return refuse(format!("ring_page_order {ring_page_order} is above the limit {most}"));
        }
        if !(1..=config.max_queues).contains(&queues) {
            return refuse(format!("queues {queues} is not from 1 to {}", config.max_queues));
        }
        let pages = u64::from(data_pages) * u64::from(queues);
        if !(1..=u64::from(config.max_data_pages)).contains(&pages) {
            let most = config.max_data_pages;
            return refuse(format!("{data_pages} data pages in {queues} queues are not from 1 to {most}"));
        }
        let failed = |error: io::Error| {
            let errno = sys::errno_of(&error);
            (errno, format!("cannot set the rings up: {error}"))
        };
        memory::room(0).map_err(failed)?;
        let queue_bytes = ((1usize << ring_page_order) + data_pages as usize) * PAGE_SIZE;
        let (memfd, memory) = share(queue_bytes * queues as usize).map_err(failed)?;
        if config.lock_memory {
            memory::lock_of_client(&memory);
        }
        let limits =
            Limits { indirect_segments: config.max_indirect_segments as usize, sector_size: disk.sector_size };
        for queue in 0..queues as usize {
            let base = queue * queue_bytes;
            let ring = BackRing::attach(Shared::new(Arc::clone(&memory), base, abi, ring_page_order));
            let base = base + (PAGE_SIZE << ring_page_order);
            let pages = DataPages { memory: Arc::clone(&memory), base, count: data_pages };
            let queue = Queue::new(RingQueue::new(ring, limits), pages).map_err(failed)?;
            self.queues.push(queue);
            self.watch(self.queues.len() - 1, registry).map_err(failed)?;
        }
        // What was made for it may have been the last that there was.
        memory::room(0).map_err(failed)?;
        let doorbells = self.queues.iter().flat_map(|queue| [queue.kick.as_fd(), queue.call.as_fd()]);
        let fds: Vec<BorrowedFd> = std::iter::once(memfd.as_fd()).chain(doorbells).collect();
        Welcome::new(config, disk, queue_bytes as u64).send(&self.socket, &fds).map_err(failed)?;
        self.connected = true;
        Ok(())
    }

    fn watch(&self, queue: usize, registry: &Registry) -> io::Result<()> {
        let fd = self.queues[queue].kick.as_fd().as_raw_fd();
        registry.register(&mut SourceFd(&fd), Token(self.token + 1 + queue), Interest::READABLE)
    }

    pub(super) fn deregister(&self, registry: &Registry) {
        // A doorbell that is muted is not registered, which is no matter here.
        for fd in self.queues.iter().map(|queue| queue.kick.as_fd()).chain([self.socket.as_fd()]) {
            let _ = registry.deregister(&mut SourceFd(&fd.as_raw_fd()));
        }
    }

    pub(super) fn kicked(&mut self, queue: usize) {
        if let Some(queue) = self.queues.get_mut(queue) {
            queue.doorbell.ring(&mut queue.ring.ring_mut().counters);
        }
    }

    /// Pulls from all queues. An error says why the client has to go.
    pub(super) fn pull(&mut self, intake: &mut Intake, index: u64, registry: &Registry) -> Result<(), String> {
        if self.hello_until.is_some_and(|until| intake.now >= until) {
            return Err("did not say hello".into());
        }
        for i in 0..self.queues.len() {
            let queue = &mut self.queues[i];
            let tag = Tag::pack(index, i);
            let taken = queue.ring.pull(intake, &queue.pages, tag);
            let taken = taken.map_err(|overflow| format!("queue {i}: {overflow}"))?;
            if queue.doorbell.storm(taken, &mut queue.ring.ring_mut().counters) {
                let fd = queue.kick.as_fd().as_raw_fd();
                registry.deregister(&mut SourceFd(&fd)).map_err(|error| error.to_string())?;
                queue.muted_until = Some(intake.now + MUTE);
            } else if queue.muted_until.is_some_and(|until| intake.now >= until) {
                queue.muted_until = None;
                self.watch(i, registry).map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    pub(super) fn answer(&mut self, tag: &Tag, request: &Request) {
        if let Some(queue) = self.queues.get_mut(usize::from(tag.queue)) {
            queue.ring.answer(tag.place, request);
        }
    }

    pub(super) fn publish(&mut self) {
        for queue in &mut self.queues {
            if queue.ring.ring_mut().publish() {
                // Full only if the client made it so, and then it is awake.
                let _ = queue.call.write(1);
            }
        }
    }

    pub(super) fn ready(&self) -> bool {
        self.queues.iter().any(|queue| queue.ring.ring().ready())
    }

    pub(super) fn arm(&mut self) -> bool {
        self.queues.iter_mut().fold(false, |ready, queue| queue.ring.ring_mut().arm() | ready)
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        self.queues.iter().filter_map(|queue| queue.muted_until).chain(self.hello_until).min()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.queues.iter().map(|queue| queue.ring.in_flight()).sum()
    }

    pub(super) fn inspect(&self) -> serde_json::Value {
        let queue = |queue: &Queue| {
            serde_json::json!({
                "entries": queue.ring.ring().entries(),
                "in_flight": queue.ring.in_flight(),
                "indices": queue.ring.ring().indices(),
                "counters": queue.ring.ring().counters,
                "muted": queue.muted_until.is_some(),
            })
        };
        let queues: Vec<_> = self.queues.iter().map(queue).collect();
        serde_json::json!({ "client": self.number, "connected": self.hello_until.is_none(), "queues": queues })
    }
}

impl Queue {
    fn new(ring: RingQueue, pages: DataPages) -> io::Result<Queue> {
        let doorbell = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let (kick, call) = (doorbell()?, doorbell()?);
        Ok(Queue { ring, pages, kick, call, doorbell: Doorbell::default(), muted_until: None })
    }
}

/// Sealed shared memory of `len` bytes.
fn share(len: usize) -> io::Result<(OwnedFd, Arc<Memory>)> {
    let fd = memfd_create(c"tapdisk-ring", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    ftruncate(&fd, len as i64)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
    let memory = Memory::shared(&fd, len)?;
    Ok((fd, Arc::new(memory)))
}

impl Welcome {
    fn new(config: &Config, disk: &DiskInfo, queue_bytes: u64) -> Welcome {
        Welcome {
            magic: MAGIC,
            sectors: disk.sectors(),
            queue_bytes,
            error: 0,
            sector_size: disk.sector_size,
            physical_sector_size: disk.physical_sector_size,
            info: if disk.read_only { INFO_READ_ONLY } else { 0 },
            max_ring_page_order: config.max_ring_page_order,
            max_queues: config.max_queues,
            max_data_pages: config.max_data_pages,
            max_indirect_segments: config.max_indirect_segments,
            message: [0; 128],
        }
    }

    /// An answer that says why there is none.
    pub(super) fn refusal(errno: Errno, message: &str) -> Welcome {
        let mut welcome = Welcome { magic: MAGIC, error: errno as i32, ..Welcome::new_zeroed() };
        let text = &message.as_bytes()[..message.len().min(welcome.message.len() - 1)];
        welcome.message[..text.len()].copy_from_slice(text);
        welcome
    }
}
