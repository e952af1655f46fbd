//! Wishes against a small cache: what they take, what they leave alone, and what becomes of them.

use super::*;
use crate::engine::experts::Room;
use crate::engine::layout::{Fetch, Layout};
use crate::error::{Error, ErrorKind};
use crate::plan::{ExpertPlan, PageRun, SlotClass, Unit};
use crate::units::Extent;
use std::sync::Arc;

/// `units_count` experts of one page each, and slots for some of them.
fn state(units_count: u32, slots_count: u32) -> State {
    let page_bytes = 4096;
    let run = |unit: u32| PageRun {
        shard_index: 0,
        first_page: u64::from(unit),
        page_count: 1,
    };
    let unit = |index: u32| Unit {
        extent: Extent {
            shard_index: 0,
            offset_bytes: u64::from(index) * page_bytes,
            len_bytes: page_bytes,
        },
        run: run(index),
        layer: 0,
        expert_index: index,
        class: 0,
    };
    let fetch = |index: u32| Fetch {
        run: run(index),
        len_bytes: page_bytes,
        transient_of: None,
        request_count: 1,
    };
    let experts = ExpertPlan {
        units: (0..units_count).map(unit).collect(),
        classes: vec![SlotClass {
            slot_pages: 1,
            units_count,
            slots_count,
            slots_least_count: 1,
        }],
        cache_bytes: u64::from(slots_count) * page_bytes,
        experts_bytes: u64::from(units_count) * page_bytes,
        shared_bytes: 0,
        used_count: 1,
        skew: 0.0,
        hit_rate: 0.0,
        used_bytes_per_token: page_bytes,
    };
    let layout = Layout {
        page_bytes,
        request_bytes: page_bytes,
        fetches: (0..units_count).map(fetch).collect(),
        of_layer: vec![Vec::new()],
        fixed_slot: vec![None],
        slots_count: 0,
        experts: Some(experts),
        first_unit: 0,
    };
    State::new(Arc::new(layout), None)
}

fn read(state: &mut State, job: Job) {
    state.completed(job.fetch, 0, Ok(()), true);
    state.published(job.fetch);
}

/// Reads whatever there is to read; the units, in the order in which it was begun.
fn read_all(state: &mut State) -> Vec<u32> {
    let mut units = Vec::new();
    while let Some(job) = state.pick() {
        read(state, job);
        units.push(job.fetch);
    }
    units
}

fn lease(state: &mut State, units: &[u32]) {
    assert_eq!(state.lease_units(units, 1), Room::Leased);
    read_all(state);
    assert!(state.units_ready(units));
}

fn release(state: &mut State, units: &[u32]) {
    state.release_units(units, 1).unwrap();
}

#[test]
fn wishes_are_read_in_their_order_and_are_hits_afterwards() {
    let mut state = state(16, 8);
    state.wish(&[5, 3, 9]);
    assert_eq!(read_all(&mut state), [5, 3, 9]);
    assert_eq!(state.lease_units(&[3, 5, 9], 1), Room::Leased);
    assert!(state.units_ready(&[3, 5, 9]));
    assert_eq!(state.expert_counts().hits, 0, "nobody has them yet");
    state.count_acquired(&[3, 5, 9]);
    let counts = state.expert_counts();
    assert_eq!((counts.hits, counts.misses, counts.bytes), (3, 0, 0));
    assert_eq!((counts.ahead, counts.ahead_bytes), (3, 3 * 4096));
    assert_eq!(counts.unused_bytes, 0);
}

#[test]
fn what_had_to_be_asked_for_is_no_hit_when_the_acquire_is_made_again() {
    let mut state = state(16, 8);
    // An acquire that gives up before its units are there.
    assert_eq!(state.lease_units(&[3, 5], 1), Room::Leased);
    release(&mut state, &[3, 5]);
    read_all(&mut state);
    let acquire = |state: &mut State| {
        lease(state, &[3, 5]);
        state.count_acquired(&[3, 5]);
        release(state, &[3, 5]);
        let counts = state.expert_counts();
        (counts.calls, counts.hits, counts.misses)
    };
    assert_eq!(acquire(&mut state), (1, 0, 2));
    assert_eq!(acquire(&mut state), (2, 2, 2));
}

