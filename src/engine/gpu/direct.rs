//! Weights that come from the drive into VRAM past host memory: `reader = gds`.
//!
//! A few threads, each with VRAM of its own that cuFile reads into: whole 4 KiB of the file, of which a copy within VRAM then
//! takes what belongs in the image. cuFile's calls wait, so it is their number that keeps the drive busy. With it nothing is
//! kept in host memory: what is not in VRAM is read in every pass. Invariants: a copy into a slot runs behind the events of
//! those who read the slot before (the gate); a target is read into again only when the copy out of it is done. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: from the reader to the pool of a GPU.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::PIECE_BYTES;
use crate::engine::trace::{Part, Trace};
use crate::error::{Error, ErrorKind, Result};
use crate::io::ShardFile;
use crate::io::gds::{Gds, GdsTarget};
use crate::mem::cuda::{Context, Event, Stream};
use crate::plan::image::Piece;
use crate::units::PAGE_4K;

/// Reads under way at a time: 16 MiB, and what cuFile makes of them.
const THREADS: usize = 4;
/// What each reads into, in turn.
const TARGETS: usize = 2;
/// A piece, and what is read along because reads are aligned.
const TARGET_BYTES: u64 = PIECE_BYTES + 2 * PAGE_4K;

/// Where the reads of a task are events, and of what.
pub(super) struct Traced {
    pub(super) trace: Arc<Trace>,
    pub(super) key: u64,
    pub(super) layer: Option<u32>,
}

/// Pieces to be read and copied to their places.
struct Task {
    pieces: Vec<Piece>,
    image_base: u64,
    gate: Option<Arc<Event>>,
    traced: Option<Traced>,
    reply: SyncSender<Result<Event>>,
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Direct {
    tasks: Option<SyncSender<Task>>,
    threads: Vec<JoinHandle<()>>,
    /// Waits for those who read a slot, so that one event stands for all of theirs.
    gates: Stream,
    gate: Mutex<Option<Arc<Event>>>,
    bytes_read: Arc<AtomicU64>,
}

impl Direct {
    /// VRAM it takes.
    pub(super) const fn vram_bytes() -> u64 {
        THREADS as u64 * TARGETS as u64 * TARGET_BYTES
    }

    /// Starts the threads, once cuFile has proved itself on these files.
    ///
    /// # Errors
    /// Why GDS is not to be used; `NoMemory`; what starting a thread gives.
    pub(super) fn start(context: &Arc<Context>, files: &Arc<[ShardFile]>) -> Result<Self> {
        let gds = Arc::new(Gds::trusted(context, files)?);
        let (sender, receiver) = sync_channel(THREADS);
        let receiver = Arc::new(Mutex::new(receiver));
        let mut direct = Self {
            tasks: Some(sender),
            threads: Vec::with_capacity(THREADS),
            gates: Stream::new(context)?,
            gate: Mutex::new(None),
            bytes_read: Arc::new(AtomicU64::new(0)),
        };
        for _ in 0..THREADS {
            let worker = Worker::new(context, &gds, &direct.bytes_read)?;
            let receiver = Arc::clone(&receiver);
            let thread = std::thread::Builder::new()
                .name("flea-gds".to_owned())
                .spawn(move || worker.run(&receiver))
                .map_err(|error| Error::from_io(&error, "start the thread flea-gds"))?;
            direct.threads.push(thread);
        }
        Ok(direct)
    }

    /// Copies asked for from now on, until the next call, run behind these events.
    ///
    /// # Errors
    /// What the driver says.
    pub(super) fn close_gate(&self, events: &[Event]) -> Result<()> {
        events.iter().try_for_each(|event| self.gates.wait(event))?;
        // Also without events: a fetch that is tried again has told its readers the first time.
        let gate = Some(Arc::new(self.gates.record()?));
        *self.gate.lock().unwrap_or_else(PoisonError::into_inner) = gate;
        Ok(())
    }

    /// Asks for pieces. What comes out is the event behind their last copy.
    ///
    /// # Errors
    /// `Internal` when no thread is left.
    pub(super) fn read(
        &self,
        pieces: Vec<Piece>,
        image_base: u64,
        traced: Option<Traced>,
    ) -> Result<Receiver<Result<Event>>> {
        let (reply, answer) = sync_channel(1);
        let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        let task = Task {
            pieces,
            image_base,
            gate: gate.clone(),
            traced,
            reply,
        };
        drop(gate);
        let sent = self.tasks.as_ref().map(|tasks| tasks.send(task));
        match sent {
            Some(Ok(())) => Ok(answer),
            _ => Err(gone()),
        }
    }

    /// What cuFile has read.
    pub(super) fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }
}

pub(super) fn gone() -> Error {
    Error::new(ErrorKind::Internal, "a thread that reads by cuFile is gone")
}

