//! Chains of VHD images: an image, its parent, that one's parent, and so on.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use drivers::vhd::{self, Image, Kind, Parts, Platform, Problem, ReadError, Source, Uuid};
use nix::errno::Errno;

use crate::blocking::Blocking;
use crate::store::{self, FileStore, Identity, Store, is_within};
use crate::sys;
use crate::sys::file::file_id;
use crate::volume;

/// Images of a chain, at most. Toolstacks make no more than 30.
pub const DEPTH_MAX: usize = 256;

/// Why a chain can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One of its stores can't be had.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The image is no good.
    #[error("{}: {source}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: ReadError,
    },
    /// None of the names in the image is a file.
    #[error("{}: its parent is not there; tried {}", path.display(), list(tried))]
    NoParent {
        /// The child.
        path: PathBuf,
        /// Where the parent was looked for.
        tried: Vec<PathBuf>,
    },
    /// What is there is another image.
    #[error("{}: its parent has the UUID {expected}, and {} has {found}", path.display(), parent.display())]
    OtherParent {
        /// The child.
        path: PathBuf,
        /// What is in the parent's place.
        parent: PathBuf,
        /// As the child says.
        expected: Uuid,
        /// As that image says.
        found: Uuid,
    },
    /// The parent was written after its child was made.
    #[error(
        "{}: its parent, {}, has changed since: it was written at {found}, and the child knows it as of {expected} (seconds since \
         2000); what the disk shows would be neither; set image.changed_parent to \"serve\" if you know better",
        path.display(), parent.display()
    )]
    ChangedParent {
        /// The child.
        path: PathBuf,
        /// The parent.
        parent: PathBuf,
        /// As the child says.
        expected: u32,
        /// As the parent says.
        found: u32,
    },
    /// The parent is in a folder that the configuration does not allow.
    #[error(
        "{}: its parent, {}, is in another folder, or a link to one, which an image made elsewhere must not name; if it is to be there, \
         allow its folder: image.parents in the configuration, --parents of vhd-util",
        path.display(), parent.display()
    )]
    Folder {
        /// The child.
        path: PathBuf,
        /// The parent.
        parent: PathBuf,
    },
    /// An image is its own ancestor, or there are too many.
    #[error("{}: {why}", path.display())]
    Endless {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

impl Error {
    /// The errno that it stands for.
    pub fn errno(&self) -> Errno {
        match self {
            Error::Store(error) => error.errno(),
            Error::Image { source: ReadError::Io { source, .. } | ReadError::Size(source), .. } => {
                sys::errno_of(source)
            }
            Error::NoParent { .. } => Errno::ENOENT,
            Error::Image { .. }
            | Error::OtherParent { .. }
            | Error::ChangedParent { .. }
            | Error::Folder { .. }
            | Error::Endless { .. } => Errno::EINVAL,
        }
    }
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// An image of a chain, as it was found.
#[derive(Debug)]
pub struct Link {
    /// Its path.
    pub path: PathBuf,
    /// What was looked at.
    pub id: Identity,
    /// Bytes of its file or device.
    pub file_size: u64,
    /// Its metadata. None: it is raw, and the last of its chain.
    pub image: Option<Image>,
    /// What is not as it should be, and does not matter.
    pub problems: Vec<Problem>,
}

impl Link {
    /// A raw image.
    pub fn raw(path: &Path) -> Result<Link, Error> {
        look(path, |found| Link::of(&found, None, Vec::new()))
    }

    fn of(store: &Looked, image: Option<Image>, problems: Vec<Problem>) -> Result<Link, Error> {
        let path = store.0.path().to_owned();
        let size = store.0.size_now(store.1);
        let file_size =
            size.map_err(|source| store::Error::Io { path: path.clone(), action: "see its size", source })?;
        Ok(Link { path, id: store.0.identity(), file_size, image, problems })
    }

    /// Whether an open file, which was opened by the same path later, is the one that was looked at: what was allowed is that one.
    pub fn is(&self, file: &File) -> Result<(), Error> {
        match file.metadata() {
            Ok(meta) if Identity::File(file_id(&meta)) == self.id => Ok(()),
            _ => Err(store::Error::Replaced { path: self.path.clone() }.into()),
        }
    }
}

/// A store that is open, and leave to read it.
#[derive(Clone, Copy)]
struct Looked<'a>(&'a dyn Store, &'a Blocking);

/// Looks at what is in the file of that name.
fn look<T>(path: &Path, see: impl FnOnce(Looked) -> Result<T, Error>) -> Result<T, Error> {
    // Tools have no main loop, and a tapdisk does this in jobs alone.
    let blocking = Blocking::of_thread();
    let store = FileStore::look(&blocking, path)?;
    see(Looked(&store, &blocking))
}

/// The VHD image in a file, without its parents.
pub fn layer(path: &Path) -> Result<Link, Error> {
    layer_with(path, Image::read)
}

/// The same of one that has children, or is to be merged: with all that they may have of it.
pub fn parent_layer(path: &Path) -> Result<Link, Error> {
    layer_with(path, Image::read_parent)
}

/// Parts of it. `by_copy`: by the footer's copy at the beginning, whatever is at the end; an image that is in use has none there.
pub fn parts(path: &Path, parts: Parts, by_copy: bool) -> Result<Link, Error> {
    let read = if by_copy { Image::read_by_copy } else { Image::read_parts };
    layer_with(path, |source, problems| read(source, parts, problems))
}

fn layer_with(
    path: &Path,
    read: impl FnOnce(&dyn Source, &mut Vec<Problem>) -> Result<Image, ReadError>,
) -> Result<Link, Error> {
    look(path, |store| read_link(store, read))
}

fn read_link(
    store: Looked,
    read: impl FnOnce(&dyn Source, &mut Vec<Problem>) -> Result<Image, ReadError>,
) -> Result<Link, Error> {
    let mut problems = Vec::new();
    let image = read(&store.0.reading(store.1), &mut problems);
    let image = image.map_err(|source| Error::Image { path: store.0.path().to_owned(), source })?;
    Link::of(&store, Some(image), problems)
}

/// All that is wrong with the image in a file, without its parents. `bitmaps`: those of its blocks are looked at, too.
pub fn check(path: &Path, unix_seconds: u64, bitmaps: bool) -> Result<Vec<Problem>, Error> {
    look(path, |Looked(store, blocking)| {
        let source = store.reading(blocking);
        let check = || {
            let mut problems = Image::check(&source, unix_seconds)?;
            if bitmaps && !problems.iter().any(|problem| problem.fatal) {
                problems.extend(Image::check_bitmaps(&source)?);
            }
            Ok(problems)
        };
        check().map_err(|source| Error::Image { path: path.to_owned(), source })
    })
}

/// Which parents are taken.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// Folders that they may be in, and below, besides the leaf's own, which they may be in only exactly. An image made elsewhere can name any
    /// file of the host.
    pub folders: &'a [PathBuf],
    /// Also those that were written after their child was made.
    pub changed: bool,
    /// What is read of each image.
    pub parts: Parts,
}

impl<'a> Rules<'a> {
    /// Those that a tool takes: it is for people who know what they changed.
    pub fn tool(folders: &'a [PathBuf], parts: Parts) -> Rules<'a> {
        Rules { folders, changed: true, parts }
    }

    /// Whether a parent that is open may be where it is, of an image whose leaf is at `leaf`. A file is where it is without links; a block device
    /// is where the link or node is that was named.
    fn allow(&self, leaf: &Path, parent: &dyn Store) -> bool {
        // What is on no file of the host is none that an image could have found out about.
        let Some(file) = parent.file() else { return true };
        let path = parent.path();
        let device = |meta: io::Result<Metadata>| meta.is_ok_and(|meta| meta.file_type().is_block_device());
        let real =
            || std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).or_else(|_| path.canonicalize());
        let place = if device(file.metadata()) { Some(path.to_owned()) } else { real().ok() };
        let Some(folder) = place.as_deref().and_then(Path::parent) else { return false };
        // Volumes of one group are beside each other. All else that the host has is in /dev, too.
        let group = |path: &Path| Some(volume::group_and_name(path)?.0);
        let own = volume::lasting_name(leaf).ok().as_deref().and_then(group);
        let of_device = device(leaf.metadata());
        let mut beside = volume::folders(leaf).into_iter().filter(|own| !(of_device && own.starts_with("/dev")));
        own.is_some_and(|own| group(path) == Some(own))
            || beside.any(|own| own.canonicalize().is_ok_and(|own| folder == own))
            || is_within(folder, self.folders)
    }
}

/// Where the parent of a differencing image is, as an absolute path. None: it has none.
pub fn parent(path: &Path, image: &Image) -> Result<Option<PathBuf>, Error> {
    let Some(header) = image.header.as_ref().filter(|_| image.kind == Kind::Differencing) else { return Ok(None) };
    let named = |wanted: &'static [Platform]| {
        image.parents.iter().filter(|(platform, _)| wanted.contains(platform)).map(|(_, path)| PathBuf::from(path))
    };
    // Paths that are relative first: an image is copied together with its parent more often than not.
    let beside = header.parent_name().into_iter().map(PathBuf::from);
    let names: Vec<_> =
        named(&[Platform::W2ru, Platform::MacX]).chain(named(&[Platform::W2ku])).chain(beside).collect();
    let mut tried = Vec::new();
    for folder in volume::folders(path) {
        for candidate in names.iter().map(|name| folder.join(name)) {
            // What the parent names is relative to its folder, also where its name there is a link to a device.
            let folder = candidate.parent().map(Path::canonicalize);
            match (candidate.metadata(), folder) {
                (Ok(_), Some(Ok(folder))) => return Ok(Some(folder.join(candidate.file_name().unwrap_or_default()))),
                _ if tried.contains(&candidate) => {}
                _ => tried.push(candidate),
            }
        }
    }
    Err(Error::NoParent { path: path.to_owned(), tried })
}

