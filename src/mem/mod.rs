//! Memory: the windows a host looks through, the pool that gives them memory, and what the machine has of it.
//!
//! Invariants: a place without valid bytes cannot be read (private backing: the MMU sees to it); memory the kernel may
//! still write to is never moved, reused or freed; nothing here allocates more than the plan says; what was asked for
//! and not had (huge pages, a NUMA node) is reported, never passed over. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: the pool, and the windows that a host sees it through.

#[cfg(feature = "cuda")]
pub mod cuda;
pub mod gpu;
pub mod limits;
pub mod place;
pub mod pool;
pub mod topology;
pub mod window;
pub mod words;

mod behind;
mod fill;
mod fresh;
mod host;
mod private;
mod report;
mod shared;
mod slot;
mod view;

pub use place::Place;
pub use pool::{Backing, Pool, PoolOptions};
pub use report::{Fallback, PageProbe, PageReport, PageSource};
pub use topology::{Binding, Topology};
pub use view::PoolFile;
pub use window::Windows;
pub use words::SharedWords;
