//! How a command fails: exit code, standard error, and with --json standard output.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use nix::errno::Errno;
use serde_json::json;
use tapdisk::control::client::{self, Refused};
use tapdisk::text::{one_line, plain_json};

use super::Args;

/// What is told of an error.
pub(super) fn report(args: &Args, error: &io::Error) -> ExitCode {
    // Only standard output is a pipe here; whoever read it has enough.
    if error.kind() == io::ErrorKind::BrokenPipe {
        return ExitCode::SUCCESS;
    }
    let number = exit_code(error);
    let (known, words) = (strerror(number), words(error));
    if args.json {
        print_json(number, words.as_ref().unwrap_or(&known));
    }
    let detailed = args.debug || io::stderr().is_terminal();
    match words {
        Some(words) if !args.command.is_blktaps() || is_exact(error) => eprintln!("{words}"),
        Some(words) if detailed => eprintln!("{known}\n{words}"),
        _ => eprintln!("{known}"),
    }
    ExitCode::from(u8::try_from(number).unwrap_or(1))
}

/// The exit code of an error, and what it says: its own words, or its errno's.
pub(super) fn told(error: &io::Error) -> (i32, String) {
    let number = exit_code(error);
    (number, words(error).unwrap_or_else(|| strerror(number)))
}

fn exit_code(error: &io::Error) -> i32 {
    if is_exact(error) { Errno::EPERM as i32 } else { number(error) }
}

/// An error as the one value on standard output.
pub(super) fn print_json(number: i32, text: &str) {
    #[expect(clippy::disallowed_methods, reason = "an exit code that is no errno has the name of none")]
    let name = format!("{:?}", Errno::from_raw(number));
    let value = json!({ "error": { "errno": number, "name": name, "text": text } });
    // Where it can't be written, the exit code still says that something is wrong.
    let _ = writeln!(io::stdout(), "{}", plain_json(&value.to_string()));
}

/// What an error says beyond its errno. What a tapdisk says that does not start has lines.
fn words(error: &io::Error) -> Option<String> {
    let escaped = |words: &str| words.lines().map(one_line).collect::<Vec<_>>().join("\n");
    error.raw_os_error().is_none().then(|| escaped(&error.to_string()))
}

/// The errno, or the exit code of a tapdisk that did not start, whatever that means.
fn number(error: &io::Error) -> i32 {
    let refused = error.get_ref().and_then(|error| error.downcast_ref::<Refused>());
    refused.map(|refused| refused.errno).filter(|code| (1..256).contains(code)).unwrap_or(client::errno(error) as i32)
}

/// What the C library says of an errno, and toolstacks look for.
fn strerror(number: i32) -> String {
    let text = io::Error::from_raw_os_error(number).to_string();
    text.rsplit_once(" (os error").map_or(text.clone(), |(text, _)| text.to_owned())
}

/// An error whose words blktap prints in place of the errno's.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Exact(String);

/// An error with exit code 1 and these words.
pub(super) fn exact(text: &str) -> io::Error {
    io::Error::other(Exact(text.to_owned()))
}

fn is_exact(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|error| error.is::<Exact>())
}
