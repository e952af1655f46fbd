//! The policies against models that search plain lists, on random sequences of everything a cache can be told; and
//! what each policy is for, on sequences made for it.

use proptest::prelude::*;

use super::*;

const UNITS: u32 = 12;

#[derive(Debug, Clone, Copy)]
enum Step {
    Touch(u32),
    Admit(u32),
    Pin(u32),
    Unpin(u32),
    Remove(u32),
    Evict,
    Resize(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Some ids do not exist.
    let unit = 0..UNITS + 2;
    let step = prop_oneof![
        6 => unit.clone().prop_map(Step::Touch),
        12 => unit.clone().prop_map(Step::Admit),
        2 => unit.clone().prop_map(Step::Pin),
        3 => unit.clone().prop_map(Step::Unpin),
        1 => unit.prop_map(Step::Remove),
        1 => Just(Step::Evict),
        1 => (0..UNITS + 3).prop_map(Step::Resize),
    ];
    proptest::collection::vec(step, 0..160)
}

/// One unit inside a naive cache. The lists hold the oldest first.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Inside {
    unit: u32,
    pins: u32,
}

/// The same four policies, written for reading: lists in order, linear searches.
#[derive(Debug)]
struct Naive {
    kind: PolicyKind,
    capacity: usize,
    clock: u64,
    /// Each unit's uses: when they were.
    uses: Vec<Vec<u64>>,
    probation: Vec<Inside>,
    main: Vec<Inside>,
    remembered: Vec<u32>,
}

impl Naive {
    fn new(kind: PolicyKind, capacity: u32) -> Self {
        Self {
            kind,
            capacity: capacity.min(UNITS) as usize,
            clock: 0,
            uses: vec![Vec::new(); UNITS as usize],
            probation: Vec::new(),
            main: Vec::new(),
            remembered: Vec::new(),
        }
    }

    fn share(&self, share: f64) -> usize {
        ((self.capacity as f64 * share) as usize).max(usize::from(self.capacity > 0))
    }

    fn find(&mut self, unit: u32) -> Option<&mut Inside> {
        let all = self.probation.iter_mut().chain(&mut self.main);
        all.into_iter().find(|inside| inside.unit == unit)
    }

    fn inside(&self) -> Vec<u32> {
        let mut units: Vec<u32> = self
            .probation
            .iter()
            .chain(&self.main)
            .map(|i| i.unit)
            .collect();
        units.sort_unstable();
        units
    }

    fn note(&mut self, unit: u32) {
        self.clock += 1;
        self.uses[unit as usize].push(self.clock);
    }

    /// Uses weighed by their age.
    fn frequency(&self, unit: u32) -> f64 {
        let half_life = HALF_LIFE_TURNS * f64::from(UNITS);
        let weight = |at: &u64| (-((self.clock - at) as f64) / half_life).exp2();
        self.uses[unit as usize].iter().map(weight).sum()
    }

    fn take(list: &mut Vec<Inside>, unit: u32) -> Option<Inside> {
        let at = list.iter().position(|inside| inside.unit == unit)?;
        Some(list.remove(at))
    }

    fn touch(&mut self, unit: u32) -> bool {
        if self.find(unit).is_none() {
            return false;
        }
        self.note(unit);
        if let Some(inside) = Self::take(&mut self.main, unit) {
            self.main.push(inside);
        } else if self.kind == PolicyKind::Lfru {
            let inside = Self::take(&mut self.probation, unit).unwrap();
            self.main.push(inside);
            self.demote();
        }
        true
    }

    fn demote(&mut self) {
        while self.main.len() > self.share(PROTECTED_SHARE)
            && let Some(at) = self.main.iter().position(|inside| inside.pins == 0)
        {
            let inside = self.main.remove(at);
            self.probation.push(inside);
        }
    }

    /// The oldest unpinned of a list, or the least frequent where that counts, by its last use among equals.
    fn choice(&self, list: &[Inside], frequent: bool) -> Option<u32> {
        let mut free = list.iter().filter(|inside| inside.pins == 0);
        if !frequent {
            return free.next().map(|inside| inside.unit);
        }
        let last = |unit: u32| *self.uses[unit as usize].last().unwrap();
        free.map(|inside| inside.unit).min_by(|a, b| {
            let order = self.frequency(*a).total_cmp(&self.frequency(*b));
            order.then(last(*a).cmp(&last(*b)))
        })
    }

