//! The engine: ties plan, pool and reader together. `file -> catalog -> plan -> reader -> pool -> **lease** -> host`.
//!
//! * [`open`]: path to catalog. * [`options`]: how to open it. * [`model`]: what a host holds. * `layout`: what there is to fetch.
//! * `order`: what comes next. * [`trace`]: what happened when. * `latency`: how long loads took. * `reading`: how it is read.
//! * `state`: who holds what. * `demand`: what is asked for. * `pick`: what to read next. * `contention`: whose slot it may have. * `experts`: which of them are cached.
//! * [`ranges`]: leases of byte ranges. * [`rows`]: rows of embeddings, copied out. * [`board`]: leases of other processes. * `client`: what each of them is due. * `wait`: how a host sleeps for it.
//! * `stream`: the one thread that moves bytes. * `gpu`: the same one floor up, into VRAM.

mod ahead;
pub mod board;
mod client;
mod contention;
mod counting;
mod demand;
mod experts;
#[cfg(feature = "cuda")]
pub mod gpu;
mod latency;
mod layout;
pub mod leases;
pub mod model;
pub mod open;
pub mod options;
mod order;
mod pick;
mod placement;
pub mod ranges;
mod reading;
pub mod rows;
pub mod serve;
pub mod share;
mod state;
pub mod stats;
mod stream;
pub mod trace;
mod wait;

pub use board::Board;
pub use experts::ExpertCounts;
pub use latency::Latency;
pub use layout::Spans;
pub use leases::LEASES_MAX;
pub use model::Model;
pub use open::read_catalog;
pub use options::{BudgetSpec, OpenOptions};
pub use ranges::RANGES_MAX;
pub use rows::ROWS_MAX;
pub use stats::{
    BudgetReport, Fallback, FallbackKind, RowStats, STALL_BOUNDS_NS, SlotCounts, Stats,
};
pub use stream::Shared;
pub use trace::Trace;
