//! What `spectral` knows of a head before it codes: the mean, the directions in which its vectors vary, and how much.
//!
//! Made from a sample: the basis from three quarters of it, whether it is worth anything from the last quarter, which the
//! basis has never seen. Without a gain of [`GAIN_MIN_BITS`] per value there the coder is a `tq`.
//! Layout: `FKC1`, dim u32, mean dim x f32, deviations dim x f32, basis dim x dim x f16, checksum u32.

use half::f16;

use super::eigen;
use super::spec::{DIM_MAX, DIM_MIN};
use crate::error::{Error, ErrorKind, Result};

const MAGIC: [u8; 4] = *b"FKC1";
/// A basis has to save this much to be used: half its square root of 4 in error is not worth its own bytes.
pub const GAIN_MIN_BITS: f64 = 0.1;

/// Mean, basis and deviations of a head's vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// Values of a vector.
    pub dim: usize,
    /// What is taken off each vector.
    pub mean: Vec<f32>,
    /// Standard deviation along each direction, descending.
    pub deviations: Vec<f32>,
    /// Unit directions, one per row, as f16 holds them.
    pub basis: Vec<f32>,
}

impl Calibration {
    /// Mean and principal directions of the finite ones among `vectors`.
    ///
    /// # Errors
    /// `Invalid`: lengths do not fit, or there are fewer vectors than directions.
    pub fn fit(vectors: &[f32], dim: usize) -> Result<Self> {
        let invalid = |what: String| Error::new(ErrorKind::Invalid, what);
        if !(DIM_MIN..=DIM_MAX).contains(&dim) || !vectors.len().is_multiple_of(dim) {
            return Err(invalid(format!(
                "{} values are no vectors of {dim}",
                vectors.len()
            )));
        }
        let good = |vector: &&[f32]| vector.iter().all(|value| value.abs() < 1e15);
        let used: Vec<&[f32]> = vectors.chunks_exact(dim).filter(good).collect();
        if used.len() < dim {
            return Err(invalid(format!(
                "a basis of {dim} directions needs at least {dim} vectors to calibrate with, not {}",
                used.len()
            )));
        }
        let mut mean = vec![0.0f64; dim];
        for vector in &used {
            for (mean, value) in mean.iter_mut().zip(*vector) {
                *mean += f64::from(*value) / used.len() as f64;
            }
        }
        let mut covariance = vec![0.0f64; dim * dim];
        let mut centred = vec![0.0f64; dim];
        for vector in &used {
            for ((centred, value), mean) in centred.iter_mut().zip(*vector).zip(&mean) {
                *centred = f64::from(*value) - mean;
            }
            for (row, weight) in covariance.chunks_exact_mut(dim).zip(&centred) {
                for (sum, value) in row.iter_mut().zip(&centred) {
                    *sum += weight * value / used.len() as f64;
                }
            }
        }
        let (variances, basis) = eigen::symmetric(covariance, dim);
        Ok(Self {
            dim,
            mean: mean.into_iter().map(|value| value as f32).collect(),
            deviations: variances
                .into_iter()
                .map(|value| value.max(0.0).sqrt() as f32)
                .collect(),
            basis: basis
                .into_iter()
                .map(|value| f16::from_f64(value).to_f32())
                .collect(),
        })
    }

    /// The bytes to keep: what a ratio has to count beside the frames.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend((self.dim as u32).to_le_bytes());
        bytes.extend(
            self.mean
                .iter()
                .chain(&self.deviations)
                .flat_map(|value| value.to_le_bytes()),
        );
        bytes.extend(
            self.basis
                .iter()
                .flat_map(|value| f16::from_f32(*value).to_le_bytes()),
        );
        bytes.extend(sum(&bytes).to_le_bytes());
        bytes
    }

    /// Reads what [`Self::to_bytes`] wrote.
    ///
    /// # Errors
    /// `Format`, `Truncated` or `Checksum`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let error = |kind, what: &str| Error::new(kind, format!("KV calibration: {what}"));
        if bytes.len() < 8 || bytes[..4] != MAGIC {
            return Err(error(ErrorKind::Format, "does not begin with FKC1"));
        }
        let dim = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
        if !(DIM_MIN..=DIM_MAX).contains(&dim) {
            return Err(error(ErrorKind::Format, "impossible length of vectors"));
        }
        if bytes.len() != 12 + 8 * dim + 2 * dim * dim {
            return Err(error(
                ErrorKind::Truncated,
                "its length is not what its head says",
            ));
        }
        let (body, end) = bytes.split_at(bytes.len() - 4);
        if end != sum(body).to_le_bytes() {
            return Err(error(ErrorKind::Checksum, "it was changed"));
        }
        let (floats, halves) = body[8..].split_at(8 * dim);
        let floats: Vec<f32> = floats
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        let basis: Vec<f32> = halves
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect();
        let in_range = |value: &f32| value.abs() < 1e16;
        if !floats.iter().chain(&basis).all(in_range)
            || floats[dim..].iter().any(|value| *value < 0.0)
        {
            return Err(error(ErrorKind::Format, "holds numbers that cannot be"));
        }
        Ok(Self {
            dim,
            mean: floats[..dim].to_vec(),
            deviations: floats[dim..].to_vec(),
            basis,
        })
    }

    /// A number that frames name it by: never 0.
    #[must_use]
    pub fn id(&self) -> u32 {
        sum(&self.to_bytes()).max(1)
    }
}

fn sum(bytes: &[u8]) -> u32 {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    (hash ^ (hash >> 32)) as u32
}
