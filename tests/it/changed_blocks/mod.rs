//! Logs of changed blocks: `cbt-util`, how a tapdisk is told of one, and that what is written is in it.

mod killed;
mod opened;
mod served;
mod told;
mod util;

use std::path::Path;

use crate::common::served::{output, run, tool};

/// Bytes of the disk that a bit is for.
const BLOCK: u64 = 64 << 10;

/// Makes a log of a disk of `size` bytes.
fn create(path: &Path, size: u64) {
    run(tool("cbt-util").args(["create", "-s", &size.to_string(), "-n"]).arg(path));
}

/// What a log says of each block.
fn bits(path: &Path) -> Vec<bool> {
    let said = output(tool("cbt-util").args(["get", "-b", "-n"]).arg(path));
    assert!(said.status.success(), "{said:?}");
    said.stdout.iter().flat_map(|byte| (0..8).map(move |bit| byte & 1 << bit != 0)).collect()
}

/// The blocks that a log has marked.
fn marked(path: &Path) -> Vec<usize> {
    bits(path).iter().enumerate().filter_map(|(block, set)| set.then_some(block)).collect()
}

/// A log's header, which is the storage manager's.
fn header(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()[..48].to_vec()
}
