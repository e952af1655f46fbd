//! The two threads between host memory and VRAM: one hands copies to the driver, one books those that are done.
//!
//! The first asks the state what VRAM wants next, waits until the bytes of a piece have landed in the pool below, asks for
//! its copy behind the events of those who read that slot before, and marks it with an event. The second waits for these
//! events in turn, gives the memory below back, and tells the hosts. So drive, link and GPU work at the same time, and
//! neither thread waits for what the other has to do first. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: from the pool in host memory to that in VRAM.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::direct::{self, Direct, Traced};
use super::source::{Copied, Source, pieces_between};
use crate::engine::layout::Layout;
use crate::engine::state::{Job, Outcome};
use crate::engine::wait::Hall;
use crate::error::{Error, ErrorKind, Result};
use crate::io::wake_promptly;
use crate::mem::cuda::{Event, Stream, VramPool};
use crate::plan::image::Piece;

/// Pieces handed to the driver and not done yet, at most: the queue is never the limit.
const IN_FLIGHT_MAX: usize = 256;
/// How long a wait lasts before it is looked whether the model is being closed.
const PATIENCE: Duration = Duration::from_millis(100);

/// What the threads and the hosts share.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) hall: Hall,
    pub(super) layout: Arc<Layout>,
    /// What lies where in the image, by place.
    pub(super) pieces: Vec<Piece>,
    // Stages wait for their copies; only then the memory that is copied to may go.
    pub(super) below: OnceLock<Arc<Source>>,
    pub(super) resident: Mutex<Option<Arc<Source>>>,
    /// In place of both: what reads past host memory.
    pub(super) direct: Option<Direct>,
    /// Per slot, the events behind which it may be written again.
    pub(super) last_uses: Mutex<Vec<Vec<Event>>>,
    pub(super) pool: VramPool,
    /// Its own, so that events of a host are waited for in no stream that copies.
    pub(super) relay: Stream,
    /// Rung when there may be something to do.
    pub(super) bell: Bell,
    /// Rung when a piece is done.
    pub(super) retired: Bell,
    pub(super) stop: AtomicBool,
    pub(super) counted: Counted,
}

/// Counters; see [`super::GpuStats`].
#[derive(Debug, Default)]
pub(super) struct Counted {
    pub(super) h2d_bytes: AtomicU64,
    pub(super) h2d_pinned_bytes: AtomicU64,
    pub(super) h2d_resident_bytes: AtomicU64,
    pub(super) copies: AtomicU64,
    pub(super) unpacked_bytes: AtomicU64,
    /// Read for resident pages by a source that is gone.
    pub(super) resident_read_bytes: AtomicU64,
}

impl Counted {
    fn add(&self, copied: &Copied) {
        for (counter, more) in [
            (&self.copies, copied.copies),
            (&self.h2d_bytes, copied.bytes),
            (&self.h2d_pinned_bytes, copied.pinned_bytes),
            (&self.unpacked_bytes, copied.unpacked_bytes),
        ] {
            counter.fetch_add(more, Ordering::Relaxed);
        }
    }
}

/// A flag that stays up until somebody has seen it.
#[derive(Debug, Default)]
pub(super) struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    pub(super) fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Sleeps until it has been rung, or for `patience`.
    fn wait(&self, patience: Duration) {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut rung, _) = self
            .changed
            .wait_timeout_while(rung, patience, |rung| !*rung)
            .unwrap_or_else(PoisonError::into_inner);
        *rung = false;
    }
}

/// A piece's key in the trace.
const fn key_of(fetch: u32, request: u32) -> u64 {
    (fetch as u64) << 32 | request as u64
}

/// A piece that was asked for.
struct Issued {
    fetch: u32,
    request: u32,
    arrival: Arrival,
}

