//! Sums over a vector that become vector instructions: sixteen running sums instead of one.

/// The inner product.
#[must_use]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (mut left, mut right) = (a.chunks_exact(16), b.chunks_exact(16));
    for (x, y) in (&mut left).zip(&mut right) {
        for (sum, (x, y)) in sums.iter_mut().zip(x.iter().zip(y)) {
            *sum += x * y;
        }
    }
    let rest: f32 = left
        .remainder()
        .iter()
        .zip(right.remainder())
        .map(|(x, y)| x * y)
        .sum();
    sums.iter().sum::<f32>() + rest
}

/// The Euclidean length of a vector if a codec can work with it: `None` where it has a NaN or an infinity, or is not
/// zero and yet too short or too long for its square to be an f32.
#[must_use]
pub fn length(x: &[f32]) -> Option<f32> {
    let square = dot(x, x);
    if square.is_finite() && square >= 1e-30 {
        return Some(square.sqrt());
    }
    (square == 0.0 && x.iter().all(|value| *value == 0.0)).then_some(0.0)
}
