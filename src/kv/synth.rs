//! Made-up K and V to measure codecs on: the three distributions of dhurandhar 0.1.3, drawn in the same order from the
//! same generator (torch's mt19937 and its way to make normal numbers), so that figures compare digit for digit.

use super::rotate::splitmix;

/// torch's CPU generator.
#[derive(Debug, Clone)]
pub struct Torch {
    state: Box<[u32; 624]>,
    at: usize,
}

impl Torch {
    /// `torch.Generator().manual_seed(seed)`.
    #[must_use]
    pub fn new(seed: u32) -> Self {
        let mut state = Box::new([seed; 624]);
        for index in 1..624 {
            let last = state[index - 1];
            state[index] = 1_812_433_253u32
                .wrapping_mul(last ^ (last >> 30))
                .wrapping_add(index as u32);
        }
        Self { state, at: 624 }
    }

    fn refill(&mut self) {
        for index in 0..624 {
            let y =
                (self.state[index] & 0x8000_0000) | (self.state[(index + 1) % 624] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[index] = self.state[(index + 397) % 624] ^ (y >> 1) ^ odd;
        }
        self.at = 0;
    }

    /// The next 32 bits.
    pub fn random(&mut self) -> u32 {
        if self.at == 624 {
            self.refill();
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `torch.rand`: one number from 0 to 1.
    pub fn uniform(&mut self) -> f32 {
        (self.random() & 0xff_ffff) as f32 / 16_777_216.0
    }

    /// `torch.randn` of a tensor with `count` elements; a multiple of 16, as torch does others differently.
    pub fn normal(&mut self, count: usize) -> Vec<f32> {
        debug_assert!(count.is_multiple_of(16));
        let mut values: Vec<f32> = (0..count).map(|_| self.uniform()).collect();
        for group in values.chunks_exact_mut(16) {
            let (first, second) = group.split_at_mut(8);
            for (a, b) in first.iter_mut().zip(second) {
                let radius = (-2.0 * (1.0 - *a).ln()).sqrt();
                let (sin, cos) = (2.0 * std::f32::consts::PI * *b).sin_cos();
                (*a, *b) = (radius * cos, radius * sin);
            }
        }
        values
    }
}

/// What values look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distribution {
    /// Independent normal values.
    Gaussian,
    /// Normal values of deviation 0.3, every twentieth with another of deviation 3 added.
    HeavyTail,
    /// Normal values along a random basis: 4 % of the directions carry most of the variance.
    Spectral,
}

impl Distribution {
    /// Every distribution.
    pub const ALL: [Self; 3] = [Self::Gaussian, Self::HeavyTail, Self::Spectral];

    /// Its name in tables and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gaussian => "gaussian",
            Self::HeavyTail => "gaussian_heavy_tail",
            Self::Spectral => "spectral",
        }
    }

    /// `count` vectors of `dim` values, one after the other; their product is a multiple of 16.
    #[must_use]
    pub fn sample(self, count: usize, dim: usize, seed: u32) -> Vec<f32> {
        let mut torch = Torch::new(seed);
        match self {
            Self::Gaussian => torch.normal(count * dim),
            Self::HeavyTail => {
                let mut values = torch.normal(count * dim);
                let heavy: Vec<bool> = values.iter().map(|_| torch.uniform() < 0.05).collect();
                let tail = torch.normal(count * dim);
                for ((value, heavy), tail) in values.iter_mut().zip(heavy).zip(tail) {
                    *value = *value * 0.3 + if heavy { tail * 3.0 } else { 0.0 };
                }
                values
            }
            Self::Spectral => spectral(&mut torch, count, dim),
        }
    }
}

fn spectral(torch: &mut Torch, count: usize, dim: usize) -> Vec<f32> {
    let strong = ((dim as f64 * 0.04) as usize).max(1);
    let square = torch_square(torch, dim);
    let basis = orthogonal(&square, dim);
    let deviation: Vec<f32> = (0..dim)
        .map(|index| {
            let variance = match index {
                0 => 10.0,
                _ if index < strong => 10.0 - 8.0 * index as f32 / (strong - 1) as f32,
                _ => 0.05,
            };
            variance.sqrt()
        })
        .collect();
    let mut values = torch.normal(count * dim);
    let mut scaled = vec![0.0f32; dim];
    for vector in values.chunks_exact_mut(dim) {
        for ((scaled, value), deviation) in scaled.iter_mut().zip(vector.iter()).zip(&deviation) {
            *scaled = value * deviation;
        }
        for (value, row) in vector.iter_mut().zip(basis.chunks_exact(dim)) {
            *value = super::vector::dot(row, &scaled);
        }
    }
    values
}

