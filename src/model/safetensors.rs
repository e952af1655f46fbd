//! safetensors headers: one file, the index of a model in several files, and what is used of `config.json`.
//!
//! Invariants: the header's length is bounded ([`HEADER_BYTES_MAX`], the reference implementation's limit) and compared with
//! the file before it is believed; JSON is walked entry by entry, so that names given twice are seen; every offset is
//! checked here, with the tensor's name, and then once more by the `safetensors` crate.
//! Place in the house: **file -> catalog** -> plan -> reader -> pool -> lease -> host.

use super::cursor::Cursor;
use super::{
    DType, ELEMENT_COUNT_MAX, Metadata, SHARD_COUNT_MAX, Shard, TENSOR_COUNT_MAX, TENSOR_NAME_MAX,
    TensorInfo, Value, bad_format, check_layout, fault,
};
use crate::error::{Error, ErrorKind, Result};
use ::safetensors::tensor as reference;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use std::collections::HashMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Bytes of a header, and of an index or config file: what the reference implementation allows.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Bytes of the number that says how long the header is.
const LENGTH_BYTES: u64 = 8;
/// Dimensions of a tensor. Vision towers have five.
const DIMS_MAX: usize = 8;

/// The header of one safetensors file, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardHeader {
    /// The file.
    pub shard: Shard,
    /// The texts under `__metadata__`.
    pub metadata: Metadata,
    /// The tensors in the order of their offsets.
    pub tensors: Vec<TensorInfo>,
    /// Where the tensor data begin.
    pub data_offset_bytes: u64,
}

/// Reads the header of the file at `path`, `len_bytes` long, from `source`, which stands at the file's first byte. Consumes
/// the header's bytes and not one more.
///
/// # Errors
/// `Format` for what is no safetensors file or contradicts itself, `Truncated` where the file ends before its data do, `Io`
/// when `source` fails. Each names the path, and the tensor and offset where there is one.
pub fn parse_shard(path: &Path, len_bytes: u64, source: &mut dyn Read) -> Result<ShardHeader> {
    let mut cursor = Cursor {
        path,
        source,
        offset_bytes: 0,
        len_bytes,
        record: None,
    };
    let header_bytes = cursor.u64(format_args!("the header's length"))?;
    if header_bytes > HEADER_BYTES_MAX {
        return Err(bad_format(
            path,
            format_args!(
                "not a safetensors file: its header would be {header_bytes} bytes long; at most {HEADER_BYTES_MAX} are possible"
            ),
        ));
    }
    let text = cursor.bytes(header_bytes, format_args!("the header"))?;
    let entries: HeaderEntries = serde_json::from_slice(&text).map_err(|error| {
        bad_format(
            path,
            format_args!("the safetensors header is wrong: {error}"),
        )
    })?;
    let data_offset_bytes = LENGTH_BYTES + header_bytes;
    let mut pairs = entries.tensors.0;
    pairs.sort_by_key(|(_, info)| info.data_offsets);
    if pairs.len() as u64 > TENSOR_COUNT_MAX {
        return Err(bad_format(
            path,
            format_args!(
                "{} tensors; at most {TENSOR_COUNT_MAX} are possible",
                pairs.len()
            ),
        ));
    }
    let tensors = pairs
        .iter()
        .map(|(name, info)| tensor_info(path, len_bytes, data_offset_bytes, name, info))
        .collect::<Result<Vec<_>>>()?;
    check_layout(path, &tensors)?;
    check_cover(path, len_bytes, data_offset_bytes, &tensors)?;
    reference::Metadata::new(None, pairs).map_err(|error| {
        bad_format(
            path,
            format_args!("the safetensors header is wrong: {error}"),
        )
    })?;
    Ok(ShardHeader {
        shard: Shard {
            path: path.to_path_buf(),
            len_bytes,
        },
        metadata: entries.metadata,
        tensors,
        data_offset_bytes,
    })
}

