//! Writes the man pages and shell completions of all programs, made of their command lines' definitions.

use std::io;
use std::path::{Path, PathBuf};

use clap::{Arg, Command, CommandFactory, Parser};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

/// Writes man pages and shell completions of all programs.
///
/// The pages are in man1 and man8 of the directory, the completions for bash, fish and zsh in its folder completions. Directories are
/// made where they are missing, and files that are there already are written anew.
#[derive(Parser)]
#[command(
    name = "docs",
    version,
    after_help = "Examples:
  docs target/docs
  man target/docs/man8/tap-ctl.8"
)]
struct Args {
    /// Where to
    directory: PathBuf,
}

fn main() -> io::Result<()> {
    let directory = Args::parse().directory;
    let commands = [
        (tapdisk::args::Args::command(), "8"),
        (tools::tap_ctl::Args::command(), "8"),
        (tools::vhd_util::Args::command(), "8"),
        (tools::cbt_util::Args::command(), "8"),
        (tools::ring_load::Args::command(), "1"),
        (Args::command(), "1"),
    ];
    let completions = directory.join("completions");
    std::fs::create_dir_all(&completions)?;
    for (command, section) in commands {
        let mut command = command.disable_help_subcommand(true);
        let name = command.get_name().to_owned();
        for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
            clap_complete::generate_to(shell, &mut command, &name, &completions)?;
        }
        let pages = directory.join(format!("man{section}"));
        std::fs::create_dir_all(&pages)?;
        write(command, section, &pages)?;
    }
    Ok(())
}

/// Writes a program's page, with all its commands.
fn write(mut command: Command, section: &str, pages: &Path) -> io::Result<()> {
    command.build();
    let man = Man::new(command.clone()).section(section);
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        page.extend(b".SH COMMANDS\n");
        page.extend(b"The options above may stand with each command.\n");
    }
    for subcommand in command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()) {
        page.extend(part(subcommand)?);
    }
    if command.get_after_help().is_some() {
        page.extend(b".SH EXAMPLES\n");
        page.extend(examples(&command).to_roff().into_bytes());
    }
    std::fs::write(pages.join(man.get_filename()), page)
}

/// What a page says of a command. What it has in common with the others is said once, for the program.
fn part(command: &Command) -> io::Result<Vec<u8>> {
    let name = command.get_bin_name().unwrap_or(command.get_name());
    let own = command.clone().mut_args(|arg| {
        let common = arg.is_global_set() || arg.get_id() == "help";
        arg.hide(common)
    });
    let arguments: Vec<_> = own.get_arguments().filter(|arg| !arg.is_hide_set()).map(synopsis).collect();
    let usage = format!("{name} {}", arguments.join(" "));
    let man = Man::new(own.override_usage(usage.trim_end().to_owned()));
    let mut rendered = Vec::new();
    man.render_synopsis_section(&mut rendered)?;
    rendered.extend(b".PP\n");
    man.render_description_section(&mut rendered)?;
    man.render_options_section(&mut rendered)?;
    // It is a part of a section, and has no preamble.
    let is_heading = |line: &&str| [".SH", ".ie", ".el"].iter().any(|start| line.starts_with(start));
    let text = String::from_utf8_lossy(&rendered).into_owned();
    let mut part = format!(".SS {name}\n");
    part.extend(text.lines().filter(|line| !is_heading(line)).flat_map(|line| [line, "\n"]));
    if command.get_after_help().is_some() {
        part += &examples(command).to_roff();
    }
    Ok(part.into_bytes())
}

/// An argument in a command's synopsis.
fn synopsis(arg: &Arg) -> String {
    let option = arg.get_short().map(|short| format!("-{short}")).or(arg.get_long().map(|long| format!("--{long}")));
    let takes_value = arg.get_action().takes_values();
    let values = arg.get_value_names().filter(|_| takes_value).map(|names| names.join(" "));
    let text = [option, values].into_iter().flatten().collect::<Vec<_>>().join(" ");
    if arg.is_required_set() { text } else { format!("[{text}]") }
}

/// What follows a command's help: examples, line by line as they are, and paragraphs.
fn examples(command: &Command) -> Roff {
    let mut roff = Roff::new();
    let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    for line in text.lines() {
        match line.strip_prefix("  ") {
            Some(example) => roff.control("nf", []).text([roman(format!("    {example}"))]).control("fi", []),
            None if line.is_empty() => roff.control("PP", []),
            None if line.ends_with(':') => roff.control("PP", []).text([bold(line)]),
            None => roff.text([roman(line)]),
        };
    }
    roff
}
