//! The engines: one suite for all, the pool, faults, the choice of one.

mod choice;
mod conformance;
mod faults;
mod pool;
