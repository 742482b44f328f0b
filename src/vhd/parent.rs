//! What an image says of its parent.

use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::UNIX_EPOCH;

use drivers::vhd::layout::NewParent;
use drivers::vhd::{Uuid, unix_seconds};

use crate::chain::Link;
use crate::store;
use crate::volume;

fn missing(path: &Path) -> impl Fn(io::Error) -> store::Error + '_ {
    |source| store::Error::Io { path: path.to_owned(), action: "find it", source }
}

/// What a child at `child` says of its parent.
pub fn new_parent(child: &Path, parent: &Link) -> Result<NewParent, store::Error> {
    let uuid = match &parent.image {
        None => Uuid::NIL,
        Some(image) if image.footer.uuid == Uuid::NIL => {
            let message =
                "its UUID is all zeros, which would say that it is a raw image: it cannot be a parent".into();
            return Err(store::Error::Unfit { path: parent.path.clone(), message });
        }
        Some(image) => image.footer.uuid,
    };
    // What tells that a parent has changed: its footer's time or, of a raw one, its file's.
    let unix_seconds = match &parent.image {
        Some(image) => unix_seconds(image.footer.timestamp.get()),
        None => {
            let meta = parent.path.metadata().map_err(missing(&parent.path))?;
            let changed = meta.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            changed.map_or(0, |since| since.as_secs())
        }
    };
    let name = volume::lasting_name(&parent.path).map_err(missing(&parent.path))?;
    if uuid == Uuid::NIL && volume::is_passing(&name) {
        let message = "a raw parent is known by its name alone, and this one is another volume's after the next boot: name it as in \
                       /dev/VG/LV, /dev/mapper or /dev/drbd/by-res"
            .into();
        return Err(store::Error::Unfit { path: parent.path.clone(), message });
    }
    let path = relative(&folder_of(child)?, &name);
    let path = path.to_str().ok_or_else(|| {
        let message = "its path is not UTF-8, which the format wants: rename it".into();
        store::Error::Unfit { path: parent.path.clone(), message }
    })?;
    Ok(NewParent { path: path.to_owned(), uuid, unix_seconds })
}

/// The folder of an image that is to be, or is there: of a volume, that of its lasting name.
fn folder_of(child: &Path) -> Result<PathBuf, store::Error> {
    if let Ok(name) = volume::lasting_name(child) {
        return Ok(name.parent().unwrap_or(Path::new("/")).to_owned());
    }
    let folder = child.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    folder.canonicalize().map_err(missing(folder))
}

/// A path from a folder to a file, both absolute and without links.
fn relative(folder: &Path, file: &Path) -> PathBuf {
    let (from, to): (Vec<_>, Vec<_>) = (folder.components().collect(), file.components().collect());
    let common = from.iter().zip(&to).take_while(|(one, other)| one == other).count();
    let up = from[common..].iter().map(|_| Component::ParentDir);
    let start = if common == from.len() { Some(Component::CurDir) } else { None };
    start.into_iter().chain(up).chain(to[common..].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_relative_to_the_childs_folder() {
        for (folder, file, path) in [
            ("/a/b", "/a/b/c.vhd", "./c.vhd"),
            ("/a/b", "/a/b/c/d.vhd", "./c/d.vhd"),
            ("/a/b", "/a/c/d.vhd", "../c/d.vhd"),
            ("/a/b", "/dev/disk", "../../dev/disk"),
            ("/", "/c.vhd", "./c.vhd"),
        ] {
            assert_eq!(relative(Path::new(folder), Path::new(file)), Path::new(path), "{folder} {file}");
        }
    }
}
