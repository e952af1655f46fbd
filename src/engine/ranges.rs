//! Leases of byte ranges: what a host needs that finds out at run time which weights it needs.
//!
//! Ranges of weights that come with their layer are leases of that layer; ranges of experts that are fetched one by one
//! are leases of those. All reads of a call are asked for before the first is waited for; a hint says what will be asked for
//! next. Invariant: a call gets all of its ranges or none. Place in
//! `file -> catalog -> plan -> reader -> pool -> **lease** -> host`.

use super::experts::Room;
use super::leases::thread_id;
use super::model::{Model, Running};
use super::state::{Need, State};
use crate::error::{Error, ErrorKind, Result};
use crate::units::Extent;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most ranges in one call: every expert of three tensors of the largest models, many times over.
pub const RANGES_MAX: usize = 1 << 16;

/// What the ranges of a call come to.
#[derive(Debug, Default)]
struct Wanted {
    layers: Vec<(u32, Need)>,
    /// Each once, in the order of the ranges: so they are read.
    units: Vec<u32>,
    /// Per unit: the last call that wanted it.
    calls: Vec<u64>,
    call: u64,
}

impl Wanted {
    fn clear(&mut self) {
        self.layers.clear();
        self.units.clear();
        self.call += 1;
    }

    fn add_units(&mut self, units: Range<u32>) {
        if self.calls.len() < units.end as usize {
            self.calls.resize(units.end as usize, 0);
        }
        for unit in units {
            let call = std::mem::replace(&mut self.calls[unit as usize], self.call);
            if call != self.call {
                self.units.push(unit);
            }
        }
    }
}

thread_local!(static WANTED: RefCell<Wanted> = RefCell::default());

