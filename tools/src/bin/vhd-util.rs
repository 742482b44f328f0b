//! `vhd-util`: looks at VHD images.

use std::process::ExitCode;

fn main() -> ExitCode {
    tools::vhd_util::main()
}
