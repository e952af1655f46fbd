//! The stream: the one thread of a model that moves bytes.
//!
//! It asks the state what to read next, aims a slot at it, keeps the reader's queue full, publishes what has arrived
//! and wakes the hosts that wait. Only this thread moves slots and submits reads, so a slot in flight is never moved.
//! Invariant: no lock is held across a system call that can block.

// The one unsafe call is Reader::submit: what it asks for (the memory stays until the kernel has given it back) is what
// this module and `state` are there to keep, so the promise is made here and not hidden behind a safe-looking wrapper.
#![allow(unsafe_code)]

use super::board::Board;
use super::latency::Histogram;
use super::layout::Layout;
use super::share::Member;
use super::state::{Job, Outcome, State};
use super::trace::Part;
use super::wait::Hall;
use crate::error::{Error, ErrorKind, Result};
use crate::io::mirror::{Copies, Mirrored};
use crate::io::{
    Completion, Counters, ReaderKind, ReaderOptions, Request, ShardFile, Waker, wake_promptly,
};
use crate::mem::Pool;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a model's close waits for reads that the kernel still has. After that their memory is leaked on purpose.
const DRAIN: Duration = Duration::from_secs(5);

/// What the stream and the hosts share.
#[derive(Debug)]
pub struct Core {
    /// Where hosts wait.
    pub hall: Hall,
    /// The memory; hosts take this lock only to measure it.
    pub pool: Mutex<Pool>,
    /// Counters of the reader, as of its last wait.
    pub counters: Mutex<Counters>,
    /// What each copy of the model has served.
    pub copies: Arc<Copies>,
    /// How long transient runs took to read.
    pub load_latency: Histogram,
    /// Set to end the stream.
    pub stop: AtomicBool,
}

impl Core {
    /// The state; see [`Hall::state`].
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.hall.state()
    }

    /// The pool; see [`Hall::state`].
    pub fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread tells its starter once its reader stands.
#[derive(Debug)]
pub struct Started {
    /// Wakes the stream out of its wait.
    pub waker: Waker,
    /// What kind of reader it became, and why, where it is not the one wished for.
    pub reader_kind: ReaderKind,
    /// The reason for the fallback.
    pub fallback: Option<String>,
}

/// What a model in the daemon shares with others; nothing of a model in its host's process.
#[derive(Debug, Clone, Default)]
pub struct Shared {
    /// Its clients.
    pub board: Option<Arc<Board>>,
    /// Its part of the drive.
    pub share: Option<Arc<Member>>,
    /// Set when the daemon ends: a pool that is being filled is filled no further.
    pub cancel: Option<Arc<AtomicBool>>,
}

/// Body of the thread. The reader is made here because its ring belongs to the thread that made it.
pub fn run(
    core: &Arc<Core>,
    layout: &Layout,
    files: &Arc<[ShardFile]>,
    options: &ReaderOptions,
    shared: &Shared,
    started: &SyncSender<Result<Started>>,
) {
    // Signals are the host's business; a handler running here would stall the drive.
    let _ = nix::sys::signal::SigSet::all().thread_block();
    wake_promptly();
    let reader = match Mirrored::new(Arc::clone(files), Arc::clone(&core.copies), options) {
        Ok(reader) => reader,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let news = Started {
        waker: reader.waker(),
        reader_kind: reader.kind(),
        fallback: reader.fallback(),
    };
    if started.send(Ok(news)).is_err() {
        return;
    }
    let mut stream = Stream {
        core,
        layout,
        files,
        board: shared.board.as_deref(),
        share: shared.share.as_deref(),
        reader,
        queue: VecDeque::with_capacity(1024),
        completions: Vec::with_capacity(256),
        begun: vec![Instant::now(); layout.fetches.len()],
    };
    // Hosts wait without a time limit: whatever ends this thread must be told them.
    if catch_unwind(AssertUnwindSafe(|| stream.work())).is_err() {
        let context =
            "the thread that reads has panicked; close the model, and report what it said";
        stream.give_up(Error::new(ErrorKind::Internal, context));
    }
    stream.finish();
}

/// A request that waits for a place in the reader's queue.
struct Queued {
    fetch: u32,
    request: u32,
    target: *mut u8,
}

struct Stream<'a> {
    core: &'a Arc<Core>,
    layout: &'a Layout,
    files: &'a Arc<[ShardFile]>,
    board: Option<&'a Board>,
    share: Option<&'a Member>,
    reader: Mirrored,
    queue: VecDeque<Queued>,
    completions: Vec<Completion>,
    /// When each fetch was begun last.
    begun: Vec<Instant>,
}

