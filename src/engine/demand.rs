//! What hosts ask for: layers they wait for, and layers they only try to get.
//!
//! Part of the bookkeeping of [`super::state`]. Place in `file -> catalog -> plan -> reader -> pool -> **lease** -> host`.

use super::state::State;
use crate::error::Error;

impl State {
    /// Notes that somebody wants `layer`; `waiting` protects it from eviction until [`State::stop_waiting`].
    pub fn demand(&mut self, layer: u32, waiting: bool) {
        let state = &mut self.layers[layer as usize];
        state.waiters += u32::from(waiting);
        if !state.demanded {
            state.demanded = true;
            self.demands.push_back(layer);
        }
    }

    /// Notes that a host wants `layer` and does not wait: once there, it stays until the host has come back for it or has
    /// gone on to other layers. Without that the next prefetch would take its slot, and the host would try for ever.
    pub fn tried(&mut self, layer: u32) {
        self.layers[layer as usize].tried_at = Some(self.acquires);
        self.demand(layer, false);
    }

    /// The failure of a read that a host asked for by trying. It is told once; the try after that asks anew.
    pub fn answer_try(&mut self, layer: u32) -> Option<Error> {
        self.layers[layer as usize].tried_at?;
        let error = self.take_error(layer)?;
        self.layers[layer as usize].tried_at = None;
        Some(error)
    }

    /// True while the host that tried to get `layer` may still come back for it.
    pub(super) fn is_expected(&self, layer: u32) -> bool {
        let passed = |at: u64| self.acquires - at;
        self.layers[layer as usize]
            .tried_at
            .is_some_and(|at| passed(at) < u64::from(self.layout.slots_count))
    }

    /// A waiter of `layer` has its lease, or has given up.
    pub fn stop_waiting(&mut self, layer: u32) {
        self.layers[layer as usize].waiters -= 1;
    }

    /// Takes the error that the last attempt to read `layer` left; the next demand tries again.
    pub fn take_error(&mut self, layer: u32) -> Option<Error> {
        let state = &mut self.layers[layer as usize];
        if state.error.is_some() {
            state.past_error.clone_from(&state.error);
        }
        state.error.take()
    }

    /// The host says which layers come next.
    pub fn hint(&mut self, layers: &[u32]) {
        self.order.set_hint(layers);
    }
}
