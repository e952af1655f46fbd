//! What the programs share on the command line: output, errors, exit codes, logging and the values arguments take.
//!
//! Every subcommand has a file of its own with its `Args` and a `command` function; a program's `main` parses, calls
//! and hands the result to [`finish`]. Answers go to stdout, everything else to stderr. A reader of stdout that goes
//! away (`flea inspect m.gguf | head`) is no failure. The last room before the programs: nothing depends on it.

pub mod analyze;
pub mod bench;
mod bench_gds;
#[cfg(feature = "cuda")]
mod bench_gpu;
mod bench_kernels;
pub mod bench_policies;
#[cfg(feature = "run")]
pub mod bench_predict;
mod bench_raw;
pub mod bench_suite;
pub mod cost;
pub mod ctl;
pub mod dashboard;
pub mod doctor;
pub mod flead;
pub mod inspect;
pub mod kv;
pub mod pack;
pub mod plan;
pub mod probe;
mod probe_rows;
#[cfg(feature = "run")]
pub mod run;
pub mod synth;
pub mod table;
pub mod trace;
pub mod values;

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::error::{ContextKind, ContextValue};
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use crate::daemon::config;
use crate::error::{Error, ErrorKind, Result};
use crate::units;

/// The environment variables flea reads, besides one for each key of flead.toml (`FLEA_LIMITS_CLIENTS`). Any other
/// `FLEA_*` is a slip of the fingers and is warned about.
pub const ENVIRONMENT: [&str; 14] = [
    "FLEA_MEMORY",
    "FLEA_MODEL",
    "FLEA_STATS",
    "FLEA_ENDPOINT",
    "FLEA_READER",
    "FLEA_LOG",
    "FLEA_FAULT",
    "FLEA_PROFILE",
    "FLEA_CONFIG",
    "FLEA_MIRROR",
    "FLEA_VRAM",
    "FLEA_GPU",
    "FLEA_GGML_CUDA",
    "FLEA_CACHE",
];

/// Options that an environment variable stands in for.
const OPTION_VARIABLES: [(&str, &str); 2] =
    [("--memory", "FLEA_MEMORY"), ("--reader", "FLEA_READER")];

/// Shown below `flea --help`.
pub const EXAMPLES: &str = "\
Examples:
  flea run model.gguf -p \"Once upon a time\" -n 64 --memory 4GiB
  flea plan model.gguf --memory 50%
  flea inspect model.gguf --json
  flea synth --size 4GiB -o big.gguf
  flea bench stream big.gguf --memory 10% --passes 3
  flea bench raw big.gguf
  flea probe /models
  flea analyze gemma4-e2b --context 32768 --device all
  flea cost --tokens-per-second 7 --price 900 --watts 12
  flea kv bench --svg plots
  flea dashboard model.gguf --export report.html

Sizes are written 4GiB, 4GB, 512M, or as a number of bytes; a memory budget also as a share of the model, 50%.
Exit codes: 0 done, 1 failed, 2 usage, 3 daemon unreachable, 4 budget or resource refused, 5 not a model file or its \
bytes are the cause, 130 interrupted; of flea analyze also 10, 11, 12, its verdict.";

/// True when the arguments ask for `--json`. Known before they are parsed, because a parse error must obey it too.
#[must_use]
pub fn wants_json(arguments: impl Iterator<Item = OsString>) -> bool {
    arguments
        .skip(1)
        .take_while(|argument| argument != OsStr::new("--"))
        .any(|argument| argument == OsStr::new("--json"))
}

/// Ends a program whose arguments could not be parsed, or asked only for help or the version.
#[must_use]
pub fn usage(error: &clap::Error, json: bool) -> ExitCode {
    if !error.use_stderr() {
        // --help and --version: an answer, on stdout. Nobody is left to tell when it cannot be printed.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let _ = error.print();
    let source = from_environment(error, std::env::args_os().skip(1));
    if let Some(variable) = source {
        let _ = writeln!(
            std::io::stderr(),
            "The value is that of the environment variable {variable}; unset it, or give the option."
        );
    }
    if json {
        let mut message = first_paragraph(&error.render().to_string());
        if let Some(variable) = source {
            message += &format!(" (from the environment variable {variable})");
        }
        print_failure(&Error::new(ErrorKind::Invalid, message));
    }
    ExitCode::from(ErrorKind::Invalid.exit_code())
}

/// The environment variable that a refused value came from, where it was not an option: clap names only the option.
fn from_environment(
    error: &clap::Error,
    mut arguments: impl Iterator<Item = OsString>,
) -> Option<&'static str> {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let option = argument.split(' ').next().unwrap_or_default();
    let (_, variable) = OPTION_VARIABLES.iter().find(|(name, _)| *name == option)?;
    let given = arguments.any(|argument| {
        let text = argument.to_string_lossy();
        text == option || text.starts_with(&format!("{option}="))
    });
    (!given).then_some(*variable)
}