impl Model {
    /// Waits until every range, an address in the windows and a length, is in memory, and keeps it there until
    /// [`Model::release_ranges`] with the same ranges. `timeout`: `None` for ever, zero to start the reads and see.
    ///
    /// # Errors
    /// `Invalid` for a range that is not all weights, for none, and for more than [`RANGES_MAX`]; `Refused` for more
    /// experts than the cache has slots; `Busy` when this thread holds what it would wait for; and those of
    /// [`Model::acquire`].
    pub fn acquire_ranges(
        &self,
        ranges: &[(usize, usize)],
        timeout: Option<Duration>,
    ) -> Result<()> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        self.with_wanted(ranges, |running, wanted| {
            running.core.state().check_room(&wanted.units)?;
            self.ask_for(running, wanted);
            let left = || deadline.map(|at| at.saturating_duration_since(Instant::now()));
            for (index, (layer, need)) in wanted.layers.iter().enumerate() {
                if let Err(error) = self.acquire_need(*layer, *need, left()) {
                    self.release_layers(&wanted.layers[..index]);
                    return Err(error);
                }
            }
            let units = acquire_units(running, &wanted.units, deadline);
            if units.is_err() {
                self.release_layers(&wanted.layers);
            }
            units
        })
    }

    /// Gives the leases of an [`Model::acquire_ranges`] with the same ranges back. May be called on another thread.
    ///
    /// # Errors
    /// `Invalid` for ranges that are not leased.
    pub fn release_ranges(&self, ranges: &[(usize, usize)]) -> Result<()> {
        if self.plan().is_none() {
            let context = "ranges are released but nothing was ever acquired";
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        self.with_wanted(ranges, |running, wanted| {
            if !wanted.units.is_empty() {
                give_back(running, running.core.state(), &wanted.units)?;
            }
            let mut result = Ok(());
            for (layer, _) in &wanted.layers {
                result = result.and(self.release(*layer));
            }
            result
        })
    }

    /// Says which ranges will be acquired next, in this order: experts among them are read while nothing else is asked for,
    /// into slots that nobody holds, and stay until they were acquired once. What was said before is forgotten; nothing at
    /// all forgets it as well. A wrong hint costs time, never a wrong byte.
    ///
    /// # Errors
    /// `Invalid` for a range that is not all weights, and for more than [`RANGES_MAX`]; those of a deferred plan.
    pub fn hint_ranges(&self, ranges: &[(usize, usize)]) -> Result<()> {
        if ranges.is_empty() && self.plan().is_none() {
            return Ok(());
        }
        if ranges.len() > RANGES_MAX {
            return Err(wrong_count(ranges.len()));
        }
        let running = self.running()?;
        WANTED.with(|wanted| {
            let mut wanted = wanted.take();
            let located = self.locate_units(running, ranges, &mut wanted.units);
            if located.is_ok() {
                let mut state = running.core.state();
                state.wish(&wanted.units);
                let wake = std::mem::take(&mut state.hungry);
                drop(state);
                if wake {
                    running.started.waker.wake();
                }
            }
            WANTED.set(wanted);
            located
        })
    }

    /// True when routed experts are fetched one by one, with [`Model::acquire_ranges`], or may be once there is a plan.
    #[must_use]
    pub fn experts_on_demand(&self) -> bool {
        self.experts_allowed
    }

    /// Resolves `ranges` into memory of this thread, so that nothing is allocated once it has grown.
    fn with_wanted<T>(
        &self,
        ranges: &[(usize, usize)],
        then: impl FnOnce(&Running, &Wanted) -> Result<T>,
    ) -> Result<T> {
        if ranges.is_empty() || ranges.len() > RANGES_MAX {
            return Err(wrong_count(ranges.len()));
        }
        let running = self.running()?;
        WANTED.with(|wanted| {
            let mut wanted = wanted.take();
            let resolved = self.resolve(running, ranges, &mut wanted);
            let result = resolved.and_then(|()| then(running, &wanted));
            WANTED.set(wanted);
            result
        })
    }

    fn resolve(
        &self,
        running: &Running,
        ranges: &[(usize, usize)],
        wanted: &mut Wanted,
    ) -> Result<()> {
        wanted.clear();
        let layout = &running.layout;
        for &range in ranges {
            let layers = &mut wanted.layers;
            let extent = self.locate(range, |layer, need| match layout.experts {
                // What does not come and go with the units is resident.
                Some(_) => layers.push((layer, Need::Whole)),
                None => layers.push((layer, need)),
            })?;
            wanted.add_units(units_of(running, &extent));
        }
        if layout.experts.is_some() {
            wanted.layers.sort_unstable_by_key(|(layer, _)| *layer);
            wanted.layers.dedup_by_key(|(layer, _)| *layer);
        }
        Ok(())
    }

    /// The units of `ranges`, in the order of these.
    fn locate_units(
        &self,
        running: &Running,
        ranges: &[(usize, usize)],
        units: &mut Vec<u32>,
    ) -> Result<()> {
        units.clear();
        for &range in ranges {
            let extent = self.locate(range, |_, _| ())?;
            units.extend(units_of(running, &extent));
        }
        Ok(())
    }

    /// Where a range lies. `each` hears of its part in every layer; one that is not all weights is an error.
    fn locate(
        &self,
        (address, len): (usize, usize),
        mut each: impl FnMut(u32, Need),
    ) -> Result<Extent> {
        let invalid = || {
            let context =
                format!("{len} bytes at {address:#x} are not all weights of the model's layers");
            Error::new(ErrorKind::Invalid, context)
        };
        let (shard_index, offset_bytes) = self.windows.locate(address).ok_or_else(invalid)?;
        let end_bytes = offset_bytes
            .checked_add(len as u64)
            .filter(|end| *end > offset_bytes)
            .ok_or_else(invalid)?;
        let mut start_bytes = offset_bytes;
        while start_bytes < end_bytes {
            let part = self.spans.part_at(shard_index, start_bytes);
            let (layer, part_end) = part.ok_or_else(invalid)?;
            let end = part_end.min(end_bytes);
            let need = Need::Bytes {
                shard_index,
                start_bytes,
                end_bytes: end,
            };
            each(layer, need);
            start_bytes = end;
        }
        Ok(Extent {
            shard_index,
            offset_bytes,
            len_bytes: end_bytes - offset_bytes,
        })
    }

    /// Tells the stream about every layer that is missing, before the first is waited for.
    fn ask_for(&self, running: &Running, wanted: &Wanted) {
        let wake = {
            let mut state = running.core.state();
            let mut asked = false;
            for (layer, need) in &wanted.layers {
                if !state.ready(*layer, *need) {
                    state.demand(*layer, false);
                    asked = true;
                }
            }
            asked && std::mem::take(&mut state.hungry)
        };
        if wake {
            running.started.waker.wake();
        }
    }

    fn release_layers(&self, layers: &[(u32, Need)]) {
        for (layer, _) in layers {
            if let Err(error) = self.release(*layer) {
                log::error!("a lease could not be given back: {error}");
            }
        }
    }
}