impl Stream<'_> {
    fn work(&mut self) {
        while !self.core.stop.load(Ordering::Acquire) {
            let submitted = self.refill().and_then(|()| self.submit());
            if self.reader.free() == 0 && self.reader.in_flight() == 0 {
                let context = "the drive has given back none of its reads within their deadlines; close the model";
                self.give_up(Error::new(ErrorKind::Io, context));
                return;
            }
            let patience = self.board.and_then(|_| self.core.state().look_again());
            if let Err(error) =
                submitted.and_then(|()| self.reader.wait(patience, &mut self.completions))
            {
                self.give_up(error);
                return;
            }
            self.reap();
        }
    }

    /// Starts fetches until the reader has enough to do, or nothing is left to start.
    fn refill(&mut self) -> Result<()> {
        while self.queue.len() < self.reader.free() {
            let Some(job) = self.next_job() else { break };
            if let Err(error) = self.begin(job) {
                let mut state = self.core.state();
                state.failed_to_start(job.fetch, &error);
                self.notify(&state);
                continue;
            }
            // Experts that somebody waits for come in handfuls: the drive has the first while the slots of the others move.
            if job.urgent && self.layout.unit_of(job.fetch).is_some() {
                self.submit()?;
                self.reader.flush()?;
            }
        }
        Ok(())
    }

    fn next_job(&self) -> Option<Job> {
        let mut state = self.core.state();
        let mut job = state.pick();
        if let Some(board) = self.board {
            board.set_starving(job.is_none());
            if job.is_none() {
                // A client that released before it could see this will not tell: look once more.
                job = state.pick();
            }
        }
        state.hungry = job.is_none();
        job
    }

    /// Aims the slot and queues the requests of a fetch.
    fn begin(&mut self, job: Job) -> Result<()> {
        let fetch = &self.layout.fetches[job.fetch as usize];
        self.begun[job.fetch as usize] = Instant::now();
        self.reader.check_unchanged(fetch.run.shard_index)?;
        let target = {
            let mut pool = self.core.pool();
            pool.check_filled()?;
            match job.slot {
                Some(slot) if self.is_own_slot(fetch.transient_of, slot) => {
                    pool.aim(slot, &fetch.run)?
                }
                Some(slot) => pool.aim_away(slot, &fetch.run)?,
                None => pool.resident_target(&fetch.run),
            }
        };
        if target.is_null() {
            let context = format!("{:?} is in the plan and not in the pool", fetch.run);
            return Err(Error::new(ErrorKind::Internal, context));
        }
        let requests = (0..fetch.request_count).map(|request| Queued {
            fetch: job.fetch,
            request,
            target,
        });
        if job.urgent {
            for queued in requests.rev() {
                self.queue.push_front(queued);
            }
        } else {
            self.queue.extend(requests);
        }
        Ok(())
    }

    /// True for the slot that the plan gives a layer, and for every slot where it gives none.
    fn is_own_slot(&self, layer: Option<u32>, slot: u32) -> bool {
        let own = layer.and_then(|layer| self.layout.fixed_slot[layer as usize]);
        own.is_none_or(|own| own == slot)
    }

    fn submit(&mut self) -> Result<()> {
        let depth = self.reader.free() + self.reader.in_flight();
        if let Some(share) = self.share {
            share.set_busy(!self.queue.is_empty() || self.reader.in_flight() > 0);
        }
        while self.reader.free() > 0 {
            if let Some(share) = self.share
                && self.reader.in_flight() >= share.allowance(depth)
            {
                break;
            }
            let Some(queued) = self.queue.pop_front() else {
                break;
            };
            let fetch = &self.layout.fetches[queued.fetch as usize];
            let (offset_bytes, len_bytes) = self.layout.request_range(queued.fetch, queued.request);
            let skip_bytes = offset_bytes - fetch.run.first_page * self.layout.page_bytes;
            let request = Request {
                key: u64::from(queued.fetch) << 32 | u64::from(queued.request),
                shard_index: fetch.run.shard_index,
                offset_bytes,
                len_bytes,
                target: queued.target.wrapping_add(skip_bytes as usize),
            };
            if let Some(trace) = self.core.hall.trace.get() {
                let len_bytes = len_bytes.min(
                    self.files[fetch.run.shard_index as usize]
                        .len_bytes()
                        .saturating_sub(offset_bytes),
                );
                let part = Part {
                    shard_index: fetch.run.shard_index,
                    offset_bytes,
                    len_bytes,
                };
                trace.read_begun(request.key, fetch.transient_of, part);
            }
            // SAFETY: the target is a part of the run that Pool::aim or Pool::resident_target gave, at a distance below
            // its length. It stays: only this thread aims slots, State gives none away while its fetch is Loading,
            // nobody has a lease on it, and what the kernel does not give back is quarantined or kept at the end.
            unsafe { self.reader.submit(request)? };
        }
        Ok(())
    }

    /// Books the completions; publishes every fetch that is whole.
    fn reap(&mut self) {
        if self.completions.is_empty() {
            return;
        }
        let completions = std::mem::take(&mut self.completions);
        for completion in &completions {
            let (fetch, request) = (fetch_of(completion.key), completion.key as u32);
            let failed = completion.result.is_err();
            if let Some(trace) = self.core.hall.trace.get() {
                trace.read_ended(completion.key, failed);
            }
            if !completion.returned {
                self.quarantine(fetch);
            }
            let mut outcome = {
                let mut state = self.core.state();
                state.completed(
                    fetch,
                    request,
                    completion.result.clone(),
                    completion.returned,
                )
            };
            if failed && outcome == Outcome::Pending {
                outcome = self.withdraw(fetch);
            }
            if outcome == Outcome::Complete {
                self.publish(fetch);
            }
        }
        self.completions = completions;
        self.completions.clear();
        *self
            .core
            .counters
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = self.reader.counters();
        let state = self.core.state();
        self.notify(&state);
    }

    /// Takes the requests of a failed fetch that were not submitted yet out of the queue.
    fn withdraw(&mut self, fetch: u32) -> Outcome {
        let before = self.queue.len();
        self.queue.retain(|queued| queued.fetch != fetch);
        let count = u32::try_from(before - self.queue.len()).unwrap_or(u32::MAX);
        self.core.state().withdraw(fetch, count)
    }

    /// The kernel kept the memory of a request: it is never used again. Called before the state lets go of the slot.
    fn quarantine(&self, fetch: u32) {
        let slot = self.core.state().slot_of(fetch);
        let mut pool = self.core.pool();
        match slot {
            Some(slot) => pool.quarantine(slot),
            None => pool.quarantine_resident(),
        }
    }

    /// Makes a whole fetch readable. A file that was cut and grown again meanwhile reads zeros without any error, so its
    /// identity is looked at once more, after the last byte.
    fn publish(&mut self, fetch: u32) {
        let slot = self.core.state().slot_of(fetch);
        let run = &self.layout.fetches[fetch as usize].run;
        let unchanged = self.reader.check_unchanged(run.shard_index);
        let published = unchanged.and_then(|()| {
            let mut pool = self.core.pool();
            match slot {
                Some(slot) => pool.publish(slot),
                None => pool.publish_resident(run),
            }
        });
        let mut state = self.core.state();
        match published {
            Ok(()) => {
                if slot.is_some() {
                    self.core
                        .load_latency
                        .record(self.begun[fetch as usize].elapsed());
                }
                state.published(fetch);
            }
            Err(error) => state.failed_to_start(fetch, &error),
        }
    }

    fn notify(&self, state: &State) {
        self.core.hall.notify(state);
    }

    /// The reader itself is broken: nobody can be served any more.
    fn give_up(&self, error: Error) {
        log::error!("the reader stopped: {error}");
        let mut state = self.core.state();
        state.fatal = Some(error);
        state.show_all();
        self.notify(&state);
    }

    /// Ends the stream: hosts that wait are told, reads in flight are waited for.
    fn finish(mut self) {
        {
            let mut state = self.core.state();
            if state.fatal.is_none() {
                state.fatal = Some(Error::new(ErrorKind::Canceled, "the model is being closed"));
            }
            self.notify(&state);
        }
        let kept = self.reader.drain(DRAIN);
        if !kept.is_empty() {
            log::error!(
                "the drive has not given back {} reads; their memory is never freed",
                kept.len()
            );
        }
        for key in kept {
            self.quarantine(fetch_of(key));
        }
    }
}

/// The fetch that a request's key names; the low half is the request.
const fn fetch_of(key: u64) -> u32 {
    (key >> 32) as u32
}
