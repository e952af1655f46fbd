//! Who holds what: the state of every layer, fetch and slot, and the choice of what to read next.
//!
//! Pure bookkeeping under one mutex; no system call is made in here. Invariants: a slot that is being read into or
//! whose layer is leased is never given to another layer; a slot with a request that the kernel has not returned is
//! quarantined and never used again; a layer with waiters is not evicted before they had it.

use super::board::{self, Board};
use super::contention::{Contention, Courtesy, loads_per_pass};
use super::experts::Experts;
use super::layout::Layout;
use super::leases::Leases;
use super::order::Order;
use super::pick::Foresight;
use super::stats::{STALL_BOUNDS_NS, SlotCounts};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::PolicyKind;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Absent,
    Loading,
    Ready,
}

#[derive(Debug)]
pub(super) struct FetchState {
    pub(super) phase: Phase,
    pub(super) slot: Option<u32>,
    pub(super) done: Vec<u64>,
    pub(super) outstanding: u32,
    pub(super) lost: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slot {
    Free,
    Holds(u32),
    Quarantined,
}

#[derive(Debug, Default)]
pub(super) struct LayerState {
    pub(super) leases: u32,
    pub(super) waiters: u32,
    pub(super) demanded: bool,
    /// A host tried to get it and will come back for it: how many leases there had been then.
    pub(super) tried_at: Option<u64>,
    /// Since when a client of the daemon waits for it.
    pub(super) wanted_since: Option<Instant>,
    pub(super) error: Option<Error>,
    /// What the error before that was: a client of the daemon asks for its text after the next attempt has begun.
    pub(super) past_error: Option<Error>,
    /// Clients of the daemon hold it while others want its slot.
    pub(super) contention: Option<Contention>,
    /// No client gets it any more: the slot is wanted.
    pub(super) closing: bool,
    /// When its last byte arrived.
    pub(super) ready_since: Option<Instant>,
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
    pub(super) layout: Arc<Layout>,
    pub(super) fetches: Vec<FetchState>,
    pub(super) layers: Vec<LayerState>,
    pub(super) layers_of_fetch: Vec<Vec<u32>>,
    /// The ring's, then those of experts.
    pub(super) slots: Vec<Slot>,
    /// The cache of experts, where the plan has one.
    pub(super) experts: Option<Experts>,
    /// Fetches of resident pages that are still to be read.
    pub(super) residents_left: u32,
    leases: Leases,
    pub(super) demands: VecDeque<u32>,
    pub(super) order: Order,
    pub(super) foresight: Foresight,
    /// What clients of the daemon see of this state, and say; `None` for a host in this process.
    pub(super) board: Option<Arc<Board>>,
    pub(super) courtesy: Courtesy,
    pub(super) wanted: Vec<u32>,
    /// Somebody's wait is put off for the others' sake.
    pub(super) puts_off: bool,
    /// Layers that are read in every pass.
    pub(super) loads_per_pass: u64,
    /// A new plan is being made: nothing is read ahead.
    pub draining: bool,
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
    /// How many of them waited how long; see [`STALL_BOUNDS_NS`].
    pub stall_counts: [u64; STALL_BOUNDS_NS.len() + 1],
}

impl State {
    /// The state of a model of which nothing is in memory yet.
    #[must_use]
    pub fn new(layout: Arc<Layout>, board: Option<Arc<Board>>) -> Self {
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
            slots: vec![Slot::Free; layout.all_slots_count() as usize],
            experts: Experts::new(&layout, PolicyKind::default()),
            residents_left: layout.residents_count(),
            leases: Leases::default(),
            demands: VecDeque::with_capacity(layout.of_layer.len()),
            order: Order::new(layout.of_layer.len()),
            foresight: Foresight::new(layout.of_layer.len()),
            board,
            courtesy: Courtesy::new(),
            wanted: Vec::with_capacity(layout.of_layer.len()),
            puts_off: false,
            loads_per_pass: loads_per_pass(&layout),
            draining: false,
            hungry: false,
            waiters: 0,
            fatal: None,
            acquires: 0,
            releases: 0,
            loads: 0,
            stalls: 0,
            stall_ns: 0,
            stall_counts: [0; STALL_BOUNDS_NS.len() + 1],
            layout,
        }
    }

    /// Acquires that the learned order did not foresee.
    #[must_use]
    pub fn mispredicts(&self) -> u64 {
        match &self.board {
            None => self.order.mispredicts,
            Some(board) => {
                let clients = board.clients();
                clients.iter().map(|client| client.order.mispredicts).sum()
            }
        }
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

    /// Gives `thread` a lease of a layer that is ready, or extends the one it has. True for a new one.
    ///
    /// # Errors
    /// `Busy` when the host has [`super::LEASES_MAX`] leases out.
    pub fn lease(&mut self, layer: u32, thread: u64) -> Result<bool> {
        let new = self.leases.add(layer, thread)?;
        self.layers[layer as usize].leases += 1;
        // Also when it is extended: whoever has a part of a layer tries for the next one.
        self.layers[layer as usize].tried_at = None;
        if new {
            self.acquires += 1;
            self.order.note(layer);
        }
        Ok(new)
    }

    /// Takes a lease back: this thread's if it has one, else any (a lease may be released on another thread). True when
    /// all of it has come back.
    ///
    /// # Errors
    /// `Invalid` when the layer is not leased.
    pub fn release(&mut self, layer: u32, thread: u64) -> Result<bool> {
        let last = self.leases.remove(layer, thread)?;
        self.releases += u64::from(last);
        self.layers[layer as usize].leases -= 1;
        if last {
            self.layers[layer as usize].tried_at = None;
        }
        Ok(last)
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
        let holds = |layer: u32| self.leases.holds(layer, thread);
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
                self.note_unit_error(fetch, &error);
            }
        }
        let state = &self.fetches[fetch as usize];
        if state.outstanding > 0 {
            self.show_arrivals(fetch);
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
        self.note_unit_error(fetch, error);
        self.fetches[fetch as usize].outstanding = 0;
        self.abandon(fetch);
    }

