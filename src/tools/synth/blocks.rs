//! Random weights in ggml's storage formats: pools of valid blocks with a chosen mean and spread.
//!
//! A model of many gigabytes is tiled from a few pools of some MiB, because random numbers come slower than a drive
//! writes. Two things keep the copies apart. Every piece begins at its own place in the pool. And a pool holds a prime
//! number of blocks, so that no two pages of a tensor are alike even where a piece goes round. Everything
//! follows from the seed. Values are near-normal and bounded to 3.5 standard deviations, so no block overflows its scale.

use half::{bf16, f16};

use crate::model::DType;

/// The storage formats synth writes, and how a random block of each is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// 32-bit reals: norms, biases, the router of a mixture of experts.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a 32-bit real.
    Bf16,
    /// 32 values of 8 bits, one scale.
    Q8_0,
    /// 32 values of 4 bits, one scale.
    Q4_0,
    /// 256 values of 4 bits, 8 scales and minima.
    Q4K,
    /// 256 values of 5 bits, 8 scales and minima.
    Q5K,
    /// 256 values of 6 bits, 16 scales.
    Q6K,
    /// 32 floats of 4 bits, one exponent.
    Mxfp4,
}

impl Kind {
    /// The type in the catalog's terms: its number and geometry stand there and nowhere else.
    const fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Q8_0 => DType::Q8_0,
            Self::Q4_0 => DType::Q4_0,
            Self::Q4K => DType::Q4_K,
            Self::Q5K => DType::Q5_K,
            Self::Q6K => DType::Q6_K,
            Self::Mxfp4 => DType::MXFP4,
        }
    }

    /// ggml's number of the type. Every type here has one.
    #[must_use]
    pub fn ggml_type(self) -> u32 {
        self.dtype().ggml_number().unwrap_or(u32::MAX)
    }

    /// Values of one block; a row is a whole number of blocks.
    #[must_use]
    pub fn block_elements(self) -> u64 {
        self.dtype().block_elements()
    }

    /// Bytes of one block.
    #[must_use]
    pub fn block_bytes(self) -> u64 {
        self.dtype().block_bytes()
    }

    /// Bytes of this many values.
    #[must_use]
    pub fn bytes(self, elements: u64) -> u64 {
        elements / self.block_elements() * self.block_bytes()
    }

    /// Appends one random block. Quantised kinds take no mean: weights have none.
    fn push_block(self, random: &mut Random, mean: f32, std: f32, out: &mut Vec<u8>) {
        match self {
            Self::F32 => out.extend((mean + std * random.normal()).to_le_bytes()),
            Self::F16 => out.extend(f16::from_f32(std * random.normal()).to_le_bytes()),
            Self::Bf16 => out.extend(bf16::from_f32(std * random.normal()).to_le_bytes()),
            Self::Q8_0 => push_q8_0(random, std, out),
            Self::Q4_0 => push_q4_0(random, std, out),
            Self::Q4K => push_q4_k(random, std, out),
            Self::Q5K => push_q5_k(random, std, out),
            Self::Q6K => push_q6_k(random, std, out),
            Self::Mxfp4 => push_mxfp4(random, std, out),
        }
    }
}

/// Quantised the way ggml does it: the largest magnitude takes the largest code.
fn push_q8_0(random: &mut Random, std: f32, out: &mut Vec<u8>) {
    let values: [f32; 32] = std::array::from_fn(|_| std * random.normal());
    let largest = values.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
    let scale = f16::from_f32(largest / 127.0);
    out.extend(scale.to_le_bytes());
    let inverse = inverse(scale.to_f32());
    out.extend(values.map(|v| (v * inverse).round().clamp(-127.0, 127.0) as i8 as u8));
}

fn push_q4_0(random: &mut Random, std: f32, out: &mut Vec<u8>) {
    let values: [f32; 32] = std::array::from_fn(|_| std * random.normal());
    let extreme = values.iter().fold(
        0.0_f32,
        |most, v| if v.abs() > most.abs() { *v } else { most },
    );
    let scale = f16::from_f32(extreme / -8.0);
    out.extend(scale.to_le_bytes());
    let inverse = inverse(scale.to_f32());
    let codes = values.map(|v| (v * inverse + 8.5).clamp(0.0, 15.0) as u8);
    out.extend((0..16).map(|i| codes[i] | codes[i + 16] << 4));
}

/// Magnitudes of the 4-bit floats, 2 bits of exponent and 1 of mantissa. Codes from 8 on are the negative ones.
const MXFP4_MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The largest magnitude lands between 4 and 8 units, as ggml does it.
fn push_mxfp4(random: &mut Random, std: f32, out: &mut Vec<u8>) {
    let values: [f32; 32] = std::array::from_fn(|_| std * random.normal());
    let largest = values.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
    let exponent = (largest.max(f32::MIN_POSITIVE).log2().floor() - 2.0 + 127.0).clamp(0.0, 254.0);
    out.push(exponent as u8);
    let unit = (exponent - 127.0).exp2();
    let codes = values.map(|value| {
        let off = |code: &usize| (MXFP4_MAGNITUDES[*code] - value.abs() / unit).abs();
        let code = (0..8).min_by(|a, b| off(a).total_cmp(&off(b))).unwrap_or(0);
        code as u8 | if value < 0.0 { 8 } else { 0 }
    });
    out.extend((0..16).map(|i| codes[i] | codes[i + 16] << 4));
}

