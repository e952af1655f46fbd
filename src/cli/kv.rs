//! `flea kv bench`, `compare` and `gate`: what the codecs for keys and values do to vectors, and how fast.

use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args as ClapArgs, Subcommand};
use serde_json::{Value, json};

#[cfg(feature = "run")]
mod gate;

use super::table::{Align, Table};
use crate::error::{Error, ErrorKind, Result};
use crate::kv::synth::Distribution;
use crate::kv::{Choice, Codec, Rate};
use crate::tools::kv_bench::{Cell, Gain, iso_bit, measure};
use crate::tools::svg::{Plot, Series};

/// Measure the codecs for keys and values
#[derive(Debug, ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Every codec at every rate on made-up vectors, against the rate-distortion bound
    Bench(BenchArgs),
    /// Codecs side by side on vectors of your own
    Compare(CompareArgs),
    /// What codecs do to a model's answers: divergence, top-1 agreement
    #[cfg(feature = "run")]
    Gate(gate::GateArgs),
}

const BENCH_HELP: &str = "\
Examples:
  flea kv bench
  flea kv bench --dim 256 --distribution gaussian --svg plots
  flea kv bench --codec tq:4 --codec tcq:3 --json

bits counts every stored byte: heads, scales, verbatim vectors, and a calibration spread over the vectors coded with it.
x bound is the error over 4^-bits, the least that any code of a Gaussian can have. GB/s are of bf16 values, on one core.";

/// What `flea kv bench` takes.
#[derive(Debug, ClapArgs)]
#[command(after_help = BENCH_HELP)]
pub struct BenchArgs {
    /// Values of a vector: the head size of the model
    #[arg(long, value_name = "N", default_value = "128", value_parser = super::count)]
    dim: u32,

    /// Tokens, of 4 heads each
    #[arg(long, value_name = "N", default_value = "2048", value_parser = super::count)]
    tokens: u32,

    /// What the vectors look like [default: all three]
    #[arg(long, value_name = "NAME", value_parser = distribution_parser())]
    distribution: Option<Distribution>,

    /// Only this codec; may be given again
    #[arg(long = "codec", value_name = "CODEC")]
    codecs: Vec<Choice>,

    /// Seed of the vectors
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u32,

    /// Write plots there: quality against bits for each distribution, and speed
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const COMPARE_HELP: &str = "\
Examples:
  flea kv compare keys.bin --type f16 --dim 128 q8_0 tq:4 tcq:3
  flea kv compare keys.bin --type f32 --dim 64 --json tq:3 spectral:3

FILE holds nothing but values, little-endian, one vector after the other (numpy: array.tofile).";

/// What `flea kv compare` takes.
#[derive(Debug, ClapArgs)]
#[command(after_help = COMPARE_HELP)]
pub struct CompareArgs {
    /// Values, little-endian, vector after vector
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Codecs: q8_0, q4_0, tq:1-8, tq-ec:1-8 (also 3.5), tcq:1-4, rotor:1-8, spectral:1-8, dh013:2-8
    #[arg(value_name = "CODEC", required = true)]
    codecs: Vec<Choice>,

    /// Values of a vector
    #[arg(long, value_name = "N", value_parser = super::count)]
    dim: u32,

