//! Logs of changed blocks: `cbt-util`, and how a tapdisk is told of one.

mod told;
mod util;
