//! What the daemon asks of a model beside the calls of a host: its pool's file, its clients' overdue leases, a pause.

use super::model::Model;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::PageRun;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// What a client is told about a layer that does not come.
#[derive(Debug, Clone)]
pub struct Failure {
    /// What the last attempt said.
    pub error: Error,
    /// No further attempt will be made.
    pub fatal: bool,
}

impl Model {
    /// Wakes the stream: a client waits for something, or gave something back.
    pub fn wake(&self) {
        if let Some((_, waker)) = self.core_and_waker() {
            waker.wake();
        }
    }

    /// Whether the stream shall stop reading ahead, because a new plan is being made.
    pub fn set_draining(&self, draining: bool) {
        if let Some((core, waker)) = self.core_and_waker() {
            core.state().draining = draining;
            waker.wake();
        }
    }

    /// Clients that have held a layer for longer than `timeout` while others wanted its slot.
    #[must_use]
    pub fn overdue(&self, timeout: Duration) -> Vec<u64> {
        self.core_and_waker()
            .map_or_else(Vec::new, |(core, _)| core.state().overdue(timeout))
    }

    /// Why a layer does not come; `None` when nothing failed.
    #[must_use]
    pub fn failure(&self, layer: u32) -> Option<Failure> {
        let (core, _) = self.core_and_waker()?;
        let state = core.state();
        if state.unservable(layer) {
            let context = format!(
                "layer {layer}: every slot it may use waits for reads that the drive has not given back; unload the model"
            );
            let error = Error::new(ErrorKind::Io, context);
            return Some(Failure { error, fatal: true });
        }
        let fatal = state.fatal.is_some();
        state.failure(layer).map(|error| Failure { error, fatal })
    }

    /// The pool's file for a client: read-only.
    ///
    /// # Errors
    /// `Unsupported` in the private backing, `Internal` before there is a plan.
    pub fn pool_fd(&self) -> Result<OwnedFd> {
        match self.core_and_waker() {
            Some((core, _)) => core.pool().read_only_fd(),
            None => Err(Error::new(ErrorKind::Internal, "no plan was made yet")),
        }
    }

    /// The pool as a stage for a GPU.
    ///
    /// # Errors
    /// As [`crate::mem::cuda::Stage::new`]; `Internal` before there is a plan.
    #[cfg(feature = "cuda")]
    pub(super) fn stage(
        &self,
        context: &std::sync::Arc<crate::mem::cuda::Context>,
    ) -> Result<crate::mem::cuda::Stage> {
        match self.core_and_waker() {
            Some((core, _)) => crate::mem::cuda::Stage::new(context, &core.pool()),
            None => Err(Error::new(ErrorKind::Internal, "no plan was made yet")),
        }
    }

    /// Where a run of the plan lies in the pool's file.
    #[must_use]
    pub fn pool_offset_bytes(&self, run: &PageRun) -> Option<u64> {
        let (core, _) = self.core_and_waker()?;
        core.pool().file_offset_bytes(run)
    }

    /// Where slot 0 begins in the pool's file.
    #[must_use]
    pub fn ring_offset_bytes(&self) -> u64 {
        self.core_and_waker()
            .map_or(0, |(core, _)| core.pool().ring_offset_bytes())
    }

    /// Bytes of memory the pool holds now, as the kernel counts.
    #[must_use]
    pub fn pool_held_bytes(&self) -> u64 {
        self.core_and_waker()
            .map_or(0, |(core, _)| core.pool().held_bytes())
    }

    /// Slots the ring really has.
    #[must_use]
    pub fn ring_slots_count(&self) -> u32 {
        self.core_and_waker()
            .map_or(0, |(core, _)| core.pool().slots_count())
    }
}
