//! flea runs models that do not fit.

pub mod error;
pub mod io;
pub mod units;

pub use error::{Error, ErrorKind, Result};
