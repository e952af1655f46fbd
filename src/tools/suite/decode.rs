//! Cases with compute: decode and prefill of one model over the budgets, beside the same program with all weights in
//! memory.
//!
//! The bound of a streamed token is the longer of two times: computing it with resident weights, and reading what is
//! streamed at the rate of fio. Invariants: the resident run is warm and every streamed run cold; disk, compute and
//! overhead sum to all of the time from the first weight to the last token.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::lab::{Case, Lab, RoundLine, Run, find, number, touch_memory};
use super::report::{Book, CaseReport, Spec};
use super::stat::Goal;
use super::{blank, file_bytes};
use crate::error::{Error, Result};
use crate::io::cached;

/// Its row in every table.
pub const RESIDENT: &str = "resident (--no-stream)";
/// Tokens of the short prompt.
const SHORT_PROMPT: usize = 5;
/// Tokens of the long one.
const LONG_PROMPT: usize = 64;
/// Tokens per second times what one takes at least.
pub(super) const OF_BOUND: Spec = Spec::ratio("of bound").goal(Goal::AtLeast(0.93));
/// The time to the first token, in that of a pass over all weights.
pub(super) const FIRST_TOKEN: Spec = Spec::ratio("first token passes").goal(Goal::AtMost(1.15));
/// What both compute in, as the peers do.
pub const CONTEXT_TOKENS: &str = "256";

/// A model generating at several budgets.
#[derive(Debug)]
pub struct Decode {
    /// The model.
    pub path: PathBuf,
    /// What to call it in the name of the case.
    pub slug: String,
    /// Weights in memory, percent of the model.
    pub budgets: Vec<u32>,
}

/// Few tokens where each is slow; enough for a rate where each is fast.
fn tokens_at(budget: u32) -> usize {
    match budget {
        0..=60 => 4,
        61..=90 => 6,
        91..=99 => 10,
        _ => 24,
    }
}

pub(super) fn prompt(count: usize) -> String {
    let ids: Vec<String> = (0..count)
        .map(|index| (index * 7 % 900 + 300).to_string())
        .collect();
    ids.join(",")
}

/// Reads the whole file once, so that the page cache holds it.
pub(super) fn make_warm(path: &Path) -> Result<()> {
    let failed =
        |error: std::io::Error| Error::from_io(&error, format_args!("read {}", path.display()));
    let mut file = std::fs::File::open(path).map_err(failed)?;
    std::io::copy(&mut file, &mut std::io::sink()).map_err(failed)?;
    Ok(())
}

/// How much of a model `flea run` may keep.
#[derive(Debug, Clone, Copy)]
pub(super) enum Budget {
    /// Percent of the weights; the rest is streamed, from a cold file.
    Percent(u32),
    /// Everything, without flea's device, from a warm file.
    Resident,
}

/// `flea run` behind a prompt of so many tokens.
struct Asked {
    prompt_count: usize,
    tokens: usize,
    budget: Budget,
}

fn run_flea(
    lab: &Lab<'_>,
    path: &Path,
    asked: &Asked,
    arguments: &[&str],
) -> Result<BTreeMap<&'static str, f64>> {
    let mut command = lab.flea_run(path, CONTEXT_TOKENS);
    command.args(["--prompt-tokens", &prompt(asked.prompt_count)]);
    command
        .args(["-n", &asked.tokens.to_string()])
        .args(arguments);
    match asked.budget {
        Budget::Percent(percent) => {
            cached::make_cold(path)?;
            touch_memory(file_bytes(path)? / 100 * u64::from(percent))?;
            command.args(["--memory", &format!("{percent}%")]);
        }
        Budget::Resident => {
            make_warm(path)?;
            command.arg("--no-stream");
        }
    }
    let (answer, _) = lab.flea_json(&mut command)?;
    figures(&answer, asked.tokens)
}

