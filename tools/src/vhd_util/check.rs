//! `check`: says whether an image is good, and all that is not.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use drivers::vhd::{Corrupt, Image, Parts, Problem, Uuid};
use nix::errno::Errno;
use tapdisk::chain::{self, Error, Link, Rules};

use super::Check;
use super::create::now;
use super::failure::{Failure, Result, print_line};
use super::show::opened;

/// Says whether an image is good, and all that is not.
pub(super) fn check(check: &Check, parents: &[PathBuf], out: &mut dyn Write) -> Result<()> {
    let mut bad = Vec::new();
    for path in paths(check, parents)? {
        let problems = opened(&path, chain::check(&path, now(), check.bitmaps))?;
        let mut shown: Vec<_> = problems.iter().filter(|problem| minded(check, problem)).map(told).collect();
        if !problems.iter().any(|problem| problem.fatal) {
            shown.extend(parent_problem(check, &path)?);
        }
        for text in &shown {
            print_line(out, &format!("{}: {text}", path.display()))?;
        }
        if !shown.is_empty() {
            bad.push(path);
        } else if !check.stats {
            print_line(out, &format!("{} is valid", path.display()))?;
        }
    }
    if !bad.is_empty() {
        return Err(Failure { errno: Errno::EINVAL, line: None, text: String::new() });
    }
    if check.stats { stats(check, parents, out) } else { Ok(()) }
}

/// The images to check: the one that is named, and, if that is asked for, its parents that are VHD.
fn paths(check: &Check, parents: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut paths = vec![check.name.clone()];
    if check.parents {
        match chain::chain(&check.name, &Rules::tool(parents, Parts::Heads)) {
            Ok(layers) => {
                let parents = layers.into_iter().skip(1).filter(|layer| layer.image.is_some());
                paths.extend(parents.map(|layer| layer.path));
            }
            // What is wrong with the image itself is told below.
            Err(Error::Image { path, .. } | Error::OtherParent { path, .. }) if path == check.name => {}
            Err(error) => return opened(&check.name, Err(error)),
        }
    }
    Ok(paths)
}

fn minded(check: &Check, problem: &Problem) -> bool {
    match problem.what {
        Corrupt::BlocksOverlap { .. } => !check.ignore_overlaps,
        Corrupt::Cookie { what: "footer" } | Corrupt::Checksum { what: "footer", .. } | Corrupt::CopyDiffers => {
            problem.fatal || !check.ignore_footer
        }
        Corrupt::Future { .. } => !check.ignore_times,
        _ => true,
    }
}

fn told(problem: &Problem) -> String {
    let may = if problem.fatal { "" } else { " (it can be used all the same)" };
    format!("{}{may}", problem.what)
}

/// What is wrong about the parent: it is not there, or it is another image.
fn parent_problem(check: &Check, path: &Path) -> Result<Option<String>> {
    let Some(image) = chain::parts(path, Parts::Heads, false)?.image else { return Ok(None) };
    let parent = match chain::parent(path, &image) {
        Ok(Some(parent)) => parent,
        Ok(None) => return Ok(None),
        Err(error) => return Ok(Some(without(path, &error))),
    };
    let expected = image.header.as_ref().map_or(Uuid::NIL, |header| header.parent_uuid);
    if expected == Uuid::NIL || check.ignore_uuid {
        return Ok(None);
    }
    Ok(match chain::parts(&parent, Parts::Heads, false) {
        Err(error) => Some(format!("its parent is no good: {error}")),
        Ok(Link { image: Some(found), .. }) if found.footer.uuid != expected => {
            let found = found.footer.uuid;
            Some(format!("its parent has the UUID {expected}, and {} has {found}", parent.display()))
        }
        Ok(_) => None,
    })
}

/// An error's text without the path that it begins with.
fn without(path: &Path, error: &Error) -> String {
    let text = error.to_string();
    text.strip_prefix(&format!("{}: ", path.display())).map_or(text.clone(), str::to_owned)
}

/// Sectors of the disk that are counted together, so that a large one takes no more memory than a small one.
const WINDOW: u64 = 1 << 17;

/// An image whose sectors are counted, and what was counted.
struct Counted {
    file: std::fs::File,
    layer: Link,
    /// The bitmap of a window.
    held: Vec<u8>,
    /// Sectors that it holds; of those, the ones that the image above does not, and that none above does.
    own: u64,
    not_one: u64,
    not_all: u64,
}

