//! What `flea plan --vram` tells: what stays in VRAM, in pinned memory and on the drive, and how fast that is.
//!
//! Invariant: nothing is predicted from a rate that nobody measured or gave; what is missing is named.

use serde::Serialize;

use super::{Args, layer_options};
use crate::cli::table::{Align, Table};
use crate::error::Result;
use crate::io::profile::Found;
use crate::model::Catalog;
use crate::plan::tiers::balance;
use crate::plan::{Budget, Plan, TierRates, TierShare, TierTimes, VramPlan};
use crate::units::{HumanBytes, MemorySpec};

/// Argument parser for VRAM: a size or a share of the model.
///
/// # Errors
/// A sentence for the user.
pub(in crate::cli) fn vram(text: &str) -> std::result::Result<MemorySpec, String> {
    match text.parse()? {
        MemorySpec::Auto | MemorySpec::Bytes(0) => {
            Err("write 8GiB, 8GB or, of the model, 25%".to_owned())
        }
        spec => Ok(spec),
    }
}

/// The upper plan, where `--vram` is given.
///
/// # Errors
/// As [`VramPlan::new`].
pub(super) fn plan(args: &Args, catalog: &Catalog) -> Result<Option<VramPlan>> {
    let vram_bytes = match args.vram {
        None | Some(MemorySpec::Auto) => return Ok(None),
        Some(MemorySpec::Bytes(bytes)) => bytes,
        Some(MemorySpec::Percent(percent)) => (catalog.model_bytes as f64 * percent / 100.0) as u64,
    };
    VramPlan::new(catalog, vram_bytes, args.slots).map(Some)
}

/// The tiers, as `--json` has them.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct TierReport {
    budget_bytes: u64,
    resident_bytes: u64,
    ring_bytes: u64,
    slots_count: u32,
    smallest_budget_bytes: u64,
    /// The model as it lies in VRAM: with its alignment and the zeros behind quantised rows.
    image_bytes: u64,
    padding_bytes: u64,
    /// What comes over the link in each pass.
    link_bytes_per_pass: u64,
    /// Of that, what is kept in memory.
    memory_bytes: u64,
    /// Of that, what is read from the drive.
    drive_bytes_per_pass: u64,
    link_gb_per_second: Option<f64>,
    drive_gb_per_second: Option<f64>,
    link_seconds: Option<f64>,
    drive_seconds: Option<f64>,
    seconds_per_pass: Option<f64>,
    /// `link`, `drive` or `compute`: what sets the speed.
    bound: Option<&'static str>,
    /// The `--memory` with which link and drive finish together; `null` where the drive is as fast as the link.
    balanced_total_bytes: Option<u64>,
    /// Why no times are told although there are rates.
    #[serde(skip)]
    without_times: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    layers: Option<Vec<TierLayer>>,
}

#[derive(Debug, Serialize)]
struct TierLayer {
    layer: usize,
    label: String,
    vram_bytes: u64,
    memory_bytes: u64,
    drive_bytes: u64,
}

impl TierReport {
    /// The figures of the upper plan and of the one below it.
    ///
    /// # Errors
    /// `Invalid` for rates that are none.
    pub(super) fn new(
        args: &Args,
        catalog: &Catalog,
        vram: &VramPlan,
        budget: &Budget,
        lower: &Plan,
        found: &Found,
    ) -> Result<Self> {
        let shares = vram.shares(catalog, lower);
        let drive = args
            .drive_gbps
            .or_else(|| found.profile()?.stream_gb_per_second(lower.page_bytes));
        let link = args
            .link_gbps
            .or_else(|| found.profile()?.link_gb_per_second(0));
        let rates = link.zip(drive).map(|(link, drive)| TierRates {
            drive_bytes_per_second: drive * 1e9,
            link_bytes_per_second: link * 1e9,
        });
        let compute_seconds = args.compute_seconds.unwrap_or(0.0);
        let times = rates
            .map(|rates| TierTimes::new(&shares, &rates, compute_seconds))
            .transpose()?;
        let options = layer_options(args, catalog);
        let balanced = rates
            .map(|rates| balance(&vram.below, &options, &rates))
            .transpose()?;
        let sum = |bytes: fn(&TierShare) -> u64| shares.iter().map(bytes).sum();
        Ok(Self {
            budget_bytes: vram.plan.weight_budget_bytes,
            resident_bytes: vram.plan.resident_bytes,
            ring_bytes: vram.plan.ring_bytes,
            slots_count: vram.plan.slots_count,
            smallest_budget_bytes: vram.plan.smallest_budget_bytes,
            image_bytes: vram.image.len_bytes,
            padding_bytes: vram.image.padding_bytes,
            link_bytes_per_pass: vram.link_bytes_per_pass(),
            memory_bytes: sum(|share| share.memory_bytes),
            drive_bytes_per_pass: sum(|share| share.drive_bytes),
            link_gb_per_second: link,
            drive_gb_per_second: drive,
            link_seconds: times.map(|times| times.link_seconds),
            drive_seconds: times.map(|times| times.drive_seconds),
            seconds_per_pass: times.map(|times| times.seconds_per_pass()),
            bound: times.map(|times| times.bound.name()),
            balanced_total_bytes: balanced
                .flatten()
                .map(|bytes| bytes.saturating_add(budget.host_bytes)),
            without_times: None,
            layers: args.layers.then(|| tier_layers(catalog, &shares)),
        })
    }

