//! The tools from outside. Those that need a tapdisk process are in the tests of tapdisk.

mod ring_load;