/// Generates behind the short prompt.
///
/// # Errors
/// Those of [`Lab::flea_json`].
pub(super) fn run_streamed(
    lab: &Lab<'_>,
    path: &Path,
    tokens: usize,
    budget: Budget,
    arguments: &[&str],
) -> Result<BTreeMap<&'static str, f64>> {
    let asked = Asked {
        prompt_count: SHORT_PROMPT,
        tokens,
        budget,
    };
    run_flea(lab, path, &asked, arguments)
}

/// Computes the long prompt.
fn run_prompt(lab: &Lab<'_>, path: &Path, budget: Budget) -> Result<BTreeMap<&'static str, f64>> {
    let asked = Asked {
        prompt_count: LONG_PROMPT,
        tokens: 1,
        budget,
    };
    run_flea(lab, path, &asked, &[])
}

/// What the judges need of flea's answer.
///
/// # Errors
/// See [`number`].
pub fn figures(answer: &serde_json::Value, tokens: usize) -> Result<BTreeMap<&'static str, f64>> {
    let prompt_rate = number(answer, "prompt_tokens_per_second")?;
    let mut figures = BTreeMap::from([
        (
            "prompt_seconds",
            number(answer, "prompt_tokens")? / prompt_rate,
        ),
        ("prompt_rate", prompt_rate),
        ("first_token", number(answer, "seconds_to_first_token")?),
        ("stall", number(answer, "stall_seconds")?),
        ("read_bytes", number(answer, "bytes_read")?),
        ("peak", number(answer, "peak_memory_bytes")?),
        ("early_pieces", number(answer, "early_pieces")?),
    ]);
    if tokens > 1 {
        let rate = number(answer, "tokens_per_second")?;
        figures.insert("rate", rate);
        figures.insert("decode_seconds", (tokens - 1) as f64 / rate);
        figures.insert("tokens", (tokens - 1) as f64);
    }
    for (name, key) in [
        ("streamed", "streamed_bytes_per_pass"),
        ("resident", "resident_bytes"),
        ("total", "total_bytes"),
        ("read_rate", "read_gb_per_second"),
    ] {
        if let Some(value) = answer[key].as_f64() {
            figures.insert(name, value);
        }
    }
    Ok(figures)
}

impl Case for Decode {
    fn path(&self) -> &Path {
        &self.path
    }

    fn report(&self) -> CaseReport {
        CaseReport {
            plot: Some("tokens/s".to_owned()),
            ..blank(
                &format!("decode-{}", self.slug),
                &format!("Decode, {}", self.slug),
                "`flea run`, 5 tokens of prompt, context 256, page cache cold. Of bound: tokens/s times the longer of computing \
                 a token with resident weights and reading its streamed bytes at the rate of fio (same footprint). First \
                 token: passes over all weights at the rate of fio, from exec. Disk, compute and overhead are shares of the \
                 time from the first weight to the last token: waited for reads, computing as long as the resident run, all else. \
                 Overlap: share of the computing time in which the drive was reading.",
                &self.path,
            )
        }
    }

    fn round(&mut self, lab: &mut Lab<'_>) -> Result<Vec<Run>> {
        let mut runs = lab.between_lines(&self.budgets, |lab, &budget| {
            (lab.say)(&format!("{} at {budget} %", self.slug));
            let (tokens, kept) = (tokens_at(budget), Budget::Percent(budget));
            let result = run_streamed(lab, &self.path, tokens, kept, &[]);
            Run::of(format!("flea, {budget} %"), result)
        })?;
        let tokens = tokens_at(100);
        let resident = run_streamed(lab, &self.path, tokens, Budget::Resident, &[]);
        runs.push(Run::of(RESIDENT, resident)?);
        cached::make_cold(&self.path)?;
        Ok(runs)
    }

    fn judge(&self, runs: &[Run], line: &RoundLine, book: &mut Book) {
        let resident = find(runs, RESIDENT);
        for run in runs {
            judge_decode(run, resident, run.line_or(line), book);
        }
    }
}

