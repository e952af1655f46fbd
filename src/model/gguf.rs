//! GGUF headers: a bounded parser of one shard, version 2 and 3, little-endian.
//!
//! Invariants: bytes are consumed in order and only up to the end of the tensor infos; a count allocates nothing until its
//! elements have been read; every element costs file bytes, and a header costs at most [`HEADER_BYTES_MAX`] of them, so time
//! and memory are bounded by what the file really holds. Token arrays are walked, not kept: a 5 MB tokenizer costs one pass.
//! Place in the house: **file -> catalog** -> plan -> reader -> pool -> lease -> host.

use super::cursor::Cursor;
use super::value::read_value;
use super::{
    DType, ELEMENT_COUNT_MAX, Metadata, SHARD_COUNT_MAX, Shard, TENSOR_COUNT_MAX, TENSOR_NAME_MAX,
    TensorInfo, Value, bad_format, check_layout, fault,
};
use crate::error::{ErrorKind, Result};
use crate::units::align_up;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

pub use super::cursor::HEADER_BYTES_MAX;
pub use super::value::{ARRAY_DEPTH_MAX, INTEGERS_KEPT_MAX, TEXT_KEPT_BYTES_MAX};
pub use super::{SplitPaths, split_paths};

/// The first four bytes.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Bytes before the first key: magic, version, tensor count, key count.
pub const PREAMBLE_BYTES: u64 = 24;
/// Metadata keys. Real files have fewer than 100.
pub const KEY_COUNT_MAX: u64 = 1 << 16;
/// Bytes of a key: the format's own limit.
pub const KEY_BYTES_MAX: u64 = (1 << 16) - 1;
/// Alignment where `general.alignment` is absent.
pub const ALIGNMENT_DEFAULT_BYTES: u64 = 32;
/// The largest alignment believed: a 1 GiB page, the largest thing anybody could align to.
pub const ALIGNMENT_MAX_BYTES: u64 = 1 << 30;

/// Bytes of the shortest key and value: length, no text, type, one byte.
const KEY_VALUE_BYTES_MIN: u64 = 8 + 4 + 1;
/// Bytes of the shortest tensor info: name length, one letter, dimension count, type, offset.
const TENSOR_INFO_BYTES_MIN: u64 = 8 + 1 + 4 + 4 + 8;

/// Where this file stands in a split model (`split.no`, `split.count`, `split.tensors.count`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Which part this is, counted from 0.
    pub part_index: u32,
    /// Parts in all.
    pub part_count: u32,
    /// Tensors in all parts together, where the file says so.
    pub tensor_count: Option<u64>,
}

/// The header of one shard, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardHeader {
    /// The file.
    pub shard: Shard,
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// `general.alignment`, or its default.
    pub alignment_bytes: u64,
    /// The keys and their values, as far as they are kept.
    pub metadata: Metadata,
    /// Number of keys.
    pub key_count: u64,
    /// Where the keys and values lie in the file: these bytes as they are, behind a preamble of one's own, make a header.
    pub metadata_range: Range<u64>,
    /// The bytes of `metadata_range`, only after [`parse_shard_with_raw_metadata`]; else empty.
    pub raw_metadata: Vec<u8>,
    /// The tensors in the order of the file.
    pub tensors: Vec<TensorInfo>,
    /// Where the tensor data begin.
    pub data_offset_bytes: u64,
    /// Set when the file is part of a split model.
    pub split: Option<Split>,
}

/// Reads the header of the shard at `path`, `len_bytes` long, from `source`, which stands at the file's first byte. Consumes
/// the header's bytes and not one more.
///
/// # Errors
/// `Format` for what is no GGUF or contradicts itself, `Truncated` where the file ends before its data do, `Io` when
/// `source` fails. Each names the path, and the tensor and offset where there is one.
pub fn parse_shard(path: &Path, len_bytes: u64, source: &mut dyn Read) -> Result<ShardHeader> {
    parse(path, len_bytes, source, false)
}

/// [`parse_shard`], keeping the bytes of the keys and values: for a host that writes a header of its own.
///
/// # Errors
/// As [`parse_shard`].
pub fn parse_shard_with_raw_metadata(
    path: &Path,
    len_bytes: u64,
    source: &mut dyn Read,
) -> Result<ShardHeader> {
    parse(path, len_bytes, source, true)
}

