//! flea runs models that do not fit: it streams weights from NVMe into a hard memory budget, just before they are used.
//!
//! The whole of it is one pipeline, `file -> catalog -> plan -> reader -> pool -> lease -> host`, and each arrow is a
//! room of the house:
//!
//! * [`model`]: what is in the files. Headers in, a [`model::Catalog`] out: tensors, layers, extents. No I/O.
//! * [`plan`]: which pages of it stay in memory and which are streamed, so that every layer streams the same number of
//!   pages and the budget is full. Pure arithmetic: the same catalog and budget give the same [`plan::Plan`].
//! * [`mem`]: windows that mirror the files at constant addresses, and the pool that gives pages of them memory.
//! * [`io`]: moves bytes with O_DIRECT, by io_uring or pread threads, and knows every way in which a read goes wrong.
//! * [`engine`]: ties the four together. [`engine::Model`] is what a host holds: acquire a layer, use it, release it.
//! * [`proto`]: the same model in a daemon that several programs share, over a socket and shared words.
//! * [`kv`]: codecs for the keys and values of the attention. Pure, beside the pipeline: vectors in, bytes out.
//! * [`ffi`]: the same as a C library; `include/flea.h` is generated from it.
//!
//! Around the engine stand `host` (llama.cpp in process, for `flea run`), `tools` (synthetic models, benches) and
//! `cli` (the programs). Dependencies point one way: each room uses only those above it.
//!
//! ```no_run
//! use flea::engine::{Model, OpenOptions};
//! # fn main() -> flea::Result<()> {
//! let model = Model::open("model.gguf".as_ref(), OpenOptions::default())?;
//! for layer in 0..model.catalog().layers.len() as u32 {
//!     model.acquire(layer, None, None)?;
//!     // Compute with the weights at model.address(shard, offset): they are there until the release.
//!     model.release(layer)?;
//! }
//! # Ok(())
//! # }
//! ```

#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "cli")]
pub mod daemon;
pub mod engine;
pub mod error;
pub mod ffi;
#[cfg(feature = "run")]
pub mod host;
pub mod io;
pub mod kv;
pub mod mem;
pub mod model;
pub mod plan;
pub mod proto;
#[cfg(feature = "cli")]
pub mod tools;
pub mod units;

pub use error::{Error, ErrorKind, Result};
