//! `flea probe rows`: arguments, report and verdicts around [`crate::tools::probe::rows`].

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::Args as ClapArgs;
use serde_json::{Value, json};

use super::probe::{Telling, Verdict, duration};
use super::table::{Align, Table};
use crate::error::Result;
use crate::io::ReaderKind;
use crate::io::rows::RowOptions;
use crate::plan::PolicyKind;
use crate::tools::probe::rows::{
    Access, BATCH_TOKENS, Case, RowsOptions, RowsReport, Way, measure,
};
use crate::units::HumanBytes;

const EXAMPLES: &str = "\
Examples:
  flea probe rows --synth 1GiB
  flea probe rows gemma-3n.gguf --json
  flea probe rows /mnt/nvme --synth 4GiB --row-bytes 9520 --slices 35

Cold is proven: before every round the page cache holds nothing of the table (posix_fadvise, checked by mincore), and a
mapping that never waited for the drive is an error. The row reader's figure for one sequence is bounded by what one
read takes; with several sequences, or several rows a token, its reads are in flight together and mmap's are not.
PASS, WARN (less than a tenth short) and FAIL hold the best random decode against --target times plain mmap, and what
the row reader keeps in memory against --budget. Exit codes: 0 PASS or WARN, 1 FAIL or no figure, 130 interrupted.";

/// Measure what single rows of a table cost, by mmap and by the row reader
#[derive(Debug, ClapArgs)]
#[command(after_help = EXAMPLES)]
pub struct RowsArgs {
    /// A model with embeddings or any file, which is only read, or a directory for a temporary table
    #[arg(value_name = "FILE", default_value = ".")]
    path: PathBuf,

