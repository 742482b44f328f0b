//! The command line. What has a single letter is blktap's, or XCP-ng's, and means the same.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};
use tapdisk::config::Size;

use super::throttle::Throttle;
use super::top::Top;
use super::{CONTROL_DIRECTORY, engine};

/// Starts, inspects and steers tapdisks through their control sockets.
///
/// The exit code is 0, or the errno of what went wrong. Standard error says that errno's text, alone, after blktap's commands, because
/// toolstacks read it; on a terminal, or with --debug, the tapdisk's own words follow, which name the file, the key and the remedy.
/// Commands that blktap has not (metrics, top, debug-queue, poll, resize, coalesce, engine, throttle, fault, exit) always say those. A wrong
/// command line is EINVAL (22), with the usage on standard error.
///
/// With --json, standard output is one JSON value: what the command is about, or {"error": {"errno": 16, "name": "EBUSY", "text":
/// "..."}}, also for a wrong command line. Only top prints several: one a line, for each disk and look.
#[derive(Debug, Parser)]
#[command(
    name = "tap-ctl",
    version,
    after_help = "Examples:
  tap-ctl list
  tap-ctl create -a vhd:/srv/vm/guest.vhd
  tap-ctl destroy -p 4711 -m 0
  tap-ctl debug-queue                      the only tapdisk there is
  tap-ctl debug-queue -p 4711 --json
  tap-ctl resize -p 4711 --size 20G
  tap-ctl pause -p 4711 -m 0
  tap-ctl unpause -p 4711 -m 0 -a vhd:/srv/vm/snapshot.vhd
  tap-ctl coalesce -p 4711 --rate 50M --wait
  tap-ctl engine --name threads --submit auto
  tap-ctl throttle -p 4711 --bytes 200M --write-requests 500
  tap-ctl --directory target/quick-start stats"
)]
pub struct Args {
    /// Where the control sockets and the minors' files are
    #[arg(long, global = true, default_value = CONTROL_DIRECTORY, env = "TAPDISK_CONTROL_DIRECTORY")]
    pub directory: PathBuf,

    /// Says more about an error; may stand anywhere
    #[arg(long, global = true)]
    pub debug: bool,

