//! `repair`: mends what can be mended without touching data.

use std::io::Write;

use drivers::vhd::{Corrupt, ReadError};

use super::Repair;
use super::create::now;
use super::failure::{self, Failure, Result, print_line};
use super::file::{ImageFile, Medium, cut_footer, write_footers, write_pieces};

/// Mends an image, and says what it did.
pub(super) fn repair(args: &Repair, out: &mut dyn Write) -> Result<()> {
    let path = &args.name;
    let opening = |failure: Failure| failure.saying(|errno| format!("error opening {}: {errno}", path.display()));
    let file = ImageFile::open(path).map_err(|error| opening(error.into()))?;
    let planned = drivers::vhd::Repair::plan(&file, now(), args.bitmaps);
    let plan = planned.map_err(|error| {
        let remedy = remedy(&error);
        let failure = failure::read(path)(error);
        opening(Failure { text: format!("{}: {remedy}", failure.text), ..failure })
    })?;
    let say = |out: &mut dyn Write, text: &str| print_line(out, &format!("{}: {text}", path.display()));
    let end = plan.image.end();
    if !file.is_device() && plan.pieces.iter().any(|piece| piece.at + piece.bytes.len() as u64 > plan.image.footer_at)
    {
        cut_footer(&file, &plan.image.footer, plan.image.footer_at).map_err(Failure::io(&file.path, "write it"))?;
    }
    write_pieces(&file, &plan.pieces).map_err(Failure::io(&file.path, "write it"))?;
    if !plan.pieces.is_empty() {
        file.sync().map_err(Failure::io(&file.path, "write it"))?;
    }
    if plan.footers {
        write_footers(&file, &plan.image.footer, end).map_err(Failure::io(&file.path, "write it"))?;
    }
    for mended in &plan.mended {
        say(out, mended)?;
    }
    for problem in &plan.left {
        say(out, &format!("left as it is: {}", problem.what))?;
    }
    if plan.mended.is_empty() && plan.left.is_empty() {
        say(out, "there is nothing to repair")?;
    }
    Ok(())
}

/// What could be done about an image that is not mended.
fn remedy(error: &ReadError) -> &'static str {
    match error {
        ReadError::Io { .. } | ReadError::Size(_) => {
            "what can't be read can't be mended: look at the disk that it is on"
        }
        ReadError::Corrupt(Corrupt::BlocksOverlap { .. }) => {
            "whose data is there is not known, and it is not mended: restore the image from a backup, or read the other \
             blocks by other means"
        }
        ReadError::Corrupt(Corrupt::Disabled) => "whoever marked it so has to say what is to become of it",
        ReadError::Corrupt(_) => {
            "that cannot be had from anywhere else in the image, and it is not mended: restore it from a backup"
        }
    }
}
