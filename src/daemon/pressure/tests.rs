//! Tests of the pressure policy on simulated machines, and of the alarms on this one.

use super::policy::{Bounds, Policy, Reading, State};
use super::sources::{limit_events, some_avg10};
use super::{Settings, Sources, Stall};
use crate::units::{GIB, MIB};
use proptest::prelude::*;
use std::path::Path;

const SECOND_NS: u64 = 1_000_000_000;
/// How often the daemon takes a reading.
const TICK_NS: u64 = SECOND_NS / 4;

/// A machine with other programs on it, and pools that follow their target at a finite rate.
struct Machine {
    total_bytes: u64,
    others_bytes: u64,
    pool_bytes: u64,
    pool_rate_bytes: u64,
    now_ns: u64,
    policy: Policy,
    bounds: Bounds,
    /// Bytes that somebody wanted and that were not there: here the OOM killer comes.
    short_bytes: u64,
    changes: Vec<(u64, u64)>,
}

impl Machine {
    fn new(total_bytes: u64, wanted_bytes: u64, floor_bytes: u64) -> Self {
        let settings = Settings {
            hold_ns: 5 * SECOND_NS,
            ..Settings::default()
        };
        Self {
            total_bytes,
            others_bytes: 0,
            pool_bytes: wanted_bytes,
            pool_rate_bytes: 512 * MIB,
            now_ns: 0,
            policy: Policy::new(settings, wanted_bytes),
            bounds: Bounds {
                floor_bytes,
                wanted_bytes,
            },
            short_bytes: 0,
            changes: Vec::new(),
        }
    }

    fn available_bytes(&self) -> u64 {
        self.total_bytes
            .saturating_sub(self.others_bytes + self.pool_bytes)
    }

    fn tick(&mut self, stalled: bool) {
        self.now_ns += TICK_NS;
        let held_bytes = self.others_bytes + self.pool_bytes;
        self.short_bytes = self
            .short_bytes
            .max(held_bytes.saturating_sub(self.total_bytes));
        let reading = Reading {
            now_ns: self.now_ns,
            available_bytes: self.available_bytes(),
            stalled,
            pool_bytes: self.pool_bytes,
        };
        if let Some(decision) = self.policy.step(&reading, &self.bounds) {
            assert!(!decision.reason.is_empty());
            self.changes.push((self.now_ns, decision.target_bytes));
        }
        let target_bytes = self.policy.target_bytes();
        self.pool_bytes = if target_bytes > self.pool_bytes {
            target_bytes.min(self.pool_bytes + self.pool_rate_bytes)
        } else {
            target_bytes.max(self.pool_bytes.saturating_sub(self.pool_rate_bytes))
        };
    }

    fn run(&mut self, seconds: u64) {
        for _ in 0..seconds * SECOND_NS / TICK_NS {
            self.tick(false);
        }
    }
}

#[test]
fn a_quiet_machine_is_left_alone() {
    let mut machine = Machine::new(24 * GIB, 16 * GIB, GIB);
    machine.run(600);
    assert!(machine.changes.is_empty(), "{:?}", machine.changes);
    assert_eq!(machine.policy.state(), State::Calm);
}

#[test]
fn the_pool_makes_room_before_anything_is_killed_and_grows_back() {
    let mut machine = Machine::new(24 * GIB, 20 * GIB, GIB);
    // Another program takes 10 GiB at 256 MiB a second.
    for _ in 0..160 {
        machine.others_bytes += 64 * MIB;
        machine.tick(false);
    }
    assert_eq!(machine.short_bytes, 0, "the OOM killer would have come");
    assert_eq!(machine.policy.state(), State::Shrunk);
    assert!(machine.pool_bytes < 14 * GIB, "{}", machine.pool_bytes);
    machine.run(120);
    let settled = machine.changes.len();
    machine.run(600);
    assert!(
        machine.changes.len() <= settled + 1,
        "a steady machine: {:?}",
        machine.changes
    );
    machine.others_bytes = 0;
    machine.run(120);
    assert_eq!(machine.pool_bytes, 20 * GIB);
    assert_eq!(machine.policy.state(), State::Calm);
}

