//! The chain of image layers: plans a request, one extent at a time, into transfers for the queue, and takes their
//! ends back.

use std::path::PathBuf;

use drivers::{Extent, Format, Plan};
use nix::errno::Errno;

use crate::queue::{Queue, Transfer};
use crate::request::{Op, RequestId, Slots};
use crate::sys::io::{FileId, IoOp};

/// One image of the chain.
pub struct Layer {
    /// What says where data is.
    pub format: Box<dyn Format>,
    /// Its file in the engine.
    pub file: FileId,
    /// The file's name, for messages.
    pub path: PathBuf,
}

/// The layers of a disk. For now one: the leaf.
pub struct Stack {
    leaf: Layer,
}

impl Stack {
    /// A stack of one layer.
    pub fn new(leaf: Layer) -> Stack {
        Stack { leaf }
    }

    /// The layer that is written.
    pub fn leaf(&self) -> &Layer {
        &self.leaf
    }

    /// Plans a request as far as the queue has room. True: wholly.
    pub fn start(&mut self, id: RequestId, slots: &mut Slots, queue: &mut Queue) -> bool {
        let request = slots.get_mut(id);
        let (plan_as, op) = match request.op {
            Op::Read => (drivers::Op::Read, IoOp::Read),
            Op::Write { fua } => (drivers::Op::Write, IoOp::Write { fua }),
            // The disk has drained and flushed before, and so only its own data is left to be made durable.
            Op::Barrier => (drivers::Op::Write, IoOp::Write { fua: true }),
            Op::Discard => (drivers::Op::Discard, IoOp::Discard),
            Op::WriteZeroes { unmap } => (drivers::Op::WriteZeroes, IoOp::WriteZeroes { unmap }),
            Op::Status => (drivers::Op::Read, IoOp::Status),
            Op::Flush => return self.flush(id, slots, queue),
        };
        while request.planned < request.len {
            let extent = Extent { offset: request.offset + request.planned, len: request.len - request.planned };
            match self.leaf.format.plan(plan_as, extent) {
                Plan::Data { at, count } => {
                    let file = self.leaf.file;
                    let transfer = Transfer { op, file, offset: at, len: count, owner: id, at: request.planned };
                    if !queue.push(transfer) {
                        return false;
                    }
                    request.pieces += 1;
                    request.planned += count;
                }
                Plan::Zero { count } => {
                    if op == IoOp::Read {
                        request.payload.zero(request.planned, count);
                    }
                    request.planned += count;
                }
            }
        }
        true
    }

    /// Makes what is written durable, on behalf of a request. True: the queue had room.
    pub fn flush(&mut self, id: RequestId, slots: &mut Slots, queue: &mut Queue) -> bool {
        let transfer = Transfer { op: IoOp::Flush, file: self.leaf.file, offset: 0, len: 0, owner: id, at: 0 };
        let room = queue.push(transfer);
        if room {
            slots.get_mut(id).pieces += 1;
        }
        room
    }

    /// A transfer has ended. Gives its error, if it is the request's first one for what the caller logs.
    pub fn finish(&mut self, transfer: &Transfer, result: Result<u64, Errno>, slots: &mut Slots) -> Option<Errno> {
        let request = slots.get_mut(transfer.owner);
        request.pieces -= 1;
        let error = match result {
            Err(errno) => errno,
            Ok(done) if done < transfer.len && transfer.op == IoOp::Read => {
                // The file ends here. That is in order only where it ended when it was opened.
                if transfer.offset + done < self.leaf.format.zeros_from() {
                    Errno::EIO
                } else {
                    request.payload.zero(transfer.at + done, transfer.len - done);
                    return None;
                }
            }
            Ok(_) => return None,
        };
        request.error.get_or_insert(error);
        Some(error)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::queue::{Limits, SubmitMode};
    use crate::sys::memory::Memory;

    /// Every other 4096 bytes are nowhere; the others are at half their offset.
    struct Sparse;

    impl Format for Sparse {
        fn name(&self) -> &'static str {
            "sparse"
        }
        fn size(&self) -> u64 {
            1 << 20
        }
        fn plan(&mut self, _: drivers::Op, extent: Extent) -> Plan {
            let count = extent.len.min(4096 - extent.offset % 4096);
            let at = extent.offset / 8192 * 4096 + extent.offset % 4096;
            if (extent.offset / 4096).is_multiple_of(2) { Plan::Data { at, count } } else { Plan::Zero { count } }
        }
        fn zeros_from(&self) -> u64 {
            1 << 19
        }
    }

    #[test]
    fn a_request_is_planned_extent_by_extent_as_far_as_there_is_room() {
        let engine = crate::engine::memory::null(4).unwrap();
        let limits = Limits { tiocbs: 2, iovecs: 4, merge_bytes: 0 };
        let mut queue = Queue::new(engine, SubmitMode::Inline, limits).unwrap();
        let mut stack = Stack::new(Layer { format: Box::new(Sparse), file: FileId(0), path: "x".into() });
        let mut slots = Slots::new(1, 1);
        let memory = Arc::new(Memory::anonymous(32768).unwrap());
        memory.write(0, &[0x77; 32768]);
        let request = slots.vacant().unwrap();
        (request.op, request.offset, request.len) = (Op::Read, 2048, 24576);
        request.payload.set_memory(&memory);
        request.payload.push(0, 24576);
        let id = slots.take().unwrap();
        assert!(!stack.start(id, &mut slots, &mut queue), "a third transfer has no room");
        let mut finished = Vec::new();
        for _ in 0..3 {
            queue.kick(&slots);
            queue.reap();
            while let Some((transfer, result)) = queue.next_finished() {
                assert_eq!(stack.finish(&transfer, result, &mut slots), None);
                finished.push((transfer.offset, transfer.at, transfer.len));
            }
            stack.start(id, &mut slots, &mut queue);
        }
        let request = slots.get(id);
        assert_eq!((request.planned, request.pieces), (24576, 0));
        assert_eq!(finished, [(2048, 0, 2048), (4096, 6144, 4096), (8192, 14336, 4096), (12288, 22528, 2048)]);
        let mut data = vec![0; 24576];
        memory.read(0, &mut data);
        let zeros = |range: std::ops::Range<usize>| data[range].iter().all(|byte| *byte == 0);
        assert!(zeros(2048..6144) && zeros(10240..14336) && zeros(18432..22528), "what is nowhere is zeros");
        assert!(data[6144..10240].iter().all(|byte| *byte == 0x77), "the rest is the engine's affair");
    }
}
