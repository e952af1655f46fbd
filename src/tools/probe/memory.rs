//! Memory bandwidth: reading and copying, by one core and by all.
//!
//! Computing a token reads every weight once, so it takes no less than the weights at this rate. The memory is larger
//! than a processor's caches, on huge pages and touched before it is measured. Place: part of the tool `probe`.

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::{check_stop, median};
use crate::error::{Error, ErrorKind, Result};
use crate::io::AlignedMemory;
use crate::io::profile::Memory;
use crate::mem::limits;
use crate::units::{MIB, PAGE_2M};

/// Memory of all threads together. Larger than the caches of most processors; the largest server processors have more,
/// and then the figure is between the two.
const MEMORY_BYTES: u64 = 512 * MIB;
/// Words that are summed up in one go.
const PAGE_WORDS: usize = 4096;
/// Rounds; the median counts.
const ROUNDS: usize = 5;

/// What the cores do.
#[derive(Debug, Clone, Copy)]
enum Work {
    Read,
    Copy,
}

/// Measures for about `span` per round with one thread and with `cores`.
///
/// # Errors
/// `Refused` or `NoMemory` where 512 MiB cannot be had; `Canceled`.
pub fn measure(cores: u32, span: Duration, stop: &AtomicBool) -> Result<Memory> {
    limits::check_free(MEMORY_BYTES, "measuring memory bandwidth")?;
    let rate = |work, threads| -> Result<f64> {
        check_stop(stop)?;
        measure_one(work, threads, span)
    };
    Ok(Memory {
        cores,
        read_one_gb_per_second: rate(Work::Read, 1)?,
        read_all_gb_per_second: rate(Work::Read, cores)?,
        copy_one_gb_per_second: rate(Work::Copy, 1)?,
        copy_all_gb_per_second: rate(Work::Copy, cores)?,
    })
}

fn measure_one(work: Work, threads: u32, span: Duration) -> Result<f64> {
    let len_bytes = MEMORY_BYTES / u64::from(threads.max(1));
    let memories = (0..threads)
        .map(|_| AlignedMemory::new(len_bytes, PAGE_2M))
        .collect::<Result<Vec<_>>>()?;
    // All begin together: one that begins late would find the memory idle.
    let barrier = Barrier::new(threads as usize);
    let rounds: Vec<Vec<f64>> = std::thread::scope(|scope| {
        let workers: Vec<_> = memories
            .into_iter()
            .map(|memory| scope.spawn(|| rounds(work, memory, span, &barrier)))
            .collect();
        let joined = workers.into_iter().map(|worker| worker.join());
        joined.collect::<std::result::Result<Vec<_>, _>>()
    })
    .map_err(|_| Error::new(ErrorKind::Internal, "a thread of the memory test panicked"))?;
    let sums: Vec<f64> = (0..ROUNDS)
        .map(|round| rounds.iter().map(|rates| rates[round]).sum())
        .collect();
    Ok(median(&sums))
}

/// GB/s of this thread, round by round.
fn rounds(work: Work, mut memory: AlignedMemory, span: Duration, barrier: &Barrier) -> Vec<f64> {
    let rates = (0..ROUNDS).map(|_| {
        barrier.wait();
        let began = Instant::now();
        let mut bytes = 0;
        while began.elapsed() < span {
            bytes += match work {
                Work::Read => read(&memory),
                Work::Copy => copy(&mut memory),
            };
        }
        bytes as f64 / 1e9 / began.elapsed().as_secs_f64().max(1e-9)
    });
    rates.collect()
}

fn read(memory: &AlignedMemory) -> usize {
    let words: &[u64] = bytemuck::cast_slice(memory.bytes());
    for page in words.chunks(PAGE_WORDS) {
        // A plain sum: the compiler makes several wide ones of it, side by side.
        black_box(page.iter().fold(0u64, |sum, word| sum.wrapping_add(*word)));
    }
    memory.bytes().len()
}

fn copy(memory: &mut AlignedMemory) -> usize {
    let bytes = memory.bytes_mut();
    let (from, to) = bytes.split_at_mut(bytes.len() / 2);
    to.copy_from_slice(from);
    black_box(&to);
    from.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_one() {
        let memory = measure(2, Duration::from_millis(1), &AtomicBool::new(false)).unwrap();
        assert_eq!(memory.cores, 2);
        for rate in [
            memory.read_one_gb_per_second,
            memory.read_all_gb_per_second,
            memory.copy_one_gb_per_second,
            memory.copy_all_gb_per_second,
        ] {
            assert!(rate > 0.01 && rate < 10_000.0, "{memory:?}");
        }
    }

    #[test]
    fn reading_reads_all_and_copying_copies() {
        let mut memory = AlignedMemory::new(2 * MIB, PAGE_2M).unwrap();
        assert_eq!(read(&memory), 2 << 20);
        memory.bytes_mut()[7] = 9;
        assert_eq!(copy(&mut memory), 1 << 20);
        assert_eq!(memory.bytes()[(1 << 20) + 7], 9);
    }
}
