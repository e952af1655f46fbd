//! What a model needs and where it runs, before hardware is bought and before its weights are fetched.
//!
//! [`source`] finds a model's geometry, [`breakdown`] turns it into bytes by component, [`verdict`] holds that against a
//! [`device`]; [`cost`] says what its tokens cost, [`dhurandhar`] repeats the figures that people have from that tool.
//! Invariants: totals are the sums of their components; every figure is in bytes, and what cannot be counted in 64 bits is
//! an error; more context or more bits never need less memory. Above `model` and `kv`; of the pipeline it uses only the
//! catalog, and the plan of a file that is there is made by `plan`, not here.

pub mod breakdown;
pub mod cost;
pub mod device;
pub mod dhurandhar;
pub mod kv_store;
pub mod registry;
pub mod remote;
pub mod source;
pub mod verdict;

#[cfg(test)]
mod tests;

pub use breakdown::{Breakdown, Question, Strip};
pub use cost::{Cost, Price};
pub use device::Device;
pub use kv_store::{KvStore, weight_bits};
pub use source::Source;
pub use verdict::{Judgement, Verdict};