/// `torch.randn(dim, dim)`: where the element count is no multiple of 16 torch draws the last sixteen anew.
fn torch_square(torch: &mut Torch, dim: usize) -> Vec<f32> {
    let count = dim * dim;
    if count.is_multiple_of(16) {
        return torch.normal(count);
    }
    let mut all = torch.clone().normal(count.next_multiple_of(16));
    for _ in 0..count {
        torch.random();
    }
    all.truncate(count);
    let last = torch.normal(16);
    all[count - 16..].copy_from_slice(&last);
    all
}

/// Q of the QR decomposition of a row-major square matrix, by Householder reflections with LAPACK's signs; row-major.
fn orthogonal(matrix: &[f32], dim: usize) -> Vec<f32> {
    let mut a: Vec<f64> = matrix.iter().map(|value| f64::from(*value)).collect();
    let mut reflections = Vec::with_capacity(dim);
    for k in 0..dim {
        let norm = (k..dim)
            .map(|row| a[row * dim + k] * a[row * dim + k])
            .sum::<f64>()
            .sqrt();
        let head = a[k * dim + k];
        // The last column is one number and LAPACK leaves it alone.
        let tail: f64 = (k + 1..dim).map(|row| a[row * dim + k].abs()).sum();
        if tail == 0.0 {
            reflections.push((Vec::new(), 0.0));
            continue;
        }
        let beta = if head >= 0.0 { -norm } else { norm };
        let mut v: Vec<f64> = (k..dim)
            .map(|row| a[row * dim + k] / (head - beta))
            .collect();
        v[0] = 1.0;
        let tau = (beta - head) / beta;
        reflect(&mut a, dim, k, k, &v, tau);
        reflections.push((v, tau));
    }
    let mut q = vec![0.0; dim * dim];
    (0..dim).for_each(|i| q[i * dim + i] = 1.0);
    for (k, (v, tau)) in reflections.iter().enumerate().rev() {
        reflect(&mut q, dim, k, k, v, *tau);
    }
    q.into_iter().map(|value| value as f32).collect()
}

/// Applies `1 - tau v v'` to the rows from `first` on, columns from `left` on.
fn reflect(a: &mut [f64], dim: usize, first: usize, left: usize, v: &[f64], tau: f64) {
    let mut sums = vec![0.0; dim];
    for (offset, weight) in v.iter().enumerate() {
        let row = &a[(first + offset) * dim..][..dim];
        for (sum, value) in sums[left..].iter_mut().zip(&row[left..]) {
            *sum += weight * value;
        }
    }
    for (offset, weight) in v.iter().enumerate() {
        let row = &mut a[(first + offset) * dim..][..dim];
        for (sum, value) in sums[left..].iter().zip(&mut row[left..]) {
            *value -= tau * weight * sum;
        }
    }
}

/// A number below `bound`, for tests and samples that need no torch.
pub fn below(state: &mut u64, bound: u64) -> u64 {
    splitmix(state) % bound.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first outputs of the reference implementation of mt19937 for its usual seed.
    #[test]
    fn the_generator_is_mt19937() {
        let mut torch = Torch::new(5489);
        assert_eq!(
            [torch.random(), torch.random()],
            [3_499_211_612, 581_869_302]
        );
        for _ in 2..9999 {
            torch.random();
        }
        assert_eq!(torch.random(), 4_123_659_995);
    }

    #[test]
    fn the_basis_is_orthogonal() {
        let dim = 48;
        let q = orthogonal(&Torch::new(1).normal(dim * dim), dim);
        for a in 0..dim {
            for b in 0..dim {
                let product: f32 = (0..dim).map(|k| q[a * dim + k] * q[b * dim + k]).sum();
                let wanted = if a == b { 1.0 } else { 0.0 };
                assert!((product - wanted).abs() < 1e-5);
            }
        }
    }
}
