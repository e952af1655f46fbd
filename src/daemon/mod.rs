//! The daemon: one pool and one drive for many programs.
//!
//! `flead` opens models, streams each of them once, and lets clients on the same machine hold leases of their layers.
//! Nothing a client says or writes is believed. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`:
//! the lease, for hosts in other processes.

mod answer;
mod bar;
pub mod config;
mod divide;
mod hosted;
pub mod http;
mod listener;
pub mod metrics;
pub mod notify;
pub mod pressure;
mod server;
pub mod service;
mod session;
pub mod settings;
mod shelf;
mod worker;

pub use listener::Listener;
pub use server::{Alone, Server, Surroundings, TICK};
pub use settings::Settings;
