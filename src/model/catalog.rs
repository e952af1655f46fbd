//! The catalog: what is in the files, as the plan needs it.
//!
//! Joins the headers of all shards and tells the layers of a pass, the experts and the row tables apart. Invariants: every
//! tensor's extent lies inside its shard and shares no byte with another; every byte a layer uses is in exactly one layer
//! (a cut head is cut between rows); extents of different layers never overlap; layers stand in the order of a pass.
//! Place in the house: **file -> catalog** -> plan -> reader -> pool -> lease -> host.

use super::build::Builder;
use super::roles::{Naming, Role};
use super::{DType, Metadata, Shard, bad_format, dtype, gguf, safetensors};
use crate::error::{Error, ErrorKind, Result};
use crate::units::Extent;
use std::collections::HashMap;
use std::ops::Range;

/// Two extents of one layer closer than this are read as one: at 2 GB/s 64 KiB takes as long as starting a request.
pub const EXTENT_GAP_BYTES: u64 = 64 << 10;

/// The format of a model's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// GGUF of this version.
    Gguf(u32),
    /// safetensors.
    Safetensors,
}

/// The layers that use a tensor, as indices into [`Catalog::layers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSpan {
    /// The first.
    pub first: u32,
    /// The last; more than the first only for a head that is cut.
    pub last: u32,
    /// Rows that each of them uses (the last one maybe fewer); 0 when the tensor is not cut.
    pub rows_per_layer: u64,
}

/// The routed experts a tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    /// The first one's number.
    pub first: u32,
    /// How many lie one behind the other in this tensor, all of one size.
    pub count: u32,
}

/// One tensor of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// The tensor's name, unique in the model.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Elements per dimension in ggml's order (the contiguous one first); unused dimensions are 1.
    pub shape: [u64; 4],
    /// Dimensions the file names, at most 4.
    pub dims: u32,
    /// Where it lies in its file.
    pub extent: Extent,
    /// What it is for.
    pub role: Role,
    /// True when the host keeps it, or the rows it needs of it, in memory of its own.
    pub host_kept: bool,
    /// The layers that use it. A tied embedding is kept by the host *and* used by the head; a tensor that neither has is
    /// not used at all (drafting layers that hosts skip).
    pub layers: Option<LayerSpan>,
    /// The routed experts it holds.
    pub experts: Option<Experts>,
}

impl Tensor {
    /// Rows of the tensor: the elements of all dimensions but the first.
    #[must_use]
    pub fn row_count(&self) -> u64 {
        self.shape[1] * self.shape[2] * self.shape[3]
    }

    /// Bytes of one row; `None` where rows are no whole number of blocks.
    #[must_use]
    pub fn row_bytes(&self) -> Option<u64> {
        self.dtype.row_bytes(self.shape[0])
    }

    /// Number of elements.
    #[must_use]
    pub fn element_count(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Where one expert lies, by its number in the layer.
    #[must_use]
    pub fn expert_extent(&self, expert_index: u32) -> Option<Extent> {
        let experts = self.experts?;
        let place = expert_index.checked_sub(experts.first)?;
        let each_bytes = self.extent.len_bytes / u64::from(experts.count.max(1));
        (place < experts.count).then_some(Extent {
            offset_bytes: self.extent.offset_bytes + u64::from(place) * each_bytes,
            len_bytes: each_bytes,
            ..self.extent
        })
    }
}

/// What a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// The block of this number.
    Block(u32),
    /// These rows of the output head; norm and bias are with the first piece.
    Head {
        /// First row.
        first_row: u64,
        /// Number of rows.
        row_count: u64,
    },
}

/// One tensor's bytes (or, of a cut head, its piece's) in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Use {
    /// The bytes.
    pub extent: Extent,
    /// The tensor, as index into [`Catalog::tensors`].
    pub tensor_index: u32,
    /// Its turn inside the layer: smaller is used earlier.
    pub order: u16,
}

/// The tensors used together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// What it is.
    pub kind: LayerKind,
    /// A short name: `blk.7`, `output[0..32000]`.
    pub label: String,
    /// Where it lies: sorted, disjoint, gaps under [`EXTENT_GAP_BYTES`] that no other layer uses merged.
    pub extents: Vec<Extent>,
    /// Its tensors, sorted by extent.
    pub uses: Vec<Use>,
    /// Bytes of its tensors.
    pub bytes: u64,
}

