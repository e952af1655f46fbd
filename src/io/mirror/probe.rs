//! A read now and then of a copy that is too slow to be used, so that one that has recovered is found.
//!
//! Invariants: it lands in memory of its own, so nobody ever waits for it; at most one is under way; memory that the kernel
//! keeps is never freed. Place: part of `reader` in `file -> catalog -> plan -> reader -> pool -> lease -> host`.

use crate::error::Result;
use crate::io::{AlignedMemory, Request};
use crate::units::PAGE_2M;

/// The key of such a read; no fetch has this number.
pub(super) const KEY: u64 = u64::MAX;
/// Its length.
pub(super) const PROBE_BYTES: u64 = 1 << 20;

/// The memory, and whether it is in use.
#[derive(Debug)]
pub(super) struct Probe {
    /// None once the kernel has kept it.
    memory: Option<AlignedMemory>,
    is_out: bool,
}

impl Probe {
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            memory: Some(AlignedMemory::new(PROBE_BYTES, PAGE_2M)?),
            is_out: false,
        })
    }

    /// The beginning of what `like` asks for, into this memory; `None` while that is in use.
    pub(super) fn request(&self, like: &Request) -> Option<Request> {
        let memory = self.memory.as_ref().filter(|_| !self.is_out)?;
        Some(Request {
            key: KEY,
            len_bytes: like.len_bytes.min(PROBE_BYTES),
            target: memory.as_ptr(),
            ..*like
        })
    }

    /// It has been submitted.
    pub(super) const fn went_out(&mut self) {
        self.is_out = true;
    }

    /// Nothing more comes of it. Memory that is not `returned` is the kernel's for ever.
    pub(super) fn came_back(&mut self, returned: bool) {
        self.is_out = false;
        if !returned && let Some(memory) = self.memory.take() {
            memory.leak();
        }
    }

    pub(super) const fn is_out(&self) -> bool {
        self.is_out
    }
}
