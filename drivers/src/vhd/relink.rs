//! Gives an image another parent, so that it has one or the other at each moment.
//!
//! The header has two sectors, and a crash can leave one of them as it was. But the footer, which says where the header is, has one
//! sector. So the new names and a new header go to the end of the file; the footer, which has only its copy meanwhile, points there;
//! then the header is written in its old place, and the footer points there again.

use zerocopy::IntoBytes;

use super::layout::{LayoutError, NewParent, Piece, name_parent};
use super::{HEADER_SIZE, IN_USE, Image};
use crate::SECTOR_SIZE;

/// What is to be written of a differencing image that nobody has open. Each step is safe before the next begins; afterwards a file ends
/// with the last piece.
///
/// # Errors
///
/// There is not enough room before the footer of a device, `device_end` being where it begins.
pub fn relink(image: &Image, parent: &NewParent, device_end: Option<u64>) -> Result<Vec<Vec<Piece>>, LayoutError> {
    let Some((header, header_at)) = image.header.zip(image.footer.header_at()) else { return Ok(Vec::new()) };
    let end = image.end().next_multiple_of(SECTOR_SIZE);
    let room = device_end.map_or(u64::MAX, |footer| footer.saturating_sub(end + HEADER_SIZE as u64));
    // None of those that there are: the old names are good until the new ones count.
    let mut header = header.without_names();
    let mut names = name_parent(&mut header, parent, end, room)?;
    let other_at = names.last().map_or(end, |name| name.at + name.bytes.len() as u64);
    let footer = |at: u64, header_at: u64| {
        let mut footer = image.footer;
        footer.set_header_at(header_at);
        footer.seal();
        Piece { at, bytes: footer.as_bytes().to_vec() }
    };
    let last_at = device_end.unwrap_or(other_at);
    let mut steps = Vec::new();
    // As it is, in case that only the last footer was good.
    steps.push(vec![footer(0, header_at)]);
    if let Some(at) = device_end {
        steps.push(vec![Piece { at, bytes: IN_USE.to_vec() }]);
    }
    names.push(Piece { at: other_at, bytes: header.as_bytes().to_vec() });
    steps.push(names);
    steps.push(vec![footer(0, other_at)]);
    steps.push(vec![Piece { at: header_at, bytes: header.as_bytes().to_vec() }]);
    steps.push(vec![footer(0, header_at)]);
    steps.push(vec![footer(last_at, header_at)]);
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::super::layout::{Layout, NewImage};
    use super::super::{FOOTER_SIZE, Source, Uuid};
    use super::*;

    #[derive(Clone)]
    struct Bytes(Vec<u8>);

    impl Source for Bytes {
        fn size(&self) -> std::io::Result<u64> {
            Ok(self.0.len() as u64)
        }
        fn read_at(&self, at: u64, to: &mut [u8]) -> std::io::Result<()> {
            to.copy_from_slice(&self.0[at as usize..][..to.len()]);
            Ok(())
        }
    }

    impl Bytes {
        fn put(&mut self, at: u64, bytes: &[u8]) {
            let end = at as usize + bytes.len();
            if self.0.len() < end {
                self.0.resize(end, 0);
            }
            self.0[at as usize..end].copy_from_slice(bytes);
        }
    }

    fn parent(name: &str, number: u8) -> NewParent {
        NewParent {
            path: format!("./{name}"),
            uuid: Uuid([number; 16]),
            unix_seconds: 946_684_800 + u64::from(number),
        }
    }

    fn child(device: bool) -> Bytes {
        let new = NewImage {
            size: 1 << 30,
            room: 0,
            uuid: Uuid([9; 16]),
            unix_seconds: 1_000_000_000,
            parent: Some(parent("old.vhd", 1)),
        };
        let layout = Layout::new(&new).unwrap();
        let mut bytes = Bytes(Vec::new());
        layout.pieces().iter().for_each(|piece| bytes.put(piece.at, &piece.bytes));
        bytes.put(0, layout.footer.as_bytes());
        let at = layout.end + if device { 1 << 20 } else { 0 };
        bytes.put(at, layout.footer.as_bytes());
        bytes
    }

    /// Whose child it is.
    fn parent_of(bytes: &Bytes) -> (Uuid, String) {
        let image = Image::read(bytes, &mut Vec::new()).unwrap();
        let names: Vec<_> = image.parents.iter().map(|(_, name)| name.clone()).collect();
        assert!(names.len() == 3 && names.iter().all(|name| *name == names[0]), "{names:?}");
        (image.header.unwrap().parent_uuid, names[0].clone())
    }

    #[test]
    fn at_each_moment_it_has_one_parent_or_the_other() {
        let (old, new) = ((Uuid([1; 16]), "./old.vhd".to_owned()), (Uuid([2; 16]), "./a/new.vhd".to_owned()));
        for device in [false, true] {
            let mut bytes = child(device);
            assert_eq!(parent_of(&bytes), old);
            let image = Image::read(&bytes, &mut Vec::new()).unwrap();
            let device_end = device.then_some(image.footer_at);
            let steps = relink(&image, &parent("a/new.vhd", 2), device_end).unwrap();
            let mut seen = vec![old.clone()];
            for step in &steps {
                let sectors: Vec<_> =
                    step.iter().flat_map(|piece| (piece.at..).step_by(512).zip(piece.bytes.chunks(512))).collect();
                // Each sector of a step may be there before or without the others.
                for those in 0..1_u32 << sectors.len().min(10) {
                    let mut cut = bytes.clone();
                    for (i, (at, sector)) in sectors.iter().enumerate() {
                        if those & 1 << i != 0 {
                            cut.put(*at, sector);
                        }
                    }
                    let found = parent_of(&cut);
                    assert!(found == old || found == new, "{found:?}");
                    if found != seen[seen.len() - 1] {
                        seen.push(found);
                    }
                }
                sectors.iter().for_each(|(at, sector)| bytes.put(*at, sector));
            }
            if let (false, Some(last)) = (device, steps.last()) {
                bytes.0.truncate(last[0].at as usize + FOOTER_SIZE);
            }
            assert_eq!(parent_of(&bytes), new);
            assert_eq!(seen, [old.clone(), new.clone()], "and never back");
            let mut problems = Vec::new();
            let image = Image::read(&bytes, &mut problems).unwrap();
            assert!(problems.is_empty() && image.footer.header_at() == Some(512), "{problems:?}");
        }
    }

    #[test]
    fn a_device_without_room_is_left_alone() {
        let bytes = child(true);
        let image = Image::read(&bytes, &mut Vec::new()).unwrap();
        let error = relink(&image, &parent("new.vhd", 2), Some(image.end() + 512)).unwrap_err();
        assert!(matches!(error, LayoutError::Name { .. }), "{error}");
    }
}
