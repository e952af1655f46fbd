//! What to read next: demanded layers first, then the layers to come; and whose slot they may have.
//!
//! With one host in this process the learned order decides. With clients of a daemon their orders are merged: a layer is
//! as near as it is to the client that needs it first. A client that is ahead waits for one that is a ring's distance
//! behind, so that both are served by one read; a budget of waiting time sees to it that a slow client costs the others
//! a tenth of their time at most.

use super::board::Board;
use super::state::{Job, Phase, Slot, State};
use crate::error::ErrorKind;
use std::time::{Duration, Instant};

/// Share of time, as a divisor, that clients may wait for one another.
const COURTESY_SHARE: u32 = 10;
/// Most that is saved up.
const COURTESY_MOST: Duration = Duration::from_millis(100);
/// How often a stream that waits out of courtesy looks again.
const COURTESY_LOOK: Duration = Duration::from_millis(2);
/// A layer that somebody waited for is kept this long for him to take it.
const TAKE_UP: Duration = Duration::from_millis(20);
/// Layers to come whose own reads go before those of experts that will be leased.
const NEAR_LAYERS: usize = 2;
/// A layer whose slot others want is not given to new holders after this long.
const CLOSING: Duration = Duration::from_millis(100);

/// Time that clients may wait for one another.
#[derive(Debug)]
pub(super) struct Courtesy {
    saved: Duration,
    updated: Instant,
    since: Option<Instant>,
    /// Whether the present choice waits.
    pub(super) waits: bool,
}

impl Courtesy {
    pub(super) fn new() -> Self {
        Self {
            saved: COURTESY_MOST,
            updated: Instant::now(),
            since: None,
            waits: false,
        }
    }

    fn begin(&mut self, now: Instant) {
        self.waits = false;
        if self.since.is_none() {
            let earned = now.duration_since(self.updated) / COURTESY_SHARE;
            self.saved = (self.saved + earned).min(COURTESY_MOST);
        }
        self.updated = now;
    }

    /// True as long as there is time left to wait.
    fn wait(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        self.waits = now.duration_since(since) < self.saved;
        self.waits
    }

    /// Books the time waited once nobody is waited for.
    fn end(&mut self, now: Instant) {
        if self.waits {
            return;
        }
        if let Some(since) = self.since.take() {
            self.saved = self.saved.saturating_sub(now.duration_since(since));
        }
    }
}

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
        self.picks += 1;
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
        if board.is_some() {
            self.courtesy.end(Instant::now());
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
        self.forget_past_contention();
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
        let mut wanted = std::mem::take(&mut self.wanted);
        wanted.clear();
        let layers = &self.layers;
        board.listen(
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
        let anybody = clients.iter().any(|client| client.active(now));
        for client in clients
            .iter()
            .filter(|client| client.active(now) || !anybody)
        {
            self.foresight.merge(|layer| client.order.distance(layer));
        }
        if clients.is_empty() {
            self.foresight.merge(|layer| layer);
        }
        self.foresight.sort();
    }

    /// Layers whose slots nobody wants any more are open to new holders again.
    fn forget_past_contention(&mut self) {
        if self.board.is_none() {
            return;
        }
        for layer in 0..self.layers.len() as u32 {
            let state = &mut self.layers[layer as usize];
            if state.contended.is_some_and(|(_, pick)| pick != self.picks) {
                state.contended = None;
                state.closing = false;
                self.show(layer);
            }
        }
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
                evicted_state.contended = None;
                evicted_state.closing = false;
                self.show(evicted);
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
    fn slot_for(&mut self, layer: u32, distance: u32) -> Option<u32> {
        if let Some(kept) = self.kept_slot(layer) {
            return self.nobody_holds(layer, distance).then_some(kept);
        }
        let mut best: Option<(u32, u32, u32)> = None;
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
                    let due = match self.is_expected(holder) {
                        true => 1, // Only a layer that somebody asks for now comes before it.
                        false => self.foresight.distance(holder).saturating_add(1),
                    };
                    if phase == Phase::Loading || state.leases > 0 {
                        continue;
                    }
                    if phase == Phase::Absent {
                        if self.nobody_holds(holder, distance) {
                            return Some(slot);
                        }
                        continue;
                    }
                    if state.waiters == 0
                        && due > distance
                        && best.is_none_or(|(_, latest, _)| due > latest)
                    {
                        best = Some((slot, due, holder));
                    }
                }
            }
        }
        let (slot, _, holder) = best?;
        (!self.spared(holder, distance) && self.nobody_holds(holder, distance)).then_some(slot)
    }

    /// True when a client of the daemon should have `layer` before its slot goes to a layer that is demanded now.
    fn spared(&mut self, layer: u32, distance: u32) -> bool {
        let Some(board) = self.board.clone() else {
            return false;
        };
        let now = Instant::now();
        let fresh = self.layers[layer as usize]
            .ready_since
            .is_some_and(|since| now.duration_since(since) < TAKE_UP);
        if fresh && board.awaited(layer) {
            self.courtesy.waits |= distance == 0;
            return true;
        }
        if distance > 0 {
            return false;
        }
        // Somebody who will want it within the ring, and is not himself waiting for a slot, comes by soon.
        let reach = self.layout.slots_count;
        let near = board.clients().iter().any(|client| {
            client.active(now) && !client.waits() && client.order.distance(layer) < reach
        });
        near && self.courtesy.wait(now)
    }

    /// Takes a layer off the board and looks whether any client holds it; if so, it stands there again. `distance` 0 is a
    /// demand: then the holder is in the way, and it is noted since when.
    fn nobody_holds(&mut self, layer: u32, distance: u32) -> bool {
        if self.layers[layer as usize].leases > 0 {
            return false;
        }
        let Some(board) = self.board.clone() else {
            return true;
        };
        if !board.held(layer) {
            board.show(layer, 0, 0);
            if !board.held(layer) {
                return true;
            }
            self.show(layer);
        }
        if distance == 0 {
            let now = Instant::now();
            let contended = &mut self.layers[layer as usize].contended;
            let since = contended.map_or(now, |(since, _)| since);
            *contended = Some((since, self.picks));
            if now.duration_since(since) > CLOSING {
                self.layers[layer as usize].closing = true;
                self.show(layer);
            }
        }
        false
    }

    /// Layers that clients have held for longer than `timeout` while others wait for their slots.
    #[must_use]
    pub fn overdue(&self, timeout: Duration) -> Vec<u32> {
        let now = Instant::now();
        let overdue = |state: &super::state::LayerState| {
            state
                .contended
                .is_some_and(|(since, _)| now.duration_since(since) > timeout)
        };
        (0u32..)
            .zip(&self.layers)
            .filter(|(_, state)| overdue(state))
            .map(|(layer, _)| layer)
            .collect()
    }

    /// How long the stream may sleep although it found nothing to do: for as long as somebody is waited for out of
    /// courtesy; `None` = until it is woken.
    #[must_use]
    pub fn look_again(&self) -> Option<Duration> {
        let contended = self.layers.iter().any(|layer| layer.contended.is_some());
        if self.courtesy.waits {
            Some(COURTESY_LOOK)
        } else {
            contended.then_some(CLOSING)
        }
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

    pub(super) fn candidate_slots(&self, layer: u32) -> std::ops::Range<u32> {
        match self.layout.fixed_slot[layer as usize] {
            Some(slot) => slot..slot + 1,
            None => 0..self.layout.slots_count,
        }
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
