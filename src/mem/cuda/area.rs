//! VRAM at one place of its own: what is not a window of a model, but what a copy or a kernel works in.
//!
//! Invariant: a [`Span`] was inside of mapped VRAM when it was made, never host memory. Whoever holds one keeps the memory
//! until the work on it is done. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: beside the pool of a GPU.

#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::sys;

use super::context::Context;
use super::driver::check;
use super::memory::{Access, AddressRange, Vram, granularity_bytes};
use super::stream::Stream;
use crate::error::{Error, ErrorKind, Result};
use crate::units::HumanBytes;

/// VRAM with an address.
#[derive(Debug)]
pub struct VramArea {
    // Unmapped before the memory is released.
    range: AddressRange,
    _memory: Vram,
}

/// VRAM as libraries know it, from cuMemAlloc: what cuFile may read into.
#[derive(Debug)]
pub struct DeviceArea {
    at: u64,
    len_bytes: u64,
    context: Arc<Context>,
}

/// Bytes of VRAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    at: u64,
    len_bytes: u64,
}

impl VramArea {
    /// Takes at least `len_bytes`.
    ///
    /// # Errors
    /// `NoMemory` when the GPU has not that much left; what the driver says.
    pub fn new(context: &Arc<Context>, len_bytes: u64) -> Result<Self> {
        context.enter()?;
        let len_bytes = len_bytes
            .max(1)
            .next_multiple_of(granularity_bytes(context)?);
        let memory = Vram::new(context, len_bytes)?;
        let mut range = AddressRange::reserve(context, len_bytes)?;
        range.map(0, &memory, len_bytes, Access::ReadWrite)?;
        Ok(Self {
            range,
            _memory: memory,
        })
    }

    /// Some of its bytes.
    ///
    /// # Errors
    /// `Invalid` for bytes that are not in it.
    pub fn span(&self, offset_bytes: u64, len_bytes: u64) -> Result<Span> {
        Span::inside(
            self.range.base(),
            self.range.len_bytes(),
            offset_bytes,
            len_bytes,
        )
    }
}

impl DeviceArea {
    /// Takes `len_bytes`.
    ///
    /// # Errors
    /// `NoMemory` when the GPU has not that much left; what the driver says.
    pub fn new(context: &Arc<Context>, len_bytes: u64) -> Result<Self> {
        context.enter()?;
        let mut at = 0;
        // SAFETY: the context is current; the call writes one address, freed in drop.
        let code = unsafe { sys::cuMemAlloc_v2(&raw mut at, len_bytes.max(1) as usize) };
        check(
            code,
            format_args!(
                "take {} of VRAM on GPU {}",
                HumanBytes(len_bytes),
                context.index()
            ),
        )?;
        Ok(Self {
            at,
            len_bytes: len_bytes.max(1),
            context: Arc::clone(context),
        })
    }

    /// All of it.
    #[must_use]
    pub const fn span(&self) -> Span {
        Span {
            at: self.at,
            len_bytes: self.len_bytes,
        }
    }
}

impl Drop for DeviceArea {
    fn drop(&mut self) {
        let freed = self.context.enter().and_then(|()| {
            // SAFETY: taken in new, freed once; who works in it waits for its work first.
            check(unsafe { sys::cuMemFree_v2(self.at) }, "free VRAM")
        });
        if let Err(error) = freed {
            log::debug!("GPU {}: {error}", self.context.index());
        }
    }
}

impl Span {
    /// Bytes of memory of `whole_bytes` that is mapped at `base`.
    pub(super) fn inside(
        base: u64,
        whole_bytes: u64,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Self> {
        let end = offset_bytes.checked_add(len_bytes);
        if len_bytes == 0 || end.is_none_or(|end| end > whole_bytes) {
            let context =
                format!("{len_bytes} bytes at {offset_bytes} of {whole_bytes} bytes of VRAM");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        Ok(Self {
            at: base + offset_bytes,
            len_bytes,
        })
    }

    /// Its address on the GPU.
    #[must_use]
    pub const fn at(self) -> u64 {
        self.at
    }

    /// Its length.
    #[must_use]
    pub const fn len_bytes(self) -> u64 {
        self.len_bytes
    }
}

// ---- for programs that look themselves; weights come and go through stages and readbacks -------------------------

impl Span {
    /// Its first `len_bytes`.
    ///
    /// # Errors
    /// `Invalid` for more than there are.
    pub fn first(self, len_bytes: u64) -> Result<Self> {
        Self::inside(self.at, self.len_bytes, 0, len_bytes)
    }

    /// Writes bytes at its beginning, behind everything asked of the stream before, and waits.
    ///
    /// # Errors
    /// `Invalid` for more than there is room for; what the driver says.
    pub fn write(self, stream: &Stream, bytes: &[u8]) -> Result<()> {
        let to = self.first(bytes.len() as u64)?;
        // SAFETY: borrowed until the event behind the copy is done. Where waiting fails the GPU copies no more.
        unsafe { stream.copy_in(to.at, bytes.as_ptr(), bytes.len())? };
        stream.record()?.wait()
    }

    /// Its bytes, once everything asked of the stream before is done.
    ///
    /// # Errors
    /// What the driver says.
    pub fn read(self, stream: &Stream) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.len_bytes as usize];
        // SAFETY: nobody looks at the vector before the event behind the copy is done.
        unsafe { stream.copy_out(bytes.as_mut_ptr(), self.at, bytes.len())? };
        stream.record()?.wait()?;
        Ok(bytes)
    }
}