/// What clap says before it explains the usage, on one line.
fn first_paragraph(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let lines = text.lines().take_while(|line| !line.trim().is_empty());
    lines.map(str::trim).collect::<Vec<_>>().join(" ")
}

/// Ends a program: reports a failure (`error: ...` on stderr, one JSON object on stdout with `--json`) and gives the
/// exit code of its kind. A closed stdout counts as success.
#[must_use]
pub fn finish(result: Result<ExitCode>, json: bool) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) if is_closed_output(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // A person who pressed Ctrl-C knows why it ended, but not what became of the work: say it all the same.
            let _ = writeln!(std::io::stderr(), "error: {error}");
            if json {
                print_failure(&error);
            }
            ExitCode::from(error.kind().exit_code())
        }
    }
}

fn is_closed_output(error: &Error) -> bool {
    error.kind() == ErrorKind::Io && error.errno() == Some(libc::EPIPE)
}

fn print_failure(error: &Error) {
    // The failure is on stderr already; if stdout is gone as well there is nothing more to do.
    let _ = print_json(&failure(error));
}

fn failure(error: &Error) -> serde_json::Value {
    serde_json::json!({
        "error": {
            "status": error.kind().name(),
            "message": error.context(),
            "exit_code": error.kind().exit_code(),
        }
    })
}

/// Writes text to stdout. Use this and not `println!`, which panics when the reader has gone away.
///
/// # Errors
/// stdout cannot be written; [`finish`] takes a closed pipe for success.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Error::from_io(&error, "write standard output"))
}

/// Writes one object on one line of stdout.
///
/// # Errors
/// As `print`; or the value cannot be JSON, a defect.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_string(value)
        .map_err(|error| Error::new(ErrorKind::Internal, format!("encode JSON: {error}")))?;
    line.push('\n');
    print(&line)
}

/// Log lines on stderr: warnings by default, more with `-v`, per module with `FLEA_LOG` (`info`, `flea::io=debug`).
pub fn start_logging(verbose: u8) {
    let filter = std::env::var("FLEA_LOG").unwrap_or_else(|_| "warn".to_owned());
    start_logger(&filter, verbose, false);
}

/// Log lines of flead: `filter` comes from its configuration. For systemd's journal each begins with its priority.
pub fn start_daemon_logging(filter: &str, verbose: u8) {
    let for_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    start_logger(filter, verbose, for_journal);
}

fn start_logger(filter: &str, verbose: u8, for_journal: bool) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(log::LevelFilter::Warn);
    builder.parse_filters(filter);
    match verbose {
        0 => {}
        1 => drop(builder.filter_module("flea", log::LevelFilter::Info)),
        2 => drop(builder.filter_module("flea", log::LevelFilter::Debug)),
        _ => drop(builder.filter_module("flea", log::LevelFilter::Trace)),
    }
    builder.format(move |out, record| {
        if for_journal {
            // sd-daemon(3): the journal takes the priority off again.
            let priority = match record.level() {
                log::Level::Error => 3,
                log::Level::Warn => 4,
                log::Level::Info => 6,
                log::Level::Debug | log::Level::Trace => 7,
            };
            return writeln!(out, "<{priority}>{}", record.args());
        }
        let level = match record.level() {
            log::Level::Error => "error",
            log::Level::Warn => "warning",
            log::Level::Info => "info",
            log::Level::Debug | log::Level::Trace => {
                return writeln!(out, "{}: {}", record.target(), record.args());
            }
        };
        writeln!(out, "{level}: {}", record.args())
    });
    // Fails only where a logger stands already, as in a test: that one is as good.
    let _ = builder.try_init();
}

