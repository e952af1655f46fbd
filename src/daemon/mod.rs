//! flead: one process that holds the pools and serves many programs.

pub mod config;
pub mod pressure;
