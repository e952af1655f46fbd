//! Who holds what: the state of every layer, fetch and slot, and the choice of what to read next.
//!
//! Pure bookkeeping under one mutex; no system call is made in here. Invariants: a slot that is being read into or
//! whose layer is leased is never given to another layer; a slot with a request that the kernel has not returned is
//! quarantined and never used again; a layer with waiters is not evicted before they had it.

use super::layout::Layout;
use super::order::Order;
use crate::error::{Error, ErrorKind, Result};
use std::collections::VecDeque;
use std::sync::Arc;

/// Most leases one model may have out at a time, over all threads. A host needs one per thread; the limit turns a
/// host that never releases into an error instead of memory growth.
pub const LEASES_MAX: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Absent,
    Loading,
    Ready,
}

#[derive(Debug)]
struct FetchState {
    phase: Phase,
    slot: Option<u32>,
    done: Vec<u64>,
    outstanding: u32,
    lost: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Free,
    Holds(u32),
    Quarantined,
}

#[derive(Debug, Default)]
struct LayerState {
    leases: u32,
    waiters: u32,
    demanded: bool,
    error: Option<Error>,
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    thread: u64,
    layer: u32,
    count: u32,
}

/// What of a layer an acquire needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// All of it.
    Whole,
    /// Only these bytes of a shard.
    Bytes {
        /// Shard of the range.
        shard_index: u32,
        /// First byte.
        start_bytes: u64,
        /// One past the last byte.
        end_bytes: u64,
    },
}

/// A fetch that the stream shall start now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// Which fetch.
    pub fetch: u32,
    /// The slot its pages land in; `None` for resident pages.
    pub slot: Option<u32>,
    /// Somebody waits for it: its requests go before everything that is queued.
    pub urgent: bool,
}

/// How a fetch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// More requests are out.
    Pending,
    /// All bytes are in: publish it, then call [`State::published`].
    Complete,
    /// It failed; its layer's waiters have been told.
    Failed,
}

/// The engine's state; see the module's invariants.
#[derive(Debug)]
pub struct State {
    layout: Arc<Layout>,
    fetches: Vec<FetchState>,
    layers: Vec<LayerState>,
    layers_of_fetch: Vec<Vec<u32>>,
    slots: Vec<Slot>,
    leases: Vec<Lease>,
    demands: VecDeque<u32>,
    order: Order,
    /// The stream looked for work and found none: it wants to be woken when that may have changed.
    pub hungry: bool,
    /// Threads waiting on the condition variable.
    pub waiters: u32,
    /// Set when the stream can serve nobody any more.
    pub fatal: Option<Error>,
    /// Leases given. A thread that acquires more of a layer that it holds extends its lease; that is not counted again.
    pub acquires: u64,
    /// Leases that came back whole.
    pub releases: u64,
    /// Transient runs read to the end.
    pub loads: u64,
    /// Acquires that had to wait.
    pub stalls: u64,
    /// Time they waited.
    pub stall_ns: u64,
}

impl State {
    /// The state of a model of which nothing is in memory yet.
    #[must_use]
    pub fn new(layout: Arc<Layout>) -> Self {
        let mut layers_of_fetch = vec![Vec::new(); layout.fetches.len()];
        for (layer, fetches) in (0u32..).zip(&layout.of_layer) {
            for fetch in fetches {
                layers_of_fetch[*fetch as usize].push(layer);
            }
        }
        let fetches = layout.fetches.iter().map(|fetch| FetchState {
            phase: Phase::Absent,
            slot: None,
            done: vec![0; (fetch.request_count as usize).div_ceil(64)],
            outstanding: 0,
            lost: false,
        });
        Self {
            fetches: fetches.collect(),
            layers: layout
                .of_layer
                .iter()
                .map(|_| LayerState::default())
                .collect(),
            layers_of_fetch,
            slots: vec![Slot::Free; layout.slots_count as usize],
            leases: Vec::with_capacity(64),
            demands: VecDeque::with_capacity(layout.of_layer.len()),
            order: Order::new(layout.of_layer.len()),
            hungry: false,
            waiters: 0,
            fatal: None,
            acquires: 0,
            releases: 0,
            loads: 0,
            stalls: 0,
            stall_ns: 0,
            layout,
        }
    }

    /// Acquires that the learned order did not foresee.
    #[must_use]
    pub fn mispredicts(&self) -> u64 {
        self.order.mispredicts
    }

    // ---- leases ---------------------------------------------------------------------------------------------