fn parse(
    path: &Path,
    len_bytes: u64,
    source: &mut dyn Read,
    keep_raw: bool,
) -> Result<ShardHeader> {
    let mut cursor = Cursor {
        path,
        source,
        offset_bytes: 0,
        len_bytes,
        record: None,
    };
    let version = read_version(&mut cursor)?;
    let tensor_count = cursor.u64(format_args!("the tensor count"))?;
    let key_count = cursor.u64(format_args!("the key count"))?;
    cursor.bound_count(
        key_count,
        KEY_COUNT_MAX,
        KEY_VALUE_BYTES_MIN,
        format_args!("metadata keys"),
    )?;
    cursor.bound_count(
        tensor_count,
        TENSOR_COUNT_MAX,
        TENSOR_INFO_BYTES_MIN,
        format_args!("tensors"),
    )?;

    let metadata_start = cursor.offset_bytes;
    cursor.record = keep_raw.then(Vec::new);
    let metadata = read_metadata(&mut cursor, key_count)?;
    let raw_metadata = cursor.record.take().unwrap_or_default();
    let metadata_range = metadata_start..cursor.offset_bytes;
    let alignment_bytes = alignment(path, &metadata)?;

    let mut tensors = Vec::new();
    for index in 0..tensor_count {
        tensors.push(read_tensor_info(&mut cursor, index)?);
    }
    let data_offset_bytes = place_tensors(
        path,
        len_bytes,
        cursor.offset_bytes,
        alignment_bytes,
        &mut tensors,
    )?;
    check_layout(path, &tensors)?;
    Ok(ShardHeader {
        shard: Shard {
            path: path.to_path_buf(),
            len_bytes,
        },
        version,
        alignment_bytes,
        split: split(path, &metadata)?,
        metadata,
        key_count,
        metadata_range,
        raw_metadata,
        tensors,
        data_offset_bytes,
    })
}

fn read_version(cursor: &mut Cursor<'_>) -> Result<u32> {
    let path = cursor.path;
    let magic: [u8; 4] = cursor.array(format_args!("the magic"))?;
    if magic == *b"FLEA" {
        return Err(bad_format(
            path,
            "a model that flea pack --compress made, read as it lies; flea pack --decompress gives the GGUF back",
        ));
    }
    if magic != MAGIC {
        return Err(bad_format(
            path,
            format_args!("not a GGUF file: it begins with {magic:02x?}, not with \"GGUF\""),
        ));
    }
    let version = cursor.u32(format_args!("the version"))?;
    match version {
        2 | 3 => Ok(version),
        1 => Err(bad_format(
            path,
            "GGUF version 1 is no longer supported; convert the model again with a current llama.cpp",
        )),
        // Versions are small, so a big-endian file shows its version in the upper half.
        _ if version & 0xffff == 0 && version != 0 => Err(bad_format(
            path,
            format_args!(
                "a big-endian GGUF (version {}); convert it with gguf-convert-endian",
                version.swap_bytes()
            ),
        )),
        _ => Err(bad_format(
            path,
            format_args!("GGUF version {version} is unknown; versions 2 and 3 are supported"),
        )),
    }
}

