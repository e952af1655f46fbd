//! The rounds: every variant once a round, one behind the other, with fio before and after.
//!
//! Invariants: variants are interleaved, so that a drive that changes its speed changes it for all of them; a round
//! within which the drive's own line moved by more than [`SPREAD_MAX`] is thrown away and measured again (as often as
//! there are rounds, and the report says how often, and how many were taken as they were after that); what was measured
//! before an interruption stays.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::child::{self, Finished};
use super::fio::{Chosen, Fio, Line};
use super::report::{Book, CaseReport};
use super::settings::Locks;
use super::stat::{SPREAD_MAX, Series};
use crate::error::{Error, ErrorKind, Result};
use crate::io::AlignedMemory;
use crate::mem::limits::available_memory_bytes;
use crate::units::{PAGE_2M, align_down};

/// More than any run of flea takes here.
const FLEA_LIMIT: Duration = Duration::from_secs(900);

/// How the suite measures.
#[derive(Debug, Clone)]
pub struct Options {
    /// The flea that is measured.
    pub flea: PathBuf,
    /// Rounds of every case.
    pub rounds: u32,
    /// Seconds of one fio line.
    pub fio_seconds: f64,
    /// Locked during each round.
    pub locks: Vec<PathBuf>,
    /// Where stock llama.cpp's programs are.
    pub llama_cpp: Option<PathBuf>,
    /// flea's ggml device, built for it.
    pub ggml_flea: Option<PathBuf>,
    /// A Python that has the loaders.
    pub python: Option<PathBuf>,
    /// Computing threads, for everybody.
    pub threads_count: u32,
    /// What to call the flea that is measured.
    pub version: String,
}

/// What every case has at hand.
pub struct Lab<'a> {
    /// How to measure.
    pub options: &'a Options,
    /// Raised to end it.
    pub stop: &'a AtomicBool,
    /// The drive's own lines.
    pub fio: Fio,
    /// What they read: the file of the case.
    pub path: PathBuf,
    /// What a reader of every case has to know.
    pub note: Option<String>,
    /// Which of them.
    pub shapes: Chosen,
    /// Tells a person what goes on.
    pub say: &'a dyn Fn(&str),
    /// Which variant begins: another one in each round, since the first may find the machine otherwise than those behind it.
    pub turn: usize,
}

impl std::fmt::Debug for Lab<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lab")
            .field("options", self.options)
            .finish_non_exhaustive()
    }
}

/// The drive's lines around a round.
#[derive(Debug, Clone, Copy)]
pub struct RoundLine {
    /// The best of all shapes.
    pub best: Line,
    /// The best with a large footprint.
    pub large: Line,
}

/// What came of one variant in one round.
#[derive(Debug, Clone)]
pub struct Run {
    /// Which variant.
    pub label: String,
    /// Its figures by name.
    pub figures: BTreeMap<&'static str, f64>,
    /// Why there are none.
    pub missing: Option<String>,
    /// Because it was killed for memory: a result as well.
    pub died: bool,
    /// The drive's lines right before and after it; `None` = those of the round.
    pub line: Option<RoundLine>,
}

impl Run {
    /// A variant's figures, or the reason why it has none.
    ///
    /// # Errors
    /// `Canceled` only: that ends the round.
    pub fn of(
        label: impl Into<String>,
        result: Result<BTreeMap<&'static str, f64>>,
    ) -> Result<Self> {
        let died = result
            .as_ref()
            .is_err_and(|error| error.kind() == ErrorKind::NoMemory);
        let (figures, missing) = match result {
            Ok(figures) => (figures, None),
            Err(error) if error.kind() == ErrorKind::Canceled => return Err(error),
            Err(error) => (BTreeMap::new(), Some(error.context().to_owned())),
        };
        Ok(Self {
            label: label.into(),
            figures,
            missing,
            died,
            line: None,
        })
    }