/// 1/x, and 0 where a scale is so small that it became 0.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// A scale between these, 24 to 63 of the 6 bits, has the root mean square 45.
const SCALE_MIN: u32 = 24;
const SCALE_RMS: f32 = 45.0;

/// Scales and minima of the 4- and 5-bit formats. The minimum follows the scale, so that the values of each sub-block
/// centre on zero, give or take one step.
fn push_scales(random: &mut Random, out: &mut Vec<u8>) {
    let scales: [u8; 8] = std::array::from_fn(|_| (SCALE_MIN + random.below(40) as u32) as u8);
    let minima = scales.map(|scale| (scale - 1 + random.below(3) as u8).min(63));
    out.extend((0..4).map(|i| scales[i] | scales[i + 4] >> 4 << 6));
    out.extend((0..4).map(|i| minima[i] | minima[i + 4] >> 4 << 6));
    out.extend((4..8).map(|i| (scales[i] & 15) | minima[i] << 4));
}

/// 256 codes of `bits` bits, near-normal around the middle of their range.
fn codes(random: &mut Random, bits: u32, middle: f32, spread: f32) -> [u8; 256] {
    let most = ((1_u32 << bits) - 1) as f32;
    std::array::from_fn(|_| (middle + spread * random.normal()).round().clamp(0.0, most) as u8)
}

fn push_q4_k(random: &mut Random, std: f32, out: &mut Vec<u8>) {
    let (middle, spread) = (7.5, 3.2);
    let scale = std / (spread * SCALE_RMS);
    out.extend(f16::from_f32(scale).to_le_bytes());
    out.extend(f16::from_f32(scale * middle).to_le_bytes());
    push_scales(random, out);
    let codes = codes(random, 4, middle, spread);
    push_nibbles(&codes, out);
}

/// Groups of 64 codes: the low halves of 32 bytes hold the first 32, the high halves the others.
fn push_nibbles(codes: &[u8; 256], out: &mut Vec<u8>) {
    for group in codes.as_chunks::<64>().0 {
        out.extend((0..32).map(|i| (group[i] & 15) | group[i + 32] << 4));
    }
}

fn push_q5_k(random: &mut Random, std: f32, out: &mut Vec<u8>) {
    let (middle, spread) = (15.5, 6.4);
    let scale = std / (spread * SCALE_RMS);
    out.extend(f16::from_f32(scale).to_le_bytes());
    out.extend(f16::from_f32(scale * middle).to_le_bytes());
    push_scales(random, out);
    let codes = codes(random, 5, middle, spread);
    // Bit g of byte i is the fifth bit of code i of sub-block g.
    out.extend((0..32).map(|i| (0..8).fold(0, |byte, g| byte | codes[g * 32 + i] >> 4 << g)));
    push_nibbles(&codes, out);
}

fn push_q6_k(random: &mut Random, std: f32, out: &mut Vec<u8>) {
    let spread = 10.0;
    let codes = codes(random, 6, 32.0, spread);
    let halves = codes.as_chunks::<128>().0;
    for half in halves {
        out.extend((0..64).map(|i| (half[i] & 15) | half[i + 64] << 4));
    }
    for half in halves {
        out.extend((0..32).map(|i| {
            half[i] >> 4 | half[i + 32] >> 4 << 2 | half[i + 64] >> 4 << 4 | half[i + 96] >> 4 << 6
        }));
    }
    // Small scales keep the common factor, a half-precision real, away from its underflow. 16 to 31: rms 24.
    out.extend((0..16).map(|_| {
        let magnitude = 16 + random.below(16) as i8;
        (if random.below(2) == 0 {
            magnitude
        } else {
            -magnitude
        }) as u8
    }));
    out.extend(f16::from_f32(std / (spread * 24.0)).to_le_bytes());
}

/// A pool of random blocks, stored twice in a row so that a piece from any place is one slice.
#[derive(Debug)]
pub struct Pool {
    twice: Vec<u8>,
    blocks_count: u64,
    block_bytes: u64,
}

impl Pool {
    /// At least `len_bytes` of blocks of this kind, mean and standard deviation.
    #[must_use]
    pub fn new(kind: Kind, mean: f32, std: f32, len_bytes: u64, seed: u64) -> Self {
        let mut random = Random::new(&[
            seed,
            u64::from(kind.ggml_type()),
            u64::from(mean.to_bits()),
            u64::from(std.to_bits()),
        ]);
        let blocks_count = next_prime(len_bytes.div_ceil(kind.block_bytes()));
        let once_bytes = (blocks_count * kind.block_bytes()) as usize;
        let mut twice = Vec::with_capacity(2 * once_bytes);
        for _ in 0..blocks_count {
            kind.push_block(&mut random, mean, std, &mut twice);
        }
        twice.extend_from_within(..);
        Self {
            twice,
            blocks_count,
            block_bytes: kind.block_bytes(),
        }
    }

