//! The state machine against simulated hosts and a simulated drive that completes late, out of order, and fails.

use super::*;
use crate::engine::LEASES_MAX;
use crate::engine::layout::Fetch;
use crate::plan::PageRun;
use proptest::prelude::*;

/// Layers of one resident and one transient fetch each; `requests` requests per fetch.
pub fn layout(layer_count: u32, slots_count: u32, requests: u32, fixed: bool) -> Arc<Layout> {
    let request_bytes = 4096;
    let mut layout = Layout {
        page_bytes: 4096,
        request_bytes,
        fetches: Vec::new(),
        of_layer: Vec::new(),
        fixed_slot: (0..layer_count)
            .map(|layer| fixed.then_some(layer % slots_count))
            .collect(),
        slots_count,
        experts: None,
        first_unit: u32::MAX,
    };
    for layer in 0..layer_count {
        let first_page = u64::from(layer) * 1000;
        for (transient_of, first_page) in [(None, first_page), (Some(layer), first_page + 500)] {
            let run = PageRun {
                shard_index: 0,
                first_page,
                page_count: u64::from(requests),
            };
            let len_bytes = u64::from(requests) * request_bytes;
            layout.fetches.push(Fetch {
                run,
                len_bytes,
                transient_of,
                request_count: requests,
            });
        }
        layout.of_layer.push(vec![2 * layer, 2 * layer + 1]);
    }
    Arc::new(layout)
}

fn finish(state: &mut State, fetch: u32, requests: u32) {
    for request in 0..requests {
        if state.completed(fetch, request, Ok(()), true) == Outcome::Complete {
            state.published(fetch);
        }
    }
}

fn read_all(state: &mut State, requests: u32) -> Vec<Job> {
    let mut jobs = Vec::new();
    while let Some(job) = state.pick() {
        finish(state, job.fetch, requests);
        jobs.push(job);
    }
    jobs
}

#[test]
fn prefetch_fills_the_slots_and_all_resident_pages() {
    let mut state = State::new(layout(6, 3, 2, false), None);
    let jobs = read_all(&mut state, 2);
    let transient: Vec<u32> = jobs
        .iter()
        .filter(|job| job.slot.is_some())
        .map(|job| job.fetch / 2)
        .collect();
    assert_eq!(
        transient,
        [0, 1, 2],
        "the ring holds the first layers of the pass"
    );
    assert_eq!(
        jobs.len(),
        6 + 3,
        "resident pages of later layers are read while the ring is full"
    );
}

#[test]
fn a_released_layer_gives_its_slot_to_the_next_one_due_and_the_pass_wraps() {
    let mut state = State::new(layout(4, 3, 1, false), None);
    read_all(&mut state, 1);
    let mut loads = Vec::new();
    for layer in [0, 1, 2, 3, 0, 1, 2, 3] {
        assert!(
            state.ready(layer, Need::Whole),
            "layer {layer} was prefetched"
        );
        state.lease(layer, 1).unwrap();
        state.release(layer, 1).unwrap();
        loads.extend(read_all(&mut state, 1).iter().map(|job| job.fetch / 2));
    }
    assert_eq!(loads, [3, 0, 1, 2, 3, 0, 1, 2]);
}

#[test]
fn a_leased_layer_keeps_its_slot() {
    let mut state = State::new(layout(8, 3, 1, false), None);
    read_all(&mut state, 1);
    for layer in 0..3 {
        state.lease(layer, 1).unwrap();
    }
    state.demand(5, true);
    assert!(state.pick().is_none(), "all slots are leased");
    assert!(
        state.would_deadlock(5, 1),
        "the thread that holds them all would wait for itself"
    );
    assert!(!state.would_deadlock(5, 2), "another thread may wait");
    state.release(1, 1).unwrap();
    assert!(!state.would_deadlock(5, 1));
    let job = state.pick().expect("the demanded layer gets the slot");
    assert_eq!((job.fetch, job.urgent), (5 * 2 + 1, true));
}

