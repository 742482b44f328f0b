//! A fixed image in use: byte n of the disk is byte n of the file, and the footer is behind the last.

use zerocopy::IntoBytes;

use super::{Footer, Image, Kind};
use crate::{Extent, Format, Op, Plan, SECTOR_SIZE};

/// A fixed image in use.
#[derive(Debug)]
pub struct Fixed {
    footer: Footer,
    footer_at: u64,
    /// Something was written.
    written: bool,
}

impl Fixed {
    /// An image, as it was read. None: it is not fixed.
    pub fn new(image: &Image) -> Option<Fixed> {
        let &Image { footer, footer_at, .. } = image;
        (image.kind == Kind::Fixed).then_some(Fixed { footer, footer_at, written: false })
    }
}

impl Format for Fixed {
    fn name(&self) -> &'static str {
        "vhd"
    }

    fn size(&self) -> u64 {
        self.footer.size()
    }

    fn plan(&mut self, op: Op, extent: Extent) -> Plan {
        self.written |= op != Op::Read;
        Plan::Data { at: extent.offset, count: extent.len, ticket: None }
    }

    fn zeros_from(&self) -> u64 {
        u64::MAX
    }

    fn close(&mut self, unix_seconds: u64, write: &mut dyn FnMut(u64, &[u8])) -> Option<u64> {
        // Its children are to see that it has changed. There is no copy of the footer: it is written only where a crash leaves all of
        // it, in one sector.
        if self.written && self.footer_at.is_multiple_of(SECTOR_SIZE) {
            self.footer.set_time(unix_seconds);
            self.footer.seal();
            write(self.footer_at, self.footer.as_bytes());
        }
        None
    }
}
