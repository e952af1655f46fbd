//! `flea plan`: shows what a budget means for a model before anything is read or allocated.
//!
//! The arithmetic of [`crate::plan`] in figures: total, host, weights, ring, resident and streamed bytes, and what they
//! let a drive do. Only headers are read. The same figures stand in the answer of `flea run --json`.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::builder::TypedValueParser;
use serde::Serialize;

use super::table::Table;
use super::values;
use crate::error::Result;
use crate::io::ShardFile;
use crate::io::coded_file::CodedFile;
use crate::io::profile::{self, Device, Found};
use crate::model::Catalog;
use crate::plan::budget::{resolve_and_plan, smallest_total_bytes};
use crate::plan::experts::has_experts;
use crate::plan::{
    Budget, ExpertOptions, Method, Plan, PlanOptions, SLOTS_DEFAULT, default_page_bytes, peak_bytes,
};
use crate::units::{HumanBytes, MemorySpec, PAGE_4K};

mod compressed;
mod experts;
mod host;
mod layers;
pub mod prediction;
mod rows;
mod tiers;

use compressed::CompressedReport;
use experts::ExpertReport;
pub(super) use host::{CONTEXT_DEFAULT_COUNT, KvArgs, UBATCH_DEFAULT_COUNT, host_shape};
use host::{KvReport, estimate};
use layers::{LayerReport, layer_reports, layer_table};
use prediction::{Basis, PredictionReport};
use rows::RowsReport;
use tiers::TierReport;

const EXAMPLES: &str = "\
Examples:
  flea plan model.gguf --memory 4GiB
  flea plan model.gguf --memory 50% --drive-gbps 2.4 --compute-seconds 0.25
  flea plan model.gguf --memory 8GiB --layers
  flea plan model.gguf --vram 8GiB --memory 16GiB --link-gbps 25
  flea plan model.gguf --memory 8GiB --ctx 65536 --kv-disk /var/tmp

Without --host-bytes, what `flea run` holds besides the weights is estimated from --ctx, --ubatch and the KV cache. The
prediction is for a short text, before a cache on the drive has much to read; it comes from the drive's profile, which `flea probe` measures; --drive-gbps and --compute-seconds overrule it.
With --vram a layer is divided over VRAM, pinned memory and the drive; --memory is then what feeds the GPU.
Of a compressed model (.fleapack) no speed is predicted: how fast it is decoded is in no profile.
Exit code 4: the budget is too small; the message names the smallest one that works.";

/// Show what a memory budget means for a model: what stays in memory, what is streamed, how fast that is
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The model: a GGUF file (of a split, the first part), a safetensors file or its index
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,

    /// Everything the process may hold: 4GiB, 4GB, 512M; or 50%, weights of half the model; or auto, all that is free
    #[arg(long, value_name = "SIZE", default_value = "auto", env = "FLEA_MEMORY")]
    pub memory: MemorySpec,

    /// Weights in the memory of a GPU: 8GiB, 8GB, or 25%, of the model
    #[arg(long, value_name = "SIZE", value_parser = tiers::vram)]
    pub vram: Option<MemorySpec>,

    /// The rate from pinned memory into VRAM in GB/s (10^9 bytes), for the prediction [default: the drive's profile]
    #[arg(long, value_name = "X", value_parser = positive, requires = "vram")]
    pub link_gbps: Option<f64>,

    /// What the host holds besides weights in flea's pools [default: an estimate for `flea run`]
    #[arg(long, value_name = "SIZE", value_parser = crate::units::parse_size)]
    pub host_bytes: Option<u64>,

    /// Slots of the ring
    #[arg(long, value_name = "N", default_value_t = SLOTS_DEFAULT, value_parser = values::slots)]
    pub slots: u32,

    /// Page size [default: 2 MiB where layers are 32 MiB or more, else 4 KiB]
    #[arg(long, value_name = "BYTES", value_parser = page_bytes_parser())]
    pub page_bytes: Option<u64>,

    /// Tokens of context the host makes room for [default: the model's own, at most 4096]
    #[arg(long, value_name = "TOKENS", value_parser = super::count)]
    pub ctx: Option<u32>,

    /// Prompt tokens the host computes in one pass
    #[arg(long, value_name = "TOKENS", default_value_t = UBATCH_DEFAULT_COUNT, value_parser = super::count)]
    pub ubatch: u32,

    /// Keys and values.
    #[command(flatten)]
    pub kv: KvArgs,

    /// The drive's rate in GB/s (10^9 bytes), for the prediction [default: the drive's profile]
    #[arg(long, value_name = "X", value_parser = positive)]
    pub drive_gbps: Option<f64>,

    /// Seconds that computing one token takes with all weights in memory, for the prediction [default: the profile]
    #[arg(long, value_name = "S", value_parser = not_negative)]
    pub compute_seconds: Option<f64>,

    /// Stream a layer with all its experts instead of fetching those that are chosen
    #[arg(long)]
    pub whole_experts: bool,

    /// Keep token and per-layer embeddings whole in memory instead of reading the rows that are needed
    #[arg(long)]
    pub host_rows: bool,

    /// How unevenly experts are chosen, for the prediction: the exponent of a Zipf law, 0 = all alike
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = not_negative)]
    pub expert_skew: f64,

    /// Show every layer
    #[arg(long)]
    pub layers: bool,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

