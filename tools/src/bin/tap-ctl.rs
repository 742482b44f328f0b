//! `tap-ctl`: starts, inspects and steers tapdisks.

use std::process::ExitCode;

fn main() -> ExitCode {
    tools::tap_ctl::main()
}