/// How it comes.
enum Arrival {
    /// Out of host memory: the driver has been asked to copy it.
    Copied {
        event: Event,
        source: Arc<Source>,
        /// The layer of the source, and how many leases of it are held.
        layer: u32,
        leases: u32,
        /// Where it is told whether what was unpacked was damaged.
        word: Option<u32>,
    },
    /// Past host memory: somebody reads it, and gives the event behind its last copy.
    Read(Receiver<Result<Event>>),
}

/// The threads.
#[derive(Debug)]
pub(super) struct Feed {
    core: Arc<Core>,
    threads: Vec<JoinHandle<()>>,
}

impl Feed {
    /// Starts them.
    ///
    /// # Errors
    /// What starting a thread gives.
    pub(super) fn start(core: &Arc<Core>) -> Result<Self> {
        let mut feed = Self {
            core: Arc::clone(core),
            threads: Vec::with_capacity(3),
        };
        let (sender, receiver) = sync_channel(IN_FLIGHT_MAX);
        let own = Arc::clone(core);
        feed.spawn("flea-gpu-copy", move || {
            own.or_tell(|| own.issue_all(&sender));
        })?;
        let own = Arc::clone(core);
        feed.spawn("flea-gpu-done", move || {
            own.or_tell(|| own.retire_all(&receiver));
        })?;
        if let Some(below) = core.below.get().cloned() {
            feed.spawn("flea-gpu-pin", move || below.stage().pinned().pin_all())?;
        }
        Ok(feed)
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // Signals are the host's business.
                let _ = nix::sys::signal::SigSet::all().thread_block();
                wake_promptly();
                work();
            })
            .map_err(|error| Error::from_io(&error, format_args!("start the thread {name}")))?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        let core = &self.core;
        core.stop.store(true, Ordering::Release);
        if let Some(below) = core.below.get() {
            below.stage().pinned().stop();
        }
        core.bell.ring();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread between memory and GPU had panicked");
            }
        }
    }
}

impl Core {
    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Hosts wait without a time limit: whatever ends a thread they need must be told them.
    fn or_tell(&self, work: impl FnOnce()) {
        if catch_unwind(AssertUnwindSafe(work)).is_err() {
            let context = "a thread between memory and GPU has panicked; close the model, and report what it said";
            let mut state = self.hall.state();
            state.fatal = Some(Error::new(ErrorKind::Internal, context));
            self.hall.notify(&state);
        }
    }

    // ---- the thread that asks for copies ------------------------------------------------------------------------

    fn issue_all(&self, sender: &SyncSender<Issued>) {
        while !self.is_stopped() {
            let job = {
                let mut state = self.hall.state();
                let job = state.pick();
                state.hungry = job.is_none();
                job
            };
            match job {
                Some(job) => self.issue(job, sender),
                None => self.bell.wait(PATIENCE),
            }
        }
        let mut state = self.hall.state();
        if state.fatal.is_none() {
            state.fatal = Some(Error::new(ErrorKind::Canceled, "the model is being closed"));
        }
        self.hall.notify(&state);
    }

    /// Asks for all copies of a fetch; the first that cannot be had fails it.
    fn issue(&self, job: Job, sender: &SyncSender<Issued>) {
        let request_count = self.layout.fetches[job.fetch as usize].request_count;
        for request in 0..request_count {
            let issued = self.issue_piece(job, request).and_then(|issued| {
                sender.send(issued).map_err(|_| {
                    Error::new(ErrorKind::Internal, "nobody books what the GPU has copied")
                })
            });
            if let Err(error) = issued {
                let mut state = self.hall.state();
                let outcome = state.completed(job.fetch, request, Err(error), true);
                let rest = request_count - request - 1;
                if outcome == Outcome::Pending && rest > 0 {
                    state.withdraw(job.fetch, rest);
                }
                self.hall.notify(&state);
                return;
            }
        }
    }

    fn issue_piece(&self, job: Job, request: u32) -> Result<Issued> {
        let arrival = match &self.direct {
            Some(direct) => self.issue_read(direct, job, request)?,
            None => self.issue_copies(job, request)?,
        };
        Ok(Issued {
            fetch: job.fetch,
            request,
            arrival,
        })
    }