#[test]
fn growing_takes_its_time() {
    let mut machine = Machine::new(24 * GIB, 20 * GIB, GIB);
    for _ in 0..160 {
        machine.others_bytes += 64 * MIB;
        machine.tick(false);
    }
    let shrunk_bytes = machine.policy.target_bytes();
    machine.others_bytes = 0;
    machine.run(4);
    assert_eq!(
        machine.policy.target_bytes(),
        shrunk_bytes,
        "calm for less than the hold"
    );
    let before = machine.changes.len();
    machine.run(120);
    let grown = &machine.changes[before..];
    assert!(grown.len() >= 3, "several steps: {grown:?}");
    for pair in grown.windows(2) {
        assert!(pair[1].0 - pair[0].0 >= 5 * SECOND_NS, "{grown:?}");
        assert!(pair[1].1 - pair[0].1 <= 20 * GIB / 8, "{grown:?}");
    }
}

#[test]
fn a_stall_shrinks_only_where_memory_is_short() {
    let mut machine = Machine::new(64 * GIB, 8 * GIB, GIB);
    machine.tick(true);
    assert_eq!(
        machine.policy.target_bytes(),
        8 * GIB,
        "56 GiB are available: no matter of ours"
    );
    machine.others_bytes = 55 * GIB + 700 * MIB;
    machine.tick(true);
    let first_bytes = machine.policy.target_bytes();
    assert!(first_bytes < 8 * GIB);
    // The same stall, reported again while the pages are on their way, is answered once.
    machine.tick(true);
    assert_eq!(machine.policy.target_bytes(), first_bytes);
}

#[test]
fn growth_that_is_regretted_waits_longer() {
    let mut machine = Machine::new(24 * GIB, 20 * GIB, GIB);
    let mut shrinks = Vec::new();
    // Somebody takes 4 GiB whenever the pool has grown back, for ever.
    for _ in 0..4000 {
        machine.others_bytes = if machine.policy.target_bytes() == 20 * GIB {
            4 * GIB
        } else {
            GIB
        };
        let before_bytes = machine.policy.target_bytes();
        machine.tick(false);
        if machine.policy.target_bytes() < before_bytes {
            shrinks.push(machine.now_ns);
        }
    }
    let gaps: Vec<u64> = shrinks.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let (first, last) = (gaps[1], gaps[gaps.len() - 1]);
    assert!(last > 2 * first, "the swing slows down: {gaps:?}");
}

#[test]
fn the_floor_holds_and_is_said() {
    let mut machine = Machine::new(8 * GIB, 6 * GIB, 4 * GIB);
    machine.others_bytes = 5 * GIB;
    machine.run(10);
    assert_eq!(machine.policy.target_bytes(), 4 * GIB);
    assert_eq!(machine.policy.state(), State::Exhausted);
    machine.others_bytes = 0;
    machine.run(200);
    assert_eq!(
        (machine.policy.target_bytes(), machine.policy.state()),
        (6 * GIB, State::Calm)
    );
}

#[test]
fn a_new_budget_is_followed_at_once() {
    let mut machine = Machine::new(24 * GIB, 8 * GIB, GIB);
    machine.bounds.wanted_bytes = 4 * GIB;
    machine.tick(false);
    assert_eq!(machine.policy.target_bytes(), 4 * GIB);
    machine.bounds.wanted_bytes = 16 * GIB;
    machine.tick(false);
    assert_eq!(machine.policy.target_bytes(), 16 * GIB);
}

#[test]
fn switched_off_it_gives_everything_back_to_the_budget() {
    let mut machine = Machine::new(24 * GIB, 20 * GIB, GIB);
    machine.others_bytes = 10 * GIB;
    machine.tick(false);
    assert!(machine.policy.target_bytes() < 20 * GIB);
    machine.policy.set(Settings {
        watch: false,
        ..Settings::default()
    });
    machine.tick(false);
    assert_eq!(machine.policy.target_bytes(), 20 * GIB);
    let count = machine.changes.len();
    machine.run(20);
    assert_eq!(machine.changes.len(), count);
}

