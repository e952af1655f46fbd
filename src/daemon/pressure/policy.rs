//! From readings to a size for the pools. Pure: no clock, no files.
//!
//! Two marks in available memory: below the low one (half of the reserve) the pools shrink at once until the reserve is
//! there again; a stall the kernel reports shrinks them while less than twice the reserve is there (with more, memory
//! is not what anybody waits for, or not ours to give). Growing waits until it was calm for `hold`, takes at most half
//! of what lies above the reserve and an eighth of the whole, and waits again. Growing that had to be taken back
//! doubles the wait, up to 16 times. Invariant: `floor <= target <= wanted`, whatever the readings say.

use super::Settings;
use crate::mem::limits::{MARGIN_MIN_BYTES, MARGIN_PERCENT};
use crate::units::{GIB, HumanBytes, PAGE_2M, align_down, align_up};

/// The wait for growing is doubled this often at most.
const BACKOFF_MOST: u32 = 4;

/// What is known at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Any clock that only goes forward.
    pub now_ns: u64,
    /// What can still be had without the OOM killer: [`crate::mem::limits::free_memory`].
    pub available_bytes: u64,
    /// The kernel reported since the last reading that tasks wait for memory.
    pub stalled: bool,
    /// What the pools hold.
    pub pool_bytes: u64,
}

/// Between these the target moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The smallest pools that the open models work with.
    pub floor_bytes: u64,
    /// What the pools have when nobody else wants memory: the budget.
    pub wanted_bytes: u64,
}

/// How the pools stand to the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The pools have all they want.
    Calm,
    /// They were made smaller and wait until it is calm.
    Shrunk,
    /// They have as little as the open models work with, and memory is still short.
    Exhausted,
}

impl State {
    /// The word in `flea-ctl status`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Calm => "calm",
            Self::Shrunk => "shrunk",
            Self::Exhausted => "exhausted",
        }
    }
}

/// A new size for the pools, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The size.
    pub target_bytes: u64,
    /// A sentence for the log and for `flea-ctl status`.
    pub reason: String,
}

/// Remembers what it decided; see the module.
#[derive(Debug, Clone)]
pub struct Policy {
    settings: Settings,
    state: State,
    target_bytes: u64,
    wanted_bytes: u64,
    /// Before this the pools do not grow.
    grow_at_ns: u64,
    /// Before this a stall does not shrink again: what was given back must first take effect.
    stall_at_ns: u64,
    /// When the pools last grew; `None` when that growth has proved itself.
    grown_ns: Option<u64>,
    backoff: u32,
}

impl Policy {
    /// The pools have `wanted_bytes`.
    #[must_use]
    pub fn new(settings: Settings, wanted_bytes: u64) -> Self {
        Self {
            settings,
            state: State::Calm,
            target_bytes: wanted_bytes,
            wanted_bytes,
            grow_at_ns: 0,
            stall_at_ns: 0,
            grown_ns: None,
            backoff: 0,
        }
    }

    /// How the pools stand to the machine.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// The size decided on last.
    #[must_use]
    pub const fn target_bytes(&self) -> u64 {
        self.target_bytes
    }

