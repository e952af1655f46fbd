//! `flea bench predict MODEL...`: what `flea plan` predicts beside what `flea run` then does, for several budgets.
//!
//! Both are run as programs of their own, as a user would, and their `--json` is compared. The drive is measured right
//! before and right after every run: where it drifts, the second prediction shows what the profile could not know, and a
//! run in which it changed is made again, and told from a wrong prediction.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::Args as ClapArgs;
use serde_json::{Value, json};

use super::table::{Align, Table};
use crate::error::{Error, ErrorKind, Result};
use crate::io::profile::{self, Device};
use crate::io::{default_depth, default_request_bytes};
use crate::tools::probe::rate_now;
use crate::units::HumanBytes;

const EXAMPLES: &str = "\
Examples:
  flea probe model.gguf && flea bench predict model.gguf
  flea bench predict a.gguf b.gguf --memory 25%,50%,110% --tokens 16 --json

Exit code 1: a run was further than 15 % from the tokens per second predicted for the drive as it was just before and
after (where the prediction is an upper bound: above it), or further than 5 % from the peak memory predicted. A run during
which the drive changed by more than 15 % is made again, three times in all, and then called noisy instead of judged by
its speed.";

/// Off by more than this is a failed prediction.
const SPEED_OFF_MAX: f64 = 0.15;
const PEAK_OFF_MAX: f64 = 0.05;
/// A drive that changed by more than this during a run makes its speed no measurement.
const DRIFT_MAX: f64 = 0.15;
/// Runs until one met a steady drive.
const ATTEMPTS: usize = 3;
/// Context and ubatch of the runs: small, so that the prompt fills what is reserved.
const CONTEXT_TOKENS: u32 = 256;
const UBATCH_TOKENS: u32 = 64;
/// Of each of three looks at the drive before a run.
const LOOK: Duration = Duration::from_millis(400);

/// Hold predictions against measurements
#[derive(Debug, ClapArgs)]
#[command(after_help = EXAMPLES)]
pub struct PredictArgs {
    /// GGUF files
    #[arg(value_name = "MODEL", required = true)]
    pub models: Vec<PathBuf>,

    /// Budgets to try, as in `flea run`
    #[arg(
        long,
        value_name = "SIZES",
        value_delimiter = ',',
        default_value = "25%,50%,75%,110%"
    )]
    pub memory: Vec<String>,

    /// Tokens to generate in each run
    #[arg(long, value_name = "N", default_value_t = 12, value_parser = clap::value_parser!(u32).range(2..=128))]
    pub tokens: u32,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// One run beside its predictions.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    model: PathBuf,
    memory: String,
    profiled_tokens: f64,
    expected_tokens: f64,
    measured_tokens: f64,
    drive_gb_per_second: f64,
    /// How much the drive changed from before the run to after it.
    drift: f64,
    streams: bool,
    /// The prediction is the most that can be reached, and a slower run no contradiction.
    is_upper_bound: bool,
    expected_peak_bytes: u64,
    measured_peak_bytes: u64,
}

impl Row {
    /// Of the prediction for the drive as it was around the run.
    fn speed_off(&self) -> f64 {
        self.expected_tokens / self.measured_tokens.max(1e-9) - 1.0
    }

    /// Of the prediction from the profile alone, made before the run.
    fn profiled_off(&self) -> f64 {
        self.profiled_tokens / self.measured_tokens.max(1e-9) - 1.0
    }

    fn peak_off(&self) -> f64 {
        self.expected_peak_bytes as f64 / self.measured_peak_bytes.max(1) as f64 - 1.0
    }

    /// A run that reads nothing does not mind the drive.
    fn is_noisy(&self) -> bool {
        self.streams && self.drift > DRIFT_MAX
    }

    fn holds(&self) -> bool {
        let is_below_bound = self.is_upper_bound && self.speed_off() > 0.0;
        let is_near = self.speed_off().abs() <= SPEED_OFF_MAX;
        let speed_holds = self.is_noisy() || is_below_bound || is_near;
        speed_holds && self.peak_off().abs() <= PEAK_OFF_MAX
    }

    fn verdict(&self) -> &'static str {
        match (self.holds(), self.is_noisy()) {
            (false, _) => "does not hold",
            (true, true) => "noisy",
            (true, false) if self.is_upper_bound => "below the bound",
            (true, false) => "holds",
        }
    }

    fn json(&self) -> Value {
        json!({
            "model": self.model.to_string_lossy(),
            "memory": self.memory,
            "predicted_tokens_per_second": self.expected_tokens,
            "predicted_from_profile_alone": self.profiled_tokens,
            "profile_off": self.profiled_off(),
            "drive_gb_per_second": self.drive_gb_per_second,
            "measured_tokens_per_second": self.measured_tokens,
            "drive_drift": self.drift,
            "noisy": self.is_noisy(),
            "is_upper_bound": self.is_upper_bound,
            "speed_off": self.speed_off(),
            "predicted_peak_bytes": self.expected_peak_bytes,
            "measured_peak_bytes": self.measured_peak_bytes,
            "peak_off": self.peak_off(),
            "holds": self.holds(),
        })
    }
}

