//! The GPUs of this machine, as every build can ask for them.
//!
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: beside the pool; a build without the feature `cuda`
//! knows none and says so.

use std::fmt;

use crate::error::Result;
use crate::units::HumanBytes;

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its number, from 0.
    pub index: u32,
    /// What its maker calls it.
    pub name: String,
    /// Its memory.
    pub total_bytes: u64,
    /// Of that, what nobody holds.
    pub free_bytes: u64,
    /// The CUDA version of the driver: `13.0`.
    pub driver: String,
    /// Its compute capability: 9 and 0.
    pub capability: (i32, i32),
    /// Whether it can map memory at chosen addresses and hand it to other processes, as pools need.
    pub maps_memory: bool,
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}, {} ({} free), compute capability {}.{}, driver for CUDA {}",
            self.index,
            self.name,
            HumanBytes(self.total_bytes),
            HumanBytes(self.free_bytes),
            self.capability.0,
            self.capability.1,
            self.driver
        )
    }
}

/// Every GPU of this machine that the driver shows.
///
/// # Errors
/// `Unsupported` without a driver, or with one that is too old, or in a build without CUDA; `NotFound` without a GPU; what
/// the driver says.
#[cfg(feature = "cuda")]
pub fn gpus() -> Result<Vec<Gpu>> {
    super::cuda::context::gpus()
}

/// Every GPU of this machine that the driver shows.
///
/// # Errors
/// `Unsupported`: this build has no CUDA.
#[cfg(not(feature = "cuda"))]
pub fn gpus() -> Result<Vec<Gpu>> {
    Err(not_built())
}

/// Whether the CUDA driver's library can be loaded, whatever it then says.
#[must_use]
pub fn driver_is_there() -> bool {
    #[cfg(feature = "cuda")]
    return super::cuda::context::driver_is_there();
    #[cfg(not(feature = "cuda"))]
    false
}

/// What a build without CUDA says.
#[cfg(not(feature = "cuda"))]
pub(crate) fn not_built() -> crate::error::Error {
    crate::error::Error::new(
        crate::error::ErrorKind::Unsupported,
        "this flea is built without CUDA: build it with --features cuda, or leave the weights in host memory",
    )
}
