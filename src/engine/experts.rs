//! The cache of experts: which units are in memory, who holds them, and which one leaves when another has to come.
//!
//! Part of [`State`], under its mutex. Invariants: a unit that is leased, or that is being read, is never evicted; a unit
//! that lies in a slot is the only one there; a lease of several units is given whole or not at all, so that two hosts
//! that each want half of the cache cannot wait for each other for ever.

use super::ahead::Ahead;
use super::layout::Layout;
use super::state::{Job, Phase, Slot, State};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{Admission, Policy, PolicyKind};
use std::collections::{HashMap, VecDeque};

/// Slots of one size and the units that use them.
#[derive(Debug)]
struct ClassCache {
    policy: Policy,
    /// The units by their number in the policy.
    units: Vec<u32>,
    free: Vec<u32>,
}

/// What the cache has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExpertCounts {
    /// Leases of ranges that named experts: where a host had to look what its router chose.
    pub calls: u64,
    /// Units leased that were in memory, or on their way already.
    pub hits: u64,
    /// Units leased that had to be read.
    pub misses: u64,
    /// Bytes read for them: whole pages.
    pub bytes: u64,
    /// Units read because a host said that it would lease them: leased later, they are hits.
    pub ahead: u64,
    /// Bytes read for those: whole pages.
    pub ahead_bytes: u64,
    /// Of those bytes: gone again before anybody leased them.
    pub unused_bytes: u64,
}

/// The cache of one model.
#[derive(Debug)]
pub(super) struct Experts {
    classes: Vec<ClassCache>,
    /// Per unit: its class, and its number there.
    places: Vec<(u32, u32)>,
    /// Leases of each unit.
    leases: Vec<u32>,
    /// Unit leases of each thread: so many that a thread with some must not wait for more room.
    held: HashMap<u64, u32>,
    /// Units to be read, in the order they were asked for.
    queue: VecDeque<u32>,
    /// Per unit: an acquire has missed it and gave up waiting. The next one that leases it is the same question.
    asked: Vec<bool>,
    /// What the last attempt to read a unit said.
    pub(super) errors: HashMap<u32, Error>,
    /// Units that will be leased soon.
    pub(super) ahead: Ahead,
    pub(super) counts: ExpertCounts,
}

/// What came of an attempt to lease units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// They are leased; those that were missing are being read.
    Leased,
    /// Others hold so much of the cache that they do not fit now; nothing is leased.
    Full,
}

impl Experts {
    /// An empty cache, where the plan has one. Slots are numbered from the end of the ring on, class by class.
    pub(super) fn new(layout: &Layout, kind: PolicyKind) -> Option<Self> {
        let plan = layout.experts.as_ref()?;
        let mut next_slot = layout.slots_count;
        let mut classes = Vec::with_capacity(plan.classes.len());
        for class in &plan.classes {
            let slots = next_slot..next_slot + class.slots_count;
            next_slot = slots.end;
            classes.push(ClassCache {
                policy: Policy::new(kind, class.units_count, class.slots_count),
                units: Vec::with_capacity(class.units_count as usize),
                free: slots.rev().collect(),
            });
        }
        let mut places = Vec::with_capacity(plan.units.len());
        for (index, unit) in (0u32..).zip(&plan.units) {
            let units = &mut classes[unit.class as usize].units;
            places.push((unit.class, units.len() as u32));
            units.push(index);
        }
        Some(Self {
            classes,
            leases: vec![0; places.len()],
            asked: vec![false; places.len()],
            ahead: Ahead::new(places.len()),
            places,
            held: HashMap::with_capacity(64),
            queue: VecDeque::with_capacity(1024),
            errors: HashMap::new(),
            counts: ExpertCounts::default(),
        })
    }

    /// Keeps a unit that has a slot there; false for one that has none.
    pub(super) fn pin(&mut self, unit: u32) -> bool {
        let (class, id) = self.places[unit as usize];
        self.classes[class as usize].policy.pin(id)
    }

    pub(super) fn unpin(&mut self, unit: u32) {
        let (class, id) = self.places[unit as usize];
        self.classes[class as usize].policy.unpin(id);
    }
}

