//! `tap-ctl`: lists the tapdisks of a host and shows what they do.

mod coalesce;
mod engine;
mod resize;
mod show;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args as ClapArgs, Parser, Subcommand};
use nix::errno::Errno;
use tapdisk::config::Size;
use tapdisk::control::client::{self, Listed, Refused};
use tapdisk::control::proto::{fault, kind};
use tapdisk::disk::DebugQueue;

/// Inspects and steers tapdisks through their control sockets.
///
/// The exit code is 0, or the errno of what went wrong; its text is on standard error.
#[derive(Debug, Parser)]
#[command(
    name = "tap-ctl",
    version,
    after_help = "Examples:
  tap-ctl list
  tap-ctl debug-queue                      the only tapdisk there is
  tap-ctl debug-queue -p 4711 --json
  tap-ctl resize -p 4711 --size 20G
  tap-ctl pause -p 4711
  tap-ctl unpause -p 4711 -a vhd:/srv/vm/snapshot.vhd
  tap-ctl coalesce -p 4711 --rate 50M --wait
  tap-ctl poll --us 1000 --idle-percent 30
  tap-ctl engine --name threads --submit auto
  tap-ctl --directory target/quick-start stats"
)]
pub struct Args {
    /// Where the control sockets are
    #[arg(long, global = true, default_value = "/run/blktap-control", env = "TAPDISK_CONTROL_DIRECTORY")]
    pub directory: PathBuf,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Lists disks, one a line: pid, minor, state (0: running) and image
    ///
    /// To a terminal it prints columns, otherwise `pid=… minor=… state=… args=type:path`.
    List {
        /// Only those of this process
        #[arg(short, long)]
        pid: Option<i32>,
        /// Only those with this minor
        #[arg(short, long)]
        minor: Option<i32>,
        /// Only images of this type, such as aio
        #[arg(short = 't', long = "type")]
        kind: Option<String>,
        /// Only the image with this path
        #[arg(short, long)]
        file: Option<String>,
        /// Prints JSON
        #[arg(long)]
        json: bool,
    },
    /// Prints a disk's counters as one line of JSON
    Stats {
        /// Which disk
        #[command(flatten)]
        disk: Which,
    },
    /// Shows every request of a disk: its age and who holds it; and the queue's counters and latencies
    ///
    /// It answers while the disk is stuck in I/O. The oldest request comes first.
    DebugQueue {
        /// Which disk
        #[command(flatten)]
        disk: Which,
        /// Prints JSON
        #[arg(long)]
        json: bool,
    },
    /// Sets for how long a tapdisk looks at rings after the last request, before it sleeps; prints what is in force
    ///
    /// It is quicker for the guest, and takes a CPU for that time. Until it is set, the configuration's main_loop.poll_us
    /// and poll_idle_percent are in force.
    Poll {
        /// Which disk
        #[command(flatten)]
        disk: Which,
        /// For how long, 0 to 1000000 µs; 0: not at all
        #[arg(long, value_name = "MICROSECONDS")]
        us: Option<u32>,
        /// Only while so much of the host's CPUs, all together, is idle: 0 to 100
        #[arg(long, value_name = "PERCENT")]
        idle_percent: Option<u32>,
        /// Prints JSON
        #[arg(long)]
        json: bool,
    },
    /// Tells a tapdisk that its image has grown; prints the disk's size before and now, in bytes
    ///
    /// Clients of the ring can use all of it at once, NBD clients when they connect again. No disk shrinks.
    Resize {
        /// Which disk
        #[command(flatten)]
        disk: Which,
        /// Lets the image grow to this size first, such as "20 GiB": a raw image, which must be a regular file; or a VHD image
        /// that has room in its table (vhd-util query -S), for which the disk is paused. Not given: the file or block device
        /// has grown already
        #[arg(long)]
        size: Option<Size>,
    },
    /// Pauses a disk: what is under way is finished and made durable, its image is closed, and clients wait
    ///
    /// It returns when that is done, and fails after 10 seconds; the disk then pauses as soon as it can.
    Pause {
        /// Which disk
        #[command(flatten)]
        disk: Which,
    },
    /// Lets a paused disk go on
    Unpause {
        /// Which disk
        #[command(flatten)]
        disk: Which,
        /// With this image from now on, which has what the disk had: a snapshot's
        #[arg(short = 'a', value_name = "TYPE:PATH")]
        image: Option<String>,
    },
    /// Merges an image of a disk's chain into its parent while the disk is in use, and leaves it out of the chain then
    ///
    /// The image's file is not used any more afterwards, and can be removed. A merge that was interrupted is begun again.
    Coalesce(Coalesce),
    /// Shows a disk's engine; with options, changes it while the disk is in use, once what is in flight has finished
    ///
    /// Requests wait meanwhile. If something in flight does not finish in 5 seconds, the engine stays as it was.
    Engine {
        /// Which disk
        #[command(flatten)]
        disk: Which,
        /// The engine: auto, aio, threads or io_uring
        #[arg(long, value_parser = engine::name)]
        name: Option<u32>,
        /// Who submits: auto, thread, or inline, which can deadlock a host that is short of memory
        #[arg(long, value_parser = engine::submit_mode)]
        submit: Option<u32>,
        /// Threads that the pool always has
        #[arg(long, value_name = "COUNT")]
        threads_min: Option<u32>,
        /// The most threads of the pool
        #[arg(long, value_name = "COUNT")]
        threads_max: Option<u32>,
        /// Prints JSON
        #[arg(long)]
        json: bool,
    },
    /// Steers the faults that are configured ([[fault]]), and shows them with what they have hit
    Fault {
        /// Which disk
        #[command(flatten)]
        disk: Which,
        /// Lets the I/Os complete that are stuck
        #[arg(long)]
        release: bool,
        /// I/Os are hit from now on
        #[arg(long, conflicts_with = "off")]
        on: bool,
        /// No I/O is hit from now on
        #[arg(long)]
        off: bool,
        /// Prints JSON
        #[arg(long)]
        json: bool,
    },
    /// Tells a tapdisk to finish what is in flight, make it durable, and exit
    Exit {
        /// Which disk
        #[command(flatten)]
        disk: Which,
    },
}

