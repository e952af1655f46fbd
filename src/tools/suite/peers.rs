//! The peers: stock llama.cpp over the same model in the same memory cgroup, at two read-aheads of the device.
//!
//! Invariants: a limit holds for everybody alike (flea gets a little less than it as `--memory`, for what the kernel
//! charges besides); huge pages that a cgroup does not charge are not used by anybody here; a peer that the kernel
//! kills is a result; a peer that is not there is said to be missing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::cgroup::Cgroup;
use super::child::Finished;
use super::decode::{CONTEXT_TOKENS, figures};
use super::lab::{Case, Lab, RoundLine, Run, find, number};
use super::machine::queue_of;
use super::report::{Book, CaseReport, Spec};
use super::settings::Setting;
use super::stat::Goal;
use super::{blank, file_bytes};
use crate::error::{Error, ErrorKind, Result};
use crate::io::cached;
use crate::units::MIB;

/// Page tables, sockets and the pages of its own program, which the cgroup charges and `--memory` does not count.
pub(super) const CHARGED_BESIDES_BYTES: u64 = 48 * MIB;
/// A peer that is slower than this for a handful of tokens is not waited for.
pub(super) const PEER_LIMIT: Duration = Duration::from_secs(400);
const PROMPT: &str = "The quick brown fox";
/// The first token pays for loading; the rest are steady.
const TOKENS: usize = 3;
/// With flea they are quicker, and more of them make a better rate.
const FLEA_TOKENS: usize = 6;

/// A way in which llama.cpp gets its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mode {
    name: &'static str,
    arguments: &'static [&'static str],
    /// Tried at this limit only: it does not survive below, or does not care.
    only_at: Option<u32>,
}

/// llama.cpp as it is when nothing is said about loading.
pub(super) const MMAP: &str = "llama.cpp mmap";

const MODES: [Mode; 4] = [
    Mode {
        name: MMAP,
        arguments: &["--load-mode", "mmap", "--no-repack"],
        only_at: None,
    },
    Mode {
        name: "llama.cpp no-mmap",
        arguments: &["--load-mode", "none", "--no-repack"],
        only_at: Some(95),
    },
    Mode {
        name: "llama.cpp direct I/O",
        arguments: &["--load-mode", "dio", "--no-repack"],
        only_at: Some(95),
    },
    Mode {
        name: "llama.cpp as it comes",
        arguments: &[],
        only_at: Some(95),
    },
];

/// flea and llama.cpp under the same limit.
#[derive(Debug)]
pub struct Limited {
    /// The model.
    pub path: PathBuf,
    /// Limits, percent of the model.
    pub limits: Vec<u32>,
    /// The device's read-ahead meanwhile.
    pub read_ahead_kib: u64,
}

impl Limited {
    /// flea and llama.cpp on a model, with these limits and that read-ahead of the device.
    #[must_use]
    pub fn new(path: PathBuf, limits: &[u32], read_ahead_kib: u64) -> Self {
        Self {
            path,
            limits: limits.to_vec(),
            read_ahead_kib,
        }
    }

    fn goal(&self, limit: u32) -> Option<f64> {
        let (short, long) = match limit {
            25 => (3.5, 1.7),
            50 => (5.0, 2.5),
            75 => (10.0, 5.0),
            95 => (24.0, 12.0),
            _ => return None,
        };
        match self.read_ahead_kib {
            128 => Some(short),
            8192 => Some(long),
            _ => None,
        }
    }

