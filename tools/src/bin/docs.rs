//! Writes the man pages and shell completions of all programs, made of their command lines' definitions.
//!
//! `cargo run -p tools --bin docs -- DIRECTORY`

use std::io;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory, Parser};
use clap_complete::Shell;

/// Writes man pages to DIRECTORY/man1 and completions to DIRECTORY/completions.
#[derive(Parser)]
struct Args {
    /// Where to
    directory: PathBuf,
}

fn main() -> io::Result<()> {
    let directory = Args::parse().directory;
    let commands = [
        tapdisk::args::Args::command(),
        tools::tap_ctl::Args::command(),
        tools::vhd_util::Args::command(),
        tools::ring_load::Args::command(),
    ];
    let man = directory.join("man1");
    let completions = directory.join("completions");
    std::fs::create_dir_all(&man)?;
    std::fs::create_dir_all(&completions)?;
    for command in commands {
        write(command, &man, &completions)?;
    }
    Ok(())
}

fn write(command: Command, man: &Path, completions: &Path) -> io::Result<()> {
    let mut command = command.disable_help_subcommand(true);
    let name = command.get_name().to_owned();
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut command, &name, completions)?;
    }
    // A page each for the program and its subcommands.
    clap_mangen::generate_to(command, man)
}
