//! Measurements that the page asks for: one at a time, in a thread of their own, by the functions of the commands.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use clap::Parser;
use serde_json::{Value, json};

use super::board::{Settings, options, parse_line};
use crate::cli::probe::now;
use crate::cli::{kv, probe_rows};
use crate::error::{Error, ErrorKind, Result};

/// Most codecs that one request compares.
const CODECS_MAX: usize = 64;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    KvBench,
    KvCompare,
    Rows,
}

impl What {
    pub(super) const ALL: [Self; 3] = [Self::KvBench, Self::KvCompare, Self::Rows];

    /// As addresses name it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::KvBench => "kv-bench",
            Self::KvCompare => "kv-compare",
            Self::Rows => "rows",
        }
    }

    /// The command that measures the same.
    pub(super) const fn verb(self) -> &'static str {
        match self {
            Self::KvBench => "flea kv bench",
            Self::KvCompare => "flea kv compare",
            Self::Rows => "flea probe rows",
        }
    }

    /// A list that its JSON has.
    pub(super) const fn list(self) -> &'static str {
        match self {
            Self::KvBench => "distributions",
            Self::KvCompare => "cells",
            Self::Rows => "cases",
        }
    }

    /// Settings that the page may choose.
    const fn settings(self) -> &'static [&'static str] {
        match self {
            Self::KvBench => &["dim", "tokens", "distribution", "seed"],
            Self::KvCompare => &["codecs"],
            Self::Rows => &["synth", "seconds", "budget", "depth", "seed"],
        }
    }
}

#[derive(Debug, Parser)]
#[command(name = "flea kv bench", no_binary_name = true)]
struct BenchLine {
    #[command(flatten)]
    args: kv::BenchArgs,
}

#[derive(Debug, Parser)]
#[command(name = "flea kv compare", no_binary_name = true)]
struct CompareLine {
    #[command(flatten)]
    args: kv::CompareArgs,
}

#[derive(Debug, Parser)]
#[command(name = "flea probe rows", no_binary_name = true)]
struct RowsLine {
    #[command(flatten)]
    args: probe_rows::RowsArgs,
}

/// A measurement whose arguments are parsed.
enum Task {
    Bench(kv::BenchArgs),
    Compare(kv::CompareArgs),
    Rows(probe_rows::RowsArgs),
}

/// A result, and where it is from.
#[derive(Clone)]
struct Kept {
    from: String,
    value: Value,
    revision: u64,
}

struct Running {
    what: What,
    began: Instant,
    doing: String,
    stop: Arc<AtomicBool>,
}

#[derive(Default)]
struct State {
    running: Option<Running>,
    failed: Option<(What, Error)>,
    kept: [Option<Kept>; What::ALL.len()],
    revision: u64,
}

/// Runs measurements and keeps the latest result of each kind.
#[derive(Clone, Default)]
pub(super) struct Measurer(Arc<Mutex<State>>);

impl Measurer {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a result that is there already.
    pub(super) fn keep(&self, what: What, from: String, value: Value) {
        let mut state = self.state();
        state.revision += 1;
        let revision = state.revision;
        state.kept[what as usize] = Some(Kept {
            from,
            value,
            revision,
        });
    }

    /// The latest result: its JSON, and where it is from.
    pub(super) fn result(&self, what: What) -> Option<(Value, String)> {
        let kept = self.state().kept[what as usize].clone()?;
        Some((kept.value, kept.from))
    }

    /// Begins to measure. `fixed` are the arguments that no request chooses.
    ///
    /// # Errors
    /// `Invalid` for settings that cannot be, `Busy` while a measurement runs: two would spoil each other's figures.
    pub(super) fn start(&self, what: What, settings: &Settings, fixed: Vec<String>) -> Result<()> {
        let task = Task::parse(what, settings, fixed)?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut state = self.state();
        if let Some(running) = &state.running {
            let said = format!(
                "{} is still running; wait for it or stop it",
                running.what.verb()
            );
            return Err(Error::new(ErrorKind::Busy, said));
        }
        let measurer = self.clone();
        let stopped = Arc::clone(&stop);
        std::thread::Builder::new()
            .name("flea-measure".to_owned())
            .spawn(move || measurer.run(what, &task, &stopped))
            .map_err(|error| Error::from_io(&error, "start a thread to measure"))?;
        state.failed = None;
        // The thread waits for this lock before it says anything.
        state.running = Some(Running {
            what,
            began: Instant::now(),
            doing: "beginning".to_owned(),
            stop,
        });
        Ok(())
    }

