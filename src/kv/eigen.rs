//! Eigenvalues and eigenvectors of a symmetric matrix, by Jacobi rotations: slow, short and accurate.

const SWEEPS_MAX: usize = 30;

/// Eigenvalues in descending order and their unit eigenvectors, one per row.
#[must_use]
pub fn symmetric(mut a: Vec<f64>, dim: usize) -> (Vec<f64>, Vec<f64>) {
    let mut v = vec![0.0; dim * dim];
    (0..dim).for_each(|i| v[i * dim + i] = 1.0);
    let size: f64 = a.iter().map(|value| value * value).sum();
    for _ in 0..SWEEPS_MAX {
        let mut off = 0.0;
        for p in 0..dim {
            for q in p + 1..dim {
                off += a[p * dim + q] * a[p * dim + q];
                rotate(&mut a, &mut v, dim, p, q);
            }
        }
        if off <= size * 1e-22 {
            break;
        }
    }
    let mut order: Vec<usize> = (0..dim).collect();
    order.sort_by(|x, y| a[y * dim + y].total_cmp(&a[x * dim + x]));
    let values = order.iter().map(|i| a[i * dim + i]).collect();
    let vectors = order
        .iter()
        .flat_map(|i| v[i * dim..(i + 1) * dim].iter().copied())
        .collect();
    (values, vectors)
}

/// Makes the element (p, q) zero. `v` keeps the eigenvectors as rows.
fn rotate(a: &mut [f64], v: &mut [f64], dim: usize, p: usize, q: usize) {
    let apq = a[p * dim + q];
    if apq == 0.0 {
        return;
    }
    let theta = (a[q * dim + q] - a[p * dim + p]) / (2.0 * apq);
    let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
    let t = if theta == 0.0 { 1.0 } else { t };
    let c = 1.0 / (t * t + 1.0).sqrt();
    let s = t * c;
    for k in 0..dim {
        let (x, y) = (a[k * dim + p], a[k * dim + q]);
        a[k * dim + p] = c * x - s * y;
        a[k * dim + q] = s * x + c * y;
    }
    turn_rows(a, dim, p, q, c, s);
    turn_rows(v, dim, p, q, c, s);
}

fn turn_rows(m: &mut [f64], dim: usize, p: usize, q: usize, c: f64, s: f64) {
    let (upper, lower) = m.split_at_mut(q * dim);
    for (x, y) in upper[p * dim..(p + 1) * dim]
        .iter_mut()
        .zip(&mut lower[..dim])
    {
        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_matrix_is_taken_apart() {
        let dim = 24;
        let mut state = 1;
        let mut a = vec![0.0; dim * dim];
        for i in 0..dim {
            for j in 0..=i {
                let value = (super::super::rotate::splitmix(&mut state) >> 40) as f64 / 1e6 - 8.0;
                a[i * dim + j] = value;
                a[j * dim + i] = value;
            }
        }
        let (values, vectors) = symmetric(a.clone(), dim);
        assert!(values.is_sorted_by(|x, y| x >= y));
        for (value, vector) in values.iter().zip(vectors.chunks_exact(dim)) {
            for row in 0..dim {
                let product: f64 = (0..dim).map(|k| a[row * dim + k] * vector[k]).sum();
                assert!((product - value * vector[row]).abs() < 1e-8);
            }
        }
    }
}
