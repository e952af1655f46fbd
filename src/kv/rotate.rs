//! Rotations that spread a vector's energy over all its coordinates, so that one quantiser fits every coordinate.
//!
//! [`Hadamard`]: random signs, then a Walsh-Hadamard transform of the even part of the length and a Hartley transform of
//! its odd part (96 = 32 x 3), O(d log d) for powers of two. [`Rotors`]: one 3D rotation per three coordinates, nearly
//! free and nearly useless against a heavy channel. Invariants: orthogonal; the same for every process that names the
//! same length; no state.

/// Where the generator of the signs starts. Part of the format: another seed decodes nonsense.
const SEED: u64 = 0x666c_6561_6b76_3031;

/// The next number of a splitmix64 sequence.
pub(super) const fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The randomised Hadamard rotation of a length.
#[derive(Debug, Clone)]
pub struct Hadamard {
    /// A random sign per coordinate, over the square root of the transform's length.
    signs: Vec<f32>,
    /// Length of the Walsh-Hadamard rows, a power of two.
    row: usize,
    /// The symmetric orthogonal Hartley matrix across the rows; empty when there is one row.
    hartley: Vec<f32>,
}

impl Hadamard {
    /// The rotation in `dim` dimensions.
    #[must_use]
    pub fn new(dim: usize) -> Self {
        let row = 1 << dim.trailing_zeros();
        let rows = dim / row;
        let mut state = SEED ^ dim as u64;
        let size = 1.0 / (row as f32).sqrt();
        let signs = (0..dim)
            .map(|_| {
                if splitmix(&mut state) >> 63 == 0 {
                    size
                } else {
                    -size
                }
            })
            .collect();
        let angle = 2.0 * std::f64::consts::PI / rows as f64;
        let hartley = |index: usize| {
            let phase = angle * ((index / rows) * (index % rows) % rows) as f64;
            ((phase.cos() + phase.sin()) / (rows as f64).sqrt()) as f32
        };
        Self {
            signs,
            row,
            hartley: if rows == 1 {
                Vec::new()
            } else {
                (0..rows * rows).map(hartley).collect()
            },
        }
    }

    /// Rotates `x` in place; `spare` is as long.
    pub fn forward(&self, x: &mut [f32], spare: &mut [f32]) {
        for (value, sign) in x.iter_mut().zip(&self.signs) {
            *value *= sign;
        }
        self.transform(x, spare);
    }

    /// Undoes [`Self::forward`].
    pub fn inverse(&self, x: &mut [f32], spare: &mut [f32]) {
        self.transform(x, spare);
        for (value, sign) in x.iter_mut().zip(&self.signs) {
            *value *= sign;
        }
    }

    /// The symmetric part: its own inverse, but for the length of the rows.
    fn transform(&self, x: &mut [f32], spare: &mut [f32]) {
        for row in x.chunks_exact_mut(self.row) {
            walsh_hadamard(row);
        }
        if self.hartley.is_empty() {
            return;
        }
        let rows = x.len() / self.row;
        spare.fill(0.0);
        for (to, weights) in spare
            .chunks_exact_mut(self.row)
            .zip(self.hartley.chunks_exact(rows))
        {
            for (from, weight) in x.chunks_exact(self.row).zip(weights) {
                for (sum, value) in to.iter_mut().zip(from) {
                    *sum += value * weight;
                }
            }
        }
        x.copy_from_slice(spare);
    }
}

