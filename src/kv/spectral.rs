//! `spectral`: vectors along the directions of a calibration, with more bits where they vary more.
//!
//! The bits of a vector are exactly rate x dim, given out one by one to the direction whose error they lower most; a
//! direction without a bit costs nothing. Each direction has the Lloyd-Max levels of a Gaussian of its deviation.
//! Record: indices from the strongest direction on, then the scale that fits the vector best (2 bytes).

use super::bits::{Reader, Writer};
use super::calibration::Calibration;
use super::lloyd::{BITS_MAX, Quantiser};
use super::math::Density;
use super::scalar::Spare;
use super::scale;
use super::vector::{dot, length};

/// Sizes that the encoder tries for a vector, relative to the calibration's; 0 stands for the vector's own.
const TRIALS: [f32; 4] = [1.0, 0.0, 0.7, 1.4];

/// The codec for one calibration and rate.
#[derive(Debug, Clone)]
pub struct Spectral {
    calibration: Calibration,
    /// Its transpose, to decode with.
    transposed: Vec<f32>,
    /// Bits of each direction.
    widths: Vec<u8>,
    quantisers: Vec<Quantiser>,
    budget_bits: usize,
    total_variance: f32,
}

impl Spectral {
    /// With `bits` from 1 to 8 per value on average.
    #[must_use]
    pub fn new(calibration: &Calibration, bits: u32) -> Self {
        let dim = calibration.dim;
        let gaussian = Density::gaussian();
        let quantisers: Vec<Quantiser> = (1..=BITS_MAX)
            .map(|bits| Quantiser::new(&gaussian, bits))
            .collect();
        let budget_bits = bits as usize * dim;
        let variances: Vec<f64> = calibration
            .deviations
            .iter()
            .map(|d| f64::from(*d) * f64::from(*d))
            .collect();
        let mut transposed = vec![0.0; dim * dim];
        for (row, direction) in calibration.basis.chunks_exact(dim).enumerate() {
            for (column, value) in direction.iter().enumerate() {
                transposed[column * dim + row] = *value;
            }
        }
        Self {
            widths: share_out(&variances, budget_bits, &quantisers),
            total_variance: variances.iter().sum::<f64>() as f32,
            calibration: calibration.clone(),
            transposed,
            quantisers,
            budget_bits,
        }
    }

    /// Bytes of a record.
    #[must_use]
    pub fn record_bytes(&self) -> usize {
        self.budget_bits.div_ceil(8) + 2
    }

    /// Bits of each direction: their sum is the budget.
    #[must_use]
    pub fn widths(&self) -> &[u8] {
        &self.widths
    }

    /// Levels for `w` (in standard deviations) seen at `1 / size`: the fit, and how much of the energy it explains.
    fn attempt(&self, w: &[f32], size: f32, indices: &mut [u8]) -> (f32, f32) {
        let (mut along, mut own) = (0.0, 0.0);
        for (place, width) in self.widths.iter().enumerate() {
            if *width == 0 {
                continue;
            }
            let quantiser = &self.quantisers[*width as usize - 1];
            indices[place] = quantiser.index(w[place] / size);
            let level = quantiser.value(indices[place]);
            let weight = self.calibration.deviations[place] * self.calibration.deviations[place];
            along += weight * w[place] * level;
            own += weight * level * level;
        }
        if own > 0.0 {
            (along / own, along * along / own)
        } else {
            (0.0, 0.0)
        }
    }

    /// Encodes `x`, which is overwritten; false where it cannot be held.
    pub fn encode(&self, x: &mut [f32], record: &mut [u8], spare: &mut Spare) -> bool {
        for (value, mean) in x.iter_mut().zip(&self.calibration.mean) {
            *value -= mean;
        }
        let Some(norm) = length(x) else { return false };
        let dim = self.calibration.dim;
        let w = &mut spare.values;
        for ((w, direction), deviation) in w
            .iter_mut()
            .zip(self.calibration.basis.chunks_exact(dim))
            .zip(&self.calibration.deviations)
        {
            *w = if *deviation > 0.0 {
                dot(direction, x) / deviation
            } else {
                0.0
            };
        }
        let own = norm / self.total_variance.max(f32::MIN_POSITIVE).sqrt();
        let mut best = (0.0, -1.0);
        let mut trial = vec![0u8; dim];
        for size in TRIALS.map(|size| if size == 0.0 { own } else { size }) {
            if !(size.is_finite() && size > 0.0) {
                continue;
            }
            let (fit, explained) = self.attempt(w, size, &mut trial);
            if explained > best.1 {
                best = (fit, explained);
                spare.indices.copy_from_slice(&trial);
            }
        }
        let Some(code) = scale::encode(best.0) else {
            return false;
        };
        let (string, tail) = record.split_at_mut(self.budget_bits.div_ceil(8));
        let mut writer = Writer::new(string);
        for (index, width) in spare.indices.iter().zip(&self.widths) {
            if *width > 0 {
                writer.put(u32::from(*index), u32::from(*width));
            }
        }
        writer.finish();
        tail.copy_from_slice(&code.to_le_bytes());
        true
    }

    /// Decodes a record.
    pub fn decode(&self, record: &[u8], out: &mut [f32], spare: &mut Spare) {
        let (string, tail) = record.split_at(self.budget_bits.div_ceil(8));
        let scale = scale::decode(u16::from_le_bytes([tail[0], tail[1]]));
        let mut reader = Reader::new(string);
        let mut used = 0;
        for (place, width) in self.widths.iter().enumerate() {
            spare.values[place] = 0.0;
            if *width > 0 {
                let index = reader.take(u32::from(*width)) as u8;
                let level = self.quantisers[*width as usize - 1].value(index);
                spare.values[place] = level * scale * self.calibration.deviations[place];
                used = place + 1;
            }
        }
        let dim = self.calibration.dim;
        let rows = self.transposed.chunks_exact(dim);
        for ((value, row), mean) in out.iter_mut().zip(rows).zip(&self.calibration.mean) {
            *value = mean + dot(&row[..used], &spare.values[..used]);
        }
    }
}

/// Gives out `budget` bits, each to the direction whose error it lowers most. Errors fall ever more slowly with bits, so
/// this is the best that whole bits can do.
fn share_out(variances: &[f64], budget: usize, quantisers: &[Quantiser]) -> Vec<u8> {
    let mut widths = vec![0u8; variances.len()];
    let error = |width: u8| {
        if width == 0 {
            1.0
        } else {
            quantisers[width as usize - 1].error
        }
    };
    for _ in 0..budget {
        let gain = |place: &usize| {
            let width = widths[*place];
            if u32::from(width) == BITS_MAX {
                -1.0
            } else {
                variances[*place] * (error(width) - error(width + 1))
            }
        };
        let best = (0..variances.len()).max_by(|a, b| gain(a).total_cmp(&gain(b)).then(b.cmp(a)));
        if let Some(best) = best {
            widths[best] += 1;
        }
    }
    widths
}
