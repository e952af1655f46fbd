//! Which copy serves the next request: one lane per copy, and how fast each has shown itself.
//!
//! Pure bookkeeping: it reads nothing and has no clock of its own. Invariant: what is outstanding is booked to one lane.
//! Place: part of `reader` in `file -> catalog -> plan -> reader -> pool -> lease -> host`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Copies;
use crate::error::Error;
use crate::io::{Completion, Request};

/// How much a newly measured rate weighs against what was known.
const RATE_WEIGHT: f64 = 0.25;
/// A rate is taken over at least this many requests: one alone may have met an empty or a full queue.
pub(super) const RATE_REQUESTS: u32 = 4;

/// One copy at work.
#[derive(Debug, Default)]
pub(super) struct Lane {
    pub(super) is_dropped: bool,
    pub(super) outstanding_count: u32,
    outstanding_bytes: u64,
    /// Bytes per second; 0 = not known yet.
    pub(super) rate: f64,
    /// The measurement under way: since when it has had something to do, and what it did.
    pub(super) busy_since: Option<Instant>,
    done_bytes: u64,
    done_count: u32,
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
        if self.done_count >= RATE_REQUESTS || is_idle {
            let seconds = now.saturating_duration_since(since).as_secs_f64().max(1e-6);
            let measured = self.done_bytes as f64 / seconds;
            self.rate = if self.rate > 0.0 {
                self.rate + (measured - self.rate) * RATE_WEIGHT
            } else {
                measured
            };
            self.busy_since = (!is_idle).then_some(now);
            (self.done_bytes, self.done_count) = (0, 0);
        }
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
    /// Completions kept while a wait sorts them.
    pub(super) sorted: Vec<Completion>,
}

impl Spread {
    /// Bytes per second of a lane; before the first measurement that of the others, or just any.
    fn rate(&self, lane: usize) -> f64 {
        let own = self.lanes[lane].rate;
        if own > 0.0 {
            return own;
        }
        let most = self.lanes.iter().map(|lane| lane.rate).fold(0.0, f64::max);
        if most > 0.0 { most } else { 1e9 }
    }

    /// How many requests a copy may have: what it does in the time in which the fastest does its depth.
    pub(super) fn allowed(&self, lane: usize) -> u32 {
        if self.lanes[lane].is_dropped {
            return 0;
        }
        let live = (0..self.lanes.len()).filter(|&other| !self.lanes[other].is_dropped);
        let fastest = live.map(|other| self.rate(other)).fold(0.0, f64::max);
        let share = self.rate(lane) / fastest.max(1e-9);
        ((f64::from(self.depth) * share).round() as u32).clamp(1, self.depth)
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
            |lane: usize| (self.lanes[lane].outstanding_bytes + len_bytes) as f64 / self.rate(lane);
        open.min_by(|&a, &b| seconds(a).total_cmp(&seconds(b)))
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
        let copy = &self.copies.0[lane];
        copy.dropped.store(true, Ordering::Relaxed);
        log::warn!(
            "the copy in {} is used no more: {reason}",
            copy.directory.display()
        );
        true
    }
}
