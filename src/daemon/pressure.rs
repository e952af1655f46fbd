//! Memory pressure: gives resident pages back before the kernel kills anyone, and takes them again when it is calm.
//!
//! Three parts. [`Sources`] are the kernel's own alarms as descriptors to poll: PSI triggers of the machine and of our
//! cgroup, cgroup v2's `memory.events`, cgroup v1's `memory.pressure_level`. A [`Reading`] is what is known at one
//! moment, and [`Policy`] turns readings into the size the pools should have: pure, so that its promises are tested
//! with simulated machines. Shrinking is quick and growing slow, with a gap between the two, so that a steady machine
//! never sees the pool swing. Place: beside `plan` and `pool` of
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`; the daemon makes a new plan for every new target.

use serde::{Deserialize, Serialize};

use super::config::text;

mod policy;
mod sources;

#[cfg(test)]
mod tests;

pub use policy::{Bounds, Decision, Policy, Reading, State};
pub use sources::{Sources, Stall, some_avg10};

/// The section `[pressure]` of flead.toml.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Whether the pools follow the machine at all.
    pub watch: bool,
    /// Memory that is kept available for everybody else; 0 = max(256 MiB, 3 %).
    #[serde(rename = "reserve", with = "text::auto_size")]
    pub reserve_bytes: u64,
    /// How long tasks must have stalled for memory, within two seconds, to count as pressure.
    #[serde(rename = "stall", with = "text::duration")]
    pub stall_ns: u64,
    /// How long it must be calm before the pools grow, and between two steps of growing.
    #[serde(rename = "hold", with = "text::duration")]
    pub hold_ns: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            watch: true,
            reserve_bytes: 0,
            // systemd's own default for MemoryPressureThresholdSec= is 200 ms in 2 s.
            stall_ns: 150_000_000,
            hold_ns: 30_000_000_000,
        }
    }
}
