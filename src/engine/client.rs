//! What the stream knows of one client of the daemon: how far its pass is, whether it gets on, and what it is due.
//!
//! A client is *due* a layer once per pass: when it has not had it yet, or when, since the load that it had, as many loads
//! were begun as a pass takes. Who asks for the same layers again and again is not due them, and others need not pay for
//! his reads: see [`super::board::Board::listen`]. A wait is *expected* when the client comes to that layer in its order.
//! What a client says it acquired counts as had, and so does what it waited for and was given: a page that lies gains
//! nothing by it.
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: the lease, between processes.

use super::board::{WANT_COUNT, place};
use super::order::Order;
use crate::mem::SharedWords;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// A client that does not get on for this long is not waited for, or four times its usual pace if that is longer.
const IDLE_LEAST: Duration = Duration::from_millis(50);
/// And it is never waited for longer than this.
const IDLE_MOST: Duration = Duration::from_millis(500);
/// No number of a wait: those have 16 bits.
const NO_WAIT: u32 = u32::MAX;

/// The loads of transient runs, counted: the clock by which it is told that a pass has gone by.
#[derive(Debug)]
pub struct Loads {
    count: AtomicU64,
    /// Per layer: the number of its last load; 0 = none.
    last: Box<[AtomicU64]>,
    /// A pass, in loads; 0 = as good as none.
    pass: AtomicU64,
}

impl Loads {
    pub(super) fn new(layer_count: u32) -> Self {
        Self {
            count: AtomicU64::new(0),
            last: (0..layer_count).map(|_| AtomicU64::new(0)).collect(),
            pass: AtomicU64::new(0),
        }
    }

    pub(super) fn begin(&self, layer: u32) {
        let number = self.count.fetch_add(1, Relaxed) + 1;
        self.last[layer as usize].store(number, Relaxed);
    }

    pub(super) fn set_pass(&self, loads: u64) {
        self.pass.store(loads, Relaxed);
    }

    fn last(&self, layer: u32) -> u64 {
        self.last[layer as usize].load(Relaxed)
    }

    fn is_pass_since(&self, load: u64) -> bool {
        let loads = self.count.load(Relaxed).saturating_sub(load);
        loads >= self.pass.load(Relaxed)
    }
}

/// What a client last had of a layer.
#[derive(Debug, Clone, Copy)]
struct Had {
    /// Which load it was; 0 = none yet.
    load: u64,
    /// The wait that it answered, as long as nobody has heard that the client took it up.
    wait: u32,
    /// The first load for that wait: evicted before it was taken up is bad luck, once.
    first: bool,
}

const NOTHING: Had = Had {
    load: 0,
    wait: NO_WAIT,
    first: false,
};

/// What the stream knows of one client.
#[derive(Debug)]
pub struct Client {
    /// Its number.
    pub id: u64,
    /// Its page.
    pub page: Arc<SharedWords>,
    /// The order in which it walks.
    pub order: Order,
    /// Acquires seen in its ring.
    pub acquires: u64,
    /// The layer it acquired last.
    pub layer: Option<u32>,
    pub(super) attached: Instant,
    /// Waits that are served before anything is read ahead: expected ones, for layers it is due.
    pub(super) due: Vec<u32>,
    /// Its other waits.
    pub(super) again: Vec<u32>,
    /// How many layers a ring reads ahead.
    ahead: u32,
    /// Nobody else gets on: all it asks for is served.
    pub(super) alone: bool,
    /// Its waits are being served.
    pub(super) waiting: bool,
    /// The last wait that was put off: layer and number.
    put_off: (u32, u32),
    ring_seen: u32,
    /// When it was last heard of, when it last came to another layer, and when to one that it was due: got on.
    heard: Instant,
    moved: Instant,
    advanced: Instant,
    pace: Duration,
    /// Per layer: the number of the wait that a failure answered.
    answered: Vec<u32>,
    had: Vec<Had>,
}

impl Client {
    pub(super) fn new(
        id: u64,
        page: Arc<SharedWords>,
        (layer_count, ahead): (u32, u32),
        now: Instant,
    ) -> Self {
        Self {
            id,
            page,
            order: Order::new(layer_count as usize),
            acquires: 0,
            layer: None,
            attached: now,
            due: Vec::new(),
            again: Vec::new(),
            ahead,
            alone: true,
            waiting: false,
            put_off: (0, NO_WAIT),
            ring_seen: 0,
            heard: now,
            moved: now,
            advanced: now,
            pace: Duration::ZERO,
            answered: vec![NO_WAIT; layer_count as usize],
            had: vec![NOTHING; layer_count as usize],
        }
    }

    /// Reads what is new in its ring, at most one ring full.
    pub(super) fn listen(&mut self, loads: &Loads, now: Instant) {
        let head = self.page.load(place::RING_HEAD);
        let new = head.wrapping_sub(self.ring_seen);
        if new == 0 {
            return;
        }
        self.acquires += u64::from(new.min(1 << 16));
        let readable = new.min(place::RING_COUNT as u32);
        let mut advances = false;
        for back in (1..=readable).rev() {
            let at = head.wrapping_sub(back) as usize % place::RING_COUNT;
            let layer = self.page.load(place::RING + at);
            if (layer as usize) < self.had.len() {
                if self.layer != Some(layer) {
                    self.moved = now;
                }
                advances |= self.took(layer, loads);
                self.order.note(layer);
                self.layer = Some(layer);
            }
        }
        self.ring_seen = head;
        self.heard = now;
        if advances {
            let gap = now.duration_since(self.advanced) / new;
            self.pace = (self.pace * 3 + gap.min(IDLE_MOST)) / 4;
            self.advanced = now;
        }
    }

