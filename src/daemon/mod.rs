//! The daemon: one pool and one drive for many programs.
//!
//! `flead` opens models, streams each of them once, and lets clients on the same machine hold leases of their layers.
//! Nothing a client says or writes is believed. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`:
//! the lease, for hosts in other processes.

pub mod config;
pub mod notify;
pub mod pressure;
pub mod settings;

pub use settings::Settings;
