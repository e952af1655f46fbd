//! How long things took: a histogram of fixed size with logarithmic steps, for the stream's own use.
//!
//! Invariants: recording allocates nothing and takes no lock; a percentile is exact to an eighth of itself, the mean and
//! the largest value are exact. Place: engine, beside the counters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Steps between a power of two and the next.
const STEPS: u64 = 8;
const STEPS_LOG2: u32 = STEPS.trailing_zeros();
/// Up to 2^43 ns, more than two hours.
const OCTAVES: usize = 41;
const BINS: usize = OCTAVES * STEPS as usize;

/// Counts of durations; one thread records, any thread reads.
#[derive(Debug)]
pub struct Histogram {
    bins: [AtomicU64; BINS],
    sum_ns: AtomicU64,
    max_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            bins: [const { AtomicU64::new(0) }; BINS],
            sum_ns: AtomicU64::new(0),
            max_ns: AtomicU64::new(0),
        }
    }
}

/// What a histogram says: how many, and how long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Latency {
    /// How many were recorded.
    pub count: u64,
    /// Their mean.
    pub mean_ns: u64,
    /// Half of them took no longer.
    pub p50_ns: u64,
    /// 95 of 100 took no longer.
    pub p95_ns: u64,
    /// 99 of 100 took no longer.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

impl Histogram {
    /// Counts one.
    pub fn record(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.bins[bin_of(ns)].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
        self.max_ns.fetch_max(ns, Ordering::Relaxed);
    }

    /// What was counted so far.
    #[must_use]
    pub fn summary(&self) -> Latency {
        let counts: Vec<u64> = self
            .bins
            .iter()
            .map(|bin| bin.load(Ordering::Relaxed))
            .collect();
        let count: u64 = counts.iter().sum();
        if count == 0 {
            return Latency::default();
        }
        let max_ns = self.max_ns.load(Ordering::Relaxed);
        let percentile = |percent: u64| {
            let rank = (count * percent).div_ceil(100);
            let mut seen = 0;
            let bin = counts.iter().position(|bin| {
                seen += bin;
                seen >= rank
            });
            bin.map_or(max_ns, |bin| end_of(bin).min(max_ns))
        };
        Latency {
            count,
            mean_ns: self.sum_ns.load(Ordering::Relaxed) / count,
            p50_ns: percentile(50),
            p95_ns: percentile(95),
            p99_ns: percentile(99),
            max_ns,
        }
    }
}

/// The first 8 bins are 0 to 7 ns; from there on every power of two has 8.
fn bin_of(ns: u64) -> usize {
    if ns < STEPS {
        return ns as usize;
    }
    let octave = ns.ilog2() - STEPS_LOG2;
    let step = (ns >> octave) - STEPS;
    ((u64::from(octave) + 1) * STEPS + step).min(BINS as u64 - 1) as usize
}

/// The largest value of a bin.
fn end_of(bin: usize) -> u64 {
    let (octave, step) = (bin as u64 / STEPS, bin as u64 % STEPS);
    match octave {
        0 => step,
        octave => ((STEPS + step + 1) << (octave - 1)) - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_bin() {
        let mut last = 0;
        for ns in (0..4096)
            .chain((12..43).flat_map(|power| [(1 << power) - 1, 1 << power, 3 << (power - 1)]))
        {
            let bin = bin_of(ns);
            assert!(ns <= end_of(bin), "{ns} in {bin}");
            assert!(bin == 0 || ns > end_of(bin - 1), "{ns} in {bin}");
            last = last.max(bin);
        }
        assert!(last < BINS);
        assert_eq!(bin_of(u64::MAX), BINS - 1);
    }

    #[test]
    fn percentiles_are_exact_to_an_eighth() {
        let histogram = Histogram::default();
        assert_eq!(histogram.summary(), Latency::default());
        for microseconds in 1..=1000 {
            histogram.record(Duration::from_micros(microseconds));
        }
        let summary = histogram.summary();
        assert_eq!(
            (summary.count, summary.mean_ns, summary.max_ns),
            (1000, 500_500, 1_000_000)
        );
        for (found, exact) in [
            (summary.p50_ns, 500_000),
            (summary.p95_ns, 950_000),
            (summary.p99_ns, 990_000),
        ] {
            assert!(
                found >= exact && found <= exact * 9 / 8,
                "{found} for {exact}"
            );
        }
    }
}
