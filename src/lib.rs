//! # Architecture
//!
//! A process serves a disk, or, driven by tap-ctl, a few. The data of each goes this way, and the modules are listed in that order:
//!
//! ```text
//! ring -> Request -> stack (plan) -> queue (merge) -> submit thread -> engine -> kernel
//!                                                                                 |
//! ring <- answer  <- finish  <------------------ split <- reap on the main loop <-+
//! ```
//!
//! The main loop ([`event`]) is one mio `Poll`. Its turn ([`disk::Disk::turn`]) reads top to bottom: pull, start, submit,
//! reap, finish, answer, publish. All that a turn found is handed on in one batch: one kick of the submit thread, one
//! notification a ring.
//!
//! ## Invariants
//!
//! 1. **Reaping never waits for submitting.** `io_submit` can block for memory, and what frees memory can be the
//!    completion of I/O in flight. So the main loop hands I/Os to the [submit thread](submit) and goes on completing;
//!    completions reach it by an eventfd. It submits by itself only where nothing at all is in flight, a single I/O, and
//!    with `RWF_NOWAIT`; and never a write to a regular file, because a frozen file system holds that up in spite of the
//!    flag. Nor does it wait for anything else: what opens, closes, starts a thread or locks memory takes [leave to wait](blocking),
//!    which the main loop gives away before it runs. It hands such work to a [job], and what has to be closed is [kept apart](job::Apart).
//! 2. **Nothing is allocated on the data path.** Slots, tiocbs, I/Os and their iovecs are made at the start, a client's
//!    memory when it connects. Where slots run out, the loop stops pulling, and the ring or socket holds the client back.
//!    [`memory`] says what is promised, and what a disk takes.
//!
//! ## A process and its disks
//!
//! A disk has a [minor](minors), whose [marker] on the host says that it is taken. A configuration takes
//! one, opens the image that it names, and lets both go at the end; through the [control socket](control) a toolstack does the same in steps:
//! ATTACH, OPEN, CLOSE, DETACH. What a member of its group names is opened, and whenever it is opened again, [with that member's
//! rights](sys::credentials). Whoever asks for what a job does is answered when that is done. All disks share the main loop, and nothing else.
//!
//! [marker]: minors::marker
//!
//! ## Boundaries
//!
//! - A **layer** (crate `drivers`) is an image format or a filter: it says where the bytes of an extent are, and never moves one. Every
//!   operation descends the layers, from the first to the image that is written; reads go on to those that it is based on. The
//!   [page of the trait](drivers::layer) has the contract, and what each feature takes of it. The [`stack`] walks, moves data and
//!   metadata, and tells layers of the ends that they have asked for by a ticket.
//!   A **filter** has no data of its own. The first is the [throttle](drivers::throttle), which has requests wait, and is not asked without
//!   limits; then the [changed blocks](drivers::changed_blocks), in whose log a block is marked before it is written.
//!   Which images a disk is made of, a [`chain`] says: each names its parent, a [volume] by a name that lasts.
//! - A **store** ([`store`]) is where a layer's bytes are: a file, a block device, memory. Jobs open, lock, measure and close it, and read and
//!   write metadata there before the first request and after the last one; in between its bytes are the engine's. Its page says what its lock holds off.
//! - An **engine** ([`engine`]) moves bytes between memory and stores, and knows no format. It has two halves: submit, which
//!   any thread may call and which may block, and reap, which is the main loop's and never blocks.
//!   A disk whose files are of several kinds has one for each kind, and a [router](engine::route) in front of them.
//!   [Which one](engine::Opener) is for the configuration to say, or for the image, and can [change](disk::Wanted) while the
//!   disk is in use. [Faults](engine::fault) are engines around an engine.
//! - The **pool** ([`engine::pool`]) is an engine of threads, and does for the others what the kernel does only by waiting.
//!   Whoever submits to it makes no thread.
//! - A **frontend** ([`frontend`]) brings requests, each with a tag of its own that comes back with the answer.
//! - The **XenStore** ([`xenstore`]) is asked without waiting: its client's requests are futures, polled on the main loop.
//!
//! ## A Xen guest
//!
//! [`frontend::xen`] has two halves. [`vbd`](frontend::xen::vbd) moves requests and data: what a turn finds in the rings is
//! taken out, indirect descriptors and the data of writes are copied in from the guest's pages with one system call each, and
//! the data of reads is copied out with one before the answers become visible. [`xenbus`](frontend::xen::xenbus) shakes hands
//! through [`xenstore`]: an asynchronous function, polled by the main loop, that looks at both sides' nodes whenever one has
//! changed and does what [`decide`](frontend::xen::handshake::decide) says. A guest that goes leaves its requests behind: they
//! are finished in memory of ours before the next guest is let in, and before the toolstack is told that the disk is closed.
//! Where blktap's tapback shakes hands, [`tapback`](frontend::xen::tapback) is the second half: it has a vbd for each ring that
//! the control socket names.
//!
//! ## A virtio guest
//!
//! [`frontend::virtio`] knows rings and requests, [`frontend::vhost_user`] how they get here: a front end, such as QEMU, hands over the guest's
//! memory and eventfds. Data goes between that memory and the image; only what is not aligned to sectors goes through memory of ours.
//!
//! ## Live operations
//!
//! A [pause](disk::Disk::pause_for_client) is a drain without an end: nothing is pulled, what was pulled is finished and flushed, the image is
//! closed, and an engine without files takes the place of the other. [Resume](disk::Disk::resume) opens the image again, or another.
//! [Coalesce](disk::Disk::coalesce) merges two images of the chain in a thread of its own, with the files alone ([`vhd`]): what
//! changes is hidden by the image above. Then a pause leaves the merged one out. What a disk serves that is not what its configuration
//! says, its log of changed blocks too, and that it is paused, is on [record] for whoever starts it again. What others may change of an
//! image in use, [`vhd`] says.
//!
//! ## What is seen from outside
//!
//! [`stats`] counts requests and the transfers of each layer in fixed memory. [`metrics`] shows that to monitoring, `debug-queue`
//! every request in flight and which layer has it wait, and [shared memory](stats::shm) to xentop what a guest's disk does.
//!
//! ## Ownership
//!
//! A request lives in a [slot](request::Slots); a [tiocb](queue) is one transfer of it; an [I/O](sys::io::Io) is one or more
//! contiguous tiocbs. A request's data can be in [several memories](request::Payload) of its client. An I/O owns a share of each memory
//! that it points into, and whoever has it in flight owns the I/O: main loop, submit thread, or kernel. So a client can go at any
//! moment, or take a part of its memory away, and that goes after the last request on it.
//!
//! All unsafe code is in [`sys`].
//!
//! ## Errors
//!
//! What fails on the data path and may pass by itself is [tried again](retry). What does not come back is told of by the
//! [watchdog](disk::Watchdog).
//!
//! What is opened or configured fails with a text that names the file, the key and the remedy. What fails on the data
//! path is an errno: it is logged once where it arose, with operation, file, offset and length, and goes to the client.

pub mod args;
pub mod config;
pub mod daemon;
pub mod privileges;
pub mod record;
pub mod serve;

pub mod event;
pub mod polling;

pub mod minors;

pub mod disk;

pub mod frontend;

pub mod xenstore;

pub mod request;

pub mod payload;

pub mod stack;

pub mod queue;

pub mod retry;

pub mod submit;

pub mod engine;

pub mod blocking;
pub mod chain;
pub mod image;
pub mod job;
pub mod memory;
pub mod store;
pub mod vhd;
pub mod volume;

pub mod client;
pub mod control;
pub mod listen;
pub mod log;
pub mod metrics;
pub mod stats;
pub mod sys;
pub mod text;
