//! `flea probe PATH`: measures the drive below a path and the machine's memory, keeps the result as the drive's profile,
//! and holds it against a target.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::{Args as ClapArgs, Subcommand};
use serde_json::{Value, json};

use super::probe_rows;
use super::table::Table;
use crate::error::{Error, ErrorKind, Result};
use crate::io::ReaderKind;
use crate::io::profile::{Compute, Link, Profile, Rate, VERSION};
use crate::mem::gpu::gpus;
use crate::tools::probe::{ProbeOptions, Probed, measure, measure_memory};
use crate::units::{HumanBytes, PAGE_2M, parse_size};

const EXAMPLES: &str = "\
Examples:
  flea probe /models
  flea probe model.gguf --target 2GB/s
  flea probe /mnt/usb --size 4GiB --sustain 5s --json
  flea probe rows --synth 1GiB

The result is kept as the drive's profile under XDG_CACHE_HOME/flea (or FLEA_PROFILE=DIRECTORY; none = keep nothing):
`flea run` and `flea bench stream` take their request length and depth from it, `flea plan` its prediction.
Exit codes: 0 measured, and PASS or WARN (less than a tenth below the target); 1 FAIL, or no figure could be had (noisy,
not a drive, full disk); 130 interrupted.";

/// Below the target by less than this is a warning and no failure.
const NEARLY: f64 = 0.9;
/// Rounds of the memory and compute tests take this share of `--seconds`.
const MEMORY_SPAN_SHARE: f64 = 0.5;

/// Measure a drive and this machine's memory, and keep the result
#[derive(Debug, ClapArgs)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,

    /// A file on the drive, which is only read, or a directory, where a temporary file is written and removed
    #[arg(value_name = "PATH", required = true)]
    path: Option<PathBuf>,

    /// Length of the temporary file
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = super::size)]
    size: u64,

    /// How long to read without a pause, to see whether the drive keeps its rate: 5s, 2m
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    sustain: Duration,

    /// Time for one point of the sweep
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = duration)]
    seconds: Duration,

    /// What the drive should reach: 2GB/s
    #[arg(long, value_name = "RATE", value_parser = rate)]
    target: Option<f64>,

    /// Which reader: auto, io_uring or pread
    #[arg(
        long,
        value_name = "READER",
        default_value = "auto",
        env = "FLEA_READER",
        hide_env_values = true
    )]
    reader: ReaderKind,

    /// Equal reads that lie further apart than this, in percent, are noise and no measurement
    #[arg(long, value_name = "PERCENT", default_value_t = 15.0, value_parser = percent)]
    max_spread: f64,

    /// Measure, but keep no profile
    #[arg(long)]
    no_save: bool,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Measure what single rows of a table cost, by mmap and by the row reader
    Rows(probe_rows::RowsArgs),
}

pub(super) fn duration(text: &str) -> std::result::Result<Duration, String> {
    let text = text.trim();
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale = match unit.trim() {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        _ => return Err(format!("'{text}' is not a time; write 500ms, 60s or 2m")),
    };
    match number.parse::<f64>() {
        Ok(value) if (0.001..=86_400.0).contains(&(value * scale)) => {
            Ok(Duration::from_secs_f64(value * scale))
        }
        _ => Err(format!("'{text}' is not a time from 1 ms to a day")),
    }
}

/// `2GB/s` as 10^9 bytes per second.
fn rate(text: &str) -> std::result::Result<f64, String> {
    let size = text.trim();
    let size = size.strip_suffix("/s").unwrap_or(size);
    match parse_size(size)? {
        0 => Err("must be larger than zero".to_owned()),
        bytes => Ok(bytes as f64 / 1e9),
    }
}

fn percent(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.1..=1000.0).contains(&value) => Ok(value),
        _ => Err(format!("'{text}' is not a percentage from 0.1 to 1000")),
    }
}

/// What became of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verdict {
    Pass,
    Warn,
    Fail,
}

impl Verdict {
    pub(super) fn of(reached: f64, target: f64) -> Self {
        if reached >= target {
            Self::Pass
        } else if reached >= target * NEARLY {
            Self::Warn
        } else {
            Self::Fail
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        }
    }
}