    /// Takes back what was reckoned from rates, where they are not what sets the speed.
    pub(super) fn leave_times_out(&mut self, why: &str) {
        (self.link_seconds, self.drive_seconds) = (None, None);
        (self.seconds_per_pass, self.bound) = (None, None);
        self.balanced_total_bytes = None;
        self.without_times = Some(why.to_owned());
    }

    /// The lines for people.
    pub(super) fn fields(&self, table: &mut Table) {
        let size = HumanBytes;
        table.field(
            "VRAM",
            format!(
                "{}: {} resident, {} ring ({} slots); at least {}",
                size(self.budget_bytes),
                size(self.resident_bytes),
                size(self.ring_bytes),
                self.slots_count,
                size(self.smallest_budget_bytes)
            ),
        );
        table.field(
            "per pass",
            format!(
                "{} over the link: {} from memory, {} from the drive",
                size(self.link_bytes_per_pass),
                size(self.memory_bytes),
                size(self.drive_bytes_per_pass)
            ),
        );
        table.field("prediction", self.prediction());
    }

    fn prediction(&self) -> String {
        if let Some(why) = &self.without_times {
            return format!("none: {why}");
        }
        let (Some(link), Some(drive), Some(pass), Some(bound)) = (
            self.link_seconds,
            self.drive_seconds,
            self.seconds_per_pass,
            self.bound,
        ) else {
            return "none: `flea probe PATH` measures drive and link, or give --drive-gbps and --link-gbps".to_owned();
        };
        let balance = self.balanced_total_bytes.map_or_else(
            || "the drive is as fast as the link: memory speeds nothing up".to_owned(),
            |bytes| format!("link and drive balance at {} of memory", HumanBytes(bytes)),
        );
        if pass <= 0.0 {
            return "nothing is streamed: compute alone sets the speed".to_owned();
        }
        format!(
            "{:.2} tokens/s at most: {link:.3} s over the link, {drive:.3} s from the drive, bound by {bound}; {balance}",
            1.0 / pass
        )
    }

    /// Every layer, for people.
    pub(super) fn layers(&self) -> Option<Table> {
        let layers = self.layers.as_ref()?;
        let mut table = Table::new(&[
            ("layer", Align::Right),
            ("label", Align::Left),
            ("VRAM", Align::Right),
            ("memory", Align::Right),
            ("drive", Align::Right),
        ]);
        for layer in layers {
            table.row([
                layer.layer.to_string(),
                layer.label.clone(),
                HumanBytes(layer.vram_bytes).to_string(),
                HumanBytes(layer.memory_bytes).to_string(),
                HumanBytes(layer.drive_bytes).to_string(),
            ]);
        }
        Some(table)
    }
}

fn tier_layers(catalog: &Catalog, shares: &[TierShare]) -> Vec<TierLayer> {
    let layers = catalog.layers.iter().zip(shares).enumerate();
    layers
        .map(|(layer, (entry, share))| TierLayer {
            layer,
            label: entry.label.clone(),
            vram_bytes: share.vram_bytes,
            memory_bytes: share.memory_bytes,
            drive_bytes: share.drive_bytes,
        })
        .collect()
}