/// The unnormalised Walsh-Hadamard transform; the length is a power of two.
pub(super) fn walsh_hadamard(x: &mut [f32]) {
    let mut rows = x.chunks_exact_mut(8);
    for row in &mut rows {
        eight(row.try_into().expect("eight values"));
    }
    let mut half = if rows.into_remainder().is_empty() {
        8
    } else {
        1
    };
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

/// Three butterfly stages within one register. Eight and not sixteen values: what the compiler makes of sixteen with
/// AVX-512 takes five times as long (200 against 37 ns for 128 values).
#[inline(always)]
fn eight(x: &mut [f32; 8]) {
    *x = stage::<4>(stage::<2>(stage::<1>(*x)));
}

#[inline(always)]
fn stage<const HALF: usize>(x: [f32; 8]) -> [f32; 8] {
    // A permutation, then one addition of what has its sign changed: vectors all the way.
    let other: [f32; 8] = std::array::from_fn(|i| x[i ^ HALF]);
    std::array::from_fn(|i| other[i] + if i & HALF == 0 { x[i] } else { -x[i] })
}

/// One rotation in three dimensions per three coordinates; one or two coordinates at the end stay as they are.
#[derive(Debug, Clone)]
pub struct Rotors {
    /// Row-major 3 x 3 matrices.
    matrices: Vec<[f32; 9]>,
}

impl Rotors {
    /// The rotors in `dim` dimensions.
    #[must_use]
    pub fn new(dim: usize) -> Self {
        let mut state = SEED ^ (dim as u64) << 32;
        Self {
            matrices: (0..dim / 3).map(|_| matrix(&mut state)).collect(),
        }
    }

    /// Rotates `x` in place.
    pub fn forward(&self, x: &mut [f32]) {
        for (triple, m) in x.chunks_exact_mut(3).zip(&self.matrices) {
            let [a, b, c] = [triple[0], triple[1], triple[2]];
            for (value, row) in triple.iter_mut().zip(m.chunks_exact(3)) {
                *value = row[0] * a + row[1] * b + row[2] * c;
            }
        }
    }

    /// Undoes [`Self::forward`].
    pub fn inverse(&self, x: &mut [f32]) {
        for (triple, m) in x.chunks_exact_mut(3).zip(&self.matrices) {
            let [a, b, c] = [triple[0], triple[1], triple[2]];
            for (column, value) in triple.iter_mut().enumerate() {
                *value = m[column] * a + m[column + 3] * b + m[column + 6] * c;
            }
        }
    }
}

/// The matrix of a uniformly random unit rotor (a quaternion, drawn from the ball).
fn matrix(state: &mut u64) -> [f32; 9] {
    loop {
        let [s, a, b, c]: [f64; 4] =
            std::array::from_fn(|_| (splitmix(state) >> 11) as f64 / (1u64 << 52) as f64 - 1.0);
        let square = s * s + a * a + b * b + c * c;
        if !(0.01..=1.0).contains(&square) {
            continue;
        }
        let twice = 2.0 / square;
        return [
            1.0 - twice * (b * b + c * c),
            twice * (a * b - s * c),
            twice * (a * c + s * b),
            twice * (a * b + s * c),
            1.0 - twice * (a * a + c * c),
            twice * (b * c - s * a),
            twice * (a * c - s * b),
            twice * (b * c + s * a),
            1.0 - twice * (a * a + b * b),
        ]
        .map(|value| value as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(dim: usize) -> Vec<f32> {
        (0..dim)
            .map(|i| ((i * 37 + 11) % 101) as f32 - 50.0)
            .collect()
    }

    fn energy(x: &[f32]) -> f32 {
        x.iter().map(|v| v * v).sum()
    }

    #[test]
    fn rotations_keep_length_and_come_back() {
        for dim in [16, 24, 64, 80, 96, 128, 255, 256, 576] {
            let (x, mut spare) = (ramp(dim), vec![0.0; dim]);
            let mut y = x.clone();
            let hadamard = Hadamard::new(dim);
            hadamard.forward(&mut y, &mut spare);
            assert!((energy(&y) / energy(&x) - 1.0).abs() < 1e-5, "{dim}");
            hadamard.inverse(&mut y, &mut spare);
            assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-3), "{dim}");
            let rotors = Rotors::new(dim);
            rotors.forward(&mut y);
            assert!((energy(&y) / energy(&x) - 1.0).abs() < 1e-5, "{dim}");
            rotors.inverse(&mut y);
            assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-3), "{dim}");
        }
    }

    #[test]
    fn the_transform_is_the_hadamard_matrix() {
        for dim in [1usize, 2, 8, 16, 64] {
            let mut x = ramp(dim);
            let expected: Vec<f32> = (0..dim)
                .map(|row| {
                    let sign = |column: usize| {
                        if (row & column).count_ones().is_multiple_of(2) {
                            1.0
                        } else {
                            -1.0
                        }
                    };
                    ramp(dim)
                        .iter()
                        .enumerate()
                        .map(|(column, value)| sign(column) * value)
                        .sum()
                })
                .collect();
            walsh_hadamard(&mut x);
            assert_eq!(x, expected, "{dim}");
        }
    }

    #[test]
    fn one_heavy_channel_is_spread_by_hadamard_and_not_by_rotors() {
        let mut x = vec![0.0; 128];
        x[5] = 100.0;
        let (mut flat, mut lumpy) = (x.clone(), x);
        Hadamard::new(128).forward(&mut flat, &mut [0.0; 128]);
        Rotors::new(128).forward(&mut lumpy);
        let peak = |x: &[f32]| x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(peak(&flat) < 9.0 && peak(&lumpy) > 50.0);
    }
}
