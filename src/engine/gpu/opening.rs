//! What a model on a GPU is opened from: its files, compressed or not, and what reads or unpacks them.
//!
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: from the file to the two engines of a GPU.

use std::path::Path;
use std::sync::Arc;

use super::direct::Direct;
use super::source::Packed;
use super::{PIECE_BYTES, packed};
use crate::engine::open::read_catalog;
use crate::engine::stats::{Fallback, FallbackKind};
use crate::error::{Error, ErrorKind, Result};
use crate::io::ShardFile;
use crate::io::coded_file::CodedFile;
use crate::mem::cuda::{Context, Unpacker};
use crate::model::Catalog;

/// The catalog of a model, compressed or not, and whether it is.
///
/// # Errors
/// As [`super::GpuModel::open`].
pub fn catalog_of(path: &Path) -> Result<(Catalog, bool)> {
    let (packed, catalog, _) = open_files(path)?;
    Ok((catalog, packed.is_some()))
}

/// The files of a model: compressed, or as [`read_catalog`] finds them.
pub(super) fn open_files(path: &Path) -> Result<(Option<Arc<CodedFile>>, Catalog, Vec<ShardFile>)> {
    match packed::open(path)? {
        Some((packed, catalog, file)) => Ok((Some(Arc::new(packed)), catalog, vec![file])),
        None => {
            let (catalog, files) = read_catalog(path)?;
            Ok((None, catalog, files))
        }
    }
}

/// What reads by cuFile, or why that is not to be.
pub(super) fn start_direct(
    context: &Arc<Context>,
    files: &Arc<[ShardFile]>,
    is_packed: bool,
) -> (Option<Direct>, Option<Fallback>) {
    let started = match is_packed {
        true => Err(Error::new(
            ErrorKind::Unsupported,
            "compressed models are not read by cuFile",
        )),
        false => Direct::start(context, files),
    };
    match started {
        Ok(direct) => (Some(direct), None),
        Err(error) => {
            let fallback = Fallback {
                kind: FallbackKind::Gds,
                reason: format!("through host memory instead of GDS: {error}"),
            };
            (None, Some(fallback))
        }
    }
}

pub(super) fn unpacking(
    context: &Arc<Context>,
    packed: Option<&Arc<CodedFile>>,
) -> Result<Option<Packed>> {
    let Some(file) = packed else {
        return Ok(None);
    };
    Ok(Some(Packed {
        file: Arc::clone(file),
        unpacker: Arc::new(Unpacker::new(context, PIECE_BYTES)?),
    }))
}