/// What other programs do: for how many seconds, how much they hold at the end of it.
fn any_load() -> impl Strategy<Value = Vec<(u64, u64)>> {
    proptest::collection::vec((10u64..120, 0u64..=20), 1..6)
}

proptest! {
    /// Whatever others do at a rate the pools can follow, nobody runs out while the pools are above their floor; the
    /// target keeps to its bounds; and all comes back in the end.
    #[test]
    fn nobody_is_killed_and_everything_comes_back(
        load in any_load(), wanted_gib in 2u64..=20, floor_share in 0u64..=100, stalls in any::<u64>()
    ) {
        let wanted_bytes = wanted_gib * GIB;
        let floor_bytes = wanted_bytes / 100 * floor_share;
        let mut machine = Machine::new(24 * GIB, wanted_bytes, floor_bytes);
        for (index, (seconds, others_gib)) in load.into_iter().enumerate() {
            for _ in 0..seconds * SECOND_NS / TICK_NS {
                let goal_bytes = others_gib * GIB;
                machine.others_bytes = if goal_bytes > machine.others_bytes {
                    goal_bytes.min(machine.others_bytes + 64 * MIB)
                } else {
                    goal_bytes
                };
                machine.tick(stalls >> (index * 8) & 7 == 7);
                let target_bytes = machine.policy.target_bytes();
                prop_assert!((floor_bytes..=wanted_bytes).contains(&target_bytes));
                prop_assert!(machine.short_bytes == 0 || machine.policy.state() == State::Exhausted);
                machine.short_bytes = 0;
            }
        }
        machine.others_bytes = 0;
        machine.run(1200);
        prop_assert_eq!(machine.pool_bytes, wanted_bytes);
        prop_assert_eq!(machine.policy.state(), State::Calm);
    }

    /// Any readings at all: the bounds hold, nothing overflows, and a decision is always a change.
    #[test]
    fn wild_readings_keep_to_the_bounds(
        readings in proptest::collection::vec((any::<u64>(), any::<bool>(), any::<u64>(), any::<u64>()), 1..64),
        reserve_gib in 0u64..=1024, wanted_bytes in 0u64..=1 << 50, floor_bytes in any::<u64>()
    ) {
        let settings = Settings { reserve_bytes: reserve_gib * GIB, ..Settings::default() };
        let mut policy = Policy::new(settings, wanted_bytes);
        let bounds = Bounds { floor_bytes, wanted_bytes };
        for (available_bytes, stalled, pool_bytes, now_ns) in readings {
            let before_bytes = policy.target_bytes();
            let decision = policy.step(&Reading { now_ns, available_bytes, stalled, pool_bytes }, &bounds);
            prop_assert!(policy.target_bytes() <= wanted_bytes);
            prop_assert!(policy.target_bytes() >= floor_bytes.min(wanted_bytes));
            prop_assert_eq!(decision.is_some(), policy.target_bytes() != before_bytes);
        }
    }
}

#[test]
fn kernel_texts_are_read() {
    let text = "some avg10=12.50 avg60=1.00 avg300=0.00 total=520611\nfull avg10=3.00 avg60=0.00 avg300=0.00 total=1\n";
    assert_eq!(some_avg10(text), Some(12.5));
    assert_eq!(some_avg10("full avg10=3.00\n"), None);
    assert_eq!(
        limit_events("low 9\nhigh 1\nmax 20\noom 3\noom_kill 4\noom_group_kill 5\n"),
        28
    );
}

/// The alarms of this machine: whatever it offers opens, and what it does not is named.
#[test]
fn every_source_is_watched_or_named() {
    let mut sources = Sources::open(&Settings::default());
    let machine_wide = "/proc/pressure/memory";
    let is_watched = (sources.watched()).any(|watched| watched == Path::new(machine_wide));
    let missing = sources.missing().join("\n");
    assert!(is_watched || missing.contains(machine_wide), "{missing}");
    assert_eq!(sources.take(|_| false).unwrap(), Stall::None);
    let off = Settings {
        watch: false,
        ..Settings::default()
    };
    assert_eq!(Sources::open(&off).watched().count(), 0);
}