impl Drop for Direct {
    fn drop(&mut self) {
        self.tasks = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread that reads by cuFile had panicked");
            }
        }
    }
}

/// What one thread works with.
struct Worker {
    stream: Stream,
    /// With the event behind the last copy out of each.
    targets: [(GdsTarget, Option<Event>); TARGETS],
    gds: Arc<Gds>,
    bytes_read: Arc<AtomicU64>,
}

impl Worker {
    fn new(context: &Arc<Context>, gds: &Arc<Gds>, bytes_read: &Arc<AtomicU64>) -> Result<Self> {
        let target = || gds.target(TARGET_BYTES).map(|target| (target, None));
        Ok(Self {
            stream: Stream::new(context)?,
            targets: [target()?, target()?],
            gds: Arc::clone(gds),
            bytes_read: Arc::clone(bytes_read),
        })
    }

    fn run(mut self, tasks: &Mutex<Receiver<Task>>) {
        let _ = nix::sys::signal::SigSet::all().thread_block();
        loop {
            let task = tasks.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(task) = task else {
                break;
            };
            let event = self.work(&task).inspect_err(|_| self.settle());
            // Nobody waits for it where the model is being closed.
            let _ = task.reply.send(event);
        }
        // The targets go when nothing reads them any more.
        self.settle();
    }

    /// Waits for the copies that were asked for: after a failure the slot they go to may be given on. A GPU that is lost copies
    /// nothing.
    fn settle(&self) {
        if let Err(error) = self.stream.record().and_then(|event| event.wait()) {
            log::debug!("a thread that reads by cuFile: {error}");
        }
    }

    fn work(&mut self, task: &Task) -> Result<Event> {
        if let Some(gate) = &task.gate {
            self.stream.wait(gate)?;
        }
        for piece in &task.pieces {
            let to = task.image_base + piece.offset_bytes;
            if piece.file.len_bytes > 0 {
                self.piece(piece, to, task.traced.as_ref())?;
            }
            if piece.padding_bytes > 0 {
                let behind = to + piece.file.len_bytes;
                self.stream.zero(behind, piece.padding_bytes as usize)?;
            }
        }
        self.stream.record()
    }

    fn piece(&mut self, piece: &Piece, to: u64, traced: Option<&Traced>) -> Result<()> {
        self.targets.swap(0, 1);
        let (target, copied) = &mut self.targets[0];
        if let Some(copied) = copied.take() {
            copied.wait()?;
        }
        let file = &piece.file;
        let begin = file.offset_bytes / PAGE_4K * PAGE_4K;
        let len = (file.end_bytes() - begin).next_multiple_of(PAGE_4K);
        if let Some(traced) = traced {
            let part = Part {
                shard_index: file.shard_index,
                offset_bytes: begin,
                len_bytes: self.gds.readable(file.shard_index, begin, len),
            };
            traced.trace.read_begun(traced.key, traced.layer, part);
        }
        let got = self.gds.read(file.shard_index, begin, len, target);
        if let Some(traced) = traced {
            traced.trace.read_ended(traced.key, got.is_err());
        }
        let got = got?;
        self.bytes_read.fetch_add(got, Ordering::Relaxed);
        let skip = file.offset_bytes - begin;
        if got < skip + file.len_bytes {
            let context = format!("cuFile read {got} bytes at offset {begin} and not {len}");
            return Err(Error::new(ErrorKind::Truncated, context));
        }
        let from = target.area().span().at() + skip;
        self.stream.copy_within(to, from, file.len_bytes as usize)?;
        *copied = Some(self.stream.record()?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::cuda::VramArea;
    use crate::mem::cuda::testing::fake_gpu;

    /// A fetch that is tried again has told its readers the first time: what is copied then still waits for them.
    #[test]
    fn a_gate_without_events_of_its_own_is_behind_the_one_before() {
        let context = fake_gpu();
        let direct = Direct {
            tasks: None,
            threads: Vec::new(),
            gates: Stream::new(&context).unwrap(),
            gate: Mutex::new(None),
            bytes_read: Arc::default(),
        };
        let area = VramArea::new(&context, PAGE_4K).unwrap();
        let reader = Stream::new(&context).unwrap();
        // Each takes the fake GPU 0.2 ms at least.
        for _ in 0..500 {
            let span = area.span(0, PAGE_4K).unwrap();
            reader.zero(span.at(), PAGE_4K as usize).unwrap();
        }
        let (told, done) = (reader.record().unwrap(), reader.record().unwrap());
        direct.close_gate(&[told]).unwrap();
        direct.close_gate(&[]).unwrap();
        let gate = direct.gate.lock().unwrap().clone().expect("a gate");
        assert!(!done.is_done().unwrap(), "the reader was too fast to tell");
        gate.wait().unwrap();
        assert!(done.is_done().unwrap(), "the gate opened under a reader");
    }
}
