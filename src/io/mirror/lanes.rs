//! Which copy serves the next request: one lane per copy, and how fast each has shown itself.
//!
//! Seconds per byte are known of a lane, and not bytes per second: they add up to the time that a layer waits, and a mean of
//! them is slow as soon as one of them was. Invariants: what is outstanding is booked to one lane; a lane is given nothing
//! that would take it much longer than the fastest one's whole queue, so a copy that crawls makes nobody wait. Pure bookkeeping:
//! it reads nothing and has no clock of its own.
//! Place: part of `reader` in `file -> catalog -> plan -> reader -> pool -> lease -> host`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Copies;
use super::probe::{PROBE_BYTES, Probe};
use crate::error::{Error, Result};
use crate::io::{Completion, Request};

/// How much a new measurement weighs against what was known.
const COST_WEIGHT: f64 = 0.25;
/// A lane that shows itself so many times faster than known has recovered.
const RECOVERED: f64 = 4.0;
/// A measurement takes at least this many requests: one alone may have met an empty or a full queue.
pub(super) const COST_REQUESTS: u32 = 4;
/// What is assumed while nothing was measured anywhere.
const COST_UNKNOWN: f64 = 1e-9;
/// A lane that is too slow is tried again after so many times what that takes,
const PROBE_REST: f64 = 8.0;
/// and within these bounds.
const PROBE_REST_SECONDS: std::ops::RangeInclusive<f64> = 1.0..=60.0;

/// One copy at work.
#[derive(Debug, Default)]
pub(super) struct Lane {
    pub(super) is_dropped: bool,
    pub(super) outstanding_count: u32,
    pub(super) outstanding_bytes: u64,
    /// Seconds per byte, once they were measured.
    pub(super) cost: Option<f64>,
    /// The measurement under way: since when it has had something to do, and what it did.
    pub(super) busy_since: Option<Instant>,
    idle_since: Option<Instant>,
    done_bytes: u64,
    done_count: u32,
    /// It was said that it is left out.
    is_left_out: bool,
}

impl Lane {
    pub(super) fn begin(&mut self, len_bytes: u64, now: Instant) {
        self.outstanding_count += 1;
        self.outstanding_bytes += len_bytes;
        self.busy_since.get_or_insert(now);
    }

    pub(super) fn end(&mut self, len_bytes: u64, now: Instant) {
        self.outstanding_count -= 1;
        self.outstanding_bytes -= len_bytes;
        self.done_bytes += len_bytes;
        self.done_count += 1;
        let Some(since) = self.busy_since else { return };
        let is_idle = self.outstanding_count == 0;
        if self.done_count >= COST_REQUESTS || is_idle {
            let seconds = now.saturating_duration_since(since).as_secs_f64().max(1e-6);
            let measured = seconds / self.done_bytes.max(1) as f64;
            self.cost = Some(self.cost.map_or(measured, |known| learn(known, measured)));
            self.busy_since = (!is_idle).then_some(now);
            self.idle_since = is_idle.then_some(now);
            (self.done_bytes, self.done_count) = (0, 0);
        }
    }

    /// Seconds per byte as they look now. Requests that do not come back teach, too: if everything that is out came this
    /// moment, the lane would have been as slow as that.
    fn cost_at(&self, now: Instant) -> Option<f64> {
        let known = self.cost?;
        let Some(since) = self.busy_since else {
            return Some(known);
        };
        let begun_bytes = (self.done_bytes + self.outstanding_bytes).max(1);
        let shown = now.saturating_duration_since(since).as_secs_f64() / begun_bytes as f64;
        Some(known.max(shown))
    }
}

/// What is known after one more measurement. A mean would forget a bad time too slowly and one fast answer (a cache's) may
/// mislead: of a far better one half counts, on the scale of factors.
fn learn(known: f64, measured: f64) -> f64 {
    if measured * RECOVERED < known {
        (known * measured).sqrt()
    } else {
        known + (measured - known) * COST_WEIGHT
    }
}

/// A request on its way to a copy.
#[derive(Debug, Clone)]
pub(super) struct Sent {
    pub(super) request: Request,
    pub(super) lane: usize,
}

/// The copies of a model.
#[derive(Debug)]
pub(super) struct Spread {
    pub(super) lanes: Vec<Lane>,
    pub(super) sent: Vec<Sent>,
    pub(super) depth: u32,
    pub(super) request_bytes: u64,
    pub(super) copies: Arc<Copies>,
    pub(super) probe: Probe,
    /// Completions kept while a wait sorts them.
    pub(super) sorted: Vec<Completion>,
    /// The time of all choices until the next look: who is told that there is room finds it when he comes.
    looked_at: Instant,
}