    /// What to hold its figures against.
    #[must_use]
    pub fn line_or<'a>(&'a self, of_round: &'a RoundLine) -> &'a RoundLine {
        self.line.as_ref().unwrap_or(of_round)
    }

    /// A figure that the variant has.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<f64> {
        self.figures.get(name).copied()
    }
}

/// Finds a variant of the round.
#[must_use]
pub fn find<'a>(runs: &'a [Run], label: &str) -> Option<&'a Run> {
    runs.iter().find(|run| run.label == label)
}

/// One thing to find out.
pub trait Case {
    /// The model or file it reads.
    fn path(&self) -> &Path;
    /// An empty report: name, title, what it is about.
    fn report(&self) -> CaseReport;
    /// Measures every variant once.
    ///
    /// # Errors
    /// Only what makes all further rounds pointless; one variant's failure is a [`Run`] without figures.
    fn round(&mut self, lab: &mut Lab<'_>) -> Result<Vec<Run>>;
    /// Turns a round into samples.
    fn judge(&self, runs: &[Run], line: &RoundLine, book: &mut Book);
}

impl Lab<'_> {
    /// Measures a case and gives the report to `keep` after each round. The second value is what ended it early.
    ///
    /// # Errors
    /// Those of `keep`.
    pub fn measure(
        &mut self,
        case: &mut dyn Case,
        keep: &mut dyn FnMut(&CaseReport) -> Result<()>,
    ) -> Result<(CaseReport, Option<Error>)> {
        case.path().clone_into(&mut self.path);
        let mut report = case.report();
        report.shapes = Some(self.shapes);
        report.version.clone_from(&self.options.version);
        report.notes.extend(self.note.clone());
        report.interrupted = true;
        while report.rounds < self.options.rounds {
            if let Err(error) = self.round(case, &mut report) {
                report.ended_by = Some(error.to_string());
                keep(&report)?;
                return Ok((report, Some(error)));
            }
            report.interrupted = report.rounds < self.options.rounds;
            keep(&report)?;
        }
        Ok((report, None))
    }

    fn round(&mut self, case: &mut dyn Case, report: &mut CaseReport) -> Result<()> {
        let number = report.rounds + 1;
        (self.say)(&format!(
            "{}: round {number} of {}",
            report.name, self.options.rounds
        ));
        let _alone = Locks::take(&self.options.locks, self.stop)?;
        let before = self.lines()?;
        self.turn = report.rounds as usize;
        let runs = case.round(self)?;
        let after = self.lines()?;
        let moved = Series {
            samples: vec![before.large.gb_per_second, after.large.gb_per_second],
        };
        // Variants with lines of their own do not mind.
        let unsteady = moved.spread().is_some_and(|spread| spread > SPREAD_MAX)
            && runs.iter().all(|run| run.line.is_none());
        if unsteady && report.repeated_rounds < self.options.rounds {
            (self.say)("the drive changed its speed within this round: measuring it again");
            report.repeated_rounds += 1;
            return Ok(());
        }
        report.unsteady_rounds += u32::from(unsteady);
        for line in [before, after] {
            report.fio_best.add(line.best.gb_per_second);
            report.fio_large.add(line.large.gb_per_second);
        }
        for run in &runs {
            report.rows.begin(&run.label);
            if let Some(reason) = &run.missing {
                report.rows.miss(&run.label, reason, run.died);
            }
        }
        case.judge(&runs, &mean(before, after), &mut report.rows);
        report.rounds = number;
        Ok(())
    }

    /// Measures variants one after the other, each between two lines of the drive: in a round of a minute it may wander. Who
    /// begins changes with the round; the runs are given in the order of the variants.
    ///
    /// # Errors
    /// Those of fio; `Canceled`.
    pub fn between_lines<T>(
        &mut self,
        variants: impl IntoIterator<Item = T>,
        measure: impl Fn(&Self, T) -> Result<Run>,
    ) -> Result<Vec<Run>> {
        let mut variants: Vec<T> = variants.into_iter().collect();
        let first = self.turn % variants.len().max(1);
        variants.rotate_left(first);
        let mut before = self.lines()?;
        let mut runs = Vec::with_capacity(variants.len());
        for variant in variants {
            let mut run = measure(self, variant)?;
            let after = self.lines()?;
            run.line = Some(mean(before, after));
            before = after;
            runs.push(run);
        }
        runs.rotate_right(first);
        Ok(runs)
    }

