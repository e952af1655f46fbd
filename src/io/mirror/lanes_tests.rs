//! Tests of the choice among copies, in a time of their own: nothing is read, and no clock is looked at.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::super::Source;
use super::*;

const REQUEST_BYTES: u64 = 1 << 20;
const FAST: f64 = 0.001;
const CRAWL: f64 = 1.0;

fn spread(lanes_count: usize, depth: u32) -> Spread {
    let source = |_| Source {
        directory: PathBuf::from("copy"),
        bytes: AtomicU64::new(0),
        dropped: AtomicBool::new(false),
    };
    let copies = Copies((0..lanes_count).map(source).collect());
    Spread::new(Arc::new(copies), depth, REQUEST_BYTES).unwrap()
}

/// Drives that do one request after the other, and how long each takes at which time.
struct Simulation {
    spread: Spread,
    begin: Instant,
    now_seconds: f64,
    seconds_per_request: Vec<fn(f64) -> f64>,
    /// Per drive: length, when it is done, whether it is a probe.
    queues: Vec<VecDeque<(u64, f64, bool)>>,
    /// Per drive: when each request was given to it, without probes.
    given: Vec<Vec<f64>>,
    probes: u32,
    done: u32,
}

impl Simulation {
    fn new(seconds_per_request: &[fn(f64) -> f64]) -> Self {
        let count = seconds_per_request.len();
        Self {
            spread: spread(count, 8),
            begin: Instant::now(),
            now_seconds: 0.0,
            seconds_per_request: seconds_per_request.to_vec(),
            queues: vec![VecDeque::new(); count],
            given: vec![Vec::new(); count],
            probes: 0,
            done: 0,
        }
    }

    fn now(&self) -> Instant {
        self.begin + Duration::from_secs_f64(self.now_seconds)
    }

    fn give(&mut self, lane: usize, len_bytes: u64, is_probe: bool) {
        let free_at = self.queues[lane].back().map_or(0.0, |last| last.1);
        let from = free_at.max(self.now_seconds);
        let share = len_bytes as f64 / REQUEST_BYTES as f64;
        let done_at = from + self.seconds_per_request[lane](from) * share;
        self.queues[lane].push_back((len_bytes, done_at, is_probe));
        let now = self.now();
        self.spread.lanes[lane].begin(len_bytes, now);
    }

    fn step(&mut self) {
        self.spread.look(self.now());
        while let Some(lane) = self.spread.choose(REQUEST_BYTES, false) {
            self.give(lane, REQUEST_BYTES, false);
            self.given[lane].push(self.now_seconds);
        }
        assert_eq!(self.spread.free(), 0, "what is free can be chosen");
        if let Some(lane) = self.spread.probe_due() {
            self.give(lane, PROBE_BYTES, true);
            self.probes += 1;
        }
        let fronts = self.queues.iter().enumerate();
        let next = fronts.filter_map(|(lane, queue)| Some((lane, queue.front()?.1)));
        let (lane, at) = next.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
        self.now_seconds = at;
        let (len_bytes, _, is_probe) = self.queues[lane].pop_front().unwrap();
        self.spread.look(self.now());
        self.spread.end(lane, len_bytes);
        self.done += u32::from(!is_probe);
    }

    fn run_until(&mut self, seconds: f64) {
        while self.now_seconds < seconds {
            self.step();
        }
    }

    fn given_between(&self, lane: usize, from: f64, to: f64) -> usize {
        let given = self.given[lane].iter();
        given.filter(|at| (from..to).contains(*at)).count()
    }
}

#[test]
fn a_copy_that_begins_to_crawl_gets_nothing_more_and_one_that_recovers_is_found() {
    let mut drives = Simulation::new(&[
        |_| FAST,
        |at| {
            if (1.0..60.0).contains(&at) {
                CRAWL
            } else {
                FAST
            }
        },
    ]);
    drives.run_until(1.0);
    let half = drives.given_between(1, 0.0, 1.0) as f64;
    assert!((900.0..1100.0).contains(&half), "{half} of 2000");
    // Nothing of what it has comes back for a second: that alone tells.
    drives.run_until(60.0);
    let crawling = drives.given_between(1, 1.0, 60.0);
    assert!(crawling <= 2, "{crawling} requests for a copy that crawls");
    let alone = drives.given_between(0, 1.0, 60.0);
    assert!(alone >= 58_900, "the other works as if it were alone");
    assert!(
        (2..=12).contains(&drives.probes),
        "{} probes",
        drives.probes
    );
    drives.run_until(90.0);
    let found = drives.given[1].iter().find(|at| **at > 2.0).unwrap();
    assert!(*found < 80.0, "found after {found} s");
    let half = drives.given_between(1, 85.0, 90.0);
    assert!((4500..5500).contains(&half), "{half} of 10000");
}