/// Measures, keeps, prints, judges.
///
/// # Errors
/// Those of the measurement; that the profile cannot be written is a warning, the figures stand.
pub fn command(args: &Args) -> Result<ExitCode> {
    if let Some(What::Rows(rows)) = &args.what {
        return probe_rows::command(rows);
    }
    let Some(path) = &args.path else {
        return Err(Error::new(ErrorKind::Invalid, "a path is needed"));
    };
    // The compute test should meet the same OpenMP that `flea run` does.
    #[cfg(feature = "run")]
    crate::host::process::restart_with_short_spins();
    let stop = super::stop_on_signal()?;
    let mut telling = Telling::new(args.json);
    let options = ProbeOptions {
        path: path.clone(),
        size_bytes: args.size,
        span: args.seconds,
        sustain: args.sustain,
        reader: args.reader,
        spread_max: args.max_spread / 100.0,
    };
    let probed = measure(&options, &stop, &mut |text| telling.tell(text));
    let measured = probed.and_then(|probed| {
        let profile = profile(&probed, args, &stop, &mut telling)?;
        Ok((probed, profile))
    });
    telling.finish();
    let (probed, profile) = measured?;
    let kept = keep(args, &profile);
    let reached = profile.stream_gb_per_second(PAGE_2M).unwrap_or(0.0);
    let verdict = args.target.map(|target| Verdict::of(reached, target));
    if args.json {
        super::print_json(&to_json(args, &probed, &profile, kept.as_deref(), verdict))?;
    } else {
        super::print(&to_table(args, &probed, &profile, kept.as_deref(), verdict))?;
    }
    Ok(match verdict {
        Some(Verdict::Fail) => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    })
}

/// What the machine adds to what the drive gave.
fn profile(
    probed: &Probed,
    args: &Args,
    stop: &AtomicBool,
    telling: &mut Telling,
) -> Result<Profile> {
    let span = args.seconds.mul_f64(MEMORY_SPAN_SHARE);
    telling.tell("memory bandwidth");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = match measure_memory(u32::try_from(cores).unwrap_or(1), span, stop) {
        Ok(memory) => Some(memory),
        Err(error) if error.kind() == ErrorKind::Canceled => return Err(error),
        Err(error) => {
            log::warn!("memory bandwidth is not measured: {error}");
            None
        }
    };
    let links = links(span, stop, telling)?;
    telling.tell("compute");
    let (compute, node_seconds) = compute(span, stop)?;
    Ok(Profile {
        version: VERSION,
        measured: now(),
        device: probed.device.clone(),
        reader: probed.reader.name().to_owned(),
        direct_io: probed.direct_io.clone(),
        sequential: probed.sequential.clone(),
        random: probed.random.clone(),
        sustained: Some(probed.sustained),
        memory,
        links,
        compute,
        node_seconds,
    })
}

#[cfg(feature = "run")]
fn compute(span: Duration, stop: &AtomicBool) -> Result<(Vec<Compute>, f64)> {
    match crate::host::compute::measure(span, stop) {
        Ok(measured) => Ok((measured.rates, measured.node_seconds)),
        Err(error) if error.kind() == ErrorKind::Canceled => Err(error),
        Err(error) => {
            log::warn!("compute is not measured: {error}");
            Ok((Vec::new(), 0.0))
        }
    }
}

#[cfg(not(feature = "run"))]
#[allow(clippy::unnecessary_wraps)] // The build with llama.cpp can fail.
fn compute(_span: Duration, _stop: &AtomicBool) -> Result<(Vec<Compute>, f64)> {
    Ok((Vec::new(), 0.0))
}

/// To the second, UTC.
pub(super) fn now() -> String {
    let now = jiff::Timestamp::now();
    jiff::Timestamp::from_second(now.as_second())
        .map_or_else(|_| now.to_string(), |t| t.to_string())
}

fn keep(args: &Args, profile: &Profile) -> Option<PathBuf> {
    if args.no_save {
        return None;
    }
    match profile.save() {
        Ok(path) => Some(path),
        Err(error) => {
            log::warn!("the profile is not kept: {error}");
            None
        }
    }
}

/// One line on a terminal that says what is being done.
pub(super) struct Telling {
    visible: bool,
}

impl Telling {
    pub(super) fn new(quiet: bool) -> Self {
        Self {
            visible: !quiet && std::io::stderr().is_terminal(),
        }
    }

