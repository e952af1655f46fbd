//! Measures what flea depends on: how a drive is read fastest, whether it keeps that up, and how fast memory is.
//!
//! `drive` finds the best request length and depth by climbing until the rate falls, `memory` the bandwidth of the
//! processor's memory, `link` that into the memory of GPUs, `rows` what single rows of a table cost, by mmap and by the row reader. Invariants: a figure is given only for a drive that the page cache was kept out of and only when
//! its rounds agree; the path's file is only read, a directory gets a nameless file. The result is a
//! [`Profile`](crate::io::profile::Profile). Place: a tool beside the pipeline; it uses `file` and `reader`.

mod drive;
#[cfg(feature = "cuda")]
mod link;
mod memory;
pub mod rows;

use std::sync::atomic::{AtomicBool, Ordering};

pub use drive::{FILE_BYTES_MIN, ProbeOptions, Probed, measure, rate_now};
#[cfg(feature = "cuda")]
pub use link::measure as measure_link;
pub use memory::measure as measure_memory;

use crate::error::{Error, ErrorKind, Result};

/// Ends a measurement between two points.
fn check_stop(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) {
        return Err(Error::new(ErrorKind::Canceled, "interrupted"));
    }
    Ok(())
}

/// The middle of some figures; 0 of none.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

/// How far the rounds lie apart: (largest - smallest) / median, the best and the worst round left out where there are
/// five or more.
fn spread(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = if sorted.len() >= 5 {
        &sorted[1..sorted.len() - 1]
    } else {
        &sorted[..]
    };
    match (middle.first(), middle.last()) {
        (Some(least), Some(most)) => (most - least) / median(middle).max(1e-9),
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_spread_are_those_of_the_middle() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-12);
        assert!((median(&[4.0, 1.0]) - 2.5).abs() < 1e-12);
        assert!(median(&[]).abs() < 1e-12);
        // One outlier on either side is forgiven, two are not.
        assert!(spread(&[2.0, 2.0, 0.1, 2.0, 9.0]).abs() < 1e-12);
        assert!((spread(&[2.0, 1.0, 0.1, 2.0, 9.0]) - 0.5).abs() < 1e-12);
        assert!((spread(&[1.0, 2.0]) - 1.0 / 1.5).abs() < 1e-12);
    }
}
