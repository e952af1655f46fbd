//! A catalog as rows of a table: how it travels from the daemon to a client, page by page.
//!
//! Only what a client needs to find tensors and layers is kept; metadata, tokenizer and statistics stay behind. The
//! receiving side checks every index and range again. Place in the house: **file -> catalog** -> plan -> reader ->
//! pool -> lease -> host.

use super::{Catalog, DType, Format, Layer, LayerKind, LayerSpan, Role, Shard, Tensor, Use};
use crate::error::{Error, ErrorKind, Result};
use crate::units::Extent;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// One row. What a row is stands in its first field, `kind`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// The model; always the first row.
    Model {
        /// `general.architecture`.
        architecture: String,
        /// Files that follow.
        shards: u32,
        /// Tensors that follow.
        tensors: u32,
        /// Layers that follow.
        layers: u32,
    },
    /// One file.
    Shard {
        /// Where it lies, for people; not to be opened.
        path: String,
        /// Its length.
        bytes: u64,
    },
    /// One tensor.
    Tensor {
        /// Its name.
        name: String,
        /// Name of its type.
        dtype: String,
        /// Elements per dimension, the contiguous one first.
        shape: [u64; 4],
        /// How many of them count.
        dims: u32,
        /// Its file.
        shard: u32,
        /// First byte in the file.
        offset: u64,
        /// Its length.
        bytes: u64,
        /// The host keeps it, or rows of it, itself.
        host: bool,
        /// First layer, last layer, rows per layer; absent when no layer uses it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        layers: Option<(u32, u32, u64)>,
    },
    /// One layer.
    Layer {
        /// A short name.
        label: String,
        /// Its bytes.
        bytes: u64,
        /// Number of the block; absent for a piece of the output head.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        block: Option<u32>,
        /// First row and rows of a piece of the output head.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        head: Option<(u64, u64)>,
    },
    /// A tensor's bytes in a layer.
    Use {
        /// The layer.
        layer: u32,
        /// The tensor.
        tensor: u32,
        /// The file.
        shard: u32,
        /// First byte in the file.
        offset: u64,
        /// Their length.
        bytes: u64,
    },
    /// A range of a file that a layer lies in.
    Extent {
        /// The layer.
        layer: u32,
        /// The file.
        shard: u32,
        /// First byte in the file.
        offset: u64,
        /// Its length.
        bytes: u64,
    },
}

/// All rows of a catalog, in the order in which they are sent.
pub fn rows(catalog: &Catalog) -> impl Iterator<Item = Record> + '_ {
    let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
    let model = Record::Model {
        architecture: catalog.architecture.clone(),
        shards: count(catalog.shards.len()),
        tensors: count(catalog.tensors.len()),
        layers: count(catalog.layers.len()),
    };
    let shards = catalog.shards.iter().map(|shard| Record::Shard {
        path: shard.path.display().to_string(),
        bytes: shard.len_bytes,
    });
    let layers = catalog.layers.iter().map(|layer| Record::Layer {
        label: layer.label.clone(),
        bytes: layer.bytes,
        block: match layer.kind {
            LayerKind::Block(block) => Some(block),
            LayerKind::Head { .. } => None,
        },
        head: match layer.kind {
            LayerKind::Block(_) => None,
            LayerKind::Head {
                first_row,
                row_count,
            } => Some((first_row, row_count)),
        },
    });
    std::iter::once(model)
        .chain(shards)
        .chain(catalog.tensors.iter().map(tensor_row))
        .chain(layers)
        .chain((0u32..).zip(&catalog.layers).flat_map(layer_rows))
}

fn tensor_row(tensor: &Tensor) -> Record {
    Record::Tensor {
        name: tensor.name.clone(),
        dtype: tensor.dtype.name().to_owned(),
        shape: tensor.shape,
        dims: tensor.dims,
        shard: tensor.extent.shard_index,
        offset: tensor.extent.offset_bytes,
        bytes: tensor.extent.len_bytes,
        host: tensor.host_kept,
        layers: tensor
            .layers
            .map(|span| (span.first, span.last, span.rows_per_layer)),
    }
}

fn layer_rows((index, layer): (u32, &Layer)) -> impl Iterator<Item = Record> + '_ {
    let uses = layer.uses.iter().map(move |used| Record::Use {
        layer: index,
        tensor: used.tensor_index,
        shard: used.extent.shard_index,
        offset: used.extent.offset_bytes,
        bytes: used.extent.len_bytes,
    });
    let extents = layer.extents.iter().map(move |extent| Record::Extent {
        layer: index,
        shard: extent.shard_index,
        offset: extent.offset_bytes,
        bytes: extent.len_bytes,
    });
    uses.chain(extents)
}

