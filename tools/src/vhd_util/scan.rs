//! `scan`: a line for each of many images.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use drivers::vhd::{FOOTER_SIZE, Footer, HEADER_SIZE, Header, Image, KeyHash, Kind, Parts, Source, Uuid};
use tapdisk::blocking::Blocking;
use tapdisk::chain::{self, Error};
use tapdisk::store::{FileStore, Store};
use tapdisk::sys::errno_of;
use tapdisk::text::one_line;
use tapdisk::volume;

use super::Scan;
use super::failure::{Failure, Result, print_line, read};
use super::volumes::{Volume, volumes};

/// What a line says of an image.
struct Found {
    path: PathBuf,
    capacity: u64,
    size: u64,
    hidden: u8,
    marker: u8,
    key_hash: Option<KeyHash>,
    parent: Option<PathBuf>,
}

/// Why there is none, in blktap's words.
struct Bad {
    path: PathBuf,
    message: &'static str,
    failure: Failure,
}

/// Lists images.
pub(super) fn scan(args: &Scan, out: &mut dyn Write) -> Result<()> {
    let volumes = args.group.as_deref().map_or(Ok(HashMap::new()), volumes)?;
    let mut images = Vec::new();
    let mut failed = None;
    let mut targets = if args.group.is_some() { of_group(args, &volumes) } else { targets(args) };
    if targets.is_empty()
        && args.group.is_none()
        && let Some(error) = args.pattern.as_deref().and_then(unreadable)
    {
        let pattern = args.pattern.as_deref().unwrap_or_default();
        let failure = Failure::new(errno_of(&error), Path::new(pattern), format!("cannot look there: {error}"));
        let line = |errno| format!("vhd={pattern} scan-error={errno} error-message='failure scanning target'");
        return Err(failure.saying(line));
    }
    let mut next = 0;
    while next < targets.len() {
        let (path, raw) = targets[next].clone();
        next += 1;
        match look(args, &path, raw, &volumes) {
            Ok((found, parent_raw)) => {
                if let Some(parent) = found.parent.as_ref().filter(|_| args.parents) {
                    let parent = beside(&found.path, parent);
                    // By names, as blktap does: a parent can be named in more than one way.
                    if !targets.iter().any(|(path, _)| path.file_name() == parent.file_name()) {
                        targets.push((parent, parent_raw));
                    }
                }
                if args.pretty {
                    images.push(found);
                } else {
                    print(args, &found, 0, "", out)?;
                }
            }
            Err(bad) => {
                let (path, errno) = (bad.path.display(), -(bad.failure.errno as i32));
                print_line(out, &format!("vhd={path} scan-error={errno} error-message='{}'", bad.message))?;
                failed = Some(bad.failure);
                if !args.go_on {
                    break;
                }
                eprintln!("{}", one_line(&failed.take().map_or_else(String::new, |failure| failure.text)));
            }
        }
    }
    if args.pretty {
        tree(args, images, out)?;
    }
    failed.map_or(Ok(()), Err)
}

/// The images to list, and whether they are raw. A pattern that matches nothing is no error.
fn targets(args: &Scan) -> Vec<(PathBuf, bool)> {
    let matching = args.pattern.iter().flat_map(|pattern| braces(pattern)).flat_map(|pattern| {
        let options = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
        glob::glob_with(&pattern, options).into_iter().flatten().map(|path| match path {
            Ok(path) => path,
            Err(error) => error.path().to_owned(),
        })
    });
    matching.chain(args.images.iter().cloned()).map(|path| (path, false)).collect()
}

/// The volumes of a group to list, in the order of their names.
fn of_group(args: &Scan, volumes: &HashMap<PathBuf, Volume>) -> Vec<(PathBuf, bool)> {
    let patterns = args.pattern.iter().flat_map(|pattern| braces(pattern));
    let patterns: Vec<_> = patterns.filter_map(|pattern| glob::Pattern::new(&pattern).ok()).collect();
    let wanted = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        patterns.iter().any(|pattern| pattern.matches(&name)) || args.images.contains(path)
    };
    let mut found: Vec<_> = volumes.keys().filter(|path| wanted(path)).cloned().collect();
    found.sort();
    found.into_iter().map(|path| (path, false)).collect()
}

/// Why the folder can't be read whose files a pattern is about.
fn unreadable(pattern: &str) -> Option<std::io::Error> {
    let plain = pattern.split(['*', '?', '[', '{']).next().unwrap_or_default();
    let folder = plain.rsplit_once('/').map(|(folder, _)| format!("{folder}/"))?;
    std::fs::read_dir(folder).err()
}

