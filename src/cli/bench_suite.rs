//! `flea bench suite`: arguments and files around [`crate::tools::suite`]. Results go into a directory as JSON, as a page
//! and as plots; a summary goes to stdout, what goes on to stderr.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use super::table::{Align, Table};
use crate::error::{Error, ErrorKind, Result};
use crate::tools::suite::lab::Options;
use crate::tools::suite::machine::Machine;
use crate::tools::suite::models::{self, Model};
use crate::tools::suite::report::{CaseReport, Report};
use crate::tools::suite::stat::Verdict;
use crate::tools::suite::{self, Kind, Outcome, cache_directory, llama_cpp_directory, plot};

const RESULTS: &str = "results.json";
const PAGE: &str = "README.md";
const ROUNDS_DEFAULT: u32 = 5;
const ROUNDS_QUICK: u32 = 3;

const ABOUT: &str = r#"Examples:
  flea bench suite --quick
  flea bench suite --models a.gguf,b.gguf --cases engine,decode --out results
  scripts/peers.sh && sudo env FLEA_CACHE="$(scripts/cache-dir.sh)" flea bench suite --out docs/results/my-machine

Needs fio. Root for the peers (memory cgroups, the device's read-ahead) and for fio's huge pages; what was set is put
back, also after Ctrl-C. Below sudo, FLEA_CACHE says where scripts/peers.sh has put them. A directory that has results
already keeps those of other cases, and those of a case with as many rounds as an interrupted one. Nothing else should run
on the machine meanwhile.
Exit codes: 0 every row has a figure (whatever the verdict), 1 one has none, 130 interrupted, with what was measured kept."#;

/// Measure everything: drive, engine, decode, prefill, peers, loading, leases
#[derive(Debug, Clone, Args)]
#[command(after_help = ABOUT)]
pub struct SuiteArgs {
    /// Models to measure with, the first for cases that need one [default: three synthetic ones of 7 GB]
    #[arg(long, value_name = "FILES", value_delimiter = ',', num_args = 1)]
    models: Vec<PathBuf>,

    /// Only these cases [default: all]
    #[arg(long, value_name = "CASES", value_delimiter = ',', num_args = 1, value_parser = kind_parser())]
    cases: Vec<Kind>,

    /// Rounds; all variants take turns in each [default: 5, with --quick 3]
    #[arg(long, value_name = "N", value_parser = super::count)]
    rounds: Option<u32>,

    /// One synthetic model of 2 GiB and 3 rounds
    #[arg(long)]
    quick: bool,

    /// Where results go
    #[arg(long, value_name = "DIR", default_value = "flea-results")]
    out: PathBuf,

    /// Where synthetic models are made and kept [default: ~/.cache/flea/suite]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,

    /// Stock llama.cpp's programs [default: those of scripts/llama-cpp.sh]
    #[arg(long, value_name = "DIR")]
    llama_cpp: Option<PathBuf>,

    /// libggml-flea.so, built for that llama.cpp [default: that of make ggml-flea, beside flea's directory]
    #[arg(long, value_name = "FILE")]
    ggml_flea: Option<PathBuf>,

    /// A Python with fastsafetensors and runai-model-streamer [default: that of scripts/peers.sh]
    #[arg(long, value_name = "FILE")]
    python: Option<PathBuf>,

    /// Computing threads of flea and its peers [default: one per core]
    #[arg(short = 't', long, value_name = "N", value_parser = super::count)]
    threads: Option<u32>,

    /// Seconds of one fio line
    #[arg(long, value_name = "SECONDS", default_value_t = 1.5, value_parser = seconds)]
    fio_seconds: f64,

    /// Lock these files during each round, for others on the machine that wait for them (flock)
    #[arg(long, value_name = "FILE")]
    lock: Vec<PathBuf>,

    /// What to call this flea in the results, a commit for example
    #[arg(long, value_name = "TEXT", default_value = env!("CARGO_PKG_VERSION"))]
    label: String,

    /// Report as one JSON object
    #[arg(long)]
    json: bool,
}

fn kind_parser() -> impl TypedValueParser<Value = Kind> {
    PossibleValuesParser::new(Kind::ALL.map(Kind::name)).map(|name| {
        Kind::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .unwrap_or(Kind::Raw)
    })
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=60.0).contains(&seconds) => Ok(seconds),
        _ => Err(format!(
            "'{text}' is not a number of seconds from 0.1 to 60"
        )),
    }
}

