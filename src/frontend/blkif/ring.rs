//! One ring: shared indices and entries (Xen's public header `io/ring.h`), as the backend and as the client see it.
//!
//! The ring is some shared pages; how the other side is notified is the caller's business.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use super::wire::{Abi, Entry, RING_HEADER, Response};
use crate::sys::memory::Memory;

/// The client claims requests that can't be: more than there is room for, or fewer than there were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("req_prod {req_prod} is beyond the ring, req_cons is {req_cons}")]
pub struct Overflow {
    /// What it wrote as `req_prod`.
    pub req_prod: u32,
    /// What we had consumed.
    pub req_cons: u32,
}

/// Where the ring is, and how it is laid out.
#[derive(Clone, Debug)]
pub struct Shared {
    memory: Arc<Memory>,
    base: usize,
    abi: Abi,
    entries: u32,
    /// Place of the first entry, bytes of each, and what of an index is its number: worked out once for all requests.
    first: usize,
    entry_size: usize,
    mask: u32,
}

impl Shared {
    /// A ring of `1 << order` pages at byte `base` of `memory`.
    pub fn new(memory: Arc<Memory>, base: usize, abi: Abi, order: u32) -> Shared {
        let (entries, entry_size) = (abi.entries(order), abi.entry_size());
        Shared { memory, base, abi, entries, first: base + RING_HEADER, entry_size, mask: entries - 1 }
    }

    /// Entries, a power of two.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// The layout of its entries.
    pub fn abi(&self) -> Abi {
        self.abi
    }

    fn req_prod(&self) -> &AtomicU32 {
        self.memory.atomic_u32(self.base)
    }
    fn req_event(&self) -> &AtomicU32 {
        self.memory.atomic_u32(self.base + 4)
    }
    fn rsp_prod(&self) -> &AtomicU32 {
        self.memory.atomic_u32(self.base + 8)
    }
    fn rsp_event(&self) -> &AtomicU32 {
        self.memory.atomic_u32(self.base + 12)
    }

    fn entry(&self, index: u32) -> usize {
        self.first + (index & self.mask) as usize * self.entry_size
    }

    /// Moves a producer index, and says whether the other side asked for an event in between.
    fn push(&self, producer: &AtomicU32, event: &AtomicU32, new: u32) -> bool {
        let old = producer.load(Ordering::Relaxed);
        producer.store(new, Ordering::Release);
        // The index must be visible before the event is looked at: the other side does it the other way round.
        fence(Ordering::SeqCst);
        let event = event.load(Ordering::Relaxed);
        new.wrapping_sub(event) < new.wrapping_sub(old)
    }
}

/// The backend's side.
#[derive(Debug)]
pub struct BackRing {
    shared: Shared,
    req_cons: u32,
    rsp_prod_pvt: u32,
}

/// Its indices, for debug-queue.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Indices {
    /// The client's.
    pub req_prod: u32,
    /// Ours.
    pub req_cons: u32,
    /// When we want to be woken.
    pub req_event: u32,
    /// Ours, as the client sees it.
    pub rsp_prod: u32,
    /// Ours, not yet published.
    pub rsp_prod_pvt: u32,
    /// When the client wants to be woken.
    pub rsp_event: u32,
}

impl BackRing {
    /// Takes up a ring where its indices stand.
    pub fn attach(shared: Shared) -> BackRing {
        let rsp_prod = shared.rsp_prod().load(Ordering::Acquire);
        BackRing { shared, req_cons: rsp_prod, rsp_prod_pvt: rsp_prod }
    }

    /// Requests that are there and not consumed.
    pub fn pending(&self) -> Result<u32, Overflow> {
        let req_prod = self.shared.req_prod().load(Ordering::Acquire);
        let new = req_prod.wrapping_sub(self.req_cons);
        // Every request occupies an entry until it is answered. An index that goes back is one that goes far ahead.
        let unanswered = self.req_cons.wrapping_sub(self.rsp_prod_pvt);
        if new > self.shared.entries - unanswered {
            return Err(Overflow { req_prod, req_cons: self.req_cons });
        }
        Ok(new)
    }