/// Names a disk. Without a pid: the only tapdisk that there is.
#[derive(Debug, ClapArgs)]
pub struct Which {
    /// Its process; may be left out if there is only one tapdisk
    #[arg(short, long)]
    pub pid: Option<i32>,
    /// Its minor; may be left out if the process has only one disk
    #[arg(short, long)]
    pub minor: Option<u16>,
}

/// What `coalesce` does.
#[derive(Debug, ClapArgs)]
pub struct Coalesce {
    /// Which disk
    #[command(flatten)]
    pub disk: Which,
    /// The image that is merged. Not given: the parent of the one that is written
    #[arg(long)]
    pub image: Option<PathBuf>,
    /// At most so many bytes a second, such as "20 MiB"
    #[arg(long)]
    pub rate: Option<Size>,
    /// Returns when it is done; shows how far it is on a terminal, and fails if it fails
    #[arg(long)]
    pub wait: bool,
    /// Only shows how far it is
    #[arg(long, conflicts_with = "cancel")]
    pub show: bool,
    /// Ends it; the chain stays as it is
    #[arg(long)]
    pub cancel: bool,
    /// Prints JSON
    #[arg(long)]
    pub json: bool,
}

/// Does what the command line says.
pub fn run(args: &Args) -> ExitCode {
    match command(args) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has enough of it.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(refused) = error.get_ref().and_then(|error| error.downcast_ref::<Refused>()) {
                eprintln!("{refused}");
                return ExitCode::from(u8::try_from(refused.errno).unwrap_or(1));
            }
            let Some(errno) = error.raw_os_error() else {
                eprintln!("{error}");
                return ExitCode::from(if error.kind() == io::ErrorKind::NotFound { Errno::ENOENT as u8 } else { 1 });
            };
            eprintln!("{}", Errno::from_raw(errno).desc());
            ExitCode::from(u8::try_from(errno).unwrap_or(1))
        }
    }
}

