//! Starts a tapdisk.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, absolute};
use std::process::{Command, ExitStatus, Stdio};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use tapdisk::control::client::{self, Refused, errno, refused};
use tapdisk::sys::process::keep_from_children;

use super::CONTROL_DIRECTORY;

/// More than a path has, in bytes.
const LINE_MAX: u64 = 4096;
/// More than anybody reads of what it says if it fails, in bytes.
const ERRORS_MAX: usize = 16384;

/// The program: what somebody names, the one beside us, or the one in PATH.
fn program() -> OsString {
    let named = std::env::var_os("TAPDISK").filter(|name| !name.is_empty()).map(|name| {
        // It starts elsewhere. A name alone is looked for in PATH.
        let path = Path::new(&name).components().count() > 1;
        path.then(|| absolute(&name).ok()).flatten().map_or(name, OsString::from)
    });
    let beside =
        || std::env::current_exe().ok().map(|path| path.with_file_name("tapdisk")).filter(|path| path.exists());
    named.or_else(|| beside().map(OsString::from)).unwrap_or_else(|| "tapdisk".into())
}

/// Starts a tapdisk without disks, in a slice of systemd if one is named, and gives its process id. It gets nothing of ours that
/// somebody may wait for the end of.
pub(super) fn start(directory: &Path, slice: Option<&str>) -> io::Result<i32> {
    let program = program();
    let mut command = Command::new(if slice.is_some() { "systemd-run".as_ref() } else { program.as_os_str() });
    if let Some(slice) = slice {
        command.args(["--quiet", "--scope", "--slice", slice, "--"]).arg(&program);
    }
    // blktap's tapdisk has one folder, and no such option.
    let directory = absolute(directory)?;
    let told = directory != Path::new(CONTROL_DIRECTORY);
    if told {
        command.arg("--control-directory").arg(&directory);
    }
    // Whoever waits for the end of a pipe of our caller's must not wait for the end of a disk.
    keep_from_children()?;
    // What it says if it fails. A file does not block it, and need not have an end.
    let errors = File::from(memfd_create(c"stderr", MFdFlags::MFD_CLOEXEC)?);
    // As blktap's, it holds no folder of whoever started it.
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors.try_clone()?);
    let mut child = command.spawn().map_err(|error| {
        let text = match slice {
            Some(slice) => format!("systemd-run: {error}; without it there is no slice {slice}: leave -c out"),
            None => format!("{}: {error}; TAPDISK in the environment names another program", program.display()),
        };
        refused(errno(&error), text)
    })?;
    let mut line = Vec::new();
    let output = child.stdout.take().ok_or(Errno::EIO)?;
    BufReader::new(output.take(LINE_MAX)).read_until(b'\n', &mut line)?;
    let pid = pid_of(&line);
    // Where it was not told, it goes by the host's defaults.
    let folder = std::str::from_utf8(&line).ok().and_then(|line| Path::new(line.trim_end()).parent());
    if let (Some(pid), Some(elsewhere)) = (pid, folder.filter(|folder| *folder != directory && !told)) {
        // It waits for nobody who finds it. Its process id is only what it says.
        let _ = client::signal(elsewhere, pid, Signal::SIGTERM);
        if child.try_wait()?.is_none() && pid == child.id() as i32 {
            let _ = child.kill();
        }
        let text = format!(
            "{}: it has its control socket in {}, as its defaults say, and not in {}; --directory names the folder",
            program.display(),
            elsewhere.display(),
            directory.display()
        );
        return Err(refused(Errno::EINVAL, text));
    }
    if pid == Some(child.id() as i32) {
        // It stays in the foreground, and is its own master.
        return Ok(child.id() as i32);
    }
    if pid.is_none() && !line.is_empty() {
        // It is something else, which may have ended.
        let _ = child.kill();
    }
    match (pid, child.wait()?) {
        (Some(pid), status) if status.success() => Ok(pid),
        (_, status) => {
            let mut said = vec![0; ERRORS_MAX];
            let len = errors.read_at(&mut said, 0)?;
            line.extend_from_slice(&said[..len]);
            Err(failed(&program.display().to_string(), status, String::from_utf8_lossy(&line).trim_end()))
        }
    }
}

/// The process id in the control socket's path.
fn pid_of(line: &[u8]) -> Option<i32> {
    let (_, pid) = std::str::from_utf8(line).ok()?.strip_suffix('\n')?.rsplit_once("/ctl")?;
    pid.parse().ok()
}

/// Its exit code becomes ours.
fn failed(program: &str, status: ExitStatus, said: &str) -> io::Error {
    let errno = match status.code() {
        Some(0) => Errno::EPROTO as i32,
        Some(code) => code,
        // A signal's, as blktap has it.
        None => Errno::EINTR as i32,
    };
    let said = if said.is_empty() { "it printed no control socket" } else { said };
    io::Error::other(Refused { errno, text: format!("{program} did not start ({status}): {said}") })
}
