//! `--logits FILE`: the raw f32 logits, one row per generated token.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// The file of `--logits`.
#[derive(Debug)]
pub(super) struct LogitsFile {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
}

impl LogitsFile {
    /// Rows go to a file beside `path` that takes its name when they are all written: a run that fails, or a path typed
    /// by mistake, destroys nothing. A model is never overwritten.
    pub(super) fn create(path: &Path, model: &Path) -> Result<Self> {
        let same = |a: &Path, b: &Path| Some(a.canonicalize().ok()? == b.canonicalize().ok()?);
        if same(path, model) == Some(true) {
            let context = format!(
                "--logits {}: that is the model itself; name another file",
                path.display()
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let mut name = path.as_os_str().to_owned();
        // Devices and pipes are written to as they are.
        if path.metadata().map_or(true, |metadata| metadata.is_file()) {
            name.push(".tmp");
        }
        let temporary = PathBuf::from(name);
        let file = File::create(&temporary).map_err(|error| {
            Error::from_io(&error, format_args!("create {}", temporary.display()))
        })?;
        Ok(Self {
            path: path.to_owned(),
            temporary,
            file: BufWriter::new(file),
        })
    }

    pub(super) fn write(&mut self, row: &[f32]) -> Result<()> {
        self.file
            .write_all(bytemuck::cast_slice(row))
            .map_err(|error| self.failed(&error))
    }

    pub(super) fn finish(mut self) -> Result<()> {
        self.file
            .flush()
            .and_then(|()| {
                if self.temporary == self.path {
                    return Ok(());
                }
                std::fs::rename(&self.temporary, &self.path)
            })
            .map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &std::io::Error) -> Error {
        Error::from_io(error, format_args!("write {}", self.path.display()))
    }
}

impl Drop for LogitsFile {
    fn drop(&mut self) {
        // After finish it is gone; before, its rows are half of an answer.
        if self.temporary != self.path {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}