#[test]
fn a_layer_that_was_tried_stays_until_the_host_comes_back_or_goes_on() {
    for comes_back in [true, false] {
        let mut state = State::new(layout(8, 3, 1, false), None);
        read_all(&mut state, 1);
        state.tried(6);
        read_all(&mut state, 1);
        assert!(state.ready(6, Need::Whole), "prefetch leaves it alone");
        if comes_back {
            state.lease(6, 1).unwrap();
            state.release(6, 1).unwrap();
        }
        for layer in 0..6 {
            state.demand(layer, false);
            read_all(&mut state, 1);
            state.lease(layer, 1).unwrap();
            state.release(layer, 1).unwrap();
        }
        assert!(
            !state.is_expected(6),
            "a host that went on is waited for no more"
        );
    }
}

/// A host that computes with the parts of a layer as they arrive tries for the rest while it has a lease. Its slot must be
/// free for what comes next as soon as it has released, or the ring works like one of a single slot.
#[test]
fn a_try_under_a_lease_keeps_no_slot_after_its_release() {
    let mut state = State::new(layout(8, 3, 1, false), None);
    for layer in 0..6 {
        state.demand(layer, false);
        read_all(&mut state, 1);
        state.lease(layer, 1).unwrap();
        state.tried(layer);
        if layer % 2 == 0 {
            // Two leases: two to come back.
            state.lease(layer, 1).unwrap();
            state.release(layer, 1).unwrap();
        }
        state.release(layer, 1).unwrap();
        assert!(!state.is_expected(layer));
        read_all(&mut state, 1);
        for next in 1..=3 {
            let next = (layer + next) % 8;
            assert!(state.ready(next, Need::Whole), "{next} after {layer}");
        }
    }
}

#[test]
fn a_range_is_ready_before_its_layer() {
    let mut state = State::new(layout(2, 2, 4, false), None);
    let mut job = state.pick().unwrap();
    while job.slot.is_none() {
        finish(&mut state, job.fetch, 4);
        job = state.pick().unwrap();
    }
    let base = 500 * 4096;
    let range = |from: u64, to: u64| Need::Bytes {
        shard_index: 0,
        start_bytes: base + from,
        end_bytes: base + to,
    };
    state.completed(job.fetch, 1, Ok(()), true);
    assert!(state.ready(0, range(4096, 8192)));
    assert!(
        !state.ready(0, range(4095, 8192)),
        "its first byte is in a request that is out"
    );
    assert!(!state.ready(0, range(4096, 8193)));
    assert!(!state.ready(0, Need::Whole));
}

#[test]
fn a_failed_read_fails_the_layer_once_and_frees_the_slot() {
    let mut state = State::new(layout(5, 2, 2, false), None);
    let job = loop {
        let job = state.pick().unwrap();
        if job.slot.is_some() {
            break job;
        }
        finish(&mut state, job.fetch, 2);
    };
    let error = Error::new(ErrorKind::Io, "drive");
    assert_eq!(
        state.completed(job.fetch, 0, Err(error), true),
        Outcome::Pending
    );
    assert_eq!(state.withdraw(job.fetch, 1), Outcome::Failed);
    assert!(!state.ready(0, Need::Whole));
    let again: Vec<u32> = read_all(&mut state, 2)
        .iter()
        .map(|job| job.fetch)
        .collect();
    assert!(
        !again.contains(&job.fetch),
        "a failed layer is not read again until somebody asks"
    );
    assert_eq!(
        state.take_error(0).map(|error| error.kind()),
        Some(ErrorKind::Io)
    );
    assert!(state.take_error(0).is_none());
    state.demand(0, true);
    assert_eq!(state.pick().map(|job| job.fetch), Some(job.fetch));
}

#[test]
fn a_slot_that_the_kernel_keeps_is_never_used_again() {
    let mut state = State::new(layout(5, 2, 1, false), None);
    let error = || Err(Error::new(ErrorKind::Timeout, "stuck"));
    let mut lost = Vec::new();
    for layer in [0, 1] {
        state.demand(layer, false);
        let job = loop {
            let job = state.pick().unwrap();
            if job.slot.is_some() {
                break job;
            }
            finish(&mut state, job.fetch, 1);
        };
        assert!(!lost.contains(&job.slot));
        lost.push(job.slot);
        assert_eq!(
            state.completed(job.fetch, 0, error(), false),
            Outcome::Failed
        );
    }
    assert!(
        state.fatal.is_some(),
        "without a slot nobody can be served, and they are told"
    );
    read_all(&mut state, 1);
    state.demand(3, true);
    assert!(state.pick().is_none());
}

