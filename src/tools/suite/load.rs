//! A whole model into memory, cold: flea beside llama.cpp's loaders and those for safetensors.
//!
//! Invariants: every loader starts with an empty page cache, proven; what a loader's time covers stands in the notes; a
//! loader that is not installed is a row that says so.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::child::Finished;
use super::decode::CONTEXT_TOKENS;
use super::lab::{Case, Lab, RoundLine, Run, number, touch_memory};
use super::peers::{PEER_LIMIT, llama_cpp};
use super::report::{Book, CaseReport, Spec};
use super::stat::Goal;
use super::{blank, file_bytes, file_name};
use crate::error::{Error, ErrorKind, Result};
use crate::io::cached;

/// A whole model into memory.
#[derive(Debug)]
pub struct Load {
    /// The model as GGUF.
    pub path: PathBuf,
    /// As many bytes as safetensors, for loaders that take nothing else.
    pub safetensors: PathBuf,
}

const FASTSAFETENSORS: &str = r#"
import json, sys, time
import torch
from fastsafetensors import SafeTensorsFileLoader, SingleGroup
t, c = time.perf_counter(), time.process_time()
loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
loader.add_filenames({0: [sys.argv[1]]})
buffers = loader.copy_files_to_device()
n = sum(buffers.get_tensor(k).nbytes for k in loader.get_keys())
print(json.dumps({"seconds": time.perf_counter() - t, "bytes": n, "cpu": time.process_time() - c}))
"#;

const RUNAI: &str = r#"
import json, sys, time
import torch
from runai_model_streamer import SafetensorsStreamer
t, c = time.perf_counter(), time.process_time()
n, kept = 0, []
with SafetensorsStreamer() as streamer:
    streamer.stream_file(sys.argv[1])
    for name, tensor in streamer.get_tensors():
        kept.append(tensor)
        n += tensor.nbytes
print(json.dumps({"seconds": time.perf_counter() - t, "bytes": n, "cpu": time.process_time() - c}))
"#;

