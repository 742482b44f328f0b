//! Stores: one suite for all kinds, and what is special to each.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::common::served::folder;
use nix::errno::Errno;
use slog::{Discard, Logger, o};
use tapdisk::blocking::Blocking;
use tapdisk::config::Direct;
use tapdisk::store::{self, Error, How, Identity, Means, MemoryStore, Ram, Store};

const SIZE: usize = 300_000;

fn how(direct: Direct, read_only: bool) -> How<'static> {
    How { read_only, metadata: true, direct, sector_size: Some(512), lock: true, log: false, by: None }
}

fn open(blocking: &Blocking, path: &Path, how: &How) -> Result<Box<dyn Store>, Error> {
    let mut store = store::open(blocking, path, how, &Logger::root(Discard, o!()))?;
    store.lock(blocking)?;
    Ok(store)
}

/// One of each kind, of 300000 bytes of zeros.
fn each(folder: &Path, blocking: &Blocking) -> Vec<(&'static str, Box<dyn Store>)> {
    let file = |name: &str, direct| {
        let path = folder.join(name);
        fs::write(&path, vec![0; SIZE]).unwrap();
        open(blocking, &path, &how(direct, false)).unwrap()
    };
    let ram = Arc::new(Ram::zeroed(blocking, SIZE as u64).unwrap());
    vec![
        ("file", file("buffered", Direct::Off)),
        ("file, direct", file("direct", Direct::On)),
        ("memory", Box::new(MemoryStore::new(Path::new("memory"), ram))),
    ]
}

#[test]
fn any_bytes_are_written_and_read_up_to_the_end() {
    let (folder, blocking) = (folder(), Blocking::before_main_loop());
    for (kind, store) in each(folder.path(), &blocking) {
        let bytes: Vec<u8> = (0..SIZE).map(|i| (i % 253) as u8).collect();
        for (at, len) in [(0, 511), (511, 100_000), (100_511, 3), (100_514, 199_486)] {
            store.write_at(&blocking, at as u64, &bytes[at..][..len]).unwrap();
        }
        store.sync(&blocking, false).unwrap();
        store.refresh(&blocking).unwrap();
        for (at, len, expected) in [(0, SIZE, SIZE), (1, 4096, 4096), (299_000, 5000, 1000), (SIZE, 10, 0)] {
            let mut read = vec![0xee; len];
            assert_eq!(store.read_at(&blocking, at as u64, &mut read).unwrap(), expected, "{kind}, {at}");
            assert!(read[..expected] == bytes[at..][..expected], "{kind}, {at}");
        }
        store.sync(&blocking, true).unwrap();
        assert_eq!(store.size_now(&blocking).unwrap(), SIZE as u64, "{kind}");
        assert_eq!(store.geometry().size, SIZE as u64, "{kind}");
    }
}

#[test]
fn a_file_grows_and_memory_does_not() {
    let (folder, blocking) = (folder(), Blocking::before_main_loop());
    for (kind, store) in each(folder.path(), &blocking) {
        let grown = store.set_len(&blocking, 400_000);
        match kind {
            "memory" => assert_eq!(grown.unwrap_err().raw_os_error(), Some(Errno::EOPNOTSUPP as i32)),
            _ => grown.unwrap(),
        }
        let size = if kind == "memory" { SIZE } else { 400_000 };
        assert_eq!(store.size_now(&blocking).unwrap(), size as u64, "{kind}");
        assert_eq!(store.geometry().size, SIZE as u64, "{kind}: as it was");
    }
}

#[test]
fn the_means_are_for_the_engine_of_its_kind_and_identities_are_no_names() {
    let (folder, blocking) = (folder(), Blocking::before_main_loop());
    let stores = each(folder.path(), &blocking);
    for (kind, store) in &stores {
        match store.means(&blocking).unwrap() {
            Means::File(file) => assert_eq!((file.direct, file.block_device), (*kind == "file, direct", false)),
            Means::Memory(ram) => assert_eq!((*kind, ram.size()), ("memory", SIZE as u64)),
        }
        assert_eq!(store.is_direct(), *kind != "file", "{kind}");
        let same = stores.iter().filter(|(_, other)| other.identity() == store.identity()).count();
        assert_eq!(same, 1, "{kind}");
    }
    let link = folder.path().join("link");
    std::os::unix::fs::symlink("buffered", &link).unwrap();
    let other = store::open(&blocking, &link, &how(Direct::Off, true), &Logger::root(Discard, o!())).unwrap();
    assert_eq!(other.identity(), stores[0].1.identity());
    assert!(matches!(other.identity(), Identity::File(_)));
}

#[test]
fn the_lock_holds_off_what_it_says_until_the_store_is_gone() {
    let (folder, blocking) = (folder(), Blocking::before_main_loop());
    for direct in [Direct::Off, Direct::On] {
        let path = folder.path().join("image");
        fs::write(&path, vec![0; SIZE]).unwrap();
        let locked = |read_only| matches!(open(&blocking, &path, &how(direct, read_only)), Err(Error::Locked { .. }));
        let writer = open(&blocking, &path, &how(direct, false)).unwrap();
        assert_eq!(writer.holds_off(), "all of this host that take the lock: tapdisk and vhd-util");
        assert!(locked(true) && locked(false));
        drop(writer);
        let [reader, two] = [(); 2].map(|()| open(&blocking, &path, &how(direct, true)).unwrap());
        assert!(locked(false));
        assert!(reader.has_other_readers(&blocking).unwrap());
        drop(two);
        assert!(!reader.has_other_readers(&blocking).unwrap());
        drop(reader);
        let without = open(&blocking, &path, &How { lock: false, log: false, ..how(direct, false) }).unwrap();
        assert_eq!(without.holds_off(), "nobody");
        assert!(!locked(false));
    }
}