    /// Prints one JSON value, also for an error
    #[arg(long, global = true)]
    pub json: bool,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Lists disks, one a line: pid, minor, state (0: running, 0x2a: paused) and image
    ///
    /// To a terminal it prints columns, otherwise `pid=… minor=… state=… args=type:path`. A disk without an image has no args, and a
    /// process without disks, or that does not tell, in 10 seconds or at all, is `pid=…` alone; with --json its `error`, which is null
    /// otherwise, says why, with --debug a line on standard error. The order is that of the process ids, and of the minors within a
    /// process. Options choose lines that have exactly that.
    #[command(after_help = "Examples:
  tap-ctl list
  tap-ctl list -t vhd -f /srv/vm/guest.vhd")]
    List(List),
    /// Takes a minor that is free, and prints the path of its file, whose name ends with the minor
    #[command(after_help = "Example:
  tap-ctl allocate                         prints /run/blktap-control/tapdisk/tapdisk-0")]
    Allocate {
        /// Accepted, as blktap's: there is no device that could have a name
        #[arg(short, value_name = "NAME")]
        device: Option<String>,
    },
    /// Gives a minor back that no tapdisk has
    #[command(after_help = "Example:
  tap-ctl free -m 0")]
    Free {
        /// The minor
        #[arg(short, long)]
        minor: u16,
    },
    /// Starts a tapdisk without disks, and prints its process id
    ///
    /// The program is what the environment's TAPDISK names, otherwise the tapdisk beside tap-ctl, otherwise the one in PATH. It ends
    /// after its last disk is detached. If it does not start, its exit code is ours.
    #[command(after_help = "Examples:
  tap-ctl spawn
  tap-ctl spawn -c vm.slice")]
    Spawn {
        /// In this slice of systemd, by systemd-run(1)
        #[arg(short = 'c', value_name = "SLICE")]
        slice: Option<String>,
    },
    /// Gives a tapdisk a minor to serve
    #[command(after_help = "Example:
  tap-ctl attach -p 4711 -m 0")]
    Attach {
        /// Which disk
        #[command(flatten)]
        disk: Disk,
    },
    /// Takes a minor from its tapdisk; its image must be closed
    #[command(after_help = "Example:
  tap-ctl detach -p 4711 -m 0")]
    Detach {
        /// Which disk
        #[command(flatten)]
        disk: Disk,
    },
    /// Opens an image, and serves it
    ///
    /// It returns when the image is open, however long that takes.
    #[command(after_help = "Examples:
  tap-ctl open -p 4711 -m 0 -a vhd:/srv/vm/guest.vhd
  tap-ctl open -p 4711 -m 0 -a aio:/dev/vg0/cdrom -R")]
    Open {
        /// Which disk
        #[command(flatten)]
        disk: Disk,
        /// What
        #[command(flatten)]
        image: Opened,
        /// Reads a key of 32 or 64 bytes from standard input
        #[arg(short = 'E')]
        encrypted: bool,
    },
    /// Finishes what is under way, makes it durable, and closes the image
    ///
    /// While the disk is busy with something else it is tried again, for 30 seconds.
    #[command(after_help = "Examples:
  tap-ctl close -p 4711 -m 0
  tap-ctl close -p 4711 -m 0 -f -t 120")]
    Close {
        /// Which disk
        #[command(flatten)]
        disk: Disk,
        /// Gives up what has not been submitted
        #[arg(short)]
        force: bool,
        /// How long it waits for the end
        #[command(flatten)]
        limit: Limit,
    },
    /// Pauses a disk: what is under way is finished and made durable, its image is closed, and clients wait
    ///
    /// It returns when that is done. If it stops waiting before, the disk pauses as soon as it can.
    #[command(after_help = "Examples:
  tap-ctl pause -p 4711 -m 0
  tap-ctl pause -p 4711 -m 0 -t 60")]
    Pause {
        /// Which disk
        #[command(flatten)]
        disk: Which,
        /// How long it waits for the pause
        #[command(flatten)]
        limit: Limit,
    },
    /// Lets a paused disk go on
    #[command(after_help = "Examples:
  tap-ctl unpause -p 4711 -m 0
  tap-ctl unpause -p 4711 -m 0 -a vhd:/srv/vm/snapshot.vhd
  tap-ctl unpause -p 4711 -m 0 -c /srv/vm/guest.cbtlog")]
    Unpause {
        /// Which disk
        #[command(flatten)]
        disk: Which,
        /// With this image from now on, which has what the disk had: a snapshot's
        #[arg(short = 'a', value_name = "TYPE:PATH")]
        image: Option<String>,
        /// A secondary image: refused
        #[arg(short = '2', value_name = "PATH")]
        secondary: Option<String>,
        /// Marks what is written from now on in this log of changed blocks (cbt-util(8)); not given: in none, whatever was before
        #[arg(short = 'c', value_name = "PATH")]
        log: Option<String>,
    },
    /// Prints a disk's counters as one line of JSON
    #[command(after_help = "Example:
  tap-ctl stats -p 4711 -m 0")]
    Stats {
        /// Which disk
        #[command(flatten)]
        disk: Which,
    },
    /// Allocates a minor, starts a tapdisk, attaches the minor and opens an image; prints the path of the minor's file
    ///
    /// If a step fails, those before are undone.
    #[command(after_help = "Examples:
  tap-ctl create -a vhd:/srv/vm/guest.vhd
  tap-ctl create -a aio:/srv/vm/guest.img -R")]
    Create {
        /// What
        #[command(flatten)]
        image: Opened,
        /// Accepted, as blktap's: there is no device that could have a name
        #[arg(short, value_name = "NAME")]
        device: Option<String>,
        /// In this slice of systemd, by systemd-run(1)
        #[arg(short = 'c', value_name = "SLICE")]
        slice: Option<String>,
    },
    /// Closes a disk's image, detaches its minor, and gives the minor back
    ///
    /// What is done already, or went with a process that was killed, is passed over.
    #[command(after_help = "Examples:
  tap-ctl destroy -p 4711 -m 0
  tap-ctl destroy -p 4711 -m 0 -t 120")]
    Destroy {
        /// Which disk
        #[command(flatten)]
        disk: Disk,
        /// How long it waits for the image to be closed
        #[command(flatten)]
        limit: Limit,
    },
    /// XCP-ng's: begins to merge an image of a disk's chain into its parent
    #[command(after_help = "Example:
  tap-ctl commit -p 4711 -m 0 -a vhd:/srv/vm/middle.vhd")]
    Commit {
        /// Which disk
        #[command(flatten)]
        disk: Which,
        /// The image that is merged
        #[arg(short = 'a', value_name = "TYPE:PATH")]
        image: String,
    },
    /// XCP-ng's: prints how far a merge is: a word, and how much of how much
    #[command(after_help = "Example:
  tap-ctl query -p 4711 -m 0")]
    Query {
        /// Which disk
        #[command(flatten)]
        disk: Which,
    },
    /// XCP-ng's: ends a merge; the chain stays as it is
    #[command(after_help = "Example:
  tap-ctl cancel -p 4711 -m 0 -w")]
    Cancel {
        /// Which disk
        #[command(flatten)]
        disk: Which,
        /// Returns when it has ended
        #[arg(short)]
        wait: bool,
    },
    /// Prints the metrics of all tapdisks of the host, as OpenMetrics text
    ///
    /// One that does not answer within two seconds has tapdisk_process_up 0. With --json it prints an array of what each process tells.
    #[command(after_help = "Example:
  tap-ctl metrics >/var/lib/node_exporter/tapdisk.prom.new")]
    Metrics,
    /// Shows what all disks of the host do, the busiest first, again each second
    ///
    /// QD are requests that are not answered, R-MEAN and W-MEAN the mean latencies of the interval, OLDEST the age of the oldest
    /// request. A tapdisk that does not answer is shown first. To a pipe it prints a header and a line for each disk, with --json
    /// an object a line.
    #[command(after_help = "Examples:
  tap-ctl top
  tap-ctl top --interval 5 --count 12 >/tmp/a-minute")]
    Top(Top),
    /// Shows every request of a disk: its age and who holds it; and the queue's counters and latencies
    ///
    /// It answers while the disk is stuck in I/O. The oldest request comes first.
    #[command(after_help = "Examples:
  tap-ctl debug-queue
  tap-ctl debug-queue -p 4711 -m 0 --json")]
    DebugQueue {
        /// Which disk
        #[command(flatten)]
        disk: Which,
    },
    /// Sets for how long a tapdisk looks at rings after the last request, before it sleeps; prints what is in force
    ///
    /// It is quicker for the guest, and takes a CPU for that time. Until it is set, the configuration's main_loop.poll_us
    /// and poll_idle_percent are in force.
    #[command(after_help = "Example:
  tap-ctl poll --us 1000 --idle-percent 30")]
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
    },
    /// Tells a tapdisk that its image has grown; prints the disk's size before and now, in bytes
    ///
    /// Clients of the ring can use all of it at once, NBD clients when they connect again. No disk shrinks.
    #[command(after_help = "Examples:
  tap-ctl resize -p 4711
  tap-ctl resize -p 4711 --size 20G")]
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
    /// Merges an image of a disk's chain into its parent while the disk is in use, and leaves it out of the chain then
    ///
    /// The image's file is not used any more afterwards, and can be removed. A merge that was interrupted is begun again.
    #[command(after_help = "Examples:
  tap-ctl coalesce -p 4711 --rate 50M --wait
  tap-ctl coalesce -p 4711 --cancel")]
    Coalesce(Coalesce),
    /// Shows a disk's engine; with options, changes it while the disk is in use, once what is in flight has finished
    ///
    /// Requests wait meanwhile. If something in flight does not finish in 5 seconds, the engine stays as it was.
    #[command(after_help = "Examples:
  tap-ctl engine
  tap-ctl engine --name threads --submit auto")]
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
    },
    /// Shows how many bytes and requests a second a disk lets pass, and what that holds back; with options, sets limits while it is in use
    ///
    /// Limits that are not named stay. They are in force until the tapdisk ends, whatever becomes of the image; then the configuration's
    /// are. A rate of 0 takes that limit off, a burst of 0 is a tenth of a second's. Frontends that wait at the same time get the same.
    #[command(after_help = "Examples:
  tap-ctl throttle
  tap-ctl throttle --read-bytes 100M --write-bytes 50M --write-bytes-burst 200M
  tap-ctl throttle --requests 1000
  tap-ctl throttle --off")]
    Throttle(Throttle),
    /// Steers the faults that the configuration has, and shows them with what they have hit
    #[command(after_help = "Examples:
  tap-ctl fault
  tap-ctl fault --release --off")]
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
    },
    /// Tells a tapdisk to finish what is in flight, make it durable, and exit
    #[command(after_help = "Example:
  tap-ctl exit -p 4711")]
    Exit {
        /// Which disk
        #[command(flatten)]
        disk: Which,
    },
}

