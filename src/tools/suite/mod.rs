//! The lab: everything flea claims about speed, measured beside fio, resident compute and the peers, in one run that
//! anybody can repeat.
//!
//! A suite is a list of cases; a case is a list of variants that take turns for several rounds ([`lab`]); every round has
//! the drive's own lines before and after it ([`fio`]); what came out is a [`report`] with goals and verdicts. Programs
//! that are measured are children, flea's own included. Invariants: caches are cold and proven so before each run;
//! settings of the machine are put back; what cannot be measured is said and never guessed. Nothing is printed here.

pub mod cgroup;
pub mod child;
pub mod decode;
pub mod early;
pub mod experts;
pub mod fio;
pub mod lab;
pub mod lease;
pub mod load;
pub mod machine;
pub mod models;
pub mod peers;
pub mod plot;
pub mod reading;
pub mod report;
pub mod settings;
pub mod stat;
pub mod stock;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use crate::error::{Error, ErrorKind, Result};
use crate::io::bulk::Cursor;
use crate::units::MIB;
use lab::{Case, Lab, Options};
use models::Model;
use report::{Book, CaseReport};
use stat::Series;

/// What can be measured, in the order in which it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// fio against the reader.
    Raw,
    /// Streaming without compute.
    Engine,
    /// Generating.
    Decode,
    /// A long prompt.
    Prefill,
    /// Compute that begins with a part of a layer.
    Early,
    /// Stock llama.cpp on flea's device.
    Stock,
    /// Stock llama.cpp with Linux's default read-ahead.
    PeersShort,
    /// Stock llama.cpp with a long read-ahead.
    PeersLong,
    /// Models with experts beside stock llama.cpp, with Linux's default read-ahead.
    ExpertsShort,
    /// The same with a long read-ahead.
    ExpertsLong,
    /// A whole model into memory.
    Load,
    /// Acquire and release.
    Lease,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Raw,
        Self::Engine,
        Self::Decode,
        Self::Prefill,
        Self::Early,
        Self::Stock,
        Self::PeersShort,
        Self::PeersLong,
        Self::ExpertsShort,
        Self::ExpertsLong,
        Self::Load,
        Self::Lease,
    ];

    /// The word for `--cases`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Engine => "engine",
            Self::Decode => "decode",
            Self::Prefill => "prefill",
            Self::Early => "early",
            Self::Stock => "stock",
            Self::PeersShort => "peers-128k",
            Self::PeersLong => "peers-8m",
            Self::ExpertsShort => "experts-128k",
            Self::ExpertsLong => "experts-8m",
            Self::Load => "load",
            Self::Lease => "lease",
        }
    }
}

const ENGINE_BUDGETS: [u32; 5] = [10, 25, 50, 75, 95];
const DECODE_BUDGETS: [u32; 6] = [10, 25, 50, 75, 95, 110];
const PREFILL_BUDGETS: [u32; 5] = [10, 25, 50, 75, 95];
const STOCK_BUDGETS: [u32; 3] = [25, 50, 75];
const PEER_LIMITS: [u32; 4] = [25, 50, 75, 95];
const EXPERT_LIMITS: [u32; 2] = [25, 50];
/// Enough layers to walk over, and quickly read.
const LEASE_MODEL_BYTES: u64 = 448 * MIB;

/// What came of a suite.
#[derive(Debug)]
pub struct Outcome {
    /// Each case, also one that was cut short.
    pub cases: Vec<CaseReport>,
    /// What ended a case before its time, or kept it from beginning.
    pub failures: Vec<Error>,
}

impl Outcome {
    /// True when it was asked to end.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        let mut failures = self.failures.iter();
        failures.any(|error| error.kind() == ErrorKind::Canceled)
    }
}

/// Measures `kinds` on `models` (the first one, where one is enough). `keep` is called with every case after each of its
/// rounds.
///
/// # Errors
/// Only what makes all measuring pointless: no fio, no model, results that cannot be kept. Everything else is in the outcome.
pub fn measure(
    options: &Options,
    kinds: &[Kind],
    models: &[Model],
    directory: &Path,
    stop: &AtomicBool,
    say: &dyn Fn(&str),
    keep: &mut dyn FnMut(&CaseReport) -> Result<()>,
) -> Result<Outcome> {
    let first = models
        .first()
        .ok_or_else(|| Error::new(ErrorKind::Invalid, "no model to measure with"))?;
    let (mut fio, note) = fio::Fio::new(options.fio_seconds);
    say("looking for the best shapes of fio");
    let shapes = {
        let _alone = settings::Locks::take(&options.locks, stop)?;
        fio.choose(&first.path, stop)?
    };
    let mut lab = Lab {
        options,
        stop,
        fio,
        path: first.path.clone(),
        note,
        shapes,
        say,
        turn: 0,
    };
    let mut outcome = Outcome {
        cases: Vec::new(),
        failures: Vec::new(),
    };
    for &kind in kinds {
        match cases(kind, models, directory, &lab) {
            Ok(cases) => run_all(cases, &mut lab, keep, &mut outcome)?,
            Err(error) => outcome.failures.push(error),
        }
        if outcome.is_interrupted() {
            break;
        }
    }
    Ok(outcome)
}

fn run_all(
    cases: Cases,
    lab: &mut Lab<'_>,
    keep: &mut dyn FnMut(&CaseReport) -> Result<()>,
    outcome: &mut Outcome,
) -> Result<()> {
    for mut case in cases {
        let (report, ended) = lab.measure(case.as_mut(), keep)?;
        outcome.cases.push(report);
        outcome.failures.extend(ended);
        if outcome.is_interrupted() {
            break;
        }
    }
    Ok(())
}

type Cases = Vec<Box<dyn Case>>;