#[test]
fn what_is_asked_for_goes_before_what_is_wished_for() {
    let mut state = state(16, 8);
    state.wish(&[0, 1]);
    let first = state.pick().unwrap();
    assert_eq!((first.fetch, first.urgent), (0, false));
    // Also what is wished for itself.
    assert_eq!(state.lease_units(&[1, 7], 1), Room::Leased);
    let jobs: Vec<Job> = std::iter::from_fn(|| state.pick()).collect();
    assert_eq!(jobs.iter().map(|job| job.fetch).collect::<Vec<_>>(), [1, 7]);
    assert!(jobs.iter().all(|job| job.urgent));
    let counts = state.expert_counts();
    assert_eq!((counts.misses, counts.ahead), (2, 1));
}

#[test]
fn a_wish_takes_no_slot_that_is_leased_or_wished_for() {
    let mut state = state(16, 4);
    lease(&mut state, &[0, 1]);
    lease(&mut state, &[2]);
    release(&mut state, &[2]);
    // Unit 2 is there and wished for: it stays, although it is the only one that nobody leases.
    state.wish(&[2, 8, 9]);
    assert_eq!(read_all(&mut state), [8]);
    assert!(state.units_ready(&[0, 1, 2, 8]));
    assert!(!state.wants_room(), "the stream does not sleep yet");
    state.hungry = true;
    release(&mut state, &[0, 1]);
    assert!(state.wants_room());
    assert_eq!(read_all(&mut state), [9]);
    assert!(state.units_ready(&[2, 8, 9]));
    assert!(!state.wants_room(), "no wish is left");
}

#[test]
fn a_lease_that_lacks_room_has_what_was_kept_for_wishes() {
    let mut state = state(16, 4);
    state.wish(&[0, 1, 2, 3]);
    assert_eq!(read_all(&mut state), [0, 1, 2, 3]);
    lease(&mut state, &[8, 9, 10, 11]);
    let counts = state.expert_counts();
    assert_eq!(
        counts.unused_bytes,
        4 * 4096,
        "read ahead, and gone before anybody used them"
    );
    assert!(state.pick().is_none(), "the wishes are forgotten");
    // What is still being read is not to be had; it comes free by itself.
    release(&mut state, &[8, 9, 10, 11]);
    state.wish(&[0]);
    let job = state.pick().unwrap();
    assert_eq!(state.lease_units(&[4, 5, 6, 7], 1), Room::Full);
    assert!(state.reads_ahead());
    read(&mut state, job);
    assert!(!state.reads_ahead());
    lease(&mut state, &[4, 5, 6, 7]);
}

#[test]
fn new_wishes_replace_old_ones_and_none_forget_all() {
    let mut state = state(16, 4);
    state.wish(&[0, 1, 2]);
    assert_eq!(state.pick().map(|job| job.fetch), Some(0));
    state.wish(&[5]);
    assert_eq!(state.pick().map(|job| job.fetch), Some(5));
    assert!(state.pick().is_none());
    state.wish(&[6, 7]);
    state.wish(&[]);
    assert!(state.pick().is_none());
}

#[test]
fn a_wish_whose_read_fails_is_left_to_whoever_asks() {
    let mut state = state(16, 4);
    state.wish(&[0, 1]);
    let job = state.pick().unwrap();
    let error = Error::new(ErrorKind::Io, "a test");
    state.completed(job.fetch, 0, Err(error.clone()), true);
    assert_eq!(read_all(&mut state), [1], "it is not tried again by itself");
    state.wish(&[0]);
    assert!(state.pick().is_none());
    lease(&mut state, &[0]);
    release(&mut state, &[0]);
    // A slot that the kernel kept is lost, and so is the pin of the wish: a later lease has its own.
    state.wish(&[2]);
    let job = state.pick().unwrap();
    state.completed(job.fetch, 0, Err(error), false);
    lease(&mut state, &[2]);
    state.wish(&[]);
    lease(&mut state, &[8, 9]);
    assert!(state.units_ready(&[2]), "leased, so it stays");
}
