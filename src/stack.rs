//! The chain of image layers: plans a request, one extent at a time, into transfers for the queue, and takes their
//! ends back.

use std::path::PathBuf;

use drivers::{Extent, Format, OpenError, Plan};
use nix::errno::Errno;

use crate::queue::{Queue, Transfer};
use crate::request::{Op, RequestId, Slots};
use crate::stats::now;
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
    /// The format's `zeros_from` when it was opened.
    zeros_at_open: u64,
    /// When the file was seen to have grown, ns of [`now`].
    grown_at: u64,
}

impl Stack {
    /// A stack of one layer.
    pub fn new(leaf: Layer) -> Stack {
        let zeros_at_open = leaf.format.zeros_from();
        Stack { leaf, zeros_at_open, grown_at: 0 }
    }

    /// The layer that is written.
    pub fn leaf(&self) -> &Layer {
        &self.leaf
    }

    /// Of a file in the engine: its layer, 0 being the leaf, and its path.
    pub fn place(&self, _file: FileId) -> (u32, String) {
        (0, self.leaf.path.display().to_string())
    }

    /// The leaf's file has that size now, in bytes. Gives the disk's.
    pub fn file_grown(&mut self, file_size: u64) -> Result<u64, OpenError> {
        let before = self.leaf.format.zeros_from();
        let size = self.leaf.format.file_grown(file_size)?;
        if self.leaf.format.zeros_from() != before {
            self.grown_at = now();
        }
        Ok(size)
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
                // The file ends here. That is in order only where it ended when it was looked at last; or, for a read
                // that was under way when it grew, earlier.
                let format = &self.leaf.format;
                let zeros = if request.born <= self.grown_at { self.zeros_at_open } else { format.zeros_from() };
                if transfer.offset + done < zeros {
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
    use crate::retry::Retry;
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
        let limits = Limits { tiocbs: 2, iovecs: 4, merge_bytes: 0, retry: Retry::default() };
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

    #[test]
    fn a_read_that_met_the_end_of_the_file_just_before_it_grew_has_lost_nothing() {
        let raw = drivers::Raw::new(4097, 512, drivers::OddSize::RoundUp).unwrap();
        let mut stack = Stack::new(Layer { format: Box::new(raw), file: FileId(0), path: "x".into() });
        let mut slots = Slots::new(2, 1);
        let mut read = |born| {
            let request = slots.vacant().unwrap();
            (request.op, request.offset, request.len, request.pieces) = (Op::Read, 4096, 512, 1);
            request.born = born;
            slots.take().unwrap()
        };
        let (before, after) = (read(now()), read(u64::MAX));
        assert_eq!(stack.file_grown(4097), Ok(4608));
        assert_eq!(stack.grown_at, 0, "it has not grown");
        assert_eq!(stack.file_grown(8192), Ok(8192));
        let mut finish = |owner| {
            let transfer = Transfer { op: IoOp::Read, file: FileId(0), offset: 4096, len: 512, owner, at: 0 };
            stack.finish(&transfer, Ok(1), &mut slots)
        };
        assert_eq!((finish(before), finish(after)), (None, Some(Errno::EIO)));
    }
}