    fn lines(&mut self) -> Result<RoundLine> {
        let large = self.fio.line(&self.path, self.shapes.large, self.stop)?;
        let best = if self.shapes.best == self.shapes.large {
            large
        } else {
            self.fio.line(&self.path, self.shapes.best, self.stop)?
        };
        Ok(RoundLine { best, large })
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// See [`child::run`].
    pub fn run(&self, command: &mut Command, limit: Duration) -> Result<Finished> {
        child::run(command, limit, self.stop)
    }

    /// flea itself, with nothing of `FLEA_*` handed down.
    #[must_use]
    pub fn flea(&self) -> Command {
        let mut command = Command::new(&self.options.flea);
        child::without_flea_variables(&mut command);
        command
    }

    /// `flea run` of a model in `context_tokens`, that never ends before its time.
    #[must_use]
    pub fn flea_run(&self, path: &Path, context_tokens: &str) -> Command {
        let mut command = self.flea();
        command
            .arg("run")
            .arg(path)
            .args(["--ignore-eos", "--ctx", context_tokens, "--threads"])
            .arg(self.options.threads_count.to_string());
        command
    }

    /// Runs flea with `--json` and gives its answer.
    ///
    /// # Errors
    /// What flea itself said was wrong; `Io` when it died or answered nonsense.
    pub fn flea_json(&self, command: &mut Command) -> Result<(serde_json::Value, Finished)> {
        let done = self.run(command.arg("--json"), FLEA_LIMIT)?;
        let answer: Option<serde_json::Value> = serde_json::from_str(done.stdout.trim()).ok();
        match answer {
            Some(answer) if done.status.success() => Ok((answer, done)),
            Some(answer) if answer["error"]["message"].is_string() => {
                let message = answer["error"]["message"].as_str().unwrap_or_default();
                Err(Error::new(ErrorKind::Io, message))
            }
            _ if done.was_killed() => Err(Error::new(ErrorKind::NoMemory, "killed: out of memory")),
            _ => Err(Error::new(
                ErrorKind::Io,
                format!("flea: {}", done.last_words()),
            )),
        }
    }
}

/// Takes as much memory as the next program will, and gives it back. The host of a virtual machine takes memory away that
/// the guest leaves free, and finds it again at a fraction of the speed: whoever came first would pay for all that follow.
///
/// # Errors
/// What allocating says; not that there is less than asked for.
pub fn touch_memory(bytes: u64) -> Result<()> {
    let free_bytes = available_memory_bytes()?;
    let bytes = align_down(bytes.min(free_bytes / 10 * 9), PAGE_2M);
    if bytes > 0 {
        drop(AlignedMemory::new(bytes, PAGE_2M)?);
    }
    Ok(())
}

/// A number of flea's answer.
///
/// # Errors
/// `Internal` when it is not there: this flea and the one that is measured differ.
pub fn number(answer: &serde_json::Value, key: &str) -> Result<f64> {
    answer[key].as_f64().ok_or_else(|| {
        Error::new(
            ErrorKind::Internal,
            format!("flea's answer has no number '{key}'"),
        )
    })
}

fn mean(before: RoundLine, after: RoundLine) -> RoundLine {
    let middle = |a: Line, b: Line| Line {
        gb_per_second: f64::midpoint(a.gb_per_second, b.gb_per_second),
        cpu_seconds_per_gb: f64::midpoint(a.cpu_seconds_per_gb, b.cpu_seconds_per_gb),
    };
    RoundLine {
        best: middle(before.best, after.best),
        large: middle(before.large, after.large),
    }
}
