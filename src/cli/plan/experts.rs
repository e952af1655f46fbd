//! What `flea plan` tells of a cache of experts. Invariant: every predicted figure stands beside what it assumes.

use serde::Serialize;

use crate::plan::ExpertPlan;
use crate::units::HumanBytes;

/// The cache, as `--json` has it.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct ExpertReport {
    cache_bytes: u64,
    experts_bytes: u64,
    /// Resident because two experts share the page.
    shared_bytes: u64,
    units_count: usize,
    slots_count: u32,
    used_per_layer_count: u32,
    /// What the hit rate is predicted from.
    skew: f64,
    hit_rate: f64,
    pub(super) used_bytes_per_token: u64,
}

impl ExpertReport {
    /// The figures of a plan.
    pub(super) fn new(plan: &ExpertPlan) -> Self {
        Self {
            cache_bytes: plan.cache_bytes,
            experts_bytes: plan.experts_bytes,
            shared_bytes: plan.shared_bytes,
            units_count: plan.units.len(),
            slots_count: plan.slots_count(),
            used_per_layer_count: plan.used_count,
            skew: plan.skew,
            hit_rate: plan.hit_rate,
            used_bytes_per_token: plan.used_bytes_per_token,
        }
    }

    /// The line for people.
    pub(super) fn text(&self) -> String {
        format!(
            "{} of {} in {} slots for {} experts' parts; {} per layer and token, predicted hit rate {:.0} % at skew {}",
            HumanBytes(self.cache_bytes),
            HumanBytes(self.experts_bytes),
            self.slots_count,
            self.units_count,
            self.used_per_layer_count,
            self.hit_rate * 100.0,
            self.skew
        )
    }
}
