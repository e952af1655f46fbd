//! The board: what a model in the daemon shows its clients, and what they show it, in words of shared memory.
//!
//! One *area* per model, which only the daemon writes: per layer a state word and how many of its transient pages have
//! arrived. One *page* per client, which both can write and the daemon never believes: per layer how often the client
//! holds it and whether it waits for it, and a ring of its last acquires. A lease is taken without a system call: the
//! client raises its hold word, then reads the layer's state word. The stream takes the state word down before it looks
//! at the hold words. All of it is sequentially consistent, so one of the two always sees the other. A lying client
//! gets wrong bytes itself and is revoked; it cannot make the daemon touch memory that is not there.
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: the lease, between processes.

use super::order::Order;
use crate::error::{Error, ErrorKind, Result};
use crate::mem::SharedWords;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Where things lie, in words. Part of the protocol.
pub mod place {
    /// Area and page: [`super::LAYOUT`].
    pub const LAYOUT: usize = 0;
    /// Area: number of the plan in force.
    pub const GENERATION: usize = 1;
    /// Area: [`super::GATE_OPEN`] and the like. Clients sleep on it.
    pub const GATE: usize = 2;
    /// Area: the stream wants to be told of releases.
    pub const STARVING: usize = 3;
    /// Page: not 0 once the daemon has given the client up; the status, negated.
    pub const REVOKED: usize = 1;
    /// Page: acquires so far, wrapping; the ring's next place is this modulo [`RING_COUNT`].
    pub const RING_HEAD: usize = 2;
    /// Page: first word of the ring of acquired layers.
    pub const RING: usize = 16;
    /// Words of the ring.
    pub const RING_COUNT: usize = 256;
    const AREA_LAYERS: usize = 16;
    const PAGE_LAYERS: usize = RING + RING_COUNT;

    /// Area: state of a layer.
    #[must_use]
    pub const fn state(layer: u32) -> usize {
        AREA_LAYERS + 2 * layer as usize
    }
    /// Area: pages of the layer's transient run that have arrived, from its first.
    #[must_use]
    pub const fn arrived(layer: u32) -> usize {
        state(layer) + 1
    }
    /// Page: how often the client holds a layer.
    #[must_use]
    pub const fn hold(layer: u32) -> usize {
        PAGE_LAYERS + 2 * layer as usize
    }
    /// Page: low half how many threads wait for the layer, high half a number that grows with each wait.
    #[must_use]
    pub const fn want(layer: u32) -> usize {
        hold(layer) + 1
    }
    /// Words of an area.
    #[must_use]
    pub const fn area_count(layers: u32) -> usize {
        state(layers)
    }
    /// Words of a page.
    #[must_use]
    pub const fn page_count(layers: u32) -> usize {
        hold(layers)
    }
}

/// Version of the layout.
pub const LAYOUT: u32 = 1;
/// State: all of the layer is there.
pub const READY: u32 = 1;
/// State: its resident pages are there.
pub const RESIDENT: u32 = 2;
/// State: the last read of it failed.
pub const FAILED: u32 = 4;
/// Lowest bit of the number that every change of a state word raises.
pub const CHANGE: u32 = 8;
/// Gate: leases are given.
pub const GATE_OPEN: u32 = 0;
/// Gate: a new plan is being made; only threads that hold a lease may take another.
pub const GATE_DRAINING: u32 = 1;
/// Gate: the model is unloaded.
pub const GATE_CLOSED: u32 = 2;
/// What one wait adds to a want word: a waiter, and a number.
pub const WANT: u32 = 0x1_0001;
/// The waiters of a want word.
pub const WANT_COUNT: u32 = 0xffff;

/// A client that does nothing for this long is not waited for, or four times its usual pace if that is longer.
const IDLE_LEAST: Duration = Duration::from_millis(50);
/// And it is never waited for longer than this.
const IDLE_MOST: Duration = Duration::from_millis(500);

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
    attached: Instant,
    ring_seen: u32,
    last_active: Instant,
    pace: Duration,
    waiting: bool,
    /// Per layer: the number of the wait that a failure answered.
    answered: Vec<u32>,
}