    fn flea(&self, lab: &Lab<'_>, limit_bytes: u64) -> Result<BTreeMap<&'static str, f64>> {
        cached::make_cold(&self.path)?;
        let group = Cgroup::new("suite", limit_bytes)?;
        let memory_bytes = limit_bytes.saturating_sub(CHARGED_BESIDES_BYTES);
        let mut command = lab.flea_run(&self.path, CONTEXT_TOKENS);
        command.args(["-p", PROMPT, "-n", &FLEA_TOKENS.to_string()]);
        command.args(["--memory", &memory_bytes.to_string()]);
        let (answer, done) = lab.flea_json(&mut group.wrap(&command))?;
        let mut figures = figures(&answer, FLEA_TOKENS)?;
        figures.insert("token_bytes", number(&answer, "streamed_bytes_per_pass")?);
        count(&mut figures, &done, &group);
        Ok(figures)
    }

    fn peer(
        &self,
        lab: &Lab<'_>,
        mode: Mode,
        limit_bytes: u64,
    ) -> Result<BTreeMap<&'static str, f64>> {
        cached::make_cold(&self.path)?;
        let group = Cgroup::new("suite", limit_bytes)?;
        let mut command = llama_cpp(lab, "llama-completion")?;
        command.arg("-m").arg(&self.path).args([
            "-p",
            PROMPT,
            "-n",
            &TOKENS.to_string(),
            "--ignore-eos",
        ]);
        command.args([
            "-c",
            CONTEXT_TOKENS,
            "-t",
            &lab.options.threads_count.to_string(),
        ]);
        command
            .args(["--temp", "0", "-no-cnv", "--no-warmup"])
            .args(mode.arguments);
        let done = lab.run(&mut group.wrap(&command), PEER_LIMIT)?;
        group.check_survived(&done)?;
        let mut figures = BTreeMap::from([("rate", steady_rate(&done)?)]);
        count(&mut figures, &done, &group);
        Ok(figures)
    }
}

/// What the kernel counted for a program from its start to its end.
fn count(figures: &mut BTreeMap<&'static str, f64>, done: &Finished, group: &Cgroup) {
    figures.insert("read_bytes", done.read_bytes as f64);
    figures.insert("faults", done.major_faults as f64);
    figures.extend(group.peak_of_limit().map(|share| ("cgroup_peak", share)));
}

/// One of stock llama.cpp's programs.
pub(super) fn llama_cpp(lab: &Lab<'_>, program: &str) -> Result<Command> {
    let missing = |place: &str| {
        Error::new(
            ErrorKind::NotFound,
            format!("{program} is not {place}; run scripts/peers.sh, or give --llama-cpp DIR"),
        )
    };
    let directory = lab
        .options
        .llama_cpp
        .as_ref()
        .ok_or_else(|| missing("installed"))?;
    let path = directory.join(program);
    if !path.is_file() {
        return Err(missing(&format!("in {}", directory.display())));
    }
    let mut command = Command::new(path);
    command.env("LD_LIBRARY_PATH", directory);
    Ok(command)
}

/// Tokens per second after the first, from what llama.cpp prints at its end.
fn steady_rate(done: &Finished) -> Result<f64> {
    let (seconds, tokens) = spent(done, " eval time")?;
    Ok(tokens / seconds)
}

/// The seconds that llama.cpp says it has spent on `key` (" eval time", "prompt eval time"), and on how many tokens.
///
/// # Errors
/// `Io`: it failed, or does not say.
pub(super) fn spent(done: &Finished, key: &str) -> Result<(f64, f64)> {
    let failed = || Error::new(ErrorKind::Io, format!("llama.cpp: {}", done.last_words()));
    if !done.status.success() {
        return Err(failed());
    }
    let wants_prompt = key.starts_with("prompt");
    let mut lines = done.stderr.lines().chain(done.stdout.lines());
    let line = lines
        .find(|line| line.contains(key) && line.contains("prompt eval time") == wants_prompt)
        .ok_or_else(failed)?;
    let first_number = |text: &str| text.trim_start().split(' ').next()?.parse::<f64>().ok();
    let milliseconds = line
        .split_once('=')
        .and_then(|(_, rest)| first_number(rest));
    let tokens = line
        .split_once('/')
        .and_then(|(_, rest)| first_number(rest));
    match (milliseconds, tokens) {
        (Some(milliseconds), Some(tokens)) if milliseconds > 0.0 => {
            Ok((milliseconds / 1e3, tokens))
        }
        _ => Err(failed()),
    }
}

impl Case for Limited {
    fn path(&self) -> &Path {
        &self.path
    }

    fn report(&self) -> CaseReport {
        let kib = self.read_ahead_kib;
        let name = format!("peers-{}", read_ahead_name(kib));
        CaseReport {
            plot: Some("tokens/s".to_owned()),
            ..blank(
                &name,
                &format!("Against stock llama.cpp under the same limit, read-ahead {kib} KiB"),
                "Each alone in a memory cgroup limited to that share of the model file, context 256, page cache cold (proven by \
                 cachestat or mincore) before each; flea gets the limit less 48 MiB as --memory. Steady tokens after the first: 5 of flea, \
                 2 of llama.cpp. GB read and major faults are the kernel's counts for the process from its start to its end, with loading \
                 and the prompt; GB planned per token is what flea's plan streams.",
                &self.path,
            )
        }
    }

