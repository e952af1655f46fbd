//! What to read next: demanded layers first, then the layers to come.
//!
//! With one host in this process the learned order decides. With clients of a daemon their orders are merged: a layer is
//! as near as it is to the client that needs it first. Only who gets on has a say: whoever stands still, or asks for what
//! he has just had, steers nobody's reads.

use super::board::Board;
use super::state::{Job, Phase, Slot, State};
use crate::error::ErrorKind;
use std::time::Instant;

/// Layers to come whose own reads go before those of experts that will be leased.
const NEAR_LAYERS: usize = 2;

/// The layers to come, and how far off each is.
#[derive(Debug)]
pub(super) struct Foresight {
    distance: Vec<u32>,
    upcoming: Vec<u32>,
}

impl Foresight {
    pub(super) fn new(layer_count: usize) -> Self {
        Self {
            distance: vec![u32::MAX; layer_count],
            upcoming: Vec::with_capacity(layer_count),
        }
    }

    pub(super) fn distance(&self, layer: u32) -> u32 {
        self.distance[layer as usize]
    }

    fn upcoming(&self, index: usize) -> Option<u32> {
        self.upcoming.get(index).copied()
    }

    fn clear(&mut self) {
        self.distance.fill(u32::MAX);
        self.upcoming.clear();
    }

    fn merge(&mut self, distance_of: impl Fn(u32) -> u32) {
        for (layer, distance) in (0u32..).zip(&mut self.distance) {
            *distance = (*distance).min(distance_of(layer));
        }
    }

    fn sort(&mut self) {
        let known = self.distance.iter().enumerate();
        let known = known.filter(|(_, distance)| **distance != u32::MAX);
        self.upcoming.extend(known.map(|(layer, _)| layer as u32));
        self.upcoming
            .sort_unstable_by_key(|layer| self.distance[*layer as usize]);
    }
}

impl State {
    /// The next fetch to start: demanded layers first, then the layers to come. Marks it as loading.
    pub fn pick(&mut self) -> Option<Job> {
        // Beside a cache of experts there is no ring: once the rest is there, only they come and go.
        if self.experts.is_some() && self.residents_left == 0 {
            return self.pick_unit().or_else(|| self.pick_wish());
        }
        let board = self.board.clone();
        match board.as_deref() {
            None => {
                self.order.look_ahead();
                let order = &self.order;
                self.foresight.clear();
                self.foresight.merge(|layer| order.distance(layer));
                self.foresight.sort();
            }
            Some(board) => self.listen(board),
        }
        let job = self.choose();
        if let Some(board) = board.as_deref() {
            let now = Instant::now();
            self.courtesy.end(now);
            self.look_at_contention(board, now);
        }
        job
    }

    fn choose(&mut self) -> Option<Job> {
        if self.experts.is_some()
            && let Some(job) = self.pick_unit()
        {
            return Some(job);
        }
        for index in 0..self.demands.len() {
            let layer = self.demands[index];
            if let Some(job) = self.job_for(layer, 0, true) {
                return Some(job);
            }
        }
        if self.draining {
            return None;
        }
        let mut slots_left = true;
        for index in 0..self.layers.len() {
            if index == NEAR_LAYERS
                && let Some(job) = self.pick_wish()
            {
                return Some(job);
            }
            let Some(layer) = self.foresight.upcoming(index) else {
                break;
            };
            // A layer that failed is tried again when somebody asks for it, not in a loop of our own.
            if self.layers[layer as usize].error.is_some() {
                continue;
            }
            let distance = self.foresight.distance(layer).saturating_add(1);
            if let Some(mut job) = self.job_for(layer, distance, slots_left) {
                job.urgent = false;
                return Some(job);
            }
            // Slots go to the nearest layer that wants one; resident pages further on can be read meanwhile.
            slots_left &= !self.transient_absent(layer);
        }
        self.pick_wish()
    }

    /// Hears what the clients of the daemon want, and merges their orders.
    fn listen(&mut self, board: &Board) {
        let now = Instant::now();
        self.courtesy.begin(now);
        board.set_pass(self.pass_loads());
        let mut wanted = std::mem::take(&mut self.wanted);
        wanted.clear();
        let layers = &self.layers;
        self.puts_off = board.listen(
            now,
            |layer| layers[layer as usize].error.is_some(),
            &mut wanted,
        );
        for layer in &wanted {
            if !self.ready(*layer, super::state::Need::Whole)
                && !self.layers[*layer as usize].demanded
            {
                self.stalls += 1;
                self.layers[*layer as usize].wanted_since.get_or_insert(now);
                drop(self.take_error(*layer));
                self.show(*layer);
                self.demand(*layer, false);
            }
        }
        self.wanted = wanted;
        self.foresight.clear();
        let clients = board.clients();
        let anybody = clients.iter().any(|client| client.advances(now));
        for client in clients.iter() {
            let steers = !anybody || client.advances(now);
            let stays = client.stays(now).filter(|_| !anybody);
            let distance = |layer| match stays == Some(layer) {
                true => 0,
                false => client.distance(layer, steers, board.loads()),
            };
            self.foresight.merge(distance);
        }
        if clients.is_empty() {
            self.foresight.merge(|layer| layer);
        }
        self.foresight.sort();
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
                let state = &mut self.fetches[old as usize];
                state.phase = Phase::Absent;
                state.slot = None;
                let evicted = self.layers_of_fetch[old as usize][0];
                let evicted_state = &mut self.layers[evicted as usize];
                evicted_state.contention = None;
                evicted_state.closing = false;
                self.show(evicted);
            }
            self.slots[slot as usize] = Slot::Holds(fetch);
            self.note_load(fetch, slot);
        }
        let state = &mut self.fetches[fetch as usize];
        state.phase = Phase::Loading;
        state.slot = slot;
        state.done.fill(0);
        state.lost = false;
        state.outstanding = self.layout.fetches[fetch as usize].request_count;
    }

    /// The slot that still lies at the place of a layer whose last read failed.
    pub(super) fn kept_slot(&self, layer: u32) -> Option<u32> {
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

    pub(super) fn transient_fetch(&self, layer: u32) -> Option<u32> {
        let last = *self.layout.of_layer[layer as usize].last()?;
        self.layout.fetches[last as usize]
            .transient_of
            .map(|_| last)
    }

    fn transient_absent(&self, layer: u32) -> bool {
        self.transient_fetch(layer)
            .is_some_and(|fetch| self.fetches[fetch as usize].phase == Phase::Absent)
    }

    /// The text of the last failed read of a layer.
    #[must_use]
    pub fn failure(&self, layer: u32) -> Option<crate::error::Error> {
        let state = self.layers.get(layer as usize)?;
        let fatal = self
            .fatal
            .clone()
            .filter(|e| e.kind() != ErrorKind::Canceled);
        state
            .error
            .clone()
            .or_else(|| state.past_error.clone())
            .or(fatal)
    }
}