fn page_bytes_parser() -> impl TypedValueParser<Value = u64> {
    PossibleValuesParser::new(["4096", "2097152"]).try_map(|text| text.parse::<u64>())
}

pub(super) fn positive(text: &str) -> std::result::Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err("must be a number above 0".to_owned()),
    }
}

pub(super) fn not_negative(text: &str) -> std::result::Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(value) if value >= 0.0 && value.is_finite() => Ok(value),
        _ => Err("must be a number, 0 or more".to_owned()),
    }
}

/// Runs `flea plan`.
///
/// # Errors
/// What reading the headers says; `Refused` when the budget does not do.
pub fn command(args: &Args) -> Result<()> {
    args.kv.check()?;
    let (catalog, files) = crate::engine::read_catalog(&args.model)?;
    let drive = files.first().map(Device::of_shard);
    let found = drive.map_or(Found::Nothing, |drive| profile::find(&drive));
    let coded = files.first().and_then(ShardFile::coded);
    let available_bytes = crate::mem::limits::available_memory_bytes()?;
    let model = (&catalog, coded.map(AsRef::as_ref));
    let report = Report::new(args, model, available_bytes, &found)?;
    if args.json {
        super::print_json(&report)
    } else {
        super::print(&report.text())
    }
}

/// The answer; its fields are those of `--json`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) model: String,
    pub(super) architecture: String,
    pub(super) model_bytes: u64,
    pub(super) total_bytes: u64,
    pub(super) host_bytes: u64,
    /// False when `--host-bytes` was given.
    pub(super) host_bytes_estimated: bool,
    pub(super) weight_budget_bytes: u64,
    pub(super) always_resident_bytes: u64,
    pub(super) resident_bytes: u64,
    pub(super) ring_bytes: u64,
    pub(super) streamed_bytes_per_pass: u64,
    pub(super) resident_share: f64,
    pub(super) smallest_budget_bytes: u64,
    pub(super) smallest_total_bytes: u64,
    pub(super) page_bytes: u64,
    pub(super) slots_count: u32,
    pub(super) slot_bytes: u64,
    pub(super) layers_count: u32,
    pub(super) transient_layers_count: u32,
    /// The cache of experts; `null` where layers are streamed with all they have.
    pub(super) experts: Option<ExpertReport>,
    /// Embeddings that are read row by row; `null` where the host keeps them.
    pub(super) rows: Option<RowsReport>,
    /// Keys and values on a drive; `null` where memory holds them.
    pub(super) kv: Option<KvReport>,
    /// What VRAM holds and what comes over the link; the figures above are then those of the memory below it. `null`
    /// without `--vram`.
    pub(super) vram: Option<TierReport>,
    /// What is read of a compressed model; the figures above are then of its weights, decoded. `null` for others.
    pub(super) compressed: Option<CompressedReport>,
    /// The most the host will hold, once its context is full and a prompt has filled a ubatch.
    pub(super) peak_memory_bytes: u64,
    /// Where the prediction's figures come from.
    pub(super) profile: String,
    /// `null` where there is nothing to predict from. With `--vram` see there.
    pub(super) prediction: Option<PredictionReport>,
    /// Why there is no prediction, and what to do.
    pub(super) prediction_missing: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    layers: Option<Vec<LayerReport>>,
}

