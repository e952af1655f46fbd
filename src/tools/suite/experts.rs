//! A mixture of experts against stock llama.cpp in the same memory cgroup: a long prompt, and tokens one by one.
//!
//! Invariants: those of [`super::peers`]; flea's decoding is held against what its cache missed, apart from the prompt.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::cgroup::Cgroup;
use super::decode::{RESIDENT, figures, make_warm, prompt};
use super::fio::Shape;
use super::lab::{Case, Lab, RoundLine, Run, find, number, touch_memory};
use super::peers::{
    CHARGED_BESIDES_BYTES, MMAP, PEER_LIMIT, label, llama_cpp, read_ahead_name, set_read_ahead,
};
use super::report::{Book, CaseReport, Spec};
use super::stat::Goal;
use super::{blank, file_bytes};
use crate::error::{Error, ErrorKind, Result};
use crate::io::cached;
use crate::units::PAGE_4K;

/// One ubatch of llama.cpp.
const PROMPT: usize = 512;
const CONTEXT_TOKENS: &str = "1024";
/// The first comes out of the prompt's pass.
const FLEA_TOKENS: usize = 17;
const PEER_TOKENS: &str = "6";

/// flea and llama.cpp's mmap under the same limit.
#[derive(Debug)]
pub struct Experts {
    /// The model.
    pub path: PathBuf,
    /// What to call it.
    pub slug: String,
    /// Limits, percent of the model.
    pub limits: Vec<u32>,
    /// The device's read-ahead meanwhile.
    pub read_ahead_kib: u64,
}

/// True for a model whose experts are fetched one by one.
///
/// # Errors
/// Those of [`crate::engine::read_catalog`].
pub fn has_experts(path: &Path) -> Result<bool> {
    let (catalog, _) = crate::engine::read_catalog(path)?;
    Ok(crate::plan::experts::has_experts(&catalog))
}