    /// Copies the next request out. [`pending`](Self::pending) has said that there is one.
    pub fn pop(&mut self) -> Entry {
        let entry = Entry::read(self.shared.abi, &self.shared.memory, self.shared.entry(self.req_cons));
        self.req_cons = self.req_cons.wrapping_add(1);
        entry
    }

    /// Puts a response in, not yet visible.
    pub fn push(&mut self, response: Response) {
        let at = self.shared.entry(self.rsp_prod_pvt);
        response.write(self.shared.abi, &self.shared.memory, at);
        self.rsp_prod_pvt = self.rsp_prod_pvt.wrapping_add(1);
    }

    /// Makes the responses visible. True: the client wants to be notified.
    pub fn publish(&mut self) -> bool {
        let shared = &self.shared;
        shared.push(shared.rsp_prod(), shared.rsp_event(), self.rsp_prod_pvt)
    }

    /// Whether responses are not visible yet.
    pub fn unpublished(&self) -> bool {
        self.shared.rsp_prod().load(Ordering::Relaxed) != self.rsp_prod_pvt
    }

    /// Asks to be notified of the next request. True: there is one already.
    pub fn arm(&mut self) -> bool {
        self.arm_at(1)
    }

    /// Asks to be notified when `count` requests are there. True: they are there already, or the client broke the ring.
    pub fn arm_at(&mut self, count: u32) -> bool {
        self.shared.req_event().store(self.req_cons.wrapping_add(count), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        !matches!(self.pending(), Ok(pending) if pending < count)
    }

    /// The layout.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// All indices.
    pub fn indices(&self) -> Indices {
        let load = |index: &AtomicU32| index.load(Ordering::Relaxed);
        Indices {
            req_prod: load(self.shared.req_prod()),
            req_cons: self.req_cons,
            req_event: load(self.shared.req_event()),
            rsp_prod: load(self.shared.rsp_prod()),
            rsp_prod_pvt: self.rsp_prod_pvt,
            rsp_event: load(self.shared.rsp_event()),
        }
    }
}

/// The client's side: for the load tool and for tests, which also use it wrongly.
#[derive(Debug)]
pub struct FrontRing {
    shared: Shared,
    req_prod_pvt: u32,
    rsp_cons: u32,
}

impl FrontRing {
    /// Initialises the indices of a fresh ring (SHARED_RING_INIT).
    pub fn init(shared: Shared) -> FrontRing {
        shared.req_prod().store(0, Ordering::Relaxed);
        shared.rsp_prod().store(0, Ordering::Relaxed);
        shared.req_event().store(1, Ordering::Relaxed);
        shared.rsp_event().store(1, Ordering::Release);
        FrontRing { shared, req_prod_pvt: 0, rsp_cons: 0 }
    }

    /// Entries that are free.
    pub fn room(&self) -> u32 {
        self.shared.entries - self.req_prod_pvt.wrapping_sub(self.rsp_cons)
    }

    /// Puts a request in, not yet visible. The caller has seen that there is [`room`](Self::room).
    pub fn push(&mut self, entry: &Entry) {
        entry.write(&self.shared.memory, self.shared.entry(self.req_prod_pvt));
        self.req_prod_pvt = self.req_prod_pvt.wrapping_add(1);
    }

    /// Makes the requests visible. True: the backend wants to be notified.
    pub fn publish(&mut self) -> bool {
        self.shared.push(self.shared.req_prod(), self.shared.req_event(), self.req_prod_pvt)
    }

    /// The next response, if there is one.
    pub fn pop(&mut self) -> Option<Response> {
        if !self.ready() {
            return None;
        }
        let response = Response::read(&self.shared.memory, self.shared.entry(self.rsp_cons));
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        Some(response)
    }

