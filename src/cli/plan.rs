//! `flea plan`: shows what a budget means for a model before anything is read or allocated.
//!
//! The arithmetic of [`crate::plan`] in figures: total, host, weights, ring, resident and streamed bytes, and what they
//! let a drive do. Only headers are read. The same figures stand in the answer of `flea run --json`.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::builder::TypedValueParser;
use serde::Serialize;

use super::table::{Align, Table};
use super::values;
use crate::error::Result;
use crate::io::profile::{self, Device, Found};
use crate::model::Catalog;
use crate::plan::budget::{resolve_and_plan, smallest_total_bytes};
use crate::plan::experts::has_experts;
use crate::plan::{
    Budget, ExpertOptions, Method, Plan, PlanOptions, SLOTS_DEFAULT, default_page_bytes, peak_bytes,
};
use crate::units::{HumanBytes, MemorySpec, PAGE_4K};

mod experts;
mod host;
pub mod prediction;
mod rows;

use experts::ExpertReport;
pub(super) use host::{CONTEXT_DEFAULT_COUNT, KvArgs, UBATCH_DEFAULT_COUNT, host_shape};
use host::{KvReport, estimate};
use prediction::{Basis, PredictionReport};
use rows::RowsReport;

const EXAMPLES: &str = "\
Examples:
  flea plan model.gguf --memory 4GiB
  flea plan model.gguf --memory 50% --drive-gbps 2.4 --compute-seconds 0.25
  flea plan model.gguf --memory 8GiB --layers
  flea plan model.gguf --memory 8GiB --ctx 65536 --kv-disk /var/tmp

Without --host-bytes, what `flea run` holds besides the weights is estimated from --ctx, --ubatch and the KV cache. The
prediction is for a short text, before a cache on the drive has much to read; it comes from the drive's profile, which `flea probe` measures; --drive-gbps and --compute-seconds overrule it.
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
    let available_bytes = crate::mem::limits::available_memory_bytes()?;
    let report = Report::new(args, &catalog, available_bytes, &found)?;
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
    /// The most the host will hold, once its context is full and a prompt has filled a ubatch.
    pub(super) peak_memory_bytes: u64,
    /// Where the prediction's figures come from.
    pub(super) profile: String,
    /// `null` without a profile and without `--drive-gbps`: there is nothing to predict from.
    pub(super) prediction: Option<PredictionReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    layers: Option<Vec<LayerReport>>,
}

#[derive(Debug, Serialize)]
struct LayerReport {
    layer: usize,
    label: String,
    bytes: u64,
    resident_bytes: u64,
    transient_bytes: u64,
    shard_index: Option<u32>,
    /// Where in the shard the streamed run begins.
    transient_offset_bytes: Option<u64>,
    transient_pages: u64,
    slot_index: Option<u32>,
}