    /// A piece of at most `most_bytes` (whole blocks, at least one) from a random place.
    #[must_use]
    pub fn piece(&self, random: &mut Random, most_bytes: u64) -> &[u8] {
        let start = random.below(self.blocks_count);
        let blocks = (most_bytes / self.block_bytes).clamp(1, self.blocks_count);
        let begin = (start * self.block_bytes) as usize;
        &self.twice[begin..begin + (blocks * self.block_bytes) as usize]
    }
}

fn next_prime(at_least: u64) -> u64 {
    let is_prime = |n: &u64| {
        (2..)
            .take_while(|d| d * d <= *n)
            .all(|d| !n.is_multiple_of(d))
    };
    (at_least.max(2)..).find(is_prime).unwrap_or(at_least)
}

/// splitmix64: fast, and equal on every machine. Not for secrets.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A stream of its own for each list of numbers.
    #[must_use]
    pub fn new(seeds: &[u64]) -> Self {
        let mut random = Self(0x666c_6561);
        for seed in seeds {
            random.0 = random.next() ^ seed;
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 to `bound` - 1, `bound` above 0. The bias of the product is below 2^-40 for the bounds used here.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// Mean 0, standard deviation 1, bounded to 3.5: the sum of four 16-bit numbers.
    pub fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: u64 = (0..4).map(|part| bits >> (16 * part) & 0xffff).sum();
        // 2 * 65535 is the mean of the sum, 65536 * sqrt(4 / 12) its standard deviation.
        (sum as f32 - 131_070.0) / 37_837.2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Kind; 9] = [
        Kind::F32,
        Kind::F16,
        Kind::Bf16,
        Kind::Q8_0,
        Kind::Q4_0,
        Kind::Q4K,
        Kind::Q5K,
        Kind::Q6K,
        Kind::Mxfp4,
    ];

    #[test]
    fn blocks_have_their_length() {
        for kind in ALL {
            let mut out = Vec::new();
            kind.push_block(&mut Random::new(&[1]), 0.0, 0.02, &mut out);
            assert_eq!(out.len() as u64, kind.block_bytes(), "{kind:?}");
        }
    }

    #[test]
    fn a_pool_follows_from_its_seed_and_only_from_it() {
        let pool = |seed| Pool::new(Kind::Q8_0, 0.0, 0.02, 10_000, seed).twice;
        assert_eq!(pool(1), pool(1));
        assert_ne!(pool(1), pool(2));
    }

    #[test]
    fn pieces_are_whole_blocks_and_differ() {
        let pool = Pool::new(Kind::Q6K, 0.0, 0.02, 100_000, 3);
        let mut random = Random::new(&[5]);
        let first = pool.piece(&mut random, 21_000).to_vec();
        let second = pool.piece(&mut random, 21_000).to_vec();
        assert_eq!(first.len(), 21_000);
        assert_ne!(first, second);
        assert_eq!(pool.piece(&mut random, 1).len(), 210);
        assert!(next_prime(480) == 487 && next_prime(0) == 2);
    }

    #[test]
    fn normal_numbers_are_normal() {
        let mut random = Random::new(&[9]);
        let values: Vec<f32> = (0..100_000).map(|_| random.normal()).collect();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let variance = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        assert!(mean.abs() < 0.02, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.02, "variance {variance}");
    }

    /// Decoded as ggml's `dequantize_row_mxfp4` does it, the values have the spread they were drawn with.
    #[test]
    fn four_bit_floats_have_their_spread() {
        let mut bytes = Vec::new();
        let mut random = Random::new(&[8]);
        for _ in 0..1000 {
            push_mxfp4(&mut random, 0.02, &mut bytes);
        }
        let mut squares = 0.0;
        for block in bytes.as_chunks::<17>().0 {
            let unit = (f32::from(block[0]) - 127.0).exp2();
            for byte in &block[1..] {
                for code in [byte & 15, byte >> 4] {
                    squares += (MXFP4_MAGNITUDES[usize::from(code & 7)] * unit).powi(2);
                }
            }
        }
        let std = (squares / 32_000.0).sqrt();
        assert!((std / 0.02 - 1.0).abs() < 0.03, "{std}");
    }

    /// Scales and minima come back out of their 12 bytes as ggml's `get_scale_min_k4` takes them.
    #[test]
    fn packed_scales_unpack_in_range() {
        let mut bytes = Vec::new();
        push_scales(&mut Random::new(&[4]), &mut bytes);
        for j in 0..8 {
            let (scale, minimum) = if j < 4 {
                (bytes[j] & 63, bytes[j + 4] & 63)
            } else {
                (
                    (bytes[j + 4] & 15) | bytes[j - 4] >> 6 << 4,
                    bytes[j + 4] >> 4 | bytes[j] >> 6 << 4,
                )
            };
            assert!(u32::from(scale) >= SCALE_MIN, "scale {scale}");
            assert!(scale.abs_diff(minimum) <= 1, "{scale} and {minimum}");
        }
    }
}