    /// Type of the values
    #[arg(long = "type", value_name = "TYPE", default_value = "f32", value_parser = PossibleValuesParser::new(["f32", "f16", "bf16"]))]
    kind: String,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn distribution_parser() -> impl TypedValueParser<Value = Distribution> {
    PossibleValuesParser::new(Distribution::ALL.map(Distribution::name)).try_map(|name| {
        Distribution::ALL
            .into_iter()
            .find(|distribution| distribution.name() == name)
            .ok_or("no such distribution")
    })
}

/// Runs the subcommand.
///
/// # Errors
/// Bad arguments, files that cannot be read or written.
pub fn command(args: &Args) -> Result<()> {
    match &args.what {
        What::Bench(args) => bench(args),
        What::Compare(args) => compare(args),
        #[cfg(feature = "run")]
        What::Gate(args) => gate::command(args),
    }
}

/// Every codec at the rates that people use.
fn every_choice() -> Vec<Choice> {
    let mut choices = Vec::new();
    for codec in Codec::ALL {
        let rates: &[u16] = match codec {
            Codec::Q8_0 => &[8],
            Codec::Q4_0 => &[4],
            Codec::Tcq => &[1, 2, 3, 4],
            Codec::Dh013 => &[2, 3, 4, 6, 8],
            Codec::Tq | Codec::Rotor | Codec::TqEc | Codec::Spectral => &[1, 2, 3, 4, 5, 6, 8],
        };
        choices.extend(rates.iter().map(|bits| Choice {
            codec,
            rate: Rate::bits(*bits),
        }));
    }
    choices
}

/// What `flea kv bench` measured: the cells of every distribution.
pub(super) struct Benched {
    dim: usize,
    count: usize,
    seed: u32,
    all: Vec<(Distribution, Vec<Cell>)>,
}

/// Measures; `tell` hears before every codec which it is, and may end it.
///
/// # Errors
/// `Invalid` for vectors that cannot be; what the codecs and `tell` say.
pub(super) fn measure_bench(
    args: &BenchArgs,
    tell: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Benched> {
    let dim = args.dim as usize;
    let count = args.tokens as usize * 4;
    let total = count.saturating_mul(dim);
    if !total.is_multiple_of(16) || total > 1 << 28 {
        let message = format!(
            "{} tokens of 4 heads of {dim} values: their number must be a multiple of 16, and at most 2^28",
            args.tokens
        );
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    let choices = if args.codecs.is_empty() {
        every_choice()
    } else {
        args.codecs.clone()
    };
    let mut all = Vec::new();
    for distribution in Distribution::ALL {
        if args.distribution.is_some_and(|only| only != distribution) {
            continue;
        }
        let values = distribution.sample(count, dim, args.seed);
        let what = distribution.name();
        all.push((
            distribution,
            measure_each(&choices, &values, dim, what, tell)?,
        ));
    }
    let seed = args.seed;
    Ok(Benched {
        dim,
        count,
        seed,
        all,
    })
}

fn measure_each(
    choices: &[Choice],
    values: &[f32],
    dim: usize,
    what: &str,
    tell: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Vec<Cell>> {
    let one = |choice: &Choice| {
        tell(&format!("{choice} on {what}"))?;
        measure(*choice, values, dim)
    };
    choices.iter().map(one).collect()
}

impl Benched {
    /// What `--json` prints.
    pub(super) fn to_json(&self) -> Value {
        let of_distribution = |(distribution, cells): &(Distribution, Vec<Cell>)| {
            json!({
                "distribution": distribution.name(),
                "cells": cells.iter().map(cell_json).collect::<Vec<_>>(),
                "iso_bit": iso_bit(cells).iter().map(gain_json).collect::<Vec<_>>(),
            })
        };
        let list: Vec<Value> = self.all.iter().map(of_distribution).collect();
        json!({
            "dim": self.dim, "vectors": self.count, "seed": self.seed, "distributions": list,
        })
    }
}

fn bench(args: &BenchArgs) -> Result<()> {
    let benched = measure_bench(args, &mut |_| Ok(()))?;
    if let Some(folder) = &args.svg {
        write_plots(folder, benched.dim, &benched.all)?;
    }
    if args.json {
        return super::print_json(&benched.to_json());
    }
    let (dim, count) = (benched.dim, benched.count);
    let mut text = String::new();
    for (distribution, cells) in &benched.all {
        text += &format!(
            "{}: {count} vectors of {dim} values\n\n{}\n",
            distribution.name(),
            cell_table(cells)
        );
        let gains = iso_bit(cells);
        if !gains.is_empty() {
            text += &format!("From no more bits than dh013:\n\n{}\n", gain_table(&gains));
        }
    }
    super::print(&text)
}

/// What `flea kv compare` measured.
pub(super) struct Compared<'a> {
    args: &'a CompareArgs,
    vectors: usize,
    cells: Vec<Cell>,
}

/// Measures; `tell` hears before every codec which it is, and may end it.
///
/// # Errors
/// `Invalid` for values that are no vectors; what the file, the codecs and `tell` say.
pub(super) fn measure_compare<'a>(
    args: &'a CompareArgs,
    tell: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Compared<'a>> {
    let dim = args.dim as usize;
    let values = read_values(&args.file, &args.kind)?;
    if values.is_empty() || !values.len().is_multiple_of(dim) {
        let message = format!(
            "{}: {} values are no vectors of {dim}",
            args.file.display(),
            values.len()
        );
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    let what = args.file.display().to_string();
    Ok(Compared {
        args,
        vectors: values.len() / dim,
        cells: measure_each(&args.codecs, &values, dim, &what, tell)?,
    })
}

impl Compared<'_> {
    /// What `--json` prints.
    pub(super) fn to_json(&self) -> Value {
        json!({
            "file": self.args.file, "dim": self.args.dim, "vectors": self.vectors,
            "cells": self.cells.iter().map(cell_json).collect::<Vec<_>>(),
            "iso_bit": iso_bit(&self.cells).iter().map(gain_json).collect::<Vec<_>>(),
        })
    }
}

fn compare(args: &CompareArgs) -> Result<()> {
    let compared = measure_compare(args, &mut |_| Ok(()))?;
    if args.json {
        return super::print_json(&compared.to_json());
    }
    super::print(&format!(
        "{}: {} vectors of {} values\n\n{}",
        args.file.display(),
        compared.vectors,
        args.dim,
        cell_table(&compared.cells)
    ))
}

fn read_values(path: &Path, kind: &str) -> Result<Vec<f32>> {
    let bytes = std::fs::read(path).map_err(|error| Error::from_io(&error, path.display()))?;
    let width = if kind == "f32" { 4 } else { 2 };
    if !bytes.len().is_multiple_of(width) {
        let message = format!(
            "{}: {} bytes are not values of {width} bytes",
            path.display(),
            bytes.len()
        );
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    Ok(bytes
        .chunks_exact(width)
        .map(|b| match kind {
            "f32" => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            "f16" => half::f16::from_le_bytes([b[0], b[1]]).to_f32(),
            _ => half::bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        })
        .collect())
}

fn cell_json(cell: &Cell) -> Value {
    json!({
        "codec": cell.choice.to_string(),
        "fallback": cell.fallback.map(|(choice, gain)| json!({"codec": choice.to_string(), "gain_bits": gain})),
        "stored_bits": cell.stored_bits,
        "side_bits": cell.side_bits,
        "ratio_to_16_bits": cell.ratio(),
        "mse": cell.quality.mse,
        "nmse": cell.quality.nmse,
        "nmse_global": cell.quality.nmse_global,
        "cosine": cell.quality.cosine,
        "norm_ratio": cell.quality.norm_ratio,
        "over_bound": cell.over_bound(),
        "encode_gb_per_second": cell.encode_gb_per_second,
        "decode_gb_per_second": cell.decode_gb_per_second,
    })
}

fn gain_json(gain: &Gain<'_>) -> Value {
    json!({
        "base": gain.base.choice.to_string(), "base_bits": gain.base.total_bits(), "base_nmse": gain.base.quality.nmse,
        "codec": gain.cell.choice.to_string(), "bits": gain.cell.total_bits(), "nmse": gain.cell.quality.nmse,
        "times_less_error": gain.times(),
    })
}

fn cell_table(cells: &[Cell]) -> String {
    let right = Align::Right;
    let mut table = Table::new(&[
        ("codec", Align::Left),
        ("bits", right),
        ("of 16", right),
        ("nmse", right),
        ("cosine", right),
        ("x bound", right),
        ("encode GB/s", right),
        ("decode GB/s", right),
        ("", Align::Left),
    ]);
    for cell in cells {
        let note = match cell.fallback {
            Some((choice, gain)) => format!("is {choice}: a basis gains {gain:.2} bits"),
            None if cell.side_bits > 0.0 => {
                format!("{:.3} of the bits are calibration", cell.side_bits)
            }
            None => String::new(),
        };
        table.row([
            cell.choice.to_string(),
            format!("{:.3}", cell.total_bits()),
            format!("{:.2}x", cell.ratio()),
            format!("{:.3e}", cell.quality.nmse),
            format!("{:.5}", cell.quality.cosine),
            format!("{:.3}", cell.over_bound()),
            format!("{:.4}", cell.encode_gb_per_second),
            format!("{:.3}", cell.decode_gb_per_second),
            note,
        ]);
    }
    table.to_string()
}

fn gain_table(gains: &[Gain<'_>]) -> String {
    let right = Align::Right;
    let mut table = Table::new(&[
        ("baseline", Align::Left),
        ("bits", right),
        ("nmse", right),
        ("codec", Align::Left),
        ("bits", right),
        ("nmse", right),
        ("less error", right),
    ]);
    for gain in gains {
        table.row([
            gain.base.choice.to_string(),
            format!("{:.3}", gain.base.total_bits()),
            format!("{:.3e}", gain.base.quality.nmse),
            gain.cell.choice.to_string(),
            format!("{:.3}", gain.cell.total_bits()),
            format!("{:.3e}", gain.cell.quality.nmse),
            format!("{:.2}x", gain.times()),
        ]);
    }
    table.to_string()
}

/// The cells of each codec in the order of their bits.
fn by_codec(cells: &[Cell], y: impl Fn(&Cell) -> f64) -> Vec<Series> {
    let mut series = Vec::new();
    for codec in Codec::ALL {
        let mut points: Vec<(f64, f64)> = cells
            .iter()
            .filter(|cell| cell.choice.codec == codec && cell.fallback.is_none())
            .map(|cell| (cell.total_bits(), y(cell)))
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        if !points.is_empty() {
            series.push(Series {
                name: codec.name().to_owned(),
                points,
                bound: false,
            });
        }
    }
    series
}

fn write_plots(folder: &Path, dim: usize, all: &[(Distribution, Vec<Cell>)]) -> Result<()> {
    let write = |name: String, plot: &Plot| {
        let path = folder.join(name);
        std::fs::write(&path, plot.to_svg()?)
            .map_err(|error| Error::from_io(&error, path.display()))
    };
    std::fs::create_dir_all(folder).map_err(|error| Error::from_io(&error, folder.display()))?;
    for (distribution, cells) in all {
        let mut series = by_codec(cells, |cell| -10.0 * cell.quality.nmse.log10());
        let most = cells.iter().map(Cell::total_bits).fold(1.0, f64::max);
        let bound = |bits: f64| (bits, 20.0 * 2f64.log10() * bits);
        series.push(Series {
            name: "Gaussian bound".to_owned(),
            points: vec![bound(1.0), bound(most)],
            bound: true,
        });
        let plot = Plot {
            title: format!("KV codecs, {}, vectors of {dim}", distribution.name()),
            x: "stored bits per value".to_owned(),
            y: "signal to error, dB".to_owned(),
            series,
        };
        write(
            format!("kv-quality-{}-{dim}.svg", distribution.name()),
            &plot,
        )?;
    }
    if let Some((distribution, cells)) = all.first() {
        let plot = Plot {
            title: format!(
                "KV codecs, decoding, {}, vectors of {dim}",
                distribution.name()
            ),
            x: "stored bits per value".to_owned(),
            y: "GB/s of bf16 values, one core".to_owned(),
            series: by_codec(cells, |cell| cell.decode_gb_per_second),
        };
        write(format!("kv-speed-{dim}.svg"), &plot)?;
    }
    Ok(())
}
