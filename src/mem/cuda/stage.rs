//! A stage: a pool of host memory that a stream copies out of, into VRAM.
//!
//! The pool must not move its pages, so it is one of the shared backing; copies read its own mapping, not the windows.
//! Invariant: the memory stays where it is until the last copy that was asked for is done, also when the pool is dropped
//! before. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: from the pool in host memory to that in
//! VRAM.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::context::Context;
use super::pin::{Pinned, STEP_BYTES};
use super::stream::{Event, Stream};
use crate::error::{Error, ErrorKind, Result};
use crate::mem::Pool;
use crate::mem::shared::Memory;

/// See the module's head.
#[derive(Debug)]
pub struct Stage {
    // In the order in which they have to go; `drop` waits for the stream first.
    stream: Stream,
    pinned: Pinned,
    memory: Arc<Memory>,
}

impl Stage {
    /// A stage in a pool, of which nothing is pinned yet.
    ///
    /// # Errors
    /// `Invalid` for a pool of the private backing; what the driver says.
    pub fn new(context: &Arc<Context>, pool: &Pool) -> Result<Self> {
        let Some(memory) = pool.shared_memory() else {
            let text = "weights go to a GPU through a pool of the shared backing, whose pages stay in their places";
            return Err(Error::new(ErrorKind::Invalid, text));
        };
        let memory = Arc::clone(memory);
        let stream = Stream::new(context)?;
        // SAFETY: the mapping goes with `memory`, which this value drops after what pins it.
        let pinned = unsafe { Pinned::new(context, memory.base, memory.len, STEP_BYTES) };
        Ok(Self {
            stream,
            pinned,
            memory,
        })
    }

    /// Copies `len` bytes at an offset of the pool to an address in VRAM, once everything asked for before is done. The
    /// bytes must not change before an event recorded behind this is done. Returns how many of them are pinned.
    ///
    /// # Errors
    /// `Invalid` for bytes outside of the pool; what the driver says, also of earlier copies.
    pub fn copy_in(&self, to: u64, offset_bytes: u64, len: usize) -> Result<usize> {
        let end = offset_bytes.checked_add(len as u64);
        if end.is_none_or(|end| end > self.memory.len as u64) {
            let text = format!("{len} bytes at {offset_bytes} are not in the pool that is staged");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let start = self.memory.base + offset_bytes as usize;
        let (mut done, mut pinned_bytes) = (0, 0);
        while done < len {
            let at = start + done;
            let cut = self.pinned.cut(at, len - done);
            let is_pinned = self.pinned.with_step(at, |is_pinned| {
                // SAFETY: within the mapping, which stays until drop has waited for this copy.
                unsafe {
                    self.stream
                        .copy_in(to + done as u64, at as *const u8, cut)?
                };
                Ok(is_pinned)
            })?;
            pinned_bytes += if is_pinned { cut } else { 0 };
            done += cut;
        }
        Ok(pinned_bytes)
    }

    /// Copies memory that is not the pool's, in order with the other copies.
    ///
    /// # Errors
    /// What the driver says, also of earlier copies.
    ///
    /// # Safety
    /// `from` stays readable and unchanged until an event recorded behind this copy is done.
    pub(super) unsafe fn copy_pinned(&self, to: u64, from: *const u8, len: usize) -> Result<()> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.stream.copy_in(to, from, len) }
    }

    /// Writes zeros, in order with the copies.
    ///
    /// # Errors
    /// What the driver says.
    pub fn zero(&self, at: u64, len: usize) -> Result<()> {
        self.stream.zero(at, len)
    }

    /// Copies asked for from now on wait, on the GPU, for an event.
    ///
    /// # Errors
    /// What the driver says.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.stream.wait(event)
    }

    /// Sets a mark behind everything asked for so far.
    ///
    /// # Errors
    /// What the driver says.
    pub fn record(&self) -> Result<Event> {
        self.stream.record()
    }

    /// What of it is pinned, and what keeps the rest from it.
    #[must_use]
    pub const fn pinned(&self) -> &Pinned {
        &self.pinned
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // A GPU that is lost copies no more.
        if let Err(error) = self.stream.record().and_then(|event| event.wait()) {
            log::debug!("the end of a stage: {error}");
        }
    }
}
