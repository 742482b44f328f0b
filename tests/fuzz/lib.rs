//! What the targets share.

#[path = "../common/world.rs"]
pub mod world;