/// Runs the suite.
///
/// # Errors
/// No fio, no model, no space, no directory for the results.
pub fn command(args: &SuiteArgs) -> Result<ExitCode> {
    let stop = stop_softly()?;
    let cache = cache_directory();
    let options = options(args, cache.as_deref())?;
    let scratch = args
        .scratch
        .clone()
        .or_else(|| cache.map(|cache| cache.join("suite")))
        .ok_or_else(|| {
            Error::new(
                ErrorKind::Invalid,
                "no home directory to keep models in; give --scratch DIR",
            )
        })?;
    let say = |text: &str| {
        // Nobody is left to tell when stderr is gone.
        let _ = writeln!(std::io::stderr(), "{text}");
    };
    let models = if args.models.is_empty() {
        models::synthesise(&options, &scratch, args.quick, &stop, &say)?
    } else {
        args.models.iter().map(|path| Model::given(path)).collect()
    };
    for model in &models {
        std::fs::metadata(&model.path).map_err(|error| {
            Error::from_io(&error, format_args!("open {}", model.path.display()))
        })?;
    }
    let kinds = if args.cases.is_empty() {
        Kind::ALL.to_vec()
    } else {
        args.cases.clone()
    };
    let mut book = Results::open(&args.out, Machine::look(&models[0].path))?;
    let outcome = suite::measure(
        &options,
        &kinds,
        &models,
        &scratch,
        &stop,
        &say,
        &mut |case| book.keep(case),
    )?;
    finish(args, &outcome)
}

/// Raised by the first signal and by every further one: the machine's settings have to be put back, so none of them
/// ends the program at once.
fn stop_softly() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        flag::register(signal, Arc::clone(&stop))
            .map_err(|error| Error::from_io(&error, "install the handler for Ctrl-C"))?;
    }
    Ok(stop)
}

fn options(args: &SuiteArgs, cache: Option<&Path>) -> Result<Options> {
    let flea =
        std::env::current_exe().map_err(|error| Error::from_io(&error, "find flea itself"))?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Options {
        flea,
        rounds: args.rounds.unwrap_or(if args.quick {
            ROUNDS_QUICK
        } else {
            ROUNDS_DEFAULT
        }),
        fio_seconds: args.fio_seconds,
        locks: args.lock.clone(),
        llama_cpp: args
            .llama_cpp
            .clone()
            .or_else(|| llama_cpp_directory(cache?)),
        ggml_flea: args.ggml_flea.clone().or_else(built_device),
        python: args
            .python
            .clone()
            .or_else(|| Some(cache?.join("peers/bin/python"))),
        threads_count: args
            .threads
            .unwrap_or_else(|| u32::try_from(cores).unwrap_or(1)),
        version: args.label.clone(),
    })
}

/// Where `make ggml-flea` puts the device of the flea that runs.
fn built_device() -> Option<PathBuf> {
    let flea = std::env::current_exe().ok()?;
    Some(flea.parent()?.parent()?.join("ggml-flea/libggml-flea.so"))
}

/// The directory of results: written anew after every round, so that whatever happens costs at most one.
struct Results {
    directory: PathBuf,
    report: Report,
}

impl Results {
    fn open(directory: &Path, machine: Machine) -> Result<Self> {
        std::fs::create_dir_all(directory).map_err(|error| {
            Error::from_io(&error, format_args!("make {}", directory.display()))
        })?;
        let path = directory.join(RESULTS);
        let cases = match std::fs::read_to_string(&path) {
            Ok(text) => {
                let report: Report = serde_json::from_str(&text).map_err(|error| {
                    let context = format!(
                        "{} is not a result of this suite ({error}); give another --out",
                        path.display()
                    );
                    Error::new(ErrorKind::Invalid, context)
                })?;
                report.cases
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                return Err(Error::from_io(
                    &error,
                    format_args!("read {}", path.display()),
                ));
            }
        };
        Ok(Self {
            directory: directory.to_owned(),
            report: Report { machine, cases },
        })
    }

    fn keep(&mut self, case: &CaseReport) -> Result<()> {
        if case.rounds == 0 || !self.report.put(case.clone()) {
            return Ok(());
        }
        let mut plots = Vec::new();
        for case in &self.report.cases {
            let file = format!("{}.svg", case.name);
            match plot::svg(case)? {
                Some(text) => {
                    self.write(&file, &text)?;
                    plots.push(Some(file));
                }
                None => plots.push(None),
            }
        }
        self.write(PAGE, &self.report.markdown(&plots))?;
        let text = serde_json::to_string_pretty(&self.report)
            .map_err(|error| Error::new(ErrorKind::Internal, format!("encode JSON: {error}")))?;
        self.write(RESULTS, &(text + "\n"))
    }

