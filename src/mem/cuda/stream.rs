//! Streams: copies that run one after another on a GPU, and events that tell others how far they are.
//!
//! Invariant: a stream waits for another by an event, on the GPU; the host waits for single events and never for a device.
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: between the pool in host memory and that in VRAM.
#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::sys::{self, CUevent, CUresult, CUstream};

use super::context::Context;
use super::driver::check;
use crate::error::{Error, ErrorKind, Result};

/// CU_STREAM_NON_BLOCKING: does not wait for the default stream, nor does that for it.
const NON_BLOCKING: u32 = 1;
/// CU_EVENT_BLOCKING_SYNC and CU_EVENT_DISABLE_TIMING: who waits sleeps, and no clock is read.
const SLEEPING_UNTIMED: u32 = 1 | 2;

/// Work in order. May be used by any thread.
#[derive(Debug)]
pub struct Stream {
    raw: CUstream,
    context: Arc<Context>,
}

// SAFETY: the driver takes work for a stream from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

/// A mark in a stream: done when everything before it is.
#[derive(Debug)]
pub struct Event {
    raw: CUevent,
    context: Arc<Context>,
}

// SAFETY: the driver answers about an event on any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Stream {
    /// A stream of its own on a GPU.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is current; the call writes one stream, destroyed in drop.
        let code = unsafe { sys::cuStreamCreate(&raw mut raw, NON_BLOCKING) };
        check(code, "make a stream")?;
        Ok(Self {
            raw,
            context: Arc::clone(context),
        })
    }

    /// The driver's handle.
    pub(super) const fn raw(&self) -> CUstream {
        self.raw
    }

    /// Copies from host memory. Pinned memory is read when the copy runs.
    ///
    /// # Errors
    /// What the driver says, also of work that was asked for earlier.
    ///
    /// # Safety
    /// `from` stays readable and unchanged until an event recorded behind this copy is done.
    pub unsafe fn copy_in(&self, to: u64, from: *const u8, len: usize) -> Result<()> {
        self.context.enter()?;
        // SAFETY: per this function's contract; the driver checks the address in VRAM.
        let code = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), len, self.raw) };
        check(code, format_args!("copy {len} bytes into VRAM"))
    }

    /// Copies to host memory.
    ///
    /// # Errors
    /// What the driver says, also of work that was asked for earlier.
    ///
    /// # Safety
    /// `to` stays writable, and nobody else looks at it, until an event recorded behind this copy is done.
    pub unsafe fn copy_out(&self, to: *mut u8, from: u64, len: usize) -> Result<()> {
        self.context.enter()?;
        // SAFETY: per this function's contract; the driver checks the address in VRAM.
        let code = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, len, self.raw) };
        check(code, format_args!("copy {len} bytes out of VRAM"))
    }

    /// Copies within VRAM.
    ///
    /// # Errors
    /// What the driver says, also of work that was asked for earlier.
    pub fn copy_within(&self, to: u64, from: u64, len: usize) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the driver checks both addresses; no memory of the host is touched.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, len, self.raw) };
        check(code, format_args!("copy {len} bytes within VRAM"))
    }

    /// Writes zeros.
    ///
    /// # Errors
    /// What the driver says, also of work that was asked for earlier.
    pub fn zero(&self, at: u64, len: usize) -> Result<()> {
        self.fill(at, 0, len)
    }

    /// Writes one byte again and again.
    ///
    /// # Errors
    /// What the driver says, also of work that was asked for earlier.
    pub fn fill(&self, at: u64, byte: u8, len: usize) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the driver checks the address; no memory of the host is touched.
        let code = unsafe { sys::cuMemsetD8Async(at, byte, len, self.raw) };
        check(code, format_args!("fill {len} bytes of VRAM"))
    }

    /// Sets a mark behind everything asked for so far.
    ///
    /// # Errors
    /// What the driver says.
    pub fn record(&self) -> Result<Event> {
        self.context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is current; the call writes one event, destroyed in Event's drop.
        let code = unsafe { sys::cuEventCreate(&raw mut raw, SLEEPING_UNTIMED) };
        check(code, "make an event")?;
        let event = Event {
            raw,
            context: Arc::clone(&self.context),
        };
        // SAFETY: an event and a stream of one context, both alive.
        let code = unsafe { sys::cuEventRecord(event.raw, self.raw) };
        check(code, "record an event")?;
        Ok(event)
    }

    /// Whatever is asked for from now on waits, on the GPU, until an event is done.
    ///
    /// # Errors
    /// What the driver says.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.context.enter()?;
        // SAFETY: an event and a stream, both alive; the driver keeps what it needs when the event is destroyed.
        let code = unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) };
        check(code, "have a stream wait for an event")
    }

    /// An event in this stream that is done when everything is that an event of somebody else stands for now. Its owner
    /// may record that one anew at once.
    ///
    /// # Errors
    /// `Invalid` for NULL; what the driver says.
    ///
    /// # Safety
    /// `event` is NULL or an event (`CUevent`, `cudaEvent_t`) of this process that is alive during the call.
    pub unsafe fn behind(&self, event: *mut std::ffi::c_void) -> Result<Event> {
        if event.is_null() {
            let context = "the event is NULL: give one that is recorded behind the last kernel";
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        self.context.enter()?;
        // SAFETY: an event and a stream, both alive, the event by this function's contract; the driver takes down what
        // the event stands for now.
        let code = unsafe { sys::cuStreamWaitEvent(self.raw, event.cast(), 0) };
        check(code, "have a stream wait for a host's event")?;
        self.record()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made in new, destroyed once; the driver finishes work that is left and frees the stream then.
        let destroyed = self
            .context
            .enter()
            .and_then(|()| check(unsafe { sys::cuStreamDestroy_v2(self.raw) }, "end a stream"));
        if let Err(error) = destroyed {
            log::debug!("{error}");
        }
    }
}

impl Event {
    /// Whether it is done.
    ///
    /// # Errors
    /// What the driver says of the work before it.
    pub fn is_done(&self) -> Result<bool> {
        self.context.enter()?;
        // SAFETY: an event that this value holds.
        match unsafe { sys::cuEventQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check(code, "ask for an event").map(|()| true),
        }
    }

    /// Sleeps until it is done.
    ///
    /// # Errors
    /// What the driver says of the work before it.
    pub fn wait(&self) -> Result<()> {
        self.context.enter()?;
        // SAFETY: an event that this value holds.
        check(
            unsafe { sys::cuEventSynchronize(self.raw) },
            "wait for an event",
        )
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in record, destroyed once; the driver lets streams that wait for it finish.
        let destroyed = self
            .context
            .enter()
            .and_then(|()| check(unsafe { sys::cuEventDestroy_v2(self.raw) }, "end an event"));
        if let Err(error) = destroyed {
            log::debug!("{error}");
        }
    }
}