    fn victim(&self) -> Option<u32> {
        let main = || self.choice(&self.main, self.kind == PolicyKind::Lfu);
        let probation = || self.choice(&self.probation, self.kind == PolicyKind::Lfru);
        if self.kind == PolicyKind::TwoQ && self.probation.len() <= self.share(NEWCOMERS_SHARE) {
            main().or_else(probation)
        } else {
            probation().or_else(main)
        }
    }

    fn evict(&mut self) -> Option<u32> {
        let victim = self.victim()?;
        if Self::take(&mut self.probation, victim).is_some() && self.kind == PolicyKind::TwoQ {
            self.remembered.push(victim);
            let most = self.share(REMEMBERED_SHARE);
            let excess = self.remembered.len().saturating_sub(most);
            self.remembered.drain(..excess);
        }
        Self::take(&mut self.main, victim);
        Some(victim)
    }

    fn admit(&mut self, unit: u32) -> Admission {
        if self.touch(unit) {
            return Admission::Present;
        }
        if unit >= UNITS || self.capacity == 0 {
            return Admission::Refused;
        }
        let full = self.inside().len() >= self.capacity;
        if full && self.victim().is_none() {
            return Admission::Refused;
        }
        let known = self.remembered.contains(&unit);
        self.remembered.retain(|other| *other != unit);
        let victim = if full { self.evict() } else { None };
        self.note(unit);
        let inside = Inside { unit, pins: 0 };
        match self.kind {
            PolicyKind::TwoQ if !known => self.probation.push(inside),
            PolicyKind::Lfru => self.probation.push(inside),
            _ => self.main.push(inside),
        }
        victim.map_or(Admission::Free, Admission::Evicted)
    }

    fn pin(&mut self, unit: u32) -> bool {
        self.find(unit).map(|inside| inside.pins += 1).is_some()
    }

    fn unpin(&mut self, unit: u32) -> bool {
        match self.find(unit) {
            Some(inside) if inside.pins > 0 => {
                inside.pins -= 1;
                true
            }
            _ => false,
        }
    }

    fn remove(&mut self, unit: u32) -> bool {
        let probation = Self::take(&mut self.probation, unit);
        probation.or(Self::take(&mut self.main, unit)).is_some()
    }

    fn resize(&mut self, capacity: u32) {
        self.capacity = capacity.min(UNITS) as usize;
        if self.kind == PolicyKind::TwoQ {
            let excess = self
                .remembered
                .len()
                .saturating_sub(self.share(REMEMBERED_SHARE));
            self.remembered.drain(..excess);
        }
        if self.kind == PolicyKind::Lfru {
            self.demote();
        }
    }
}

/// The answers of both as text, so that one comparison serves every kind of step.
fn apply(policy: &mut Policy, naive: &mut Naive, step: Step) -> (String, String) {
    let both =
        |a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| (format!("{a:?}"), format!("{b:?}"));
    match step {
        Step::Touch(unit) => both(&policy.touch(unit), &naive.touch(unit)),
        Step::Admit(unit) => both(&policy.admit(unit), &naive.admit(unit)),
        Step::Pin(unit) => both(&policy.pin(unit), &naive.pin(unit)),
        Step::Unpin(unit) => both(&policy.unpin(unit), &naive.unpin(unit)),
        Step::Remove(unit) => both(&policy.remove(unit), &naive.remove(unit)),
        Step::Evict => both(&policy.evict(), &naive.evict()),
        Step::Resize(capacity) => {
            policy.resize(capacity);
            naive.resize(capacity);
            both(&policy.capacity(), &naive.capacity)
        }
    }
}

