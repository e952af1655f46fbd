//! Cases without compute: the drive through fio and through flea's reader, the engine's stream at several budgets, a
//! whole model into memory beside other loaders.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use super::blank;
use super::fio::{FOOTPRINT_BYTES, LARGE_SHAPES, SHAPES, Shape};
use super::lab::{Case, Lab, RoundLine, Run, number};
use super::report::{Book, CaseReport, Spec};
use super::stat::Goal;
use crate::error::{Error, ErrorKind, Result};
use crate::io::bulk::{Cursor, sweep};
use crate::io::{AlignedMemory, ReaderKind, ReaderOptions, ShardFile, cached};
use crate::units::{HumanBytes, MIB, PAGE_2M};

const RATE: Spec = Spec::figure("GB/s", 3);
const CPU: Spec = Spec::figure("CPU s per GB", 4);
const OF_BEST: Spec = Spec::ratio("of fio best");
const OF_LARGE: Spec = Spec::ratio("of fio, same footprint");
const CPU_OF_FIO: Spec = Spec::ratio("CPU of fio's");

/// Memory sizes of the footprint table.
const FOOTPRINTS: [u64; 5] = [4 * MIB, 16 * MIB, 64 * MIB, 128 * MIB, 512 * MIB];
/// What reads into them.
const FOOTPRINT_SHAPE: Shape = SHAPES[1];
/// What flea's reader is tried with.
const READER_SHAPES: [(u64, u32); 4] = [(MIB, 8), (2 * MIB, 8), (4 * MIB, 8), (4 * MIB, 16)];

/// fio in every shape against flea's reader, and what a small footprint does.
#[derive(Debug)]
pub struct Raw {
    /// The file.
    pub path: PathBuf,
    /// Where the reader goes on.
    pub cursor: Cursor,
}

impl Case for Raw {
    fn path(&self) -> &Path {
        &self.path
    }

    fn report(&self) -> CaseReport {
        CaseReport {
            plot: Some(RATE.name.to_owned()),
            ..blank(
                "raw",
                "The drive: fio and flea's reader",
                "O_DIRECT sequential reads through io_uring. fio reads again and again into request x depth bytes of memory; \
                 where that is little it stays in the processor's cache, which streaming cannot have: the last rows show the \
                 same reader with the same requests into more and more memory.",
                &self.path,
            )
        }
    }

    fn round(&mut self, lab: &mut Lab<'_>) -> Result<Vec<Run>> {
        let mut runs = Vec::new();
        for shape in SHAPES.into_iter().chain(LARGE_SHAPES) {
            let line = lab.fio.line(&self.path, shape, lab.stop).map(|line| {
                BTreeMap::from([
                    ("rate", line.gb_per_second),
                    ("cpu", line.cpu_seconds_per_gb),
                ])
            });
            let memory = HumanBytes(shape.footprint_bytes());
            runs.push(Run::of(format!("fio {} ({memory})", shape.label()), line)?);
        }
        let span = Duration::from_secs_f64(lab.options.fio_seconds);
        for (request_bytes, depth) in READER_SHAPES {
            let shape = Shape {
                request_bytes,
                depth,
            };
            let label = format!(
                "flea's reader {} ({})",
                shape.label(),
                HumanBytes(FOOTPRINT_BYTES)
            );
            runs.push(Run::of(label, self.reader(shape, FOOTPRINT_BYTES, span))?);
        }
        for footprint_bytes in FOOTPRINTS {
            let label = format!(
                "footprint {}: flea's reader {}",
                HumanBytes(footprint_bytes),
                FOOTPRINT_SHAPE.label()
            );
            runs.push(Run::of(
                label,
                self.reader(FOOTPRINT_SHAPE, footprint_bytes, span),
            )?);
        }
        Ok(runs)
    }

    fn judge(&self, runs: &[Run], line: &RoundLine, book: &mut Book) {
        for run in runs {
            let (Some(rate), Some(cpu)) = (run.get("rate"), run.get("cpu")) else {
                continue;
            };
            book.add(&run.label, RATE, rate);
            book.add(&run.label, CPU, cpu);
            if !run.label.starts_with("fio") {
                book.add(&run.label, OF_BEST, rate / line.best.gb_per_second);
                book.add(&run.label, OF_LARGE, rate / line.large.gb_per_second);
            }
        }
    }
}

impl Raw {
    fn reader(
        &mut self,
        shape: Shape,
        footprint_bytes: u64,
        span: Duration,
    ) -> Result<BTreeMap<&'static str, f64>> {
        let files: Arc<[ShardFile]> = Arc::new([ShardFile::open(&self.path)?]);
        let options = ReaderOptions {
            kind: ReaderKind::Auto,
            request_bytes: u32::try_from(shape.request_bytes).unwrap_or(u32::MAX),
            depth: shape.depth,
            page_bytes: PAGE_2M,
            ..ReaderOptions::default()
        };
        let memory = AlignedMemory::new(footprint_bytes, PAGE_2M)?;
        let cpu_before = own_cpu_seconds();
        let (swept, _) = sweep(&files, &options, memory, &mut self.cursor, span)?;
        let gb = swept.bytes as f64 / 1e9;
        Ok(BTreeMap::from([
            ("rate", gb / swept.wall.as_secs_f64()),
            ("cpu", (own_cpu_seconds() - cpu_before) / gb),
        ]))
    }
}

