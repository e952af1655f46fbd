//! Stock llama.cpp with `libggml-flea.so` plugged in, unchanged: its tokens over the budgets, and its first one after loading.
//!
//! Invariants: the device's own counters say that the weights were streamed, or there is no figure; the resident run is the
//! same program without the device, its model warm in the page cache.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::decode::{CONTEXT_TOKENS, FIRST_TOKEN, OF_BOUND, make_warm};
use super::lab::{Case, Lab, RoundLine, Run, find, number, touch_memory};
use super::peers::{PEER_LIMIT, llama_cpp, spent};
use super::report::{Book, CaseReport, Spec};
use super::{blank, child, file_bytes};
use crate::error::{Error, ErrorKind, Result};
use crate::io::cached;

/// The row of the same program without the device.
const WITHOUT: &str = "llama.cpp, resident";
/// A few tokens in any vocabulary: what a long one computes is no reading.
const PROMPT: &str = "Hello";
/// The first is the prompt's.
const TOKENS: usize = 6;

/// A stock host at several budgets.
#[derive(Debug)]
pub struct Stock {
    /// The model.
    pub path: PathBuf,
    /// Weights in memory, percent of the model.
    pub budgets: Vec<u32>,
}

impl Stock {
    fn command(&self, lab: &Lab<'_>) -> Result<Command> {
        let mut command = llama_cpp(lab, "llama-completion")?;
        child::without_flea_variables(&mut command);
        command.arg("-m").arg(&self.path).args(["-p", PROMPT]);
        command.args([
            "-n",
            &TOKENS.to_string(),
            "--ignore-eos",
            "-c",
            CONTEXT_TOKENS,
        ]);
        command.args(["-t", &lab.options.threads_count.to_string()]);
        command.args(["--temp", "0", "-no-cnv", "--no-warmup", "--no-repack"]);
        Ok(command)
    }

    fn streamed(&self, lab: &Lab<'_>, percent: u32) -> Result<BTreeMap<&'static str, f64>> {
        let device = lab.options.ggml_flea.as_ref().filter(|path| path.is_file());
        let device = device.ok_or_else(|| {
            let context = "libggml-flea.so is not there; build it for that llama.cpp (make ggml-flea), or give --ggml-flea FILE";
            Error::new(ErrorKind::NotFound, context)
        })?;
        cached::make_cold(&self.path)?;
        // llama.cpp's loader maps all of the file before the device takes its memory.
        touch_memory(file_bytes(&self.path)? / 100 * u64::from(100 + percent))?;
        let told = std::env::temp_dir().join(format!("flea-suite-{}.json", std::process::id()));
        let mut command = self.command(lab)?;
        command.args(["--device", "FLEA"]);
        command
            .env("GGML_BACKEND_PATH", device)
            .env("FLEA_STATS", &told);
        command.env("FLEA_MEMORY", format!("{percent}%"));
        let done = lab.run(&mut command, PEER_LIMIT);
        let text = std::fs::read_to_string(&told);
        // It may never have been written.
        let _ = std::fs::remove_file(&told);
        let mut figures = figures(&done?)?;
        let text =
            text.map_err(|error| Error::from_io(&error, format_args!("read {}", told.display())))?;
        let stats: serde_json::Value = serde_json::from_str(&text).map_err(|error| {
            Error::new(ErrorKind::Io, format!("what the device counted: {error}"))
        })?;
        if number(&stats, "loads")? == 0.0 {
            return Err(Error::new(
                ErrorKind::Internal,
                "the device has streamed nothing",
            ));
        }
        for (name, key) in [
            ("streamed", "streamed_bytes_per_pass"),
            ("model", "model_bytes"),
        ] {
            figures.insert(name, number(&stats, key)?);
        }
        Ok(figures)
    }

    fn resident(&self, lab: &Lab<'_>) -> Result<BTreeMap<&'static str, f64>> {
        make_warm(&self.path)?;
        let mut command = self.command(lab)?;
        command.args(["--device", "none", "--load-mode", "mmap"]);
        figures(&lab.run(&mut command, PEER_LIMIT)?)
    }
}

fn figures(done: &child::Finished) -> Result<BTreeMap<&'static str, f64>> {
    let (seconds, tokens) = spent(done, " eval time")?;
    let (first_seconds, _) = spent(done, "prompt eval time")?;
    Ok(BTreeMap::from([
        ("rate", tokens / seconds),
        ("first", first_seconds),
    ]))
}

impl Case for Stock {
    fn path(&self) -> &Path {
        &self.path
    }

    fn report(&self) -> CaseReport {
        CaseReport {
            plot: Some("tokens/s".to_owned()),
            ..blank(
                "stock",
                "Stock llama.cpp with flea's device",
                "llama-completion, unchanged, with libggml-flea.so; page cache cold. Of bound: as for decode, the compute that of the \
                 same program without the device. First token: its prompt's time, in passes over all weights at the rate of \
                 fio (same footprint), after loading.",
                &self.path,
            )
        }
    }

    fn round(&mut self, lab: &mut Lab<'_>) -> Result<Vec<Run>> {
        let mut runs = lab.between_lines(&self.budgets, |lab, &percent| {
            Run::of(format!("FLEA, {percent} %"), self.streamed(lab, percent))
        })?;
        runs.push(Run::of(WITHOUT, self.resident(lab))?);
        cached::make_cold(&self.path)?;
        Ok(runs)
    }

    fn judge(&self, runs: &[Run], line: &RoundLine, book: &mut Book) {
        let resident = find(runs, WITHOUT).and_then(|run| run.get("rate"));
        for run in runs {
            let (Some(rate), Some(first)) = (run.get("rate"), run.get("first")) else {
                continue;
            };
            book.add(&run.label, Spec::figure("tokens/s", 3), rate);
            book.add(&run.label, Spec::figure("first token s", 2), first);
            let (Some(streamed), Some(model)) = (run.get("streamed"), run.get("model")) else {
                continue;
            };
            let fio = run.line_or(line).large.gb_per_second * 1e9;
            if let Some(resident) = resident {
                book.add(
                    &run.label,
                    OF_BOUND,
                    rate * resident.recip().max(streamed / fio),
                );
            }
            book.add(&run.label, FIRST_TOKEN, first * fio / model);
        }
    }
}