    /// True when the bytes that `need` asks for are in memory.
    #[must_use]
    pub fn ready(&self, layer: u32, need: Need) -> bool {
        self.layout.of_layer[layer as usize].iter().all(|fetch| {
            let state = &self.fetches[*fetch as usize];
            match (state.phase, need) {
                (Phase::Ready, _) => true,
                (_, Need::Whole) => false,
                (
                    phase,
                    Need::Bytes {
                        shard_index,
                        start_bytes,
                        end_bytes,
                    },
                ) => {
                    let first = self.requests_touched(*fetch, shard_index, start_bytes, end_bytes);
                    first.is_empty()
                        || (phase == Phase::Loading
                            && first.into_iter().all(|r| bit(&state.done, r)))
                }
            }
        })
    }

    /// The requests of `fetch` that a byte range of a shard touches.
    fn requests_touched(
        &self,
        fetch: u32,
        shard_index: u32,
        start: u64,
        end: u64,
    ) -> std::ops::Range<u32> {
        let entry = &self.layout.fetches[fetch as usize];
        let base = entry.run.first_page * self.layout.page_bytes;
        if entry.run.shard_index != shard_index || end <= base || start >= base + entry.len_bytes {
            return 0..0;
        }
        let request_bytes = self.layout.request_bytes;
        let first = start.saturating_sub(base) / request_bytes;
        let last = (end.min(base + entry.len_bytes) - base).div_ceil(request_bytes);
        u32::try_from(first).unwrap_or(u32::MAX)..u32::try_from(last).unwrap_or(u32::MAX)
    }

