//! Any text as a configuration: what is accepted prints as TOML that means the same, what is not has a line.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tapdisk::config::Config;

fuzz_target!(|text: &str| {
    let path = Path::new("disk.toml");
    match Config::parse(text, path) {
        Ok(config) => assert_eq!(Config::parse(&config.to_toml(), path).unwrap(), config),
        Err(error) => assert!(error.to_string().starts_with("disk.toml:")),
    }
});
