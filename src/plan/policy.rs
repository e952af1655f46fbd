//! Which unit leaves a cache of a fixed number of slots when another one has to come in. A unit is what is fetched
//! and evicted as a whole: one expert of one layer, one page of a table of rows.
//!
//! The policies are pure bookkeeping over ids 0 to `units_count` - 1; who owns the slots does the reading. Invariants:
//!
//! * a pinned unit is never evicted; when every unit is pinned, [`Admission::Refused`] says so and nothing changes;
//! * a pin does not change the order: an unpinned unit stands where its use put it;
//! * at most `capacity` units are inside, except while units pinned before a [`Policy::resize`] stay ([`Policy::evict`]);
//! * a step costs O(log capacity), and nothing is allocated after [`Policy::new`] but by a `resize` that grows.
//!
//! About 16 bytes a unit, 24 where frequency counts, and 24 a slot. Which policy is the default was measured:
//! `flea bench policies`. Place in the pipeline: file -> catalog -> **plan** -> reader -> pool -> lease -> host.

mod heap;
#[cfg(test)]
mod properties;

use std::fmt;
use std::str::FromStr;

use heap::{ABSENT, Heap};

/// How a victim is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PolicyKind {
    /// The one whose last use is the longest ago.
    #[default]
    Lru,
    /// The one used least often, a use counting half as much after [`HALF_LIFE_TURNS`]; of equals the least recent.
    /// Uses count while a unit is outside, too.
    Lfu,
    /// Two queues: newcomers wait in a first-in-first-out queue of a quarter of the slots, and only those that come
    /// back after they left it enter the main part, which is least recently used. (Johnson and Shasha, 1994.)
    TwoQ,
    /// Least frequent, recently used: a unit used again moves to a protected half, least recently used, and falls back
    /// from there; victims are the least frequent of the other half. (Bilal and Kang, 2017.)
    Lfru,
}

impl PolicyKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Lru, Self::Lfu, Self::TwoQ, Self::Lfru];

    /// The name on the command line and in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Lfu => "lfu",
            Self::TwoQ => "2q",
            Self::Lfru => "lfru",
        }
    }

    const fn counts_uses(self) -> bool {
        matches!(self, Self::Lfu | Self::Lfru)
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PolicyKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name().eq_ignore_ascii_case(text))
            .ok_or_else(|| {
                let names = Self::ALL.map(Self::name).join(", ");
                format!("'{text}' is not a cache policy; there are {names}")
            })
    }
}

/// What [`Policy::admit`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Admission {
    /// The unit was inside already; its use was noted.
    Present,
    /// The unit came in and there was room.
    Free,
    /// The unit came in for this one, which is outside now: its slot is free.
    Evicted(u32),
    /// Nothing changed: every unit inside is pinned, the capacity is 0, or there is no unit of this id.
    Refused,
}

/// After this many uses for each unit there is, a use counts half. 256 tokens of a model that uses 8 of 128 experts.
pub const HALF_LIFE_TURNS: f64 = 16.0;
/// Share of the slots for newcomers, and, relative to the slots, of the ids remembered after they left: both are what
/// the authors of 2Q recommend.
const NEWCOMERS_SHARE: f64 = 0.25;
const REMEMBERED_SHARE: f64 = 0.5;
/// Share of the slots that LFRU protects.
const PROTECTED_SHARE: f64 = 0.5;

/// Where a unit stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Outside,
    /// Outside, but 2Q remembers it.
    Remembered,
    /// 2Q's newcomers, LFRU's unprotected half. Victims come from here first.
    Probation,
    Main,
}

/// The state of one cache.
#[derive(Debug, Clone)]
pub struct Policy {
    kind: PolicyKind,
    capacity: u32,
    half_life_steps: f64,
    /// Uses so far.
    clock: u64,
    place: Vec<Place>,
    pins: Vec<u16>,
    /// When the unit's turn was last renewed: its use, or its admission where uses do not count.
    renewed_at: Vec<u64>,
    /// Binary logarithm of the uses, each weighed by 2^(when / half-life). Empty where uses are not counted.
    frequency: Vec<f64>,
    /// Where the unit stands in the one heap that holds it. Pinned units are in none.
    slot_of: Vec<u32>,
    probation: Heap,
    main: Heap,
    remembered: Heap,
    /// Units of each part, pinned ones as well.
    probation_count: u32,
    main_count: u32,
}