/// Warns about `FLEA_*` variables that flea does not know: a mistyped budget must not be overlooked.
pub fn warn_about_environment() {
    for name in unknown_variables(std::env::vars_os().map(|(name, _)| name)) {
        log::warn!(
            "environment variable {name} means nothing to flea; it knows {}",
            ENVIRONMENT.join(", ")
        );
    }
}

fn unknown_variables(names: impl Iterator<Item = OsString>) -> Vec<String> {
    let keys = config::keys();
    let of_flead = |name: &str| keys.iter().any(|key| config::variable_of(key) == name);
    let known = |name: &str| ENVIRONMENT.contains(&name) || of_flead(name);
    let mut unknown: Vec<String> = names
        .filter_map(|name| name.into_string().ok())
        .filter(|name| name.starts_with("FLEA_") && !known(name))
        .collect();
    unknown.sort();
    unknown
}

/// A flag that Ctrl-C, SIGTERM and a closed terminal raise, for work that looks at it now and then. A second one ends the program at once.
///
/// # Errors
/// The handler cannot be installed.
pub fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))
            .and_then(|_| flag::register(signal, Arc::clone(&stop)))
            .map_err(|error| Error::from_io(&error, "install the handler for Ctrl-C"))?;
    }
    Ok(stop)
}

/// Argument parser for a size that must not be zero: `4GiB`, `4GB`, `512M`, bytes.
///
/// # Errors
/// A sentence for the user.
pub fn size(text: &str) -> std::result::Result<u64, String> {
    match units::parse_size(text)? {
        0 => Err("must be larger than zero".to_owned()),
        bytes => Ok(bytes),
    }
}

/// As [`size`], for what the kernel counts in 32 bits (a request, a page).
///
/// # Errors
/// A sentence for the user.
pub fn small_size(text: &str) -> std::result::Result<u32, String> {
    u32::try_from(size(text)?).map_err(|_| format!("'{text}' is more than 4 GiB"))
}

/// Argument parser for a count of at least one.
///
/// # Errors
/// A sentence for the user.
pub fn count(text: &str) -> std::result::Result<u32, String> {
    match text.trim().parse::<u32>() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(count) => Ok(count),
        Err(_) => Err(format!("'{text}' is not a count")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> impl Iterator<Item = OsString> {
        text.split(' ')
            .map(OsString::from)
            .collect::<Vec<_>>()
            .into_iter()
    }

    #[test]
    fn json_is_seen_before_parsing_and_not_behind_the_dashes() {
        assert!(wants_json(words("flea plan m.gguf --json --memory 1")));
        assert!(!wants_json(words("flea plan m.gguf -- --json")));
        assert!(!wants_json(words("--json plan m.gguf")));
    }

    #[test]
    fn a_failure_carries_status_message_and_exit_code() {
        let error = Error::new(ErrorKind::Refused, "needs 3.00 GiB");
        assert_eq!(
            failure(&error).to_string(),
            r#"{"error":{"status":"REFUSED","message":"needs 3.00 GiB","exit_code":4}}"#
        );
    }

    #[test]
    fn usage_errors_fit_on_a_line() {
        let text =
            "error: the following arguments are missing:\n  --output <FILE>\n\nUsage: flea synth\n";
        let expected = "the following arguments are missing: --output <FILE>";
        assert_eq!(first_paragraph(text), expected);
    }

    #[test]
    fn only_a_closed_pipe_counts_as_success() {
        assert!(is_closed_output(&Error::os(libc::EPIPE, "write")));
        assert!(!is_closed_output(&Error::os(libc::ENOSPC, "write")));
        assert!(!is_closed_output(
            &Error::os(libc::EPIPE, "send").with_kind(ErrorKind::Connection)
        ));
    }

    #[test]
    fn unknown_variables_are_named_and_known_ones_are_not() {
        let names = words("FLEA_MEMROY FLEA_MEMORY HOME FLEA_LOG FLEAS FLEA_LIMITS_CLIENTS");
        assert_eq!(unknown_variables(names), ["FLEA_MEMROY"]);
    }

    #[test]
    fn values_are_bounded() {
        assert_eq!(size("1MiB"), Ok(1 << 20));
        assert!(size("0").is_err());
        assert!(small_size("5GiB").is_err());
        assert!(count("0").is_err() && count("-1").is_err());
        assert_eq!(count("7"), Ok(7));
    }
}