/// Runs the comparison and prints it.
///
/// # Errors
/// What a plan or run says; the exit code is 1 where a prediction did not hold.
pub fn command(args: &PredictArgs) -> Result<()> {
    let mut rows = Vec::new();
    for model in &args.models {
        let device = Device::of_path(model)?;
        if profile::find(&device).profile().is_none() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "no profile of the drive below {}; run `flea probe {}` first",
                    model.display(),
                    model.display()
                ),
            ));
        }
        for memory in &args.memory {
            rows.push(steady_row(args, model, memory)?);
        }
    }
    if args.json {
        let answers: Vec<Value> = rows.iter().map(Row::json).collect();
        super::print_json(&json!({ "runs": answers }))?;
    } else {
        super::print(&table(&rows).to_string())?;
    }
    match rows.iter().filter(|row| !row.holds()).count() {
        0 => Ok(()),
        count => Err(Error::new(
            ErrorKind::Io,
            format!("{count} of {} predictions did not hold", rows.len()),
        )),
    }
}

/// The first row with a steady drive, or the steadiest.
fn steady_row(args: &PredictArgs, model: &Path, memory: &str) -> Result<Row> {
    let mut best = row(args, model, memory)?;
    for _ in 1..ATTEMPTS {
        if !best.is_noisy() {
            break;
        }
        let again = row(args, model, memory)?;
        if again.drift < best.drift {
            best = again;
        }
    }
    Ok(best)
}

fn row(args: &PredictArgs, model: &Path, memory: &str) -> Result<Row> {
    let profiled = plan(model, memory, None)?;
    let page_bytes = profiled["page_bytes"].as_u64().unwrap_or(0);
    let before = drive_now(model, page_bytes)?;
    let run = run(args, model, memory)?;
    let after = drive_now(model, page_bytes)?;
    let drive = f64::midpoint(before, after);
    let expected = plan(model, memory, Some(drive))?;
    let tokens = |plan: &Value| match plan["prediction_missing"].as_str() {
        Some(reason) => Err(Error::new(ErrorKind::Unsupported, reason)),
        None => number(&plan["prediction"], "tokens_per_second"),
    };
    Ok(Row {
        model: model.to_path_buf(),
        memory: memory.to_owned(),
        profiled_tokens: tokens(&profiled)?,
        expected_tokens: tokens(&expected)?,
        measured_tokens: number(&run, "tokens_per_second")?,
        drive_gb_per_second: drive,
        drift: (after - before).abs() / drive.max(1e-9),
        streams: number(&expected, "streamed_bytes_per_pass")? > 0.0,
        is_upper_bound: expected["prediction"]["is_upper_bound"] == true,
        expected_peak_bytes: number(&expected, "peak_memory_bytes")? as u64,
        measured_peak_bytes: number(&run, "peak_memory_bytes")? as u64,
    })
}

/// The drive's rate now, read as the engine will read.
fn drive_now(model: &Path, page_bytes: u64) -> Result<f64> {
    let found = profile::find(&Device::of_path(model)?);
    let profiled = found.profile().and_then(|p| p.sequential(page_bytes));
    let way = profiled.map_or_else(
        || {
            let request_bytes = default_request_bytes(page_bytes);
            let depth = default_depth(request_bytes);
            (u64::from(request_bytes), depth, page_bytes)
        },
        |rate| (u64::from(rate.request_bytes), rate.depth, page_bytes),
    );
    rate_now(model, way, LOOK)
}

fn plan(model: &Path, memory: &str, drive: Option<f64>) -> Result<Value> {
    let mut words = vec!["--memory".to_owned(), memory.to_owned()];
    words.extend(["--ctx".to_owned(), CONTEXT_TOKENS.to_string()]);
    words.extend(["--ubatch".to_owned(), UBATCH_TOKENS.to_string()]);
    if let Some(drive) = drive {
        words.extend(["--drive-gbps".to_owned(), drive.to_string()]);
    }
    flea("plan", model, &words)
}

fn run(args: &PredictArgs, model: &Path, memory: &str) -> Result<Value> {
    // Any ids do, as long as every vocabulary has them; the first few are control tokens in many.
    let prompt: Vec<String> = (10..10 + UBATCH_TOKENS).map(|id| id.to_string()).collect();
    let words = [
        "--memory",
        memory,
        "--ctx",
        &CONTEXT_TOKENS.to_string(),
        "--ubatch",
        &UBATCH_TOKENS.to_string(),
        "--prompt-tokens",
        &prompt.join(","),
        "-n",
        &args.tokens.to_string(),
        "--ignore-eos",
    ];
    flea("run", model, &words.map(str::to_owned))
}

