//! Gives resident pages their memory while the first pass already reads, so that a model's first token does not wait
//! for a pool to be cleared.
//!
//! One thread walks the resident places in the order of the file, a few MiB ahead of the reader or behind it. Nothing
//! depends on who comes first: a read into a page without memory makes the kernel give it some, only more slowly. What
//! must not be lost is the refusal: when memory runs out meanwhile, [`FillBehind::check`] says so before the next read.
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: the birth of a pool, beside [`super::fill`].
#![allow(unsafe_code)]

use super::host;
use super::limits;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{HumanBytes, MIB};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

/// What is populated in one call. The stream's moves wait for the lock that the call holds, so it has to be short: 4 MiB
/// are 0.4 ms, and 8 ms in a virtual machine whose host has to find the memory first, less than what is in flight.
const STEP_BYTES: usize = (4 * MIB) as usize;
/// Bytes between two looks at what is free.
const CHECK_BYTES: usize = (64 * MIB) as usize;

/// A range of a pool: address and length.
pub(super) type Range = (usize, usize);

/// The thread that fills; stopped and joined when dropped.
#[derive(Debug)]
pub(super) struct FillBehind {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    failed: OnceLock<Error>,
}

impl FillBehind {
    /// Begins to populate `ranges`, in their order.
    ///
    /// # Safety
    /// Every range is whole pages, belongs to flea, stays mapped until this is dropped, and is writable until its bytes
    /// have been read into it.
    pub(super) unsafe fn begin(ranges: Vec<Range>) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("flea-fill".to_owned())
            .spawn(move || {
                // SAFETY: per this function's contract; drop joins the thread.
                if let Err(error) = unsafe { fill(&ranges, &theirs.stop) } {
                    // Nobody else sets it.
                    let _ = theirs.failed.set(error);
                }
            })
            .map_err(|error| Error::from_io(&error, "start the thread that fills the pool"))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// What kept the pool from being filled.
    pub(super) fn check(&self) -> Result<()> {
        self.shared.failed.get().cloned().map_or(Ok(()), Err)
    }
}

impl Drop for FillBehind {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            log::error!("the thread that fills the pool had panicked");
        }
    }
}

/// Populates the ranges step by step.
///
/// # Safety
/// As [`FillBehind::begin`], until it returns.
unsafe fn fill(ranges: &[Range], stop: &AtomicBool) -> Result<()> {
    let total_bytes: usize = ranges.iter().map(|(_, len)| len).sum();
    let mut done_bytes = 0;
    let mut unchecked_bytes = 0;
    for &(address, len) in ranges {
        for skip in (0..len).step_by(STEP_BYTES) {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let step = STEP_BYTES.min(len - skip);
            unchecked_bytes += step;
            if unchecked_bytes >= CHECK_BYTES {
                unchecked_bytes = 0;
                check_free(done_bytes, total_bytes)?;
            }
            // SAFETY: a part of a range, per this function's contract.
            if !unsafe { host::populate_beside_reads(address + skip, step)? } {
                return Ok(());
            }
            done_bytes += step;
        }
    }
    log::debug!("the pool is filled: resident_bytes={total_bytes}");
    Ok(())
}

/// The kernel answers a cgroup that is full with the OOM killer, so what is free is asked first. What the reader populated
/// itself is counted twice here; it is a few requests' worth, and errs on the safe side.
fn check_free(done_bytes: usize, total_bytes: usize) -> Result<()> {
    let step = CHECK_BYTES.min(total_bytes - done_bytes);
    limits::check_free(step as u64, "the next part of the pool").map_err(|error| {
        let context = format!(
            "{error}; the pool was filled to {} of {}",
            HumanBytes(done_bytes as u64),
            HumanBytes(total_bytes as u64)
        );
        Error::new(ErrorKind::NoMemory, context)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::host::Protection;
    use crate::mem::limits::process_memory_bytes;

    #[test]
    fn memory_arrives_and_what_is_protected_meanwhile_is_passed_over() {
        const LEN: usize = 64 << 20;
        let base = host::reserve(LEN as u64).unwrap();
        let before = process_memory_bytes().unwrap();
        // SAFETY: a fresh reservation of this test.
        let behind = unsafe {
            host::protect(base, LEN, Protection::ReadWrite).unwrap();
            // The first page tells the kernel's answer for a range that is not writable from its not knowing the call.
            host::populate(base, 4096).unwrap();
            host::protect(base + LEN / 2, LEN / 4, Protection::Read).unwrap();
            FillBehind::begin(vec![(base, LEN)]).unwrap()
        };
        while !behind.thread.as_ref().unwrap().is_finished() {
            std::thread::yield_now();
        }
        behind.check().unwrap();
        let grown = process_memory_bytes().unwrap().saturating_sub(before);
        drop(behind);
        // SAFETY: as above; the thread is joined.
        unsafe { host::unmap(base, LEN).unwrap() };
        // Other tests run beside this one: only a lower bound means something.
        assert!(grown >= (LEN / 2) as u64, "{grown}");
    }
}