    fn issue_read(&self, direct: &Direct, job: Job, request: u32) -> Result<Arrival> {
        if request == 0 {
            let events = job.slot.map_or_else(Vec::new, |slot| self.readers_of(slot));
            direct.close_gate(&events)?;
        }
        let (start, len) = self.layout.request_range(job.fetch, request);
        let pieces = pieces_between(&self.pieces, start, start + len);
        let bytes = pieces.iter().map(|piece| piece.file.len_bytes).sum();
        self.counted.h2d_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.trace_copy(job.fetch, request, bytes);
        if job.slot.is_none() {
            let counter = &self.counted.h2d_resident_bytes;
            counter.fetch_add(bytes, Ordering::Relaxed);
        }
        let traced = self.hall.trace.get().map(|trace| Traced {
            trace: Arc::clone(trace),
            key: key_of(job.fetch, request),
            layer: self.layout.fetches[job.fetch as usize].transient_of,
        });
        let answer = direct.read(pieces, self.pool.base(), traced);
        answer
            .map(Arrival::Read)
            .inspect_err(|_| self.trace_copied(job.fetch, request, true))
    }

    fn issue_copies(&self, job: Job, request: u32) -> Result<Arrival> {
        let (source, layer) = self.source_of(job.fetch, request)?;
        if let (Some(slot), 0) = (job.slot, request) {
            self.wait_for_readers(&source, slot)?;
        }
        let (start, len) = self.layout.request_range(job.fetch, request);
        let (mut leases, mut bytes) = (0, 0);
        let word = source.begin()?;
        let event = pieces_between(&self.pieces, start, start + len)
            .iter()
            .try_for_each(|piece| {
                let more = self.copy(&source, layer, piece, (&mut leases, word))?;
                self.trace_copy(job.fetch, request, more);
                bytes += more;
                Ok(())
            })
            .and_then(|()| source.record(word));
        if job.slot.is_none() {
            let counter = &self.counted.h2d_resident_bytes;
            counter.fetch_add(bytes, Ordering::Relaxed);
        }
        match event {
            Ok(event) => Ok(Arrival::Copied {
                event,
                source,
                layer,
                leases,
                word,
            }),
            Err(error) => {
                // Copies that were asked for before it went wrong still read the memory below.
                let _ = source.record(word).and_then(|event| event.wait());
                source.release(layer, leases);
                self.trace_copied(job.fetch, request, true);
                Err(error)
            }
        }
    }

    fn trace_copy(&self, fetch: u32, request: u32, bytes: u64) {
        if let (Some(trace), true) = (self.hall.trace.get(), bytes > 0) {
            let layer = self.layout.fetches[fetch as usize].transient_of;
            trace.copying(key_of(fetch, request), layer, bytes);
        }
    }

    fn trace_copied(&self, fetch: u32, request: u32, failed: bool) {
        if let Some(trace) = self.hall.trace.get() {
            trace.copied(key_of(fetch, request), failed);
        }
    }

    /// Where the bytes of a fetch come from, and in which layer of that model they are.
    fn source_of(&self, fetch: u32, request: u32) -> Result<(Arc<Source>, u32)> {
        let gone = || Error::new(ErrorKind::Internal, "the model below a GPU is gone");
        match self.layout.fetches[fetch as usize].transient_of {
            Some(layer) => Ok((self.below.get().cloned().ok_or_else(gone)?, layer)),
            None => {
                let source = self.resident_source().ok_or_else(gone)?;
                let layer = source.layer_of_piece(fetch, request);
                Ok((source, layer))
            }
        }
    }

    /// Has the copies wait, on the GPU, for everybody who reads a slot.
    fn wait_for_readers(&self, source: &Source, slot: u32) -> Result<()> {
        self.readers_of(slot)
            .iter()
            .try_for_each(|event| source.stage().wait(event))
    }