impl Spread {
    /// `depth` requests of `request_bytes` for each copy.
    pub(super) fn new(copies: Arc<Copies>, depth: u32, request_bytes: u64) -> Result<Self> {
        let lanes_count = copies.count();
        let requests_count = depth as usize * lanes_count;
        Ok(Self {
            lanes: (0..lanes_count).map(|_| Lane::default()).collect(),
            sent: Vec::with_capacity(requests_count),
            depth,
            request_bytes,
            copies,
            probe: Probe::new()?,
            sorted: Vec::with_capacity(requests_count),
            looked_at: Instant::now(),
        })
    }

    /// It is this late.
    pub(super) const fn look(&mut self, now: Instant) {
        self.looked_at = now;
    }

    /// Seconds per byte of a lane; before the first measurement those of the best, or just any.
    fn cost(&self, lane: usize) -> f64 {
        let known = |lane: &Lane| lane.cost_at(self.looked_at);
        known(&self.lanes[lane]).unwrap_or_else(|| {
            let others = self.lanes.iter().filter_map(known);
            others.reduce(f64::min).unwrap_or(COST_UNKNOWN)
        })
    }

    /// How many requests a copy may have: what it does in the time in which the fastest does its depth. None if it were not
    /// done with one in twice that time: layers would wait for it longer than they would without it.
    pub(super) fn allowed(&self, lane: usize) -> u32 {
        if self.lanes[lane].is_dropped {
            return 0;
        }
        if self.lanes[lane].cost.is_none() {
            return 1; // Nobody knows whether it crawls.
        }
        let live = (0..self.lanes.len()).filter(|&other| !self.lanes[other].is_dropped);
        let fastest = live.map(|other| self.cost(other)).fold(f64::MAX, f64::min);
        let share = fastest / self.cost(lane).max(f64::MIN_POSITIVE);
        ((f64::from(self.depth) * share).round() as u32).min(self.depth)
    }

    pub(super) fn free(&self) -> usize {
        let lanes = 0..self.lanes.len();
        let free = lanes.map(|lane| {
            let outstanding = self.lanes[lane].outstanding_count;
            self.allowed(lane).saturating_sub(outstanding) as usize
        });
        free.sum()
    }

    /// The copy that would have `len_bytes` first, of those with room (or, with `crowd`, of all).
    pub(super) fn choose(&self, len_bytes: u64, crowd: bool) -> Option<usize> {
        let open = (0..self.lanes.len()).filter(|&lane| {
            let state = &self.lanes[lane];
            !state.is_dropped && (crowd || state.outstanding_count < self.allowed(lane))
        });
        let seconds =
            |lane: usize| (self.lanes[lane].outstanding_bytes + len_bytes) as f64 * self.cost(lane);
        open.min_by(|&a, &b| seconds(a).total_cmp(&seconds(b)))
    }

    /// A request of a lane is over, at the time of the last look.
    pub(super) fn end(&mut self, lane: usize, len_bytes: u64) {
        self.lanes[lane].end(len_bytes, self.looked_at);
        let is_left_out = self.allowed(lane) == 0;
        let state = &mut self.lanes[lane];
        if state.is_dropped || std::mem::replace(&mut state.is_left_out, is_left_out) == is_left_out
        {
            return;
        }
        let directory = self.copies.directory(lane).display();
        if is_left_out {
            let rate = 1e-6 / state.cost.unwrap_or(COST_UNKNOWN);
            log::info!(
                "the copy in {directory} is left out, at {rate:.1} MB/s; it is tried now and then"
            );
        } else {
            log::info!("the copy in {directory} is read from again");
        }
    }

    /// A lane that is too slow to be given anything, has nothing to do and has had its rest.
    pub(super) fn probe_due(&self) -> Option<usize> {
        (0..self.lanes.len()).find(|&lane| {
            let state = &self.lanes[lane];
            let (Some(cost), Some(since)) = (state.cost, state.idle_since) else {
                return false;
            };
            let (least, most) = PROBE_REST_SECONDS.into_inner();
            let seconds = (cost * PROBE_BYTES as f64 * PROBE_REST).clamp(least, most);
            !state.is_dropped
                && state.outstanding_count == 0
                && self.allowed(lane) == 0
                && self.looked_at.saturating_duration_since(since)
                    >= Duration::from_secs_f64(seconds)
        })
    }

    pub(super) fn live_count(&self) -> usize {
        self.lanes.iter().filter(|lane| !lane.is_dropped).count()
    }

    /// Uses a copy no more, and says so once; false for the last one, which stays.
    pub(super) fn drop_lane(&mut self, lane: usize, reason: &Error) -> bool {
        if self.lanes[lane].is_dropped {
            return true;
        }
        if self.live_count() == 1 {
            return false;
        }
        self.lanes[lane].is_dropped = true;
        self.copies.drop_one(lane, reason);
        true
    }
}

#[cfg(test)]
#[path = "lanes_tests.rs"]
mod tests;