impl Client {
    /// Reads what is new in its ring, at most one ring full.
    fn listen(&mut self, layer_count: u32, now: Instant) {
        let head = self.page.load(place::RING_HEAD);
        let new = head.wrapping_sub(self.ring_seen);
        if new == 0 {
            return;
        }
        self.acquires += u64::from(new.min(1 << 16));
        let readable = new.min(place::RING_COUNT as u32);
        for back in (1..=readable).rev() {
            let at = head.wrapping_sub(back) as usize % place::RING_COUNT;
            let layer = self.page.load(place::RING + at);
            if layer < layer_count {
                self.order.note(layer);
                self.layer = Some(layer);
            }
        }
        self.ring_seen = head;
        let gap = now.duration_since(self.last_active) / new.max(1);
        self.pace = (self.pace * 3 + gap.min(IDLE_MOST)) / 4;
        self.last_active = now;
    }

    fn holds(&self, layer: u32) -> bool {
        self.page.load(place::hold(layer)) != 0
    }

    /// The wait for `layer` that no failure has answered yet.
    fn wants(&self, layer: u32, failed: bool) -> bool {
        let want = self.page.load(place::want(layer));
        want & WANT_COUNT != 0 && (!failed || want >> 16 != self.answered[layer as usize])
    }

    /// True when it is worth keeping bytes for: it waits, or it did something within its usual pace.
    #[must_use]
    pub fn active(&self, now: Instant) -> bool {
        let patience = (self.pace * 4).clamp(IDLE_LEAST, IDLE_MOST);
        self.waiting || now.duration_since(self.last_active) < patience
    }

    /// True when it waits for the stream.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.waiting
    }
}

/// The daemon's side of the words of one model.
#[derive(Debug)]
pub struct Board {
    area: SharedWords,
    layer_count: u32,
    /// Most layers that one client's waits are honoured for at a time.
    demands_max: usize,
    clients: Mutex<Vec<Client>>,
    past_acquires: AtomicU64,
}

impl Board {
    /// A board for a model of so many layers, with no plan yet: its gate is draining.
    ///
    /// # Errors
    /// `Unsupported` for more layers than fit; what memfd_create says.
    pub fn new(layer_count: u32, demands_max: usize) -> Result<Self> {
        if layer_count > 1 << 16 {
            let context = format!("{layer_count} layers are too many for a daemon");
            return Err(Error::new(ErrorKind::Unsupported, context));
        }
        let area = SharedWords::create(place::area_count(layer_count))?;
        area.store(place::LAYOUT, LAYOUT);
        area.store(place::GATE, GATE_DRAINING);
        Ok(Self {
            area,
            layer_count,
            demands_max: demands_max.max(1),
            clients: Mutex::default(),
            past_acquires: AtomicU64::new(0),
        })
    }

    /// The area: for a client to map.
    #[must_use]
    pub fn area(&self) -> &SharedWords {
        &self.area
    }

    /// Number of layers.
    #[must_use]
    pub fn layer_count(&self) -> u32 {
        self.layer_count
    }

    /// The clients. Never taken while waiting for the engine's state.
    pub fn clients(&self) -> MutexGuard<'_, Vec<Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a page for a new client.
    ///
    /// # Errors
    /// What memfd_create says.
    pub fn attach(&self, id: u64) -> Result<Arc<SharedWords>> {
        let page = Arc::new(SharedWords::create(place::page_count(self.layer_count))?);
        page.store(place::LAYOUT, LAYOUT);
        self.clients().push(Client {
            id,
            page: Arc::clone(&page),
            order: Order::new(self.layer_count as usize),
            acquires: 0,
            layer: None,
            attached: Instant::now(),
            ring_seen: 0,
            last_active: Instant::now(),
            pace: Duration::ZERO,
            waiting: false,
            answered: vec![u32::MAX; self.layer_count as usize],
        });
        Ok(page)
    }

    /// Forgets a client: all it held is free.
    pub fn detach(&self, id: u64) {
        self.clients().retain(|client| {
            let stays = client.id != id;
            if !stays {
                self.past_acquires.fetch_add(client.acquires, Relaxed);
            }
            stays
        });
    }

    /// Takes over which layers a client will acquire next.
    pub fn hint(&self, id: u64, layers: &[u32]) {
        let mut clients = self.clients();
        if let Some(client) = clients.iter_mut().find(|client| client.id == id) {
            client.order.set_hint(layers);
        }
    }