impl Report {
    /// Plans a model, and the file it is compressed in, as `args` say. `available_bytes`: what this process may hold.
    pub(super) fn new(
        args: &Args,
        (catalog, coded): (&Catalog, Option<&CodedFile>),
        available_bytes: u64,
        found: &Found,
    ) -> Result<Self> {
        let host_bytes = args.host_bytes.unwrap_or_else(|| estimate(args, catalog));
        let vram = tiers::plan(args, catalog)?;
        let method = match &vram {
            Some(_) => Method::Layers(layer_options(args, catalog)),
            None => method(args, catalog),
        };
        let streamed = vram.as_ref().map_or(catalog, |vram| &vram.below);
        let (budget, plan) =
            resolve_and_plan(streamed, args.memory, available_bytes, host_bytes, &method)?;
        let basis = Basis::new(args.drive_gbps, args.compute_seconds, found, catalog, &plan);
        let compressed = coded
            .map(|coded| CompressedReport::new(&plan, coded, basis.as_ref()))
            .transpose()?;
        if let Some(vram) = vram {
            let mut tiers = TierReport::new(args, catalog, &vram, &budget, &plan, found)?;
            let why = compressed.as_ref().map(CompressedReport::why);
            if let Some(why) = &why {
                tiers.leave_times_out(why);
            }
            return Ok(Self {
                vram: Some(tiers),
                compressed,
                prediction_missing: why,
                profile: found.to_string(),
                layers: args.layers.then(|| layer_reports(catalog, &plan)),
                ..Self::of_plan(args, catalog, &budget, &plan)
            });
        }
        let prediction = basis
            .filter(|_| compressed.is_none())
            .map(|basis| PredictionReport::new(&plan, &basis))
            .transpose()?;
        let why = || {
            compressed
                .as_ref()
                .map_or_else(|| prediction::MISSING.to_owned(), CompressedReport::why)
        };
        Ok(Self {
            prediction,
            prediction_missing: prediction.is_none().then(why),
            compressed,
            profile: found.to_string(),
            layers: args.layers.then(|| layer_reports(catalog, &plan)),
            ..Self::of_plan(args, catalog, &budget, &plan)
        })
    }

    fn of_plan(args: &Args, catalog: &Catalog, budget: &Budget, plan: &Plan) -> Self {
        Self {
            model: args.model.display().to_string(),
            architecture: catalog.architecture.clone(),
            model_bytes: catalog.model_bytes,
            total_bytes: budget.total_bytes,
            host_bytes: budget.host_bytes,
            host_bytes_estimated: args.host_bytes.is_none(),
            weight_budget_bytes: budget.weight_budget_bytes,
            always_resident_bytes: plan.always_resident_bytes,
            resident_bytes: plan.resident_bytes,
            ring_bytes: plan.ring_bytes,
            streamed_bytes_per_pass: plan.streamed_bytes_per_pass,
            resident_share: plan.resident_share(),
            smallest_budget_bytes: plan.smallest_budget_bytes,
            smallest_total_bytes: smallest_total_bytes(
                plan.smallest_budget_bytes,
                budget.host_bytes,
            ),
            page_bytes: plan.page_bytes,
            slots_count: plan.slots_count,
            slot_bytes: plan.slot_bytes(),
            layers_count: u32::try_from(plan.layers.len()).unwrap_or(u32::MAX),
            transient_layers_count: plan.transient_layers_count(),
            experts: plan.experts.as_ref().map(ExpertReport::new),
            rows: RowsReport::new(catalog, args.host_rows),
            kv: KvReport::new(args, catalog),
            vram: None,
            compressed: None,
            peak_memory_bytes: peak_bytes(plan, budget.host_bytes),
            profile: String::new(),
            prediction: None,
            prediction_missing: None,
            layers: None,
        }
    }

    /// Why nothing is predicted of a compressed model; `None` for others.
    pub(super) fn why_compressed(&self) -> Option<String> {
        self.compressed.as_ref().map(CompressedReport::why)
    }

