//! NBD
mod arena;
pub mod negotiate;
pub mod wire;