impl Report {
    /// Plans `catalog` as `args` say. `available_bytes`: what this process may hold.
    pub(super) fn new(
        args: &Args,
        catalog: &Catalog,
        available_bytes: u64,
        found: &Found,
    ) -> Result<Self> {
        let host_bytes = args.host_bytes.unwrap_or_else(|| estimate(args, catalog));
        let method = method(args, catalog);
        let (budget, plan) =
            resolve_and_plan(catalog, args.memory, available_bytes, host_bytes, &method)?;
        let basis = Basis::new(args.drive_gbps, args.compute_seconds, found, catalog, &plan);
        let prediction = basis
            .map(|basis| PredictionReport::new(&plan, &basis))
            .transpose()?;
        Ok(Self {
            prediction,
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
            peak_memory_bytes: peak_bytes(plan, budget.host_bytes),
            profile: String::new(),
            prediction: None,
            layers: None,
        }
    }

    /// Whether nothing is read once the model is loaded.
    pub(super) const fn is_resident(&self) -> bool {
        self.slots_count == 0 && self.experts.is_none()
    }

    fn text(&self) -> String {
        let mut text = self.summary().to_string();
        if let Some(layers) = &self.layers {
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
        table.field("prediction", prediction::text(self.prediction.as_ref()));
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

/// As `flea run` would plan.
pub(super) fn method(args: &Args, catalog: &Catalog) -> Method {
    let layers = PlanOptions {
        slots_count: args.slots,
        page_bytes: args
            .page_bytes
            .unwrap_or_else(|| default_page_bytes(catalog)),
    };
    if args.whole_experts || !has_experts(catalog) {
        return Method::Layers(layers);
    }
    let experts = ExpertOptions {
        page_bytes: args.page_bytes.unwrap_or(PAGE_4K),
        skew: args.expert_skew,
    };
    Method::Experts { layers, experts }
}

fn layer_reports(catalog: &Catalog, plan: &Plan) -> Vec<LayerReport> {
    let layers = catalog.layers.iter().zip(&plan.layers).enumerate();
    layers
        .map(|(index, (layer, planned))| LayerReport {
            layer: index,
            label: layer.label.clone(),
            bytes: layer.bytes,
            resident_bytes: planned.resident_bytes,
            transient_bytes: planned.transient_bytes,
            shard_index: planned.transient.map(|run| run.shard_index),
            transient_offset_bytes: planned
                .transient
                .map(|run| run.first_page * plan.page_bytes),
            transient_pages: planned.transient.map_or(0, |run| run.page_count),
            slot_index: planned.slot_index,
        })
        .collect()
}

fn layer_table(layers: &[LayerReport]) -> Table {
    let mut table = Table::new(&[
        ("layer", Align::Right),
        ("label", Align::Left),
        ("size", Align::Right),
        ("resident", Align::Right),
        ("streamed", Align::Right),
        ("pages", Align::Right),
        ("shard", Align::Right),
        ("from offset", Align::Right),
        ("slot", Align::Right),
    ]);
    for layer in layers {
        table.row([
            layer.layer.to_string(),
            layer.label.clone(),
            HumanBytes(layer.bytes).to_string(),
            HumanBytes(layer.resident_bytes).to_string(),
            HumanBytes(layer.transient_bytes).to_string(),
            layer.transient_pages.to_string(),
            or_dash(layer.shard_index),
            or_dash(layer.transient_offset_bytes),
            or_dash(layer.slot_index),
        ]);
    }
    table
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::error::ErrorKind;
    use crate::plan::testing::even_catalog;
    use crate::units::{GIB, MIB, PAGE_2M, PAGE_4K};

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> std::result::Result<Args, clap::Error> {
        let words = ["plan", "m.gguf"]
            .into_iter()
            .chain(line.split_whitespace());
        Program::try_parse_from(words).map(|program| program.args)
    }

    /// Twenty layers of 64 MiB, attention before feed-forward.
    fn catalog() -> Catalog {
        even_catalog(20, &[(1, 16 * MIB), (5, 48 * MIB)])
    }

    fn report(line: &str) -> Result<Report> {
        Report::new(&parse(line).unwrap(), &catalog(), 16 * GIB, &Found::Nothing)
    }

    #[test]
    fn the_arithmetic_adds_up() {
        let report = report("--memory 1GiB --host-bytes 256MiB").unwrap();
        assert_eq!(report.page_bytes, PAGE_2M);
        assert_eq!(
            report.total_bytes,
            report.host_bytes + report.weight_budget_bytes
        );
        assert_eq!(
            report.ring_bytes,
            u64::from(report.slots_count) * report.slot_bytes
        );
        assert!(report.resident_bytes + report.ring_bytes <= report.weight_budget_bytes);
        // 20 x 32 pages, 384 pages of budget: 20 x (32 - 16) + 3 x 16 = 368 fit, 20 x 17 + 3 x 15 = 385 do not.
        assert_eq!(report.slot_bytes, 16 * PAGE_2M);
        // The 16 pages left over are given back.
        assert_eq!(report.streamed_bytes_per_pass, (20 * 16 - 16) * PAGE_2M);
        assert_eq!(report.smallest_total_bytes, 256 * MIB + 3 * 64 * MIB);
        assert_eq!(report.transient_layers_count, 20);
    }

    #[test]
    fn json_has_the_agreed_fields() {
        let line = "--memory 50% --host-bytes 64MiB --drive-gbps 2 --compute-seconds 0.1 --layers";
        let value = serde_json::to_value(report(line).unwrap()).unwrap();
        for field in [
            "model_bytes",
            "total_bytes",
            "host_bytes",
            "weight_budget_bytes",
            "resident_bytes",
            "ring_bytes",
            "streamed_bytes_per_pass",
            "smallest_total_bytes",
            "page_bytes",
            "slots_count",
        ] {
            assert!(value[field].is_u64(), "{field}");
        }
        assert_eq!(value["weight_budget_bytes"], 640 * MIB);
        assert_eq!(value["layers"].as_array().unwrap().len(), 20);
        let prediction = &value["prediction"];
        let read_seconds = value["streamed_bytes_per_pass"].as_f64().unwrap() / 2e9;
        assert!((prediction["read_seconds"].as_f64().unwrap() - read_seconds).abs() < 1e-9);
        assert!(prediction["tokens_per_second"].as_f64().unwrap() <= 1.0 / read_seconds + 1e-9);
        let bare =
            serde_json::to_value(report("--memory 50% --host-bytes 64MiB").unwrap()).unwrap();
        assert!(bare["prediction"].is_null() && bare.get("layers").is_none());
    }

    #[test]
    fn the_text_names_every_term() {
        let text = report("--memory 1GiB --host-bytes 256MiB --drive-gbps 2 --layers")
            .unwrap()
            .text();
        for part in [
            "total memory       1.00 GiB",
            "- host             256.0 MiB (as given)",
            "= weight budget    768.0 MiB",
            "3 slots x 16 pages of 2.0 MiB",
            "608.0 MiB in 20 of 20 layers",
            "tokens/s",
            "blk.19",
        ] {
            assert!(text.contains(part), "no '{part}' in\n{text}");
        }
        let resident = report("--memory 200% --host-bytes 1M").unwrap().text();
        assert!(resident.contains("none: everything is resident"));
    }

    #[test]
    fn too_little_is_refused_with_exit_code_4_and_the_named_total_works() {
        let error = report("--memory 300MiB --host-bytes 256MiB").unwrap_err();
        assert_eq!(
            (error.kind(), error.kind().exit_code()),
            (ErrorKind::Refused, 4)
        );
        let named = format!("{} bytes", 448 * MIB);
        assert!(error.context().contains(&named), "{error}");
        assert!(report(&format!("--memory {} --host-bytes 256MiB", 448 * MIB)).is_ok());
        assert!(report("--memory 17GiB").is_err(), "more than is available");
    }

    #[test]
    fn without_host_bytes_an_estimate_is_used() {
        let report = report("--memory 1GiB").unwrap();
        assert!(report.host_bytes_estimated);
        assert_eq!(report.host_bytes, estimate(&parse("").unwrap(), &catalog()));
        assert!(report.host_bytes >= crate::plan::budget::HOST_RESERVE_BYTES);
    }

    #[test]
    fn arguments_are_bounded() {
        for line in [
            "--slots 1",
            "--slots 65",
            "--page-bytes 8192",
            "--drive-gbps 0",
            "--drive-gbps inf",
            "--drive-gbps 1 --compute-seconds -1",
            "--ctx 0",
            "--ubatch 0",
            "--memory 0%",
            "--memory much",
            "--kv-slots 4",
            "--kv-disk . --kv-slots 1",
            "--kv-type int3",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        let args = parse("--memory 50% --page-bytes 4096 --slots 2").unwrap();
        assert_eq!((args.page_bytes, args.slots), (Some(PAGE_4K), 2));
        assert_eq!(args.memory, MemorySpec::Percent(50.0));
    }
}
