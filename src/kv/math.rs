//! The arithmetic that tables are made of: exponential and logarithm, and the density of a rotated coordinate.
//!
//! Invariant: the same tables on every machine. Only IEEE operations that are exact to the last bit stand here, no
//! `exp` of a C library: an entropy coder whose two ends disagree about one frequency decodes nonsense.

/// Steps of the grid on which densities are integrated, and how far it reaches (in standard deviations).
const GRID_STEPS: usize = 1 << 15;
const GRID_REACH: f64 = 9.0;

/// `e` to the `x`; 0 below -700.
#[must_use]
pub fn exp(x: f64) -> f64 {
    if x < -700.0 {
        return 0.0;
    }
    let n = (x * std::f64::consts::LOG2_E).round();
    let r = x - n * std::f64::consts::LN_2;
    // |r| is at most 0.35: eighteen terms are beyond the last bit.
    let mut sum = 1.0;
    for term in (1..=18).rev() {
        sum = 1.0 + sum * r / f64::from(term);
    }
    let power = f64::from_bits(((n as i64 + 1023) as u64) << 52);
    sum * power
}

/// The natural logarithm of a positive, normal `x`.
#[must_use]
pub fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mut mantissa = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    // ln m = 2 atanh((m - 1) / (m + 1)), with an argument of at most 0.172.
    let z = (mantissa - 1.0) / (mantissa + 1.0);
    let square = z * z;
    let mut sum = 0.0;
    for term in (0..=15).rev() {
        sum = sum * square + 1.0 / f64::from(2 * term + 1);
    }
    2.0 * z * sum + exponent as f64 * std::f64::consts::LN_2
}

/// The logarithm to base 2 of a positive, normal `x`.
#[must_use]
pub fn log2(x: f64) -> f64 {
    ln(x) / std::f64::consts::LN_2
}

/// The integral of a symmetric density of unit variance over [0, u], and its first two moments there.
#[derive(Debug, Clone)]
pub struct Density {
    step: f64,
    mass: Vec<f64>,
    first: Vec<f64>,
    second: Vec<f64>,
    cube_root: Vec<f64>,
}

impl Density {
    /// One coordinate of a uniformly distributed point on the sphere of radius sqrt(dim) in `dim` dimensions: what a
    /// random rotation makes of any vector. Approaches the Gaussian as `dim` grows.
    #[must_use]
    pub fn sphere(dim: usize) -> Self {
        let dim = dim as f64;
        let power = (dim - 3.0) / 2.0;
        Self::new(dim.sqrt().min(GRID_REACH), |u| {
            let inside = 1.0 - u * u / dim;
            if inside <= 1e-300 {
                0.0
            } else {
                exp(power * ln(inside))
            }
        })
    }

    /// The normal distribution.
    #[must_use]
    pub fn gaussian() -> Self {
        Self::new(GRID_REACH, |u| exp(-0.5 * u * u))
    }

    fn new(reach: f64, density: impl Fn(f64) -> f64) -> Self {
        let step = reach / GRID_STEPS as f64;
        let mut columns: [Vec<f64>; 4] = std::array::from_fn(|_| vec![0.0]);
        let at = |index: usize| {
            let u = index as f64 * step;
            let p = density(u);
            let root = if p > 1e-300 { exp(ln(p) / 3.0) } else { 0.0 };
            [p, p * u, p * u * u, root]
        };
        let mut left = at(0);
        for index in 0..GRID_STEPS {
            let right = at(index + 1);
            for (column, (a, b)) in columns.iter_mut().zip(left.into_iter().zip(right)) {
                column.push(column[index] + 0.5 * (a + b) * step);
            }
            left = right;
        }
        let total = 2.0 * columns[0][GRID_STEPS];
        for column in &mut columns[..3] {
            column.iter_mut().for_each(|value| *value /= total);
        }
        let [mass, first, second, cube_root] = columns;
        Self {
            step,
            mass,
            first,
            second,
            cube_root,
        }
    }

    fn at(&self, column: &[f64], u: f64) -> f64 {
        let place = (u / self.step).clamp(0.0, GRID_STEPS as f64);
        let index = (place as usize).min(GRID_STEPS - 1);
        column[index] + (column[index + 1] - column[index]) * (place - index as f64)
    }

    /// Mass, first and second moment of [low, high], both at least 0.
    #[must_use]
    pub fn moments(&self, low: f64, high: f64) -> [f64; 3] {
        [&self.mass, &self.first, &self.second]
            .map(|column| self.at(column, high) - self.at(column, low))
    }

    /// The mean over [low, high]; its middle where there is no mass.
    #[must_use]
    pub fn mean(&self, low: f64, high: f64) -> f64 {
        let [mass, first, _] = self.moments(low, high);
        if mass > 1e-13 {
            (first / mass).clamp(low, high)
        } else {
            0.5 * (low + high)
        }
    }

    /// The means of `count` (an even number of) intervals of the same mass, ascending.
    #[must_use]
    pub fn equal_parts(&self, count: usize) -> Vec<f64> {
        let half = count / 2;
        let place = |index: usize| {
            let wanted = 0.5 * index as f64 / half as f64;
            let above = self
                .mass
                .partition_point(|mass| *mass < wanted)
                .clamp(1, GRID_STEPS);
            let (low, high) = (self.mass[above - 1], self.mass[above]);
            let part = if high > low {
                (wanted - low) / (high - low)
            } else {
                0.0
            };
            (above as f64 - 1.0 + part) * self.step
        };
        let mut upper: Vec<f64> = (0..half)
            .map(|index| {
                let high = if index + 1 == half {
                    1e9
                } else {
                    place(index + 1)
                };
                self.mean(place(index), high)
            })
            .collect();
        let mut all: Vec<f64> = upper.iter().rev().map(|value| -value).collect();
        all.append(&mut upper);
        all
    }

    /// `count` places in [0, reach] as dense as the cube root of the density: where many levels lie best.
    #[must_use]
    pub fn companded(&self, count: usize) -> Vec<f64> {
        let total = self.cube_root[GRID_STEPS];
        (0..count)
            .map(|index| {
                let wanted = total * (index as f64 + 0.5) / count as f64;
                self.cube_root.partition_point(|sum| *sum < wanted) as f64 * self.step
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_and_logarithm_agree_with_the_library() {
        for index in -2000..=2000 {
            let x = f64::from(index) * 0.17;
            assert!((exp(x) / x.exp() - 1.0).abs() < 1e-13, "exp({x})");
        }
        for index in 1..4000 {
            let x = f64::from(index) * 0.013;
            assert!(
                (ln(x) - x.ln()).abs() < 1e-14 * (1.0 + x.ln().abs()),
                "ln({x})"
            );
        }
        assert_eq!(exp(-1e9), 0.0);
    }

    #[test]
    fn densities_have_unit_variance() {
        for density in [
            Density::gaussian(),
            Density::sphere(64),
            Density::sphere(512),
        ] {
            let [mass, _, second] = density.moments(0.0, 100.0);
            assert!(
                (mass - 0.5).abs() < 1e-9 && (second - 0.5).abs() < 1e-6,
                "{mass} {second}"
            );
        }
        // The share within one standard deviation, to seven digits.
        let [within, _, _] = Density::gaussian().moments(0.0, 1.0);
        assert!((2.0 * within - 0.682_689_492).abs() < 1e-7);
    }
}