    /// Whether a response is there.
    pub fn ready(&self) -> bool {
        self.shared.rsp_prod().load(Ordering::Acquire) != self.rsp_cons
    }

    /// Asks to be notified of the next response. True: there is one already.
    pub fn arm(&mut self) -> bool {
        self.arm_at(1)
    }

    /// Asks to be notified when `count` more responses are there. True: one is there already.
    pub fn arm_at(&mut self, count: u32) -> bool {
        self.shared.rsp_event().store(self.rsp_cons.wrapping_add(count), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.ready()
    }

    /// Writes `req_prod` as it is said, true or not.
    pub fn forge_req_prod(&mut self, value: u32) {
        self.shared.req_prod().store(value, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::{OP_FLUSH_DISKCACHE, RSP_OKAY};
    use super::*;

    fn pair() -> (FrontRing, BackRing) {
        let shared = Shared::new(Arc::new(Memory::anonymous(4096).unwrap()), 0, Abi::Native, 0);
        (FrontRing::init(shared.clone()), BackRing::attach(shared))
    }

    #[test]
    fn requests_go_out_and_answers_come_back_around_the_ring() {
        let (mut front, mut back) = pair();
        for id in 0..100u64 {
            assert_eq!((front.room(), back.pending()), (32, Ok(0)));
            front.push(&Entry::new(Abi::Native, OP_FLUSH_DISKCACHE, id));
            assert_eq!(back.pending(), Ok(0), "not published");
            front.publish();
            assert_eq!(back.pending(), Ok(1));
            assert_eq!(back.pop().id(), id);
            back.push(Response { id, operation: OP_FLUSH_DISKCACHE, status: RSP_OKAY });
            assert_eq!(front.pop(), None);
            back.publish();
            assert_eq!(front.pop().unwrap().id, id);
        }
    }

    #[test]
    fn who_sleeps_is_notified_once_and_who_looks_is_not() {
        let (mut front, mut back) = pair();
        let request = Entry::new(Abi::Native, OP_FLUSH_DISKCACHE, 0);
        assert!(!back.arm());
        front.push(&request);
        assert!(front.publish(), "the backend sleeps");
        front.push(&request);
        assert!(!front.publish(), "it has been notified");
        assert!(back.arm(), "two are there");
        back.pop();
        back.pop();
        assert!(!back.arm());
        front.push(&request);
        assert!(front.publish());
    }

    #[test]
    fn a_client_that_claims_too_much_is_found_out() {
        let (mut front, mut back) = pair();
        front.forge_req_prod(32);
        assert_eq!(back.pending(), Ok(32));
        back.pop();
        front.forge_req_prod(33);
        assert_eq!(back.pending(), Err(Overflow { req_prod: 33, req_cons: 1 }));
        front.forge_req_prod(u32::MAX);
        assert!(back.pending().is_err());
        assert!(back.arm(), "an overflow must not be slept on");
    }

    #[test]
    fn whatever_the_client_says_there_are_never_more_requests_than_free_entries() {
        // Wherever the indices are, also where they wrap around; with some requests taken, and some of those answered.
        for base in [0u32, 5, u32::MAX - 7] {
            for (taken, answered) in [(0u32, 0u32), (1, 0), (8, 3), (32, 0), (32, 32)] {
                let (mut front, mut back) = pair();
                (back.req_cons, back.rsp_prod_pvt) = (base.wrapping_add(taken), base.wrapping_add(answered));
                let free = 32 - (taken - answered);
                for claim in (0..40).chain((0..40).map(|back: u32| back.wrapping_neg())).chain([1 << 31]) {
                    front.forge_req_prod(back.req_cons.wrapping_add(claim));
                    assert_eq!(
                        back.pending().ok(),
                        (claim <= free).then_some(claim),
                        "{base} {taken} {answered} {claim}"
                    );
                }
            }
        }
    }
}
