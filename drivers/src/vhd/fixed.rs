//! A fixed image in use: byte n of the disk is byte n of the file, and the footer is behind the last.

use super::{Image, Kind};
use crate::{Extent, Format, Op, Plan};

/// A fixed image in use.
#[derive(Debug)]
pub struct Fixed {
    size: u64,
}

impl Fixed {
    /// An image, as it was read. None: it is not fixed.
    pub fn new(image: &Image) -> Option<Fixed> {
        (image.kind == Kind::Fixed).then(|| Fixed { size: image.footer.size() })
    }
}

impl Format for Fixed {
    fn name(&self) -> &'static str {
        "vhd"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn plan(&mut self, _op: Op, extent: Extent) -> Plan {
        Plan::Data { at: extent.offset, count: extent.len, ticket: None }
    }

    fn zeros_from(&self) -> u64 {
        u64::MAX
    }
}
