//! local
pub mod wire;