    fn run(&self, what: What, task: &Task, stop: &AtomicBool) {
        let mut tell = |text: &str| {
            if let Some(running) = &mut self.state().running {
                running.doing = text.to_owned();
            }
        };
        let panicked = |_| Err(Error::new(ErrorKind::Internal, "the measurement panicked"));
        let result = catch_unwind(AssertUnwindSafe(|| task.run(stop, &mut tell)));
        let result = result.unwrap_or_else(panicked);
        let from = format!("measured {} by {}", now(), what.verb());
        match result {
            Ok(value) => self.keep(what, from, value),
            Err(error) => self.state().failed = Some((what, error)),
        }
        self.state().running = None;
    }

    /// Ends what runs, as soon as it looks.
    pub(super) fn stop(&self) {
        if let Some(running) = &self.state().running {
            running.stop.store(true, Ordering::Relaxed);
        }
    }

    /// What runs, what failed, and which results there are.
    pub(super) fn describe(&self) -> Value {
        let state = self.state();
        let running = state.running.as_ref().map(|running| {
            json!({
                "what": running.what.name(),
                "command": running.what.verb(),
                "seconds": running.began.elapsed().as_secs_f64(),
                "doing": running.doing,
            })
        });
        let failed = state
            .failed
            .as_ref()
            .map(|(what, error)| json!({"what": what.name(), "message": error.to_string()}));
        let results: serde_json::Map<String, Value> = What::ALL
            .iter()
            .filter_map(|what| {
                let kept = state.kept[*what as usize].as_ref()?;
                let about = json!({"from": kept.from, "revision": kept.revision});
                Some((what.name().to_owned(), about))
            })
            .collect();
        json!({"running": running, "failed": failed, "results": results})
    }
}

impl Task {
    fn parse(what: What, settings: &Settings, fixed: Vec<String>) -> Result<Self> {
        if what == What::KvCompare {
            let codecs = codecs(settings)?;
            let line: Vec<String> = fixed.into_iter().chain(codecs).collect();
            return parse_line::<CompareLine>(&line).map(|line| Self::Compare(line.args));
        }
        let mut line = options(settings, what.settings())?;
        line.extend(fixed);
        match what {
            What::KvBench => parse_line::<BenchLine>(&line).map(|line| Self::Bench(line.args)),
            _ => parse_line::<RowsLine>(&line).map(|line| Self::Rows(line.args)),
        }
    }

    fn run(&self, stop: &AtomicBool, tell: &mut dyn FnMut(&str)) -> Result<Value> {
        let mut unless_stopped = |text: &str| {
            tell(text);
            if stop.load(Ordering::Relaxed) {
                return Err(Error::new(ErrorKind::Canceled, "stopped on request"));
            }
            Ok(())
        };
        match self {
            Self::Bench(args) => Ok(kv::measure_bench(args, &mut unless_stopped)?.to_json()),
            Self::Compare(args) => Ok(kv::measure_compare(args, &mut unless_stopped)?.to_json()),
            Self::Rows(args) => Ok(probe_rows::probe(args, stop, tell)?.to_json(args)),
        }
    }
}

/// The codecs of a request, as arguments behind the file.
fn codecs(settings: &Settings) -> Result<Vec<String>> {
    // Checks the names; the one there may be is split into arguments here.
    options(settings, What::KvCompare.settings())?;
    let words = settings
        .iter()
        .flat_map(|(_, value)| value.split([' ', ',']));
    let codecs: Vec<String> = words
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect();
    if codecs.is_empty() || codecs.len() > CODECS_MAX {
        let said = format!(
            "1 to {CODECS_MAX} codecs can be compared, not {}",
            codecs.len()
        );
        return Err(Error::new(ErrorKind::Invalid, said));
    }
    Ok(codecs)
}