impl Experts {
    /// `limit_bytes`: of its cgroup; `None` for all weights in memory, without flea.
    fn flea(&self, lab: &Lab<'_>, limit_bytes: Option<u64>) -> Result<BTreeMap<&'static str, f64>> {
        let mut command = lab.flea_run(&self.path, CONTEXT_TOKENS);
        command.args(["--prompt-tokens", &prompt(PROMPT)]);
        command.args(["-n", &FLEA_TOKENS.to_string()]);
        let Some(limit_bytes) = limit_bytes else {
            touch_memory(file_bytes(&self.path)?)?;
            make_warm(&self.path)?;
            let (answer, _) = lab.flea_json(command.arg("--no-stream"))?;
            return figures(&answer, FLEA_TOKENS);
        };
        cached::make_cold(&self.path)?;
        touch_memory(limit_bytes)?;
        let group = Cgroup::new("suite", limit_bytes)?;
        let memory_bytes = limit_bytes.saturating_sub(CHARGED_BESIDES_BYTES);
        command.args(["--memory", &memory_bytes.to_string()]);
        let (answer, _) = lab.flea_json(&mut group.wrap(&command))?;
        let mut figures = figures(&answer, FLEA_TOKENS)?;
        let read = number(&answer, "decode_bytes_read")?;
        let missed = number(&answer, "decode_expert_misses")?;
        let each = number(&answer, "expert_bytes_read")? / number(&answer, "expert_misses")?;
        if missed > 0.0 {
            figures.insert("of_misses", read / (missed * each));
            figures.insert("expert_bytes", each);
            let cuts = number(&answer, "decode_expert_cuts")?;
            figures.insert("missed_at_once", missed / cuts);
            let seconds = number(&answer, "decode_read_seconds")?;
            figures.insert("miss_rate", read / 1e9 / seconds);
        }
        figures.insert("token_bytes", read / (FLEA_TOKENS - 1) as f64);
        figures.extend(group.peak_of_limit().map(|share| ("cgroup_peak", share)));
        Ok(figures)
    }

    /// fio with requests of an expert's length, as many in flight as flea misses at once.
    fn fio_line(&self, lab: &mut Lab<'_>, run: &mut Run) -> Result<()> {
        if let (Some(bytes), Some(count)) = (run.get("expert_bytes"), run.get("missed_at_once")) {
            let request_bytes = (bytes as u64).next_multiple_of(PAGE_4K);
            let shape = Shape::new(request_bytes, count.round().max(1.0) as u32);
            match lab.fio.random_line(&self.path, shape, lab.stop) {
                Ok(line) => {
                    run.figures.insert("fio_rate", line.gb_per_second);
                }
                Err(error) if error.kind() == ErrorKind::Canceled => return Err(error),
                // The other figures of the round are as good without it.
                Err(error) => (lab.say)(&error.to_string()),
            }
        }
        Ok(())
    }

    fn peer(&self, lab: &Lab<'_>, limit_bytes: u64) -> Result<BTreeMap<&'static str, f64>> {
        cached::make_cold(&self.path)?;
        touch_memory(limit_bytes)?;
        let group = Cgroup::new("suite", limit_bytes)?;
        let mut command = llama_cpp(lab, "llama-bench")?;
        command
            .arg("-m")
            .arg(&self.path)
            .args(["-p", &PROMPT.to_string(), "-n", PEER_TOKENS])
            .args(["-r", "1", "--no-warmup", "-lm", "mmap", "--repack", "0"])
            .args(["-o", "json", "-t"])
            .arg(lab.options.threads_count.to_string());
        let done = lab.run(&mut group.wrap(&command), PEER_LIMIT)?;
        group.check_survived(&done)?;
        let (prompt_rate, rate) = rates(&done.stdout).ok_or_else(|| {
            Error::new(ErrorKind::Io, format!("llama-bench: {}", done.last_words()))
        })?;
        let mut figures = BTreeMap::from([("prompt_rate", prompt_rate), ("rate", rate)]);
        figures.extend(group.peak_of_limit().map(|share| ("cgroup_peak", share)));
        Ok(figures)
    }

    fn decode_goal(&self) -> Option<f64> {
        match self.read_ahead_kib {
            128 => Some(3.0),
            8192 => Some(2.0),
            _ => None,
        }
    }
}

/// What llama-bench says of the prompt and of the tokens after it.
fn rates(answer: &str) -> Option<(f64, f64)> {
    let tests: Vec<serde_json::Value> = serde_json::from_str(answer.trim()).ok()?;
    let rate = |key: &str| {
        let test = tests.iter().find(|test| test[key].as_u64() > Some(0))?;
        test["avg_ts"].as_f64().filter(|rate| *rate > 0.0)
    };
    Some((rate("n_prompt")?, rate("n_gen")?))
}

impl Case for Experts {
    fn path(&self) -> &Path {
        &self.path
    }

    fn report(&self) -> CaseReport {
        let name = read_ahead_name(self.read_ahead_kib);
        CaseReport {
            plot: Some("tokens/s".to_owned()),
            ..blank(
                &format!("experts-{name}-{}", self.slug),
                &format!(
                    "Experts, {}, against stock llama.cpp under the same limit, read-ahead {} KiB",
                    self.slug, self.read_ahead_kib
                ),
                "A prompt of 512 tokens and tokens after it, each alone in a memory cgroup limited to that share of the model \
                 file, page cache cold (proven by cachestat or mincore) before each; flea gets the limit less 48 MiB as --memory, llama.cpp \
                 is llama-bench with mmap. Of resident: of the prompt's rate with all weights in memory, which no way of \
                 reading can pass. Read to misses: bytes read while decoding against those of the experts that were missing. Of fio, \
                 same reads: their rate while any was in flight against random reads of fio, as long as an expert's and as many \
                 in flight as are missing at once.",
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
            let flea = self.flea(lab, Some(limit_bytes));
            let mut flea = Run::of(label("flea", limit), flea)?;
            self.fio_line(lab, &mut flea)?;
            runs.push(flea);
            (lab.say)(&label(MMAP, limit));
            runs.push(Run::of(label(MMAP, limit), self.peer(lab, limit_bytes))?);
        }
        runs.push(Run::of(RESIDENT, self.flea(lab, None))?);
        cached::make_cold(&self.path)?;
        Ok(runs)
    }

    fn judge(&self, runs: &[Run], _line: &RoundLine, book: &mut Book) {
        for run in runs {
            for (name, decimals, key, scale) in [
                ("tokens/s", 3, "rate", 1.0),
                ("prompt tokens/s", 2, "prompt_rate", 1.0),
                ("GB read per token", 3, "token_bytes", 1e-9),
                ("cgroup peak of limit", 2, "cgroup_peak", 1.0),
            ] {
                if let Some(value) = run.get(key) {
                    book.add(&run.label, Spec::figure(name, decimals), value * scale);
                }
            }
            if let Some(value) = run.get("of_misses") {
                let spec = Spec::figure("read to misses", 3).goal(Goal::AtMost(1.05));
                book.add(&run.label, spec, value);
            }
            if let (Some(ours), Some(fio)) = (run.get("miss_rate"), run.get("fio_rate")) {
                book.add(&run.label, Spec::figure("misses GB/s", 3), ours);
                let spec = Spec::ratio("of fio, same reads").goal(Goal::AtLeast(0.85));
                book.add(&run.label, spec, ours / fio);
            }
        }
        for &limit in &self.limits {
            let get = |name: &str, key: &str| find(runs, name).and_then(|run| run.get(key));
            let (flea, peer) = (label("flea", limit), label(MMAP, limit));
            let times = |name: &'static str| Spec {
                decimals: 2,
                ..Spec::ratio(name)
            };
            let decode = times("times llama.cpp mmap");
            let decode = self
                .decode_goal()
                .map_or(decode, |goal| decode.goal(Goal::AtLeast(goal)));
            let prefill = times("prompt, times llama.cpp mmap").goal(Goal::AtLeast(3.0));
            for (spec, key) in [(decode, "rate"), (prefill, "prompt_rate")] {
                if let (Some(ours), Some(theirs)) = (get(&flea, key), get(&peer, key)) {
                    book.add(&flea, spec, ours / theirs);
                }
            }
            let resident = get(RESIDENT, "prompt_rate");
            if let (Some(ours), Some(resident)) = (get(&flea, "prompt_rate"), resident) {
                book.add(&flea, Spec::ratio("prompt, of resident"), ours / resident);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_llama_bench_says_is_read() {
        let answer = r#"[{"n_prompt": 512, "n_gen": 0, "avg_ts": 29.5}, {"n_prompt": 0, "n_gen": 6, "avg_ts": 0.2}]"#;
        assert_eq!(rates(answer), Some((29.5, 0.2)));
        assert_eq!(rates("[]"), None);
        assert_eq!(rates("error"), None);
    }
}
