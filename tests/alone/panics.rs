//! A panic of a thread is the end of the process, and nobody waits for what the thread was to do.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use crate::common::served::output;

#[test]
fn a_panic_of_any_thread_ends_the_process() {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "panics::in_own_process::of_a_thread", "--ignored", "--nocapture"]);
    let output = output(&mut child);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{text}");
    assert!(text.contains("it was on purpose"), "{text}");
}

/// What a test before it runs.
mod in_own_process {
    #[test]
    #[ignore = "a_panic_of_any_thread_ends_the_process runs it"]
    fn of_a_thread() {
        tapdisk::daemon::end_on_panic();
        // Caught, as a thread's is by whoever joins it.
        let thread = std::thread::spawn(|| panic!("it was on purpose"));
        assert!(thread.join().is_err(), "it comes to this only if the process goes on");
    }
}