fn command(args: &Args) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match &args.command {
        Command::List { pid, minor, kind, file, json } => {
            let wanted = |disk: &Listed| {
                let (of_kind, path) = disk.name.split_once(':').unwrap_or(("", &disk.name));
                pid.is_none_or(|pid| disk.pid == pid)
                    && minor.is_none_or(|minor| disk.minor == minor)
                    && kind.as_ref().is_none_or(|kind| of_kind == kind)
                    && file.as_ref().is_none_or(|file| path == file)
            };
            let disks: Vec<_> = disks(args)?.into_iter().filter(wanted).collect();
            show::list(&mut out, &disks, *json)
        }
        Command::Stats { disk } => writeln!(out, "{}", text(args, disk, kind::STATS)?),
        Command::DebugQueue { disk, json } => {
            let text = text(args, disk, kind::DEBUG_QUEUE)?;
            if *json {
                return writeln!(out, "{text}");
            }
            let queue: DebugQueue = serde_json::from_str(&text)?;
            show::debug_queue(&mut out, &queue)
        }
        Command::Poll { disk, us, idle_percent, json } => {
            let (pid, minor) = find(args, disk)?;
            show::poll(&mut out, client::poll(&args.directory, pid, minor, *us, *idle_percent)?, *json)
        }
        Command::Resize { disk, size } => {
            resize::resize(&mut out, &args.directory, find(args, disk)?, size.map(|size| size.0))
        }
        Command::Engine { disk, name, submit, threads_min, threads_max, json } => {
            let change = engine::change(*name, *submit, *threads_min, *threads_max);
            let (pid, minor) = find(args, disk)?;
            engine::show(&mut out, &client::engine(&args.directory, pid, minor, &change)?, *json)
        }
        Command::Fault { disk, release, on, off, json } => {
            let flag = |set: bool, flag| if set { flag } else { 0 };
            let flags = flag(*release, fault::RELEASE) | flag(*on, fault::ENABLE) | flag(*off, fault::DISABLE);
            let (pid, minor) = find(args, disk)?;
            engine::show_faults(&mut out, &client::faults(&args.directory, pid, minor, flags)?, *json)
        }
        Command::Pause { disk } => {
            let (pid, minor) = find(args, disk)?;
            client::pause(&args.directory, pid, minor)
        }
        Command::Unpause { disk, image } => {
            let (pid, minor) = find(args, disk)?;
            client::resume(&args.directory, pid, minor, image.as_deref())
        }
        Command::Coalesce(options) => {
            coalesce::coalesce(&mut out, &args.directory, find(args, &options.disk)?, options)
        }
        Command::Exit { disk } => client::exit(&args.directory, find(args, disk)?.0),
    }
}

/// All disks. A tapdisk that has just gone, or left its socket behind, has none.
fn disks(args: &Args) -> io::Result<Vec<Listed>> {
    let mut disks = Vec::new();
    for pid in client::pids(&args.directory).map_err(|error| in_directory(args, &error))? {
        match client::list(&args.directory, pid) {
            Ok(of_pid) => disks.extend(of_pid),
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(disks)
}

fn in_directory(args: &Args, error: &io::Error) -> io::Error {
    let directory = args.directory.display();
    io::Error::new(error.kind(), format!("{directory}: {error}; --directory says where the control sockets are"))
}

/// The process and the minor that are meant.
fn find(args: &Args, which: &Which) -> io::Result<(i32, u16)> {
    if let (Some(pid), Some(minor)) = (which.pid, which.minor) {
        return Ok((pid, minor));
    }
    let wanted = |disk: &Listed| {
        which.pid.is_none_or(|pid| disk.pid == pid) && which.minor.is_none_or(|minor| disk.minor == i32::from(minor))
    };
    let found: Vec<_> = disks(args)?.into_iter().filter(wanted).collect();
    match found.as_slice() {
        [disk] => Ok((disk.pid, disk.minor as u16)),
        [] => Err(in_directory(args, &io::Error::new(io::ErrorKind::NotFound, "no such tapdisk"))),
        many => {
            let pids: Vec<_> = many.iter().map(|disk| format!("-p {} -m {}", disk.pid, disk.minor)).collect();
            Err(io::Error::other(format!("there are several disks: say which ({})", pids.join(", "))))
        }
    }
}

fn text(args: &Args, which: &Which, request: u16) -> io::Result<String> {
    let (pid, minor) = find(args, which)?;
    client::text_of(&args.directory, pid, minor, request)
}

/// Whether standard output is a terminal.
fn is_terminal() -> bool {
    io::stdout().is_terminal()
}
