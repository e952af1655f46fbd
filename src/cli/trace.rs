//! `--trace FILE`: the file is made before the work begins, so that a wrong path is noticed at once, and written however the
//! work ends: done, failed or interrupted.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::engine::Trace;
use crate::error::{Error, Result};

/// The file that a trace goes to.
#[derive(Debug)]
pub struct TraceFile {
    path: PathBuf,
    file: File,
    trace: Arc<Trace>,
}

impl TraceFile {
    /// Makes the file, if one is asked for.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(path: Option<&Path>) -> Result<Option<Self>> {
        let Some(path) = path else { return Ok(None) };
        let file = File::create(path).map_err(|error| {
            Error::from_io(&error, format_args!("create the trace {}", path.display()))
        })?;
        Ok(Some(Self {
            path: path.to_path_buf(),
            file,
            trace: Arc::new(Trace::default()),
        }))
    }

    /// Where the events go.
    #[must_use]
    pub fn trace(&self) -> Arc<Trace> {
        Arc::clone(&self.trace)
    }

    /// Writes it; `label` names a layer.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(self, label: &dyn Fn(u32) -> String) -> Result<()> {
        let dropped_count = self.trace.dropped_count();
        if dropped_count > 0 {
            log::warn!(
                "{}: the trace holds the last events only, {dropped_count} older ones gave way",
                self.path.display()
            );
        }
        self.trace
            .write_json(&mut BufWriter::new(self.file), label)
            .map_err(|error| {
                Error::from_io(
                    &error,
                    format_args!("write the trace {}", self.path.display()),
                )
            })
    }
}

/// The outcome of the work, or else that of writing its trace: the first failure counts.
///
/// # Errors
/// The first of the two.
pub fn both<T>(outcome: Result<T>, written: Result<()>) -> Result<T> {
    let value = outcome?;
    written.map(|()| value)
}
