//! Scalar quantisers for rotated coordinates: Lloyd-Max (a fixed number of levels) as tables for both directions.
//!
//! Invariants: levels are symmetric about 0 and ascend; the same table on every machine (see `math`).

use super::bits::unpack;
use super::lookup::{Lookup, Pairs};
use super::math::Density;

/// Bits of a level's index that a table may have.
pub const BITS_MAX: u32 = 8;
/// Rounds of Lloyd's iteration: from companded places the distortion of 256 levels is then within 0.1 % of the optimum.
const ROUNDS: usize = 3000;
/// The range and resolution of the table that finds a level: finer than half the smallest distance of two levels.
const FINDER_REACH: f32 = 8.0;
const FINDER_CELLS: usize = 4096;

/// The levels of the best quantiser with `2^bits` of them, ascending, and its mean squared error.
#[must_use]
pub fn levels(density: &Density, bits: u32) -> (Vec<f64>, f64) {
    let half = 1usize << bits.clamp(1, BITS_MAX) >> 1;
    let mut centres = density.companded(half);
    for _ in 0..ROUNDS {
        let mut moved = 0.0f64;
        let mut low = 0.0;
        for index in 0..half {
            let high = upper(&centres, index);
            let centre = density.mean(low, high);
            moved = moved.max((centre - centres[index]).abs());
            centres[index] = centre;
            low = high;
        }
        if moved < 1e-10 {
            break;
        }
    }
    let mut error = 0.0;
    let mut low = 0.0;
    for index in 0..half {
        let high = upper(&centres, index);
        let [mass, first, second] = density.moments(low, high);
        error += second - 2.0 * centres[index] * first + centres[index] * centres[index] * mass;
        low = high;
    }
    let mut all: Vec<f64> = centres.iter().rev().map(|centre| -centre).collect();
    all.extend(centres);
    (all, 2.0 * error)
}

fn upper(centres: &[f64], index: usize) -> f64 {
    centres
        .get(index + 1)
        .map_or(1e9, |next| 0.5 * (centres[index] + next))
}

/// A quantiser of values of unit variance to `2^bits` levels.
#[derive(Debug, Clone)]
pub struct Quantiser {
    bits: u32,
    /// Level of an index; the upper entries repeat the last.
    values: Lookup<256>,
    /// The levels of two neighbouring indices, where both fit a byte.
    pairs: Option<Pairs>,
    /// `thresholds[i]` parts level i from i + 1; the last is infinite.
    thresholds: Lookup<256>,
    /// The lowest level whose cell touches a place of the range.
    finder: Box<[u8; FINDER_CELLS]>,
    /// Mean squared error for the density it was made for.
    pub error: f64,
}

impl Quantiser {
    /// The Lloyd-Max quantiser of `density` with `bits` from 1 to 8.
    #[must_use]
    pub fn new(density: &Density, bits: u32) -> Self {
        let (levels, error) = levels(density, bits);
        let value = |index: usize| levels[index.min(levels.len() - 1)] as f32;
        let threshold = |index: usize| match levels.get(index + 1) {
            Some(next) => (0.5 * (levels[index] + next)) as f32,
            None => f32::INFINITY,
        };
        let thresholds: Vec<f32> = (0..levels.len()).map(threshold).collect();
        let mut finder = Box::new([0; FINDER_CELLS]);
        for (cell, first) in finder.iter_mut().enumerate() {
            // A little to the left: rounding may put a value into the next cell.
            let left =
                (cell as f32 - 0.01) * (2.0 * FINDER_REACH / FINDER_CELLS as f32) - FINDER_REACH;
            *first = thresholds.partition_point(|threshold| *threshold <= left) as u8;
        }
        Self {
            bits,
            values: Lookup::new(value),
            pairs: (bits <= 4).then(|| Pairs::new(bits, value)),
            thresholds: Lookup::new(threshold),
            finder,
            error,
        }
    }

    /// Bits of an index.
    #[must_use]
    pub const fn bits(&self) -> u32 {
        self.bits
    }

    /// Levels of packed indices, as many as `out` is long; `spare` is as long.
    pub fn unpack(&self, packed: &[u8], out: &mut [f32], spare: &mut [u8]) {
        if let (Some(pairs), true) = (&self.pairs, out.len().is_multiple_of(2)) {
            let bytes = &mut spare[..out.len() / 2];
            unpack(packed, 2 * self.bits, bytes);
            for (values, byte) in out.chunks_exact_mut(2).zip(bytes) {
                values.copy_from_slice(&pairs.get(*byte));
            }
            return;
        }
        let indices = &mut spare[..out.len()];
        unpack(packed, self.bits, indices);
        for (value, index) in out.iter_mut().zip(indices) {
            *value = self.value(*index);
        }
    }

    /// The index of the level nearest to `value`, which must be finite.
    #[inline(always)]
    #[must_use]
    pub fn index(&self, value: f32) -> u8 {
        let place = (value + FINDER_REACH) * (FINDER_CELLS as f32 / (2.0 * FINDER_REACH));
        // A cast saturates: what is out of range lands in the outermost cells.
        let first = self.finder[(place as u32 as usize).min(FINDER_CELLS - 1)];
        first + u8::from(value > self.thresholds.get(first as usize))
    }

    /// The level of an index.
    #[inline(always)]
    #[must_use]
    pub fn value(&self, index: u8) -> f32 {
        self.values.get(index as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_finder_finds_the_nearest_level() {
        for bits in 1..=BITS_MAX {
            let quantiser = Quantiser::new(&Density::sphere(128), bits);
            let (levels, _) = levels(&Density::sphere(128), bits);
            for step in -40_000..40_000 {
                let value = step as f32 * 0.000_25;
                let nearest = levels
                    .iter()
                    .map(|l| (l - f64::from(value)).abs())
                    .fold(f64::MAX, f64::min);
                let found = f64::from((quantiser.value(quantiser.index(value)) - value).abs());
                assert!(
                    found <= nearest + 2e-6,
                    "{bits} bits, {value}: {found} {nearest}"
                );
            }
        }
    }
}
