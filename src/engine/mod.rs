//! The engine: ties plan, pool and reader together. `file -> catalog -> plan -> reader -> pool -> **lease** -> host`.
//!
//! * [`open`]: path to catalog. * [`model`]: what a host holds. * `layout`: what there is to fetch.
//! * `order`: what comes next. * [`trace`]: what happened when. * `reading`: how it is read. * `state`: who holds what. * `wait`: how a host sleeps for it. * `stream`: the one thread that moves bytes.

mod layout;
pub mod model;
pub mod open;
mod order;
mod placement;
mod reading;
mod state;
pub mod stats;
mod stream;
pub mod trace;
mod wait;

pub use model::{BudgetSpec, Model, OpenOptions};
pub use open::read_catalog;
pub use state::LEASES_MAX;
pub use stats::{BudgetReport, Fallback, FallbackKind, Stats};
pub use trace::Trace;