/// An image and all that it is made of, the leaf first: only to look at them.
pub fn chain(leaf: &Path, rules: &Rules) -> Result<Vec<Link>, Error> {
    let blocking = Blocking::of_thread();
    let open = |path: &Path| -> store::OpenResult { Ok(Box::new(FileStore::look(&blocking, path)?)) };
    let found = descend(&blocking, open(leaf)?, rules, &open)?;
    Ok(found.into_iter().map(|found| found.link).collect())
}

/// An image of a chain and its store.
#[derive(Debug)]
pub struct Found {
    /// What it says.
    pub link: Link,
    /// Where it is.
    pub store: Box<dyn Store>,
}

/// Finds all that an image is made of, the image first. Each parent is opened by `open`, looked at, whether it may be one, locked, and read.
pub fn descend(
    blocking: &Blocking,
    leaf: Box<dyn Store>,
    rules: &Rules,
    open: &dyn Fn(&Path) -> store::OpenResult,
) -> Result<Vec<Found>, Error> {
    let read = |source: &dyn Source, problems: &mut Vec<Problem>| Image::read_parts(source, rules.parts, problems);
    let link = read_link(Looked(&*leaf, blocking), read)?;
    let mut chain = vec![Found { link, store: leaf }];
    loop {
        let Link { path, image: Some(image), .. } = &chain[chain.len() - 1].link else { return Ok(chain) };
        let Some(next) = parent(path, image)? else { return Ok(chain) };
        let endless = |why| Error::Endless { path: path.clone(), why };
        let mut store = open(&next)?;
        if chain.iter().any(|found| found.link.id == store.identity()) {
            return Err(endless(format!("{} is its parent and its child", next.display())));
        }
        if chain.len() == DEPTH_MAX {
            return Err(endless(format!("it has more than {DEPTH_MAX} parents")));
        }
        if !rules.allow(&chain[0].link.path, &*store) {
            return Err(Error::Folder { path: path.clone(), parent: next });
        }
        store.lock(blocking)?;
        let below = identified(path, image, Looked(&*store, blocking), rules.parts)?;
        if !rules.changed {
            unchanged(path, image, &below)?;
        }
        chain.push(Found { link: below, store });
    }
}

