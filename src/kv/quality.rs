//! How far decoded vectors are from the originals: the figures of the reference, under their names.

use super::vector::dot;

/// Averages over vectors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quality {
    /// Mean squared error of a value.
    pub mse: f64,
    /// Squared error over squared length, mean over vectors. What a codec that scales to the vector can be held against
    /// `4^-bits` with.
    pub nmse: f64,
    /// Squared error of all over squared length of all.
    pub nmse_global: f64,
    /// Cosine of the angle to the original, mean over vectors.
    pub cosine: f64,
    /// Length of the decoded vector over that of the original, mean over vectors.
    pub norm_ratio: f64,
}

/// Compares vectors of `dim` values. Vectors of length 0 count in `mse` only.
#[must_use]
pub fn compare(original: &[f32], decoded: &[f32], dim: usize) -> Quality {
    let (mut error_sum, mut energy_sum) = (0.0, 0.0);
    let (mut nmse, mut cosine, mut ratio, mut count) = (0.0, 0.0, 0.0, 0u64);
    let mut difference = vec![0.0f32; dim];
    for (x, y) in original.chunks_exact(dim).zip(decoded.chunks_exact(dim)) {
        for (difference, (x, y)) in difference.iter_mut().zip(x.iter().zip(y)) {
            *difference = x - y;
        }
        let error = f64::from(dot(&difference, &difference));
        let (xx, yy) = (f64::from(dot(x, x)), f64::from(dot(y, y)));
        error_sum += error;
        energy_sum += xx;
        if xx > 0.0 {
            nmse += error / xx;
            ratio += (yy / xx).sqrt();
            cosine += if yy > 0.0 {
                f64::from(dot(x, y)) / (xx * yy).sqrt()
            } else {
                0.0
            };
            count += 1;
        }
    }
    let count = count.max(1) as f64;
    Quality {
        mse: error_sum / original.len().max(1) as f64,
        nmse: nmse / count,
        nmse_global: if energy_sum > 0.0 {
            error_sum / energy_sum
        } else {
            0.0
        },
        cosine: cosine / count,
        norm_ratio: ratio / count,
    }
}