fn judge_decode(run: &Run, resident: Option<&Run>, line: &RoundLine, book: &mut Book) {
    let Some(rate) = run.get("rate") else {
        return;
    };
    book.add(&run.label, Spec::figure("tokens/s", 3), rate);
    let Some(streamed) = run.get("streamed") else {
        return;
    };
    let compute = resident
        .and_then(|resident| resident.get("rate"))
        .map(f64::recip);
    let read_seconds = streamed / 1e9 / line.large.gb_per_second;
    if let Some(compute) = compute {
        if streamed > 0.0 {
            book.add(&run.label, OF_BOUND, rate * compute.max(read_seconds));
        } else {
            let speed = Spec::figure("of resident speed", 3).goal(Goal::AtLeast(0.97));
            book.add(&run.label, speed, rate * compute);
        }
    }
    if let Some(read_rate) = run.get("read_rate") {
        book.add(&run.label, Spec::figure("GB/s", 3), read_rate);
    }
    let all_bytes = streamed + run.get("resident").unwrap_or(0.0);
    if let Some(first) = run.get("first_token") {
        book.add(&run.label, Spec::figure("first token s", 2), first);
        book.add(
            &run.label,
            FIRST_TOKEN,
            first * line.large.gb_per_second * 1e9 / all_bytes,
        );
    }
    if let Some(shares) = resident.and_then(|resident| breakdown(run, resident)) {
        book.add(&run.label, Spec::figure("disk %", 1), shares.disk);
        book.add(&run.label, Spec::figure("compute %", 1), shares.compute);
        book.add(&run.label, Spec::figure("overhead %", 1), shares.overhead);
        book.add(&run.label, Spec::figure("overlap %", 1), shares.overlap);
        book.add(&run.label, Spec::figure("drive busy %", 1), shares.busy);
    }
    if let (Some(peak), Some(total)) = (run.get("peak"), run.get("total")) {
        let over = Spec::figure("peak over plan", 3).goal(Goal::AtMost(1.02));
        book.add(&run.label, over, peak / total);
    }
}

/// Where the time went, in percent; the first three sum to 100.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Shares {
    disk: f64,
    compute: f64,
    overhead: f64,
    overlap: f64,
    busy: f64,
}

fn breakdown(run: &Run, resident: &Run) -> Option<Shares> {
    let wall = run.get("prompt_seconds")? + run.get("decode_seconds").unwrap_or(0.0);
    let tokens = run.get("tokens").unwrap_or(0.0);
    let token_seconds = resident.get("rate").map_or(0.0, f64::recip);
    let stall = run.get("stall")?.min(wall);
    // Compute that came out faster than in the resident run is all of what was not waited.
    let compute = (resident.get("prompt_seconds")? + tokens * token_seconds).min(wall - stall);
    let read_rate = run.get("read_rate").filter(|rate| *rate > 0.0);
    let reading = read_rate
        .map_or(0.0, |rate| {
            run.get("read_bytes").unwrap_or(0.0) / 1e9 / rate
        })
        .min(wall);
    let percent = |seconds: f64, of: f64| if of > 0.0 { 100.0 * seconds / of } else { 0.0 };
    Some(Shares {
        disk: percent(stall, wall),
        compute: percent(compute, wall),
        overhead: percent(wall - stall - compute, wall),
        overlap: percent((reading - stall).clamp(0.0, wall - stall), wall - stall),
        busy: percent(reading, wall),
    })
}

/// A long prompt at several budgets.
#[derive(Debug)]
pub struct Prefill {
    /// The model.
    pub path: PathBuf,
    /// What to call it in the name of the case.
    pub slug: String,
    /// Weights in memory, percent of the model.
    pub budgets: Vec<u32>,
}

impl Case for Prefill {
    fn path(&self) -> &Path {
        &self.path
    }

