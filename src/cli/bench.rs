//! `flea bench stream` and `flea bench raw`: arguments and report around [`crate::tools::bench_stream`] and the raw
//! measurement of the drive.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args as ClapArgs, Subcommand};

use super::table::Table;
use super::trace::{self, TraceFile};
use super::{bench_gds, bench_kernels, bench_policies, bench_raw, bench_suite, values};
use crate::engine::{BudgetSpec, Latency, OpenOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::io::mirror::CopyStats;
use crate::io::{ReaderKind, ReaderOptions};
use crate::mem::Backing;
use crate::plan::SLOTS_DEFAULT;
use crate::proto::Opened;
use crate::proto::gpus::{GpuList, GpuShare, VramList};
use crate::proto::opened::{Endpoint, PlanFigures};
use crate::tools::bench_stream::{self, Outcome};
use crate::units::{HumanBytes, MemorySpec};

/// Measure the drive and the streaming of a model
#[derive(Debug, ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Stream a model without computing: the ceiling of every host
    Stream(StreamArgs),
    /// Find the drive's ceiling: the best sequential O_DIRECT read
    Raw(bench_raw::RawArgs),
    /// Find the rates of the kernels on a GPU, each beside a copy in its memory
    Kernels(bench_kernels::KernelsArgs),
    /// Find out whether GPUDirect Storage works for a file
    Gds(bench_gds::GdsArgs),
    /// Hold what `flea plan` predicts against what `flea run` then does
    #[cfg(feature = "run")]
    Predict(super::bench_predict::PredictArgs),
    /// Find out which cache policy suits which use of experts, on traces with known skews
    Policies(bench_policies::PoliciesArgs),
    /// Measure everything beside fio and the peers, and write it down
    Suite(bench_suite::SuiteArgs),
}

const EXAMPLES: &str = "\
Examples:
  flea bench stream model.gguf --memory 10% --passes 3
  flea bench stream model.gguf --memory 2GiB --reader pread --verify --json
  flea bench stream model.gguf --gpu 0 --vram 4GiB --memory 8GiB

The first pass also reads what stays in memory. Nothing is warmed up; with O_DIRECT the page cache plays no part.
Compare with `flea bench raw`, which measures what the drive can do.";

/// What `flea bench stream` takes.
#[derive(Debug, ClapArgs)]
#[command(after_help = EXAMPLES)]
pub struct StreamArgs {
    /// GGUF or safetensors file; any shard or the index of a split model
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,

    /// Everything the process may hold (4GiB, 512M), or the weights in memory as a share of the model (50%)
    /// [default: what is free]
    #[arg(
        long,
        value_name = "SIZE",
        env = "FLEA_MEMORY",
        hide_env_values = true,
        allow_hyphen_values = true
    )]
    pub memory: Option<MemorySpec>,

    /// Walks over all layers
    #[arg(long, value_name = "N", default_value = "3", value_parser = super::count)]
    pub passes: u32,

    /// How weights are read
    #[arg(long, value_name = "READER", env = "FLEA_READER", hide_env_values = true, default_value = "auto", value_parser = reader_parser())]
    pub reader: ReaderKind,

    /// Where weights live: memory whose pages move, or memory that other processes can map
    #[arg(long, value_name = "BACKING", default_value = "private", value_parser = backing_parser())]
    pub backing: Backing,

    /// Length of one read [default: by page size]
    #[arg(long, value_name = "SIZE", value_parser = values::request_bytes)]
    pub request_bytes: Option<u32>,

    /// Reads in flight, 1 to 256 [default: 32 MiB worth, 4 to 16]
    #[arg(long, value_name = "N", value_parser = values::depth)]
    pub depth: Option<u32>,

    /// Page size, 4KiB or 2MiB [default: by the size of the layers]
    #[arg(long, value_name = "SIZE", value_parser = values::page_bytes)]
    pub page_bytes: Option<u64>,

    /// Slots of the ring
    #[arg(long, value_name = "N", default_value_t = SLOTS_DEFAULT, value_parser = values::slots)]
    pub slots: u32,

    /// Stream through the daemon at this endpoint, unix:PATH; memory, reader, slots and pages are then the daemon's
    #[arg(long, value_name = "ENDPOINT", conflicts_with_all = ["memory", "backing", "request_bytes", "depth", "page_bytes", "slots", "trace"])]
    pub endpoint: Option<String>,

    /// Stream into the memory of this GPU, counted from 0, through host memory; or of several, 0,1, each with layers of its own
    #[arg(long, value_name = "N,...", requires = "vram", conflicts_with_all = ["endpoint", "backing"])]
    pub gpu: Option<GpuList>,

    /// What weights may take of the GPU's memory: 4GiB, 512M, or 25%, of the model; or of each one's, 4GiB,2GiB
    #[arg(long, value_name = "SIZE,...", requires = "gpu")]
    pub vram: Option<VramList>,

    /// Walk once more, unmeasured, and hold every byte against a plain read of the file
    #[arg(long)]
    pub verify: bool,

    /// A directory with a copy of the model's files, to be read from as well; may be given several times. Lengths, holes and
    /// samples of the bytes are compared with the model, not every byte
    #[arg(long, value_name = "DIR")]
    pub mirror: Vec<PathBuf>,

    /// Write what the drive and the walk did when, in Chrome's trace format (ui.perfetto.dev)
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,

    /// Report as one JSON object
    #[arg(long)]
    pub json: bool,
}

