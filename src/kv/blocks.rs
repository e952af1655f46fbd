//! `q8_0` and `q4_0`: the formats of ggml, bit for bit. Blocks of 32 values, an f16 scale in front of each.

use half::f16;

use super::spec::BLOCK;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocks {
    /// A byte per value.
    Q8_0,
    /// Half a byte per value: value i and i + 16 share one.
    Q4_0,
}

impl Blocks {
    const fn block_bytes(self) -> usize {
        match self {
            Self::Q8_0 => 2 + BLOCK,
            Self::Q4_0 => 2 + BLOCK / 2,
        }
    }

    /// Bytes of a vector of `dim` values.
    #[must_use]
    pub const fn record_bytes(self, dim: usize) -> usize {
        dim / BLOCK * self.block_bytes()
    }

    /// Encodes a vector; false where a scale would not be finite.
    #[must_use]
    pub fn encode(self, x: &[f32], record: &mut [u8]) -> bool {
        x.chunks_exact(BLOCK)
            .zip(record.chunks_exact_mut(self.block_bytes()))
            .all(|(values, bytes)| match self {
                Self::Q8_0 => encode_q8(values, bytes),
                Self::Q4_0 => encode_q4(values, bytes),
            })
    }

    /// Decodes a vector. A scale that is not finite, which `encode` never writes, counts as 0.
    pub fn decode(self, record: &[u8], out: &mut [f32]) {
        for (values, bytes) in out
            .chunks_exact_mut(BLOCK)
            .zip(record.chunks_exact(self.block_bytes()))
        {
            let scale = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
            let scale = if scale.is_finite() { scale } else { 0.0 };
            match self {
                Self::Q8_0 => {
                    for (value, byte) in values.iter_mut().zip(&bytes[2..]) {
                        *value = f32::from(*byte as i8) * scale;
                    }
                }
                Self::Q4_0 => {
                    let (low, high) = values.split_at_mut(BLOCK / 2);
                    for ((low, high), byte) in low.iter_mut().zip(high).zip(&bytes[2..]) {
                        *low = (f32::from(byte & 15) - 8.0) * scale;
                        *high = (f32::from(byte >> 4) - 8.0) * scale;
                    }
                }
            }
        }
    }
}

fn encode_q8(values: &[f32], bytes: &mut [u8]) -> bool {
    // NaN would be lost in a maximum; a sum keeps it.
    let peak = values
        .iter()
        .fold(0.0f32, |peak, value| peak.max(value.abs()));
    let sum: f32 = values.iter().map(|value| value * 0.0).sum();
    let scale = peak / 127.0;
    let stored = f16::from_f32(scale);
    if sum != 0.0 || !stored.is_finite() {
        return false;
    }
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    bytes[..2].copy_from_slice(&stored.to_le_bytes());
    for (byte, value) in bytes[2..].iter_mut().zip(values) {
        *byte = (value * inverse).round() as i8 as u8;
    }
    true
}

fn encode_q4(values: &[f32], bytes: &mut [u8]) -> bool {
    let sum: f32 = values.iter().map(|value| value * 0.0).sum();
    let peak = values.iter().fold(0.0f32, |peak, value| {
        if value.abs() > peak.abs() {
            *value
        } else {
            peak
        }
    });
    let scale = peak / -8.0;
    let stored = f16::from_f32(scale);
    if sum != 0.0 || !stored.is_finite() {
        return false;
    }
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    bytes[..2].copy_from_slice(&stored.to_le_bytes());
    let code = |value: f32| ((value * inverse + 8.5) as u8).min(15);
    let (low, high) = values.split_at(BLOCK / 2);
    for ((byte, low), high) in bytes[2..].iter_mut().zip(low).zip(high) {
        *byte = code(*low) | code(*high) << 4;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed by hand from ggml's quantize_row_q4_0_ref and quantize_row_q8_0_ref.
    #[test]
    fn the_bytes_are_those_of_ggml() {
        let values: Vec<f32> = (0..32).map(|i| i as f32 - 24.0).collect();
        let mut q4 = vec![0; Blocks::Q4_0.record_bytes(32)];
        assert!(Blocks::Q4_0.encode(&values, &mut q4));
        // The value furthest from 0 is -24, so the scale is 3 (0x4200) and code 0; -8 is 16 places further: 5.83 -> 5.
        assert_eq!(&q4[..3], [0x00, 0x42, 0x50]);
        // Value 15 is -9 -> 5.5 -> 5; value 31 is 7 -> 10.83 -> 10.
        assert_eq!(q4[17], 0xa5);
        let mut q8 = vec![0; Blocks::Q8_0.record_bytes(32)];
        assert!(Blocks::Q8_0.encode(&values, &mut q8));
        assert_eq!(
            (q8[2] as i8, q8[2 + 24] as i8, q8[2 + 31] as i8),
            (-127, 0, 37)
        );
        assert_eq!(
            f16::from_le_bytes([q8[0], q8[1]]),
            f16::from_f32(24.0 / 127.0)
        );
    }
}
