//! The model room: file -> catalog. Bytes of a header go in, a description of the model comes out.
//!
//! Invariants: nothing here opens a file, and nothing a file says is believed before it is bounded: every count, length,
//! offset and product is checked against a named `*_MAX` and against the bytes the file really has, so a hostile header
//! costs an error that names the file, the tensor and the offset, never a panic, a hang or a large allocation.
//! Place in the house: **file -> catalog** -> plan -> reader -> pool -> lease -> host.
//!
//! [`gguf`] and [`safetensors`] read one shard's header each; [`catalog`] joins the shards and tells layers, experts and
//! row tables apart with the table in [`roles`]; [`dtype`] holds the geometry of every tensor type, [`arch`] that of a whole
//! model, also of one whose weights are not there. [`tiles`] and [`coded`] code 16-bit weights without loss.

pub mod arch;
mod build;
pub mod catalog;
pub mod coded;
mod cursor;
pub mod dtype;
pub mod gguf;
mod head;
pub mod records;
pub mod roles;
pub mod safetensors;
pub mod tiles;
mod value;

pub use catalog::{Catalog, Experts, Format, Layer, LayerKind, LayerSpan, Tensor, Use};
pub use dtype::DType;
pub use roles::Role;
pub use value::{Metadata, Value};

use crate::error::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};

/// Tensors one model may have. The largest known (a safetensors mixture of 61 layers with 384 experts of six tensors each)
/// has 150 000.
pub const TENSOR_COUNT_MAX: u64 = 1 << 20;
/// Files one model may have. The largest known splits have a few hundred.
pub const SHARD_COUNT_MAX: u32 = 4096;
/// Bytes of a tensor name. ggml allows 63; Hugging Face names of vision towers pass 100.
pub const TENSOR_NAME_MAX: u64 = 255;
/// Elements one tensor may have: ggml counts them in an `int64_t`.
pub const ELEMENT_COUNT_MAX: u64 = i64::MAX as u64;

/// One file of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Where it lies.
    pub path: PathBuf,
    /// How long it was when its header was read.
    pub len_bytes: u64,
}

/// What a shard's header says about one tensor, checked against the file's length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The tensor's name, unique in the model.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Elements per dimension in ggml's order (the contiguous one first); unused dimensions are 1. More than four
    /// dimensions (convolutions of vision towers) are folded into the last.
    pub shape: [u64; 4],
    /// Dimensions the file names, at most 4.
    pub dims: u32,
    /// First byte, counted from the start of the file.
    pub offset_bytes: u64,
    /// Bytes the tensor occupies.
    pub len_bytes: u64,
}

impl TensorInfo {
    /// One past the last byte. Bounded by the file's length once the shard is parsed.
    #[must_use]
    pub const fn end_bytes(&self) -> u64 {
        self.offset_bytes.saturating_add(self.len_bytes)
    }
}

/// An error that begins with the file it is about.
pub(crate) fn fault(kind: ErrorKind, path: &Path, what: impl std::fmt::Display) -> Error {
    Error::new(kind, format!("{}: {what}", path.display()))
}

/// A [`ErrorKind::Format`] error that begins with the file it is about.
pub(crate) fn bad_format(path: &Path, what: impl std::fmt::Display) -> Error {
    fault(ErrorKind::Format, path, what)
}

/// What a file name tells about the parts of a split model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitPaths {
    /// Which part the given path is, counted from 0.
    pub part_index: u32,
    /// All parts in order.
    pub paths: Vec<PathBuf>,
}

/// The parts of `name-00002-of-00005.gguf` (or `.safetensors`): path arithmetic only, nothing is looked up. `None` when the
/// name does not follow that pattern, or promises more than [`SHARD_COUNT_MAX`] parts.
#[must_use]
pub fn split_paths(path: &Path) -> Option<SplitPaths> {
    let file_name = path.file_name()?.to_str()?;
    let (stem, extension) = file_name.rsplit_once('.')?;
    let (stem, count) = stem.rsplit_once("-of-")?;
    let (prefix, part) = stem.rsplit_once('-')?;
    let (part, count) = (split_number(part)?, split_number(count)?);
    if part == 0 || part > count || count > SHARD_COUNT_MAX {
        return None;
    }
    let paths = (1..=count)
        .map(|number| {
            path.with_file_name(format!("{prefix}-{number:05}-of-{count:05}.{extension}"))
        })
        .collect();
    Some(SplitPaths {
        part_index: part - 1,
        paths,
    })
}

/// The number of exactly five digits that llama.cpp and Hugging Face write.
fn split_number(text: &str) -> Option<u32> {
    (text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit()))
        .then(|| text.parse().ok())
        .flatten()
}

/// Checks one shard's tensors against each other: no name twice, no byte in two tensors.
pub(crate) fn check_layout(path: &Path, tensors: &[TensorInfo]) -> Result<()> {
    let mut by_name: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    by_name.sort_unstable();
    if let Some(pair) = by_name.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(bad_format(
            path,
            format_args!("tensor '{}' is there twice", pair[0]),
        ));
    }
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().filter(|t| t.len_bytes > 0).collect();
    by_offset.sort_unstable_by_key(|tensor| tensor.offset_bytes);
    for pair in by_offset.windows(2) {
        if pair[0].end_bytes() > pair[1].offset_bytes {
            return Err(bad_format(
                path,
                format_args!(
                    "tensor '{}' at offset {} begins inside tensor '{}', which ends at {}",
                    pair[1].name,
                    pair[1].offset_bytes,
                    pair[0].name,
                    pair[0].end_bytes()
                ),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_names_are_arithmetic() {
        let split = split_paths(Path::new("/m/big-00002-of-00003.gguf")).unwrap();
        assert_eq!(split.part_index, 1);
        let names: Vec<_> = split.paths.iter().map(|p| p.to_str().unwrap()).collect();
        assert_eq!(
            names,
            [
                "/m/big-00001-of-00003.gguf",
                "/m/big-00002-of-00003.gguf",
                "/m/big-00003-of-00003.gguf"
            ]
        );
        for name in [
            "big.gguf",
            "big-00000-of-00003.gguf",
            "big-00004-of-00003.gguf",
            "big-2-of-3.gguf",
            "big-00001-of-99999.gguf",
            "big-0000a-of-00003.gguf",
            "00001-of-00003.gguf",
            "big-00001-of-00003",
            "",
        ] {
            assert_eq!(split_paths(Path::new(name)), None, "{name}");
        }
    }

    fn info(name: &str, offset_bytes: u64, len_bytes: u64) -> TensorInfo {
        TensorInfo {
            name: name.into(),
            dtype: DType::F32,
            shape: [len_bytes / 4, 1, 1, 1],
            dims: 1,
            offset_bytes,
            len_bytes,
        }
    }

    #[test]
    fn overlap_and_duplicates_are_named() {
        let path = Path::new("m.gguf");
        assert!(check_layout(path, &[info("b", 64, 64), info("a", 0, 64)]).is_ok());
        assert!(check_layout(path, &[info("b", 64, 64), info("empty", 70, 0)]).is_ok());
        let overlap = check_layout(path, &[info("b", 60, 64), info("a", 0, 64)]).unwrap_err();
        assert_eq!(
            overlap.to_string(),
            "m.gguf: tensor 'b' at offset 60 begins inside tensor 'a', which ends at 64"
        );
        let twice = check_layout(path, &[info("a", 64, 64), info("a", 0, 64)]).unwrap_err();
        assert_eq!(twice.to_string(), "m.gguf: tensor 'a' is there twice");
    }
}