fn reader_parser() -> impl TypedValueParser<Value = ReaderKind> {
    let kinds = [
        ReaderKind::Auto,
        ReaderKind::IoUring,
        ReaderKind::Pread,
        ReaderKind::Gds,
    ];
    PossibleValuesParser::new(kinds.map(ReaderKind::name)).map(move |name| {
        let named = kinds.into_iter().find(|kind| kind.name() == name);
        named.unwrap_or_default()
    })
}

fn backing_parser() -> impl TypedValueParser<Value = Backing> {
    PossibleValuesParser::new(["private", "shared"]).map(|name| match name.as_str() {
        "shared" => Backing::Shared,
        _ => Backing::Private,
    })
}

const fn backing_name(backing: Backing) -> &'static str {
    match backing {
        Backing::Private => "private",
        Backing::Shared => "shared",
    }
}

impl StreamArgs {
    fn options(&self) -> OpenOptions {
        OpenOptions {
            budget: BudgetSpec::Memory(self.memory.unwrap_or(MemorySpec::Auto)),
            backing: self.backing,
            reader: ReaderOptions {
                kind: self.reader,
                request_bytes: self.request_bytes.unwrap_or(0),
                depth: self.depth.unwrap_or(0),
                ..ReaderOptions::default()
            },
            slots_count: self.slots,
            page_bytes: self.page_bytes,
            mirrors: self.mirror.clone(),
            ..OpenOptions::default()
        }
    }
}

/// Runs the measurement that was asked for.
///
/// # Errors
/// Those of opening and streaming the model, or of reading the drive.
pub fn command(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Stream(args) => stream(args).map(|()| ExitCode::SUCCESS),
        What::Raw(args) => bench_raw::command(args).map(|()| ExitCode::SUCCESS),
        What::Kernels(args) => bench_kernels::command(args).map(|()| ExitCode::SUCCESS),
        What::Gds(args) => bench_gds::command(args).map(|()| ExitCode::SUCCESS),
        What::Policies(args) => bench_policies::command(args).map(|()| ExitCode::SUCCESS),
        What::Suite(args) => bench_suite::command(args),
        #[cfg(feature = "run")]
        What::Predict(args) => super::bench_predict::command(args).map(|()| ExitCode::SUCCESS),
    }
}

fn stream(args: &StreamArgs) -> Result<()> {
    let stop = super::stop_on_signal()?;
    let trace = TraceFile::create(args.trace.as_deref())?;
    let options = OpenOptions {
        trace: trace.as_ref().map(TraceFile::trace),
        ..args.options()
    };
    if let (Some(gpus), Some(vram)) = (&args.gpu, &args.vram) {
        let streamed = vram
            .of(gpus)
            .and_then(|gpus| gpu_stream(args, &gpus, options, &stop));
        let label = |layer: u32| format!("layer {layer}");
        return trace::both(streamed, trace.map_or(Ok(()), |trace| trace.write(&label)));
    }
    let endpoint = args
        .endpoint
        .as_deref()
        .map_or(Ok(Endpoint::Local), Endpoint::parse)?;
    let model = Opened::open(&args.model, &endpoint, options)?;
    let outcome = bench_stream::measure(&model, args.passes, &stop);
    let label = |layer: u32| model.catalog().layers[layer as usize].label.clone();
    let written = trace.map_or(Ok(()), |trace| trace.write(&label));
    let outcome = trace::both(outcome, written)?;
    for fallback in &outcome.stats.fallbacks {
        log::warn!("{}", fallback.reason);
    }
    let verified_bytes = verify(args, &model, &stop)?;
    let plan = model
        .plan()
        .ok_or_else(|| Error::new(ErrorKind::Internal, "the model was streamed without a plan"))?;
    if args.json {
        super::print_json(&json(&model, &plan, &outcome, verified_bytes))
    } else {
        super::print(&table(&model, &plan, &outcome, verified_bytes))
    }
}