#[test]
fn leases_are_counted_and_bounded() {
    let mut state = State::new(layout(2, 2, 1, false), None);
    read_all(&mut state, 1);
    state.lease(0, 1).unwrap();
    state.lease(0, 1).unwrap();
    state.release(0, 2).unwrap();
    state.release(0, 1).unwrap();
    assert_eq!(state.release(0, 1).unwrap_err().kind(), ErrorKind::Invalid);
    for thread in 0..LEASES_MAX as u64 {
        state.lease(1, thread).unwrap();
    }
    assert_eq!(state.lease(1, 1 << 40).unwrap_err().kind(), ErrorKind::Busy);
}

/// One simulated host thread: walks the layers, holds one at a time.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Host {
    Wants(u32),
    Waits(u32),
    Holds(u32),
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever the interleaving: a held layer stays whole, nobody starves, and every acquire is served.
    #[test]
    fn hosts_always_progress_and_never_lose_a_held_layer(
        layer_count in 2u32..9,
        slots_count in 2u32..4,
        fixed in any::<bool>(),
        hosts in 1usize..6,
        choices in prop::collection::vec((any::<u8>(), any::<u8>()), 400..1200),
    ) {
        let requests = 3;
        let mut state = State::new(layout(layer_count, slots_count, requests, fixed), None);
        let mut host: Vec<Host> = (0..hosts as u32).map(|index| Host::Wants(index % layer_count)).collect();
        let mut flying: Vec<(u32, u32)> = Vec::new();
        let mut served = 0u64;
        let mut step = |state: &mut State, action: u8, pickup: u8, flying: &mut Vec<(u32, u32)>, host: &mut [Host], failures: bool| {
            match action % 3 {
                0 => if let Some(job) = state.pick() {
                    flying.extend((0..requests).map(|request| (job.fetch, request)));
                },
                1 if !flying.is_empty() => {
                    let (fetch, request) = flying.swap_remove(pickup as usize % flying.len());
                    let fails = failures && pickup.is_multiple_of(16);
                    let result = if fails { Err(Error::new(ErrorKind::Io, "drive")) } else { Ok(()) };
                    if state.completed(fetch, request, result, true) == Outcome::Complete {
                        state.published(fetch);
                    }
                }
                _ => {
                    let index = pickup as usize % host.len();
                    let thread = index as u64;
                    host[index] = match host[index] {
                        Host::Wants(layer) if state.ready(layer, Need::Whole) => {
                            state.lease(layer, thread).unwrap();
                            served += 1;
                            Host::Holds(layer)
                        }
                        Host::Wants(layer) => {
                            prop_assert!(!state.would_deadlock(layer, thread), "it holds nothing");
                            drop(state.take_error(layer));
                            state.demand(layer, true);
                            Host::Waits(layer)
                        }
                        Host::Waits(layer) if state.ready(layer, Need::Whole) => {
                            state.stop_waiting(layer);
                            state.lease(layer, thread).unwrap();
                            served += 1;
                            Host::Holds(layer)
                        }
                        Host::Waits(layer) => {
                            drop(state.take_error(layer));
                            state.demand(layer, false);
                            Host::Waits(layer)
                        }
                        Host::Holds(layer) => {
                            state.release(layer, thread).unwrap();
                            Host::Wants((layer + 1) % layer_count)
                        }
                    };
                }
            }
            for entry in host.iter() {
                if let Host::Holds(layer) = entry {
                    prop_assert!(state.ready(*layer, Need::Whole), "layer {layer} was taken from under its holder");
                }
            }
            Ok(())
        };
        for (action, pickup) in choices {
            step(&mut state, action, pickup, &mut flying, &mut host, true)?;
        }
        // A fair run without failures: everybody gets on.
        let before = state.acquires;
        for round in 0..2000u32 {
            step(&mut state, (round % 3) as u8, (round / 3 % 251) as u8, &mut flying, &mut host, false)?;
        }
        prop_assert!(state.acquires > before + u64::from(layer_count), "stuck after {before} acquires: {host:?}");
    }
}