    pub(super) fn tell(&mut self, text: &str) {
        if self.visible {
            // Nobody is left to tell when stderr is gone.
            let _ = write!(std::io::stderr(), "\r\x1b[K{text}");
        }
    }

    pub(super) fn finish(mut self) {
        self.tell("");
    }
}

/// The links into the memory of GPUs. What cannot be measured is a warning and no failure: the drive's figures stand.
#[cfg(feature = "cuda")]
fn links(span: Duration, stop: &AtomicBool, telling: &mut Telling) -> Result<Vec<Link>> {
    let gpus = match gpus() {
        Ok(gpus) => gpus,
        Err(_) => return Ok(Vec::new()),
    };
    let mut links = Vec::with_capacity(gpus.len());
    for gpu in &gpus {
        telling.tell(&format!("link to GPU {}", gpu.index));
        match crate::tools::probe::measure_link(gpu, span, stop) {
            Ok(link) => links.push(link),
            Err(error) if error.kind() == ErrorKind::Canceled => return Err(error),
            Err(error) => log::warn!("the link to GPU {} is not measured: {error}", gpu.index),
        }
    }
    Ok(links)
}

#[cfg(not(feature = "cuda"))]
#[allow(clippy::unnecessary_wraps)] // The build with CUDA can be stopped.
fn links(_span: Duration, _stop: &AtomicBool, _telling: &mut Telling) -> Result<Vec<Link>> {
    Ok(Vec::new())
}

/// The GPUs and their links, or why there is none.
fn gpu_text(profile: &Profile) -> String {
    if profile.links.is_empty() {
        return match gpus() {
            Ok(gpus) => format!("{} there, no link measured", gpus.len()),
            Err(error) => error.context().to_owned(),
        };
    }
    let link = |link: &Link| {
        format!(
            "{}: {}, {:.2} GB/s from pinned memory",
            link.gpu_index, link.gpu, link.gb_per_second
        )
    };
    profile
        .links
        .iter()
        .map(link)
        .collect::<Vec<_>>()
        .join("; ")
}

fn to_json(
    args: &Args,
    probed: &Probed,
    profile: &Profile,
    kept: Option<&Path>,
    verdict: Option<Verdict>,
) -> Value {
    json!({
        "path": args.path.as_deref().map(Path::to_string_lossy),
        "file_bytes": probed.file_bytes,
        "temporary_file": probed.temporary,
        "points": probed.points_count,
        "fallbacks": probed.fallbacks,
        "gb_per_second": profile.sequential(PAGE_2M).map(|rate| rate.gb_per_second),
        "lasting_gb_per_second": profile.stream_gb_per_second(PAGE_2M),
        "gpu": gpu_text(profile),
        "target_gb_per_second": args.target,
        "verdict": verdict.map(Verdict::name),
        "profile_path": kept.map(|path| path.to_string_lossy()),
        "profile": profile,
    })
}

fn to_table(
    args: &Args,
    probed: &Probed,
    profile: &Profile,
    kept: Option<&Path>,
    verdict: Option<Verdict>,
) -> String {
    let mut table = Table::fields();
    let device = &profile.device;
    let unknown = || "unknown".to_owned();
    table.field(
        "drive",
        format!(
            "{}:{}, model {}, serial {}, {}, {}",
            device.major,
            device.minor,
            device.model.clone().unwrap_or_else(unknown),
            device.serial.clone().unwrap_or_else(unknown),
            device.size_bytes.map_or_else(
                || "size unknown".to_owned(),
                |bytes| HumanBytes(bytes).to_string()
            ),
            device.filesystem
        ),
    );
    table.field(
        "read from",
        format!(
            "{} ({}{}), {}, {}, {} points",
            args.path.as_deref().unwrap_or(Path::new("")).display(),
            HumanBytes(probed.file_bytes),
            if probed.temporary { ", temporary" } else { "" },
            profile.reader,
            profile.direct_io,
            probed.points_count
        ),
    );
    for fallback in &probed.fallbacks {
        table.field("note", fallback);
    }
    for rate in profile.sequential.iter().rev() {
        table.field("sequential", sequential_text(rate));
    }
    for rate in &profile.random {
        table.field("random", random_text(rate));
    }
    machine_fields(&mut table, profile);
    table.field("GPU", gpu_text(profile));
    let reached = profile.stream_gb_per_second(PAGE_2M).unwrap_or(0.0);
    if let (Some(verdict), Some(target)) = (verdict, args.target) {
        table.field(
            "target",
            format!(
                "{}: {reached:.2} GB/s, asked for {target:.2}",
                verdict.name()
            ),
        );
    }
    let kept = kept.map_or_else(|| "not kept".to_owned(), |path| path.display().to_string());
    table.field("profile", kept);
    table.to_string()
}

