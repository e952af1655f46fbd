//! How fast the link into VRAM is: copies out of pinned memory, one behind the other.
//!
//! Place: beside the pipeline, for `flea probe`.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::context::Context;
use super::memory::{Access, AddressRange, Vram};
use super::pin::Pinned;
use super::stream::Stream;
use crate::error::Result;
use crate::mem::Place;
use crate::units::MIB;

/// Copied at a time: far beyond what a copy costs to begin.
const COPY_BYTES: u64 = 64 * MIB;

/// Memory on both sides of a link.
#[derive(Debug)]
pub struct LinkTest {
    // In the order in which they have to go.
    stream: Stream,
    range: AddressRange,
    _vram: Vram,
    _pinned: Pinned,
    memory: Place,
}

impl LinkTest {
    /// Takes 64 MiB on either side.
    ///
    /// # Errors
    /// `NoMemory`; that host memory cannot be pinned; what else the driver says.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let mut memory = Place::reserve(COPY_BYTES)?;
        memory.open()?;
        memory.populate(COPY_BYTES as usize)?;
        let (base, len) = (memory.address(), memory.len_bytes());
        // SAFETY: the place lives in the same value and is dropped after what pins it.
        let pinned = unsafe { Pinned::new(context, base, len, len) };
        pinned.pin_all();
        if let Some(error) = pinned.failure() {
            return Err(error);
        }
        let vram = Vram::new(context, COPY_BYTES)?;
        let mut range = AddressRange::reserve(context, COPY_BYTES)?;
        range.map(0, &vram, COPY_BYTES, Access::ReadWrite)?;
        Ok(Self {
            stream: Stream::new(context)?,
            range,
            _vram: vram,
            _pinned: pinned,
            memory,
        })
    }

    /// Bytes per second over about `span`.
    ///
    /// # Errors
    /// What the driver says.
    pub fn round(&self, span: Duration) -> Result<f64> {
        let began = Instant::now();
        let mut copied_bytes = 0;
        while copied_bytes == 0 || began.elapsed() < span {
            let from = self.memory.address() as *const u8;
            // Two under way, so that the link does not wait for this thread.
            // SAFETY: pinned memory of this value, which nobody writes; the wait below is behind both copies.
            unsafe {
                self.stream
                    .copy_in(self.range.base(), from, COPY_BYTES as usize)?;
                self.stream
                    .copy_in(self.range.base(), from, COPY_BYTES as usize)?;
            }
            self.stream.record()?.wait()?;
            copied_bytes += 2 * COPY_BYTES;
        }
        Ok(copied_bytes as f64 / began.elapsed().as_secs_f64().max(1e-9))
    }
}