fn wrong_count(count: usize) -> Error {
    let context = format!("{count} ranges; 1 to {RANGES_MAX} are possible");
    Error::new(ErrorKind::Invalid, context)
}

fn units_of(running: &Running, extent: &Extent) -> Range<u32> {
    let end_bytes = extent.end_bytes();
    running
        .layout
        .units_in(extent.shard_index, extent.offset_bytes, end_bytes)
}

/// Gives leased units back, and wakes who waits for room.
fn give_back(running: &Running, mut state: MutexGuard<'_, State>, units: &[u32]) -> Result<()> {
    state.release_units(units, thread_id())?;
    running.core.hall.notify(&state);
    if state.wants_room() {
        drop(state);
        running.started.waker.wake();
    }
    Ok(())
}

/// Leases units and waits until they are there.
fn acquire_units(running: &Running, units: &[u32], deadline: Option<Instant>) -> Result<()> {
    if units.is_empty() {
        return Ok(());
    }
    let thread = thread_id();
    let begun = Instant::now();
    let mut state = running.core.state();
    while state.lease_units(units, thread) == Room::Full {
        if state.holds_units(thread) && !state.reads_ahead() {
            let context = format!(
                "{} experts do not fit into the cache beside those that are leased, and this thread holds some; release \
                 them first",
                units.len()
            );
            return Err(Error::new(ErrorKind::Busy, context));
        }
        check_deadline(deadline, begun)?;
        state = sleep(running, state, deadline);
    }
    if state.units_ready(units) {
        state.count_acquired(units);
        return Ok(());
    }
    // Who only asks does not wait.
    let waits = deadline.is_none_or(|at| at > begun);
    state.stalls += u64::from(waits);
    let (mut state, arrived) = wait_for(running, state, units, deadline, begun);
    if waits {
        state.count_stall(begun);
    }
    if arrived.is_ok() {
        state.count_acquired(units);
        drop(state);
    } else if let Err(error) = give_back(running, state, units) {
        log::error!("{error}"); // why they did not arrive counts more
    }
    if let (Some(trace), true) = (running.core.hall.trace.get(), waits) {
        trace.waited(running.layout.units()[units[0] as usize].layer, begun);
    }
    arrived
}

fn wait_for<'a>(
    running: &'a Running,
    mut state: MutexGuard<'a, State>,
    units: &[u32],
    deadline: Option<Instant>,
    begun: Instant,
) -> (MutexGuard<'a, State>, Result<()>) {
    loop {
        if state.units_ready(units) {
            return (state, Ok(()));
        }
        if let Some(error) = state.unit_error(units).or_else(|| state.fatal.clone()) {
            return (state, Err(error));
        }
        if std::mem::take(&mut state.hungry) {
            drop(state);
            running.started.waker.wake();
            state = running.core.state();
            continue;
        }
        if let Err(error) = check_deadline(deadline, begun) {
            return (state, Err(error));
        }
        state = sleep(running, state, deadline);
    }
}

/// # Errors
/// `Again` when there was never any time to wait, `Timeout` when it has passed.
fn check_deadline(deadline: Option<Instant>, begun: Instant) -> Result<()> {
    match deadline {
        Some(deadline) if deadline <= begun => Err(Error::new(
            ErrorKind::Again,
            "the experts asked for are not in memory yet",
        )),
        Some(deadline) if deadline <= Instant::now() => Err(Error::new(
            ErrorKind::Timeout,
            "the experts asked for did not arrive in time",
        )),
        _ => Ok(()),
    }
}

fn sleep<'a>(
    running: &'a Running,
    mut state: MutexGuard<'a, State>,
    deadline: Option<Instant>,
) -> MutexGuard<'a, State> {
    state.waiters += 1;
    let changed = &running.core.hall.changed;
    let mut state = match deadline {
        None => changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        Some(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now());
            let woken = changed.wait_timeout(state, left);
            woken.unwrap_or_else(PoisonError::into_inner).0
        }
    };
    state.waiters -= 1;
    state
}