/// The patterns that one with {alternatives,of,parts} stands for, as a shell has it.
fn braces(pattern: &str) -> Vec<String> {
    let Some(begin) = pattern.find('{') else { return vec![pattern.to_owned()] };
    let (mut depth, mut parts, mut from) = (0, Vec::new(), begin + 1);
    for (at, letter) in pattern[begin..].char_indices().map(|(at, letter)| (begin + at, letter)) {
        match letter {
            '{' => depth += 1,
            ',' if depth == 1 => {
                parts.push(&pattern[from..at]);
                from = at + 1;
            }
            '}' if depth == 1 => {
                parts.push(&pattern[from..at]);
                let (before, after) = (&pattern[..begin], &pattern[at + 1..]);
                return parts.iter().flat_map(|part| braces(&format!("{before}{part}{after}"))).collect();
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    vec![pattern.to_owned()]
}

/// The path of a parent that may be named relative to its child.
fn beside(child: &Path, parent: &Path) -> PathBuf {
    child.parent().unwrap_or(Path::new("")).join(parent)
}

/// What is to be said of an image, and whether its parent is raw.
fn look(
    args: &Scan,
    path: &Path,
    raw: bool,
    volumes: &HashMap<PathBuf, Volume>,
) -> std::result::Result<(Found, bool), Bad> {
    let bad = |message| {
        let path = path.to_owned();
        move |failure| Bad { path, message, failure }
    };
    let io = |error: std::io::Error| Failure::new(errno_of(&error), path, format!("cannot open it: {error}"));
    let volume = volumes.get(path);
    let path_shown = if args.pretty && volume.is_none() {
        path.canonicalize().map_err(|error| bad("resolving name")(io(error)))?
    } else {
        path.to_owned()
    };
    let blocking = Blocking::before_main_loop();
    let (opened, store, reading);
    let source: &dyn Source = match volume {
        Some(volume) => {
            opened = volume.open().map_err(|error| bad("opening file")(io(error)))?;
            &opened
        }
        None => {
            store = FileStore::look(&blocking, path).map_err(|error| bad("opening file")(error.into()))?;
            reading = (&store as &dyn Store).reading(&blocking);
            &reading
        }
    };
    let size = source.size().map_err(|error| bad("opening file")(io(error)))?;
    let mut found =
        Found { path: path_shown, capacity: size, size, hidden: 1, marker: 0, key_hash: None, parent: None };
    if raw {
        return Ok((found, false));
    }
    let fast = args.fast && !args.pretty && !args.markers;
    if let Some((footer, header)) = fast.then(|| headers(source)).flatten() {
        (found.capacity, found.hidden) = (footer.size(), footer.hidden_value());
        if footer.kind() == Ok(Kind::Differencing) {
            let name = header.parent_name();
            found.parent = if volume.is_some() { name.and_then(|name| volume_name(path, &name)) } else { name }
                .map(PathBuf::from);
            if found.parent.is_some() {
                return Ok((found, header.parent_uuid == Uuid::NIL));
            }
        } else {
            return Ok((found, false));
        }
    }
    let parts = if args.markers { Parts::Unchecked } else { Parts::Heads };
    let image =
        Image::read_parts(source, parts, &mut Vec::new()).map_err(|error| bad("opening file")(read(path)(error)))?;
    (found.capacity, found.hidden) = (image.size, image.footer.hidden_value());
    if let Some(batmap) = &image.batmap {
        (found.marker, found.key_hash) = (batmap.marker, batmap.key_hash);
    }
    if image.kind == Kind::Differencing {
        let parent = if volume.is_some() { volume_parent(path, &image) } else { parent(path, &image) };
        found.parent = Some(parent.map_err(|error| bad("getting parent")(error.into()))?);
    }
    Ok((found, image.header.as_ref().is_some_and(|header| header.parent_uuid == Uuid::NIL)))
}

/// The parent of a volume: one of the same group, which may not be active, and so has no device to be found by.
fn volume_parent(path: &Path, image: &Image) -> std::result::Result<PathBuf, Error> {
    let name = image.parents.first().and_then(|(_, name)| Some(path.with_file_name(volume_name(path, name)?)));
    name.ok_or_else(|| Error::NoParent { path: path.to_owned(), tried: Vec::new() })
}

/// A volume's name in its group, of a path by which an image of the group names it: that of the device mapper has both.
fn volume_name(child: &Path, path: &str) -> Option<String> {
    let name = Path::new(path).file_name()?.to_str()?;
    let group = volume::group_and_name(child).map(|(group, _)| group);
    match volume::mapper_parts(name) {
        Some((of, name)) if Some(&of) == group.as_ref() => Some(name),
        _ => Some(name.to_owned()),
    }
}

/// The footer's copy and the header that follows it, of an image that is as blktap makes them.
fn headers(source: &dyn Source) -> Option<(Footer, Header)> {
    let mut bytes = [0; FOOTER_SIZE + HEADER_SIZE];
    if source.size().ok()? < bytes.len() as u64 {
        return None;
    }
    source.read_at(0, &mut bytes).ok()?;
    let footer = Footer::parse(&bytes[..FOOTER_SIZE]).ok()?;
    let follows = footer.header_at() == Some(FOOTER_SIZE as u64);
    follows.then(|| Some((footer, Header::parse(&bytes[FOOTER_SIZE..]).ok()?)))?
}

/// The parent's path; if the parent is not there, as the image has it.
fn parent(path: &Path, image: &Image) -> std::result::Result<PathBuf, Error> {
    match chain::parent(path, image) {
        Ok(Some(parent)) => Ok(parent),
        Ok(None) => Ok(PathBuf::new()),
        Err(error) => image.parents.first().map(|(_, path)| PathBuf::from(path)).ok_or(error),
    }
}

/// A path, or its last part.
fn shown(args: &Scan, path: &Path) -> String {
    let name = if args.verbose { path.as_os_str() } else { path.file_name().unwrap_or(path.as_os_str()) };
    name.to_string_lossy().into_owned()
}

fn print(args: &Scan, image: &Found, indent: usize, remark: &str, out: &mut dyn Write) -> Result<()> {
    let parent = image.parent.as_ref().map_or_else(|| "none".to_owned(), |parent| shown(args, parent));
    let markers = if args.markers {
        let hash = image.key_hash.map_or_else(String::new, |key| super::key::hex(&key.hash));
        format!(" marker={} keyhash={hash}", image.marker)
    } else {
        String::new()
    };
    let (name, hidden) = (shown(args, &image.path), image.hidden);
    let line = format!("vhd={name} capacity={} size={} hidden={hidden}", image.capacity, image.size);
    print_line(out, &format!("{:indent$}{line}{markers} parent={parent}{remark}", ""))
}

/// Prints images below their parents: by name, hidden ones after the others.
fn tree(args: &Scan, mut images: Vec<Found>, out: &mut dyn Write) -> Result<()> {
    images.sort_by(|one, other| one.path.cmp(&other.path));
    images.dedup_by(|one, other| one.path == other.path);
    let index: HashMap<_, _> = images.iter().enumerate().map(|(i, image)| (image.path.clone(), i)).collect();
    let parents: Vec<_> =
        images.iter().map(|image| image.parent.as_ref().and_then(|parent| index.get(parent).copied())).collect();
    let mut order: Vec<_> = (0..images.len()).filter(|i| parents[*i].is_none()).collect();
    order.sort_by_key(|i| images[*i].hidden == 0);
    // Those that are their own ancestors come last, and once.
    order.extend((0..images.len()).filter(|i| parents[*i].is_some()));
    let mut printed = vec![false; images.len()];
    let mut stack: Vec<_> = order.into_iter().rev().map(|i| (i, 0)).collect();
    while let Some((i, depth)) = stack.pop() {
        if std::mem::replace(&mut printed[i], true) {
            continue;
        }
        let image = &images[i];
        let remark = if image.parent.is_some() && parents[i].is_none() { " (not found in scan)" } else { "" };
        print(args, image, 3 * depth, remark, out)?;
        let mut children: Vec<_> = (0..images.len()).filter(|child| parents[*child] == Some(i)).collect();
        children.sort_by_key(|child| images[*child].hidden);
        stack.extend(children.into_iter().rev().map(|child| (child, depth + 1)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::braces;

    #[test]
    fn braces_are_alternatives() {
        assert_eq!(braces("/a/*.vhd"), ["/a/*.vhd"]);
        assert_eq!(braces("/{a,b{c,d}}/{x}.vhd"), ["/a/x.vhd", "/bc/x.vhd", "/bd/x.vhd"]);
        assert_eq!(braces("/{a,b"), ["/{a,b"]);
    }
}
