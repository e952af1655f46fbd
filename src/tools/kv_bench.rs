//! Measures KV codecs: quality and stored bits on made-up or given vectors, speed on one core, and what each does with
//! the bits of another.
//!
//! Stored bits are all bytes of a frame. A calibration is bytes too: it is shown apart and spread over the vectors that
//! were coded with it, which are never those it was made from.

use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::kv::quality::{Quality, compare};
use crate::kv::{Choice, Codec, Coder, Spec, Values};

/// How long decoding is repeated; the best time counts, as others use the machine too.
const DECODE_SPAN: Duration = Duration::from_millis(200);
/// A value is counted as the two bytes of the bf16 that a cache would hold without a codec.
const PLAIN_BYTES: f64 = 2.0;

/// One codec on one set of vectors.
#[derive(Debug, Clone)]
pub struct Cell {
    /// What was asked for.
    pub choice: Choice,
    /// What `spectral` fell back to, and the bits it would have gained.
    pub fallback: Option<(Choice, f64)>,
    /// How far the decoded vectors are off.
    pub quality: Quality,
    /// All bytes of the frame, in bits per value.
    pub stored_bits: f64,
    /// The calibration spread over the coded vectors, in bits per value.
    pub side_bits: f64,
    /// Gigabytes of bf16 values encoded per second on one core.
    pub encode_gb_per_second: f64,
    /// Gigabytes of bf16 values decoded per second on one core.
    pub decode_gb_per_second: f64,
}

impl Cell {
    /// Bits per value with everything.
    #[must_use]
    pub fn total_bits(&self) -> f64 {
        self.stored_bits + self.side_bits
    }

    /// Error over the rate-distortion bound of a Gaussian at the stored bits, `4^-bits`.
    #[must_use]
    pub fn over_bound(&self) -> f64 {
        self.quality.nmse * 4f64.powf(self.total_bits())
    }

    /// Bytes of f16 or bf16 over stored bytes.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        16.0 / self.total_bits()
    }
}

/// The coder of a choice, the vectors it is measured on, and the bytes of its calibration. `spectral` learns from the
/// first half and is measured on the second.
fn prepare(choice: Choice, values: &[f32], dim: usize) -> Result<(Coder, &[f32], usize)> {
    let spec = Spec::new(choice.codec, choice.rate, dim)?;
    if choice.codec != Codec::Spectral {
        return Ok((Coder::new(spec)?, values, 0));
    }
    let (sample, coded) = values.split_at(values.len() / dim / 2 * dim);
    let (coder, calibration) = Coder::calibrated(spec, sample)?;
    let side_bytes = calibration.map_or(0, |calibration| calibration.to_bytes().len());
    Ok((coder, coded, side_bytes))
}

/// Measures a codec on vectors of `dim` values.
///
/// # Errors
/// `Invalid`: no whole number of vectors, none at all, or a codec that cannot code them.
pub fn measure(choice: Choice, values: &[f32], dim: usize) -> Result<Cell> {
    let (coder, coded, side_bytes) = prepare(choice, values, dim)?;
    if coded.is_empty() {
        return Err(Error::new(
            ErrorKind::Invalid,
            "there are no vectors to measure on",
        ));
    }
    let started = Instant::now();
    let frame = coder.encode(Values::F32(coded))?;
    let encode_seconds = started.elapsed().as_secs_f64();
    let mut back = vec![0.0; coded.len()];
    let mut decode_seconds = f64::INFINITY;
    let span = Instant::now();
    while span.elapsed() < DECODE_SPAN {
        let started = Instant::now();
        coder.decode_into(&frame, &mut back)?;
        decode_seconds = decode_seconds.min(started.elapsed().as_secs_f64());
    }
    let count = coded.len() as f64;
    let speed = |seconds: f64| count * PLAIN_BYTES / seconds / 1e9;
    let used = Choice {
        codec: coder.spec().codec,
        rate: coder.spec().rate,
    };
    Ok(Cell {
        choice,
        fallback: coder.fallback().map(|fallback| (used, fallback.gain_bits)),
        quality: compare(coded, &back, dim),
        stored_bits: frame.len() as f64 * 8.0 / count,
        side_bits: side_bytes as f64 * 8.0 / count,
        encode_gb_per_second: speed(encode_seconds),
        decode_gb_per_second: speed(decode_seconds),
    })
}

/// A codec beside another that stores more.
#[derive(Debug, Clone)]
pub struct Gain<'a> {
    /// The one that is compared with.
    pub base: &'a Cell,
    /// The best of its codec that stores no more.
    pub cell: &'a Cell,
}

impl Gain<'_> {
    /// How many times less error.
    #[must_use]
    pub fn times(&self) -> f64 {
        self.base.quality.nmse / self.cell.quality.nmse
    }
}

/// For each cell of `dh013` the best cell of each other codec that stores no more bits: the iso-bit table.
#[must_use]
pub fn iso_bit(cells: &[Cell]) -> Vec<Gain<'_>> {
    let mut gains = Vec::new();
    for base in cells
        .iter()
        .filter(|cell| cell.choice.codec == Codec::Dh013)
    {
        for codec in Codec::ALL
            .into_iter()
            .filter(|codec| *codec != Codec::Dh013)
        {
            let best = cells
                .iter()
                .filter(|cell| cell.choice.codec == codec && cell.total_bits() <= base.total_bits())
                .min_by(|a, b| a.quality.nmse.total_cmp(&b.quality.nmse));
            gains.extend(best.map(|cell| Gain { base, cell }));
        }
    }
    gains
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::synth::Distribution;

    fn cell(choice: &str, values: &[f32]) -> Cell {
        measure(choice.parse().expect("a choice"), values, 64).expect("measures")
    }

    #[test]
    fn the_iso_bit_table_never_gives_more_bits() {
        let values = Distribution::HeavyTail.sample(256, 64, 0);
        let cells: Vec<Cell> = ["dh013:2", "dh013:3", "tq:2", "tq:3", "tq:4", "q4_0"]
            .map(|name| cell(name, &values))
            .into();
        let gains = iso_bit(&cells);
        let names: Vec<String> = gains
            .iter()
            .map(|gain| format!("{} {}", gain.base.choice, gain.cell.choice))
            .collect();
        // q4_0 has 4.5 bits and a head of its own, so it just does not fit beside dh013:3; tq:4 does.
        assert_eq!(names, ["dh013:2 tq:3", "dh013:3 q4_0", "dh013:3 tq:4"]);
        assert!(
            gains
                .iter()
                .all(|gain| gain.cell.total_bits() <= gain.base.total_bits())
        );
        assert!(gains[0].times() > 5.0);
    }

    #[test]
    fn a_calibration_counts() {
        let values = Distribution::Spectral.sample(1024, 64, 0);
        let found = cell("spectral:3", &values);
        let bytes = 12.0 + 8.0 * 64.0 + 2.0 * 64.0 * 64.0;
        assert!((found.side_bits - bytes * 8.0 / (512.0 * 64.0)).abs() < 1e-9);
        assert!(found.fallback.is_none() && found.total_bits() > 5.0);
        let flat = cell("spectral:3", &Distribution::Gaussian.sample(1024, 64, 0));
        assert_eq!(
            (flat.fallback.expect("tq").0.codec, flat.side_bits),
            (Codec::Tq, 0.0)
        );
    }
}