fn tensor_info(
    path: &Path,
    len_bytes: u64,
    data_offset_bytes: u64,
    name: &str,
    info: &reference::TensorInfo,
) -> Result<TensorInfo> {
    let bad = |what: fmt::Arguments<'_>| bad_format(path, format_args!("tensor '{name}' {what}"));
    if name.is_empty() || name.len() as u64 > TENSOR_NAME_MAX {
        return Err(bad(format_args!(
            "has a name of {} bytes; 1 to {TENSOR_NAME_MAX} are possible",
            name.len()
        )));
    }
    if info.shape.len() > DIMS_MAX {
        return Err(bad(format_args!(
            "has {} dimensions; at most {DIMS_MAX} are possible",
            info.shape.len()
        )));
    }
    let dtype = dtype(info.dtype)
        .ok_or_else(|| bad(format_args!("has the type {}, unknown to flea", info.dtype)))?;
    // Counted in bits: elements narrower than a byte need not fill whole bytes row by row, only in all.
    let wanted_bytes = info
        .shape
        .iter()
        .try_fold(1_u64, |product, &extent| product.checked_mul(extent as u64))
        .filter(|&elements| elements <= ELEMENT_COUNT_MAX)
        .and_then(|elements| elements.checked_mul(info.dtype.bitsize() as u64))
        .filter(|bits| bits % 8 == 0)
        .map(|bits| bits / 8)
        .ok_or_else(|| bad(format_args!("has the impossible shape {:?}", info.shape)))?;
    let (begin, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
    if end.checked_sub(begin) != Some(wanted_bytes) {
        return Err(bad(format_args!(
            "lies at data offsets {begin} to {end}, but {dtype} {:?} takes {wanted_bytes} bytes",
            info.shape
        )));
    }
    if end > len_bytes - data_offset_bytes {
        return Err(fault(
            ErrorKind::Truncated,
            path,
            format_args!(
                "tensor '{name}' at data offsets {begin} to {end} reaches beyond the file's {len_bytes} bytes; the file is incomplete, fetch it again"
            ),
        ));
    }
    Ok(TensorInfo {
        name: name.to_owned(),
        dtype,
        shape: ggml_shape(&info.shape),
        dims: info.shape.len().min(4) as u32,
        offset_bytes: data_offset_bytes + begin,
        len_bytes: wanted_bytes,
    })
}

/// ggml's order is the reverse; outer dimensions beyond four fold into the last. The product is checked already.
fn ggml_shape(shape: &[usize]) -> [u64; 4] {
    let mut folded = [1_u64; 4];
    for (index, &extent) in shape.iter().rev().enumerate() {
        folded[index.min(3)] = folded[index.min(3)].saturating_mul(extent as u64);
    }
    folded
}

/// The format wants the data covered without holes, up to the last byte of the file.
fn check_cover(
    path: &Path,
    len_bytes: u64,
    data_offset_bytes: u64,
    tensors: &[TensorInfo],
) -> Result<()> {
    let mut expected = data_offset_bytes;
    for tensor in tensors {
        if tensor.offset_bytes != expected {
            return Err(bad_format(
                path,
                format_args!(
                    "tensor '{}' begins at offset {}, but the tensor before it ends at {expected}",
                    tensor.name, tensor.offset_bytes
                ),
            ));
        }
        expected = tensor.end_bytes();
    }
    if expected != len_bytes {
        return Err(bad_format(
            path,
            format_args!("the tensors end at offset {expected}, the file at {len_bytes}"),
        ));
    }
    Ok(())
}

fn dtype(dtype: reference::Dtype) -> Option<DType> {
    use reference::Dtype as D;
    Some(match dtype {
        D::BOOL => DType::BOOL,
        D::F4 => DType::F4,
        D::F6_E2M3 => DType::F6_E2M3,
        D::F6_E3M2 => DType::F6_E3M2,
        D::U8 => DType::U8,
        D::I8 => DType::I8,
        D::F8_E5M2 => DType::F8_E5M2,
        D::F8_E4M3 => DType::F8_E4M3,
        D::F8_E8M0 => DType::F8_E8M0,
        D::F8_E4M3FNUZ => DType::F8_E4M3FNUZ,
        D::F8_E5M2FNUZ => DType::F8_E5M2FNUZ,
        D::I16 => DType::I16,
        D::U16 => DType::U16,
        D::F16 => DType::F16,
        D::BF16 => DType::BF16,
        D::I32 => DType::I32,
        D::U32 => DType::U32,
        D::F32 => DType::F32,
        D::C64 => DType::C64,
        D::F64 => DType::F64,
        D::I64 => DType::I64,
        D::U64 => DType::U64,
        _ => return None,
    })
}

/// The entries of a JSON object in their order, also those whose name is there twice.
struct Pairs<V>(Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Pairs<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Walk<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Walk<V> {
            type Value = Pairs<V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Pairs<V>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    let value = map
                        .next_value()
                        .map_err(|error| A::Error::custom(format_args!("'{key}': {error}")))?;
                    pairs.push((key, value));
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Walk(std::marker::PhantomData))
    }
}

/// A header: tensors by name, and `__metadata__` among them.
struct HeaderEntries {
    metadata: Metadata,
    tensors: Pairs<reference::TensorInfo>,
}

impl<'de> Deserialize<'de> for HeaderEntries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Walk;
        impl<'de> Visitor<'de> for Walk {
            type Value = HeaderEntries;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<HeaderEntries, A::Error> {
                let mut metadata = Metadata::default();
                let mut tensors = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    if key == "__metadata__" {
                        for (key, text) in map.next_value::<Pairs<String>>()?.0 {
                            metadata.insert(key, Value::Text(text));
                        }
                        continue;
                    }
                    let info = map.next_value().map_err(|error| {
                        A::Error::custom(format_args!("tensor '{key}': {error}"))
                    })?;
                    tensors.push((key, info));
                }
                Ok(HeaderEntries {
                    metadata,
                    tensors: Pairs(tensors),
                })
            }
        }
        deserializer.deserialize_map(Walk)
    }
}

