//! What the tools are made of. Their command lines are here and not in the binaries, because manual pages and shell
//! completions are generated from them.

pub mod ring_load;