    /// Whether nothing is read once the model is loaded.
    pub(super) const fn is_resident(&self) -> bool {
        self.slots_count == 0 && self.experts.is_none()
    }

    fn text(&self) -> String {
        let mut text = self.summary().to_string();
        if let Some(layers) = self.vram.as_ref().and_then(TierReport::layers) {
            let _ = write!(text, "\n{layers}");
        } else if let Some(layers) = &self.layers {
            let _ = write!(text, "\n{}", layer_table(layers));
        }
        text
    }

    fn summary(&self) -> Table {
        let size = HumanBytes;
        let mut table = Table::fields();
        table.field(
            "model",
            format_args!("{} ({})", self.model, self.architecture),
        );
        table.field("model size", size(self.model_bytes));
        table.field("total memory", size(self.total_bytes));
        let origin = if self.host_bytes_estimated {
            "estimate: tensors it keeps, KV cache, compute, program, reserve"
        } else {
            "as given"
        };
        table.field(
            "- host",
            format_args!("{} ({origin})", size(self.host_bytes)),
        );
        table.field("= weight budget", size(self.weight_budget_bytes));
        table.field(
            "  resident",
            format_args!(
                "{} ({:.1} % of the layers; {} of it under every budget)",
                size(self.resident_bytes),
                self.resident_share * 100.0,
                size(self.always_resident_bytes)
            ),
        );
        match &self.experts {
            Some(experts) => table.field("  experts' cache", experts.text()),
            None => table.field("  ring", self.ring_text()),
        };
        if let Some(rows) = &self.rows {
            table.field("rows", rows.text());
        }
        if let Some(kv) = &self.kv {
            table.field("keys and values", kv.text());
        }
        table.field(
            self.streamed_label(),
            match &self.experts {
                Some(experts) => format!(
                    "{} of the {} of experts that a token uses",
                    size(self.streamed_bytes_per_pass),
                    size(experts.used_bytes_per_token)
                ),
                None => format!(
                    "{} in {} of {} layers",
                    size(self.streamed_bytes_per_pass),
                    self.transient_layers_count,
                    self.layers_count
                ),
            },
        );
        if let Some(compressed) = &self.compressed {
            table.field("compressed", compressed.text());
        }
        table.field(
            "smallest total",
            format_args!(
                "{} ({} for weights)",
                size(self.smallest_total_bytes),
                size(self.smallest_budget_bytes)
            ),
        );
        table.field(
            "peak memory",
            format_args!("{} with a full context", size(self.peak_memory_bytes)),
        );
        table.field("profile", &self.profile);
        match &self.vram {
            Some(vram) => vram.fields(&mut table),
            None => {
                let missing = self.prediction_missing.as_deref().unwrap_or_default();
                let told = self.prediction.as_ref().map(prediction::text);
                table.field(
                    "prediction",
                    told.unwrap_or_else(|| format!("none: {missing}")),
                );
            }
        }
        table
    }

    const fn streamed_label(&self) -> &'static str {
        match self.experts {
            Some(_) => "read per token",
            None => "streamed per pass",
        }
    }

    fn ring_text(&self) -> String {
        if self.slots_count == 0 {
            return "none: everything is resident".to_owned();
        }
        format!(
            "{} ({} slots x {} pages of {})",
            HumanBytes(self.ring_bytes),
            self.slots_count,
            self.slot_bytes / self.page_bytes,
            HumanBytes(self.page_bytes)
        )
    }
}

fn layer_options(args: &Args, catalog: &Catalog) -> PlanOptions {
    PlanOptions {
        slots_count: args.slots,
        page_bytes: args
            .page_bytes
            .unwrap_or_else(|| default_page_bytes(catalog)),
    }
}

/// As `flea run` would plan.
pub(super) fn method(args: &Args, catalog: &Catalog) -> Method {
    let layers = layer_options(args, catalog);
    if args.whole_experts || !has_experts(catalog) {
        return Method::Layers(layers);
    }
    let experts = ExpertOptions {
        page_bytes: args.page_bytes.unwrap_or(PAGE_4K),
        skew: args.expert_skew,
    };
    Method::Experts { layers, experts }
}

#[cfg(test)]
mod tests;
