//! The formats from outside: images that others have made, chains, cuts at any moment.

mod chain;
mod common;
mod crash;
mod images;