/// Tensors of one type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TypeShare {
    /// The type.
    pub dtype: DType,
    /// How many tensors have it.
    pub tensor_count: u64,
    /// Their elements.
    pub element_count: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What is in the files of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Catalog {
    /// The files' format.
    pub format: Format,
    /// `general.architecture`, or `model_type`; "unknown" where the files do not say.
    pub architecture: String,
    /// `general.name`.
    pub name: Option<String>,
    /// Alignment of the tensors in the first shard.
    pub alignment_bytes: u64,
    /// The files, in order.
    pub shards: Vec<Shard>,
    /// All tensors, in the order of shards and, in a shard, of its header.
    pub tensors: Vec<Tensor>,
    /// The layers in the order of a pass: blocks, then pieces of the head.
    pub layers: Vec<Layer>,
    /// Bytes of all tensors.
    pub model_bytes: u64,
    /// Bytes of the tensors the host keeps.
    pub host_tensor_bytes: u64,
    /// Bytes of tensors a pass never uses (drafting layers that hosts skip).
    pub unused_tensor_bytes: u64,
    /// Elements of all tensors.
    pub parameter_count: u64,
    /// The types of the tensors, by descending bytes.
    pub types: Vec<TypeShare>,
    /// Name of the quantisation mix (`general.file_type`).
    pub file_type: Option<&'static str>,
    /// Tokens of context the model was trained for.
    pub context_length: Option<u64>,
    /// Blocks the metadata promise.
    pub block_count: Option<u64>,
    /// Width of the residual stream.
    pub embedding_length: Option<u64>,
    /// Tokens of the vocabulary.
    pub vocabulary_size: Option<u64>,
    /// Routed experts per layer.
    pub expert_count: Option<u64>,
    /// Routed experts used per token.
    pub experts_used_count: Option<u64>,
    /// Experts every token uses.
    pub shared_expert_count: Option<u64>,
    /// True when the head multiplies with the token embedding.
    pub tied_embeddings: bool,
    /// Kept metadata of the first shard.
    pub metadata: Metadata,
    /// GGUF: number of keys and where keys and values lie in the first shard, for a host that writes a header of its own.
    pub metadata_range: Option<(u64, Range<u64>)>,
    /// Where each tensor stands among `tensors`.
    pub(super) by_name: HashMap<String, u32>,
}

impl Catalog {
    /// A tensor and its index, by name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<(usize, &Tensor)> {
        let index = *self.by_name.get(name)? as usize;
        Some((index, &self.tensors[index]))
    }

    /// The blocks among the layers.
    #[must_use]
    pub fn block_layer_count(&self) -> usize {
        self.layers
            .iter()
            .filter(|layer| matches!(layer.kind, LayerKind::Block(_)))
            .count()
    }

    /// Bytes a pass uses: all layers together.
    #[must_use]
    pub fn layer_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.bytes).sum()
    }

    /// Other layers in the place of this model's, without tensors: what a plan needs of a part of the model, or of the
    /// model laid out elsewhere. `model_bytes` stays, so that a percentage means the same.
    #[must_use]
    pub fn of_layers(&self, shards: Vec<Shard>, layers: Vec<Layer>) -> Self {
        Self {
            shards,
            layers,
            model_bytes: self.model_bytes,
            ..empty(self.format, self.architecture.clone())
        }
    }

    /// A metadata number below the architecture's name (`llama.block_count`).
    #[must_use]
    pub fn architecture_number(&self, key: &str) -> Option<u64> {
        self.metadata
            .unsigned(&format!("{}.{key}", self.architecture))
    }
}

/// The catalog of a GGUF model from the headers of all its parts, in order.
///
/// # Errors
/// `Format` when the parts do not belong together, a tensor is there twice, or there is none.
pub fn from_gguf(headers: Vec<gguf::ShardHeader>) -> Result<Catalog> {
    check_split(&headers)?;
    let first = headers.first().ok_or_else(no_files)?;
    let metadata = first.metadata.clone();
    let architecture = metadata
        .text("general.architecture")
        .unwrap_or("unknown")
        .to_owned();
    let number = |key: &str| metadata.unsigned(&format!("{architecture}.{key}"));
    let mut catalog = empty(Format::Gguf(first.version), architecture.clone());
    catalog.name = metadata.text("general.name").map(str::to_owned);
    catalog.alignment_bytes = first.alignment_bytes;
    catalog.file_type = metadata
        .unsigned("general.file_type")
        .and_then(dtype::file_type_name);
    catalog.context_length = number("context_length");
    catalog.block_count = number("block_count");
    catalog.embedding_length = number("embedding_length");
    catalog.vocabulary_size =
        number("vocab_size").or_else(|| metadata.array_count("tokenizer.ggml.tokens"));
    catalog.expert_count = number("expert_count").filter(|&count| count > 0);
    catalog.experts_used_count = number("expert_used_count").filter(|&count| count > 0);
    catalog.shared_expert_count = number("expert_shared_count").filter(|&count| count > 0);
    catalog.metadata_range = Some((first.key_count, first.metadata_range.clone()));
    let drafting = number("nextn_predict_layers").unwrap_or(0);
    catalog.metadata = metadata;
    let parts = headers
        .into_iter()
        .map(|header| (header.shard, header.tensors))
        .collect();
    Builder::new(catalog, Naming::Gguf, None, drafting, parts)?.build()
}

