//! `cbt-util`: makes, reads and changes logs of changed blocks.

use std::process::ExitCode;

fn main() -> ExitCode {
    tools::cbt_util::main()
}
