//! What `flea plan` expects of `flea run`: tokens per second from the drive's profile (or the figures given) and the plan.
//!
//! Invariant: nothing is predicted from a number that nobody measured or gave; what is missing is named.

use serde::Serialize;

use crate::error::Result;
use crate::io::profile::{Found, Profile};
use crate::model::{Catalog, DType};
use crate::plan::{Plan, compute_seconds, predict};

/// What to do where there is nothing to predict from.
pub(super) const MISSING: &str = "`flea probe PATH` measures the drive, or give --drive-gbps";

/// What a prediction is made from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Basis {
    /// The drive's rate in 10^9 bytes per second.
    pub drive_gb_per_second: f64,
    /// What a token takes with all weights in memory.
    pub compute_seconds: f64,
}

impl Basis {
    /// The basis for `plan`: what is given counts, the profile fills in the rest. `None` without a rate of the drive.
    #[must_use]
    pub fn new(
        drive_gb_per_second: Option<f64>,
        compute: Option<f64>,
        found: &Found,
        catalog: &Catalog,
        plan: &Plan,
    ) -> Option<Self> {
        let profile = found.profile();
        let drive = drive_gb_per_second.or_else(|| profile?.stream_gb_per_second(plan.page_bytes));
        let compute = compute.or_else(|| profiled_compute(profile?, catalog));
        Some(Self {
            drive_gb_per_second: drive?,
            compute_seconds: compute.unwrap_or(0.0),
        })
    }
}

/// Seconds of compute per token on the machine of the profile. Types that were not measured count as fast as memory is
/// read: norms, which are all of them in most models, are a few kilobytes.
#[must_use]
pub fn profiled_compute(profile: &Profile, catalog: &Catalog) -> Option<f64> {
    let memory = profile.memory.map(|memory| memory.read_all_gb_per_second);
    compute_seconds(catalog, profile.node_seconds, &|dtype: DType| {
        let measured = profile.compute.iter().find(|c| c.dtype == dtype.name());
        Some(measured.map(|c| c.gb_per_second).or(memory)? * 1e9)
    })
}

/// The prediction as `--json` has it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PredictionReport {
    /// The drive's rate it is made from.
    pub drive_gb_per_second: f64,
    /// The compute time it is made from.
    pub compute_seconds: f64,
    /// What reading alone takes.
    pub read_seconds: f64,
    /// One token.
    pub seconds_per_pass: f64,
    /// `null` when nothing is streamed and no compute time is known.
    pub tokens_per_second: Option<f64>,
    /// Waiting for the drive.
    pub stall_seconds: f64,
    /// Waiting for the drive, 0 to 1.
    pub stall_share: f64,
}

impl PredictionReport {
    /// What `plan` will do.
    ///
    /// # Errors
    /// `Invalid` for a basis that is none.
    pub fn new(plan: &Plan, basis: &Basis) -> Result<Self> {
        let prediction = predict(plan, basis.drive_gb_per_second * 1e9, basis.compute_seconds)?;
        Ok(Self {
            drive_gb_per_second: basis.drive_gb_per_second,
            compute_seconds: prediction.compute_seconds,
            read_seconds: prediction.read_seconds,
            seconds_per_pass: prediction.seconds_per_pass,
            tokens_per_second: prediction.tokens_per_second,
            stall_seconds: prediction.stall_seconds,
            stall_share: prediction.stall_share,
        })
    }
}

/// The prediction as a person reads it.
#[must_use]
pub fn text(prediction: &PredictionReport) -> String {
    let Some(tokens_per_second) = prediction.tokens_per_second else {
        return "nothing is streamed: compute alone sets the speed".to_owned();
    };
    let compute = if prediction.compute_seconds > 0.0 {
        format!("{:.3} s of compute", prediction.compute_seconds)
    } else {
        "compute left out".to_owned()
    };
    format!(
        "{tokens_per_second:.2} tokens/s, {:.3} s per token: {:.3} s of reading at {:.2} GB/s, {compute}, stalled {:.0} %",
        prediction.seconds_per_pass,
        prediction.read_seconds,
        prediction.drive_gb_per_second,
        prediction.stall_share * 100.0
    )
}