#[test]
fn a_copy_that_crawls_from_the_beginning_gets_one_request() {
    for crawling in [0, 1] {
        let mut speeds: [fn(f64) -> f64; 2] = [|_| FAST; 2];
        speeds[crawling] = |_| CRAWL;
        let mut drives = Simulation::new(&speeds);
        drives.run_until(30.0);
        assert_eq!(drives.given[crawling].len(), 1);
        assert!(drives.probes >= 1);
        assert!(drives.done >= 29_900, "{}", drives.done);
    }
}

#[test]
fn copies_of_like_speed_share_and_are_never_left_out() {
    let mut drives = Simulation::new(&[|_| FAST, |_| 2.0 * FAST, |_| 5.0 * FAST]);
    drives.run_until(10.0);
    assert_eq!(drives.probes, 0);
    let all = f64::from(drives.done);
    // 1000, 500 and 200 a second.
    assert!((16_000.0..17_100.0).contains(&all), "{all}");
}

#[test]
fn requests_follow_the_costs() {
    let mut spread = spread(2, 8);
    // Nothing is known: one request each tells.
    assert_eq!((spread.allowed(0), spread.allowed(1)), (1, 1));
    spread.lanes[0].cost = Some(1.0 / 2e9);
    assert_eq!((spread.allowed(0), spread.allowed(1)), (8, 1));
    spread.lanes[1].cost = Some(1.0 / 0.5e9);
    assert_eq!((spread.allowed(0), spread.allowed(1)), (8, 2));
    let now = Instant::now();
    let mut served = [0, 0];
    while let Some(lane) = spread.choose(REQUEST_BYTES, false) {
        spread.lanes[lane].begin(REQUEST_BYTES, now);
        served[lane] += 1;
    }
    assert_eq!(served, [8, 2]);
    assert_eq!(spread.free(), 0);
    // One that crawls has none, unless it is the last.
    spread.lanes[1].cost = Some(1e-3);
    assert_eq!(spread.allowed(1), 0);
    spread.lanes[0].is_dropped = true;
    assert_eq!((spread.allowed(0), spread.allowed(1)), (0, 8));
    assert_eq!(spread.live_count(), 1);
}

#[test]
fn requests_that_do_not_come_back_teach() {
    let mut spread = spread(2, 8);
    let begin = Instant::now();
    for lane in &mut spread.lanes {
        lane.cost = Some(1e-9);
        (0..8).for_each(|_| lane.begin(REQUEST_BYTES, begin));
    }
    // One answers as ever; of the other nothing came for a second, then a single request.
    for millisecond in 1..=8 {
        spread.look(begin + Duration::from_millis(millisecond));
        spread.end(0, REQUEST_BYTES);
    }
    assert_eq!((spread.allowed(0), spread.allowed(1)), (8, 8));
    spread.look(begin + Duration::from_secs(1));
    assert_eq!((spread.allowed(0), spread.allowed(1)), (8, 0));
    spread.end(1, REQUEST_BYTES);
    assert_eq!(spread.choose(REQUEST_BYTES, false), Some(0));
    assert_eq!(spread.free(), 8, "all of the other");
}

#[test]
fn a_cost_is_what_was_done_while_there_was_something_to_do() {
    let mut lane = Lane::default();
    let begin = Instant::now();
    for _ in 0..COST_REQUESTS {
        lane.begin(1 << 20, begin);
    }
    for _ in 0..COST_REQUESTS {
        lane.end(1 << 20, begin + Duration::from_millis(4));
    }
    let expected = 0.004 / f64::from(COST_REQUESTS) / f64::from(1 << 20);
    let is_expected = |lane: &Lane| (lane.cost.unwrap() / expected - 1.0).abs() < 1e-6;
    assert!(is_expected(&lane), "{lane:?}");
    // Idle time is not slowness: it starts anew.
    assert!(lane.busy_since.is_none());
    let later = begin + Duration::from_secs(60);
    lane.begin(1 << 20, later);
    lane.end(1 << 20, later + Duration::from_millis(1));
    assert!(is_expected(&lane), "{lane:?}");
}

#[test]
fn slowness_is_learned_at_once_and_a_single_fast_answer_is_not_believed() {
    assert!(learn(1.0, 1000.0) > 200.0);
    assert!(learn(1000.0, 1.0) > 30.0);
    let mut cost = 1000.0;
    for _ in 0..4 {
        cost = learn(cost, 1.0);
    }
    assert!(cost < 2.5, "{cost}");
}