impl Policy {
    /// An empty cache of `capacity` slots for the units 0 to `units_count` - 1.
    #[must_use]
    pub fn new(kind: PolicyKind, units_count: u32, capacity: u32) -> Self {
        let units = units_count as usize;
        let mut policy = Self {
            kind,
            capacity: 0,
            half_life_steps: HALF_LIFE_TURNS * f64::from(units_count.max(1)),
            clock: 0,
            place: vec![Place::Outside; units],
            pins: vec![0; units],
            renewed_at: vec![0; units],
            frequency: vec![f64::NEG_INFINITY; if kind.counts_uses() { units } else { 0 }],
            slot_of: vec![ABSENT; units],
            probation: Heap::default(),
            main: Heap::default(),
            remembered: Heap::default(),
            probation_count: 0,
            main_count: 0,
        };
        policy.resize(capacity);
        policy
    }

    /// The policy in use.
    #[must_use]
    pub const fn kind(&self) -> PolicyKind {
        self.kind
    }

    /// Slots.
    #[must_use]
    pub const fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Units inside.
    #[must_use]
    pub const fn len(&self) -> u32 {
        self.probation_count + self.main_count
    }

    /// True while nothing is inside.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the unit is inside. False for an id that does not exist.
    #[must_use]
    pub fn contains(&self, unit: u32) -> bool {
        matches!(
            self.place.get(unit as usize),
            Some(Place::Probation | Place::Main)
        )
    }

    /// A hit: notes that the unit was used. False, and nothing noted, when it is not inside.
    pub fn touch(&mut self, unit: u32) -> bool {
        if !self.contains(unit) {
            return false;
        }
        self.note_use(unit);
        let from = self.place[unit as usize];
        match (self.kind, from) {
            // Uses that follow the first closely say nothing yet.
            (PolicyKind::TwoQ, Place::Probation) => return true,
            (PolicyKind::Lfru, Place::Probation) => {
                self.leave(unit);
                self.renewed_at[unit as usize] = self.clock;
                self.enter(unit, Place::Main);
                self.demote_excess();
            }
            _ => {
                self.unqueue(unit);
                self.renewed_at[unit as usize] = self.clock;
                self.queue(unit);
            }
        }
        true
    }

    /// A miss: the unit comes in, another one goes if there is no room.
    pub fn admit(&mut self, unit: u32) -> Admission {
        if self.touch(unit) {
            return Admission::Present;
        }
        if unit as usize >= self.place.len() || self.capacity == 0 {
            return Admission::Refused;
        }
        let victim = if self.len() < self.capacity {
            None
        } else {
            match self.victim() {
                None => return Admission::Refused,
                some => some,
            }
        };
        // Before the victim is remembered, which may push this one out of memory.
        let known = self.forget(unit);
        if let Some(victim) = victim {
            self.expel(victim);
        }
        self.note_use(unit);
        self.renewed_at[unit as usize] = self.clock;
        let place = match self.kind {
            PolicyKind::Lru | PolicyKind::Lfu => Place::Main,
            PolicyKind::TwoQ if known => Place::Main,
            PolicyKind::TwoQ | PolicyKind::Lfru => Place::Probation,
        };
        self.enter(unit, place);
        victim.map_or(Admission::Free, Admission::Evicted)
    }

    /// Keeps the unit inside until as many [`Policy::unpin`]s. False when it is not inside.
    pub fn pin(&mut self, unit: u32) -> bool {
        if !self.contains(unit) {
            return false;
        }
        let Some(pins) = self.pins[unit as usize].checked_add(1) else {
            return false;
        };
        if pins == 1 {
            self.unqueue(unit);
        }
        self.pins[unit as usize] = pins;
        true
    }

    /// Takes one pin back. False when the unit has none.
    pub fn unpin(&mut self, unit: u32) -> bool {
        let Some(pins) = self.pins.get_mut(unit as usize).filter(|pins| **pins > 0) else {
            return false;
        };
        *pins -= 1;
        if *pins == 0 {
            self.queue(unit);
        }
        true
    }

    /// Evicts one unit, the next in turn. None when all are pinned or nothing is inside.
    pub fn evict(&mut self) -> Option<u32> {
        let victim = self.victim()?;
        self.expel(victim);
        Some(victim)
    }

    /// Takes a unit out whatever its turn, and its pins with it: its read failed. False when it is not inside.
    pub fn remove(&mut self, unit: u32) -> bool {
        if !self.contains(unit) {
            return false;
        }
        self.leave(unit);
        self.pins[unit as usize] = 0;
        true
    }

