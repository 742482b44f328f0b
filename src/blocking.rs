//! Who may wait: every thread but the main loop's.
//!
//! A system call that waits for a file, for memory or for another thread takes a [`Blocking`]. A thread has one from its first line,
//! by [`spawn`], and the token can't leave it. The main loop's thread gives its own away when the loop begins
//! ([`MainLoop::run`](crate::event::MainLoop::run)). So what may wait does not compile where nobody may.

use std::io;
use std::marker::PhantomData;
use std::thread::{Builder, JoinHandle};

use crate::sys::reserve::room_for_thread;

/// Leave to wait. It belongs to one thread: neither `Send` nor `Sync` nor `Clone`.
///
/// ```compile_fail
/// let blocking = tapdisk::blocking::Blocking::before_main_loop();
/// std::thread::spawn(move || drop(blocking));
/// ```
#[derive(Debug)]
pub struct Blocking(PhantomData<*const ()>);

impl Blocking {
    /// For a program without a main loop, or before it runs.
    pub fn before_main_loop() -> Blocking {
        Blocking(PhantomData)
    }

    /// For a thread that runs nothing else.
    pub(crate) fn of_thread() -> Blocking {
        Blocking(PhantomData)
    }
}

/// Who calls what may be called by both.
#[derive(Clone, Copy, Debug)]
pub enum Caller<'a> {
    /// The main loop: it waits for nobody.
    MainLoop,
    /// A thread that may wait.
    Thread(&'a Blocking),
}

/// Starts a thread with a stack of so many bytes. It has the signal mask, the CPUs and the priority of the thread that calls. Waits
/// where the system has no memory for it (clone(2)). Errors are the system's: EAGAIN where it has no more threads for us, ENOMEM where it
/// has no memory.
pub fn spawn(
    blocking: &Blocking,
    name: &str,
    stack_size: usize,
    run: impl FnOnce(&Blocking) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    spawn_if(blocking, false, name, stack_size, run)
}

/// The same; where memory is short, `at_any_price` takes of what others would need, and of luck.
pub(crate) fn spawn_if(
    _: &Blocking,
    at_any_price: bool,
    name: &str,
    stack_size: usize,
    run: impl FnOnce(&Blocking) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    room_for_thread(stack_size, at_any_price)?;
    Builder::new().name(name.to_owned()).stack_size(stack_size).spawn(move || run(&Blocking::of_thread()))
}
