//! `tq` and `rotor`: rotate, quantise each coordinate to the nearest Lloyd-Max level, keep one scale per vector.
//!
//! The levels are the best for a coordinate of a random point on the sphere, so no table travels with the data. The
//! scale is not the vector's length but what makes the decoded vector closest: length x <u, q> / <q, q>.
//! Record: indices of `bits` bits, then the scale (2 bytes).

use super::bits::{pack, packed_bytes};
use super::lloyd::Quantiser;
use super::math::Density;
use super::rotate::{Hadamard, Rotors};
use super::scale;
use super::vector::{dot, length};

/// How coordinates are mixed before each is quantised by itself.
#[derive(Debug, Clone)]
pub enum Rotation {
    /// `tq`.
    Hadamard(Hadamard),
    /// `rotor`.
    Rotors(Rotors),
}

impl Rotation {
    fn forward(&self, x: &mut [f32], spare: &mut [f32]) {
        match self {
            Self::Hadamard(rotation) => rotation.forward(x, spare),
            Self::Rotors(rotation) => rotation.forward(x),
        }
    }

    fn inverse(&self, x: &mut [f32], spare: &mut [f32]) {
        match self {
            Self::Hadamard(rotation) => rotation.inverse(x, spare),
            Self::Rotors(rotation) => rotation.inverse(x),
        }
    }
}

/// The codec for one rotation, rate and length.
#[derive(Debug, Clone)]
pub struct Scalar {
    rotation: Rotation,
    quantiser: Quantiser,
    dim: usize,
}

impl Scalar {
    /// With `bits` from 1 to 8.
    #[must_use]
    pub fn new(rotation: Rotation, bits: u32, dim: usize) -> Self {
        Self {
            rotation,
            quantiser: Quantiser::new(&Density::sphere(dim), bits),
            dim,
        }
    }

    fn index_bytes(&self) -> usize {
        packed_bytes(self.dim, self.quantiser.bits())
    }

    /// Bytes of a record.
    #[must_use]
    pub fn record_bytes(&self) -> usize {
        self.index_bytes() + 2
    }

    /// Encodes `x`, which is overwritten; false where it cannot be held.
    pub fn encode(&self, x: &mut [f32], record: &mut [u8], spare: &mut Spare) -> bool {
        let Some(norm) = length(x) else { return false };
        let deviation = norm / (self.dim as f32).sqrt();
        self.rotation.forward(x, &mut spare.values);
        let inverse = if norm > 0.0 { 1.0 / deviation } else { 0.0 };
        let indices = &mut spare.indices[..self.dim];
        for ((value, index), level) in x.iter_mut().zip(indices.iter_mut()).zip(&mut spare.values) {
            *value *= inverse;
            *index = self.quantiser.index(*value);
            *level = self.quantiser.value(*index);
        }
        let fit = dot(x, &spare.values) / dot(&spare.values, &spare.values);
        let Some(code) = scale::encode(deviation * fit) else {
            return false;
        };
        let (packed, tail) = record.split_at_mut(self.index_bytes());
        pack(indices, self.quantiser.bits(), packed);
        tail.copy_from_slice(&code.to_le_bytes());
        true
    }

    /// Decodes a record.
    pub fn decode(&self, record: &[u8], out: &mut [f32], spare: &mut Spare) {
        let (packed, tail) = record.split_at(self.index_bytes());
        let scale = scale::decode(u16::from_le_bytes([tail[0], tail[1]]));
        self.quantiser.unpack(packed, out, &mut spare.indices);
        out.iter_mut().for_each(|value| *value *= scale);
        self.rotation.inverse(out, &mut spare.values);
    }
}

/// Memory to work in, made once per call and not per vector.
#[derive(Debug)]
pub struct Spare {
    /// As long as a (padded) vector.
    pub values: Vec<f32>,
    /// As long as a (padded) vector.
    pub indices: Vec<u8>,
}

impl Spare {
    /// For vectors of `dim` values.
    #[must_use]
    pub fn new(dim: usize) -> Self {
        Self {
            values: vec![0.0; dim],
            indices: vec![0; dim],
        }
    }
}
