//! Raw: byte n of the disk is byte n of the file.

use crate::{Ask, Layer, LayerFile, OpenError, Plan};

/// What to do where a file's size is no multiple of the logical sector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OddSize {
    /// Do not open it.
    #[default]
    Refuse,
    /// The last sector is served; what the file lacks of it reads as zeros.
    RoundUp,
    /// The last, partial sector is not served.
    RoundDown,
}

/// A raw image.
#[derive(Debug)]
pub struct Raw {
    /// Bytes of the disk.
    size: u64,
    /// Bytes of the file when it was looked at last.
    file_size: u64,
    /// Bytes in a logical sector.
    sector_size: u64,
    odd: OddSize,
}

impl Raw {
    /// A raw image in a file of `file_size` bytes, with logical sectors of `sector_size` bytes (a power of two).
    pub fn new(file_size: u64, sector_size: u64, odd: OddSize) -> Result<Raw, OpenError> {
        assert!(sector_size.is_power_of_two());
        if file_size > i64::MAX as u64 - sector_size {
            return Err(OpenError::TooLarge { size: file_size });
        }
        let down = file_size / sector_size * sector_size;
        let size = match odd {
            OddSize::Refuse if down != file_size => {
                return Err(OpenError::OddSize { size: file_size, sector_size });
            }
            OddSize::RoundUp => file_size.next_multiple_of(sector_size),
            OddSize::Refuse | OddSize::RoundDown => down,
        };
        if size == 0 {
            return Err(OpenError::Empty { size: file_size, sector_size });
        }
        Ok(Raw { size, file_size, sector_size, odd })
    }
}

impl Layer for Raw {
    fn name(&self) -> &'static str {
        "aio"
    }

    fn size(&self) -> Option<u64> {
        Some(self.size)
    }

    fn plan(&mut self, ask: &Ask) -> Plan {
        let extent = ask.extent;
        debug_assert!(extent.offset + extent.len <= self.size);
        Plan::Data { file: LayerFile(0), at: extent.offset, count: extent.len, ticket: None }
    }

    fn zeros_from(&self, _file: LayerFile) -> u64 {
        self.file_size
    }

    fn file_grown(&mut self, _file: LayerFile, file_size: u64) -> Result<u64, OpenError> {
        if file_size < self.file_size {
            return Err(OpenError::Shrunk { size: file_size, before: self.file_size });
        }
        *self = Raw::new(file_size, self.sector_size, self.odd)?;
        Ok(self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Op;

    const FILE: LayerFile = LayerFile(0);

    #[test]
    fn a_whole_file_is_itself() {
        let mut raw = Raw::new(8192, 512, OddSize::Refuse).unwrap();
        assert_eq!(raw.size(), Some(8192));
        let plan = raw.plan(&Ask::of(Op::Write, 512, 7680));
        assert_eq!(plan, Plan::Data { file: FILE, at: 512, count: 7680, ticket: None });
    }

    #[test]
    fn an_odd_size_is_refused_or_rounded() {
        let odd = |how| Raw::new(4097, 4096, how);
        assert_eq!(odd(OddSize::Refuse).unwrap_err(), OpenError::OddSize { size: 4097, sector_size: 4096 });
        assert_eq!(odd(OddSize::RoundDown).unwrap().size(), Some(4096));
        let up = odd(OddSize::RoundUp).unwrap();
        assert_eq!((up.size(), up.zeros_from(FILE)), (Some(8192), 4097));
        let message = odd(OddSize::Refuse).unwrap_err().to_string();
        assert!(message.contains("missing 4095 bytes") && message.contains("last 1 bytes"), "{message}");
    }

    #[test]
    fn it_grows_by_the_rules_it_was_opened_by_and_never_shrinks() {
        let mut raw = Raw::new(8192, 4096, OddSize::Refuse).unwrap();
        assert_eq!(raw.file_grown(FILE, 8192), Ok(8192));
        assert_eq!(raw.file_grown(FILE, 12289), Err(OpenError::OddSize { size: 12289, sector_size: 4096 }));
        assert_eq!(raw.file_grown(FILE, 8191), Err(OpenError::Shrunk { size: 8191, before: 8192 }));
        assert_eq!(raw.file_grown(FILE, u64::MAX), Err(OpenError::TooLarge { size: u64::MAX }));
        assert_eq!((raw.size(), raw.zeros_from(FILE)), (Some(8192), 8192), "errors change nothing");
        assert_eq!(raw.file_grown(FILE, 12288), Ok(12288));
        assert_eq!((raw.size(), raw.zeros_from(FILE)), (Some(12288), 12288));
        let mut up = Raw::new(4097, 4096, OddSize::RoundUp).unwrap();
        assert_eq!((up.file_grown(FILE, 8193), up.zeros_from(FILE)), (Ok(12288), 8193));
        let mut down = Raw::new(4097, 4096, OddSize::RoundDown).unwrap();
        assert_eq!((down.file_grown(FILE, 8191), down.zeros_from(FILE)), (Ok(4096), 8191));
        assert_eq!(down.file_grown(FILE, 8190), Err(OpenError::Shrunk { size: 8190, before: 8191 }));
        assert_eq!(down.file_grown(FILE, 8192), Ok(8192));
    }

    #[test]
    fn no_sector_and_absurd_sizes_are_refused() {
        assert!(matches!(Raw::new(0, 512, OddSize::RoundUp), Err(OpenError::Empty { .. })));
        assert!(matches!(Raw::new(511, 512, OddSize::RoundDown), Err(OpenError::Empty { .. })));
        assert!(matches!(Raw::new(u64::MAX, 512, OddSize::RoundUp), Err(OpenError::TooLarge { .. })));
    }
}