fn read_metadata(cursor: &mut Cursor<'_>, key_count: u64) -> Result<Metadata> {
    let path = cursor.path;
    let mut metadata = Metadata::default();
    for index in 0..key_count {
        let at = cursor.offset_bytes;
        let key = cursor.text(KEY_BYTES_MAX, format_args!("key {index}"))?;
        if key.is_empty() {
            return Err(bad_format(
                path,
                format_args!("key {index} at offset {at} is empty"),
            ));
        }
        let number = cursor.u32(format_args!("the type of key '{key}'"))?;
        let value = read_value(cursor, number, &key)?;
        if metadata.get(&key).is_some() {
            return Err(bad_format(
                path,
                format_args!("key '{key}' at offset {at} is there twice"),
            ));
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

fn alignment(path: &Path, metadata: &Metadata) -> Result<u64> {
    let Some(value) = metadata.get("general.alignment") else {
        return Ok(ALIGNMENT_DEFAULT_BYTES);
    };
    match value {
        Value::Unsigned(bytes) if bytes.is_power_of_two() && *bytes <= ALIGNMENT_MAX_BYTES => {
            Ok(*bytes)
        }
        _ => Err(bad_format(
            path,
            format_args!(
                "general.alignment is {value:?}, which is no power of two up to {ALIGNMENT_MAX_BYTES}"
            ),
        )),
    }
}

fn split(path: &Path, metadata: &Metadata) -> Result<Option<Split>> {
    let Some(part_count) = metadata.unsigned("split.count") else {
        return Ok(None);
    };
    let part_index = metadata.unsigned("split.no").unwrap_or(0);
    // llama.cpp writes count 0 for a model that was merged again.
    if part_count <= 1 && part_index == 0 {
        return Ok(None);
    }
    if part_index >= part_count || part_count > u64::from(SHARD_COUNT_MAX) {
        return Err(bad_format(
            path,
            format_args!(
                "split.no is {part_index} of split.count {part_count}; at most {SHARD_COUNT_MAX} parts are possible"
            ),
        ));
    }
    Ok(Some(Split {
        part_index: part_index as u32,
        part_count: part_count as u32,
        tensor_count: metadata.unsigned("split.tensors.count"),
    }))
}

/// Reads one tensor info. Its offset still counts from the start of the data, which is known only after the last info.
fn read_tensor_info(cursor: &mut Cursor<'_>, index: u64) -> Result<TensorInfo> {
    let path = cursor.path;
    let at = cursor.offset_bytes;
    let name = cursor.text(TENSOR_NAME_MAX, format_args!("the name of tensor {index}"))?;
    if name.is_empty() {
        return Err(bad_format(
            path,
            format_args!("tensor {index} at header offset {at} has no name"),
        ));
    }
    let dims = cursor.u32(format_args!("the dimensions of tensor '{name}'"))?;
    if dims > 4 {
        return Err(bad_format(
            path,
            format_args!("tensor '{name}' at header offset {at} has {dims} dimensions; ggml has 4"),
        ));
    }
    let mut shape = [1_u64; 4];
    for extent in &mut shape[..dims as usize] {
        *extent = cursor.u64(format_args!("the shape of tensor '{name}'"))?;
    }
    let number = cursor.u32(format_args!("the type of tensor '{name}'"))?;
    let offset_bytes = cursor.u64(format_args!("the data offset of tensor '{name}'"))?;
    let Some(dtype) = DType::from_ggml(number) else {
        return Err(bad_format(
            path,
            format_args!("tensor '{name}' at header offset {at} has the unknown type {number}"),
        ));
    };
    if shape[0] % dtype.block_elements() != 0 {
        return Err(bad_format(
            path,
            format_args!(
                "tensor '{name}' at header offset {at} has rows of {} elements, no multiple of the {} that share a block of {dtype}",
                shape[0],
                dtype.block_elements()
            ),
        ));
    }
    Ok(TensorInfo {
        len_bytes: checked_len(path, &name, dtype, &shape)?,
        name,
        dtype,
        shape,
        dims,
        offset_bytes,
    })
}

fn checked_len(path: &Path, name: &str, dtype: DType, shape: &[u64; 4]) -> Result<u64> {
    shape
        .iter()
        .try_fold(1_u64, |product, &extent| product.checked_mul(extent))
        .filter(|&elements| elements <= ELEMENT_COUNT_MAX)
        .and_then(|_| dtype.tensor_bytes(shape))
        .ok_or_else(|| {
            bad_format(
                path,
                format_args!(
                    "tensor '{name}' of shape {shape:?} has more elements than ggml can count"
                ),
            )
        })
}

/// Turns offsets into the data into offsets into the file, and checks each against alignment and the file's end. Returns
/// where the data begin.
fn place_tensors(
    path: &Path,
    len_bytes: u64,
    header_end_bytes: u64,
    alignment_bytes: u64,
    tensors: &mut [TensorInfo],
) -> Result<u64> {
    let data_offset_bytes = align_up(header_end_bytes, alignment_bytes)
        .ok_or_else(|| bad_format(path, "the header ends beyond any file"))?;
    for tensor in tensors {
        let name = &tensor.name;
        if tensor.offset_bytes % alignment_bytes != 0 {
            return Err(bad_format(
                path,
                format_args!(
                    "tensor '{name}' has the data offset {}, no multiple of the alignment {alignment_bytes}",
                    tensor.offset_bytes
                ),
            ));
        }
        let Some(start) = data_offset_bytes.checked_add(tensor.offset_bytes) else {
            return Err(bad_format(
                path,
                format_args!(
                    "tensor '{name}' has the data offset {}, beyond any file",
                    tensor.offset_bytes
                ),
            ));
        };
        tensor.offset_bytes = start;
        let end = start.checked_add(tensor.len_bytes);
        if end.is_none_or(|end| end > len_bytes) {
            return Err(fault(
                ErrorKind::Truncated,
                path,
                format_args!(
                    "tensor '{name}' of {} bytes at offset {start} reaches beyond the file's {len_bytes} bytes; the file is incomplete, fetch it again",
                    tensor.len_bytes
                ),
            ));
        }
    }
    Ok(data_offset_bytes)
}
