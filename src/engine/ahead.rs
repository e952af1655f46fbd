//! Experts read ahead: what a host says it will lease next is read while nobody waits for anything else.
//!
//! Part of [`State`], under its mutex, beside [`super::experts`]. Invariants: a wish takes a slot only when its read
//! begins, and never from a unit that is leased, being read or wished for itself; what is in memory for a wish stays until
//! somebody leased it or other wishes came; a lease that lacks room has all of that, so a wish costs time at worst.
//! Place in `file -> catalog -> plan -> reader -> pool -> **lease** -> host`.

use super::state::{Job, Phase, State};
use std::collections::VecDeque;

/// What will be leased soon.
#[derive(Debug)]
pub(super) struct Ahead {
    /// Units to be looked at, the next one first.
    wishes: VecDeque<u32>,
    /// Units that are pinned for a wish, and some that were.
    kept: Vec<u32>,
    /// Per unit: pinned for a wish.
    is_kept: Vec<bool>,
    /// Per unit: being read for a wish.
    is_loading: Vec<bool>,
    /// Per unit: read for a wish and not leased since.
    is_unused: Vec<bool>,
    loading_count: u32,
}

impl Ahead {
    pub(super) fn new(units_count: usize) -> Self {
        Self {
            wishes: VecDeque::with_capacity(units_count),
            kept: Vec::with_capacity(units_count),
            is_kept: vec![false; units_count],
            is_loading: vec![false; units_count],
            is_unused: vec![false; units_count],
            loading_count: 0,
        }
    }

    /// A unit is leased. True when it was pinned for a wish: it need not be any more.
    pub(super) fn leased(&mut self, unit: u32) -> bool {
        self.is_unused[unit as usize] = false;
        std::mem::take(&mut self.is_kept[unit as usize])
    }

    /// A unit leaves the cache. True when it was read for a wish and nobody ever leased it.
    pub(super) fn evicted(&mut self, unit: u32) -> bool {
        std::mem::take(&mut self.is_unused[unit as usize])
    }

    /// The read of a unit is over.
    pub(super) fn settled(&mut self, unit: u32) {
        if std::mem::take(&mut self.is_loading[unit as usize]) {
            self.loading_count -= 1;
        }
    }

    fn begun(&mut self, unit: u32) {
        self.is_loading[unit as usize] = true;
        self.is_unused[unit as usize] = true;
        self.loading_count += 1;
    }

    /// Notes that a unit is to be pinned; false when it is already.
    fn keep(&mut self, unit: u32) -> bool {
        let kept = &mut self.is_kept[unit as usize];
        if !*kept {
            *kept = true;
            self.kept.push(unit);
            return true;
        }
        false
    }
}

impl State {
    /// The units that will be leased next, in this order; what was wished for before is forgotten.
    pub(super) fn wish(&mut self, units: &[u32]) {
        self.forget_wishes();
        let Some(experts) = &mut self.experts else {
            return;
        };
        for &unit in units {
            let fetch = (self.layout.first_unit + unit) as usize;
            if self.fetches[fetch].phase == Phase::Absent {
                experts.ahead.wishes.push_back(unit);
            } else if experts.ahead.keep(unit) {
                experts.pin(unit);
            }
        }
    }

    /// Forgets all wishes. True when units were kept for them, whose slots may now go to others.
    pub(super) fn forget_wishes(&mut self) -> bool {
        let Some(experts) = &mut self.experts else {
            return false;
        };
        experts.ahead.wishes.clear();
        let mut any = false;
        while let Some(unit) = experts.ahead.kept.pop() {
            if std::mem::take(&mut experts.ahead.is_kept[unit as usize]) {
                experts.unpin(unit);
                any = true;
            }
        }
        any
    }

    /// The next unit to read for a wish, if it can have a slot.
    pub(super) fn pick_wish(&mut self) -> Option<Job> {
        loop {
            let experts = self.experts.as_mut()?;
            let unit = *experts.ahead.wishes.front()?;
            let fetch = self.layout.first_unit + unit;
            // Somebody has leased it meanwhile, or its read failed: that is tried again when somebody asks.
            let there = self.fetches[fetch as usize].phase != Phase::Absent;
            if there || experts.errors.contains_key(&unit) {
                experts.ahead.wishes.pop_front();
                continue;
            }
            if !self.admit_unit(unit) {
                return None;
            }
            self.begin_unit(unit);
            let len_bytes = self.layout.fetches[fetch as usize].len_bytes;
            let experts = self.experts.as_mut()?;
            experts.ahead.wishes.pop_front();
            experts.ahead.begun(unit);
            experts.ahead.keep(unit);
            experts.pin(unit);
            experts.counts.ahead += 1;
            experts.counts.ahead_bytes += len_bytes;
            return Some(Job {
                fetch,
                slot: self.fetches[fetch as usize].slot,
                urgent: false,
            });
        }
    }

    /// True while units are being read for a wish: their slots come free without anybody's doing.
    pub(super) fn reads_ahead(&self) -> bool {
        let experts = self.experts.as_ref();
        experts.is_some_and(|experts| experts.ahead.loading_count > 0)
    }

    /// True when the stream sleeps although there are wishes: slots have come free.
    pub(super) fn wants_room(&mut self) -> bool {
        let experts = self.experts.as_ref();
        experts.is_some_and(|experts| !experts.ahead.wishes.is_empty())
            && std::mem::take(&mut self.hungry)
    }
}

#[cfg(test)]
#[path = "ahead_tests.rs"]
mod tests;
