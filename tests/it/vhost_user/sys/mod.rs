//! What clients that were written for C need of the compiler's trust.

use std::mem::MaybeUninit;

use blkio::Completion;

/// The mark of a request that do_io says has ended, and what came of it.
#[expect(unsafe_code, reason = "libblkio fills them in as C does")]
pub(super) fn ended(completion: &MaybeUninit<Completion>) -> (usize, i32) {
    // SAFETY: it is one of those that do_io has counted, which it has filled in.
    let completion = unsafe { completion.assume_init_ref() };
    (completion.user_data, completion.ret)
}