    fn abandon(&mut self, fetch: u32) {
        // The slot's pages stay where they are until somebody else gets them: part of the layer may be leased (a range
        // that had arrived), and another attempt at this layer finds its place taken by its own slot only.
        let state = &mut self.fetches[fetch as usize];
        state.phase = Phase::Absent;
        let lost = state.lost;
        if lost && let Some(slot) = state.slot.take() {
            self.slots[slot as usize] = Slot::Quarantined;
        }
        self.unit_settled(fetch, lost);
        for index in 0..self.layers_of_fetch[fetch as usize].len() {
            let layer = self.layers_of_fetch[fetch as usize][index];
            self.forget_demand(layer);
            self.show(layer);
            if let Some(board) = &self.board {
                board.answer_failure(layer);
            }
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
        self.unit_settled(fetch, false);
        self.residents_left -= u32::from(self.layout.is_resident(fetch));
        self.loads += u64::from(self.fetches[fetch as usize].slot.is_some());
        if let (Some(board), Some(layer)) = (
            &self.board,
            self.layout.fetches[fetch as usize].transient_of,
        ) {
            board.give(layer);
        }
        for index in 0..self.layers_of_fetch[fetch as usize].len() {
            let layer = self.layers_of_fetch[fetch as usize][index];
            if self.ready(layer, Need::Whole) {
                self.forget_demand(layer);
                let state = &mut self.layers[layer as usize];
                state.closing = false;
                state.ready_since = self.board.as_ref().map(|_| Instant::now());
                if let Some(since) = state.wanted_since.take() {
                    self.count_stall(since);
                }
            }
            self.show(layer);
        }
    }

    /// A wait that began at `since` is over.
    pub(super) fn count_stall(&mut self, since: Instant) {
        let waited_ns = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.stall_ns = self.stall_ns.saturating_add(waited_ns);
        let place = STALL_BOUNDS_NS.partition_point(|bound| *bound < waited_ns);
        self.stall_counts[place] += 1;
    }

    /// Whether everything that stays in memory is there.
    #[must_use]
    #[cfg(feature = "cuda")]
    pub fn residents_are_ready(&self) -> bool {
        let fetches = self.layout.fetches.iter().zip(&self.fetches);
        fetches
            .filter(|(fetch, _)| fetch.transient_of.is_none())
            .all(|(_, state)| state.phase == Phase::Ready)
    }

    /// How many slots are in which state.
    #[must_use]
    pub fn slot_counts(&self) -> SlotCounts {
        let mut counts = SlotCounts::default();
        for slot in &self.slots {
            match slot {
                Slot::Free => counts.free += 1,
                Slot::Holds(_) => counts.used += 1,
                Slot::Quarantined => counts.quarantined += 1,
            }
        }
        counts
    }

    // ---- what clients of the daemon see ---------------------------------------------------------------------

    /// Shows a layer's state on the board, where there is one.
    pub(super) fn show(&self, layer: u32) {
        let Some(board) = &self.board else { return };
        let mut flags = 0;
        let state = &self.layers[layer as usize];
        if !state.closing {
            let fetches = &self.layout.of_layer[layer as usize];
            let resident = fetches.iter().all(|fetch| {
                let absent = self.fetches[*fetch as usize].phase != Phase::Ready;
                !absent || self.layout.fetches[*fetch as usize].transient_of.is_some()
            });
            flags |= if resident { board::RESIDENT } else { 0 };
            flags |= if self.ready(layer, Need::Whole) {
                board::READY
            } else {
                0
            };
        }
        flags |= if state.error.is_some() || self.fatal.is_some() {
            board::FAILED
        } else {
            0
        };
        board.show(layer, flags, self.arrived_pages(layer));
    }

    /// Shows every layer anew.
    pub fn show_all(&self) {
        for layer in 0..self.layers.len() as u32 {
            self.show(layer);
        }
    }

    fn show_arrivals(&self, fetch: u32) {
        if self.board.is_some()
            && let Some(layer) = self.layout.fetches[fetch as usize].transient_of
        {
            self.show(layer);
        }
    }

    /// Pages of the layer's transient run that are in memory, counted from its first.
    fn arrived_pages(&self, layer: u32) -> u32 {
        let Some(fetch) = self.transient_fetch(layer) else {
            return 0;
        };
        let (state, entry) = (
            &self.fetches[fetch as usize],
            &self.layout.fetches[fetch as usize],
        );
        if state.phase == Phase::Absent || self.layers[layer as usize].closing {
            return 0;
        }
        let missing = (0..entry.request_count).find(|request| !bit(&state.done, *request));
        let bytes = missing.map_or(entry.len_bytes, |request| {
            u64::from(request) * self.layout.request_bytes
        });
        u32::try_from(bytes / self.layout.page_bytes).unwrap_or(u32::MAX)
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
pub(super) mod tests;
