//! `check`: says whether an image is good, and all that is not.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use drivers::vhd::{Corrupt, Parts, Problem, Uuid};
use nix::errno::Errno;
use tapdisk::chain::{self, Error, Layer, Rules};

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
        Ok(Layer { image: Some(found), .. }) if found.footer.uuid != expected => {
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

/// Sectors of a part of the disk: blocks of two images may differ in size.
const PART: u64 = 4096;

/// The sectors that are held, a bit for each, of each part of which some may be.
type Held = BTreeMap<u64, Vec<u8>>;

/// How many sectors the images hold, and how many of them their children do not.
fn stats(check: &Check, parents: &[PathBuf], out: &mut dyn Write) -> Result<()> {
    let layers = if check.parents {
        chain::chain(&check.name, &Rules::tool(parents, Parts::All))?
    } else {
        vec![chain::layer(&check.name)?]
    };
    let share = |part: u64, of: u64| if of == 0 { 0.0 } else { part as f64 / of as f64 * 100.0 };
    // The sectors of the image above, and of all that are above.
    let mut above: Option<(Held, Held)> = None;
    for layer in layers.iter().filter(|layer| layer.image.is_some()) {
        let (allocated, held) = sectors(layer)?;
        let name = layer.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let own = count(&held, &Held::new());
        let part = share(own, allocated);
        let mut line = format!("{name}: secs allocated: {allocated:#x} secs written: {own:#x} ({part:.2}%)");
        if let Some((one, all)) = &above {
            let (not_one, not_all) = (count(&held, one), count(&held, all));
            let (one, all) = (share(not_one, own), share(not_all, own));
            line += &format!(" secs not in parent: {not_one:#x} ({one:.2}%)");
            line += &format!(" secs not in ancestors: {not_all:#x} ({all:.2}%)");
        }
        print_line(out, &line)?;
        let mut all = above.map_or_else(Held::new, |(_, all)| all);
        for (part, bits) in &held {
            let all = all.entry(*part).or_insert_with(|| vec![0; bits.len()]);
            all.iter_mut().zip(bits).for_each(|(all, bits)| *all |= bits);
        }
        above = Some((held, all));
    }
    Ok(())
}

/// Bits that are set, and are not in `but`.
fn count(held: &Held, but: &Held) -> u64 {
    let of_part = |(part, bits): (&u64, &Vec<u8>)| {
        let but = but.get(part).map_or(&[][..], Vec::as_slice).iter().copied().chain(std::iter::repeat(0));
        bits.iter().zip(but).map(|(bit, but)| u64::from((bit & !but).count_ones())).sum::<u64>()
    };
    held.iter().map(of_part).sum()
}

/// How many sectors an image has room for in its blocks, and those that it holds.
fn sectors(layer: &Layer) -> Result<(u64, Held)> {
    let image = layer.image.as_ref();
    let Some((image, header)) = image.and_then(|image| Some((image, image.header.as_ref()?))) else {
        return Ok((0, Held::new()));
    };
    let file = std::fs::File::open(&layer.path).map_err(Failure::io(&layer.path, "open it"))?;
    let of_block = u64::from(header.block_size()) / 512;
    let (mut held, mut allocated) = (Held::new(), 0);
    let mut bits = vec![0; (of_block / 8) as usize];
    for (block, at) in image.table.allocated() {
        file.read_exact_at(&mut bits, at).map_err(Failure::io(&layer.path, "read it"))?;
        allocated += of_block;
        for (i, byte) in bits.iter().enumerate() {
            let sector = u64::from(block) * of_block + 8 * i as u64;
            let part = held.entry(sector / PART).or_insert_with(|| vec![0; (PART / 8) as usize]);
            part[(sector % PART / 8) as usize] = *byte;
        }
    }
    Ok((allocated, held))
}