#[cfg(feature = "cuda")]
fn gpu_stream(
    args: &StreamArgs,
    gpus: &[GpuShare],
    options: OpenOptions,
    stop: &AtomicBool,
) -> Result<()> {
    super::bench_gpu::stream(args, gpus, options, stop)
}

#[cfg(not(feature = "cuda"))]
fn gpu_stream(
    _args: &StreamArgs,
    _gpus: &[GpuShare],
    _options: OpenOptions,
    _stop: &AtomicBool,
) -> Result<()> {
    Err(crate::mem::gpu::not_built())
}

fn verify(args: &StreamArgs, model: &Opened, stop: &AtomicBool) -> Result<Option<u64>> {
    if !args.verify {
        return Ok(None);
    }
    bench_stream::verify(model, stop).map(Some)
}

fn json(
    model: &Opened,
    plan: &PlanFigures,
    outcome: &Outcome,
    verified_bytes: Option<u64>,
) -> serde_json::Value {
    let stats = &outcome.stats;
    let budget = model.budget();
    let fallbacks: Vec<&str> = stats.fallbacks.iter().map(|f| f.kind.name()).collect();
    let passes: Vec<_> = outcome.passes.iter().map(pass_json).collect();
    serde_json::json!({
        "gb_per_second": outcome.gb_per_second(),
        "cpu_seconds_per_gb": outcome.cpu_seconds_per_gb(),
        "bytes_read": outcome.bytes_read,
        "kernel_read_bytes": outcome.kernel_read_bytes,
        "read_seconds": outcome.read_seconds,
        "layer_load_ms": load_json(&stats.load_latency),
        "seconds": outcome.seconds,
        "cpu_seconds": outcome.cpu_seconds,
        "passes": passes,
        "layers": model.catalog().layers.len(),
        "acquires": stats.acquires,
        "loads": stats.loads,
        "stalls": stats.stalls,
        "stall_seconds": stats.stall_ns as f64 / 1e9,
        "mispredicts": stats.mispredicts,
        "retries": stats.retries,
        "model_bytes": model.catalog().model_bytes,
        "total_bytes": budget.map(|budget| budget.total_bytes),
        "host_bytes": budget.map(|budget| budget.host_bytes),
        "weight_budget_bytes": budget.map(|budget| budget.weight_budget_bytes),
        "resident_bytes": plan.resident_bytes,
        "ring_bytes": plan.ring_bytes,
        "streamed_bytes_per_pass": plan.streamed_bytes_per_pass,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "reader": stats.reader.name(),
        "backing": backing_name(stats.backing),
        "direct_io": stats.direct_io,
        "page_bytes": stats.page_bytes,
        "huge_page_share": stats.huge_page_share,
        "fallbacks": fallbacks,
        "mirrors": stats.mirrors.iter().map(mirror_json).collect::<Vec<_>>(),
        "profile": model.profile(),
        "verified_bytes": verified_bytes,
    })
}

/// What one copy has served, as `--json` has it.
pub(super) fn mirror_json(copy: &CopyStats) -> serde_json::Value {
    serde_json::json!({
        "directory": copy.directory.to_string_lossy(),
        "bytes_read": copy.bytes_read,
        "dropped": copy.is_dropped,
    })
}

/// Milliseconds from aiming a slot to the last byte of its layer; null where nothing was counted.
fn load_json(latency: &Latency) -> serde_json::Value {
    if latency.count == 0 {
        return serde_json::Value::Null;
    }
    let milliseconds = |ns: u64| ns as f64 / 1e6;
    serde_json::json!({
        "count": latency.count,
        "mean": milliseconds(latency.mean_ns),
        "p50": milliseconds(latency.p50_ns),
        "p95": milliseconds(latency.p95_ns),
        "p99": milliseconds(latency.p99_ns),
        "max": milliseconds(latency.max_ns),
    })
}

