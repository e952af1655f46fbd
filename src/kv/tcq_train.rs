//! Makes `tcq_levels.bin`: the level of each window is the mean of the values that the encoder gives it, again and again.
//!
//! `FLEA_BLESS_TCQ=1 cargo test --release --lib tcq_train` trains anew (minutes); otherwise the tests hold the committed
//! levels against what training promises.

use super::math::Density;
use super::rotate::splitmix;
use super::scalar::Spare;
use super::synth::Torch;
use super::tcq::{STATES, Search, Tcq};
use super::vector::length;

const DIM: usize = 128;
const ROUNDS: u32 = 40;
const VECTORS: usize = 3000;

/// Means of equal parts of a Gaussian in random order, narrowed to the variance of what is reproduced.
fn shuffled(bits: u32) -> Vec<f32> {
    let spread = (1.0 - 0.25f64.powi(bits as i32)).sqrt();
    let mut state = 7;
    let mut order: Vec<(u64, usize)> = (0..STATES)
        .map(|index| (splitmix(&mut state), index))
        .collect();
    order.sort_unstable();
    let mut levels = vec![0.0; STATES];
    for (level, (_, place)) in Density::gaussian().equal_parts(STATES).iter().zip(order) {
        levels[place] = (level * spread) as f32;
    }
    levels
}

/// Gaussian vectors of the length that the codec scales them to.
fn sample(count: usize, seed: u32) -> Vec<f32> {
    let mut values = Torch::new(seed).normal(count * DIM);
    for vector in values.chunks_exact_mut(DIM) {
        let scale = (DIM as f32).sqrt() / length(vector).expect("a length");
        vector.iter_mut().for_each(|value| *value *= scale);
    }
    values
}

/// Codes a sample: mean squared error, and for each window the sum and number of its values.
fn round(levels: &[f32], bits: u32, seed: u32, count: usize) -> (f64, Vec<(f64, u32)>) {
    let tcq = Tcq::with_levels(bits, DIM, levels);
    let (mut search, mut spare) = (Search::new(DIM), Spare::new(DIM));
    let mut record = vec![0; tcq.record_bytes()];
    let mut given = vec![(0.0, 0); STATES];
    let mut error = 0.0;
    for vector in sample(count, seed).chunks_exact(DIM) {
        let mut x = vector.to_vec();
        assert!(tcq.encode(&mut x, &mut record, &mut spare, &mut search));
        // What `encode` left in x is the rotated vector.
        for (window, value) in tcq.windows(&record).into_iter().zip(&x) {
            error += f64::from((value - levels[window]) * (value - levels[window]));
            given[window].0 += f64::from(*value);
            given[window].1 += 1;
        }
    }
    (error / (count * DIM) as f64, given)
}

fn train(bits: u32) -> Vec<f32> {
    let mut levels = shuffled(bits);
    for number in 0..ROUNDS {
        let (error, given) = round(&levels, bits, 1000 + number, VECTORS);
        println!(
            "{bits} bits, round {number}: {:.4} x 4^-bits",
            error * 4f64.powi(bits as i32)
        );
        for (level, (sum, count)) in levels.iter_mut().zip(given) {
            // A few imaginary values hold rarely used windows where they are.
            *level = ((f64::from(*level) * 4.0 + sum) / (4.0 + f64::from(count))) as f32;
        }
    }
    levels
}

#[test]
fn training_writes_the_levels() {
    if std::env::var_os("FLEA_BLESS_TCQ").is_none() {
        return;
    }
    let tables: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (1..=4)
            .map(|bits| scope.spawn(move || train(bits)))
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().expect("trained"))
            .collect()
    });
    let bytes: Vec<u8> = tables
        .iter()
        .flatten()
        .flat_map(|level| half::f16::from_f32(*level).to_le_bytes())
        .collect();
    std::fs::write(
        concat!(env!("CARGO_MANIFEST_DIR"), "/src/kv/tcq_levels.bin"),
        bytes,
    )
    .expect("written");
}