/// What is in the place of an image's parent, if it is that.
fn identified(path: &Path, image: &Image, store: Looked, read: Parts) -> Result<Link, Error> {
    let expected = image.header.as_ref().map_or(Uuid::NIL, |header| header.parent_uuid);
    if expected == Uuid::NIL {
        return Link::of(&store, None, Vec::new());
    }
    let link = match read {
        Parts::All => read_link(store, Image::read_parent)?,
        _ => read_link(store, |source, problems| Image::read_parts(source, read, problems))?,
    };
    match link.image.as_ref().map(|image| image.footer.uuid) {
        Some(found) if found != expected => {
            Err(Error::OtherParent { path: path.to_owned(), parent: link.path, expected, found })
        }
        _ => Ok(link),
    }
}

/// The parent of an image, without its own parents, wherever it is. None: it has none.
pub fn below(path: &Path, image: &Image) -> Result<Option<Link>, Error> {
    let Some(parent) = parent(path, image)? else { return Ok(None) };
    look(&parent, |store| identified(path, image, store, Parts::All)).map(Some)
}

/// How far the clocks of hosts and file servers may differ, seconds (blktap's check).
const CLOCK_SLACK: u32 = 1800;

/// Looks whether a parent was written after its child was made. Its footer has the time when it was written last, by us, or when it was
/// made, by others. A child of ours has that time, and so no clock matters; one of others has the time when the parent's file was
/// changed last, by the file server's clock.
fn unchanged(path: &Path, image: &Image, parent: &Link) -> Result<(), Error> {
    let in_header = image.header.as_ref().map_or(0, |header| header.parent_timestamp.get());
    let (found, expected, slack) = match &parent.image {
        Some(parent) => match image.parent_time {
            Some(time) => (parent.footer.timestamp.get(), time, 0),
            None => (parent.footer.timestamp.get(), in_header, CLOCK_SLACK),
        },
        // A device's time says nothing of its content.
        None => match parent.path.metadata() {
            Ok(metadata) if metadata.is_file() => (vhd::timestamp(metadata.mtime().max(0) as u64), in_header, 0),
            _ => return Ok(()),
        },
    };
    if in_header == 0 || found <= expected.saturating_add(slack) {
        return Ok(());
    }
    Err(Error::ChangedParent { path: path.to_owned(), parent: parent.path.clone(), expected, found })
}