    /// Whole or not at all: a full disk must not cost the results of before.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.directory.join(name);
        let temporary = self.directory.join(format!("{name}.part"));
        std::fs::write(&temporary, text)
            .and_then(|()| std::fs::rename(&temporary, &path))
            .map_err(|error| {
                // Half a file helps nobody; that it cannot be removed is not the failure to report.
                let _ = std::fs::remove_file(&temporary);
                Error::from_io(&error, format_args!("write {}", path.display()))
            })
    }
}

fn finish(args: &SuiteArgs, outcome: &Outcome) -> Result<ExitCode> {
    if args.json {
        super::print_json(&serde_json::json!({
            "cases": outcome.cases,
            "interrupted": outcome.is_interrupted(),
            "failures": outcome.failures.iter().map(Error::context).collect::<Vec<_>>(),
            "directory": args.out.to_string_lossy(),
        }))?;
    } else {
        super::print(&summary(outcome))?;
    }
    for error in &outcome.failures {
        // Nobody is left to tell when stderr is gone.
        let _ = writeln!(
            std::io::stderr(),
            "error: {error}; what was measured is in {}",
            args.out.display()
        );
    }
    // Of several the last: nothing follows an interruption.
    if let Some(error) = outcome.failures.last() {
        return Ok(ExitCode::from(error.kind().exit_code()));
    }
    let missing: usize = outcome.cases.iter().map(CaseReport::missing_count).sum();
    if missing > 0 {
        let _ = writeln!(
            std::io::stderr(),
            "{missing} rows have no figure; see {}",
            args.out.join(PAGE).display()
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn summary(outcome: &Outcome) -> String {
    let mut table = Table::new(&[
        ("case", Align::Left),
        ("rounds", Align::Right),
        ("PASS", Align::Right),
        ("MISS", Align::Right),
        ("NOISY", Align::Right),
        ("without a figure", Align::Right),
    ]);
    for case in &outcome.cases {
        table.row([
            case.name.clone(),
            case.rounds.to_string(),
            case.count(Verdict::Pass).to_string(),
            case.count(Verdict::Miss).to_string(),
            case.count(Verdict::Noisy).to_string(),
            case.missing_count().to_string(),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::suite::blank;
    use crate::tools::suite::report::Spec;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        args: SuiteArgs,
    }

    #[test]
    fn arguments_are_read_and_nonsense_refused() {
        let parse =
            |line: &str| Program::try_parse_from(std::iter::once("suite").chain(line.split(' ')));
        let args =
            parse("--quick --cases engine,peers-8m --models a.gguf,b.gguf --lock x --lock y")
                .unwrap()
                .args;
        assert_eq!(args.cases, [Kind::Engine, Kind::PeersLong]);
        assert_eq!((args.models.len(), args.lock.len()), (2, 2));
        assert_eq!(options(&args, None).unwrap().rounds, ROUNDS_QUICK);
        for line in ["--cases warp", "--rounds 0", "--fio-seconds 0"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn results_of_other_cases_stay() {
        let directory = tempfile::tempdir().unwrap();
        let machine = Machine::look(directory.path());
        let mut case = blank("engine", "Engine", "How.", "m.gguf".as_ref());
        case.rows.add("flea", Spec::figure("GB/s", 2), 1.9);
        case.plot = Some("GB/s".to_owned());
        Results::open(directory.path(), machine.clone())
            .unwrap()
            .keep(&case)
            .unwrap();
        let path = directory.path().join(RESULTS);
        assert!(!path.exists(), "a case without a round is no result");
        case.rounds = 1;
        Results::open(directory.path(), machine.clone())
            .unwrap()
            .keep(&case)
            .unwrap();
        let mut cut_short = case.clone();
        cut_short.interrupted = true;
        cut_short.model = "another".to_owned();
        Results::open(directory.path(), machine.clone())
            .unwrap()
            .keep(&cut_short)
            .unwrap();
        let kept = std::fs::read_to_string(&path).unwrap();
        assert!(!kept.contains("another"), "a whole result is kept: {kept}");
        case.name = "load".to_owned();
        Results::open(directory.path(), machine.clone())
            .unwrap()
            .keep(&case)
            .unwrap();
        let report: Report =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let names: Vec<&str> = report.cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names, ["engine", "load"]);
        assert!(
            directory.path().join("engine.svg").exists() && directory.path().join(PAGE).exists()
        );
        std::fs::write(&path, "{}").unwrap();
        assert!(Results::open(directory.path(), machine).is_err());
    }
}
