//! Whose slot a layer may have, and what becomes of a slot that somebody keeps.
//!
//! A client of the daemon that is ahead waits for one that is a ring's distance behind, so that both are served by one
//! read; a budget of waiting time sees to it that a slow client costs the others a tenth of their time at most. A slot
//! that clients hold while others want it is *contended*: first nobody new gets its layer, so that those who come and go
//! give it up; what is held all the same is *stuck*. As long as any slot is, the layers are read into whatever slot there
//! is (each has a slot of its own in the shared backing): who never releases shortens the ring for the others and does
//! not stop them. His lease is taken back in the end; see [`State::overdue`].
//! Place in `file -> catalog -> plan -> reader -> pool -> **lease** -> host`.

use super::board::Board;
use super::layout::Layout;
use super::state::{Phase, Slot, State};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Share of time, as a divisor, that clients may wait for one another.
const COURTESY_SHARE: u32 = 10;
/// Most that is saved up.
const COURTESY_MOST: Duration = Duration::from_millis(100);
/// How often a stream that waits out of courtesy looks again.
const COURTESY_LOOK: Duration = Duration::from_millis(2);
/// A layer that somebody waited for is kept this long for him to take it.
const TAKE_UP: Duration = Duration::from_millis(20);
/// A layer whose slot others want is not given to new holders after this long; at once, if none of its holders gets on.
const CLOSING: Duration = Duration::from_millis(100);
/// Who still holds it this long after that has held it all the time.
const STUCK: Duration = Duration::from_millis(50);
/// A slot that nobody wanted in vain for this long is not contended any more.
const FORGET: Duration = Duration::from_millis(30);
/// The same for a stuck one, whose layers the others get elsewhere: a slow pass comes by seldom.
const FORGET_STUCK: Duration = Duration::from_secs(10);
/// How often a stream that waits for a contended slot looks again; nearly half of [`FORGET`].
const CONTENTION_LOOK: Duration = Duration::from_millis(12);

/// A layer that clients hold while others want its slot.
#[derive(Debug)]
pub(super) struct Contention {
    since: Instant,
    /// When somebody last wanted the slot.
    wanted: Instant,
    /// Since when nobody new gets the layer.
    closed: Option<Instant>,
    /// Who held it all the time since then; empty as long as that is not known.
    stuck: Vec<u64>,
}

/// Time that clients may wait for one another.
#[derive(Debug)]
pub(super) struct Courtesy {
    saved: Duration,
    updated: Instant,
    since: Option<Instant>,
    /// Whether the present choice waits.
    waits: bool,
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

    pub(super) fn begin(&mut self, now: Instant) {
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
    pub(super) fn end(&mut self, now: Instant) {
        if self.waits {
            return;
        }
        if let Some(since) = self.since.take() {
            self.saved = self.saved.saturating_sub(now.duration_since(since));
        }
    }
}

/// How many layers are read in every pass, once the rest is in memory: those that share their slot with another.
pub(super) fn loads_per_pass(layout: &Layout) -> u64 {
    let mut layers_of_slot = vec![0u64; layout.slots_count as usize];
    let runs = layout.fetches.iter().filter_map(|fetch| fetch.transient_of);
    for slot in runs.filter_map(|layer| layout.fixed_slot[layer as usize]) {
        layers_of_slot[slot as usize] += 1;
    }
    layers_of_slot.iter().filter(|count| **count > 1).sum()
}

/// A slot that a layer might have.
struct Candidate {
    slot: u32,
    /// The layer that has it, if any.
    holder: Option<u32>,
    /// Its bytes are there, and somebody may come for them.
    ready: bool,
}

impl State {
    /// The slot that a failed attempt left at this layer's place, else one that nobody needs, else the one whose layer is
    /// due last, if that is later than `distance`.
    pub(super) fn slot_for(&mut self, layer: u32, distance: u32) -> Option<u32> {
        if let Some(kept) = self.kept_slot(layer) {
            return self.nobody_holds(layer, distance).then_some(kept);
        }
        let own = self.candidate_slots(layer);
        let mut others = 0..0;
        if self.stuck_count() > 0 {
            self.want_own_slot(layer, Instant::now());
            others = 0..self.layout.slots_count;
        }
        let mut tried = 0u64;
        loop {
            let slots = own.clone().chain(others.clone());
            let best = self.best_slot(slots, distance, tried)?;
            let Some(holder) = best.holder else {
                return Some(best.slot);
            };
            let spared = best.ready && self.spared(holder, distance);
            if !spared && self.nobody_holds(holder, distance) {
                return Some(best.slot);
            }
            tried |= 1u64.checked_shl(best.slot)?;
        }
    }