    // ---- what clients see -----------------------------------------------------------------------------------

    /// Shows a layer's state, if it is another one than what is shown, and wakes whoever waits for the layer.
    pub fn show(&self, layer: u32, flags: u32, arrived_pages: u32) {
        let old = self.area.load(place::state(layer));
        if old % CHANGE == flags && self.area.load(place::arrived(layer)) == arrived_pages {
            return;
        }
        self.area.store(place::arrived(layer), arrived_pages);
        let next = (old & !(CHANGE - 1)).wrapping_add(CHANGE) | flags;
        self.area.store(place::state(layer), next);
        let awaited = |client: &Client| client.page.load(place::want(layer)) & WANT_COUNT != 0;
        if self.clients().iter().any(awaited) {
            self.area.wake(place::state(layer));
        }
    }

    /// Nothing of any layer is there.
    pub fn clear(&self) {
        for layer in 0..self.layer_count {
            self.show(layer, 0, 0);
        }
    }

    /// Says whether the stream wants to be told of releases.
    pub fn set_starving(&self, starving: bool) {
        self.area.store(place::STARVING, u32::from(starving));
    }

    /// Opens or closes the gate and wakes everybody who waits for that.
    pub fn set_gate(&self, gate: u32) {
        self.area.store(place::GATE, gate);
        self.area.wake(place::GATE);
        for layer in 0..self.layer_count {
            self.area.wake(place::state(layer));
        }
    }

    /// The gate.
    #[must_use]
    pub fn gate(&self) -> u32 {
        self.area.load(place::GATE)
    }

    /// Announces a new plan.
    pub fn set_generation(&self, generation: u32) {
        self.area.store(place::GENERATION, generation);
    }

