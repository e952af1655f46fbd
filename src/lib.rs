//! flea runs models that do not fit.

#[cfg(feature = "cli")]
pub mod cli;
pub mod error;
pub mod io;
#[cfg(feature = "cli")]
pub mod tools;
pub mod units;

pub use error::{Error, ErrorKind, Result};
