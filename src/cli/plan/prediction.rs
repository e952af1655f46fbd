//! What `flea plan` expects of `flea run`: tokens per second from the drive's profile (or the figures given) and the plan.
//!
//! Invariant: nothing is predicted from a number that nobody measured or gave; what is missing is named.

use serde::Serialize;

use crate::error::Result;
use crate::io::profile::{Found, Profile};
use crate::model::{Catalog, DType};
use crate::plan::{DriveRate, Plan, compute_seconds, predict};

/// What to do where there is nothing to predict from.
pub(super) const MISSING: &str = "`flea probe PATH` measures the drive, or give --drive-gbps";

/// What a prediction is made from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Basis {
    /// The drive's rate in 10^9 bytes per second.
    pub drive_gb_per_second: f64,
    /// What one of its reads takes beside its bytes; 0 where that was not measured.
    pub read_latency_seconds: f64,
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
        let profiled = |profile: &Profile| {
            let stream = profile.stream_gb_per_second(plan.page_bytes);
            let experts = plan.experts.as_ref();
            // Experts lie all over the drive, and each is one long read whatever the pages are.
            let experts = experts.and_then(|_| profile.expert_gb_per_second());
            experts.or(stream)
        };
        let drive = drive_gb_per_second.or_else(|| profiled(profile?));
        let compute = compute.or_else(|| profiled_compute(profile?, catalog));
        Some(Self {
            drive_gb_per_second: drive?,
            read_latency_seconds: profile
                .and_then(Profile::read_latency_seconds)
                .unwrap_or(0.0),
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
    /// Whether it is slower by what nobody measured, as where experts are fetched.
    pub is_upper_bound: bool,
}

impl PredictionReport {
    /// What `plan` will do.
    ///
    /// # Errors
    /// `Invalid` for a basis that is none.
    pub fn new(plan: &Plan, basis: &Basis) -> Result<Self> {
        let drive = DriveRate {
            bytes_per_second: basis.drive_gb_per_second * 1e9,
            latency_seconds: basis.read_latency_seconds,
        };
        let prediction = predict(plan, &drive, basis.compute_seconds)?;
        Ok(Self {
            drive_gb_per_second: basis.drive_gb_per_second,
            compute_seconds: prediction.compute_seconds,
            read_seconds: prediction.read_seconds,
            seconds_per_pass: prediction.seconds_per_pass,
            tokens_per_second: prediction.tokens_per_second,
            stall_seconds: prediction.stall_seconds,
            stall_share: prediction.stall_share,
            is_upper_bound: prediction.is_upper_bound,
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
    let (most, bound) = if prediction.is_upper_bound {
        let why = "; an upper bound: what a host loses around each layer's reads is not known";
        ("at most ", why)
    } else {
        ("", "")
    };
    format!(
        "{most}{tokens_per_second:.2} tokens/s, {:.3} s per token: {:.3} s of reading at {:.2} GB/s, {compute}, stalled {:.0} %{bound}",
        prediction.seconds_per_pass,
        prediction.read_seconds,
        prediction.drive_gb_per_second,
        prediction.stall_share * 100.0
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::engine::read_catalog;
    use crate::plan::{ExpertOptions, PlanOptions, experts, plan};
    use crate::tools::synth::shape::{Arch, Quant, Shape, Wish};
    use crate::tools::synth::{Spec, generate};
    use crate::units::PAGE_4K;

    fn mixture() -> Catalog {
        let wish = Wish {
            layers: Some(4),
            embd: Some(256),
            ffn: Some(256),
            vocab: Some(512),
            ..Wish::default()
        };
        let spec = Spec {
            shape: Shape::choose(Arch::Qwen3Moe, Quant::Q8_0, &wish).unwrap(),
            seed: 1,
            router_skew: 0.0,
            split_bytes: None,
            force: false,
        };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.gguf");
        generate(&spec, &path, &AtomicBool::new(false), |_, _| {}).unwrap();
        read_catalog(&path).unwrap().0
    }

    /// A drive whose long random reads are faster than sequential ones into small pages.
    fn profile() -> Found {
        let rate = |request_bytes: u64, depth: u32, gb_per_second: f64| {
            serde_json::json!({"page_bytes": PAGE_4K, "request_bytes": request_bytes, "depth": depth,
                "gb_per_second": gb_per_second, "spread": 0.0, "cpu_seconds_per_gb": 0.0})
        };
        let profile = serde_json::json!({
            "version": 1, "measured": "2026-11-22", "reader": "io_uring", "direct_io": "direct",
            "device": {"major": 1, "minor": 2, "model": null, "serial": null, "filesystem": "ext4"},
            "sequential": [rate(1 << 20, 16, 0.9)],
            "random": [rate(4096, 1, 0.1), rate(1 << 20, 1, 1.4), rate(1 << 20, 8, 1.5)],
            "sustained": null, "memory": null,
        });
        Found::Measured(Box::new(serde_json::from_value(profile).unwrap()))
    }

    /// Experts are read from all over the file, one layer after the other, and nobody measured what a host loses there.
    #[test]
    fn experts_come_at_the_rate_of_random_reads_and_are_a_bound() {
        let catalog = mixture();
        let options = ExpertOptions::default();
        let budget_bytes = experts::smallest_budget_bytes(&catalog, &options).unwrap() * 5 / 4;
        let fetched = experts::plan(&catalog, budget_bytes, &options).unwrap();
        assert!(fetched.streamed_bytes_per_pass > 0);
        let found = profile();
        let basis = Basis::new(None, Some(0.01), &found, &catalog, &fetched).unwrap();
        assert!((basis.drive_gb_per_second - 1.5).abs() < 1e-9, "{basis:?}");
        let latency = basis.read_latency_seconds;
        assert!((latency - 38.2e-6).abs() < 0.1e-6, "{basis:?}");
        let report = PredictionReport::new(&fetched, &basis).unwrap();
        let bytes_seconds = fetched.streamed_bytes_per_pass as f64 / 1.5e9;
        assert!(report.is_upper_bound && report.read_seconds > bytes_seconds);
        assert!(report.read_seconds <= bytes_seconds + 4.0 * latency + 1e-12);
        let told = text(&report);
        assert!(
            told.starts_with("at most ") && told.contains("an upper bound"),
            "{told}"
        );

        let options = PlanOptions {
            slots_count: 3,
            page_bytes: PAGE_4K,
        };
        let whole = plan(&catalog, catalog.model_bytes * 3 / 4, &options).unwrap();
        let basis = Basis::new(None, Some(0.01), &found, &catalog, &whole).unwrap();
        assert!((basis.drive_gb_per_second - 0.9).abs() < 1e-9, "{basis:?}");
        let report = PredictionReport::new(&whole, &basis).unwrap();
        assert!(!report.is_upper_bound && !text(&report).contains("most"));
        // What is given counts, whatever was measured.
        let given = Basis::new(Some(3.0), None, &found, &catalog, &fetched).unwrap();
        assert!((given.drive_gb_per_second - 3.0).abs() < 1e-9);
    }
}