impl State {
    /// Refuses units that can never be in memory together.
    ///
    /// # Errors
    /// `Refused`, saying how many slots there are.
    pub(super) fn check_room(&self, units: &[u32]) -> Result<()> {
        let Some(experts) = &self.experts else {
            return Ok(());
        };
        for (class, cache) in (0u32..).zip(&experts.classes) {
            let of_class = |unit: &&u32| experts.places[**unit as usize].0 == class;
            let wanted = units.iter().filter(of_class).count();
            let slots = cache.policy.capacity();
            if wanted > slots as usize {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!(
                        "{wanted} experts of one size asked for at once, and their cache has {slots} slots; ask for fewer \
                         at a time, or give more memory"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Leases `units` (each once) for `thread`, and starts to read those that are missing.
    pub(super) fn lease_units(&mut self, units: &[u32], thread: u64) -> Room {
        // What is kept for later gives way to what is needed now.
        let held = self.hold_units(units) || self.forget_wishes() && self.hold_units(units);
        if !held {
            return Room::Full;
        }
        let Some(experts) = &mut self.experts else {
            return Room::Leased;
        };
        *experts.held.entry(thread).or_insert(0) += units.len() as u32;
        for &unit in units {
            self.count_lease(unit);
        }
        Room::Leased
    }

    /// Books the lease of a unit that has a slot, and asks for it where it is missing.
    fn count_lease(&mut self, unit: u32) {
        let fetch = (self.layout.first_unit + unit) as usize;
        let Some(experts) = &mut self.experts else {
            return;
        };
        if experts.ahead.leased(unit) {
            experts.unpin(unit);
        }
        if self.fetches[fetch].phase != Phase::Absent {
            return;
        }
        experts.asked[unit as usize] = true;
        experts.counts.misses += 1;
        experts.counts.bytes += self.layout.fetches[fetch].len_bytes;
        experts.errors.remove(&unit);
        experts.queue.push_back(unit);
        self.begin_unit(unit);
    }

    /// An acquire of these units has got them: a hit is what neither it nor one that gave up before it had to ask for.
    pub(super) fn count_acquired(&mut self, units: &[u32]) {
        if let Some(experts) = &mut self.experts {
            experts.counts.calls += 1;
            for &unit in units {
                let asked = std::mem::take(&mut experts.asked[unit as usize]);
                experts.counts.hits += u64::from(!asked);
            }
        }
    }

    /// Marks a unit that has a slot as being read.
    pub(super) fn begin_unit(&mut self, unit: u32) {
        let fetch = self.layout.first_unit + unit;
        let state = &mut self.fetches[fetch as usize];
        state.phase = Phase::Loading;
        state.done.fill(0);
        state.lost = false;
        state.outstanding = self.layout.fetches[fetch as usize].request_count;
        if let Some(experts) = &mut self.experts {
            experts.pin(unit); // until it is read
        }
    }

    /// Gives every unit a slot and keeps it there; all of them or none.
    fn hold_units(&mut self, units: &[u32]) -> bool {
        let Some(experts) = &mut self.experts else {
            return true;
        };
        // What is in memory first, lest it be evicted for the rest.
        for &unit in units {
            let (class, id) = experts.places[unit as usize];
            let policy = &mut experts.classes[class as usize].policy;
            if policy.touch(id) && policy.pin(id) {
                experts.leases[unit as usize] += 1;
            }
        }
        for (index, &unit) in units.iter().enumerate() {
            let fetch = (self.layout.first_unit + unit) as usize;
            // Held already, by the loop above: a unit in the policy has a slot.
            if self.fetches[fetch].slot.is_some() {
                continue;
            }
            if !self.admit_unit(unit) {
                self.let_go(units, index);
                return false;
            }
            if let Some(experts) = &mut self.experts {
                experts.pin(unit);
                experts.leases[unit as usize] += 1;
            }
        }
        true
    }

    /// Gives a unit that has no slot one, that of another unit if none is free; false where all are held.
    pub(super) fn admit_unit(&mut self, unit: u32) -> bool {
        let first_unit = self.layout.first_unit;
        let Some(experts) = &mut self.experts else {
            return false;
        };
        let (class, id) = experts.places[unit as usize];
        let cache = &mut experts.classes[class as usize];
        let slot = match cache.policy.admit(id) {
            Admission::Free => cache.free.pop(),
            Admission::Evicted(victim) => {
                let victim = cache.units[victim as usize];
                let fetch = (first_unit + victim) as usize;
                experts.asked[victim as usize] = false;
                if experts.ahead.evicted(victim) {
                    experts.counts.unused_bytes += self.layout.fetches[fetch].len_bytes;
                }
                let state = &mut self.fetches[fetch];
                state.phase = Phase::Absent;
                state.slot.take()
            }
            Admission::Present | Admission::Refused => None,
        };
        let Some(slot) = slot else {
            return false;
        };
        let fetch = first_unit + unit;
        self.slots[slot as usize] = Slot::Holds(fetch);
        self.fetches[fetch as usize].slot = Some(slot);
        true
    }

    /// Undoes [`State::hold_units`] when it got as far as the unit at `until`: those that had a slot before it have one
    /// still, and all before `until`.
    fn let_go(&mut self, units: &[u32], until: usize) {
        let Some(experts) = &mut self.experts else {
            return;
        };
        for (index, &unit) in units.iter().enumerate() {
            let fetch = (self.layout.first_unit + unit) as usize;
            if index < until || self.fetches[fetch].slot.is_some() {
                experts.leases[unit as usize] -= 1;
                experts.unpin(unit);
            }
        }
    }

    /// Gives leases of units back.
    ///
    /// # Errors
    /// `Invalid` when one of them is not leased; then none is given back.
    pub(super) fn release_units(&mut self, units: &[u32], thread: u64) -> Result<()> {
        let Some(experts) = &mut self.experts else {
            return Ok(());
        };
        if let Some(unit) = units
            .iter()
            .find(|unit| experts.leases[**unit as usize] == 0)
        {
            let unit = &self.layout.units()[*unit as usize];
            let context = format!(
                "expert {} of layer {} is released but nobody acquired it",
                unit.expert_index, unit.layer
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        for &unit in units {
            experts.leases[unit as usize] -= 1;
            experts.unpin(unit);
        }
        // A lease may come back on another thread: then somebody else's count goes down.
        let count = units.len() as u32;
        let held = experts.held.get_mut(&thread).filter(|held| **held >= count);
        match held {
            Some(held) => *held -= count,
            None => {
                if let Some(held) = experts.held.values_mut().find(|held| **held >= count) {
                    *held -= count;
                }
            }
        }
        Ok(())
    }

    /// True when `thread` has units leased: it must not wait for room that only it can make.
    pub(super) fn holds_units(&self, thread: u64) -> bool {
        let held = self.experts.as_ref().and_then(|e| e.held.get(&thread));
        held.is_some_and(|held| *held > 0)
    }

    /// True when every unit is in memory.
    pub(super) fn units_ready(&self, units: &[u32]) -> bool {
        units.iter().all(|unit| {
            self.fetches[(self.layout.first_unit + unit) as usize].phase == Phase::Ready
        })
    }

    /// Why a unit does not come.
    pub(super) fn unit_error(&self, units: &[u32]) -> Option<Error> {
        let experts = self.experts.as_ref()?;
        if experts.errors.is_empty() {
            return None;
        }
        let failed = |unit: &&u32| {
            self.fetches[(self.layout.first_unit + **unit) as usize].phase == Phase::Absent
        };
        let mut failed = units.iter().filter(failed);
        failed.find_map(|unit| experts.errors.get(unit).cloned())
    }

    /// The next unit to read.
    pub(super) fn pick_unit(&mut self) -> Option<Job> {
        let unit = self.experts.as_mut()?.queue.pop_front()?;
        let fetch = self.layout.first_unit + unit;
        Some(Job {
            fetch,
            slot: self.fetches[fetch as usize].slot,
            urgent: true,
        })
    }

    /// A read of a unit failed.
    pub(super) fn note_unit_error(&mut self, fetch: u32, error: &Error) {
        if let (Some(unit), Some(experts)) = (self.layout.unit_of(fetch), &mut self.experts) {
            experts.errors.entry(unit).or_insert_with(|| error.clone());
        }
    }

    /// The read of a unit is over, well or not. `lost`: the kernel kept its slot, which is not the cache's any more.
    pub(super) fn unit_settled(&mut self, fetch: u32, lost: bool) {
        let (Some(unit), Some(experts)) = (self.layout.unit_of(fetch), &mut self.experts) else {
            return;
        };
        experts.unpin(unit);
        experts.ahead.settled(unit);
        if lost {
            experts.ahead.leased(unit);
            let (class, id) = experts.places[unit as usize];
            let policy = &mut experts.classes[class as usize].policy;
            policy.remove(id);
            policy.resize(policy.capacity() - 1);
        }
    }

    /// What the cache of experts has done so far.
    #[must_use]
    pub fn expert_counts(&self) -> ExpertCounts {
        self.experts
            .as_ref()
            .map_or_else(ExpertCounts::default, |experts| experts.counts)
    }
}
