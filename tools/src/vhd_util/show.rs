//! `query` and `info`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use drivers::vhd::{Header, Image, Kind, Parts};
use serde_json::Value;
use tapdisk::chain::{self, Error, Link, Rules};
use tapdisk::text::{one_line, plain_json};

use super::Query;
use super::failure::{Failure, Result, print_line};

/// `error opening %s: %d` on standard output, as storage managers know it.
pub(super) fn opened<T>(path: &Path, layer: std::result::Result<T, Error>) -> Result<T> {
    layer.map_err(|error| Failure::from(error).saying(|errno| format!("error opening {}: {errno}", path.display())))
}

/// Prints what is asked for.
pub(super) fn query(query: &Query, parents: &[PathBuf], out: &mut dyn Write) -> Result<()> {
    let path = &query.name;
    // No more than is asked for: another program may be writing the image, or its table be damaged.
    let heads = !(query.physical || query.marker || query.allocated);
    let parts = if heads { Parts::Heads } else { Parts::Unchecked };
    let layer = opened(path, chain::parts(path, parts, query.backup))?;
    let Some(image) = &layer.image else { return Ok(()) };
    let mut done = Ok(());
    let mut say = |line: Result<String>| {
        let line = line.unwrap_or_else(|failure| {
            let line = failure.line.clone().unwrap_or_default();
            done = Err(Failure { line: None, ..failure });
            line
        });
        print_line(out, &line)
    };
    if query.size {
        say(Ok((image.size >> 20).to_string()))?;
    }
    if query.physical {
        say(Ok(image.physical_size().to_string()))?;
    }
    if query.parent {
        say(parent(query, image))?;
    }
    if query.fields {
        say(Ok(format!("hidden: {}", image.footer.hidden_value())))?;
    }
    if query.marker {
        say(Ok(format!("marker: {}", image.batmap.as_ref().map_or(0, |batmap| batmap.marker))))?;
    }
    if query.depth {
        let layers = chain::chain(path, &Rules::tool(parents, Parts::Heads)).map_err(Failure::from);
        let layers = layers.map_err(|failure| failure.saying(|errno| format!("error checking chain depth: {errno}")));
        say(layers.map(|layers| format!("chain depth: {}", layers.len())))?;
    }
    if query.allocated {
        say(Ok(image.table.allocated().count().to_string()))?;
    }
    if query.largest {
        // A fixed image has no table that could have room.
        say(Ok((image.header.as_ref().map_or(0, Header::size_max) >> 20).to_string()))?;
    }
    done
}

/// The line about the parent.
fn parent(query: &Query, image: &Image) -> Result<String> {
    let failed = |error: Error| Failure::from(error).saying(|_| "query failed".to_owned());
    if image.kind != Kind::Differencing {
        return Ok(format!("{} has no parent", query.name.display()));
    }
    if query.unresolved {
        let named = image.parents.first().map(|(_, path)| path.clone());
        return named.ok_or_else(|| failed(Error::NoParent { path: query.name.clone(), tried: Vec::new() }));
    }
    let parent = chain::parent(&query.name, image).map_err(failed)?;
    Ok(parent.map_or_else(String::new, |parent| parent.display().to_string()))
}

/// Shows an image and its parents.
pub(super) fn info(path: &Path, parents: &[PathBuf], json: bool, out: &mut dyn Write) -> Result<()> {
    let layers = chain::chain(path, &Rules::tool(parents, Parts::All))?;
    print(&layers, json, out).map_err(Failure::output)
}

fn print(layers: &[Link], json: bool, out: &mut dyn Write) -> io::Result<()> {
    let layers = layers.iter().map(describe);
    if json {
        let layers: Vec<serde_json::Map<_, _>> =
            layers.map(|fields| fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()).collect();
        return writeln!(out, "{}", plain_json(&serde_json::to_string_pretty(&layers)?));
    }
    for (depth, fields) in layers.enumerate() {
        if depth > 0 {
            writeln!(out, "\non")?;
        }
        for (name, value) in fields {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            writeln!(out, "{:<16} {}", name.replace('_', " "), one_line(&value))?;
        }
    }
    Ok(())
}

/// Names and values, in the order in which they are printed.
fn describe(layer: &Link) -> Vec<(&'static str, Value)> {
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
