//! The board: what a model in the daemon shows its clients, and what they show it, in words of shared memory.
//!
//! One *area* per model, which only the daemon writes: per layer a state word and how many of its transient pages have
//! arrived. One *page* per client, which both can write and the daemon never believes: per layer how often the client
//! holds it and whether it waits for it, and a ring of its last acquires. A lease is taken without a system call: the
//! client raises its hold word, then reads the layer's state word. The stream takes the state word down before it looks
//! at the hold words. All of it is sequentially consistent, so one of the two always sees the other. A lying client
//! gets wrong bytes itself and is revoked; it cannot make the daemon touch memory that is not there.
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: the lease, between processes.

use super::client::Loads;
use crate::error::{Error, ErrorKind, Result};
use crate::mem::SharedWords;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

pub use super::client::Client;

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
    /// Area, behind the states of all `layers`: the slot that a layer's transient run lies in, or lay in last.
    #[must_use]
    pub const fn slot(layer: u32, layers: u32) -> usize {
        state(layers) + layer as usize
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
        slot(layers, layers)
    }
    /// Words of a page.
    #[must_use]
    pub const fn page_count(layers: u32) -> usize {
        hold(layers)
    }
}

/// Version of the layout.
pub const LAYOUT: u32 = 2;
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

/// What reading a layer again for a client that is not due it costs the others, as a divisor of their time: it takes a
/// read, and what had to go for it is read once more.
const AGAIN_SHARE: u32 = 20;
const AGAIN_COST: u32 = 2;

/// The one layer that is being read again for somebody who is not due it, and when the next one may be.
#[derive(Debug)]
struct Again {
    layer: Option<u32>,
    since: Instant,
    not_before: Instant,
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
    loads: Loads,
    again: Mutex<Again>,
    put_off: AtomicU64,
    away: AtomicU64,
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
        let now = Instant::now();
        Ok(Self {
            area,
            layer_count,
            demands_max: demands_max.max(1),
            clients: Mutex::default(),
            past_acquires: AtomicU64::new(0),
            loads: Loads::new(layer_count),
            again: Mutex::new(Again {
                layer: None,
                since: now,
                not_before: now,
            }),
            put_off: AtomicU64::new(0),
            away: AtomicU64::new(0),
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
        let ahead = self.demands_max as u32 + 1;
        let shape = (self.layer_count, ahead);
        let client = Client::new(id, Arc::clone(&page), shape, Instant::now());
        self.clients().push(client);
        Ok(page)
    }

    /// Forgets a client: all it held is free.
    pub fn detach(&self, id: u64) {
        self.clients().retain_mut(|client| {
            let stays = client.id != id;
            if !stays {
                // What it took since the stream last looked counts too.
                client.listen(&self.loads, Instant::now());
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
        self.clients().iter_mut().for_each(Client::forget);
    }

    /// A load of a layer's transient run begins, into `slot`; `away`: not the one of the plan. Nobody holds the layer's run.
    pub(super) fn begin_load(&self, layer: u32, slot: u32, away: bool) {
        self.area.store(place::slot(layer, self.layer_count), slot);
        self.loads.begin(layer);
        self.away.fetch_add(u64::from(away), Relaxed);
        let mut again = self.again();
        if again.layer == Some(layer) {
            again.since = Instant::now();
        }
    }

    /// A layer is there, for whoever waits for it.
    pub(super) fn give(&self, layer: u32) {
        for client in self.clients().iter_mut() {
            client.give(layer, &self.loads);
        }
        let mut again = self.again();
        if again.layer == Some(layer) {
            again.layer = None;
            again.not_before = Instant::now() + again.since.elapsed() * AGAIN_COST * AGAIN_SHARE;
        }
    }

    fn again(&self) -> MutexGuard<'_, Again> {
        self.again.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many loads later a client is due the same layer again.
    pub(super) fn set_pass(&self, loads: u64) {
        self.loads.set_pass(loads);
    }

    /// The clock of loads.
    pub(super) fn loads(&self) -> &Loads {
        &self.loads
    }

    /// Waits that were put off, because they were for layers that their client had less than a pass ago.
    #[must_use]
    pub fn put_off(&self) -> u64 {
        self.put_off.load(Relaxed)
    }

    /// Loads into another slot than that of the plan, because that one was held.
    #[must_use]
    pub fn away(&self) -> u64 {
        self.away.load(Relaxed)
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

    /// True when some client gets on and does not say that it holds the layer.
    #[must_use]
    pub fn others_get_on(&self, layer: u32, now: Instant) -> bool {
        let clients = self.clients();
        let mut others = clients.iter().filter(|client| !client.holds(layer));
        others.any(|client| client.active(now))
    }

    /// True when others get on, and none of those who say that they hold the layer does.
    #[must_use]
    pub fn only_idlers_hold(&self, layer: u32, now: Instant) -> bool {
        let clients = self.clients();
        let mut active = clients
            .iter()
            .filter(|client| client.active(now))
            .peekable();
        active.peek().is_some() && active.all(|client| !client.holds(layer))
    }

    /// True when this client says that it holds the layer.
    #[must_use]
    pub fn is_holder(&self, id: u64, layer: u32) -> bool {
        let clients = self.clients();
        let client = clients.iter().find(|client| client.id == id);
        client.is_some_and(|client| client.holds(layer))
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
    /// the rings. Appends to `wanted`. Who waits for a layer that he is not due, while others get on, is put off: until
    /// the others' pass comes by, or until such a read costs them no more than their share of it. True when somebody is
    /// put off: nobody will say so when the others get on no more.
    pub fn listen(
        &self,
        now: Instant,
        failed: impl Fn(u32) -> bool,
        wanted: &mut Vec<u32>,
    ) -> bool {
        let mut clients = self.clients();
        let mut advancing = 0;
        for client in clients.iter_mut() {
            client.listen(&self.loads, now);
            client.order.look_ahead();
            client.sort_waits(self.demands_max, &self.loads, &failed);
            advancing += usize::from(client.advances(now));
        }
        let mut again = self.again();
        let mut stands = false;
        let mut oldest: Option<(u64, u32)> = None;
        for client in clients.iter_mut() {
            client.alone = advancing == usize::from(client.advances(now));
            wanted.extend(&client.due);
            client.waiting = !client.due.is_empty();
            if client.alone {
                wanted.extend(&client.again);
                client.waiting |= !client.again.is_empty();
                continue;
            }
            self.put_off.fetch_add(u64::from(client.put_off()), Relaxed);
            for layer in &client.again {
                stands |= again.layer == Some(*layer);
                let one = (client.had_load(*layer), *layer);
                oldest = Some(oldest.map_or(one, |oldest| oldest.min(one)));
            }
        }
        if !stands {
            again.layer = None;
        }
        if again.layer.is_none()
            && now >= again.not_before
            && let Some((_, layer)) = oldest
        {
            again.layer = Some(layer);
            again.since = now;
        }
        wanted.extend(again.layer);
        oldest.is_some()
    }

    /// The waits for `layer` so far are answered by a failure; a new wait is a new question.
    pub fn answer_failure(&self, layer: u32) {
        for client in self.clients().iter_mut() {
            client.answer_failure(layer);
        }
    }
}

#[cfg(test)]
#[path = "board_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "clients_tests.rs"]
mod clients_tests;