    /// New settings, from a reload.
    pub fn set(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// Takes a reading; `Some` when the pools should have another size.
    pub fn step(&mut self, reading: &Reading, bounds: &Bounds) -> Option<Decision> {
        let before_bytes = self.target_bytes;
        let reason = self.follow_budget(bounds);
        let reason = if self.settings.watch {
            self.follow_machine(reading, bounds).or(reason)
        } else {
            self.target_bytes = bounds.wanted_bytes;
            self.state = State::Calm;
            reason.or_else(|| Some("memory pressure is not watched".to_owned()))
        };
        if self.target_bytes == bounds.wanted_bytes && self.state == State::Shrunk {
            self.state = State::Calm;
        }
        (self.target_bytes != before_bytes).then(|| Decision {
            target_bytes: self.target_bytes,
            reason: reason.unwrap_or_default(),
        })
    }

    /// A new budget, or models that came and went.
    fn follow_budget(&mut self, bounds: &Bounds) -> Option<String> {
        let had_all = self.target_bytes == self.wanted_bytes;
        self.wanted_bytes = bounds.wanted_bytes;
        let floor_bytes = bounds.floor_bytes.min(bounds.wanted_bytes);
        let target_bytes = if had_all {
            bounds.wanted_bytes
        } else {
            self.target_bytes.clamp(floor_bytes, bounds.wanted_bytes)
        };
        let changed = target_bytes != self.target_bytes;
        self.target_bytes = target_bytes;
        changed.then(|| format!("the budget is {}", HumanBytes(bounds.wanted_bytes)))
    }

    fn follow_machine(&mut self, reading: &Reading, bounds: &Bounds) -> Option<String> {
        let reserve_bytes = self.reserve_bytes(reading);
        // As it will be once the pools have the size that was decided on.
        let available_bytes = (reading.available_bytes)
            .saturating_add(reading.pool_bytes)
            .saturating_sub(self.target_bytes);
        let stalled = reading.stalled && reading.now_ns >= self.stall_at_ns;
        if available_bytes < reserve_bytes / 2 {
            self.shrink(reading, bounds, reserve_bytes - available_bytes);
            return Some(format!(
                "{} are available, less than half of the reserve of {}",
                HumanBytes(available_bytes),
                HumanBytes(reserve_bytes)
            ));
        }
        if stalled && available_bytes < 2 * reserve_bytes {
            self.shrink(reading, bounds, 2 * reserve_bytes - available_bytes);
            return Some("tasks stall for memory".to_owned());
        }
        if self.state == State::Exhausted {
            self.state = State::Shrunk;
        }
        self.grow(reading, bounds, available_bytes, reserve_bytes)
    }

    fn reserve_bytes(&self, reading: &Reading) -> u64 {
        match self.settings.reserve_bytes {
            0 => {
                let ours = reading.available_bytes.saturating_add(reading.pool_bytes);
                MARGIN_MIN_BYTES.max(ours / 100 * MARGIN_PERCENT)
            }
            bytes => bytes,
        }
    }

    fn shrink(&mut self, reading: &Reading, bounds: &Bounds, missing_bytes: u64) {
        let step_bytes = step_bytes(bounds.wanted_bytes);
        let give_bytes = align_up(missing_bytes.max(step_bytes), PAGE_2M).unwrap_or(u64::MAX);
        let floor_bytes = bounds.floor_bytes.min(bounds.wanted_bytes);
        let enough = self.target_bytes.saturating_sub(floor_bytes) >= give_bytes;
        self.target_bytes = self
            .target_bytes
            .saturating_sub(give_bytes)
            .max(floor_bytes);
        self.state = if enough {
            State::Shrunk
        } else {
            State::Exhausted
        };
        let regretted = self.grown_ns.take().is_some_and(|grown_ns| {
            reading.now_ns.saturating_sub(grown_ns) < self.hold_ns().saturating_mul(2)
        });
        if regretted {
            self.backoff = (self.backoff + 1).min(BACKOFF_MOST);
        }
        self.grow_at_ns = reading.now_ns.saturating_add(self.hold_ns());
        self.stall_at_ns = reading.now_ns.saturating_add(2_000_000_000);
    }

    fn grow(
        &mut self,
        reading: &Reading,
        bounds: &Bounds,
        available_bytes: u64,
        reserve_bytes: u64,
    ) -> Option<String> {
        if reading.stalled {
            self.grow_at_ns = self
                .grow_at_ns
                .max(reading.now_ns.saturating_add(self.hold_ns()));
            return None;
        }
        if self.target_bytes >= bounds.wanted_bytes || reading.now_ns < self.grow_at_ns {
            return None;
        }
        if self.grown_ns.is_some() {
            // The last step was not regretted: the next wait is the plain one again.
            self.backoff = 0;
        }
        let free_bytes = available_bytes.saturating_sub(reserve_bytes + reserve_bytes / 4) / 2;
        let missing_bytes = bounds.wanted_bytes - self.target_bytes;
        let step_bytes = step_bytes(bounds.wanted_bytes);
        let most_bytes = (bounds.wanted_bytes / 8).max(step_bytes);
        let take_bytes = if missing_bytes <= free_bytes.min(most_bytes) {
            missing_bytes
        } else {
            align_down(free_bytes.min(most_bytes), PAGE_2M)
        };
        if take_bytes < step_bytes.min(missing_bytes) {
            return None;
        }
        self.target_bytes += take_bytes;
        self.grown_ns = Some(reading.now_ns);
        self.grow_at_ns = reading.now_ns.saturating_add(self.hold_ns());
        Some(format!(
            "{} are available and nothing stalled",
            HumanBytes(available_bytes)
        ))
    }

    fn hold_ns(&self) -> u64 {
        self.settings.hold_ns << self.backoff
    }
}

/// The smallest change worth a new plan: a 64th of the budget, 2 MiB to 1 GiB.
fn step_bytes(wanted_bytes: u64) -> u64 {
    align_down(wanted_bytes / 64, PAGE_2M).clamp(PAGE_2M, GIB)
}