    /// Gives `thread` a lease of a layer that is ready, or extends the one it has.
    ///
    /// # Errors
    /// `Busy` when the host has [`LEASES_MAX`] leases out.
    pub fn lease(&mut self, layer: u32, thread: u64) -> Result<()> {
        let held = self
            .leases
            .iter()
            .position(|lease| lease.thread == thread && lease.layer == layer);
        match held {
            Some(index) => self.leases[index].count += 1,
            None if self.leases.len() >= LEASES_MAX => {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("{LEASES_MAX} leases are out; release some first"),
                ));
            }
            None => self.leases.push(Lease {
                thread,
                layer,
                count: 1,
            }),
        }
        self.layers[layer as usize].leases += 1;
        if held.is_none() {
            self.acquires += 1;
            self.order.note(layer);
        }
        Ok(())
    }

    /// Takes a lease back: this thread's if it has one, else any (a lease may be released on another thread).
    ///
    /// # Errors
    /// `Invalid` when the layer is not leased.
    pub fn release(&mut self, layer: u32, thread: u64) -> Result<()> {
        let mine = self
            .leases
            .iter()
            .position(|lease| lease.layer == layer && lease.thread == thread);
        let Some(index) =
            mine.or_else(|| self.leases.iter().position(|lease| lease.layer == layer))
        else {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("layer {layer} is released but nobody acquired it"),
            ));
        };
        self.leases[index].count -= 1;
        if self.leases[index].count == 0 {
            self.leases.swap_remove(index);
            self.releases += 1;
        }
        self.layers[layer as usize].leases -= 1;
        Ok(())
    }

    /// True when waiting for `layer` could last for ever: every slot that could serve it is leased, and this thread
    /// holds one of them while it asks. (Somebody who holds nothing may wait; the holders will release.)
    #[must_use]
    pub fn would_deadlock(&self, layer: u32, thread: u64) -> bool {
        let Some(transient) = self.transient_fetch(layer) else {
            return false;
        };
        if self.fetches[transient as usize].phase != Phase::Absent {
            return false;
        }
        let holds = |layer: u32| {
            self.leases
                .iter()
                .any(|lease| lease.layer == layer && lease.thread == thread)
        };
        if self.kept_slot(layer).is_some() {
            return holds(layer);
        }
        let mut mine = false;
        for slot in self.candidate_slots(layer) {
            match self.slots[slot as usize] {
                Slot::Free => return false,
                Slot::Quarantined => {}
                Slot::Holds(fetch) => {
                    let holder = self.layers_of_fetch[fetch as usize][0];
                    if self.layers[holder as usize].leases == 0 {
                        return false;
                    }
                    mine |= holds(holder);
                }
            }
        }
        mine
    }

    /// Notes that somebody wants `layer`; `waiting` protects it from eviction until [`State::stop_waiting`].
    pub fn demand(&mut self, layer: u32, waiting: bool) {
        let state = &mut self.layers[layer as usize];
        state.waiters += u32::from(waiting);
        if !state.demanded {
            state.demanded = true;
            self.demands.push_back(layer);
        }
    }

    /// A waiter of `layer` has its lease, or has given up.
    pub fn stop_waiting(&mut self, layer: u32) {
        self.layers[layer as usize].waiters -= 1;
    }

    /// Takes the error that the last attempt to read `layer` left; the next demand tries again.
    pub fn take_error(&mut self, layer: u32) -> Option<Error> {
        self.layers[layer as usize].error.take()
    }

    /// The host says which layers come next.
    pub fn hint(&mut self, layers: &[u32]) {
        self.order.set_hint(layers);
    }

    // ---- what to read next ----------------------------------------------------------------------------------

    /// The next fetch to start: demanded layers first, then the layers to come. Marks it as loading.
    pub fn pick(&mut self) -> Option<Job> {
        self.order.look_ahead();
        for index in 0..self.demands.len() {
            let layer = self.demands[index];
            if let Some(job) = self.job_for(layer, 0, true) {
                return Some(job);
            }
        }
        let mut slots_left = true;
        for index in 0..self.layers.len() {
            let Some(layer) = self.order.upcoming(index) else {
                break;
            };
            // A layer that failed is tried again when somebody asks for it, not in a loop of our own.
            if self.layers[layer as usize].error.is_some() {
                continue;
            }
            let distance = self.order.distance(layer).saturating_add(1);
            if let Some(mut job) = self.job_for(layer, distance, slots_left) {
                job.urgent = false;
                return Some(job);
            }
            // Slots go to the nearest layer that wants one; resident pages further on can be read meanwhile.
            slots_left &= !self.transient_absent(layer);
        }
        None
    }

    fn job_for(&mut self, layer: u32, distance: u32, slots_allowed: bool) -> Option<Job> {
        for position in 0..self.layout.of_layer[layer as usize].len() {
            let fetch = self.layout.of_layer[layer as usize][position];
            if self.fetches[fetch as usize].phase != Phase::Absent {
                continue;
            }
            let transient = self.layout.fetches[fetch as usize].transient_of.is_some();
            let slot = match (transient, slots_allowed) {
                (false, _) => None,
                (true, false) => continue,
                (true, true) => match self.slot_for(layer, distance) {
                    Some(slot) => Some(slot),
                    None => continue,
                },
            };
            self.start(fetch, slot);
            return Some(Job {
                fetch,
                slot,
                urgent: true,
            });
        }
        None
    }

    /// Marks `fetch` as loading, and whatever its slot held as absent.
    fn start(&mut self, fetch: u32, slot: Option<u32>) {
        if let Some(slot) = slot {
            if let Slot::Holds(old) = self.slots[slot as usize] {
                let old = &mut self.fetches[old as usize];
                old.phase = Phase::Absent;
                old.slot = None;
            }
            self.slots[slot as usize] = Slot::Holds(fetch);
        }
        let state = &mut self.fetches[fetch as usize];
        state.phase = Phase::Loading;
        state.slot = slot;
        state.done.fill(0);
        state.lost = false;
        state.outstanding = self.layout.fetches[fetch as usize].request_count;
    }

    /// The slot that a failed attempt left at this layer's place, else one that nobody needs, else the one whose layer is
    /// due last, if that is later than `distance`.
    fn slot_for(&self, layer: u32, distance: u32) -> Option<u32> {
        if let Some(kept) = self.kept_slot(layer) {
            return (self.layers[layer as usize].leases == 0).then_some(kept);
        }
        let mut best: Option<(u32, u32)> = None;
        for slot in self.candidate_slots(layer) {
            match self.slots[slot as usize] {
                Slot::Free => return Some(slot),
                Slot::Quarantined => {}
                Slot::Holds(fetch) => {
                    let holder = self.layers_of_fetch[fetch as usize][0];
                    let (phase, state) = (
                        self.fetches[fetch as usize].phase,
                        &self.layers[holder as usize],
                    );
                    let due = self.order.distance(holder).saturating_add(1);
                    if phase == Phase::Loading || state.leases > 0 {
                        continue;
                    }
                    if phase == Phase::Absent {
                        return Some(slot);
                    }
                    if state.waiters == 0
                        && due > distance
                        && best.is_none_or(|(_, latest)| due > latest)
                    {
                        best = Some((slot, due));
                    }
                }
            }
        }
        best.map(|(slot, _)| slot)
    }

    /// The slot that still lies at the place of a layer whose last read failed.
    fn kept_slot(&self, layer: u32) -> Option<u32> {
        self.fetches[self.transient_fetch(layer)? as usize].slot
    }

    /// True when no slot is left that could ever serve `layer`: those it may use are quarantined.
    #[must_use]
    pub fn unservable(&self, layer: u32) -> bool {
        self.transient_absent(layer)
            && self
                .candidate_slots(layer)
                .all(|slot| self.slots[slot as usize] == Slot::Quarantined)
    }

    fn candidate_slots(&self, layer: u32) -> std::ops::Range<u32> {
        match self.layout.fixed_slot[layer as usize] {
            Some(slot) => slot..slot + 1,
            None => 0..self.layout.slots_count,
        }
    }

    fn transient_fetch(&self, layer: u32) -> Option<u32> {
        let last = *self.layout.of_layer[layer as usize].last()?;
        self.layout.fetches[last as usize]
            .transient_of
            .map(|_| last)
    }

    fn transient_absent(&self, layer: u32) -> bool {
        self.transient_fetch(layer)
            .is_some_and(|fetch| self.fetches[fetch as usize].phase == Phase::Absent)
    }

    // ---- completions ----------------------------------------------------------------------------------------

    /// A request of `fetch` has come back. `Err` fails the fetch; `returned = false` means that the kernel may still
    /// write into the memory, so its slot is never used again.
    pub fn completed(
        &mut self,
        fetch: u32,
        request: u32,
        result: Result<()>,
        returned: bool,
    ) -> Outcome {
        let state = &mut self.fetches[fetch as usize];
        debug_assert!(
            state.outstanding > 0,
            "fetch {fetch} has a completion too many"
        );
        state.outstanding -= 1;
        match result {
            Ok(()) => set_bit(&mut state.done, request),
            Err(error) => {
                state.lost |= !returned;
                for layer in &self.layers_of_fetch[fetch as usize] {
                    self.layers[*layer as usize]
                        .error
                        .get_or_insert_with(|| error.clone());
                }
            }
        }
        let state = &self.fetches[fetch as usize];
        if state.outstanding > 0 {
            return Outcome::Pending;
        }
        let requests = self.layout.fetches[fetch as usize].request_count;
        if (0..requests).all(|request| bit(&state.done, request)) {
            return Outcome::Complete;
        }
        self.abandon(fetch);
        Outcome::Failed
    }

    /// Requests of a failed fetch that were never submitted will not come back: count them off.
    pub fn withdraw(&mut self, fetch: u32, count: u32) -> Outcome {
        let state = &mut self.fetches[fetch as usize];
        state.outstanding -= count;
        if state.outstanding > 0 {
            return Outcome::Pending;
        }
        self.abandon(fetch);
        Outcome::Failed
    }

    /// The fetch could not even start (its slot could not be moved): its layers get the error.
    pub fn failed_to_start(&mut self, fetch: u32, error: &Error) {
        for layer in &self.layers_of_fetch[fetch as usize] {
            self.layers[*layer as usize]
                .error
                .get_or_insert_with(|| error.clone());
        }
        self.fetches[fetch as usize].outstanding = 0;
        self.abandon(fetch);
    }

    fn abandon(&mut self, fetch: u32) {
        // The slot's pages stay where they are until somebody else gets them: part of the layer may be leased (a range
        // that had arrived), and another attempt at this layer finds its place taken by its own slot only.
        let state = &mut self.fetches[fetch as usize];
        state.phase = Phase::Absent;
        if state.lost
            && let Some(slot) = state.slot.take()
        {
            self.slots[slot as usize] = Slot::Quarantined;
        }
        for index in 0..self.layers_of_fetch[fetch as usize].len() {
            let layer = self.layers_of_fetch[fetch as usize][index];
            self.forget_demand(layer);
        }
        let usable = self
            .slots
            .iter()
            .filter(|slot| **slot != Slot::Quarantined)
            .count();
        if usable == 0 && !self.slots.is_empty() && self.fatal.is_none() {
            self.fatal = Some(Error::new(
                ErrorKind::Io,
                "every slot is quarantined: the drive has not given back the reads into them; close the model and look at the drive",
            ));
        }
    }

    /// The bytes of a complete fetch are readable by the host now.
    pub fn published(&mut self, fetch: u32) {
        self.fetches[fetch as usize].phase = Phase::Ready;
        self.loads += u64::from(self.layout.fetches[fetch as usize].transient_of.is_some());
        for index in 0..self.layers_of_fetch[fetch as usize].len() {
            let layer = self.layers_of_fetch[fetch as usize][index];
            if self.ready(layer, Need::Whole) {
                self.forget_demand(layer);
            }
        }
    }

    /// The slot that `fetch` is read into or lies in.
    #[must_use]
    pub fn slot_of(&self, fetch: u32) -> Option<u32> {
        self.fetches[fetch as usize].slot
    }

    fn forget_demand(&mut self, layer: u32) {
        if std::mem::take(&mut self.layers[layer as usize].demanded) {
            self.demands.retain(|demanded| *demanded != layer);
        }
    }
}

fn bit(words: &[u64], index: u32) -> bool {
    words[index as usize / 64] >> (index % 64) & 1 == 1
}

fn set_bit(words: &mut [u64], index: u32) {
    words[index as usize / 64] |= 1 << (index % 64);
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
