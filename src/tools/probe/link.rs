//! The links: how fast pinned memory goes into the VRAM of each GPU.
//!
//! Place: part of the tool `probe`; a build without the feature `cuda` has none.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::{check_stop, median};
use crate::error::Result;
use crate::io::profile::Link;
use crate::mem::cuda::Context;
use crate::mem::cuda::rate::LinkTest;
use crate::mem::gpu::Gpu;

/// Rounds; the median counts.
const ROUNDS: usize = 5;

/// Measures the link of a GPU, for about `span` per round.
///
/// # Errors
/// What the driver says; `Canceled`.
pub fn measure(gpu: &Gpu, span: Duration, stop: &AtomicBool) -> Result<Link> {
    let test = LinkTest::new(&Context::new(gpu.index)?)?;
    let mut rates = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        check_stop(stop)?;
        rates.push(test.round(span)? / 1e9);
    }
    Ok(Link {
        gpu: gpu.name.clone(),
        gpu_index: gpu.index,
        gb_per_second: median(&rates),
    })
}
