//! An acquire: at once where the layer is there, else the host sleeps until the stream has brought what it needs.
//!
//! Invariants: the state's lock is never held while waking the stream; a waiter is counted in the state for as long as
//! it waits, so its layer is not evicted before it had it.

use super::leases::thread_id;
use super::state::{Need, State};
use super::trace::Trace;
use crate::error::{Error, ErrorKind, Result};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Where hosts and the stream that serves them meet.
#[derive(Debug)]
pub struct Hall {
    /// All bookkeeping.
    pub state: Mutex<State>,
    /// Signalled when bytes have arrived, or failed to.
    pub changed: Condvar,
    /// Where events go, when somebody wants them.
    pub trace: OnceLock<Arc<Trace>>,
}

impl Hall {
    /// The state, also after a panic elsewhere: its invariants hold between any two statements that can panic.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes waiting hosts; costs a system call only when there are any.
    pub fn notify(&self, state: &State) {
        if state.waiters > 0 {
            self.changed.notify_all();
        }
    }

    /// Leases what is asked for, waiting for the stream that `wake` wakes where it is not there.
    ///
    /// # Errors
    /// `Busy` for a wait that could last for ever, `Again` and `Timeout`, and what the drive said.
    pub fn acquire(&self, wake: &dyn Fn(), asked: Asked, timeout: Option<Duration>) -> Result<()> {
        let mut state = self.state();
        let leased = if state.ready(asked.layer, asked.need) || skip_the_wait() {
            let leased = state.lease(asked.layer, asked.thread);
            drop(state);
            leased
        } else {
            wait(self, wake, state, asked, timeout)
        };
        if let (Some(trace), true) = (self.trace.get(), leased?) {
            trace.leased(asked.layer, asked.thread);
        }
        Ok(())
    }
}

/// What a host waits for, and who it is.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// The layer.
    pub layer: u32,
    /// How much of it.
    pub need: Need,
    /// The calling thread.
    pub thread: u64,
}

impl Asked {
    /// The calling thread asks.
    #[must_use]
    pub fn by_this_thread(layer: u32, need: Need) -> Self {
        Self {
            layer,
            need,
            thread: thread_id(),
        }
    }
}

/// `FLEA_FAULT=nowait`: hosts get their lease before the bytes are there. A suite that passes with it tests nothing.
fn skip_the_wait() -> bool {
    #[cfg(feature = "faults")]
    return {
        static NOWAIT: OnceLock<bool> = OnceLock::new();
        *NOWAIT
            .get_or_init(|| crate::io::fault::Faults::from_env().is_ok_and(|faults| faults.nowait))
    };
    #[cfg(not(feature = "faults"))]
    false
}

/// Asks the stream, which `wake` wakes, for a layer and sleeps until it is there; leases it. True for a new lease.
///
/// # Errors
/// `Busy` for a wait that could last for ever, `Again` and `Timeout`, and what the drive said.
fn wait(
    hall: &Hall,
    wake: &dyn Fn(),
    mut state: MutexGuard<'_, State>,
    asked: Asked,
    timeout: Option<Duration>,
) -> Result<bool> {
    let layer = asked.layer;
    if let Some(error) = &state.fatal {
        return Err(error.clone());
    }
    if state.would_deadlock(layer, asked.thread) {
        // A part of a layer keeps the rest from being read again after a failure: that failure is the answer. BUSY would
        // have the host come again and again for what cannot come while it holds the part.
        let failed = state.kept_slot(layer).is_some();
        if let Some(error) = state.failure(layer).filter(|_| failed) {
            drop(state.take_error(layer));
            return Err(error);
        }
        let context = format!(
            "layer {layer} needs a slot, but all of them are leased and this thread holds at least one; release it first"
        );
        return Err(Error::new(ErrorKind::Busy, context));
    }
    let tries = timeout.is_some_and(|timeout| timeout.is_zero());
    // Who does not wait hears at his next try what became of the one before.
    if tries && let Some(error) = state.answer_try(layer) {
        return Err(error);
    }
    // An error that prefetch left behind is not an answer to this call: it reads again.
    drop(state.take_error(layer));
    if tries {
        state.tried(layer);
        let hungry = std::mem::take(&mut state.hungry);
        drop(state);
        if hungry {
            wake();
        }
        return Err(Error::new(
            ErrorKind::Again,
            format!("layer {layer} is not in memory yet"),
        ));
    }
    let begun = Instant::now();
    state.stalls += 1;
    state.demand(layer, true);
    let (mut state, result) = sleep(
        hall,
        wake,
        state,
        asked,
        timeout.map(|timeout| begun + timeout),
    );
    state.stop_waiting(layer);
    if let Some(trace) = hall.trace.get() {
        trace.waited(layer, begun);
    }
    state.count_stall(begun);
    result?;
    state.lease(layer, asked.thread)
}

fn sleep<'a>(
    hall: &'a Hall,
    wake: &dyn Fn(),
    mut state: MutexGuard<'a, State>,
    asked: Asked,
    deadline: Option<Instant>,
) -> (MutexGuard<'a, State>, Result<()>) {
    let layer = asked.layer;
    loop {
        if state.ready(layer, asked.need) {
            return (state, Ok(()));
        }
        if let Some(error) = state.take_error(layer).or_else(|| state.fatal.clone()) {
            return (state, Err(error));
        }
        if state.unservable(layer) {
            let context = format!(
                "layer {layer}: every slot it may use waits for reads that the drive has not given back; close the model"
            );
            return (state, Err(Error::new(ErrorKind::Io, context)));
        }
        // Another waiter may have taken the error of a failed read: this one asks again.
        state.demand(layer, false);
        if std::mem::take(&mut state.hungry) {
            drop(state);
            wake();
            state = hall.state();
            continue;
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            let context = format!("layer {layer} did not arrive in time");
            return (state, Err(Error::new(ErrorKind::Timeout, context)));
        }
        state.waiters += 1;
        state = match left {
            None => hall
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner),
            Some(left) => {
                hall.changed
                    .wait_timeout(state, left)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        };
        state.waiters -= 1;
    }
}