/// The index of a model in several files (`model.safetensors.index.json`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// The files, by name, in the order of their names; they lie beside the index.
    pub shard_names: Vec<String>,
    /// Which of them each tensor is in.
    pub shard_of: HashMap<String, u32>,
}

#[derive(serde::Deserialize)]
struct IndexFile {
    weight_map: Pairs<String>,
}

impl Index {
    /// The files' paths, beside the index at `path`.
    #[must_use]
    pub fn shard_paths(&self, path: &Path) -> Vec<PathBuf> {
        self.shard_names
            .iter()
            .map(|name| path.with_file_name(name))
            .collect()
    }
}

/// Reads an index. The caller has bounded `json` by [`HEADER_BYTES_MAX`] before reading the file.
///
/// # Errors
/// `Format` when it is no index, names a tensor twice, or names a file that does not lie beside it.
pub fn parse_index(path: &Path, json: &[u8]) -> Result<Index> {
    bound_json(path, json)?;
    let wrong = |error: &dyn fmt::Display| -> Error {
        bad_format(
            path,
            format_args!("the safetensors index is wrong: {error}"),
        )
    };
    let file: IndexFile = serde_json::from_slice(json).map_err(|error| wrong(&error))?;
    let pairs = file.weight_map;
    let mut shard_names: Vec<String> = pairs.0.iter().map(|(_, file)| file.clone()).collect();
    shard_names.sort_unstable();
    shard_names.dedup();
    if shard_names.is_empty() || shard_names.len() > SHARD_COUNT_MAX as usize {
        return Err(wrong(&format_args!(
            "it names {} files; 1 to {SHARD_COUNT_MAX} are possible",
            shard_names.len()
        )));
    }
    if let Some(name) = shard_names.iter().find(|name| !is_plain_file_name(name)) {
        return Err(wrong(&format_args!(
            "'{}' is no plain file name; parts lie beside their index",
            name.escape_debug()
        )));
    }
    let mut shard_of = HashMap::new();
    for (tensor, file) in pairs.0 {
        let shard = shard_names.binary_search(&file).unwrap_or_default() as u32;
        if let Some(other) = shard_of.insert(tensor, shard) {
            return Err(wrong(&format_args!(
                "a tensor is there twice, the second time in '{file}' after '{}'",
                shard_names[other as usize]
            )));
        }
    }
    Ok(Index {
        shard_names,
        shard_of,
    })
}

/// An index may not lead out of its own directory.
fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty()
        && name != "."
        && name != ".."
        && !name.contains(['/', '\\', '\0'])
        && name.len() <= 255
}

fn bound_json(path: &Path, json: &[u8]) -> Result<()> {
    if json.len() as u64 > HEADER_BYTES_MAX {
        return Err(bad_format(
            path,
            format_args!("longer than the {HEADER_BYTES_MAX} bytes that are possible"),
        ));
    }
    Ok(())
}

/// What flea uses of a model's `config.json`. All of it is optional: the tensors alone make a catalog.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// `model_type`.
    pub architecture: Option<String>,
    /// `max_position_embeddings`.
    pub context_length: Option<u64>,
    /// `num_hidden_layers`.
    pub block_count: Option<u64>,
    /// `hidden_size`.
    pub embedding_length: Option<u64>,
    /// `num_experts`, `num_local_experts` or `n_routed_experts`.
    pub expert_count: Option<u64>,
    /// `num_experts_per_tok`.
    pub experts_used_count: Option<u64>,
    /// `n_shared_experts`.
    pub shared_expert_count: Option<u64>,
    /// `vocab_size`.
    pub vocabulary_size: Option<u64>,
    /// `tie_word_embeddings`.
    pub tied_embeddings: Option<bool>,
}

/// Reads a `config.json`; values of multimodal models are looked up in their `text_config` first.
///
/// # Errors
/// `Format` when it is no JSON object.
pub fn parse_config(path: &Path, json: &[u8]) -> Result<Config> {
    bound_json(path, json)?;
    let top: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(json)
        .map_err(|error| bad_format(path, format_args!("config.json is wrong: {error}")))?;
    let text = top.get("text_config").and_then(|value| value.as_object());
    let get = |key: &str| text.and_then(|text| text.get(key)).or_else(|| top.get(key));
    let number = |keys: &[&str]| {
        keys.iter()
            .find_map(|key| get(key).and_then(serde_json::Value::as_u64))
    };
    Ok(Config {
        architecture: top
            .get("model_type")
            .and_then(|value| value.as_str())
            .map(str::to_owned),
        context_length: number(&["max_position_embeddings", "n_positions"]),
        block_count: number(&["num_hidden_layers", "n_layer"]),
        embedding_length: number(&["hidden_size", "n_embd"]),
        expert_count: number(&["num_experts", "num_local_experts", "n_routed_experts"]),
        experts_used_count: number(&["num_experts_per_tok"]),
        shared_expert_count: number(&["n_shared_experts"]),
        vocabulary_size: number(&["vocab_size"]),
        tied_embeddings: get("tie_word_embeddings").and_then(serde_json::Value::as_bool),
    })
}