/// Puts a catalog together again.
///
/// # Errors
/// `Format` when the rows contradict one another.
pub fn catalog(rows: impl IntoIterator<Item = Record>) -> Result<Catalog> {
    let mut catalog = super::catalog::empty(Format::Gguf(3), String::new());
    let mut promised = (0, 0, 0);
    for row in rows {
        match row {
            Record::Model {
                architecture,
                shards,
                tensors,
                layers,
            } => {
                catalog.architecture = architecture;
                promised = (shards as usize, tensors as usize, layers as usize);
            }
            row => add(&mut catalog, row)?,
        }
    }
    let found = (
        catalog.shards.len(),
        catalog.tensors.len(),
        catalog.layers.len(),
    );
    if found != promised {
        return Err(wrong(format!(
            "{promised:?} parts promised, {found:?} came"
        )));
    }
    Ok(catalog)
}

fn add(catalog: &mut Catalog, row: Record) -> Result<()> {
    match row {
        Record::Model { .. } => {}
        Record::Shard { path, bytes } => catalog.shards.push(Shard {
            path: PathBuf::from(path),
            len_bytes: bytes,
        }),
        Record::Tensor {
            name,
            dtype,
            shape,
            dims,
            shard,
            offset,
            bytes,
            host,
            layers,
        } => {
            let tensor = Tensor {
                dtype: DType::from_name(&dtype)
                    .ok_or_else(|| wrong(format!("'{name}' has the unknown type {dtype}")))?,
                name,
                shape,
                dims,
                extent: extent(catalog, shard, offset, bytes)?,
                role: Role::Other,
                host_kept: host,
                layers: layers.map(|(first, last, rows_per_layer)| LayerSpan {
                    first,
                    last,
                    rows_per_layer,
                }),
                experts: None,
            };
            add_tensor(catalog, tensor);
        }
        Record::Layer {
            label,
            bytes,
            block,
            head,
        } => catalog.layers.push(Layer {
            kind: match (block, head) {
                (Some(block), None) => LayerKind::Block(block),
                (None, Some((first_row, row_count))) => LayerKind::Head {
                    first_row,
                    row_count,
                },
                _ => return Err(wrong(format!("layer '{label}' is neither block nor head"))),
            },
            label,
            extents: Vec::new(),
            uses: Vec::new(),
            bytes,
        }),
        Record::Use {
            layer,
            tensor,
            shard,
            offset,
            bytes,
        } => {
            let extent = extent(catalog, shard, offset, bytes)?;
            if tensor as usize >= catalog.tensors.len() {
                return Err(wrong(format!("no tensor {tensor}")));
            }
            let layer = layer_of(catalog, layer)?;
            let order = u16::try_from(layer.uses.len()).unwrap_or(u16::MAX);
            layer.uses.push(Use {
                extent,
                tensor_index: tensor,
                order,
            });
        }
        Record::Extent {
            layer,
            shard,
            offset,
            bytes,
        } => {
            let extent = extent(catalog, shard, offset, bytes)?;
            layer_of(catalog, layer)?.extents.push(extent);
        }
    }
    Ok(())
}

fn add_tensor(catalog: &mut Catalog, tensor: Tensor) {
    catalog.model_bytes += tensor.extent.len_bytes;
    if tensor.host_kept {
        catalog.host_tensor_bytes += tensor.extent.len_bytes;
    }
    let index = u32::try_from(catalog.tensors.len()).unwrap_or(u32::MAX);
    catalog.by_name.insert(tensor.name.clone(), index);
    catalog.tensors.push(tensor);
}

fn layer_of(catalog: &mut Catalog, layer: u32) -> Result<&mut Layer> {
    catalog
        .layers
        .get_mut(layer as usize)
        .ok_or_else(|| wrong(format!("no layer {layer}")))
}

fn extent(catalog: &Catalog, shard: u32, offset: u64, bytes: u64) -> Result<Extent> {
    let found = catalog.shards.get(shard as usize);
    let end = offset.checked_add(bytes);
    match (found, end) {
        (Some(found), Some(end)) if end <= found.len_bytes => Ok(Extent {
            shard_index: shard,
            offset_bytes: offset,
            len_bytes: bytes,
        }),
        _ => Err(wrong(format!(
            "{bytes} bytes at {offset} are not in shard {shard}"
        ))),
    }
}

fn wrong(what: String) -> Error {
    Error::new(
        ErrorKind::Format,
        format!("the daemon's catalog contradicts itself: {what}"),
    )
}