/// How many sectors the images hold, and how many of them their children do not.
fn stats(check: &Check, parents: &[PathBuf], out: &mut dyn Write) -> Result<()> {
    let layers = if check.parents {
        chain::chain(&check.name, &Rules::tool(parents, Parts::All))?
    } else {
        vec![chain::layer(&check.name)?]
    };
    let layers = layers.into_iter().filter(|layer| layer.image.is_some());
    let mut counted: Vec<_> = layers.map(Counted::new).collect::<Result<_>>()?;
    let size = counted.iter().filter_map(|counted| counted.image()).map(|image| image.size).max().unwrap_or(0);
    for first in (0..size / 512).step_by(WINDOW as usize) {
        let (mut one, mut all): (Option<&[u8]>, Option<Vec<u8>>) = (None, None);
        for counted in &mut counted {
            if counted.look(first)? {
                let held = &counted.held;
                counted.own += count(held, None);
                counted.not_one += count(held, one);
                counted.not_all += count(held, all.as_deref());
                match &mut all {
                    Some(all) => all.iter_mut().zip(held).for_each(|(all, bits)| *all |= bits),
                    None => all = Some(held.clone()),
                }
                one = Some(&counted.held);
            } else {
                one = None;
            }
        }
    }
    for (depth, counted) in counted.iter().enumerate() {
        print_line(out, &counted.told(depth > 0))?;
    }
    Ok(())
}

/// Bits that are set, and are not in `but`.
fn count(held: &[u8], but: Option<&[u8]>) -> u64 {
    let but = but.unwrap_or_default().iter().copied().chain(std::iter::repeat(0));
    held.iter().zip(but).map(|(bits, but)| u64::from((bits & !but).count_ones())).sum()
}

impl Counted {
    fn new(layer: Link) -> Result<Counted> {
        let file = std::fs::File::open(&layer.path).map_err(Failure::io(&layer.path, "open it"))?;
        Ok(Counted { file, layer, held: Vec::new(), own: 0, not_one: 0, not_all: 0 })
    }

    fn image(&self) -> Option<&Image> {
        self.layer.image.as_ref()
    }

    /// Reads which sectors of a window it holds. False: it has none of its blocks.
    fn look(&mut self, first: u64) -> Result<bool> {
        let Some((image, header)) = self.layer.image.as_ref().and_then(|image| Some((image, image.header.as_ref()?)))
        else {
            return Ok(false);
        };
        let of_block = u64::from(header.block_size()) / 512;
        let (mut sector, end, mut any) = (first, first + WINDOW, false);
        while sector < end {
            let (block, within) = (sector / of_block, sector % of_block);
            let now = (of_block - within).min(end - sector);
            if let Some(at) = u32::try_from(block).ok().and_then(|block| image.table.get(block)) {
                if !any {
                    self.held.clear();
                    self.held.resize((WINDOW / 8) as usize, 0);
                    any = true;
                }
                // All of them are whole bytes: the smallest block has eight sectors.
                let place = ((sector - first) / 8) as usize;
                let bits = &mut self.held[place..place + (now / 8) as usize];
                let read = self.file.read_exact_at(bits, at + within / 8);
                read.map_err(Failure::io(&self.layer.path, "read it"))?;
            }
            sector += now;
        }
        Ok(any)
    }

    fn told(&self, child: bool) -> String {
        let share = |part: u64, of: u64| if of == 0 { 0.0 } else { part as f64 / of as f64 * 100.0 };
        let Counted { own, not_one, not_all, .. } = *self;
        let of_block = |image: &Image| image.header.as_ref().map_or(0, |header| u64::from(header.block_size()) / 512);
        let allocated = self.image().map_or(0, |image| image.table.allocated().count() as u64 * of_block(image));
        let name = self.layer.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let part = share(own, allocated);
        let mut line = format!("{name}: secs allocated: {allocated:#x} secs written: {own:#x} ({part:.2}%)");
        if child {
            let (one, all) = (share(not_one, own), share(not_all, own));
            line += &format!(" secs not in parent: {not_one:#x} ({one:.2}%)");
            line += &format!(" secs not in ancestors: {not_all:#x} ({all:.2}%)");
        }
        line
    }
}