    /// Another number of slots. Units beyond it stay until [`Policy::evict`] is called while `len() > capacity()`: the
    /// owner of the slots has to know each.
    pub fn resize(&mut self, capacity: u32) {
        let capacity = capacity.min(self.place.len() as u32);
        self.capacity = capacity;
        self.main.reserve(capacity);
        match self.kind {
            PolicyKind::Lru | PolicyKind::Lfu => {}
            PolicyKind::TwoQ => {
                self.probation.reserve(capacity);
                self.remembered
                    .reserve(share(capacity, REMEMBERED_SHARE) + 1);
                self.trim_remembered();
            }
            PolicyKind::Lfru => {
                self.probation.reserve(capacity);
                self.demote_excess();
            }
        }
    }

    /// Counts a use of the unit.
    fn note_use(&mut self, unit: u32) {
        self.clock += 1;
        let now = self.clock as f64 / self.half_life_steps;
        if let Some(frequency) = self.frequency.get_mut(unit as usize) {
            // log2(2^frequency + 2^now), without the powers that would overflow.
            let (low, high) = (frequency.min(now), frequency.max(now));
            *frequency = high + (low - high).exp2().ln_1p() * std::f64::consts::LOG2_E;
        }
    }

    /// The lower, the earlier the unit goes; then the second number decides.
    fn turn(&self, unit: u32) -> (u64, u64) {
        let renewed_at = self.renewed_at[unit as usize];
        match (self.kind, self.place[unit as usize]) {
            (PolicyKind::Lfu, _) | (PolicyKind::Lfru, Place::Probation) => {
                // Positive reals are ordered like their bits; a use makes the frequency positive.
                (self.frequency[unit as usize].to_bits(), renewed_at)
            }
            _ => (renewed_at, 0),
        }
    }

    fn victim(&self) -> Option<u32> {
        let probation_first = match self.kind {
            PolicyKind::TwoQ => self.probation_count > share(self.capacity, NEWCOMERS_SHARE),
            _ => true,
        };
        let (first, second) = if probation_first {
            (&self.probation, &self.main)
        } else {
            (&self.main, &self.probation)
        };
        first.first().or_else(|| second.first())
    }

    /// Evicts an unpinned unit.
    fn expel(&mut self, unit: u32) {
        let from = self.place[unit as usize];
        self.leave(unit);
        if self.kind == PolicyKind::TwoQ && from == Place::Probation {
            self.clock += 1;
            self.place[unit as usize] = Place::Remembered;
            self.remembered
                .push(&mut self.slot_of, unit, (self.clock, 0));
            self.trim_remembered();
        }
    }

    fn trim_remembered(&mut self) {
        let most = share(self.capacity, REMEMBERED_SHARE);
        while self.remembered.len() > most
            && let Some(oldest) = self.remembered.first()
        {
            self.forget(oldest);
        }
    }

    /// Whether the unit was remembered; it is no longer.
    fn forget(&mut self, unit: u32) -> bool {
        let known = self.place[unit as usize] == Place::Remembered;
        if known {
            self.remembered.remove(&mut self.slot_of, unit);
            self.place[unit as usize] = Place::Outside;
        }
        known
    }

    /// The least recent of the protected half go back where the least frequent are evicted.
    fn demote_excess(&mut self) {
        let most = share(self.capacity, PROTECTED_SHARE);
        while self.main_count > most
            && let Some(unit) = self.main.first()
        {
            self.leave(unit);
            self.enter(unit, Place::Probation);
        }
    }

    fn enter(&mut self, unit: u32, place: Place) {
        self.place[unit as usize] = place;
        match place {
            Place::Probation => self.probation_count += 1,
            _ => self.main_count += 1,
        }
        self.queue(unit);
    }

    fn leave(&mut self, unit: u32) {
        self.unqueue(unit);
        match self.place[unit as usize] {
            Place::Probation => self.probation_count -= 1,
            _ => self.main_count -= 1,
        }
        self.place[unit as usize] = Place::Outside;
    }

    /// Into the heap of its part, unless it is pinned.
    fn queue(&mut self, unit: u32) {
        if self.pins[unit as usize] > 0 {
            return;
        }
        let turn = self.turn(unit);
        let heap = match self.place[unit as usize] {
            Place::Probation => &mut self.probation,
            _ => &mut self.main,
        };
        heap.push(&mut self.slot_of, unit, turn);
    }

    /// Out of the heap of its part, where a pinned unit is not.
    fn unqueue(&mut self, unit: u32) {
        if self.slot_of[unit as usize] == ABSENT {
            return;
        }
        let heap = match self.place[unit as usize] {
            Place::Probation => &mut self.probation,
            _ => &mut self.main,
        };
        heap.remove(&mut self.slot_of, unit);
    }
}

/// At least one slot, where there are any.
fn share(capacity: u32, share: f64) -> u32 {
    ((f64::from(capacity) * share) as u32).max(u32::from(capacity > 0))
}
