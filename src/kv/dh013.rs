//! `dh013`: what dhurandhar 0.1.3 calls TurboQuant, as the baseline. Rotation, sign bits with the vector's length, and a
//! uniform quantiser of `bits` for what the signs leave, scaled to its largest value.
//!
//! The rotation's signs are those of the original (torch's generator, seed 20260421), lengths are padded to a power of two
//! as there. What it stores: a sign and `bits` per padded value and two f16 scalars, 1 + bits + 32 / dim; the
//! original's own claim is bits - 0.5. Record: sign bits, residuals, length, residual scale.

use half::f16;

use super::bits::{pack, packed_bytes, unpack};
use super::rotate::walsh_hadamard;
use super::scalar::Spare;
use super::synth::Torch;
use super::vector::length;

const ROTATION_SEED: u32 = 20_260_421;
const SMALLEST: f32 = 1e-8;

/// The baseline for one rate and length.
#[derive(Debug, Clone)]
pub struct Dh013 {
    /// A random sign per padded coordinate.
    signs: Vec<f32>,
    bits: u32,
    dim: usize,
}

impl Dh013 {
    /// With residuals of `bits` from 2 to 8.
    #[must_use]
    pub fn new(bits: u32, dim: usize) -> Self {
        let mut torch = Torch::new(ROTATION_SEED);
        let signs = (0..dim.next_power_of_two())
            .map(|_| {
                if torch.random().is_multiple_of(2) {
                    -1.0
                } else {
                    1.0
                }
            })
            .collect();
        Self { signs, bits, dim }
    }

    /// Length of the padded vectors.
    #[must_use]
    pub fn padded(&self) -> usize {
        self.signs.len()
    }

    fn parts(&self) -> (usize, usize) {
        (
            packed_bytes(self.padded(), 1),
            packed_bytes(self.padded(), self.bits),
        )
    }

    /// Bytes of a record.
    #[must_use]
    pub fn record_bytes(&self) -> usize {
        let (signs, residuals) = self.parts();
        signs + residuals + 4
    }

    /// Encodes `x`; false where it cannot be held.
    pub fn encode(&self, x: &[f32], record: &mut [u8], spare: &mut Spare) -> bool {
        if length(x).is_none() {
            return false;
        }
        let y = &mut spare.values;
        for (index, (value, sign)) in y.iter_mut().zip(&self.signs).enumerate() {
            *value = x.get(index).map_or(0.0, |x| x * sign);
        }
        walsh_hadamard(y);
        let size = 1.0 / (self.padded() as f32).sqrt();
        y.iter_mut().for_each(|value| *value *= size);
        let Some(norm) = length(y) else { return false };
        let step = norm.max(SMALLEST) * size;
        let (sign_bytes, residual_bytes) = self.parts();
        for (index, value) in spare.indices.iter_mut().zip(y.iter()) {
            *index = u8::from(*value >= 0.0);
        }
        pack(&spare.indices, 1, &mut record[..sign_bytes]);
        let residual = |value: f32| {
            if value >= 0.0 {
                value - step
            } else {
                value + step
            }
        };
        let peak = y
            .iter()
            .fold(SMALLEST, |peak, value| peak.max(residual(*value).abs()));
        let highest = (1i32 << (self.bits - 1)) - 1;
        let scale = peak / highest as f32;
        let mask = ((1u32 << self.bits) - 1) as u8;
        for (index, value) in spare.indices.iter_mut().zip(y.iter()) {
            let code = (residual(*value) / scale).round_ties_even() as i32;
            *index = code.clamp(-highest - 1, highest) as u8 & mask;
        }
        pack(
            &spare.indices,
            self.bits,
            &mut record[sign_bytes..sign_bytes + residual_bytes],
        );
        let (norm, scale) = (f16::from_f32(norm), f16::from_f32(scale));
        let tail = &mut record[sign_bytes + residual_bytes..];
        tail[..2].copy_from_slice(&norm.to_le_bytes());
        tail[2..].copy_from_slice(&scale.to_le_bytes());
        norm.is_finite() && scale.is_finite()
    }

    /// Decodes a record. Scalars that are not finite, which `encode` never writes, count as 0.
    pub fn decode(&self, record: &[u8], out: &mut [f32], spare: &mut Spare) {
        let (sign_bytes, residual_bytes) = self.parts();
        let tail = &record[sign_bytes + residual_bytes..];
        let scalar = |at: usize| {
            let value = f16::from_le_bytes([tail[at], tail[at + 1]]).to_f32();
            if value.is_finite() { value } else { 0.0 }
        };
        let size = 1.0 / (self.padded() as f32).sqrt();
        let (step, scale) = (scalar(0).max(SMALLEST) * size, scalar(2));
        let y = &mut spare.values;
        unpack(&record[..sign_bytes], 1, &mut spare.indices);
        for (value, sign) in y.iter_mut().zip(&spare.indices) {
            *value = if *sign == 1 { step } else { -step };
        }
        unpack(
            &record[sign_bytes..sign_bytes + residual_bytes],
            self.bits,
            &mut spare.indices,
        );
        let shift = 8 - self.bits;
        for (value, code) in y.iter_mut().zip(&spare.indices) {
            *value += f32::from((code << shift) as i8 >> shift) * scale;
        }
        walsh_hadamard(y);
        for ((value, y), sign) in out[..self.dim].iter_mut().zip(y.iter()).zip(&self.signs) {
            *value = y * sign * size;
        }
    }
}
