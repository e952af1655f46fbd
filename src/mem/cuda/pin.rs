//! Host memory that a GPU reads by itself: pinned in steps, so that a pool of many gigabytes can be used meanwhile.
//!
//! A copy from memory that is not pinned yet is right all the same, only slower: the driver copies it aside first. What a
//! driver does not do is a copy of which a part is pinned, so every copy is cut at steps ([`Pinned::cut`]), and a step
//! becomes pinned between copies and never during one. Invariant: the memory outlives this value (the caller's part). Place
//! in `file -> catalog -> plan -> reader -> pool -> lease -> host`: what makes slots of host memory stages of VRAM.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys;

use super::context::Context;
use super::driver::check;
use crate::error::{Error, Result};
use crate::units::{HumanBytes, MIB};

/// Pinned at a time: some 10 ms, after which a copy that waits may run.
pub const STEP_BYTES: usize = (64 * MIB) as usize;
/// CU_MEMHOSTREGISTER_PORTABLE: pinned for every context.
const PORTABLE: u32 = 1;

/// A range of host memory, of which ever more is pinned.
#[derive(Debug)]
pub struct Pinned {
    base: usize,
    len: usize,
    step: usize,
    /// How many steps from the start are pinned. Held while a copy is handed to the driver.
    done: Mutex<usize>,
    /// Why pinning ended early.
    failed: Mutex<Option<Error>>,
    stop: AtomicBool,
    context: Arc<Context>,
}

impl Pinned {
    /// A range of which nothing is pinned yet. `step` is a multiple of the page size.
    ///
    /// # Safety
    /// The range stays mapped, at this place, as long as this value lives.
    #[must_use]
    pub unsafe fn new(context: &Arc<Context>, base: usize, len: usize, step: usize) -> Self {
        Self {
            base,
            len,
            step: step.max(1),
            done: Mutex::new(0),
            failed: Mutex::new(None),
            stop: AtomicBool::new(false),
            context: Arc::clone(context),
        }
    }

    /// Pins step after step until all are, or [`Pinned::stop`] is called. What cannot be pinned stays as it is, and
    /// [`Pinned::failure`] tells why.
    pub fn pin_all(&self) {
        while !self.stop.load(Ordering::Acquire) {
            match self.pin_step() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    log::warn!("host memory for the GPU is not pinned: {error}");
                    *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return;
                }
            }
        }
    }

    /// Pins the next step; false when there is none.
    fn pin_step(&self) -> Result<bool> {
        let mut done = self.steps();
        let start = *done * self.step;
        if start >= self.len {
            return Ok(false);
        }
        let len = self.step.min(self.len - start);
        self.context.enter()?;
        let at = (self.base + start) as *mut std::ffi::c_void;
        // SAFETY: mapped as long as this value lives, which unregisters it in drop (the caller of new's promise).
        let code = unsafe { sys::cuMemHostRegister_v2(at, len, PORTABLE) };
        check(
            code,
            format_args!(
                "pin {} of host memory (`ulimit -l` and the memory cgroup limit what can be pinned)",
                HumanBytes(len as u64)
            ),
        )?;
        *done += 1;
        Ok(true)
    }

    /// Ends [`Pinned::pin_all`] after its present step.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Why not all of it can be pinned.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        self.failed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Bytes that are pinned.
    #[must_use]
    pub fn pinned_bytes(&self) -> u64 {
        (*self.steps() * self.step).min(self.len) as u64
    }

    /// How many bytes from `at` on one copy may take: up to the end of its step.
    #[must_use]
    pub const fn cut(&self, at: usize, len: usize) -> usize {
        let left = self.step - (at.wrapping_sub(self.base)) % self.step;
        if len < left { len } else { left }
    }

    /// Hands a copy of one step's bytes to the driver, with what is pinned unchanged meanwhile. `copy` is told whether
    /// they are.
    ///
    /// # Errors
    /// What `copy` gives.
    pub fn with_step<T>(&self, at: usize, copy: impl FnOnce(bool) -> Result<T>) -> Result<T> {
        let done = self.steps();
        let is_pinned = at.wrapping_sub(self.base) / self.step < *done;
        copy(is_pinned)
    }

    fn steps(&self) -> MutexGuard<'_, usize> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let steps = *self.steps();
        let unpinned = self.context.enter().and_then(|()| {
            (0..steps).try_for_each(|step| {
                let at = (self.base + step * self.step) as *mut std::ffi::c_void;
                // SAFETY: a range registered in pin_step, unregistered once; copies from it are done (the caller's part).
                check(unsafe { sys::cuMemHostUnregister(at) }, "unpin host memory")
            })
        });
        if let Err(error) = unpinned {
            log::debug!("GPU {}: {error}", self.context.index());
        }
    }
}