/// What came of one loader.
type Loaded = Result<BTreeMap<&'static str, f64>>;
/// A loader: what to call it, and how to run it.
type Variant<'a> = (String, &'a dyn Fn(&Lab<'_>) -> Loaded);

impl Load {
    fn flea(&self, lab: &Lab<'_>, path: &Path) -> Result<BTreeMap<&'static str, f64>> {
        make_ready(path)?;
        let mut command = lab.flea();
        command
            .args(["bench", "stream"])
            .arg(path)
            .args(["--memory", "110%", "--passes", "1"]);
        let (answer, done) = lab.flea_json(&mut command)?;
        Ok(BTreeMap::from([
            ("seconds", done.seconds),
            ("bytes", number(&answer, "bytes_read")?),
            ("cpu", done.cpu_seconds),
            ("reading_seconds", number(&answer, "seconds")?),
        ]))
    }

    fn llama_cpp(&self, lab: &Lab<'_>, mode: &str) -> Result<BTreeMap<&'static str, f64>> {
        make_ready(&self.path)?;
        let mut command = llama_cpp(lab, "llama-completion")?;
        command.arg("-m").arg(&self.path).args([
            "-p",
            "a",
            "-n",
            "1",
            "-c",
            CONTEXT_TOKENS,
            "-no-cnv",
            "--no-warmup",
        ]);
        command.args([
            "-t",
            &lab.options.threads_count.to_string(),
            "--load-mode",
            mode,
            "--no-repack",
        ]);
        let done = lab.run(&mut command, PEER_LIMIT)?;
        let seconds = loaded_after(&done).ok_or_else(|| {
            Error::new(ErrorKind::Io, format!("llama.cpp: {}", done.last_words()))
        })?;
        Ok(BTreeMap::from([
            ("seconds", seconds),
            ("bytes", file_bytes(&self.path)? as f64),
        ]))
    }

    fn python(&self, lab: &Lab<'_>, program: &str) -> Result<BTreeMap<&'static str, f64>> {
        let missing = || {
            Error::new(
                ErrorKind::NotFound,
                "its Python is not there; run scripts/peers.sh, or give --python FILE",
            )
        };
        let python = lab
            .options
            .python
            .as_ref()
            .filter(|python| python.is_file())
            .ok_or_else(missing)?;
        make_ready(&self.safetensors)?;
        let mut command = Command::new(python);
        command.args(["-c", program]).arg(&self.safetensors);
        let done = lab.run(&mut command, PEER_LIMIT)?;
        if done.was_killed() {
            return Err(Error::new(ErrorKind::NoMemory, "killed: out of memory"));
        }
        let line = done.stdout.lines().last().unwrap_or_default();
        let answer: serde_json::Value =
            serde_json::from_str(line).map_err(|_| Error::new(ErrorKind::Io, done.last_words()))?;
        Ok(BTreeMap::from([
            ("seconds", number(&answer, "seconds")?),
            ("bytes", number(&answer, "bytes")?),
            ("cpu", number(&answer, "cpu")?),
        ]))
    }
}

/// The same start for every loader: nothing of the file in memory, and memory that a virtual machine's host has.
fn make_ready(path: &Path) -> Result<()> {
    cached::make_cold(path)?;
    touch_memory(file_bytes(path)? / 10 * 11)
}

/// When llama.cpp had its model: its log lines begin with minutes, seconds, milliseconds and microseconds since it began,
/// and the one about the system comes right after loading.
fn loaded_after(done: &Finished) -> Option<f64> {
    let mut text = done.stderr.lines().chain(done.stdout.lines());
    let line = text.find(|line| line.contains("system_info:"))?;
    let mut parts = line
        .split_whitespace()
        .next()?
        .split('.')
        .map(str::parse::<f64>);
    let mut next = || parts.next()?.ok();
    Some(60.0 * next()? + next()? + next()? / 1e3 + next()? / 1e6)
}

impl Case for Load {
    fn path(&self) -> &Path {
        &self.path
    }

    fn report(&self) -> CaseReport {
        CaseReport {
            plot: Some("GB/s".to_owned()),
            notes: vec![
                "flea: the whole process, exec to exit, allocating and zeroing the memory included; reading alone is the time \
                 from the first acquire to the last."
                    .to_owned(),
                "llama.cpp: from its start to the end of loading, by its log; the Python loaders: from opening the file to the last tensor, \
                 without starting Python."
                    .to_owned(),
                "CPU: of the same time as the seconds; llama.cpp does not tell its own apart from that of its first token."
                    .to_owned(),
            ],
            ..blank(
                "load",
                "A whole model into memory, cold",
                "Page cache cold (proven by cachestat or mincore) before each, as much memory taken and given back, so that a virtual machine's \
                 host has it. The safetensors file is as large as the model.",
                &self.path,
            )
        }
    }

    fn round(&mut self, lab: &mut Lab<'_>) -> Result<Vec<Run>> {
        let tensors = file_name(&self.safetensors);
        let variants: [Variant<'_>; 6] = [
            ("flea, GGUF".to_owned(), &|lab| self.flea(lab, &self.path)),
            ("llama.cpp direct I/O, GGUF".to_owned(), &|lab| {
                self.llama_cpp(lab, "dio")
            }),
            ("llama.cpp no-mmap, GGUF".to_owned(), &|lab| {
                self.llama_cpp(lab, "none")
            }),
            (format!("flea, {tensors}"), &|lab| {
                self.flea(lab, &self.safetensors)
            }),
            (format!("fastsafetensors, {tensors}"), &|lab| {
                self.python(lab, FASTSAFETENSORS)
            }),
            (format!("runai-model-streamer, {tensors}"), &|lab| {
                self.python(lab, RUNAI)
            }),
        ];
        let runs = lab.between_lines(variants, |lab, (label, load)| Run::of(label, load(lab)))?;
        cached::make_cold(&self.path)?;
        cached::make_cold(&self.safetensors)?;
        Ok(runs)
    }

    fn judge(&self, runs: &[Run], line: &RoundLine, book: &mut Book) {
        for run in runs {
            let (Some(seconds), Some(bytes)) = (run.get("seconds"), run.get("bytes")) else {
                continue;
            };
            let rate = bytes / 1e9 / seconds;
            book.add(&run.label, Spec::figure("seconds", 2), seconds);
            book.add(&run.label, Spec::figure("GB/s", 3), rate);
            let share = Spec::ratio("of fio, same footprint");
            let is_flea = run.label.starts_with("flea");
            book.add(
                &run.label,
                if is_flea {
                    share.goal(Goal::AtLeast(0.95))
                } else {
                    share
                },
                rate / run.line_or(line).large.gb_per_second,
            );
            if let Some(reading) = run.get("reading_seconds") {
                book.add(
                    &run.label,
                    Spec::figure("reading alone GB/s", 3),
                    bytes / 1e9 / reading,
                );
            }
            if let Some(cpu) = run.get("cpu") {
                book.add(
                    &run.label,
                    Spec::figure("CPU s per GB", 3),
                    cpu / (bytes / 1e9),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn the_end_of_loading_is_found_in_the_log() {
        let mut done = Finished {
            status: std::process::ExitStatus::from_raw(0),
            stdout: String::new(),
            stderr: "0.00.100.000 I build: 1\n1.06.855.993 I system_info: n_threads = 2\n"
                .to_owned(),
            seconds: 70.0,
            cpu_seconds: 1.0,
            major_faults: 0,
            read_bytes: 0,
        };
        let seconds = loaded_after(&done).unwrap();
        assert!((seconds - 66.855_993).abs() < 1e-9, "{seconds}");
        done.stderr = "error: no such model".to_owned();
        assert_eq!(loaded_after(&done), None);
    }
}
