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
    pub const ALL: [Self; 10] = [
        Self::Raw,
        Self::Engine,
        Self::Decode,
        Self::Prefill,
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
const PEER_LIMITS: [u32; 4] = [25, 50, 75, 95];
const EXPERT_LIMITS: [u32; 2] = [25, 50];
/// Enough layers to walk over, and quickly read.
const LEASE_MODEL_BYTES: u64 = 448 * MIB;

/// What came of a suite.
#[derive(Debug)]
pub struct Outcome {
    /// Each case, also one that was cut short.
    pub cases: Vec<CaseReport>,
    /// Why it ended before its time.
    pub ended: Option<Error>,
}

/// Measures `kinds` on `models` (the first one, where one is enough). `keep` is called with every case as it is done.
///
/// # Errors
/// Only what makes all measuring pointless, before anything was: no fio, no model. What comes later is in the outcome.
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
    let (mut fio, refusal) = fio::Fio::new(&first.path, options.fio_seconds);
    say("looking for the best shapes of fio");
    let shapes = {
        let _alone = settings::Locks::take(&options.locks, stop)?;
        fio.choose(stop)?
    };
    let mut lab = Lab {
        options,
        stop,
        fio,
        shapes,
        say,
        turn: 0,
    };
    let mut outcome = Outcome {
        cases: Vec::new(),
        ended: None,
    };
    for &kind in kinds {
        let cases = cases(kind, models, directory, &lab);
        let cases = match cases {
            Ok(cases) => cases,
            Err(error) => {
                outcome.ended = Some(error);
                break;
            }
        };
        for mut case in cases {
            let (mut report, ended) = lab.measure(case.as_mut());
            report.notes.extend(refusal.clone());
            keep(&report)?;
            outcome.cases.push(report);
            if let Some(error) = ended {
                let over = error.kind() == ErrorKind::Canceled;
                outcome.ended = Some(error);
                if over {
                    return Ok(outcome);
                }
            }
        }
    }
    Ok(outcome)
}

fn cases(
    kind: Kind,
    models: &[Model],
    directory: &Path,
    lab: &Lab<'_>,
) -> Result<Vec<Box<dyn Case>>> {
    let path = models[0].path.clone();
    let each = |make: &dyn Fn(&Model) -> Box<dyn Case>| models.iter().map(make).collect();
    let limited = |read_ahead_kib: u64| -> Vec<Box<dyn Case>> {
        vec![Box::new(peers::Limited {
            path: path.clone(),
            limits: PEER_LIMITS.to_vec(),
            read_ahead_kib,
        })]
    };
    let with_experts = |read_ahead_kib: u64| -> Result<Vec<Box<dyn Case>>> {
        let mut cases: Vec<Box<dyn Case>> = Vec::new();
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
    };
    Ok(match kind {
        Kind::Raw => vec![Box::new(reading::Raw {
            path,
            cursor: Cursor::default(),
        })],
        Kind::Engine => vec![Box::new(reading::Engine {
            path,
            budgets: ENGINE_BUDGETS.to_vec(),
        })],
        Kind::Decode => each(&|model| {
            Box::new(decode::Decode {
                path: model.path.clone(),
                slug: model.slug.clone(),
                budgets: DECODE_BUDGETS.to_vec(),
            })
        }),
        Kind::Prefill => each(&|model| {
            Box::new(decode::Prefill {
                path: model.path.clone(),
                slug: model.slug.clone(),
                budgets: PREFILL_BUDGETS.to_vec(),
            })
        }),
        Kind::PeersShort => limited(128),
        Kind::PeersLong => limited(8192),
        Kind::ExpertsShort => with_experts(128)?,
        Kind::ExpertsLong => with_experts(8192)?,
        Kind::Load => {
            let bytes = file_bytes(&path)?;
            vec![Box::new(load::Load {
                safetensors: models::safetensors(lab, directory, bytes)?,
                path,
            })]
        }
        Kind::Lease => vec![Box::new(lease::Lease {
            path: models::safetensors(lab, directory, LEASE_MODEL_BYTES)?,
        })],
    })
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
        interrupted: false,
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
    found.sort();
    found.pop()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_llama_cpp_is_taken() {
        let cache = tempfile::tempdir().unwrap();
        assert_eq!(llama_cpp_directory(cache.path()), None);
        for version in ["llama.cpp-0.3.35", "llama.cpp-0.3.36", "other"] {
            std::fs::create_dir_all(cache.path().join(version).join("build/bin")).unwrap();
        }
        let found = llama_cpp_directory(cache.path()).unwrap();
        assert_eq!(found, cache.path().join("llama.cpp-0.3.36/build/bin"));
    }
}
