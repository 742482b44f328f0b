//! What layers can ask of the walk, and what it has to carry: for each feature to come the sequence of calls, on a chain that is real but for
//! its engine, which keeps files in memory, and completes in an order that a seed says.

mod chain;
mod contract;
mod cow;
mod features;

use self::chain::{Chain, FILE, pattern};
