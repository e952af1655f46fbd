//! Gives resident pages and the ring's slots their memory while the first pass already reads, so that a model's first token
//! does not wait for a pool to be cleared.
//!
//! Threads walk the places in the order of the file, a few MiB ahead of the reader or behind it. Nothing depends on who
//! comes first: a read into a page without memory makes the kernel give it some, only more slowly. What
//! must not be lost is the refusal: when memory runs out meanwhile, [`FillBehind::check`] says so before the next read.
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: the birth of a pool, beside [`super::fill`].
#![allow(unsafe_code)]

use super::host;
use super::limits;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{HumanBytes, MIB};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

/// What is populated in one call. The stream's moves wait for the lock that the call holds, so it has to be short: 4 MiB
/// are 0.4 ms, and 8 ms in a virtual machine whose host has to find the memory first, less than what is in flight.
const STEP_BYTES: usize = (4 * MIB) as usize;
/// Bytes between two looks at what is free.
const CHECK_BYTES: usize = (64 * MIB) as usize;

/// A range of a pool: address and length.
pub(super) type Range = (usize, usize);

/// The threads that fill; stopped and joined when dropped.
#[derive(Debug)]
pub(super) struct FillBehind {
    work: Arc<Work>,
    threads: Vec<JoinHandle<()>>,
}

/// What is populated in one call.
#[derive(Debug, Clone, Copy)]
struct Step {
    address: usize,
    len: usize,
    /// Of all steps in front of it.
    before_bytes: usize,
}

#[derive(Debug)]
struct Work {
    /// Populated one by one, in their order.
    steps: Vec<Step>,
    total_bytes: usize,
    /// The first step that nobody has taken.
    next: AtomicUsize,
    stop: AtomicBool,
    failed: OnceLock<Error>,
}

impl FillBehind {
    /// Begins to populate `ranges`, in their order; the first `hurry_bytes` in two threads: while they are filled nobody
    /// computes yet, and in a virtual machine whose host has to find the memory one thread is slower than the drive.
    ///
    /// # Safety
    /// Every range is whole pages, belongs to flea, and stays mapped until this is dropped. While it is writable, nothing but
    /// its bytes that are being read is written there.
    pub(super) unsafe fn begin(ranges: &[Range], hurry_bytes: usize) -> Result<Self> {
        let (steps, total_bytes) = steps_of(ranges);
        let hurry = steps.partition_point(|step| step.before_bytes < hurry_bytes);
        let work = Arc::new(Work {
            steps,
            total_bytes,
            next: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            failed: OnceLock::new(),
        });
        let mut behind = Self {
            work,
            threads: Vec::with_capacity(2),
        };
        let all = behind.work.steps.len();
        for until in [all, hurry] {
            let work = Arc::clone(&behind.work);
            let thread = std::thread::Builder::new()
                .name("flea-fill".to_owned())
                // SAFETY: per this function's contract; drop joins the thread.
                .spawn(move || unsafe { work.fill(until) })
                .map_err(|error| Error::from_io(&error, "start a thread that fills the pool"))?;
            behind.threads.push(thread);
        }
        Ok(behind)
    }

    /// What kept the pool from being filled.
    pub(super) fn check(&self) -> Result<()> {
        self.work.failed.get().cloned().map_or(Ok(()), Err)
    }
}

impl Drop for FillBehind {
    fn drop(&mut self) {
        self.work.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread that fills the pool had panicked");
            }
        }
    }
}

impl Work {
    /// Takes steps before `until` until none is left.
    ///
    /// # Safety
    /// As [`FillBehind::begin`], until it returns.
    unsafe fn fill(&self, until: usize) {
        while !self.stop.load(Ordering::Relaxed) {
            let take = |next: usize| (next < until).then_some(next + 1);
            let taken = self
                .next
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
            let Ok(index) = taken else { return };
            let step = self.steps[index];
            // SAFETY: a part of a range, per this function's contract.
            let populated = self
                .check_free(&step)
                .and_then(|()| unsafe { host::populate_beside_reads(step.address, step.len) });
            match populated {
                Ok(true) => {}
                Ok(false) => self.stop.store(true, Ordering::Relaxed),
                Err(error) => {
                    // The first reason is the one that counts.
                    let _ = self.failed.set(error);
                    self.stop.store(true, Ordering::Relaxed);
                }
            }
        }
    }

    /// The kernel answers a cgroup that is full with the OOM killer, so what is free is asked first. What the reader populated
    /// itself is counted twice here; it is a few requests' worth, and errs on the safe side.
    fn check_free(&self, step: &Step) -> Result<()> {
        let Some(next_bytes) = due_check(step, self.total_bytes) else {
            return Ok(());
        };
        let done_bytes = step.before_bytes;
        limits::check_free(next_bytes as u64, "the next part of the pool").map_err(|error| {
            let context = format!(
                "{error}; the pool was filled to {} of {}",
                HumanBytes(done_bytes as u64),
                HumanBytes(self.total_bytes as u64)
            );
            error.with_context(context).with_kind(ErrorKind::NoMemory)
        })
    }
}

/// Ranges in steps, and the bytes of all of them.
fn steps_of(ranges: &[Range]) -> (Vec<Step>, usize) {
    let mut steps = Vec::new();
    let mut before_bytes = 0;
    for &(address, range_len) in ranges {
        for skip in (0..range_len).step_by(STEP_BYTES) {
            let len = STEP_BYTES.min(range_len - skip);
            steps.push(Step {
                address: address + skip,
                len,
                before_bytes,
            });
            before_bytes += len;
        }
    }
    (steps, before_bytes)
}

/// How much has to be free before a step, where it is time to look: [`CHECK_BYTES`] since the last look. The first is that
/// of who made the pool.
fn due_check(step: &Step, total_bytes: usize) -> Option<usize> {
    let checks_before = step.before_bytes / CHECK_BYTES;
    let checks_behind = (step.before_bytes + step.len) / CHECK_BYTES;
    let is_due = checks_behind > checks_before && step.before_bytes > 0;
    is_due.then(|| (CHECK_BYTES + STEP_BYTES).min(total_bytes - step.before_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::host::Protection;
    use crate::mem::limits::process_memory_bytes;

    #[test]
    fn what_is_free_is_asked_all_the_way_through_short_ranges() {
        const COUNT: usize = 2000;
        let ranges: Vec<Range> = (0..COUNT).map(|index| (index << 20, 512 << 10)).collect();
        let (steps, total_bytes) = steps_of(&ranges);
        assert_eq!((steps.len(), total_bytes), (COUNT, COUNT * (512 << 10)));
        let mut covered = CHECK_BYTES; // whoever made the pool asked for all of it
        for step in &steps {
            if let Some(next_bytes) = due_check(step, total_bytes) {
                assert!(
                    step.before_bytes <= covered,
                    "a gap at {}",
                    step.before_bytes
                );
                covered = step.before_bytes + next_bytes;
            }
        }
        assert_eq!(covered, total_bytes);
    }

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
            FillBehind::begin(&[(base, LEN)], LEN / 4).unwrap()
        };
        while !behind.threads.iter().all(JoinHandle::is_finished) {
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
