//! A fixed image in use: byte n of the disk is byte n of the file, and the footer is behind the last.

use super::{Footer, Image, Kind};
use crate::{Ask, LastStep, Layer, LayerFile, Plan, SECTOR_SIZE};

/// A fixed image in use.
#[derive(Debug)]
pub struct Fixed {
    size: u64,
    footer: Footer,
    footer_at: u64,
    /// Something was written.
    written: bool,
}

impl Fixed {
    /// An image, as it was read. None: it is not fixed.
    pub fn new(image: &Image) -> Option<Fixed> {
        let &Image { size, footer, footer_at, .. } = image;
        (image.kind == Kind::Fixed).then_some(Fixed { size, footer, footer_at, written: false })
    }
}

impl Layer for Fixed {
    fn name(&self) -> &'static str {
        "vhd"
    }

    fn size(&self) -> Option<u64> {
        Some(self.size)
    }

    fn plan(&mut self, ask: &Ask) -> Plan {
        self.written |= ask.op.writes();
        Plan::Data { file: LayerFile(0), at: ask.extent.offset, count: ask.extent.len, ticket: None }
    }

    fn close(&mut self, unix_seconds: u64, step: &mut dyn FnMut(LastStep)) {
        // Its children are to see that it has changed. There is no copy of the footer: it is written only where a crash leaves all of
        // it, in one sector.
        if self.written && self.footer_at.is_multiple_of(SECTOR_SIZE) {
            self.footer.set_time(unix_seconds);
            self.footer.seal();
            step(self.footer.last_write(self.footer_at, self.footer_at));
        }
    }
}
