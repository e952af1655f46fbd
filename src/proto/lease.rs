//! How a client takes a lease: a few atomics when the layer is there, a kick and a sleep when it is not.

use super::attached::{Attached, NO_WISH, SLICE, locked};
use super::fetch::fetch_plan;
use super::message::{Failure, Method, to_value};
use super::plan::ClientPlan;
use crate::engine::board::{self, place};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::PageRun;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// How often a client that waits asks why.
const ASK: Duration = Duration::from_secs(1);

/// What a lease is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Need {
    Whole,
    Bytes { shard: u32, start: u64, end: u64 },
}

impl Attached {
    /// Says that the layer is wanted, without waiting: the wish stands until the layer is had, or cannot be had. Then
    /// the next try is told why, once, and the one after it asks anew.
    pub(super) fn ask_for(&self, layer: u32) -> Result<Error> {
        let state = self.area.load(place::state(layer));
        let wish = &self.wished[layer as usize];
        let asked = wish.load(Ordering::Acquire);
        if asked == NO_WISH {
            if wish.swap(state.into(), Ordering::AcqRel) == NO_WISH {
                self.page.add(place::want(layer), board::WANT);
            }
        } else if state & board::FAILED != 0
            && asked != u64::from(state)
            && let Some(error) = self.failure(layer, true)?
        {
            self.take_wish_back(layer);
            return Ok(error);
        }
        self.kick();
        Ok(Error::new(
            ErrorKind::Again,
            format!("layer {layer} is not in memory yet"),
        ))
    }

    fn take_wish_back(&self, layer: u32) {
        if self.wished[layer as usize].swap(NO_WISH, Ordering::AcqRel) != NO_WISH {
            self.page.sub(place::want(layer), 1);
        }
    }

    /// Raises the hold and looks whether the layer is there; if so, it is leased and mapped.
    pub(super) fn take(&self, layer: u32, need: Need, thread: u64) -> Result<bool> {
        self.page.add(place::hold(layer), 1);
        match self.look(layer, need, thread) {
            Ok(true) => Ok(true),
            other => {
                self.page.sub(place::hold(layer), 1);
                // The stream may have come by meanwhile and gone to sleep over this hold.
                self.tell_of_release();
                other
            }
        }
    }

    /// Under a raised hold: nothing that is there now is taken away.
    fn look(&self, layer: u32, need: Need, thread: u64) -> Result<bool> {
        let gate = self.area.load(place::GATE);
        if gate == board::GATE_CLOSED {
            return Err(self.lose(Error::new(
                ErrorKind::Connection,
                "the daemon has unloaded the model",
            )));
        }
        let mut leases = locked(&self.leases);
        if gate == board::GATE_DRAINING && !leases.iter().any(|(_, holder)| holder == thread) {
            return Ok(false);
        }
        let state = self.area.load(place::state(layer));
        let arrived = self.area.load(place::arrived(layer));
        let generation = self.area.load(place::GENERATION);
        let ready = state & board::READY != 0;
        let whole = matches!(need, Need::Whole);
        if !ready && (whole || state & board::RESIDENT == 0 && arrived == 0) {
            return Ok(false);
        }
        if self.plan().figures.generation != generation {
            drop(leases);
            self.fetch_plan_of(generation)?;
            leases = locked(&self.leases);
        }
        if !ready && !self.has_arrived(layer, need, state, arrived) {
            return Ok(false);
        }
        let slot = self.area.load(place::slot(layer, self.area_layers()));
        let shown = u64::from(generation) << 32 | u64::from(slot);
        if self.mapped[layer as usize].load(Ordering::Acquire) != shown {
            self.map(layer, generation, slot)?;
        }
        let new = leases.add(layer, thread)?;
        self.take_wish_back(layer);
        // More of a layer that the thread holds already tells nothing about the order.
        if new {
            let head = self.page.load(place::RING_HEAD);
            self.page
                .store(place::RING + head as usize % place::RING_COUNT, layer);
            self.page.store(place::RING_HEAD, head.wrapping_add(1));
            self.acquires.fetch_add(1, Ordering::Relaxed);
        }
        Ok(true)
    }

    fn has_arrived(&self, layer: u32, need: Need, state: u32, arrived: u32) -> bool {
        let Need::Bytes { shard, start, end } = need else {
            return false;
        };
        let (resident, pages) = self.plan().needs(layer, shard, start, end);
        (!resident || state & board::RESIDENT != 0) && arrived >= pages
    }

    /// Shows the layer's pages in its windows. The layer is held, so its plan and its slot stay what they are. A page
    /// that it shares with a layer that another thread reads is there in both plans, with the same bytes.
    fn map(&self, layer: u32, generation: u32, slot: u32) -> Result<()> {
        let _one_at_a_time = locked(&self.mapping);
        let plan = self.plan();
        let page_bytes = plan.figures.page_bytes;
        let show = |run: &PageRun, offset_bytes: u64| {
            self.windows.show(&plan.pool, run, page_bytes, offset_bytes)
        };
        let mapped = &self.mapped[layer as usize];
        if mapped.load(Ordering::Acquire) >> 32 != u64::from(generation) {
            plan.resident_pieces(&self.catalog, layer, show)?;
        }
        if let Some((run, offset_bytes)) = plan.streamed(layer, slot)? {
            show(&run, offset_bytes)?;
        }
        let shown = u64::from(generation) << 32 | u64::from(slot);
        mapped.store(shown, Ordering::Release);
        Ok(())
    }

    fn area_layers(&self) -> u32 {
        self.catalog.layers.len() as u32
    }

