//! `query`, `check` and `info`.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use drivers::vhd::{Corrupt, Header, Kind, Problem};
use nix::errno::Errno;
use serde_json::Value;
use tapdisk::chain::{self, Error, Layer, Rules};

use super::{Check, Query, errno, exit_code};

/// `error opening %s: %d` and the exit code, as storage managers know them; the reason for people on standard error.
fn refused(path: &Path, error: &Error, out: &mut dyn Write) -> io::Result<ExitCode> {
    writeln!(out, "error opening {}: {}", path.display(), -(errno(error) as i32))?;
    eprintln!("{error}");
    Ok(exit_code(error))
}

/// Prints what is asked for.
pub(super) fn query(query: &Query, out: &mut dyn Write) -> io::Result<ExitCode> {
    let path = &query.name;
    let layer = match chain::layer(path) {
        Ok(layer) => layer,
        Err(error) => return refused(path, &error, out),
    };
    let Some(image) = &layer.image else { return Ok(ExitCode::FAILURE) };
    let mut code = ExitCode::SUCCESS;
    let mut failed = |error: &Error| {
        eprintln!("{error}");
        code = exit_code(error);
    };
    if query.size {
        writeln!(out, "{}", image.footer.size() >> 20)?;
    }
    if query.physical {
        writeln!(out, "{}", image.physical_size())?;
    }
    if query.parent {
        match chain::parent(path, image) {
            Ok(Some(parent)) => writeln!(out, "{}", parent.display())?,
            Ok(None) => writeln!(out, "{} has no parent", path.display())?,
            Err(error) => {
                writeln!(out, "query failed")?;
                failed(&error);
            }
        }
    }
    if query.fields {
        writeln!(out, "hidden: {}", u8::from(image.footer.is_hidden()))?;
    }
    if query.depth {
        match chain::chain(path, &Rules::ANY) {
            Ok(layers) => writeln!(out, "chain depth: {}", layers.len())?,
            Err(error) => {
                writeln!(out, "error checking chain depth: {}", -(errno(&error) as i32))?;
                failed(&error);
            }
        }
    }
    if query.largest {
        writeln!(out, "{}", image.header.as_ref().map_or(image.footer.size(), Header::size_max) >> 20)?;
    }
    if query.allocated {
        writeln!(out, "{}", image.table.allocated().count())?;
    }
    Ok(code)
}

/// Says whether an image is good, and all that is not.
pub(super) fn check(check: &Check, out: &mut dyn Write) -> io::Result<ExitCode> {
    let minded = |problem: &Problem| match problem.what {
        Corrupt::BlocksOverlap { .. } => !check.ignore_overlaps,
        Corrupt::Cookie { what: "footer" } => problem.fatal || !check.ignore_footer,
        _ => true,
    };
    let mut paths = vec![check.name.clone()];
    if check.parents {
        match chain::chain(&check.name, &Rules::ANY) {
            Ok(layers) => {
                paths
                    .extend(layers.into_iter().skip(1).filter(|layer| layer.image.is_some()).map(|layer| layer.path));
            }
            // What is wrong with the image itself is told below.
            Err(Error::Image { path, .. }) if path == check.name => {}
            Err(error) => return refused(&check.name, &error, out),
        }
    }
    let mut code = ExitCode::SUCCESS;
    for path in paths {
        let problems = match chain::check(&path) {
            Ok(problems) => problems,
            Err(error) => return refused(&path, &error, out),
        };
        let shown: Vec<_> = problems.iter().filter(|problem| minded(problem)).collect();
        for problem in &shown {
            let may = if problem.fatal { "" } else { " (it can be used all the same)" };
            writeln!(out, "{}: {}{may}", path.display(), problem.what)?;
        }
        if shown.is_empty() {
            writeln!(out, "{} is valid", path.display())?;
        } else {
            code = ExitCode::from(Errno::EINVAL as u8);
        }
    }
    Ok(code)
}

/// Shows an image and its parents.
pub(super) fn info(path: &Path, json: bool, out: &mut dyn Write) -> io::Result<ExitCode> {
    let layers = match chain::chain(path, &Rules::ANY) {
        Ok(layers) => layers,
        Err(error) => {
            eprintln!("{error}");
            return Ok(exit_code(&error));
        }
    };
    let layers = layers.iter().map(describe);
    if json {
        let layers: Vec<serde_json::Map<_, _>> =
            layers.map(|fields| fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()).collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&layers)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    for (depth, fields) in layers.enumerate() {
        if depth > 0 {
            writeln!(out, "\non")?;
        }
        for (name, value) in fields {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            writeln!(out, "{:<16} {value}", name.replace('_', " "))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Names and values, in the order in which they are printed.
fn describe(layer: &Layer) -> Vec<(&'static str, Value)> {
    let path = ("path", layer.path.to_string_lossy().into());
    let file_size = ("file_size", layer.file_size.into());
    let Some(image) = &layer.image else { return vec![path, ("format", "raw".into()), file_size] };
    let footer = &image.footer;
    let kind = match image.kind {
        Kind::Fixed => "fixed",
        Kind::Dynamic => "dynamic",
        Kind::Differencing => "differencing",
    };
    let creator = String::from_utf8_lossy(&footer.creator).trim_end_matches(['\0', ' ']).to_owned();
    let mut shown = vec![
        path,
        ("format", "vhd".into()),
        ("kind", kind.into()),
        ("size", footer.size().into()),
        file_size,
        ("physical_size", image.physical_size().into()),
        ("uuid", footer.uuid.to_string().into()),
        ("hidden", footer.is_hidden().into()),
        ("creator", creator.into()),
    ];
    if let Some(header) = &image.header {
        shown.push(("block_size", header.block_size().into()));
        shown.push(("blocks", image.table.blocks().into()));
        shown.push(("blocks_allocated", image.table.allocated().count().into()));
    }
    let problems: Vec<_> = layer.problems.iter().map(|problem| problem.what.to_string()).collect();
    shown.push(("problems", problems.into()));
    shown
}