fn own_cpu_seconds() -> f64 {
    getrusage(UsageWho::RUSAGE_SELF).map_or(0.0, |usage| {
        (usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e6
    })
}

/// The stream without compute, at several budgets.
#[derive(Debug)]
pub struct Engine {
    /// The model.
    pub path: PathBuf,
    /// Weights in memory, percent of the model.
    pub budgets: Vec<u32>,
}

/// Enough passes that the rate is that of streaming: this many times the model, at most so many passes.
const ENGINE_MODELS: f64 = 1.0;
const ENGINE_PASSES_MAX: f64 = 12.0;

impl Case for Engine {
    fn path(&self) -> &Path {
        &self.path
    }

    fn report(&self) -> CaseReport {
        CaseReport {
            plot: Some(RATE.name.to_owned()),
            ..blank(
                "engine",
                "The engine: streaming without compute",
                "`flea bench stream` at several budgets: all passes but the first. The first also reads what stays resident, \
                 and pays for its memory. Layer load: from aiming a slot to the last byte. Drive busy: part of the time with \
                 at least one read in flight.",
                &self.path,
            )
        }
    }

    fn round(&mut self, lab: &mut Lab<'_>) -> Result<Vec<Run>> {
        lab.between_lines(&self.budgets, |lab, &budget| {
            Run::of(format!("flea, {budget} %"), self.stream(lab, budget))
        })
    }

    fn judge(&self, runs: &[Run], line: &RoundLine, book: &mut Book) {
        for run in runs {
            let line = run.line_or(line);
            let mut add = |spec: Spec, value: Option<f64>| {
                if let Some(value) = value {
                    book.add(&run.label, spec, value);
                }
            };
            let (rate, cpu) = (run.get("rate"), run.get("cpu"));
            add(RATE, rate);
            add(Spec::figure("first pass GB/s", 3), run.get("first_rate"));
            add(
                OF_BEST.goal(Goal::AtLeast(0.97)),
                rate.map(|rate| rate / line.best.gb_per_second),
            );
            add(
                OF_LARGE.goal(Goal::AtLeast(0.97)),
                rate.map(|rate| rate / line.large.gb_per_second),
            );
            add(CPU, cpu);
            add(
                CPU_OF_FIO.goal(Goal::AtMost(1.2)),
                cpu.map(|cpu| cpu / line.large.cpu_seconds_per_gb),
            );
            add(Spec::figure("drive busy %", 1), run.get("busy"));
            add(Spec::figure("load mean ms", 1), run.get("load_mean"));
            add(Spec::figure("P50", 1), run.get("load_p50"));
            add(Spec::figure("P95", 1), run.get("load_p95"));
            add(Spec::figure("P99", 1), run.get("load_p99"));
            add(
                Spec::figure("peak over plan", 3).goal(Goal::AtMost(1.02)),
                run.get("peak"),
            );
        }
    }
}

impl Engine {
    fn stream(&self, lab: &Lab<'_>, budget: u32) -> Result<BTreeMap<&'static str, f64>> {
        cached::make_cold(&self.path)?;
        let streamed_share = (100.0 - f64::from(budget)).max(1.0) / 100.0;
        let passes = 1.0
            + (ENGINE_MODELS / streamed_share)
                .ceil()
                .min(ENGINE_PASSES_MAX);
        let mut command = lab.flea();
        command.args(["bench", "stream"]).arg(&self.path);
        command.args([
            "--memory",
            &format!("{budget}%"),
            "--passes",
            &format!("{passes}"),
        ]);
        let (answer, _) = lab.flea_json(&mut command)?;
        let loads = &answer["layer_load_ms"];
        let (first, steady) = passes_of(&answer)?;
        let mut figures = BTreeMap::from([
            ("first_rate", number(first, "gb_per_second")?),
            ("rate", steady.gb / steady.seconds),
            ("cpu", steady.cpu_seconds / steady.gb),
            ("busy", 100.0 * steady.read_seconds / steady.seconds),
            (
                "peak",
                number(&answer, "peak_memory_bytes")? / number(&answer, "total_bytes")?,
            ),
        ]);
        for (name, key) in [
            ("load_mean", "mean"),
            ("load_p50", "p50"),
            ("load_p95", "p95"),
            ("load_p99", "p99"),
        ] {
            if let Some(value) = loads[key].as_f64() {
                figures.insert(name, value);
            }
        }
        Ok(figures)
    }
}

/// What several passes come to.
#[derive(Debug, Clone, Copy, Default)]
struct Passes {
    gb: f64,
    seconds: f64,
    cpu_seconds: f64,
    read_seconds: f64,
}

/// The first pass of `flea bench stream`, and the others together.
fn passes_of(answer: &serde_json::Value) -> Result<(&serde_json::Value, Passes)> {
    let passes = answer["passes"].as_array().map_or(&[][..], Vec::as_slice);
    let [first, others @ ..] = passes else {
        return Err(Error::new(
            ErrorKind::Internal,
            "flea's answer has no passes",
        ));
    };
    let mut sum = Passes::default();
    for pass in others {
        sum.gb += number(pass, "bytes_read")? / 1e9;
        sum.seconds += number(pass, "seconds")?;
        sum.cpu_seconds += number(pass, "cpu_seconds")?;
        sum.read_seconds += number(pass, "read_seconds")?;
    }
    Ok((first, sum))
}
