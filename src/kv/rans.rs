//! Entropy coding of quantised coordinates: a range variant of asymmetric numeral systems with fixed frequencies.
//!
//! The frequencies follow from the density of a rotated coordinate and the step alone, so that no table is stored.
//! Invariants: four states share the stream in turn; a decoder that has read everything is back at the encoder's
//! start, which is checked; any bytes are decoded or refused, never a panic.

use super::math::Density;
use crate::error::{Error, ErrorKind, Result};

const STATES: usize = 4;
const LOW: u32 = 1 << 16;
/// Steps reach this many standard deviations; what lies beyond is kept verbatim.
const REACH: f64 = 6.5;

/// Symbols `0..symbols`, where `centre` stands for zero.
#[derive(Debug, Clone)]
pub struct Model {
    /// Distance of two thresholds, in standard deviations.
    pub step: f64,
    /// The symbol of a value around zero.
    pub centre: usize,
    /// What each symbol decodes to: the mean over its interval.
    pub values: Vec<f32>,
    frequencies: Vec<u32>,
    starts: Vec<u32>,
    /// The symbol of each slot.
    symbols: Vec<u16>,
    bits: u32,
}

fn probabilities(density: &Density, step: f64) -> Vec<f64> {
    let half = (REACH / step).ceil() as usize;
    let mass = |index: usize| {
        if index == 0 {
            2.0 * density.moments(0.0, 0.5 * step)[0]
        } else {
            density.moments((index as f64 - 0.5) * step, (index as f64 + 0.5) * step)[0]
        }
    };
    (0..=half).map(mass).collect()
}

/// Bits per symbol of a uniform quantiser.
fn entropy(density: &Density, step: f64) -> f64 {
    let bits = |p: f64| {
        if p > 1e-300 {
            -p * super::math::log2(p)
        } else {
            0.0
        }
    };
    let all = probabilities(density, step);
    bits(all[0]) + all[1..].iter().map(|p| 2.0 * bits(*p)).sum::<f64>()
}

