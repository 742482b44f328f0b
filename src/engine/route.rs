//! One engine of several, for a disk whose files are of several kinds: each I/O goes to the engine that has its file.
//!
//! The disk's files have one number space, that of this engine. Each engine within numbers its own from 0, and so an I/O's file is
//! renamed on its way in and, done or refused, on its way out. All have the disk's one event and depth. A disk with files of one kind has
//! none of this.

use std::any::{Any, TypeId};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::{Engine, Inline, Reap, Submit};
use crate::blocking::Caller;
use crate::sys::io::{FileId, Io};

/// Where one of the disk's files is: which engine has it, and by which id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilePlace {
    /// Index of the engine.
    pub engine: u8,
    /// What that one calls it.
    pub file: FileId,
}

/// One engine of `engines`, where `places` are the disk's files in the order of their ids. Its name is the first one's. All have the
/// same depth and the same event.
pub fn route(engines: Vec<Engine>, places: &[FilePlace]) -> Engine {
    let (name, depth) = (engines[0].name, engines[0].depth);
    let event = Arc::clone(engines[0].submit.event());
    assert!(engines.iter().all(|engine| engine.depth == depth && Arc::ptr_eq(engine.submit.event(), &event)));
    let inline = places.iter().map(|place| engines[usize::from(place.engine)].inline.of(place.file).clone());
    let inline = Inline::of_files(inline);
    let (mut submits, mut reaps, mut files) = (Vec::new(), Vec::new(), Vec::new());
    for (engine, index) in engines.into_iter().zip(0u8..) {
        let of_engine = places.iter().zip(0u16..).filter(|(place, _)| place.engine == index);
        let mut named: Vec<_> = of_engine.map(|(place, id)| (place.file.0, FileId(id))).collect();
        named.sort_unstable_by_key(|(theirs, _)| *theirs);
        let numbered = named.iter().zip(0u16..).all(|((theirs, _), at)| *theirs == at);
        assert!(numbered, "an engine's files are numbered from 0");
        submits.push(engine.submit);
        reaps.push(engine.reap);
        files.push(named.into_iter().map(|(_, ours)| ours).collect());
    }
    let files: Arc<[Box<[FileId]>]> = files.into();
    let reap = Box::new(RouteReap { engines: reaps.into(), files: Arc::clone(&files) });
    let with = std::iter::repeat_with(AtomicU8::default).take(depth).collect();
    let submit = Arc::new(RouteSubmit { engines: submits.into(), places: places.into(), files, with, event });
    Engine { name, depth, inline, submit, reap }
}

struct RouteSubmit {
    engines: Box<[Arc<dyn Submit>]>,
    /// Of each of the disk's files.
    places: Box<[FilePlace]>,
    /// Of each engine's files, what the disk calls it.
    files: Arc<[Box<[FileId]>]>,
    /// The engine that each I/O went to, by tag.
    with: Box<[AtomicU8]>,
    event: Arc<EventFd>,
}

impl RouteSubmit {
    fn place(&self, io: &Io) -> FilePlace {
        self.places[usize::from(io.file.0)]
    }
}

impl Submit for RouteSubmit {
    fn submit(&self, batch: &mut VecDeque<Box<Io>>, limit: usize, by: Caller) -> Result<usize, Errno> {
        let Some(first) = batch.front() else { return Ok(0) };
        let engine = self.place(first).engine;
        let mut given = 0;
        for io in batch.iter_mut().take(limit) {
            let place = self.place(io);
            if place.engine != engine {
                break;
            }
            io.file = place.file;
            if let Some(with) = self.with.get(io.tag as usize) {
                with.store(engine, Ordering::Release);
            }
            given += 1;
        }
        let result = self.engines[usize::from(engine)].submit(batch, given, by);
        let files = &self.files[usize::from(engine)];
        for io in batch.iter_mut().take(given - result.unwrap_or(0)) {
            io.file = files[usize::from(io.file.0)];
        }
        result
    }

    fn cancel(&self, tag: u32) -> bool {
        // One that is on its way to its engine may be asked of another, which does not have it.
        let with = self.with.get(tag as usize).map(|with| with.load(Ordering::Acquire));
        with.is_some_and(|engine| self.engines[usize::from(engine)].cancel(tag))
    }

    fn tidy(&self) {
        self.engines.iter().for_each(|engine| engine.tidy());
    }

    fn offers(&self, kind: TypeId) -> Option<&dyn Any> {
        self.engines.iter().find_map(|engine| engine.offers(kind))
    }

    fn event(&self) -> &Arc<EventFd> {
        &self.event
    }
}

struct RouteReap {
    engines: Box<[Box<dyn Reap>]>,
    /// Of each engine's files, what the disk calls it.
    files: Arc<[Box<[FileId]>]>,
}

impl Reap for RouteReap {
    fn ready(&self) -> bool {
        self.engines.iter().any(|engine| engine.ready())
    }

    fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
        let mut count = 0;
        for (engine, files) in self.engines.iter_mut().zip(&*self.files) {
            count += engine.reap(&mut |mut io, result| {
                io.file = files[usize::from(io.file.0)];
                done(io, result);
            });
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::blocking::Blocking;
    use crate::sys::io::IoOp;

    /// Takes as many as it may, or refuses, and notes what it is asked.
    struct Noting {
        event: Arc<EventFd>,
        accepts: Result<usize, Errno>,
        taken: Mutex<VecDeque<Box<Io>>>,
        asked: Mutex<Vec<u32>>,
    }

    impl Submit for Noting {
        fn submit(&self, batch: &mut VecDeque<Box<Io>>, limit: usize, _: Caller) -> Result<usize, Errno> {
            let count = self.accepts?.min(limit).min(batch.len());
            self.taken.lock().unwrap().extend(batch.drain(..count));
            Ok(count)
        }

        fn offers(&self, _: TypeId) -> Option<&dyn Any> {
            None
        }

        fn cancel(&self, tag: u32) -> bool {
            self.asked.lock().unwrap().push(tag);
            true
        }

        fn event(&self) -> &Arc<EventFd> {
            &self.event
        }
    }

    struct Finishing(Arc<Noting>);

    impl Reap for Finishing {
        fn ready(&self) -> bool {
            !self.0.taken.lock().unwrap().is_empty()
        }

        fn reap(&mut self, done: &mut dyn FnMut(Box<Io>, Result<u64, Errno>)) -> usize {
            let taken = std::mem::take(&mut *self.0.taken.lock().unwrap());
            taken.into_iter().map(|io| done(io, Ok(512))).count()
        }
    }

    fn engines<const N: usize>(accepts: [Result<usize, Errno>; N]) -> ([Arc<Noting>; N], Vec<Engine>) {
        let event = super::super::event().unwrap();
        let noting = accepts.map(|accepts| {
            let (taken, asked) = (Mutex::default(), Mutex::default());
            Arc::new(Noting { event: Arc::clone(&event), accepts, taken, asked })
        });
        let engine = |(noting, name): (&Arc<Noting>, _)| Engine {
            name,
            depth: 8,
            inline: if name == "first" { Inline::Never } else { Inline::Always },
            submit: Arc::clone(noting) as Arc<dyn Submit>,
            reap: Box::new(Finishing(Arc::clone(noting))),
        };
        let engines = noting.iter().zip(["first", "second"]).map(engine).collect();
        (noting, engines)
    }

    const fn at(engine: u8, file: u16) -> FilePlace {
        FilePlace { engine, file: FileId(file) }
    }

    /// The disk's files: 0 and 3 are the second engine's.
    const PLACES: [FilePlace; 4] = [at(1, 1), at(0, 0), at(0, 1), at(1, 0)];

    fn batch(files: &[u16]) -> VecDeque<Box<Io>> {
        let io = |(tag, file): (u32, &u16)| {
            let mut io = Io::new(tag, 1);
            io.begin(IoOp::Flush, FileId(*file), 0);
            io
        };
        (0..).zip(files).map(io).collect()
    }

    fn files(batch: &VecDeque<Box<Io>>) -> Vec<(u32, u16)> {
        batch.iter().map(|io| (io.tag, io.file.0)).collect()
    }

    #[test]
    fn each_io_goes_to_the_engine_of_its_file_and_comes_back_as_it_was() {
        let (noting, engines) = engines([Ok(2), Ok(8)]);
        let mut engine = route(engines, &PLACES);
        assert_eq!((engine.name, engine.depth), ("first", 8));
        let (never, always) = (Inline::Never, Inline::Always);
        assert_eq!(engine.inline, Inline::ByFile([always.clone(), never.clone(), never, always].into()));
        let mut batch = batch(&[1, 2, 1, 3, 0, 0, 2]);
        let blocking = Blocking::before_main_loop();
        let mut submit = |limit| engine.submit.submit(&mut batch, limit, Caller::Thread(&blocking));
        assert_eq!((submit(8), submit(8), submit(2), submit(8)), (Ok(2), Ok(1), Ok(2), Ok(1)));
        assert_eq!(files(&batch), [(6, 2)]);
        assert_eq!(files(&noting[0].taken.lock().unwrap()), [(0, 0), (1, 1), (2, 0)]);
        assert_eq!(files(&noting[1].taken.lock().unwrap()), [(3, 0), (4, 1), (5, 1)]);
        for (tag, with) in [(2, 0), (3, 1)] {
            assert!(engine.submit.cancel(tag));
            assert_eq!(*noting[with].asked.lock().unwrap(), [tag]);
        }
        assert!(!engine.submit.cancel(8), "there is no such I/O");
        assert!(engine.reap.ready());
        let mut done = VecDeque::new();
        assert_eq!(engine.reap.reap(&mut |io, _| done.push_back(io)), 6);
        assert_eq!(files(&done), [(0, 1), (1, 2), (2, 1), (3, 3), (4, 0), (5, 0)]);
        assert!(!engine.reap.ready());
    }

    #[test]
    fn what_is_refused_has_the_disks_name_of_its_file() {
        let (_, engines) = engines([Err(Errno::EAGAIN), Err(Errno::ENOSPC)]);
        let engine = route(engines, &PLACES);
        let blocking = Blocking::before_main_loop();
        for (given, errno) in [([0, 3, 2], Errno::ENOSPC), ([2, 1, 0], Errno::EAGAIN)] {
            let mut batch = batch(&given);
            assert_eq!(engine.submit.submit(&mut batch, 8, Caller::Thread(&blocking)), Err(errno));
            assert_eq!(batch.iter().map(|io| io.file.0).collect::<Vec<_>>(), given);
        }
    }
}