    /// It has acquired `layer`. True when that brings it on: another layer than before, and one it was due.
    fn took(&mut self, layer: u32, loads: &Loads) -> bool {
        let load = loads.last(layer);
        let before = std::mem::replace(&mut self.had[layer as usize], Had { load, ..NOTHING });
        let due = before.load == 0 || loads.is_pass_since(before.load);
        due && self.layer != Some(layer)
    }

    /// The load of `layer` that has just ended is for this client too, if it waits for it.
    pub(super) fn give(&mut self, layer: u32, loads: &Loads) {
        let want = self.page.load(place::want(layer));
        if want & WANT_COUNT != 0 {
            let had = &mut self.had[layer as usize];
            had.first = had.wait != want >> 16;
            had.wait = want >> 16;
            had.load = loads.last(layer);
        }
    }

    /// Nothing of what it had counts any more: another plan is in force.
    pub(super) fn forget(&mut self) {
        self.had.fill(NOTHING);
    }

    /// True when it has not had `layer` in this pass.
    #[must_use]
    pub fn is_due(&self, layer: u32, loads: &Loads) -> bool {
        let had = &self.had[layer as usize];
        had.load == 0 || self.missed(layer) || loads.is_pass_since(had.load)
    }

    /// True when a load for the present wait was evicted before the client took it up, for the first time.
    fn missed(&self, layer: u32) -> bool {
        let had = &self.had[layer as usize];
        had.first && had.wait == self.page.load(place::want(layer)) >> 16
    }

    /// True when it comes to `layer` in its order, holds a part of it, or never had it. Not for what it was given and did
    /// not say that it took: then nobody knows where it is.
    fn is_expected(&self, layer: u32) -> bool {
        let had = &self.had[layer as usize];
        let comes = self.order.distance(layer) <= self.ahead || self.holds(layer);
        had.load == 0 || self.missed(layer) || (had.wait == NO_WAIT && comes)
    }

    /// How many acquires until it comes to `layer`; `u32::MAX` for what is not in sight. While others get on, that is also
    /// what it is not due. What it waits for out of its order comes behind all that is read ahead for the others.
    /// `steers`: whether it has a say beyond its waits.
    #[must_use]
    pub fn distance(&self, layer: u32, steers: bool, loads: &Loads) -> u32 {
        if !self.alone && !self.is_due(layer, loads) {
            return u32::MAX;
        }
        let waits = self.again.contains(&layer);
        let last = if waits { self.ahead + 1 } else { u32::MAX };
        match steers {
            true => self.order.distance(layer).min(last),
            false => last,
        }
    }

    /// Sorts its waits, no more than `most`: those that cannot be put off first.
    pub(super) fn sort_waits(&mut self, most: usize, loads: &Loads, failed: impl Fn(u32) -> bool) {
        self.due.clear();
        self.again.clear();
        for layer in 0..self.had.len() as u32 {
            if !self.wants(layer, failed(layer)) {
                continue;
            }
            let list = match self.is_due(layer, loads) && self.is_expected(layer) {
                true => &mut self.due,
                false => &mut self.again,
            };
            if list.len() < most {
                list.push(layer);
            }
        }
        self.again.truncate(most - self.due.len());
    }

    /// The load of `layer` that it had last.
    pub(super) fn had_load(&self, layer: u32) -> u64 {
        self.had[layer as usize].load
    }

    /// Its first other wait is not served now. True for the first time.
    pub(super) fn put_off(&mut self) -> bool {
        let Some(&layer) = self.again.first() else {
            return false;
        };
        let wait = (layer, self.page.load(place::want(layer)) >> 16);
        std::mem::replace(&mut self.put_off, wait) != wait
    }

    pub(super) fn holds(&self, layer: u32) -> bool {
        self.page.load(place::hold(layer)) != 0
    }

    /// The wait for `layer` that no failure has answered yet.
    pub(super) fn wants(&self, layer: u32, failed: bool) -> bool {
        let want = self.page.load(place::want(layer));
        want & WANT_COUNT != 0 && (!failed || want >> 16 != self.answered[layer as usize])
    }

    /// The waits for `layer` so far are answered by a failure.
    pub(super) fn answer_failure(&mut self, layer: u32) {
        self.answered[layer as usize] = self.page.load(place::want(layer)) >> 16;
    }

    /// True when it gets on: it waits for what comes next, or came to what it was due within its usual pace.
    pub(super) fn advances(&self, now: Instant) -> bool {
        let patience = (self.pace * 4).clamp(IDLE_LEAST, IDLE_MOST);
        !self.due.is_empty() || now.duration_since(self.advanced) < patience
    }

    /// The layer that it acquires over and over: it will want that one next.
    pub(super) fn stays(&self, now: Instant) -> Option<u32> {
        let stands = self.heard.duration_since(self.moved) > IDLE_LEAST;
        let recently = now.duration_since(self.heard) < IDLE_MOST;
        self.layer.filter(|_| stands && recently)
    }

    /// True when it is worth keeping bytes for: it is being served, or gets on.
    #[must_use]
    pub fn active(&self, now: Instant) -> bool {
        self.waiting || self.advances(now)
    }

    /// True when it waits for the stream, and the stream for the drive.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.waiting
    }
}
