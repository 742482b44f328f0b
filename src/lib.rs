//! placeholder
pub mod args;
pub mod client;
pub mod config;
pub mod control;
pub mod disk;
pub mod engine;
pub mod event;
pub mod frontend;
pub mod image;
pub mod log;
pub mod queue;
pub mod request;
pub mod serve;
pub mod stack;
pub mod stats;
pub mod submit;
pub mod sys;