fn cases(kind: Kind, models: &[Model], directory: &Path, lab: &Lab<'_>) -> Result<Cases> {
    let path = models[0].path.clone();
    Ok(match kind {
        Kind::Raw => one(reading::Raw {
            path,
            cursor: Cursor::default(),
        }),
        Kind::Engine => one(reading::Engine {
            path,
            budgets: ENGINE_BUDGETS.to_vec(),
        }),
        Kind::Decode => each(models, |path, slug| decode::Decode {
            path,
            slug,
            budgets: DECODE_BUDGETS.to_vec(),
        }),
        Kind::Prefill => each(models, |path, slug| decode::Prefill {
            path,
            slug,
            budgets: PREFILL_BUDGETS.to_vec(),
        }),
        Kind::Early => one(early::Early {
            path,
            slug: models[0].slug.clone(),
        }),
        Kind::Stock => one(stock::Stock {
            path,
            budgets: STOCK_BUDGETS.to_vec(),
        }),
        Kind::PeersShort => one(peers::Limited::new(path, &PEER_LIMITS, 128)),
        Kind::PeersLong => one(peers::Limited::new(path, &PEER_LIMITS, 8192)),
        Kind::ExpertsShort => with_experts(models, 128, lab)?,
        Kind::ExpertsLong => with_experts(models, 8192, lab)?,
        Kind::Load => {
            let safetensors = models::safetensors(lab, directory, file_bytes(&path)?)?;
            check_same_drive(&path, &safetensors)?;
            one(load::Load { safetensors, path })
        }
        Kind::Lease => one(lease::Lease {
            path: models::safetensors(lab, directory, LEASE_MODEL_BYTES)?,
        }),
    })
}

fn one(case: impl Case + 'static) -> Cases {
    vec![Box::new(case)]
}

fn each<C: Case + 'static>(models: &[Model], make: impl Fn(PathBuf, String) -> C) -> Cases {
    let make = |model: &Model| Box::new(make(model.path.clone(), model.slug.clone())) as _;
    models.iter().map(make).collect()
}

fn with_experts(models: &[Model], read_ahead_kib: u64, lab: &Lab<'_>) -> Result<Cases> {
    let mut cases: Cases = Vec::new();
    for model in models {
        if experts::has_experts(&model.path)? {
            cases.push(Box::new(experts::Experts {
                path: model.path.clone(),
                slug: model.slug.clone(),
                limits: EXPERT_LIMITS.to_vec(),
                read_ahead_kib,
            }));
        }
    }
    if cases.is_empty() {
        (lab.say)("no model with experts: give one with --models (flea synth --arch qwen3moe)");
    }
    Ok(cases)
}

/// Loaders are compared on one drive, whose fio lines are those of the first file.
fn check_same_drive(model: &Path, other: &Path) -> Result<()> {
    if machine::queue_of(model) == machine::queue_of(other) {
        return Ok(());
    }
    let context = format!(
        "{} and {} are on different drives, and their rates cannot be compared; give --scratch a directory on the model's",
        model.display(),
        other.display()
    );
    Err(Error::new(ErrorKind::Invalid, context))
}

/// A report without results.
#[must_use]
pub fn blank(name: &str, title: &str, about: &str, path: &Path) -> CaseReport {
    CaseReport {
        name: name.to_owned(),
        title: title.to_owned(),
        about: about.to_owned(),
        model: described(path),
        measured_at: now(),
        version: String::new(),
        rounds: 0,
        repeated_rounds: 0,
        unsteady_rounds: 0,
        interrupted: false,
        ended_by: None,
        machine: Some(machine::Machine::look(path)),
        shapes: None,
        fio_best: Series::default(),
        fio_large: Series::default(),
        rows: Book::default(),
        notes: Vec::new(),
        plot: None,
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn file_bytes(path: &Path) -> Result<u64> {
    let metadata = std::fs::metadata(path)
        .map_err(|error| Error::from_io(&error, format_args!("look at {}", path.display())))?;
    Ok(metadata.len())
}

fn described(path: &Path) -> String {
    let bytes = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    format!("{} ({:.2} GB)", file_name(path), bytes as f64 / 1e9)
}

fn now() -> String {
    jiff::Timestamp::now()
        .strftime("%Y-%m-%d %H:%M UTC")
        .to_string()
}

/// Where scripts/llama-cpp.sh and scripts/peers.sh put the peers, as scripts/cache-dir.sh says.
#[must_use]
pub fn cache_directory() -> Option<PathBuf> {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    variable("FLEA_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("flea")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/flea")))
}

/// The programs of scripts/llama-cpp.sh, the latest where there are several.
#[must_use]
pub fn llama_cpp_directory(cache: &Path) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(cache)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| file_name(path).starts_with("llama.cpp-"))
        .map(|path| path.join("build/bin"))
        .filter(|path| path.is_dir())
        .collect();
    found.sort_by_cached_key(|path| version(path));
    found.pop()
}

/// The numbers in a path: 0.3.36 is behind 0.3.9.
fn version(path: &Path) -> Vec<u64> {
    let text = path.to_string_lossy();
    let numbers = text.split(|letter: char| !letter.is_ascii_digit());
    numbers.filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_llama_cpp_is_taken() {
        let cache = tempfile::tempdir().unwrap();
        assert_eq!(llama_cpp_directory(cache.path()), None);
        for version in ["llama.cpp-0.3.9", "llama.cpp-0.3.36", "other"] {
            std::fs::create_dir_all(cache.path().join(version).join("build/bin")).unwrap();
        }
        let found = llama_cpp_directory(cache.path()).unwrap();
        assert_eq!(found, cache.path().join("llama.cpp-0.3.36/build/bin"));
    }
}
