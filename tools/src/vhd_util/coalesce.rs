//! `coalesce`: writes what a differencing image holds into its parent.

use std::io::{self, Write};
use std::path::PathBuf;

use tapdisk::vhd::merge::{self, Progress};

use super::Coalesce;
use super::failure::{Failure, Result};

/// Merges an image into its parent.
pub(super) fn coalesce(args: &Coalesce, parents: &[PathBuf], out: &mut dyn Write) -> Result<()> {
    let mut shown = |Progress { done, .. }: Progress| -> io::Result<()> {
        if args.progress {
            write!(out, "\r{:6.2}%{}", 100.0 * done, if done >= 1.0 { "\n" } else { "" })?;
            out.flush()?;
        }
        Ok(())
    };
    let merged = merge::merge(&args.name, parents, &mut shown);
    let failed = |failure: Failure| failure.saying(|errno| format!("error coalescing: {errno}"));
    let sectors = merged.map_err(|error| failed(error.into()))?;
    writeln!(out, "Coalesced {sectors} sectors").map_err(Failure::output)
}

#[cfg(test)]
mod tests {
    use drivers::vhd::{Image, Kind, Source};
    use nix::errno::Errno;
    use tapdisk::vhd::file::Medium;
    use tapdisk::vhd::merge::{Child, Target};

    use super::super::testing::{self, Memory, crashes};
    use super::*;

    /// Merges, and gives what the two are afterwards.
    fn merge(child: &Memory, parent: &Memory) -> io::Result<u64> {
        merge_telling(child, parent, &mut |_| Ok(()))
    }

    fn merge_telling(
        child: &Memory,
        parent: &Memory,
        progress: &mut dyn FnMut(Progress) -> io::Result<()>,
    ) -> io::Result<u64> {
        let image = Image::read(child, &mut Vec::new()).unwrap();
        let into = Image::read(parent, &mut Vec::new()).unwrap();
        Target::image(parent, into).merge(&Child { source: child, image: &image }, progress)
    }

    #[test]
    fn a_merge_that_is_interrupted_is_done_again() {
        for (device, kind) in [(false, Kind::Dynamic), (true, Kind::Dynamic), (false, Kind::Differencing)] {
            let parent = testing::image(kind, device, &[(1, 0..3), (2, 0..8), (9, 1..2)], 1);
            let child = testing::image(Kind::Differencing, false, &[(0, 0..8), (2, 3..5), (3, 7..8), (9, 0..1)], 2);
            let before = testing::content(&[&child, &parent]);
            let merged = |parent: &Memory| {
                assert_eq!(testing::problems(parent), []);
                assert_eq!(testing::content(&[parent]), before);
            };
            crashes(
                &parent,
                |parent| merge(&child, parent).map(drop),
                |after| {
                    let fatal = testing::fatal(after);
                    assert_eq!(fatal, None);
                    assert_eq!(testing::content(&[&child, after]), before);
                    assert_eq!(merge(&child, after).unwrap(), 12);
                    merged(after);
                },
            );
            assert_eq!(merge(&child, &parent).unwrap(), 12);
            merged(&parent);
        }
    }

    #[test]
    fn a_block_that_was_said_to_be_full_before_it_was_there_is_not() {
        let parent = testing::image(Kind::Differencing, false, &[(1, 0..3)], 1);
        testing::say_full(&parent, 3);
        assert!(testing::image_of(&parent).unwrap().batmap_is_stale);
        let child = testing::image(Kind::Differencing, false, &[(3, 7..8)], 2);
        let before = testing::content(&[&child, &parent]);
        crashes(
            &parent,
            |parent| merge(&child, parent).map(drop),
            |after| assert_eq!(testing::content(&[&child, after]), before),
        );
        merge(&child, &parent).unwrap();
        assert_eq!(testing::problems(&parent), []);
    }

    #[test]
    fn a_merge_that_is_canceled_anywhere_leaves_a_good_parent() {
        let parent = testing::image(Kind::Dynamic, false, &[(1, 0..3), (2, 0..8)], 1);
        let child = testing::image(Kind::Differencing, false, &[(0, 0..8), (2, 3..5), (3, 7..8)], 2);
        let before = testing::content(&[&child, &parent]);
        let bytes = parent.bytes();
        let mut told = Vec::new();
        // Before each of three blocks, for their data and for their bitmaps, and when all is done.
        for left in 0..7 {
            let parent = Memory::new(bytes.clone(), false);
            told.clear();
            let canceled = merge_telling(&child, &parent, &mut |progress| {
                told.push(progress);
                if told.len() > left { Err(Errno::ECANCELED.into()) } else { Ok(()) }
            });
            assert_eq!(canceled.unwrap_err().raw_os_error(), Some(Errno::ECANCELED as i32));
            assert_eq!(testing::problems(&parent), [], "after {left}");
            assert_eq!(testing::content(&[&child, &parent]), before, "after {left}");
            assert_eq!(merge(&child, &parent).unwrap(), 11);
            assert_eq!(testing::content(&[&parent]), before, "after {left}");
        }
        assert_eq!(told.iter().map(|told| told.data).sum::<u64>(), 11 * 512);
        assert_eq!(told.iter().map(|told| told.bitmaps).sum::<u64>(), 3 * 512);
        assert!(told.is_sorted_by(|one, next| one.done < next.done) && told[6].done == 1.0 && told[5].done < 1.0);
    }

    #[test]
    fn what_the_child_gets_meanwhile_is_not_said_to_be_merged() {
        let parent = testing::image(Kind::Dynamic, false, &[(1, 0..3)], 1);
        let child = testing::image(Kind::Differencing, false, &[(0, 0..2), (1, 4..5)], 2);
        let (image, into) = (testing::image_of(&child).unwrap(), testing::image_of(&parent).unwrap());
        let before = testing::content(&[&child, &parent]);
        let mut told = 0;
        // When the data is merged, the child gets a bit for each of its sectors, as from a program that fills it.
        let mut fill = |_| {
            told += 1;
            if told == 3 {
                for (_, at) in image.table.allocated() {
                    child.write_at(at, &[0xff])?;
                }
            }
            Ok(())
        };
        assert_eq!(
            Target::image(&parent, into).merge(&Child { source: &child, image: &image }, &mut fill).unwrap(),
            3
        );
        assert_eq!(testing::problems(&parent), []);
        assert_eq!(testing::content(&[&parent]), before, "nothing of the parent is hidden");
    }

    #[test]
    fn a_full_device_is_left_as_a_good_image() {
        let parent = testing::image(Kind::Dynamic, false, &[(1, 0..3)], 1);
        let child = testing::image(Kind::Differencing, false, &[(0, 0..8), (1, 7..8), (3, 7..8)], 2);
        let before = testing::content(&[&child, &parent]);
        // Room for one more block, and not for two.
        let full = parent.device_of(parent.size().unwrap() + 2 * 4096 + 1024);
        let error = merge(&child, &full).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc_enospc()));
        assert_eq!(testing::problems(&full), []);
        assert_eq!(testing::content(&[&child, &full]), before);
    }

    fn libc_enospc() -> i32 {
        Errno::ENOSPC as i32
    }
}
