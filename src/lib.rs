//! placeholder
pub mod client;
pub mod engine;
pub mod frontend;
pub mod queue;
pub mod request;
pub mod stack;
pub mod stats;
pub mod submit;
pub mod sys;
