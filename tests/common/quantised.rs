//! What the kernels are held against: quantised types as their formats say, weights, and numbers that look random.

#![allow(dead_code)]

use half::{bf16, f16};

/// splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    /// bf16, near normal.
    pub fn weights(&mut self, elements: usize) -> Vec<u8> {
        let mut weight = || {
            let sum: f32 = (0..6)
                .map(|_| (self.next() >> 40) as f32 / 16_777_216.0)
                .sum();
            bf16::from_f32((sum - 3.0) * 0.02).to_le_bytes()
        };
        (0..elements).flat_map(|_| weight()).collect()
    }
}

/// A quantised type: ggml's number, bytes and values of a block, and its reference.
pub struct Type {
    pub name: &'static str,
    pub ggml_type: u32,
    pub block_bytes: usize,
    pub elements: usize,
    pub values: fn(&[u8]) -> Vec<f32>,
}

pub const TYPES: [Type; 5] = [
    Type {
        name: "q4_0",
        ggml_type: 2,
        block_bytes: 18,
        elements: 32,
        values: q4_0,
    },
    Type {
        name: "q8_0",
        ggml_type: 8,
        block_bytes: 34,
        elements: 32,
        values: q8_0,
    },
    Type {
        name: "q4_k",
        ggml_type: 12,
        block_bytes: 144,
        elements: 256,
        values: q4_k,
    },
    Type {
        name: "q6_k",
        ggml_type: 14,
        block_bytes: 210,
        elements: 256,
        values: q6_k,
    },
    Type {
        name: "mxfp4",
        ggml_type: 39,
        block_bytes: 17,
        elements: 32,
        values: mxfp4,
    },
];

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The codes of `bytes`: all lower halves, then all upper ones.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    bytes
        .iter()
        .map(|byte| byte & 15)
        .chain(bytes.iter().map(|byte| byte >> 4))
}

fn q4_0(block: &[u8]) -> Vec<f32> {
    nibbles(&block[2..])
        .map(|code| (f32::from(code) - 8.0) * half_at(block, 0))
        .collect()
}

fn q8_0(block: &[u8]) -> Vec<f32> {
    block[2..]
        .iter()
        .map(|&code| f32::from(code as i8) * half_at(block, 0))
        .collect()
}

fn q4_k(block: &[u8]) -> Vec<f32> {
    let scales = &block[4..16];
    let six = |j: usize| match j {
        0..4 => (scales[j] & 63, scales[j + 4] & 63),
        _ => (
            (scales[j + 4] & 15) | (scales[j - 4] >> 6 << 4),
            (scales[j + 4] >> 4) | (scales[j] >> 6 << 4),
        ),
    };
    let codes = block[16..].chunks(32).flat_map(nibbles);
    let value = |(index, code): (usize, u8)| {
        let (scale, minimum) = six(index / 32);
        let (scale, minimum) = (
            half_at(block, 0) * f32::from(scale),
            half_at(block, 2) * f32::from(minimum),
        );
        scale * f32::from(code) - minimum
    };
    codes.enumerate().map(value).collect()
}

fn q6_k(block: &[u8]) -> Vec<f32> {
    let value = |index: usize| {
        // Halves of 128 values, quarters of 32.
        let (half, quarter, place) = (index / 128, index / 32 % 4, index % 32);
        let lower = block[64 * half + 32 * (quarter % 2) + place] >> (4 * (quarter / 2)) & 15;
        let upper = block[128 + 32 * half + place] >> (2 * quarter) & 3;
        let scale = block[192 + index / 16] as i8;
        half_at(block, 208) * f32::from(scale) * (f32::from(lower | (upper << 4)) - 32.0)
    };
    (0..256).map(value).collect()
}

fn mxfp4(block: &[u8]) -> Vec<f32> {
    const HALVES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
    // 2^-128 is no normal number, and exp2 of it would be one rounding more.
    let scale = match block[0] {
        0 => f32::from_bits(0x0020_0000),
        1 => f32::from_bits(0x0040_0000),
        exponent => f32::from_bits((u32::from(exponent) - 1) << 23),
    };
    nibbles(&block[1..])
        .map(|code| f32::from(HALVES[usize::from(code)]) * scale)
        .collect()
}

/// Blocks of any bytes, and of scales that models have.
pub fn blocks(kind: &Type, count: usize) -> Vec<u8> {
    let mut random = Random(u64::from(kind.ggml_type));
    let mut bytes = random.bytes(kind.block_bytes * count);
    for (index, block) in bytes
        .chunks_mut(kind.block_bytes)
        .enumerate()
        .skip(count / 4)
    {
        let scale = f16::from_f32((index as f32 + 0.5) * 1e-4).to_le_bytes();
        match kind.name {
            "mxfp4" => block[0] = (index % 256) as u8,
            "q6_k" => block[208..].copy_from_slice(&scale),
            "q4_k" => {
                block[..2].copy_from_slice(&scale);
                block[2..4].copy_from_slice(&scale);
            }
            _ => block[..2].copy_from_slice(&scale),
        }
    }
    bytes
}

pub fn to_half(value: f32) -> [u8; 2] {
    if value.is_nan() {
        [0xff, 0x7f]
    } else {
        f16::from_f32(value).to_le_bytes()
    }
}

pub fn to_bfloat(value: f32) -> [u8; 2] {
    if value.is_nan() {
        [0xff, 0x7f]
    } else {
        bf16::from_f32(value).to_le_bytes()
    }
}