    fn report(&self) -> CaseReport {
        CaseReport {
            plot: Some("prompt tokens/s".to_owned()),
            ..blank(
                &format!("prefill-{}", self.slug),
                &format!("Prefill, {}", self.slug),
                "`flea run`, 64 tokens of prompt in one pass, page cache cold: every weight is read once, whatever the budget. \
                 Of bound: against the longer of computing it with resident weights and reading all weights at the rate of \
                 fio (same footprint).",
                &self.path,
            )
        }
    }

    fn round(&mut self, lab: &mut Lab<'_>) -> Result<Vec<Run>> {
        let mut runs = lab.between_lines(&self.budgets, |lab, &budget| {
            let result = run_prompt(lab, &self.path, Budget::Percent(budget));
            Run::of(format!("flea, {budget} %"), result)
        })?;
        let resident = run_prompt(lab, &self.path, Budget::Resident);
        runs.push(Run::of(RESIDENT, resident)?);
        cached::make_cold(&self.path)?;
        Ok(runs)
    }

    fn judge(&self, runs: &[Run], line: &RoundLine, book: &mut Book) {
        let resident = find(runs, RESIDENT);
        for run in runs {
            let Some(seconds) = run.get("prompt_seconds") else {
                continue;
            };
            if let Some(rate) = run.get("prompt_rate") {
                book.add(&run.label, Spec::figure("prompt tokens/s", 2), rate);
            }
            let (Some(streamed), Some(kept)) = (run.get("streamed"), run.get("resident")) else {
                continue;
            };
            let rate = run.line_or(line).large.gb_per_second;
            let read_seconds = (streamed + kept) / 1e9 / rate;
            if let Some(compute) = resident.and_then(|resident| resident.get("prompt_seconds")) {
                book.add(
                    &run.label,
                    Spec::ratio("of bound"),
                    compute.max(read_seconds) / seconds,
                );
            }
            if let Some(shares) = resident.and_then(|resident| breakdown(run, resident)) {
                book.add(&run.label, Spec::figure("disk %", 1), shares.disk);
                book.add(&run.label, Spec::figure("compute %", 1), shares.compute);
                book.add(&run.label, Spec::figure("overhead %", 1), shares.overhead);
                book.add(&run.label, Spec::figure("overlap %", 1), shares.overlap);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(label: &str, figures: &[(&'static str, f64)]) -> Run {
        Run {
            label: label.to_owned(),
            figures: figures.iter().copied().collect(),
            missing: None,
            died: false,
            line: None,
        }
    }

    #[test]
    fn the_breakdown_sums_to_everything() {
        let resident = run(RESIDENT, &[("prompt_seconds", 0.5), ("rate", 4.0)]);
        let streamed = [
            ("prompt_seconds", 4.0),
            ("decode_seconds", 6.0),
            ("tokens", 3.0),
            ("stall", 8.0),
            ("read_bytes", 18e9),
            ("read_rate", 2.0),
        ];
        let shares = breakdown(&run("flea", &streamed), &resident).unwrap();
        assert!((shares.disk + shares.compute + shares.overhead - 100.0).abs() < 1e-9);
        assert_eq!(
            (shares.disk, shares.compute, shares.busy),
            (80.0, 12.5, 90.0)
        );
        assert_eq!(
            shares.overlap, 50.0,
            "one of the two seconds not waited was read in"
        );
        // Compute that was faster than the resident run's does not make overhead negative.
        let quick = run("flea", &[("prompt_seconds", 1.0), ("stall", 0.8)]);
        assert_eq!(breakdown(&quick, &resident).unwrap().overhead, 0.0);
    }

    #[test]
    fn prompts_have_the_tokens_asked_for() {
        assert_eq!(prompt(SHORT_PROMPT), "300,307,314,321,328");
        assert_eq!(prompt(LONG_PROMPT).split(',').count(), LONG_PROMPT);
    }
}