proptest! {
    #[test]
    fn every_step_does_what_the_naive_model_does(
        kind in proptest::sample::select(&PolicyKind::ALL[..]),
        capacity in 0..UNITS + 2,
        steps in steps(),
    ) {
        let mut policy = Policy::new(kind, UNITS, capacity);
        let mut naive = Naive::new(kind, capacity);
        for (number, step) in steps.into_iter().enumerate() {
            let (found, expected) = apply(&mut policy, &mut naive, step);
            prop_assert_eq!(found, expected, "{} step {} {:?}", kind, number, step);
            let inside: Vec<u32> = (0..UNITS + 2).filter(|unit| policy.contains(*unit)).collect();
            prop_assert_eq!(&inside, &naive.inside());
            prop_assert_eq!(policy.len() as usize, inside.len());
        }
    }

    #[test]
    fn the_pinned_stay_and_the_rest_keeps_to_the_capacity(
        kind in proptest::sample::select(&PolicyKind::ALL[..]),
        capacity in 1..UNITS,
        pinned in 0..UNITS,
        units in proptest::collection::vec(0..UNITS, 0..200),
    ) {
        let mut policy = Policy::new(kind, UNITS, capacity);
        prop_assert_eq!(policy.admit(pinned), Admission::Free);
        prop_assert!(policy.pin(pinned));
        for unit in units {
            let admission = policy.admit(unit);
            prop_assert!(policy.contains(pinned));
            prop_assert!(policy.len() <= capacity);
            // With one slot, and that pinned, nothing else comes in; otherwise what was admitted is there.
            prop_assert_eq!(admission == Admission::Refused, !policy.contains(unit));
            prop_assert!(capacity == 1 || policy.contains(unit));
        }
    }
}

/// Hits of a sequence of uses.
fn hits(kind: PolicyKind, units_count: u32, capacity: u32, uses: &[u32]) -> usize {
    let mut policy = Policy::new(kind, units_count, capacity);
    let hit = |unit: &&u32| policy.admit(**unit) == Admission::Present;
    uses.iter().filter(hit).count()
}

#[test]
fn units_used_once_leave_in_the_order_they_came() {
    for kind in PolicyKind::ALL {
        let mut policy = Policy::new(kind, 100, 10);
        for unit in 0..10 {
            assert_eq!(policy.admit(unit), Admission::Free, "{kind}");
        }
        for unit in 10..100 {
            let admission = policy.admit(unit);
            // Uses count less with age, so also for the frequency policies the oldest goes first.
            assert_eq!(admission, Admission::Evicted(unit - 10), "{kind}");
        }
    }
}

#[test]
fn a_cycle_one_longer_than_the_cache_defeats_lru_but_not_two_queues() {
    let cycle: Vec<u32> = (0..1100).map(|step| step % 11).collect();
    assert_eq!(hits(PolicyKind::Lru, 11, 10, &cycle), 0);
    assert!(hits(PolicyKind::TwoQ, 11, 10, &cycle) > 500);
}

#[test]
fn a_scan_does_not_displace_what_is_used_often() {
    // Units 0 to 3 in every round, then five that come once and never again.
    let mut uses = Vec::new();
    for round in 0..100 {
        uses.extend([0, 1, 2, 3, 0, 1, 2, 3]);
        uses.extend((0..5).map(|once| 4 + round * 5 + once));
    }
    let lru = hits(PolicyKind::Lru, 504, 8, &uses);
    assert_eq!(lru, 4 * 100, "the second use in a round");
    for kind in [PolicyKind::Lfu, PolicyKind::Lfru] {
        assert_eq!(hits(kind, 504, 8, &uses), 8 * 100 - 4, "{kind}");
    }
    assert!(hits(PolicyKind::TwoQ, 504, 8, &uses) > lru + 300);
}

#[test]
fn favourites_that_are_used_no_more_are_forgotten() {
    let mut policy = Policy::new(PolicyKind::Lfu, 8, 4);
    for step in 0..4000_u32 {
        let _ = policy.admit(step % 4);
    }
    // The other four take over within some half-lives of 16 * 8 uses.
    for step in 0..4000_u32 {
        let _ = policy.admit(4 + step % 4);
    }
    assert!((4..8).all(|unit| policy.contains(unit)));
}

#[test]
fn what_does_not_exist_is_refused() {
    let mut policy = Policy::new(PolicyKind::Lru, 4, 2);
    assert_eq!(policy.admit(4), Admission::Refused);
    assert!(!policy.contains(4) && !policy.touch(4) && !policy.pin(4) && !policy.unpin(4));
    assert!(!policy.remove(u32::MAX) && !policy.contains(u32::MAX));
    let mut nothing = Policy::new(PolicyKind::TwoQ, 0, 10);
    assert_eq!(
        (nothing.capacity(), nothing.admit(0)),
        (0, Admission::Refused)
    );
    assert_eq!("2Q".parse(), Ok(PolicyKind::TwoQ));
    assert!("arc".parse::<PolicyKind>().unwrap_err().contains("lfru"));
}
