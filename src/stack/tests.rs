//! The walk over layers, with layers made for it.

use std::path::Path;
use std::sync::Arc;

use drivers::Layer;

use super::*;
use crate::queue::{Limits, SubmitMode};
use crate::retry::Retry;
use crate::sys::memory::Memory;

/// Every other 4096 bytes are nowhere; the others are at half their offset.
struct Sparse;

impl Layer for Sparse {
    fn name(&self) -> &'static str {
        "sparse"
    }
    fn size(&self) -> Option<u64> {
        Some(1 << 20)
    }
    fn plan(&mut self, ask: &Ask) -> Plan {
        let extent = ask.extent;
        let count = extent.len.min(4096 - extent.offset % 4096);
        let at = extent.offset / 8192 * 4096 + extent.offset % 4096;
        if (extent.offset / 4096).is_multiple_of(2) {
            Plan::Data { file: LayerFile(0), at, count, ticket: None }
        } else {
            Plan::Below { count }
        }
    }
    fn zeros_from(&self, _: LayerFile) -> u64 {
        1 << 19
    }
}

#[test]
fn a_request_is_planned_extent_by_extent_as_far_as_there_is_room() {
    let engine = crate::engine::memory::null(4).unwrap();
    let limits = Limits { tiocbs: 2, iovecs: 4, merge_bytes: 0, retry: Retry::default() };
    let blocking = Blocking::before_main_loop();
    let submission = crate::queue::Submission::start(&blocking, engine, SubmitMode::Inline).unwrap();
    let mut queue = Queue::new(submission.into(), SubmitMode::Inline, limits);
    let mut stack =
        Stack::new(vec![HostLayer::new(Box::new(Sparse), Path::new("x"), FileId(0), false)].into(), 1).unwrap();
    let mut slots = Slots::new(1, 1, 0);
    let memory = Arc::new(Memory::anonymous(32768).unwrap());
    memory.write(0, &[0x77; 32768]);
    let request = slots.vacant().unwrap();
    (request.op, request.offset, request.len) = (Op::Read, 2048, 24576);
    request.payload.set(&memory, 0, 24576);
    let id = slots.take().unwrap();
    assert_eq!(stack.start(id, &mut slots, &mut queue), Started::NoRoom, "a third transfer has no room");
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
    let mut stack =
        Stack::new(vec![HostLayer::new(Box::new(raw), Path::new("x"), FileId(0), false)].into(), 2).unwrap();
    let mut slots = Slots::new(2, 1, 0);
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
        let transfer =
            Transfer { op: IoOp::Read, file: FileId(0), offset: 4096, len: 512, owner, at: 0, piece: None };
        stack.finish(&transfer, Ok(1), &mut slots)
    };
    assert_eq!((finish(before), finish(after)), (None, Some(Errno::EIO)));
}
