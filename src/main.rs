//! `tapdisk`: arguments, configuration, log, and the main loop of one disk.

use std::io::Write;
use std::process::ExitCode;
use std::str::FromStr;

use clap::Parser;
use slog::Level;
use tapdisk::args::Args;
use tapdisk::config::Config;
use tapdisk::log::Log;
use tapdisk::{event, memory, serve};

fn main() -> ExitCode {
    let args = Args::parse();
    let config = match Config::load(&args.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("tapdisk: {error}");
            return ExitCode::from(2);
        }
    };
    if args.check {
        print!("{}", config.to_toml());
        return ExitCode::SUCCESS;
    }
    match run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tapdisk: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: &Config) -> Result<(), Box<dyn std::error::Error>> {
    // Every thread inherits the mask, and so only the main loop sees these signals.
    event::signals().thread_block()?;
    let level = Level::from_str(&config.log.level).unwrap_or(Level::Info);
    let denied = memory::announce(&config.memory);
    let (logging, log) = Log::open(config.log.format, level, config.log.file.as_deref())?;
    denied.iter().for_each(|denied| denied.log(&log));
    let main_loop = serve::open(config, logging, &log)?;
    // Whoever started us reads this line to learn that we serve, and where. It may have gone.
    let _ = writeln!(std::io::stdout(), "{}", main_loop.control_path().display());
    Ok(main_loop.run()?)
}