    fn best_slot(
        &self,
        slots: impl Iterator<Item = u32>,
        distance: u32,
        tried: u64,
    ) -> Option<Candidate> {
        let is_tried = |slot: u32| tried.checked_shr(slot).is_some_and(|bits| bits & 1 == 1);
        let mut best: Option<(u32, Candidate)> = None;
        for slot in slots.filter(|slot| !is_tried(*slot)) {
            let fetch = match self.slots[slot as usize] {
                Slot::Quarantined => continue,
                Slot::Holds(fetch) => fetch,
                Slot::Free => {
                    return Some(Candidate {
                        slot,
                        holder: None,
                        ready: false,
                    });
                }
            };
            let holder = self.layers_of_fetch[fetch as usize][0];
            let phase = self.fetches[fetch as usize].phase;
            let state = &self.layers[holder as usize];
            if phase == Phase::Loading || state.leases > 0 || self.is_stuck(holder) {
                continue;
            }
            let candidate = Candidate {
                slot,
                holder: Some(holder),
                ready: phase == Phase::Ready,
            };
            if phase == Phase::Absent {
                return Some(candidate);
            }
            let due = match self.is_expected(holder) {
                true => 1, // Only a layer that somebody asks for now comes before it.
                false => self.foresight.distance(holder).saturating_add(1),
            };
            let later = best.as_ref().is_none_or(|(latest, _)| due > *latest);
            if state.waiters == 0 && due > distance && later {
                best = Some((due, candidate));
            }
        }
        best.map(|(_, candidate)| candidate)
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
            let distance = client.distance(layer, true, board.loads());
            client.active(now) && !client.waits() && distance < reach
        });
        near && self.courtesy.wait(now)
    }

    /// Takes a layer off the board and looks whether any client holds it; if so, it stands there again. `distance` 0 is a
    /// demand: then the holder is in the way. A holder that does not get on is in the way of what is read ahead, too.
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
        let now = Instant::now();
        let idle = board.only_idlers_hold(layer, now);
        if distance == 0 || idle {
            self.contend(layer, idle, now);
        }
        false
    }

    // ---- contended slots ------------------------------------------------------------------------------------

    /// Notes that the slot of `layer` is wanted while clients hold it; `idle`: none of them gets on.
    fn contend(&mut self, layer: u32, idle: bool, now: Instant) {
        let state = &mut self.layers[layer as usize];
        let contention = state.contention.get_or_insert(Contention {
            since: now,
            wanted: now,
            closed: None,
            stuck: Vec::new(),
        });
        contention.wanted = now;
        let open = contention.closed.is_none() && contention.stuck.is_empty();
        if open && (idle || now.duration_since(contention.since) > CLOSING) {
            contention.closed = Some(now);
            state.closing = true;
            self.show(layer);
        }
    }

    /// What has become of the contended slots.
    pub(super) fn look_at_contention(&mut self, board: &Board, now: Instant) {
        for layer in 0..self.layers.len() as u32 {
            let state = &mut self.layers[layer as usize];
            let Some(contention) = &mut state.contention else {
                continue;
            };
            let was_stuck = !contention.stuck.is_empty();
            contention.stuck.retain(|id| board.is_holder(*id, layer));
            if let Some(closed) = contention.closed
                && now.duration_since(closed) > STUCK
            {
                contention.stuck = board.holders(layer);
                contention.closed = None;
            }
            let is_stuck = !contention.stuck.is_empty();
            let unwanted = now.duration_since(contention.wanted);
            let over = match is_stuck {
                true => unwanted > FORGET_STUCK,
                // Closed and let go: whoever wants the slot finds that out.
                false => {
                    unwanted > FORGET || was_stuck || contention.closed.is_none() && state.closing
                }
            };
            if over {
                state.contention = None;
            }
            if over || is_stuck {
                // Others may share what is there; the slot is not to be had this way.
                let closing = std::mem::take(&mut state.closing);
                if closing {
                    self.show(layer);
                }
            }
        }
    }

    fn is_stuck(&self, layer: u32) -> bool {
        let contention = &self.layers[layer as usize].contention;
        contention.as_ref().is_some_and(|c| !c.stuck.is_empty())
    }

    /// The layer that is in a slot.
    fn layer_in(&self, slot: u32) -> Option<u32> {
        match self.slots[slot as usize] {
            Slot::Holds(fetch) => Some(self.layers_of_fetch[fetch as usize][0]),
            Slot::Free | Slot::Quarantined => None,
        }
    }

    fn stuck_count(&self) -> u64 {
        if self.board.is_none() {
            return 0;
        }
        let layers = (0..self.layout.slots_count).filter_map(|slot| self.layer_in(slot));
        layers.filter(|layer| self.is_stuck(*layer)).count() as u64
    }

    /// A layer goes elsewhere if its own slot is stuck. That slot is wanted all the same, unless it is the one who keeps
    /// it that wants it.
    fn want_own_slot(&mut self, layer: u32, now: Instant) {
        let Some(board) = self.board.clone() else {
            return;
        };
        for slot in self.candidate_slots(layer) {
            if let Some(holder) = self.layer_in(slot)
                && self.is_stuck(holder)
                && board.others_get_on(holder, now)
                && let Some(contention) = &mut self.layers[holder as usize].contention
            {
                contention.wanted = now;
            }
        }
    }

    /// Tells the clients where the run of a layer will lie, and counts its load.
    pub(super) fn note_load(&self, fetch: u32, slot: u32) {
        if let (Some(board), Some(layer)) = (
            &self.board,
            self.layout.fetches[fetch as usize].transient_of,
        ) {
            let away = self.layout.fixed_slot[layer as usize].is_some_and(|own| own != slot);
            board.begin_load(layer, slot, away);
        }
    }

    /// After how many loads a client is due a layer again: what a pass takes, less the layer itself, those that cannot go
    /// because somebody keeps their slots, and one that is asked for a moment early.
    pub(super) fn pass_loads(&self) -> u64 {
        self.loads_per_pass.saturating_sub(2 + self.stuck_count())
    }

    /// Clients that have held a layer for longer than `timeout` while others wanted its slot.
    #[must_use]
    pub fn overdue(&self, timeout: Duration) -> Vec<u64> {
        let now = Instant::now();
        let contentions = self.layers.iter().filter_map(|l| l.contention.as_ref());
        let overdue = contentions.filter(|c| now.duration_since(c.since) > timeout);
        overdue.flat_map(|c| c.stuck.iter().copied()).collect()
    }

    /// How long the stream may sleep although it found nothing to do: not long while somebody is waited for out of
    /// courtesy, a slot is contended or a wait is put off; `None` = until it is woken.
    #[must_use]
    pub fn look_again(&self) -> Option<Duration> {
        let contended = self.layers.iter().any(|layer| layer.contention.is_some());
        if self.courtesy.waits {
            Some(COURTESY_LOOK)
        } else {
            (contended || self.puts_off).then_some(CONTENTION_LOOK)
        }
    }

    pub(super) fn candidate_slots(&self, layer: u32) -> Range<u32> {
        match self.layout.fixed_slot[layer as usize] {
            Some(slot) => slot..slot + 1,
            None => 0..self.layout.slots_count,
        }
    }
}
