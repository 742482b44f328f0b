//! The answer to a block status: runs of the disk as descriptors of `base:allocation`.

use zerocopy::IntoBytes;
use zerocopy::big_endian::U32;

use super::command::STATUS_BYTES;
use super::wire::{Descriptor, STATE_HOLE_ZERO};
use crate::sys::memory::Memory;

const RUNS: usize = STATUS_BYTES as usize / size_of::<u64>();

/// Makes descriptors of the runs (see [`crate::sys::io::IoOp::Status`]) at `offset`, in their place, and gives how
/// many bytes they have. They are of at most `len` bytes of the disk, and if there are no runs, all of it is data.
pub(super) fn describe(memory: &Memory, offset: usize, len: u32, only_one: bool) -> u32 {
    let mut words = [0; STATUS_BYTES as usize];
    memory.read(offset, &mut words);
    let runs = words.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word));
    let (mut descriptors, mut count) = ([Descriptor { length: U32::ZERO, status: U32::ZERO }; RUNS], 0);
    let mut left = len;
    for (index, run) in runs.enumerate() {
        let length = run.min(u64::from(left)) as u32;
        if length == 0 && index > 0 {
            break;
        }
        if length > 0 {
            let status = if index % 2 == 0 { 0 } else { STATE_HOLE_ZERO };
            descriptors[count] = Descriptor { length: length.into(), status: status.into() };
            count += 1;
            left -= length;
        }
    }
    if count == 0 {
        descriptors[0].length = len.into();
    }
    let count = if only_one { 1 } else { count.max(1) };
    let bytes = descriptors[..count].as_bytes();
    memory.write(offset, bytes);
    bytes.len() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(runs: &[u64], len: u32, only_one: bool) -> Vec<(u32, u32)> {
        let memory = Memory::anonymous(4096).unwrap();
        memory.write(512, runs.as_bytes());
        let bytes = describe(&memory, 512, len, only_one);
        let mut words = vec![0; bytes as usize];
        memory.read(512, &mut words);
        let number = |word: &[u8]| u32::from_be_bytes(word.try_into().unwrap());
        words.chunks(8).map(|d| (number(&d[..4]), number(&d[4..]))).collect()
    }

    #[test]
    fn runs_alternate_from_data_on_and_end_with_the_range() {
        assert_eq!(described(&[512, 1024, 512], 2048, false), [(512, 0), (1024, 3), (512, 0)]);
        assert_eq!(described(&[0, 1024, 512, 0, 512], 1 << 20, false), [(1024, 3), (512, 0)]);
        assert_eq!(described(&[512, u64::MAX], 2048, false), [(512, 0), (1536, 3)]);
        assert_eq!(described(&[0, 8192, 512], u32::MAX, true), [(8192, 3)]);
        assert_eq!(described(&[], 4096, false), [(4096, 0)]);
        assert_eq!(described(&[4096; 64], u32::MAX, false).len(), 64);
    }
}