    pub(super) fn plan(&self) -> Arc<ClientPlan> {
        Arc::clone(&self.plan.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn fetch_plan_of(&self, generation: u32) -> Result<()> {
        let mut control = locked(&self.control);
        if self.plan().figures.generation == generation {
            return Ok(());
        }
        let plan = fetch_plan(&mut control, self.catalog.layers.len());
        let plan = plan.map_err(|error| self.explain(error))?;
        *self.plan.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(plan);
        Ok(())
    }

    /// Tells the daemon of a release, if it wants to know.
    pub(super) fn tell_of_release(&self) {
        let starving = self.area.load(place::STARVING) != 0;
        if starving || self.area.load(place::GATE) != board::GATE_OPEN {
            self.kick();
        }
    }

    fn kick(&self) {
        // A full counter is a kick that the daemon has not seen yet; a closed one is found out by check_alive.
        let _ = nix::unistd::write(&self.kick, &1u64.to_ne_bytes());
    }

    /// Waits while this process holds as many streamed layers as it may.
    pub(super) fn admit(&self, layer: u32, thread: u64, deadline: Option<Instant>) -> Result<()> {
        let mut leases = locked(&self.leases);
        loop {
            if leases.is_empty() {
                return Ok(());
            }
            let plan = self.plan();
            if !plan.streams(layer) || leases.iter().any(|(held, _)| held == layer) {
                return Ok(());
            }
            let mut streamed: Vec<u32> = Vec::new();
            let mut mine = false;
            for (held, holder) in leases.iter().filter(|(held, _)| plan.streams(*held)) {
                mine |= holder == thread;
                if !streamed.contains(&held) {
                    streamed.push(held);
                }
            }
            if streamed.len() < plan.figures.holds_max as usize {
                return Ok(());
            }
            if mine {
                let context = format!(
                    "layer {layer}: a client of the daemon may hold {} streamed layers at a time, and this thread holds one of them; release it first",
                    plan.figures.holds_max
                );
                return Err(Error::new(ErrorKind::Busy, context));
            }
            let left = deadline.map_or(SLICE, |deadline| {
                deadline.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                return Err(not_in_time(layer, deadline));
            }
            let waited = self.released.wait_timeout(leases, left.min(SLICE));
            leases = waited.unwrap_or_else(PoisonError::into_inner).0;
            self.check_alive(SLICE)?;
        }
    }

    /// A slot that this thread itself holds will never come free while it waits.
    pub(super) fn refuse_deadlock(&self, layer: u32, thread: u64) -> Result<()> {
        let plan = self.plan();
        let Some(slot) = plan.slot(layer) else {
            return Ok(());
        };
        let failed = self.area.load(place::state(layer)) & board::FAILED != 0;
        let leases = locked(&self.leases);
        if failed && leases.holds(layer, thread) {
            drop(leases);
            // Why it failed is the answer: BUSY would have the host come again and again for what cannot come.
            if let Some(error) = self.failure(layer, true)? {
                return Err(error);
            }
            let context = format!(
                "layer {layer} failed to arrive, and this thread holds a part of it; release it, then try again"
            );
            return Err(Error::new(ErrorKind::Busy, context));
        }
        let in_the_way = leases.iter().find(|(held, holder)| {
            *holder == thread && *held != layer && plan.slot(*held) == Some(slot)
        });
        match in_the_way {
            None => Ok(()),
            Some((held, _)) => Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "layer {layer} needs the slot of layer {held}, which this thread holds; release it first"
                ),
            )),
        }
    }

    pub(super) fn wait(
        &self,
        layer: u32,
        need: Need,
        thread: u64,
        deadline: Option<Instant>,
    ) -> Result<()> {
        let at_first = self.area.load(place::state(layer));
        let mut asked = Instant::now();
        self.kick();
        loop {
            let state = self.area.load(place::state(layer));
            let gate = self.area.load(place::GATE);
            if self.take(layer, need, thread)? {
                return Ok(());
            }
            let failed = state & board::FAILED != 0;
            if failed && (state != at_first || asked.elapsed() > ASK) {
                asked = Instant::now();
                if let Some(error) = self.failure(layer, state != at_first)? {
                    return Err(error);
                }
            }
            let left = deadline.map_or(SLICE, |deadline| {
                deadline.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                return Err(not_in_time(layer, deadline));
            }
            if gate == board::GATE_OPEN {
                self.area.wait(place::state(layer), state, left.min(SLICE));
            } else {
                // Whoever holds nothing waits for the gate; whoever holds something waits for the layer, briefly.
                let left = left.min(Duration::from_millis(2));
                self.area.wait(place::state(layer), state, left);
            }
            self.check_alive(SLICE)?;
        }
    }

    /// Why a layer does not come; `None` when the daemon knows of nothing final.
    fn failure(&self, layer: u32, answered: bool) -> Result<Option<Error>> {
        let parameters = to_value(&Failure { layer })?;
        let answer = locked(&self.control).call(Method::Failure, &parameters);
        let answer = answer.map_err(|error| self.explain(error))?;
        let fatal = answer["fatal"].as_bool().unwrap_or(false);
        if !answered && !fatal {
            return Ok(None);
        }
        let status = answer["status"].as_str().unwrap_or_default();
        let kind = ErrorKind::ALL
            .into_iter()
            .find(|kind| kind.name() == status);
        let text = answer["message"].as_str().unwrap_or_default();
        Ok(kind.map(|kind| Error::new(kind, text)))
    }
}

fn not_in_time(layer: u32, deadline: Option<Instant>) -> Error {
    debug_assert!(deadline.is_some());
    Error::new(
        ErrorKind::Timeout,
        format!("layer {layer} did not arrive in time"),
    )
}
