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