fn pass_json(pass: &bench_stream::Pass) -> serde_json::Value {
    serde_json::json!({
        "seconds": pass.seconds,
        "bytes_read": pass.bytes_read,
        "gb_per_second": pass.bytes_read as f64 / 1e9 / pass.seconds.max(1e-9),
        "cpu_seconds": pass.cpu_seconds,
        "read_seconds": pass.read_seconds,
    })
}

fn table(
    model: &Opened,
    plan: &PlanFigures,
    outcome: &Outcome,
    verified_bytes: Option<u64>,
) -> String {
    let stats = &outcome.stats;
    let mut table = Table::fields();
    table.field(
        "model",
        format!(
            "{} in {} layers",
            HumanBytes(model.catalog().model_bytes),
            model.catalog().layers.len()
        ),
    );
    table.field(
        "weights",
        format!(
            "{} resident, {} ring, {} streamed per pass",
            HumanBytes(plan.resident_bytes),
            HumanBytes(plan.ring_bytes),
            HumanBytes(plan.streamed_bytes_per_pass)
        ),
    );
    table.field(
        "reader",
        format!(
            "{}, {}, {} pages, {:.0} % of the pool on huge pages",
            stats.reader.name(),
            if stats.direct_io {
                "O_DIRECT"
            } else {
                "buffered"
            },
            HumanBytes(stats.page_bytes),
            100.0 * stats.huge_page_share
        ),
    );
    table.field("profile", model.profile());
    for copy in &stats.mirrors {
        let dropped = if copy.is_dropped { ", dropped" } else { "" };
        let read = HumanBytes(copy.bytes_read);
        table.field(
            "copy",
            format!("{}: {read} read{dropped}", copy.directory.display()),
        );
    }
    for (index, pass) in outcome.passes.iter().enumerate() {
        let rate = pass.bytes_read as f64 / 1e9 / pass.seconds.max(1e-9);
        table.field(
            &format!("pass {}", index + 1),
            format!(
                "{:.2} s, {}, {rate:.2} GB/s",
                pass.seconds,
                HumanBytes(pass.bytes_read)
            ),
        );
    }
    table.field(
        "all",
        format!(
            "{:.2} GB/s, {:.3} CPU seconds per GB, {} loads, waited {:.2} s of {:.2} s",
            outcome.gb_per_second(),
            outcome.cpu_seconds_per_gb(),
            stats.loads,
            stats.stall_ns as f64 / 1e9,
            outcome.seconds
        ),
    );
    table.field("peak memory", HumanBytes(outcome.peak_memory_bytes));
    if let Some(bytes) = verified_bytes {
        table.field(
            "verified",
            format!("{}, every byte as in the file", HumanBytes(bytes)),
        );
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> std::result::Result<StreamArgs, clap::Error> {
        let words = std::iter::once("bench").chain(line.split(' '));
        match Program::try_parse_from(words)?.args.what {
            What::Stream(args) => Ok(args),
            _ => panic!("{line} is not stream"),
        }
    }

    #[test]
    fn options_reach_the_engine() {
        let line = "stream m.gguf --memory 10% --reader pread --backing shared --request-bytes 4MiB --depth 2 \
                    --page-bytes 4KiB --slots 5 --passes 2 --verify --json";
        let args = parse(line).unwrap();
        let options = args.options();
        assert_eq!(
            options.budget,
            BudgetSpec::Memory(MemorySpec::Percent(10.0))
        );
        assert_eq!(options.reader.kind, ReaderKind::Pread);
        assert_eq!(
            (options.reader.request_bytes, options.reader.depth),
            (4 << 20, 2)
        );
        assert_eq!(options.backing, Backing::Shared);
        assert_eq!((options.page_bytes, options.slots_count), (Some(4096), 5));
        assert!(args.passes == 2 && args.verify && args.json);
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "stream",
            "stream m.gguf --passes 0",
            "stream m.gguf --page-bytes 64KiB",
            "stream m.gguf --reader mmap",
            "stream m.gguf --memory lots",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