    /// Number of the plan in force.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.area.load(place::GENERATION)
    }

    // ---- what clients say -----------------------------------------------------------------------------------

    /// True when some client says that it holds the layer.
    #[must_use]
    pub fn held(&self, layer: u32) -> bool {
        self.clients().iter().any(|client| client.holds(layer))
    }

    /// True when some client waits for the layer.
    #[must_use]
    pub fn awaited(&self, layer: u32) -> bool {
        self.clients()
            .iter()
            .any(|client| client.wants(layer, false))
    }

    /// Numbers of the clients that say they hold anything, but for those that attached after `since`.
    #[must_use]
    pub fn holding(&self, since: Instant) -> Vec<u64> {
        let clients = self.clients();
        let old = clients.iter().filter(|client| client.attached <= since);
        let holding = old.filter(|client| (0..self.layer_count).any(|layer| client.holds(layer)));
        holding.map(|client| client.id).collect()
    }

    /// Numbers of the clients that say they hold the layer.
    #[must_use]
    pub fn holders(&self, layer: u32) -> Vec<u64> {
        let clients = self.clients();
        let holders = clients.iter().filter(|client| client.holds(layer));
        holders.map(|client| client.id).collect()
    }

    /// Of every client: its number, how many layers it says it holds, the layer it acquired last, and its acquires.
    #[must_use]
    pub fn told(&self) -> HashMap<u64, (u32, Option<u32>, u64)> {
        let clients = self.clients();
        let told = clients.iter().map(|client| {
            let held = (0..self.layer_count).filter(|layer| client.holds(*layer));
            let leases = u32::try_from(held.count()).unwrap_or(u32::MAX);
            (client.id, (leases, client.layer, client.acquires))
        });
        told.collect()
    }

    /// Layers a client says it holds, and how often.
    #[must_use]
    pub fn leases(&self, id: u64) -> Vec<(u32, u32)> {
        let clients = self.clients();
        let Some(client) = clients.iter().find(|client| client.id == id) else {
            return Vec::new();
        };
        (0..self.layer_count)
            .map(|layer| (layer, client.page.load(place::hold(layer))))
            .filter(|(_, count)| *count != 0)
            .collect()
    }

    /// Acquires that the clients, also those that have gone, said they made.
    #[must_use]
    pub fn acquires(&self) -> u64 {
        let clients = self.clients();
        let present: u64 = clients.iter().map(|client| client.acquires).sum();
        present + self.past_acquires.load(Relaxed)
    }

    /// The layers that clients wait for, each client's own limit kept; `failed` tells whose last read failed. Also reads
    /// the rings. Appends to `wanted`.
    pub fn listen(&self, now: Instant, failed: impl Fn(u32) -> bool, wanted: &mut Vec<u32>) {
        for client in self.clients().iter_mut() {
            client.listen(self.layer_count, now);
            client.order.look_ahead();
            let mut honoured = 0;
            for layer in 0..self.layer_count {
                if honoured < self.demands_max && client.wants(layer, failed(layer)) {
                    honoured += 1;
                    wanted.push(layer);
                }
            }
            client.waiting = honoured > 0;
        }
    }

    /// The waits for `layer` so far are answered by a failure; a new wait is a new question.
    pub fn answer_failure(&self, layer: u32) {
        for client in self.clients().iter_mut() {
            client.answered[layer as usize] = client.page.load(place::want(layer)) >> 16;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_is_seen_until_its_client_is_gone() {
        let board = Board::new(4, 2).unwrap();
        let page = board.attach(1).unwrap();
        let before = Instant::now();
        assert!(board.holding(before).is_empty());
        page.add(place::hold(2), 1);
        assert!(board.held(2) && !board.held(1));
        assert_eq!(board.holding(before), [1]);
        let late = board.attach(2).unwrap();
        late.add(place::hold(1), 1);
        assert_eq!(
            board.holding(before),
            [1],
            "who came later has no lease yet"
        );
        assert_eq!(board.holding(Instant::now()), [1, 2]);
        board.detach(2);
        assert_eq!(board.holders(2), [1]);
        assert_eq!(board.leases(1), [(2, 1)]);
        assert_eq!(board.told()[&1], (1, None, 0));
        board.detach(1);
        assert!(board.holding(Instant::now()).is_empty());
    }

    #[test]
    fn garbage_in_a_page_is_bounded() {
        let board = Board::new(8, 2).unwrap();
        let page = board.attach(1).unwrap();
        for index in 0..page.count() {
            page.store(index, 0xdead_beef);
        }
        let mut wanted = Vec::new();
        board.listen(Instant::now(), |_| false, &mut wanted);
        assert_eq!(wanted.len(), 2, "no more waits than a client may have");
        assert_eq!(board.leases(1).len(), 8);
        page.store(place::RING_HEAD, 0);
        board.listen(Instant::now(), |_| false, &mut wanted);
        assert!(board.clients()[0].layer.is_none(), "no layer 0xdeadbeef");
    }

    #[test]
    fn the_ring_teaches_the_order_even_when_it_has_gone_round() {
        let board = Board::new(4, 2).unwrap();
        let page = board.attach(1).unwrap();
        let mut head = 0u32;
        let mut acquire = |layer: u32| {
            page.store(place::RING + head as usize % place::RING_COUNT, layer);
            head += 1;
            page.store(place::RING_HEAD, head);
        };
        for _ in 0..200 {
            for layer in [0, 2, 1, 3] {
                acquire(layer);
            }
        }
        let mut wanted = Vec::new();
        board.listen(Instant::now(), |_| false, &mut wanted);
        let mut clients = board.clients();
        assert_eq!(clients[0].acquires, 800);
        assert_eq!(clients[0].order.look_ahead(), [0, 2, 1, 3]);
    }

    #[test]
    fn a_failure_answers_the_waits_before_it_and_none_after() {
        let board = Board::new(2, 2).unwrap();
        let page = board.attach(1).unwrap();
        page.add(place::want(1), WANT);
        let ask = || {
            let mut wanted = Vec::new();
            board.listen(Instant::now(), |layer| layer == 1, &mut wanted);
            wanted
        };
        assert_eq!(ask(), [1]);
        board.answer_failure(1);
        assert!(ask().is_empty(), "one read for one question");
        page.sub(place::want(1), 1);
        page.add(place::want(1), WANT);
        assert_eq!(ask(), [1]);
    }

    #[test]
    fn a_change_of_state_is_always_another_word() {
        let board = Board::new(1, 1).unwrap();
        let state = || board.area().load(place::state(0));
        board.show(0, READY, 3);
        let first = state();
        assert_eq!(first % CHANGE, READY);
        board.show(0, READY, 3);
        assert_eq!(state(), first);
        board.show(0, 0, 0);
        board.show(0, READY, 3);
        assert_ne!(state(), first);
    }
}