/// This program again, with `--json`.
fn flea(verb: &str, model: &Path, words: &[String]) -> Result<Value> {
    let program =
        std::env::current_exe().map_err(|error| Error::from_io(&error, "find this program"))?;
    let output = Command::new(program)
        .arg(verb)
        .arg(model)
        .args(words)
        .arg("--json")
        .output()
        .map_err(|error| Error::from_io(&error, format_args!("start flea {verb}")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let value: Value = serde_json::from_str(text.trim()).map_err(|error| {
        let said = String::from_utf8_lossy(&output.stderr);
        Error::new(
            ErrorKind::Internal,
            format!("flea {verb}: {}: {error}: {}", output.status, said.trim()),
        )
    })?;
    if output.status.success() {
        return Ok(value);
    }
    let message = value["error"]["message"].as_str().unwrap_or("it failed");
    Err(Error::new(
        ErrorKind::Io,
        format!("flea {verb} {}: {message}", model.display()),
    ))
}

fn number(value: &Value, key: &str) -> Result<f64> {
    value[key].as_f64().ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format!("there is no {key} to compare; has the drive a profile (`flea probe`)?"),
        )
    })
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&[
        ("model", Align::Left),
        ("memory", Align::Right),
        ("tokens/s", Align::Right),
        ("by profile", Align::Right),
        ("off", Align::Right),
        ("drive GB/s", Align::Right),
        ("by that", Align::Right),
        ("off", Align::Right),
        ("peak predicted", Align::Right),
        ("peak", Align::Right),
        ("off", Align::Right),
        ("", Align::Left),
    ]);
    for row in rows {
        let name = row.model.file_name().unwrap_or(row.model.as_os_str());
        table.row([
            name.to_string_lossy().into_owned(),
            row.memory.clone(),
            format!("{:.2}", row.measured_tokens),
            format!("{:.2}", row.profiled_tokens),
            format!("{:+.1} %", row.profiled_off() * 100.0),
            format!("{:.2}", row.drive_gb_per_second),
            format!("{:.2}", row.expected_tokens),
            format!("{:+.1} %", row.speed_off() * 100.0),
            HumanBytes(row.expected_peak_bytes).to_string(),
            HumanBytes(row.measured_peak_bytes).to_string(),
            format!("{:+.1} %", row.peak_off() * 100.0),
            row.verdict().to_owned(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        Row {
            model: PathBuf::from("/models/m.gguf"),
            memory: "50%".to_owned(),
            profiled_tokens: 1.0,
            expected_tokens: 2.0,
            measured_tokens: 2.2,
            drive_gb_per_second: 1.5,
            drift: 0.1,
            streams: true,
            is_upper_bound: false,
            expected_peak_bytes: 1020,
            measured_peak_bytes: 1000,
        }
    }

    #[test]
    fn a_prediction_holds_within_its_bounds() {
        assert!(row().holds());
        let slow = Row {
            measured_tokens: 1.7,
            ..row()
        };
        let drifting = Row {
            drift: 0.3,
            ..slow.clone()
        };
        assert!(drifting.holds() && drifting.is_noisy());
        let resident = Row {
            streams: false,
            ..drifting
        };
        assert!(!resident.holds(), "nothing is read: the drive is no excuse");
        assert!(!slow.holds() && slow.speed_off() > SPEED_OFF_MAX);
        let bounded = Row {
            is_upper_bound: true,
            ..slow.clone()
        };
        assert_eq!(bounded.verdict(), "below the bound");
        let above = Row {
            measured_tokens: 2.4,
            ..bounded
        };
        assert!(!above.holds(), "nothing passes a bound");
        let fast = Row {
            measured_tokens: 2.4,
            ..row()
        };
        assert!(!fast.holds() && fast.speed_off() < -SPEED_OFF_MAX);
        let large = Row {
            measured_peak_bytes: 1100,
            ..row()
        };
        assert!(!large.holds());
        assert!(
            !Row {
                measured_tokens: 0.0,
                ..row()
            }
            .holds()
        );
    }

    #[test]
    fn the_table_says_which_ones_do_not() {
        let text = table(&[
            row(),
            Row {
                measured_tokens: 9.0,
                ..row()
            },
        ])
        .to_string();
        assert_eq!(text.matches("does not hold").count(), 1, "{text}");
        assert!(text.contains("m.gguf") && text.contains("-9.1 %"), "{text}");
    }

    #[test]
    fn a_missing_figure_is_an_error() {
        assert!(number(&json!({"a": 1.5}), "a").is_ok());
        let error = number(&json!({"a": null}), "a").unwrap_err();
        assert!(error.context().contains("flea probe"), "{error}");
    }
}