impl Command {
    /// Whether toolstacks expect of it what they know from blktap.
    pub(super) fn is_blktaps(&self) -> bool {
        use Command::*;
        matches!(self, List(_) | Allocate { .. } | Free { .. } | Spawn { .. } | Attach { .. } | Detach { .. })
            || matches!(self, Open { .. } | Close { .. } | Pause { .. } | Unpause { .. } | Stats { .. })
            || matches!(self, Create { .. } | Destroy { .. } | Commit { .. } | Query { .. } | Cancel { .. })
    }
}

/// Which lines `list` prints.
#[derive(Debug, ClapArgs)]
pub struct List {
    /// Only those of this process
    #[arg(short, long)]
    pub pid: Option<i32>,
    /// Only those with this minor
    #[arg(short, long)]
    pub minor: Option<i32>,
    /// Only images of this type, such as aio
    #[arg(short = 't', long = "type")]
    pub kind: Option<String>,
    /// Only the image with this path
    #[arg(short, long)]
    pub file: Option<String>,
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

/// Names a disk.
#[derive(Clone, Copy, Debug, ClapArgs)]
pub struct Disk {
    /// Its process
    #[arg(short, long)]
    pub pid: i32,
    /// Its minor
    #[arg(short, long)]
    pub minor: u16,
}

/// How long a command waits.
#[derive(Clone, Copy, Debug, ClapArgs)]
pub struct Limit {
    /// Waits so long at most; 0 or not given: without limit
    #[arg(short = 't', value_name = "SECONDS", default_value_t = 0, hide_default_value = true)]
    pub seconds: u32,
}

/// An image, and how it is opened.
#[derive(Debug, ClapArgs)]
pub struct Opened {
    /// The image
    #[arg(short = 'a', value_name = "TYPE:PATH")]
    pub image: String,
    /// Read-only
    #[arg(short = 'R')]
    pub read_only: bool,
    /// Through the page cache, not by O_DIRECT
    #[arg(short = 'D')]
    pub no_o_direct: bool,
    /// A read cache on local storage: refused
    #[arg(short = 'r')]
    pub local_cache: bool,
    /// The parent has to be the image that a tapdisk of this host has open as this minor
    #[arg(short = 'e', value_name = "MINOR")]
    pub parent: Option<u16>,
    /// A secondary image: refused
    #[arg(short = '2', value_name = "PATH")]
    pub secondary: Option<String>,
    /// The secondary image takes over where the first has no space: refused
    #[arg(short = 's')]
    pub standby: bool,
    /// How long I/O that fails is tried again; 0 or not given: as the configuration says
    #[arg(short = 't', value_name = "SECONDS", default_value_t = 0, hide_default_value = true)]
    pub timeout_s: u16,
    /// Marks what is written in this log of changed blocks (cbt-util(8)); with -R, there is nothing to mark
    #[arg(short = 'C', value_name = "PATH")]
    pub log: Option<String>,
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
}
