//! I/O of the formats' own, in memory and slots of the stack.

use std::sync::Arc;

use drivers::{Meta, MetaId, MetaOp, Origin};
use nix::errno::Errno;

use super::{ALIGN, Stack, Started};
use crate::queue::{Queue, Transfer};
use crate::request::{Op, Slots};
use crate::stats::now;
use crate::sys::io::IoOp;
use crate::sys::memory::Memory;

/// Memory for some I/Os of metadata at a time.
pub(super) struct MetaMemory {
    memory: Arc<Memory>,
    /// Bytes of each place.
    place: usize,
    /// Places that are free.
    free: Vec<u32>,
    /// What is copied from and to the memory.
    copy: Vec<u8>,
}

impl MetaMemory {
    /// For `count` I/Os of up to `longest` bytes.
    pub(super) fn new(count: usize, longest: usize) -> std::io::Result<MetaMemory> {
        let place = longest.next_multiple_of(ALIGN);
        let memory = Arc::new(Memory::anonymous(count * place)?);
        Ok(MetaMemory { memory, place, free: (0..count as u32).rev().collect(), copy: vec![0; longest] })
    }

    pub(super) fn bytes(&self) -> usize {
        self.memory.len() + self.copy.len()
    }
}

impl Stack {
    /// Hands what the formats want done to the queue, as far as there is room. True: there was something.
    pub fn move_metadata(&mut self, slots: &mut Slots, queue: &mut Queue) -> bool {
        while let Some(id) = self.to_flush.pop_front() {
            if self.flush(id, slots, queue) != Started::Planned {
                // What it waits for is in flight, or moved below.
                self.to_flush.push_front(id);
                break;
            }
            if slots.get(id).pieces == 0 {
                self.done.push_back(id);
            }
        }
        let mut moved = self.move_copies(slots, queue);
        if !std::mem::take(&mut self.meta_due) {
            return moved;
        }
        for layer in 0..self.layers.len() {
            loop {
                let room = queue.has_room() && self.metas.as_ref().is_some_and(|metas| !metas.free.is_empty());
                if !room {
                    // Something is in flight, and when it is done there is.
                    self.meta_due = self.metas.is_some();
                    return moved;
                }
                let Some(meta) = self.layers[layer].layer.next_meta() else { break };
                self.begin(layer, meta, slots, queue);
                moved = true;
            }
        }
        moved
    }

    fn begin(&mut self, layer: usize, meta: Meta, slots: &mut Slots, queue: &mut Queue) {
        let metas = self.metas.as_mut().expect("a format with metadata has memory for it");
        let place = metas.free.pop().expect("somebody has looked");
        let id = slots.take_own().expect("there are as many slots as places");
        let request = slots.get_mut(id);
        let offset = place as usize * metas.place;
        let len = if matches!(meta.op, MetaOp::Read | MetaOp::Write) { meta.len } else { 0 };
        request.payload.set(&metas.memory, offset, len as u32);
        let op = match meta.op {
            MetaOp::Read => (Op::Read, IoOp::Read),
            MetaOp::Write => (Op::Write { fua: false }, IoOp::Write { fua: false }),
            MetaOp::Extend => (Op::WriteZeroes { unmap: false }, IoOp::WriteZeroes { unmap: false }),
            MetaOp::Discard => (Op::Discard, IoOp::Discard),
            MetaOp::Flush => (Op::Flush, IoOp::Flush),
        };
        if meta.op == MetaOp::Write {
            let bytes = &mut metas.copy[..len as usize];
            self.layers[layer].layer.meta_bytes(meta.id, bytes);
            metas.memory.write(offset, bytes);
        }
        (request.op, request.offset, request.len) = (op.0, meta.at, meta.len);
        (request.origin, request.tag, request.born) = (Origin::Layer(layer as u16), meta.id.0, now());
        (request.planning, request.planned, request.pieces) = (false, meta.len, 1);
        let file = self.layers[layer].file(meta.file);
        request.meta_seen = self.meta_written;
        let transfer = Transfer { op: op.1, file, offset: meta.at, len: meta.len, owner: id, at: 0, piece: None };
        let pushed = queue.push(transfer);
        debug_assert!(pushed);
    }

    /// An I/O of a format's own has ended.
    pub(super) fn meta_finished(&mut self, transfer: &Transfer, result: Result<(), Errno>, slots: &mut Slots) {
        let layer = self.layer_of(transfer.file);
        match transfer.op {
            IoOp::Read => {}
            // Of one that has several, it is about one of them.
            IoOp::Flush if layer == self.leaf && self.layers[layer].files.len() == 1 && result.is_ok() => {
                self.meta_durable = self.meta_durable.max(slots.get(transfer.owner).meta_seen);
            }
            IoOp::Flush => {}
            _ => self.meta_written += u64::from(self.layers[layer].layer.flushes_metadata()),
        }
        let id = MetaId(slots.get(transfer.owner).tag);
        let metas = self.metas.as_mut().expect("an I/O of metadata has memory");
        let offset = slots.get(transfer.owner).payload.place();
        slots.release(transfer.owner);
        metas.free.push((offset / metas.place) as u32);
        let mut bytes = std::mem::take(&mut metas.copy);
        let read = if transfer.op == IoOp::Read { transfer.len as usize } else { 0 };
        metas.memory.read(offset, &mut bytes[..read]);
        self.layers[layer].layer.meta_done(id, result.is_ok().then_some(&bytes[..read]));
        if let Some(metas) = &mut self.metas {
            metas.copy = bytes;
        }
        self.settle(layer, slots);
    }
}
