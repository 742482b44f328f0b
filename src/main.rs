//! `tapdisk`: arguments, configuration, log, and the main loop.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::str::FromStr;

use clap::Parser;
use slog::Level;
use tapdisk::args::Args;
use tapdisk::blocking::Blocking;
use tapdisk::config::Config;
use tapdisk::control::client::errno;
use tapdisk::daemon::{self, Daemon};
use tapdisk::event::MainLoop;
use tapdisk::log::{Log, Sink};
use tapdisk::sys::reserve::Reserve;
use tapdisk::text::one_line;
use tapdisk::{event, memory, privileges, serve, sys};

/// Where memory ends, it is no client's fault and no disk's end.
#[global_allocator]
static ALLOCATOR: Reserve = Reserve;

fn main() -> ExitCode {
    sys::process::keep_from_others();
    daemon::end_on_panic();
    let args = Args::parse();
    let config = match args.configuration() {
        Ok(config) => config,
        Err(error) => {
            eprintln!("tapdisk: {}", one_line(&error.to_string()));
            return ExitCode::from(2);
        }
    };
    if args.check {
        print!("{}", config.to_toml());
        return ExitCode::SUCCESS;
    }
    match run(&args, &config) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("tapdisk: {}", one_line(&error.to_string()));
            ExitCode::from(code(&args, &*error))
        }
    }
}

/// tap-ctl spawn hands on the errno.
fn code(args: &Args, error: &(dyn Error + 'static)) -> u8 {
    let errno = error.downcast_ref::<io::Error>().map(|error| errno(error) as i32);
    if args.config.is_none() { errno.and_then(|errno| u8::try_from(errno).ok()).unwrap_or(1) } else { 1 }
}

fn run(args: &Args, config: &Config) -> Result<ExitCode, Box<dyn Error>> {
    // Every thread inherits the mask, and so only the main loop sees these signals.
    event::blocked().thread_block()?;
    let blocking = Blocking::before_main_loop();
    if !args.in_background() {
        let main_loop = open(&blocking, args, config)?;
        return Ok(main_loop.run(blocking).map(|()| ExitCode::SUCCESS)?);
    }
    let daemon = match Daemon::start()? {
        Ok(daemon) => daemon,
        Err(code) => return Ok(ExitCode::from(code)),
    };
    let main_loop = match open(&blocking, args, config) {
        Ok(main_loop) => main_loop,
        Err(error) => {
            daemon.failed(code(args, &*error));
            return Err(error);
        }
    };
    daemon.serves()?;
    Ok(main_loop.run(blocking).map(|()| ExitCode::SUCCESS)?)
}

fn open(blocking: &Blocking, args: &Args, config: &Config) -> Result<MainLoop, Box<dyn Error>> {
    let level = Level::from_str(&config.log.level).unwrap_or(Level::Info);
    let denied = memory::announce(&config.memory);
    privileges::give_up(config)?;
    let sink = match &config.log.file {
        Some(path) => Sink::File(path.clone()),
        None if args.in_background() => Sink::Syslog,
        None => Sink::Stderr,
    };
    let (logging, log) = Log::open(blocking, config.log.format, level, sink)?;
    denied.iter().for_each(|denied| denied.log(&log));
    let open = if args.config.is_some() { serve::open } else { serve::wait };
    let main_loop = open(blocking, config, logging, &log)?;
    if args.config.is_none() {
        // It holds no folder of whoever started it, and the images' paths begin at the root.
        std::env::set_current_dir("/")?;
    }
    // Whoever started us reads this line to learn that we serve, and where. It may have gone.
    let _ = writeln!(io::stdout(), "{}", main_loop.control_path().display());
    Ok(main_loop)
}