fn machine_fields(table: &mut Table, profile: &Profile) {
    if let Some(sustained) = &profile.sustained {
        table.field(
            "sustained",
            format!(
                "{:.0} s: {:.2} GB/s at first, {:.2} at last ({:+.0} %), slowest {:.2}",
                sustained.seconds,
                sustained.first_gb_per_second,
                sustained.last_gb_per_second,
                (sustained.last_gb_per_second / sustained.first_gb_per_second - 1.0) * 100.0,
                sustained.slowest_gb_per_second
            ),
        );
    }
    if let Some(memory) = &profile.memory {
        table.field(
            "memory",
            format!(
                "read {:.1} GB/s by one core, {:.1} by all {}; copy {:.1} and {:.1}",
                memory.read_one_gb_per_second,
                memory.read_all_gb_per_second,
                memory.cores,
                memory.copy_one_gb_per_second,
                memory.copy_all_gb_per_second
            ),
        );
    }
    if let Some(first) = profile.compute.first() {
        let rates: Vec<String> = profile
            .compute
            .iter()
            .map(|compute| format!("{} {:.1}", compute.dtype, compute.gb_per_second))
            .collect();
        table.field(
            "compute",
            format!(
                "GB/s of weights with {} threads: {}; {:.1} us for each operation",
                first.threads,
                rates.join(", "),
                profile.node_seconds * 1e6
            ),
        );
    }
}

fn sequential_text(rate: &Rate) -> String {
    format!(
        "{:.2} GB/s into {} pages at {} x {} (spread {:.0} %, {:.4} CPU s per GB)",
        rate.gb_per_second,
        HumanBytes(rate.page_bytes),
        HumanBytes(u64::from(rate.request_bytes)),
        rate.depth,
        rate.spread * 100.0,
        rate.cpu_seconds_per_gb
    )
}

fn random_text(rate: &Rate) -> String {
    format!(
        "{:.3} GB/s at {} x {}: {:.0} reads/s (spread {:.0} %)",
        rate.gb_per_second,
        HumanBytes(u64::from(rate.request_bytes)),
        rate.depth,
        rate.gb_per_second * 1e9 / f64::from(rate.request_bytes.max(1)),
        rate.spread * 100.0
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_rates_are_written_as_people_write_them() {
        assert_eq!(duration("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("1.5"), Ok(Duration::from_millis(1500)));
        for text in ["", "0s", "fast", "-1s", "1h", "90000s"] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert!((rate("2GB/s").unwrap() - 2.0).abs() < 1e-12);
        assert!((rate("1GiB/s").unwrap() - 1.073_741_824).abs() < 1e-12);
        assert!(rate("0").is_err() && rate("quick").is_err());
        assert!(percent("0").is_err() && percent("15").is_ok());
    }

    /// A drive's own cache outlasts a few seconds: whether it keeps its rate is seen in a minute.
    #[test]
    fn the_drive_is_read_for_a_minute_unless_told_otherwise() {
        #[derive(clap::Parser)]
        struct Program {
            #[command(flatten)]
            args: Args,
        }
        let sustain = |words: &[&str]| {
            let words = [&["probe", "/models"], words].concat();
            <Program as clap::Parser>::parse_from(words).args.sustain
        };
        assert_eq!(sustain(&[]), Duration::from_secs(60));
        assert_eq!(sustain(&["--sustain", "5s"]), Duration::from_secs(5));
    }

    #[test]
    fn a_target_is_passed_nearly_or_not() {
        assert_eq!(Verdict::of(2.0, 2.0), Verdict::Pass);
        assert_eq!(Verdict::of(1.81, 2.0), Verdict::Warn);
        assert_eq!(Verdict::of(1.79, 2.0), Verdict::Fail);
    }

    #[test]
    fn the_date_is_a_date() {
        let now = now();
        assert!(
            now.len() == 20 && now.ends_with('Z') && now.starts_with("20"),
            "{now}"
        );
    }
}