    fn round(&mut self, lab: &mut Lab<'_>) -> Result<Vec<Run>> {
        let model_bytes = file_bytes(&self.path)?;
        let _setting = set_read_ahead(&self.path, self.read_ahead_kib)?;
        let mut runs = Vec::new();
        for &limit in &self.limits {
            let limit_bytes = model_bytes / 100 * u64::from(limit);
            runs.push(Run::of(label("flea", limit), self.flea(lab, limit_bytes))?);
            for mode in MODES {
                if mode.only_at.is_some_and(|only| only != limit) {
                    continue;
                }
                (lab.say)(&label(mode.name, limit));
                runs.push(Run::of(
                    label(mode.name, limit),
                    self.peer(lab, mode, limit_bytes),
                )?);
            }
        }
        cached::make_cold(&self.path)?;
        Ok(runs)
    }

    fn judge(&self, runs: &[Run], _line: &RoundLine, book: &mut Book) {
        for run in runs {
            let Some(rate) = run.get("rate") else {
                continue;
            };
            book.add(&run.label, Spec::figure("tokens/s", 3), rate);
            for (name, decimals, key, scale) in [
                ("GB planned per token", 2, "token_bytes", 1e-9),
                ("GB read in all", 2, "read_bytes", 1e-9),
                ("major faults in all", 0, "faults", 1.0),
                ("cgroup peak of limit", 2, "cgroup_peak", 1.0),
            ] {
                if let Some(value) = run.get(key) {
                    book.add(&run.label, Spec::figure(name, decimals), value * scale);
                }
            }
        }
        for &limit in &self.limits {
            let rate = |name: &str| find(runs, &label(name, limit)).and_then(|run| run.get("rate"));
            let (Some(flea), Some(peer)) = (rate("flea"), rate(MMAP)) else {
                continue;
            };
            let times = Spec {
                decimals: 1,
                ..Spec::ratio("times llama.cpp mmap")
            };
            let times = self
                .goal(limit)
                .map_or(times, |goal| times.goal(Goal::AtLeast(goal)));
            book.add(&label("flea", limit), times, flea / peer);
        }
    }
}

/// Sets the read-ahead of the device below a file, until the setting is dropped.
///
/// # Errors
/// `Unsupported` for a file on no block device; those of [`Setting::set`].
pub(super) fn set_read_ahead(path: &Path, kib: u64) -> Result<Setting> {
    let context = || format!("{} is on no block device", path.display());
    let queue = queue_of(path).ok_or_else(|| Error::new(ErrorKind::Unsupported, context()))?;
    Setting::set(&queue.join("read_ahead_kb"), &kib.to_string())
}

/// "8m", "128k": a part of a case's name.
pub(super) fn read_ahead_name(kib: u64) -> String {
    if kib >= 1024 {
        format!("{}m", kib / 1024)
    } else {
        format!("{kib}k")
    }
}

pub(super) fn label(name: &str, limit: u32) -> String {
    format!("{name}, {limit} %")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn said(stderr: &str) -> Finished {
        Finished {
            status: std::process::ExitStatus::from_raw(0),
            stdout: String::new(),
            stderr: stderr.to_owned(),
            seconds: 1.0,
            cpu_seconds: 1.0,
            major_faults: 0,
            read_bytes: 0,
        }
    }

    #[test]
    fn what_llama_cpp_prints_is_read() {
        let text = "common_perf_print:        load time =   5132.11 ms\n\
                    common_perf_print: prompt eval time =   4000.00 ms /     5 tokens (  800.00 ms per token,     1.25 tokens per second)\n\
                    common_perf_print:        eval time =   8000.00 ms /     2 runs   ( 4000.00 ms per token,     0.25 tokens per second)\n";
        assert_eq!(steady_rate(&said(text)).unwrap(), 0.25);
        assert_eq!(spent(&said(text), "prompt eval time").unwrap(), (4.0, 5.0));
        assert!(steady_rate(&said("error: no such model")).is_err());
    }

    #[test]
    fn goals_are_those_of_the_two_read_aheads() {
        let case = |read_ahead_kib| Limited {
            path: PathBuf::new(),
            limits: vec![],
            read_ahead_kib,
        };
        assert_eq!(
            (case(128).goal(95), case(8192).goal(25)),
            (Some(24.0), Some(1.7))
        );
        assert_eq!((case(128).goal(60), case(512).goal(50)), (None, None));
    }
}