impl Model {
    /// The model whose symbols take `rate` bits on average.
    #[must_use]
    pub fn new(density: &Density, rate: f64) -> Self {
        // Entropy falls with the step; sixty halvings leave nothing of the interval.
        let (mut low, mut high) = (1e-3, 6.0);
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            if entropy(density, middle) > rate {
                low = middle;
            } else {
                high = middle;
            }
        }
        Self::with_step(density, high)
    }

    fn with_step(density: &Density, step: f64) -> Self {
        let half = probabilities(density, step);
        let centre = half.len() - 1;
        let count = 2 * centre + 1;
        // Rare symbols must not eat the table: the finer the step, the longer the table.
        let bits = if count <= 40 { 14 } else { 16 };
        let total = 1u32 << bits;
        let at = |symbol: usize| half[symbol.abs_diff(centre)];
        let mut frequencies: Vec<u32> = (0..count)
            .map(|symbol| ((at(symbol) * f64::from(total)) as u32).max(1))
            .collect();
        // What rounding left over goes to the most frequent ones, a unit each, from the centre outwards.
        let mut left = i64::from(total) - frequencies.iter().map(|f| i64::from(*f)).sum::<i64>();
        let mut distance = 0;
        while left != 0 {
            for symbol in [centre + distance, centre - distance] {
                let change = left.signum();
                if left != 0 && i64::from(frequencies[symbol]) + change >= 1 {
                    frequencies[symbol] = (i64::from(frequencies[symbol]) + change) as u32;
                    left -= change;
                }
            }
            distance = (distance + 1) % (centre / 2 + 1);
        }
        let mut starts = Vec::with_capacity(count);
        let mut symbols = Vec::with_capacity(total as usize);
        for (symbol, frequency) in frequencies.iter().enumerate() {
            starts.push(symbols.len() as u32);
            symbols.resize(symbols.len() + *frequency as usize, symbol as u16);
        }
        let value = |symbol: usize| {
            let distance = symbol.abs_diff(centre) as f64;
            if distance == 0.0 {
                return 0.0;
            }
            let mean = density.mean((distance - 0.5) * step, (distance + 0.5) * step);
            (if symbol < centre { -mean } else { mean }) as f32
        };
        Self {
            step,
            centre,
            values: (0..count).map(value).collect(),
            frequencies,
            starts,
            symbols,
            bits,
        }
    }

    /// Bits of the likeliest symbol, the cheapest.
    #[must_use]
    pub fn least_bits(&self) -> f64 {
        f64::from(self.bits) - f64::from(self.frequencies[self.centre]).log2()
    }

    /// Encodes symbols, which must be of this model.
    #[must_use]
    pub fn encode(&self, symbols: &[u16]) -> Vec<u8> {
        let mut states = [LOW; STATES];
        let mut words: Vec<u16> = Vec::with_capacity(symbols.len() / 2);
        for (index, symbol) in symbols.iter().enumerate().rev() {
            let (frequency, start) = (
                self.frequencies[*symbol as usize],
                self.starts[*symbol as usize],
            );
            let state = &mut states[index % STATES];
            if u64::from(*state) >= u64::from(frequency) << (32 - self.bits) {
                words.push(*state as u16);
                *state >>= 16;
            }
            *state = ((*state / frequency) << self.bits) + *state % frequency + start;
        }
        let mut bytes: Vec<u8> = states
            .iter()
            .flat_map(|state| state.to_le_bytes())
            .collect();
        bytes.extend(words.iter().rev().flat_map(|word| word.to_le_bytes()));
        bytes
    }

    /// Decodes as many symbols as `out` is long.
    ///
    /// # Errors
    /// `Format`: the bytes are not what [`Self::encode`] gave for as many symbols.
    pub fn decode(&self, bytes: &[u8], out: &mut [u16]) -> Result<()> {
        let wrong = || {
            Error::new(
                ErrorKind::Format,
                "KV frame: its entropy-coded part does not end where its values do",
            )
        };
        if bytes.len() < 4 * STATES || !bytes.len().is_multiple_of(2) {
            return Err(wrong());
        }
        let (head, tail) = bytes.split_at(4 * STATES);
        let mut states: [u32; STATES] = std::array::from_fn(|i| {
            u32::from_le_bytes([
                head[4 * i],
                head[4 * i + 1],
                head[4 * i + 2],
                head[4 * i + 3],
            ])
        });
        let mut words = tail
            .chunks_exact(2)
            .map(|word| u32::from(u16::from_le_bytes([word[0], word[1]])));
        let mask = (1u32 << self.bits) - 1;
        for group in out.chunks_mut(STATES) {
            for (symbol, state) in group.iter_mut().zip(&mut states) {
                let slot = *state & mask;
                *symbol = self.symbols[slot as usize];
                let index = *symbol as usize;
                // Below 2^32: the frequency is at most 2^bits, the rest of the state less than 2^(32 - bits).
                *state = self.frequencies[index]
                    .wrapping_mul(*state >> self.bits)
                    .wrapping_add(slot - self.starts[index]);
                if *state < LOW {
                    *state = (*state << 16) | words.next().ok_or_else(wrong)?;
                }
            }
        }
        if words.next().is_some() || states != [LOW; STATES] {
            return Err(wrong());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_rate_is_what_was_asked_for() {
        let density = Density::gaussian();
        for rate in [1.0, 2.0, 2.5, 4.0, 6.0, 8.0] {
            let model = Model::new(&density, rate);
            assert!((entropy(&density, model.step) - rate).abs() < 1e-6);
            let total: f64 = f64::from(1u32 << model.bits);
            let half = probabilities(&density, model.step);
            let spent: f64 = (0..model.values.len())
                .map(|symbol| {
                    -half[symbol.abs_diff(model.centre)]
                        * (f64::from(model.frequencies[symbol]) / total).log2()
                })
                .sum();
            assert!(
                spent - rate < 0.01,
                "{rate}: the table costs {} bits",
                spent - rate
            );
        }
    }

    proptest! {
        #[test]
        fn symbols_come_back(rate in 1.0f64..8.0, raw in proptest::collection::vec(any::<u16>(), 0..500)) {
            let model = Model::new(&Density::sphere(128), rate);
            let symbols: Vec<u16> = raw.iter().map(|value| value % model.values.len() as u16).collect();
            let bytes = model.encode(&symbols);
            let mut back = vec![0; symbols.len()];
            model.decode(&bytes, &mut back).expect("what was encoded");
            prop_assert_eq!(back, symbols);
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), count in 0usize..300) {
            let model = Model::new(&Density::sphere(64), 3.0);
            let _ = model.decode(&bytes, &mut vec![0; count]);
        }
    }
}
