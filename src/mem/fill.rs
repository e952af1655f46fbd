//! Gives a new pool its memory, piece by piece: bound to its node, checked against every limit, and stopped on request.
//!
//! The kernel answers a cgroup that is full with the OOM killer, not with an error, so what is free is asked before
//! each piece. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: the birth of a pool.
#![allow(unsafe_code)]

use super::host;
use super::limits;
use super::report::Fallback;
use super::topology::Binding;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{HumanBytes, MIB, PAGE_2M};
use std::sync::atomic::{AtomicBool, Ordering};

/// What one thread populates at a time. 64 MiB take some 20 ms: short enough to answer a Ctrl-C, long enough that asking for limits
/// (0.1 ms) and starting a thread (0.05 ms) are nothing.
const PIECE_BYTES: usize = (64 * MIB) as usize;
/// Clearing pages is bound by memory, which a few cores saturate.
const THREADS_MAX: usize = 4;

/// Progress of populating a pool.
#[derive(Debug)]
pub(super) struct Fill<'a> {
    cancel: Option<&'a AtomicBool>,
    binding: Option<&'a Binding>,
    page_bytes: u64,
    total_bytes: u64,
    done_bytes: u64,
    /// Bytes since the limits were last asked.
    unchecked_bytes: usize,
    /// False for MFD_HUGETLB, whose pages are reserved apart and charged to no limit.
    charged: bool,
    threads: usize,
    /// What was wanted and not had.
    pub(super) fallbacks: Vec<Fallback>,
}

impl<'a> Fill<'a> {
    /// Begins to fill a pool of `total_bytes`; refused at once when that much is not free.
    pub(super) fn begin(
        total_bytes: u64,
        page_bytes: u64,
        charged: bool,
        binding: Option<&'a Binding>,
        cancel: Option<&'a AtomicBool>,
    ) -> Result<Self> {
        if charged {
            limits::check_free(
                total_bytes,
                &format!("a pool of {}", HumanBytes(total_bytes)),
            )?;
        }
        Ok(Self {
            cancel,
            binding,
            page_bytes,
            total_bytes,
            done_bytes: 0,
            unchecked_bytes: 0,
            charged,
            threads: std::thread::available_parallelism()
                .map_or(1, |count| count.get().min(THREADS_MAX)),
            fallbacks: Vec::new(),
        })
    }

    /// Gives a range its memory. `advise` asks for the page size of the plan: not for hugetlb mappings, which have theirs.
    ///
    /// # Safety
    /// The range belongs to flea, is mapped read-write and is whole pages; nobody else uses it yet.
    pub(super) unsafe fn range(&mut self, address: usize, len: usize, advise: bool) -> Result<()> {
        if advise {
            // SAFETY: per this function's contract.
            unsafe { self.advise(address, len)? };
        }
        self.bind(address, len);
        let mut at = address;
        while at < address + len {
            let piece = (PIECE_BYTES * self.threads).min(address + len - at);
            self.check(piece)?;
            // SAFETY: a part of the range, per this function's contract.
            unsafe { populate(at, piece) }.map_err(|error| self.stopped(error))?;
            self.done_bytes += piece as u64;
            at += piece;
        }
        Ok(())
    }

    /// Says where a range's memory shall come from; it gets it later, from [`super::behind`].
    ///
    /// # Safety
    /// As [`Fill::range`].
    pub(super) unsafe fn range_later(&mut self, address: usize, len: usize) -> Result<()> {
        // SAFETY: per this function's contract.
        unsafe { self.advise(address, len)? };
        self.bind(address, len);
        Ok(())
    }

    /// Asks for the page size of the plan.
    ///
    /// # Safety
    /// As [`Fill::range`].
    unsafe fn advise(&self, address: usize, len: usize) -> Result<()> {
        // SAFETY: per this function's contract.
        unsafe { host::want_huge_pages(address, len, self.page_bytes >= PAGE_2M) }
    }

    /// Binds a range to the node; a failure is reported once and the memory is taken from anywhere.
    fn bind(&mut self, address: usize, len: usize) {
        let Some(binding) = self.binding else { return };
        let told = self
            .fallbacks
            .iter()
            .any(|fallback| matches!(fallback, Fallback::NotBound { .. }));
        if told {
            return;
        }
        let rest = self.total_bytes.saturating_sub(self.done_bytes);
        // SAFETY: the range belongs to flea and has no memory yet.
        if let Err(error) = unsafe { binding.bind_memory(address, len, rest) } {
            self.fallbacks.push(Fallback::NotBound {
                reason: error.to_string(),
            });
        }
    }

    fn check(&mut self, piece: usize) -> Result<()> {
        if self.cancel.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
            return Err(Error::new(
                ErrorKind::Canceled,
                format!("stopped while filling the pool, {}", self.progress()),
            ));
        }
        self.unchecked_bytes += piece;
        if !self.charged || self.unchecked_bytes < PIECE_BYTES * self.threads {
            return Ok(());
        }
        self.unchecked_bytes = 0;
        let rest = self.total_bytes.saturating_sub(self.done_bytes);
        limits::check_free(rest, "the rest of the pool")
            .map_err(|error| self.stopped(error.with_kind(ErrorKind::NoMemory)))
    }

    fn stopped(&self, error: Error) -> Error {
        let text = format!("{error}; the pool was filled {}", self.progress());
        error.with_context(text)
    }

    fn progress(&self) -> String {
        format!(
            "to {} of {}",
            HumanBytes(self.done_bytes),
            HumanBytes(self.total_bytes)
        )
    }
}

/// Populates a range, [`PIECE_BYTES`] in each thread.
///
/// # Safety
/// As [`host::populate`].
unsafe fn populate(address: usize, len: usize) -> Result<()> {
    let first = len.min(PIECE_BYTES);
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (first..len)
            .step_by(PIECE_BYTES)
            .map(|skip| {
                let part = PIECE_BYTES.min(len - skip);
                // SAFETY: parts of the range that do not overlap, per this function's contract.
                scope.spawn(move || unsafe { host::populate(address + skip, part) })
            })
            .collect();
        // SAFETY: the first part of the range, per this function's contract.
        let mut result = unsafe { host::populate(address, first) };
        for helper in helpers {
            let part = helper.join().unwrap_or_else(|_| {
                Err(Error::new(
                    ErrorKind::Internal,
                    "a thread that fills the pool panicked",
                ))
            });
            result = result.and(part);
        }
        result
    })
}