/// The catalog of a safetensors model from the headers of all its files, in the order of the index.
///
/// # Errors
/// `Format` when the files do not hold what the index says, a tensor is there twice, or there is none.
pub fn from_safetensors(
    headers: Vec<safetensors::ShardHeader>,
    index: Option<&safetensors::Index>,
    config: Option<&safetensors::Config>,
) -> Result<Catalog> {
    if let Some(index) = index {
        check_index(&headers, index)?;
    }
    let first = headers.first().ok_or_else(no_files)?;
    let config = config.cloned().unwrap_or_default();
    let architecture = config.architecture.unwrap_or_else(|| "unknown".to_owned());
    let mut catalog = empty(Format::Safetensors, architecture);
    // The format promises only that the header's length is a multiple of 8.
    catalog.alignment_bytes = 8;
    catalog.context_length = config.context_length;
    catalog.block_count = config.block_count;
    catalog.embedding_length = config.embedding_length;
    catalog.vocabulary_size = config.vocabulary_size;
    catalog.expert_count = config.expert_count.filter(|&count| count > 0);
    catalog.experts_used_count = config.experts_used_count.filter(|&count| count > 0);
    catalog.shared_expert_count = config.shared_expert_count.filter(|&count| count > 0);
    catalog.metadata = first.metadata.clone();
    let parts = headers
        .into_iter()
        .map(|header| (header.shard, header.tensors))
        .collect();
    Builder::new(
        catalog,
        Naming::HuggingFace,
        config.tied_embeddings,
        0,
        parts,
    )?
    .build()
}

fn no_files() -> Error {
    Error::new(ErrorKind::Invalid, "a model needs at least one file")
}

fn check_split(headers: &[gguf::ShardHeader]) -> Result<()> {
    let count = headers.len();
    for (place, header) in headers.iter().enumerate() {
        let path = &header.shard.path;
        let Some(split) = header.split else {
            if count > 1 {
                return Err(bad_format(
                    path,
                    format_args!("no part of a split model, but {count} files were given"),
                ));
            }
            continue;
        };
        if (split.part_index as usize, split.part_count as usize) != (place, count) {
            return Err(bad_format(
                path,
                format_args!(
                    "says it is part {} of {}, but it was opened as part {} of {count}; all parts must lie together under their own names (NAME-00001-of-{:05}.gguf)",
                    split.part_index + 1,
                    split.part_count,
                    place + 1,
                    split.part_count
                ),
            ));
        }
    }
    let Some(first) = headers.first() else {
        return Ok(());
    };
    let found: u64 = headers.iter().map(|h| h.tensors.len() as u64).sum();
    match first.split.and_then(|split| split.tensor_count) {
        Some(promised) if promised != found => Err(bad_format(
            &first.shard.path,
            format_args!("split.tensors.count is {promised}, but the parts hold {found} tensors"),
        )),
        _ => Ok(()),
    }
}

fn check_index(headers: &[safetensors::ShardHeader], index: &safetensors::Index) -> Result<()> {
    if headers.len() != index.shard_names.len() {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "the index names {} files, {} were given",
                index.shard_names.len(),
                headers.len()
            ),
        ));
    }
    let mut found = 0_usize;
    for (place, header) in headers.iter().enumerate() {
        for tensor in &header.tensors {
            if index.shard_of.get(&tensor.name) != Some(&(place as u32)) {
                return Err(bad_format(
                    &header.shard.path,
                    format_args!(
                        "the index does not place tensor '{}' in this file",
                        tensor.name
                    ),
                ));
            }
            found += 1;
        }
    }
    if found == index.shard_of.len() {
        return Ok(());
    }
    let there = |name: &str| {
        headers
            .iter()
            .any(|header| header.tensors.iter().any(|tensor| tensor.name == name))
    };
    let missing = index.shard_of.iter().find(|(name, _)| !there(name));
    let (name, place) = missing.map_or(("?", 0), |(name, &place)| (name.as_str(), place));
    Err(bad_format(
        &headers[place as usize].shard.path,
        format_args!("the index places tensor '{name}' in this file, but it is not there"),
    ))
}

/// A catalog of nothing, to be filled.
pub(super) fn empty(format: Format, architecture: String) -> Catalog {
    Catalog {
        format,
        architecture,
        name: None,
        alignment_bytes: 1,
        shards: Vec::new(),
        tensors: Vec::new(),
        layers: Vec::new(),
        model_bytes: 0,
        host_tensor_bytes: 0,
        unused_tensor_bytes: 0,
        parameter_count: 0,
        types: Vec::new(),
        file_type: None,
        context_length: None,
        block_count: None,
        embedding_length: None,
        vocabulary_size: None,
        expert_count: None,
        experts_used_count: None,
        shared_expert_count: None,
        tied_embeddings: false,
        metadata: Metadata::default(),
        metadata_range: None,
        by_name: HashMap::new(),
    }
}