    /// Length of the temporary table
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = super::size)]
    synth: u64,

    /// Length of a row, where the file does not say [default: 35 layers of 256 4-bit values, as in Gemma 4 E2B]
    #[arg(long, value_name = "BYTES", default_value_t = 5040, value_parser = clap::value_parser!(u64).range(1..1 << 30), hide_default_value = true)]
    row_bytes: u64,

    /// Layers that a row has a slice for, where the file does not say
    #[arg(long, value_name = "N", default_value_t = 35, value_parser = clap::value_parser!(u32).range(1..1024))]
    slices: u32,

    /// Memory of the row reader
    #[arg(long, value_name = "SIZE", default_value = "32MiB", value_parser = super::size)]
    budget: u64,

    /// Reads in flight
    #[arg(long, value_name = "N", default_value_t = RowOptions::default().depth)]
    depth: u32,

    /// What leaves the cache: lru, lfu, 2q or lfru
    #[arg(long, value_name = "POLICY", default_value_t = RowOptions::default().policy)]
    policy: PolicyKind,

    /// Which reader: auto, io_uring or pread
    #[arg(
        long,
        value_name = "READER",
        default_value = "auto",
        env = "FLEA_READER",
        hide_env_values = true
    )]
    reader: ReaderKind,

    /// Time for each case
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = duration)]
    seconds: Duration,

    /// How many times the rate of plain mmap random decode should reach
    #[arg(long, value_name = "TIMES", default_value_t = 10.0)]
    target: f64,

    /// Where the choice of rows comes from
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Measures, prints, judges.
///
/// # Errors
/// Those of the measurement.
pub fn command(args: &RowsArgs) -> Result<ExitCode> {
    let stop = super::stop_on_signal()?;
    let mut telling = Telling::new(args.json);
    let probed = probe(args, &stop, &mut |text| telling.tell(text));
    telling.finish();
    let probed = probed?;
    if args.json {
        super::print_json(&probed.to_json(args))?;
    } else {
        super::print(&to_table(args, &probed.report, probed.speed, probed.memory))?;
    }
    Ok(if probed.speed.max(probed.memory) == Verdict::Fail {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// What was measured, and how it is judged.
pub(super) struct Probed {
    report: RowsReport,
    speed: Verdict,
    memory: Verdict,
}

impl Probed {
    /// What `--json` prints.
    pub(super) fn to_json(&self, args: &RowsArgs) -> Value {
        to_json(args, &self.report, self.speed, self.memory)
    }
}

/// Measures and judges.
///
/// # Errors
/// Those of the measurement.
pub(super) fn probe(
    args: &RowsArgs,
    stop: &AtomicBool,
    tell: &mut dyn FnMut(&str),
) -> Result<Probed> {
    let options = RowsOptions {
        path: args.path.clone(),
        synth_bytes: args.synth,
        row_bytes: args.row_bytes,
        slices: args.slices,
        span: args.seconds,
        rows: RowOptions {
            budget_bytes: args.budget,
            depth: args.depth,
            policy: args.policy,
            reader: args.reader,
            ..RowOptions::default()
        },
        seed: args.seed,
    };
    let report = measure(&options, stop, tell)?;
    Ok(Probed {
        speed: Verdict::of(best_ratio(&report), args.target),
        memory: memory_verdict(&report),
        report,
    })
}

/// Random decode, one sequence or several: whichever gains more.
fn best_ratio(report: &RowsReport) -> f64 {
    [Access::Decode, Access::DecodeBatch]
        .iter()
        .filter_map(|access| report.ratio(*access, Way::Mmap))
        .fold(0.0, f64::max)
}

/// The most that the row reader had mapped in any case.
fn resident_bytes(report: &RowsReport, way: Way) -> u64 {
    let cases = report.cases.iter().filter(|case| case.way == way);
    cases.map(|case| case.resident_bytes).max().unwrap_or(0)
}

fn memory_verdict(report: &RowsReport) -> Verdict {
    let most = resident_bytes(report, Way::Flea).max(report.memory_bytes);
    Verdict::of(report.budget_bytes as f64, most as f64)
}

fn case_json(case: &Case) -> Value {
    json!({
        "access": case.access.name(),
        "way": case.way.name(),
        "tokens": case.tokens,
        "seconds": case.seconds,
        "tokens_per_second": case.tokens_per_second(),
        "mb_per_second": case.mb_per_second(),
        "p50_ns": case.p50_ns,
        "p99_ns": case.p99_ns,
        "drive_bytes": case.drive_bytes,
        "major_faults": case.major_faults,
        "cold_rounds": case.cold_rounds,
        "resident_peak_bytes": case.resident_bytes,
        "page_cache_bytes": case.page_cache_bytes,
        "rows": case.counters.map(|c| c.rows),
        "page_uses": case.counters.map(|c| c.page_uses),
        "page_hits": case.counters.map(|c| c.page_hits),
        "reads": case.counters.map(|c| c.reads),
        "reads_per_second": case.counters.map(|c| c.reads as f64 / case.seconds.max(1e-9)),
    })
}

fn to_json(args: &RowsArgs, report: &RowsReport, speed: Verdict, memory: Verdict) -> Value {
    let ratios = |way| -> Value {
        let pairs = Access::ALL.map(|access| (access.name(), report.ratio(access, way)));
        pairs
            .into_iter()
            .map(|(name, ratio)| (name.to_owned(), json!(ratio)))
            .collect()
    };
    json!({
        "path": report.path.to_string_lossy(),
        "temporary_file": report.temporary,
        "tensor": report.tensor,
        "filesystem": report.filesystem,
        "read_ahead_kib": report.read_ahead_kib,
        "row_bytes": report.table.row_bytes,
        "rows": report.table.rows_count,
        "slices": report.slices,
        "reader": report.reader.name(),
        "direct_io": report.direct_io,
        "fallbacks": report.fallbacks,
        "depth": args.depth,
        "policy": args.policy.name(),
        "budget_bytes": report.budget_bytes,
        "memory_bytes": report.memory_bytes,
        "cache_pages": report.cache_pages,
        "batch_tokens": BATCH_TOKENS,
        "cases": report.cases.iter().map(case_json).collect::<Vec<_>>(),
        "times_mmap": ratios(Way::Mmap),
        "times_mmap_random": ratios(Way::MmapRandom),
        "target_times_mmap": args.target,
        "speed_verdict": speed.name(),
        "memory_verdict": memory.name(),
    })
}

fn to_table(args: &RowsArgs, report: &RowsReport, speed: Verdict, memory: Verdict) -> String {
    let mut fields = Table::fields();
    let what = match (&report.tensor, report.temporary) {
        (Some(tensor), _) => format!("{tensor} of {}", report.path.display()),
        (None, true) => format!("a temporary table in {}", report.path.display()),
        (None, false) => report.path.display().to_string(),
    };
    fields.field(
        "table",
        format!(
            "{what}: {} rows of {} bytes, {} slices, on {}",
            report.table.rows_count, report.table.row_bytes, report.slices, report.filesystem
        ),
    );
    fields.field(
        "row reader",
        format!(
            "{}, {}, {} in flight, {} ({} cached pages, {})",
            report.reader,
            report.direct_io,
            args.depth,
            HumanBytes(report.memory_bytes),
            report.cache_pages,
            args.policy
        ),
    );
    for fallback in &report.fallbacks {
        fields.field("note", fallback);
    }
    let mut cases = Table::new(&[
        ("access", Align::Left),
        ("way", Align::Left),
        ("tokens/s", Align::Right),
        ("MB/s", Align::Right),
        ("p50 us", Align::Right),
        ("p99 us", Align::Right),
        ("major faults", Align::Right),
        ("from drive", Align::Right),
        ("RSS peak", Align::Right),
        ("page cache", Align::Right),
    ]);
    for case in &report.cases {
        cases.row([
            case.access.name().to_owned(),
            case.way.name().to_owned(),
            format!("{:.0}", case.tokens_per_second()),
            format!("{:.1}", case.mb_per_second()),
            format!("{:.0}", case.p50_ns as f64 / 1e3),
            format!("{:.0}", case.p99_ns as f64 / 1e3),
            case.major_faults.to_string(),
            HumanBytes(case.drive_bytes).to_string(),
            format!("+{}", HumanBytes(case.resident_bytes)),
            HumanBytes(case.page_cache_bytes).to_string(),
        ]);
    }
    let mut verdicts = Table::fields();
    for access in Access::ALL {
        let ratio = |way| report.ratio(access, way).unwrap_or(0.0);
        verdicts.field(
            access.name(),
            format!(
                "{:.1} times mmap, {:.1} times mmap with MADV_RANDOM",
                ratio(Way::Mmap),
                ratio(Way::MmapRandom)
            ),
        );
    }
    verdicts.field(
        "speed",
        format!(
            "{}: {:.1} times cold mmap at random decode, asked for {:.1}",
            speed.name(),
            best_ratio(report),
            args.target
        ),
    );
    verdicts.field(
        "memory",
        format!(
            "{}: RSS +{} at most, {} allowed (mmap +{})",
            memory.name(),
            HumanBytes(resident_bytes(report, Way::Flea)),
            HumanBytes(report.budget_bytes),
            HumanBytes(
                resident_bytes(report, Way::Mmap).max(resident_bytes(report, Way::MmapRandom))
            )
        ),
    );
    format!("{fields}\n{cases}\n{verdicts}")
}