    /// The events of everybody who reads a slot.
    fn readers_of(&self, slot: u32) -> Vec<Event> {
        if ignore_readers() {
            return Vec::new();
        }
        std::mem::take(&mut self.last_uses()[slot as usize])
    }

    /// Gives the bytes that go over the link.
    fn copy(
        &self,
        source: &Source,
        layer: u32,
        piece: &Piece,
        (leases, word): (&mut u32, Option<u32>),
    ) -> Result<u64> {
        let to = self.pool.base() + piece.offset_bytes;
        let mut copied = Copied::default();
        if piece.file.len_bytes > 0 {
            self.lease_below(source, layer, piece)?;
            *leases += 1;
            copied = source.copy(&piece.file, to, word)?;
            self.counted.add(&copied);
        }
        if piece.padding_bytes > 0 {
            let behind = to + piece.file.len_bytes;
            source.stage().zero(behind, piece.padding_bytes as usize)?;
        }
        Ok(copied.bytes)
    }

    /// Waits until the bytes of a piece have landed.
    fn lease_below(&self, source: &Source, layer: u32, piece: &Piece) -> Result<()> {
        loop {
            if self.is_stopped() {
                return Err(Error::new(ErrorKind::Canceled, "the model is being closed"));
            }
            match source.acquire(layer, &piece.file, PATIENCE) {
                Err(error) if error.kind() == ErrorKind::Timeout => {}
                // Its slot below holds a layer whose copy is not done yet.
                Err(error) if error.kind() == ErrorKind::Busy => self.retired.wait(PATIENCE),
                result => return result,
            }
        }
    }

    // ---- the thread that books what is done ---------------------------------------------------------------------

    fn retire_all(&self, receiver: &Receiver<Issued>) {
        for issued in receiver {
            let (fetch, request) = (issued.fetch, issued.request);
            let done = self.arrived(issued);
            self.trace_copied(fetch, request, done.is_err());
            self.retired.ring();
            let mut state = self.hall.state();
            let outcome = state.completed(fetch, request, done, true);
            let is_resident = self.layout.fetches[fetch as usize].transient_of.is_none();
            if outcome == Outcome::Complete {
                state.published(fetch);
            }
            let all_there = is_resident && state.residents_are_ready();
            let hungry = std::mem::take(&mut state.hungry);
            self.hall.notify(&state);
            drop(state);
            if all_there {
                self.drop_resident();
            }
            if hungry {
                self.bell.ring();
            }
        }
    }

    /// Waits for a piece and gives back what it came out of.
    fn arrived(&self, issued: Issued) -> Result<()> {
        match issued.arrival {
            Arrival::Copied {
                event,
                source,
                layer,
                leases,
                word,
            } => {
                let (start, len) = self.layout.request_range(issued.fetch, issued.request);
                let pieces = pieces_between(&self.pieces, start, start + len);
                let done = event.wait().and_then(|()| source.check(word, &pieces));
                source.release(layer, leases);
                done
            }
            Arrival::Read(answer) => answer.recv().map_err(|_| direct::gone())??.wait(),
        }
    }

    /// All that stays in VRAM is there: the model it came from goes, and its memory with it.
    fn drop_resident(&self) {
        let source = {
            let mut kept = self.resident.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(source) = kept.as_ref() {
                let counter = &self.counted.resident_read_bytes;
                counter.fetch_add(source.bytes_read(), Ordering::Relaxed);
            }
            kept.take()
        };
        // Its threads end and its memory goes here, where nobody waits for the lock.
        drop(source);
    }
}

/// `FLEA_FAULT=noevent`: slots of VRAM are written again while they are read. A suite that passes with it tests nothing.
fn ignore_readers() -> bool {
    #[cfg(feature = "faults")]
    return {
        static NOEVENT: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        *NOEVENT
            .get_or_init(|| crate::io::fault::Faults::from_env().is_ok_and(|faults| faults.noevent))
    };
    #[cfg(not(feature = "faults"))]
    false
}
